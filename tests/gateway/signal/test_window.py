"""Features of a window against scipy, for every implementation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.signal
from numpy.typing import NDArray

from gateway.signal.bands import BANDS, BETA, FeatureSettings, phase_bins
from gateway.signal.features import WindowAnalysis, WindowFeatures, implementations

RELATIVE_POWER_ERROR_MAX = 1e-6
COHERENCE_ERROR_MAX = 1e-6
PLV_ERROR_MAX = 2e-6
PAIRS_OF_8 = np.triu_indices(8, 1)
Floats = NDArray[np.float64]


@pytest.fixture
def window_type(implementation: str) -> type[WindowAnalysis]:
    found: type[WindowAnalysis] = implementations()[implementation].WindowAnalysis
    return found


def analysed(
    window_type: type[WindowAnalysis], uv: Floats, rate_hz: float, settings: FeatureSettings | None = None
) -> WindowFeatures:
    return window_type(rate_hz, uv.shape[1], uv.shape[0], settings or FeatureSettings()).analyse(uv)


def by_scipy(uv: Floats, rate_hz: float) -> tuple[Floats, Floats, Floats, Floats]:
    """Relative power, entropy, coherence, PLV."""
    length = round(rate_hz)
    _, density = scipy.signal.welch(uv, rate_hz, "hann", length, detrend="constant", axis=0)
    power = np.stack([density[list(band.bins())].sum(axis=0) for band in BANDS])
    share = density[1:45] / density[1:45].sum(axis=0)
    entropy = -(share * np.log(share)).sum(axis=0) / math.log(44)
    i, j = np.triu_indices(uv.shape[1], 1)
    _, raw = scipy.signal.coherence(uv[:, i], uv[:, j], rate_hz, "hann", length, detrend="constant", axis=0)
    coherence = np.stack([raw[list(band.bins())].mean(axis=0) for band in BANDS])
    frequency = np.fft.fftfreq(len(uv), 1 / rate_hz)
    spectrum = np.fft.fft(uv - uv.mean(axis=0), axis=0)
    spectrum[np.abs(np.abs(frequency) - 10.5 + 1e-9) > 2.5] = 0  # 8 Hz in, 13 Hz out
    analytic = scipy.signal.hilbert(np.fft.ifft(spectrum, axis=0).real, axis=0)
    unit = analytic / np.abs(analytic)
    return power / power.sum(axis=0), entropy, coherence, np.abs((unit[:, i] * unit[:, j].conj()).mean(axis=0))


def check(window_type: type[WindowAnalysis], uv: Floats, rate_hz: float) -> None:
    found = analysed(window_type, uv, rate_hz)
    relative_power, entropy, coherence, plv = by_scipy(uv, rate_hz)
    np.testing.assert_allclose(found.relative_power, relative_power, rtol=0, atol=RELATIVE_POWER_ERROR_MAX)
    np.testing.assert_allclose(found.entropy, entropy, rtol=0, atol=2e-6)
    np.testing.assert_allclose(found.coherence, coherence, rtol=0, atol=COHERENCE_ERROR_MAX)
    np.testing.assert_allclose(found.plv, plv, rtol=0, atol=PLV_ERROR_MAX)


def noise(count: int, channels: int, seed: int = 1) -> Floats:
    rng = np.random.default_rng(seed)
    return np.asarray(10 * rng.standard_normal((count, channels)) + 8 * rng.standard_normal((count, 1)))


@pytest.mark.parametrize(
    ("rate_hz", "count"), [(100, 200), (128, 250), (160, 320), (250, 500), (250, 1000), (256, 512)]
)
@pytest.mark.parametrize("channels", [1, 2, 5, 8])
def test_noise(window_type: type[WindowAnalysis], rate_hz: float, count: int, channels: int) -> None:
    check(window_type, noise(count, channels), rate_hz)


@pytest.mark.parametrize(("rate_hz", "count"), [(173, 346), (500, 1000), (1000, 2000), (2000, 4000)])
def test_other_rates(window_type: type[WindowAnalysis], rate_hz: float, count: int) -> None:
    check(window_type, noise(count, 3), rate_hz)


def test_many_channels(window_type: type[WindowAnalysis]) -> None:
    check(window_type, noise(500, 64), 250)


def test_many_windows(window_type: type[WindowAnalysis]) -> None:
    for seed in range(30):
        check(window_type, noise(500, 8, seed), 250)


def test_offsets(window_type: type[WindowAnalysis]) -> None:
    check(window_type, noise(500, 8) + np.array([1e5, -1e5, 187_500, 0, 3, 1e4, -5e4, 99_999.9]), 250)


def test_a_rail_that_is_left(window_type: type[WindowAnalysis]) -> None:
    uv = noise(500, 4)
    uv[:300, 1] = 187_500
    uv[400:, 2] += 1e5
    check(window_type, uv, 250)


@pytest.mark.parametrize("name", ["cyton", "muse", "eegmmidb"])
def test_recordings(window_type: type[WindowAnalysis], name: str, request: pytest.FixtureRequest) -> None:
    content, rate_hz = request.getfixturevalue(name)
    uv = np.stack(list(content.values())[:16], axis=1) if isinstance(content, dict) else content
    count = 2 * round(rate_hz)
    for start in range(0, len(uv) - count, count // 2):
        check(window_type, uv[start : start + count], rate_hz)


def test_bad_channels_have_no_values(window_type: type[WindowAnalysis]) -> None:
    uv = noise(500, 8)
    uv += [1e5, 0, -1e5, 50, 0, 0, 0, 99_999.9]
    uv[:, 1] = 61_379.36
    uv[77, 4] = math.nan
    uv[:, 5] = 187_500
    uv[10, 6] = 2e8
    bad = [1, 4, 5, 6]
    good = [0, 2, 3, 7]
    found = analysed(window_type, uv, 250)
    rest = by_scipy(uv[:, good], 250)
    i, j = np.triu_indices(8, 1)
    among_good = np.isin(i, good) & np.isin(j, good)
    np.testing.assert_allclose(found.relative_power[:, good], rest[0], rtol=0, atol=RELATIVE_POWER_ERROR_MAX)
    np.testing.assert_allclose(found.coherence[:, among_good], rest[2], rtol=0, atol=COHERENCE_ERROR_MAX)
    np.testing.assert_allclose(found.plv[among_good], rest[3], rtol=0, atol=PLV_ERROR_MAX)
    assert np.isnan(found.relative_power[:, bad]).all()
    assert np.isnan(found.entropy[bad]).all()
    assert np.isnan(found.coherence[:, ~among_good]).all()
    assert np.isnan(found.plv[~among_good]).all()


def test_one_channel_in_hum_and_another_with_a_sample_out_of_all_range(window_type: type[WindowAnalysis]) -> None:
    uv = noise(500, 8)
    uv[:, 0] = 0.01 * uv[:, 0] + 1000 * np.sin(2 * np.pi * 50 * np.arange(500) / 250)
    uv[201, 1] = -2e8
    uv[8, 2] = math.inf
    good = [0, 3, 4, 5, 6, 7]
    found = analysed(window_type, uv, 250)
    assert np.isnan(found.relative_power).any(axis=0).tolist() == [channel not in good for channel in range(8)]
    relative_power, _, coherence, plv = by_scipy(uv[:, good], 250)
    among_good = np.isin(PAIRS_OF_8, good).all(axis=0)
    np.testing.assert_allclose(found.relative_power[:, good], relative_power, rtol=0, atol=RELATIVE_POWER_ERROR_MAX)
    np.testing.assert_allclose(found.coherence[:, among_good], coherence, rtol=0, atol=COHERENCE_ERROR_MAX)
    np.testing.assert_allclose(found.plv[among_good], plv, rtol=0, atol=PLV_ERROR_MAX)
    assert np.isnan(found.plv[~among_good]).all()


def test_identical_signals_and_a_fixed_lag(window_type: type[WindowAnalysis]) -> None:
    angle = 2 * np.pi * 10 * np.arange(500) / 250
    own = noise(500, 1)
    found = analysed(window_type, np.hstack([own, -3 * own, own]), 250)
    np.testing.assert_allclose(found.coherence, 1, atol=COHERENCE_ERROR_MAX)
    np.testing.assert_allclose(found.plv, 1, atol=PLV_ERROR_MAX)
    lagged = analysed(window_type, np.stack([np.sin(angle), np.sin(angle - 1.2)], axis=1), 250)
    np.testing.assert_allclose(lagged.plv, 1, atol=PLV_ERROR_MAX)


def test_the_coherence_band_is_a_setting(window_type: type[WindowAnalysis]) -> None:
    settings = FeatureSettings(coherence_band=BETA)
    uv = noise(500, 3)
    spectrum = np.fft.rfft(uv, axis=0)
    spectrum[26:60] = spectrum[26:60, :1]
    found = analysed(window_type, np.fft.irfft(spectrum, 500, axis=0), 250, settings)
    np.testing.assert_allclose(found.plv, 1, atol=PLV_ERROR_MAX)
    assert list(phase_bins(BETA, 250, 500)) == list(range(26, 60))


@pytest.mark.parametrize("count", [249, 499, 2502, 0, -2])
def test_windows_outside_the_definitions_are_refused(window_type: type[WindowAnalysis], count: int) -> None:
    with pytest.raises(ValueError, match="expected an even number"):
        window_type(250.0, 2, count)


def test_pairs_can_be_left_out(window_type: type[WindowAnalysis]) -> None:
    uv = noise(500, 8)
    both = analysed(window_type, uv, 250)
    alone = window_type(250, 8, 500, with_pairs=False).analyse(uv)
    np.testing.assert_array_equal(alone.relative_power, both.relative_power)
    np.testing.assert_array_equal(alone.entropy, both.entropy)
    assert alone.coherence.shape == (5, 0)
    assert alone.plv.shape == (0,)
