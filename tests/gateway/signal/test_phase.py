from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.signal
from numpy.typing import NDArray

from gateway.signal.bands import ALPHA
from gateway.signal.features import FeatureEngine
from gateway.signal.phase import PhaseLocking, analytic_filter

RATE_HZ = 250.0
MEAN_ERROR_MAX = 0.025


def fed(samples: NDArray[np.float64], rate_hz: float = RATE_HZ, cut: int = 50) -> PhaseLocking:
    phase = PhaseLocking(rate_hz, samples.shape[1], ALPHA, 4.0)
    feed(phase, samples, cut)
    return phase


def feed(phase: PhaseLocking, samples: NDArray[np.float64], cut: int) -> None:
    for start in range(0, samples.shape[0], cut):
        stop = min(start + cut, samples.shape[0])
        phase.add(samples[max(0, start - phase.tap_count + 1) : stop], stop - start)


def gain(rate_hz: float, frequency_hz: float) -> float:
    taps = analytic_filter(rate_hz, ALPHA).taps()
    return float(abs(np.sum(taps * np.exp(-2j * np.pi * frequency_hz / rate_hz * np.arange(len(taps))))))


@pytest.mark.parametrize(
    ("rate_hz", "count", "decimation"), [(100, 101, 3), (160, 161, 5), (250, 251, 7), (256, 257, 8), (2000, 2001, 62)]
)
def test_the_filter_scales_with_the_rate(rate_hz: float, count: int, decimation: int) -> None:
    phase = PhaseLocking(rate_hz, 1, ALPHA, 4.0)
    assert (phase.tap_count, phase.decimation) == (count, decimation)
    assert phase.window_count * decimation / rate_hz == pytest.approx(4, abs=decimation / rate_hz)


@pytest.mark.parametrize("rate_hz", [100, 160, 250, 256, 2000])
def test_the_filter_passes_the_band_and_positive_frequencies_alone(rate_hz: float) -> None:
    # An analytic signal of a sine has twice its positive half: gain 2 on half the amplitude is 1.
    assert gain(rate_hz, 10.5) == pytest.approx(2, rel=1e-3)
    assert gain(rate_hz, 8) == pytest.approx(1, rel=0.08)
    assert gain(rate_hz, 13) == pytest.approx(1, rel=0.08)
    assert gain(rate_hz, -10.5) < 2e-3
    assert gain(rate_hz, 0) < 1e-12
    for hum_hz in (40, 49):
        assert gain(rate_hz, hum_hz) < 2e-3


def test_the_filter_is_half_a_second_late() -> None:
    taps = analytic_filter(256, ALPHA).taps()
    assert np.argmax(np.abs(taps)) == 128
    np.testing.assert_allclose(taps, taps[::-1].conj(), atol=1e-15)


@pytest.mark.parametrize("lag", [0.0, 1.2, np.pi])
def test_a_fixed_lag_is_locked(lag: float) -> None:
    angle = 2 * np.pi * 10 * np.arange(1500) / RATE_HZ
    phase = fed(np.stack([30 * np.sin(angle) + 1e5, 4 * np.sin(angle - lag) - 3e4], axis=1))
    assert phase.ready.all()
    assert phase.pairs(phase.ready)[0, 1] == pytest.approx(1, abs=1e-3)


def test_a_delayed_noise_is_nearly_locked() -> None:
    # 8 ms are 0.03 rad more at the upper than at the middle of the band: only that is lost.
    noise = np.random.default_rng(1).standard_normal(2002)
    phase = fed(np.stack([noise[2:], noise[:-2]], axis=1))
    assert phase.pairs(phase.ready)[0, 1] > 0.97


def test_phases_that_drift_apart_are_not_locked() -> None:
    angle = 2 * np.pi * np.arange(2500) / RATE_HZ
    phase = fed(np.stack([np.sin(9.5 * angle), np.sin(11.5 * angle)], axis=1))
    assert phase.pairs(phase.ready)[0, 1] < 0.05


@pytest.mark.parametrize("cut", [1, 7, 64, 250])
def test_cuts_do_not_matter(cut: int) -> None:
    samples = np.random.default_rng(9).standard_normal((1700, 3))
    whole, pieces = fed(samples, cut=50), fed(samples, cut=cut)
    np.testing.assert_allclose(pieces.pairs(pieces.ready), whole.pairs(whole.ready), rtol=1e-10)


def test_a_channel_is_ready_when_no_unusable_sample_touches_its_window() -> None:
    samples = np.random.default_rng(6).standard_normal((4000, 2))
    samples[600, 1] = np.nan
    phase = PhaseLocking(RATE_HZ, 2, ALPHA, 4.0)
    ready_from = None
    for stop in range(50, 3001, 50):
        phase.add(samples[max(0, stop - 50 - phase.tap_count + 1) : stop], 50)
        if stop >= 1250:
            assert phase.ready[0]
        if phase.ready[1] and ready_from is None and stop > 601:
            ready_from = stop
    # The filter's 251 samples, then 143 phases at every 7th sample.
    assert ready_from is not None
    assert 600 + 251 + 142 * 7 <= ready_from <= 600 + 251 + 143 * 7 + 50


def test_a_dead_channel_has_no_phase() -> None:
    samples = np.stack([np.random.default_rng(6).standard_normal(2000), np.full(2000, 61379.36)], axis=1)
    assert fed(samples).ready.tolist() == [True, False]


def test_clear_forgets_all() -> None:
    samples = np.random.default_rng(9).standard_normal((1700, 3))
    used = fed(np.random.default_rng(10).standard_normal((2123, 3)))
    used.clear()
    assert not used.ready.any()
    feed(used, samples, 50)
    fresh = fed(samples)
    np.testing.assert_array_equal(used.pairs(used.ready), fresh.pairs(fresh.ready))


def reference(samples: NDArray[np.float64], rate_hz: float) -> NDArray[np.complex128]:
    """Phases (n, channels) by a band-pass run forwards and backwards, and the Hilbert transform of the whole."""
    sections = scipy.signal.butter(4, [8, 13], "bandpass", fs=rate_hz, output="sos")
    passed = scipy.signal.sosfiltfilt(sections, samples - samples.mean(axis=0), axis=0)
    analytic = scipy.signal.hilbert(passed, axis=0)
    return analytic / np.abs(analytic)


@pytest.fixture(params=["cyton", "muse", "eegmmidb"])
def recording(request: pytest.FixtureRequest) -> tuple[NDArray[np.float64], float]:
    """Samples (n, channels) and their rate."""
    content, rate_hz = request.getfixturevalue(request.param)
    if isinstance(content, dict):
        content = np.stack([content[k] for k in ("Fp1", "F3", "C3", "Cz", "C4", "P3", "O1", "Oz")], axis=1)
    return content, rate_hz


def test_against_filtfilt_and_hilbert_over_a_recording(recording: tuple[NDArray[np.float64], float]) -> None:
    samples, rate_hz = recording
    expected = reference(samples, rate_hz)
    window = round(4 * rate_hz)
    phase = PhaseLocking(rate_hz, samples.shape[1], ALPHA, 4.0)
    rows, columns = np.triu_indices(samples.shape[1], 1)
    step = round(rate_hz / 5)
    errors = []
    for start in range(0, samples.shape[0] - step + 1, step):
        stop = start + step
        phase.add(samples[max(0, start - phase.tap_count + 1) : stop], step)
        instant = stop - phase.tap_count // 2
        if not phase.ready.all() or instant < window:
            continue
        phases = expected[instant - window : instant]
        true = np.abs(phases.T @ phases.conj()) / window
        found = phase.pairs(phase.ready)
        errors.append(np.abs(found - true)[rows, columns].mean())
    assert len(errors) > 250
    assert np.mean(errors) <= MEAN_ERROR_MAX


def test_the_engines_against_filtfilt_and_hilbert(
    engine_type: type[FeatureEngine], recording: tuple[NDArray[np.float64], float]
) -> None:
    """Engines of two channels, whose mean over pairs is that of the one."""
    samples, rate_hz = recording
    expected = reference(samples, rate_hz)
    window, step = round(4 * rate_hz), round(rate_hz / 5)
    errors = []
    for one, other in [(0, 1), (0, 2), (1, 3), (2, 3)]:
        engine = engine_type(rate_hz, 2)
        for start in range(0, samples.shape[0] - step + 1, step):
            engine.push(np.ascontiguousarray(samples[start : start + step, [one, other]]))
            state = engine.step()
            instant = start + step - round(engine.latency_s * rate_hz)
            if state is None or math.isnan(state.plv) or instant < window:
                continue
            phases = expected[instant - window : instant]
            errors.append(abs(state.plv - abs((phases[:, one] * phases[:, other].conj()).mean())))
    assert len(errors) > 1000
    assert np.mean(errors) <= MEAN_ERROR_MAX
