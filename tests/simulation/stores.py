"""The cloud's two stores: a dictionary for the time series, and the real PostgreSQL behind a modelled network.

Every statement of the registry runs as real SQL, at one moment of virtual time, which `now()` gives, too. Transactions
come one after the other, the strictest form of row locks; what they see of each other is for PostgreSQL to say.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg

from cloud_sync.registry.database import Database, mapped
from cloud_sync.timeseries import Outcome
from gateway.errors import UnavailableError
from gateway.samples import NS_PER_S
from tests.simulation.books import Books, Stream
from tests.simulation.host import BEGIN_NS

STATEMENT_S = (0.000_2, 0.003)
REQUEST_S = (0.002, 0.08)
NOTICE_S = (0.001, 0.05)
CHANNEL = "wardlink_bindings"


class Service:
    """A server that may be away, or do what it is asked and then not say so."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.outages = 0
        self.muteness = 0
        """Reasons why answers get lost now and then."""

    def does_not_answer(self) -> bool:
        return self.muteness > 0 and self.rng.random() < 0.3


class SeriesServer(Service):
    """The time-series store: (measurement and tags, time) -> fields. Writing twice overwrites."""

    def __init__(self, rng: random.Random, books: Books) -> None:
        super().__init__(rng)
        self.points: dict[bytes, dict[int, bytes]] = {}
        self._books = books

    def keep(self, lines: list[bytes]) -> None:
        for line in lines:
            series, fields, time_ns = line.rsplit(b" ", 2)
            of_series = self.points.setdefault(series, {})
            if of_series.setdefault(int(time_ns), fields) != fields:
                self._books.trouble(f"a point is overwritten by another: {line.decode()}")


class ModelTimeSeries:
    """One bridge's client of it; a `TimeSeries`."""

    where = "the time-series store"

    def __init__(self, server: SeriesServer) -> None:
        self._server = server

    async def ping(self) -> None:
        await self._way()
        if self._server.outages:
            raise UnavailableError("the time-series store does not answer")

    async def write(self, org: str, bucket: str, lines: bytes) -> Outcome:
        del org, bucket
        await self._way()
        server, texts = self._server, lines.splitlines()
        if server.outages:
            if server.rng.random() < 0.3:  # it began before it fell
                server.keep(texts[: server.rng.randrange(len(texts) + 1)])
            raise UnavailableError("the time-series store does not answer")
        server.keep(texts)
        await self._way()
        if server.does_not_answer():
            raise UnavailableError("the time-series store did not answer")
        return Outcome()

    async def close(self) -> None:
        pass

    async def _way(self) -> None:
        await asyncio.sleep(self._server.rng.uniform(*REQUEST_S))


class RegistryServer(Service):
    """PostgreSQL, whose one connection stands for all of them."""

    def __init__(self, conninfo: str, rng: random.Random, loop: asyncio.AbstractEventLoop) -> None:
        """`conninfo`: a database whose `now()` is what the setting `virtual.now` says."""
        super().__init__(rng)
        self.real = psycopg.connect(conninfo, autocommit=True)
        # Its own durability is not what is tried here.
        self.real.execute("SELECT set_config('timezone', 'UTC', false), set_config('synchronous_commit', 'off', false)")
        self.real.execute(f"LISTEN {CHANNEL}")
        self.real.add_notify_handler(self._notify)
        self.turn = asyncio.Lock()
        self.breaks = 0
        """Counts outages, so that a connection knows that it is an old one."""
        self._loop = loop
        self._listeners: dict[asyncio.Queue[str | None], None] = {}
        """In the order in which they came."""

    def fall(self) -> None:
        self.outages += 1
        self.breaks += 1
        for queue in self._listeners:
            queue.put_nowait(None)

    def close(self) -> None:
        self.real.close()

    def tell_time(self) -> None:
        """Let its clock say what time it is."""
        now = datetime.fromtimestamp(BEGIN_NS // NS_PER_S, UTC) + timedelta(seconds=self._loop.time())
        self.real.execute("SELECT set_config('virtual.now', %s, false)", (now.isoformat(),))

    def check(self, seen: int) -> None:
        """Whether a connection made after so many breaks still stands."""
        if self.outages or self.breaks != seen:
            raise psycopg.OperationalError("the connection is closed")

    async def heard(self) -> AsyncIterator[str]:
        """Notifications, with an empty one after every interruption."""
        queue: asyncio.Queue[str | None] = asyncio.Queue()
        self._listeners[queue] = None
        try:
            while True:
                while self.outages:  # noqa: ASYNC110 - a client that tries again
                    await asyncio.sleep(self.rng.uniform(1, 10))
                yield ""
                while (told := await queue.get()) is not None:
                    yield told
        finally:
            del self._listeners[queue]

    def _notify(self, notice: psycopg.Notify) -> None:
        for queue in self._listeners:
            self._loop.call_later(self.rng.uniform(*NOTICE_S), queue.put_nowait, notice.payload)


class ModelDatabase(Database):
    """The registry as `Database` gives it, with virtual latency, outages and lost answers."""

    def __init__(self, server: RegistryServer) -> None:
        super().__init__("host=registry dbname=wardlink")
        self._server = server
        self._is_open = False

    async def open(self) -> None:
        await asyncio.sleep(self._server.rng.uniform(*REQUEST_S))
        with mapped(self.where):
            self._server.check(self._server.breaks)
        self._is_open = True

    async def close(self) -> None:
        self._is_open = False

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Any]:
        if not self._is_open:
            raise UnavailableError(f"the connection to PostgreSQL ({self.where}) is closed")
        with mapped(self.where):
            await asyncio.sleep(self._server.rng.uniform(*STATEMENT_S))
            self._server.check(self._server.breaks)
            yield _Connection(self._server)

    async def listen(self, channel: str) -> AsyncIterator[str]:
        assert channel == CHANNEL
        async for told in self._server.heard():
            yield told


class _Connection:
    """What the registry's SQL uses of `psycopg.AsyncConnection`."""

    def __init__(self, server: RegistryServer) -> None:
        self._server = server
        self._breaks = server.breaks
        self._depth = 0

    async def execute(self, query: Any, parameters: Any = None) -> _Cursor:
        return await self.run(query, lambda: _Cursor(self, self._server.real.execute(query, parameters)))

    async def run(self, query: Any, step: Any) -> Any:
        """One statement, in the transaction that is open or in one of its own."""
        if self._depth:
            return await self._reach(step)
        async with self._server.turn:
            if not _is_timeless(query):
                self._server.tell_time()
            return await self._reach(step)

    async def _reach(self, step: Any) -> Any:
        await asyncio.sleep(self._server.rng.uniform(*STATEMENT_S))
        self._server.check(self._breaks)
        return step()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        if self._depth:
            with self._server.real.transaction():
                yield
            return
        async with self._server.turn:
            self._server.check(self._breaks)
            self._server.tell_time()
            self._depth += 1
            try:
                with self._server.real.transaction():
                    yield
                    await asyncio.sleep(self._server.rng.uniform(*STATEMENT_S))
                    self._server.check(self._breaks)
            finally:
                self._depth -= 1
            await asyncio.sleep(self._server.rng.uniform(*STATEMENT_S))
            self._server.check(self._breaks)
            if self._server.does_not_answer():
                raise psycopg.OperationalError("the connection was lost while it committed")

    @asynccontextmanager
    async def cursor(self, **options: Any) -> AsyncIterator[_Cursor]:
        with self._server.real.cursor(**options) as real:
            yield _Cursor(self, real)


def _is_timeless(query: Any) -> bool:
    text = query if isinstance(query, bytes) else str(query).encode()
    return text.lstrip().startswith(b"SELECT") and b"now()" not in text


class _Cursor:
    """What the registry's SQL uses of `psycopg.AsyncCursor`."""

    def __init__(self, connection: _Connection, real: Any) -> None:
        self._connection = connection
        self._real = real

    @property
    def rowcount(self) -> int:
        return int(self._real.rowcount)

    async def execute(self, query: Any, parameters: Any = None) -> _Cursor:
        await self._connection.run(query, lambda: self._real.execute(query, parameters))
        return self

    async def executemany(self, query: Any, parameters: Any) -> None:
        await self._connection.run(query, lambda: self._real.executemany(query, parameters))

    async def fetchone(self) -> Any:
        return self._real.fetchone()

    async def fetchall(self) -> Any:
        return self._real.fetchall()

    async def __aiter__(self) -> AsyncIterator[Any]:
        for row in self._real:
            yield row


def stored_points(server: SeriesServer, devices: dict[str, str]) -> Iterator[tuple[Stream, dict[int, int]]]:
    """Of every stream the points, time -> number; `devices`: id -> serial."""
    found: dict[Stream, dict[int, int]] = {}
    for series, points in server.points.items():
        tags = dict(pair.split("=", 1) for pair in series.decode().split(",")[1:])
        of_stream = found.setdefault((devices[tags["device_id"]], tags["signal_type"]), {})
        for time_ns, fields in points.items():
            of_stream[time_ns] = _number(fields)
    yield from found.items()


def _number(fields: bytes) -> int:
    values = dict(pair.split(b"=", 1) for pair in fields.split(b","))
    (value,) = (value for name, value in values.items() if name != b"quality")
    return round(float(value))
