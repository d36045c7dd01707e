"""A synthetic headset: EEG with the features that a wardlink shows, the same for the same seed. No patient behind it.

1/f background, alpha that waxes while the eyes are closed, blinks while they are open, 50 Hz hum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from gateway.errors import ConfigError
from gateway.virtual.recordings import CYTON_MONTAGE, CYTON_RATE_HZ, Recording

SECONDS_MAX = 3600.0
"""The whole recording is in memory: 8 channels of an hour take 58 MB."""

EYES_PERIOD_S = 10.0
"""Eyes open for so long, then closed for so long."""
EYES_TRANSITION_S = 0.5
BACKGROUND_UV_RMS = 8.0
SHARED_BACKGROUND = 0.5
"""Share of the background's power that all electrodes have in common (volume conduction, reference)."""
ALPHA_HZ = 10.0
ALPHA_WIDTH_HZ = 0.8
ALPHA_CLOSED_UV_RMS = 20.0
ALPHA_OPEN_SHARE = 0.15
HUM_HZ = 50.0
HUM_UV = 4.0
BLINK_UV = 120.0
BLINK_S = 0.35
BLINK_PAUSE_S = (2.0, 6.0)

_ALPHA_WEIGHTS = {"O": 1.0, "P": 0.7, "T": 0.35, "C": 0.35, "F": 0.15}
_BLINK_WEIGHTS = {"FP": 1.0, "AF": 0.8, "F": 0.4, "C": 0.1}


def synthetic_headset(
    seconds: float, *, seed: int = 1, electrodes: Sequence[str] = CYTON_MONTAGE, rate_hz: float = CYTON_RATE_HZ
) -> Recording:
    """EEG of the given length in microvolts; begins with open eyes. Electrodes by their 10-20 names.

    Raises `ConfigError` for a length that is not within 1 s and an hour.
    """
    if not 1.0 <= seconds <= SECONDS_MAX:
        raise ConfigError(f"a synthetic recording of {seconds:g} s: expected 1 to {SECONDS_MAX:.0f} s")
    random = np.random.default_rng(seed)
    count = round(seconds * rate_hz)
    times_s = np.arange(count) / rate_hz
    closed = _eyes_closed(times_s)
    shared = _shaped_noise(random, count, rate_hz, _pink)
    alpha = _shaped_noise(random, count, rate_hz, _alpha_band) * ALPHA_CLOSED_UV_RMS
    alpha *= ALPHA_OPEN_SHARE + (1 - ALPHA_OPEN_SHARE) * closed
    blinks = _blinks(random, times_s)
    hum_phase = random.uniform(0, 2 * np.pi)
    uv = np.empty((count, len(electrodes)))
    for column, electrode in enumerate(electrodes):
        own = _shaped_noise(random, count, rate_hz, _pink)
        background = np.sqrt(SHARED_BACKGROUND) * shared + np.sqrt(1 - SHARED_BACKGROUND) * own
        hum = random.uniform(0.5, 1.0) * np.sin(2 * np.pi * HUM_HZ * times_s + hum_phase)
        uv[:, column] = (
            background * BACKGROUND_UV_RMS
            + alpha * _weight(electrode, _ALPHA_WEIGHTS)
            + blinks * _weight(electrode, _BLINK_WEIGHTS)
            + hum * HUM_UV
        )
    return Recording(tuple(electrodes), float(rate_hz), uv)


def eyes_closed(time_s: float) -> bool:
    """Whether the synthetic person has the eyes closed at this time of the recording."""
    return bool(time_s % (2 * EYES_PERIOD_S) >= EYES_PERIOD_S)


def _eyes_closed(times_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """0 with open eyes, 1 with closed ones, and a ramp at each change."""
    phase_s = times_s % (2 * EYES_PERIOD_S)
    closing = np.clip((phase_s - EYES_PERIOD_S) / EYES_TRANSITION_S, 0, 1)
    opening = np.clip(phase_s / EYES_TRANSITION_S, 0, 1)
    after_first = times_s >= 2 * EYES_PERIOD_S
    return np.where(phase_s >= EYES_PERIOD_S, closing, np.where(after_first, 1 - opening, 0.0))


def _pink(frequency_hz: NDArray[np.float64]) -> NDArray[np.float64]:
    """Amplitude of 1/f power, flat below 0.5 Hz."""
    return 1 / np.sqrt(np.maximum(frequency_hz, 0.5))


def _alpha_band(frequency_hz: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-0.5 * ((frequency_hz - ALPHA_HZ) / ALPHA_WIDTH_HZ) ** 2)


def _shaped_noise(
    random: np.random.Generator,
    count: int,
    rate_hz: float,
    amplitude: Callable[[NDArray[np.float64]], NDArray[np.float64]],
) -> NDArray[np.float64]:
    """Gaussian noise with this amplitude over frequency, no mean, RMS 1."""
    frequency_hz = np.arange(count // 2 + 1, dtype=np.float64) * (rate_hz / count)
    spectrum = np.fft.rfft(random.standard_normal(count)) * amplitude(frequency_hz)
    spectrum[0] = 0
    noise: NDArray[np.float64] = np.fft.irfft(spectrum, count)
    noise /= np.sqrt(np.mean(noise**2))
    return noise


def _blinks(random: np.random.Generator, times_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """Raised cosines of some 120 uV, only with open eyes."""
    uv = np.zeros_like(times_s)
    at_s = random.uniform(*BLINK_PAUSE_S)
    while at_s < times_s[-1]:
        if not eyes_closed(at_s) and not eyes_closed(at_s + BLINK_S):
            inside = (times_s >= at_s) & (times_s < at_s + BLINK_S)
            height = BLINK_UV * random.uniform(0.8, 1.2)
            uv[inside] = height / 2 * (1 - np.cos(2 * np.pi * (times_s[inside] - at_s) / BLINK_S))
        at_s += random.uniform(*BLINK_PAUSE_S)
    return uv


def _weight(electrode: str, weights: dict[str, float]) -> float:
    """The weight of the longest matching beginning of the electrode's name; 0 for none."""
    beginnings = [begin for begin in weights if electrode.upper().startswith(begin)]
    return weights[max(beginnings, key=len)] if beginnings else 0.0
