"""What the SQLite store promises beside the contract: durability, a private file, clear errors, damage noticed."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import DamagedError, UnavailableError
from gateway.spool import salvage, sqlite_format, sqlite_store
from gateway.spool.sqlite_format import PAGE_BYTES
from gateway.spool.sqlite_recovery import make_file
from gateway.spool.sqlite_store import SqliteStore
from gateway.spool.store import DamagedRow, Row, StoredRow, Tally

ALL = 10**9
KILLS = 12
NOBODY = 65534

WRITER = """
import sys
from pathlib import Path
from gateway.spool.sqlite_store import SqliteStore
from gateway.spool.store import Row
from gateway.wire.codec import Payload

def row(sequence):
    data = b"%d " % sequence * 300
    return Row("DEV", "eeg", "E", sequence, sequence, sequence, 10, 0, "", Payload("application/cbor", "raw", data))

store = SqliteStore(Path(sys.argv[1]))
store.open()
tally = store.tallies().get(("DEV", "eeg"))
first = tally.blocks if tally else 0
print("open", flush=True)
while True:
    count = 1 + first % 7
    store.append([row(sequence) for sequence in range(first, first + count)])
    if first % 5 == 0 and first > 20:
        store.replace([], [], store.find("DEV", "eeg", "E", [(0, first - 20)]))
    first += count
    print(first - 1, flush=True)
"""


def test_kill_9_in_mid_append_loses_nothing_that_was_accepted_and_doubles_nothing(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    chance = random.Random(7)
    for _ in range(KILLS):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "open\n"
            for _ in range(chance.randrange(1, 40)):
                accepted = int(writer.stdout.readline())
            for _ in range(chance.randrange(20_000)):
                pass  # not at the moment of a print
            writer.send_signal(signal.SIGKILL)
            printed = writer.stdout.read().split("\n")
        accepted = max([accepted, *(int(line) for line in printed[:-1] if line)])
        store = SqliteStore(path)
        store.open()
        try:
            found = store.fetch(0, ALL, ALL)
            assert all(isinstance(item, StoredRow) for item in found)
            sequences = [item.row.sequence for item in found if isinstance(item, StoredRow)]
            tally = store.tallies()["DEV", "eeg"]
            holding = store.holding()
        finally:
            store.close()
        # Rows are accepted in order and forgotten from the oldest on: what is here is one run that ends at the newest.
        assert sequences == list(range(sequences[0], sequences[-1] + 1))
        assert sequences[0] <= max(accepted - 18, 0)
        assert accepted <= sequences[-1] <= accepted + 7
        assert tally == Tally(sequences[-1] + 1, 10 * (sequences[-1] + 1), 0)
        assert (holding.rows, holding.last_id) == (len(sequences), sequences[-1] + 1)


def test_commits_are_synced_through_the_log(sqlite_place: Any, make: Any) -> None:
    store = sqlite_place.open()
    assert store._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store._db.execute("PRAGMA synchronous").fetchone() == (2,)
    assert store._db.execute("PRAGMA wal_autocheckpoint").fetchone() == (8000,)
    assert store._db.execute("PRAGMA page_size").fetchone() == (512,)
    assert store._db.execute("PRAGMA secure_delete").fetchone() == (0,)
    store.append([make.row(0)])
    assert sqlite_place.path.with_name("outbox.db-wal").stat().st_size > 0


def test_a_folder_that_is_made_is_synced_into_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    store = SqliteStore(tmp_path / "a" / "b" / "outbox.db")
    store.open()
    store.close()
    folder = tmp_path / "a" / "b"
    assert [place for place in synced if place.is_dir()] == [tmp_path / "a", tmp_path, folder, folder]
    synced.clear()
    store.open()
    store.close()
    assert [place for place in synced if place.is_dir()] == []


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def test_nobody_else_may_read_the_file_from_its_first_moment(sqlite_place: Any, make: Any, open_umask: None) -> None:
    store = sqlite_place.store()
    make_file(sqlite_place.path)
    assert sqlite_place.path.stat().st_mode & 0o777 == 0o600
    assert sqlite_place.path.parent.stat().st_mode & 0o777 == 0o700
    sqlite_place.path.chmod(0o644)
    store.open()
    store.append([make.row(0)])
    files = sorted(sqlite_place.path.parent.iterdir())
    assert [file.name for file in files] == ["outbox.db", "outbox.db-shm", "outbox.db-wal", "outbox.db.marks"]
    assert [file.stat().st_mode & 0o777 for file in files] == [0o600] * 4
    store.close()


def test_another_programs_file_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    text = tmp_path / "letter.txt"
    text.write_text("Dear Sir or Madam, " * 100)
    text.chmod(0o644)
    other = tmp_path / "other.db"
    with contextlib.closing(sqlite3.connect(other)) as connection:
        connection.execute("CREATE TABLE letters (text TEXT)")
    for path in (text, other):
        before = path.read_bytes()
        mode = path.stat().st_mode
        for read_only in (False, True):
            with pytest.raises(DamagedError, match=str(path)):
                SqliteStore(path, read_only=read_only).open()
        assert path.read_bytes() == before
        assert path.stat().st_mode == mode
    assert {entry.name for entry in tmp_path.iterdir()} == {"letter.txt", "other.db"}


def test_an_outbox_of_another_format_is_refused_and_left_as_it_is(sqlite_place: Any, make: Any) -> None:
    store = sqlite_place.open()
    store.append([make.row(0)])
    store.close()
    with contextlib.closing(sqlite3.connect(sqlite_place.path, isolation_level=None)) as connection:
        connection.execute("UPDATE outbox SET value = '3' WHERE key = 'format'")
    before = sqlite_place.path.read_bytes()
    with pytest.raises(DamagedError, match="format 3, this program writes 2"):
        sqlite_place.open()
    assert sqlite_place.path.read_bytes() == before


FORMER_TABLES = """
CREATE TABLE outbox (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE block (
    id INTEGER PRIMARY KEY AUTOINCREMENT, device TEXT NOT NULL, signal TEXT NOT NULL, sequence INTEGER NOT NULL,
    first_ns INTEGER NOT NULL, last_ns INTEGER NOT NULL, samples INTEGER NOT NULL, lost INTEGER NOT NULL,
    lost_signal TEXT NOT NULL, content_type TEXT NOT NULL, schema TEXT NOT NULL, payload BLOB NOT NULL,
    size INTEGER NOT NULL, checksum INTEGER NOT NULL, UNIQUE (device, signal, sequence)
) STRICT;
CREATE TABLE tally (
    device TEXT NOT NULL, signal TEXT NOT NULL, next_sequence INTEGER NOT NULL DEFAULT 0,
    accepted INTEGER NOT NULL DEFAULT 0, lost INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (device, signal)
) STRICT, WITHOUT ROWID;
INSERT INTO outbox VALUES ('format', '1'), ('epoch', 'former');
INSERT INTO tally VALUES ('DEV', 'eeg', 12, 120, 7), ('DEV', 'loss', 1, 0, 0);
"""


def former_file(path: Path) -> None:
    """An outbox of the format before this one: sequences 3 to 11, of which 5 is damaged, and a loss record."""
    path.parent.mkdir(mode=0o700)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.executescript(FORMER_TABLES)
        for signal_name, sequence, samples, lost, of in [("eeg", n, 10, 0, "") for n in range(3, 12)] + [
            ("loss", 0, 0, 7, "eeg")
        ]:
            about = ("DEV", signal_name, sequence, sequence, sequence + 9, samples, lost, of, "application/cbor", "raw")
            data = b"%d " % sequence * 300
            checksum = zlib.crc32(data, zlib.crc32("\0".join(str(part) for part in (*about, "")).encode()))
            stored = b"damaged" if sequence == 5 else data
            connection.execute(
                f"INSERT INTO block VALUES (NULL, {', '.join('?' * 13)})", (*about, stored, len(data) + 160, checksum)
            )


def test_an_outbox_of_the_former_format_is_taken_over_also_when_that_is_cut_off(
    sqlite_place: Any, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_format, "TAKEN_OVER_AT_ONCE", 3)
    former_file(sqlite_place.path)
    with pytest.raises(UnavailableError, match="former format"):
        sqlite_place.open(read_only=True)
    move = sqlite_format._move_former
    for steps in (0, 1, 1):
        left = iter([True] * steps)

        def cut_off(db: Any, epoch: str, left: Iterator[bool] = left) -> bool:
            if not next(left, False):
                move(db, epoch)
                raise sqlite3.OperationalError("cut off")
            return move(db, epoch)

        monkeypatch.setattr(sqlite_format, "_move_former", cut_off)
        with pytest.raises(UnavailableError, match="cut off"):
            sqlite_place.open()
    monkeypatch.setattr(sqlite_format, "_move_former", move)
    for _ in range(2):
        store = sqlite_place.open()
        assert store.epoch != "former"
        found = store.fetch(0, ALL, ALL)
        rows = [item.row if isinstance(item, StoredRow) else item.held for item in found]
        assert [(row.signal, row.epoch, row.sequence) for row in rows] == [
            *(("eeg", "former", sequence) for sequence in range(3, 12)),
            ("loss", "former", 0),
        ]
        assert [isinstance(item, StoredRow) for item in found] == [row.sequence != 5 for row in rows]
        assert [item.row.payload.data for item in found[:1]] == [b"3 " * 300]
        assert store.tallies() == {("DEV", "eeg"): Tally(12, 120, 7), ("DEV", "loss"): Tally(1, 0, 0)}
        assert store.holding().rows == 10
        tables = {name for (name,) in store._db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
        assert {"block", "tally", "outbox"} <= tables
        assert not any("former" in name for name in tables)
        store.close()
    store.open()
    store.append([make.row(4)])
    assert make.forget(store, "DEV", "eeg", "former", [(0, 99)])
    assert store.holding().rows == 2


def test_an_empty_file_becomes_an_outbox(sqlite_place: Any, make: Any) -> None:
    """A power cut between making the file and its first commit leaves one."""
    sqlite_place.path.parent.mkdir()
    sqlite_place.path.touch()
    with pytest.raises(UnavailableError, match="empty"):
        sqlite_place.open(read_only=True)
    sqlite_place.open().append([make.row(0)])


@pytest.mark.parametrize("read_only", [False, True])
def test_a_path_that_cannot_be_opened_is_a_clear_error(tmp_path: Path, read_only: bool) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "outbox.db", tmp_path / "folder", Path("/proc/none/outbox.db")):
        with pytest.raises(UnavailableError, match=str(path)) as raised:
            SqliteStore(path, read_only=read_only).open()
        assert "folder" in raised.value.hint


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Root may open everything: be somebody else for a moment."""
    was = os.geteuid()
    if was == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(was)


@pytest.mark.parametrize("read_only", [False, True])
def test_a_missing_permission_is_a_clear_error(sqlite_place: Any, make: Any, read_only: bool) -> None:
    sqlite_place.open().close()
    sqlite_place.path.parent.chmod(0)
    try:
        with as_nobody(), pytest.raises(UnavailableError, match=r"cannot be opened|cannot open"):
            SqliteStore(sqlite_place.path, read_only=read_only).open()
    finally:
        sqlite_place.path.parent.chmod(0o700)
    sqlite_place.open().append([make.row(0)])


def test_a_full_disk_changes_nothing_and_is_survived(sqlite_place: Any, make: Any) -> None:
    store = sqlite_place.open()
    store.append(make.rows(0, 9))
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    before = (store.holding(), store.tallies(), store.fetch(0, ALL, ALL))
    many = make.rows(10, 40, size=1000)
    steps: list[Callable[[], object]] = [lambda: store.append(many), lambda: store.replace([1, 2], many)]
    for step in steps:
        with pytest.raises(UnavailableError, match="full"):
            step()
        assert (store.holding(), store.tallies(), store.fetch(0, ALL, ALL)) == before
    make.forget(store, "DEV", "eeg", make.epoch, [(0, 4)])
    store._db.execute("PRAGMA max_page_count = 1000000")
    store.append(many)
    assert store.holding().rows == 36


def test_a_file_that_is_locked_for_long_is_unavailable_and_comes_back(
    sqlite_place: Any, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.spool.sqlite_file._BUSY_TIMEOUT_S", 0.01)
    store = sqlite_place.open()
    with contextlib.closing(sqlite3.connect(sqlite_place.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(UnavailableError, match="locked"):
            store.append([make.row(0)])
    store.append([make.row(0)])
    assert store.holding().rows == 1


def table_record(path: Path, payload: bytes) -> tuple[int, int]:
    """Where in the file the table's record with this payload begins and ends, identity included."""
    raw = path.read_bytes()
    at = raw.find(payload)
    assert at > 0
    assert raw.count(payload) == 1
    return raw.rfind(b"DEVICE", 0, at), at + len(payload)


def flip(path: Path, offset: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))


@pytest.mark.parametrize("bit", [0, 7])
def test_a_row_whose_identity_is_damaged_is_named_by_the_index_and_can_be_taken_out(
    sqlite_place: Any, make: Any, bit: int
) -> None:
    """Bit 7 makes the text undecodable; deleting such a row finds no index entry that fits."""
    store = sqlite_place.open()
    store._db.execute("PRAGMA secure_delete = ON")  # no remains of pages that were split
    rows = make.rows(0, 4, "DEVICE")
    store.append(rows)
    store.close()
    start, _ = table_record(sqlite_place.path, rows[2].payload.data)
    flip(sqlite_place.path, start + 1, bit)
    store = sqlite_place.open()
    found = store.fetch(0, ALL, ALL)
    assert [type(item) for item in found] == [StoredRow, StoredRow, DamagedRow, StoredRow, StoredRow]
    held = found[2].held
    assert (held.device, held.signal, held.sequence, held.samples) == ("DEVICE", "eeg", 2, 10)
    store.replace([3], [make.loss_row(0, "DEVICE", lost=10)])
    assert [item.id for item in store.fetch(0, ALL, ALL)] == [1, 2, 4, 5, 6]
    assert make.forget(store, "DEVICE", "eeg", make.epoch, [(0, 4)]) == [1, 2, 4, 5]
    assert store._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def flip_sequence(path: Path, row: Row, bit: int) -> None:
    """In the table, not in its index."""
    start, _ = table_record(path, row.payload.data)
    flip(path, start + len(row.device + row.signal + row.epoch), bit)


def opened_with_another_identity(sqlite_place: Any, make: Any, bit: int) -> SqliteStore:
    """Five rows, of which row 2 says that it is 3, which has an index entry, or 10, which has none."""
    store: SqliteStore = sqlite_place.open()
    store._db.execute("PRAGMA secure_delete = ON")  # no remains of pages that were split
    rows = make.rows(0, 4, "DEVICE")
    store.append(rows)
    store.close()
    flip_sequence(sqlite_place.path, rows[2], bit)
    return sqlite_place.open()


@pytest.mark.parametrize("going", [[3], [3, 4], [4, 3]])
@pytest.mark.parametrize("bit", [0, 3])
def test_a_row_that_says_that_it_is_another_goes_without_that_one(
    sqlite_place: Any, make: Any, bit: int, going: list[int]
) -> None:
    store = opened_with_another_identity(sqlite_place, make, bit)
    assert [held.sequence for held in store.oldest(["eeg"], ALL)] == [0, 1, 2, 3, 4]
    store.replace(going, [make.loss_row(0, "DEVICE", lost=10 * len(going))])
    left = [number for number in (1, 2, 3, 4, 5) if number not in going]
    assert [item.id for item in store.fetch(0, ALL, ALL)] == [*left, 6]
    assert store._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert [place.sequence + 1 for place in store.find("DEVICE", "eeg", make.epoch, [(0, 10)])] == left
    assert make.forget(store, "DEVICE", "eeg", make.epoch, [(0, 10)]) == left
    assert store.tallies() == {("DEVICE", "eeg"): Tally(5, 50, 10 * len(going)), ("DEVICE", "loss"): Tally(1, 0, 0)}
    store.close()
    store = sqlite_place.open()
    assert store.suspects() == []
    assert [item.held.signal for item in store.fetch(0, ALL, ALL)] == ["loss"]


@pytest.mark.parametrize("bit", [0, 3])
def test_a_receipt_for_a_row_that_says_that_it_is_another_forgets_that_row(
    sqlite_place: Any, make: Any, bit: int
) -> None:
    store = opened_with_another_identity(sqlite_place, make, bit)
    assert make.forget(store, "DEVICE", "eeg", make.epoch, [(2, 2)]) == [3]
    assert [item.held.sequence for item in store.fetch(0, ALL, ALL)] == [0, 1, 3, 4]
    assert store._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    store.close()
    store = sqlite_place.open()
    assert store.suspects() == []
    assert make.forget(store, "DEVICE", "eeg", make.epoch, [(0, 10)]) == [1, 2, 4, 5]


def test_no_flipped_bit_in_a_record_passes_as_a_row(sqlite_place: Any, make: Any) -> None:
    store = sqlite_place.open()
    store._db.execute("PRAGMA secure_delete = ON")  # no remains of pages that were split
    rows = make.rows(0, 4, "DEVICE")
    store.append(rows)
    store.close()
    start, end = table_record(sqlite_place.path, rows[2].payload.data)
    noticed = 0
    for offset in range(start - 24, end + 6):  # with the record's header before and its size and checksum behind
        for bit in (0, 3, 6):
            flip(sqlite_place.path, offset, bit)
            store = SqliteStore(sqlite_place.path, read_only=True)
            try:
                store.open()
                found = store.fetch(0, ALL, ALL)
                assert [item.row for item in found if isinstance(item, StoredRow) and item.row not in rows] == []
                noticed += any(isinstance(item, DamagedRow) for item in found)
            except (DamagedError, UnavailableError):
                noticed += 1
            finally:
                store.close()
            flip(sqlite_place.path, offset, bit)
    assert noticed > 0.9 * 3 * (end + 6 - start + 24)


def test_a_damaged_row_that_vanishes_before_it_goes_is_on_record_once(sqlite_place: Any, make: Any) -> None:
    store = sqlite_place.open()
    store._db.execute("PRAGMA secure_delete = ON")  # no remains of pages that were split
    rows = [*make.rows(0, 4), make.loss_row(0, lost=7)]
    store.append(rows)
    store.close()
    for number in (2, 3, 6):
        flip(sqlite_place.path, sqlite_place.path.read_bytes().index(rows[number - 1].payload.data), 0)
    store = sqlite_place.open()
    assert [type(item) for item in store.fetch(0, ALL, ALL)].count(DamagedRow) == 3
    store._file.is_broken = True  # as SQLite's next word of damage makes it
    again = make.loss_row(0, lost=7)
    store.replace([2, 6], [make.loss_row(1, lost=10), again])
    (suspect,) = store.suspects()
    assert (suspect.first, suspect.last, suspect.samples) == (2, 2, 10), "that one is not going"
    assert store.tallies() == {("DEV", "eeg"): Tally(5, 50, 17), ("DEV", "loss"): Tally(2, 0, 0)}
    assert [item.held.sequence for item in store.fetch(0, ALL, ALL)] == [0, 3, 4, 1, 0]


def test_a_cell_is_found_as_sqlite_finds_it(sqlite_place: Any, make: Any) -> None:
    """Bits of a cell's place that are beyond the page it does not read: the row is intact, and cannot be deleted."""
    store = sqlite_place.open()
    store._db.execute("PRAGMA secure_delete = ON")  # no remains of pages that were split
    store.append(make.rows(0, 4, size=2000))
    store.close()  # which puts all into the file
    data = bytearray(sqlite_place.path.read_bytes())
    leaves = [at for at in range(0, len(data), PAGE_BYTES) if data[at] == salvage.TABLE_LEAF]
    for at in (leaf + 8 + 2 * cell for leaf in leaves for cell in range(data[leaf + 4])):
        data[at] ^= 0x40
    assert sorted(item.row.sequence for item in salvage.intact_rows(bytes(data))) == [0, 1, 2, 3, 4]


def test_a_damaged_row_makes_the_file_be_looked_at_once(sqlite_place: Any, make: Any) -> None:
    store = sqlite_place.open()
    store.append(make.rows(0, 4))
    statements: list[str] = []
    store._db.set_trace_callback(statements.append)
    for number in (2, 4):
        sqlite_place.damage(number)
        for _ in range(3):
            assert DamagedRow in map(type, store.fetch(0, ALL, ALL))
            assert len(store.oldest(["eeg"], ALL)) == 5
    assert len([text for text in statements if "quick_check" in text]) == 2


def test_a_large_file_is_not_looked_at_whole(
    sqlite_place: Any, make: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sqlite_store, "LOOK_BYTES_MAX", 1)
    store = sqlite_place.open()
    store.append(make.rows(0, 4))
    statements: list[str] = []
    store._db.set_trace_callback(statements.append)
    sqlite_place.damage(2)
    assert [type(item) for item in store.fetch(0, ALL, ALL)].count(DamagedRow) == 1
    assert not [text for text in statements if "quick_check" in text]
    assert "too large" in caplog.text


def test_a_disk_that_fails_while_the_file_is_looked_at_is_unavailable_and_comes_back(
    sqlite_place: Any, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = sqlite_place.open()
    store.append(make.rows(0, 4))
    sqlite_place.damage(2)

    def fail(_: SqliteStore) -> bool:
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as failing:
        failing.setattr(SqliteStore, "_is_sound", fail)
        with pytest.raises(UnavailableError, match="cannot look at: disk I/O error"):
            store.fetch(0, ALL, ALL)
    assert [type(item) for item in store.fetch(0, ALL, ALL)].count(DamagedRow) == 1
