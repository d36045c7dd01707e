"""The brain state: what every implementation of the features gives, and which samples all of them refuse."""

from __future__ import annotations

from dataclasses import dataclass

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
