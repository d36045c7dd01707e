"""The bridge put together: the only file that knows every part of it."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from cloud_sync import line_protocol
from cloud_sync import settings as cloud_settings
from cloud_sync.binding import Bindings
from cloud_sync.consumer import Consumer
from cloud_sync.gaps import GapReview
from cloud_sync.ingest import Ingest
from cloud_sync.redrive import Redrive
from cloud_sync.registry import migrations
from cloud_sync.registry.database import Database
from cloud_sync.settings import Settings
from cloud_sync.timeseries import InfluxV1, InfluxV2, TimeSeries
from gateway import kernels
from gateway.errors import ConfigError, UnavailableError
from gateway.service import Service, install_signals
from gateway.wire import packing

log = logging.getLogger(__name__)

STATUS_INTERVAL_S = 5.0
RETRY_S_MAX = 10.0
POOL_SIZE = 4
"""One connection for the batch in hand, one for parked messages, one for gaps, the last for their overlap."""
IMPLEMENTATIONS = {"line protocol": line_protocol.IMPLEMENTATION, "packing": packing.IMPLEMENTATION}
"""Which implementation of each kernel runs."""


async def run(settings: Settings) -> None:
    """Run the bridge until SIGTERM or SIGINT. Raises `ConfigError`, also where the schema is not this version's.

    Stores or a broker that are away are waited for, with the reason in the status.
    """
    kernels.check(IMPLEMENTATIONS)
    cloud_settings.check(settings)
    log.info("kernels: %s", ", ".join(f"{name} {which}" for name, which in IMPLEMENTATIONS.items()))
    for warning in cloud_settings.warnings(settings):
        log.warning("%s", warning)
    lock = await asyncio.to_thread(_only_one, Path(settings.bridge.state_dir), settings.bridge.id)
    try:
        await _until_asked(Bridge(settings))
    finally:
        os.close(lock)


async def _until_asked(bridge: Bridge) -> None:
    stop = asyncio.Event()
    install_signals(stop)
    running = asyncio.create_task(bridge.run())
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            await running
    finally:
        for task in (running, stopping):
            task.cancel()
        await asyncio.gather(running, stopping, return_exceptions=True)


def _only_one(folder: Path, bridge: str) -> int:
    """Hold the lock of this bridge's id: two of one id would throw each other out of the broker for ever."""
    path = folder / f"{bridge}.lock"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"bridge.state_dir: {path} cannot be written: {error.strerror}", hint="name a folder of the service's user"
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise ConfigError(
            f"another bridge with the id {bridge!r} runs on this machine", hint="give each bridge.id once"
        ) from None
    return lock


class Bridge:
    """The parts of one bridge and how they are doing."""

    def __init__(self, settings: Settings) -> None:
        influx = settings.influx
        self.id = settings.bridge.id
        self.service = Service()
        self.database = Database(
            cloud_settings.conninfo(settings), pool_size=POOL_SIZE, application_name=f"wardlink-{settings.bridge.id}"
        )
        self.timeseries = timeseries(settings)
        self.bindings = Bindings(self.database)
        self.redrive = Redrive(self.database, self.timeseries, self.bindings)
        self.gaps = GapReview(self.database, alert_after_s=settings.bridge.gap_alert_s)
        self.consumer = Consumer(
            cloud_settings.broker(settings),
            settings.bridge.id,
            Ingest(self.database, self.timeseries, self.bindings),
            batch_lines=influx.batch_lines,
            batch_ms=influx.batch_ms,
            stores_answer=self._stores_answer,
            on_parked=self.redrive.wake,
        )
        self._away = ""
        self._points_before = 0

    async def run(self) -> None:
        """Until cancelled. Raises `ConfigError` where only a person can help."""
        self.service.ready()  # waiting for a store is part of the service's life, not of its start
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.service.watch(lambda: True), name="watchdog")
                tasks.create_task(self._show_status(), name="status")
                await self._stores_answer()
                await self._retry(lambda: migrations.verify(self.database))
                tasks.create_task(self.bindings.listen(self.redrive.wake), name="bindings")
                tasks.create_task(self.redrive.run(), name="redrive")
                tasks.create_task(self.gaps.run(), name="gaps")
                tasks.create_task(self.consumer.run(), name="consumer")
        except BaseExceptionGroup as group:
            raise _cause(group) from None
        finally:
            self.service.stopping()
            await self.timeseries.close()
            await self.database.close()

    async def _stores_answer(self) -> None:
        await self._retry(self._ping)

    async def _ping(self) -> None:
        await self.database.open()
        async with self.database.connection():
            pass  # a connection that is given out was asked
        await self.timeseries.ping()

    async def _retry(self, step: Callable[[], Awaitable[object]]) -> None:
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(UnavailableError),
            wait=wait_random_exponential(multiplier=0.2, max=RETRY_S_MAX),
            before_sleep=self._note_away,
        )
        async for attempt in retrying:
            with attempt:
                await step()
        self._away = ""

    def _note_away(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if str(error) != self._away:
            log.warning("waiting: %s", error)
        self._away = str(error)
        self.service.status(self.status_line(0.0))

    async def _show_status(self) -> None:
        while True:
            points = self.consumer.activity.points
            rate = (points - self._points_before) / STATUS_INTERVAL_S
            self._points_before = points
            line = self.status_line(rate)
            self.service.status(line)
            log.debug("%s", line)
            await asyncio.sleep(STATUS_INTERVAL_S)

    def status_line(self, points_per_s: float) -> str:
        """What the bridge does now, for an operator."""
        activity = self.consumer.activity
        if self._away or activity.keeping:
            state = f"waiting: {self._away or activity.keeping}"
        elif not self.consumer.session.connected.is_set():
            state = f"no broker: {self.consumer.session.last_error}"
        else:
            state = "stores and broker answer"
        return (
            f"{points_per_s:.0f} points/s, {activity.points} written, {self.redrive.parked_count} messages parked, "
            f"{activity.letters} dead letters; {state}"
        )


def timeseries(settings: Settings) -> TimeSeries:
    """The store that the settings name. Raises `ConfigError`."""
    influx = settings.influx
    secret = cloud_settings.influx_secret(settings)
    if influx.dialect == "v1":
        return InfluxV1(influx.url, username=influx.username, password=secret, compress=influx.gzip)
    return InfluxV2(influx.url, org=influx.org, token=secret or "", compress=influx.gzip)


def _cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error in a group of groups."""
    first = group.exceptions[0]
    return _cause(first) if isinstance(first, BaseExceptionGroup) else first
