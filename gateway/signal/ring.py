"""The newest samples of a stream, sample-major, in memory that is allocated once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class SampleRing:
    """Holds at least the last `kept` samples of `channel_count` channels, float64.

    The newest samples always lie in one piece: when the end is reached they move to the front,
    which costs less than a wrapped read in every step.
    """

    def __init__(self, kept: int, appended_max: int, channel_count: int) -> None:
        """`appended_max`: most samples that one `append` may bring."""
        self._kept = kept
        self._rows: NDArray[np.float64] = np.zeros((2 * kept + appended_max, channel_count))
        self._end = 0
        self.appended_max = appended_max

    def clear(self) -> None:
        """Forget all samples."""
        self._end = 0

    def __len__(self) -> int:
        """Samples that `newest` can give."""
        return self._end

    def append(self, samples: NDArray[np.float64]) -> None:
        """Add samples (n, channels), n up to `appended_max`."""
        count = samples.shape[0]
        if self._end + count > self._rows.shape[0]:
            self._rows[: self._kept] = self._rows[self._end - self._kept : self._end]
            self._end = self._kept
        self._rows[self._end : self._end + count] = samples
        self._end += count

    def newest(self, count: int) -> NDArray[np.float64]:
        """View (count, channels) of the newest samples, oldest first; valid until the next `append`."""
        return self._rows[self._end - count : self._end]
