"""The MQTT session against a real mosquitto: publish, acknowledge, lose the broker, come back, end without a trace."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import count
from typing import Self

import psutil
import pytest

from gateway import mqtt, tcp
from gateway.errors import UnavailableError
from gateway.mqtt import Broker, Inbound, MqttSession, Outbound, connected_session
from gateway.mqtt_messages import QOS_AT_MOST_ONCE
from wardlink.servers import Login, Mosquitto

SECONDS_MAX = 10.0
"""For anything awaited here: a deadline, not a measure."""
_numbers = count(1)


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt, "BACKOFF_S_MAX", 0.1)


@pytest.fixture
def mosquitto(mosquitto_server: Mosquitto) -> Iterator[Mosquitto]:
    mosquitto_server.start()
    yield mosquitto_server
    if mosquitto_server.pid is not None:
        os.kill(mosquitto_server.pid, signal.SIGCONT)


@pytest.fixture
def gateway(mosquitto: Mosquitto) -> Login:
    return mosquitto.gateway("gw-mqtt")


def broker_for(server: Mosquitto, login: Login, port: int | None = None) -> Broker:
    return Broker(server.host, port or server.port, f"{login.user}-{next(_numbers)}", login.user, login.password)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(SECONDS_MAX):
        while not condition():  # noqa: ASYNC110 - most conditions here have no event of their own
            await asyncio.sleep(0.01)


@asynccontextmanager
async def running(session: MqttSession) -> AsyncIterator[asyncio.Task[None]]:
    """`session.run()` as a task that need not connect."""
    task = asyncio.create_task(session.run())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class Relay:
    """A TCP relay before the broker, whose connections can be cut with a reset."""

    def __init__(self, port: int) -> None:
        self._to = port
        self.port = 0
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        await self._server.wait_closed()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._to)
        self._writers += [writer, far_writer]
        await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()


async def test_what_is_sent_at_most_once_asks_for_no_answer(mosquitto: Mosquitto, gateway: Login) -> None:
    got: list[Inbound] = []
    sent = Outbound("wardlink/v1/gw-mqtt/time/request", b"1", "application/json", {"schema": "x"}, qos=QOS_AT_MOST_ONCE)
    receiver = MqttSession(
        broker_for(mosquitto, mosquitto.bridge), on_message=got.append, subscriptions=["wardlink/v1/+/time/request"]
    )
    async with connected_session(receiver), connected_session(MqttSession(broker_for(mosquitto, gateway))) as session:
        answer = session.publish(sent)
        assert answer.done()
        assert answer.exception() is None
        await until(lambda: got)
        assert (got[0].payload, got[0].properties) == (b"1", {"schema": "x"})
        got[0].acknowledge()
        assert session._connection is not None
        assert not session._connection._inflight


async def test_publish_is_done_when_the_broker_has_acknowledged(mosquitto: Mosquitto, gateway: Login) -> None:
    got: list[Inbound] = []
    listener = MqttSession(
        broker_for(mosquitto, mosquitto.bridge), on_message=got.append, subscriptions=["wardlink/v1/+/data/#"]
    )
    sender = MqttSession(broker_for(mosquitto, gateway))
    message = Outbound("wardlink/v1/gw-mqtt/data/dev/eeg", b"\x00\xff", "application/cbor", {"schema": "raw"})
    async with connected_session(listener), connected_session(sender):
        await asyncio.wait_for(sender.publish(message), SECONDS_MAX)
        await until(lambda: got)
    assert (got[0].topic, got[0].payload) == (message.topic, message.payload)
    assert (got[0].content_type, got[0].properties, got[0].retain) == ("application/cbor", {"schema": "raw"}, False)
    with pytest.raises(UnavailableError):
        sender.publish(message)


async def test_many_publishes_at_once_are_all_acknowledged_in_order(mosquitto: Mosquitto, gateway: Login) -> None:
    got: list[bytes] = []

    def keep(message: Inbound) -> None:
        got.append(message.payload)
        message.acknowledge()

    listener = MqttSession(
        broker_for(mosquitto, mosquitto.bridge), on_message=keep, subscriptions=["wardlink/v1/gw-mqtt/data/#"]
    )
    sender = MqttSession(broker_for(mosquitto, gateway))
    payloads = [str(number).encode() for number in range(3000)]
    async with connected_session(listener), connected_session(sender):
        futures = [sender.publish(Outbound("wardlink/v1/gw-mqtt/data/d/many", payload)) for payload in payloads]
        await asyncio.wait_for(asyncio.gather(*futures), SECONDS_MAX)
        await until(lambda: len(got) == len(payloads))
    assert got == payloads


async def test_a_killed_broker_fails_what_waits_and_is_found_again(mosquitto: Mosquitto, gateway: Login) -> None:
    got: list[Inbound] = []
    greetings = count()
    greeted = []
    session = MqttSession(
        broker_for(mosquitto, gateway),
        on_message=got.append,
        on_connect=lambda: greeted.append(next(greetings)),
        subscriptions=["wardlink/v1/gw-mqtt/receipt"],
    )
    async with connected_session(session):
        assert session.last_error == ""
        os.kill(mosquitto.pid or 0, signal.SIGSTOP)
        waiting = session.publish(Outbound("wardlink/v1/gw-mqtt/status", b"1"))
        await asyncio.sleep(0)
        assert not waiting.done()
        await asyncio.to_thread(mosquitto.kill)
        with pytest.raises(UnavailableError):
            await asyncio.wait_for(waiting, SECONDS_MAX)
        await until(lambda: not session.connected.is_set())
        assert "lost" in session.last_error or "cannot reach" in session.last_error
        with pytest.raises(UnavailableError):
            session.publish(Outbound("wardlink/v1/gw-mqtt/status", b"2"))
        await asyncio.to_thread(mosquitto.start)
        await asyncio.wait_for(session.connected.wait(), SECONDS_MAX)
        assert greeted == [0, 1]
        bridge = MqttSession(broker_for(mosquitto, mosquitto.bridge))
        async with connected_session(bridge):
            await asyncio.wait_for(bridge.publish(Outbound("wardlink/v1/gw-mqtt/receipt", b"3")), SECONDS_MAX)
            await until(lambda: got)
        assert [message.payload for message in got] == [b"3"]


async def test_what_is_not_acknowledged_comes_again_and_old_acknowledgements_do_no_harm(
    mosquitto: Mosquitto, gateway: Login
) -> None:
    got: list[Inbound] = []
    greeted: list[None] = []
    topic = "wardlink/v1/gw-mqtt/receipt"
    async with Relay(mosquitto.port) as relay:
        session = MqttSession(
            broker_for(mosquitto, gateway, relay.port),
            on_message=got.append,
            on_connect=lambda: greeted.append(None),
            subscriptions=[topic],
            receive_maximum=5,
        )
        bridge = MqttSession(broker_for(mosquitto, mosquitto.bridge))
        async with connected_session(session), connected_session(bridge):
            for payload in (b"a", b"b", b"c"):
                await asyncio.wait_for(bridge.publish(Outbound(topic, payload)), SECONDS_MAX)
            await until(lambda: len(got) == 3)
            first, second, third = got
            second.acknowledge()
            # answered only after the acknowledgement before it
            await asyncio.wait_for(session.publish(Outbound("wardlink/v1/gw-mqtt/status", b"")), SECONDS_MAX)
            relay.cut()
            await until(lambda: len(got) == 5 and session.connected.is_set())
            assert sorted(message.payload for message in got[3:]) == [b"a", b"c"]
            for old in (first, second, third):
                old.acknowledge()
            await asyncio.wait_for(session.publish(Outbound("wardlink/v1/gw-mqtt/status", b"")), SECONDS_MAX)
            relay.cut()
            await until(lambda: len(got) == 7 and session.connected.is_set())
            assert sorted(message.payload for message in got[5:]) == [b"a", b"c"]
            for message in got[5:]:
                message.acknowledge()
                message.acknowledge()
            await asyncio.wait_for(session.publish(Outbound("wardlink/v1/gw-mqtt/status", b"")), SECONDS_MAX)
            relay.cut()
            await until(lambda: len(greeted) == 4)
            await asyncio.wait_for(bridge.publish(Outbound(topic, b"d")), SECONDS_MAX)
            await until(lambda: len(got) == 8)
            assert got[7].payload == b"d"


async def test_a_message_of_qos_0_can_be_acknowledged(mosquitto: Mosquitto, gateway: Login) -> None:
    """Anybody may publish with QoS 0: an acknowledgement with packet id 0 would make the broker close."""
    got: list[Inbound] = []
    topic = "wardlink/v1/gw-mqtt/receipt"
    session = MqttSession(broker_for(mosquitto, gateway), on_message=got.append, subscriptions=[topic])
    async with connected_session(session):
        _, writer = await asyncio.open_connection(mosquitto.host, mosquitto.port)
        user, password = mosquitto.bridge.user.encode(), mosquitto.bridge.password.encode()
        fields = b"".join(len(part).to_bytes(2, "big") + part for part in (b"", user, password))
        connect = b"\x00\x04MQTT\x04\xc2\x00\x0a" + fields
        publish = len(topic).to_bytes(2, "big") + topic.encode() + b"x"
        writer.write(bytes([0x10, len(connect)]) + connect + bytes([0x30, len(publish)]) + publish)
        await until(lambda: got)
        got[0].acknowledge()
        await asyncio.wait_for(session.publish(Outbound("wardlink/v1/gw-mqtt/status", b"")), SECONDS_MAX)
        assert session.connected.is_set()
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("orderly", [True, False])
async def test_the_last_will_arrives(mosquitto: Mosquitto, gateway: Login, orderly: bool) -> None:
    topic = f"wardlink/v1/gw-mqtt/will/{orderly}"
    got: list[Inbound] = []
    listener = MqttSession(
        broker_for(mosquitto, mosquitto.bridge), on_message=got.append, subscriptions=[topic], clean=True
    )
    will = Outbound(topic, b"gone", "application/json", {"schema": "status"}, retain=True)
    async with connected_session(listener), Relay(mosquitto.port) as relay:
        session = MqttSession(broker_for(mosquitto, gateway, relay.port), will=will)
        async with connected_session(session):
            await asyncio.wait_for(session.publish(Outbound(topic, b"here", retain=True)), SECONDS_MAX)
            if not orderly:
                relay.cut()
                await until(lambda: len(got) == 2)
        await until(lambda: len(got) >= 2)
    assert [message.payload for message in got[:2]] == [b"here", b"gone"]
    assert (got[1].content_type, got[1].properties) == ("application/json", {"schema": "status"})


async def test_a_wrong_password_is_said_and_tried_again(
    mosquitto: Mosquitto, gateway: Login, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = Broker(mosquitto.host, mosquitto.port, "gw-wrong", gateway.user, "not this one")
    session = MqttSession(wrong)
    async with running(session) as task:
        await until(lambda: len([record for record in caplog.records if "next attempt" in record.message]) >= 2)
        assert not task.done()
        assert "uthori" in session.last_error
        assert "password" in session.last_error
        assert "not this one" not in session.last_error
    assert all(record.exc_info is None for record in caplog.records)
    assert "not this one" not in caplog.text
    assert "not this one" not in repr(session.broker)


async def test_an_unreachable_port_is_said_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        session = MqttSession(Broker("127.0.0.1", port, "x"))
        async with running(session) as task:
            await until(lambda: len([record for record in caplog.records if "next attempt" in record.message]) >= 2)
            assert not task.done()
            assert "refused" in session.last_error
            assert str(port) in session.last_error
    assert all(record.exc_info is None for record in caplog.records)


async def test_an_unknown_host_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    session = MqttSession(Broker("no-such-host.invalid", 1883, "x"))
    async with running(session):
        await until(lambda: "no-such-host.invalid" in session.last_error)
    assert "mqtt.host" in session.last_error


@pytest.mark.parametrize("host", ["a" * 70 + ".example", "..", "b\xfccher\x00"])
async def test_an_impossible_host_name_is_said(host: str) -> None:
    session = MqttSession(Broker(host, 1883, "x"))
    async with running(session) as task:
        await until(lambda: session.last_error != "not yet tried")
        assert not task.done()
    assert "cannot reach" in session.last_error


async def test_a_flood_is_held_back_and_everything_arrives_after_release(mosquitto: Mosquitto, gateway: Login) -> None:
    payload = bytes(10_000)
    room = 10
    held: list[Inbound] = []
    session = MqttSession(
        broker_for(mosquitto, gateway),
        on_message=held.append,
        subscriptions=["wardlink/v1/gw-mqtt/receipt"],
        receive_maximum=1000,
        bytes_unacknowledged_max=room * len(payload),
    )
    sender = MqttSession(broker_for(mosquitto, mosquitto.bridge))
    numbers = [number.to_bytes(4, "big") for number in range(200)]
    async with connected_session(session), connected_session(sender):
        messages = [Outbound("wardlink/v1/gw-mqtt/receipt", number + payload) for number in numbers]
        await asyncio.wait_for(asyncio.gather(*(sender.publish(message) for message in messages)), SECONDS_MAX)
        await until(lambda: len(held) >= room)
        # a round trip on another connection, and turns of the loop: time enough for one too many
        await asyncio.wait_for(sender.publish(Outbound("wardlink/v1/another/receipt", b"")), SECONDS_MAX)
        for _ in range(100):
            await asyncio.sleep(0)
        assert len(held) <= room + 1
        got: list[bytes] = []
        async with asyncio.timeout(SECONDS_MAX):
            while len(got) < len(numbers):
                while held:
                    message = held.pop(0)
                    got.append(message.payload[:4])
                    message.acknowledge()
                    session.release(message)
                    session.release(message)
                    assert len(held) <= room + 1
                await asyncio.sleep(0)
    assert got == numbers


async def test_twenty_lost_connections_leave_nothing_behind(mosquitto: Mosquitto, gateway: Login) -> None:
    got: list[Inbound] = []
    greeted: list[None] = []
    async with Relay(mosquitto.port) as relay:
        before = await traces()
        session = MqttSession(
            broker_for(mosquitto, gateway, relay.port),
            on_message=got.append,
            on_connect=lambda: greeted.append(None),
            subscriptions=["wardlink/v1/gw-mqtt/#"],
        )
        async with connected_session(session):
            for number in range(1, 21):
                await until(lambda number=number: len(greeted) == number)
                future = session.publish(Outbound("wardlink/v1/gw-mqtt/status", b""))
                relay.cut()
                with pytest.raises(UnavailableError):
                    await asyncio.wait_for(future, SECONDS_MAX)
        relay.cut()
        await settled(before)


@pytest.mark.parametrize("moment", ["look-up", "connect", "tls", "greeting", "back-off", "connected"])
async def test_cancelled_at_any_moment_it_ends_at_once_and_leaves_nothing(
    mosquitto: Mosquitto, gateway: Login, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_name = threading.Event()
    silent = await asyncio.start_server(keep_silent, "127.0.0.1", 0)
    silent_port = silent.sockets[0].getsockname()[1]
    full = socket.socket()
    full.bind(("127.0.0.1", 0))
    full.listen(0)
    fillers = [socket.socket() for _ in range(4)]
    for filler in fillers:
        filler.settimeout(0)
        filler.connect_ex(full.getsockname())
    resolve = socket.getaddrinfo

    def wait_for_name(host: str, *arguments: object, **options: object) -> object:
        if host == "slow.example":
            if options.get("flags") == socket.AI_NUMERICHOST:
                raise socket.gaierror
            answer_name.wait(SECONDS_MAX)
        return resolve(host, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(tcp.socket, "getaddrinfo", wait_for_name)
    brokers = {
        "look-up": Broker("slow.example", 1883, "x"),
        "connect": Broker("127.0.0.1", full.getsockname()[1], "x"),
        "tls": Broker("127.0.0.1", silent_port, "x", tls=mqtt.Tls()),
        "greeting": Broker("127.0.0.1", silent_port, "x"),
        "back-off": Broker("127.0.0.1", 1, "x"),
        "connected": broker_for(mosquitto, gateway),
    }
    monkeypatch.setattr(mqtt, "BACKOFF_S_MAX", 1000.0)
    monkeypatch.setattr(mqtt, "wait_random_exponential", lambda **_: lambda _state: 1000.0)
    before = await traces()
    session = MqttSession(brokers[moment])
    task = asyncio.create_task(session.run())
    if moment == "back-off":
        await until(lambda: session.last_error != "not yet tried")
    elif moment == "connected":
        await asyncio.wait_for(session.connected.wait(), SECONDS_MAX)
    else:
        await asyncio.sleep(0.3)  # no condition to wait for: nothing must have happened yet
        assert session.last_error == "not yet tried"
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=1.5)
    assert done
    assert task.cancelled()
    assert not session.connected.is_set()
    answer_name.set()
    await settled(before)
    for filler in [*fillers, full]:
        filler.close()
    silent.close()
    await silent.wait_closed()


def test_a_look_up_that_hangs_does_not_keep_the_program_from_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_name = threading.Event()

    def hang(_host: str, *_: object, **options: object) -> object:
        if options.get("flags") != socket.AI_NUMERICHOST:
            answer_name.wait(SECONDS_MAX)
        raise socket.gaierror

    async def try_shortly() -> None:
        async with asyncio.timeout(0.1):
            await MqttSession(Broker("slow.example", 1883, "x")).run()

    def whole_program() -> None:
        with contextlib.suppress(TimeoutError):
            asyncio.run(try_shortly())

    monkeypatch.setattr(tcp.socket, "getaddrinfo", hang)
    ending = threading.Thread(target=whole_program)
    ending.start()
    ending.join(SECONDS_MAX / 2)
    assert not ending.is_alive()
    answer_name.set()
    for thread in threading.enumerate():
        if thread.name == "wardlink-resolver":
            thread.join(SECONDS_MAX)


async def test_an_error_in_on_connect_ends_the_session_cleanly(mosquitto: Mosquitto, gateway: Login) -> None:
    def fail() -> None:
        raise LookupError("a bug")

    before = await traces()
    session = MqttSession(broker_for(mosquitto, gateway), on_connect=fail)
    with pytest.raises(LookupError):
        await asyncio.wait_for(session.run(), SECONDS_MAX)
    assert not session.connected.is_set()
    await settled(before)


async def test_two_clients_of_one_id_say_so(
    mosquitto: Mosquitto, gateway: Login, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    broker = broker_for(mosquitto, gateway)
    async with connected_session(MqttSession(broker)), connected_session(MqttSession(broker)):
        await until(lambda: f"another client use the client id {broker.client_id!r}" in caplog.text)


async def keep_silent(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        await _reader.read()
    except ConnectionError:
        pass
    finally:
        writer.close()


Traces = tuple[int, int, int]


async def traces() -> Traces:
    """Threads, open descriptors and tasks of this process, without the executor's idle workers."""
    gc.collect()
    threads = [thread for thread in threading.enumerate() if not thread.name.startswith("asyncio_")]
    return len(threads), psutil.Process().num_fds(), len(asyncio.all_tasks())


async def settled(before: Traces) -> None:
    """Wait until there are no more traces than before."""
    now = await traces()
    async with asyncio.timeout(SECONDS_MAX):
        while any(later > earlier for later, earlier in zip(now, before, strict=True)):
            await asyncio.sleep(0.01)
            now = await traces()
