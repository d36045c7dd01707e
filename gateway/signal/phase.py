"""Phase-locking value (Lachaux 1999) from a streaming analytic signal.

A complex FIR band-pass of 1 s (257 taps at 256 Hz) gives the analytic signal 0.5 s late, with no other delay;
it is only evaluated at every `decimation`-th sample. Knows no clock and no device.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from gateway.signal.bands import LATENCY_S, Band, samples_in

SILENT_UV = 1e-4
"""Amplitude in the band under which a phase is rounding noise: that of a dead channel."""
_DECIMATED_HZ_MIN = 32.0
"""Phase differences change slower than the band is wide; four times its width, and this at least, loses nothing."""


def analytic_taps(rate_hz: float, band: Band) -> NDArray[np.complex128]:
    """Impulse response of the analytic band-pass, complex (taps,), oldest sample last.

    A Hann-windowed ideal band-pass with half its gain at the band's edges, symmetric in magnitude, 2 x the nearest
    number of samples to 0.5 s + 1 taps; constants vanish exactly, a sine in the band keeps its amplitude.
    """
    delay = samples_in(LATENCY_S, rate_hz)
    time_s = np.arange(-delay, delay + 1) / rate_hz
    # The end points of a Hann window are 0: they are left out, so that every tap counts.
    window = np.hanning(2 * delay + 3)[1:-1]
    low_pass = window * (band.width_hz / rate_hz) * np.sinc(band.width_hz * time_s)
    taps = 2 * low_pass * np.exp(2j * np.pi * band.centre_hz * time_s)
    return np.asarray(taps - window * (taps.sum() / window.sum()), dtype=np.complex128)


class PhaseLocking:
    """Phases of channels over a window, and how well pairs of them keep their distance."""

    def __init__(self, rate_hz: float, channel_count: int, band: Band, window_s: float) -> None:
        taps = analytic_taps(rate_hz, band)
        self.tap_count = taps.shape[0]
        self.decimation = max(1, math.floor(rate_hz / max(_DECIMATED_HZ_MIN, 4 * band.width_hz)))
        self.window_count = samples_in(window_s, rate_hz / self.decimation)
        """Phases in the window."""
        newest_first = taps[::-1]
        self._taps = np.stack([newest_first.real, newest_first.imag], axis=1)
        self._phasors: NDArray[np.complex128] = np.zeros((self.window_count, channel_count), dtype=np.complex128)
        self._next = 0
        self._valid: NDArray[np.int64] = np.zeros(channel_count, dtype=np.int64)
        self._seen = 0

    def clear(self) -> None:
        """Forget all samples."""
        self._next = 0
        self._valid[:] = 0
        self._seen = 0

    def add(self, samples: NDArray[np.float64], new: int) -> None:
        """Take in the last `new` rows of `samples`.

        `samples`: uV (n, channels), NaN where not usable, up to `tap_count` - 1 rows from before and the new ones.
        """
        before = samples.shape[0] - new
        # Output i needs the rows i .. i + taps - 1; numbered from the last clear, its newest row is a multiple
        # of the decimation, so that the phases do not depend on how the samples were cut into pushes.
        first_number = max(self._seen, self.tap_count - 1)
        first_number += -first_number % self.decimation
        first = first_number - self._seen + before - (self.tap_count - 1)
        self._seen += new
        if first_number >= self._seen:
            return
        windows = sliding_window_view(samples, self.tap_count, axis=0)[first :: self.decimation]
        parts = windows @ self._taps
        for row in parts[..., 0] + 1j * parts[..., 1]:
            self._append(row)

    def _append(self, analytic: NDArray[np.complex128]) -> None:
        amplitude = np.abs(analytic)
        valid = amplitude >= SILENT_UV  # False for NaN
        row = self._phasors[self._next]
        row[:] = 0
        np.divide(analytic, amplitude, out=row, where=valid)
        self._next = (self._next + 1) % self.window_count
        self._valid += 1
        self._valid[~valid] = 0

    @property
    def ready(self) -> NDArray[np.bool_]:
        """Channels (bool) whose whole window holds phases that no unusable sample touches."""
        return self._valid >= self.window_count

    def pairs(self, channels: NDArray[np.bool_]) -> NDArray[np.float64]:
        """PLV of all pairs of the chosen channels, in 0..1: (chosen, chosen). They must be `ready`.

        |mean over the window of exp(i (phase of one - phase of the other))|. Independent signals do not reach 0:
        the window holds about bandwidth x duration = 20 independent phases, so they read 0.2 on average.
        """
        phasors = self._phasors[:, channels]
        locked = np.abs(phasors.T @ phasors.conj()) / self.window_count
        return np.asarray(np.minimum(locked, 1.0), dtype=np.float64)
