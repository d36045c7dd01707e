"""The runner: once, in order, unchanged, whoever else runs."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cloud_sync.registry.database import Database
from cloud_sync.registry.migrations import migrate, read_migrations, sql_folder, status, verify
from gateway.errors import ConfigError, RefusedError, UnavailableError, WardlinkError

FILES = [path.name for path in sorted(sql_folder().glob("*.sql"))]
NEXT = f"{len(FILES) + 1:04}"
"""The number of the migration that is not there yet."""


@pytest.fixture
async def empty(database: str) -> AsyncIterator[Database]:
    async with Database(database, pool_size=3) as opened:
        yield opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The real files, to be spoiled."""
    return Path(shutil.copytree(sql_folder(), tmp_path / "sql"))


async def test_migrates_once_and_then_has_nothing_to_do(empty: Database) -> None:
    assert all(state.applied_at is None for state in await status(empty))
    assert [state.name for state in await migrate(empty)] == FILES
    assert await migrate(empty) == []
    assert [state.name for state in await verify(empty)] == FILES


async def test_two_runners_at_once(empty: Database) -> None:
    applied = await asyncio.gather(*(migrate(empty) for _ in range(4)))
    assert sorted(map(len, applied)) == [0, 0, 0, len(FILES)]


async def test_new_file_is_pending_then_applied(empty: Database, folder: Path) -> None:
    await migrate(empty, folder)
    (folder / f"{NEXT}_more.sql").write_text("CREATE TABLE more (x int);")
    with pytest.raises(UnavailableError, match=rf"lacks 1 migrations: {NEXT}_more\.sql") as caught:
        await verify(empty, folder)
    assert "wardlink cloud migrate" in caught.value.hint
    assert [state.name for state in await migrate(empty, folder)] == [f"{NEXT}_more.sql"]
    await verify(empty, folder)


@pytest.mark.parametrize("act", [migrate, status, verify])
async def test_changed_or_missing_applied_file_is_refused(empty: Database, folder: Path, act) -> None:
    await migrate(empty, folder)
    last = folder / FILES[-1]
    last.write_text(last.read_text() + "-- a harmless word\n")
    with pytest.raises(ConfigError, match=f"{FILES[-1]} was applied with SHA-256"):
        await act(empty, folder)
    last.unlink()
    with pytest.raises(ConfigError, match=f"no file for: {FILES[-1]}"):
        await act(empty, folder)


async def test_renamed_file_is_refused(empty: Database, folder: Path) -> None:
    await migrate(empty, folder)
    (folder / FILES[0]).rename(folder / "0001_other.sql")
    with pytest.raises(ConfigError, match=r"the file is now 0001_other\.sql"):
        await status(empty, folder)


async def test_file_that_fails_leaves_nothing_and_those_before_it(empty: Database, folder: Path) -> None:
    (folder / f"{NEXT}_bad.sql").write_text("CREATE TABLE half (x int); INSERT INTO half SELECT 1/0;")
    with pytest.raises(RefusedError, match="division by zero"):
        await migrate(empty, folder)
    states = await status(empty, folder)
    assert [state.applied_at is None for state in states] == [False] * len(FILES) + [True]
    (folder / f"{NEXT}_bad.sql").write_text("CREATE TABLE half (x int);")
    assert len(await migrate(empty, folder)) == 1


async def test_file_and_its_record_are_one_transaction(empty: Database, folder: Path) -> None:
    await migrate(empty, folder)
    (folder / f"{NEXT}_bad.sql").write_text("CREATE TABLE half (x int); ALTER TABLE schema_migrations RENAME TO lost;")
    with pytest.raises(UnavailableError, match="schema_migrations"):
        await migrate(empty, folder)
    assert [state.applied_at is None for state in await status(empty, folder)] == [False] * len(FILES) + [True]


async def test_syntax_error_is_one_of_ours(empty: Database, folder: Path) -> None:
    (folder / f"{NEXT}_bad.sql").write_text("CREATE TABEL half (x int);")
    with pytest.raises(WardlinkError, match='syntax error at or near "TABEL"'):
        await migrate(empty, folder)


@pytest.mark.parametrize(
    ("name", "said"),
    [("0999_gap.sql", "numbered"), ("0001_twice.sql", "numbered"), ("5_short.sql", "not the name of a migration")],
)
def test_folder_with_wrong_names(folder: Path, name: str, said: str) -> None:
    (folder / name).write_text("")
    with pytest.raises(ConfigError, match=said):
        read_migrations(folder)


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no migrations there"):
        read_migrations(tmp_path)
