"""Bad networks on either side of the broker: noticed in time, bounded in memory, and everything there once afterwards.

The whole chain is real: outbox, uplink, mosquitto, bridge, InfluxDB, PostgreSQL. Only the network is a relay.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway import mqtt, mqtt_connection, tcp
from gateway.mqtt import Broker, MqttSession, Outbound, connected_session
from gateway.spool.outbox import Outbox
from gateway.wire import topics
from tests.faults.chaos_proxy import ChaosProxy
from tests.faults.edge import POINTS_A_BLOCK, WINDOW_BYTES_MAX, Edge, running_edge
from tests.faults.namespace import FarPeer, NoNamespaceError, copy
from wardlink.servers import Mosquitto

pytestmark = pytest.mark.faults

SECONDS_MAX = 60.0
"""For anything awaited here: a deadline, not a measure."""
DETECTION_S_MAX = 15.0
"""What is promised of the constants as they are shipped."""
RESEND_AFTER_S = 8.0
"""Asked for after half of it: a receipt is lost where the bridge's link is, and nobody sends receipts again unasked."""

_names = itertools.count(1)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(SECONDS_MAX):
        while not condition():  # noqa: ASYNC110 - these conditions have no event of their own
            await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt, "BACKOFF_S_MAX", 0.1)


@pytest.fixture
def pings(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Every ping that goes out; they go out often."""
    sent: list[None] = []
    ping = mqtt_connection._Client.ping

    def counted(client: mqtt_connection._Client) -> None:
        sent.append(None)
        ping(client)

    monkeypatch.setattr(mqtt_connection, "KEEPALIVE_S", 0.5)
    monkeypatch.setattr(mqtt_connection.paho.Client, "keepalive", property(lambda _: 0.5, lambda *_: None))
    monkeypatch.setattr(mqtt_connection._Client, "ping", counted)
    monkeypatch.setattr(mqtt, "CONNECT_TIMEOUT_S", 1.0)
    return sent


def test_the_shipped_constants_find_a_dead_link_in_time() -> None:
    ping_s = mqtt_connection.KEEPALIVE_S * mqtt_connection.PING_SHARE
    assert ping_s * (mqtt_connection.PINGS_UNANSWERED_MAX + 1) < DETECTION_S_MAX
    assert (
        ping_s + tcp.UNACKNOWLEDGED_S_MAX < DETECTION_S_MAX
    )  # while nothing is read, the ping is what goes unanswered
    assert 1.5 * mqtt_connection.KEEPALIVE_S <= DETECTION_S_MAX  # the broker's end: MQTT 5, section 3.1.2.10


@dataclass
class Line:
    """The chain with a relay on one side of the broker."""

    ward: Any
    proxy: ChaosProxy
    session: MqttSession
    """The one that has the bad network."""
    edge: Edge
    delivered: list[str]
    """Topics of blocks as the bridge got them, again and again included."""
    known: object = None

    @property
    def outbox(self) -> Outbox:
        return self.edge.outbox

    @property
    def sent(self) -> int:
        return self.edge.at

    def send(self, count: int) -> None:
        self.edge.send(count)

    async def arrived(self, count: int) -> None:
        await until(lambda: len(self.delivered) >= count)

    async def lost(self) -> None:
        """Until the connection is not the one of the last `connected`: the next may come within a moment."""
        await until(lambda: self.session._connection is not self.known)

    async def connected(self) -> None:
        await asyncio.wait_for(self.session.connected.wait(), SECONDS_MAX)
        self.known = self.session._connection

    async def all_is_there_once(self) -> None:
        await asyncio.wait_for(self.outbox.empty.wait(), SECONDS_MAX)
        ward, points = self.ward, POINTS_A_BLOCK * self.sent
        assert len(await ward.points("vital_signs")) == points
        assert await ward.value("SELECT sum(point_count) FROM signal_streams") == points
        assert await ward.value("SELECT committed::text FROM ledger") == f"{{[0,{self.sent})}}"
        assert await ward.count("dead_letters") == 0


@asynccontextmanager
async def made(side: str, ward: Any, mosquitto: Mosquitto, folder: Path) -> AsyncIterator[Line]:
    settings = ward.settings
    async with ChaosProxy(mosquitto.port) as proxy:
        if side == "bridge":
            mqtt_settings = msgspec.structs.replace(settings.mqtt, port=proxy.port)
            ward.settings = msgspec.structs.replace(settings, mqtt=mqtt_settings)
        try:
            async with connected(side, ward, proxy, mosquitto, folder) as line:
                yield line
        finally:
            await ward.stop()
            ward.settings = settings


@asynccontextmanager
async def connected(side: str, ward: Any, proxy: ChaosProxy, mosquitto: Mosquitto, folder: Path) -> AsyncIterator[Line]:
    bridge = await ward.start()
    delivered: list[str] = []
    take = bridge.consumer.session._on_message

    def watch(message: Any) -> None:
        if topics.parse(message.topic).kind is topics.TopicKind.DATA:
            delivered.append(message.topic)
        take(message)

    bridge.consumer.session._on_message = watch
    if bridge.consumer.session._connection is not None:
        bridge.consumer.session._connection._deliver = watch
    port = proxy.port if side == "gateway" else mosquitto.port
    name = f"gw-network-{next(_names)}"
    async with running_edge(ward, name, folder, port=port, resend_after_s=RESEND_AFTER_S) as edge:
        session = edge.uplink.session if side == "gateway" else bridge.consumer.session
        line = Line(ward, proxy, session, edge, delivered)
        await line.connected()
        yield line


@pytest.fixture(params=["gateway", "bridge"])
async def line(
    request: pytest.FixtureRequest, ward: Any, mosquitto_server: Mosquitto, tmp_path: Path
) -> AsyncIterator[Line]:
    async with made(request.param, ward, mosquitto_server, tmp_path) as ready:
        yield ready


@pytest.fixture
async def gateway_line(ward: Any, mosquitto_server: Mosquitto, tmp_path: Path) -> AsyncIterator[Line]:
    async with made("gateway", ward, mosquitto_server, tmp_path) as ready:
        yield ready


async def test_over_a_long_and_narrow_link_everything_comes_through_one_connection(line: Line) -> None:
    line.proxy.now.latency_s = 0.3
    line.proxy.now.bytes_per_s = 8_000
    line.send(60)
    await line.all_is_there_once()
    assert line.proxy.connections == 1


async def test_a_black_hole_is_noticed_and_everything_is_there_afterwards(line: Line, pings: list[None]) -> None:
    line.proxy.reset()  # the connection from before has the long pings
    await line.lost()
    await line.connected()
    line.send(10)
    await line.arrived(10)
    line.proxy.black_hole(is_on=True)
    line.send(20)
    await line.lost()
    line.send(10)
    line.proxy.black_hole(is_on=False)
    await line.all_is_there_once()
    assert line.proxy.connections >= 3


async def test_the_last_ping_that_a_dead_link_gets_is_the_third(gateway_line: Line, pings: list[None]) -> None:
    line = gateway_line
    await line.ward.stop()  # its pings would be counted too
    line.proxy.reset()
    await line.lost()
    await line.connected()
    line.proxy.black_hole(is_on=True)
    pings.clear()
    await line.lost()
    assert len(pings) <= mqtt_connection.PINGS_UNANSWERED_MAX + 1
    assert "silent" in line.session.last_error


async def test_control_without_the_pings_a_black_hole_is_not_noticed(
    gateway_line: Line, pings: list[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = gateway_line
    monkeypatch.setattr(mqtt_connection, "PINGS_UNANSWERED_MAX", 10**9)
    await line.ward.stop()
    line.proxy.reset()
    await line.lost()
    await line.connected()
    line.proxy.black_hole(is_on=True)
    line.send(5)
    pings.clear()
    await until(lambda: len(pings) > 5 * 3)
    assert line.session.connected.is_set()


async def test_a_peer_that_vanished_is_noticed_while_new_connections_work(line: Line, pings: list[None]) -> None:
    """Half-open: the broker still believes in the old connection when the new one comes, under the same client id."""
    line.proxy.reset()
    await line.lost()
    await line.connected()
    line.send(10)
    await line.arrived(10)
    for _ in range(2):
        line.proxy.abandon()
        line.send(5)
        await line.lost()
        await line.connected()
    line.send(5)
    await line.all_is_there_once()


@pytest.fixture
def far_peer(tmp_path: Path) -> Iterator[FarPeer]:
    with contextlib.ExitStack() as connected:
        try:
            yield connected.enter_context(FarPeer(tmp_path / "broker.sock"))
        except NoNamespaceError as error:
            pytest.skip(f"NOT PROVEN HERE, that a peer whose packets vanish is noticed: no network namespace, {error}")


async def test_a_pulled_cable_is_noticed_by_what_stays_unconfirmed(
    far_peer: FarPeer, mosquitto_server: Mosquitto, tmp_path: Path, pings: list[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even when nobody waits for answers to pings, as while a flood is held back. The control has no such limit."""
    monkeypatch.setattr(mqtt_connection, "PINGS_UNANSWERED_MAX", 10**9)
    mosquitto_server.start()

    async def to_broker(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(mosquitto_server.host, mosquitto_server.port)
        await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer))

    login = mosquitto_server.bridge
    brokers = [Broker(far_peer.host, far_peer.port, f"cable-{n}", login.user, login.password) for n in range(2)]
    watching, control = MqttSession(brokers[0]), MqttSession(brokers[1])
    async with await asyncio.start_unix_server(to_broker, tmp_path / "broker.sock"):
        monkeypatch.setattr(tcp, "UNACKNOWLEDGED_S_MAX", 600.0)
        async with connected_session(control):
            monkeypatch.setattr(tcp, "UNACKNOWLEDGED_S_MAX", 1.0)
            async with connected_session(watching):
                await asyncio.to_thread(far_peer.pull_the_cable)
                await until(lambda: not watching.connected.is_set())
                assert "timed out" in watching.last_error
                assert control.connected.is_set()


async def test_resets_lose_and_double_nothing(line: Line) -> None:
    for _ in range(8):
        line.send(10)
        line.proxy.reset()
        await line.lost()
        await line.connected()
    await line.all_is_there_once()
    assert line.proxy.connections >= 9


@pytest.mark.parametrize("is_upstream", [True, False], ids=["upstream", "downstream"])
async def test_cuts_in_mid_frame_lose_and_double_nothing(line: Line, is_upstream: bool) -> None:
    for count in (1, 3, 40, 200, 500, 777, 1501, 3000):
        line.proxy.cut_after(count, is_upstream=is_upstream)
        before = line.proxy.connections
        while line.proxy.connections == before:
            line.send(2)
            await asyncio.sleep(0.02)
        await line.connected()
    line.proxy.cut_after(10**9, is_upstream=is_upstream)
    await line.all_is_there_once()
    assert line.proxy.connections >= 9
    assert len(line.delivered) >= line.sent


async def test_control_what_is_forgotten_when_it_is_handed_to_the_socket_is_lost(gateway_line: Line) -> None:
    """The same cuts and the same books, with a sender that believes what it wrote to be there."""
    line = gateway_line
    publish = line.session.publish
    forgetting: list[asyncio.Task[Any]] = []

    def reckless(message: Outbound) -> asyncio.Future[None]:
        answer = publish(message)
        if topics.parse(message.topic).kind is topics.TopicKind.DATA:
            everything = [(0, line.sent)]
            epoch = line.outbox.epoch
            forgetting.append(
                asyncio.create_task(line.outbox.forget("STRAP-1", "vital_signs", epoch, everything))  # type: ignore[arg-type]
            )
        return answer

    line.session.publish = reckless  # type: ignore[method-assign]
    for count in (200, 500, 777, 1501):
        line.proxy.cut_after(count)
        before = line.proxy.connections
        while line.proxy.connections == before:
            line.send(2)
            await asyncio.sleep(0.02)
        await line.connected()
    await asyncio.gather(*forgetting)
    await asyncio.wait_for(line.outbox.empty.wait(), SECONDS_MAX)
    await asyncio.sleep(1.0)  # for what is on its way to the stores: the books can only get better
    assert await line.ward.value("SELECT sum(point_count) FROM signal_streams") < POINTS_A_BLOCK * line.sent


async def test_memory_is_flat_while_nothing_gets_through(gateway_line: Line) -> None:
    """What is on its way stays within the window of each lane, and the rest on the disk."""
    line = gateway_line
    line.proxy.black_hole(is_on=True)
    connection, window = line.session._connection, line.edge.uplink.sender._window
    assert connection is not None
    under_way, handed = [], []
    for _ in range(30):
        line.send(100)
        await line.outbox.commit()
        for _ in range(20):
            await asyncio.sleep(0)
        under_way.append(window.bytes_under_way)
        handed.append(len(connection._inflight) + len(connection._waiting) + len(connection._giving_way))
    await until(lambda: line.outbox.holding.rows == 3000)
    assert line.session._connection is connection  # not noticed yet: that is when it could pile up
    largest = max(len(stored.row.payload.data) for stored in await line.outbox.fetch(0, 10**9, 100)) + 200
    assert max(under_way) <= 2 * (WINDOW_BYTES_MAX + largest)
    assert max(handed) == max(handed[5:15])  # it grew at the beginning, and then no more
    line.proxy.black_hole(is_on=False)
    await line.all_is_there_once()
