"""The machines of a ward: gateways with disk and clock, and bridges, with wardlink's own services on them."""

from __future__ import annotations

import asyncio
import random
from contextvars import Context
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cloud_sync.app
import gateway.app
from cloud_sync.settings import Bridge as BridgeSection
from cloud_sync.settings import Influx, Mqtt, Postgres
from cloud_sync.settings import Settings as CloudSettings
from gateway.acquisition import Acquisition
from gateway.settings import Device, Settings, Spool, Uplink
from gateway.settings import Gateway as GatewaySection
from gateway.settings import Mqtt as GatewayMqtt
from tests.simulation.books import Books, Stream
from tests.simulation.disk import Disk
from tests.simulation.host import Host, Network, SystemClock
from tests.simulation.wearables import SILENCE_S, Wearable

BYTES_MAX = 60_000
"""Quota of an outbox: about half a day of its wearables."""
COMMIT_INTERVAL_S = 120.0
RESEND_AFTER_S = 1200.0
WINDOW_BYTES_MAX = 8_192
DISK_GRACE_S = 90.0
"""Beside the commit interval: a slow disk, retries after a refusal."""


class Ward(Protocol):
    """What a machine needs of the world around it."""

    loop: asyncio.AbstractEventLoop
    books: Books

    def rng(self, of: str) -> random.Random: ...
    def on(self, host: Host) -> Context: ...
    def task(self, host: Host, life: Any) -> asyncio.Task[Any]: ...
    def end(self, running: Running, *, is_silent: bool) -> None: ...


@dataclass(slots=True)
class Running:
    """A service on a host, as long as it runs."""

    host: Host
    task: asyncio.Task[Any]
    service: Any
    stop: asyncio.Event


class GatewayMachine:
    """A gateway: its disk and wearables last, the rest begins anew with every start."""

    def __init__(self, ward: Ward, name: str, folder: Path, wearables: list[Wearable]) -> None:
        self.name = name
        self.ward = ward
        self.wearables = wearables
        self.network = Network(ward.rng(f"network {name}"), (0.02, 0.3))
        self.disk = Disk(folder / name, name, ward.books)
        self.running: Running | None = None
        self.clock = SystemClock()
        self.refused_since_s: float | None = None
        self.settings = Settings(
            gateway=GatewaySection(id=name, state_dir=str(folder / name / "state")),
            mqtt=GatewayMqtt(host="broker", tls=False),
            spool=Spool(commit_interval_s=COMMIT_INTERVAL_S, bytes_max=BYTES_MAX),
            uplink=Uplink(window_bytes_max=WINDOW_BYTES_MAX, resend_after_s=RESEND_AFTER_S),
        )

    @property
    def streams(self) -> list[Stream]:
        return [stream for wearable in self.wearables for stream in wearable.streams()]

    def start(self) -> None:
        assert self.running is None
        host = Host(self.name, self.ward.loop, self.network, self.clock)
        stop = asyncio.Event()
        service = self.ward.on(host).run(gateway.app.Gateway, self.settings)
        self.running = Running(host, self.ward.task(host, self._live(service, stop)), service, stop)
        self.ward.books.note(f"{self.name} starts")

    async def _live(self, service: gateway.app.Gateway, stop: asyncio.Event) -> None:
        """As `gateway.app.run` does."""
        try:
            await service.open()
            for wearable in self.wearables:
                device = Device(driver="simulated", serial=wearable.serial, brain_state=False)
                service.acquisitions.append(
                    Acquisition(
                        self.name, device, wearable.driver(), wearable.new_link, service.time.clock, service._outputs
                    )
                )
            await service.run(stop)
        finally:
            await service.close()

    def cut_power(self) -> None:
        """Off, at this very moment."""
        if (running := self.running) is None:
            return
        self.running = None
        self.disk.cut_power()
        self.ward.end(running, is_silent=True)
        self.ward.books.note(f"{self.name} loses power")
        self._forgo_what_was_in_memory()

    def _forgo_what_was_in_memory(self) -> None:
        grace_s = COMMIT_INTERVAL_S + DISK_GRACE_S
        if self.refused_since_s is not None:
            grace_s += self.ward.loop.time() - self.refused_since_s
        for wearable in self.wearables:
            for spec in wearable.signals:
                # A time axis is begun with two packets, and the radio may lose some between them.
                settling_s = SILENCE_S if spec.rate_hz else 0.0
                self.ward.books.forgo((wearable.serial, spec.signal), grace_s + settling_s)

    async def shut_down(self) -> None:
        """SIGTERM, and wait for its end."""
        if (running := self.running) is None:
            return
        self.ward.books.note(f"{self.name} is stopped")
        running.stop.set()
        await asyncio.wait({running.task})
        if self.running is running:
            self.running = None
            running.host.is_dead = True
            if self.disk.refusals:
                self._forgo_what_was_in_memory()


class BridgeMachine:
    """A bridge: nothing of it lasts."""

    def __init__(self, ward: Ward, name: str) -> None:
        self.name = name
        self.ward = ward
        self.network = Network(ward.rng(f"network {name}"), (0.001, 0.02))
        self.running: Running | None = None
        self.settings = CloudSettings(
            bridge=BridgeSection(id=name),
            mqtt=Mqtt(host="broker", tls=False),
            influx=Influx(dialect="v1", batch_ms=1_000),
            postgres=Postgres(),
        )

    def start(self) -> None:
        assert self.running is None
        host = Host(self.name, self.ward.loop, self.network, SystemClock())
        service = self.ward.on(host).run(cloud_sync.app.Bridge, self.settings)
        self.running = Running(host, self.ward.task(host, service.run()), service, asyncio.Event())
        self.ward.books.note(f"{self.name} starts")

    def kill(self) -> None:
        """Kill -9."""
        if (running := self.running) is not None:
            self.running = None
            self.ward.end(running, is_silent=False)
            self.ward.books.note(f"{self.name} is killed")

    async def shut_down(self) -> None:
        """SIGTERM, and wait for its end."""
        if (running := self.running) is not None:
            self.ward.books.note(f"{self.name} is stopped")
            running.task.cancel()
            await asyncio.wait({running.task})
            if self.running is running:
                self.running = None
                running.host.is_dead = True
