"""The private servers: up, private, killed and restarted on the same port and data, and never left behind."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import paho.mqtt.client as mqtt
import psutil
import psycopg
import pytest
import redis
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from gateway.errors import RefusedError, UnavailableError
from wardlink.servers import InfluxDB, Login, Mosquitto, PostgreSQL, PrivateServer, PrivateServers, Redis
from wardlink.servers.process import PORTS, find_program, free_port

KINDS: list[Callable[[Path], PrivateServer]] = [Mosquitto, InfluxDB, PostgreSQL, Redis]
DEADLINE_SECONDS = 20.0


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that PostgreSQL's user may enter."""
    path = Path(tempfile.mkdtemp(prefix="wardlink-servers-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(params=KINDS, ids=["mosquitto", "influxdb", "postgresql", "redis"])
def server(request: pytest.FixtureRequest, folder: Path) -> Iterator[PrivateServer]:
    """Each server in turn, made but not started."""
    made: PrivateServer = request.param(folder)
    yield made
    made.stop()


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Wait until the condition holds, fail at the deadline."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.01)


def family(pid: int) -> list[psutil.Process]:
    """A process and its children."""
    top = psutil.Process(pid)
    return [top, *top.children(recursive=True)]


def alive(process: psutil.Process) -> bool:
    """Whether a process runs; one that has ended but was not collected does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def port_of(server: PrivateServer) -> int:
    """TCP port of a server, 0 for Redis which has none."""
    return server.port if isinstance(server, Mosquitto | InfluxDB | PostgreSQL) else 0


def keep_mark(server: PrivateServer) -> Callable[[], bool]:
    """Store something in the server; returns whether it is still there. Mosquitto keeps nothing over a kill."""
    match server:
        case PostgreSQL():
            uri = server.create_database("mark")
            with psycopg.connect(uri) as connection:
                connection.execute("CREATE TABLE kept AS SELECT 42 AS value")
            return lambda: postgres_value(uri) == (42,)
        case InfluxDB():
            server.create_database("mark")
            return lambda: server.query("SHOW DATABASES")[0]["values"] == [["mark"]]
        case Redis():
            with redis.Redis.from_url(server.url(3)) as client:
                client.set("mark", 42)
            return lambda: redis_value(server) == b"42"
        case _:
            return lambda: True


def postgres_value(uri: str) -> object:
    """What `keep_mark` stored."""
    with psycopg.connect(uri) as connection:
        return connection.execute("SELECT value FROM kept").fetchone()


def redis_value(server: Redis) -> object:
    """What `keep_mark` stored."""
    with redis.Redis.from_url(server.url(3)) as client:
        return client.get("mark")


def test_kill_and_start_again_keep_port_and_data(server: PrivateServer) -> None:
    server.start()
    assert server.pid is not None
    port = port_of(server)
    is_kept = keep_mark(server)
    before = family(server.pid)
    server.kill()
    assert server.pid is None
    assert [process for process in before if alive(process)] == []
    server.start()
    assert port_of(server) == port
    assert is_kept()


def test_kill_takes_children_that_would_not_go_by_themselves(folder: Path) -> None:
    server = PostgreSQL(folder)
    server.start()
    assert server.pid is not None
    processes = family(server.pid)
    assert len(processes) > 3
    for process in processes:
        process.suspend()
    server.kill()
    assert [process for process in processes if alive(process)] == []
    server.start()
    server.stop()


def test_stop_leaves_no_process_and_both_calls_may_repeat(server: PrivateServer) -> None:
    server.start()
    first = server.pid
    server.start()
    assert server.pid == first
    assert first is not None
    before = family(first)
    server.stop()
    server.stop()
    server.kill()
    assert [process for process in before if alive(process)] == []
    server.restart()
    assert server.pid not in {None, first}


def test_listens_on_loopback_only(server: PrivateServer) -> None:
    server.start()
    assert server.pid is not None
    listening = {
        connection.laddr
        for connection in psutil.Process(server.pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {address.ip for address in listening} <= {"127.0.0.1"}
    assert all(address.port in PORTS for address in listening)
    assert bool(listening) != isinstance(server, Redis)


def test_restart_from_a_thread_that_ends_keeps_the_server(server: PrivateServer) -> None:
    server.start()
    thread = threading.Thread(target=server.restart)
    thread.start()
    thread.join()
    server.ready(DEADLINE_SECONDS)
    with pytest.raises(TimeoutError):
        wait_ended(server, 0.3)


def wait_ended(server: PrivateServer, seconds: float) -> None:
    """Wait for the server to end by itself; TimeoutError if it does not."""
    try:
        psutil.Process(server.pid).wait(seconds)
    except psutil.TimeoutExpired as error:
        raise TimeoutError from error


def test_a_server_that_cannot_start_shows_its_log(server: PrivateServer) -> None:
    server.start()
    server.stop()
    [config] = [*server.folder.glob("*.conf"), *server.folder.glob("data/postgresql.conf")]
    config.write_text(config.read_text() + "\nno_such_setting nonsense\n")
    reason = "parse config: toml" if isinstance(server, InfluxDB) else "no_such_setting"
    with pytest.raises(UnavailableError, match=rf"(?s)^{server.name} ended instead of starting.*{reason}"):
        server.start()
    assert server.pid is None


def test_a_server_that_hangs_is_killed_by_stop(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wardlink.servers.process.STOP_SECONDS_MAX", 0.1)
    monkeypatch.setattr(Mosquitto, "stop_signal", signal.SIGWINCH)  # which it ignores
    server = Mosquitto(folder)
    server.start()
    assert server.pid is not None
    process = psutil.Process(server.pid)
    server.stop()
    assert not alive(process)


def test_a_stopped_process_is_stopped_gracefully(folder: Path) -> None:
    server = PostgreSQL(folder)
    server.start()
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    server.stop()
    assert "database system is shut down" in server.log_path.read_text()


def test_missing_program_names_the_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr("wardlink.servers.process.SYSTEM_FOLDERS", ())
    monkeypatch.setattr("wardlink.servers.postgresql.PROGRAM_FOLDERS", folder)
    for kind in KINDS:
        server = kind(folder)
        with pytest.raises(UnavailableError) as caught:
            server.start()
        assert caught.value.hint == f"apt-get install {server.package}"


def test_free_ports_are_free_and_given_once() -> None:
    ports = [free_port() for _ in range(50)]
    assert len(set(ports)) == 50
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", ports[0]))


def test_programs_are_found_where_path_does_not_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert find_program("mosquitto", "mosquitto") == "/usr/sbin/mosquitto"


GROUP_PROGRAM = """
import pathlib, sys, time
from wardlink.servers import PrivateServers
servers = PrivateServers(pathlib.Path(sys.argv[1]))
print("starting", flush=True)
servers.start()
print(*[server.pid for server in servers.servers], flush=True)
time.sleep(600)
"""


def test_servers_die_with_a_program_that_is_killed(folder: Path) -> None:
    program = subprocess.Popen([sys.executable, "-c", GROUP_PROGRAM, folder], stdout=subprocess.PIPE, text=True)
    with program:
        assert program.stdout is not None
        assert program.stdout.readline() == "starting\n"
        processes = [process for pid in program.stdout.readline().split() for process in family(int(pid))]
        assert len(processes) > 4
        program.kill()
    wait_for(lambda: not any(alive(process) for process in processes), "the servers of a killed program to end")


def test_ctrl_c_while_starting_leaves_nothing(folder: Path) -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", GROUP_PROGRAM, folder], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with program:
        assert program.stdout is not None
        program.stdout.readline()
        wait_for((folder / "postgresql" / "data").exists, "initdb to start")
        processes = family(program.pid)
        program.send_signal(signal.SIGINT)
        _, errors = program.communicate(timeout=DEADLINE_SECONDS)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    wait_for(lambda: not any(alive(process) for process in processes), "the servers to end")


def test_group_starts_all_and_stops_all(folder: Path) -> None:
    servers = PrivateServers(folder)
    with servers:
        pids = [server.pid for server in servers.servers]
        assert None not in pids
        servers.start()
        assert [server.pid for server in servers.servers] == pids
    assert [server.pid for server in servers.servers] == [None] * 4
    servers.stop()


def test_group_stops_the_others_when_one_cannot_start(folder: Path) -> None:
    servers = PrivateServers(folder)
    with socket.socket() as taken:
        taken.bind((servers.mosquitto.host, servers.mosquitto.port))
        taken.listen()
        with pytest.raises(UnavailableError, match=r"(?s)mosquitto .*Address already in use"):
            servers.start()
    assert [server.pid for server in servers.servers] == [None] * 4


def test_passwords_are_asked_for(
    influx_server: InfluxDB, postgres_server: PostgreSQL, redis_server: Redis, mosquitto_server: Mosquitto
) -> None:
    wrong = "0" * 48
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(postgres_server.conninfo().replace(postgres_server.password, wrong))
    client = redis.Redis.from_url(redis_server.url().replace(redis_server.password, wrong))
    with client, pytest.raises(redis.AuthenticationError):
        client.ping()
    assert not mosquitto_server._accepts(Login("bridge", wrong))
    right, influx_server.password = influx_server.password, wrong
    try:
        with pytest.raises(RefusedError, match="401"):
            influx_server.query("SHOW DATABASES")
    finally:
        influx_server.password = right


def test_secrets_are_readable_by_the_owner_only(folder: Path) -> None:
    with PrivateServers(folder) as servers:
        secret_words = [servers.influxdb.password, servers.postgresql.password, servers.redis.password]
        secret_words.append(servers.mosquitto.bridge.password)
        assert secret_words[-1] not in repr(servers.mosquitto.bridge)
        for server in servers.servers:
            assert server.folder.stat().st_mode & 0o077 == 0
            assert not any(word in server.log_path.read_text() for word in secret_words)


def test_fixtures_give_databases_of_the_test_own(
    database: str, influx_database: str, redis_url: str, influx_server: InfluxDB
) -> None:
    with psycopg.connect(database) as connection:
        row = connection.execute("SELECT current_database(), count(*) FROM pg_tables WHERE schemaname='public'")
        assert row.fetchone() == (database.rpartition("/")[2], 0)
    assert [influx_database] in influx_server.query("SHOW DATABASES")[0]["values"]
    with redis.Redis.from_url(redis_url) as client:
        assert client.dbsize() == 0


class Subscriber:
    """An MQTT 5 client that keeps what it is sent."""

    def __init__(self, server: Mosquitto, login: Login, topic: str) -> None:
        self.topics: list[str] = []
        self.subscribed = threading.Event()
        self.client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
        self.client.username_pw_set(login.user, login.password)
        self.client.on_message = self.on_message
        self.client.on_connect = lambda client, *_: client.subscribe(topic, qos=1)
        self.client.on_subscribe = self.on_subscribe
        self.client.connect(server.host, server.port)
        self.client.loop_start()
        assert self.subscribed.wait(DEADLINE_SECONDS)

    def on_message(self, _client: mqtt.Client, _data: object, message: mqtt.MQTTMessage) -> None:
        if "/acl-" in message.topic:  # the run's other tests leave retained messages on the same broker
            self.topics.append(message.topic)

    def on_subscribe(
        self, _client: mqtt.Client, _data: object, _mid: int, _codes: list[ReasonCode], _properties: Properties | None
    ) -> None:
        self.subscribed.set()

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


def test_a_gateway_reaches_its_own_topics_only(mosquitto_server: Mosquitto) -> None:
    # made before anybody connects: a broker that reads its logins anew may drop those who are there
    logins = [mosquitto_server.gateway(name) for name in ("acl-1", "acl-2")]
    bridge = Subscriber(mosquitto_server, mosquitto_server.bridge, "wardlink/v1/#")
    first = Subscriber(mosquitto_server, logins[0], "wardlink/v1/+/receipt")
    second = Subscriber(mosquitto_server, logins[1], "#")
    try:
        first.client.publish("wardlink/v1/acl-2/data/x/eeg", b"", qos=1)
        first.client.publish("wardlink/v1/acl-1/data/x/eeg", b"", qos=1)
        wait_for(lambda: len(bridge.topics) > 0, "the gateway's data")
        bridge.client.publish("wardlink/v1/acl-1/data/x/eeg", b"forged", qos=1)
        bridge.client.publish("wardlink/v1/acl-1/receipt", b"", qos=1)
        bridge.client.publish("wardlink/v1/acl-2/receipt", b"", qos=1)
        last = "wardlink/v1/acl-2/receipt"
        try:
            wait_for(lambda: last in bridge.topics and last in second.topics and bool(first.topics), "the last message")
        except AssertionError as error:
            error.add_note(f"bridge {bridge.topics}, first {first.topics}, second {second.topics}")
            raise
        assert sorted(bridge.topics) == [
            "wardlink/v1/acl-1/data/x/eeg",
            "wardlink/v1/acl-1/receipt",
            "wardlink/v1/acl-2/receipt",
        ]
        assert first.topics == ["wardlink/v1/acl-1/receipt"]
        assert second.topics == ["wardlink/v1/acl-2/receipt"]
    finally:
        for subscriber in (bridge, first, second):
            subscriber.close()


@pytest.mark.parametrize("gateway_id", ["", "a/b", "+", "a#", "x:y", "a\nb"])
def test_a_gateway_id_that_would_widen_its_rights_is_refused(gateway_id: str, mosquitto_server: Mosquitto) -> None:
    with pytest.raises(ValueError, match="no gateway id"):
        mosquitto_server.gateway(gateway_id)
