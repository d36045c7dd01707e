"""A gateway's outbox and uplink in the test's own process, for rigs that do something to its network or its disk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.mqtt import Broker
from gateway.spool.outbox import Limits, Outbox
from gateway.spool.sqlite_store import SqliteStore
from gateway.uplink.uplink import Uplink
from gateway.uplink.window import Window

WINDOW_BYTES_MAX = 64 << 10
POINTS_A_BLOCK = 5


@dataclass
class Edge:
    """One gateway that runs, whose strap gives a block every 10 s since noon."""

    ward: Any
    name: str
    outbox: Outbox
    uplink: Uplink
    at: int

    def send(self, count: int) -> None:
        for _ in range(count):
            self.outbox.append(self.ward.vitals(first_ns=self.ward.noon_ns + self.at * 10**10, n=POINTS_A_BLOCK))
            self.at += 1


@asynccontextmanager
async def running_edge(
    ward: Any,
    name: str,
    folder: Path,
    *,
    port: int | None = None,
    resend_after_s: float = 60.0,
    at: int = 0,
    bytes_max: int = 1 << 30,
) -> AsyncIterator[Edge]:
    """Its next block is number `at`; it talks to the ward's broker, or to what is at this port."""
    login = await asyncio.to_thread(ward.mosquitto.gateway, name)
    outbox = Outbox(SqliteStore(folder / "outbox.db"), name, Limits(commit_interval_s=0.01, bytes_max=bytes_max))
    await outbox.open()
    window = Window(delay_s=0.5, bytes_max=WINDOW_BYTES_MAX)
    broker = Broker(ward.mosquitto.host, port or ward.mosquitto.port, name, login.user, login.password)
    uplink = Uplink(outbox, broker, name, window=window, resend_after_s=resend_after_s)
    running = [asyncio.create_task(outbox.run()), asyncio.create_task(uplink.run())]
    try:
        yield Edge(ward, name, outbox, uplink, at)
        for task in running:
            assert not task.done(), task.exception()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await outbox.close()
