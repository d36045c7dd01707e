"""The schema's history: numbered SQL files, each applied once, in one transaction, its SHA-256 on record.

A file that was applied never changes: a changed or missing one is refused, whoever is right.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import cloud_sync
from cloud_sync.registry.database import Connection, Database
from gateway.errors import ConfigError, UnavailableError

_FILE = re.compile(r"(\d{4})_[a-z0-9_]+\.sql")
_LOCK = 0x7761_7264_6C69_6E6B
"""Key of the advisory lock: "wardlink" in ASCII."""
LOCK_TIMEOUT_S = 50
"""Another runner may be at work; below the statement timeout, so that the error can say so."""
MIGRATION_TIMEOUT_S = 3600
"""A later migration may rewrite a large table."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One file."""

    version: int
    name: str
    sha256: str
    text: bytes


@dataclass(frozen=True, slots=True)
class MigrationState:
    """One file and whether this database has it."""

    version: int
    name: str
    sha256: str
    applied_at: datetime | None
    """None: pending."""


def sql_folder() -> Path:
    """Where the files are: inside the installed package, or beside it in a checkout."""
    package = Path(cloud_sync.__file__).parent
    installed = package / "sql"
    return installed if installed.is_dir() else package.parent / "sql"


def read_migrations(folder: Path) -> tuple[Migration, ...]:
    """The files of a folder in order. Raises `ConfigError` where their numbers are not 1, 2, 3…"""
    found = []
    for path in sorted(folder.glob("*.sql")):
        match = _FILE.fullmatch(path.name)
        if match is None:
            raise ConfigError(f"{path}: not the name of a migration", hint="expected NNNN_what_it_does.sql")
        text = path.read_bytes()
        found.append(Migration(int(match[1]), path.name, hashlib.sha256(text).hexdigest(), text))
    if not found:
        raise ConfigError(f"{folder}: no migrations there", hint="the installation is not complete")
    numbers = [migration.version for migration in found]
    if numbers != list(range(1, len(found) + 1)):
        raise ConfigError(f"{folder}: migrations are numbered {numbers}", hint="expected 1, 2, 3… each once")
    return tuple(found)


async def migrate(database: Database, folder: Path | None = None) -> list[MigrationState]:
    """Apply what is pending; returns what this call applied. Safe to run twice, and from two places at once.

    Raises `ConfigError` where an applied file has changed or is gone, `RefusedError` or `UnavailableError`
    where PostgreSQL does not take one: that file and those after it are then not applied.
    """
    migrations = await _read(folder)
    applied: list[MigrationState] = []
    async with database.session() as connection:
        await _lock(connection)
        await connection.execute(
            "CREATE TABLE IF NOT EXISTS schema_migrations (version integer PRIMARY KEY, name text NOT NULL, "
            "sha256 text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())"
        )
        states = await _compared(connection, migrations)
        for migration, state in zip(migrations, states, strict=True):
            if state.applied_at is None:
                applied.append(await _apply(connection, migration))
    return applied


async def status(database: Database, folder: Path | None = None) -> list[MigrationState]:
    """Every file, applied or pending. Raises `ConfigError` where an applied file has changed or is gone."""
    migrations = await _read(folder)
    async with database.connection() as connection:
        return await _compared(connection, migrations)


async def verify(database: Database, folder: Path | None = None) -> list[MigrationState]:
    """The files, all applied and unchanged. Raises `ConfigError` or, where some are pending, `UnavailableError`."""
    states = await status(database, folder)
    pending = [state.name for state in states if state.applied_at is None]
    if pending:
        raise UnavailableError(
            f"the database ({database.where}) lacks {len(pending)} migrations: {', '.join(pending)}",
            hint="run `wardlink cloud migrate`",
        )
    return states


async def _read(folder: Path | None) -> tuple[Migration, ...]:
    return await asyncio.to_thread(lambda: read_migrations(folder or sql_folder()))


async def _lock(connection: Connection) -> None:
    await connection.execute("SELECT set_config('lock_timeout', %s, false)", (f"{LOCK_TIMEOUT_S}s",))
    await connection.execute("SELECT pg_advisory_lock(%s)", (_LOCK,))
    await connection.execute("SELECT set_config('statement_timeout', %s, false)", (f"{MIGRATION_TIMEOUT_S}s",))


async def _compared(connection: Connection, migrations: tuple[Migration, ...]) -> list[MigrationState]:
    row = await (await connection.execute("SELECT to_regclass('schema_migrations') IS NOT NULL")).fetchone()
    applied: dict[int, tuple[str, str, datetime]] = {}
    if row is not None and row[0]:
        cursor = await connection.execute("SELECT version, name, sha256, applied_at FROM schema_migrations")
        applied = {version: (name, sha256, at) for version, name, sha256, at in await cursor.fetchall()}
    states: list[MigrationState] = []
    for migration in migrations:
        known = applied.pop(migration.version, None)
        if known is not None and known[:2] != (migration.name, migration.sha256):
            raise ConfigError(
                f"migration {known[0]} was applied with SHA-256 {known[1][:12]}…, the file is now "
                f"{migration.name} with {migration.sha256[:12]}…",
                hint="restore the file as it was, and put the change into a new one",
            )
        applied_at = known[2] if known is not None else None
        if applied_at is not None and states and states[-1].applied_at is None:
            raise ConfigError(f"migration {migration.name} was applied, {states[-1].name} before it was not")
        states.append(MigrationState(migration.version, migration.name, migration.sha256, applied_at))
    if applied:
        names = ", ".join(sorted(name for name, _, _ in applied.values()))
        raise ConfigError(
            f"the database has migrations that this installation has no file for: {names}",
            hint="it was migrated by a newer wardlink: install that version",
        )
    return states


async def _apply(connection: Connection, migration: Migration) -> MigrationState:
    async with connection.transaction():
        await connection.execute(migration.text)
        cursor = await connection.execute(
            "INSERT INTO schema_migrations (version, name, sha256) VALUES (%s, %s, %s) RETURNING applied_at",
            (migration.version, migration.name, migration.sha256),
        )
        row = await cursor.fetchone()
    return MigrationState(migration.version, migration.name, migration.sha256, row[0] if row else None)
