"""Streaming spectra: Hann segments, exponentially averaged power and coherence, and what is read from them.

A segment is 1 s of samples, its mean removed, times a periodic Hann window; a new one is taken every step of 0.2 s
(Welch 1967, with an exponential instead of a plain mean: the segment d steps back has weight exp(-0.2 d / time
constant)). A segment in which a channel has an unusable sample, or is flat, ends that channel's averages:
they begin anew with its next clean segment. Knows no clock and no device.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from gateway.signal.bands import SEGMENT_S, STEP_S, samples_in

FLAT_UV2 = 1e-8
"""Power over the bands under which a segment is of a dead channel: the quantisation noise alone of a 24-bit
EEG converter is a thousand times more."""
COHERENCE_SEGMENTS_MIN = 20
"""Segments before a pair has a coherence: 4.8 s of samples, about 8 effective segments."""


def hann(count: int) -> NDArray[np.float64]:
    """The periodic ("DFT-even") Hann window, float64 (count,)."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(count) / count)


class SegmentTransform:
    """Turns segments into the Fourier coefficients of some bins."""

    def __init__(self, rate_hz: float, bins: range) -> None:
        self.length = samples_in(SEGMENT_S, rate_hz)
        """Samples of a segment."""
        self.bins = bins
        self._window = hann(self.length)
        self._scale = math.sqrt(2 / (rate_hz * float(np.sum(self._window**2))))

    def coefficients(self, segment: NDArray[np.float64]) -> NDArray[np.complex128]:
        """Coefficients (bins, channels) of a segment (length, channels) in uV.

        Scaled so that the square of the magnitude is the one-sided power spectral density in uV^2/Hz.
        """
        # An offset of 1e5 uV would cost five digits in the mean, and a dead channel would not come out as exactly 0.
        level = segment - segment[0]
        level -= level.mean(axis=0)
        level *= self._window[:, np.newaxis]
        spectrum = np.fft.rfft(level, axis=0)[self.bins.start : self.bins.stop]
        return np.asarray(spectrum * self._scale, dtype=np.complex128)


def decay_of(time_constant_s: float) -> float:
    """Factor by which a segment's weight falls from one step to the next; 1 for an infinite time constant."""
    return math.exp(-STEP_S / time_constant_s)


def effective_segments(segments: NDArray[np.int64], time_constant_s: float) -> NDArray[np.float64]:
    """How many independent segments the exponential average over the newest `segments` ones is worth.

    K = (sum w_i)^2 / sum_ij w_i w_j r(|i - j|)^2, where w are the weights and r(d) is the correlation of the Hann
    window with itself shifted by d steps: overlapping segments repeat part of their information (Welch 1967).
    Tends to 17.2 for the time constant of 4 s. float64 of the argument's shape, 0 for 0 segments.
    """
    decay = decay_of(time_constant_s)

    def squares(count: NDArray[np.int64]) -> NDArray[np.float64]:
        held = np.maximum(count, 0).astype(np.float64)
        return held if decay == 1 else (1 - decay ** (2 * held)) / (1 - decay**2)

    held = segments.astype(np.float64)
    weight = held if decay == 1 else (1 - decay**held) / (1 - decay)
    products = squares(segments)
    for steps in range(1, math.ceil(SEGMENT_S / STEP_S)):
        products = products + 2 * hann_correlation(steps * STEP_S / SEGMENT_S) ** 2 * decay**steps * squares(
            segments - steps
        )
    return np.divide(weight**2, products, out=np.zeros_like(weight), where=products > 0)


def hann_correlation(shift: float) -> float:
    """Correlation of a Hann window with itself, shifted by a fraction of its length (0: 1, 1: 0)."""
    turn = 2 * math.pi * shift
    return (1 - shift) * (2 + math.cos(turn)) / 3 + math.sin(turn) / turn * shift if shift else 1.0


class PowerAverage:
    """Exponentially averaged power spectral densities of channels."""

    def __init__(self, bin_count: int, channel_count: int, time_constant_s: float) -> None:
        self._decay = decay_of(time_constant_s)
        self._sum: NDArray[np.float64] = np.zeros((bin_count, channel_count))
        self._weight: NDArray[np.float64] = np.zeros(channel_count)

    def clear(self) -> None:
        """Forget all segments."""
        self._sum[:] = 0
        self._weight[:] = 0

    def add(self, density: NDArray[np.float64], clean: NDArray[np.bool_]) -> None:
        """Add a segment: densities (bins, channels), and bool (channels,) which of them count."""
        self._sum *= self._decay
        self._weight *= self._decay
        self._sum += density
        self._weight += 1
        self._sum[:, ~clean] = 0
        self._weight[~clean] = 0

    def density(self, channels: NDArray[np.bool_]) -> NDArray[np.float64]:
        """uV^2/Hz (bins, chosen channels) of the channels that `channels` (bool) chooses: they must be clean."""
        return self._sum[:, channels] / self._weight[channels]


class CoherenceAverage:
    """Exponentially averaged cross-spectra of all pairs of channels, and their magnitude-squared coherence.

    Each pair averages its two auto-spectra over the same segments as its cross-spectrum, those that were clean in
    both channels: the coherence then stays in 0..1, and 1 for identical signals, after any interruption.
    """

    def __init__(self, bin_count: int, channel_count: int, time_constant_s: float) -> None:
        self._time_constant_s = time_constant_s
        self._decay = decay_of(time_constant_s)
        shape = (bin_count, channel_count, channel_count)
        self._cross: NDArray[np.complex128] = np.zeros(shape, dtype=np.complex128)
        self._power: NDArray[np.float64] = np.zeros(shape)
        """[k, i, j]: power of channel i over the segments of the pair i, j."""
        self._segments: NDArray[np.int64] = np.zeros(channel_count, dtype=np.int64)

    def clear(self) -> None:
        """Forget all segments."""
        self._cross[:] = 0
        self._power[:] = 0
        self._segments[:] = 0

    def add(self, coefficients: NDArray[np.complex128], clean: NDArray[np.bool_]) -> None:
        """Add a segment: coefficients (bins, channels), and bool (channels,) which of them count."""
        self._cross *= self._decay
        self._power *= self._decay
        self._cross += coefficients[:, :, np.newaxis] * coefficients.conj()[:, np.newaxis, :]
        self._power += (np.abs(coefficients) ** 2)[:, :, np.newaxis]
        for sums in (self._cross, self._power):
            sums[:, ~clean, :] = 0
            sums[:, :, ~clean] = 0
        self._segments += 1
        self._segments[~clean] = 0

    @property
    def ready(self) -> NDArray[np.bool_]:
        """Channels (bool) that have enough segments for a coherence."""
        return self._segments >= COHERENCE_SEGMENTS_MIN

    def pairs(self, channels: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Coherence of all pairs of the chosen channels, bias removed, mean over the bins: (chosen, chosen).

        Not clipped: around a true value of 0 the estimate scatters to both sides, and only so is its mean 0.
        The raw estimate C of K segments has a bias of (1 - C)^2 / K (Carter 1987);
        the factor (K + 1) / (K - 1) makes the correction exact for independent signals, where C follows
        Beta(1, K - 1). At C = 1 it vanishes.
        """
        chosen = np.ix_(np.arange(self._cross.shape[0]), channels, channels)
        power = self._power[chosen]
        both = power * power.transpose(0, 2, 1)
        raw = np.divide(np.abs(self._cross[chosen]) ** 2, both, out=np.zeros_like(both), where=both > 0)
        held = self._segments[channels]
        count = effective_segments(np.minimum(held[:, np.newaxis], held[np.newaxis, :]), self._time_constant_s)
        corrected = raw - (1 - raw) ** 2 * ((count + 1) / (count * (count - 1)))
        return np.asarray(corrected.mean(axis=0), dtype=np.float64)


def mean_of_pairs(values: NDArray[np.float64]) -> float:
    """Mean over the pairs i < j of a symmetric matrix (channels, channels); NaN for fewer than two channels."""
    rows, columns = np.triu_indices(values.shape[0], 1)
    return float(values[rows, columns].mean()) if rows.size else math.nan


def relative_power(density: NDArray[np.float64], bands: list[slice]) -> NDArray[np.float64]:
    """Share of each band in the power of all of them: (bands, channels) from densities (bins, channels)."""
    power = np.stack([density[band].sum(axis=0) for band in bands])
    return np.asarray(power / power.sum(axis=0), dtype=np.float64)


def spectral_entropy(density: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shannon entropy of a spectrum over its logarithm of the number of bins (Inouye 1991): (channels,) in 0..1.

    `density`: (bins, channels), two bins or more. 1 for a flat spectrum, 0 for a single line.
    """
    total = density.sum(axis=0)
    share = np.divide(density, total, out=np.zeros_like(density), where=total > 0)
    logarithm = np.log(share, out=np.zeros_like(share), where=share > 0)
    return np.asarray(-(share * logarithm).sum(axis=0) / math.log(density.shape[0]), dtype=np.float64)
