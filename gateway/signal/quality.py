"""Which samples of which electrodes are usable, and the bit set in which that travels (`gateway.samples.QUALITY`).

Pure: arrays in, arrays out, sample-major.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gateway.samples import QUALITY_BITS

COUNTS_24_BIT = (-8_388_608, 8_388_607)
"""Full scale of a 24-bit two's complement converter: a count there says nothing about the electrode any more."""


def railed(counts: NDArray[np.integer], full_scale: tuple[int, int] = COUNTS_24_BIT) -> NDArray[np.bool_]:
    """True where a converter stood at an end of its range.

    `counts`: integers (n, channels). Returns bool of the same shape.
    """
    low, high = full_scale
    return (counts <= low) | (counts >= high)


def quality_bits(bad: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The quality field of n samples: bit k set where electrode k is not usable.

    `bad`: bool (n, channels). Returns int64 (n,). Electrodes beyond the 63rd have no bit.
    """
    held = bad[:, :QUALITY_BITS]
    weights = np.left_shift(np.int64(1), np.arange(held.shape[1], dtype=np.int64))
    return held.astype(np.int64) @ weights


def unusable(quality: NDArray[np.int64], channel_count: int) -> NDArray[np.bool_]:
    """The inverse of `quality_bits`: bool (n, channel_count) from int64 (n,); False beyond the 63rd electrode."""
    held = min(channel_count, QUALITY_BITS)
    bad = np.zeros((quality.shape[0], channel_count), dtype=np.bool_)
    bad[:, :held] = (quality[:, np.newaxis] >> np.arange(held, dtype=np.int64)) & 1
    return bad
