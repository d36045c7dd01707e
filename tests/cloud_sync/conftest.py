"""A bridge on the run's private servers, with a ward of its own in the registry and a gateway that sends to it."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from cloud_sync import settings as cloud_settings
from cloud_sync.app import Bridge
from cloud_sync.registry import admin, stream_admin
from cloud_sync.registry.database import Database
from cloud_sync.registry.instants import instant_of_ns
from cloud_sync.registry.migrations import migrate
from cloud_sync.settings import Influx, Mqtt, Postgres, Settings
from gateway.errors import UnavailableError
from gateway.mqtt import Broker, Inbound, MqttSession, Outbound, connected_session
from gateway.samples import ClockStamp, ClockState, LossRecord, SampleBlock
from gateway.wire import codec, control, topics
from gateway.wire.codec import Identity
from gateway.wire.messages import Receipt, Status
from wardlink.servers import InfluxDB, Mosquitto

DEADLINE_S = 40.0
"""For what takes well below a second here when nothing else runs."""
NOON_NS = 1_714_564_800_000_000_000
"""2024-05-01 12:00 UTC."""
MS = 1_000_000
EPOCH = "e1"
CLOCK = ClockStamp(ClockState.SYNCED, 1000)

_numbers = itertools.count(1)


def vitals(
    device: str = "STRAP-1", first_ns: int = NOON_NS, n: int = 5, step_ns: int = 1000 * MS, signal: str = "vital_signs"
) -> SampleBlock:
    """Heart rate 60, 61, … and temperature 36.1, 36.2, …"""
    columns = {"heart_rate": 60.0 + np.arange(n), "temperature": 36.1 + 0.1 * np.arange(n)}
    return SampleBlock(device, signal, first_ns + step_ns * np.arange(n, dtype=np.int64), columns, CLOCK)


def eeg(device: str = "CYTON-1", first_ns: int = NOON_NS, n: int = 250) -> SampleBlock:
    """Two electrodes in counts of 0.02235 uV, the second one's samples 10 and 11 not usable."""
    rng = np.random.default_rng(n)
    quality = np.zeros(n, dtype=np.int64)
    quality[10:12] = 2
    columns = {
        "Fp1": rng.integers(-(2**23), 2**23, n, dtype=np.int32),
        "Fp2": rng.integers(-5000, 5000, n, dtype=np.int32),
        "quality": quality,
    }
    times_ns = first_ns + 4 * MS * np.arange(n, dtype=np.int64)
    return SampleBlock(device, "eeg", times_ns, columns, CLOCK, scales={"Fp1": 0.02235, "Fp2": 0.02235})


async def wait_for(condition: Callable[[], Awaitable[Any]], what: str, seconds: float = DEADLINE_S) -> Any:
    """Wait until a condition holds and return what it gave; fail at the deadline."""
    deadline = time.monotonic() + seconds
    while not (found := await condition()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        await asyncio.sleep(0.02)
    return found


class GatewayEnd:
    """A gateway as the broker sees it: sends blocks, hears receipts."""

    def __init__(self, name: str, session: MqttSession, heard: list[Receipt]) -> None:
        self.name = name
        self.session = session
        self.heard = heard
        self.bridges: dict[str, bool] = {}

    def identity(self, block: SampleBlock | LossRecord, sequence: int, epoch: str = EPOCH) -> Identity:
        signal = "loss" if isinstance(block, LossRecord) else block.signal
        return Identity(self.name, block.device, signal, epoch, sequence)

    async def send(self, block: SampleBlock | LossRecord, sequence: int, *, epoch: str = EPOCH) -> None:
        payload = codec.encode(self.identity(block, sequence, epoch), block)
        signal = block.signal
        is_loss = isinstance(block, LossRecord)
        where = topics.loss(self.name, block.device) if is_loss else topics.data(self.name, block.device, signal)
        await self.publish(where, payload.data, payload.content_type)

    async def publish(self, topic: str, payload: bytes, content_type: str = "", *, retain: bool = False) -> None:
        while True:
            await self.session.connected.wait()
            with suppress(UnavailableError):
                await self.session.publish(Outbound(topic, payload, content_type, {}, retain))
                return

    async def say(self, topic: str, message: control.ControlMessage, *, retain: bool = False) -> None:
        payload = control.encode(message)
        await self.publish(topic, payload.data, payload.content_type, retain=retain)

    def receipted(self, device: str, signal: str, epoch: str = EPOCH) -> list[tuple[int, int]]:
        """All ranges heard so far."""
        return [
            pair
            for receipt in self.heard
            for entry in receipt.committed
            if (entry.device, entry.signal, entry.epoch) == (device, signal, epoch)
            for pair in entry.ranges
        ]

    async def until_receipted(self, device: str, signal: str, *sequences: int, epoch: str = EPOCH) -> None:
        async def all_there() -> bool:
            ranges = self.receipted(device, signal, epoch)
            return all(any(first <= sequence <= last for first, last in ranges) for sequence in sequences)

        await wait_for(all_there, f"receipts of {device} {signal} {sequences}, heard {self.receipted(device, signal)}")


class Chain:
    """Servers, registry and bridge of one test."""

    noon_ns = NOON_NS
    ms = MS
    vitals = staticmethod(vitals)
    eeg = staticmethod(eeg)
    wait_for = staticmethod(wait_for)
    at = staticmethod(instant_of_ns)

    def __init__(self, settings: Settings, mosquitto: Mosquitto, influx: InfluxDB, bucket: str) -> None:
        self.settings = settings
        self.mosquitto = mosquitto
        self.influx = influx
        self.bucket = bucket
        self.registry = Database(cloud_settings.conninfo(settings), pool_size=2)
        self.bridge = Bridge(settings)
        self._running: asyncio.Task[None] | None = None

    async def start(self, *, is_connected: bool = True) -> Bridge:
        """A new bridge, with nothing left in memory of the one before."""
        self.bridge = Bridge(self.settings)
        self._running = asyncio.create_task(self.bridge.run())
        if is_connected:
            waiting = asyncio.create_task(self.bridge.consumer.session.connected.wait())
            await asyncio.wait({waiting, self._running}, timeout=DEADLINE_S, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            assert self.bridge.consumer.session.connected.is_set(), self.bridge.status_line(0)
        return self.bridge

    async def stop(self) -> None:
        if self._running is not None:
            self._running.cancel()
            with suppress(asyncio.CancelledError):
                await self._running
            self._running = None

    async def forget_session(self) -> None:
        """Take the bridge's session out of the broker, which would go on giving it its share of the messages."""
        async with connected_session(MqttSession(cloud_settings.broker(self.settings), clean=True)):
            pass

    @asynccontextmanager
    async def gateway(self, name: str = "") -> AsyncIterator[GatewayEnd]:
        name = name or f"gw-{next(_numbers)}"
        login = await asyncio.to_thread(self.mosquitto.gateway, name)
        heard: list[Receipt] = []

        def hear(message: Inbound) -> None:
            message.acknowledge()
            if topics.parse(message.topic).kind is topics.TopicKind.RECEIPT:
                heard.append(control.decode(message.payload, Receipt))
            elif message.payload:
                status = control.decode(message.payload, Status)
                end.bridges[status.name] = status.online
            else:
                end.bridges.pop(topics.parse(message.topic).bridge, None)

        broker = Broker(self.mosquitto.host, self.mosquitto.port, name, login.user, login.password)
        wanted = [topics.receipt(name), topics.bridge_status("+")]
        session = MqttSession(broker, on_message=hear, subscriptions=wanted, clean=True)
        end = GatewayEnd(name, session, heard)
        async with connected_session(session):
            yield end

    async def rows(self, query: str, *parameters: object) -> list[tuple[Any, ...]]:
        async with self.registry.connection() as connection:
            return await (await connection.execute(query.encode(), parameters)).fetchall()

    async def run(self, statement: str) -> None:
        async with self.registry.connection() as connection:
            await connection.execute(statement.encode())

    async def value(self, query: str, *parameters: object) -> Any:
        ((found,),) = await self.rows(query, *parameters)
        return found

    async def count(self, table: str) -> int:
        return int(await self.value(f"SELECT count(*) FROM {table}"))

    async def points(self, measurement: str, where: str = "", bucket: str = "") -> list[dict[str, Any]]:
        """All points of a measurement with fields and tags, in order of time."""
        statement = f'SELECT * FROM "{measurement}" {where} ORDER BY time'
        series = await asyncio.to_thread(self.influx.query, statement, bucket or self.bucket)
        return [dict(zip(one["columns"], values, strict=True)) for one in series for values in one["values"]]

    async def until_points(self, measurement: str, count: int) -> list[dict[str, Any]]:
        async def there() -> list[dict[str, Any]]:
            found = await self.points(measurement)
            return found if len(found) >= count else []

        return list(await wait_for(there, f"{count} points of {measurement}"))

    async def until_count(self, table: str, count: int) -> None:
        async def there() -> bool:
            return await self.count(table) == count

        await wait_for(there, f"{count} rows of {table}")

    async def add_device(self, serial: str, kind: str, patient: str | None, **more: Any) -> None:
        async with self.registry.connection() as connection:
            await admin.add_device(connection, serial, org="ward", device_type=kind, patient=patient, **more)

    async def furnish(self) -> None:
        """A ward with patients A and B, a headset CYTON-1 and a strap STRAP-1 that A wears."""
        await migrate(self.registry)
        async with self.registry.connection() as connection:
            await admin.add_organization(connection, "ward", "Ward 5")
            for code in "AB":
                await admin.add_patient(connection, "ward", code)
            for signal in ("vital_signs", "brain_state", "eeg"):
                await stream_admin.add_template(
                    connection, "ward", signal, bucket=self.bucket, tags={"location": "ICU 5", "priority": "high"}
                )
        await self.add_device("CYTON-1", "eeg_headset", "A")
        await self.add_device("STRAP-1", "hr_strap", "A")

    async def tags(self, serial: str, signal: str) -> dict[str, str]:
        """The five tags of the only stream of a device's signal."""
        ((device, stream, patient, org),) = await self.rows(
            "SELECT d.id, s.id, s.patient_id, d.org_id FROM signal_streams s JOIN devices d ON d.id = s.device_id "
            "JOIN signal_types t ON t.id = s.signal_type_id WHERE d.serial = %s AND t.code = %s", serial, signal
        )  # fmt: skip
        return {
            "device_id": str(device),
            "stream_id": str(stream),
            "patient_id": str(patient),
            "org_id": str(org),
            "signal_type": signal,
        }


@pytest.fixture
def bridge_settings(
    mosquitto_server: Mosquitto,
    influx_server: InfluxDB,
    database: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Settings:
    """Settings of a bridge of the test's own, on InfluxDB 1.x, with its credentials in the environment."""
    mosquitto_server.start()
    influx_server.start()
    postgres = urlsplit(database)
    monkeypatch.setenv("WARDLINK_MQTT_PASSWORD", mosquitto_server.bridge.password)
    monkeypatch.setenv("WARDLINK_INFLUX_PASSWORD", influx_server.password)
    monkeypatch.setenv("WARDLINK_POSTGRES_PASSWORD", postgres.password or "")
    return Settings(
        bridge=cloud_settings.Bridge(id=f"bridge-{next(_numbers)}", state_dir=str(tmp_path)),
        mqtt=Mqtt(host=mosquitto_server.host, port=mosquitto_server.port, username="bridge", tls=False),
        influx=Influx(url=influx_server.url, dialect="v1", username=influx_server.user_name),
        postgres=Postgres(
            host=postgres.hostname or "",
            port=postgres.port or 0,
            dbname=postgres.path.lstrip("/"),
            user=postgres.username or "",
        ),
    )


@pytest.fixture
async def chain(
    bridge_settings: Settings, mosquitto_server: Mosquitto, influx_server: InfluxDB, influx_database: str
) -> AsyncIterator[Chain]:
    """A furnished ward; no bridge runs yet."""
    made = Chain(bridge_settings, mosquitto_server, influx_server, influx_database)
    async with made.registry:
        await made.furnish()
        yield made
        await made.stop()
        await asyncio.to_thread(mosquitto_server.start)
        await made.forget_session()
