"""The MQTT session against a scripted broker that does what a real one does rarely, or only when it is broken."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from tenacity import RetryCallState

from gateway import mqtt, mqtt_connection
from gateway.errors import RefusedError, UnavailableError
from gateway.mqtt import Broker, Inbound, MqttSession, Outbound, connected_session

SECONDS_MAX = 10.0

CONNECT, CONNACK, PUBLISH, PUBACK, SUBSCRIBE, SUBACK, PINGREQ, PINGRESP, DISCONNECT = 1, 2, 3, 4, 8, 9, 12, 13, 14
RECEIVE_MAXIMUM = 0x21
MAXIMUM_PACKET_SIZE = 0x27
SESSION_TAKEN_OVER = 0x8E
NOT_AUTHORIZED = 0x87


def packet(kind: int, body: bytes = b"", flags: int = 0) -> bytes:
    """MQTT 5, section 2.1: fixed header with a variable length, and the rest."""
    length, size = bytearray(), len(body)
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    return bytes([kind << 4 | flags]) + bytes([*length, size]) + body


def connack(code: int = 0, properties: bytes = b"") -> bytes:
    return packet(CONNACK, bytes([0, code, len(properties)]) + properties)


def publish(mid: int, payload: bytes, qos: int = 1) -> bytes:
    return packet(PUBLISH, b"\x00\x01t" + (mid.to_bytes(2, "big") if qos else b"") + b"\x00" + payload, flags=qos << 1)


@dataclass
class Peer:
    """The broker's end of one connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    got: list[tuple[int, bytes]] = field(default_factory=list)
    answers_pings: bool = True

    async def receive(self) -> tuple[int, bytes]:
        """Next packet as (kind, body); pings are answered and kept in `got` as the others."""
        head = (await self.reader.readexactly(1))[0]
        size = shift = 0
        while True:
            byte = (await self.reader.readexactly(1))[0]
            size |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        self.got.append((head >> 4, await self.reader.readexactly(size)))
        if head >> 4 == PINGREQ and self.answers_pings:
            await self.send(packet(PINGRESP))
        return self.got[-1]

    async def expect(self, kind: int) -> bytes:
        """The body of the next packet of this kind."""
        while True:
            got, body = await self.receive()
            if got == kind:
                return body

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def greet(self, properties: bytes = b"") -> None:
        await self.expect(CONNECT)
        await self.send(connack(properties=properties))

    async def listen(self) -> None:
        while True:
            await self.receive()


Script = Callable[[Peer], Awaitable[None]]


@asynccontextmanager
async def scripted_broker(script: Script) -> AsyncIterator[Broker]:
    """A broker that runs the script on every connection and then closes it."""
    scripts: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        scripts.add(task)
        try:
            await script(Peer(reader, writer))
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # asyncio.streams of Python 3.11 logs a cancelled one as an error
        finally:
            scripts.discard(task)
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield Broker("127.0.0.1", server.sockets[0].getsockname()[1], "scripted")
    finally:
        server.close()
        for task in list(scripts):
            task.cancel()
        await asyncio.gather(*scripts, return_exceptions=True)
        await server.wait_closed()


@asynccontextmanager
async def running(session: MqttSession) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(session.run())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(SECONDS_MAX):
        while not condition():  # noqa: ASYNC110 - most conditions here have no event of their own
            await asyncio.sleep(0.005)


@pytest.fixture
def frequent_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt_connection, "KEEPALIVE_S", 0.1)
    monkeypatch.setattr(mqtt_connection.paho.Client, "keepalive", property(lambda _: 0.1, lambda *_: None))


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt, "BACKOFF_S_MAX", 0.05)


async def test_a_reused_packet_id_is_not_acknowledged_by_the_message_that_had_it_before() -> None:
    got: list[Inbound] = []
    first_acknowledged, acknowledgements = asyncio.Event(), []

    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.send(publish(1, b"first"))
        acknowledgements.append(await peer.expect(PUBACK))
        await peer.send(publish(1, b"second"))
        first_acknowledged.set()
        while True:
            kind, body = await peer.receive()
            if kind == PUBACK:
                acknowledgements.append(body)
            if kind == PUBLISH:
                await peer.send(packet(PUBACK, body[3:5]))

    async with scripted_broker(script) as broker:
        session = MqttSession(broker, on_message=got.append)
        async with connected_session(session):
            await until(lambda: len(got) == 1)
            got[0].acknowledge()
            await until(lambda: len(got) == 2)
            got[0].acknowledge()
            await asyncio.wait_for(session.publish(Outbound("t", b"")), SECONDS_MAX)
            assert len(acknowledgements) == 1
            got[1].acknowledge()
            await until(lambda: len(acknowledgements) == 2)


async def test_qos_0_is_never_acknowledged() -> None:
    got: list[Inbound] = []
    kinds: list[int] = []

    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.send(publish(0, b"x", qos=0))
        while True:
            kind, body = await peer.receive()
            kinds.append(kind)
            if kind == PUBLISH:
                await peer.send(packet(PUBACK, body[3:5]))

    async with scripted_broker(script) as broker:
        session = MqttSession(broker, on_message=got.append)
        async with connected_session(session):
            await until(lambda: got)
            got[0].acknowledge()
            await asyncio.wait_for(session.publish(Outbound("t", b"")), SECONDS_MAX)
    assert PUBACK not in kinds


async def test_the_brokers_receive_maximum_is_kept() -> None:
    at_a_time: list[int] = []

    async def script(peer: Peer) -> None:
        await peer.greet(bytes([RECEIVE_MAXIMUM, 0, 2]))
        while True:
            unanswered = [await peer.expect(PUBLISH)]
            with contextlib.suppress(TimeoutError):
                while True:  # what may come without an answer comes at once
                    unanswered.append(await asyncio.wait_for(peer.expect(PUBLISH), 0.05))
            at_a_time.append(len(unanswered))
            for body in unanswered:
                await peer.send(packet(PUBACK, body[3:5]))

    async with scripted_broker(script) as broker, connected_session(MqttSession(broker)) as session:
        answers = [session.publish(Outbound("t", bytes([number]))) for number in range(5)]
        await asyncio.wait_for(asyncio.gather(*answers), SECONDS_MAX)
    assert at_a_time == [2, 2, 1]


@pytest.mark.parametrize("clean", [True, False])
async def test_what_the_broker_is_told_first(clean: bool) -> None:
    told: list[bytes] = []

    async def script(peer: Peer) -> None:
        told.append(await peer.expect(CONNECT))
        await peer.send(connack())
        await peer.listen()

    async with scripted_broker(script) as broker:
        session = MqttSession(broker, clean=clean, receive_maximum=7)
        async with connected_session(session):
            pass
    protocol, version, flags = told[0][:6], told[0][6], told[0][7]
    assert (protocol, version) == (b"\x00\x04MQTT", 5)
    assert flags == (0b10 if clean else 0)  # neither will nor login; clean start
    assert int.from_bytes(told[0][8:10], "big") == mqtt_connection.KEEPALIVE_S
    properties = told[0][11 : 11 + told[0][10]]
    assert b"\x21\x00\x07" in properties
    assert b"\x11" + (0 if clean else mqtt_connection.SESSION_EXPIRY_S).to_bytes(4, "big") in properties
    assert b"\x27" + mqtt_connection.PACKET_BYTES_MAX.to_bytes(4, "big") in properties


async def test_a_message_larger_than_the_broker_takes_is_refused_and_the_session_goes_on() -> None:
    async def script(peer: Peer) -> None:
        await peer.greet(bytes([MAXIMUM_PACKET_SIZE]) + (2000).to_bytes(4, "big"))
        while True:
            await peer.send(packet(PUBACK, (await peer.expect(PUBLISH))[3:5]))

    async with scripted_broker(script) as broker, connected_session(MqttSession(broker)) as session:
        with pytest.raises(RefusedError, match="2000"):
            await session.publish(Outbound("t", bytes(2000)))
        message = Outbound("t", bytes(1900), "application/json", {"schema": "raw", "historical": "0"})
        await asyncio.wait_for(session.publish(message), SECONDS_MAX)


@pytest.mark.parametrize("properties", [{}, {"schema": "vital_signs", "historical": "1"}])
@pytest.mark.parametrize("size", [0, 100, 20_000])
async def test_what_is_just_small_enough_is_as_large_as_was_counted(size: int, properties: dict[str, str]) -> None:
    """The limit is on the whole packet; what is counted may be a few bytes more, never less."""
    message = Outbound("wardlink/v1/gw/data/ä/eeg", bytes(size), "application/cbor", properties)
    sizes: list[int] = []

    async def script(peer: Peer) -> None:
        await peer.greet()
        body = await peer.expect(PUBLISH)
        sizes.append(len(packet(PUBLISH, body)))
        await peer.send(packet(PUBACK, body[2 + body[1] : 4 + body[1]]))

    async with scripted_broker(script) as broker, connected_session(MqttSession(broker)) as session:
        await asyncio.wait_for(session.publish(message), SECONDS_MAX)
    assert 0 <= mqtt_connection._packet_bytes(message) - sizes[0] <= 8


@pytest.mark.parametrize(
    ("code", "kind"),
    [(0x90, RefusedError), (0x99, RefusedError), (NOT_AUTHORIZED, UnavailableError), (0x97, UnavailableError)],
)
async def test_what_lies_in_the_message_is_told_from_what_may_heal(code: int, kind: type[Exception]) -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        mid = (await peer.expect(PUBLISH))[3:5]
        await peer.send(packet(PUBACK, mid + bytes([code, 0])))
        await peer.listen()

    async with scripted_broker(script) as broker, connected_session(MqttSession(broker)) as session:
        with pytest.raises(kind):
            await asyncio.wait_for(session.publish(Outbound("t", b"")), SECONDS_MAX)
        assert session.connected.is_set()


async def test_a_publish_that_the_broker_declines_fails_with_its_reason() -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        while True:
            mid = (await peer.expect(PUBLISH))[3:5]
            await peer.send(packet(PUBACK, mid + bytes([NOT_AUTHORIZED, 0])))

    async with scripted_broker(script) as broker, connected_session(MqttSession(broker)) as session:
        with pytest.raises(UnavailableError, match="Not authorized"):
            await asyncio.wait_for(session.publish(Outbound("t", b"")), SECONDS_MAX)
        assert session.connected.is_set()


async def test_publishes_that_wait_their_turn_fail_with_the_connection() -> None:
    async def script(peer: Peer) -> None:
        await peer.greet(bytes([RECEIVE_MAXIMUM, 0, 1]))
        await peer.expect(PUBLISH)

    async with scripted_broker(script) as broker, connected_session(MqttSession(broker)) as session:
        answers = [session.publish(Outbound("t", b"")) for _ in range(3)]
        results = await asyncio.wait_for(asyncio.gather(*answers, return_exceptions=True), SECONDS_MAX)
    assert all(isinstance(result, UnavailableError) for result in results)


async def test_a_session_taken_over_says_who_might_be_the_other() -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.send(packet(DISCONNECT, bytes([SESSION_TAKEN_OVER, 0])))

    async with scripted_broker(script) as broker:
        session = MqttSession(broker)
        async with running(session):
            await until(lambda: "another client uses the same client id" in session.last_error)


async def test_a_refused_subscription_is_said_and_tried_again() -> None:
    tries = 0

    async def script(peer: Peer) -> None:
        nonlocal tries
        tries += 1
        await peer.greet()
        mid = (await peer.expect(SUBSCRIBE))[:2]
        await peer.send(packet(SUBACK, mid + bytes([0, NOT_AUTHORIZED])))
        await peer.listen()

    async with scripted_broker(script) as broker:
        session = MqttSession(broker, subscriptions=["secret/#"])
        async with running(session):
            await until(lambda: tries >= 2)
            assert not session.connected.is_set()
            assert "refuses to subscribe" in session.last_error


async def test_a_broker_that_says_nothing_is_given_up_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt, "CONNECT_TIMEOUT_S", 0.1)
    tries = 0

    async def script(peer: Peer) -> None:
        nonlocal tries
        tries += 1
        await peer.listen()

    async with scripted_broker(script) as broker:
        session = MqttSession(broker)
        async with running(session) as task:
            await until(lambda: tries >= 3)
            assert not task.done()
            assert "no answer" in session.last_error


async def test_a_link_that_fell_silent_is_given_up(frequent_pings: None) -> None:

    async def script(peer: Peer) -> None:
        peer.answers_pings = False
        await peer.greet()
        await peer.listen()

    async with scripted_broker(script) as broker:
        session = MqttSession(broker)
        async with running(session):
            await until(lambda: "silent" in session.last_error)


async def test_a_flood_held_back_for_long_keeps_the_connection(frequent_pings: None) -> None:
    """No answer to a ping is read meanwhile, so that must not count, and pings must go out or the broker gives up."""
    peers: list[Peer] = []
    flood = 50

    async def script(peer: Peer) -> None:
        peers.append(peer)
        await peer.greet()
        await peer.send(b"".join(publish(mid, bytes(1000)) for mid in range(1, flood + 1)))
        await peer.listen()

    async with scripted_broker(script) as broker:
        held: list[Inbound] = []
        session = MqttSession(broker, on_message=held.append, bytes_unacknowledged_max=5000)
        async with connected_session(session):
            pings = 3 * mqtt_connection.PINGS_UNANSWERED_MAX
            await until(lambda: [kind for kind, _ in peers[0].got].count(PINGREQ) >= pings)
            assert len(peers) == 1
            assert 0 < len(held) <= 5
            done = 0
            async with asyncio.timeout(SECONDS_MAX):
                while done < flood:
                    while held:
                        message = held.pop(0)
                        message.acknowledge()
                        session.release(message)
                        done += 1
                    await asyncio.sleep(0)
            await until(lambda: [kind for kind, _ in peers[0].got].count(PUBACK) == flood)
            assert len(peers) == 1


async def test_what_is_held_bounds_the_next_connections_too(frequent_pings: None) -> None:
    """While nothing is read, the end of the connection shows when a ping cannot be sent."""
    connections = 0

    async def script(peer: Peer) -> None:
        nonlocal connections
        await peer.greet()
        await peer.send(b"".join(publish(mid, bytes(1000)) for mid in range(1, 11)))
        mid = (await peer.expect(SUBSCRIBE))[:2]
        await peer.send(packet(SUBACK, mid + b"\x00\x01"))
        connections += 1
        if connections < 5:
            await peer.expect(PUBLISH)
        else:
            await peer.listen()

    async with scripted_broker(script) as broker:
        held: list[Inbound] = []
        session = MqttSession(broker, on_message=held.append, subscriptions=["t"], bytes_unacknowledged_max=5000)
        async with running(session):
            for wanted in range(1, 5):
                await until(lambda wanted=wanted: connections == wanted and session.connected.is_set())
                session.publish(Outbound("t", b""))  # the script's sign to close
                await until(lambda wanted=wanted: connections == wanted + 1)
            await asyncio.wait_for(session.connected.wait(), SECONDS_MAX)
            assert len(held) <= 5


@pytest.mark.parametrize(("stable_s", "attempts"), [(0.0, [1, 1, 1, 1]), (60.0, [1, 2, 3, 4])])
async def test_connections_that_do_not_last_let_the_back_off_grow(
    monkeypatch: pytest.MonkeyPatch, stable_s: float, attempts: list[int]
) -> None:
    seen: list[int] = []

    def wait(state: RetryCallState) -> float:
        seen.append(state.attempt_number)
        return 0.001

    async def script(peer: Peer) -> None:
        await peer.greet()

    monkeypatch.setattr(mqtt, "STABLE_S", stable_s)
    monkeypatch.setattr(mqtt, "wait_random_exponential", lambda **_: wait)
    async with scripted_broker(script) as broker, running(MqttSession(broker)):
        await until(lambda: len(seen) >= 4)
    assert seen[:4] == attempts


@pytest.mark.parametrize("with_will", [True, False])
async def test_a_cancelled_session_says_goodbye_after_its_last_words(with_will: bool) -> None:
    got: list[tuple[int, bytes]] = []
    ended = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.greet()
        try:
            while True:
                got.append(await peer.receive())
        finally:
            ended.set()

    async with scripted_broker(script) as broker:
        session = MqttSession(broker, will=Outbound("t", b"gone") if with_will else None)
        async with connected_session(session):
            answer = session.publish(Outbound("t", b"last words"))
        await asyncio.wait_for(ended.wait(), SECONDS_MAX)
    assert isinstance(answer.exception(), UnavailableError)
    told = [(kind, body) for kind, body in got if kind != PINGREQ]
    assert [kind for kind, _ in told] == [PUBLISH, DISCONNECT]
    assert told[1][1][:1] == (b"\x04" if with_will else b"\x00")  # "Disconnect with Will Message"


async def test_a_topic_that_is_no_text_costs_the_connection_and_no_more() -> None:
    tries = 0

    async def script(peer: Peer) -> None:
        nonlocal tries
        tries += 1
        await peer.greet()
        await peer.send(packet(PUBLISH, b"\x00\x01\xff\x00\x01\x00x", flags=2))
        await peer.listen()

    async with scripted_broker(script) as broker:
        session = MqttSession(broker, on_message=lambda _: None)
        async with running(session) as task:
            await until(lambda: tries >= 2)
            assert not task.done()
            assert "not MQTT" in session.last_error


@pytest.mark.parametrize("seed", range(30))
async def test_a_peer_that_speaks_no_mqtt_is_an_error_and_is_tried_again(
    seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    tries = 0
    source = random.Random(seed)
    greeting = b"HTTP/1.1 400 Bad Request\r\n\r\n" if seed == 0 else source.randbytes(200)
    if seed % 3 == 1:  # a good beginning, then rubbish with a plausible head
        kind = source.choice([CONNACK, PUBLISH, PUBACK, SUBACK, DISCONNECT])
        greeting = connack() + packet(kind, source.randbytes(source.randrange(20)), source.randrange(16))

    async def script(peer: Peer) -> None:
        nonlocal tries
        tries += 1
        await peer.expect(CONNECT)
        await peer.send(greeting)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(peer.listen(), 0.05)

    async with scripted_broker(script) as broker:
        session = MqttSession(broker, on_message=lambda _: None, subscriptions=["t"])
        async with running(session) as task:
            await until(lambda: tries >= 2)
            assert not task.done()
            assert session.last_error
    assert [record for record in caplog.records if record.name != "gateway.mqtt" or record.exc_info] == []


@pytest.mark.parametrize("is_bounded", [True, False], ids=["bounded", "control"])
async def test_what_gives_way_is_overtaken_even_when_the_link_is_stuck(
    monkeypatch: pytest.MonkeyPatch, is_bounded: bool
) -> None:
    """Only what the socket has is final; with no bound on what paho is given, nothing can be overtaken."""
    if not is_bounded:
        monkeypatch.setattr(mqtt_connection, "HANDED_BYTES_MAX", 1 << 30)
    total = 600
    reads = asyncio.Event()
    order: list[bytes] = []
    done = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.greet()
        await reads.wait()
        while len(order) < total + 1:
            order.append((await peer.expect(PUBLISH))[2:3])
        done.set()

    async with scripted_broker(script) as broker, connected_session(MqttSession(broker)) as session:
        for _ in range(total):
            session.publish(Outbound("b", bytes(10_000), gives_way=True))
        assert session._connection is not None
        async with asyncio.timeout(SECONDS_MAX):  # until the socket takes no more, and the loop has seen it
            while True:
                handed = len(session._connection._inflight)
                for _ in range(50):
                    await asyncio.sleep(0)
                if handed == len(session._connection._inflight):
                    break
        session.publish(Outbound("a", b""))
        reads.set()
        await asyncio.wait_for(done.wait(), SECONDS_MAX)
    assert order.count(b"b") == total
    if is_bounded:
        assert order.index(b"a") < total / 2
    else:
        assert order.index(b"a") == total


async def test_waiting_for_the_brokers_receive_maximum_what_gives_way_is_overtaken_too() -> None:
    order: list[bytes] = []
    done = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.greet(bytes([RECEIVE_MAXIMUM, 0, 2]))
        while len(order) < 7:
            body = await peer.expect(PUBLISH)
            order.append(body[2:3])
            await peer.send(packet(PUBACK, body[3:5]))
        done.set()

    async with scripted_broker(script) as broker, connected_session(MqttSession(broker)) as session:
        for _ in range(5):
            session.publish(Outbound("b", b"", gives_way=True))
        for _ in range(2):
            session.publish(Outbound("a", b""))
        await asyncio.wait_for(done.wait(), SECONDS_MAX)
    assert b"".join(order) == b"bbaabbb"
