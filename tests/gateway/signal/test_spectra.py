from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.signal
from numpy.typing import NDArray

from gateway.signal.bands import ALPHA
from gateway.signal.ring import SampleRing
from gateway.signal.spectra import (
    COHERENCE_SEGMENTS_MIN,
    CoherenceAverage,
    PowerAverage,
    SegmentTransform,
    decay_of,
    effective_segments,
    hann,
    mean_of_pairs,
    relative_power,
    spectral_entropy,
)

BINS = range(1, 45)
CHANNELS = 4
ALL = np.ones(CHANNELS, dtype=np.bool_)
RATE_HZ = 250.0
LENGTH, HOP = 250, 50


@pytest.fixture
def noise() -> NDArray[np.float64]:
    """20 s of channels with a common part, and offsets of tens of millivolts."""
    rng = np.random.default_rng(5)
    return (
        10 * rng.standard_normal((5000, CHANNELS)) + 8 * rng.standard_normal((5000, 1)) + np.array([0, 1e5, -3e4, 12.5])
    )


def segments(samples: NDArray[np.float64]) -> NDArray[np.complex128]:
    """Coefficients (segments, bins, channels) of all whole segments."""
    transform = SegmentTransform(RATE_HZ, BINS)
    starts = range(0, samples.shape[0] - LENGTH + 1, HOP)
    return np.stack([transform.coefficients(samples[start : start + LENGTH]) for start in starts])


@pytest.mark.parametrize("rate_hz", [100, 160, 250, 256, 500, 2000])
def test_a_segment_is_scipys(rate_hz: int) -> None:
    samples = np.random.default_rng(rate_hz).standard_normal((rate_hz, 3)) * 20
    _, expected = scipy.signal.welch(samples, rate_hz, "hann", rate_hz, detrend="constant", axis=0)
    density = np.abs(SegmentTransform(rate_hz, BINS).coefficients(samples)) ** 2
    np.testing.assert_allclose(density, expected[1:45], rtol=1e-10)


def test_an_offset_costs_no_accuracy() -> None:
    transform = SegmentTransform(RATE_HZ, BINS)
    samples = np.round(np.random.default_rng(2).standard_normal((LENGTH, 2)) * 20 * 1024) / 1024
    np.testing.assert_array_equal(transform.coefficients(samples + 2.0**17), transform.coefficients(samples))


def test_a_constant_has_no_power_at_all() -> None:
    assert not SegmentTransform(RATE_HZ, BINS).coefficients(np.full((LENGTH, 1), 61379.36)).any()


def test_equal_weights_give_scipys_welch(noise: NDArray[np.float64]) -> None:
    average = PowerAverage(len(BINS), CHANNELS, math.inf)
    for segment in segments(noise):
        average.add(np.abs(segment) ** 2, ALL)
    _, expected = scipy.signal.welch(noise, RATE_HZ, "hann", LENGTH, LENGTH - HOP, detrend="constant", axis=0)
    np.testing.assert_allclose(average.density(ALL), expected[1:45], rtol=1e-9)


def test_equal_weights_give_scipys_coherence(noise: NDArray[np.float64]) -> None:
    average = CoherenceAverage(len(BINS), CHANNELS, math.inf)
    coefficients = segments(noise)
    for segment in coefficients:
        average.add(segment, ALL)
    _, raw = scipy.signal.coherence(
        noise.T[:, np.newaxis], noise.T[np.newaxis], RATE_HZ, "hann", LENGTH, LENGTH - HOP, detrend="constant"
    )
    raw = raw[..., 1:45]
    count = float(effective_segments(np.array([len(coefficients)]), math.inf)[0])
    expected = (raw - (1 - raw) ** 2 * (count + 1) / (count * (count - 1))).mean(axis=-1)
    np.testing.assert_allclose(average.pairs(ALL), expected, rtol=1e-9)


def test_exponential_weights_over_scipys_segments(noise: NDArray[np.float64]) -> None:
    _, _, spectra = scipy.signal.spectrogram(
        noise, RATE_HZ, "hann", LENGTH, LENGTH - HOP, detrend="constant", axis=0, mode="complex"
    )
    spectra = spectra[1:45] * math.sqrt(2)  # one-sided; (bins, channels, segments)
    count = spectra.shape[-1]
    weights = np.exp(-0.2 / 4 * np.arange(count)[::-1])
    cross = np.einsum("kis,kjs,s->kij", spectra, spectra.conj(), weights)
    power = np.einsum("kii->ki", cross).real
    raw = np.abs(cross) ** 2 / (power[:, :, np.newaxis] * power[:, np.newaxis, :])
    worth = float(effective_segments(np.array([count]), 4.0)[0])
    expected = (raw - (1 - raw) ** 2 * (worth + 1) / (worth * (worth - 1))).mean(axis=0)

    averages = PowerAverage(len(BINS), CHANNELS, 4.0), CoherenceAverage(len(BINS), CHANNELS, 4.0)
    for segment in segments(noise):
        averages[0].add(np.abs(segment) ** 2, ALL)
        averages[1].add(segment, ALL)
    np.testing.assert_allclose(averages[0].density(ALL), power / weights.sum(), rtol=1e-9)
    np.testing.assert_allclose(averages[1].pairs(ALL), expected, rtol=1e-9)


@pytest.mark.parametrize("time_constant_s", [2.0, 4.0, 30.0, math.inf])
def test_effective_segments_from_their_definition(time_constant_s: float) -> None:
    window = hann(1000)
    shifts = [np.dot(window[steps * 200 :], window[: 1000 - steps * 200]) for steps in range(5)]
    correlation = np.array([*shifts, 0]) / shifts[0]
    for count in (1, 2, 7, 20, 300):
        weights = decay_of(time_constant_s) ** np.arange(count)
        apart = np.minimum(np.abs(np.subtract.outer(np.arange(count), np.arange(count))), 5)
        expected = weights.sum() ** 2 / (weights @ correlation[apart] ** 2 @ weights)
        assert effective_segments(np.array([count]), time_constant_s)[0] == pytest.approx(expected, rel=1e-6)


def test_the_stated_number_of_effective_segments() -> None:
    assert effective_segments(np.array([10_000]), 4.0)[0] == pytest.approx(17.2, abs=0.05)
    assert effective_segments(np.array([COHERENCE_SEGMENTS_MIN]), 4.0)[0] == pytest.approx(8, abs=0.1)
    assert effective_segments(np.array([0]), 4.0)[0] == 0


@pytest.mark.parametrize("duration_s", [5, 30])
def test_unrelated_noise_has_no_bias(duration_s: int) -> None:
    means = []
    for seed in range(20):
        average = CoherenceAverage(len(BINS), CHANNELS, 4.0)
        for segment in segments(np.random.default_rng(seed).standard_normal((duration_s * 250, CHANNELS))):
            average.add(segment, ALL)
        means.append(mean_of_pairs(average.pairs(ALL)))
    assert np.mean(means) == pytest.approx(0, abs=0.015)


def test_an_interruption_of_one_channel_leaves_a_pair_of_equals_at_one() -> None:
    samples = np.random.default_rng(3).standard_normal((250 * 12, 1)) * np.ones((1, CHANNELS))
    samples[: 250 * 5] *= 10
    average = CoherenceAverage(len(BINS), CHANNELS, 4.0)
    broken = np.array([True, True, False, True])
    for number, segment in enumerate(segments(samples)):
        average.add(segment, broken if 20 <= number < 26 else ALL)
    assert average.ready.all()
    np.testing.assert_allclose(average.pairs(ALL), 1, rtol=1e-12)


def test_an_interrupted_channel_waits_for_enough_segments() -> None:
    average = CoherenceAverage(1, 2, 4.0)
    both, first = np.array([True, True]), np.array([True, False])
    for _ in range(COHERENCE_SEGMENTS_MIN):
        average.add(np.ones((1, 2), dtype=np.complex128), both)
    average.add(np.ones((1, 2), dtype=np.complex128), first)
    assert average.ready.tolist() == [True, False]
    for _ in range(COHERENCE_SEGMENTS_MIN - 1):
        average.add(np.ones((1, 2), dtype=np.complex128), both)
    assert average.ready.tolist() == [True, False]
    average.add(np.ones((1, 2), dtype=np.complex128), both)
    assert average.ready.tolist() == [True, True]


def test_an_interrupted_channels_power_begins_anew() -> None:
    average = PowerAverage(1, 2, 4.0)
    average.add(np.array([[100.0, 100.0]]), np.array([True, True]))
    average.add(np.array([[100.0, 0.0]]), np.array([True, False]))
    average.add(np.array([[100.0, 7.0]]), np.array([True, True]))
    np.testing.assert_allclose(average.density(np.array([True, True])), [[100, 7]])


def test_coherence_of_a_band_is_the_mean_of_its_bins() -> None:
    rng = np.random.default_rng(8)
    whole = CoherenceAverage(len(BINS), 2, 4.0)
    single = [CoherenceAverage(1, 2, 4.0) for _ in ALPHA.bins()]
    band = CoherenceAverage(len(ALPHA.bins()), 2, 4.0)
    both = np.array([True, True])
    for segment in segments(rng.standard_normal((5000, 2))):
        alpha = segment[7:12]
        band.add(alpha, both)
        whole.add(segment, both)
        for row, average in enumerate(single):
            average.add(alpha[row : row + 1], both)
    expected = np.mean([average.pairs(both)[0, 1] for average in single])
    assert band.pairs(both)[0, 1] == pytest.approx(expected, rel=1e-12)
    assert whole.pairs(both)[0, 1] != pytest.approx(expected, rel=1e-3)


def test_mean_of_pairs_leaves_out_the_diagonal() -> None:
    values = np.array([[1, 0.2, 0.4], [0.2, 1, 0.9], [0.4, 0.9, 1]])
    assert mean_of_pairs(values) == pytest.approx(0.5)
    assert math.isnan(mean_of_pairs(np.ones((1, 1))))
    assert math.isnan(mean_of_pairs(np.ones((0, 0))))


def test_relative_power_of_a_known_spectrum() -> None:
    density = np.array([[1.0, 0.0], [2.0, 0.0], [5.0, 4.0]])
    np.testing.assert_allclose(
        relative_power(density, [slice(0, 2), slice(2, 3)]), [[3 / 8, 0], [5 / 8, 1]], rtol=1e-12
    )


def test_entropy_of_known_spectra() -> None:
    density = np.zeros((44, 4))
    density[:, 0] = 3.0
    density[9, 1] = 5.0
    density[[9, 20], 2] = 0.1
    expected = [1, 0, math.log(2) / math.log(44), 0]
    np.testing.assert_allclose(spectral_entropy(density), expected, atol=1e-12)


def test_the_ring_keeps_the_newest_samples_in_one_piece() -> None:
    rng = np.random.default_rng(4)
    samples = rng.standard_normal((2000, 2))
    ring = SampleRing(kept=30, appended_max=17, channel_count=2)
    start = 0
    while start < 1900:
        stop = start + int(rng.integers(1, 18))
        ring.append(samples[start:stop])
        start = stop
        held = min(30, stop)
        assert len(ring) >= held
        np.testing.assert_array_equal(ring.newest(held), samples[stop - held : stop])
    ring.clear()
    assert len(ring) == 0
