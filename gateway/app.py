"""The gateway's composition root: the only file that knows every part."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tenacity import AsyncRetrying, retry_if_exception_type, wait_random_exponential

from gateway import config, kernels, settings, status
from gateway.acquisition import Acquisition, Outputs, State, utc_text
from gateway.devices import packets
from gateway.devices.registry import DRIVERS, Asked, LinkKind
from gateway.errors import DamagedError, UnavailableError
from gateway.reach import Reach, link_maker, reach
from gateway.samples import LossCause
from gateway.service import Service, install_signals
from gateway.settings import Device, Settings
from gateway.signal import features
from gateway.signal.features import Features
from gateway.spool import sealed
from gateway.spool.outbox import Limits, Outbox
from gateway.spool.sealed import SealedStore
from gateway.spool.sqlite_store import SqliteStore
from gateway.spool.store import Store
from gateway.timekeeper import Timekeeper
from gateway.uplink.uplink import Uplink
from gateway.uplink.window import Window
from gateway.wire import packing

if TYPE_CHECKING:
    from gateway.live.redis_live import RedisLive
    from gateway.metrics import Exporter

log = logging.getLogger(__name__)

STATUS_S = 5.0
COMMIT_STALL_S = 60.0
"""A commit that is under way for so long without an error is a hung disk: the watchdog may restart us."""
ASK_S_MAX = 10.0
IMPLEMENTATIONS = {
    "features": features.IMPLEMENTATION,
    "packets": packets.IMPLEMENTATION,
    "packing": packing.IMPLEMENTATION,
}
"""Which implementation of each kernel runs."""
STATES = tuple(state.value for state in State)
DAMAGED_HINT = "keep the file, move it out of the way and start again: a new outbox is begun"


async def run(chosen: Settings) -> None:
    """Run the gateway until SIGTERM or SIGINT. Raises `WardlinkError` for what it cannot live without."""
    stop = asyncio.Event()
    install_signals(stop)
    kernels.check(IMPLEMENTATIONS)
    log.info("kernels: %s", ", ".join(f"{name} {which}" for name, which in IMPLEMENTATIONS.items()))
    gateway = await asyncio.to_thread(Gateway, chosen)  # it reads credential files
    try:
        await gateway.open()
        await gateway.run(stop)
    finally:
        await gateway.close()


class Gateway:
    """All parts of one gateway, connected."""

    def __init__(self, chosen: Settings) -> None:
        name = chosen.gateway.id
        self._service = Service()
        self._started = utc_text(time.time_ns())
        spool = chosen.spool
        self.outbox = Outbox(
            make_store(chosen), name, Limits(spool.commit_interval_s, spool.commit_blocks, spool.bytes_max)
        )
        self.time = Timekeeper(
            self.outbox,
            name,
            Path(chosen.gateway.state_dir),
            hold_s=chosen.clock.hold_s,
            is_online=lambda: self.uplink is not None and self.uplink.session.connected.is_set(),
        )
        self._broker = settings.broker(chosen)
        self._live = _make_live(chosen)
        self._exporter = _make_exporter(chosen)
        self._complaints: dict[int, str] = {}
        """What was logged last of what tells the state."""
        self._settings = chosen
        self.uplink: Uplink | None = None
        self.acquisitions: list[Acquisition] = []

    async def open(self) -> None:
        """Open the outbox; everything else may be away at the start."""
        try:
            await self.outbox.open()
        except DamagedError as error:
            raise DamagedError(error.message, hint=error.hint or DAMAGED_HINT) from error
        name, uplink = self._settings.gateway.id, self._settings.uplink
        self.uplink = Uplink(
            self.outbox,
            self._broker,
            name,
            window=Window(delay_s=uplink.backlog_delay_s, bytes_max=uplink.window_bytes_max),
            resend_after_s=uplink.resend_after_s,
            clock=self.time.clock,
            trust_bridge=self._settings.clock.trust_bridge,
        )
        self._outputs = Outputs(self.time.accept, self.uplink.announce, self._show)
        for device in self._settings.device:
            if not isinstance(DRIVERS[device.driver].line, Asked):
                self._add(device, Reach(DRIVERS[device.driver], link_maker(device, self._settings.bluetooth)))

    async def run(self, stop: asyncio.Event) -> None:
        """Run everything until `stop` is set."""
        assert self.uplink is not None
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(self.outbox.run()),
                tasks.create_task(self.uplink.run()),
                tasks.create_task(self.time.run()),
                tasks.create_task(self._report()),
                tasks.create_task(self._write_status()),
                tasks.create_task(self._service.watch(lambda: self.outbox.stalled_s() < COMMIT_STALL_S)),
            ]
            if self._live:
                running.append(tasks.create_task(self._live.run()))
            reading = [tasks.create_task(acquisition.run()) for acquisition in self.acquisitions]
            asked = [one for one in self._settings.device if isinstance(DRIVERS[one.driver].line, Asked)]
            reading += [tasks.create_task(self._ask_and_read(device)) for device in asked]
            self._service.ready()
            await stop.wait()
            self._service.stopping()
            log.info("stopping")
            for task in reading:
                task.cancel()
            await asyncio.gather(*reading, return_exceptions=True)
            await self._drain(self.uplink)
            await self.uplink.say_goodbye()
            for task in running:
                task.cancel()
        await self._tell_status(running=False)

    def _add(self, device: Device, found: Reach) -> Acquisition:
        name = self._settings.gateway.id
        self.acquisitions.append(Acquisition(name, device, found.driver, found.link, self.time.clock, self._outputs))
        return self.acquisitions[-1]

    async def _ask_and_read(self, device: Device) -> None:
        """Read a source that says itself what it gives; it may be away at first."""
        attempts = AsyncRetrying(
            retry=retry_if_exception_type(UnavailableError), wait=wait_random_exponential(max=ASK_S_MAX)
        )
        await self._add(device, await attempts(reach, device, self._settings.bluetooth)).run()

    async def _drain(self, uplink: Uplink) -> None:
        """Send what is left, for a short time: what then remains is sent after the next start."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.uplink.drain_s):
                await self.outbox.commit()
                can_go = not self.time.clock.is_held  # what waits for its time waits for the next start
                if can_go and uplink.session.connected.is_set() and uplink.sender.bridge_present:
                    await self.outbox.empty.wait()

    async def close(self) -> None:
        """Commit what is pending and close the outbox."""
        if self._exporter:
            await asyncio.to_thread(self._exporter.close)
        await self.outbox.close()

    def _show(self, device: Device, features: Features) -> None:
        if self._live and device.user_id:
            from gateway.live.redis_live import Wearer  # noqa: PLC0415 - loaded already, when there is a live view

            self._live.show(Wearer(device.user_id, device.session_id), features)

    async def _report(self) -> None:
        while True:
            self._service.status(self.status_line())
            await asyncio.sleep(STATUS_S)

    async def _write_status(self) -> None:
        """Apart from `_report`: a disk that hangs must not keep systemd's line from being told."""
        while True:
            await self._tell_status()
            await asyncio.sleep(status.PERIOD_S)

    async def _tell_status(self, *, running: bool = True) -> None:
        """To `status.json` and as metrics; what cannot be told is logged once."""
        now = self.current_status(running=running)
        telling: list[Callable[[status.GatewayStatus], None]] = [partial(status.write, self._state_folder)]
        if self._exporter:
            telling.append(self._exporter.tell)
        for number, tell in enumerate(telling):
            try:
                await asyncio.to_thread(tell, now)
                self._complaints.pop(number, None)
            except UnavailableError as error:
                if self._complaints.get(number) != error.message:
                    log.warning("%s", error)
                self._complaints[number] = error.message

    def current_status(self, *, running: bool = True) -> status.GatewayStatus:
        """What `status.json` says."""
        assert self.uplink is not None
        holding = self.outbox.holding
        return status.GatewayStatus(
            gateway=self._settings.gateway.id,
            pid=os.getpid(),
            written=utc_text(time.time_ns()),  # the clock that a reader compares it with
            running=running,
            devices=[*(_device_status(one, self.outbox) for one in self.acquisitions), *self._unanswered()],
            outbox=status.OutboxStatus(holding.rows, holding.size, self.outbox.problem),
            clock=self._clock_status(),
            broker=self._broker_status(),
            implementations=IMPLEMENTATIONS,
            bluetooth=self._bluetooth(),
        )

    def _broker_status(self) -> status.BrokerStatus:
        assert self.uplink is not None
        session, refused = self.uplink.session, self.uplink.sender.refused
        connected = session.connected.is_set()
        newest = refused[max(refused)] if refused else ""
        return status.BrokerStatus(
            connected,
            "" if connected else str(session.last_error or ""),
            len(refused),
            newest[: status.REASON_CHARACTERS_MAX],
        )

    def _clock_status(self) -> status.ClockStatus:
        clock = self.time.clock
        return status.ClockStatus(
            clock.known.state.value, clock.known.error_ns, self.time.source.value, clock.is_held, self.time.waiting
        )

    def _bluetooth(self) -> list[status.BluetoothStatus]:
        if not any(DRIVERS[device.driver].link is LinkKind.BLE for device in self._settings.device):
            return []
        from gateway.links.ble import connections  # noqa: PLC0415 - loaded already, for these devices

        slots = self._settings.bluetooth.slots
        return [status.BluetoothStatus(adapter, count, slots) for adapter, count in connections().items()]

    def _unanswered(self) -> list[status.DeviceStatus]:
        """Sources that have not said yet what they give."""
        answered = {one.device.serial for one in self.acquisitions}
        return [
            status.DeviceStatus(
                device.serial,
                device.driver,
                device.port or device.address or "",
                State.WAITING,
                "it has not answered yet",
                self._started,
                0,
                0,
            )
            for device in self._settings.device
            if device.serial not in answered
        ]

    @property
    def _state_folder(self) -> Path:
        return Path(self._settings.gateway.state_dir)

    def status_line(self) -> str:
        """One line for `systemctl status`."""
        assert self.uplink is not None
        streaming = sum(1 for one in self.acquisitions if one.condition.state is State.STREAMING)
        session = self.uplink.session
        broker = "connected" if session.connected.is_set() else f"broker away: {session.last_error}"
        parts = [
            f"{streaming}/{len(self._settings.device)} devices streaming",
            f"{self.outbox.holding.rows} blocks waiting",
            broker,
        ]
        if self.time.clock.is_held:
            parts.append(f"nobody has told the time: {self.time.waiting} blocks wait for it")
        if self.outbox.problem:
            parts.insert(0, f"OUTBOX: {self.outbox.problem}")
        if refused := self.uplink.sender.refused:
            parts.append(f"{len(refused)} blocks THAT THE BROKER DOES NOT TAKE: {refused[max(refused)]}")
        parts.extend(
            f"{one.device.serial} {one.condition.state}: {one.condition.reason}"
            for one in self.acquisitions
            if one.condition.state is not State.STREAMING
        )
        return "; ".join(parts)


def _device_status(acquisition: Acquisition, outbox: Outbox) -> status.DeviceStatus:
    device, condition = acquisition.device, acquisition.condition
    return status.DeviceStatus(
        serial=device.serial,
        driver=device.driver,
        place=device.port or device.address or "",
        state=condition.state.value,
        reason=condition.reason[: status.REASON_CHARACTERS_MAX],
        since=acquisition.since,
        segments=condition.segments,
        rejected_bytes=condition.rejected_bytes,
        electrodes=[
            status.ElectrodeStatus(name, each.state.value, each.reason) for name, each in acquisition.electrodes.items()
        ],
        streams=_streams(acquisition, outbox),
    )


def _streams(acquisition: Acquisition, outbox: Outbox) -> list[status.StreamStatus]:
    condition, serial = acquisition.condition, acquisition.device.serial
    lost: dict[str, dict[str, int]] = {
        signal: {LossCause.RADIO.value: condition.lost[signal]} for signal in {*condition.samples, *condition.lost}
    }
    for (device, signal, cause), count in outbox.losses.items():
        if device == serial:
            lost.setdefault(signal, {})[cause.value] = count
    return [status.StreamStatus(signal, condition.samples[signal], lost[signal]) for signal in sorted(lost)]


def _make_exporter(chosen: Settings) -> Exporter | None:
    metrics = chosen.metrics
    if metrics.textfile is None and metrics.listen is None:
        return None
    from gateway.metrics import Exporter  # noqa: PLC0415 - most gateways need not hold it

    textfile = None if metrics.textfile is None else Path(metrics.textfile)
    return Exporter(STATES, textfile, metrics.address)


def _make_live(chosen: Settings) -> RedisLive | None:
    if chosen.live.redis is None:
        return None
    from gateway.live.redis_live import RedisLive  # noqa: PLC0415 - 6 MB that most gateways need not hold

    return RedisLive(chosen.live.redis.url, config.secret(settings.REDIS_PASSWORD))


def make_store(chosen: Settings, *, read_only: bool = False) -> SealedStore:
    """The store that the settings name; nothing is opened yet. Raises `ConfigError` for its credentials."""
    spool = chosen.spool
    text = config.required_secret(sealed.CREDENTIAL, "spool.encrypt") if spool.encrypt else _former_key()
    key = sealed.key_of(text) if text else None
    return SealedStore(_inner_store(chosen, read_only=read_only), key, seals=spool.encrypt)


def _former_key() -> str | None:
    """What was sealed before `spool.encrypt` was turned off still needs its key."""
    return config.secret(sealed.CREDENTIAL)


def _inner_store(chosen: Settings, *, read_only: bool) -> Store:
    if chosen.spool.backend == "sqlite":
        return SqliteStore(
            chosen.outbox_path,
            read_only=read_only,
            free_bytes_min=chosen.spool.free_bytes_min,
            reserve_bytes=chosen.spool.reserve_bytes,
        )
    from gateway.spool.redis_store import RedisStore  # noqa: PLC0415 - a gateway without Redis need not load it

    assert chosen.spool.redis_url is not None
    password = config.secret(settings.REDIS_PASSWORD)
    return RedisStore(chosen.spool.redis_url, chosen.gateway.id, password, read_only=read_only)
