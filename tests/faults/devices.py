"""Devices that do not wait: blocks for a running outbox, numbered, at a steady pace, whatever becomes of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable

from gateway.spool.outbox import Outbox
from gateway.spool.store import StreamKey
from tests.faults.witness import STREAMS, block

PACE_S = 0.002
"""Between two blocks of a stream."""


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


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110 - what these conditions wait for has no event of its own
        await asyncio.sleep(PACE_S)


@contextlib.asynccontextmanager
async def running(outbox: Outbox) -> AsyncIterator[Devices]:
    """The outbox open and at work, with devices; at the end the devices are quiet, and all is committed."""
    await outbox.open()
    devices = Devices(outbox)
    at_work = [asyncio.create_task(devices.run()), asyncio.create_task(outbox.run())]
    try:
        yield devices
    finally:
        for task in at_work:
            task.cancel()
        failed = [end for end in await asyncio.gather(*at_work, return_exceptions=True) if isinstance(end, Exception)]
    assert failed == []
    await outbox.commit()
