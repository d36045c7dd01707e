"""The time-series store behind one small interface, in two dialects: InfluxDB 2 (`v2`) and InfluxDB 1.x (`v1`).

Only here are influxdb-client and the HTTP library beneath it known. Requests block, so they run in worker threads,
each bounded in time. What the store refuses for good is told line by line; everything that somebody could mend
outside (away, overloaded, wrong credentials, no such bucket) is an `UnavailableError`: the lines are to be kept.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlencode, urlsplit

import urllib3
from influxdb_client.client.exceptions import InfluxDBError
from influxdb_client.client.influxdb_client import InfluxDBClient
from influxdb_client.client.write_api import SYNCHRONOUS, WriteApi

from gateway.errors import UnavailableError

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
REQUEST_TIMEOUT_S = 20.0
"""A batch takes some 20 ms; a store that compacts or makes a shard may take seconds."""
REASON_LENGTH_MAX = 500
"""Of what a store says about a refused line: 1.x repeats the line itself."""
_GZIP_LEVEL = 1
"""Lines of one series shrink tenfold at any level; higher ones only cost time."""
_BAD_REQUEST, _NOT_FOUND, _TOO_LARGE, _UNPROCESSABLE = 400, 404, 413, 422
_DROPPED = re.compile(r"dropped=(\d+)")
_NO_PLACE = re.compile(r"\b(bucket|organization)\b.*not found")
"""What 2.x says with 404; without it the whole address is wrong."""
_ABOUT_THE_DATA = ("partial write", "unable to parse", "field type conflict", "beyond retention", "time outside range")
"""What 1.x says with 400 when the lines are at fault; any other 400 is about the request."""


class PlaceError(UnavailableError):
    """One bucket cannot be written until somebody makes it or mends the binding; the store as a whole works."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A line that the store will never take."""

    line: int
    """Its number in what was written, from 0."""
    reason: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the lines: all but the refused ones are stored."""

    refused: tuple[Refusal, ...] = ()


class TimeSeries(Protocol):
    """A store that lines are written to."""

    @property
    def where(self) -> str:
        """What an operator calls it, without secrets."""

    async def ping(self) -> None:
        """Whether it answers. Raises `UnavailableError`."""

    async def write(self, org: str, bucket: str, lines: bytes) -> Outcome:
        """Store lines (precision ns, each ends in a line feed); when it returns, those not refused are stored.

        Writing the same lines again changes nothing. Raises `UnavailableError`, with any part of them stored;
        `PlaceError` where it is about this bucket alone.
        """

    async def close(self) -> None:
        """Release connections; any number of times."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """A store's answer to one write request."""

    status: int
    said: str = ""

    @property
    def is_stored(self) -> bool:
        return self.status in (200, 204) and not self.said

    @property
    def dropped(self) -> int | None:
        """How many lines it says that it dropped."""
        found = _DROPPED.search(self.said)
        return int(found[1]) if found else None


class _Posts(Protocol):
    """One write request of a dialect, blocking."""

    def __call__(self, org: str, bucket: str, lines: bytes, /) -> _Answer: ...


class InfluxV2:
    """InfluxDB 2.x, Cloud and whatever speaks `/api/v2/write`, through the official client."""

    def __init__(self, url: str, *, org: str, token: str, compress: bool = True) -> None:
        self.where = f"InfluxDB at {_host_of(url)}"
        self._org = org
        timeout_ms = (int(CONNECT_TIMEOUT_S * 1000), int(REQUEST_TIMEOUT_S * 1000))
        self._client = InfluxDBClient(url, token=token, org=org, enable_gzip=compress, timeout=timeout_ms)
        self._write_api: WriteApi = self._client.write_api(write_options=SYNCHRONOUS)
        self._http = _pool()
        self._ping_url = f"{url.rstrip('/')}/ping"

    async def ping(self) -> None:
        """Whether it answers. Raises `UnavailableError`."""
        await asyncio.to_thread(_get, self._http, self._ping_url, self.where)

    async def write(self, org: str, bucket: str, lines: bytes) -> Outcome:
        """See `TimeSeries.write`."""
        return await asyncio.to_thread(_write_all, self._post, org or self._org, bucket, lines)

    async def close(self) -> None:
        """Release connections."""
        self._http.clear()
        await asyncio.to_thread(self._client.close)

    def _post(self, org: str, bucket: str, lines: bytes) -> _Answer:
        try:
            self._write_api.write(bucket, org, lines)  # its default precision is ns
        except InfluxDBError as error:
            if error.response is None or not error.response.status:
                raise _away(self.where, error) from None
            answer = _Answer(error.response.status, str(error.message))
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise _away(self.where, error) from None
        else:
            return _Answer(204)
        if answer.status in (_BAD_REQUEST, _TOO_LARGE, _UNPROCESSABLE):
            return answer
        if answer.status == _NOT_FOUND and _NO_PLACE.search(answer.said):
            raise PlaceError(f"{self.where}: {_short(answer.said)}", hint=f"make bucket {bucket!r} in {org!r}")
        raise _kept(self.where, answer)


class InfluxV1:
    """InfluxDB 1.x: a bucket is a database, made when it is first needed."""

    def __init__(
        self, url: str, *, username: str | None = None, password: str | None = None, compress: bool = True
    ) -> None:
        self.where = f"InfluxDB at {_host_of(url)}"
        self._url = url.rstrip("/")
        self._headers: dict[str, str] = {}
        if username is not None:
            self._headers = dict(urllib3.make_headers(basic_auth=f"{username}:{password or ''}"))
        self._compress = compress
        self._http = _pool()

    async def ping(self) -> None:
        """Whether it answers and knows us. Raises `UnavailableError`."""
        await asyncio.to_thread(self._query, "SHOW DATABASES")

    async def write(self, org: str, bucket: str, lines: bytes) -> Outcome:
        """See `TimeSeries.write`; `org` means nothing here."""
        return await asyncio.to_thread(_write_all, self._post, org, bucket, lines)

    async def close(self) -> None:
        """Release connections."""
        self._http.clear()

    def _post(self, _org: str, bucket: str, lines: bytes) -> _Answer:
        answer = self._post_once(bucket, lines)
        if answer.status == _NOT_FOUND and "database not found" in answer.said:
            self._create(bucket)
            log.info("%s: database %r created", self.where, bucket)
            answer = self._post_once(bucket, lines)
        if answer.is_stored or answer.status == _TOO_LARGE:
            return answer
        if answer.status == _BAD_REQUEST and any(words in answer.said for words in _ABOUT_THE_DATA):
            return answer
        raise _kept(self.where, answer)

    def _create(self, database: str) -> None:
        try:
            self._query(f"CREATE DATABASE {_quoted(database)}")
        except _SaidError as error:
            raise PlaceError(f"{error.message}: {database!r}", hint="mend the binding") from None

    def _post_once(self, bucket: str, lines: bytes) -> _Answer:
        url = f"{self._url}/write?{urlencode({'db': bucket, 'precision': 'ns'})}"
        headers = {"Content-Type": "text/plain; charset=utf-8"}
        if self._compress:
            headers["Content-Encoding"] = "gzip"
            lines = gzip.compress(lines, _GZIP_LEVEL, mtime=0)
        return self._request("POST", url, lines, headers)

    def _query(self, statement: str) -> None:
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        answer = self._request("POST", f"{self._url}/query", urlencode({"q": statement}).encode(), headers)
        if answer.status == 200 and answer.said:
            raise _SaidError(f"{self.where} says: {_short(answer.said)}")
        if answer.status != 200:
            raise _kept(self.where, answer)

    def _request(self, method: str, url: str, body: bytes, headers: Mapping[str, str]) -> _Answer:
        try:
            response = self._http.request(method, url, body=body, headers=self._headers | dict(headers))
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise _away(self.where, error) from None
        return _Answer(response.status, _error_in(response.data))


class _SaidError(UnavailableError):
    """A statement that InfluxDB 1.x understood and did not carry out."""


def _write_all(post: _Posts, org: str, bucket: str, lines: bytes) -> Outcome:
    """Write lines and single out the bad ones, by halves: n bad ones among N take about 2 n log N requests.

    A v2 store rejects a whole request for one bad line; 1.x stores the good ones and does not say which were bad.
    """
    answer = post(org, bucket, lines)
    if answer.is_stored:
        return Outcome()
    refused: list[Refusal] = []
    waiting = [(0, lines.splitlines(keepends=True), answer)]
    while waiting:
        start, part, answer = waiting.pop()
        if len(part) == 1 or (answer.dropped == len(part) and answer.status != _TOO_LARGE):
            refused += [Refusal(start + n, answer.said[:REASON_LENGTH_MAX]) for n in range(len(part))]
            continue
        for first, half in _halves(start, part):
            answer = post(org, bucket, b"".join(half))
            if not answer.is_stored:
                waiting.append((first, half, answer))
    return Outcome(tuple(sorted(refused, key=lambda refusal: refusal.line)))


def _halves(start: int, lines: list[bytes]) -> Iterator[tuple[int, list[bytes]]]:
    middle = len(lines) // 2
    yield start, lines[:middle]
    yield start + middle, lines[middle:]


def _pool() -> urllib3.PoolManager:
    timeout = urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=REQUEST_TIMEOUT_S)
    return urllib3.PoolManager(timeout=timeout, retries=False)


def _get(http: urllib3.PoolManager, url: str, where: str) -> None:
    try:
        response = http.request("GET", url)
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise _away(where, error) from None
    if response.status >= 400:
        raise _kept(where, _Answer(response.status, _error_in(response.data)))


def _error_in(body: bytes) -> str:
    """The error in an answer of 1.x, empty if there is none."""
    try:
        content = json.loads(body or b"{}")
    except ValueError:
        return body[:REASON_LENGTH_MAX].decode(errors="replace")
    if not isinstance(content, dict):
        return ""
    results = content.get("results") or [{}]
    return str(content.get("error") or results[0].get("error") or "")


def _away(where: str, error: BaseException) -> UnavailableError:
    return UnavailableError(
        f"{where} does not answer: {_short(str(error) or type(error).__name__)}",
        hint="is it running, and is its port open from here?",
    )


def _kept(where: str, answer: _Answer) -> UnavailableError:
    hint = ""
    if answer.status in (401, 403):
        hint = "check the user and the credential influx-password (v1) or influx-token (v2), and its rights"
    said = f": {_short(answer.said)}" if answer.said else ""
    return UnavailableError(f"{where} answered {answer.status}{said}", hint=hint)


def _short(text: str) -> str:
    return " ".join(text.split())[:REASON_LENGTH_MAX]


def _host_of(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)


def _quoted(identifier: str) -> str:
    escaped = identifier.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
