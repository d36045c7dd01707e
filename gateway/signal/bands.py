"""EEG frequency bands and the settings of the brain-state features: frozen values.

Knows no samples. Every definition that a second implementation of the features must share is named here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gateway.samples import BRAIN_STATE_PERIOD_NS, NS_PER_S

RATE_HZ_MIN = 100.0
"""Below it the gamma band would not lie under half the sampling rate."""
RATE_HZ_MAX = 2000.0
CHANNELS_MAX = 64
SEGMENT_S = 1.0
"""Length of a Hann segment, so a spectrum's bins are 1 Hz apart."""
WINDOW_S_MAX = 10.0
"""Of a window analysed at once: its spectrum is worked through bin by bin, sample by sample."""
STEP_S = BRAIN_STATE_PERIOD_NS / NS_PER_S
"""From one segment, and one state, to the next."""
LATENCY_S = SEGMENT_S / 2
"""A state refers to the instant this long before the newest sample that went into it:
the centre of the newest segment, and the group delay of the PLV's filter."""

_HZ_MAX = RATE_HZ_MIN / 2
_WINDOW_S_MAX = 60.0
"""A longer PLV window is no longer a state, and its memory grows with it."""
_COHERENCE_TIME_CONSTANT_S_MIN = 2.0
"""Worth 9 effective segments: below that the coherence of two unrelated signals would scatter by more than 0.1."""


@dataclass(frozen=True, slots=True)
class Band:
    """Frequencies from `low_hz` up to but not including `high_hz`."""

    name: str
    low_hz: float
    high_hz: float

    def __post_init__(self) -> None:
        if not 0 < self.low_hz < self.high_hz <= _HZ_MAX:
            raise ValueError(
                f"band {self.name!r} is {self.low_hz}..{self.high_hz} Hz, expected 0 < low < high <= {_HZ_MAX:g} Hz"
            )
        if not self.bins():
            raise ValueError(f"band {self.name!r}, {self.low_hz}..{self.high_hz} Hz, holds none of the 1 Hz bins")

    @property
    def centre_hz(self) -> float:
        return (self.low_hz + self.high_hz) / 2

    @property
    def width_hz(self) -> float:
        return self.high_hz - self.low_hz

    def bins(self) -> range:
        """Numbers of the spectrum's bins in the band.

        Bin k stands for k / `SEGMENT_S` Hz at any sampling rate: a segment is a whole number of samples,
        so at a rate of, say, 250.2 Hz the true frequency is off by less than 0.5 %, and no bin changes its band.
        """
        return range(math.ceil(self.low_hz * SEGMENT_S), math.ceil(self.high_hz * SEGMENT_S))


DELTA = Band("delta", 1, 4)
THETA = Band("theta", 4, 8)
ALPHA = Band("alpha", 8, 13)
BETA = Band("beta", 13, 30)
GAMMA = Band("gamma", 30, 45)
BANDS = (DELTA, THETA, ALPHA, BETA, GAMMA)


@dataclass(frozen=True, slots=True)
class FeatureSettings:
    """What the operator may choose about the features. Raises `ValueError` for what has no meaning."""

    bands: tuple[Band, ...] = BANDS
    """Delta, theta, alpha, beta, gamma, in this order: relative powers are shares of their sum."""
    entropy_band: Band = Band("entropy", 1, 45)
    coherence_band: Band = ALPHA
    """Band of both coherence and PLV."""
    power_time_constant_s: float = 4.0
    """Of the exponential average of the auto-spectra; `math.inf` averages since the last reset with equal weights."""
    coherence_time_constant_s: float = 4.0
    plv_window_s: float = 4.0
    mains_hz: float | None = None
    """50 or 60: a notch there."""
    pass_band_hz: tuple[float, float] | None = None
    """Lower and upper edge of a band-pass."""
    common_average: bool = False
    """Refer each sample to the average of all usable channels."""

    def __post_init__(self) -> None:
        names = tuple(band.name for band in self.bands)
        if names != tuple(band.name for band in BANDS):
            raise ValueError(f"bands are {names}, expected {tuple(band.name for band in BANDS)}")
        if len(self.entropy_band.bins()) < 2:
            raise ValueError(f"entropy band {self.entropy_band} holds one bin, expected two or more")
        if not self.power_time_constant_s >= STEP_S:
            raise ValueError(f"power time constant is {self.power_time_constant_s} s, expected {STEP_S:g} s or more")
        if not self.coherence_time_constant_s >= _COHERENCE_TIME_CONSTANT_S_MIN:
            raise ValueError(
                f"coherence time constant is {self.coherence_time_constant_s} s, "
                f"expected {_COHERENCE_TIME_CONSTANT_S_MIN:g} s or more"
            )
        if not SEGMENT_S <= self.plv_window_s <= _WINDOW_S_MAX:
            raise ValueError(f"PLV window is {self.plv_window_s} s, expected {SEGMENT_S:g}..{_WINDOW_S_MAX:g} s")
        if self.mains_hz not in {None, 50, 60}:
            raise ValueError(f"mains frequency is {self.mains_hz} Hz, expected 50 or 60 Hz")
        if self.pass_band_hz is not None:
            if len(self.pass_band_hz) != 2:
                raise ValueError(f"pass band has {len(self.pass_band_hz)} edge, expected two, or none")
            low_hz, high_hz = self.pass_band_hz
            if not 0 < low_hz < high_hz < math.inf:
                raise ValueError(f"pass band is {low_hz}..{high_hz} Hz, expected 0 < low < high")


DEFAULT_SETTINGS = FeatureSettings()


def samples_in(duration_s: float, rate_hz: float) -> int:
    """Number of samples nearest to a duration; halves round up."""
    return math.floor(duration_s * rate_hz + 0.5)


def phase_bins(band: Band, rate_hz: float, sample_count: int) -> range:
    """Numbers of the bins of a window's own spectrum, rate / samples apart, that lie in a band."""
    return range(math.ceil(band.low_hz * sample_count / rate_hz), math.ceil(band.high_hz * sample_count / rate_hz))


def check_window(rate_hz: float, sample_count: int) -> None:
    """Raise `ValueError` unless a window has a segment or more, an even number of samples, and no more than 10 s."""
    low, high = samples_in(SEGMENT_S, rate_hz), samples_in(WINDOW_S_MAX, rate_hz)
    if not low <= sample_count <= high or sample_count % 2:
        raise ValueError(f"a window of {sample_count} samples, expected an even number of {low}..{high}")


def check_stream(rate_hz: float, channel_count: int) -> None:
    """Raise `ValueError` unless the rate (Hz) and number of channels are ones that the features are defined for."""
    if not RATE_HZ_MIN <= rate_hz <= RATE_HZ_MAX:
        raise ValueError(f"sampling rate is {rate_hz} Hz, expected {RATE_HZ_MIN:g}..{RATE_HZ_MAX:g} Hz")
    if not 1 <= channel_count <= CHANNELS_MAX:
        raise ValueError(f"{channel_count} channels, expected 1..{CHANNELS_MAX}")
