"""One word and a reason for each electrode, judged while the samples come; real recordings raise no false alarm."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gateway.samples import ElectrodeState
from gateway.signal.electrodes import (
    MOTION_G,
    NOT_YET,
    OFF_AFTER_S,
    Electrode,
    ElectrodeWatch,
    MotionWatch,
)

RATE_HZ = 250.0
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


def eeg(rms_uv: float = 15.0, seconds: float = 1.0, seed: int = 5, rate_hz: float = RATE_HZ) -> Floats:
    return np.random.default_rng(seed).normal(0.0, rms_uv, round(seconds * rate_hz))


def sine(hz: float, rms_uv: float, seconds: float = 1.0, rate_hz: float = RATE_HZ) -> Floats:
    times_s = np.arange(round(seconds * rate_hz)) / rate_hz
    return np.asarray(rms_uv * np.sqrt(2) * np.sin(2 * np.pi * hz * times_s + 0.4))


def none_of(uv: Floats) -> Flags:
    return np.zeros(uv.shape, dtype=np.bool_)


def judge(*channels: Floats, railed: Flags | None = None, rate_hz: float = RATE_HZ) -> tuple[Electrode, ...]:
    uv = np.stack(channels, axis=1)
    watch = ElectrodeWatch(rate_hz, uv.shape[1])
    watch.push(uv, none_of(uv) if railed is None else railed)
    return watch.electrodes


def judge_one(uv: Floats, rate_hz: float = RATE_HZ) -> Electrode:
    """Among three that are as they should be."""
    others = [eeg(seconds=len(uv) / rate_hz, seed=seed, rate_hz=rate_hz) for seed in (11, 12, 13)]
    return judge(uv, *others, rate_hz=rate_hz)[0]


# --- what is said of one


@pytest.mark.parametrize("rate_hz", [125.0, 250.0, 256.0, 512.0])
def test_ordinary_eeg_is_ok_whatever_its_offset_and_drift(rate_hz: float) -> None:
    drift = np.linspace(0, 900, round(1.2 * rate_hz))
    uv = eeg(15.0, 1.2, rate_hz=rate_hz) + sine(10.0, 30.0, 1.2, rate_hz) - 12_000 + drift
    found = judge_one(uv, rate_hz)
    assert (found.state, found.reason) == (ElectrodeState.OK, "")
    in_band_uv = 15 * np.sqrt(2 * 44 / rate_hz)
    assert found.rms_uv == pytest.approx(np.hypot(30, in_band_uv), rel=0.15)


@pytest.mark.parametrize("hz", [50.0, 50.4, 60.0])
def test_hum_of_one_electrode_is_noise(hz: float) -> None:
    found = judge_one(eeg() + sine(hz, 80.0))
    assert found.state is ElectrodeState.NOISY
    assert re.fullmatch(rf"{hz:.0f} Hz mains: (79|8\d) uV rms, \d\.\d uV in the other electrodes", found.reason)
    assert found.rms_uv < 15, "the hum is not the EEG's"
    assert judge_one(eeg() + sine(hz, 15.0)).state is ElectrodeState.OK
    assert judge_one(eeg() + sine(44.0, 80.0)).state is ElectrodeState.OK


def test_hum_that_all_share_is_no_electrodes_fault_until_they_hang_in_the_air() -> None:
    shared = [eeg(seed=seed) + sine(60.0, 200.0) for seed in range(8)]
    assert {each.state for each in judge(*shared)} == {ElectrodeState.OK}
    (worse, *others) = judge(shared[0] + sine(60.0, 900.0), *shared[1:])
    assert worse.state is ElectrodeState.OFF
    assert worse.reason == "1.1 mV of 60 Hz mains: not on the skin"
    assert {each.state for each in others} == {ElectrodeState.OK}


@pytest.mark.parametrize("count", [1, 2])
def test_with_nothing_to_compare_with_the_ratio_to_the_eeg_decides(count: int) -> None:
    loud = [eeg(seed=seed) + sine(50.0, 80.0) for seed in range(count)]
    assert {each.state for each in judge(*loud)} == {ElectrodeState.NOISY}
    quiet = [eeg(seed=seed) + sine(50.0, 20.0) for seed in range(count)]
    assert {each.state for each in judge(*quiet)} == {ElectrodeState.OK}


def test_a_bad_neighbour_is_no_measure() -> None:
    hum = [eeg(seed=seed) + sine(50.0, 80.0) for seed in range(2)]
    flat = np.zeros(250)
    assert [each.state.value for each in judge(*hum, flat, flat, flat)] == ["noisy", "noisy", "off", "off", "off"]


def test_a_slow_stream_hears_no_mains() -> None:
    assert judge_one(eeg(rate_hz=100.0), 100.0).state is ElectrodeState.OK


def test_flat_is_off() -> None:
    assert judge_one(np.full(250, -37.5)) == Electrode(ElectrodeState.OFF, "flat: always the same value", 0.0)
    found = judge_one(np.full(250, 1e5) + 0.2 * (np.arange(250) % 2))
    assert (found.state, found.reason) == (ElectrodeState.OFF, "flat: 0.20 uV p-p")
    assert judge_one(0.3 * np.where(np.arange(250) % 2, 1.0, -1.0)).state is ElectrodeState.OK


def test_railed_comes_before_flat_and_says_how_much() -> None:
    railed = np.zeros((250, 1), dtype=np.bool_)
    railed[:25] = True
    (found,) = judge(np.full(250, 187_500.0), railed=railed)
    assert (found.state, found.reason) == (ElectrodeState.RAILED, "10 % of the samples at the end of the range")
    assert np.isnan(found.rms_uv)


def test_what_is_too_large_is_noise_and_after_three_seconds_off() -> None:
    uv = np.stack([eeg(rms_uv, 6.0, seed) for seed, rms_uv in enumerate((900.0, 300.0, 15.0))], axis=1)
    watch = ElectrodeWatch(RATE_HZ, 3)
    told = []
    for start in range(0, len(uv), 50):
        watch.push(uv[start : start + 50], none_of(uv[:50]))
        told.append([each.state.value for each in watch.electrodes])
    noisy_steps = round(OFF_AFTER_S / 0.2) - 1
    assert told[:4] == [["unknown"] * 3] * 4
    assert [states[0] for states in told[4:]] == ["noisy"] * noisy_steps + ["off"] * (26 - noisy_steps)
    assert {states[1] for states in told[4:]} == {states[2] for states in told[4:]} == {"ok"}
    assert "not on the skin, or loose" in watch.electrodes[0].reason


def test_before_a_whole_second_nothing_is_said_and_nothing_is_marked() -> None:
    watch = ElectrodeWatch(RATE_HZ, 2)
    uv = np.zeros((249, 2))
    assert not watch.push(uv, none_of(uv)).any()
    assert watch.electrodes == (NOT_YET, NOT_YET)
    watch.push(uv[:1], none_of(uv[:1]))
    assert [each.state.value for each in watch.electrodes] == ["off", "off"]


# --- motion


def test_motion_is_told_of_every_electrode_and_explains_its_amplitude() -> None:
    uv = np.stack([eeg(900.0, 6.0), eeg(15.0, 6.0)], axis=1)
    watch = ElectrodeWatch(RATE_HZ, 2)
    watch.push(uv, none_of(uv), motion_g=0.31)
    assert watch.electrodes[0].state is ElectrodeState.NOISY, "off would be wrong: it is the movement"
    assert {each.reason for each in watch.electrodes} == {"moved: 0.31 g"}
    watch.push(uv[:50], none_of(uv[:50]), motion_g=MOTION_G)
    assert watch.electrodes[1].state is ElectrodeState.OK


def test_motion_is_what_differs_from_gravity_and_grows_old() -> None:
    watch = MotionWatch(25.0)
    still = np.broadcast_to([0.1, -0.2, 0.97], (25, 3))
    watch.push(still[:24], 1_000_000_000)
    assert watch.motion_g(1_000_000_000) == 0.0
    watch.push(still[:1], 1_000_000_000)
    assert watch.motion_g(1_000_000_000) == pytest.approx(0.0, abs=1e-12)
    walking = still + np.outer(np.sin(2 * np.pi * 2 * np.arange(25) / 25), [0.0, 0.0, 0.4])
    watch.push(walking, 2_000_000_000)
    assert watch.motion_g(2_500_000_000) == pytest.approx(0.4 / np.sqrt(2), rel=1e-6)
    assert watch.motion_g(4_100_000_000) == 0.0, "an accelerometer that went quiet says nothing"


# --- marks


def test_a_fault_is_marked_in_the_whole_second_that_showed_it_and_in_its_channel_alone() -> None:
    uv = np.stack([eeg(seconds=4.0, seed=seed) for seed in range(3)], axis=1)
    uv[300:, 1] = 7.0
    watch = ElectrodeWatch(RATE_HZ, 3)
    causal = watch.push(uv[:500], none_of(uv[:500]))
    assert not causal.any(), "it became flat 200 samples ago: a second that shows it has not passed"
    causal = watch.push(uv[500:750], none_of(uv[:250]))
    assert np.flatnonzero(causal[:, 1]).tolist() == list(range(50, 250)), "the judgement was at 550"
    assert np.flatnonzero(watch.marked(250)[:, 1]).tolist() == list(range(250)), "all of it lies in that second"
    assert not watch.marked(250)[:, [0, 2]].any()


def test_railed_samples_are_marked_one_by_one() -> None:
    uv = np.stack([eeg(seconds=2.0, seed=seed) for seed in range(3)], axis=1)
    railed = none_of(uv)
    railed[260:263, 2] = True
    watch = ElectrodeWatch(RATE_HZ, 3)
    assert np.array_equal(watch.push(uv, railed), railed)
    assert np.array_equal(watch.marked(250), railed[250:])
    assert watch.electrodes[2].state is ElectrodeState.RAILED


def test_single_missing_samples_are_held_and_say_nothing_of_the_electrode() -> None:
    uv = np.stack([sine(10.0, 20.0, 4.0) + eeg(5.0, 4.0, seed) for seed in range(3)], axis=1)
    missing = none_of(uv)
    missing[5::50, 1] = True
    uv[missing] = -12_000.0
    uv[17, 2] = np.nan
    watch = ElectrodeWatch(RATE_HZ, 3)
    marked = watch.push(uv, none_of(uv), missing)
    assert {each.state for each in watch.electrodes} == {ElectrodeState.OK}
    assert np.array_equal(marked, missing | np.isnan(uv))


def test_an_electrode_of_which_most_is_missing_is_unknown() -> None:
    uv = np.stack([eeg(seconds=2.0, seed=seed) for seed in range(2)], axis=1)
    missing = none_of(uv)
    missing[:, 0] = np.arange(500) % 3 > 0
    watch = ElectrodeWatch(RATE_HZ, 2)
    watch.push(uv, none_of(uv), missing)
    assert watch.electrodes[0].state is ElectrodeState.UNKNOWN
    assert watch.electrodes[0].reason == "67 % of the samples did not come"
    assert watch.electrodes[1].state is ElectrodeState.OK


def test_losses_of_a_few_samples_do_not_keep_it_from_judging() -> None:
    uv = np.stack([eeg(seconds=10.0), np.zeros(2500)], axis=1)
    watch = ElectrodeWatch(RATE_HZ, 2)
    for start in range(0, 2500, 100):
        watch.push(uv[start : start + 99], none_of(uv[:99]))
        watch.miss(1)
    assert [each.state.value for each in watch.electrodes] == ["ok", "off"]


def test_after_a_second_of_loss_it_begins_anew() -> None:
    uv = np.zeros((300, 2))
    watch = ElectrodeWatch(RATE_HZ, 2)
    watch.miss(3)
    watch.push(uv, none_of(uv))
    assert watch.electrodes[0].state is ElectrodeState.OFF
    watch.miss(250)
    assert watch.electrodes == (NOT_YET, NOT_YET)
    assert not watch.push(uv[:249], none_of(uv[:249])).any()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=40), st.integers(0, 2**32 - 1))
def test_how_the_samples_are_cut_changes_nothing(sizes: list[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    uv = random.normal(0, 20, (sum(sizes), 3))
    uv[len(uv) // 2 :, 1] = 3.0
    railed, missing = random.random((2, *uv.shape)) < 0.002
    whole, pieces = ElectrodeWatch(RATE_HZ, 3), ElectrodeWatch(RATE_HZ, 3)
    marked = whole.push(uv, railed, missing)
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        assert np.array_equal(pieces.push(uv[rows], railed[rows], missing[rows]), marked[rows])
        start += size
    assert repr(pieces.electrodes) == repr(whole.electrodes)
    count = min(250, len(uv))
    assert np.array_equal(pieces.marked(count), whole.marked(count))


# --- real recordings


def told(uv: Floats, rate_hz: float) -> Iterator[tuple[int, Electrode]]:
    """Column and judgement of all electrodes, a fifth of a second each."""
    watch, step = ElectrodeWatch(rate_hz, uv.shape[1]), round(rate_hz / 5)
    for start in range(0, len(uv), step):
        piece = uv[start : start + step]
        watch.push(piece, none_of(piece))
        yield from enumerate(watch.electrodes)


def states_of(uv: Floats, rate_hz: float) -> list[Counter[str]]:
    found: list[Counter[str]] = [Counter() for _ in range(uv.shape[1])]
    for column, electrode in told(uv, rate_hz):
        found[column][electrode.state.value] += 1
    return found


def test_no_false_alarm_on_a_cyton_whose_electrodes_all_hear_sixty_hertz(cyton: tuple[Floats, float]) -> None:
    """The hum is 5 to 20 times the EEG in every channel, and blinks, jaw and alpha are plainly seen below it."""
    for states in states_of(*cyton):
        assert set(states) == {"ok", "unknown"}
        assert states["unknown"] == 4


def test_the_hum_on_one_electrode_of_a_muse_is_a_true_alarm_and_the_only_one(muse: tuple[Floats, float]) -> None:
    tp9, *others = states_of(*muse)
    assert tp9["noisy"] > 0.97 * tp9.total()
    for states in others:
        assert set(states) == {"ok", "unknown"}
    reasons = {each.reason.split(":")[0] for column, each in told(*muse) if column == 0 and each.reason}
    assert reasons == {NOT_YET.reason, "50 Hz mains"}


def test_no_false_alarm_on_64_channels_with_blinks(eegmmidb: tuple[dict[str, Floats], float]) -> None:
    channels, rate_hz = eegmmidb
    for states in states_of(np.stack(list(channels.values()), axis=1), rate_hz):
        assert set(states) == {"ok", "unknown"}
