"""A migrated registry on the run's private PostgreSQL, and a ward in it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest

from cloud_sync.registry import admin
from cloud_sync.registry.database import Database
from cloud_sync.registry.migrations import migrate
from wardlink.servers import PostgreSQL

NOON = datetime(2024, 5, 1, 12, 0, tzinfo=UTC)
NOON_NS = int(NOON.timestamp()) * 1_000_000_000
SECOND_NS = 1_000_000_000
HOUR_NS = 3600 * SECOND_NS

_numbers = itertools.count(1)


class Ward:
    """One organisation with two patients, A and B, and a headset CYTON-1 that A wears."""

    noon = NOON
    noon_ns = NOON_NS
    second_ns = SECOND_NS
    hour_ns = HOUR_NS

    def __init__(self, database: Database) -> None:
        self.database = database
        self.org_id = UUID(int=0)
        self.device_id = UUID(int=0)
        self.patients: dict[str, UUID] = {}

    async def register(self) -> None:
        async with self.database.connection() as connection:
            self.org_id = await admin.add_organization(connection, "st-anna", "St. Anna")
            for code in "AB":
                self.patients[code] = await admin.add_patient(connection, "st-anna", code)
            self.device_id = await admin.add_device(
                connection, "CYTON-1", org="st-anna", device_type="eeg_headset", patient="A"
            )

    async def rows(self, query: str, *parameters: object) -> list[tuple[Any, ...]]:
        async with self.database.connection() as connection:
            return await (await connection.execute(query.encode(), parameters)).fetchall()

    async def value(self, query: str, *parameters: object) -> Any:
        ((found,),) = await self.rows(query, *parameters)
        return found

    async def run(self, statement: str, *parameters: object) -> None:
        async with self.database.connection() as connection:
            await connection.execute(statement.encode(), parameters)

    async def stream(
        self, start: datetime, end: datetime | None, *, patient: str = "A", signal: str = "eeg", by: str = "operator"
    ) -> UUID:
        """A stream without a binding, straight into the table."""
        found: UUID = await self.value(
            "INSERT INTO signal_streams (device_id, patient_id, signal_type_id, started_at, ended_at, opened_by) "
            "SELECT %s, %s, id, %s, %s, %s FROM signal_types WHERE code = %s RETURNING id",
            *(self.device_id, self.patients[patient], start, end, by, signal),
        )
        return found


@pytest.fixture(scope="session")
def template(postgres_server: PostgreSQL) -> str:
    """Name of a migrated database; a copy of it is made in a third of the time."""
    conninfo = postgres_server.create_database("registry_template")
    asyncio.run(_migrate(conninfo))
    return "registry_template"


async def _migrate(conninfo: str) -> None:
    await migrate(Database(conninfo))


@pytest.fixture
async def registry(postgres_server: PostgreSQL, template: str) -> AsyncIterator[Database]:
    """An open pool on an empty registry of the test's own."""
    name = f"registry_{next(_numbers)}"
    server = Database(postgres_server.conninfo())
    async with server.session() as connection:
        await connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}".encode())
    async with Database(postgres_server.conninfo(name), pool_size=8) as opened:
        yield opened
    async with server.session() as connection:
        await connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture
async def ward(registry: Database) -> Ward:
    made = Ward(registry)
    await made.register()
    return made
