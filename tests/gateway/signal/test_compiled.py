"""What only the compiled features can get wrong: every value against the numpy twin, and their door."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from types import ModuleType

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from gateway.kernels import BASELINE, PLAIN
from gateway.signal import numpy_features
from gateway.signal.bands import BETA, DELTA, GAMMA, Band, FeatureSettings
from gateway.signal.features import Features, implementations

TOLERANCE = 2e-6
Floats = NDArray[np.float64]
Run = Callable[..., list[Features | None]]
COMPILED = [name for name in implementations() if name != PLAIN]


@pytest.fixture(params=COMPILED)
def implementation(request: pytest.FixtureRequest) -> str:
    """Each compiled implementation."""
    return str(request.param)


@pytest.fixture
def compiled(implementation: str) -> ModuleType:
    return implementations()[implementation]


def mixed(duration_s: float, channels: int, rate_hz: float = 250.0, seed: int = 1) -> Floats:
    """Noise with a part that all channels share, uV."""
    rng = np.random.default_rng(seed)
    count = round(duration_s * rate_hz)
    return np.asarray(10 * rng.standard_normal((count, channels)) + 8 * rng.standard_normal((count, 1)))


def table(states: list[Features | None]) -> Floats:
    return np.array([[math.nan] * 8 if state is None else dataclasses.astuple(state) for state in states])


def compare(
    run: Run,
    uv: Floats,
    rate_hz: float,
    settings: FeatureSettings | None = None,
    bad: NDArray[np.bool_] | NDArray[np.int64] | None = None,
) -> Floats:
    """All states of the compiled features and of the twin: the same within the tolerance, and none where none."""
    settings = settings or FeatureSettings()
    found = table(run(uv, rate_hz, settings, bad))
    twin = numpy_features.FeatureEngine(rate_hz, uv.shape[1], settings)
    expected = table(run(uv, rate_hz, settings, bad, engine=twin))
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    return found


def test_there_is_a_compiled_implementation() -> None:
    assert BASELINE in COMPILED


@pytest.mark.parametrize(
    "rate_hz", [100.0, 127.0, 128.0, 160.0, 173.0, 199.5, 250.0, 250.2, 256.0, 512.0, 1000.0, 2000.0]
)
def test_any_rate(run: Run, rate_hz: float) -> None:
    states = compare(run, mixed(8, 3, rate_hz), rate_hz)
    assert not np.isnan(states[-1]).any()


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 7, 8, 9, 16, 31, 64])
def test_any_number_of_channels(run: Run, channels: int) -> None:
    states = compare(run, mixed(7, channels), 250.0)
    assert np.isnan(states[-1]).any() == (channels == 1)


def test_nasty_input(run: Run) -> None:
    uv = mixed(60, 8)
    uv += [1e5, -1e5, 187_500, 0, 3, 1e4, -5e4, 99_999.9]
    uv[2000:2600, 0] = 187_500
    uv[3000, 3] = math.nan
    uv[5000:5100, 4] = math.inf
    uv[:, 6] = 61_379.36
    uv[7000:9000, 2] += 1e5
    uv[4000:6000, 5] = -187_500
    uv[9000:9300, 1] = 0
    uv[11_000, 7] = 9e7
    compare(run, uv, 250.0)


@pytest.mark.parametrize("slope_uv", [30.0, 1000.0])
def test_drift(run: Run, slope_uv: float) -> None:
    uv = mixed(40, 4)
    uv += slope_uv * np.arange(len(uv))[:, np.newaxis] / 250 * [1, -1, 2, 0]
    compare(run, uv, 250.0)


@pytest.mark.parametrize("name", ["cyton", "muse", "eegmmidb"])
def test_recordings(run: Run, name: str, request: pytest.FixtureRequest) -> None:
    content, rate_hz = request.getfixturevalue(name)
    uv = np.stack(list(content.values()), axis=1)[:3200] if isinstance(content, dict) else content
    compare(run, uv, rate_hz)


@pytest.mark.parametrize(
    "settings",
    [
        FeatureSettings(coherence_band=BETA),
        FeatureSettings(coherence_band=DELTA),
        FeatureSettings(coherence_band=GAMMA, entropy_band=Band("entropy", 4, 45)),
        FeatureSettings(coherence_band=Band("wide", 1, 45), plv_window_s=1),
        FeatureSettings(coherence_band=Band("narrow", 10, 11), plv_window_s=10),
        FeatureSettings(power_time_constant_s=0.2, coherence_time_constant_s=2),
        FeatureSettings(power_time_constant_s=math.inf, coherence_time_constant_s=math.inf),
        FeatureSettings(power_time_constant_s=500, coherence_time_constant_s=500),
        FeatureSettings(mains_hz=60),
        FeatureSettings(pass_band_hz=(0.5, 70)),
        FeatureSettings(common_average=True),
        FeatureSettings(mains_hz=50, pass_band_hz=(1, 40), common_average=True),
    ],
    ids=str,
)
def test_settings(run: Run, settings: FeatureSettings) -> None:
    uv = mixed(30, 5) + np.array([1e4, 0, -2e4, 50, 0])
    uv[2000:2030, 2] = math.nan
    uv[4000:4500, 4] += 5e4
    compare(run, uv, 250.0, settings)


def test_channels_that_began_at_different_times(run: Run) -> None:
    # Seven interruptions make eight groups; with a time constant of 2 s they are one again after 92 s.
    uv = mixed(115, 9)
    for channel in range(7):
        uv[400 * (channel + 1), channel] = math.nan
    uv[3900, 8] = math.nan
    compare(run, uv, 250.0, FeatureSettings(coherence_time_constant_s=2))
    compare(run, uv[:10_000], 250.0, FeatureSettings(coherence_time_constant_s=math.inf))


def test_marks(run: Run) -> None:
    uv, rng = mixed(30, 6), np.random.default_rng(3)
    bad = np.zeros(uv.shape, dtype=np.bool_)
    for start, channel in zip(rng.integers(0, len(uv), 10), rng.integers(0, 6, 10), strict=True):
        bad[start : start + 40, channel] = True
    compare(run, uv, 250.0, bad=bad)
    compare(run, uv, 250.0, bad=bad @ (1 << np.arange(6)))
    compare(run, uv, 250.0, bad=np.repeat(bad, 2, axis=0)[::2])
    compare(run, uv, 250.0, bad=np.asfortranarray(bad))


def test_steps_of_any_length(compiled: ModuleType) -> None:
    rng = np.random.default_rng(12)
    uv = mixed(60, 3)
    engine, twin = compiled.FeatureEngine(250.0, 3), numpy_features.FeatureEngine(250.0, 3)
    start = 0
    while start < len(uv):
        stop = start + int(rng.integers(0, 200))
        for one in (engine, twin):
            one.push(uv[start:stop])
        found, expected = engine.step(), twin.step()
        np.testing.assert_allclose(table([found]), table([expected]), rtol=0, atol=TOLERANCE)
        start = stop


def test_nothing_of_the_past_stays(compiled: ModuleType) -> None:
    """200,000 steps, some of them 10,000 times as loud: no drift, no memory."""
    uv = mixed(40, 8, seed=5)
    blocks = [np.ascontiguousarray(uv[start : start + 50]) for start in range(0, len(uv), 50)]
    engine = compiled.FeatureEngine(250.0, 8)
    process = psutil.Process()
    rss_before = 0
    for turn in range(1000):
        if turn == 200:
            rss_before = process.memory_info().rss
        for block in blocks:
            engine.push(block * 1e4 if turn % 50 == 7 else block)
            state = engine.step()
    assert process.memory_info().rss - rss_before < 1_000_000
    # The phases fall on the same samples if the number of those before is a multiple of the decimation, 7.
    end = 1000 * len(uv)
    numbers = np.arange(end - (5 * len(uv) - 3), end)
    assert numbers[0] % 7 == 0
    fresh = compiled.FeatureEngine(250.0, 8)
    fresh.push(uv[numbers[:47] % len(uv)])
    for start in range(47, len(numbers), 50):
        fresh.push(uv[numbers[start : start + 50] % len(uv)])
        expected = fresh.step()
    np.testing.assert_allclose(table([state]), table([expected]), rtol=0, atol=5e-7)


def test_samples_in_other_forms(compiled: ModuleType) -> None:
    uv = np.round(mixed(7, 8) * 100)
    engine = compiled.FeatureEngine(250.0, 8)
    engine.push(uv)
    expected = table([engine.step()])
    packed = np.zeros(uv.shape, dtype=[("mark", "u1"), ("uv", "f8")])
    packed["uv"] = uv
    wide = np.zeros((len(uv), 20))
    wide[:, 2:18:2] = uv
    forms = {
        "Fortran order": np.asfortranarray(uv),
        "columns of a wider array": wide[:, 2:18:2],
        "backwards": np.ascontiguousarray(uv[::-1])[::-1],
        "integers": uv.astype(np.int64),
        "single": uv.astype(np.float32),
        "big endian": uv.astype(">f8"),
        "not aligned": packed["uv"],
    }
    for name, form in forms.items():
        engine.reset()
        engine.push(form)
        np.testing.assert_array_equal(table([engine.step()]), expected, err_msg=name)
    engine.reset()
    engine.push(np.zeros((0, 8)))
    assert engine.step() is None


@pytest.mark.parametrize("shape", [(0,), (500,), (500, 7), (500, 9), (7, 500, 8)])
def test_windows_of_another_shape_are_refused(compiled: ModuleType, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="samples have shape"):
        compiled.WindowAnalysis(250.0, 8, 500).analyse(np.zeros(shape))
    with pytest.raises(ValueError, match="samples have shape"):
        compiled.FeatureEngine(250.0, 8).push(np.zeros(shape)[..., :3])


def test_what_is_no_array_is_refused(compiled: ModuleType) -> None:
    with pytest.raises(TypeError):
        compiled.FeatureEngine(250.0, 2).push([[1.0, 2.0]])


@pytest.mark.parametrize(
    ("rate_hz", "channels"), [(99.9, 8), (2000.1, 8), (math.nan, 8), (250, 0), (250, 65), (250, -1)]
)
def test_streams_outside_the_definitions_are_refused(compiled: ModuleType, rate_hz: float, channels: int) -> None:
    with pytest.raises(ValueError, match=r"sampling rate|channels"):
        compiled.FeatureEngine(rate_hz, channels)
    with pytest.raises(ValueError, match=r"sampling rate|channels"):
        compiled.WindowAnalysis(rate_hz, channels, 500)
