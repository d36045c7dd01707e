"""How each electrode of an EEG stream is, judged while the samples come: ok, noisy, railed or off, and the reason.

One implementation for what is stored (the quality field), for the features, and for whoever puts the electrodes on.
Pure: knows no clock and no device. kOhm is never guessed here: that takes a test current (`gateway.signal.impedance`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gateway.samples import NS_PER_S, ElectrodeState
from gateway.signal.ring import SampleRing

WINDOW_S = 1.0
"""What is judged: the newest second, which resolves 1 Hz."""
STEP_S = 0.2
"""From one judgement to the next: as often as there is a brain state."""
FLAT_UV_MAX = 0.5
"""Peak to peak. An amplifier's own noise is above it (ADS1299 data sheet: 1 uV), so nothing reaches its input."""
BAND_HZ = (1.0, 45.0)
"""Where the EEG is looked for. Below lie an electrode's own offset and drift, which are millivolts and no fault."""
MAINS_HZ = (50.0, 60.0)
MAINS_WIDTH_HZ = 2.0
"""Half the main lobe of a second's Hann window."""
MAINS_TO_BAND_MAX = 3.0
"""Hum to the rest in `BAND_HZ`, rms: 10 dB."""
MAINS_TO_OTHERS_MAX = 5.0
"""Hum to the median of the other electrodes, rms. Hum that all of them share comes through the reference and the
cable, lies outside the bands, and is no electrode's fault: measured up to 2.7 on a Cyton whose electrodes all carry
ten times more hum than EEG, and 11 and more on a Muse with one bad contact. That a channel is judged by its
neighbours is after PREP (Bigdely-Shamlo et al. 2015, Front. Neuroinform. 9:16)."""
OTHERS_MIN = 2
"""With fewer to compare with, the ratio to the band alone decides."""
MAINS_OFF_UV = 1_000.0
"""rms: what an input hears that hangs in the air; on the skin it stays far below."""
RMS_UV_MAX = 400.0
"""In `BAND_HZ`, over a second. EEG of an adult at rest stays below 100 uV (Niedermeyer, Electroencephalography, ch. 9),
a second of blinks at the forehead below 350 (PhysioNet EEGMMIDB S001); the rest is movement, muscles or a loose
electrode."""
OFF_AFTER_S = 3.0
"""Movement ends; what stays beyond `RMS_UV_MAX` for so long is not on the skin."""
MOTION_G = 0.1
"""Acceleration about its mean, all axes, rms over a second: the usual border of moderate activity, as walking
(Hildebrand et al. 2014, Med. Sci. Sports Exerc. 46:1816). A head at rest stays below 0.02."""
MISSING_SHARE_MAX = 0.5
"""With more of a second's samples missing nothing is said."""
MILLIVOLT_UV = 1_000.0


@dataclass(frozen=True, slots=True)
class Electrode:
    """How an electrode is, and why that is said; `rms_uv`: in `BAND_HZ`, NaN where it cannot be told."""

    state: ElectrodeState
    reason: str = ""
    rms_uv: float = float("nan")

    @property
    def is_usable(self) -> bool:
        """Whether its samples may enter a mean."""
        return self.state in {ElectrodeState.OK, ElectrodeState.UNKNOWN}

    @property
    def is_judged(self) -> bool:
        """Whether anything is known of it."""
        return self.state is not ElectrodeState.UNKNOWN


NOT_YET = Electrode(ElectrodeState.UNKNOWN, "there is no whole second yet")


class ElectrodeWatch:
    """Judges the electrodes of one stream as its samples come, every fifth of a second by the newest second.

    How the samples are cut into pieces changes nothing. What is missing is held at its last value, and its channel is
    judged by the rest.
    """

    def __init__(self, rate_hz: float, channel_count: int) -> None:
        self.electrodes: tuple[Electrode, ...] = (NOT_YET,) * channel_count
        """The newest judgement, in the order of the channels."""
        self._window = max(2, round(WINDOW_S * rate_hz))
        self._step = max(1, round(STEP_S * rate_hz))
        self._spectrum = _Spectrum(self._window, rate_hz)
        self._uv, self._railed, self._missing, self._marked = (
            SampleRing(self._window, self._step, channel_count) for _ in range(4)
        )
        self._parts: list[tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]] = []
        """Since the last judgement: uV, railed, missing, marked. Put into the rings together: they come in fours."""
        self._since_step = 0
        self._judged_bad: NDArray[np.bool_] = np.zeros(channel_count, dtype=np.bool_)
        self._loud_steps: NDArray[np.int64] = np.zeros(channel_count, dtype=np.int64)

    def push(
        self,
        uv: NDArray[np.float64],
        railed: NDArray[np.bool_],
        missing: NDArray[np.bool_] | None = None,
        motion_g: float = 0.0,
    ) -> NDArray[np.bool_]:
        """Take in consecutive samples; returns bool (n, channels): not usable, by what was judged so far.

        `uv`: uV (n, channels). `railed`, `missing`: bool of the same shape. `motion_g`: see `MotionWatch`.
        Railed samples are marked by themselves; flat, off, noisy is said of all that comes until the next judgement.
        """
        marked = np.empty(uv.shape, dtype=np.bool_)
        absent = ~np.isfinite(uv) if missing is None else missing | ~np.isfinite(uv)
        start = 0
        while start < len(uv):
            stop = min(len(uv), start + self._step - self._since_step)
            rows = slice(start, stop)
            marked[rows] = railed[rows] | absent[rows] | self._judged_bad
            self._parts.append((uv[rows], railed[rows], absent[rows], marked[rows]))
            self._since_step += stop - start
            if self._since_step == self._step:
                self._since_step = 0
                self._put_together()
                self._judge(motion_g)
            start = stop
        return marked

    def judges(self, count: int) -> bool:
        """Whether so many more samples complete what a judgement takes."""
        return self._since_step + count >= self._step

    def miss(self, count: int) -> None:
        """So many samples did not come: a few are held over, after a second of them everything begins anew."""
        self._put_together()
        if count >= self._window or not len(self._uv):
            self.reset()
            return
        last = np.repeat(self._uv.newest(1), count, axis=0)
        self.push(last, np.zeros(last.shape, np.bool_), np.ones(last.shape, np.bool_))

    def marked(self, count: int) -> NDArray[np.bool_]:
        """Bool (count, channels) for the newest samples, up to a second: True where they are not usable.

        That is where they are railed or missing themselves, or lie in a second that was judged flat, off or noisy:
        unlike in what `push` returns, also those that came before the judgement.
        """
        self._put_together()
        return self._marked.newest(min(count, self._window)) > 0

    def reset(self) -> None:
        """Forget all samples: what follows does not follow on them."""
        for ring in (self._uv, self._railed, self._missing, self._marked):
            ring.clear()
        self._parts = []
        self._since_step = 0
        self._judged_bad[:] = False
        self._loud_steps[:] = 0
        self.electrodes = (NOT_YET,) * len(self.electrodes)

    def _put_together(self) -> None:
        parts, self._parts = self._parts, []
        if not parts:
            return
        uv, railed, absent, marked = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        self._uv.append(self._held(uv, absent))
        for ring, flags in ((self._railed, railed), (self._missing, absent), (self._marked, marked)):
            ring.append(flags.astype(np.float64))

    def _held(self, uv: NDArray[np.float64], absent: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Each absent sample as the last one that is there."""
        if not absent.any():
            return uv
        before = self._uv.newest(1) if len(self._uv) else np.zeros((1, uv.shape[1]))
        rows = np.concatenate([before, uv])
        newest = np.where(absent, 0, np.arange(1, len(rows))[:, np.newaxis])
        return np.asarray(np.take_along_axis(rows, np.maximum.accumulate(newest, axis=0), axis=0))

    def _judge(self, motion_g: float) -> None:
        if len(self._uv) < self._window:
            return
        uv = self._uv.newest(self._window)
        railed = self._railed.newest(self._window).mean(axis=0)
        missing = self._missing.newest(self._window).mean(axis=0)
        span_uv = np.ptp(uv, axis=0)
        band_uv, hum_uv, hum_hz = self._spectrum.rms_uv(uv)
        alive = (railed == 0) & (span_uv >= FLAT_UV_MAX) & (missing <= MISSING_SHARE_MAX)
        others_uv = _medians_of_the_others(hum_uv, alive)
        loud = alive & (band_uv > RMS_UV_MAX) & (motion_g <= MOTION_G)
        self._loud_steps = np.where(loud, self._loud_steps + 1, 0)
        self.electrodes = tuple(
            _electrode(
                _Measured(
                    railed=float(railed[k]),
                    missing=float(missing[k]),
                    span_uv=float(span_uv[k]),
                    band_uv=float(band_uv[k]),
                    hum_uv=float(hum_uv[k]),
                    hum_hz=float(hum_hz[k]),
                    others_uv=float(others_uv[k]),
                    motion_g=motion_g,
                    loud_s=float(self._loud_steps[k]) * STEP_S,
                )
            )
            for k in range(uv.shape[1])
        )
        # Railed samples are marked one by one: those beside them are as good as ever.
        window_counts = [not each.is_usable and each.state is not ElectrodeState.RAILED for each in self.electrodes]
        self._judged_bad = np.array(window_counts, dtype=np.bool_)
        if self._judged_bad.any():
            self._marked.newest(self._window)[:, self._judged_bad] = 1.0


class MotionWatch:
    """How much the head moves, from the newest second of an accelerometer."""

    def __init__(self, rate_hz: float) -> None:
        self._window = max(2, round(WINDOW_S * rate_hz))
        self._ring = SampleRing(self._window, self._window, 3)
        self._arrival_ns = 0

    def push(self, g: NDArray[np.float64], arrival_ns: int) -> None:
        """Take in consecutive samples: g (n, 3), which arrived at `arrival_ns` (CLOCK_MONOTONIC)."""
        for start in range(0, len(g), self._window):
            self._ring.append(g[start : start + self._window])
        self._arrival_ns = arrival_ns

    def motion_g(self, arrival_ns: int) -> float:
        """Acceleration about its mean, all axes, rms in g; 0 where the second before `arrival_ns` is not known."""
        if len(self._ring) < self._window or arrival_ns - self._arrival_ns > 2 * WINDOW_S * NS_PER_S:
            return 0.0
        return float(np.sqrt(self._ring.newest(self._window).var(axis=0).sum()))


@dataclass(frozen=True, slots=True)
class _Measured:
    """What one electrode's newest second shows."""

    railed: float
    missing: float
    """Shares of the samples."""
    span_uv: float
    band_uv: float
    hum_uv: float
    hum_hz: float
    others_uv: float
    """Median hum of the other electrodes; NaN with too few of them."""
    motion_g: float
    loud_s: float
    """For how long it has been beyond `RMS_UV_MAX` without a movement that would explain it."""


def _electrode(found: _Measured) -> Electrode:
    if found.missing > MISSING_SHARE_MAX:
        return Electrode(ElectrodeState.UNKNOWN, f"{100 * found.missing:.0f} % of the samples did not come")
    if found.railed > 0:
        return Electrode(ElectrodeState.RAILED, f"{100 * found.railed:.0f} % of the samples at the end of the range")
    if found.span_uv < FLAT_UV_MAX:
        reason = "flat: always the same value" if found.span_uv == 0 else f"flat: {found.span_uv:.2f} uV p-p"
        return Electrode(ElectrodeState.OFF, reason, 0.0)
    if found.hum_uv > MAINS_OFF_UV:
        reason = f"{found.hum_uv / MILLIVOLT_UV:.1f} mV of {found.hum_hz:.0f} Hz mains: not on the skin"
        return Electrode(ElectrodeState.OFF, reason, found.band_uv)
    if found.loud_s >= OFF_AFTER_S:
        reason = f"{found.band_uv:.0f} uV rms for {found.loud_s:.0f} s: not on the skin, or loose"
        return Electrode(ElectrodeState.OFF, reason, found.band_uv)
    reason = _noise(found)
    return Electrode(ElectrodeState.NOISY if reason else ElectrodeState.OK, reason, found.band_uv)


def _noise(found: _Measured) -> str:
    """What drowns the EEG; empty where nothing does."""
    alone = not found.hum_uv <= MAINS_TO_OTHERS_MAX * found.others_uv  # NaN: there is nothing to compare with
    if found.hum_uv > MAINS_TO_BAND_MAX * found.band_uv and alone:
        others = "" if np.isnan(found.others_uv) else f", {found.others_uv:.1f} uV in the other electrodes"
        return f"{found.hum_hz:.0f} Hz mains: {found.hum_uv:.0f} uV rms{others}"
    if found.motion_g > MOTION_G:
        return f"moved: {found.motion_g:.2f} g"
    if found.band_uv > RMS_UV_MAX:
        return f"{found.band_uv:.0f} uV rms: movement, muscles or a loose electrode"
    return ""


def _medians_of_the_others(values: NDArray[np.float64], alive: NDArray[np.bool_]) -> NDArray[np.float64]:
    """For each value the median of the others that are alive; NaN where they are fewer than `OTHERS_MIN`."""
    medians = np.full(values.shape, np.nan)
    taken = values[alive]
    count = len(taken)
    if count <= OTHERS_MIN:
        return medians
    order = np.argsort(taken)
    ranks = np.empty(count, dtype=np.int64)
    ranks[order] = np.arange(count)
    ordered = taken[order]
    # Without the value of rank r the j-th of the rest is the j-th, or from r on the one behind it.
    middles = ((count - 2) // 2, (count - 1) // 2)
    medians[alive] = sum(ordered[middle + (ranks <= middle)] for middle in middles) / 2
    return medians


class _Spectrum:
    """The rms in the EEG's band and at the mains, by a Hann window over samples whose line is taken out."""

    def __init__(self, count: int, rate_hz: float) -> None:
        self._taper: NDArray[np.float64] = np.hanning(count + 2)[1:-1, np.newaxis]
        self._times: NDArray[np.float64] = np.linspace(-1.0, 1.0, count)
        self._slope: NDArray[np.float64] = self._times / (self._times @ self._times)
        self._scale = 2.0 / (count * float((self._taper**2).sum()))
        hz = np.arange(count // 2 + 1, dtype=np.float64) * (rate_hz / count)
        self._band = _bins(hz, *BAND_HZ)
        self._mains = [
            (mains_hz, _bins(hz, mains_hz - MAINS_WIDTH_HZ, mains_hz + MAINS_WIDTH_HZ))
            for mains_hz in _heard(rate_hz / 2)
        ]

    def rms_uv(self, uv: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Of uV (count, n): rms in the band, rms of the hum, and its frequency, each (n,)."""
        level = uv - uv.mean(axis=0)
        level -= np.outer(self._times, self._slope @ level)
        spectrum = np.fft.rfft((level * self._taper).T)
        power = (spectrum.real**2 + spectrum.imag**2) * self._scale
        band = np.sqrt(power[:, self._band].sum(axis=1))
        hum, hum_hz = np.zeros_like(band), np.full(band.shape, MAINS_HZ[0])
        for mains_hz, bins in self._mains:
            heard = np.sqrt(power[:, bins].sum(axis=1))
            hum_hz = np.where(heard > hum, mains_hz, hum_hz)
            hum = np.maximum(hum, heard)
        return band, hum, hum_hz


def _bins(hz: NDArray[np.float64], low_hz: float, high_hz: float) -> slice:
    return slice(int(np.searchsorted(hz, low_hz - 1e-9)), int(np.searchsorted(hz, high_hz + 1e-9)))


def _heard(nyquist_hz: float) -> Sequence[float]:
    return [mains_hz for mains_hz in MAINS_HZ if mains_hz + MAINS_WIDTH_HZ <= nyquist_hz]
