"""A gateway's disk: the real SQLite outbox in files in memory, watched from both sides.

Every step of the outbox runs at one moment of virtual time, so what is in the files at a power cut is what was
committed by then: a copy of them is the disk that the next start finds.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gateway.errors import UnavailableError
from gateway.samples import LOSS
from gateway.spool.sqlite_store import SqliteStore
from gateway.spool.store import Place, Row, StoredRow, Suspect
from tests.simulation.books import Block, Books
from tests.simulation.host import Host

ROWS_MAX = 1 << 20


class Disk:
    """What lasts from one start of a gateway to the next."""

    def __init__(self, folder: Path, gateway: str, books: Books) -> None:
        self.gateway = gateway
        self.books = books
        self.refusals = 0
        """Reasons why nothing can be written."""
        self.written = asyncio.Event()
        """Set for a moment at each commit."""
        self._folder = folder
        self._starts = 0
        self._open: WatchedStore | None = None
        self._backup_rows: set[Block] = set()

    @property
    def folder(self) -> Path:
        """Where the outbox is, from one power cut to the next."""
        return self._folder / f"{self._starts}"

    @property
    def survivor(self) -> Path:
        """What a power cut leaves: all that was written."""
        return self.folder

    def store(self, host: Host) -> WatchedStore:
        """The outbox as this start finds it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._open = WatchedStore(self, host, SqliteStore(self.folder / "outbox.db"))
        return self._open

    def cut_power(self) -> None:
        """What is written so far is what the next start finds; what the dying one still does is not."""
        before, left = self.folder, self.survivor
        self._starts += 1
        shutil.copytree(left, self.folder)
        if self._open is not None:
            self._open.inner.close()
        shutil.rmtree(before)

    def back_up(self) -> None:
        """Keep a copy, as an operator may."""
        shutil.rmtree(self._backup, ignore_errors=True)
        shutil.copytree(self.folder, self._backup)
        self._backup_rows = self._here()

    def restore(self) -> None:
        """The copy takes the disk's place; only while the machine is off."""
        self.books.destroyed(self.gateway, self._here() - self._backup_rows)
        shutil.rmtree(self.folder)
        shutil.copytree(self._backup, self.folder)

    def wipe(self) -> None:
        """Somebody deletes the outbox; only while the machine is off."""
        self.books.destroyed(self.gateway, self._here())
        shutil.rmtree(self.folder)

    @property
    def _backup(self) -> Path:
        return self._folder / "backup"

    def _here(self) -> set[Block]:
        return set() if self._open is None else {row.identity for row in self._open.rows.values()}


class WatchedStore:
    """A `Store` that tells the books what became durable, at the moment when it did."""

    def __init__(self, disk: Disk, host: Host, inner: SqliteStore) -> None:
        self.inner = inner
        self.disk = disk
        self._host = host
        self.rows: dict[int, Row] = {}

    def __getattr__(self, name: str) -> Any:
        self._check()
        return getattr(self.inner, name)

    @property
    def epoch(self) -> str:
        return self.inner.epoch

    def open(self) -> None:
        self._check()
        self.inner.open()
        found = [*self.inner.fetch(0, ROWS_MAX, ROWS_MAX), *self.inner.unstamped(ROWS_MAX)]
        self.rows = {stored.id: stored.row for stored in found if isinstance(stored, StoredRow)}
        self.disk.books.opened(self.disk.gateway, list(self.rows.values()))

    def append(self, rows: Sequence[Row]) -> None:
        self.replace((), rows)

    def replace(
        self,
        ids: Sequence[int],
        rows: Sequence[Row],
        receipted: Sequence[Place] = (),
        settled: Sequence[Suspect] = (),
    ) -> None:
        self._check()
        if self.disk.refusals:
            raise UnavailableError("no space left on device")
        self.write(ids, rows, receipted, settled)
        gone = [row for number in ids if (row := self.rows.pop(number, None)) is not None]
        again = {row.identity for row in rows}
        safe = [row for place in receipted if (row := self.rows.pop(place.id, None)) is not None]
        last = self.inner.holding().last_id
        self.rows.update(zip(range(last - len(rows) + 1, last + 1), rows, strict=True))
        books, gateway = self.disk.books, self.disk.gateway
        books.given_up(gateway, [row for row in gone if row.identity not in again])
        books.withdrawn([row for row in gone if row.signal == LOSS])
        books.forgotten(gateway, safe)
        books.accepted(gateway, rows)
        if rows:
            self.disk.written.set()  # wakes who waits
            self.disk.written.clear()

    def write(
        self, ids: Sequence[int], rows: Sequence[Row], receipted: Sequence[Place], settled: Sequence[Suspect]
    ) -> None:
        """One step of the real store."""
        if ids or receipted or settled:
            self.inner.replace(ids, rows, receipted, settled)
        else:
            self.inner.append(rows)

    def close(self) -> None:
        if not self._host.is_dead:
            self.inner.close()

    def _check(self) -> None:
        if self._host.is_dead:
            raise UnavailableError("the machine has no power")
