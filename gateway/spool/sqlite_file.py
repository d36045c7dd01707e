"""The SQLite file of an outbox while it is open: its connection, its settings, and what its errors mean.

Remembers what a fault leaves to be done; who mends it is the store.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from gateway.errors import DamagedError, UnavailableError
from gateway.spool.disk import Reserve
from gateway.spool.sqlite_format import FORMAT, FORMER, HALF_WAY, PAGE_BYTES, SCHEMA, take_over
from gateway.spool.sqlite_recovery import found_format, is_damage, is_full, is_input_or_output, scalar_text
from gateway.spool.store import FullError

_BUSY_TIMEOUT_S = 5.0
LOG_BYTES_MAX = 16 << 20
"""A log that somebody's reading kept from being begun anew is cut as soon as it can be."""
FOLDER_HINT = "does its folder exist, and does it belong to the service's user?"
_DISK_HINT = "is the disk full, or mounted read-only?"


class SqliteFile:
    """A connection that can be lost and made again. Used from one thread."""

    def __init__(self, path: Path, reserve: Reserve, synchronous: Literal["FULL", "NORMAL", "OFF"]) -> None:
        self.path = path
        self._reserve = reserve
        self._synchronous = synchronous
        self.connection: sqlite3.Connection | None = None
        self.is_in_service = False
        """Open for its writer: from now on damage is mended, not told."""
        self.is_shaken = False
        """A write or sync failed: what the file holds must be looked at before anything more is accepted."""
        self.is_broken = False
        """SQLite calls the file damaged."""
        self.is_in_doubt = False
        """A step that failed may have been carried out all the same."""

    def connect(self, mode: str) -> None:
        """`mode`: ro, rw. Raises `sqlite3.Error`."""
        self.connection = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode={mode}",
            uri=True,
            timeout=_BUSY_TIMEOUT_S,
            isolation_level=None,
            check_same_thread=False,  # opened and used in the outbox's one thread, closed from wherever it ends
        )
        # A damaged text must come to the comparison of checksums, not raise for the whole window that it is in.
        self.connection.text_factory = lambda raw: raw.decode(errors="replace")

    def disconnect(self) -> None:
        """May be called in any state."""
        if self.connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self.connection.close()
            self.connection = None

    def prepare(self, checkpoint_pages: int) -> None:
        """Settings and tables; a former format is taken over. Raises `UnavailableError`, `sqlite3.Error`."""
        self.path.chmod(0o600)
        run = self.db.execute
        run(f"PRAGMA page_size = {PAGE_BYTES}")
        if (mode := scalar_text(self.db, "PRAGMA journal_mode = WAL")) != "wal":
            raise UnavailableError(
                f"outbox {self.path}: its file system gives no write-ahead log, only {mode!r}",
                hint="spool.path must be on a local disk",
            )
        run(f"PRAGMA synchronous = {self._synchronous}")
        run("PRAGMA secure_delete = OFF")  # what is forgotten was sent: writing zeros over it only wears the card
        run(f"PRAGMA wal_autocheckpoint = {checkpoint_pages}")
        run(f"PRAGMA journal_size_limit = {LOG_BYTES_MAX}")
        if found_format(self.db) in {FORMER, HALF_WAY}:
            take_over(self.db, self.transaction)
        with self.transaction():
            for statement in SCHEMA.split(";"):
                run(statement)
            run("INSERT OR IGNORE INTO outbox VALUES ('format', ?)", (FORMAT,))

    def keep_log_short(self) -> None:
        """Put a long log into the file. Raises `sqlite3.Error`."""
        with contextlib.suppress(FileNotFoundError):
            if self.path.with_name(self.path.name + "-wal").stat().st_size > LOG_BYTES_MAX:
                self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    @property
    def db(self) -> sqlite3.Connection:
        """The connection. Raises `UnavailableError` where there is none."""
        if self.connection is None:
            raise UnavailableError(f"outbox {self.path} is not open")
        return self.connection

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, durable when it ends."""
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                if self.db.in_transaction:
                    self.db.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def mapped(self, doing: str, hint: str = _DISK_HINT) -> Iterator[None]:
        """Turn what SQLite and the system say into errors of ours, and remember what has to be mended."""
        try:
            yield
        except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
            text = f"outbox {self.path}: cannot {doing}: {error}"
            if is_full(error):
                self._reserve.release()
                raise FullError(text, hint=hint) from error
            if isinstance(error, OSError | sqlite3.OperationalError) and not is_damage(error):
                self.is_shaken = self.is_in_doubt = self.is_shaken or is_input_or_output(error)
                raise UnavailableError(text, hint=hint) from error
            if is_damage(error) and self.is_in_service:
                self.is_broken = self.is_in_doubt = True
                raise UnavailableError(text, hint="what is intact in it goes into a new file") from error
            raise DamagedError(text) from error
