"""A disk that fills up: the reserve goes, the oldest go, the newest are taken, and nothing has to be started again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import UnavailableError
from gateway.samples import LossCause, LossRecord
from gateway.spool import disk, sqlite_file
from gateway.spool.disk import Reserve
from gateway.spool.outbox import Limits, Outbox
from gateway.spool.sqlite_store import SqliteStore
from gateway.spool.store import FullError
from gateway.wire import codec

ALL = 10**9
ON_CALL = Limits(60.0, 10**6)
RESERVE_BYTES = 1 << 18


def store_at(path: Path, **more: Any) -> SqliteStore:
    return SqliteStore(path, reserve_bytes=RESERVE_BYTES, **more)


def fill_up(store: SqliteStore) -> None:
    """From now on the file may not grow any more."""
    (pages,) = store._db.execute("PRAGMA page_count").fetchone()
    store._db.execute(f"PRAGMA max_page_count = {pages}")


def test_on_a_full_disk_the_reserve_is_released_and_it_comes_back_when_there_is_room(
    sqlite_place: Any, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "RENEWED_EVERY_S", 0.0)
    store = store_at(sqlite_place.path)
    store.open()
    reserve = sqlite_place.path.with_name("outbox.db.reserve")
    assert reserve.stat().st_blocks * 512 >= RESERVE_BYTES, "the room is taken, not only named"
    assert reserve.stat().st_mode & 0o777 == 0o600
    store.append(make.rows(0, 9))
    fill_up(store)
    with pytest.raises(FullError):
        store.append(make.rows(10, 40, size=1000))
    assert not reserve.exists()
    store._db.execute("PRAGMA max_page_count = 100000")
    store.append(make.rows(10, 12))
    assert reserve.exists()
    assert store.holding().rows == 13
    store.close()


@pytest.mark.parametrize("free", [0, RESERVE_BYTES, 2 * RESERVE_BYTES + 999])
def test_no_reserve_is_made_of_room_that_is_kept_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda _: free)
    reserve = Reserve(tmp_path / "outbox.db", RESERVE_BYTES)
    reserve.make(1000)
    assert not reserve.is_there
    assert not reserve.release()


def test_a_reserve_that_cannot_be_made_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    reserve = Reserve(tmp_path / "outbox.db", RESERVE_BYTES)
    reserve.make(0)
    assert not reserve.is_there


async def account(outbox: Outbox, produced: int) -> tuple[list[int], list[LossRecord]]:
    rows = await outbox.fetch(0, ALL, ALL)
    found = [codec.decode(item.row.payload.data, item.row.payload.content_type).content for item in rows]
    losses = [content for content in found if isinstance(content, LossRecord)]
    here = [item.row.sequence for item in rows if item.row.signal == "eeg"]
    gone = [number for loss in losses if loss.sequences for number in range(loss.sequences[0], loss.sequences[1] + 1)]
    assert sorted(here + gone) == list(range(produced))
    tally = (await outbox.tallies())["DEV", "eeg"]
    assert (tally.accepted, tally.lost) == (10 * produced, 10 * len(gone))
    assert {loss.cause for loss in losses} <= {LossCause.SHED}
    return here, losses


async def test_a_file_that_may_not_grow_takes_new_blocks_and_gives_the_oldest_up(sqlite_place: Any, make: Any) -> None:
    store = store_at(sqlite_place.path)
    outbox = Outbox(store, "gw", ON_CALL)
    await outbox.open()
    for at in range(200):
        outbox.append(make.block(at=at))
    await outbox.commit()
    await outbox._thread.run(fill_up, store)
    for at in range(200, 260):
        outbox.append(make.block(at=at))
        await outbox.commit()
        assert outbox.problem == ""
    here, losses = await account(outbox, 260)
    assert here[-60:] == list(range(200, 260))
    assert losses
    await outbox.close()


async def test_free_space_below_its_floor_stops_the_growth_and_not_the_outbox(
    sqlite_place: Any, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 1 << 40
    monkeypatch.setattr(disk, "free_bytes", lambda _: free)
    outbox = Outbox(store_at(sqlite_place.path, free_bytes_min=1 << 20), "gw", ON_CALL)
    await outbox.open()
    for at in range(3000):
        outbox.append(make.block(at=at))
    await outbox.commit()
    await account(outbox, 3000)
    assert outbox.holding.rows == 3000
    free = 1 << 20
    outbox.append(make.block(at=3000))
    await outbox.commit()
    await outbox._thread.run(outbox._store._db.execute, "PRAGMA wal_checkpoint(TRUNCATE)")
    size = sqlite_place.path.stat().st_size
    for at in range(3001, 4000):
        outbox.append(make.block(at=at))
        if at % 50 == 0:
            await outbox.commit()
    await outbox.commit()
    await outbox._thread.run(outbox._store._db.execute, "PRAGMA wal_checkpoint(TRUNCATE)")
    assert sqlite_place.path.stat().st_size <= size + 65536
    here, _ = await account(outbox, 4000)
    assert here[-900:] == list(range(3100, 4000))
    free = 1 << 40
    before = outbox.holding.rows
    for at in range(4000, 4100):
        outbox.append(make.block(at=at))
    await outbox.commit()
    assert outbox.holding.rows == before + 100, "with room again, nothing more is given up"
    await outbox.close()


def test_a_log_that_a_reader_kept_long_is_cut(sqlite_place: Any, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_file, "LOG_BYTES_MAX", 100_000)
    monkeypatch.setattr(sqlite_file, "_BUSY_TIMEOUT_S", 0.01)
    store = sqlite_place.open()
    store.append([make.row(0)])
    reader = sqlite_place.open(read_only=True)
    reader._db.execute("BEGIN")
    reader._db.execute("SELECT count(*) FROM block").fetchone()
    for first in range(1, 400, 10):
        store.append(make.rows(first, first + 9, size=1000))
    log = sqlite_place.path.with_name("outbox.db-wal")
    assert log.stat().st_size > 200_000
    reader._db.execute("COMMIT")
    store.append([make.row(1000)])
    assert log.stat().st_size < 100_000
    assert store.holding().rows == 402


def test_a_disk_that_does_not_answer_is_unavailable(
    sqlite_place: Any, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = sqlite_place.open()

    def fails(_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(disk, "free_bytes", fails)
    with pytest.raises(UnavailableError):
        store.room()
    monkeypatch.undo()
    store.append([make.row(0)])
    assert store.room() > 0
