"""The brain state: band powers, coherence, PLV and entropy of an EEG stream, one every 0.2 s of the stream's own time.

The numpy implementation, and the oracle of any other. Arrays in, values out: knows no clock, device or wire.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from gateway.signal.bands import DEFAULT_SETTINGS, LATENCY_S, Band, FeatureSettings, check_stream, samples_in
from gateway.signal.conditioning import Conditioning
from gateway.signal.numpy_window import WindowAnalysis
from gateway.signal.phase import PhaseLocking
from gateway.signal.quality import unusable
from gateway.signal.ring import SampleRing
from gateway.signal.spectra import (
    FLAT_UV2,
    CoherenceAverage,
    PowerAverage,
    SegmentTransform,
    mean_of_pairs,
    relative_power,
    spectral_entropy,
)
from gateway.signal.state import UV_MAX, Features

__all__ = ["FeatureEngine", "WindowAnalysis"]


class FeatureEngine:
    """Computes brain states from samples as they come. Memory is bounded and does not grow.

    The caller pushes what lies before each multiple of 0.2 s in the stream's time (at 256 Hz 51 or 52 samples) and
    then asks for the state by `step`. A channel is good in a state if its newest second has no unusable sample and
    is not flat; coherence and PLV begin anew for a channel after an unusable sample, and need 4.8 s and 5 s.
    """

    def __init__(self, rate_hz: float, channel_count: int, settings: FeatureSettings = DEFAULT_SETTINGS) -> None:
        """`rate_hz`: 100..2,000. `channel_count`: 1..64. Raises `ValueError` for others."""
        check_stream(rate_hz, channel_count)
        self._channel_count = channel_count
        wanted = (*settings.bands, settings.entropy_band, settings.coherence_band)
        bins = range(min(band.bins().start for band in wanted), max(band.bins().stop for band in wanted))

        def rows(band: Band) -> slice:
            return slice(band.bins().start - bins.start, band.bins().stop - bins.start)

        self._bands = [rows(band) for band in settings.bands]
        self._entropy_rows = rows(settings.entropy_band)
        self._coherence_rows = rows(settings.coherence_band)
        self._conditioning = Conditioning(rate_hz, channel_count, settings)
        self._transform = SegmentTransform(rate_hz, bins)
        self._power = PowerAverage(len(bins), channel_count, settings.power_time_constant_s)
        self._coherence = CoherenceAverage(
            len(settings.coherence_band.bins()), channel_count, settings.coherence_time_constant_s
        )
        self._phase = PhaseLocking(rate_hz, channel_count, settings.coherence_band, settings.plv_window_s)
        kept = max(self._transform.length, self._phase.tap_count)
        self._ring = SampleRing(kept, samples_in(1.0, rate_hz), channel_count)
        self._unread = 0

    @property
    def latency_s(self) -> float:
        """How long before the newest pushed sample the instant is that a state refers to.

        Holds to within the time of a sample; for PLV within its decimation, 31 ms.
        """
        return LATENCY_S

    def reset(self) -> None:
        """Begin anew: for samples that do not follow on those before, and for another wearer."""
        self._conditioning.clear()
        self._ring.clear()
        self._power.clear()
        self._coherence.clear()
        self._phase.clear()
        self._unread = 0

    def push(self, uv: NDArray[np.float64], bad: NDArray[np.bool_] | NDArray[np.int64] | None = None) -> None:
        """Take in consecutive samples.

        `uv`: uV (n, channels); what is not finite, or beyond 100 V, is not usable.
        `bad`: what else is not usable: bool (channels,) for all n samples, bool (n, channels), or the quality
        bit set int64 (n,) of `gateway.samples.QUALITY`. Raises `ValueError` for other shapes.
        """
        if uv.ndim != 2 or uv.shape[1] != self._channel_count:
            raise ValueError(f"samples have shape {uv.shape}, expected (n, {self._channel_count})")
        usable = np.abs(uv) <= UV_MAX  # False for NaN
        if bad is not None:
            usable &= ~self._as_mask(bad, uv.shape[0])
        samples = self._conditioning.apply(np.where(usable, uv, np.nan))
        for start in range(0, samples.shape[0], self._ring.appended_max):
            part = samples[start : start + self._ring.appended_max]
            self._ring.append(part)
            count = part.shape[0]
            self._phase.add(self._ring.newest(min(len(self._ring), self._phase.tap_count - 1 + count)), count)
        self._unread += samples.shape[0]

    def _as_mask(self, bad: NDArray[np.bool_] | NDArray[np.int64], count: int) -> NDArray[np.bool_]:
        if bad.dtype == np.bool_ and bad.shape in {(self._channel_count,), (count, self._channel_count)}:
            return bad.astype(np.bool_, copy=False)
        if bad.dtype == np.int64 and bad.shape == (count,):
            return unusable(bad.astype(np.int64, copy=False), self._channel_count)
        raise ValueError(
            f"bad is {bad.dtype} {bad.shape}, expected bool ({self._channel_count},), "
            f"bool ({count}, {self._channel_count}) or int64 ({count},)"
        )

    def step(self) -> Features | None:
        """The state at the newest sample, `latency_s` before it.

        None until there is 1 s of samples since the start or the last reset, or with none since the last step.
        """
        length = self._transform.length
        if len(self._ring) < length or not self._unread:
            return None
        self._unread = 0
        coefficients = self._transform.coefficients(self._ring.newest(length))
        density = np.abs(coefficients) ** 2
        power_uv2 = sum(density[band].sum(axis=0) for band in self._bands)
        good = np.asarray(power_uv2 >= FLAT_UV2, dtype=np.bool_)  # False for NaN
        coefficients[:, ~good] = 0
        density[:, ~good] = 0
        self._power.add(density, good)
        self._coherence.add(coefficients[self._coherence_rows], good)
        return self._features(good)

    def _features(self, good: NDArray[np.bool_]) -> Features:
        shares = [math.nan] * len(self._bands)
        entropy = math.nan
        if good.any():
            density = self._power.density(good)
            shares = [float(share) for share in relative_power(density, self._bands).mean(axis=1)]
            entropy = float(spectral_entropy(density[self._entropy_rows]).mean())
        coherence = mean_of_pairs(self._coherence.pairs(good & self._coherence.ready))
        plv = mean_of_pairs(self._phase.pairs(good & self._phase.ready))
        if not math.isnan(coherence):
            coherence = min(max(coherence, 0.0), 1.0)
        delta, theta, alpha, beta, gamma = shares
        return Features(delta, theta, alpha, beta, gamma, coherence, plv, entropy)
