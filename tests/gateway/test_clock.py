"""The host's clock, in simulated time: no test looks at how fast this machine is."""

from __future__ import annotations

import pytest

from gateway.anchor import DRIFT_PPM, UNSEEN_ERROR_NS, Anchor, Source
from gateway.clock import CONFIRM_NS, NOISE_NS, SLEW_NS_MAX, SLEW_PPM, STEP_NS, WIDEST_ERROR_NS, HostClock
from gateway.kernel_clock import Discipline
from gateway.samples import NS_PER_S, ClockStamp, ClockState
from tests.gateway.machine import MS, SYNCED, TRUE_OFFSET_NS, UNKNOWN, UNSYNCED, Machine

HOUR_NS = 3_600 * NS_PER_S
DAY_NS = 24 * HOUR_NS
CONFIRM_S = CONFIRM_NS // NS_PER_S
BOUND_NS = SYNCED.error_ns + UNSEEN_ERROR_NS


def bridge_word(machine: Machine, *, off_ns: int = 0, error_ns: int = 20 * MS) -> Anchor:
    return Anchor(machine.right_offset + off_ns, error_ns, machine.boot, Source.BRIDGE)


def stated_error(machine: Machine, clock: HostClock) -> int:
    return clock.now_ns() - machine.true_ns


def test_utc_is_monotonic_time_plus_an_offset() -> None:
    machine = Machine()
    clock = machine.clock()
    assert clock.utc_ns(machine.monotonic() + 7) == machine.utc() + 7
    assert clock.monotonic_ns(clock.utc_ns(42)) == 42
    assert clock.now_ns() == machine.utc()
    assert clock.stamp == clock.known == ClockStamp(ClockState.SYNCED, BOUND_NS)
    assert not clock.is_held


@pytest.mark.parametrize("said", [SYNCED, UNSYNCED, UNKNOWN])
def test_the_kernels_word_is_passed_on(said: Discipline) -> None:
    clock = Machine(said=said).clock()
    assert clock.known == ClockStamp(said.state, said.error_ns + (UNSEEN_ERROR_NS if said is SYNCED else 0))
    assert clock.disciplined is (said is SYNCED)
    assert clock.wants_time is not clock.disciplined


def test_a_host_that_is_busy_while_the_clock_is_read_sees_no_step() -> None:
    machine = Machine()
    clock = machine.clock()
    machine.reading_ns = [0, 400 * MS, 0, 900 * MS, 0, 10] * 2
    clock.refresh()
    assert clock.known.state is ClockState.SYNCED
    assert clock.known.error_ns < 4 * MS
    assert clock.shift_ns == 0


# --- steps


@pytest.mark.parametrize("step_ns", [DAY_NS, -HOUR_NS, 2 * NS_PER_S, -2 * NS_PER_S])
def test_a_step_of_a_synced_clock_is_doubtful_until_it_has_stood(step_ns: int) -> None:
    machine = Machine()
    clock = machine.clock()
    clock.give_out(clock.now_ns(), clock.now_ns())
    before = clock.offset_ns
    machine.offset += step_ns
    machine.run(CONFIRM_S, clock)
    assert clock.offset_ns == before
    assert clock.known.state is ClockState.UNSYNCED
    assert clock.known.error_ns >= abs(step_ns), "both may be right"
    assert clock.wants_time
    machine.run(1, clock)
    assert clock.offset_ns == machine.offset
    assert clock.known == ClockStamp(ClockState.SYNCED, BOUND_NS)


def test_a_step_that_is_undone_leaves_nothing_behind() -> None:
    machine = Machine()
    clock = machine.clock(holds=True)
    clock.give_out(clock.now_ns(), clock.now_ns())
    machine.offset += DAY_NS
    machine.run(3, clock)
    assert clock.is_held
    held = clock.give_out(clock.now_ns(), clock.now_ns())
    machine.offset -= DAY_NS
    machine.run(1, clock)
    assert clock.known.state is ClockState.SYNCED
    assert not clock.is_held
    assert (clock.offset_ns, clock.shift_ns, clock.setback_ns) == (machine.offset, 0, 0)
    assert held is not None
    assert clock.put_right == {held: held}


def test_who_sets_the_clock_by_hand_casts_doubt_and_the_kernel_says_unsynced() -> None:
    """The kernel forgets its discipline at a step; the old offset is what is known, not what somebody typed."""
    machine = Machine()
    clock = machine.clock()
    machine.offset, machine.said = machine.offset + DAY_NS, UNSYNCED
    machine.run(60, clock)
    assert clock.offset_ns == TRUE_OFFSET_NS
    assert clock.known.state is ClockState.UNSYNCED
    machine.offset, machine.said = TRUE_OFFSET_NS, SYNCED
    machine.run(1, clock)
    assert clock.known == ClockStamp(ClockState.SYNCED, BOUND_NS)


def test_a_time_service_that_is_away_costs_drift_and_no_more() -> None:
    machine = Machine(drift_ppm=40)
    clock = machine.clock()
    machine.said = UNSYNCED
    machine.run(600, clock)
    assert clock.known.state is ClockState.SYNCED
    assert abs(stated_error(machine, clock)) <= clock.known.error_ns
    assert clock.known.error_ns == pytest.approx(BOUND_NS + 600 * DRIFT_PPM * 1000, rel=0.01)


def test_a_leap_forward_breaks_first_and_what_came_before_keeps_its_time() -> None:
    machine = Machine()
    clock = machine.clock()
    clock.give_out(clock.now_ns(), clock.now_ns())
    seen: list[int] = []
    clock.on_break.append(lambda: seen.append(clock.offset_ns))
    machine.offset += DAY_NS
    machine.run(CONFIRM_S + 1, clock)
    assert seen == [TRUE_OFFSET_NS]
    assert clock.offset_ns == TRUE_OFFSET_NS + DAY_NS
    assert clock.shift_ns == 0


def test_a_leap_back_sets_back_what_runs() -> None:
    machine = Machine()
    clock = machine.clock()
    clock.give_out(clock.now_ns(), clock.now_ns())
    clock.on_break.append(lambda: pytest.fail("nothing is broken"))
    machine.offset -= HOUR_NS
    machine.run(CONFIRM_S + 1, clock)
    assert clock.offset_ns == TRUE_OFFSET_NS - HOUR_NS
    assert clock.setback_ns == HOUR_NS


@pytest.mark.parametrize("change_ns", [STEP_NS, -STEP_NS, SLEW_NS_MAX, -SLEW_NS_MAX])
def test_a_small_correction_is_worked_in_and_its_rest_counts_as_error(change_ns: int) -> None:
    """As a leap second, or what a time service corrects in one go."""
    machine = Machine()
    clock = machine.clock()
    clock.give_out(clock.now_ns(), clock.now_ns())
    machine.offset += change_ns
    if abs(change_ns) > STEP_NS:
        machine.run(CONFIRM_S, clock)
    machine.run(1, clock)
    assert clock.known.state is ClockState.SYNCED
    for _ in range(abs(change_ns) // (SLEW_PPM * 1000) + 1):
        before_ns = clock.offset_ns
        assert abs(clock.offset_ns - machine.offset) <= clock.known.error_ns
        machine.run(1, clock)
        assert abs(clock.offset_ns - before_ns) <= SLEW_PPM * 1000
    assert clock.offset_ns == machine.offset
    assert clock.known.error_ns == BOUND_NS


def test_a_clock_that_nobody_disciplines_is_followed_when_it_stands() -> None:
    for said in (UNSYNCED, UNKNOWN):
        machine = Machine(said=said)
        clock = machine.clock()
        machine.offset += HOUR_NS
        machine.run(CONFIRM_S, clock)
        assert clock.offset_ns == TRUE_OFFSET_NS
        assert clock.known == ClockStamp(ClockState.UNSYNCED, said.error_ns + HOUR_NS)
        machine.run(1, clock)
        assert clock.offset_ns == machine.offset
        assert clock.known == ClockStamp(said.state, said.error_ns)


def test_small_steps_that_add_up_are_followed() -> None:
    machine = Machine(said=UNSYNCED)
    clock = machine.clock()
    machine.offset += 30 * MS
    machine.run(30, clock)
    assert clock.known.error_ns == UNSYNCED.error_ns + 30 * MS
    machine.offset += 30 * MS
    machine.run(30, clock)
    assert clock.offset_ns == machine.offset


# --- held back


def test_what_is_held_back_moves_with_the_correction_in_both_directions() -> None:
    for wrong_ns in (-10 * 365 * DAY_NS, HOUR_NS, NOISE_NS + 1):
        machine = Machine(offset=TRUE_OFFSET_NS + wrong_ns, said=UNSYNCED)
        clock = machine.clock(holds=True)
        assert clock.is_held
        assert clock.stamp == ClockStamp(ClockState.UNSYNCED, 0), "the clock's part comes later"
        held = clock.give_out(clock.now_ns(), clock.now_ns())
        assert held == clock.offset_ns == machine.offset
        machine.offset, machine.said = TRUE_OFFSET_NS, SYNCED
        machine.run(CONFIRM_S + 1, clock)
        assert not clock.is_held
        assert clock.put_right == {held: TRUE_OFFSET_NS}
        assert clock.shift_ns == -wrong_ns
        assert clock.setback_ns == 0
        assert clock.stamp.state is ClockState.SYNCED


def test_a_hold_begins_with_a_break_and_what_was_there_goes_out_as_before() -> None:
    machine = Machine()
    clock = machine.clock(holds=True)
    seen: list[tuple[ClockState, int | None]] = []
    clock.on_break.append(lambda: seen.append((clock.stamp.state, clock.give_out(0, clock.now_ns()))))
    machine.offset += DAY_NS
    machine.run(5, clock)
    assert seen == [(ClockState.SYNCED, None)]
    assert clock.is_held


def test_held_times_are_not_put_before_what_has_gone_out() -> None:
    """Sent at noon, then held in doubt. That it is 11 is confirmed: the held ones stay where they are."""
    machine = Machine()
    clock = machine.clock(holds=True)
    clock.give_out(clock.now_ns(), clock.now_ns())
    machine.offset -= HOUR_NS
    machine.run(2, clock)
    held = clock.give_out(clock.now_ns(), clock.now_ns())
    machine.run(CONFIRM_S + 1, clock)
    assert clock.put_right == {held: held}
    assert (clock.shift_ns, clock.setback_ns) == (0, HOUR_NS)
    assert clock.known.state is ClockState.SYNCED


def test_a_hand_set_clock_in_a_hold_moves_all_that_is_held_along() -> None:
    machine = Machine(offset=0, said=UNSYNCED)
    clock = machine.clock(holds=True)
    first = clock.give_out(clock.now_ns(), clock.now_ns())
    machine.offset = TRUE_OFFSET_NS - HOUR_NS
    machine.run(CONFIRM_S + 1, clock)
    second = clock.give_out(clock.now_ns(), clock.now_ns())
    assert (first, second) == (0, TRUE_OFFSET_NS - HOUR_NS)
    machine.offset, machine.said = TRUE_OFFSET_NS, SYNCED
    machine.run(CONFIRM_S + 1, clock)
    assert clock.put_right == {first: TRUE_OFFSET_NS, second: TRUE_OFFSET_NS}


def test_released_is_what_it_is_and_the_next_time_it_is_held_again() -> None:
    machine = Machine(offset=TRUE_OFFSET_NS - DAY_NS, said=UNSYNCED)
    clock = machine.clock(holds=True)
    held = clock.give_out(clock.now_ns(), clock.now_ns())
    clock.release()
    assert not clock.is_held
    assert clock.put_right == {held: held}
    assert clock.stamp == ClockStamp(ClockState.UNSYNCED, UNSYNCED.error_ns)
    machine.run(5, clock)
    assert not clock.is_held
    machine.offset, machine.said = TRUE_OFFSET_NS, SYNCED
    machine.run(CONFIRM_S + 1, clock)
    assert (clock.offset_ns, clock.shift_ns) == (TRUE_OFFSET_NS, 0), "a leap: a day has gone out"
    machine.offset += DAY_NS
    machine.run(1, clock)
    assert clock.is_held


def test_what_is_released_by_a_clock_that_is_behind_goes_out_after_what_went_out_before() -> None:
    machine = Machine(offset=TRUE_OFFSET_NS - DAY_NS, said=UNSYNCED)
    clock = machine.clock(holds=True)
    first_ns = clock.now_ns()
    held = clock.give_out(first_ns, first_ns)
    assert held is not None
    machine.run(5, clock)
    clock.release(first_ns + HOUR_NS)
    assert clock.put_right == {held: held + HOUR_NS + 1}, "the first comes right after"
    assert clock.now_ns() > first_ns + HOUR_NS
    assert clock.known == ClockStamp(ClockState.UNSYNCED, WIDEST_ERROR_NS)
    machine.run(5, clock)
    assert clock.now_ns() == first_ns + HOUR_NS + 1 + 10 * NS_PER_S
    assert clock.give_out(clock.now_ns(), clock.now_ns()) is None


def test_what_is_released_later_than_what_went_out_before_stays_as_it_is() -> None:
    machine = Machine(offset=TRUE_OFFSET_NS - DAY_NS, said=UNSYNCED)
    clock = machine.clock(holds=True)
    first_ns = clock.now_ns()
    held = clock.give_out(first_ns, first_ns)
    clock.release(first_ns - 1)
    assert clock.put_right == {held: held}
    assert clock.now_ns() == first_ns


def test_who_cannot_hold_or_cannot_tell_does_not_hold() -> None:
    assert not Machine(said=UNSYNCED).clock().is_held
    assert not Machine(said=UNKNOWN).clock(holds=True).is_held


def test_a_boot_in_1970_begins_at_what_has_certainly_passed() -> None:
    machine = Machine(offset=0, said=UNSYNCED)
    passed_ns = TRUE_OFFSET_NS - DAY_NS
    clock = machine.clock(not_before_ns=passed_ns)
    assert clock.now_ns() == passed_ns
    assert clock.known == ClockStamp(ClockState.UNSYNCED, WIDEST_ERROR_NS)
    machine.offset = TRUE_OFFSET_NS
    machine.run(CONFIRM_S + 1, clock)
    assert clock.known == ClockStamp(ClockState.UNSYNCED, UNSYNCED.error_ns)


# --- sleep


def test_sleep_breaks_and_time_goes_on_where_it_is() -> None:
    machine = Machine()
    clock = machine.clock()
    woken: list[int] = []
    clock.on_break.append(lambda: woken.append(clock.utc_ns(machine.monotonic())))
    at_ns = machine.monotonic()
    before_ns = clock.utc_ns(at_ns)
    machine.sleep(300)
    machine.run(1, clock)
    assert len(woken) == 1
    assert woken[0] == before_ns + NS_PER_S, "what was sampled before the sleep keeps its time"
    assert stated_error(machine, clock) == 0
    assert clock.known.state is ClockState.SYNCED
    assert clock.shift_ns == clock.setback_ns == 0


# --- the word of a bridge


def test_a_bridge_tells_the_time_where_nobody_else_does() -> None:
    machine = Machine(offset=TRUE_OFFSET_NS - DAY_NS, said=UNSYNCED)
    clock = machine.clock(holds=True)
    held = clock.give_out(clock.now_ns(), clock.now_ns())
    clock.learn(bridge_word(machine, off_ns=5 * MS))
    assert clock.known == ClockStamp(ClockState.SYNCED, 20 * MS)
    assert clock.put_right == {held: TRUE_OFFSET_NS + 5 * MS}
    machine.offset += HOUR_NS
    machine.run(60, clock)
    assert clock.known.state is ClockState.SYNCED, "steps of a clock that nobody disciplines are no news then"
    assert clock.offset_ns == TRUE_OFFSET_NS + 5 * MS


def test_refreshed_by_a_bridge_the_bound_holds_for_days_of_drift_and_a_leap_smear() -> None:
    """The machine's crystal is 60 ppm off; for a day the bridge's time runs 11.6 ppm faster, as smeared time does."""
    machine = Machine(said=UNSYNCED, drift_ppm=60)
    clock = machine.clock()
    smeared_ns = 0.0
    last_ns = clock.now_ns()
    clock.give_out(last_ns, last_ns)
    for second in range(3 * 86_400 // 64):
        machine.run(64, clock)
        if 86_400 < second * 64 < 2 * 86_400:
            smeared_ns += 64 * 11.6e3
        clock.learn(bridge_word(machine, off_ns=round(smeared_ns) + (-1) ** second * 15 * MS))
        assert clock.known.state is ClockState.SYNCED
        assert abs(stated_error(machine, clock) - smeared_ns) <= clock.known.error_ns < 100 * MS
        assert clock.now_ns() > last_ns
        last_ns = clock.now_ns()
        clock.give_out(last_ns, last_ns)
    assert clock.shift_ns == clock.setback_ns == 0


def test_of_two_words_the_better_one_counts() -> None:
    machine = Machine(said=UNSYNCED)
    clock = machine.clock()
    clock.learn(bridge_word(machine, off_ns=2 * MS, error_ns=5 * MS))
    clock.learn(bridge_word(machine, off_ns=40 * MS, error_ns=50 * MS))
    assert clock.anchor is not None
    assert clock.anchor.error_ns == 5 * MS
    machine.run(600, clock)
    clock.learn(bridge_word(machine, off_ns=40 * MS, error_ns=50 * MS))
    assert clock.anchor.error_ns == 50 * MS


def test_a_bridge_that_contradicts_what_is_known_casts_doubt_until_it_repeats_it() -> None:
    machine = Machine(said=UNSYNCED)
    clock = machine.clock()
    clock.learn(bridge_word(machine))
    clock.learn(bridge_word(machine, off_ns=HOUR_NS))
    assert clock.known.state is ClockState.UNSYNCED
    assert clock.known.error_ns >= HOUR_NS
    clock.learn(bridge_word(machine, off_ns=HOUR_NS + 10 * MS))
    assert clock.known == ClockStamp(ClockState.SYNCED, 20 * MS)
    assert clock.offset_ns == TRUE_OFFSET_NS + HOUR_NS + 10 * MS


def test_the_kernels_discipline_is_worth_more_than_a_bridge() -> None:
    machine = Machine()
    clock = machine.clock()
    clock.learn(bridge_word(machine, off_ns=HOUR_NS))
    assert clock.offset_ns == TRUE_OFFSET_NS
    assert clock.known.state is ClockState.SYNCED
    unsynced = Machine(said=UNSYNCED)
    told = unsynced.clock()
    told.learn(bridge_word(unsynced, off_ns=10 * MS))
    unsynced.said = SYNCED
    unsynced.run(CONFIRM_S + 1, told)
    assert told.anchor is not None
    assert told.anchor.source is Source.NTP
    assert told.known.state is ClockState.SYNCED


def test_a_bridge_settles_whether_a_step_is_right() -> None:
    machine = Machine()
    clock = machine.clock(holds=True)
    machine.offset, machine.said = machine.offset + DAY_NS, UNSYNCED
    machine.run(2, clock)
    assert clock.is_held
    clock.learn(bridge_word(machine))
    assert not clock.is_held
    assert clock.known == ClockStamp(ClockState.SYNCED, 20 * MS)
    machine.run(10, clock)
    assert clock.known.state is ClockState.SYNCED


def test_what_an_earlier_process_of_this_boot_knew_is_known() -> None:
    machine = Machine(offset=TRUE_OFFSET_NS + HOUR_NS, said=UNSYNCED)
    clock = machine.clock(anchor=Anchor(TRUE_OFFSET_NS, 20 * MS, NS_PER_S, Source.BRIDGE))
    assert clock.offset_ns == TRUE_OFFSET_NS
    assert clock.known.state is ClockState.SYNCED
    begun = machine.clock(holds=True, stated_ns=TRUE_OFFSET_NS - 7)
    assert begun.offset_ns == TRUE_OFFSET_NS - 7
