"""The outbox in a SQLite file: WAL, synchronous=FULL, so that a commit that returned survives a power cut.

The only file that imports sqlite3. Used from one thread, which the outbox owns.
"""

from __future__ import annotations

import contextlib
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
_HELD = "id, device, signal, sequence, first_ns, last_ns, samples, size"
_REST = "lost, lost_signal, content_type, schema, payload, checksum"
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
    """A `Store` in one SQLite file, which nobody else may write."""

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
                self.path.parent.mkdir(parents=True, exist_ok=True)
            mode = "ro" if self._read_only else "rwc"
            self._connection = sqlite3.connect(
                f"{self.path.absolute().as_uri()}?mode={mode}",
                uri=True,
                timeout=_BUSY_TIMEOUT_S,
                isolation_level=None,
                check_same_thread=False,  # opened and used in the outbox's one thread, closed from wherever it ends
            )
        except (OSError, sqlite3.Error) as error:
            raise UnavailableError(
                f"outbox {self.path} cannot be opened: {error}",
                hint="does its folder exist and belong to the service's user?",
            ) from None
        with self._mapped("open"):
            if not self._read_only:
                self._prepare()
            self._epoch = self._scalar_text("SELECT value FROM outbox WHERE key = 'epoch'")
            rows, size = self._db.execute("SELECT count(*), coalesce(sum(size), 0) FROM block").fetchone()
            last = self._db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'block'").fetchone()
            self._holding = Holding(rows, size, last[0] if last else 0)

    def _prepare(self) -> None:
        self.path.chmod(0o600)
        run = self._db.execute
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")
        run(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
        self._db.executescript("BEGIN IMMEDIATE;" + _SCHEMA + "COMMIT;")
        with self._transaction():
            run("INSERT OR IGNORE INTO outbox VALUES ('format', ?)", (str(FORMAT),))
            run("INSERT OR IGNORE INTO outbox VALUES ('epoch', ?)", (secrets.token_hex(8),))
        found = self._scalar_text("SELECT value FROM outbox WHERE key = 'format'")
        if found != str(FORMAT):
            raise DamagedError(f"outbox {self.path} has format {found}, this program writes {FORMAT}")

    def append(self, rows: Sequence[Row]) -> None:
        with self._mapped("write"):
            with self._transaction():
                self._insert(rows)
            self._account(rows, [])

    def replace(self, ids: Sequence[int], rows: Sequence[Row]) -> None:
        removed: list[int] = []
        with self._mapped("write"):
            with self._transaction():
                for number in ids:
                    found = self._db.execute("DELETE FROM block WHERE id = ? RETURNING size", (number,)).fetchone()
                    removed.extend(found or ())
                self._insert(rows)
            self._account(rows, removed)

    def fetch(self, after: int, through: int, limit: int) -> list[StoredRow | DamagedRow]:
        with self._mapped("read"):
            cursor = self._db.execute(
                f"SELECT {_HELD}, {_REST} FROM block WHERE id > ? AND id <= ? ORDER BY id LIMIT ?",  # noqa: S608 - constants
                (after, through, limit),
            )
            return [_checked(values) for values in cursor.fetchall()]

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
            return [Held(*values) for values in self._db.execute(query, (*signals, limit)).fetchall()]

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
    def _mapped(self, doing: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise UnavailableError(
                f"outbox {self.path}: cannot {doing}: {error}", hint="is the disk full, or mounted read-only?"
            ) from error
        except sqlite3.DatabaseError as error:
            raise DamagedError(f"outbox {self.path}: cannot {doing}: {error}") from error


def _values(row: Row) -> tuple[object, ...]:
    payload = row.payload
    head = (row.device, row.signal, row.sequence, row.first_ns, row.last_ns, row.samples, row.lost, row.lost_signal)
    return (*head, payload.content_type, payload.schema, payload.data, row.size, row.checksum())


def _checked(values: Sequence[Any]) -> StoredRow | DamagedRow:
    held = Held(*values[:8])
    lost, lost_signal, content_type, schema, data, checksum = values[8:]
    row = Row(
        device=held.device,
        signal=held.signal,
        sequence=held.sequence,
        first_ns=held.first_ns,
        last_ns=held.last_ns,
        samples=held.samples,
        lost=lost,
        lost_signal=lost_signal,
        payload=Payload(content_type, schema, data),
    )
    return StoredRow(held.id, row) if row.checksum() == checksum else DamagedRow(held)
