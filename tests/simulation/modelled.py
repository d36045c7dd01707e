"""The models in the place of clocks, network and disks, around wardlink's own code."""

from __future__ import annotations

import contextlib
import logging
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

import cloud_sync.app
import gateway.app
import gateway.status
from cloud_sync import binding, consumer, gaps, redrive, time_desk
from gateway import acquisition, mqtt
from gateway import timekeeper as timekeeping
from gateway.clock import HostClock
from gateway.mqtt import MqttSession
from gateway.mqtt_messages import Hello
from gateway.spool import steps
from gateway.timekeeper import Timekeeper
from gateway.uplink import time_exchange, uplink
from tests.simulation.books import Books
from tests.simulation.broker import Line
from tests.simulation.host import HOST, HostTime
from tests.simulation.stores import ModelDatabase, ModelTimeSeries
from tests.simulation.world import World

LOG_LENGTH_MAX = 200
LOG_SUBJECT_LENGTH = 24
"""Two messages that begin alike are one: they differ in how long they wait."""

COARSE = {
    (cloud_sync.app, "STATUS_INTERVAL_S"): 86_400.0,
    (gateway.app, "STATUS_S"): 86_400.0,
    (timekeeping, "REFRESH_S"): 100.0,
    (uplink, "ASK_S"): 3_600.0,
    (time_exchange, "AGAIN_S"): 600.0,
    (time_exchange, "RETRY_S"): 300.0,
    (gaps, "INTERVAL_S"): 3_600.0,
    (gateway.status, "PERIOD_S"): 86_400.0,
    (redrive, "INTERVAL_S"): 3_600.0,
    (binding, "AGE_S_MAX"): 3_600.0,
    (mqtt, "BACKOFF_S_MAX"): 300.0,
    (acquisition, "BACKOFF_S_MAX"): 300.0,
    (cloud_sync.app, "RETRY_S_MAX"): 120.0,
    (consumer, "RETRY_S_MAX"): 60.0,
    (consumer, "QUIET_S"): 0.4,
    (redrive, "RETRY_S_MAX"): 120.0,
    (steps, "COMMIT_RETRY_S_MAX"): 60.0,
}
"""What ticks or tries again all the time, slowed down as the wearables are."""


@contextlib.contextmanager
def modelled(world: World) -> Iterator[None]:
    """Put the models in the place of clocks, network and disks."""
    with pytest.MonkeyPatch.context() as patch, _logs_to(world.books):
        _put_in_place(world, patch)
        yield


def _put_in_place(world: World, patch: pytest.MonkeyPatch) -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith(("gateway.", "cloud_sync.")) and getattr(module, "time", None) is time:
            patch.setattr(module, "time", HostTime())
    for (module, name), value in COARSE.items():
        patch.setattr(module, name, value)
    machines = {machine.name: machine for machine in world.gateways}

    async def connect(session: MqttSession, _context: object) -> Line:
        who = session.broker
        hello = Hello(who.client_id, None, None, session.clean, session.receive_maximum, session.will)
        line = Line(world.broker, hello, session.subscriptions, session._on_message, session._intake)
        await line.greet()
        return line

    def clock(**known: Any) -> HostClock:
        host = HOST.get()
        known["boot_ns"] = host.monotonic_ns
        return HostClock(host.monotonic_ns, host.utc_ns, lambda: host.clock.discipline, **known)

    def timekeeper(*parts: Any, **chosen: Any) -> Timekeeper:
        return Timekeeper(*parts, boot=HOST.get().boot, host=clock, **chosen)

    patch.setattr(MqttSession, "_connect", connect)
    patch.setattr(gateway.app, "Timekeeper", timekeeper)
    patch.setattr(time_desk, "kernel_discipline", lambda: HOST.get().clock.discipline)
    patch.setattr(gateway.app, "make_store", lambda chosen: machines[chosen.gateway.id].disk.store(HOST.get()))
    patch.setattr(cloud_sync.app, "Database", lambda *_args, **_options: ModelDatabase(world.registry))
    patch.setattr(cloud_sync.app, "timeseries", lambda _settings: ModelTimeSeries(world.series))
    patch.setattr("gateway.spool.sqlite_store.secrets", _Secrets(world.rng("secrets")))


class _Secrets:
    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def token_hex(self, count: int) -> str:
        return self._rng.randbytes(count).hex()


class _Handler(logging.Handler):
    def __init__(self, books: Books) -> None:
        super().__init__(logging.WARNING)
        self._books = books
        self._said: dict[str, str] = {}
        """By host what it said last: it is not repeated."""

    def emit(self, record: logging.LogRecord) -> None:
        host = HOST.get()
        text = record.getMessage()[:LOG_LENGTH_MAX]
        if record.exc_info is not None and not host.is_dead:
            self._books.trouble(f"{host.name} did not expect: {text}")
        subject = text[:LOG_SUBJECT_LENGTH]
        if self._said.get(host.name) != subject:
            self._said[host.name] = subject
            self._books.trace.append(f"    {host.name}: {text}")


@contextlib.contextmanager
def _logs_to(books: Books) -> Iterator[None]:
    """What the services log goes into the trace, and nowhere else."""
    handler = _Handler(books)
    loggers = [logging.getLogger(name) for name in ("gateway", "cloud_sync")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
            logger.propagate = True
