"""One MQTT 5 session that both sides use: connect, reconnect with back-off, publish, subscribe, acknowledge by hand.

The broker keeps the session between connections, under the client id. No thread, no paho: `gateway.mqtt_connection`
is one connection of it. Cancelling `run` takes effect at once, at any moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from gateway import tcp
from gateway.errors import ConfigError, UnavailableError
from gateway.mqtt_connection import Connection
from gateway.mqtt_messages import Hello, Inbound, Intake, Outbound

__all__ = ["Broker", "Inbound", "MqttSession", "Outbound", "Tls", "connected_session"]

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10.0
"""For the connection with its TLS handshake, and again for the broker's answers to CONNECT and SUBSCRIBE."""
BACKOFF_S_MAX = 30.0
STABLE_S = 5.0
"""A connection that lasted so long was a good one: the back-off begins anew. Shorter ones let it grow."""
_PEM_HINT = "mqtt.tls needs PEM files that the service's user can read"


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


class MqttSession:
    """A persistent session, held as long as `run` runs.

    `on_message` is called in the event loop; with `bytes_unacknowledged_max` no more is read from the broker while
    that many bytes have been handed over and not been given back with `release`, so that a flood stays in the
    broker. While it waits, the answers to own publishes wait too: never await a publish before a release.
    `on_connect` is called in the event loop after the subscriptions are made.
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
        self._intake = Intake(bytes_unacknowledged_max)
        self._connection: Connection | None = None

    async def run(self) -> None:
        """Connect, and connect again whenever the connection is lost, until cancelled.

        A last will reaches the others also at an orderly end. Raises `ConfigError` where no retry can help:
        a certificate file that cannot be used.
        """
        context = await asyncio.to_thread(_tls_context, self.broker.tls) if self.broker.tls else None
        attempts = AsyncRetrying(
            retry=retry_if_exception_type(UnavailableError),
            wait=wait_random_exponential(multiplier=0.5, max=BACKOFF_S_MAX),
            before_sleep=self._log_retry,
        )
        async for attempt in attempts:
            with attempt:
                await self._hold(context, attempt.retry_state)

    def publish(self, message: Outbound) -> asyncio.Future[None]:
        """Publish; the future is done when the broker has acknowledged, with QoS 0 when the message is on its way.

        Raises `UnavailableError` at once where there is no connection; the future fails with one when it is lost or
        the broker declines, and with `RefusedError` where the message is larger than the broker takes.
        """
        if self._connection is None or not self._connection.is_open:
            raise UnavailableError(f"no connection to broker {self.broker}")
        return self._connection.publish(message)

    def release(self, message: Inbound) -> None:
        """Give back the room of a message that was handed over; no effect the second time."""
        self._intake.release(message)

    async def _hold(self, context: ssl.SSLContext | None, state: RetryCallState) -> None:
        """One connection from its beginning to its loss, which is an `UnavailableError`."""
        connection = await self._connect(context)
        since = connection.loop.time()
        try:
            self._connection = connection
            self.connected.set()
            self.last_error = ""
            log.info("connected to broker %s", self.broker)
            if self._on_connect is not None:
                self._on_connect()
            await asyncio.wait([connection.lost])  # not awaited itself, which would cancel it with us
        finally:
            self.connected.clear()
            self._connection = None
            await connection.end()
        hint = ""
        if connection.loop.time() - since >= STABLE_S:
            state.attempt_number = 1
        else:
            hint = f"if that goes on: does another client use the client id {self.broker.client_id!r}?"
        raise UnavailableError(f"connection to broker {self.broker} lost: {connection.lost.result()}", hint=hint)

    def _log_retry(self, state: RetryCallState) -> None:
        self.last_error = str(state.outcome.exception() if state.outcome else "")
        wait_s = state.next_action.sleep if state.next_action else 0.0
        log.warning("%s; next attempt in %.1f s", self.last_error, wait_s)

    async def _connect(self, context: ssl.SSLContext | None) -> Connection:
        broker = self.broker
        hello = Hello(broker.client_id, broker.username, broker.password, self.clean, self.receive_maximum, self.will)
        try:
            opened = await tcp.open_socket(broker.host, broker.port, tls=context, timeout_s=CONNECT_TIMEOUT_S)
            connection = Connection(opened, hello, self.subscriptions, self._on_message, self._intake)
            try:
                await connection.greet(broker.host, broker.port, CONNECT_TIMEOUT_S)
            except BaseException:
                connection.drop()
                raise
        except (OSError, ValueError, UnavailableError) as error:
            raise UnavailableError(
                f"cannot reach the MQTT broker at {broker}: {_said(error)}", hint=_connect_hint(error, broker)
            ) from None
        return connection


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


def _tls_context(tls: Tls) -> ssl.SSLContext:
    for path in (tls.ca_file, tls.cert_file, tls.key_file):
        try:
            if path is not None:
                path.read_bytes()
        except OSError as error:
            raise ConfigError(f"TLS file {path} cannot be read: {error.strerror}", hint=_PEM_HINT) from None
    try:
        context = ssl.create_default_context(cafile=tls.ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"TLS file {tls.ca_file} cannot be used: {_said(error)}", hint=_PEM_HINT) from None
    if tls.cert_file is not None:
        try:
            # An encrypted key would make OpenSSL ask for its password on the terminal.
            context.load_cert_chain(tls.cert_file, tls.key_file, password="")
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"TLS files {tls.cert_file} and {tls.key_file or tls.cert_file} cannot be used: {_said(error)}",
                hint="expected a certificate and its own private key, PEM, without a password",
            ) from None
    return context


def _said(error: Exception) -> str:
    match error:
        case UnavailableError():
            return error.message
        case ssl.SSLCertVerificationError():
            return error.verify_message
        case ssl.SSLError() | socket.gaierror():
            return str(error.strerror or error)
        case TimeoutError():
            return "no answer in time"
        case OSError(errno=int(number)):
            return os.strerror(number)  # asyncio's own text does not say what went wrong
    return str(error) or type(error).__name__


def _connect_hint(error: BaseException, broker: Broker) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return "the broker's certificate must be valid for its host name and signed by mqtt.tls.ca_file"
    if isinstance(error, ssl.SSLError) or (broker.tls and isinstance(error, ConnectionError | TimeoutError)):
        return f"does a broker speak TLS on port {broker.port}, and does it accept our certificate?"
    if isinstance(error, socket.gaierror | ValueError):
        return "check mqtt.host and this machine's name resolution"
    if isinstance(error, UnavailableError):
        return error.hint or f"does port {broker.port} need TLS, or another client certificate?"
    return f"is a broker running, and is port {broker.port} open from here?"
