"""What every implementation of the features gives, and which samples all of them refuse."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

UV_MAX = 1e8
"""100 V: no electrode delivers more, so such a sample is not usable; its square must not overflow float32 either."""


@dataclass(frozen=True, slots=True)
class Features:
    """One brain state. NaN: no value. Powers are shares that sum to 1, the rest lies in 0..1."""

    delta: float
    theta: float
    alpha: float
    beta: float
    gamma: float
    coherence: float
    """Magnitude-squared, bias removed, mean over the good pairs, in the coherence band."""
    plv: float
    """Mean over the good pairs, in the coherence band."""
    entropy: float


@dataclass(frozen=True, slots=True)
class WindowFeatures:
    """Features of one window. NaN for a channel that is flat or has an unusable sample, and for its pairs.

    Pairs stand in the order of `numpy.triu_indices(channels, 1)`.
    """

    relative_power: NDArray[np.float64]
    """Share of each band in the power of all of them, (bands, channels)."""
    entropy: NDArray[np.float64]
    """(channels,)"""
    coherence: NDArray[np.float64]
    """Magnitude-squared, mean over each band's bins, its bias not removed, (bands, pairs)."""
    plv: NDArray[np.float64]
    """In the coherence band, (pairs,)."""
