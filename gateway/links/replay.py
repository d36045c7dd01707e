"""A link to a recording: plays parts with times, at real speed or as fast as they are read. Knows no content."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from gateway.errors import RefusedError, UnavailableError
from gateway.links.base import Chunk

Parts = Callable[[], Iterator[Chunk]]
"""Makes the parts in order of time; their `arrival_ns` counts from the recording's beginning."""


class ReplayLink:
    """A `Link` that plays a recording from its beginning each time it is opened.

    At the end `read` raises `UnavailableError`, as when a device is unplugged. With `repeat` the recording can then be
    opened again, else `open` raises `RefusedError` for good. So one link object serves all connections of a device.
    """

    def __init__(self, name: str, parts: Parts, duration_ns: int, *, paced: bool = True, repeat: bool = False) -> None:
        """`paced`: at real speed. Else as fast as it is read, with arrival times that end now: as if it had just been
        recorded, so that its samples keep their distances.
        """
        self._name = name
        self._new_parts = parts
        self._duration_ns = duration_ns
        self._paced = paced
        self._repeat = repeat
        self._parts: Iterator[Chunk] | None = None
        self._begin_ns = 0
        self.ended = False
        """Played to the end at least once."""

    @property
    def name(self) -> str:
        """The recording's file."""
        return self._name

    async def open(self) -> None:
        """Go to the beginning. Raises `RefusedError` when it was played and shall not be repeated."""
        if self.ended and not self._repeat:
            raise RefusedError(f"recording {self._name} was played to its end", hint="repeat = true plays it again")
        self._parts = self._new_parts()
        self._begin_ns = time.monotonic_ns() - (0 if self._paced else self._duration_ns)

    async def read(self) -> Chunk:
        """Wait until the next part is due. Raises `UnavailableError` at the end."""
        if self._parts is None:
            raise UnavailableError(f"recording {self._name} is not open")
        part = next(self._parts, None)
        if part is None:
            self._parts, self.ended = None, True
            raise UnavailableError(f"recording {self._name} has ended")
        due_ns = self._begin_ns + part.arrival_ns
        # A whole file must not keep the event loop for itself, so sleep in any case.
        await asyncio.sleep(max(0, due_ns - time.monotonic_ns()) / 1e9 if self._paced else 0)
        return replace(part, arrival_ns=max(due_ns, time.monotonic_ns()) if self._paced else due_ns)

    async def write(self, data: bytes, channel: str = "") -> None:
        """A recording takes no commands; what is sent to it is forgotten."""

    async def close(self) -> None:
        """Stop playing."""
        self._parts = None
