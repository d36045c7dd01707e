"""Anything may happen to the clocks: what is sent as synced is true to within its bound, and no time ever turns back.

The real clock, assemblers, timekeeper and codec in simulated time, against the true time of every sample; the outbox
is a list.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.anchor import Anchor, Source
from gateway.clock import CONFIRM_NS, STEP_NS
from gateway.devices.base import Samples, SignalSpec
from gateway.kernel_clock import Discipline
from gateway.samples import (
    BRAIN_STATE,
    BRAIN_STATE_PERIOD_NS,
    EEG,
    LOSS,
    NS_PER_S,
    ClockState,
    LossRecord,
    SampleBlock,
)
from gateway.segments import Segments
from gateway.settings import Device
from gateway.spool.store import Row, identity
from gateway.timekeeper import Timekeeper
from gateway.wire import codec
from tests.gateway.machine import MS, UNSYNCED, Machine

GATEWAY = "gw-time"
RATE_HZ = 250
SPEC = SignalSpec(EEG, float(RATE_HZ), ("C3", "C4"), ("uV", "uV"))
PERIOD_NS = NS_PER_S // RATE_HZ
HOLD_S = 25.0
CONFIRM_S = CONFIRM_NS // NS_PER_S
POLL_S = 8
NTP = Discipline(ClockState.SYNCED, 10 * MS)
LONG_NS = 40 * 365 * 86_400 * NS_PER_S


@dataclass
class ListedOutbox:
    """Rows as the outbox has them, and what has gone out."""

    held: list[Row] = field(default_factory=list)
    sent: list[Row] = field(default_factory=list)
    epoch: int = 0
    next: dict[tuple[str, int], int] = field(default_factory=lambda: defaultdict(int))

    def append(self, content: SampleBlock | LossRecord, boot: str = "", offset_ns: int = 0) -> None:
        signal = LOSS if isinstance(content, LossRecord) else content.signal
        number = self.next[signal, self.epoch]
        self.next[signal, self.epoch] += 1
        who = codec.Identity(GATEWAY, content.device, signal, f"e{self.epoch}", number)
        row = Row(
            *(content.device, signal, who.epoch, number, content.first_ns, content.last_ns, 1, 0, ""),
            codec.encode(who, content),
            boot,
            offset_ns,
        )
        (self.held if boot else self.sent).append(row)

    async def stamp(self, final: Callable[[Row], Row], limit: int) -> int:
        some, self.held = self.held[:limit], self.held[limit:]
        self.sent += [final(row) for row in some]
        return len(some)

    async def commit(self) -> None:
        return None


class World:
    """A machine, a headset on it, and a gateway process."""

    def __init__(self, folder: Path, machine: Machine, hold_s: float) -> None:
        self.folder = folder
        self.machine = machine
        self.hold_s = hold_s
        self.outbox: Any = ListedOutbox()
        self.true_ns: list[int] = []
        """Of every sample that was taken, by the number that is in it."""
        self.online = True
        self.boots = 0
        self.discipline_error_ns = 0
        self.polled_s_ago = 0
        self.is_lying = False
        self.start()

    def start(self) -> None:
        """A gateway process begins."""
        self.outbox.epoch += 1
        self.keeper = Timekeeper(
            self.outbox,
            GATEWAY,
            self.folder,
            hold_s=self.hold_s,
            is_online=lambda: self.online,
            boot=f"boot-{self.boots}",
            host=lambda **options: self.machine.clock(**{k: v for k, v in options.items() if k != "boot_ns"}),
        )
        self.clock = self.keeper.clock
        self.newest: dict[str, int] = {}
        self.number = 0
        self.connect()

    def connect(self) -> None:
        """The headset is connected; its samples are counted from 0."""
        device = Device(driver="cyton", serial="C-1", port="/dev/x")
        decoder: Any = SimpleNamespace(signals=(SPEC,))
        self.segments = Segments(device, decoder, self.clock, self._emit, lambda *_: None, self._begin)
        self.clock.on_break[:] = [self.segments.finish]
        self.index = 0

    def disconnect(self) -> None:
        self.segments.finish()

    def _begin(self) -> tuple[int, dict[str, int]]:
        self.number += 1
        return self.number, {signal: ns + self.clock.shift_ns for signal, ns in self.newest.items()}

    def _emit(self, content: SampleBlock | LossRecord) -> None:
        if isinstance(content, SampleBlock):
            self.newest[content.signal] = content.last_ns - self.clock.shift_ns
        self.keeper.accept(content)

    async def second(self) -> None:
        """A second of samples, and what the gateway does in it."""
        machine = self.machine
        before_ns = machine.true_ns
        machine.run(1)
        self.discipline()
        values = np.arange(len(self.true_ns), len(self.true_ns) + RATE_HZ, dtype=np.int32)
        self.true_ns += [before_ns + (k + 1) * PERIOD_NS for k in range(RATE_HZ)]
        columns = {"C3": values, "C4": (values * 7919) % 1009}
        self.segments.take(Samples(EEG, self.index, columns, machine.monotonic(), {"C3": 1.0, "C4": 1.0}))
        self.index += RATE_HZ
        await self.turn()

    def discipline(self) -> None:
        """As the kernel and its time service: the bound grows by 500 ppm until the next poll."""
        if self.machine.said.state is not ClockState.SYNCED or self.is_lying:
            return
        self.polled_s_ago += 1
        if self.polled_s_ago >= POLL_S:
            self.poll()
        self.machine.said = Discipline(ClockState.SYNCED, NTP.error_ns + self.polled_s_ago * MS // 2)

    def poll(self) -> None:
        self.polled_s_ago = 0
        self.machine.offset = self.machine.right_offset + self.discipline_error_ns

    async def turn(self) -> None:
        await self.keeper.turn(1.0)
        if not self.clock.is_held:
            await self.keeper.put_right()

    async def run(self, seconds: int) -> None:
        for _ in range(seconds):
            await self.second()


def content_of(row: Row) -> Any:
    return codec.decode(row.payload.data, row.payload.content_type).content


def check(world: World) -> None:
    """Everything is there once, in order, evenly apart, and as true as it says."""
    blocks: dict[str, list[SampleBlock]] = defaultdict(list)
    for row in sorted(world.outbox.sent, key=lambda row: (int(row.epoch[1:]), row.sequence)):
        who, content = identity(GATEWAY, row), content_of(row)
        assert codec.decode(row.payload.data).identity == who
        assert not row.boot
        blocks[row.signal].append(content)
    raw = blocks[EEG]
    numbers = np.concatenate([block.columns["C3"] for block in raw])
    assert np.array_equal(np.sort(numbers), np.arange(len(numbers)))
    for block in raw:
        if block.clock.state is ClockState.SYNCED:
            true_ns = np.array([world.true_ns[number] for number in block.columns["C3"]])
            assert np.abs(block.times_ns - true_ns).max() <= block.clock.error_ns
    for signal in (EEG, BRAIN_STATE):
        times = np.concatenate([block.times_ns for block in blocks[signal]] or [np.zeros(0, np.int64)])
        assert (np.diff(times) > 0).all(), f"{signal} turns back"
    runs: dict[str, dict[tuple[str, int], list[int]]] = {EEG: defaultdict(list), BRAIN_STATE: defaultdict(list)}
    for row in world.outbox.sent:
        block = content_of(row)
        runs[row.signal][row.epoch, block.segment] += block.times_ns.tolist()
    for run, times_of_run in runs[EEG].items():
        span_ns = max(times_of_run) - min(times_of_run)
        expected_ns = (len(times_of_run) - 1) * PERIOD_NS
        assert abs(span_ns - expected_ns) <= 6e-3 * expected_ns, "samples of a run are evenly apart"
        states = np.sort(np.array(runs[BRAIN_STATE][run]))
        assert (np.diff(states) == BRAIN_STATE_PERIOD_NS).all(), "200 ms, no gap and no double"
        assert len(states) >= (span_ns - 2 * NS_PER_S) // BRAIN_STATE_PERIOD_NS


seconds = st.integers(1, 18)
offsets = st.one_of(
    st.sampled_from([-3_600 * NS_PER_S, 86_400 * NS_PER_S, NS_PER_S, -NS_PER_S]),
    st.integers(-5 * NS_PER_S, 5 * NS_PER_S),
    st.integers(-LONG_NS, LONG_NS),
)
happenings = st.one_of(
    st.tuples(st.just("set"), offsets),
    st.tuples(st.just("sync"), st.integers(-10 * MS, 10 * MS)),
    st.tuples(st.just("lose_sync"), st.just(0)),
    st.tuples(st.just("wild"), offsets),
    st.tuples(st.just("bridge"), st.integers(-30 * MS, 30 * MS)),
    st.tuples(st.just("sleep"), st.integers(1, 5_000)),
    st.tuples(st.just("reconnect"), st.integers(0, 3)),
    st.tuples(st.just("online"), st.integers(0, 1)),
    st.tuples(st.just("restart"), st.integers(0, 5)),
)


async def happen(world: World, what: str, value: int) -> None:
    machine = world.machine
    match what:
        case "set":  # a hand on the clock; the kernel forgets its discipline
            machine.offset = max(machine.offset + value, -machine.boot)
            machine.said = UNSYNCED
        case "sync":
            world.discipline_error_ns = value
            machine.said = NTP
            world.poll()
        case "lose_sync":
            machine.said = UNSYNCED
        case "wild" if machine.said.state is ClockState.SYNCED and abs(value) > 2 * STEP_NS:
            # the time service errs, until it notices
            world.is_lying = True
            machine.offset += value
            await world.run(CONFIRM_S - 2)
            machine.offset -= value
            world.is_lying = False
        case "bridge":
            world.clock.learn(Anchor(machine.right_offset + value, 31 * MS, machine.boot, Source.BRIDGE))
        case "sleep":
            machine.sleep(value)
            await world.turn()
        case "reconnect":
            world.disconnect()
            machine.run(value)
            world.connect()
        case "restart":  # the gateway's process ends in good order, and another one begins
            world.disconnect()
            machine.run(value)
            await asyncio.to_thread(world.start)  # it reads what is remembered
            await world.keeper._remember()
        case "online":
            world.online = bool(value)


async def live(world: World, life: list[tuple[tuple[str, int], int]]) -> None:
    for (what, value), pause in life:
        await happen(world, what, value)
        await world.run(pause)
    world.disconnect()
    # in the end somebody tells the time, for what still waits
    await happen(world, "sync", 0)
    for _ in range(CONFIRM_S + 3):
        world.machine.run(1)
        world.discipline()
        await world.turn()
    assert world.outbox.held == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    first=st.one_of(st.just(0), offsets),
    drift_ppm=st.sampled_from([0.0, 45.0, -45.0]),
    begins_synced=st.booleans(),
    hold_s=st.sampled_from([HOLD_S, HOLD_S, 0.0]),
    life=st.lists(st.tuples(happenings, seconds), min_size=1, max_size=7),
)
def test_what_is_synced_is_true_and_no_time_turns_back(
    first: int, drift_ppm: float, begins_synced: bool, hold_s: float, life: list[tuple[tuple[str, int], int]]
) -> None:
    machine = Machine(drift_ppm=drift_ppm)
    if begins_synced:
        machine.said = NTP
    else:
        machine.said, machine.offset = UNSYNCED, max(machine.offset + first, -machine.boot)
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), machine, hold_s)
        asyncio.run(live(world, life))
        check(world)
