"""Both dialects: good lines end stored, bad ones are singled out, and nothing that can be mended counts as bad."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import urllib3

from cloud_sync.timeseries import InfluxV1, InfluxV2, PlaceError, TimeSeries
from gateway.errors import UnavailableError
from wardlink.servers import InfluxDB
from wardlink.servers.process import free_port

T0 = 1_700_000_000_000_000_000


def line(number: int, field: str = "x=1.5", tag: str = "a") -> bytes:
    return f"m,tag={tag} {field} {T0 + number}\n".encode()


def v1(server: InfluxDB, **more: Any) -> InfluxV1:
    return InfluxV1(server.url, **{"username": server.user_name, "password": server.password, **more})


async def stored(server: InfluxDB, bucket: str, field: str = "x") -> list[list[Any]]:
    series = await asyncio.to_thread(server.query, f"SELECT {field} FROM m", bucket)
    return [row for one in series for row in one["values"]]


# --- v1, on a real InfluxDB 1.x


@pytest.mark.parametrize("compress", [True, False])
async def test_v1_stores_lines_to_the_nanosecond(influx_server: InfluxDB, influx_database: str, compress: bool) -> None:
    store = v1(influx_server, compress=compress)
    await store.ping()
    body = b"".join(line(number, f"x={number}.25") for number in range(1000))
    for _ in range(2):
        assert (await store.write("", influx_database, body)).refused == ()
    assert await stored(influx_server, influx_database) == [[T0 + n, n + 0.25] for n in range(1000)]
    await store.close()


async def test_v1_makes_the_database_when_it_is_first_needed(influx_server: InfluxDB) -> None:
    store = v1(influx_server)
    name = 'made "by the" bridge, ü\'1'
    await store.write("", name, line(0))
    assert await stored(influx_server, name) == [[T0, 1.5]]
    await asyncio.to_thread(influx_server.drop_database, name)
    await store.write("", name, line(1))
    assert await stored(influx_server, name) == [[T0 + 1, 1.5]]
    await asyncio.to_thread(influx_server.drop_database, name)
    await store.close()


async def test_v1_a_name_that_no_database_can_have_is_about_this_place_alone(influx_server: InfluxDB) -> None:
    store = v1(influx_server)
    with pytest.raises(PlaceError, match="invalid name: 'a/b'"):
        await store.write("", "a/b", line(0))
    await store.close()


@pytest.mark.parametrize("bad", [b"m,tag=a x= 1\n", b"nonsense\n", b"m x=1 99999999999999999999\n", b"m x=1i2 1\n"])
@pytest.mark.parametrize("places", [[0], [99], [3, 4, 50], list(range(100))])
async def test_v1_singles_out_malformed_lines(
    influx_server: InfluxDB, influx_database: str, bad: bytes, places: list[int]
) -> None:
    store = v1(influx_server)
    lines = [bad if number in places else line(number) for number in range(100)]
    outcome = await store.write("", influx_database, b"".join(lines))
    assert [refusal.line for refusal in outcome.refused] == places
    assert all(refusal.reason for refusal in outcome.refused)
    good = [T0 + number for number in range(100) if number not in places]
    assert [row[0] for row in await stored(influx_server, influx_database)] == good
    await store.close()


@pytest.mark.parametrize("places", [[7], [0, 1, 2, 60], list(range(10, 90))])
async def test_v1_singles_out_type_conflicts(influx_server: InfluxDB, influx_database: str, places: list[int]) -> None:
    store = v1(influx_server)
    await store.write("", influx_database, line(1000))
    lines = [line(number, "x=1i" if number in places else "x=2.5") for number in range(100)]
    outcome = await store.write("", influx_database, b"".join(lines))
    assert [refusal.line for refusal in outcome.refused] == places
    assert all("field type conflict" in refusal.reason for refusal in outcome.refused)
    assert len(await stored(influx_server, influx_database)) == 1 + 100 - len(places)
    await store.close()


async def test_v1_points_older_than_the_retention_are_refused(influx_server: InfluxDB, influx_database: str) -> None:
    await asyncio.to_thread(
        influx_server.query, f'CREATE RETENTION POLICY day ON "{influx_database}" DURATION 1d REPLICATION 1 DEFAULT'
    )
    store = v1(influx_server)
    young = f"m,tag=a x=1 {time.time_ns()}\n".encode()
    outcome = await store.write("", influx_database, line(0) + young + line(1))
    assert [refusal.line for refusal in outcome.refused] == [0, 2]
    assert len(await stored(influx_server, influx_database)) == 1
    await store.close()


async def test_v1_wrong_password_keeps_the_lines_and_hints(influx_server: InfluxDB, influx_database: str) -> None:
    store = v1(influx_server, password="wrong")
    for attempt in (store.ping(), store.write("", influx_database, line(0))):
        with pytest.raises(UnavailableError, match="401") as caught:
            await attempt
        assert "influx-password" in caught.value.hint
        assert "wrong" not in str(caught.value)
    await store.close()


async def test_v1_away_is_unavailable_and_comes_back(influx_server: InfluxDB, influx_database: str) -> None:
    store = v1(influx_server)
    await store.write("", influx_database, line(0))
    await asyncio.to_thread(influx_server.kill)
    with pytest.raises(UnavailableError, match="does not answer"):
        await store.write("", influx_database, line(1))
    await asyncio.to_thread(influx_server.start)
    await store.write("", influx_database, line(2))
    assert [row[0] for row in await stored(influx_server, influx_database)] == [T0, T0 + 2]
    await store.close()


# --- v2, on a server that answers as InfluxDB 2.x does


class InfluxV2Server(ThreadingHTTPServer):
    """Rejects a whole request for one malformed line (400); stores all but lines of another type (422)."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.stored: dict[str, str] = {}
        self.requests: list[tuple[dict[str, list[str]], dict[str, str]]] = []
        self.broken: tuple[int, str] | None = None
        self.body_bytes_max = 1 << 20
        self.says_dropped = True
        self.bucket = "ward"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: InfluxV2Server

    def do_GET(self) -> None:
        self._answer(204)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        self.server.requests.append((query, dict(self.headers)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.server.broken is not None:
            self._answer(*self.server.broken)
        elif self.headers.get("Authorization") != "Token secret":
            self._answer(401, "unauthorized access")
        elif url.path != "/api/v2/write" or query["bucket"] != [self.server.bucket]:
            self._answer(404, f'bucket "{query["bucket"][0]}" not found')
        elif len(body) > self.server.body_bytes_max:
            self._answer(413, "request too large")
        else:
            self._write(body.decode().splitlines())

    def _write(self, lines: list[str]) -> None:
        if any(not re.fullmatch(r"\S+ \S+=\S+ \d+", line) for line in lines):
            self._answer(400, "unable to parse points")
            return
        conflicts = [line for line in lines if "i " in line]
        self.server.stored |= {line: "" for line in lines if line not in conflicts}
        if conflicts:
            dropped = f" dropped={len(conflicts)}" if self.server.says_dropped else ""
            self._answer(422, f"failure writing points to database: partial write: field type conflict{dropped}")
        else:
            self._answer(204)

    def _answer(self, status: int, message: str = "") -> None:
        content = json.dumps({"code": "x", "message": message}).encode() if message else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def v2_server() -> Iterator[InfluxV2Server]:
    with InfluxV2Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def v2(server: InfluxV2Server, **more: Any) -> InfluxV2:
    return InfluxV2(server.url, **{"org": "hospital", "token": "secret", **more})


@pytest.mark.parametrize("compress", [True, False])
async def test_v2_writes_through_the_official_client(v2_server: InfluxV2Server, compress: bool) -> None:
    store = v2(v2_server, compress=compress)
    await store.ping()
    body = b"".join(map(line, range(50)))
    assert (await store.write("", "ward", body)).refused == ()
    assert (await store.write("other", "ward", body)).refused == ()
    assert sorted(v2_server.stored) == body.decode().splitlines()
    queries = [query for query, _ in v2_server.requests]
    assert [query["org"] for query in queries] == [["hospital"], ["other"]]
    assert all(query["precision"] == ["ns"] for query in queries)
    assert all((headers.get("Content-Encoding") == "gzip") is compress for _, headers in v2_server.requests)
    await store.close()


@pytest.mark.parametrize("says_dropped", [True, False])
@pytest.mark.parametrize("bad", [b"m x=1i 1\n", b"nonsense\n"])
@pytest.mark.parametrize("places", [[0], [99], [3, 4, 50], list(range(100))])
async def test_v2_singles_out_bad_lines(
    v2_server: InfluxV2Server, bad: bytes, places: list[int], says_dropped: bool
) -> None:
    v2_server.says_dropped = says_dropped
    store = v2(v2_server)
    lines = [bad if number in places else line(number) for number in range(100)]
    outcome = await store.write("", "ward", b"".join(lines))
    assert [refusal.line for refusal in outcome.refused] == places
    assert sorted(v2_server.stored) == [line(number).decode().rstrip() for number in range(100) if number not in places]
    await store.close()


async def test_v2_one_bad_line_among_many_takes_few_requests(v2_server: InfluxV2Server) -> None:
    store = v2(v2_server)
    lines = [line(number, tag=f"t{number}") for number in range(5000)]
    lines[4321] = b"nonsense\n"
    outcome = await store.write("", "ward", b"".join(lines))
    assert [refusal.line for refusal in outcome.refused] == [4321]
    assert len(v2_server.stored) == 4999
    assert len(v2_server.requests) <= 1 + 2 * 13
    await store.close()


async def test_v2_a_request_that_is_too_large_is_halved(v2_server: InfluxV2Server) -> None:
    v2_server.body_bytes_max = 500
    store = v2(v2_server)
    lines = [line(number) for number in range(100)]
    lines[7] = line(7, tag="t" * 600)
    outcome = await store.write("", "ward", b"".join(lines))
    assert [(refusal.line, refusal.reason) for refusal in outcome.refused] == [(7, "request too large")]
    assert len(v2_server.stored) == 99
    await store.close()


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 502, 503, 504, 307])
async def test_v2_what_may_be_mended_is_never_refused(v2_server: InfluxV2Server, status: int) -> None:
    v2_server.broken = (status, "not now")
    store = v2(v2_server)
    with pytest.raises(UnavailableError, match=f"answered {status}: not now") as caught:
        await store.write("", "ward", line(0))
    assert not isinstance(caught.value, PlaceError)
    v2_server.broken = None
    assert (await store.write("", "ward", line(0))).refused == ()
    await store.close()


async def test_v2_a_missing_bucket_and_a_wrong_token_keep_the_lines_and_hint(v2_server: InfluxV2Server) -> None:
    store = v2(v2_server)
    with pytest.raises(PlaceError, match='bucket "no-such" not found') as caught:
        await store.write("", "no-such", line(0))
    assert caught.value.hint == "make bucket 'no-such' in 'hospital'"
    await store.close()
    store = v2(v2_server, token="not-it")
    with pytest.raises(UnavailableError) as refused:
        await store.write("", "ward", line(0))
    assert not isinstance(refused.value, PlaceError)
    assert "influx-token" in refused.value.hint
    assert "not-it" not in str(refused.value)
    await store.close()


@pytest.mark.parametrize("make", [InfluxV1, lambda url: InfluxV2(url, org="o", token="t")])
async def test_nobody_there(make: Callable[[str], TimeSeries]) -> None:
    store = make(f"http://127.0.0.1:{free_port()}")
    for attempt in (store.ping(), store.write("", "b", line(0))):
        with pytest.raises(UnavailableError, match="does not answer"):
            await attempt
    await store.close()


@pytest.fixture
def victoria_metrics(tmp_path: Path) -> Iterator[str]:
    """URL of a real server behind the official client's write path."""
    program = shutil.which("victoria-metrics")
    if program is None:
        pytest.skip("victoria-metrics is not installed (apt-get install victoria-metrics): v2 runs on the stub alone")
    address = f"127.0.0.1:{free_port()}"
    with subprocess.Popen(
        [program, f"-storageDataPath={tmp_path}", f"-httpListenAddr={address}", "-retentionPeriod=100y",
         "-dedup.minScrapeInterval=1ms", "-search.latencyOffset=0s"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        yield f"http://{address}"
        process.terminate()


async def test_v2_on_victoria_metrics(victoria_metrics: str) -> None:
    store = InfluxV2(victoria_metrics, org="any", token="any")
    deadline = time.monotonic() + 30
    while True:
        try:
            await store.ping()
            break
        except UnavailableError:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
    t0_ms = time.time_ns() // 1_000_000 - 600_000
    body = "".join(f"m,tag=a x={n}.5 {(t0_ms + n * 1000) * 1_000_000}\n" for n in range(500)).encode()
    assert (await store.write("", "any", body)).refused == ()
    await store.close()

    def exported() -> list[float]:
        http = urllib3.PoolManager()
        http.request("GET", f"{victoria_metrics}/internal/force_flush")
        answer = http.request("GET", f"{victoria_metrics}/api/v1/export?match[]=m_x").data
        return [value for row in answer.splitlines() for value in json.loads(row)["values"]]

    values = await asyncio.to_thread(exported)
    assert values == [n + 0.5 for n in range(500)]
