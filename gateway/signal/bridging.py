"""Short gaps in EEG, bridged for the features alone, and never in what is stored.

Pure: samples in, samples out, sample-major; knows no clock and no device.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gateway.signal.bands import SEGMENT_S, samples_in
from gateway.signal.electrodes import MAINS_HZ
from gateway.signal.state import UV_MAX

HUM_S = 0.2
"""What the hum is fitted to: whole periods of 50 and of 60 Hz, and too short for the mains' own drift to matter. A
straight line through 60 Hz at 250 Hz misses by the hum's whole amplitude, in all bands: on a Cyton whose electrodes
hear ten times more hum than EEG, 1 % of lost samples then move delta and entropy by 0.05 instead of 0.001."""
HUM_SHARE_MIN = 0.5
"""Of the samples in `HUM_S`: with fewer usable ones there is no fit, and the line is straight."""
BRIDGE_S = 0.05
"""Half a period of alpha: a straight line keeps what is slower. Holds a Muse's packet (12 samples at 256 Hz), and 12
samples in a row of a Cyton, whose losses are mostly of one."""
SHARE_MAX = 0.1
"""Of a segment: a tenth of straight lines takes no more than about a tenth of the power from any band."""


@dataclass(frozen=True, slots=True)
class Bridged:
    """Consecutive samples, of which nothing will change any more."""

    uv: NDArray[np.float64]
    """uV (n, channels)."""
    bad: NDArray[np.bool_]
    """Not usable, (n, channels)."""
    lost: NDArray[np.bool_] | None = None
    """Not usable because they did not come, (n, channels); None: there are none."""

    def __len__(self) -> int:
        return len(self.uv)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Samples as they are worked on, each (n, channels)."""

    uv: NDArray[np.float64]
    bad: NDArray[np.bool_]
    absent: NDArray[np.bool_]
    """It is not decided yet what becomes of them."""
    lost: NDArray[np.bool_]

    def __getitem__(self, rows: slice) -> _Rows:
        return _Rows(self.uv[rows], self.bad[rows], self.absent[rows], self.lost[rows])


class GapBridge:
    """Bridges the gaps of one stream.

    The rule. A gap of up to `BRIDGE_S`, of one electrode or of all, becomes a straight line between the samples beside
    it, with the mains hum of just before on it, if both are usable and no more than `SHARE_MAX` of the electrode's
    newest second is bridged then. Any other gap is fed as so many unusable samples: the time axis stays true, and no
    segment that holds one counts. Whatever lies before a gap comes out at once, and with no gap nothing waits; what is
    held for the sample after a gap is never more than `BRIDGE_S`.

    Real recordings with 1 % of their packets lost, without bridging and with it (`test_lossy_streams`; differences of
    a field from the stream without losses: its median, and of the eight fields the largest):

                                        grid points with a state    with coherence    difference
    Cyton                               10 % -> 100 %               0 % -> 100 %      0.005
    Muse, each electrode by itself      99 % -> 100 %               20 % -> 100 %     0.011
    Muse, all electrodes together       82 % -> 100 %               47 % -> 100 %     0.002
    """

    def __init__(self, rate_hz: float, channel_count: int) -> None:
        self._longest = math.floor(BRIDGE_S * rate_hz)
        self._second = samples_in(SEGMENT_S, rate_hz)
        self._bridged_max = math.floor(SHARE_MAX * self._second)
        self._channel_count = channel_count
        self._held = self._none()
        self._hum_samples = samples_in(HUM_S, rate_hz)
        self._hum = _hum(rate_hz, self._hum_samples, self._longest)
        self._recent: deque[tuple[NDArray[np.float64], NDArray[np.bool_]]] = deque()
        """uV and whether bad of the newest samples that came out, `HUM_S` or a little more, in pieces."""
        self._recent_count = 0
        self._count = 0
        """Samples that came out so far."""
        self._bridged: list[deque[tuple[int, int]]] = [deque() for _ in range(channel_count)]
        """The newest bridged gaps of each channel: number of the sample after, and length."""

    def push(self, uv: NDArray[np.float64], bad: NDArray[np.bool_], absent: NDArray[np.bool_] | None = None) -> Bridged:
        """Take the next samples, uV (n, channels) and whether unusable; give out those that are decided.

        `absent`: bool (n, channels), those that did not come; None: all did.
        """
        if absent is None and not len(self._held.uv):
            self._remember(uv, bad)
            return Bridged(uv, bad)
        gone = np.zeros(uv.shape, np.bool_) if absent is None else absent
        return self._decide(uv, bad | gone, gone)

    def miss(self, count: int) -> Bridged:
        """So many samples of all channels did not come."""
        shape = (count, self._channel_count)
        return self._decide(np.full(shape, np.nan), np.ones(shape, np.bool_), np.ones(shape, np.bool_))

    def give_up(self) -> Bridged:
        """What is held, with gaps that nothing follows."""
        held, self._held = self._held, self._none()
        self._remember(held.uv, held.bad)
        return Bridged(held.uv, held.bad, held.lost | held.absent)

    def reset(self) -> None:
        """Forget all samples: what follows does not follow on them."""
        self._held = self._none()
        self._recent.clear()
        self._recent_count = 0
        for gaps in self._bridged:
            gaps.clear()

    def _none(self) -> _Rows:
        empty = np.zeros((0, self._channel_count), np.bool_)
        return _Rows(empty.astype(np.float64), empty, empty, empty)

    def _remember(self, uv: NDArray[np.float64], bad: NDArray[np.bool_]) -> None:
        if not len(uv):
            return
        self._count += len(uv)
        self._recent.append((uv, bad))
        self._recent_count += len(uv)
        while self._recent_count - len(self._recent[0][0]) >= self._hum_samples:
            self._recent_count -= len(self._recent.popleft()[0])

    def _decide(self, uv: NDArray[np.float64], bad: NDArray[np.bool_], absent: NDArray[np.bool_]) -> Bridged:
        held = self._held
        known = self._recent_count
        nothing = np.zeros((known, self._channel_count), np.bool_)
        rows = _Rows(
            np.concatenate([*(piece for piece, _ in self._recent), held.uv, uv]),
            np.concatenate([*(piece for _, piece in self._recent), held.bad, bad]),
            np.concatenate([nothing, held.absent, absent]),
            np.concatenate([nothing, held.lost, np.zeros(uv.shape, np.bool_)]),
        )
        decided = len(rows.uv)
        for channel in np.flatnonzero(rows.absent.any(axis=0)).tolist():
            for start, stop in _runs(rows.absent[:, channel]):
                if not self._close(rows, channel, start, stop, self._count - known):
                    decided = min(decided, start)
        self._held = rows[decided:]
        out = rows[known:decided]
        self._remember(out.uv, out.bad)
        return Bridged(out.uv, out.bad, out.lost)

    def _close(self, rows: _Rows, channel: int, start: int, stop: int, first: int) -> bool:
        """Bridge a gap, or call it lost; False while that depends on the sample after it. `first`: number of row 0."""
        count = stop - start
        possible = start > 0 and _usable(rows, channel, start - 1) and self._may_bridge(channel, first + start, count)
        if possible and stop == len(rows.uv):
            return False
        gap = slice(start, stop)
        rows.absent[gap, channel] = False
        if not possible or not _usable(rows, channel, stop):
            rows.lost[gap, channel] = True
            return True
        hum = self._hum_uv(rows, channel, start, count)
        before, after = rows.uv[start - 1, channel] - hum[0], rows.uv[stop, channel] - hum[-1]
        line = before + (after - before) * (np.arange(1, count + 1) / (count + 1))
        rows.uv[gap, channel] = line + hum[1:-1]
        rows.bad[gap, channel] = False
        self._bridged[channel].append((first + stop, count))
        return True

    def _hum_uv(self, rows: _Rows, channel: int, start: int, count: int) -> NDArray[np.float64]:
        """The hum from the sample before a gap to the one after it, by least squares over what lies before."""
        fitted = min(start, self._hum_samples)
        before = slice(start - fitted, start)
        usable = ~rows.bad[before, channel]
        if np.count_nonzero(usable) < HUM_SHARE_MIN * self._hum_samples:
            return np.zeros(count + 2)
        terms = self._hum[self._hum_samples - fitted : self._hum_samples][usable]
        weights = np.linalg.lstsq(terms, rows.uv[before, channel][usable], rcond=None)[0]
        ahead = self._hum[self._hum_samples - 1 : self._hum_samples + count + 1]
        return np.asarray(ahead[:, 2:] @ weights[2:], dtype=np.float64)

    def _may_bridge(self, channel: int, number: int, count: int) -> bool:
        """Whether the gap, from sample `number` on, and the second before it have no more than their share."""
        gaps = self._bridged[channel]
        while gaps and gaps[0][0] <= number - self._second:
            gaps.popleft()
        return count <= self._longest and count + sum(length for _, length in gaps) <= self._bridged_max


def _usable(rows: _Rows, channel: int, row: int) -> bool:
    """Whether a sample beside a gap is one to go by."""
    return not rows.bad[row, channel] and bool(abs(rows.uv[row, channel]) <= UV_MAX)


def _hum(rate_hz: float, before: int, longest: int) -> NDArray[np.float64]:
    """A constant, a slope, and the mains' sines and cosines: from so many samples before a gap to the one after."""
    number = np.arange(-before, longest + 1)
    turns = [2 * np.pi * mains_hz / rate_hz * number for mains_hz in MAINS_HZ]
    waves = [wave(turn) for turn in turns for wave in (np.cos, np.sin)]
    return np.stack([np.ones(len(number)), number / before, *waves], axis=1)


def _runs(marked: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Start and stop of each run of True, in order."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], marked, [False]]).astype(np.int8)))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]
