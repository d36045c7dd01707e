"""The power goes after every operation of the outbox: nothing that it accepted is lost, doubled, or named twice."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gateway.errors import UnavailableError, WardlinkError
from gateway.spool import sqlite_store
from gateway.spool.outbox import Limits, Outbox
from gateway.spool.sqlite_store import SqliteStore
from gateway.spool.store import Row
from tests.faults.cuts import Cut, Mode, cuts, without_folder_syncs
from tests.faults.devices import until
from tests.faults.mount import MountedDisk
from tests.faults.operations import FailedSync, Operation
from tests.faults.witness import ALL, GATEWAY, Told, look
from tests.faults.workload import Event, MakeStore, Workload, tell

pytestmark = pytest.mark.faults

FOLDER = "state"
FILE = "outbox.db"
ROUNDS = 18
ROUNDS_LONG = 60
MODES_DRAWN_LONG = 3
"""How often the modes that draw are drawn after each operation."""
CONTROL_ROUNDS = 4
"""A control has seen enough when it has seen one loss."""
FAILING_ROUNDS = 10
"""Rounds in which fsyncs fail; each failure costs a tenth of a second of waiting."""
FAILING_ROUNDS_LONG = 40
CHECKPOINT_PAGES = 64
"""Small, so that there are many checkpoints to cut."""
NEW_NUMBER = 5000
"""Of the blocks that are appended after the cut."""


class NormalStore(SqliteStore):
    """The control: a writer that syncs its log only at checkpoints."""

    def open(self) -> None:
        super().open()
        self._db.execute("PRAGMA synchronous = NORMAL")


@dataclass(slots=True)
class Toll:
    """What a series of cuts did."""

    looked_at: int = 0
    harmed: list[str] = field(default_factory=list)


class InterruptedWorkload(Workload):
    """Work on a disk of which many fsyncs fail, once each."""

    def __init__(self, disk: MountedDisk, make_store: MakeStore) -> None:
        super().__init__(disk.path / FOLDER / FILE, make_store, disk.mark, seed=3)
        self._disk = disk

    async def _commit(self, outbox: Outbox) -> None:
        commit = asyncio.create_task(outbox.commit())
        name = self._draw.choice(["", ".db", "-wal", None, None])
        if name is not None:
            with self._disk.fault(sync_error=errno.EIO, failing_name=name):
                await until(lambda: outbox.problem or commit.done())
        await commit


class CarelessStore(SqliteStore):
    """The control: takes a failed fsync for a success, and goes on without a look at the file."""

    def _mend(self) -> None:
        self._file.is_shaken = False
        super()._mend()

    def append(self, rows: Sequence[Row]) -> None:
        with contextlib.suppress(UnavailableError):
            super().append(rows)


def record_of(disk: MountedDisk, make_store: MakeStore, rounds: int) -> tuple[list[Operation], list[Event]]:
    workload = Workload(disk.path / FOLDER / FILE, make_store, disk.mark, seed=1)
    asyncio.run(workload.run(rounds))
    return disk.take_record(), workload.events


def take_toll(
    record: Sequence[Operation], events: Sequence[Event], modes: Sequence[Mode], modes_each: int, scratch: Path
) -> Toll:
    """Cut the power after every operation, in all modes or in so many of them, and open what is left."""
    toll, told, seen = Toll(), Told(), set()
    told_through = -1
    for cut in cuts(record, modes, seed=7, modes_each=modes_each):
        while told_through < cut.mark:
            told_through += 1
            tell(told, events[told_through])
        digest = digest_of(cut)
        if digest in seen:
            continue
        seen.add(digest)
        toll.looked_at += 1
        try:
            asyncio.run(survive(cut, told, scratch))
        except (AssertionError, WardlinkError) as error:
            toll.harmed.append(f"{cut}: {error}")
    return toll


def digest_of(cut: Cut) -> bytes:
    """The same files after the same promises need no second look."""
    digest = hashlib.blake2b(f"{cut.mark} {sorted(cut.folders)}".encode())
    for path, content in sorted(cut.files.items()):
        digest.update(f"{path} {len(content)} ".encode() + content)
    return digest.digest()


async def survive(cut: Cut, told: Told, scratch: Path) -> None:
    """Open what a cut left, by itself, and hold it against what was told."""
    root = scratch / "cut"
    for folder in sorted(cut.folders):
        (root / folder).mkdir()
    for path, content in cut.files.items():
        (root / path).write_bytes(content)
    outbox = Outbox(SqliteStore(root / FOLDER / FILE), GATEWAY, Limits(3600.0, ALL))
    try:
        await outbox.open()
        found = await look(outbox, NEW_NUMBER)
    finally:
        await outbox.close()
        shutil.rmtree(root)
    found.check(told)


@pytest.fixture(autouse=True)
def small_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_store, "_CHECKPOINT_PAGES", CHECKPOINT_PAGES)


@pytest.mark.timeout(1800)
def test_no_power_cut_costs_an_accepted_block(disk: MountedDisk, scratch: Path, is_long: bool) -> None:
    record, events = record_of(disk, SqliteStore, ROUNDS_LONG if is_long else ROUNDS)
    modes = [Mode.NONE, *(MODES_DRAWN_LONG if is_long else 1) * [Mode.PREFIX, Mode.SUBSET, Mode.TORN]]
    toll = take_toll(record, events, modes, 0 if is_long else 1, scratch)
    print(f"{toll.looked_at} disks after cuts in {len(record)} operations")
    assert toll.harmed == []
    assert toll.looked_at > len(record) // 2


def test_control_a_log_that_is_not_synced_loses(disk: MountedDisk, scratch: Path) -> None:
    record, events = record_of(disk, NormalStore, CONTROL_ROUNDS)
    toll = take_toll(record, events, [Mode.NONE], 1, scratch)
    print(f"{len(toll.harmed)} of {toll.looked_at} disks harmed, such as {toll.harmed[:1]}")
    assert any("accepted blocks lost" in harm for harm in toll.harmed)


def test_control_a_folder_that_is_not_synced_loses(disk: MountedDisk, scratch: Path) -> None:
    record, events = record_of(disk, SqliteStore, CONTROL_ROUNDS)
    toll = take_toll(without_folder_syncs(record), events, [Mode.NONE], 1, scratch)
    assert any("accepted blocks lost" in harm for harm in toll.harmed)


@pytest.mark.timeout(900)
def test_a_failed_fsync_and_then_a_power_cut_cost_nothing(disk: MountedDisk, scratch: Path, is_long: bool) -> None:
    workload = InterruptedWorkload(disk, SqliteStore)
    asyncio.run(workload.run(FAILING_ROUNDS_LONG if is_long else FAILING_ROUNDS))
    record = disk.take_record()
    assert sum(isinstance(operation, FailedSync) for operation in record) > FAILING_ROUNDS // 4
    toll = take_toll(record, workload.events, list(Mode), 0 if is_long else 1, scratch)
    print(f"{toll.looked_at} disks after cuts in {len(record)} operations")
    assert toll.harmed == []


def test_control_a_writer_that_ignores_a_failed_fsync_loses(disk: MountedDisk, scratch: Path) -> None:
    workload = InterruptedWorkload(disk, CarelessStore)
    asyncio.run(workload.run(FAILING_ROUNDS))
    toll = take_toll(disk.take_record(), workload.events, [Mode.NONE], 1, scratch)
    assert any("accepted blocks lost" in harm for harm in toll.harmed)
