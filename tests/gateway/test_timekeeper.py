"""The timekeeper on a real outbox: held back, put right exactly, released at the deadline, the same after any crash."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gateway import clock_memory
from gateway.anchor import Anchor, Source
from gateway.clock import CONFIRM_NS, WIDEST_ERROR_NS
from gateway.errors import UnavailableError
from gateway.samples import NS_PER_S, VITAL_SIGNS, ClockState, LossCause, LossRecord, SampleBlock
from gateway.spool.outbox import Outbox
from gateway.spool.sqlite_store import SqliteStore
from gateway.spool.store import Row, StoredRow
from gateway.timekeeper import STAMPED_ROWS_MAX, Timekeeper
from gateway.wire import codec
from tests.gateway.machine import MS, SYNCED, TRUE_OFFSET_NS, UNSYNCED, Machine

GATEWAY = "gw-time"
HOUR_NS = 3_600 * NS_PER_S
CONFIRM_S = CONFIRM_NS // NS_PER_S
AXIS_ERROR_NS = 7 * MS


class Crash(BaseException):
    """The process is gone."""


class CrashingStore(SqliteStore):
    """Ends the process at the nth durable step: before it, or when it is done and nobody was told."""

    steps_left = 10**9
    crashes_before = True

    def append(self, rows: Sequence[Row]) -> None:
        self._step_of(lambda: super(CrashingStore, self).append(rows))

    def replace(self, ids: Sequence[int], rows: Sequence[Row]) -> None:
        self._step_of(lambda: super(CrashingStore, self).replace(ids, rows))

    def _step_of(self, step: Any) -> None:
        self.steps_left -= 1
        if self.steps_left == 0 and self.crashes_before:
            raise Crash
        step()
        if self.steps_left == 0:
            raise Crash


class Life:
    """A gateway process with a clock that is moved by hand."""

    def __init__(self, folder: Path, machine: Machine, *, boot: str = "boot-1", hold_s: float = 600.0) -> None:
        self.machine = machine
        self.store = CrashingStore(folder / "outbox.db")
        self.outbox = Outbox(self.store, GATEWAY)
        self.online = True
        self.keeper = Timekeeper(
            self.outbox,
            GATEWAY,
            folder,
            hold_s=hold_s,
            is_online=lambda: self.online,
            boot=boot,
            host=lambda **options: machine.clock(**_without(options, "boot_ns")),
        )
        self.clock = self.keeper.clock
        self.count = 0

    def reading(self) -> None:
        """A vital sign of this instant, whose value is the number of true ns since the machine's first boot."""
        at_ns = self.clock.now_ns()
        value = float(self.machine.true_ns - TRUE_OFFSET_NS)
        stamp = self.clock.stamp
        clock = type(stamp)(stamp.state, stamp.error_ns + AXIS_ERROR_NS)
        times = np.array([at_ns, at_ns + MS])
        columns = {"rr_interval": np.array([value, value + MS])}
        self.keeper.accept(SampleBlock("STRAP-1", VITAL_SIGNS, times, columns, clock, 3))

    def loss(self) -> None:
        at_ns = self.clock.now_ns()
        self.keeper.accept(LossRecord("STRAP-1", VITAL_SIGNS, LossCause.RADIO, at_ns, at_ns + 5, 2))

    async def run(self, seconds: int, *, readings: bool = True) -> None:
        """Live for a while, with a reading a second."""
        for _ in range(seconds):
            self.machine.run(1)
            if readings:
                self.reading()
            await self.keeper.turn(1.0)
            await self.outbox.commit()
            if self.keeper._may_wait and not self.clock.is_held:
                await self.keeper.put_right()

    async def sync(self) -> None:
        """The time service comes up, and is believed."""
        self.machine.said, self.machine.offset = SYNCED, self.machine.right_offset
        await self.run(CONFIRM_S + 1)

    async def sent(self) -> list[Row]:
        """What may be sent, in the order of its sequences."""
        rows = [item.row for item in await self._in_store(self.store.fetch, 0, 10**9, 10**6)]
        return sorted(rows, key=lambda row: (row.signal, row.epoch, row.sequence))

    async def waiting(self) -> list[Row]:
        return [item.row for item in await self._in_store(self.store.unstamped, 10**6)]

    async def _in_store(self, call: Any, *arguments: int) -> list[StoredRow]:
        found = await asyncio.to_thread(call, *arguments)
        assert all(isinstance(item, StoredRow) for item in found)
        return found  # type: ignore[no-any-return]

    async def close(self) -> None:
        self.store.steps_left = 10**9
        await self.outbox.close()


async def begin(folder: Path, machine: Machine, **options: Any) -> Life:
    """A process starts."""
    life = await asyncio.to_thread(Life, folder, machine, **options)  # it reads what is remembered
    await life.outbox.open()
    await life.keeper._remember()
    return life


def _without(options: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != name}


def block_of(row: Row) -> SampleBlock:
    content = codec.decode(row.payload.data, row.payload.content_type).content
    assert isinstance(content, SampleBlock)
    return content


def errors_ns(rows: list[Row]) -> list[int]:
    """Stated less true time of the first sample of each block."""
    return [block.first_ns - TRUE_OFFSET_NS - round(block.columns["rr_interval"][0]) for block in map(block_of, rows)]


def unsynced(wrong_ns: int = -HOUR_NS) -> Machine:
    return Machine(offset=TRUE_OFFSET_NS + wrong_ns, said=UNSYNCED)


@pytest.mark.parametrize("wrong_ns", [-HOUR_NS, HOUR_NS, -1_700_000_000 * NS_PER_S])
async def test_what_was_held_back_is_put_right_exactly_and_no_identity_changes(tmp_path: Path, wrong_ns: int) -> None:
    life = await begin(tmp_path, unsynced(wrong_ns))
    await life.run(100)
    life.loss()
    await life.outbox.commit()
    assert await life.sent() == []
    held = await life.waiting()
    assert {(row.boot, row.offset_ns) for row in held} == {("boot-1", TRUE_OFFSET_NS + wrong_ns)}
    assert life.keeper.waiting == 101 > STAMPED_ROWS_MAX
    await life.sync()
    assert await life.waiting() == []
    assert life.keeper.waiting == 0
    rows = [row for row in await life.sent() if row.signal == VITAL_SIGNS]
    assert [row.sequence for row in rows] == list(range(100 + CONFIRM_S + 1))
    assert errors_ns(rows) == [0] * len(rows)
    identities = {row.identity for row in held}
    assert identities <= {row.identity for row in await life.sent()}
    for row in rows:
        block = block_of(row)
        assert (row.first_ns, row.last_ns) == (block.first_ns, block.last_ns)
        assert block.segment == 3
        assert block.clock.state is ClockState.SYNCED
        assert AXIS_ERROR_NS + 3 * MS <= block.clock.error_ns < AXIS_ERROR_NS + 3 * MS + 12 * MS
    (loss,) = [row for row in await life.sent() if row.signal == "loss"]
    assert loss.first_ns == rows[99].first_ns
    tallies = await life.outbox.tallies()
    assert tallies["STRAP-1", VITAL_SIGNS].accepted == 2 * len(rows)
    assert tallies["STRAP-1", VITAL_SIGNS].lost == 2
    await life.close()


async def test_the_deadline_counts_only_while_the_broker_is_there(tmp_path: Path) -> None:
    life = await begin(tmp_path, unsynced(), hold_s=20.0)
    life.online = False
    await life.run(60)
    assert await life.sent() == []
    life.online = True
    await life.run(19)
    assert await life.sent() == []
    await life.run(1)
    rows = await life.sent()
    assert len(rows) == 80
    assert set(errors_ns(rows)) == {-HOUR_NS}
    assert {block_of(row).clock.state for row in rows} == {ClockState.UNSYNCED}
    assert {block_of(row).clock.error_ns for row in rows} == {UNSYNCED.error_ns + AXIS_ERROR_NS}
    await life.run(5)
    assert len(await life.sent()) == 85
    await life.sync()
    await life.run(1)
    assert errors_ns(await life.sent())[-1] == 0
    times = [row.first_ns for row in await life.sent()]
    assert times == sorted(times)
    await life.close()


async def test_never_held_where_that_is_wanted(tmp_path: Path) -> None:
    life = await begin(tmp_path, unsynced(), hold_s=0)
    await life.run(3)
    assert [block_of(row).clock.state for row in await life.sent()] == [ClockState.UNSYNCED] * 3
    await life.close()


async def test_a_disk_that_fails_while_times_are_put_right_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = await begin(tmp_path, unsynced())
    await life.run(5)
    replace = life.store.replace

    def full(_ids: Sequence[int], _rows: Sequence[Row]) -> None:
        raise UnavailableError("disk is full")

    monkeypatch.setattr(life.store, "replace", full)
    await life.sync()
    assert len(await life.waiting()) == 5 + CONFIRM_S + 1
    monkeypatch.setattr(life.store, "replace", replace)
    await life.run(1)
    assert await life.waiting() == []
    assert set(errors_ns(await life.sent())) == {0}
    await life.close()


@pytest.mark.parametrize("before", [True, False])
async def test_a_crash_at_any_durable_step_loses_and_doubles_nothing(tmp_path: Path, before: bool) -> None:
    """Whatever was stamped before the crash, and what the next process does with the rest: one run of even times."""
    appends, stamps = CONFIRM_S + 1, 3
    for step in range(appends - 1, appends + stamps + 2):
        folder = tmp_path / f"{step}"
        machine = unsynced()
        life = await begin(folder, machine)
        await life.run(70)
        life.store.steps_left, life.store.crashes_before = step, before
        crashed = False
        try:
            await life.sync()
        except Crash:
            crashed = True
        assert crashed == (step <= appends + stamps)
        count = life.store.holding().rows if not crashed else None
        life.store.close()
        life.outbox._thread.shutdown()
        again = await begin(folder, machine)
        await again.run(2, readings=False)
        assert await again.waiting() == []
        rows = await again.sent()
        assert [row.sequence for row in rows] == list(range(len(rows)))
        assert len(rows) >= 70
        assert count is None or len(rows) == count
        apart = np.diff([row.first_ns for row in rows])
        assert set(apart.tolist()) == {NS_PER_S}
        assert {block_of(row).clock.state for row in rows} == {ClockState.SYNCED}
        assert set(errors_ns(rows)) == {0}
        assert (await again.outbox.tallies())["STRAP-1", VITAL_SIGNS].accepted == 2 * len(rows)
        await again.close()


# --- over restarts


async def test_another_process_of_the_same_boot_puts_right_what_the_first_one_held(tmp_path: Path) -> None:
    machine = unsynced(HOUR_NS)
    first = await begin(tmp_path, machine)
    await first.run(10)
    await first.close()
    second = await begin(tmp_path, machine)
    assert second.clock.offset_ns == first.clock.offset_ns
    await second.run(10)
    await second.sync()
    assert set(errors_ns(await second.sent())) == {0}
    await second.close()


async def test_what_a_bridge_told_an_earlier_process_of_this_boot_still_holds(tmp_path: Path) -> None:
    machine = unsynced()
    first = await begin(tmp_path, machine)
    first.clock.learn(Anchor(machine.right_offset, 20 * MS, machine.boot, Source.BRIDGE))
    await first.run(1)
    await first.keeper._remember()
    await first.close()
    second = await begin(tmp_path, machine)
    assert second.clock.known.state is ClockState.SYNCED
    assert second.keeper.source is Source.BRIDGE
    await second.run(1)
    assert set(errors_ns(await second.sent())) == {0}
    await second.close()


async def test_a_boot_whose_time_was_known_is_put_right_in_the_next_one(tmp_path: Path) -> None:
    """The time came, was written down, and the power went before the blocks were put right."""
    machine = unsynced()
    first = await begin(tmp_path, machine)
    await first.run(10)
    machine.said, machine.offset = SYNCED, machine.right_offset
    machine.run(CONFIRM_S + 1, first.clock)
    await first.keeper._remember()
    await first.close()
    rebooted = Machine(offset=TRUE_OFFSET_NS, said=UNSYNCED)
    second = await begin(tmp_path, rebooted, boot="boot-2")
    await second.sync()
    rows = [row for row in await second.sent() if row.epoch != second.outbox.epoch]
    assert errors_ns(rows) == [0] * 10
    assert {block_of(row).clock.state for row in rows} == {ClockState.SYNCED}
    await second.close()


async def test_a_boot_that_nobody_told_the_time_lies_between_what_is_known(tmp_path: Path) -> None:
    """Synced; then a boot in 1970 without a network for an hour; then a synced one. It is marked, bounded, in order."""
    machine = Machine()
    first = await begin(tmp_path, machine)
    await first.run(5)
    await first.keeper._remember()
    await first.close()
    dark = Machine(offset=0, said=UNSYNCED, boot=5 * NS_PER_S)
    dark.true_elapsed = machine.true_elapsed + 2 * HOUR_NS
    dark.run(0)
    second = await begin(tmp_path, dark, boot="boot-2")
    assert second.clock.now_ns() >= first.clock.sent_through_ns - NS_PER_S
    true_start_ns = dark.true_ns
    for _ in range(60):
        dark.true_elapsed += NS_PER_S
        dark.boot += NS_PER_S
        second.reading()
    await second.outbox.commit()
    await second.keeper._remember()
    await second.close()
    bright = Machine(offset=dark.true_ns + HOUR_NS - 5 * NS_PER_S, said=SYNCED)
    bright.true_elapsed = dark.true_elapsed + HOUR_NS
    third = await begin(tmp_path, bright, boot="boot-3")
    await third.keeper.turn(1.0)
    await third.keeper.put_right()
    rows = [row for row in await third.sent() if row.epoch == second.outbox.epoch]
    assert len(rows) == 60
    first_rows = [row for row in await third.sent() if row.epoch == first.outbox.epoch]
    assert rows[0].first_ns > first_rows[-1].last_ns, "behind what went out before"
    assert rows[-1].last_ns < third.clock.now_ns(), "before this boot"
    assert set(np.diff([row.first_ns for row in rows]).tolist()) == {NS_PER_S}
    for row, error_ns in zip(rows, errors_ns(rows), strict=True):
        block = block_of(row)
        assert block.clock.state is ClockState.UNSYNCED
        assert abs(error_ns) <= block.clock.error_ns < 4 * HOUR_NS
    assert true_start_ns > first_rows[-1].last_ns
    await third.close()


async def test_a_boot_of_which_nothing_is_known_goes_out_with_the_widest_bound(tmp_path: Path) -> None:
    lost = await begin(tmp_path, Machine(offset=0, said=UNSYNCED))
    await lost.run(3)
    await lost.close()
    (tmp_path / clock_memory.FILE_NAME).unlink()
    after = await begin(tmp_path, Machine(), boot="boot-2")
    await after.run(1)
    rows = [row for row in await after.sent() if row.epoch != after.outbox.epoch]
    assert [block_of(row).clock.state for row in rows] == [ClockState.UNSYNCED] * 3
    assert {block_of(row).clock.error_ns for row in rows} == {WIDEST_ERROR_NS + AXIS_ERROR_NS}
    await after.close()


async def test_a_damaged_memory_is_said_and_begun_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / clock_memory.FILE_NAME).write_bytes(b'{"v": 1, "boots": [{"boot": 3}]}')
    life = await begin(tmp_path, Machine())
    assert "clock.json is damaged" in caplog.text
    await life.close()
    memory = await asyncio.to_thread(clock_memory.read, tmp_path)
    assert memory.of("boot-1") is not None


async def test_a_memory_that_cannot_be_written_holds_the_times_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A crash in the midst of stamping would else give the rest other times."""
    life = await begin(tmp_path, unsynced())
    await life.run(2)

    def no_room(*_: object) -> None:
        raise UnavailableError("no space left on device")

    with monkeypatch.context() as full:
        full.setattr("gateway.clock_memory.write", no_room)
        await life.sync()
        assert len(await life.waiting()) == 2 + CONFIRM_S + 1
    assert "no space left" in caplog.text
    await life.run(1)
    assert await life.waiting() == []
    await life.close()
