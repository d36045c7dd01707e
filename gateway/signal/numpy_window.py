"""Features of one window of samples at once: the arithmetic of scipy.signal's welch, csd and hilbert.

The numpy implementation, and the oracle of any other. Segments of 1 s overlap by half and count alike (Welch 1967);
coherence is that of the segments' mean spectra; the PLV is that of the window's analytic signal, of which the Fourier
coefficients outside the band are left out. Knows no clock and no device.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gateway.signal.bands import DEFAULT_SETTINGS, FeatureSettings, check_stream, check_window, phase_bins
from gateway.signal.spectra import FLAT_UV2, SegmentTransform, relative_power, spectral_entropy
from gateway.signal.state import UV_MAX, WindowFeatures


class WindowAnalysis:
    """Analyses windows of one shape. What it gives is overwritten by the next window."""

    def __init__(
        self,
        rate_hz: float,
        channel_count: int,
        sample_count: int,
        settings: FeatureSettings = DEFAULT_SETTINGS,
        *,
        with_pairs: bool = True,
    ) -> None:
        """`rate_hz`: 100..2,000. `channel_count`: 1..64. `sample_count`: even, 1..10 s. Raises `ValueError` for others.

        Of the settings only the bands count. Without `with_pairs` coherence and PLV are left out, and have no pairs.
        """
        check_stream(rate_hz, channel_count)
        check_window(rate_hz, sample_count)
        self._shape = (sample_count, channel_count)
        wanted = (*settings.bands, settings.entropy_band)
        bins = range(min(band.bins().start for band in wanted), max(band.bins().stop for band in wanted))
        self._bands = [slice(band.bins().start - bins.start, band.bins().stop - bins.start) for band in wanted]
        self._transform = SegmentTransform(rate_hz, bins)
        self._phase_bins = phase_bins(settings.coherence_band, rate_hz, sample_count)
        self._pairs = np.triu_indices(channel_count if with_pairs else 1, 1)

    def analyse(self, uv: NDArray[np.float64]) -> WindowFeatures:
        """Features of `uv`: uV (samples, channels). Raises `ValueError` for another shape."""
        if uv.shape != self._shape:
            raise ValueError(f"samples have shape {uv.shape}, expected {self._shape}")
        samples = np.where(np.abs(uv) <= UV_MAX, uv, np.nan)
        length = self._transform.length
        starts = range(0, samples.shape[0] - length + 1, length - length // 2)
        spectra = np.stack([self._transform.coefficients(samples[start : start + length]) for start in starts])
        density = np.mean(np.abs(spectra) ** 2, axis=0)
        *bands, entropy_rows = self._bands
        good = sum(density[band].sum(axis=0) for band in bands) >= FLAT_UV2  # False for NaN
        density[:, ~good] = np.nan
        i, j = self._pairs
        with np.errstate(invalid="ignore"):
            spectra /= np.sqrt(density * len(spectra))
            cross = np.abs((spectra[:, :, i] * spectra[:, :, j].conj()).sum(axis=0)) ** 2
            entropy = np.where(good, spectral_entropy(density[entropy_rows]), np.nan)
        return WindowFeatures(
            relative_power(density, bands),
            entropy,
            np.stack([cross[band].mean(axis=0) for band in bands]),
            self._phase_locking(samples, good),
        )

    def _phase_locking(self, samples: NDArray[np.float64], good: NDArray[np.bool_]) -> NDArray[np.float64]:
        spectrum = np.fft.fft(samples - samples[0], axis=0)
        kept = np.zeros_like(spectrum)
        kept[self._phase_bins.start : self._phase_bins.stop] = spectrum[self._phase_bins.start : self._phase_bins.stop]
        analytic = np.fft.ifft(kept, axis=0)
        analytic[:, ~good] = np.nan
        unit = np.divide(analytic, np.abs(analytic), out=np.full_like(analytic, np.nan), where=good)
        locked = np.abs(unit.T @ unit.conj()) / samples.shape[0]
        return np.asarray(np.minimum(locked[self._pairs], 1.0), dtype=np.float64)
