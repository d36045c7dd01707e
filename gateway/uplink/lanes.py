"""Which of the outbox's rows go next: newest data at once, what is older in the rest of the window. Pure.

Rows are known by their id, the order in which they were accepted. What has been sent needs no memory of its own:
it is everything that is neither backlog nor live.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from operator import itemgetter

SPANS_MAX = 32_000
"""About 4 MB, and more than holes can be. Of more, as when a link is too slow for days, the oldest are joined: rows
between two, that were sent and have no receipt yet, go out again, which costs only their bytes."""


class Lane(Enum):
    """Where a row is sent from."""

    LIVE = "live"
    BACKLOG = "backlog"


@dataclass(frozen=True, slots=True)
class Span:
    """Rows with after < id <= through."""

    lane: Lane
    after: int
    through: int


class Lanes:
    """What still has to be sent, as spans of ids."""

    def __init__(self, last_id: int) -> None:
        self._backlog: list[tuple[int, int]] = [(0, last_id)] if last_id else []
        """Spans (after, through], in order, that do not touch."""
        self._live_after = last_id
        self._old: list[tuple[int, int]] = []
        """Spans behind `_live_after` that are no live data, in order."""

    def interrupt(self, last_id: int) -> None:
        """The connection was away: what was accepted meanwhile is backlog."""
        if last_id > self._live_after:
            self._add([(self._live_after, last_id)])
            self._live_after = last_id
            self._old.clear()

    def defer(self, after: int, through: int) -> None:
        """Rows with after < id <= through are old, though they have just got these ids: they are backlog."""
        if through > after >= self._live_after:
            self._add([(after, through)])
            self._old.append((after, through))

    def put_back(self, ids: Iterable[int]) -> None:
        """These were sent and must be sent again."""
        self._add([(number - 1, number) for number in ids])

    def live(self, last_id: int) -> Span | None:
        """Rows accepted since the connection stands and not yet sent."""
        while self._old and self._old[0][0] == self._live_after:
            self._live_after = self._old.pop(0)[1]
        through = self._old[0][0] if self._old else last_id
        return Span(Lane.LIVE, self._live_after, through) if through > self._live_after else None

    def backlog(self) -> Span | None:
        """The oldest rows that wait."""
        return Span(Lane.BACKLOG, *self._backlog[0]) if self._backlog else None

    def sent(self, span: Span) -> None:
        """All rows of this span were sent, or are gone."""
        if span.lane is Lane.LIVE:
            self._live_after = max(self._live_after, span.through)
            return
        start = bisect_right(self._backlog, span.after, key=itemgetter(1))
        stop = bisect_left(self._backlog, span.through, key=itemgetter(0))
        rest: list[tuple[int, int]] = []
        for low, high in self._backlog[start:stop]:
            rest.extend([(low, min(high, span.after)), (max(low, span.through), high)])
        self._backlog[start:stop] = [(low, high) for low, high in rest if low < high]

    def _add(self, spans: Iterable[tuple[int, int]]) -> None:
        for low, high in spans:
            start = bisect_left(self._backlog, low, key=itemgetter(1))
            stop = bisect_right(self._backlog, high, key=itemgetter(0))
            touching = self._backlog[start:stop]
            lowest, highest = (touching[0][0], touching[-1][1]) if touching else (low, high)
            self._backlog[start:stop] = [(min(low, lowest), max(high, highest))]
            if len(self._backlog) > SPANS_MAX:
                self._join_oldest()

    def _join_oldest(self) -> None:
        oldest = self._backlog[: SPANS_MAX // 2]
        pairs = zip(oldest[::2], oldest[1::2], strict=True)
        self._backlog[: len(oldest)] = [(low, high) for (low, _), (_, high) in pairs]
