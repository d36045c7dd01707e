"""The runner: once, in order, unchanged, whoever else runs."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cloud_sync.registry import gap_rows
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


OLD_LEDGER = """
    INSERT INTO ledger (device_serial, signal, epoch, gateway_id, committed) VALUES
        ('D', 'eeg', 'whole', 'g', '{[0,9)}'), ('D', 'eeg', 'holed', 'g', '{[0,2),[6,9)}'),
        ('D', 'ppg', 'one', 'g', '{[4,5)}'), ('D', 'ecg', 'none', 'g', '{}');
    INSERT INTO stream_gaps (device_serial, signal, gateway_id, cause, first_at, last_at, closed_at, sample_count,
                             sequences) VALUES
        ('D', 'eeg', 'g', 'shed', now(), now(), now(), 10, '[2,4)'),
        ('D', 'ppg', 'g', 'shed', now(), now(), now(), 5, '[1,2)'),
        ('D', 'eeg', 'g', 'radio', now(), now(), now(), 7, NULL);
    INSERT INTO dead_letters (topic, payload, reason, digest) VALUES ('t', 'x', 'old', sha256('x'));
    INSERT INTO alerts (kind, subject) VALUES ('parked_data', 'D');
"""


async def test_a_registry_from_before_the_gaps_keeps_its_data_and_learns_its_holes(
    empty: Database, folder: Path
) -> None:
    later = [folder / name for name in FILES[5:]]
    texts = [file.read_text() for file in later]
    for file in later:
        file.unlink()
    await migrate(empty, folder)
    async with empty.connection() as connection:
        await connection.execute(OLD_LEDGER)
    for file, text in zip(later, texts, strict=True):
        file.write_text(text)
    assert [state.name for state in await migrate(empty, folder)] == FILES[5:]
    async with empty.connection() as connection:
        rows = await connection.execute(
            "SELECT epoch, committed::text, lost::text, missing::int, review_due FROM ledger ORDER BY epoch"
        )
        assert await rows.fetchall() == [
            ("holed", "{[0,2),[6,9)}", "{[2,4)}", 2, True),
            ("none", "{}", "{}", 0, False),
            ("one", "{[4,5)}", "{[1,2)}", 3, True),
            ("whole", "{[0,9)}", "{}", 0, False),
        ]
        rows = await connection.execute("SELECT signal, epoch, outcome, sample_count::int FROM stream_gaps ORDER BY id")
        assert await rows.fetchall() == [("eeg", None, "lost", 10), ("ppg", "one", "lost", 5), ("eeg", None, "lost", 7)]
        letters = await connection.execute("SELECT payload, is_claimed, counted FROM dead_letters")
        assert await letters.fetchall() == [(b"x", None, {})]
        for key in await gap_rows.due(connection, 10):
            await gap_rows.review(connection, key)
        rows = await connection.execute(
            "SELECT signal, epoch, sequences::text, sample_count::int FROM stream_gaps WHERE outcome IS NULL "
            "ORDER BY 1, 3"
        )
        assert await rows.fetchall() == [
            ("eeg", "holed", "[4,6)", 2),
            ("ppg", "one", "[0,1)", 1),
            ("ppg", "one", "[2,4)", 2),
        ]
