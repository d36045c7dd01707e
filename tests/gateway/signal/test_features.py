from __future__ import annotations

import dataclasses
import gc
import math
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from gateway.samples import BRAIN_STATE_FIELDS
from gateway.signal.bands import BETA, Band, FeatureSettings
from gateway.signal.features import FeatureEngine, Features

RATE_HZ = 250.0
Floats = NDArray[np.float64]
Run = Callable[..., list[Features | None]]


def noise(duration_s: float, channels: int, seed: int = 1, rate_hz: float = RATE_HZ) -> Floats:
    return 10 * np.random.default_rng(seed).standard_normal((round(duration_s * rate_hz), channels))


def values(states: list[Features | None], name: str) -> Floats:
    """The field of all states that have one."""
    found = np.array([getattr(state, name) for state in states if state is not None])
    return found[~np.isnan(found)]


def last(states: list[Features | None]) -> Features:
    assert states[-1] is not None
    return states[-1]


def close(one: Features | None, other: Features | None, tolerance: float = 1e-9) -> bool:
    if one is None or other is None:
        return one is other
    return bool(
        np.allclose(dataclasses.astuple(one), dataclasses.astuple(other), rtol=0, atol=tolerance, equal_nan=True)
    )


def test_the_fields_are_those_of_the_data_model() -> None:
    assert tuple(field.name for field in dataclasses.fields(Features)) == BRAIN_STATE_FIELDS


@pytest.mark.parametrize("rate_hz", [100.0, 128.0, 160.0, 250.0, 250.2, 256.0, 500.0, 2000.0])
def test_states_of_any_rate(run: Run, rate_hz: float) -> None:
    states = run(noise(7, 3, rate_hz=rate_hz), rate_hz)
    assert [state is None for state in states[:5]] == [True] * 4 + [False]
    for state in states[4:]:
        assert state is not None
        assert sum(dataclasses.astuple(state)[:5]) == pytest.approx(1, abs=1e-9)
        assert 0 <= state.entropy <= 1
    assert next(step for step, state in enumerate(states, 1) if state and not math.isnan(state.coherence)) == 24
    assert next(step for step, state in enumerate(states, 1) if state and not math.isnan(state.plv)) in {25, 26}


def test_a_state_refers_to_half_a_second_ago(engine_type: type[FeatureEngine]) -> None:
    assert engine_type(RATE_HZ, 2).latency_s == 0.5


def test_unrelated_noise(run: Run) -> None:
    states = run(noise(60, 8), RATE_HZ)
    coherence = values(states, "coherence")
    assert coherence.mean() == pytest.approx(0, abs=0.05)
    assert ((coherence >= 0) & (coherence <= 1)).all()
    assert values(states, "plv").mean() < 0.25
    assert values(states, "entropy")[20:].min() > 0.97
    # 5, 17 and 3 of 44 bins.
    assert values(states, "alpha").mean() == pytest.approx(5 / 44, abs=0.02)
    assert values(states, "beta").mean() == pytest.approx(17 / 44, abs=0.02)
    assert values(states, "delta").mean() == pytest.approx(3 / 44, abs=0.02)


def test_identical_signals(run: Run, exact: float) -> None:
    states = run(np.repeat(noise(10, 1), 4, axis=1) * [1, 2, -3, 0.1], RATE_HZ)
    np.testing.assert_allclose(values(states, "coherence"), 1, atol=exact)
    np.testing.assert_allclose(values(states, "plv"), 1, atol=exact)


@pytest.mark.parametrize("coherence", [0.2, 0.5, 0.8])
def test_signals_of_known_coherence(run: Run, coherence: float) -> None:
    # A common part of variance a beside an own one of 1: the coherence of a pair is (a / (1 + a))^2.
    share = math.sqrt(coherence)
    common = math.sqrt(share / (1 - share)) * noise(240, 1, seed=2)
    found = values(run(common + noise(240, 4, seed=3), RATE_HZ), "coherence")
    assert found.mean() == pytest.approx(coherence, abs=0.05)


def test_a_sine(run: Run) -> None:
    angle = 2 * np.pi * 10 * np.arange(2000) / RATE_HZ
    state = last(run(np.stack([np.sin(angle), np.sin(angle + 1)], axis=1), RATE_HZ))
    assert state.alpha > 0.999
    assert state.entropy < 0.25  # a Hann window spreads a line over three bins
    assert state.plv == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("frequency_hz", [4, 8, 13, 30])
def test_an_edge_belongs_to_the_band_above_it(run: Run, frequency_hz: int) -> None:
    angle = 2 * np.pi * frequency_hz * np.arange(500) / RATE_HZ
    state = last(run(np.sin(angle)[:, np.newaxis], RATE_HZ))
    above = {4: state.theta, 8: state.alpha, 13: state.beta, 30: state.gamma}[frequency_hz]
    below = {4: state.delta, 8: state.theta, 13: state.alpha, 30: state.beta}[frequency_hz]
    assert above == pytest.approx(5 / 6, abs=0.01)
    assert below == pytest.approx(1 / 6, abs=0.01)


def test_offsets_cost_no_accuracy(run: Run, exact: float) -> None:
    uv = noise(8, 4) + 5 * noise(8, 1, seed=4)
    moved = run(uv + np.array([1e5, -1e5, 187_500, 0]), RATE_HZ)
    assert all(close(one, other, max(exact, 1e-8)) for one, other in zip(run(uv, RATE_HZ), moved, strict=True))


def test_the_coherence_band_is_a_setting(run: Run) -> None:
    own, common = noise(30, 3, seed=5), noise(30, 1, seed=6)
    spectrum = np.fft.rfft(common, axis=0)
    spectrum[(np.fft.rfftfreq(common.shape[0], 1 / RATE_HZ) < 13)] = 0
    uv = own + 5 * np.fft.irfft(spectrum, common.shape[0], axis=0)
    assert last(run(uv, RATE_HZ)).coherence < 0.4
    state = last(run(uv, RATE_HZ, FeatureSettings(coherence_band=BETA)))
    assert state.coherence > 0.8
    assert state.plv > 0.8


def test_the_entropy_band_is_a_setting(run: Run) -> None:
    angle = 2 * np.pi * 2 * np.arange(2500) / RATE_HZ
    uv = noise(10, 2) + 200 * np.sin(angle)[:, np.newaxis]
    assert last(run(uv, RATE_HZ)).entropy < 0.4
    assert last(run(uv, RATE_HZ, FeatureSettings(entropy_band=Band("entropy", 4, 45)))).entropy > 0.97


@pytest.mark.parametrize("rate_hz", [160.0, 256.0])
def test_sizes_of_pushes_do_not_matter(engine_type: type[FeatureEngine], run: Run, rate_hz: float) -> None:
    uv = noise(9, 3, rate_hz=rate_hz)
    uv[700, 1] = np.nan
    engine = engine_type(rate_hz, 3)
    rng = np.random.default_rng(7)
    states, start = [], 0
    for step in range(1, 46):
        stop = math.ceil(step * rate_hz / 5)
        while start < stop:
            piece = min(int(rng.integers(1, 40)), stop - start)
            engine.push(uv[start : start + piece])
            start += piece
        states.append(engine.step())
    assert all(close(one, other) for one, other in zip(states, run(uv, rate_hz), strict=True))


def test_a_push_longer_than_the_memory(engine_type: type[FeatureEngine]) -> None:
    uv = noise(23.3, 2)
    whole, pieces = engine_type(RATE_HZ, 2), engine_type(RATE_HZ, 2)
    whole.push(uv)
    for start in range(0, uv.shape[0], 33):
        pieces.push(uv[start : start + 33])
    one, other = whole.step(), pieces.step()
    assert one is not None
    assert not math.isnan(one.plv)
    assert close(one, other)


def test_an_unusable_channel_is_left_out(run: Run, exact: float) -> None:
    uv = noise(12, 4)
    bad = np.zeros(uv.shape, dtype=np.bool_)
    bad[:, 2] = True
    uv[:, 2] *= 1000
    states = run(uv, RATE_HZ, bad=bad)
    without = run(uv[:, [0, 1, 3]], RATE_HZ)
    assert all(close(one, other, exact) for one, other in zip(states, without, strict=True))
    assert not close(last(states), last(run(uv, RATE_HZ)), 1e-3)


@pytest.mark.parametrize("kind", ["nan", "inf", "too much", "flag", "mask", "bits"])
def test_ways_to_say_unusable(engine_type: type[FeatureEngine], kind: str, exact: float) -> None:
    uv = noise(6, 3)
    engine = engine_type(RATE_HZ, 3)
    engine.push(uv[:-50])
    newest = uv[-50:].copy()
    bad: NDArray[np.bool_] | NDArray[np.int64] | None = None
    if kind in {"nan", "inf", "too much"}:
        newest[10, 1] = {"nan": math.nan, "inf": -math.inf, "too much": 1e300}[kind]
    elif kind == "flag":
        bad = np.array([False, True, False])
    elif kind == "mask":
        bad = np.zeros((50, 3), dtype=np.bool_)
        bad[10, 1] = True
    else:
        bad = np.zeros(50, dtype=np.int64)
        bad[10] = 0b010
    engine.push(newest, bad)
    expected = engine_type(RATE_HZ, 2)
    expected.push(uv[:, [0, 2]])
    assert close(engine.step(), expected.step(), exact)


def test_an_unusable_sample_counts_as_long_as_it_touches_a_window(run: Run, exact: float) -> None:
    uv = noise(16, 2)
    uv[1260, 1] = np.nan  # comes in step 26 and leaves the newest second with step 31
    states = dict(enumerate(run(uv, RATE_HZ), 1))
    alone = dict(enumerate(run(uv[:, :1], RATE_HZ), 1))

    def without(name: str) -> list[int]:
        return [step for step in range(26, 81) if math.isnan(getattr(states[step], name))]

    assert [
        step for step in range(26, 81) if states[step].alpha == pytest.approx(alone[step].alpha, abs=exact * 1e-3)
    ] == [*range(26, 31)]
    assert without("coherence") == list(range(26, 31 + 19))
    assert without("plv") == list(range(26, 51))


def test_fewer_than_two_good_channels_have_no_coherence(run: Run, exact: float) -> None:
    uv = noise(8, 3)
    uv[:, 1:] = np.nan
    state = last(run(uv, RATE_HZ))
    assert math.isnan(state.coherence)
    assert math.isnan(state.plv)
    assert close(
        dataclasses.replace(state, coherence=0, plv=0),
        dataclasses.replace(last(run(uv[:, :1], RATE_HZ)), coherence=0, plv=0),
        exact,
    )


def test_no_good_channel_has_no_value(run: Run) -> None:
    assert np.isnan(dataclasses.astuple(last(run(np.full((2000, 2), np.nan), RATE_HZ)))).all()


def test_a_dead_channel_is_left_out(run: Run, exact: float) -> None:
    uv = noise(12, 3)
    uv[:, 1] = 61379.36
    without = run(uv[:, [0, 2]], RATE_HZ)
    assert all(close(one, other, exact) for one, other in zip(run(uv, RATE_HZ), without, strict=True))


def test_rails_and_steps_do_no_harm_afterwards(run: Run, exact: float) -> None:
    uv = noise(30, 3)
    harmed = uv.copy()
    harmed[500:800, 0] = 187_500
    harmed[600:700, 1] = np.nan
    bits = (harmed[:, 0] == 187_500).astype(np.int64)
    states, clean = run(harmed, RATE_HZ, bad=bits), run(uv, RATE_HZ)
    assert all(state is not None and 0 <= state.alpha <= 1 for state in states[5:])
    # PLV has no memory beyond its window; the averages keep a share of exp(-t / 4 s).
    assert last(states).plv == pytest.approx(last(clean).plv, abs=exact)
    assert last(states).alpha == pytest.approx(last(clean).alpha, abs=5e-3)


def test_reset_makes_a_new_engine(engine_type: type[FeatureEngine], run: Run) -> None:
    engine = engine_type(RATE_HZ, 3)
    run(1e4 * noise(11.3, 3, seed=8), RATE_HZ, engine=engine)
    engine.reset()
    uv = noise(8, 3)
    states, fresh = run(uv, RATE_HZ, engine=engine), run(uv, RATE_HZ)
    assert states[:4] == [None] * 4
    assert all(close(one, other) for one, other in zip(states, fresh, strict=True))


def test_a_step_without_new_samples_is_no_state(engine_type: type[FeatureEngine]) -> None:
    engine = engine_type(RATE_HZ, 2)
    assert engine.step() is None
    engine.push(noise(2, 2))
    assert engine.step() is not None
    assert engine.step() is None


@pytest.mark.parametrize("shape", [(50,), (50, 3), (50, 2, 1)])
def test_samples_of_another_shape_are_refused(engine_type: type[FeatureEngine], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="samples have shape"):
        engine_type(RATE_HZ, 2).push(np.zeros(shape))


@pytest.mark.parametrize(
    "bad", [np.zeros(3, dtype=np.bool_), np.zeros((9, 2), dtype=np.bool_), np.zeros(9, dtype=np.int64), np.zeros(10)]
)
def test_marks_of_another_shape_are_refused(engine_type: type[FeatureEngine], bad: NDArray[np.bool_]) -> None:
    with pytest.raises(ValueError, match="bad is"):
        engine_type(RATE_HZ, 2).push(np.zeros((10, 2)), bad)


def test_memory_does_not_grow(engine_type: type[FeatureEngine], run: Run) -> None:
    engine = engine_type(RATE_HZ, 8)
    uv = noise(10, 8)
    run(uv, RATE_HZ, engine=engine)
    tracemalloc.start()
    try:
        run(uv, RATE_HZ, engine=engine)
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(6):
            run(uv, RATE_HZ, engine=engine)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 20_000


@pytest.mark.parametrize(("electrode", "alpha"), [("O1", 0.147), ("Oz", 0.133), ("Cz", 0.097)])
def test_relative_alpha_of_a_recording(
    run: Run, eegmmidb: tuple[dict[str, Floats], float], electrode: str, alpha: float
) -> None:
    signals, rate_hz = eegmmidb
    states = run(signals[electrode][:, np.newaxis], rate_hz, FeatureSettings(power_time_constant_s=math.inf))
    assert last(states).alpha == pytest.approx(alpha, abs=0.01)


def test_alpha_rises_when_the_eyes_close(run: Run, cyton: tuple[Floats, float]) -> None:
    uv, rate_hz = cyton
    states = run(uv[:, 6:8], rate_hz)
    # Mean densities: alpha has 5 bins, beta 17.
    ratio = np.array([state.alpha / 5 / (state.beta / 17) if state else math.nan for state in states])
    before, after = ratio[5 * 5 : 5 * 20], ratio[5 * 32 : 5 * 60]
    assert np.median(before) == pytest.approx(1.4, abs=0.3)
    assert np.median(after) == pytest.approx(5, abs=1)
    assert after.min() > before.max()


def test_all_channels_of_a_recording(run: Run, cyton: tuple[Floats, float]) -> None:
    uv, rate_hz = cyton
    states = run(uv, rate_hz)
    assert len(states) == 449
    for state in states[25:]:
        assert state is not None
        fields = dataclasses.astuple(state)
        assert all(0 <= value <= 1 for value in fields)
        assert sum(fields[:5]) == pytest.approx(1, abs=1e-6)
