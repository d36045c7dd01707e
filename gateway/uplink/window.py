"""How many bytes of backlog may be on their way to the broker, found out from how long they take. Pure: no clock.

Every acknowledgement is an experiment: with so many bytes under way, the last of them took so long. The window is what
keeps that time near what the path itself takes plus the wait that live data can bear, so it grows on a fast link and
shrinks on a slow one. Whatever the network, the kernel or the session queues is inside the window.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

BYTES_START = 16 << 10
"""The first guess, and the one after a pause: three blocks of a headset, 2 s of 64 kbit/s, doubled in a round trip."""
GROWTH_MAX = 2.0
"""Times what was really under way: what was not tried is not known."""
STEP = 0.25
"""Of the way to the new value with each acknowledgement: one late answer says little."""
PATHS = 8
"""Times of messages that had no other before them, of which the shortest is the path's. A longer path is believed when
so many of them say it."""
PATH_S_MAX = 1.0
"""No path takes longer, satellites included: what is beyond is a queue of somebody else's."""
LOOK_S = 30.0
"""After this time the window is let run empty once, to see the path without our own queue. The link idles for one round
trip."""
PAUSE_S = 5.0
"""With no backlog for so long the link may have become another one."""


@dataclass(frozen=True, slots=True)
class Flight:
    """A message that is not acknowledged."""

    size: int
    sent_s: float
    is_backlog: bool
    under_way: int
    """Bytes that were under way when it was sent, its own included."""
    is_alone: bool
    """No backlog was before it."""


class Window:
    """Messages on their way, by the number of their row. Times are seconds of any clock that only goes forward."""

    def __init__(self, *, delay_s: float, bytes_max: int) -> None:
        self._delay_s = delay_s
        self._bytes_max = bytes_max
        self._flights: dict[int, Flight] = {}
        self._live_bytes = 0
        self._backlog_bytes = 0
        self.begin()

    def begin(self) -> None:
        """A new connection: nothing is known of the link."""
        self._bytes = float(min(BYTES_START, self._bytes_max))
        self._paths: deque[float] = deque(maxlen=PATHS)
        self._looked_s = self._backlog_s = float("-inf")

    def __contains__(self, number: object) -> bool:
        return number in self._flights

    def __iter__(self) -> Iterator[int]:
        return iter(self._flights)

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def bytes(self) -> int:
        """How much backlog may be under way; the last message may reach beyond it."""
        return int(self._bytes)

    @property
    def bytes_under_way(self) -> int:
        return self._live_bytes + self._backlog_bytes

    def backlog_room(self, now_s: float) -> int:
        """Bytes of backlog that may go now; 0 or less: none."""
        if self._backlog_bytes and now_s - self._looked_s > LOOK_S:
            return 0
        if now_s - self._backlog_s > PAUSE_S and not self._backlog_bytes:
            self._bytes = min(self._bytes, BYTES_START)
        return self.bytes - self._backlog_bytes

    def live_room(self, *, is_small: bool) -> bool:
        """Whether a live message may go: anything that the link keeps up with, and small ones up to the limit."""
        return self._live_bytes < (self._bytes_max if is_small else self._bytes)

    def sent(self, number: int, size: int, now_s: float, *, is_backlog: bool) -> None:
        """A message of this row goes out."""
        is_alone = is_backlog and not self._backlog_bytes
        if is_backlog:
            self._backlog_bytes += size
            self._backlog_s = now_s
        else:
            self._live_bytes += size
        if is_alone:
            self._refill(now_s)
        self._flights[number] = Flight(size, now_s, is_backlog, self.bytes_under_way, is_alone)

    def acknowledged(self, number: int, now_s: float) -> None:
        """The broker has it."""
        flight = self.forget(number)
        # Live messages overtake backlog on this side of the socket: their times say less.
        if flight is not None and flight.is_backlog:
            self._learn(flight, max(now_s - flight.sent_s, 1e-6))

    def forget(self, number: int) -> Flight | None:
        """It is no longer under way, for whatever reason."""
        flight = self._flights.pop(number, None)
        if flight is None:
            return None
        if flight.is_backlog:
            self._backlog_bytes -= flight.size
        else:
            self._live_bytes -= flight.size
        return flight

    def _refill(self, now_s: float) -> None:
        """The path is empty: a whole window at once would stand in the queue, so begin with the queue's part."""
        if self._paths and now_s - self._looked_s > LOOK_S:
            self._bytes *= self._delay_s / (self._delay_s + min(self._paths))
        self._looked_s = now_s

    def _learn(self, flight: Flight, took_s: float) -> None:
        if flight.is_alone or took_s < min(self._paths, default=PATH_S_MAX):
            self._paths.append(min(took_s, PATH_S_MAX))
        wanted_s = min(self._paths, default=PATH_S_MAX) + self._delay_s
        fits = flight.under_way * min(wanted_s / took_s, GROWTH_MAX)
        is_slow = took_s > wanted_s
        if (fits < self._bytes) == is_slow:  # with less under way than the window, a quick answer says nothing
            self._bytes += STEP * (fits - self._bytes)
        self._bytes = min(max(self._bytes, 1.0), float(self._bytes_max))
