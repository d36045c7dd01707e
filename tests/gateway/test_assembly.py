"""Blocks, losses, brain states and readings from a decoder's events, in simulated time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gateway.anchor import UNSEEN_ERROR_NS
from gateway.assembly import BLOCK_SAMPLES_MAX, READING_ERROR_NS, SETTLE_EVENTS_MAX, RawAssembler, ReadingAssembler
from gateway.clock import HostClock
from gateway.devices.base import Missing, Reading, Samples, SignalSpec
from gateway.kernel_clock import Discipline
from gateway.samples import (
    BRAIN_STATE,
    BRAIN_STATE_FIELDS,
    BRAIN_STATE_PERIOD_NS,
    EEG,
    NS_PER_S,
    QUALITY,
    VITAL_SIGNS,
    ClockState,
    ElectrodeState,
    LossCause,
    LossRecord,
    SampleBlock,
)
from gateway.signal.bands import DEFAULT_SETTINGS
from gateway.signal.electrodes import MotionWatch
from gateway.signal.features import FeatureEngine, Features
from tests.gateway import machine as time_machine

MS = 1_000_000
SCALE = 0.0223517
RAIL = 8_388_607
CHANNELS = ("C3", "C4", "O1")
SPEC = SignalSpec(EEG, 250.0, CHANNELS, ("uV",) * 3)
PERIOD_NS = 4 * MS


@dataclass
class Machine:
    """A computer's clocks, moved by hand."""

    monotonic: int = 0
    offset: int = 1_700_000_000 * NS_PER_S + 123_456_789
    discipline: Discipline = field(default_factory=lambda: Discipline(ClockState.SYNCED, MS))

    def clock(self) -> HostClock:
        return HostClock(lambda: self.monotonic, lambda: self.monotonic + self.offset, lambda: self.discipline)


@dataclass
class Output:
    """What an assembler gave out."""

    items: list[SampleBlock | LossRecord] = field(default_factory=list)
    states: list[Features] = field(default_factory=list)

    def blocks(self, signal: str) -> list[SampleBlock]:
        return [item for item in self.items if isinstance(item, SampleBlock) and item.signal == signal]

    @property
    def losses(self) -> list[LossRecord]:
        return [item for item in self.items if isinstance(item, LossRecord)]

    def times(self, signal: str) -> NDArray[np.int64]:
        return np.concatenate([block.times_ns for block in self.blocks(signal)] or [np.zeros(0, np.int64)])

    def column(self, signal: str, name: str) -> NDArray[np.float64]:
        return np.concatenate([block.columns[name] for block in self.blocks(signal)])


def noise(count: int, seed: int = 1) -> NDArray[np.int32]:
    """Counts (n, 3) of three electrodes that have something in common."""
    random = np.random.default_rng(seed)
    common = random.normal(0, 400, count).cumsum()[:, np.newaxis] * 0.05
    return np.rint(common + random.normal(0, 500, (count, 3))).astype(np.int32)


def hum(count: int, hz: float, amplitude: float) -> NDArray[np.int32]:
    return np.rint(amplitude * np.sin(2 * np.pi * hz * np.arange(count) / 250)).astype(np.int32)


def samples(counts: NDArray[np.int32], start: int, stop: int, arrival_ns: int) -> Samples:
    columns = {name: counts[start:stop, k].copy() for k, name in enumerate(CHANNELS)}
    return Samples(EEG, start, columns, arrival_ns, dict.fromkeys(CHANNELS, SCALE))


def bursts(
    counts: NDArray[np.int32], *, lost: Sequence[range] = (), size: int = 5, period_ns: float = PERIOD_NS, seed: int = 0
) -> Iterator[Samples | Missing]:
    """The events of a decoder: `size` samples a burst, `lost` ones missing; with a seed up to 60 ms of jitter."""
    random = np.random.default_rng(seed)
    arrival_ns, at = 0, 0
    while at < len(counts):
        gap = next((gap for gap in lost if gap.start == at), None)
        if gap is not None:
            yield Missing(EEG, at, len(gap))
            at = gap.stop
            continue
        stop = min([len(counts), at + size, *(gap.start for gap in lost if gap.start > at)])
        delay_ns = random.uniform(0, 60 * MS) if seed else 0.0
        arrival_ns = max(arrival_ns, round((stop - 1) * period_ns + delay_ns))
        yield samples(counts, at, stop, arrival_ns)
        at = stop


def assembler(output: Output, host: HostClock, spec: SignalSpec = SPEC, **options: Any) -> RawAssembler:
    chosen: dict[str, Any] = {"brain_state": DEFAULT_SETTINGS, "on_state": output.states.append} | options
    return RawAssembler("CYTON-1", spec, 3, host, output.items.append, **chosen)


def run(events: Iterator[Samples | Missing], machine: Machine | None = None, **options: Any) -> Output:
    output = Output()
    taking = assembler(output, (machine or Machine()).clock(), **options)
    for event in events:
        taking.take(event)
    taking.finish()
    return output


# --- raw blocks


def test_blocks_of_a_second_with_every_value_and_an_even_time_axis() -> None:
    counts = noise(1_100)
    output = run(bursts(counts))
    blocks = output.blocks(EEG)
    assert [len(block) for block in blocks] == [250, 250, 250, 250, 100]
    assert {(block.device, block.segment) for block in blocks} == {("CYTON-1", 3)}
    for k, name in enumerate(CHANNELS):
        assert np.array_equal(output.column(EEG, name), counts[:, k])
        assert blocks[0].scales[name] == SCALE
    assert blocks[0].columns["C3"].dtype == np.int32
    assert blocks[0].columns[QUALITY].dtype == np.int64
    assert np.array_equal(output.times(EEG), Machine().offset + PERIOD_NS * np.arange(1_100))
    assert output.losses == []


def test_the_settling_second_is_held_and_then_given_out_whole() -> None:
    output, counts = Output(), noise(250 + 6)
    taking = assembler(output, Machine().clock())
    for event in bursts(counts[:250], size=1):
        taking.take(event)
    assert output.items == []
    taking.take(samples(counts, 250, 256, 255 * PERIOD_NS))
    assert [len(block) for block in output.blocks(EEG)] == [250]
    taking.finish()
    assert np.array_equal(output.column(EEG, "O1"), counts[:, 2])


def test_events_that_never_settle_are_not_held_for_ever() -> None:
    output, counts = Output(), noise(SETTLE_EVENTS_MAX + 1)
    taking = assembler(output, Machine().clock(), brain_state=None)
    for at in range(SETTLE_EVENTS_MAX):
        taking.take(samples(counts, at, at + 1, 5))
    assert output.items == []
    taking.take(samples(counts, SETTLE_EVENTS_MAX, SETTLE_EVENTS_MAX + 1, 5))
    assert len(output.times(EEG)) >= SETTLE_EVENTS_MAX - 250
    taking.finish()
    assert len(output.times(EEG)) == SETTLE_EVENTS_MAX + 1


@pytest.mark.parametrize("lost", [range(700, 703), range(750, 751), range(500, 1_400), range(100, 110)])
def test_a_loss_cuts_the_block_and_is_on_record_to_the_sample(lost: range) -> None:
    counts = noise(2_000)
    output = run(bursts(counts, lost=[lost]))
    kept = np.setdiff1d(np.arange(2_000), lost)
    assert np.array_equal(output.column(EEG, "C4"), counts[kept, 1])
    assert np.array_equal(output.times(EEG), Machine().offset + PERIOD_NS * kept)
    (loss,) = output.losses
    assert (loss.device, loss.signal, loss.cause, loss.sample_count) == ("CYTON-1", EEG, LossCause.RADIO, len(lost))
    assert loss.first_ns == Machine().offset + PERIOD_NS * lost.start
    assert loss.last_ns == Machine().offset + PERIOD_NS * (lost.stop - 1)
    for block in output.blocks(EEG):
        assert np.all(np.diff(block.times_ns) == PERIOD_NS), "no gap inside a block"
    numbers = [item for item in output.items if not (isinstance(item, SampleBlock) and item.signal == BRAIN_STATE)]
    assert [item.first_ns for item in numbers] == sorted(item.first_ns for item in numbers)


def test_losses_in_the_settling_second_before_and_behind_the_first_sample() -> None:
    counts = noise(600)
    output = run(bursts(counts, lost=[range(2), range(10, 12), range(598, 600)]))
    assert [(loss.first_ns - Machine().offset) // PERIOD_NS for loss in output.losses] == [0, 10, 598]
    assert len(output.times(EEG)) + sum(loss.sample_count for loss in output.losses) == 600


def test_a_loss_with_nothing_that_ever_arrived_is_stamped_with_the_time_of_its_report() -> None:
    machine = Machine(monotonic=5 * NS_PER_S)
    output = run(iter([Missing(EEG, 0, 7)]), machine)
    (loss,) = output.losses
    assert (loss.first_ns, loss.last_ns, loss.sample_count) == (machine.offset + machine.monotonic,) * 2 + (7,)


def test_railed_samples_are_marked_sample_by_sample_and_electrode_by_electrode() -> None:
    counts = noise(600)
    counts[100, 0], counts[101, 2], counts[300:310, 1] = RAIL, -RAIL - 1, RAIL
    quality = run(bursts(counts)).column(EEG, QUALITY)
    expected = np.zeros(600)
    expected[100], expected[101], expected[300:310] = 1, 4, 2
    assert np.array_equal(quality, expected)


def test_the_converters_own_full_scale_counts() -> None:
    spec = SignalSpec(EEG, 250.0, CHANNELS, ("uV",) * 3, full_scale=(-100, 100))
    counts = np.clip(noise(300), -98, 98)
    counts[7, 1], counts[8, 1], counts[9, 1] = 99, 100, -100
    quality = run(bursts(counts), spec=spec).column(EEG, QUALITY)
    assert np.flatnonzero(quality).tolist() == [8, 9]


def test_a_bad_electrode_has_its_bit_in_every_second_that_shows_it() -> None:
    """Flat from sample 1,300 on: seen by the second that ends at 1,550, when the block up to 1,500 is given out."""
    counts = noise(2_500)
    counts[1_300:, 1] = 77
    counts[:, 2] = hum(2_500, 60.0, 4_000)
    quality = run(bursts(counts)).column(EEG, QUALITY).astype(int)
    assert np.flatnonzero(quality & 1).tolist() == []
    assert np.flatnonzero(quality & 2).tolist() == list(range(1_500, 2_500))
    assert (quality & 4).all(), "also the first second, which is given out after it was judged"


def test_the_states_of_the_electrodes_are_told_by_name() -> None:
    counts = noise(600)
    counts[:, 1] = 5
    output = Output()
    taking = assembler(output, Machine().clock())
    assert {each.state for each in taking.electrodes.values()} == {ElectrodeState.UNKNOWN}
    for event in bursts(counts):
        taking.take(event)
    assert {name: each.state.value for name, each in taking.electrodes.items()} == {"C3": "ok", "C4": "off", "O1": "ok"}
    ppg = assembler(output, Machine().clock(), SignalSpec("ppg", 64.0, ("red",), ("1",)))
    assert ppg.electrodes == {}


@pytest.mark.parametrize(("shaken_g", "bits"), [(0.3, 0b111), (0.05, 0)])
def test_movement_marks_every_electrode(shaken_g: float, bits: int) -> None:
    motion = MotionWatch(25.0)
    quality = []
    for shaken in (False, True):
        output = Output()
        taking = assembler(output, Machine().clock(), motion=motion)
        axis = np.where(np.arange(50) % 2, shaken_g, -shaken_g) if shaken else np.zeros(50)
        motion.push(np.stack([axis, np.zeros(50), np.ones(50)], axis=1), 0)
        for event in bursts(noise(500)):
            taking.take(event)
        taking.finish()
        quality.append(output.column(EEG, QUALITY).astype(int)[:250])
    assert set(quality[0]) == {0}
    assert set(quality[1]) == {bits}


def test_physical_values_have_no_rails() -> None:
    values = np.full(300, np.nan)
    values[1:] = 1e9
    spec = SignalSpec("ppg", 250.0, ("red",), ("1",))
    event = Samples("ppg", 0, {"red": values}, 2 * NS_PER_S)
    assert not run(iter([event]), spec=spec, brain_state=None).column("ppg", QUALITY).any()


@pytest.mark.parametrize(("rate_hz", "largest"), [(0.2, 1), (1.0, 1), (130.0, 130), (16_000.0, BLOCK_SAMPLES_MAX)])
def test_blocks_of_any_rate_keep_to_the_wires_limit(rate_hz: float, largest: int) -> None:
    spec = SignalSpec("ecg", rate_hz, ("II",), ("uV",))
    count = 3 * largest + 1
    event = Samples("ecg", 0, {"II": np.arange(count, dtype=np.int32)}, 0)
    output = run(iter([event]), spec=spec, brain_state=None)
    assert [len(block) for block in output.blocks("ecg")] == [largest] * 3 + [1]
    assert np.array_equal(output.column("ecg", "II"), np.arange(count))


def test_what_is_not_wanted_is_not_given_out() -> None:
    counts = noise(1_500)
    assert not run(bursts(counts), brain_state=None).blocks(BRAIN_STATE)
    features_only = run(bursts(counts), raw=False)
    assert not features_only.blocks(EEG)
    assert np.array_equal(features_only.times(BRAIN_STATE), run(bursts(counts)).times(BRAIN_STATE))


def test_trust_is_the_hosts_and_the_axis_together() -> None:
    machine = Machine(discipline=Discipline(ClockState.UNKNOWN, 500 * MS))
    block = run(bursts(noise(600), seed=4), machine).blocks(EEG)[-1]
    assert block.clock.state is ClockState.UNKNOWN
    assert 500 * MS < block.clock.error_ns < 600 * MS


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 700), min_size=1, max_size=12),
    losses=st.lists(st.one_of(st.just(0), st.integers(1, 900)), min_size=12, max_size=12),
    seed=st.integers(0, 5),
    last=st.integers(0, 12),
)
def test_all_that_goes_in_comes_out_whatever_the_chunks_and_losses(
    sizes: list[int], losses: list[int], seed: int, last: int
) -> None:
    output = Output()
    taking = assembler(output, Machine().clock())
    random = np.random.default_rng(seed)
    at = went_in = missed = 0
    for size, loss in list(zip(sizes, losses, strict=False))[:last]:
        if loss:
            taking.take(Missing(EEG, at, loss))
            at, missed = at + loss, missed + loss
        counts = np.arange(at, at + size, dtype=np.int32)
        columns = dict.fromkeys(CHANNELS, counts)
        arrival_ns = round((at + size) * PERIOD_NS + random.uniform(0, 60 * MS))
        taking.take(Samples(EEG, at, columns, arrival_ns, dict.fromkeys(CHANNELS, SCALE)))
        at, went_in = at + size, went_in + size
    taking.finish()
    assert sum(len(block) for block in output.blocks(EEG)) == went_in
    assert sum(loss.sample_count for loss in output.losses) == missed
    assert all(1 <= len(block) <= 250 for block in output.blocks(EEG))
    if output.blocks(EEG):
        assert np.all(np.diff(output.column(EEG, "C3")) > 0)
    for signal in (EEG, BRAIN_STATE):
        assert np.all(np.diff(output.times(signal)) > 0)
    for block in output.blocks(EEG):
        assert np.array_equal(np.diff(block.columns["C3"]), np.ones(len(block) - 1))
    for loss in output.losses:
        assert not np.any((output.times(EEG) >= loss.first_ns) & (output.times(EEG) <= loss.last_ns))


# --- brain states


def expected_states(
    counts: NDArray[np.int32], start_ns: int, due_ns: int, period_ns: int = PERIOD_NS
) -> dict[int, Features]:
    """The feature engine by itself, fed up to each grid point: time -> state."""
    engine = FeatureEngine(250.0, 3)
    latency_ns = round(engine.latency_s * NS_PER_S)
    states: dict[int, Features] = {}
    done = 0
    while True:
        upto = (due_ns + latency_ns - start_ns) // period_ns + 1
        if upto >= len(counts):
            return states
        engine.push(counts[done:upto] * SCALE, np.abs(counts[done:upto]) >= RAIL)
        done = upto
        state = engine.step()
        if state is not None and not math.isnan(state.alpha):
            states[due_ns] = state
        due_ns += BRAIN_STATE_PERIOD_NS


def grid_after(time_ns: int) -> int:
    return -(-time_ns // BRAIN_STATE_PERIOD_NS) * BRAIN_STATE_PERIOD_NS


def assert_same_states(given: NDArray[np.float64], expected: NDArray[np.float64]) -> None:
    """To within the rounding of an engine that computes in 32 bits, which depends on how it is fed."""
    np.testing.assert_allclose(given, expected, rtol=0, atol=3e-6, equal_nan=True)


def rows(output: Output) -> NDArray[np.float64]:
    return np.stack([output.column(BRAIN_STATE, name) for name in BRAIN_STATE_FIELDS], axis=1)


def table(states: dict[int, Features]) -> NDArray[np.float64]:
    return np.array([astuple(state) for state in states.values()])


@pytest.mark.parametrize("size", [1, 7, 250, 4_000])
def test_states_are_the_feature_engines_on_the_grid_of_utc(size: int) -> None:
    counts = noise(4_000)
    output = run(bursts(counts, size=size))
    start_ns = Machine().offset
    expected = expected_states(counts, start_ns, grid_after(start_ns - NS_PER_S // 2))
    assert len(expected) > 70
    assert output.times(BRAIN_STATE).tolist() == list(expected)
    assert_same_states(rows(output), table(expected))
    assert not np.isnan(rows(output)[-1]).any()
    assert np.array_equal(np.array([astuple(state) for state in output.states]), rows(output), equal_nan=True)
    blocks = output.blocks(BRAIN_STATE)
    assert {len(block) for block in blocks[1:-1]} == {5}
    assert all(block.last_ns // NS_PER_S == block.first_ns // NS_PER_S for block in blocks), "a block is a second"
    assert {block.segment for block in blocks} == {3}


@pytest.mark.parametrize("skew", [-1e-4, 1e-4, 2.5e-3])
def test_states_stay_exactly_200_ms_apart_for_minutes_of_drift_and_jitter(skew: float) -> None:
    output = run(bursts(noise(120 * 250), period_ns=PERIOD_NS * (1 + skew), seed=9, size=8))
    times = output.times(BRAIN_STATE)
    assert len(times) == pytest.approx(119 * 5 * (1 + skew), abs=4)
    assert np.all(np.diff(times) == BRAIN_STATE_PERIOD_NS)
    assert np.all(times % BRAIN_STATE_PERIOD_NS == 0)
    raw = output.times(EEG)
    assert raw[0] + NS_PER_S // 2 - 4 * MS <= times[0] <= raw[0] + NS_PER_S // 2 + BRAIN_STATE_PERIOD_NS + 4 * MS


def test_no_state_is_joined_across_more_than_a_second() -> None:
    """Its window of a second lies behind the gap, and its values are those of an engine that knows nothing before."""
    counts = noise(3_000)
    gap = range(1_503, 1_754)
    output = run(bursts(counts, lost=[gap]))
    times = output.times(BRAIN_STATE)
    resumed_ns = Machine().offset + PERIOD_NS * gap.stop
    window_ns, latency_ns = NS_PER_S - PERIOD_NS, NS_PER_S // 2
    before = times[times + latency_ns < resumed_ns]
    after = times[times + latency_ns >= resumed_ns]
    assert len(before) > 20
    assert after[0] + latency_ns - window_ns >= resumed_ns
    assert after[0] - resumed_ns < 800 * MS
    expected = expected_states(counts[gap.stop :], resumed_ns, grid_after(resumed_ns - latency_ns))
    assert after.tolist() == list(expected)
    assert_same_states(rows(output)[len(before) :], table(expected))
    assert all(not block.first_ns < resumed_ns - latency_ns < block.last_ns for block in output.blocks(BRAIN_STATE))


def test_railed_electrodes_are_left_out_of_the_features() -> None:
    counts = noise(2_000)
    counts[:, 1] = RAIL
    output = run(bursts(counts))
    expected = expected_states(counts, Machine().offset, grid_after(Machine().offset - NS_PER_S // 2))
    assert_same_states(rows(output), table(expected))
    assert np.isfinite(rows(output)[-1]).all()
    without = run(bursts(counts[:, [0, 2, 2]]))
    assert rows(output)[-1][2] == pytest.approx(rows(without)[-1][2], rel=0.5)


def test_an_electrode_drowned_in_mains_is_left_out_of_the_features() -> None:
    counts, drowned = noise(3_000), noise(3_000)
    drowned[:, 1] += hum(3_000, 50.0, 20_000)
    without = run(bursts(counts[:, [0, 2, 2]]), spec=SignalSpec(EEG, 250.0, CHANNELS[:2], ("uV",) * 2))
    assert_same_states(rows(run(bursts(drowned)))[10:], rows(without)[10:])
    assert np.nanmax(np.abs(rows(run(bursts(counts)))[10:] - rows(without)[10:])) > 0.01, "it would have counted"


def test_where_nothing_is_usable_there_is_no_state_and_no_block_spans_the_hole() -> None:
    counts = noise(3_000)
    counts[1_000:1_013, :] = RAIL
    output = run(bursts(counts))
    times = output.times(BRAIN_STATE)
    apart = np.diff(times)
    assert set(apart[apart != BRAIN_STATE_PERIOD_NS]) == {6 * BRAIN_STATE_PERIOD_NS}
    for block in output.blocks(BRAIN_STATE):
        assert np.all(np.diff(block.times_ns) == BRAIN_STATE_PERIOD_NS)
    assert len(output.times(EEG)) == 3_000


def test_where_raw_samples_are_not_sent_a_loss_is_what_it_cost_the_states() -> None:
    """Every grid point from the first state to the last is either a state or in a loss record, and none is in both."""
    short = [range(100, 103), range(700, 701), range(1_300, 1_312), range(3_400, 3_402)]
    gaps = sorted([*short, range(1_503, 1_520), range(1_600, 1_700), range(2_500, 2_800)], key=lambda gap: gap.start)
    output = run(bursts(noise(4_000), lost=gaps), raw=False)
    assert output.blocks(EEG) == []
    assert {(loss.signal, loss.cause) for loss in output.losses} == {(BRAIN_STATE, LossCause.RADIO)}
    assert len(output.losses) == 2, "the second came before there was a state again, and the short ones cost none"
    times = output.times(BRAIN_STATE)
    grid = range(int(times[0]), int(times[-1]) + 1, BRAIN_STATE_PERIOD_NS)
    lost = [range(loss.first_ns, loss.last_ns + 1, BRAIN_STATE_PERIOD_NS) for loss in output.losses]
    assert [len(each) for each in lost] == [loss.sample_count for loss in output.losses]
    assert sorted([*times.tolist(), *(point for each in lost for point in each)]) == list(grid)
    sent = run(bursts(noise(4_000), lost=gaps))
    assert np.array_equal(sent.times(BRAIN_STATE), times)
    assert {loss.signal for loss in sent.losses} == {EEG}


def test_states_that_the_electrodes_cost_are_no_loss() -> None:
    """They are railed when the gap's second is over: from there on nothing is missing."""
    counts, gap = noise(4_000), range(1_500, 1_520)
    counts[1_700:3_000] = RAIL
    (loss,) = run(bursts(counts, lost=[gap]), raw=False).losses
    whole_again_ns = Machine().offset + PERIOD_NS * (gap.stop + 250)
    assert whole_again_ns - BRAIN_STATE_PERIOD_NS <= loss.last_ns + NS_PER_S // 2 <= whole_again_ns


def test_no_state_is_joined_across_a_leap_of_the_time_axis_at_a_loss() -> None:
    """Half a second off from the 20th second on, which is believed after ten more; a loss stands before each block.

    The first block is short: so the tenth second ends within a block, and the loss is what finds the axis gone.
    """
    counts, output = noise(251 * 50), Output()
    taking = assembler(output, Machine().clock(), raw=False)
    first = 0
    for block in range(50):
        late_ns = NS_PER_S // 2 if block >= 20 else 0
        stop = first + (250 if block else 100)
        for at in range(first, stop, 10):
            taking.take(samples(counts, at, at + 10, (at + 9) * PERIOD_NS + late_ns))
        taking.take(Missing(EEG, stop, 1))
        first = stop + 1
    taking.finish()
    apart = np.diff(output.times(BRAIN_STATE))
    (leap,) = apart[apart != BRAIN_STATE_PERIOD_NS]
    assert leap > NS_PER_S


def test_states_that_a_loss_cost_at_the_end_are_on_record_too() -> None:
    output = run(bursts(noise(1_600), lost=[range(1_503, 1_516)]), raw=False)
    (loss,) = output.losses
    assert loss.first_ns == output.times(BRAIN_STATE)[-1] + BRAIN_STATE_PERIOD_NS
    assert loss.last_ns + NS_PER_S // 2 <= Machine().offset + PERIOD_NS * 1_600


def test_without_states_and_raw_samples_there_is_nothing_to_lose() -> None:
    assert run(bursts(noise(1_600), lost=[range(1_503, 1_504)]), raw=False, brain_state=None).items == []


@pytest.mark.parametrize("wrong_ns", [-3_600 * NS_PER_S, 123_456_789, -1_700_000_000 * NS_PER_S])
def test_held_times_and_what_follows_are_put_right_as_one(wrong_ns: int) -> None:
    """Also by decades: a board without a battery boots in 1970. The grid keeps its phase, with no gap and no double."""
    machine = time_machine.Machine(offset=time_machine.TRUE_OFFSET_NS + wrong_ns, said=time_machine.UNSYNCED)
    host, output, counts = machine.clock(holds=True), Output(), noise(4_000)
    begun_ns, held = machine.boot, 0
    taking = assembler(output, host)
    for event in bursts(counts):
        assert isinstance(event, Samples)
        if event.index == 1_605:
            host.give_out(output.items[0].first_ns, output.items[-1].last_ns)
            held = len(output.items)
            machine.offset, machine.said = time_machine.TRUE_OFFSET_NS, time_machine.SYNCED
            machine.run(11, host)
        taking.take(replace(event, arrival_ns=event.arrival_ns + begun_ns))
    taking.finish()
    assert host.shift_ns == -wrong_ns
    for signal, apart_ns in ((EEG, PERIOD_NS), (BRAIN_STATE, BRAIN_STATE_PERIOD_NS)):
        blocks = [item for item in output.items if isinstance(item, SampleBlock) and item.signal == signal]
        moved = [block.times_ns + host.shift_ns * (block in output.items[:held]) for block in blocks]
        assert np.all(np.diff(np.concatenate(moved)) == apart_ns)
        assert 0 < sum(block in output.items[:held] for block in blocks) < len(blocks)
    for item in output.items:
        assert isinstance(item, SampleBlock)
        assert item.clock.state is (ClockState.UNSYNCED if item in output.items[:held] else ClockState.SYNCED)
    raw = np.concatenate([block.times_ns for block in output.blocks(EEG)[-2:]])
    assert raw[-1] == begun_ns + time_machine.TRUE_OFFSET_NS + 3_999 * PERIOD_NS


def test_what_is_held_carries_only_the_error_of_its_own_axis() -> None:
    machine = time_machine.Machine(said=time_machine.UNSYNCED)
    output = Output()
    taking = assembler(output, machine.clock(holds=True))
    for event in bursts(noise(1_100)):
        taking.take(event)
    taking.finish()
    for block in output.blocks(EEG) + output.blocks(BRAIN_STATE):
        assert block.clock.state is ClockState.UNSYNCED
        assert block.clock.error_ns < 20 * MS


def test_time_that_is_worked_back_never_turns_back_even_at_the_highest_rates() -> None:
    """A block of 1 s may bend by 0.5 ms, which is two samples at 4,000 Hz."""
    spec = SignalSpec("emg", 4_000.0, CHANNELS, ("uV",) * 3)
    machine = time_machine.Machine()
    host, output = machine.clock(), Output()
    taking = assembler(output, host, spec, brain_state=False)
    machine.offset -= NS_PER_S
    for second in range(60):
        machine.run(1, host)
        counts = np.arange(4_000, dtype=np.int32)
        columns = dict.fromkeys(CHANNELS, counts)
        taking.take(Samples("emg", second * 4_000, columns, machine.monotonic(), dict.fromkeys(CHANNELS, SCALE)))
        host.give_out(0, host.now_ns())
    assert host.offset_ns < machine.offset + NS_PER_S
    assert np.all(np.diff(output.times("emg")) > 0)


def test_a_new_segment_lies_behind_the_one_before() -> None:
    machine = Machine()
    after_ns = {EEG: machine.offset + NS_PER_S, BRAIN_STATE: grid_after(machine.offset + 3 * NS_PER_S)}
    output = run(bursts(noise(2_500)), machine, after_ns=after_ns)
    assert output.times(EEG)[0] == after_ns[EEG] + PERIOD_NS
    assert output.times(BRAIN_STATE)[0] == after_ns[BRAIN_STATE] + BRAIN_STATE_PERIOD_NS
    assert np.all(np.diff(output.times(BRAIN_STATE)) == BRAIN_STATE_PERIOD_NS)


# --- readings


def readings(*given_fields: tuple[int, dict[str, float]]) -> list[Reading]:
    return [Reading(VITAL_SIGNS, fields, arrival_ns) for arrival_ns, fields in given_fields]


def reading_assembler(output: Output, after_ns: int | None = None) -> ReadingAssembler:
    return ReadingAssembler("STRAP-1", VITAL_SIGNS, 2, Machine().clock(), output.items.append, after_ns)


def test_what_came_together_is_a_block_with_a_column_for_every_field() -> None:
    output = Output()
    taking = reading_assembler(output)
    taking.take(readings((1_000, {"rr_interval": 800.0}), (2_000, {"rr_interval": 810.0, "heart_rate": 74.0})))
    taking.take([])
    (block,) = output.blocks(VITAL_SIGNS)
    assert (block.device, block.signal, block.segment) == ("STRAP-1", VITAL_SIGNS, 2)
    assert list(block.columns) == ["heart_rate", "rr_interval"]
    assert all(column.dtype == np.float64 for column in block.columns.values())
    assert np.array_equal(block.columns["heart_rate"], [math.nan, 74.0], equal_nan=True)
    assert block.columns["rr_interval"].tolist() == [800.0, 810.0]
    assert block.times_ns.tolist() == [Machine().offset + 1_000, Machine().offset + 2_000]
    assert (block.clock.state, block.clock.error_ns) == (ClockState.SYNCED, MS + UNSEEN_ERROR_NS + READING_ERROR_NS)


@settings(deadline=None)
@given(arrivals=st.lists(st.lists(st.integers(0, 10**10), max_size=9), max_size=9))
def test_readings_are_strictly_in_order_whatever_the_jitter(arrivals: list[list[int]]) -> None:
    output = Output()
    taking = reading_assembler(output, Machine().offset + 500)
    for together in arrivals:
        taking.take(readings(*((arrival_ns, {"rr_interval": 800.0}) for arrival_ns in together)))
    times = output.times(VITAL_SIGNS)
    assert len(times) == sum(map(len, arrivals))
    assert all(before < after for before, after in pairwise([Machine().offset + 500, *times.tolist()]))
