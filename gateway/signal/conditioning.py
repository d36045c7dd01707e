"""Optional conditioning of EEG for the features alone: mains notch, band-pass, common average reference.

The raw samples never pass through here. Knows no clock and no device.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from gateway.signal.bands import FeatureSettings, check_stream

NOTCH_Q = 30.0
"""Quality of the mains notch: 1.7 Hz wide at 50 Hz, so the bins up to 45 Hz keep 99 % of their power and more."""
_BUTTERWORTH_Q = math.sqrt(0.5)

Section = tuple[float, float, float, float, float]
"""b0, b1, b2, a1, a2 of a second-order section, a0 = 1."""


def filter_sections(rate_hz: float, settings: FeatureSettings) -> list[Section]:
    """The second-order sections that the settings ask for: notch, high-pass, low-pass (Butterworth, 12 dB/octave).

    By the bilinear transform with its frequency warping undone (R. Bristow-Johnson, Audio EQ Cookbook).
    Raises `ValueError` for a frequency that is not below half the rate.
    """
    sections = []
    if settings.mains_hz is not None:
        sections.append(_section(rate_hz, settings.mains_hz, NOTCH_Q, "mains frequency"))
    if settings.pass_band_hz is not None:
        low_hz, high_hz = settings.pass_band_hz
        sections.append(_section(rate_hz, low_hz, _BUTTERWORTH_Q, "lower edge of the pass band"))
        sections.append(_section(rate_hz, high_hz, _BUTTERWORTH_Q, "upper edge of the pass band"))
    return sections


def check_settings(rate_hz: float, channel_count: int, settings: FeatureSettings) -> None:
    """Raise `ValueError` unless a stream's features can be computed with these settings."""
    check_stream(rate_hz, channel_count)
    filter_sections(rate_hz, settings)


def _section(rate_hz: float, frequency_hz: float, quality: float, what: str) -> Section:
    if not frequency_hz < rate_hz / 2:
        raise ValueError(f"{what} is {frequency_hz:g} Hz, expected less than half the sampling rate of {rate_hz:g} Hz")
    turn = 2 * math.pi * frequency_hz / rate_hz
    cosine, alpha = math.cos(turn), math.sin(turn) / (2 * quality)
    if what.startswith("mains"):
        b = (1.0, -2 * cosine, 1.0)
    elif what.startswith("lower"):
        b = ((1 + cosine) / 2, -(1 + cosine), (1 + cosine) / 2)
    else:
        b = ((1 - cosine) / 2, 1 - cosine, (1 - cosine) / 2)
    a0 = 1 + alpha
    return b[0] / a0, b[1] / a0, b[2] / a0, -2 * cosine / a0, (1 - alpha) / a0


class Conditioning:
    """Filters, then references, the samples of a stream as they come.

    An unusable sample (NaN) stays one. The filters of its channel begin anew with the next usable one, as if that had
    been there for ever, so that its offset does not ring. The common average is that of the usable channels'
    differences from their first usable sample: offsets of tens of millivolts would jump into all channels
    whenever one of them falls out.
    """

    def __init__(self, rate_hz: float, channel_count: int, settings: FeatureSettings) -> None:
        """Raises `ValueError` for filters that the rate does not allow."""
        self._sections = np.array(filter_sections(rate_hz, settings), dtype=np.float64).reshape(-1, 5)
        self._common_average = settings.common_average
        self._memory: NDArray[np.float64] = np.zeros((len(self._sections), 2, channel_count))
        self._anchor: NDArray[np.float64] = np.zeros(channel_count)
        self._fresh: NDArray[np.bool_] = np.ones(channel_count, dtype=np.bool_)

    def clear(self) -> None:
        """Forget all samples."""
        self._fresh[:] = True

    def apply(self, samples: NDArray[np.float64]) -> NDArray[np.float64]:
        """The samples (n, channels) that the features are computed from."""
        if not len(self._sections) and not self._common_average:
            return samples
        out = np.empty_like(samples)
        for row, sample in enumerate(samples):
            out[row] = self._one(sample)
        return out

    def _one(self, sample: NDArray[np.float64]) -> NDArray[np.float64]:
        usable = ~np.isnan(sample)
        begins = self._fresh & usable
        level = sample
        for (b0, b1, b2, a1, a2), memory in zip(self._sections, self._memory, strict=True):
            steady = level * (b0 + b1 + b2) / (1 + a1 + a2)
            late = np.where(begins, b2 * level - a2 * steady, memory[1])
            early = np.where(begins, b1 * level - a1 * steady + late, memory[0])
            passed = b0 * level + early
            memory[0] = b1 * level - a1 * passed + late
            memory[1] = b2 * level - a2 * passed
            level = passed
        self._anchor = np.where(begins, level, self._anchor)
        self._fresh = ~usable
        if self._common_average and usable.any():
            level = level - (level - self._anchor)[usable].mean()
        return level
