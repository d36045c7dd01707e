"""The disk fails under a running outbox, and works again: it goes on by itself, and every block is accounted for."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import UnavailableError
from gateway.spool import outbox as outbox_module
from gateway.spool.outbox import Limits, Outbox
from gateway.spool.sqlite_store import SqliteStore
from gateway.spool.store import Row
from tests.faults.devices import PACE_S, Devices, running, until
from tests.faults.mount import MountedDisk
from tests.faults.witness import ALL, GATEWAY, Found, Told, look, settle

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

FILE = Path("state") / "outbox.db"
LIMITS = Limits(commit_interval_s=0.02, commit_blocks=64)
BLOCKS_MEANWHILE = 150
"""Of all streams, that the devices give while the disk fails."""
BLOCKS_MEANWHILE_LONG = 5000
STALL_S_LONG = 30.0
PENDING_BYTES = 20_000
"""Small, so that a failing disk fills it."""
STEPS_FORGOTTEN = 3
"""By the control. What one failed step wrote may be found in the log when the file is opened again."""
QUOTA_BYTES = 30_000
GRACE_S = 10.0
"""For an event loop that is not held up to come round."""

FAULTS = {
    "disk full": {"blocks_left": 0},
    "disk full in the middle of a commit": {"blocks_left": 1},
    "EIO on every write": {"write_error": errno.EIO},
    "EIO on writes of the log": {"write_error": errno.EIO, "failing_name": "-wal"},
    "EIO on every fsync": {"sync_error": errno.EIO},
    "EIO on fsync of the log": {"sync_error": errno.EIO, "failing_name": "-wal"},
    "read-only": {"is_read_only": True},
}


class ForgetfulStore(SqliteStore):
    """The control: says that rows are stored when they are not."""

    forgotten = 0
    """Steps that failed and were said to be done."""

    def append(self, rows: Sequence[Row]) -> None:
        self._forget(super().append, rows)

    def replace(self, *arguments: Any) -> None:
        self._forget(super().replace, *arguments)

    def _forget(self, step: Callable[..., None], *arguments: Any) -> None:
        try:
            step(*arguments)
        except UnavailableError:
            self.forgotten += 1


async def account(outbox: Outbox, devices: Devices, path: Path, told: Told) -> None:
    """Every block that the devices made is stored or on record as lost; the same after a restart."""
    told.accepted = devices.made
    missed = await settle(outbox, told)
    (await look(outbox)).check(told)
    assert missed == 0, "rows are missed that went as they should"
    await outbox.close()
    again = Outbox(SqliteStore(path), GATEWAY, Limits(3600.0, ALL))
    await again.open()
    found: Found = await look(again, new_number=10_000)
    await again.close()
    found.check(told)


async def ride_out(
    disk: MountedDisk,
    store: SqliteStore,
    faults: dict[str, object],
    blocks: int,
    limits: Limits = LIMITS,
    is_felt: Callable[[], bool] = lambda: True,
) -> None:
    """A running outbox, a cloud that receipts, a fault that comes and goes once it is felt, and the account."""
    outbox, told = Outbox(store, GATEWAY, limits), Told()
    async with running(outbox, told) as devices:
        await until(lambda: outbox.holding.rows > 20)
        with disk.fault(**faults):
            enough = devices.made.total() + blocks
            await until(lambda: devices.made.total() >= enough and is_felt())
        last_id = outbox.holding.last_id
        await until(lambda: not outbox.problem and outbox.holding.last_id > last_id)
    await account(outbox, devices, store.path, told)


@pytest.fixture
def blocks(is_long: bool) -> int:
    return BLOCKS_MEANWHILE_LONG if is_long else BLOCKS_MEANWHILE


@pytest.mark.parametrize("name", FAULTS)
async def test_a_fault_comes_and_goes(disk: MountedDisk, name: str, blocks: int) -> None:
    await ride_out(disk, SqliteStore(disk.path / FILE), FAULTS[name], blocks)


@pytest.mark.parametrize("name", FAULTS)
async def test_a_fault_comes_while_blocks_are_shed(disk: MountedDisk, name: str, blocks: int) -> None:
    limits = Limits(LIMITS.commit_interval_s, LIMITS.commit_blocks, bytes_max=QUOTA_BYTES)
    await ride_out(disk, SqliteStore(disk.path / FILE), FAULTS[name], blocks, limits)


@pytest.mark.parametrize("name", FAULTS)
async def test_with_no_room_in_memory_either_the_losses_are_on_record(
    disk: MountedDisk, name: str, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "PENDING_BYTES_MAX", PENDING_BYTES)
    await ride_out(disk, SqliteStore(disk.path / FILE), FAULTS[name], blocks)


@pytest.mark.parametrize("name", FAULTS)
async def test_control_a_store_that_does_not_look_loses(disk: MountedDisk, name: str) -> None:
    store = ForgetfulStore(disk.path / FILE)
    with pytest.raises(AssertionError, match=r"accepted blocks lost|lost for no reason"):
        await ride_out(disk, store, FAULTS[name], BLOCKS_MEANWHILE, is_felt=lambda: store.forgotten >= STEPS_FORGOTTEN)


class HoldUp:
    """Holds up every fsync of a disk, and sees from outside whether somebody's event loop comes round meanwhile."""

    def __init__(self, disk: MountedDisk, rounds: Callable[[], int], grace_s: float) -> None:
        self._disk = disk
        self._rounds = rounds
        self._grace_s = grace_s
        self.loop_went_on = False

    def run(self, stall_s: float) -> None:
        """Blocking: in a thread of its own."""
        pause = threading.Event()
        with self._disk.stalled_sync():
            self._disk.await_stalled()
            enough = self._rounds() + 50
            pause.wait(stall_s)
            for _ in range(round(self._grace_s / PACE_S)):
                if self._rounds() >= enough:
                    self.loop_went_on = True
                    return
                pause.wait(PACE_S)


async def test_an_fsync_that_does_not_return_holds_up_nothing_else(disk: MountedDisk, is_long: bool) -> None:
    outbox = Outbox(SqliteStore(disk.path / FILE), GATEWAY, LIMITS)
    async with running(outbox) as devices:
        await until(lambda: outbox.holding.rows > 20)
        hold_up = HoldUp(disk, devices.made.total, GRACE_S)
        stalled = asyncio.create_task(asyncio.to_thread(hold_up.run, STALL_S_LONG if is_long else 0.0))
        await until(lambda: outbox.stalled_s() > 0 or stalled.done())
        await stalled
        assert hold_up.loop_went_on
        rows = outbox.holding.rows
        await until(lambda: outbox.holding.rows > rows)
    await account(outbox, devices, disk.path / FILE, Told())


async def test_control_an_fsync_in_the_event_loop_holds_it_up(disk: MountedDisk) -> None:
    rounds = 0

    async def write() -> None:
        nonlocal rounds
        with (disk.path / "file").open("wb", buffering=0) as file:
            while not stalled.done():
                file.write(b"x")
                os.fsync(file.fileno())
                rounds += 1
                await asyncio.sleep(PACE_S)

    hold_up = HoldUp(disk, lambda: rounds, 0.2)
    stalled = asyncio.create_task(asyncio.to_thread(hold_up.run, 0.0))
    await write()
    assert not hold_up.loop_went_on
