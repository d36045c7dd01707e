"""One MQTT 5 session that both sides use: connect, reconnect with back-off, publish, subscribe, acknowledge by hand.

The only file that imports paho. Every connection is a paho client of its own with the same client id: the broker
keeps the session, and no packet id of a lost connection can ever be acknowledged on the next one.
paho's network thread lives here; everything it says reaches the event loop through `call_soon_threadsafe`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from gateway.errors import ConfigError, UnavailableError

log = logging.getLogger(__name__)

QOS_AT_LEAST_ONCE = 1
KEEPALIVE_S = 10
"""A dead link is noticed after one and a half of these at the latest."""
CONNECT_TIMEOUT_S = 10.0
BACKOFF_S_MAX = 30.0
SESSION_EXPIRY_S = 7 * 24 * 3600
"""How long a broker keeps the session of a client that is away."""
PACKET_BYTES_MAX = 4 << 20
_DISCONNECT_GRACE_S = 2.0


@dataclass(frozen=True, slots=True)
class Tls:
    """Trust and identity on a TLS connection; the broker's name is always verified."""

    ca_file: Path | None = None
    """PEM of the authorities to trust; None: the system's."""
    cert_file: Path | None = None
    key_file: Path | None = None


@dataclass(frozen=True, slots=True)
class Broker:
    """Where the broker is and who we are there."""

    host: str
    port: int
    client_id: str
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: Tls | None = None

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Outbound:
    """A message to publish."""

    topic: str
    payload: bytes
    content_type: str = ""
    properties: Mapping[str, str] = field(default_factory=dict)
    retain: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Inbound:
    """A message that came; `acknowledge` it when, and only when, it is safely kept."""

    topic: str
    payload: bytes
    content_type: str | None
    properties: Mapping[str, str]
    retain: bool
    _client: paho.Client
    _mid: int

    def acknowledge(self) -> None:
        """Tell the broker that it may forget the message. No effect once the connection that brought it is lost."""
        self._client.ack(self._mid, QOS_AT_LEAST_ONCE)


class MqttSession:
    """A persistent session, held as long as `run` runs.

    `on_message` is called in the event loop; with `bytes_unacknowledged_max` the network thread waits while more
    than that many payload bytes have been handed over and not been given back with `release`, so that a flood
    stays in the broker. `on_connect` is called in the event loop after the subscriptions are made.
    """

    def __init__(
        self,
        broker: Broker,
        *,
        on_message: Callable[[Inbound], None] | None = None,
        on_connect: Callable[[], None] | None = None,
        subscriptions: Sequence[str] = (),
        will: Outbound | None = None,
        clean: bool = False,
        receive_maximum: int = 100,
        bytes_unacknowledged_max: int | None = None,
    ) -> None:
        self.broker = broker
        self.subscriptions = tuple(subscriptions)
        self.will = will
        self.clean = clean
        self.receive_maximum = receive_maximum
        self.connected = asyncio.Event()
        self.last_error = "not yet tried"
        self._on_message = on_message
        self._on_connect = on_connect
        self._allowance = _Allowance(bytes_unacknowledged_max)
        self._connection: _Connection | None = None

    async def run(self) -> None:
        """Connect, and connect again whenever the connection is lost, until cancelled.

        Raises `ConfigError` where no retry can help: a certificate file that cannot be read.
        """
        context = await asyncio.to_thread(_tls_context, self.broker.tls) if self.broker.tls else None
        while True:
            async for attempt in self._attempts():
                with attempt:
                    connection = await self._connect(context)
            try:
                self.last_error = await connection.lost
            finally:
                self.connected.clear()
                self._connection = None
                await connection.end()
            log.warning("connection to broker %s lost: %s", self.broker, self.last_error)

    def publish(self, message: Outbound) -> asyncio.Future[None]:
        """Publish with QoS 1; the future is done when the broker has acknowledged.

        Raises `UnavailableError` at once where there is no connection; the future fails with one when it is lost.
        """
        if self._connection is None:
            raise UnavailableError(f"no connection to broker {self.broker}")
        return self._connection.publish(message)

    def release(self, message: Inbound) -> None:
        """Give back the room of a message that was handed over."""
        self._allowance.give_back(len(message.payload))

    def _attempts(self) -> AsyncRetrying:
        return AsyncRetrying(
            retry=retry_if_exception_type(UnavailableError),
            wait=wait_random_exponential(multiplier=0.5, max=BACKOFF_S_MAX),
            before_sleep=self._log_retry,
        )

    def _log_retry(self, state: RetryCallState) -> None:
        self.last_error = str(state.outcome.exception() if state.outcome else "")
        wait_s = state.next_action.sleep if state.next_action else 0.0
        log.warning("%s; next attempt in %.1f s", self.last_error, wait_s)

    async def _connect(self, context: ssl.SSLContext | None) -> _Connection:
        self._allowance.reopen()
        connection = _Connection(self._new_client(context), self.subscriptions, self._on_message, self._allowance)
        try:
            await asyncio.to_thread(
                connection.client.connect,
                self.broker.host,
                self.broker.port,
                KEEPALIVE_S,
                clean_start=self.clean,
                properties=self._connect_properties(),
            )
            connection.client.loop_start()
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await connection.established
        except (OSError, ValueError, TimeoutError, UnavailableError) as error:
            await connection.end()
            raise UnavailableError(
                f"cannot reach the MQTT broker at {self.broker}: {str(error) or type(error).__name__}",
                hint=_connect_hint(error, self.broker),
            ) from None
        except asyncio.CancelledError:
            await connection.end()
            raise
        self._connection = connection
        self.connected.set()
        self.last_error = ""
        log.info("connected to broker %s", self.broker)
        if self._on_connect is not None:
            self._on_connect()
        return connection

    def _new_client(self, context: ssl.SSLContext | None) -> paho.Client:
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=self.broker.client_id,
            protocol=paho.MQTTv5,
            manual_ack=self._on_message is not None,
            reconnect_on_failure=False,
        )
        client.connect_timeout = CONNECT_TIMEOUT_S
        client.max_inflight_messages_set(0)
        if self.broker.username is not None:
            client.username_pw_set(self.broker.username, self.broker.password)
        if context is not None:
            client.tls_set_context(context)
        if self.will is not None:
            properties = _properties(self.will, PacketTypes.WILLMESSAGE)
            client.will_set(self.will.topic, self.will.payload, QOS_AT_LEAST_ONCE, self.will.retain, properties)
        return client

    def _connect_properties(self) -> Properties:
        properties = _typed_properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = 0 if self.clean else SESSION_EXPIRY_S
        properties.ReceiveMaximum = self.receive_maximum
        properties.MaximumPacketSize = PACKET_BYTES_MAX
        return properties


class _Connection:
    """One paho client from connect to loss. The `_on…` methods run in paho's thread and only hand over."""

    def __init__(
        self,
        client: paho.Client,
        subscriptions: Sequence[str],
        on_message: Callable[[Inbound], None] | None,
        allowance: _Allowance,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.client = client
        self.established: asyncio.Future[None] = self._loop.create_future()
        self.lost: asyncio.Future[str] = self._loop.create_future()
        self._subscriptions = subscriptions
        self._deliver = on_message
        self._allowance = allowance
        self._unacknowledged: dict[int, asyncio.Future[None]] = {}
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_disconnect = self._on_disconnect
        client.on_publish = self._on_publish
        client.on_message = self._on_message

    def publish(self, message: Outbound) -> asyncio.Future[None]:
        properties = _properties(message, PacketTypes.PUBLISH)
        info = self.client.publish(message.topic, message.payload, QOS_AT_LEAST_ONCE, message.retain, properties)
        future: asyncio.Future[None] = self._loop.create_future()
        self._unacknowledged[info.mid] = future
        if info.rc != paho.MQTT_ERR_SUCCESS:
            self._settle(info.mid, "not connected")
        return future

    async def end(self) -> None:
        """End thread and socket; a last goodbye is given a short time."""
        self._allowance.close()
        self.client.disconnect()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DISCONNECT_GRACE_S):
                await asyncio.to_thread(self.client.loop_stop)
        self._lose("ended")

    def _lose(self, reason: str) -> None:
        if not self.lost.done():
            self.lost.set_result(reason)
        self._establish(reason)
        self.established.exception()
        for mid in list(self._unacknowledged):
            self._settle(mid, reason)

    def _establish(self, failure: str | None) -> None:
        if self.established.done():
            return
        if failure is None:
            self.established.set_result(None)
        else:
            self.established.set_exception(UnavailableError(failure))

    def _settle(self, mid: int, failure: str | None) -> None:
        future = self._unacknowledged.pop(mid, None)
        if future is None or future.done():
            return
        if failure is None:
            future.set_result(None)
        else:
            future.set_exception(UnavailableError(f"broker did not take a message: {failure}"))
            future.exception()  # its sender may be gone: an unseen failure is no news

    def _tell(self, callback: Callable[..., object], *arguments: object) -> None:
        # the loop may be closed by the time paho's thread says its last word
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, *arguments)

    def _on_connect(
        self, client: paho.Client, _data: object, _flags: object, code: ReasonCode, _properties: object
    ) -> None:
        if code.is_failure or not self._subscriptions:
            self._tell(self._establish, f"the broker says: {code}" if code.is_failure else None)
            return
        options = SubscribeOptions(qos=QOS_AT_LEAST_ONCE)
        client.subscribe([(topic, options) for topic in self._subscriptions])

    def _on_subscribe(
        self, _client: paho.Client, _data: object, _mid: int, codes: list[ReasonCode], _properties: object
    ) -> None:
        refused = [str(code) for code in codes if code.is_failure]
        self._tell(self._establish, f"the broker refuses to subscribe: {refused[0]}" if refused else None)

    def _on_disconnect(
        self, _client: paho.Client, _data: object, _flags: object, code: ReasonCode, _properties: object
    ) -> None:
        self._allowance.close()
        self._tell(self._lose, str(code))

    def _on_publish(self, _client: paho.Client, _data: object, mid: int, code: ReasonCode, _properties: object) -> None:
        self._tell(self._settle, mid, str(code) if code.is_failure else None)

    def _on_message(self, client: paho.Client, _data: object, message: paho.MQTTMessage) -> None:
        properties = message.properties
        inbound = Inbound(
            topic=message.topic,
            payload=bytes(message.payload),
            content_type=getattr(properties, "ContentType", None),
            properties=dict(getattr(properties, "UserProperty", ())),
            retain=message.retain,
            _client=client,
            _mid=message.mid,
        )
        if self._deliver is not None and self._allowance.take(len(inbound.payload)):
            self._tell(self._deliver, inbound)


class _Allowance:
    """Bytes that may be between paho's thread and those who process them: the thread waits when they are used up."""

    def __init__(self, bytes_max: int | None) -> None:
        self._bytes_max = bytes_max
        self._used = 0
        self._open = True
        self._changed = threading.Condition()

    def take(self, size: int) -> bool:
        """Wait for room; False when the connection was closed meanwhile. One message is always let through."""
        bytes_max = self._bytes_max
        if bytes_max is None:
            return True
        with self._changed:
            self._changed.wait_for(lambda: not self._open or self._used == 0 or self._used + size <= bytes_max)
            if self._open:
                self._used += size
            return self._open

    def give_back(self, size: int) -> None:
        if self._bytes_max is not None:
            with self._changed:
                self._used -= size
                self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._open = False
            self._changed.notify_all()

    def reopen(self) -> None:
        with self._changed:
            self._open = True


@contextlib.asynccontextmanager
async def connected_session(session: MqttSession) -> AsyncIterator[MqttSession]:
    """Hold a session for the time of a block, connected from its first line on."""
    running = asyncio.create_task(session.run())
    waiting = asyncio.create_task(session.connected.wait())
    try:
        await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            await running
        yield session
    finally:
        for task in (running, waiting):
            task.cancel()
        await asyncio.gather(running, waiting, return_exceptions=True)


def _typed_properties(kind: int) -> Properties:
    return Properties(kind)  # type: ignore[no-untyped-call]  # paho has no types here


def _properties(message: Outbound, kind: int) -> Properties:
    properties = _typed_properties(kind)
    if message.content_type:
        properties.ContentType = message.content_type
    if message.properties:
        properties.UserProperty = list(message.properties.items())
    return properties


def _tls_context(tls: Tls) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=tls.ca_file)
        if tls.cert_file is not None:
            context.load_cert_chain(tls.cert_file, tls.key_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"TLS files cannot be used: {error}",
            hint="mqtt.tls needs PEM files that the service's user can read",
        ) from None
    return context


def _connect_hint(error: BaseException, broker: Broker) -> str:
    if isinstance(error, ssl.SSLError):
        return "the broker's certificate must be valid for its host name and signed by mqtt.tls.ca_file"
    if isinstance(error, UnavailableError) and "authori" in str(error).lower():
        return "check user name, password and the broker's access list"
    return f"is a broker running, and is port {broker.port} open from here?"
