"""Phase-locking value (Lachaux 1999) from a streaming analytic signal.

A complex FIR band-pass of 1 s (257 taps at 256 Hz) gives the analytic signal 0.5 s late, with no other delay;
it is only evaluated at every `decimation`-th sample. Knows no clock and no device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from gateway.signal.bands import LATENCY_S, Band, samples_in

SILENT_UV = 1e-4
"""Amplitude in the band under which a phase is rounding noise: that of a dead channel."""
_DECIMATED_HZ_MIN = 32.0
"""Phase differences change slower than the band is wide; four times its width, and this at least, loses nothing."""
_LOW_PASS_HALF_S = 0.06
"""Least half length of the first filter's low-pass: what its images would bring into the band is then 60 dB down."""
_FIRST_KAISER = 6.0
_SECOND_KAISER = 3.5
_MADE_UP_MIN = 0.5
_QUADRATURE = 256
"""Points of an integral over half the band."""


@dataclass(frozen=True, slots=True)
class AnalyticFilter:
    """The analytic band-pass as two filters one after the other, which costs a fifth of their product.

    The first, moved up to the band's centre, is only needed at every `decimation`-th sample: a low-pass, and the
    difference of two samples half a period of the centre apart, under which constants vanish. The second, a sharp
    low-pass of what the first gives, moved down to 0 Hz, needs no samples between those.
    """

    decimation: int
    first: NDArray[np.complex128]
    """At the full rate, (odd number of taps,)."""
    second: NDArray[np.float64]
    """At the decimated rate, symmetric, (odd number of taps,)."""
    centre_turns: float
    """Turns of the band's centre per sample."""

    def taps(self) -> NDArray[np.complex128]:
        """Impulse response of both together, complex (2 x the nearest number of samples to 0.5 s + 1,)."""
        half = len(self.second) // 2 * self.decimation
        moved = np.zeros(2 * half + 1, dtype=np.complex128)
        moved[:: self.decimation] = self.second
        moved *= _turning(np.arange(-half, half + 1) * self.centre_turns)
        return np.convolve(moved, self.first)


def analytic_filter(rate_hz: float, band: Band) -> AnalyticFilter:
    """The filter of a band, by Kaiser windows: about half its gain lies at the band's edges.

    A sine at the centre keeps its amplitude. Both responses, and so their product, are symmetric in magnitude.
    """
    delay = samples_in(LATENCY_S, rate_hz)
    centre = band.centre_hz / rate_hz
    apart = max(1, samples_in(0.5 / band.centre_hz, rate_hz))
    decimation = max(1, math.floor(rate_hz / max(_DECIMATED_HZ_MIN, 4 * band.width_hz)))
    low_pass_half = _LOW_PASS_HALF_S * rate_hz if decimation > 1 else 0
    half = math.floor((delay - low_pass_half - apart / 2) / decimation)
    count = 2 * (delay - half * decimation) + 1 - apart
    at = np.arange(count) - (count - 1) / 2
    # A window's end points that are 0, or nearly so, are left out: every tap counts.
    low_pass = np.kaiser(count + 2, _FIRST_KAISER)[1:-1] * np.sinc(at / decimation)
    difference = np.array([1j, *([0] * (apart - 1)), -1j], dtype=np.complex128)
    first: NDArray[np.complex128] = np.convolve(low_pass * _turning(at * centre), difference)
    reach = len(first) // 2
    first /= (first @ _turning(np.arange(reach, -reach - 1, -1) * centre)).real

    time_s = np.arange(-half, half + 1) * (decimation / rate_hz)
    offset_hz = (np.arange(_QUADRATURE) + 0.5) * (band.width_hz / 2 / _QUADRATURE)
    # What the difference passes beside its maximum, the second filter makes up for, as far as that makes sense.
    passed = np.maximum(np.cos(math.pi * apart * offset_hz / rate_hz), _MADE_UP_MIN)
    second = np.kaiser(2 * half + 1, _SECOND_KAISER)
    second *= np.cos(2 * np.pi * np.outer(time_s, offset_hz)) @ (1 / passed)
    return AnalyticFilter(decimation, first, 2 * second / second.sum(), centre)


def _turning(turns: NDArray[np.floating]) -> NDArray[np.complex128]:
    return np.asarray(np.exp(2j * np.pi * turns), dtype=np.complex128)


class PhaseLocking:
    """Phases of channels over a window, and how well pairs of them keep their distance."""

    def __init__(self, rate_hz: float, channel_count: int, band: Band, window_s: float) -> None:
        analytic = analytic_filter(rate_hz, band)
        taps = analytic.taps()
        self.tap_count = taps.shape[0]
        self.decimation = analytic.decimation
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
