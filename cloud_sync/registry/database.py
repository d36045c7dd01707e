"""The way to PostgreSQL: a pool of connections, transactions, notifications, and the meaning of what goes wrong.

Knows no table. Everything that psycopg raises leaves this package as an error of `gateway.errors`:
`RefusedError` only where the data itself is at fault, `UnavailableError` for all that may be mended outside.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Self, TypeAlias

import psycopg
from psycopg import conninfo as dsn
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool
from tenacity import AsyncRetrying, retry_if_exception_type, wait_random_exponential

from gateway.errors import ConfigError, RefusedError, UnavailableError, WardlinkError

log = logging.getLogger(__name__)

Connection: TypeAlias = psycopg.AsyncConnection[TupleRow]

CONNECT_TIMEOUT_S = 10
"""A server that does not answer by then is away; libpq's own default is to wait for ever."""
CHECKOUT_TIMEOUT_S = 6.0
"""How long a caller waits for a free connection before the database counts as away. A little longer than the pool
itself tries, so that no caller waits for a pool that has given up."""
STATEMENT_TIMEOUT_MS = 60_000
"""A batch takes milliseconds; what takes this long hangs on a lock or a dying disk."""
IDLE_IN_TRANSACTION_TIMEOUT_MS = 60_000
"""A bridge that stalls in mid-transaction must not hold its locks against the others."""
POOL_RECONNECT_S = 5.0
"""The pool gives up a broken connection after this; the next caller starts afresh, with no long wait."""
LISTEN_RETRY_MAX_S = 10.0
LISTEN_PROBE_S = 15.0
"""A connection that only listens would never notice a silent network: it is asked this often."""
KEEPALIVES = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 30_000}
"""A half-open connection is found after about 30 s."""

_DATA_AT_FAULT = ("22", "23", "P0001")
"""SQLSTATE classes data exception and integrity constraint violation, and what a trigger raises."""
_NO_SUCH_TABLE = ("42P01", "42703", "42883")


def describe(conninfo: str) -> str:
    """host:port/name of a connection string, never its password."""
    parts = _parsed(conninfo)
    host = str(parts.get("host") or parts.get("hostaddr") or "local socket")
    return f"{host}:{parts.get('port') or 5432}/{parts.get('dbname') or parts.get('user') or ''}"


def _parsed(conninfo: str) -> dict[str, str | int | None]:
    try:
        return dict(dsn.conninfo_to_dict(conninfo))
    except psycopg.ProgrammingError:
        # psycopg quotes the string it cannot read, password and all: its message is not passed on.
        raise ConfigError(
            "the PostgreSQL connection string cannot be read",
            hint="expected postgresql://user@host:5432/name or key=value pairs",
        ) from None


def meaning(error: psycopg.Error, where: str = "") -> WardlinkError:
    """What a psycopg error means for the caller. Row contents that PostgreSQL reports are left out."""
    at = f" ({where})" if where else ""
    said = (error.diag.message_primary or str(error)).strip().splitlines() or [type(error).__name__]
    state = error.sqlstate or ""
    if state.startswith(_DATA_AT_FAULT) or isinstance(error, psycopg.DataError | psycopg.IntegrityError):
        return RefusedError(f"PostgreSQL{at} refused: {said[0]}", hint=error.diag.message_hint or "")
    if state in _NO_SUCH_TABLE:
        return UnavailableError(
            f"the database{at} lacks what this version needs: {said[0]}", hint="run `wardlink cloud migrate`"
        )
    if state == "55P03":
        return UnavailableError(f"PostgreSQL{at}: {said[0]}", hint="another session holds the lock: try again later")
    if state == "42501":
        return UnavailableError(f"PostgreSQL{at}: {said[0]}", hint="grant the role what the head of sql/0001 names")
    return UnavailableError(
        f"PostgreSQL{at} does not answer as it should: {said[0]}",
        hint="is the server up, and are host, port, user and password right?",
    )


@contextmanager
def mapped(where: str = "") -> Iterator[None]:
    """Let psycopg errors leave as errors of `gateway.errors`."""
    try:
        yield
    except psycopg.Error as error:
        raise meaning(error, where) from error


class Database:
    """A bounded pool of autocommit connections, times in UTC.

    May be opened again after `close`, and when the server is away `open` may simply be tried again.
    """

    def __init__(self, conninfo: str, *, pool_size: int = 4, application_name: str = "wardlink") -> None:
        """Raises `ConfigError` where the connection string cannot be read."""
        if pool_size < 1:
            raise ConfigError(f"a pool of {pool_size} connections", hint="at least 1")
        self.where = describe(conninfo)
        defaults: dict[str, str | int] = {
            "connect_timeout": CONNECT_TIMEOUT_S,
            "application_name": application_name,
            **KEEPALIVES,
        }
        given = {name: value for name, value in _parsed(conninfo).items() if value is not None}
        self._conninfo = dsn.make_conninfo("", **{**defaults, **given})
        self._pool_size = pool_size
        self._pool: AsyncConnectionPool[Connection] | None = None

    async def open(self) -> None:
        """Connect. Raises `UnavailableError` with the server's own reason."""
        if self._pool is not None:
            return
        # The pool only ever says that it timed out; a connection of our own says why.
        async with self._connected():
            pass
        pool = AsyncConnectionPool(
            self._conninfo,
            connection_class=psycopg.AsyncConnection[TupleRow],
            kwargs={"autocommit": True},
            min_size=1,
            max_size=self._pool_size,
            open=False,
            configure=_configure,
            check=AsyncConnectionPool.check_connection,
            timeout=CHECKOUT_TIMEOUT_S,
            reconnect_timeout=POOL_RECONNECT_S,
            name="wardlink",
        )
        with mapped(self.where):
            await pool.open()
        self._pool = pool

    async def close(self) -> None:
        """Release every connection; any number of times."""
        pool, self._pool = self._pool, None
        if pool is not None:
            await pool.close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A connection in autocommit: each statement, or each `connection.transaction()`, stands for itself."""
        if self._pool is None:
            raise UnavailableError(f"the connection to PostgreSQL ({self.where}) is closed")
        with mapped(self.where):
            async with self._pool.connection() as connection:
                yield connection

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        """A connection inside one transaction: committed at the end, rolled back on any error."""
        async with self.connection() as connection, connection.transaction():
            yield connection

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Connection]:
        """A connection outside the pool, closed at the end: for locks that belong to a session."""
        async with self._connected() as connection:
            yield connection

    async def listen(self, channel: str) -> AsyncIterator[str]:
        """Payloads of NOTIFY on a channel, for ever, over a connection of its own that comes back by itself.

        An empty payload comes first and after every interruption: anything may have been missed, so forget all.
        """
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(UnavailableError),
            wait=wait_random_exponential(multiplier=0.2, max=LISTEN_RETRY_MAX_S),
        )
        while True:
            connection: Connection = await retrying(self._connect)
            try:
                with mapped(self.where):
                    await connection.execute(psycopg.sql.SQL("LISTEN {}").format(psycopg.sql.Identifier(channel)))
                    yield ""
                    while True:
                        async for told in connection.notifies(timeout=LISTEN_PROBE_S):
                            yield told.payload
                        await connection.execute("SELECT 1")
            except UnavailableError as error:
                log.warning("changes of bindings are not heard for now: %s", error.message)
            finally:
                await connection.close()

    async def _connect(self) -> Connection:
        with mapped(self.where):
            connection = await psycopg.AsyncConnection.connect(self._conninfo, autocommit=True)
            try:
                await _configure(connection)
            except BaseException:
                await connection.close()
                raise
        return connection

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Connection]:
        connection = await self._connect()
        try:
            with mapped(self.where):
                yield connection
        finally:
            with suppress(psycopg.Error):
                await connection.close()


async def _configure(connection: Connection) -> None:
    await connection.execute(
        "SELECT set_config('timezone', 'UTC', false), set_config('statement_timeout', %s, false), "
        "set_config('idle_in_transaction_session_timeout', %s, false)",
        (str(STATEMENT_TIMEOUT_MS), str(IDLE_IN_TRANSACTION_TIMEOUT_MS)),
    )
