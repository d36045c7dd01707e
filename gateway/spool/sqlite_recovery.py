"""What to do about an outbox's file that is damaged or lacks rows: set it aside, find rows again, name what is missing.

Works on a connection that the store owns. Nothing is ever deleted: a damaged file stays beside the new one.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path

from gateway.errors import DamagedError, UnavailableError
from gateway.spool import disk
from gateway.spool.marks import Marks
from gateway.spool.salvage import intact_rows
from gateway.spool.sqlite_format import (
    ADD_SUSPECT,
    FIND,
    FORMAT,
    FORMER,
    HALF_WAY,
    INSERT,
    SCAN,
    SCAN_TYPES,
    typed,
    values,
)
from gateway.spool.store import StoredRow, Suspect

log = logging.getLogger(__name__)

DAMAGED = ".damaged-"
"""Between the name of a file that was set aside and the time when it was."""
LOG_BYTES_READ_MAX = 64 << 20
"""Of a log before SQLite has its way with it; it is kept far shorter."""
_DAMAGE = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_FULL_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT})


class _Everything(Enum):
    EVERYTHING = "whatever is found"


EVERYTHING = _Everything.EVERYTHING
"""What is sought where no marks tell."""


@dataclass(slots=True)
class Found:
    """What the tables hold."""

    marks: Marks
    rows: int = 0
    size: int = 0
    last_id: int = 0


@dataclass(frozen=True, slots=True)
class Evidence:
    """Where rows may still be: the file with its log as it was, and files that were set aside."""

    path: Path
    log: bytes
    is_aside: bool = False
    """Whether the file itself has just been set aside."""

    @classmethod
    def of(cls, path: Path) -> Evidence:
        """Before SQLite opens the file: it shortens a log after the first frame that it does not trust."""
        return cls(path, read_log(path))

    @classmethod
    def set_aside(cls, path: Path, log_bytes: bytes) -> Evidence:
        """Give a damaged file and its log another name; the log as it was before. Raises `OSError`."""
        name = f"{path.name}{DAMAGED}{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"
        log.error("outbox %s is damaged: it is kept as %s, and what is intact in it goes into a new one", path, name)
        evidence = cls(path.with_name(name), log_bytes, is_aside=True)
        path.rename(evidence.path)
        with contextlib.suppress(FileNotFoundError):
            log_of(path).rename(log_of(evidence.path))
        path.with_name(f"{path.name}-shm").unlink(missing_ok=True)
        disk.sync_folder(path.absolute().parent)
        return evidence

    def rows(self) -> Iterator[StoredRow]:
        """Intact records, wherever they are; the most likely places first."""
        yield from rows_in(self.path, self.log)
        base = self.path.name.partition(DAMAGED)[0]
        for file in sorted(self.path.parent.glob(f"{base}{DAMAGED}*"), reverse=True):
            if file != self.path and not file.name.endswith("-wal"):
                yield from rows_in(file, read_log(file))

    def names_an_outbox(self) -> bool:
        """Whether there is a record of ours in it."""
        return next(rows_in(self.path, self.log), None) is not None


def rows_in(path: Path, log_bytes: bytes) -> Iterator[StoredRow]:
    """Intact records of one file and its log. Raises `OSError`."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            yield from intact_rows(b"", log_bytes)
            return
        try:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            yield from intact_rows(file.read(), log_bytes)  # not every file system can map a file
            return
        with content as mapped:
            yield from intact_rows(mapped, log_bytes)


def log_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def read_log(path: Path) -> bytes:
    """The write-ahead log of a file, nothing where there is none."""
    try:
        with log_of(path).open("rb") as file:
            return file.read(LOG_BYTES_READ_MAX)
    except FileNotFoundError:
        return b""


def set_aside_files(path: Path) -> list[Path]:
    """Damaged files that were kept, the oldest first."""
    return sorted(file for file in path.parent.glob(f"{path.name}{DAMAGED}*") if not file.name.endswith("-wal"))


def make_file(path: Path) -> None:
    """Make an outbox's file, readable by nobody else from its first moment; log and index follow its mode."""
    disk.make_folder(path.absolute().parent)
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        disk.sync_folder(path.absolute().parent)


def scalar_text(db: sqlite3.Connection, query: str) -> str:
    """The first value of the first row, as text; empty where there is none."""
    row = db.execute(query).fetchone()
    return str(row[0]) if row else ""


def found_format(db: sqlite3.Connection) -> str | None:
    """None for an empty file, nothing for a database that is no outbox."""
    tables = {name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    if not tables:
        return None
    return scalar_text(db, "SELECT value FROM outbox WHERE key = 'format'") if "outbox" in tables else ""


def check_owner(db: sqlite3.Connection, path: Path, *, read_only: bool) -> None:
    """Refuse a database of another program, or of another version of this one, before anything in it changes."""
    name = found_format(db)
    if name is None:
        if read_only:
            raise UnavailableError(f"outbox {path} is empty", hint="has its gateway run yet?")
        return
    if not name:
        raise DamagedError(f"{path} is a database, but no outbox", hint="check spool.path")
    if name not in {FORMAT, FORMER, HALF_WAY}:
        raise DamagedError(f"outbox {path} has format {name}, this program writes {FORMAT}")
    if name != FORMAT and read_only:
        raise UnavailableError(
            f"outbox {path} has the former format {name}", hint="the gateway takes it over when it starts"
        )


def found(db: sqlite3.Connection) -> Found:
    """What is in the tables."""
    here = Found(Marks())
    for columns in db.execute(SCAN):
        device, signal, epoch, sequence, number, size, *about = typed(columns, SCAN_TYPES)
        here.marks.add_columns((device, signal, epoch), (sequence, *about))
        here.rows += 1
        here.size += size
        here.last_id = max(here.last_id, number)
    return here


def put_back(db: sqlite3.Connection, rows: Iterable[StoredRow], sought: Marks | _Everything, here: Found) -> int:
    """Insert the intact records that are sought and not there. Returns how many. Only within a transaction.

    One that is there, and only its index entry is not, stays where it is: the index is made anew.
    """
    next_id = here.last_id + 1
    count = 0
    is_index_wrong = False
    for item in rows:
        device, signal, epoch, sequence = item.row.identity
        if isinstance(sought, Marks) and not sought.holds((device, signal, epoch), sequence):
            continue
        before = db.execute(FIND, (epoch, sequence, sequence, device, signal)).fetchone()
        if before is not None:
            if here.marks.holds((device, signal, epoch), sequence) or before[0] >= item.id:
                continue
            db.execute("DELETE FROM block WHERE id = ?", (before[0],))
            count -= 1
        taken = db.execute("SELECT device, signal, epoch, sequence FROM block WHERE id = ?", (item.id,)).fetchone()
        if taken == item.row.identity:
            is_index_wrong = True
            continue
        number = next_id if taken else item.id
        db.execute(INSERT, values(number, item.row))
        next_id = max(next_id, number + 1)
        count += 1
    if is_index_wrong:
        db.execute("REINDEX block")
    return count


def record_suspects(db: sqlite3.Connection, suspects: Sequence[Suspect]) -> None:
    """Make it durable that these are missing. Only within a transaction."""
    for suspect in suspects:
        log.error(
            "outbox: %s %s lacks blocks %d to %d of epoch %s",
            *(suspect.device, suspect.signal, suspect.first, suspect.last, suspect.epoch),
        )
    db.executemany(ADD_SUSPECT, [astuple(suspect) for suspect in suspects])


def recount(db: sqlite3.Connection) -> None:
    """Tallies of what is there, where nobody knows better. Only within a transaction."""
    db.execute("DELETE FROM tally")
    db.execute("INSERT INTO tally SELECT device, signal, count(*), sum(samples), 0 FROM block GROUP BY 1, 2")
    db.execute(
        "INSERT INTO tally SELECT device, lost_signal, 0, 0, sum(lost) FROM block WHERE lost > 0 GROUP BY 1, 2"
        " ON CONFLICT DO UPDATE SET lost = excluded.lost"
    )


def is_damage(error: Exception) -> bool:
    """Whether SQLite calls the file damaged; a table or column that is not there is damage in the schema's text."""
    if isinstance(error, UnicodeDecodeError):
        return True  # SQLite quotes what it does not understand
    if not isinstance(error, sqlite3.DatabaseError):
        return False
    text = str(error)
    return _primary(error) in _DAMAGE or text.startswith("no such ") or "has no column" in text


def is_full(error: Exception) -> bool:
    """Whether there is no room."""
    if isinstance(error, OSError):
        return error.errno in _FULL_ERRORS
    return _primary(error) == sqlite3.SQLITE_FULL


def is_input_or_output(error: Exception) -> bool:
    """Whether a disk failed, after which nothing can be said of what was written."""
    return isinstance(error, OSError) or _primary(error) in {sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN}


def _primary(error: Exception) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
