"""What a disk takes away from an outbox is found again in what it left, or named exactly; and it goes on by itself."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import DamagedError, UnavailableError
from gateway.samples import LossCause, LossRecord
from gateway.spool import retention, salvage, sqlite_recovery, sqlite_store
from gateway.spool.outbox import Limits, Outbox
from gateway.spool.sqlite_store import SqliteStore
from gateway.spool.store import DamagedRow, StoredRow, Tally
from gateway.wire import codec

ALL = 10**9
EPOCH = "0123456789abcdef"
ON_CALL = Limits(60.0, 10**6)
FLIPS = 150
BLOCKS = 60


@pytest.fixture
def open_stores() -> Iterator[list[SqliteStore]]:
    stores: list[SqliteStore] = []
    yield stores
    for store in stores:
        store.close()


Cut = Callable[[str], Path]


@pytest.fixture
def cut(tmp_path: Path, make: Any, open_stores: list[SqliteStore]) -> Cut:
    """Copies of the files of a writer that was cut off: rows 0 to 39 are in the file, 40 to 59 in its log."""
    path = tmp_path / "written" / "outbox.db"
    store = SqliteStore(path)
    store.open()
    open_stores.append(store)
    for first in range(0, 40, 4):
        store.append(make.rows(first, first + 3, size=300))
    store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for first in range(40, BLOCKS, 4):
        store.append(make.rows(first, first + 3, size=1500))

    def copied(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for suffix in ("", "-wal", ".marks"):
            shutil.copy(path.with_name(path.name + suffix), folder)
        return folder / path.name

    return copied


def opened(path: Path, open_stores: list[SqliteStore]) -> SqliteStore:
    store = SqliteStore(path)
    open_stores.append(store)
    store.open()
    return store


def account(store: SqliteStore) -> tuple[list[int], list[int], list[int]]:
    """Sequences that are here, damaged, and suspect; with samples that fit."""
    try:
        found = store.fetch(0, ALL, ALL)
    except UnavailableError:  # what is met only now sets the file aside
        found = store.fetch(0, ALL, ALL)
    here = [item.row.sequence for item in found if isinstance(item, StoredRow)]
    damaged = [
        item.held.sequence for item in found if isinstance(item, DamagedRow) and retention.is_named(item.held)
    ]  # of the others nothing can be said, and what they were is missing
    suspects = store.suspects()
    missing = [number for suspect in suspects for number in range(suspect.first, suspect.last + 1)]
    assert sum(suspect.samples for suspect in suspects) == 10 * len(missing)
    assert sorted(here + damaged + missing) == list(range(BLOCKS))
    assert store.tallies()["DEV", "eeg"] == Tally(BLOCKS, 10 * BLOCKS, 0)
    assert len(here) + len(damaged) <= store.holding().rows <= len(found)
    return here, damaged, missing


def test_no_bit_that_flips_in_the_log_takes_a_row_away_unseen(cut: Cut, open_stores: list[SqliteStore]) -> None:
    chance = random.Random(5)
    found_again = lost = 0
    for number in range(FLIPS):
        path = cut(f"flip-{number}")
        log = path.with_name("outbox.db-wal")
        data = bytearray(log.read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        log.write_bytes(data)
        store = opened(path, open_stores)
        here, damaged, missing = account(store)
        lost += len(damaged) + len(missing)
        found_again += len([sequence for sequence in here if sequence >= 40])
        store.close()
        shutil.rmtree(path.parent)
    assert lost < FLIPS, "a flip costs the row that it is in, not those after it"
    assert found_again > 18 * FLIPS


def test_control_without_marks_nobody_sees_that_rows_are_gone(cut: Cut, open_stores: list[SqliteStore]) -> None:
    path = cut("control")
    log = path.with_name("outbox.db-wal")
    data = bytearray(log.read_bytes())
    data[40] ^= 1
    log.write_bytes(data)
    path.with_name("outbox.db.marks").unlink()
    store = opened(path, open_stores)
    assert [item.row.sequence for item in store.fetch(0, ALL, ALL)] == list(range(40))
    assert store.suspects() == []


def test_no_bit_that_flips_in_the_file_takes_a_row_away_unseen(cut: Cut, open_stores: list[SqliteStore]) -> None:
    chance = random.Random(6)
    lost = 0
    for number in range(FLIPS):
        path = cut(f"flip-{number}")
        data = bytearray(path.read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        store = opened(path, open_stores)
        _, damaged, missing = account(store)
        lost += len(damaged) + len(missing)
        store.close()
        shutil.rmtree(path.parent)
    assert 0 < lost < 3 * FLIPS


@pytest.mark.parametrize("what", ["log deleted", "log truncated", "file deleted", "file emptied", "all but the marks"])
def test_what_is_gone_is_named_exactly(cut: Cut, open_stores: list[SqliteStore], what: str) -> None:
    path = cut("gone")
    log = path.with_name("outbox.db-wal")
    match what:
        case "log deleted":
            log.unlink()
        case "log truncated":
            log.write_bytes(log.read_bytes()[:5000])
        case "file deleted":
            path.unlink()
        case "file emptied":
            path.write_bytes(b"")
        case _:
            path.unlink()
            log.unlink()
    store = opened(path, open_stores)
    here, _, missing = account(store)
    expected = {"log deleted": set(range(40, 60)), "all but the marks": set(range(60))}.get(what)
    assert expected is None or set(missing) == expected
    if "file" in what:
        assert {*range(42, 58)} <= set(here), "the log still has its part"
    # It is known once and for all.
    store.close()
    assert account(opened(path, open_stores)) == (here, [], missing)


def test_a_damaged_index_doubles_no_row(cut: Cut, open_stores: list[SqliteStore]) -> None:
    path = cut("index")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (root,) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'sqlite_autoindex_block_1'").fetchone()
    data = path.read_bytes()
    entry = (EPOCH + chr(36) + "DEVeeg").encode()
    places = [at for at in range(len(data)) if data.startswith(entry, at)]
    assert places
    assert root
    for number, at in enumerate(places):
        for bit in (1, 2, 4):
            damaged = bytearray(data)
            damaged[at + len(EPOCH)] ^= bit
            copy = path.parent / f"{number}-{bit}" / path.name
            copy.parent.mkdir()
            copy.write_bytes(damaged)
            shutil.copy(path.with_name("outbox.db.marks"), copy.parent)
            store = opened(copy, open_stores)
            here, _, missing = account(store)
            assert (len(here), missing) == (BLOCKS, [])
            store.close()


def overwrite(path: Path, start: int, length: int) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\xa5" * length)


@pytest.mark.parametrize(
    ("start", "length", "is_set_aside"),
    [(0, 100, False), (0, 512, False), (512, 2048, True), (100, 4000, True)],
    ids=["header", "first page", "inner pages", "many pages"],
)
def test_a_damaged_file_is_set_aside_and_all_that_is_intact_goes_on(
    cut: Cut, open_stores: list[SqliteStore], make: Any, start: int, length: int, is_set_aside: bool
) -> None:
    """Where the log still has the first page, SQLite itself can go on."""
    path = cut("damaged")
    overwrite(path, start, length)
    store = opened(path, open_stores)
    here, _, missing = account(store)
    assert len(missing) <= length // 300 + 2
    set_aside = [file for file in path.parent.glob("outbox.db.damaged-*") if not file.name.endswith("-wal")]
    assert len(set_aside) == is_set_aside
    assert all(file.read_bytes().count(b"\xa5" * 512) >= 1 for file in set_aside), "it is kept as it is"
    store.append([make.row(60)])
    assert store._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert len(here) + len(missing) == BLOCKS


def test_with_no_marks_a_damaged_file_still_gives_all_that_is_intact(cut: Cut, open_stores: list[SqliteStore]) -> None:
    path = cut("damaged")
    path.with_name("outbox.db.marks").unlink()
    overwrite(path, 0, 100)
    store = opened(path, open_stores)
    found = [item.row.sequence for item in store.fetch(0, ALL, ALL) if isinstance(item, StoredRow)]
    assert sorted(found) == list(range(BLOCKS))
    assert store.tallies()["DEV", "eeg"] == Tally(BLOCKS, 10 * BLOCKS, 0)
    assert store.suspects() == []


def test_a_file_in_which_the_name_of_a_table_is_damaged_is_set_aside(cut: Cut, open_stores: list[SqliteStore]) -> None:
    """Its type becomes a blob: SQLite still finds the table, and `found_format` does not."""
    path = cut("renamed")
    content = bytearray(path.read_bytes())
    content[content.rindex(b"tableoutboxoutbox") - 5] ^= 1
    path.write_bytes(content)
    store = opened(path, open_stores)
    assert account(store) == (list(range(BLOCKS)), [], [])
    assert len(sqlite_recovery.set_aside_files(path)) == 1


def test_a_file_of_another_program_is_not_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "letter.txt"
    path.write_text("Dear Sir or Madam, " * 1000)
    with pytest.raises(DamagedError):
        SqliteStore(path).open()
    assert [file.name for file in tmp_path.iterdir()] == ["letter.txt"]


def test_what_is_intact_is_read_with_no_help_from_sqlite(cut: Cut) -> None:
    path = cut("walk")
    log = path.with_name("outbox.db-wal").read_bytes()
    assert {item.row.sequence for item in salvage.intact_rows(path.read_bytes(), log)} == set(range(BLOCKS))
    assert {item.row.sequence for item in salvage.intact_rows(path.read_bytes())} == set(range(40))
    assert {item.row.sequence for item in salvage.intact_rows(b"", log)} >= set(range(42, 58))


def test_any_bytes_are_walked_without_an_error(cut: Cut) -> None:
    path = cut("garbage")
    whole, log = path.read_bytes(), path.with_name("outbox.db-wal").read_bytes()
    chance = random.Random(8)
    for _ in range(40):
        data = bytearray(whole)
        for _ in range(60):
            data[chance.randrange(len(data))] = chance.randrange(256)
        list(salvage.intact_rows(bytes(data[: chance.randrange(len(data))]), log[: chance.randrange(len(log))]))


# --- through the outbox


async def losses(outbox: Outbox) -> list[LossRecord]:
    found = [codec.decode(item.row.payload.data, item.row.payload.content_type).content for item in await rows(outbox)]
    return [content for content in found if isinstance(content, LossRecord)]


async def rows(outbox: Outbox) -> list[StoredRow]:
    return await outbox.fetch(0, ALL, ALL)


async def without_its_log(place: Any, make: Any) -> tuple[Outbox, str]:
    """An outbox that lost blocks 10 to 19, and a record of 7 lost samples, with its log. Gives their epoch."""
    first = Outbox(place.store(), "gw", ON_CALL)
    await first.open()
    for at in range(20):
        first.append(make.block(at=at, n=10 + at % 2))
        if at == 9:
            await first.commit()
            await first._thread.run(first._store._db.execute, "PRAGMA wal_checkpoint(TRUNCATE)")
    first.append(make.loss(at=20, count=7))
    await first.commit()
    place.back_up()
    await first.close()
    place.restore()
    place.path.with_name("outbox.db-wal").unlink()
    outbox = Outbox(place.store(), "gw", ON_CALL)
    await outbox.open()
    return outbox, first.epoch


async def test_what_the_cloud_has_not_got_is_on_record_and_the_account_is_exact(sqlite_place: Any, make: Any) -> None:
    outbox, epoch = await without_its_log(sqlite_place, make)
    key = ("DEV", "eeg", epoch)
    for suspect in await outbox.suspects():
        if suspect.signal == "eeg":
            asked = (suspect.first, suspect.last)
            await outbox.settle(*key, asked, [(12, 14)], is_last_word=False)
            assert suspect in await outbox.suspects() or suspect.first in {12, 13, 14}
            await outbox.settle(*key, asked, [(12, 14), (40, 50)], is_last_word=True)
    await outbox.settle("DEV", "loss", epoch, (0, 5), [], is_last_word=True)
    assert await outbox.suspects() == []
    await outbox.commit()
    found = await losses(outbox)
    assert {loss.cause for loss in found} == {LossCause.CORRUPT}
    gone = [loss for loss in found if loss.sequences]
    numbers = sorted(number for loss in gone for number in range(loss.sequences[0], loss.sequences[1] + 1))
    assert numbers == [10, 11, 15, 16, 17, 18, 19]
    assert {loss.epoch for loss in gone} == {epoch}
    assert sum(loss.sample_count for loss in gone) == sum(10 + number % 2 for number in numbers)
    (again,) = [loss for loss in found if not loss.sequences]
    assert (again.signal, again.sample_count) == ("eeg", 7)
    tally = (await outbox.tallies())["DEV", "eeg"]
    stored = sum(item.row.samples for item in await rows(outbox)) + 11 + 10 + 10
    lost = sum(loss.sample_count for loss in found)
    assert tally == Tally(20, 210, lost)
    assert stored + lost == 210 + 7
    await outbox.close()


async def test_a_record_of_losses_that_the_cloud_has_is_no_loss(sqlite_place: Any, make: Any) -> None:
    outbox, epoch = await without_its_log(sqlite_place, make)
    await outbox.settle("DEV", "loss", epoch, (0, 0), [(0, 0)], is_last_word=True)
    await outbox.settle("DEV", "eeg", epoch, (0, 19), [(0, 19)], is_last_word=False)
    await outbox.commit()
    assert await outbox.suspects() == []
    assert await losses(outbox) == []
    assert (await outbox.tallies())["DEV", "eeg"] == Tally(20, 210, 7)
    await outbox.close()


async def test_an_answer_that_speaks_of_a_part_only_settles_nothing(sqlite_place: Any, make: Any) -> None:
    outbox, epoch = await without_its_log(sqlite_place, make)
    before = await outbox.suspects()
    await outbox.settle("DEV", "eeg", epoch, (10, 10), [], is_last_word=True)
    await outbox.settle("DEV", "eeg", "another", (0, 99), [], is_last_word=True)
    assert [one for one in await outbox.suspects() if one.first != 10] == [one for one in before if one.first != 10]
    await outbox.close()


async def read_until_it_fails(outbox: Outbox) -> None:
    while True:
        await outbox.fetch(0, ALL, ALL)
        await outbox.held()
        await outbox._thread.run(outbox._store._db.execute, "PRAGMA shrink_memory")


async def test_a_file_that_is_damaged_while_it_runs_is_replaced_and_nothing_pending_is_lost(
    sqlite_place: Any, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_store, "_CHECKPOINT_PAGES", 1)
    outbox = Outbox(sqlite_place.store(), "gw", ON_CALL)
    await outbox.open()
    for at in range(100):
        outbox.append(make.block(at=at))
        if at % 5 == 0:
            await outbox.commit()
    await outbox.commit()
    await outbox._thread.run(outbox._store._db.execute, "PRAGMA shrink_memory")
    size = sqlite_place.path.stat().st_size
    overwrite(sqlite_place.path, 512, size // 3)
    outbox.append(make.block(at=100))
    with pytest.raises(UnavailableError, match="malformed"):
        await read_until_it_fails(outbox)
    await outbox.commit()
    assert outbox.problem == ""
    found = await rows(outbox)
    missing = await outbox.suspects()
    numbers = [item.row.sequence for item in found if item.row.signal == "eeg"]
    gone = [number for suspect in missing for number in range(suspect.first, suspect.last + 1)]
    assert sorted(numbers + gone) == list(range(101))
    assert 100 in numbers
    assert len(gone) < 60
    assert (await outbox.tallies())["DEV", "eeg"].accepted == 1010
    assert list(sqlite_place.path.parent.glob("outbox.db.damaged-*"))
    await outbox.close()


def test_a_row_is_found_again_under_its_id(cut: Cut, open_stores: list[SqliteStore]) -> None:
    """What the sender remembers of a row must stay true when its file is replaced under it."""
    path = cut("ids")
    before = {item.row.identity: item.id for item in opened(cut("whole"), open_stores).fetch(0, ALL, ALL)}
    overwrite(path, 0, 100)
    after = {item.row.identity: item.id for item in opened(path, open_stores).fetch(0, ALL, ALL)}
    assert after == {identity: before[identity] for identity in after}
    assert sqlite3.sqlite_version_info >= (3, 37)


DAMAGED_COLUMNS = [
    ("samples", 3),
    ("first_ns", -5),
    ("last_ns", 1 << 62),
    ("lost", 9),
    ("lost_signal", "eef"),
]


@pytest.mark.parametrize(("column", "value"), DAMAGED_COLUMNS)
async def test_the_record_of_a_damaged_row_is_exact_whatever_the_row_says_of_itself(
    sqlite_place: Any, make: Any, column: str, value: object
) -> None:
    """With blocks of different sizes, and one of equal ones among equal ones; found at the start or while it runs."""
    outbox = Outbox(sqlite_place.store(), "gw", ON_CALL)
    await outbox.open()
    for at, n in enumerate((10, 11, 12, 12, 12)):
        outbox.append(make.block(at=at, n=n))
    await outbox.commit()
    sqlite_place.damage(2, column, value)
    await rows(outbox)
    await outbox.close()
    sqlite_place.damage(4, column, value)
    outbox = Outbox(sqlite_place.store(), "gw", ON_CALL)
    await outbox.open()
    await rows(outbox)
    await outbox.commit()
    first, second = await losses(outbox)
    assert (first.sample_count, first.sequences, first.block_runs) == (11, (1, 1), ((1, 11),))
    assert (first.first_ns, first.last_ns) == (make.block(at=1, n=11).first_ns, make.block(at=1, n=11).last_ns)
    assert (second.sample_count, second.sequences, second.block_runs) == (12, (3, 3), ((1, 12),))
    assert await outbox.tallies() == {("DEV", "eeg"): Tally(5, 57, 23), ("DEV", "loss"): Tally(2, 0, 0)}
    await outbox.close()


@pytest.mark.parametrize(("column", "value"), [("lost", 4), ("lost_signal", "eef"), ("last_ns", 0), ("samples", 2)])
async def test_a_damaged_loss_record_is_counted_as_what_it_was(
    sqlite_place: Any, make: Any, column: str, value: object
) -> None:
    outbox = Outbox(sqlite_place.store(), "gw", ON_CALL)
    await outbox.open()
    outbox.append(make.loss(count=5))
    await outbox.commit()
    sqlite_place.damage(1, column, value)
    await rows(outbox)
    await outbox.commit()
    (again,) = await losses(outbox)
    assert again == dataclasses.replace(make.loss(count=5), cause=LossCause.CORRUPT)
    assert await outbox.tallies() == {("DEV", "eeg"): Tally(0, 0, 5), ("DEV", "loss"): Tally(1, 0, 0)}
    await outbox.close()


@pytest.mark.parametrize(("column", "value"), [("samples", 3), ("first_ns", -5), ("last_ns", 1 << 62)])
async def test_what_is_shed_is_on_record_as_what_it_was_though_nobody_had_read_it(
    sqlite_place: Any, make: Any, column: str, value: object
) -> None:
    outbox = Outbox(sqlite_place.store(), "gw", ON_CALL)
    await outbox.open()
    for at, n in enumerate((10, 11, 12)):
        outbox.append(make.block(at=at, n=n))
    await outbox.commit()
    await outbox.close()
    sqlite_place.damage(2, column, value)
    outbox = Outbox(sqlite_place.store(), "gw", Limits(60.0, 10**6, bytes_max=1))
    await outbox.open()
    outbox.append(make.loss("OTHER"))
    await outbox.commit()
    (shed,) = [loss for loss in await losses(outbox) if loss.device == "DEV"]
    assert (shed.cause, shed.sequences) == (LossCause.SHED, (0, 2))
    assert (shed.sample_count, shed.block_runs) == (33, ((1, 10), (1, 11), (1, 12)))
    assert (shed.first_ns, shed.last_ns) == (make.block(at=0).first_ns, make.block(at=2, n=12).last_ns)
    assert await outbox.suspects() == []
    await outbox.close()
