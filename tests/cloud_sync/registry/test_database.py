"""The pool: what errors mean, that no password is told, and that it comes back by itself."""

from __future__ import annotations

import asyncio
import logging

import pytest

from cloud_sync.registry.database import Database, describe
from gateway.errors import ConfigError, RefusedError, UnavailableError

LIMIT_S = 30


@pytest.fixture
async def opened(database: str):
    async with Database(database, pool_size=2, application_name="bridge") as made:
        yield made


def test_description_has_no_password() -> None:
    assert describe("postgresql://me:secret@db.example:5433/ward") == "db.example:5433/ward"
    assert describe("host=db dbname=ward password=secret") == "db:5432/ward"


@pytest.mark.parametrize("conninfo", ["postgresql://me:secret@[db/x", "password=secret nonsense", "host = 'secret"])
def test_unreadable_connection_string_is_not_repeated(conninfo: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Database(conninfo)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


async def test_server_that_is_away_is_unavailable_and_heals(unused_tcp_port: int, caplog) -> None:
    with caplog.at_level(logging.DEBUG):
        away = Database(f"postgresql://me:secret@127.0.0.1:{unused_tcp_port}/ward")
        with pytest.raises(UnavailableError, match=f"127.0.0.1:{unused_tcp_port}/ward") as caught:
            await away.open()
        await away.close()
    assert caught.value.heals
    assert caught.value.hint
    assert "secret" not in caplog.text + str(caught.value)


async def test_wrong_password(database: str, caplog) -> None:
    user, _, rest = database.removeprefix("postgresql://").partition(":")
    wrong = Database(f"postgresql://{user}:wrong-one@{rest.partition('@')[2]}")
    with pytest.raises(UnavailableError, match="password authentication failed") as caught:
        await wrong.open()
    assert "wrong-one" not in caplog.text + str(caught.value)


async def test_closed_pool_says_so(database: str) -> None:
    made = Database(database)
    with pytest.raises(UnavailableError, match="closed"):
        await made.connection().__aenter__()
    await made.open()
    await made.open()
    await made.close()
    await made.close()
    await made.open()
    async with made.connection() as connection:
        await connection.execute("SELECT 1")
    await made.close()


async def test_what_errors_mean(opened: Database) -> None:
    async def run(statement: str, *parameters: object) -> None:
        async with opened.connection() as connection:
            await connection.execute(statement.encode(), parameters or None)

    await run("CREATE TABLE t (x int PRIMARY KEY CHECK (x > 0), y text)")
    await run("INSERT INTO t VALUES (1)")
    for bad in ("INSERT INTO t VALUES (1)", "INSERT INTO t VALUES (0, 'secret')", "SELECT 1/0", "SELECT 'x'::int"):
        with pytest.raises(RefusedError) as refused:
            await run(bad)
        assert not refused.value.heals
        assert "secret" not in str(refused.value)
    with pytest.raises(RefusedError, match="NUL"):
        await run("SELECT %s::text", "a\0b")
    with pytest.raises(UnavailableError) as lacking:
        await run("SELECT * FROM signal_streams")
    assert "wardlink cloud migrate" in lacking.value.hint
    with pytest.raises(UnavailableError):
        await run("SET LOCAL statement_timeout = 1; SELECT pg_sleep(5)")


async def test_transaction_is_all_or_nothing(opened: Database) -> None:
    async def insert_and(then: str) -> None:
        async with opened.transaction() as connection:
            await connection.execute("INSERT INTO t VALUES (1)")
            if then == "stop":
                raise KeyError
            await connection.execute(then.encode())

    async with opened.transaction() as connection:
        await connection.execute("CREATE TABLE t (x int)")
    with pytest.raises(RefusedError):
        await insert_and("SELECT 1/0")
    with pytest.raises(KeyError):
        await insert_and("stop")
    async with opened.connection() as connection:
        assert await (await connection.execute("SELECT count(*) FROM t")).fetchone() == (0,)


async def test_sessions_speak_utc_and_are_named(opened: Database) -> None:
    async with opened.connection() as connection:
        cursor = await connection.execute(
            "SELECT current_setting('timezone'), current_setting('application_name'), "
            "current_setting('statement_timeout'), current_setting('idle_in_transaction_session_timeout')"
        )
        assert await cursor.fetchone() == ("UTC", "bridge", "1min", "1min")


async def kill_others(opened: Database) -> None:
    async with opened.session() as connection:
        await connection.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )


async def use_a_connection_that_dies(opened: Database) -> None:
    async with opened.connection() as connection:
        await kill_others(opened)
        await connection.execute("SELECT 1")


async def test_pool_outlives_its_connections(opened: Database) -> None:
    async with asyncio.timeout(LIMIT_S):
        async with opened.connection() as one, opened.connection() as two:
            await one.execute("SELECT 1")
            await two.execute("SELECT 1")
        await kill_others(opened)
        with pytest.raises(UnavailableError):
            await use_a_connection_that_dies(opened)
        async with opened.connection() as connection:
            await connection.execute("SELECT 1")


async def test_listener_comes_back_and_says_that_it_may_have_missed_something(opened: Database) -> None:
    async def tell(payload: str) -> None:
        async with opened.connection() as connection:
            await connection.execute("SELECT pg_notify('news', %s)", (payload,))

    async with asyncio.timeout(LIMIT_S):
        listening = opened.listen("news")
        assert await anext(listening) == ""
        await tell("one")
        await tell("two")
        assert [await anext(listening), await anext(listening)] == ["one", "two"]
        await kill_others(opened)
        assert await anext(listening) == ""
        await tell("three")
        assert await anext(listening) == "three"
        await listening.aclose()
