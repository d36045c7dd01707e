"""A bad network as a TCP relay: delay, rate, a queue of bounded length, silence, resets, cuts in mid-frame."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Self

CHUNK_BYTES = 1460
"""What travels at a time: one segment."""
SOCKET_BYTES = 4096
"""Asked of the kernel for the relay's own sockets, which gives twice as much and little more: its queues are the
network's, and that network is described here."""
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER with no time: closing sends RST."""


@dataclass
class Conditions:
    """How the network is now; may be changed at any moment."""

    latency_s: float = 0.0
    """One way."""
    bytes_per_s: float = float("inf")
    """Each way."""
    queue_bytes: int = 64 << 10
    """What a router keeps for a link that is busy; beyond it the sender waits."""
    is_black_hole: bool = False
    """Connections stand and nothing comes through, neither data nor their end."""
    upstream_bytes_left: float = float("inf")
    """After so many more bytes to the server every connection is reset, wherever in a frame that is."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class ChaosProxy:
    """A relay on a port of its own to `host`:`port`; `now` says how the network is."""

    def __init__(self, port: int, host: str = "127.0.0.1", conditions: Conditions | None = None) -> None:
        self._to = (host, port)
        self.port = 0
        self.now = conditions or Conditions()
        self.connections = 0
        """How many were ever made."""
        self.upstream_bytes = 0
        """That reached the server."""
        self._open: dict[asyncio.Task[None], tuple[socket.socket, socket.socket]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BYTES)  # inherited by what is accepted
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(0)
        self._listener = listener
        self.port = listener.getsockname()[1]
        self._keep(self._accept())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def reset(self) -> None:
        """RST on every connection, both ways."""
        for task, pair in list(self._open.items()):
            for one in pair:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            task.cancel()

    def black_hole(self, *, is_on: bool) -> None:
        self.now.is_black_hole = is_on
        self._wake()

    def cut_after(self, count: int) -> None:
        """Reset everything when the server has got so many more bytes."""
        self.now.upstream_bytes_left = count

    def _wake(self) -> None:
        self.now.changed.set()
        self.now.changed = asyncio.Event()

    def _keep(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            near, _ = await loop.sock_accept(self._listener)
            self.connections += 1
            self._keep(self._serve(near))

    async def _serve(self, near: socket.socket) -> None:
        task = asyncio.current_task()
        assert task is not None
        far = socket.socket()
        self._open[task] = (near, far)
        try:
            for one in (near, far):
                one.settimeout(0)
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
            await self._light()
            await asyncio.get_running_loop().sock_connect(far, self._to)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._pump(near, far, is_upstream=True))
                tasks.create_task(self._pump(far, near, is_upstream=False))
        except* (OSError, EOFError):
            pass  # one end is gone: the other learns it now
        finally:
            del self._open[task]
            near.close()
            far.close()

    async def _light(self) -> None:
        """Wait while nothing comes through."""
        while self.now.is_black_hole:
            await self.now.changed.wait()

    async def _pump(self, source: socket.socket, sink: socket.socket, *, is_upstream: bool) -> None:
        queue: deque[tuple[float, bytes]] = deque()
        filled, drained = asyncio.Event(), asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._take(source, queue, filled, drained))
            tasks.create_task(self._give(sink, queue, filled, drained, is_upstream=is_upstream))

    async def _take(
        self, source: socket.socket, queue: deque[tuple[float, bytes]], filled: asyncio.Event, drained: asyncio.Event
    ) -> None:
        """Into the queue, with the time at which each piece comes out of it."""
        loop = asyncio.get_running_loop()
        free_s = 0.0
        while True:
            await self._light()
            now_s = loop.time()
            while (free_s - now_s) * min(self.now.bytes_per_s, 1e12) > self.now.queue_bytes:
                drained.clear()
                await drained.wait()
                now_s = loop.time()
            data = await loop.sock_recv(source, CHUNK_BYTES)
            free_s = max(free_s, loop.time()) + len(data) / self.now.bytes_per_s
            queue.append((free_s + self.now.latency_s, data))
            filled.set()
            if not data:
                return

    async def _give(
        self,
        sink: socket.socket,
        queue: deque[tuple[float, bytes]],
        filled: asyncio.Event,
        drained: asyncio.Event,
        *,
        is_upstream: bool,
    ) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not queue:
                filled.clear()
                await filled.wait()
            due_s, data = queue[0]
            await asyncio.sleep(max(due_s - loop.time(), 0.0))
            await self._light()
            if not data:
                raise EOFError
            if is_upstream and len(data) > self.now.upstream_bytes_left:
                data = data[: int(self.now.upstream_bytes_left)]
                await loop.sock_sendall(sink, data)
                self.now.upstream_bytes_left = float("inf")
                self.reset()
            await loop.sock_sendall(sink, data)
            queue.popleft()
            drained.set()
            if is_upstream:
                self.upstream_bytes += len(data)
                self.now.upstream_bytes_left -= len(data)


@asynccontextmanager
async def chaos(port: int, **conditions: float) -> AsyncIterator[ChaosProxy]:
    """A relay to a local port under these conditions."""
    async with ChaosProxy(port, conditions=Conditions(**conditions)) as proxy:  # type: ignore[arg-type]  # by name
        yield proxy
