"""Hours of outbox and sender in virtual time, with outages of the broker: memory, descriptors and tasks stay flat.

Half an hour in the suite; eight with WARDLINK_LONG=1.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import psutil
import pytest

from gateway.errors import UnavailableError
from gateway.mqtt import MqttSession, Outbound
from gateway.samples import BRAIN_STATE, BRAIN_STATE_FIELDS, EEG, NS_PER_S, VITAL_SIGNS, SampleBlock
from gateway.spool.outbox import Outbox
from gateway.spool.sqlite_store import SqliteStore
from gateway.uplink.sender import Sender
from gateway.uplink.window import Window
from gateway.wire import codec
from tests.faults.witness import CLOCK, GATEWAY, NOON_NS
from tests.simulation.virtual_loop import VirtualLoop

pytestmark = pytest.mark.faults

HOURS = 0.5
HOURS_LONG = 8.0
HOURS_OF_CONTROL = 0.25
WARM_SHARE = 0.4
"""Of the time: caches, allocators and files have taken what they take."""
OUTAGE_EVERY_S = 300.0
OUTAGE_S = 60.0
"""So there is backlog again and again, and resends."""
ACKNOWLEDGED_AFTER_S = 0.05
RECEIPTED_AFTER_S = 0.4
RECEIPT_LOST_EVERY = 50
GROWTH_BYTES_MAX = 2_000_000
FILE_BYTES_MAX = 16 << 20
CHANNELS = [f"ch{number}" for number in range(8)]


@pytest.fixture(autouse=True)
def no_blocking_calls() -> None:
    """In the virtual loop the outbox's thread is the loop's own: what blocks there is meant to."""


class ModelSession:
    """An MQTT session whose broker and bridge take a while, are away now and then, and lose a receipt now and then."""

    def __init__(self, outbox: Outbox) -> None:
        self.connected = asyncio.Event()
        self.connected.set()
        self.sender: Sender | None = None
        self.published = 0
        self._outbox = outbox
        self._under_way: set[asyncio.Future[None]] = set()
        self._receipts: set[asyncio.Task[None]] = set()

    def publish(self, message: Outbound) -> asyncio.Future[None]:
        if not self.connected.is_set():
            raise UnavailableError("the broker is away")
        loop = asyncio.get_running_loop()
        acknowledged: asyncio.Future[None] = loop.create_future()
        self._under_way.add(acknowledged)
        acknowledged.add_done_callback(self._under_way.discard)
        loop.call_later(ACKNOWLEDGED_AFTER_S, self._acknowledge, acknowledged)
        self.published += 1
        if self.published % RECEIPT_LOST_EVERY:
            loop.call_later(RECEIPTED_AFTER_S, self._receipt, message)
        return acknowledged

    def away(self, *, is_away: bool) -> None:
        if not is_away:
            self.connected.set()
            if self.sender is not None:
                self.sender.wake()
            return
        self.connected.clear()
        for future in list(self._under_way):
            if not future.done():
                future.set_exception(UnavailableError("the broker went away"))

    @staticmethod
    def _acknowledge(acknowledged: asyncio.Future[None]) -> None:
        if not acknowledged.done():
            acknowledged.set_result(None)

    def _receipt(self, message: Outbound) -> None:
        if self.connected.is_set():
            task = asyncio.get_running_loop().create_task(self._forget(message))
            self._receipts.add(task)
            task.add_done_callback(self._receipts.discard)

    async def _forget(self, message: Outbound) -> None:
        who = codec.decode(message.payload, message.content_type).identity
        gone = await self._outbox.forget(who.device, who.signal, who.epoch, [(who.sequence, who.sequence)])
        assert self.sender is not None
        self.sender.receipted(gone)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a process takes."""

    memory_bytes: int
    descriptors: int
    tasks: int

    @classmethod
    def take(cls) -> Reading:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is free again is no growth
        process = psutil.Process()
        return cls(process.memory_info().rss, process.num_fds(), len(asyncio.all_tasks()))


def second(number: int) -> list[SampleBlock]:
    """What a headset and a strap give in the k-th second."""
    begin_ns = NOON_NS + number * NS_PER_S
    raw = {name: np.arange(250, dtype=np.int32) * (k + 1) + number for k, name in enumerate(CHANNELS)}
    state = {name: np.full(5, 0.1) for name in BRAIN_STATE_FIELDS}
    pulse = {"heart_rate": np.array([70.0])}
    return [
        SampleBlock("CYTON-1", EEG, times(begin_ns, 250), raw, CLOCK, scales=dict.fromkeys(CHANNELS, 0.02235)),
        SampleBlock("CYTON-1", BRAIN_STATE, times(begin_ns, 5), state, CLOCK),
        SampleBlock("STRAP-1", VITAL_SIGNS, times(begin_ns, 1), pulse, CLOCK),
    ]


def times(begin_ns: int, count: int) -> np.ndarray:
    return begin_ns + np.arange(count, dtype=np.int64) * (NS_PER_S // count)


async def soak(folder: Path, hours: float, leak: Callable[[object], object] = lambda _: None) -> list[Reading]:
    """Hours of work, read after the warm-up and at the end, each time at rest."""
    outbox = Outbox(SqliteStore(folder / "outbox.db"), GATEWAY)
    await outbox.open()
    session = ModelSession(outbox)
    window = Window(delay_s=0.5, bytes_max=256 << 10)
    sender = Sender(outbox, cast("MqttSession", session), GATEWAY, window=window, resend_after_s=60.0)
    session.sender, sender.bridge_present = sender, True
    outbox.on_commit = sender.wake
    at_work = [asyncio.create_task(outbox.run()), asyncio.create_task(sender.run())]
    seconds, readings = round(hours * 3600), []
    for number in range(seconds + 1):
        if number in (round(seconds * WARM_SHARE), seconds):
            session.away(is_away=False)
            await outbox.commit()
            await outbox.empty.wait()
            readings.append(Reading.take())
        session.away(is_away=number % OUTAGE_EVERY_S > OUTAGE_EVERY_S - OUTAGE_S)
        for block in second(number):
            outbox.append(block)
            leak(block)
        await asyncio.sleep(1.0)
    assert not any(task.done() for task in at_work)
    for task in at_work:
        task.cancel()
    await asyncio.gather(*at_work, return_exceptions=True)
    assert sender.resent > 0
    await outbox.close()
    return readings


def readings_of(
    folder: Path, hours: float, leak: Callable[[object], object] = lambda _: None
) -> tuple[Reading, Reading]:
    with asyncio.Runner(loop_factory=lambda: VirtualLoop("soak")) as runner:
        warm, end = runner.run(soak(folder, hours, leak))
    print(f"warm {warm}, at the end {end}")
    assert sum(file.stat().st_size for file in folder.iterdir()) < FILE_BYTES_MAX
    return warm, end


@pytest.mark.timeout(1200)
def test_nothing_grows(scratch: Path, is_long: bool) -> None:
    warm, end = readings_of(scratch, HOURS_LONG if is_long else HOURS)
    assert end.memory_bytes - warm.memory_bytes < GROWTH_BYTES_MAX
    assert end.descriptors == warm.descriptors
    assert end.tasks == warm.tasks


def test_control_what_is_kept_is_seen(scratch: Path) -> None:
    kept: list[object] = []

    def leak(block: object) -> None:
        kept.append(block)
        if len(kept) % 600 == 0:
            kept.append(os.open(os.devnull, os.O_RDONLY))
            kept.append(asyncio.create_task(asyncio.Event().wait()))

    warm, end = readings_of(scratch, HOURS_OF_CONTROL, leak)
    for descriptor in kept:
        if isinstance(descriptor, int):
            os.close(descriptor)
    assert end.memory_bytes - warm.memory_bytes > GROWTH_BYTES_MAX
    assert end.descriptors > warm.descriptors
    assert end.tasks > warm.tasks
