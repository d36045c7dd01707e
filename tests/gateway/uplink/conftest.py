"""A gateway's outbox and uplink on the run's real broker, and the cloud's end of it played by the test."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gateway import mqtt
from gateway.mqtt import Broker, Inbound, MqttSession, Outbound, connected_session
from gateway.samples import ClockStamp, ClockState, LossCause, LossRecord, SampleBlock
from gateway.spool.outbox import Limits, Outbox
from gateway.spool.sqlite_store import SqliteStore
from gateway.spool.store import Store
from gateway.uplink.uplink import Uplink
from gateway.uplink.window import Window
from gateway.wire import codec, control, topics
from gateway.wire.control import ControlMessage
from gateway.wire.messages import CommittedRanges, DeviceMeta, Receipt, ReceiptRequest, SignalMeta, Status
from gateway.wire.topics import TopicKind
from wardlink.servers import Login, Mosquitto

SECONDS_MAX = 20.0
"""For anything awaited here: a deadline, not a measure."""
NOON_NS = 1_714_564_800_000_000_000
SECOND_NS = 1_000_000_000

_numbers = itertools.count(1)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(SECONDS_MAX):
        while not condition():  # noqa: ASYNC110 - these conditions have no event of their own
            await asyncio.sleep(0.005)


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt, "BACKOFF_S_MAX", 0.1)


@pytest.fixture(scope="module")
def mosquitto_server(servers_folder: Path) -> Iterator[Mosquitto]:
    """A broker of the module's own: bridges of other tests, retained, would be present here."""
    server = Mosquitto(servers_folder / f"uplink-{next(_numbers)}")
    server.start()
    yield server
    server.stop()


class Cloud:
    """Reads everything below a gateway's topic, with a clean session: what comes while it is away is lost to it."""

    def __init__(self, broker: Broker, gateway: str) -> None:
        self._gateway = gateway
        self.bridge = broker.client_id
        self.got: list[Inbound] = []
        self.receipting: bool = False
        """Whether each block is receipted at once."""
        self.session = MqttSession(
            broker, on_message=self._take, subscriptions=[f"wardlink/v1/{gateway}/#"], clean=True
        )

    def _take(self, message: Inbound) -> None:
        message.acknowledge()
        self.got.append(message)
        if self.receipting and topics.parse(message.topic).kind in {TopicKind.DATA, TopicKind.LOSS}:
            identity = codec.decode_on(message.topic, message.payload, message.content_type).identity
            entry = CommittedRanges(
                identity.device, identity.signal, identity.epoch, [(identity.sequence, identity.sequence)]
            )
            self.session.publish(self.receipt_message([entry]))

    @property
    def blocks(self) -> list[Inbound]:
        return [message for message in self.got if topics.parse(message.topic).kind in {TopicKind.DATA, TopicKind.LOSS}]

    def seconds(self, device: str = "DEV", signal: str = "eeg") -> list[int]:
        """At which second since noon each block of one stream begins, as they came; of any epoch."""
        found = (codec.decode(message.payload, message.content_type) for message in self.blocks)
        return [
            (message.content.first_ns - NOON_NS) // SECOND_NS
            for message in found
            if (message.identity.device, message.identity.signal) == (device, signal)
        ]

    def counts(self, device: str = "DEV", signal: str = "eeg") -> Counter[int]:
        return Counter(self.seconds(device, signal))

    def requests(self) -> list[ReceiptRequest]:
        return [
            control.decode(message.payload, ReceiptRequest)
            for message in self.got
            if topics.parse(message.topic).kind is TopicKind.RECEIPT_REQUEST
        ]

    def receipt_message(self, committed: list[CommittedRanges]) -> Outbound:
        receipt = Receipt(v=1, schema="receipt", gateway=self._gateway, committed=committed)
        return outbound(topics.receipt(self._gateway), receipt)

    async def receipt(
        self, epoch: str, ranges: Sequence[tuple[int, int]], device: str = "DEV", signal: str = "eeg"
    ) -> None:
        await self.session.publish(self.receipt_message([CommittedRanges(device, signal, epoch, list(ranges))]))

    async def send(self, topic: str, payload: bytes) -> None:
        await self.session.publish(Outbound(topic, payload))

    async def present(self, *, online: bool) -> None:
        status = Status(v=1, schema="status", name=self.bridge, online=online)
        await self.session.publish(outbound(topics.bridge_status(self.bridge), status, retain=True))


def outbound(topic: str, message: ControlMessage, *, retain: bool = False) -> Outbound:
    payload = control.encode(message)
    return Outbound(topic, payload.data, payload.content_type, {"schema": payload.schema}, retain)


class Chain:
    """What a test needs of one gateway and its cloud."""

    until = staticmethod(until)

    def __init__(self, mosquitto: Mosquitto, login: Login, path: Path) -> None:
        self.mosquitto = mosquitto
        self.gateway = login.user
        self.path = path
        self._login = login

    def store(self) -> SqliteStore:
        return SqliteStore(self.path)

    def broker(self, port: int | None = None) -> Broker:
        user, password = self._login.user, self._login.password
        return Broker(self.mosquitto.host, port or self.mosquitto.port, f"wardlink-{user}", user, password)

    @asynccontextmanager
    async def outbox(self, store: Store | None = None) -> AsyncIterator[Outbox]:
        """Open, and committing every 10 ms."""
        outbox = Outbox(store or self.store(), self.gateway, Limits(commit_interval_s=0.01))
        await outbox.open()
        committing = asyncio.create_task(outbox.run())
        try:
            yield outbox
        finally:
            committing.cancel()
            await asyncio.gather(committing, return_exceptions=True)
            await outbox.close()

    @asynccontextmanager
    async def uplink(
        self, outbox: Outbox, *, bytes_max: int = 256 << 10, resend_after_s: float = 60.0, port: int | None = None
    ) -> AsyncIterator[Uplink]:
        """Running; connected before long."""
        window = Window(delay_s=0.5, bytes_max=bytes_max)
        uplink = Uplink(outbox, self.broker(port), self.gateway, window=window, resend_after_s=resend_after_s)
        running = asyncio.create_task(uplink.run())
        try:
            yield uplink
            assert not running.done()
        finally:
            running.cancel()
            await asyncio.wait({running}, timeout=SECONDS_MAX)
            assert running.cancelled()

    @asynccontextmanager
    async def cloud(self, *, present: bool = False) -> AsyncIterator[Cloud]:
        """Connected; its retained status is taken back at the end."""
        login = self.mosquitto.bridge
        name = f"bridge-{next(_numbers)}"
        broker = Broker(self.mosquitto.host, self.mosquitto.port, name, login.user, login.password)
        cloud = Cloud(broker, self.gateway)
        async with connected_session(cloud.session):
            if present:
                await cloud.present(online=True)
            try:
                yield cloud
            finally:
                await asyncio.wait_for(cloud.session.connected.wait(), SECONDS_MAX)
                await cloud.session.publish(Outbound(topics.bridge_status(name), b"", retain=True))

    def freeze_broker(self) -> None:
        assert self.mosquitto.pid is not None
        os.kill(self.mosquitto.pid, signal.SIGSTOP)

    def thaw_broker(self) -> None:
        if self.mosquitto.pid is not None:
            os.kill(self.mosquitto.pid, signal.SIGCONT)

    @staticmethod
    def block(device: str = "DEV", signal: str = "eeg", *, at: int = 0, n: int = 10) -> SampleBlock:
        """Second number `at` since noon."""
        times = NOON_NS + at * SECOND_NS + np.arange(n, dtype=np.int64) * (SECOND_NS // n)
        clock = ClockStamp(ClockState.SYNCED, 1000)
        values: Any = np.arange(n) + at
        if signal == "brain_state":
            return SampleBlock(device, signal, times, {"alpha": values / 1000}, clock)
        if signal == "vital_signs":
            return SampleBlock(device, signal, times, {"heart_rate": values.astype(np.float64)}, clock)
        return SampleBlock(device, signal, times, {"Fp1": values.astype(np.int32)}, clock, scales={"Fp1": 0.5})

    @staticmethod
    def loss(device: str = "DEV", signal: str = "eeg", *, count: int = 5) -> LossRecord:
        return LossRecord(device, signal, LossCause.RADIO, NOON_NS, NOON_NS + SECOND_NS, count)

    def birth(self, device: str = "DEV", *, battery_pct: float | None = None) -> DeviceMeta:
        signals = [SignalMeta(signal="eeg", channels=["Fp1"], units=["uV"], rate_hz=250.0)]
        return DeviceMeta(
            v=1,
            schema="meta",
            gateway=self.gateway,
            device=device,
            driver="cyton",
            signals=signals,
            battery_pct=battery_pct,
        )


@pytest.fixture
def chain(mosquitto_server: Mosquitto, tmp_path: Path) -> Iterator[Chain]:
    mosquitto_server.start()
    login = mosquitto_server.gateway(f"gw-up-{next(_numbers)}")
    chain = Chain(mosquitto_server, login, tmp_path / "outbox.db")
    yield chain
    chain.thaw_broker()
