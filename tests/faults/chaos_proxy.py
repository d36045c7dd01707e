"""A bad network as a TCP relay: delay, rate, a queue of bounded length, silence, resets, cuts in mid-frame."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Coroutine
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
    upstream_extra_s: float = 0.0
    """What the way up takes longer than the way down."""
    bytes_per_s: float = float("inf")
    """Each way."""
    queue_bytes: int = 64 << 10
    """What a router keeps for a link that is busy; beyond it the sender waits."""
    is_black_hole: bool = False
    """Connections stand and nothing comes through, neither data nor their end."""
    bytes_left: dict[bool, float] = field(default_factory=lambda: {True: float("inf"), False: float("inf")})
    """Upstream and down: after so many more bytes every connection is reset, wherever in a frame that is."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass
class _Line:
    """One connection through the relay."""

    near: socket.socket
    far: socket.socket
    is_abandoned: bool = False


class ChaosProxy:
    """A relay on a port of its own to `host`:`port`; `now` says how the network is."""

    def __init__(self, port: int, host: str = "127.0.0.1", conditions: Conditions | None = None) -> None:
        self._to = (host, port)
        self.port = 0
        self.now = conditions or Conditions()
        self.connections = 0
        """How many were ever made."""
        self._lines: dict[asyncio.Task[None], _Line] = {}
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
        for task, line in list(self._lines.items()):
            for one in (line.near, line.far):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            task.cancel()

    def abandon(self) -> None:
        """The connections that stand carry nothing any more, and neither end is told; new ones are as ever."""
        for line in self._lines.values():
            line.is_abandoned = True

    def black_hole(self, *, is_on: bool) -> None:
        """Begin or end to let nothing through."""
        self.now.is_black_hole = is_on
        self._wake()

    def cut_after(self, count: int, *, is_upstream: bool = True) -> None:
        """Reset everything when so many more bytes came through."""
        self.now.bytes_left[is_upstream] = count

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
        line = self._lines[task] = _Line(near, socket.socket())
        try:
            for one in (near, line.far):
                one.settimeout(0)
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            line.far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
            await self._light(line)
            await asyncio.get_running_loop().sock_connect(line.far, self._to)
            async with asyncio.TaskGroup() as tasks:
                for is_upstream in (True, False):
                    way = _Way(line, is_upstream=is_upstream)
                    tasks.create_task(self._take(way))
                    tasks.create_task(self._give(way))
        except* (OSError, EOFError):
            pass  # one end is gone: the other learns it now
        finally:
            del self._lines[task]
            near.close()
            line.far.close()

    async def _light(self, line: _Line) -> None:
        """Wait while nothing comes through."""
        while self.now.is_black_hole or line.is_abandoned:
            await self.now.changed.wait()

    async def _take(self, way: _Way) -> None:
        """Into the queue, with the time at which each piece comes out of it."""
        loop = asyncio.get_running_loop()
        free_s = 0.0
        data = b"first"
        while data:
            await self._light(way.line)
            while (free_s - loop.time()) * min(self.now.bytes_per_s, 1e12) > self.now.queue_bytes:
                way.drained.clear()
                await way.drained.wait()
            data = await loop.sock_recv(way.source, CHUNK_BYTES)
            free_s = max(free_s, loop.time()) + len(data) / self.now.bytes_per_s
            extra_s = self.now.upstream_extra_s if way.is_upstream else 0.0
            way.queue.append((free_s + self.now.latency_s + extra_s, data))
            way.filled.set()

    async def _give(self, way: _Way) -> None:
        loop = asyncio.get_running_loop()
        left = self.now.bytes_left
        while True:
            while not way.queue:
                way.filled.clear()
                await way.filled.wait()
            due_s, data = way.queue[0]
            await asyncio.sleep(max(due_s - loop.time(), 0.0))
            await self._light(way.line)
            if not data:
                raise EOFError
            if len(data) > left[way.is_upstream]:
                await loop.sock_sendall(way.sink, data[: int(left[way.is_upstream])])
                left[way.is_upstream] = float("inf")
                self.reset()
                raise EOFError
            await loop.sock_sendall(way.sink, data)
            left[way.is_upstream] -= len(data)
            way.queue.popleft()
            way.drained.set()


class _Way:
    """One direction of a line, and what is in between."""

    def __init__(self, line: _Line, *, is_upstream: bool) -> None:
        self.line = line
        self.is_upstream = is_upstream
        self.source, self.sink = (line.near, line.far) if is_upstream else (line.far, line.near)
        self.queue: deque[tuple[float, bytes]] = deque()
        """When each piece is through."""
        self.filled = asyncio.Event()
        self.drained = asyncio.Event()
