"""The outbox in a SQLite file: WAL, synchronous=FULL, so that a commit that returned survives a power cut.

The only file that imports sqlite3. Used from one thread, which the outbox owns.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gateway.errors import DamagedError, UnavailableError
from gateway.spool.store import DamagedRow, Held, Holding, Range, Row, StoredRow, StreamKey, Tally
from gateway.wire.codec import Payload

FORMAT = 1
_BUSY_TIMEOUT_S = 5.0
_CHECKPOINT_PAGES = 1000
"""4 MB of log at most before it goes into the file: damage in a log can hide rows, so it is kept short."""
_FOLDER_HINT = "does its folder exist, and does it belong to the service's user?"
_DISK_HINT = "is the disk full, or mounted read-only?"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS outbox (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS block (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    device TEXT NOT NULL,
    signal TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    first_ns INTEGER NOT NULL,
    last_ns INTEGER NOT NULL,
    samples INTEGER NOT NULL,
    lost INTEGER NOT NULL,
    lost_signal TEXT NOT NULL,
    content_type TEXT NOT NULL,
    schema TEXT NOT NULL,
    payload BLOB NOT NULL,
    size INTEGER NOT NULL,
    checksum INTEGER NOT NULL,
    UNIQUE (device, signal, sequence)
) STRICT;
CREATE TABLE IF NOT EXISTS tally (
    device TEXT NOT NULL,
    signal TEXT NOT NULL,
    next_sequence INTEGER NOT NULL DEFAULT 0,
    accepted INTEGER NOT NULL DEFAULT 0,
    lost INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (device, signal)
) STRICT, WITHOUT ROWID;
"""
_HELD = "id, device, signal, sequence, first_ns, last_ns, samples, size, lost, lost_signal"
_REST = "content_type, schema, payload, checksum"
_TYPES: tuple[type[int | str | bytes], ...] = (
    *(int, str, str, int, int, int, int, int, int, str),
    *(str, str, bytes, int),
)
_INDEXED_IDENTITY = """
SELECT device, signal, sequence FROM block INDEXED BY sqlite_autoindex_block_1 WHERE device >= '' AND id = ?
"""
"""A row's identity as the index has it: a second copy. The comparison makes the index usable at all."""
_INSERT = """
INSERT INTO block (device, signal, sequence, first_ns, last_ns, samples, lost, lost_signal,
                   content_type, schema, payload, size, checksum)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
_COUNT_SEQUENCE = """
INSERT INTO tally (device, signal, next_sequence, accepted) VALUES (?, ?, ?, ?)
ON CONFLICT DO UPDATE SET next_sequence = max(next_sequence, excluded.next_sequence),
                          accepted = accepted + excluded.accepted
"""
_COUNT_LOST = """
INSERT INTO tally (device, signal, lost) VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET lost = lost + excluded.lost
"""


class SqliteStore:
    """A `Store` in one SQLite file, which nobody else may write. `read_only`: to look at it, beside its writer."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self._read_only = read_only
        self._connection: sqlite3.Connection | None = None
        self._epoch = ""
        self._holding = Holding(0, 0, 0)

    @property
    def epoch(self) -> str:
        return self._epoch

    def open(self) -> None:
        try:
            if not self._read_only:
                self._create()
            mode = "ro" if self._read_only else "rw"
            self._connection = sqlite3.connect(
                f"{self.path.absolute().as_uri()}?mode={mode}",
                uri=True,
                timeout=_BUSY_TIMEOUT_S,
                isolation_level=None,
                check_same_thread=False,  # opened and used in the outbox's one thread, closed from wherever it ends
            )
        except (OSError, sqlite3.Error) as error:
            raise UnavailableError(f"outbox {self.path} cannot be opened: {error}", hint=_FOLDER_HINT) from None
        # A damaged text must come to the comparison of checksums, not raise for the whole window that it is in.
        self._connection.text_factory = lambda raw: raw.decode(errors="replace")
        try:
            with self._mapped("open", _FOLDER_HINT):
                self._check_owner()
                if not self._read_only:
                    self._prepare()
                self._epoch = self._scalar_text("SELECT value FROM outbox WHERE key = 'epoch'")
                rows, size = self._db.execute("SELECT count(*), coalesce(sum(size), 0) FROM block").fetchone()
                last = self._db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'block'").fetchone()
                self._holding = Holding(rows, size, last[0] if last else 0)
        except BaseException:
            self.close()
            raise

    def _create(self) -> None:
        """Make the file, readable by nobody else from its first moment; its log and index follow its mode."""
        folder = self.path.absolute().parent
        missing = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for place in missing:
            _sync_folder(place.parent)  # SQLite syncs the file's own folder, not the folders that this one is in
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))

    def _check_owner(self) -> None:
        """Refuse a database of another program, or of another version of this one, before anything in it changes."""
        tables = {name for (name,) in self._db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
        if not tables:
            if self._read_only:
                raise UnavailableError(f"outbox {self.path} is empty", hint="has its gateway run yet?")
            return
        found = self._scalar_text("SELECT value FROM outbox WHERE key = 'format'") if "outbox" in tables else ""
        if not found:
            raise DamagedError(f"{self.path} is a database, but no outbox", hint="check spool.path")
        if found != str(FORMAT):
            raise DamagedError(f"outbox {self.path} has format {found}, this program writes {FORMAT}")

    def _prepare(self) -> None:
        self.path.chmod(0o600)
        run = self._db.execute
        if (mode := self._scalar_text("PRAGMA journal_mode = WAL")) != "wal":
            raise UnavailableError(
                f"outbox {self.path}: its file system gives no write-ahead log, only {mode!r}",
                hint="spool.path must be on a local disk",
            )
        run("PRAGMA synchronous = FULL")
        run(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
        with self._transaction():
            for statement in _SCHEMA.split(";"):
                run(statement)
            run("INSERT OR IGNORE INTO outbox VALUES ('format', ?)", (str(FORMAT),))
            run("INSERT OR IGNORE INTO outbox VALUES ('epoch', ?)", (secrets.token_hex(8),))

    def append(self, rows: Sequence[Row]) -> None:
        with self._mapped("write"):
            with self._transaction():
                self._insert(rows)
            self._account(rows, [])

    def replace(self, ids: Sequence[int], rows: Sequence[Row]) -> None:
        with self._mapped("write"):
            try:
                self._replace(ids, rows)
            except (sqlite3.OperationalError, sqlite3.IntegrityError):
                raise
            except sqlite3.DatabaseError:
                # The row of an id may no longer fit its index entry, which is why it is being replaced.
                self._db.execute("REINDEX block")
                self._replace(ids, rows)

    def _replace(self, ids: Sequence[int], rows: Sequence[Row]) -> None:
        sizes: list[int] = []
        with self._transaction():
            for number in ids:
                query = "DELETE FROM block WHERE id = ? RETURNING size, device, lost_signal, lost"
                for size, device, lost_signal, lost in self._db.execute(query, (number,)).fetchall():
                    sizes.append(size)
                    if lost:
                        self._db.execute(_COUNT_LOST, (device, lost_signal, -lost))
            self._insert(rows)
        self._account(rows, sizes)

    def fetch(self, after: int, through: int, limit: int) -> list[StoredRow | DamagedRow]:
        with self._mapped("read"):
            cursor = self._db.execute(
                f"SELECT {_HELD}, {_REST} FROM block WHERE id > ? AND id <= ? ORDER BY id LIMIT ?",  # noqa: S608 - constants
                (after, through, limit),
            )
            return [self._checked(values) for values in cursor.fetchall()]

    def remove(self, device: str, signal: str, ranges: Sequence[Range]) -> list[int]:
        removed: list[tuple[int, int]] = []
        with self._mapped("write"):
            with self._transaction():
                for first, last in ranges:
                    found = self._db.execute(
                        "DELETE FROM block WHERE device = ? AND signal = ? AND sequence BETWEEN ? AND ?"
                        " RETURNING id, size",
                        (device, signal, first, last),
                    )
                    removed.extend(found.fetchall())
            self._account([], [size for _, size in removed])
        return [number for number, _ in removed]

    def oldest(self, signals: Sequence[str], limit: int) -> list[Held]:
        places = ", ".join("?" * len(signals))
        query = f"SELECT {_HELD} FROM block WHERE signal IN ({places}) ORDER BY id LIMIT ?"  # noqa: S608 - constants
        with self._mapped("read"):
            return [Held(*_typed(values)) for values in self._db.execute(query, (*signals, limit)).fetchall()]

    def held(self) -> Mapping[StreamKey, Range]:
        with self._mapped("read"):
            cursor = self._db.execute("SELECT device, signal, min(sequence), max(sequence) FROM block GROUP BY 1, 2")
            return {(device, signal): (first, last) for device, signal, first, last in cursor.fetchall()}

    def tallies(self) -> Mapping[StreamKey, Tally]:
        with self._mapped("read"):
            cursor = self._db.execute("SELECT device, signal, next_sequence, accepted, lost FROM tally")
            return {(device, signal): Tally(*values) for device, signal, *values in cursor.fetchall()}

    def holding(self) -> Holding:
        return self._holding

    def close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    @property
    def _db(self) -> sqlite3.Connection:
        if self._connection is None:
            raise UnavailableError(f"outbox {self.path} is not open")
        return self._connection

    def _insert(self, rows: Sequence[Row]) -> None:
        self._db.executemany(_INSERT, [_values(row) for row in rows])
        for row in rows:
            self._db.execute(_COUNT_SEQUENCE, (*row.key, row.sequence + 1, row.samples))
            if row.lost:
                self._db.execute(_COUNT_LOST, (row.device, row.lost_signal, row.lost))

    def _account(self, added: Sequence[Row], removed_sizes: Sequence[int]) -> None:
        """Keep the holding in step after a commit; counting the table would read all of it."""
        before = self._holding
        self._holding = Holding(
            before.rows + len(added) - len(removed_sizes),
            before.size + sum(row.size for row in added) - sum(removed_sizes),
            before.last_id + len(added),
        )

    def _checked(self, values: Sequence[Any]) -> StoredRow | DamagedRow:
        values = _typed(values)
        held = Held(*values[:10])
        content_type, schema, data, checksum = values[10:]
        row = Row(
            device=held.device,
            signal=held.signal,
            sequence=held.sequence,
            first_ns=held.first_ns,
            last_ns=held.last_ns,
            samples=held.samples,
            lost=held.lost,
            lost_signal=held.lost_signal,
            payload=Payload(content_type, schema, data),
        )
        if row.checksum() == checksum:
            return StoredRow(held.id, row)
        identity = self._db.execute(_INDEXED_IDENTITY, (held.id,)).fetchone() or values[1:4]
        return DamagedRow(Held(held.id, *_typed((held.id, *identity))[1:], *values[4:10]))

    def _scalar_text(self, query: str) -> str:
        found = self._db.execute(query).fetchone()
        return str(found[0]) if found else ""

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def _mapped(self, doing: str, hint: str = _DISK_HINT) -> Iterator[None]:
        try:
            yield
        except (sqlite3.OperationalError, OSError) as error:
            raise UnavailableError(f"outbox {self.path}: cannot {doing}: {error}", hint=hint) from error
        except sqlite3.DatabaseError as error:
            raise DamagedError(f"outbox {self.path}: cannot {doing}: {error}") from error


def _typed(values: Sequence[Any]) -> tuple[Any, ...]:
    """Columns of a row, with nothing in place of one that damage gave another type."""
    return tuple(
        value if isinstance(value, kind) else kind() for value, kind in zip(values, _TYPES[: len(values)], strict=True)
    )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _values(row: Row) -> tuple[object, ...]:
    payload = row.payload
    head = (row.device, row.signal, row.sequence, row.first_ns, row.last_ns, row.samples, row.lost, row.lost_signal)
    return (*head, payload.content_type, payload.schema, payload.data, row.size, row.checksum())
