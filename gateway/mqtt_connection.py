"""One connection to an MQTT 5 broker, from CONNECT to its loss. The only file that imports paho.

paho does the protocol; the event loop reads and writes its socket, so there is no thread and no lock to wait for.
Every connection is a paho client of its own: no packet id of a lost one can ever be acknowledged on the next.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import struct
from collections import deque
from collections.abc import Callable, Sequence

import paho.mqtt.client as paho
from paho.mqtt import MQTTException
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from gateway.errors import RefusedError, UnavailableError
from gateway.mqtt_messages import (
    MESSAGE_OVERHEAD_BYTES,
    QOS_AT_LEAST_ONCE,
    Hello,
    Inbound,
    Intake,
    Outbound,
)

KEEPALIVE_S = 10
"""What the broker is told: it gives a silent client up after one and a half of these, and then the last will tells that
the gateway is gone: within 15 s."""
PING_SHARE = 0.4
"""Of the keep-alive from one ping to the next. A ping and its answer are about 200 bytes on the wire: 4 MB a day, on a
link that a device's blocks keep awake anyway. A seldom ping would save little and leave a dead link unnoticed."""
PINGS_UNANSWERED_MAX = 2
"""A link on which nothing came since so many pings is given up at the next one: within 12 s, before the broker does."""
SESSION_EXPIRY_S = 7 * 24 * 3600
"""How long a broker keeps the session of a client that is away."""
PACKET_BYTES_MAX = 4 << 20
INFLIGHT_MAX = 1000
"""Publishes without an answer at a time; less if the broker says so, as AWS and EMQX do. More wait their turn."""
HANDED_BYTES_MAX = 16 << 10
"""What paho may hold that the kernel has not taken, a message more or less: what it holds cannot be overtaken."""
PACKETS_PER_TURN_MAX = 64
"""Read before the event loop's other work gets its turn."""
_DISCONNECT_GRACE_S = 2.0
_NOT_MQTT = (MQTTException, ValueError, LookupError, TypeError, AttributeError, struct.error)
"""What paho raises on a peer's bytes that are no MQTT."""
_UNSPECIFIED = 0x80
_CREDENTIALS_HINT = "check user name, password and the broker's access list"
_NEVER = {0x90, 0x99}
"""Reasons that lie in the message itself, which another attempt does not change: its topic, its payload."""
_HINTS = {
    0x84: "the broker must speak MQTT 5",
    0x85: "the broker does not like the client id",
    0x86: _CREDENTIALS_HINT,
    0x87: _CREDENTIALS_HINT,
    0x8E: "another client uses the same client id",
    0x95: "the broker's limit on messages must be raised",
}
"""By reason code: MQTT 5, section 2.4."""


class Connection:
    """One paho client from CONNECT to loss. The `_on_…` methods are paho's callbacks and call no paho but subscribe."""

    def __init__(
        self,
        opened: socket.socket,
        hello: Hello,
        subscriptions: Sequence[str],
        on_message: Callable[[Inbound], None] | None,
        intake: Intake,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self._opened = opened
        self._client = client = _Client(opened, hello.client_id, manual_ack=on_message is not None)
        self._hello = hello
        self.lost: asyncio.Future[str] = self.loop.create_future()
        self._established: asyncio.Future[None] = self.loop.create_future()
        self._closed: asyncio.Future[None] = self.loop.create_future()
        self._subscriptions = subscriptions
        self._deliver = on_message
        self._intake = intake
        intake.on_room = self._resume
        self._greeted = False
        self._reading = False
        self._packets_handled = 0
        self._pings_unanswered = 0
        self._next_beat: asyncio.TimerHandle | None = None
        self._inflight_max = INFLIGHT_MAX
        self._packet_bytes_max: int | None = None
        self._inflight: dict[int, asyncio.Future[None]] = {}
        self._waiting: deque[tuple[Outbound, asyncio.Future[None]]] = deque()
        self._giving_way: deque[tuple[Outbound, asyncio.Future[None]]] = deque()
        self._handed_bytes = 0
        """What paho was given since it last had nothing to write."""
        self._deliveries: dict[int, Inbound] = {}
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_disconnect = self._on_disconnect
        client.on_publish = self._on_publish
        client.on_message = self._on_message
        client.on_socket_open = self._on_socket_open
        client.on_socket_close = self._on_socket_close
        client.on_socket_register_write = self._on_register_write
        client.on_socket_unregister_write = self._on_unregister_write

    @property
    def is_open(self) -> bool:
        return self._client.socket() is not None and not self.lost.done()

    async def greet(self, host: str, port: int, timeout_s: float) -> None:
        """CONNECT and SUBSCRIBE. Raises `UnavailableError` with the broker's reason, or where it does not answer."""
        hello = self._hello
        if hello.username is not None:
            self._client.username_pw_set(hello.username, hello.password)
        if hello.will is not None:
            will = _properties(hello.will, PacketTypes.WILLMESSAGE)
            self._client.will_set(hello.will.topic, hello.will.payload, QOS_AT_LEAST_ONCE, hello.will.retain, will)
        properties = _typed_properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = 0 if hello.clean else SESSION_EXPIRY_S
        properties.ReceiveMaximum = hello.receive_maximum
        properties.MaximumPacketSize = PACKET_BYTES_MAX
        self._client.connect(host, port, KEEPALIVE_S, clean_start=hello.clean, properties=properties)
        await asyncio.wait([self._established], timeout=timeout_s)
        if not self._established.done():
            raise UnavailableError(f"no answer within {timeout_s:.0f} s")
        self._established.result()

    def publish(self, message: Outbound) -> asyncio.Future[None]:
        answer: asyncio.Future[None] = self.loop.create_future()
        if self._packet_bytes_max is not None and _packet_bytes(message) > self._packet_bytes_max:
            reason = f"{message.topic}: {len(message.payload)} bytes are more than the broker takes"
            _fail(answer, RefusedError(reason, hint=f"its maximum packet size is {self._packet_bytes_max}"))
        else:
            (self._giving_way if message.gives_way else self._waiting).append((message, answer))
            self._send_waiting()
        return answer

    def acknowledge(self, message: Inbound, mid: int) -> None:
        if self._deliveries.get(mid) is message:
            del self._deliveries[mid]
            self._client.ack(mid, QOS_AT_LEAST_ONCE)

    async def end(self) -> None:
        """Say goodbye, for which there is a short time, and close; a last will is sent."""
        try:
            if self.is_open:
                name = "Disconnect with will message" if self._hello.will else "Normal disconnection"
                self._client.disconnect(ReasonCode(PacketTypes.DISCONNECT, name))
                self._write()
                await asyncio.wait([self._closed], timeout=_DISCONNECT_GRACE_S)
        finally:
            self.drop()

    def drop(self) -> None:
        """Close at once and fail what waits."""
        self._client.drop()
        self._lose("ended")
        self._deliveries.clear()
        self._intake.on_room = lambda: None
        if self._next_beat is not None:
            self._next_beat.cancel()

    def _send(self, message: Outbound, answer: asyncio.Future[None]) -> None:
        properties = _properties(message, PacketTypes.PUBLISH)
        info = self._client.publish(message.topic, message.payload, message.qos, message.retain, properties)
        if info.rc == paho.MQTT_ERR_SUCCESS:
            self._handed_bytes += len(message.payload) + MESSAGE_OVERHEAD_BYTES
            if message.qos == QOS_AT_LEAST_ONCE:
                self._inflight[info.mid] = answer
            else:
                answer.set_result(None)
        else:
            _fail(answer, UnavailableError(f"broker did not take a message: {paho.error_string(info.rc)}"))

    def _lose(self, reason: str) -> None:
        if not self.lost.done():
            self.lost.set_result(reason)
        self._establish(UnavailableError(reason))
        waiting = [*self._inflight.values(), *(answer for _, answer in (*self._waiting, *self._giving_way))]
        self._inflight.clear()
        self._waiting.clear()
        self._giving_way.clear()
        for answer in waiting:
            _fail(answer, UnavailableError(f"broker did not take a message: {reason}"))

    def _establish(self, failure: UnavailableError | None) -> None:
        if failure is not None:
            _fail(self._established, failure)
        elif not self._established.done():
            self._established.set_result(None)

    def _read(self) -> None:
        for _ in range(PACKETS_PER_TURN_MAX):
            handled = self._packets_handled
            if not self._guarded(self._client.loop_read) or self._pause_if_full():
                return
            self._pings_unanswered = 0
            if handled == self._packets_handled:
                break
        opened = self._opened
        if isinstance(opened, ssl.SSLSocket) and opened.pending() > 0:
            # decrypted already: the descriptor will not become readable for it
            self.loop.call_soon(self._read_more)

    def _read_more(self) -> None:
        if self._reading:
            self._read()

    def _write(self) -> None:
        if self._guarded(self._client.loop_write) and not self._client.want_write():
            self._handed_bytes = 0
            self._send_waiting()

    def _guarded(self, step: Callable[[], object]) -> bool:
        """Whether the connection is still open after this step of paho's."""
        try:
            step()
        except _NOT_MQTT as error:
            self._lose(f"the broker sent what is not MQTT: {error!r}")
        return self.is_open

    def _pause_if_full(self) -> bool:
        if self._greeted and self._reading and self._intake.is_full:
            self._reading = False
            self.loop.remove_reader(self._opened.fileno())
            self._establish(None)  # the answer to SUBSCRIBE may be behind what is not read now
        return not self._reading

    def _resume(self) -> None:
        if self.is_open and not self._reading:
            self._reading = True
            self._pings_unanswered = 0
            self.loop.add_reader(self._opened.fileno(), self._read)
            self.loop.call_soon(self._read_more)

    def _beat(self) -> None:
        """Ping. Not answered while reading pauses, which is no sign of a dead link then."""
        if not self.is_open:
            return
        if self._pings_unanswered >= PINGS_UNANSWERED_MAX:
            self._lose("the broker is silent")
            return
        if self._reading:
            self._pings_unanswered += 1
        self._client.ping()
        interval_s = min(self._client.keepalive or KEEPALIVE_S, KEEPALIVE_S) * PING_SHARE
        self._next_beat = self.loop.call_later(interval_s, self._beat)

    def _on_socket_open(self, _client: paho.Client, _data: object, opened: paho.SocketLike) -> None:
        self._reading = True
        self.loop.add_reader(opened.fileno(), self._read)

    def _on_socket_close(self, _client: paho.Client, _data: object, opened: paho.SocketLike) -> None:
        self._reading = False
        self.loop.remove_reader(opened.fileno())
        self.loop.remove_writer(opened.fileno())
        if not self._closed.done():
            self._closed.set_result(None)

    def _on_register_write(self, _client: paho.Client, _data: object, opened: paho.SocketLike) -> None:
        self.loop.add_writer(opened.fileno(), self._write)

    def _on_unregister_write(self, _client: paho.Client, _data: object, opened: paho.SocketLike) -> None:
        self.loop.remove_writer(opened.fileno())

    def _on_connect(
        self, client: paho.Client, _data: object, _flags: object, code: ReasonCode, properties: Properties | None
    ) -> None:
        if code.is_failure:
            self._establish(UnavailableError(f"the broker says: {code}", hint=_HINTS.get(code.value, "")))
            return
        self._greeted = True
        self._inflight_max = min(getattr(properties, "ReceiveMaximum", INFLIGHT_MAX), INFLIGHT_MAX)
        self._packet_bytes_max = getattr(properties, "MaximumPacketSize", None)
        self.loop.call_soon(self._beat)
        if self._subscriptions:
            options = SubscribeOptions(qos=QOS_AT_LEAST_ONCE)
            client.subscribe([(topic, options) for topic in self._subscriptions])
        else:
            self._establish(None)

    def _on_subscribe(
        self, _client: paho.Client, _data: object, _mid: int, codes: list[ReasonCode], _properties: object
    ) -> None:
        refused = [str(code) for code in codes if code.is_failure]
        if refused:
            self._lose(f"the broker refuses to subscribe: {refused[0]}")
        else:
            self._establish(None)

    def _on_disconnect(
        self, _client: paho.Client, _data: object, _flags: object, code: ReasonCode, _properties: object
    ) -> None:
        said = str(code) if code.value != _UNSPECIFIED else self._client.trouble or "closed by the broker"
        hint = _HINTS.get(code.value)
        self._lose(f"{said} ({hint})" if hint else said)

    def _on_publish(self, _client: paho.Client, _data: object, mid: int, code: ReasonCode, _properties: object) -> None:
        self._packets_handled += 1
        answer = self._inflight.pop(mid, None)
        if answer is not None and code.is_failure:
            kind = RefusedError if code.value in _NEVER else UnavailableError
            _fail(answer, kind(f"broker did not take a message: {code}", hint=_HINTS.get(code.value, "")))
        elif answer is not None and not answer.done():
            answer.set_result(None)
        if self._waiting or self._giving_way:
            self.loop.call_soon(self._send_waiting)

    def _send_waiting(self) -> None:
        """Hand on what broker and socket have room for; the order in which paho got it is final."""
        while self.is_open and len(self._inflight) < self._inflight_max and self._handed_bytes < HANDED_BYTES_MAX:
            waiting = self._waiting or self._giving_way
            if not waiting:
                return
            self._send(*waiting.popleft())

    def _on_message(self, _client: paho.Client, _data: object, message: paho.MQTTMessage) -> None:
        self._packets_handled += 1
        properties = message.properties
        inbound = Inbound(
            topic=message.topic,
            payload=bytes(message.payload),
            content_type=getattr(properties, "ContentType", None),
            properties=dict(getattr(properties, "UserProperty", ())),
            retain=message.retain,
            _mid=message.mid,
            _acknowledge=self.acknowledge,
        )
        if message.qos == QOS_AT_LEAST_ONCE:
            self._deliveries[message.mid] = inbound
        if self._deliver is not None:
            self._intake.take(inbound)
            self.loop.call_soon(self._deliver, inbound)


class _Client(paho.Client):
    """paho's client on a socket that is open already: its own way to connect blocks and cannot be cancelled."""

    def __init__(self, opened: socket.socket, client_id: str, *, manual_ack: bool) -> None:
        super().__init__(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            protocol=paho.MQTTv5,
            manual_ack=manual_ack,
            reconnect_on_failure=False,
        )
        self.opened = opened
        self.trouble = ""
        """What paho last complained of: the cause of a lost connection that its callback does not tell."""
        self.max_inflight_messages_set(0)
        complaints = logging.Logger("paho", logging.ERROR)  # noqa: LOG001 - of this client alone, in no hierarchy
        complaints.addHandler(_Complaints(self))
        self.enable_logger(complaints)

    def _create_socket(self) -> socket.socket:
        return self.opened

    def ping(self) -> None:
        self._send_pingreq()

    def drop(self) -> None:
        """Close the socket without a goodbye. Not from a callback of paho's: it holds a lock then."""
        self._sock_close()
        self.opened.close()


class _Complaints(logging.Handler):
    def __init__(self, client: _Client) -> None:
        super().__init__()
        self._client = client

    def emit(self, record: logging.LogRecord) -> None:
        self._client.trouble = record.getMessage()


def _fail(future: asyncio.Future[None], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # its waiter may be gone: an unseen failure is no news


def _packet_bytes(message: Outbound) -> int:
    """Of its PUBLISH, MQTT 5, section 3.3, with lengths at their longest."""
    texts = [message.topic, message.content_type, *message.properties, *message.properties.values()]
    lengths = 2 * len(texts) + len(message.properties) + 1  # and what each property is
    return 5 + 2 + 4 + lengths + sum(len(text.encode()) for text in texts) + len(message.payload)


def _typed_properties(kind: int) -> Properties:
    return Properties(kind)  # type: ignore[no-untyped-call]  # paho has no types here


def _properties(message: Outbound, kind: int) -> Properties:
    properties = _typed_properties(kind)
    if message.content_type:
        properties.ContentType = message.content_type
    if message.properties:
        properties.UserProperty = list(message.properties.items())
    return properties
