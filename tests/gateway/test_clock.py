"""The host's clock, in simulated time: no test looks at how fast this machine is."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from gateway.clock import STEP_NS, HostClock
from gateway.kernel_clock import Discipline
from gateway.samples import NS_PER_S, ClockState

MS = 1_000_000


@dataclass
class Machine:
    """A computer's clocks, moved by hand."""

    monotonic: int = 5 * NS_PER_S
    offset: int = 1_700_000_000 * NS_PER_S
    discipline: Discipline = field(default_factory=lambda: Discipline(ClockState.SYNCED, 3 * MS))
    reading_ns: list[int] = field(default_factory=list)
    """What passes while the clock is read, reading by reading."""

    def clock(self) -> HostClock:
        return HostClock(self.read_monotonic, lambda: self.monotonic + self.offset, lambda: self.discipline)

    def read_monotonic(self) -> int:
        if self.reading_ns:
            self.monotonic += self.reading_ns.pop(0)
        return self.monotonic


def test_utc_is_monotonic_time_plus_an_offset() -> None:
    machine = Machine()
    clock = machine.clock()
    assert clock.utc_ns(machine.monotonic + 7) == machine.monotonic + machine.offset + 7
    assert clock.monotonic_ns(clock.utc_ns(42)) == 42
    assert clock.now_ns() == machine.monotonic + machine.offset
    assert (clock.stamp.state, clock.stamp.error_ns, clock.steps) == (ClockState.SYNCED, 3 * MS, 0)


@pytest.mark.parametrize("step_ns", [STEP_NS + 1, 24 * 3600 * NS_PER_S, 50 * 365 * 24 * 3600 * NS_PER_S])
def test_a_step_forward_is_followed(step_ns: int) -> None:
    machine = Machine()
    clock = machine.clock()
    machine.offset += step_ns
    assert clock.utc_ns(0) == machine.offset - step_ns, "only a refresh looks"
    clock.refresh()
    assert clock.utc_ns(0) == machine.offset
    assert (clock.steps, clock.stamp.error_ns, clock.stamp.state) == (1, 3 * MS, ClockState.SYNCED)
    clock.refresh()
    assert clock.steps == 1


def test_a_step_back_is_held_and_marked() -> None:
    machine = Machine()
    clock = machine.clock()
    machine.offset -= 3600 * NS_PER_S
    clock.refresh()
    assert clock.utc_ns(0) == machine.offset + 3600 * NS_PER_S
    assert (clock.stamp.state, clock.stamp.error_ns) == (ClockState.UNSYNCED, 3600 * NS_PER_S + 3 * MS)
    assert clock.steps == 0
    machine.offset += 3600 * NS_PER_S
    clock.refresh()
    assert (clock.stamp.state, clock.stamp.error_ns) == (ClockState.SYNCED, 3 * MS)


@pytest.mark.parametrize("change_ns", [STEP_NS, -STEP_NS])
def test_what_is_too_small_to_follow_counts_as_error(change_ns: int) -> None:
    machine = Machine()
    clock = machine.clock()
    before = clock.utc_ns(0)
    machine.offset += change_ns
    clock.refresh()
    assert clock.utc_ns(0) == before
    assert (clock.stamp.state, clock.stamp.error_ns) == (ClockState.SYNCED, 3 * MS + STEP_NS)


def test_small_changes_that_add_up_are_followed() -> None:
    machine = Machine()
    clock = machine.clock()
    for _ in range(4):
        machine.offset += 30 * MS
        clock.refresh()
    assert clock.steps == 2
    assert clock.utc_ns(0) == machine.offset


def test_a_host_that_is_busy_while_the_clock_is_read_sees_no_step() -> None:
    machine = Machine()
    clock = machine.clock()
    machine.reading_ns = [0, 400 * MS, 0, 900 * MS, 0, 10]
    clock.refresh()
    assert (clock.steps, clock.stamp.state) == (0, ClockState.SYNCED)
    assert clock.stamp.error_ns <= 3 * MS + 10


@pytest.mark.parametrize("state", list(ClockState))
def test_the_kernels_word_is_passed_on(state: ClockState) -> None:
    machine = Machine(discipline=Discipline(state, 11 * MS))
    clock = machine.clock()
    assert (clock.stamp.state, clock.stamp.error_ns) == (state, 11 * MS)
    machine.discipline = Discipline(ClockState.SYNCED, 12 * MS)
    clock.refresh()
    assert (clock.stamp.state, clock.stamp.error_ns) == (ClockState.SYNCED, 12 * MS)
