"""What is wrong with an electrode, for whoever puts it on: one word and the reason, from the newest second.

Pure. For people at the bedside: what is stored is the quality field, and nothing here changes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from gateway.signal.quality import unusable

FLAT_UV_MAX = 0.5
"""Peak to peak. An amplifier's own noise is above it (ADS1299: 1 uV), so nothing reaches the amplifier's input."""
MAINS_HZ = (50.0, 60.0)
MAINS_WIDTH_HZ = 2.0
"""Half the main lobe of a second's Hann window."""
MAINS_SHARE_MAX = 0.5
"""Of the power from `LOWEST_HZ` on: above it an electrode hears more of the mains than of everything else."""
RMS_UV_MAX = 200.0
"""EEG of an adult at rest stays below 100 uV; the rest is movement, muscles or a loose electrode."""
LOWEST_HZ = 1.0
"""Below it lie the electrode's own offset and drift, which are millivolts and no fault."""
SAMPLES_MIN = 8
"""Fewer say nothing."""


class ElectrodeState(StrEnum):
    """How an electrode is."""

    OK = "ok"
    NOISY = "noisy"
    RAILED = "railed"
    FLAT = "flat"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Electrode:
    """How an electrode is, and why that is said; `rms_uv` is NaN where it cannot be told."""

    state: ElectrodeState
    reason: str
    rms_uv: float


def electrode_states(uv: NDArray[np.float64], quality: NDArray[np.int64], rate_hz: float) -> list[Electrode]:
    """The state of every electrode, from about a second of samples.

    `uv`: uV (n, channels), consecutive. `quality`: the bit set int64 (n,) of `gateway.samples.QUALITY`.
    Raises `ValueError` for other shapes.
    """
    if uv.ndim != 2 or quality.shape != uv.shape[:1]:
        raise ValueError(f"samples have shape {uv.shape} and quality {quality.shape}, expected (n, channels) and (n,)")
    bad = unusable(quality, uv.shape[1])
    return [_electrode(uv[:, k], bad[:, k], rate_hz) for k in range(uv.shape[1])]


def _electrode(uv: NDArray[np.float64], bad: NDArray[np.bool_], rate_hz: float) -> Electrode:
    count = uv.shape[0]
    if count < SAMPLES_MIN:
        return Electrode(ElectrodeState.UNKNOWN, f"{count} samples", np.nan)
    if bad.any():
        reason = f"{100 * bad.mean():.0f} % of the samples at the end of the range"
        return Electrode(ElectrodeState.RAILED, reason, np.nan)
    if not np.isfinite(uv).all():
        return Electrode(ElectrodeState.UNKNOWN, "samples without a value", np.nan)
    span_uv = float(np.ptp(uv))
    if span_uv < FLAT_UV_MAX:
        return Electrode(ElectrodeState.FLAT, "always the same value" if span_uv == 0 else f"{span_uv:.2f} uV p-p", 0.0)
    times = np.linspace(-1.0, 1.0, count)
    level = uv - uv.mean()
    level -= times * (times @ level) / (times @ times)
    rms_uv = float(np.sqrt(np.mean(level**2)))
    mains_hz, share = _mains(level, rate_hz)
    if share > MAINS_SHARE_MAX:
        return Electrode(ElectrodeState.NOISY, f"{mains_hz:.0f} Hz mains: {100 * share:.0f} % of the power", rms_uv)
    if rms_uv > RMS_UV_MAX:
        return Electrode(ElectrodeState.NOISY, f"{rms_uv:.0f} uV rms: movement or a loose electrode", rms_uv)
    return Electrode(ElectrodeState.OK, "", rms_uv)


def _mains(level_uv: NDArray[np.float64], rate_hz: float) -> tuple[float, float]:
    """The mains frequency that is heard best, and its share of the power."""
    count = level_uv.shape[0]
    power = np.abs(np.fft.rfft(level_uv * np.hanning(count))) ** 2
    hz = np.fft.rfftfreq(count, 1.0 / rate_hz)
    total = float(power[hz >= LOWEST_HZ].sum())
    if total <= 0.0:
        return MAINS_HZ[0], 0.0
    shares = [float(power[np.abs(hz - mains) <= MAINS_WIDTH_HZ].sum()) / total for mains in _below(rate_hz / 2)]
    return max(zip(_below(rate_hz / 2), shares, strict=True), key=lambda each: each[1], default=(MAINS_HZ[0], 0.0))


def _below(nyquist_hz: float) -> Sequence[float]:
    return [mains for mains in MAINS_HZ if mains + MAINS_WIDTH_HZ <= nyquist_hz]
