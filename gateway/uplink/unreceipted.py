"""Which rows went out and wait for their receipt, and which of them are lost and go again. Pure: no clock.

A broker keeps the order of what it is given. So a row is a hole when receipts of later rows have passed it, or when no
receipt comes at all; while receipts come, a row that nobody has passed waits in the broker's queue. To send that again
would only make the queue longer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable, Iterator
from typing import NamedTuple

ROWS_MAX = 20_000
"""About 4 MB."""
CHECKS = 4
"""How often a hole is looked for within the time that it may stand."""


class Sent(NamedTuple):
    """A row that waits for its receipt."""

    order: int
    """Of all rows that went out."""
    at_s: float


class Unreceipted:
    """Rows by their number. Times are seconds of any clock that only goes forward."""

    def __init__(self, hole_s: float) -> None:
        self.hole_s = hole_s
        """How long a hole may stand."""
        self._rows: dict[int, Sent] = {}
        """In the order in which they went out."""
        self._order = 0
        self._passed_order = 0
        """The highest that was receipted."""
        self._marks: deque[tuple[float, int]] = deque()
        """How far the receipts were at the last checks, from one that is as old as a hole may be."""
        self._quiet_since_s: float | None = None
        """When somebody to receipt was there and the last receipt had come; None: nobody is there."""

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, number: object) -> bool:
        return number in self._rows

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows)

    def is_overdue(self, now_s: float) -> bool:
        """Whether a row has waited for half the time that a hole may stand: the receipt itself may be lost."""
        oldest = next(iter(self._rows.values()), None)
        return oldest is not None and oldest.at_s <= now_s - self.hole_s / 2

    @property
    def is_full(self) -> bool:
        return len(self._rows) >= ROWS_MAX

    def sent(self, number: int, now_s: float) -> bool:
        """Remember a row that went out. False where that is too much to remember."""
        self._rows.pop(number, None)
        if self.is_full:
            return False
        self._order += 1
        self._rows[number] = Sent(self._order, now_s)
        return True

    def receipted(self, numbers: Iterable[int], now_s: float) -> None:
        """These rows are safe."""
        for number in numbers:
            if (sent := self._rows.pop(number, None)) is not None:
                self._passed_order = max(self._passed_order, sent.order)
                if self._quiet_since_s is not None:
                    self._quiet_since_s = now_s

    def forget(self, number: int) -> None:
        """It will go out again."""
        self._rows.pop(number, None)

    def holes(self, now_s: float, under_way: Container[int], *, is_attended: bool) -> list[int]:
        """Rows to send again, which are forgotten here; to be asked `CHECKS` times in the time a hole may stand.

        `is_attended`: there is somebody to receipt them, and has been since the last time.
        """
        if not is_attended:
            self._quiet_since_s = None
            self._marks.clear()
            return []
        if self._quiet_since_s is None:
            # What waits in the broker's queue is read first.
            self._quiet_since_s = now_s
        self._marks.append((now_s, self._passed_order))
        before_s = now_s - self.hole_s
        while len(self._marks) > 1 and self._marks[1][0] <= before_s:
            self._marks.popleft()
        marked_s, passed_order = self._marks[0]
        if marked_s > before_s:
            passed_order = 0
        is_quiet = self._quiet_since_s <= before_s
        found = []
        for number, sent in self._rows.items():
            if sent.order >= passed_order and not (is_quiet and sent.at_s <= before_s):
                break
            if number not in under_way:
                found.append(number)
        for number in found:
            del self._rows[number]
        return found
