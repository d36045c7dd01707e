"""Private servers: real Mosquitto, InfluxDB 1.x, PostgreSQL and Redis in a folder, for the demo and the tests.

Never the system's own instances, never a default port, gone with the program that started them. All of it blocks:
from asyncio call it through `asyncio.to_thread`.
"""

from __future__ import annotations

import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Self

from wardlink.servers.influxdb import InfluxDB
from wardlink.servers.mosquitto import Login, Mosquitto
from wardlink.servers.postgresql import PostgreSQL
from wardlink.servers.process import PrivateServer
from wardlink.servers.redis import Redis

__all__ = ["InfluxDB", "Login", "Mosquitto", "PostgreSQL", "PrivateServer", "PrivateServers", "Redis"]


class PrivateServers:
    """The four servers in one folder, started together and stopped in order.

    The folder belongs to the servers: PostgreSQL's user must be able to enter it when root starts this.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._cancelled = threading.Event()
        self.mosquitto = Mosquitto(folder, cancelled=self._cancelled)
        self.influxdb = InfluxDB(folder, cancelled=self._cancelled)
        self.postgresql = PostgreSQL(folder, cancelled=self._cancelled)
        self.redis = Redis(folder, cancelled=self._cancelled)

    @property
    def servers(self) -> tuple[PrivateServer, ...]:
        """In the order in which they are stopped: what feeds before what is fed."""
        return (self.mosquitto, self.redis, self.influxdb, self.postgresql)

    def start(self) -> None:
        """Start all that do not run, at the same time, and wait until each answers.

        When one fails, or on Ctrl-C, the others are stopped. Raises the first server's `UnavailableError`.
        """
        self._cancelled.clear()
        with ThreadPoolExecutor(max_workers=len(self.servers), thread_name_prefix="wardlink-start") as pool:
            starts = [pool.submit(server.start) for server in self.servers]
            try:
                done, _ = wait(starts, return_when=FIRST_EXCEPTION)
                failed = [start for start in done if start.exception() is not None]
            except BaseException:
                self._cancelled.set()
                wait(starts)
                self.stop()
                raise
            if failed:
                self._cancelled.set()
                wait(starts)
                self.stop()
                failed[0].result()

    def cancel(self) -> None:
        """Make a `start` that is under way in another thread give up."""
        self._cancelled.set()

    def stop(self) -> None:
        """Stop all that run, gracefully, each within a bounded time. Does nothing the second time."""
        for server in self.servers:
            server.stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
