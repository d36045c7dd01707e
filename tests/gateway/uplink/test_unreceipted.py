"""What is a hole and what only waits in the broker's queue, on a clock of the test's own."""

from __future__ import annotations

import tracemalloc
from collections.abc import Container

import pytest

from gateway.uplink import unreceipted as unreceipted_module
from gateway.uplink.unreceipted import CHECKS, ROWS_MAX, Unreceipted

HOLE_S = 60.0
STEP_S = HOLE_S / CHECKS


class Watched:
    """Asked for holes as often as the sender does."""

    def __init__(self) -> None:
        self.rows = Unreceipted(HOLE_S)
        self.now_s = 1000.0
        self.is_attended = True

    def sent(self, *numbers: int) -> None:
        for number in numbers:
            assert self.rows.sent(number, self.now_s)

    def receipted(self, *numbers: int) -> None:
        self.rows.receipted(numbers, self.now_s)

    def wait(self, seconds: float, under_way: Container[int] = ()) -> list[int]:
        """All holes that show in this time."""
        found: list[int] = []
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            self.now_s += STEP_S
            found += self.rows.holes(self.now_s, under_way, is_attended=self.is_attended)
        return found


@pytest.fixture
def watched() -> Watched:
    made = Watched()
    assert made.wait(2 * HOLE_S) == []
    return made


def test_what_later_receipts_passed_is_a_hole_after_its_time(watched: Watched) -> None:
    watched.sent(1, 2, 3, 4)
    watched.receipted(3)
    assert watched.wait(HOLE_S - STEP_S) == []
    watched.receipted(1)
    assert watched.wait(2 * STEP_S) == [2]
    assert list(watched.rows) == [4]


def test_what_nobody_passed_waits_for_as_long_as_receipts_come(watched: Watched) -> None:
    """A broker's queue of an hour: each receipt is of what was sent long ago."""
    watched.sent(*range(240))
    for number in range(239):
        watched.receipted(number)
        assert watched.wait(STEP_S) == []
    assert list(watched.rows) == [239]


def test_when_no_receipt_comes_at_all_everything_that_is_old_enough_goes_again(watched: Watched) -> None:
    watched.sent(1, 2)
    assert watched.wait(HOLE_S - STEP_S) == []
    watched.sent(3)
    assert watched.wait(2 * STEP_S) == [1, 2]
    assert watched.wait(HOLE_S) == [3]
    assert watched.wait(10 * HOLE_S) == []


def test_what_went_again_has_its_time_again(watched: Watched) -> None:
    watched.sent(1, 2)
    watched.receipted(2)
    assert watched.wait(2 * HOLE_S) == [1]
    watched.sent(1)
    assert watched.wait(HOLE_S - STEP_S) == []
    watched.receipted(1)
    assert watched.wait(10 * HOLE_S) == []


def test_nobody_there_nothing_goes_again_and_who_comes_reads_the_queue_first(watched: Watched) -> None:
    watched.sent(1, 2, 3)
    watched.receipted(3)
    watched.is_attended = False
    assert watched.wait(100 * HOLE_S) == []
    watched.is_attended = True
    assert watched.wait(HOLE_S) == []
    assert watched.wait(STEP_S) == [1, 2]


def test_a_receipt_is_overdue_after_half_the_time(watched: Watched) -> None:
    assert not watched.rows.is_overdue(watched.now_s)
    watched.sent(1)
    assert not watched.rows.is_overdue(watched.now_s + HOLE_S / 2 - 1)
    assert watched.rows.is_overdue(watched.now_s + HOLE_S / 2)
    watched.receipted(1)
    assert not watched.rows.is_overdue(watched.now_s + HOLE_S)


def test_what_is_under_way_is_no_hole(watched: Watched) -> None:
    watched.sent(1, 2)
    assert watched.wait(3 * HOLE_S, under_way={1}) == [2]
    assert watched.wait(STEP_S) == [1]


def test_receipts_of_what_is_not_remembered_change_nothing(watched: Watched) -> None:
    watched.sent(1)
    watched.rows.forget(1)
    watched.receipted(1, 99)
    assert watched.wait(3 * HOLE_S) == []
    assert (len(watched.rows), 1 in watched.rows) == (0, False)


def test_the_memory_is_bounded() -> None:
    """A million rows go out while nobody is there, for days."""
    rows = Unreceipted(HOLE_S)
    tracemalloc.start()
    try:
        remembered = sum(rows.sent(number, float(number)) for number in range(1_000_000))
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert remembered == len(rows) == ROWS_MAX
    assert rows.is_full
    assert used < 6 << 20
    rows.receipted([5], 1e6)
    assert rows.sent(10**7, 1e6)
    assert not rows.sent(10**7 + 1, 1e6)


def test_the_marks_are_bounded(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unreceipted_module, "ROWS_MAX", 10**9)
    for number in range(10_000):
        watched.sent(number)
        watched.receipted(number)
        watched.wait(STEP_S)
    assert len(watched.rows._marks) <= CHECKS + 2
