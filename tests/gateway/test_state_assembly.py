"""Brain states of streams of any rate and with any losses: one every 200 ms of the stream's own time, of the samples
that belong to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gateway import state_assembly
from gateway.assembly import RawAssembler
from gateway.clock import HostClock
from gateway.devices.base import Missing, Samples, SignalSpec
from gateway.samples import (
    BRAIN_STATE,
    BRAIN_STATE_FIELDS,
    BRAIN_STATE_PERIOD_NS,
    EEG,
    NS_PER_S,
    QUALITY,
    LossRecord,
    SampleBlock,
)
from gateway.signal.bands import DEFAULT_SETTINGS
from gateway.signal.features import FeatureEngine, Features

CHANNELS = ("C3", "C4")
SECONDS = 10
BURST = 7
FLOAT32 = 1e-6


@pytest.mark.parametrize("rate_hz", [100.0, 128.0, 160.0, 173.0, 249.7, 250.0, 256.0, 512.0, 1000.0, 2000.0])
def test_a_state_every_200_ms_of_the_streams_own_time(rate_hz: float) -> None:
    uv = 20 * np.random.default_rng(4).standard_normal((round(SECONDS * rate_hz), len(CHANNELS)))
    items: list[Any] = []
    assembler = RawAssembler(
        "E-1",
        SignalSpec(EEG, rate_hz, CHANNELS, ("uV",) * len(CHANNELS)),
        0,
        HostClock(lambda: 0, lambda: 1_700_000_000 * NS_PER_S + 77_000_001),
        items.append,
        brain_state=DEFAULT_SETTINGS,
    )
    for index in range(0, len(uv), BURST):
        part = uv[index : index + BURST]
        columns = {name: part[:, k].copy() for k, name in enumerate(CHANNELS)}
        assembler.take(Samples(EEG, index, columns, round((index + len(part)) / rate_hz * NS_PER_S)))
    assembler.finish()

    blocks = [item for item in items if isinstance(item, SampleBlock)]
    states = [block for block in blocks if block.signal == BRAIN_STATE]
    times_ns = np.concatenate([block.times_ns for block in states])
    assert (np.diff(times_ns) == BRAIN_STATE_PERIOD_NS).all()
    assert len(times_ns) in {5 * SECONDS - 5, 5 * SECONDS - 4}

    # The same values come from an engine that is given, for each state, what was sampled up to half a second after it.
    sample_times_ns = np.concatenate([block.times_ns for block in blocks if block.signal == EEG])
    ends = np.searchsorted(sample_times_ns, times_ns + NS_PER_S // 2, side="right")
    assert all(abs(stop - start - rate_hz / 5) <= 1 for start, stop in pairwise(ends.tolist()))
    found = [np.concatenate([block.columns[name] for block in states]) for name in BRAIN_STATE_FIELDS]
    engine = FeatureEngine(rate_hz, len(CHANNELS))
    engine.push(uv[: ends[0]])
    for number, (start, stop) in enumerate(pairwise([ends[0], *ends.tolist()])):
        engine.push(uv[start:stop])
        state = engine.step()
        assert state is not None
        values = [column[number] for column in found]
        np.testing.assert_allclose(values[:5], astuple(state)[:5], rtol=0, atol=FLOAT32)
        assert math.isnan(values[5]) == math.isnan(state.coherence)


# --- with losses

RATE_HZ = 250
PERIOD_NS = NS_PER_S // RATE_HZ
START_NS = 1_700_000_000 * NS_PER_S + 77_000_001
LATENCY_NS = NS_PER_S // 2
LONGEST, SHARE = 12, 25
"""Samples of a gap that is bridged, and in a second, at 250 Hz."""


@dataclass(frozen=True)
class Part:
    """The next samples of a stream: of which channels they do not come."""

    count: int
    gone: tuple[int, ...] = ()


def noise(count: int) -> NDArray[np.float64]:
    return 20 * np.random.default_rng(5).standard_normal((count, len(CHANNELS)))


def events(parts: list[Part]) -> Iterator[Samples | Missing]:
    uv, at = noise(sum(part.count for part in parts)), 0
    for part in parts:
        if len(part.gone) == len(CHANNELS):
            yield Missing(EEG, at, part.count)
        else:
            table = uv[at : at + part.count].copy()
            table[:, list(part.gone)] = 0
            columns: dict[str, Any] = {name: table[:, k].copy() for k, name in enumerate(CHANNELS)}
            columns[QUALITY] = np.full(part.count, sum(1 << channel for channel in part.gone), np.int64)
            yield Samples(EEG, at, columns, (at + part.count - 1) * PERIOD_NS)
        at += part.count


class Watched:
    """An assembler of a device whose raw samples are not sent, and what it gives."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self.states: list[Features] = []
        self.taking = RawAssembler(
            "E-1",
            SignalSpec(EEG, float(RATE_HZ), CHANNELS, ("uV",) * len(CHANNELS)),
            0,
            HostClock(lambda: 0, lambda: START_NS),
            self.items.append,
            brain_state=DEFAULT_SETTINGS,
            on_state=self.states.append,
            raw=False,
        )

    def take(self, parts: list[Part]) -> Watched:
        for event in events(parts):
            self.taking.take(event)
        self.taking.finish()
        return self

    @property
    def times(self) -> list[int]:
        return [int(time) for item in self.items if isinstance(item, SampleBlock) for time in item.times_ns]

    @property
    def lost(self) -> list[int]:
        """Grid points of all loss records."""
        records = [item for item in self.items if isinstance(item, LossRecord)]
        points = [range(each.first_ns, each.last_ns + 1, BRAIN_STATE_PERIOD_NS) for each in records]
        assert [len(each) for each in points] == [each.sample_count for each in records]
        return [point for each in points for point in each]

    @property
    def table(self) -> NDArray[np.float64]:
        return np.array([astuple(state) for state in self.states])


def second_before(time_ns: int) -> slice:
    """The samples that a state's newest segment holds."""
    stop = (time_ns + LATENCY_NS - START_NS) // PERIOD_NS + 1
    return slice(stop - RATE_HZ, stop)


def may_count(absent: NDArray[np.bool_], second: slice) -> bool:
    """Whether one channel's second, (all samples,), may be part of a state."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], absent, [False]]).astype(np.int8))).reshape(-1, 2)
    touching = [stop - start for start, stop in edges if start < second.stop and stop > second.start]
    return absent[second].sum() <= SHARE and max(touching, default=0) <= LONGEST


GONE = st.sampled_from([(), (), (), (0,), (1,), (0, 1), (0, 1)])
PARTS = st.lists(
    st.builds(Part, st.one_of(st.integers(1, 20), st.integers(1, 400)), GONE), min_size=1, max_size=40
).map(lambda parts: [Part(60), *parts, Part(700)])


@settings(max_examples=150, deadline=None)
@given(parts=PARTS)
def test_whatever_is_lost_states_stand_on_the_grid_and_each_point_is_a_state_or_on_record(parts: list[Part]) -> None:
    watched = Watched().take(parts)
    times, lost = watched.times, watched.lost
    assert times
    assert all(time % BRAIN_STATE_PERIOD_NS == 0 for time in times)
    assert all(later > earlier for earlier, later in pairwise(times))
    grid = range(times[0], max(times[-1], *lost, times[0]) + 1, BRAIN_STATE_PERIOD_NS)
    assert sorted([*times, *lost]) == list(grid)
    absent = np.concatenate([np.tile(np.isin(np.arange(2), part.gone), (part.count, 1)) for part in parts])
    for time in times:
        assert any(may_count(absent[:, channel], second_before(time)) for channel in range(2)), (
            "its second is not whole"
        )
    for time in lost:
        second = second_before(time)
        assert absent[max(0, second.start) : second.stop].any(axis=0).all(), "it has a channel that is whole"


def test_with_no_loss_the_engine_is_fed_exactly_as_the_samples_come() -> None:
    """To the last bit: the same pieces, and a step between the same two samples."""
    watched = Watched().take([Part(BURST)] * (12 * RATE_HZ // BURST))
    uv = noise(12 * RATE_HZ // BURST * BURST)
    engine, states, fed = FeatureEngine(RATE_HZ, len(CHANNELS)), [], 0
    due_ns = -(-(START_NS - LATENCY_NS) // BRAIN_STATE_PERIOD_NS) * BRAIN_STATE_PERIOD_NS
    for stop in range(BURST, len(uv) + 1, BURST):
        while (upto := (due_ns + LATENCY_NS - START_NS) // PERIOD_NS + 1) < stop:
            engine.push(uv[fed:upto])
            fed, due_ns = max(fed, upto), due_ns + BRAIN_STATE_PERIOD_NS
            states.append(engine.step())
        engine.push(uv[fed:stop])
        fed = stop
    expected = np.array([astuple(state) for state in states if state is not None])
    assert len(expected) > 50
    assert np.array_equal(watched.table, expected, equal_nan=True)


def test_a_state_comes_with_the_sample_after_its_second_and_with_the_one_after_a_gap() -> None:
    def counts(parts: list[Part]) -> list[int]:
        """States that are known after each sample, from the fourth second on."""
        watched, found = Watched(), []
        for event in events([Part(1)] * 1_000 + parts):
            watched.taking.take(event)
            found.append(len(watched.states))
        return found[1_000:]

    plain = counts([Part(1)] * 100)
    assert len(set(plain)) == 3
    step = next(at for at in range(100) if plain[at + 1] > plain[at]) + 1
    before, behind = step - 6, 100 - (step - 6) - LONGEST
    lossy = counts([*[Part(1)] * before, *[Part(1, (0,))] * LONGEST, *[Part(1)] * behind])
    back = before + LONGEST
    assert lossy[:step] == plain[:step]
    assert lossy[step:back] == [plain[step] - 1] * (back - step), "it needs the sample after the gap"
    assert lossy[back:] == plain[back:]


@pytest.mark.parametrize(("count", "goes_on"), [(LONGEST + 1, True), (RATE_HZ, True), (RATE_HZ + 1, False)])
def test_averages_go_on_after_a_gap_of_up_to_a_second(count: int, goes_on: bool) -> None:
    watched = Watched().take([Part(2_500), Part(count, (0, 1)), Part(500)])
    before = next(k for k, (a, b) in enumerate(pairwise(watched.times)) if b - a > BRAIN_STATE_PERIOD_NS)
    after = watched.states[before + 1]
    assert math.isfinite(watched.states[before].coherence)
    assert math.isfinite(after.coherence) == goes_on
    # an average of one segment is far rougher than one of many
    assert (abs(after.entropy - watched.states[before].entropy) < 0.02) == goes_on
    assert len(watched.lost) == pytest.approx((RATE_HZ + count) / 50, abs=1)


def test_a_second_of_losses_told_piece_by_piece_is_one_gap() -> None:
    whole, pieces = ([Part(2_500), *gap, Part(500)] for gap in ([Part(260, (0, 1))], [Part(130, (0, 1))] * 2))
    assert np.array_equal(Watched().take(whole).table, Watched().take(pieces).table, equal_nan=True)
    assert not math.isfinite(Watched().take(pieces).states[-1].coherence)


@pytest.mark.parametrize("gone", [(0,), (0, 1)])
def test_grid_points_that_wait_for_the_end_of_a_gap_when_the_connection_ends_are_on_record(
    gone: tuple[int, ...],
) -> None:
    waited = 0
    for count in range(1_500, 1_550, 10):
        watched = Watched().take([Part(count), Part(LONGEST, gone)])
        end_ns = START_NS + (count + LONGEST - 1) * PERIOD_NS - LATENCY_NS
        assert [*watched.times, *watched.lost] == list(range(watched.times[0], end_ns, BRAIN_STATE_PERIOD_NS))
        waited += len(watched.lost)
    assert (waited > 0) == (len(gone) == len(CHANNELS)), "the state of one electrode counts"


def test_a_value_that_is_no_number_is_a_sample_that_did_not_come() -> None:
    watched = Watched()
    for event in events([Part(2_000), Part(3), Part(300)]):
        if isinstance(event, Samples) and event.index == 2_000:
            event.columns["C4"][:] = math.nan
        watched.taking.take(event)
    watched.taking.finish()
    assert all(math.isfinite(state.coherence) for state in watched.states[-10:])


@pytest.mark.parametrize("count", range(300, 350, 10))
def test_nothing_from_before_a_long_gap_is_seen_behind_it(count: int) -> None:
    tables = []
    for offset_uv in (0.0, 5_000.0):
        watched = Watched()
        for event in events([Part(1_000), Part(count, (0, 1)), Part(LONGEST, (0,)), Part(300)]):
            if isinstance(event, Samples) and event.index == 0:
                event.columns["C3"][:] += offset_uv
            watched.taking.take(event)
        watched.taking.finish()
        tables.append(watched.table[-5:])
    np.testing.assert_allclose(tables[0], tables[1], rtol=0, atol=1e-5)


def test_an_electrode_that_loses_too_much_is_left_out_and_the_other_is_not() -> None:
    """As if it were not there: its second is not whole."""
    watched = Watched().take([Part(1_000), *[Part(50), Part(11, (1,))] * 4, Part(100)])
    assert watched.lost == []
    assert [math.isfinite(state.coherence) for state in watched.states[-8:]].count(False) >= 4
    assert all(math.isfinite(state.alpha) for state in watched.states)


@pytest.mark.parametrize(("gap_s_max", "found"), [(1.0, True), (0.0, False)])
def test_control_of_the_longest_gap(monkeypatch: pytest.MonkeyPatch, gap_s_max: float, found: bool) -> None:
    monkeypatch.setattr(state_assembly, "GAP_S_MAX", gap_s_max)
    assert math.isfinite(Watched().take([Part(2_500), Part(20, (0, 1)), Part(500)]).states[-1].coherence) == found
