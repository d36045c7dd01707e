"""Which rows go next, against a plain set of ids."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.uplink import lanes as lanes_module
from gateway.uplink.lanes import Lane, Lanes, Span


def test_what_was_there_at_the_start_is_backlog_and_what_comes_is_live() -> None:
    lanes = Lanes(7)
    assert lanes.backlog() == Span(Lane.BACKLOG, 0, 7)
    assert lanes.live(7) is None
    assert lanes.live(9) == Span(Lane.LIVE, 7, 9)
    lanes.sent(Span(Lane.LIVE, 7, 8))
    assert lanes.live(9) == Span(Lane.LIVE, 8, 9)
    assert lanes.backlog() == Span(Lane.BACKLOG, 0, 7)
    assert Lanes(0).backlog() is None


def test_an_interruption_makes_what_came_meanwhile_backlog() -> None:
    lanes = Lanes(0)
    lanes.sent(Span(Lane.LIVE, 0, 5))
    lanes.interrupt(5)
    assert lanes.backlog() is None
    lanes.interrupt(9)
    assert lanes.live(9) is None
    assert lanes.backlog() == Span(Lane.BACKLOG, 5, 9)
    assert lanes.live(10) == Span(Lane.LIVE, 9, 10)


def test_backlog_goes_oldest_first_and_in_parts() -> None:
    lanes = Lanes(10)
    lanes.sent(Span(Lane.BACKLOG, 0, 10))
    assert lanes.backlog() is None
    lanes.put_back([9, 3, 4])
    assert lanes.backlog() == Span(Lane.BACKLOG, 2, 4)
    lanes.sent(Span(Lane.BACKLOG, 2, 3))
    assert lanes.backlog() == Span(Lane.BACKLOG, 3, 4)
    lanes.sent(Span(Lane.BACKLOG, 3, 4))
    assert lanes.backlog() == Span(Lane.BACKLOG, 8, 9)
    lanes.put_back([9, 8])
    assert lanes.backlog() == Span(Lane.BACKLOG, 7, 9)


def test_spans_in_the_middle_and_across_are_taken_out() -> None:
    lanes = Lanes(20)
    lanes.sent(Span(Lane.BACKLOG, 5, 8))
    assert lanes.backlog() == Span(Lane.BACKLOG, 0, 5)
    lanes.sent(Span(Lane.BACKLOG, 3, 12))
    assert lanes.backlog() == Span(Lane.BACKLOG, 0, 3)
    lanes.sent(Span(Lane.BACKLOG, 0, 3))
    assert lanes.backlog() == Span(Lane.BACKLOG, 12, 20)


def test_a_link_that_is_too_slow_for_days_costs_bounded_memory_and_forgets_no_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every second row finds no room and becomes backlog."""
    monkeypatch.setattr(lanes_module, "SPANS_MAX", 100)
    lanes = Lanes(0)
    last = 1_000
    for number in range(1, last + 1):
        lanes.sent(Span(Lane.LIVE, number - 1, number))
        if number % 2:
            lanes.put_back([number])
        assert len(lanes._backlog) <= lanes_module.SPANS_MAX
    waiting = {row for low, high in lanes._backlog for row in range(low + 1, high + 1)}
    assert waiting >= set(range(1, last + 1, 2))
    assert set(range(last - lanes_module.SPANS_MAX // 2, last + 1, 2)).isdisjoint(waiting)  # the newest are exact
    previous = 0
    for low, high in lanes._backlog:
        assert previous <= low < high
        previous = high


def test_many_single_rows_are_put_back_and_sent_in_linear_time() -> None:
    """As many holes as the sender can remember: counted by work, a second of it would block the event loop."""
    lanes = Lanes(40_000)
    lanes.sent(Span(Lane.BACKLOG, 0, 40_000))
    lanes.put_back(range(2, 40_001, 2))
    for number in range(2, 40_001, 2):
        assert lanes.backlog() == Span(Lane.BACKLOG, number - 1, number)
        lanes.sent(Span(Lane.BACKLOG, number - 1, number))
    assert lanes.backlog() is None


class LanesMachine(RuleBasedStateMachine):
    """Sends as the sender does, and counts how often each id went out and had to."""

    def __init__(self) -> None:
        super().__init__()
        self.last_id = 6
        self.lanes = Lanes(self.last_id)
        self.waiting = set(range(1, 7))
        self.sent: Counter[int] = Counter()
        self.due: Counter[int] = Counter(self.waiting)

    @rule(count=st.integers(1, 5))
    def accept(self, count: int) -> None:
        new = range(self.last_id + 1, self.last_id + count + 1)
        self.last_id += count
        self.waiting.update(new)
        self.due.update(new)

    @rule()
    def interrupt(self) -> None:
        self.lanes.interrupt(self.last_id)

    @rule(ids=st.lists(st.integers(1, 60), max_size=6))
    def put_back(self, ids: list[int]) -> None:
        again = {number for number in ids if self.sent[number] and number not in self.waiting}
        self.lanes.put_back([*again, *again])
        self.waiting |= again
        self.due.update(again)

    @rule(count=st.integers(1, 4))
    def send_live(self, count: int) -> None:
        self.send(self.lanes.live(self.last_id), count)

    @rule(count=st.integers(1, 4))
    def send_backlog(self, count: int) -> None:
        span = self.lanes.backlog()
        if span is not None:
            assert span.after + 1 == min(self.waiting)
        self.send(span, count)

    def send(self, span: Span | None, count: int) -> None:
        if span is None:
            return
        assert span.after < span.through
        ids = list(range(span.after + 1, span.through + 1))[:count]
        self.lanes.sent(Span(span.lane, span.after, ids[-1]))
        for number in ids:
            assert number in self.waiting
            self.waiting.remove(number)
            self.sent[number] += 1

    @invariant()
    def nothing_is_sent_more_often_than_it_has_to_be(self) -> None:
        assert all(self.sent[number] <= self.due[number] for number in self.sent)

    @invariant()
    def only_an_empty_set_has_nothing_to_send(self) -> None:
        nothing = self.lanes.live(self.last_id) is None and self.lanes.backlog() is None
        assert nothing == (not self.waiting)

    @precondition(lambda self: self.waiting)
    @rule()
    def drain(self) -> None:
        while (span := self.lanes.live(self.last_id) or self.lanes.backlog()) is not None:
            self.send(span, 10)
        assert self.sent == self.due


LanesMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestLanes = LanesMachine.TestCase


def test_old_rows_with_new_ids_are_backlog_and_live_data_overtakes_them() -> None:
    lanes = Lanes(10)
    lanes.defer(10, 40)
    assert lanes.live(40) is None
    assert lanes.live(42) == Span(Lane.LIVE, 40, 42)
    lanes.sent(Span(Lane.LIVE, 40, 42))
    lanes.defer(44, 60)
    assert lanes.live(61) == Span(Lane.LIVE, 42, 44), "what came before them goes first"
    lanes.sent(Span(Lane.LIVE, 42, 44))
    assert lanes.live(61) == Span(Lane.LIVE, 60, 61)
    lanes.sent(Span(Lane.BACKLOG, 0, 10))
    assert lanes.backlog() == Span(Lane.BACKLOG, 10, 40)
    lanes.sent(Span(Lane.BACKLOG, 10, 40))
    assert lanes.backlog() == Span(Lane.BACKLOG, 44, 60)


def test_old_rows_are_sent_once_also_where_the_connection_was_away_meanwhile() -> None:
    lanes = Lanes(0)
    lanes.defer(3, 9)
    lanes.interrupt(12)
    assert lanes.backlog() == Span(Lane.BACKLOG, 0, 12)
    lanes.sent(Span(Lane.BACKLOG, 0, 12))
    assert lanes.backlog() is None
    assert lanes.live(12) is None
    lanes.defer(5, 7)
    assert lanes.backlog() is None, "they went with the others"
    assert lanes.live(13) == Span(Lane.LIVE, 12, 13)
