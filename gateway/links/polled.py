"""A link over a library that blocks: one thread per open connection opens it, asks it for bytes, and closes it.

The thread stamps what it gets and hands it to the event loop through a bounded queue. Knows no library and no device.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from gateway.errors import UnavailableError, WardlinkError
from gateway.links.base import Chunk

log = logging.getLogger(__name__)

QUEUE_BYTES_MAX = 16 * 1024 * 1024
"""A minute of 64 channels at 500 Hz as float64: an event loop that has not read for so long has failed."""
QUEUE_CHUNKS_MAX = 8192
CLOSE_TIMEOUT_S = 5.0
"""After this the library is left to its (daemon) thread: one that hangs must not hold the gateway."""


class Source(Protocol):
    """A library's connection. All calls come from one thread."""

    def open(self) -> None:
        """Connect. Raises `WardlinkError`."""

    def poll(self) -> bytes:
        """What has come; waits for at most some tens of milliseconds. Raises `WardlinkError` when it is lost."""

    def close(self) -> None:
        """Release everything; does not raise."""


class PolledLink:
    """A `Link` over a `Source`; each opening makes a new one."""

    def __init__(self, name: str, new_source: Callable[[], Source]) -> None:
        self._name = name
        self._new_source = new_source
        self._session: _Session | None = None

    @property
    def name(self) -> str:
        """What an operator calls it."""
        return self._name

    async def open(self) -> None:
        """Connect. Raises `WardlinkError`."""
        await self.close()
        session = _Session(self._name, self._new_source(), asyncio.get_running_loop())
        try:
            await session.opened
        except BaseException:
            await session.close()
            raise
        self._session = session

    async def read(self) -> Chunk:
        """Wait for the next chunk. Raises `UnavailableError` when the connection is lost."""
        if self._session is None:
            raise UnavailableError(f"{self._name} is not open")
        return await self._session.read()

    async def write(self, data: bytes, channel: str = "") -> None:  # noqa: ARG002 - as every link has it
        """The library talks to the device by itself: there is nothing to write to. Raises `UnavailableError`."""
        raise UnavailableError(f"{self._name} takes no bytes")

    async def close(self) -> None:
        """Release everything; may be called in any state and does not raise."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()


class _Session:
    """One connection with its thread."""

    def __init__(self, name: str, source: Source, loop: asyncio.AbstractEventLoop) -> None:
        self.opened: asyncio.Future[None] = loop.create_future()
        self._name = name
        self._source = source
        self._loop = loop
        self._queue: deque[Chunk] = deque()
        # Each total is written by one side alone, so that the bound needs no lock.
        self._bytes_in = 0
        self._bytes_out = 0
        self._end: WardlinkError | None = None
        self._arrived = asyncio.Event()
        self._wake_pending = False
        self._closing = threading.Event()
        self._closed = asyncio.Event()
        threading.Thread(target=self._own_source, name=f"polled {name}", daemon=True).start()

    async def read(self) -> Chunk:
        while True:
            self._arrived.clear()
            if self._queue:
                chunk = self._queue.popleft()
                self._bytes_out += len(chunk.data)
                return chunk
            if self._end is not None:
                raise UnavailableError(self._end.message, hint=self._end.hint)
            await self._arrived.wait()

    async def close(self) -> None:
        self._closing.set()
        try:
            # Not wait_for: before Python 3.12 it forgets a cancellation that comes together with the event.
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._closed.wait()
        except TimeoutError:
            log.warning("%s did not close within %.0f s", self._name, CLOSE_TIMEOUT_S)
        if not self.opened.done():
            self.opened.cancel()

    def _own_source(self) -> None:
        """The thread: it opens the source, reads it until the end, and closes it."""
        end: WardlinkError = UnavailableError(f"{self._name} was closed")
        try:
            self._source.open()
            self._on_loop(self._on_opened)
            end = self._poll_source() or end
        except WardlinkError as error:
            end = error
        except Exception as error:
            # The border of a thread that runs a foreign library.
            log.exception("%s: the library failed", self._name)
            end = UnavailableError(f"{self._name}: the library failed: {error!r}")
        finally:
            self._end = end
            self._on_loop(self._on_end)
            self._source.close()
            self._on_loop(self._closed.set)

    def _poll_source(self) -> WardlinkError | None:
        while not self._closing.is_set():
            data = self._source.poll()
            # Stamped after the last byte is here: an arrival may be late, never early.
            if data and not self._enqueue(Chunk(data, time.monotonic_ns())):
                waiting = self._bytes_in - self._bytes_out
                return UnavailableError(
                    f"{self._name}: the gateway did not read for too long, {waiting} bytes wait",
                    hint="the machine is overloaded or the gateway hangs: see its journal",
                )
        return None

    def _enqueue(self, chunk: Chunk) -> bool:
        waiting = self._bytes_in - self._bytes_out + len(chunk.data)
        if waiting > QUEUE_BYTES_MAX or len(self._queue) >= QUEUE_CHUNKS_MAX:
            return False
        self._bytes_in += len(chunk.data)
        self._queue.append(chunk)
        if not self._wake_pending:
            # One call at a time: a loop that stands still must not collect them without bound.
            self._wake_pending = True
            self._on_loop(self._on_arrival)
        return True

    def _on_loop(self, callback: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is gone, and with it whoever could read
            self._loop.call_soon_threadsafe(callback)

    def _on_arrival(self) -> None:
        self._wake_pending = False
        self._arrived.set()

    def _on_opened(self) -> None:
        if not self.opened.done():
            self.opened.set_result(None)

    def _on_end(self) -> None:
        if not self.opened.done() and self._end is not None:
            self.opened.set_exception(self._end)
        self._arrived.set()
