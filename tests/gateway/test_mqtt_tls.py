"""The MQTT session over TLS: a real mosquitto with certificates of our own authority, good ones and bad ones."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gateway import mqtt
from gateway.errors import ConfigError
from gateway.mqtt import Broker, Inbound, MqttSession, Outbound, Tls, connected_session
from gateway.mqtt_connection import PACKETS_PER_TURN_MAX
from wardlink.servers import Mosquitto
from wardlink.servers.process import HOST, find_program, free_port

SECONDS_MAX = 10.0


class Authority:
    """A certificate authority in a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self.ca = folder / "ca.pem"
        self._key = folder / "ca.key"
        self._openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"),
            *("-addext", "keyUsage=critical,keyCertSign,cRLSign"),  # Python 3.13 verifies strictly by RFC 5280
            *("-subj", f"/CN=test authority {folder.name}", "-keyout", str(self._key), "-out", str(self.ca)),
        )

    def issue(self, name: str, subject_alternative: str = "") -> tuple[Path, Path]:
        """Certificate and key of a server or client."""
        cert, key, request, extensions = (self._folder / f"{name}.{end}" for end in ("pem", "key", "csr", "ext"))
        names = f"subjectAltName={subject_alternative}\n" if subject_alternative else ""
        extensions.write_text(f"subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n{names}")
        self._openssl(
            *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", f"/CN={name}"),
            *("-keyout", str(key), "-out", str(request)),
        )
        self._openssl(
            *("x509", "-req", "-in", str(request), "-CA", str(self.ca), "-CAkey", str(self._key), "-CAcreateserial"),
            *("-days", "2", "-extfile", str(extensions), "-out", str(cert)),
        )
        return cert, key

    @staticmethod
    def _openssl(*arguments: str) -> None:
        subprocess.run([find_program("openssl", "openssl"), *arguments], check=True, capture_output=True)


class TlsMosquitto(Mosquitto):
    """With two more listeners: `tls_port`, and `mutual_port` that wants a client certificate."""

    def __init__(self, folder: Path, authority: Authority) -> None:
        super().__init__(folder)
        self.tls_port, self.mutual_port = free_port(), free_port()
        cert, key = authority.issue("broker", "DNS:localhost")
        self._listeners = "".join(
            f"listener {port} {HOST}\ncafile {authority.ca}\ncertfile {cert}\nkeyfile {key}\n{more}"
            for port, more in ((self.tls_port, ""), (self.mutual_port, "require_certificate true\n"))
        )

    def _prepare(self) -> None:
        super()._prepare()
        with (self.folder / "mosquitto.conf").open("a") as config:
            config.write(self._listeners)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "theirs")


@pytest.fixture(scope="module")
def server(servers_folder: Path, authority: Authority) -> Iterator[TlsMosquitto]:
    with_tls = TlsMosquitto(servers_folder / "tls", authority)
    with_tls.start()
    yield with_tls
    with_tls.stop()


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt, "BACKOFF_S_MAX", 0.1)


def broker(server: TlsMosquitto, tls: Tls | None, host: str = "localhost", port: int | None = None) -> Broker:
    return Broker(host, port or server.tls_port, "tls-test", server.bridge.user, server.bridge.password, tls)


@asynccontextmanager
async def failing(session: MqttSession) -> AsyncIterator[str]:
    """The error of the first attempt, while it tries again."""
    task = asyncio.create_task(session.run())
    try:
        async with asyncio.timeout(SECONDS_MAX):
            while session.last_error == "not yet tried" and not task.done():  # noqa: ASYNC110 - it has no event
                await asyncio.sleep(0.01)
        assert not task.done()
        assert not session.connected.is_set()
        yield session.last_error
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_messages_of_all_sizes_travel_over_tls(server: TlsMosquitto, authority: Authority) -> None:
    """Many in one TLS record, and one over many records: what OpenSSL has decrypted must not be left lying."""
    got: list[bytes] = []

    def keep(message: Inbound) -> None:
        got.append(message.payload)
        message.acknowledge()

    session = MqttSession(
        broker(server, Tls(authority.ca)), on_message=keep, subscriptions=["wardlink/v1/gw/receipt"], clean=True
    )
    payloads = [bytes([number % 256]) * size for number, size in enumerate([0, 1, 900_000, *[10] * 500, 70_000])]
    async with connected_session(session):
        for payload in payloads:
            session.publish(Outbound("wardlink/v1/gw/receipt", payload))
        async with asyncio.timeout(SECONDS_MAX):
            while len(got) < len(payloads):  # noqa: ASYNC110 - it has no event
                await asyncio.sleep(0.01)
    assert got == payloads


async def test_a_flood_is_held_back_over_tls_too(server: TlsMosquitto, authority: Authority) -> None:
    held: list[Inbound] = []
    session = MqttSession(
        broker(server, Tls(authority.ca)),
        on_message=held.append,
        subscriptions=["wardlink/v1/flood/receipt"],
        bytes_unacknowledged_max=1,
        receive_maximum=1000,
        clean=True,
    )
    done: list[bytes] = []
    async with connected_session(session):
        for number in range(300):
            session.publish(Outbound("wardlink/v1/flood/receipt", str(number).encode()))
        async with asyncio.timeout(SECONDS_MAX):
            while len(done) < 300:
                await asyncio.sleep(0)
                for message in held:
                    done.append(message.payload)
                    message.acknowledge()
                for message in held[:]:
                    held.remove(message)
                    session.release(message)
    assert done == [str(number).encode() for number in range(300)]


@pytest.mark.parametrize("bytes_max", [None, 1])
async def test_many_messages_in_one_tls_record_all_arrive(authority: Authority, bytes_max: int | None) -> None:
    """The socket does not become readable for what OpenSSL has decrypted and nobody has read."""
    cert, key = await asyncio.to_thread(authority.issue, "record", "DNS:localhost")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)
    count = 5 * PACKETS_PER_TURN_MAX
    connack = b"\x20\x03\x00\x00\x00"
    flood = b"".join(b"\x32\x06\x00\x01t" + mid.to_bytes(2, "big") + b"\x00" for mid in range(1, count + 1))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1000)
        writer.write(connack + flood)  # below 16 KiB: one record
        while await reader.read(1000):
            pass
        writer.close()

    held: list[Inbound] = []
    arrived = 0
    listening = await asyncio.start_server(serve, HOST, 0, ssl=context)
    port = listening.sockets[0].getsockname()[1]
    session = MqttSession(
        Broker("localhost", port, "x", tls=Tls(authority.ca)),
        on_message=held.append,
        bytes_unacknowledged_max=bytes_max,
    )
    async with connected_session(session), asyncio.timeout(SECONDS_MAX):
        while arrived < count:
            await asyncio.sleep(0)
            while held:
                arrived += 1
                session.release(held.pop())
    listening.close()
    await listening.wait_closed()


async def test_a_peer_that_never_finishes_the_handshake_is_given_up(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mqtt, "CONNECT_TIMEOUT_S", 0.1)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1000):
            pass
        writer.close()

    silent = await asyncio.start_server(serve, HOST, 0)
    port = silent.sockets[0].getsockname()[1]
    async with failing(MqttSession(Broker("localhost", port, "x", tls=Tls(authority.ca)))) as error:
        assert "no answer in time" in error
        assert "TLS" in error
    silent.close()
    await silent.wait_closed()


async def test_a_wrong_host_name_is_refused(server: TlsMosquitto, authority: Authority) -> None:
    async with failing(MqttSession(broker(server, Tls(authority.ca), host="127.0.0.1"))) as error:
        assert "127.0.0.1" in error
        assert "certificate must be valid for its host name" in error


async def test_an_unknown_authority_is_refused(server: TlsMosquitto, stranger: Authority) -> None:
    async with failing(MqttSession(broker(server, Tls(stranger.ca)))) as error:
        assert "ca_file" in error


async def test_the_systems_authorities_do_not_know_ours(server: TlsMosquitto) -> None:
    async with failing(MqttSession(broker(server, Tls()))) as error:
        assert "ca_file" in error


async def test_a_client_certificate_is_asked_for_and_given(
    server: TlsMosquitto, authority: Authority, stranger: Authority
) -> None:
    good = Tls(authority.ca, *await asyncio.to_thread(authority.issue, "gw"))
    bad = Tls(authority.ca, *await asyncio.to_thread(stranger.issue, "gw"))
    async with connected_session(MqttSession(broker(server, good, port=server.mutual_port))) as session:
        await asyncio.wait_for(session.publish(Outbound("wardlink/v1/gw/receipt", b"")), SECONDS_MAX)
    for wrong in (Tls(authority.ca), bad):
        async with failing(MqttSession(broker(server, wrong, port=server.mutual_port))) as error:
            assert "certificate" in error


async def test_tls_where_there_is_none_and_none_where_there_is(server: TlsMosquitto, authority: Authority) -> None:
    async with failing(MqttSession(broker(server, Tls(authority.ca), port=server.port))) as error:
        assert "TLS" in error
    async with failing(MqttSession(broker(server, None))) as error:
        assert "TLS" in error


def no_file(folder: Path, _: Authority) -> Tls:
    return Tls(folder / "missing.pem")


def no_pem(folder: Path, _: Authority) -> Tls:
    (folder / "missing.pem").write_text("not a certificate")
    return Tls(folder / "missing.pem")


def strange_key(folder: Path, authority: Authority) -> Tls:
    cert, _ = authority.issue("one")
    _, key = authority.issue("two")
    return Tls(authority.ca, cert, key.rename(folder / "missing.pem"))


def encrypted_key(folder: Path, authority: Authority) -> Tls:
    cert, key = authority.issue("three")
    subprocess.run(
        ["openssl", "ec", "-aes256", "-passout", "pass:secret", "-in", key, "-out", folder / "missing.pem"],
        check=True,
        capture_output=True,
    )
    return Tls(authority.ca, cert, folder / "missing.pem")


@pytest.mark.parametrize("make", [no_file, no_pem, strange_key, encrypted_key])
def test_a_tls_file_that_cannot_be_used_is_a_configuration_error(
    tmp_path: Path, authority: Authority, make: Callable[[Path, Authority], Tls]
) -> None:
    session_of = make(tmp_path, authority)
    with pytest.raises(ConfigError, match=r"missing\.pem"):
        asyncio.run(asyncio.wait_for(MqttSession(Broker("localhost", 1, "x", tls=session_of)).run(), SECONDS_MAX))


def test_certificates_are_verified() -> None:
    context = mqtt._tls_context(Tls())
    assert context.check_hostname
    assert context.verify_mode is ssl.CERT_REQUIRED
