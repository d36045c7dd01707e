"""The outbox in a SQLite file: WAL, synchronous=FULL, so that a commit that returned survives a power cut.

Beside it stand marks of what it holds, so that what a disk takes away from it is noticed; what can be found again in
the file or its log is put back, the rest is suspect. A damaged file is set aside. Used from one thread, the outbox's.
"""

from __future__ import annotations

import logging
import secrets
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, Literal

from gateway.errors import UnavailableError
from gateway.spool import disk
from gateway.spool.marks import Marks, apart
from gateway.spool.marks_file import MarksFile
from gateway.spool.sqlite_file import FOLDER_HINT, SqliteFile
from gateway.spool.sqlite_format import (
    COUNT,
    FETCH,
    FIND,
    HELD,
    HELD_RANGES,
    INDEXED_IDENTITY,
    INSERT,
    RAISE_TALLY,
    REST,
    SETTLE,
    SUSPECTS,
    TAKE_OUT,
    TALLIES,
    UNSTAMPED,
    checked,
    typed,
    values,
)
from gateway.spool.sqlite_recovery import (
    EVERYTHING,
    Evidence,
    check_owner,
    found,
    found_format,
    is_damage,
    make_file,
    put_back,
    read_log,
    record_suspects,
    recount,
    rows_in,
    scalar_text,
)
from gateway.spool.store import (
    DamagedRow,
    EpochKey,
    Held,
    Holding,
    Place,
    Range,
    Row,
    StoredRow,
    StreamKey,
    Suspect,
    Tally,
)

log = logging.getLogger(__name__)

LOOK_BYTES_MAX = 256 << 20
"""A larger file is not looked at whole: on a slow card, 10 MB/s, that would take longer than a step may before it
counts as hung. What damage hides in it, the marks miss at the next start."""
_CHECKPOINT_PAGES = 8000
"""4 MB of log before it goes into the file: much less would write the pages that change all the time too often."""


class SqliteStore:
    """A `Store` in one SQLite file, which nobody else may write. `read_only`: to look at it, beside its writer.

    `synchronous`: anything but FULL loses what was accepted in a power cut, and is for rigs that must see that.
    """

    def __init__(
        self,
        path: Path,
        *,
        read_only: bool = False,
        synchronous: Literal["FULL", "NORMAL", "OFF"] = "FULL",
        free_bytes_min: int = 0,
        reserve_bytes: int = 0,
    ) -> None:
        self.path = path
        self._read_only = read_only
        self._free_bytes_min = free_bytes_min
        self._reserve = disk.Reserve(path, reserve_bytes)
        self._file = SqliteFile(path, self._reserve, synchronous)
        self._marks_file = MarksFile(path.with_name(path.name + ".marks"))
        self._marks = Marks()
        self._staying: Marks | None = None
        """What is here whether or not the newest step was carried out, as long as its outcome is not known."""
        self._indexed: dict[int, Identified] = {}
        """Who damaged rows were by the index, for when they are taken out: in the row itself that may be wrong."""
        self._epoch = ""
        self._holding = Holding(0, 0, 0)

    @property
    def epoch(self) -> str:
        return self._epoch

    def open(self) -> None:
        if self._read_only:
            self._open_to_look()
            return
        try:
            with self._file.mapped("open", FOLDER_HINT):
                is_ours = self._marks_file.path.exists()
                kept = self._marks_file.open() if is_ours else None
                evidence = self._begin(kept, is_ours=is_ours)
                if not is_ours:  # only now: nothing is put beside a file of another program
                    self._marks_file.open()
                try:
                    self._reconcile(kept, evidence)
                except sqlite3.DatabaseError as error:  # damage that is met only where a row is looked for
                    if evidence.is_aside or not is_damage(error):
                        raise
                    self._reconcile(kept, self._begin_anew(evidence.log))
                self._begin_epoch(secrets.token_hex(8))
                self._marks_file.write(self._marks)
            self._reserve.make(self._free_bytes_min)
        except BaseException:
            self.close()
            raise
        self._file.is_in_service = True
        self._file.is_shaken = self._file.is_broken = self._file.is_in_doubt = False

    def append(self, rows: Sequence[Row]) -> None:
        self._step([], rows, (), ())

    def replace(
        self,
        ids: Sequence[int],
        rows: Sequence[Row],
        receipted: Sequence[Place] = (),
        settled: Sequence[Suspect] = (),
    ) -> None:
        self._step(ids, rows, receipted, settled)

    def fetch(self, after: int, through: int, limit: int) -> list[StoredRow | DamagedRow]:
        return self._rows(FETCH, (after, through, limit))

    def unstamped(self, limit: int) -> list[StoredRow | DamagedRow]:
        return self._rows(UNSTAMPED, (limit,))

    def find(self, device: str, signal: str, epoch: str, ranges: Sequence[Range]) -> list[Place]:
        found: dict[int, Place] = {}  # ranges may overlap
        for first, last in ranges:
            for columns in self._read(FIND, (epoch, first, last, device, signal)):
                found[columns[0]] = Place(*columns)
        return list(found.values())

    def suspects(self) -> list[Suspect]:
        return [Suspect(*columns) for columns in self._read(SUSPECTS)]

    def oldest(self, signals: Sequence[str], limit: int) -> list[Held]:
        places = ", ".join("?" * len(signals))
        query = f"SELECT {HELD}, {REST} FROM block WHERE signal IN ({places}) ORDER BY id LIMIT ?"  # noqa: S608 - constants
        # With payload and checksum: a damaged row must not be put on record as what damage made of it.
        return [item.held for item in self._rows(query, (*signals, limit))]

    def held(self) -> Mapping[EpochKey, Range]:
        found = self._read(HELD_RANGES)
        return {(device, signal, epoch): (first, last) for device, signal, epoch, first, last in found}

    def tallies(self) -> Mapping[StreamKey, Tally]:
        found = self._read(TALLIES)
        return {(device, signal): Tally(*numbers) for device, signal, *numbers in found}

    def holding(self) -> Holding:
        return self._holding

    def room(self) -> int:
        free_pages, size = self._read("SELECT freelist_count, page_size FROM pragma_freelist_count, pragma_page_size")[
            0
        ]
        with self._file.mapped("look at its disk"):
            return int(free_pages * size) + max(disk.free_bytes(self.path.parent) - self._free_bytes_min, 0)

    def take_in(self, file: Path) -> int:
        """Take the intact records of another file of an outbox in, which are not here; returns how many it were.

        What was accepted and lost before stays counted as it is. Raises `UnavailableError`.
        """
        self._mend()
        with self._file.mapped("take records in"):
            here = found(self._db)
            with self._file.transaction():
                count = put_back(self._db, rows_in(file, read_log(file)), EVERYTHING, here)
                here = found(self._db)
                for suspect in self.suspects():
                    if all(here.marks.holds(suspect.epoch_key, n) for n in range(suspect.first, suspect.last + 1)):
                        self._db.execute(SETTLE, (*suspect.epoch_key, suspect.first))
            self._reconcile(self._marks, Evidence(self.path, b""))
            self._marks_file.write(self._marks)
        return count

    def close(self) -> None:
        self._file.is_in_service = False
        self._file.disconnect()
        self._marks_file.close()

    # --- opening, and opening again

    def _open_to_look(self) -> None:
        try:
            with self._file.mapped("open", FOLDER_HINT):
                self._file.connect("ro")
                check_owner(self._db, self.path, read_only=True)
                self._epoch = scalar_text(self._db, "SELECT value FROM outbox WHERE key = 'epoch'")
                counted = "SELECT count(*), coalesce(sum(size), 0), coalesce(max(id), 0) FROM block"
                self._holding = Holding(*self._db.execute(counted).fetchone())
        except BaseException:
            self.close()
            raise

    def _begin(self, expected: Marks | None, *, is_ours: bool) -> Evidence:
        """Connect to the outbox, making it; a damaged one is set aside first."""
        make_file(self.path)
        evidence = Evidence.of(self.path)
        try:
            self._file.connect("rw")
            if found_format(self._db) == "" and evidence.names_an_outbox():  # damage took the name of a table
                return self._begin_anew(evidence.log)
            check_owner(self._db, self.path, read_only=False)
            self._file.prepare(_CHECKPOINT_PAGES)
            for query in (FETCH.replace("?", "0"), SUSPECTS, TALLIES):
                self._db.execute(query)  # a schema that damage has changed names no such column
            if expected and expected.lacking(found(self._db).marks):
                if not self._is_sound():
                    return self._begin_anew(evidence.log)
                self._db.execute("REINDEX block")  # the rows may be there, and only the index be damaged
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            if not (is_damage(error) or isinstance(error, sqlite3.IntegrityError)) or not (
                is_ours or evidence.names_an_outbox()
            ):
                raise
            evidence = self._begin_anew(evidence.log)
        return evidence

    def _begin_anew(self, log_bytes: bytes) -> Evidence:
        """Set the damaged file aside, and make a new one in its place."""
        self._file.disconnect()
        evidence = Evidence.set_aside(self.path, log_bytes)
        make_file(self.path)
        self._file.connect("rw")
        self._file.prepare(_CHECKPOINT_PAGES)
        return evidence

    def _begin_epoch(self, epoch: str) -> None:
        self._epoch = epoch
        with self._file.transaction():
            self._db.execute("INSERT OR REPLACE INTO outbox VALUES ('epoch', ?)", (epoch,))

    def _reconcile(self, expected: Marks | None, evidence: Evidence) -> None:
        """Put back what is missing and can be found; the rest is suspect. Then what is here is what should be here."""
        here = found(self._db)
        sought = expected if expected is not None or not evidence.is_aside else EVERYTHING
        if sought is EVERYTHING or (sought and sought.lacking(here.marks)):
            log.error("outbox %s lacks rows that it had accepted: looking for them", self.path)
            with self._file.transaction():
                count = put_back(self._db, evidence.rows(), sought, here)
                if sought is EVERYTHING:
                    recount(self._db)
            here = found(self._db)
            missing = sought.lacking(here.marks) if isinstance(sought, Marks) else []
            told = list(self._indexed.values())
            missing = [
                part for gap in missing for part in apart(gap, [who[3] for who in told if who[:3] == gap.epoch_key])
            ]
            log.error("%d rows were found and put back; %d ranges stay missing", count, len(missing))
            with self._file.transaction():
                record_suspects(self._db, missing)
        if expected is not None:
            with self._file.transaction():
                self._db.executemany(RAISE_TALLY, [(*key, *astuple(tally)) for key, tally in expected.tallies.items()])
        self._marks = expected.agreed(here.marks) if expected else here.marks
        self._marks.bound()
        self._marks.tallies = dict(self._tallies())
        self._holding = Holding(here.rows, here.size, max(here.last_id, self._holding.last_id))

    def _mend(self) -> None:
        """After a fault: open the file again, see what it really holds, and set it aside if it is damaged.

        A failed sync may have dropped what was written before it: the whole log goes into the file, synced, before
        anything is accepted again.
        """
        if self._file.connection is not None and not (self._file.is_shaken or self._file.is_broken):
            return
        if not self._file.is_in_service:
            raise UnavailableError(f"outbox {self.path} is not open")
        log_bytes = read_log(self.path) if self._file.is_broken else b""  # closing puts the log into the file
        self._file.disconnect()
        with self._file.mapped("open again"):
            if self._file.is_broken and self.path.exists():
                evidence = self._begin_anew(log_bytes)
                self._file.is_broken = False
            else:
                evidence = self._begin(self._marks, is_ours=True)
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._reconcile(self._staying or self._marks, evidence)
            self._begin_epoch(self._epoch)
            self._marks_file.write(self._marks)
        self._file.is_shaken = False
        log.warning("outbox %s was opened again after a fault", self.path)

    # --- steps

    def _step(
        self, ids: Sequence[int], rows: Sequence[Row], receipted: Sequence[Place], settled: Sequence[Suspect]
    ) -> None:
        if self._read_only:
            raise UnavailableError(f"outbox {self.path} was opened to be looked at only")
        self._mend()
        settled = [*settled, *self._vanished(ids, settled)]
        with self._file.mapped("write"):
            new = self._not_carried_out(rows, ids) if self._file.is_in_doubt else rows
            try:
                self._exchange(ids, new, receipted, settled)
            except sqlite3.DatabaseError as error:
                if not (ids or receipted) or isinstance(error, sqlite3.OperationalError | sqlite3.IntegrityError):
                    raise
                # A row that goes may no longer fit its index entry, which may be why it goes.
                self._db.execute("PRAGMA writable_schema = ON")  # then a missing index entry is no error
                try:
                    self._exchange(ids, new, receipted, settled, is_index_wrong=True)
                finally:
                    self._db.execute("PRAGMA writable_schema = OFF")
            self._file.is_in_doubt = True
            self._marks_file.write(self._marks)
            self._file.is_in_doubt = False
            self._file.keep_log_short()
        self._reserve.renew(self._free_bytes_min)

    def _vanished(self, ids: Sequence[int], settled: Sequence[Suspect]) -> list[Suspect]:
        """Damaged rows that go and went with a file that was set aside: what comes for them is the truth."""
        going = {self._indexed[number] for number in ids if number in self._indexed}
        if not going:
            return []
        alone = [suspect for suspect in self.suspects() if suspect.first == suspect.last]
        return [found for found in alone if (*found.epoch_key, found.first) in going and found not in settled]

    def _exchange(
        self,
        ids: Sequence[int],
        rows: Sequence[Row],
        receipted: Sequence[Place],
        settled: Sequence[Suspect],
        *,
        is_index_wrong: bool = False,
    ) -> None:
        """Take rows out, put others in and count, in one transaction."""
        counts: Counted = {}
        marks = self._marks.copy()
        with self._file.transaction():
            gone, sizes, is_astray = self._take_out(
                {number: self._indexed.get(number) for number in ids}, marks, counts
            )
            if ids:
                # Before they go: a cut between the two must not show as missing what is on record as lost.
                self._marks_file.write(marks)
            places = {place.id: (*place.epoch_key, place.sequence) for place in receipted}
            _, more, is_one_astray = self._take_out(places, marks, {})
            sizes += more
            if is_index_wrong or is_astray or is_one_astray:
                self._db.execute("REINDEX block")
            self._staying = marks.copy()
            identities = {row.identity for row in rows}
            for suspect in settled:
                self._db.execute(SETTLE, (*suspect.epoch_key, suspect.first))
                if suspect.lost_signal and (identity := (*suspect.epoch_key, suspect.first)) in identities:
                    gone[identity] = 0
                    _count(counts, (suspect.device, suspect.lost_signal), lost=-suspect.samples)
            for number, row in enumerate(rows, start=self._holding.last_id + 1):
                self._db.execute(INSERT, values(number, row))
                again = row.identity in gone
                _count(counts, row.key, blocks=int(not again), samples=row.samples - gone.get(row.identity, 0))
                _count(counts, (row.device, row.lost_signal), lost=row.lost)
                marks.add(row)
            self._db.executemany(COUNT, [(*key, *count) for key, count in counts.items() if any(count)])
        marks.count(counts)
        self._marks, self._staying = marks, None
        for number in ids:
            self._indexed.pop(number, None)
        before = self._holding
        self._holding = Holding(
            before.rows + len(rows) - len(sizes),
            before.size + sum(row.size for row in rows) - sum(sizes),
            before.last_id + len(rows),
        )

    def _take_out(
        self, identities: Mapping[int, Identified | None], marks: Marks, counts: Counted
    ) -> tuple[dict[Identified, int], list[int], bool]:
        """Identities with their samples, and sizes, of the rows that go; and whether one said that it was another.

        That takes the index entry of the other one along. `identities`: by id, as others than the row know them.
        """
        gone: dict[Identified, int] = {}
        sizes: list[int] = []
        is_astray = False
        for number, identity in identities.items():
            for columns in self._db.execute(TAKE_OUT, (number,)).fetchall():
                _, *about = typed(columns)
                is_astray |= identity not in {None, tuple(about[:4])}
                held = marks.known(Held(number, *(identity or about[:4]), *about[4:]))
                sizes.append(held.size)
                gone[*held.epoch_key, held.sequence] = held.samples
                marks.take(held.epoch_key, held.sequence, held.samples + held.lost)
                _count(counts, (held.device, held.lost_signal), lost=-held.lost)
        return gone, sizes, is_astray

    def _not_carried_out(self, rows: Sequence[Row], ids: Sequence[int]) -> list[Row]:
        """Those rows that a step of which the outcome was not known did not bring in."""
        new = []
        for row in rows:
            device, signal, epoch, sequence = row.identity
            there = self._db.execute(FIND, (epoch, sequence, sequence, device, signal)).fetchone()
            if there is None or there[0] in ids:
                new.append(row)
        return new

    # --- reading

    @property
    def _db(self) -> sqlite3.Connection:
        return self._file.db

    def _read(self, query: str, arguments: Sequence[object] = ()) -> list[Any]:
        if not self._read_only:
            self._mend()
        with self._file.mapped("read"):
            return self._db.execute(query, arguments).fetchall()

    def _rows(self, query: str, arguments: Sequence[object]) -> list[StoredRow | DamagedRow]:
        told = set(self._indexed)
        found = [checked(columns, self._indexed_identity) for columns in self._read(query, arguments)]
        rows = [DamagedRow(self._marks.known(row.held)) if isinstance(row, DamagedRow) else row for row in found]
        # Once for each damaged row: of a large file the look takes seconds.
        is_new = any(isinstance(row, DamagedRow) and row.held.id not in told for row in rows)
        if is_new and not self._read_only:
            with self._file.mapped("look at"):
                is_sound = self._is_sound()
            if not is_sound:
                self._file.is_broken = self._file.is_in_doubt = True
                hint = "what is intact in it goes into a new file"
                raise UnavailableError(f"outbox {self.path} is damaged", hint=hint)
        return rows

    def _is_sound(self) -> bool:
        """Whether rows can be found by their ids: damage there would hide others that are intact."""
        if self.path.stat().st_size > LOOK_BYTES_MAX:
            log.warning("outbox %s has a damaged row, and is too large to be looked at whole", self.path)
            return True
        return all(text == "ok" or "index" in text for (text,) in self._db.execute("PRAGMA quick_check"))

    def _indexed_identity(self, number: int) -> Sequence[Any] | None:
        rows = self._read(INDEXED_IDENTITY, (number,))
        if not rows:
            return None
        device, signal, epoch, sequence = typed((number, *rows[0]))[1:]
        self._indexed[number] = (device, signal, epoch, sequence)
        return self._indexed[number]

    def _tallies(self) -> Mapping[StreamKey, Tally]:
        rows = self._db.execute(TALLIES).fetchall()
        return {(device, signal): Tally(*numbers) for device, signal, *numbers in rows}


Identified = tuple[str, str, str, int]
"""Device serial, signal, epoch and sequence of a row."""
Counted = dict[StreamKey, tuple[int, int, int]]
"""Blocks, samples accepted and samples lost that a step adds to each tally."""


def _count(counts: Counted, key: StreamKey, *, blocks: int = 0, samples: int = 0, lost: int = 0) -> None:
    before = counts.get(key, (0, 0, 0))
    counts[key] = (before[0] + blocks, before[1] + samples, before[2] + lost)
