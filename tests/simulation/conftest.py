"""A registry whose clock is virtual, emptied before each simulation; the guard against blocking calls is off here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import psycopg
import pytest

from cloud_sync.registry.database import Database
from cloud_sync.registry.migrations import migrate
from wardlink.servers import PostgreSQL

NAME = "ward"
REFERENCE = ("schema_migrations", "device_types", "signal_types")
"""Tables that the migrations fill."""


@pytest.fixture(autouse=True)
def no_blocking_calls() -> None:
    """Disks and statements run inside the loop here, on purpose: their latency is virtual."""


@pytest.fixture(scope="module")
def registry(postgres_server: PostgreSQL) -> Iterator[str]:
    """Connection URI of a database in which `now()` is what the setting `virtual.now` says."""
    postgres_server.start()
    uri = postgres_server.create_database(NAME)
    with psycopg.connect(uri, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA virtual")
        connection.execute(
            "CREATE FUNCTION virtual.now() RETURNS timestamptz LANGUAGE sql STABLE PARALLEL SAFE "
            "AS $$ SELECT current_setting('virtual.now')::timestamptz $$"
        )
        connection.execute(f"ALTER DATABASE {NAME} SET virtual.now = '2024-05-01 12:00Z'")
        # Named before pg_catalog, it is found first.
        connection.execute(f"ALTER DATABASE {NAME} SET search_path = virtual, pg_catalog")
    asyncio.run(migrate(Database(uri)))
    yield uri
    postgres_server.drop_database(NAME)


@pytest.fixture
def new_registry(registry: str) -> Callable[[], str]:
    """Empties the database and gives its connection URI."""

    def empty() -> str:
        with psycopg.connect(registry) as connection:
            tables = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'virtual'").fetchall()
            connection.execute("SET session_replication_role = replica")  # no trigger, no order among tables
            for (table,) in tables:
                if table not in REFERENCE:
                    connection.execute(f"DELETE FROM {table}")
        return registry

    return empty
