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
from gateway.spool.sqlite_format import (
    COUNT,
    FETCH,
    FORMAT,
    FORMER,
    HALF_WAY,
    HELD,
    INDEXED_IDENTITY,
    INSERT,
    SCHEMA,
    TAKE_OUT,
    UNSTAMPED,
    checked,
    take_over,
    typed,
    values,
)
from gateway.spool.store import DamagedRow, EpochKey, Held, Holding, Range, Row, StoredRow, StreamKey, Tally

_BUSY_TIMEOUT_S = 5.0
_CHECKPOINT_PAGES = 1000
"""4 MB of log at most before it goes into the file: damage in a log can hide rows, so it is kept short."""
_FOLDER_HINT = "does its folder exist, and does it belong to the service's user?"
_DISK_HINT = "is the disk full, or mounted read-only?"


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
                counted = "SELECT count(*), coalesce(sum(size), 0), coalesce(max(id), 0) FROM block"
                self._holding = Holding(*self._db.execute(counted).fetchone())
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
        found = self._found_format()
        if found is None:
            if self._read_only:
                raise UnavailableError(f"outbox {self.path} is empty", hint="has its gateway run yet?")
            return
        if not found:
            raise DamagedError(f"{self.path} is a database, but no outbox", hint="check spool.path")
        if found not in {FORMAT, FORMER, HALF_WAY}:
            raise DamagedError(f"outbox {self.path} has format {found}, this program writes {FORMAT}")
        if found != FORMAT and self._read_only:
            raise UnavailableError(
                f"outbox {self.path} has the former format {found}", hint="the gateway takes it over when it starts"
            )

    def _found_format(self) -> str | None:
        """None for an empty file, nothing for a database that is no outbox."""
        tables = {name for (name,) in self._db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
        if not tables:
            return None
        return self._scalar_text("SELECT value FROM outbox WHERE key = 'format'") if "outbox" in tables else ""

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
        if self._found_format() in {FORMER, HALF_WAY}:
            take_over(self._db, self._transaction)
        with self._transaction():
            for statement in SCHEMA.split(";"):
                run(statement)
            run("INSERT OR IGNORE INTO outbox VALUES ('format', ?)", (FORMAT,))
            run("INSERT OR REPLACE INTO outbox VALUES ('epoch', ?)", (secrets.token_hex(8),))

    def append(self, rows: Sequence[Row]) -> None:
        self._step([], rows)

    def replace(self, ids: Sequence[int], rows: Sequence[Row]) -> None:
        self._step(ids, rows)

    def fetch(self, after: int, through: int, limit: int) -> list[StoredRow | DamagedRow]:
        return self._rows(FETCH, (after, through, limit))

    def unstamped(self, limit: int) -> list[StoredRow | DamagedRow]:
        return self._rows(UNSTAMPED, (limit,))

    def remove(self, device: str, signal: str, epoch: str, ranges: Sequence[Range]) -> list[int]:
        removed: list[tuple[int, int]] = []
        with self._mapped("write"):
            with self._transaction():
                for first, last in ranges:
                    found = self._db.execute(
                        "DELETE FROM block WHERE device = ? AND signal = ? AND epoch = ? AND sequence BETWEEN ? AND ?"
                        " RETURNING id, size",
                        (device, signal, epoch, first, last),
                    )
                    removed.extend(found.fetchall())
            self._account([], [size for _, size in removed])
        return [number for number, _ in removed]

    def oldest(self, signals: Sequence[str], limit: int) -> list[Held]:
        places = ", ".join("?" * len(signals))
        query = f"SELECT {HELD} FROM block WHERE signal IN ({places}) ORDER BY id LIMIT ?"  # noqa: S608 - constants
        with self._mapped("read"):
            return [Held(*typed(values)) for values in self._db.execute(query, (*signals, limit)).fetchall()]

    def held(self) -> Mapping[EpochKey, Range]:
        query = "SELECT device, signal, epoch, min(sequence), max(sequence) FROM block GROUP BY 1, 2, 3"
        with self._mapped("read"):
            found = self._db.execute(query).fetchall()
            return {(device, signal, epoch): (first, last) for device, signal, epoch, first, last in found}

    def tallies(self) -> Mapping[StreamKey, Tally]:
        with self._mapped("read"):
            cursor = self._db.execute("SELECT device, signal, blocks, accepted, lost FROM tally")
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

    def _step(self, ids: Sequence[int], rows: Sequence[Row]) -> None:
        with self._mapped("write"):
            try:
                sizes = self._exchange(ids, rows)
            except (sqlite3.OperationalError, sqlite3.IntegrityError):
                raise
            except sqlite3.DatabaseError:
                if not ids:
                    raise
                # The row of an id may no longer fit its index entry, which is why it is being replaced.
                self._db.execute("REINDEX block")
                sizes = self._exchange(ids, rows)
            self._account(rows, sizes)

    def _exchange(self, ids: Sequence[int], rows: Sequence[Row]) -> list[int]:
        """Take rows out, put others in and count, in one transaction. Returns the sizes of what went."""
        sizes: list[int] = []
        counts: Counted = {}
        with self._transaction():
            gone: dict[tuple[str, str, str, int], int] = {}
            for number in ids:
                for size, *identity, samples, lost, lost_signal in self._db.execute(TAKE_OUT, (number,)).fetchall():
                    sizes.append(size)
                    gone[tuple(identity)] = samples
                    _count(counts, (identity[0], lost_signal), lost=-lost)
            for number, row in enumerate(rows, start=self._holding.last_id + 1):
                self._db.execute(INSERT, values(number, row))
                again = row.identity in gone
                _count(counts, row.key, blocks=int(not again), samples=row.samples - gone.get(row.identity, 0))
                _count(counts, (row.device, row.lost_signal), lost=row.lost)
            self._db.executemany(COUNT, [(*key, *count) for key, count in counts.items() if any(count)])
        return sizes

    def _rows(self, query: str, arguments: Sequence[int]) -> list[StoredRow | DamagedRow]:
        with self._mapped("read"):
            found = self._db.execute(query, arguments).fetchall()
            return [checked(columns, self._indexed_identity) for columns in found]

    def _indexed_identity(self, number: int) -> Sequence[Any] | None:
        found: Sequence[Any] | None = self._db.execute(INDEXED_IDENTITY, (number,)).fetchone()
        return found

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
    def _mapped(self, doing: str, hint: str = _DISK_HINT) -> Iterator[None]:
        try:
            yield
        except (sqlite3.OperationalError, OSError) as error:
            raise UnavailableError(f"outbox {self.path}: cannot {doing}: {error}", hint=hint) from error
        except sqlite3.DatabaseError as error:
            raise DamagedError(f"outbox {self.path}: cannot {doing}: {error}") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


Counted = dict[StreamKey, tuple[int, int, int]]
"""Blocks, samples accepted and samples lost that a step adds to each tally."""


def _count(counts: Counted, key: StreamKey, *, blocks: int = 0, samples: int = 0, lost: int = 0) -> None:
    before = counts.get(key, (0, 0, 0))
    counts[key] = (before[0] + blocks, before[1] + samples, before[2] + lost)
