"""What the Redis store promises beside the contract: no step counted twice when its answer is lost, clear refusals."""

from __future__ import annotations

import logging
import select
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis

from gateway.errors import ConfigError, DamagedError, UnavailableError
from gateway.spool import redis_store
from gateway.spool.redis_store import RedisStore
from gateway.spool.store import DamagedRow, FullError, Holding, Row, StoredRow, Tally
from wardlink.servers import Redis

ALL = 10**9
SECONDS_MAX = 10.0
EPOCH = "0123456789abcdef"
STEP = b"$4\r\nEVAL\r\n"
KILLS = 4


class Fate(Enum):
    """What becomes of the next step."""

    PASS = "it arrives, and so does its answer"
    ANSWER_LOST = "carried out, and the connection dies before the answer"
    NEVER_SENT = "the connection dies before the server sees it"
    LATE = "the connection dies, and the server sees it when `release` is called"


class Relay:
    """A TCP relay before the server's unix socket that interferes with steps."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.fate = Fate.PASS
        self._late: list[tuple[socket.socket, bytes]] = []
        self._threads: list[threading.Thread] = []
        self._closing = False
        self._start(self._accept)

    def close(self) -> None:
        self._closing = True
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(SECONDS_MAX)
        assert not any(thread.is_alive() for thread in self._threads)

    def release(self) -> bytes:
        """Let the server see what was held back. Returns its answers."""
        far, request = self._late.pop()
        with far:
            far.sendall(request)
            return far.recv(1 << 20)

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX)
            far.settimeout(SECONDS_MAX)
            far.connect(self._target)
            self._start(self._serve, near, far)

    def _serve(self, near: socket.socket, far: socket.socket) -> None:
        request = b""
        with ExitStack() as stack:
            stack.enter_context(near)
            stack.callback(lambda: None if self._keeps(far) else far.close())
            while not self._closing:
                readable, _, _ = select.select([near, far], [], [], 0.05)
                for source in readable:
                    data = source.recv(1 << 20)
                    if not data:
                        return
                    if source is far:
                        near.sendall(data)
                        continue
                    request += data
                    if not is_complete(request):
                        continue
                    if STEP in request and self.fate is not Fate.PASS:
                        self._interfere(far, request)
                        return
                    far.sendall(request)
                    request = b""

    def _interfere(self, far: socket.socket, request: bytes) -> None:
        fate, self.fate = self.fate, Fate.PASS
        if fate is Fate.ANSWER_LOST:
            far.sendall(request)
            assert far.recv(1 << 20)
        elif fate is Fate.LATE:
            self._late.append((far, request))

    def _keeps(self, far: socket.socket) -> bool:
        return any(kept is far for kept, _ in self._late)


def is_complete(request: bytes) -> bool:
    """Whether a request ends here: an array of bulk strings, as RESP has it."""
    rest = request
    while rest:
        head, _, rest = rest.partition(b"\r\n")
        for _ in range(int(head[1:])):
            head, found, rest = rest.partition(b"\r\n")
            length = int(head[1:]) + 2 if found else 0
            if not found or len(rest) < length:
                return False
            rest = rest[length:]
    return True


@pytest.fixture
def relay(redis_server: Redis) -> Iterator[Relay]:
    relay = Relay(str(redis_server.socket_path))
    yield relay
    relay.close()


@pytest.fixture
def store(relay: Relay, redis_place: Any) -> Iterator[RedisStore]:
    """Open, through the relay."""
    store = store_through(relay, redis_place)
    yield store
    store.close()


def store_through(relay: Relay, place: Any) -> RedisStore:
    url = urlsplit(place.url)
    store = RedisStore(f"redis://:{url.password}@127.0.0.1:{relay.port}?{url.query}", place.gateway)
    store.open()
    return store


def assert_holds(place: Any, store: RedisStore, rows: list[Row], tally: Tally) -> None:
    """Exactly these rows, by what this store, one that is opened anew, and the server itself say."""
    expected = Holding(len(rows), sum(row.size for row in rows), store.holding().last_id)
    found = store.fetch(0, ALL, ALL)
    assert [item.row for item in found if isinstance(item, StoredRow)] == rows
    assert (store.holding(), store.tallies()["DEV", "eeg"]) == (expected, tally)
    again = place.open(read_only=True)
    assert (again.holding(), again.tallies()["DEV", "eeg"]) == (expected, tally)
    assert place.client.zcard(store._index(("DEV", "eeg", EPOCH))) == sum(row.signal == "eeg" for row in rows)


LOST = [Fate.ANSWER_LOST, Fate.NEVER_SENT]


@pytest.mark.parametrize("fate", LOST)
@pytest.mark.parametrize("more", [0, 3])
def test_an_append_without_an_answer_counts_once(
    store: RedisStore, relay: Relay, redis_place: Any, make: Any, fate: Fate, more: int
) -> None:
    rows = make.rows(0, 4 + more)
    store.append(rows[:2])
    relay.fate = fate
    with pytest.raises(UnavailableError):
        store.append(rows[2:5])
    assert store.holding().rows == 2
    store.append(rows[2:])
    assert_holds(redis_place, store, rows, Tally(5 + more, 50 + 10 * more, 0))
    store.append([make.row(5 + more)])
    assert store.holding().last_id == 6 + more


@pytest.mark.parametrize("fate", LOST)
def test_a_receipt_between_a_lost_answer_and_the_next_attempt_confuses_nothing(
    store: RedisStore, relay: Relay, redis_place: Any, make: Any, fate: Fate
) -> None:
    rows = make.rows(0, 6)
    store.append(rows[:3])
    relay.fate = fate
    with pytest.raises(UnavailableError):
        store.append(rows[3:6])
    assert make.forget(store, "DEV", "eeg", make.epoch, [(0, 1)]) == [1, 2]
    store.append(rows[3:7])
    assert_holds(redis_place, store, rows[2:], Tally(7, 70, 0))


def test_rows_that_were_accepted_without_an_answer_and_receipted_do_not_come_again(
    store: RedisStore, relay: Relay, redis_place: Any, make: Any
) -> None:
    rows = make.rows(0, 4)
    relay.fate = Fate.ANSWER_LOST
    with pytest.raises(UnavailableError):
        store.append(rows[:3])
    assert make.forget(store, "DEV", "eeg", make.epoch, [(0, 2)]) == [1, 2, 3]
    relay.fate = Fate.NEVER_SENT
    with pytest.raises(UnavailableError):
        store.append(rows)
    store.append(rows)
    assert_holds(redis_place, store, rows[3:], Tally(5, 50, 0))


@pytest.mark.parametrize("fate", LOST)
def test_a_removal_without_an_answer_counts_once(
    store: RedisStore, relay: Relay, redis_place: Any, make: Any, fate: Fate
) -> None:
    rows = make.rows(0, 4)
    store.append(rows)
    relay.fate = fate
    with pytest.raises(UnavailableError):
        make.forget(store, "DEV", "eeg", make.epoch, [(0, 1)])
    make.forget(store, "DEV", "eeg", make.epoch, [(0, 2)])
    assert_holds(redis_place, store, rows[3:], Tally(5, 50, 0))
    store.append([make.row(5)])
    assert store.holding().rows == 3


@pytest.mark.parametrize("fate", LOST)
def test_a_replacement_without_an_answer_counts_once(
    store: RedisStore, relay: Relay, redis_place: Any, make: Any, fate: Fate
) -> None:
    rows = [*make.rows(0, 2), make.loss_row(0, lost=3)]
    store.append(rows)
    new = [make.loss_row(1, lost=10), make.loss_row(0, lost=3)]
    relay.fate = fate
    with pytest.raises(UnavailableError):
        store.replace([1, 4], new)
    store.replace([1, 4], new)
    assert_holds(redis_place, store, rows[1:3] + new, Tally(3, 30, 13))


def test_a_step_that_arrives_late_does_nothing_once_it_was_repeated(
    store: RedisStore, relay: Relay, redis_place: Any, make: Any
) -> None:
    rows = make.rows(0, 4)
    store.append(rows[:2])
    relay.fate = Fate.LATE
    with pytest.raises(UnavailableError):
        store.append(rows[2:4])
    store.append(rows[2:])
    assert b"another" in relay.release()
    assert_holds(redis_place, store, rows, Tally(5, 50, 0))


def test_a_step_that_arrives_late_is_seen_by_the_next_attempt(
    store: RedisStore, relay: Relay, redis_place: Any, make: Any
) -> None:
    rows = make.rows(0, 4)
    store.append(rows[:2])
    relay.fate = Fate.LATE
    with pytest.raises(UnavailableError):
        store.append(rows[2:4])
    assert b"done" in relay.release()
    store.append(rows[2:])
    assert_holds(redis_place, store, rows, Tally(5, 50, 0))


def test_a_step_of_a_dead_program_does_nothing_once_the_next_one_is_open(
    store: RedisStore, relay: Relay, redis_place: Any, make: Any
) -> None:
    relay.fate = Fate.LATE
    with pytest.raises(UnavailableError):
        store.append(make.rows(0, 2))
    rows = make.rows(0, 4)
    with_the_same_sequences = redis_place.open()
    assert b"another" in relay.release()
    with_the_same_sequences.append(rows)
    assert_holds(redis_place, with_the_same_sequences, rows, Tally(5, 50, 0))
    with pytest.raises(DamagedError, match="another owner"):
        store.append(make.rows(0, 2))


def test_an_answer_lost_before_the_program_ends_is_found_at_the_next_start(
    store: RedisStore, relay: Relay, redis_place: Any, make: Any
) -> None:
    rows = make.rows(0, 2)
    relay.fate = Fate.ANSWER_LOST
    with pytest.raises(UnavailableError):
        store.append(rows)
    store.close()
    assert_holds(redis_place, redis_place.open(), rows, Tally(3, 30, 0))


def test_kill_9_of_the_server_in_mid_append_loses_nothing_and_doubles_nothing(
    redis_server: Redis, redis_place: Any, make: Any
) -> None:
    store = redis_place.open()
    enough = threading.Event()
    progress = threading.Condition()
    accepted = 0

    def write() -> int:
        nonlocal accepted
        failures = 0
        while not enough.is_set():
            rows = make.rows(accepted, accepted + accepted % 4)
            try:
                store.append(rows)
            except UnavailableError:
                failures += 1
                enough.wait(0.01)
                continue
            with progress:
                accepted += len(rows)
                progress.notify_all()
        return failures

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        try:
            for _ in range(KILLS):
                with progress:
                    goal = accepted + 20
                    deadline = time.monotonic() + SECONDS_MAX
                    while accepted < goal and not writing.done():
                        assert progress.wait(deadline - time.monotonic())
                redis_server.kill()
                redis_server.start()
        finally:
            enough.set()
        assert writing.result() >= KILLS
    found = store.fetch(0, ALL, ALL)
    sequences = [item.row.sequence for item in found if isinstance(item, StoredRow)]
    # The last append may have had no answer and have happened: it was not tried again.
    assert sequences == list(range(len(sequences)))
    assert accepted <= len(sequences) <= accepted + 4
    again = redis_place.open()
    assert again.tallies()["DEV", "eeg"] == Tally(len(sequences), 10 * len(sequences), 0)
    assert again.holding() == Holding(
        len(sequences), sum(item.row.size for item in found if isinstance(item, StoredRow)), len(sequences)
    )


@contextmanager
def setting(client: Any, name: str, value: object) -> Iterator[None]:
    before = client.config_get(name)[name]
    client.config_set(name, value)
    try:
        yield
    finally:
        client.config_set(name, before)


@pytest.mark.parametrize(
    ("name", "value", "needed"),
    [
        ("appendfsync", "everysec", "appendfsync always"),
        ("appendfsync", "no", "appendfsync always"),
        ("appendonly", "no", "appendonly yes"),
        ("no-appendfsync-on-rewrite", "yes", "no-appendfsync-on-rewrite no"),
    ],
)
def test_a_server_that_would_lose_data_is_refused_and_left_as_it_is(
    redis_place: Any, name: str, value: str, needed: str
) -> None:
    with setting(redis_place.client, name, value):
        with pytest.raises(ConfigError, match="power cut") as raised:
            redis_place.open()
        assert raised.value.hint == f"set {needed}"
        assert redis_place.client.keys() == []


def test_a_server_that_hides_its_configuration_is_used_with_a_warning(
    redis_server: Redis, redis_place: Any, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    url = urlsplit(redis_place.url)
    redis_place.client.acl_setuser("spool", enabled=True, passwords=["+p"], keys=["*"], commands=["+@all", "-config"])
    try:
        store = RedisStore(f"unix://spool:p@{redis_server.socket_path}?{url.query}", redis_place.gateway)
        with caplog.at_level(logging.WARNING):
            store.open()
        store.append([make.row(0)])
        store.close()
    finally:
        redis_place.client.acl_deluser("spool")
    assert "whether it is durable is not known" in caplog.text


def test_a_full_server_refuses_new_rows_but_can_be_emptied_and_reopened(redis_place: Any, make: Any) -> None:
    store = redis_place.open()
    store.append(make.rows(0, 9))
    used = redis_place.client.info("memory")["used_memory"]
    with setting(redis_place.client, "maxmemory", used // 2):
        with pytest.raises(FullError, match="maxmemory"):
            store.append([make.row(10)])
        assert make.forget(store, "DEV", "eeg", make.epoch, [(0, 1)]) == [1, 2]
        store.close()
        store = redis_place.open()
        assert make.forget(store, "DEV", "eeg", make.epoch, [(2, 2)]) == [3]
        assert store.holding().rows == 7
    store.append([make.row(10)])
    assert store.tallies()["DEV", "eeg"] == Tally(11, 110, 0)


def test_an_outbox_that_was_emptied_behind_its_back_is_noticed(redis_place: Any, make: Any) -> None:
    store = redis_place.open()
    store.append(make.rows(0, 2))
    redis_place.client.delete(store._key("blocks"))
    with pytest.raises(DamagedError, match="another state"):
        store.append([make.row(3)])


def test_a_long_index_is_added_up_in_parts(redis_place: Any, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_store, "SIZES_AT_ONCE", 3)
    rows = [make.row(sequence, size=100 + sequence) for sequence in range(10)]
    redis_place.open().append(rows)
    assert redis_place.open().holding() == Holding(10, sum(row.size for row in rows), 10)


def former_entry(sequence: int, payload: bytes = b"payload") -> dict[str, Any]:
    """A block as the format before this one had it."""
    head = f"DEV\0eeg\0{sequence}\0{sequence}\0{sequence + 9}\x0010\x000\0\0application/cbor\0raw\0"
    return {
        "device": "DEV",
        "signal": "eeg",
        "sequence": sequence,
        "first_ns": sequence,
        "last_ns": sequence + 9,
        "samples": 10,
        "size": 200,
        "lost": 0,
        "lost_signal": "",
        "content_type": "application/cbor",
        "schema": "raw",
        "checksum": zlib.crc32(b"payload", zlib.crc32(head.encode())),
        "payload": payload,
    }


def test_an_outbox_of_the_former_format_is_taken_over_also_when_that_is_cut_off(
    redis_place: Any, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_store, "RENEWED_AT_ONCE", 2)
    prefix = f"wardlink:outbox:{redis_place.gateway}:"
    redis_place.client.set(prefix + "epoch", "former")
    for sequence in range(3, 8):
        entry = former_entry(sequence, b"damaged" if sequence == 5 else b"payload")
        redis_place.client.xadd(prefix + "blocks", entry, id=f"{sequence + 1}-1")
        redis_place.client.zadd(prefix + "sequences:DEV\x1feeg", {f"{sequence + 1}:200": sequence})
    for name, value in (("next_sequence", 8), ("accepted", 80), ("lost", 0)):
        redis_place.client.hset(prefix + "tallies", f"DEV\x1feeg\x1f{name}", value)
    for _ in range(2):
        store = redis_place.store()
        steps = iter([True, False])
        carry_out = store._carry_out

        def cut_off(commands: Any, steps: Any = steps, carry_out: Any = carry_out) -> Any:
            if not next(steps):
                raise redis.ConnectionError("cut off")
            return carry_out(commands)

        store._carry_out = cut_off
        with pytest.raises(UnavailableError, match="cut off"):
            store.open()
        store.close()
    store = redis_place.open()
    found = store.fetch(0, ALL, ALL)
    assert [type(item) for item in found] == [StoredRow, StoredRow, DamagedRow, StoredRow, StoredRow]
    rows = [item.row if isinstance(item, StoredRow) else item.held for item in found]
    assert [(row.epoch, row.sequence, row.first_ns) for row in rows] == [("former", n, n) for n in range(3, 8)]
    assert store.tallies() == {("DEV", "eeg"): Tally(8, 80, 0)}
    assert (store.holding().rows, store.holding().size) == (5, 1000)
    assert store.held() == {("DEV", "eeg", "former"): (3, 7)}
    assert len(make.forget(store, "DEV", "eeg", "former", [(3, 7)])) == 5
    assert store.holding().rows == 0
    assert redis_place.client.keys(prefix + "sequences:*") == []


def test_streams_and_epochs_of_which_nothing_is_left_are_forgotten_at_the_next_start(
    redis_place: Any, make: Any
) -> None:
    store = redis_place.open()
    store.append([make.row(0, epoch="a"), make.row(0, epoch="b")])
    make.forget(store, "DEV", "eeg", "a", [(0, 0)])
    streams = store._key("streams")
    assert redis_place.client.scard(streams) == 2
    redis_place.open()
    assert redis_place.client.smembers(streams) == {b"DEV\x1feeg\x1fb"}


def test_two_gateways_share_a_database_without_meeting(redis_place: Any, make: Any) -> None:
    first = redis_place.open()
    second = RedisStore(redis_place.url, "other-gateway")
    second.open()
    first.append(make.rows(0, 2))
    second.append([make.row(0)])
    assert (first.holding().rows, second.holding().rows) == (3, 1)
    assert first.epoch != second.epoch
    second.close()


@pytest.mark.parametrize(
    ("password", "error", "hint"), [("wrong", ConfigError, "redis-password"), (None, ConfigError, "redis-password")]
)
def test_a_wrong_or_missing_password_is_the_operators(
    redis_server: Redis, redis_url: str, password: str | None, error: type[Exception], hint: str
) -> None:
    store = RedisStore(f"unix://{redis_server.socket_path}", "gw", password)
    with pytest.raises(error, match=hint):
        store.open()
    store.close()


def test_a_server_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    with socket.socket() as unused, suppress(OSError):
        unused.bind(("127.0.0.1", 0))
        nobody = unused.getsockname()[1]
    for url in (f"unix://{tmp_path}/none", f"redis://127.0.0.1:{nobody}"):
        store = RedisStore(url, "gw")
        with pytest.raises(UnavailableError) as raised:
            store.open()
        assert "spool.redis_url" in raised.value.hint
        store.close()


@pytest.mark.parametrize("url", ["http://127.0.0.1", "redis://127.0.0.1:many", "nonsense"])
def test_a_url_that_is_none_is_the_operators(url: str) -> None:
    with pytest.raises(ConfigError, match=r"spool\.redis_url"):
        RedisStore(url, "gw")


def test_the_client_never_repeats_by_itself(store: RedisStore) -> None:
    retry: Any = store._client.get_retry()
    assert retry.get_retries() == 0
