"""Devices that do not wait: blocks for a running outbox, numbered, at a steady pace, whatever becomes of them."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable

from gateway.errors import UnavailableError
from gateway.spool.outbox import Outbox
from gateway.spool.store import StreamKey
from tests.faults.witness import ALL, STREAMS, Told, block

PACE_S = 0.002
"""Between two blocks of a stream."""
ROWS_MAX = 30
"""That a cloud takes at a time."""
STORED_SHARE = 0.2


class Devices:
    """Give a block of every stream again and again, whatever becomes of it."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self.made: Counter[StreamKey] = Counter()

    async def run(self) -> None:
        while True:
            for stream in STREAMS:
                self._outbox.append(block(stream, self.made[stream]))
                self.made[stream] += 1
            await asyncio.sleep(PACE_S)


class Cloud:
    """Stores rows that are there, a few at a time, and says so with a receipt."""

    def __init__(self, outbox: Outbox, told: Told) -> None:
        self._outbox = outbox
        self._told = told
        self._draw = random.Random(5)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(10 * PACE_S)
            with contextlib.suppress(UnavailableError):
                await self._store_some()

    async def _store_some(self) -> None:
        rows = await self._outbox.fetch(0, ALL, ROWS_MAX)
        for row in rows:
            self._told.show(row)
        for row in rows:
            if self._draw.random() < STORED_SHARE:
                who = self._outbox.identity_of(row.row)
                self._told.receipt(row)
                await self._outbox.forget(who.device, who.signal, who.epoch, [(who.sequence, who.sequence)])


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110 - what these conditions wait for has no event of its own
        await asyncio.sleep(PACE_S)


@contextlib.asynccontextmanager
async def running(outbox: Outbox, told: Told | None = None) -> AsyncIterator[Devices]:
    """The outbox open and at work, with devices; at the end the devices are quiet, and all is committed.

    With something to be told, there is also a cloud.
    """
    await outbox.open()
    devices = Devices(outbox)
    at_work = [asyncio.create_task(devices.run()), asyncio.create_task(outbox.run())]
    if told is not None:
        at_work.append(asyncio.create_task(Cloud(outbox, told).run()))
    try:
        yield devices
    finally:
        for task in at_work:
            task.cancel()
        failed = [end for end in await asyncio.gather(*at_work, return_exceptions=True) if isinstance(end, Exception)]
    assert failed == []
    await outbox.commit()
