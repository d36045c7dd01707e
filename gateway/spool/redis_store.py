"""The outbox in a Redis server beside the gateway, for places that run one anyway.

Rows are a stream, in order of arrival; a sorted set a signal finds them by sequence. Every step is one MULTI.
Durable only as far as the server is: `appendonly yes` and `appendfsync always`, which is checked at the start.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import redis

from gateway.errors import ConfigError, UnavailableError
from gateway.spool.store import DamagedRow, Held, Holding, Range, Row, StoredRow, StreamKey, Tally
from gateway.wire.codec import Payload

log = logging.getLogger(__name__)

TIMEOUT_S = 5.0
_SEPARATOR = "\x1f"
"""Between device and signal in a key: no name may contain it."""
_TALLY = ("next_sequence", "accepted", "lost")


class RedisStore:
    """A `Store` under one prefix of a Redis database, which nobody else may write."""

    def __init__(self, url: str, gateway: str, password: str | None = None) -> None:
        self._client: Any = redis.Redis.from_url(  # Any: redis-py types every answer as a union of all answers
            url, password=password, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S
        )
        self._prefix = f"wardlink:outbox:{gateway}:"
        self._epoch = ""
        self._holding = Holding(0, 0, 0)
        self._unsure = False
        """The answer to the last step was lost: it may have been carried out."""

    @property
    def epoch(self) -> str:
        return self._epoch

    def open(self) -> None:
        with self._mapped():
            self._check_durability()
            self._client.set(self._key("epoch"), secrets.token_hex(8), nx=True)
            self._epoch = self._client.get(self._key("epoch")).decode()
            numbers = self._client.mget(self._key("rows"), self._key("size"), self._key("last_id"))
            self._holding = Holding(*(int(number or 0) for number in numbers))

    def append(self, rows: Sequence[Row]) -> None:
        self._step([], rows)

    def replace(self, ids: Sequence[int], rows: Sequence[Row]) -> None:
        self._step(self._summaries(ids), rows)

    def fetch(self, after: int, through: int, limit: int) -> list[StoredRow | DamagedRow]:
        if through <= after:
            return []
        with self._mapped():
            found = self._client.xrange(self._key("blocks"), f"({after}-1", f"{through}-1", count=limit)
        return [_checked(entry, fields) for entry, fields in found]

    def remove(self, device: str, signal: str, ranges: Sequence[Range]) -> list[int]:
        ids: list[int] = []
        with self._mapped():
            for first, last in ranges:
                found = self._client.zrangebyscore(self._index(device, signal), first, last)
                ids.extend(int(number) for number in found)
        self._step(self._summaries(ids), [])
        return ids

    def oldest(self, signals: Sequence[str], limit: int) -> list[Held]:
        candidates: list[int] = []
        with self._mapped():
            for device, signal in self.tallies():
                if signal in signals:
                    found = self._client.zrange(self._index(device, signal), 0, limit - 1)
                    candidates.extend(int(number) for number in found)
        return self._summaries(sorted(candidates)[:limit])

    def held(self) -> Mapping[StreamKey, Range]:
        held: dict[StreamKey, Range] = {}
        with self._mapped():
            for key in self.tallies():
                ends = [self._client.zrange(self._index(*key), at, at, withscores=True) for at in (0, -1)]
                if ends[0]:
                    held[key] = (int(ends[0][0][1]), int(ends[1][0][1]))
        return held

    def tallies(self) -> Mapping[StreamKey, Tally]:
        with self._mapped():
            found = self._client.hgetall(self._key("tallies"))
        numbers: dict[StreamKey, dict[str, int]] = {}
        for field, value in found.items():
            device, signal, name = field.decode().split(_SEPARATOR)
            numbers.setdefault((device, signal), {})[name] = int(value)
        return {key: Tally(*(values.get(name, 0) for name in _TALLY)) for key, values in numbers.items()}

    def holding(self) -> Holding:
        return self._holding

    def close(self) -> None:
        self._client.close()

    def _step(self, removed: Sequence[Held], rows: Sequence[Row]) -> None:
        """Forget and add rows, with all that is counted, in one MULTI."""
        before = self._holding
        after = Holding(
            before.rows + len(rows) - len(removed),
            before.size + sum(row.size for row in rows) - sum(held.size for held in removed),
            before.last_id + len(rows),
        )
        if self._unsure and rows and self._was_carried_out(after):
            return
        self._unsure = True
        with self._mapped(), self._client.pipeline(transaction=True) as step:
            for held in removed:
                step.xdel(self._key("blocks"), f"{held.id}-1")
                step.zrem(self._index(held.device, held.signal), held.id)
            for number, row in enumerate(rows, start=before.last_id + 1):
                step.xadd(self._key("blocks"), _fields(row), id=f"{number}-1")
                step.zadd(self._index(*row.key), {str(number): row.sequence})
                step.hset(self._key("tallies"), _tally(*row.key, "next_sequence"), str(row.sequence + 1))
                step.hincrby(self._key("tallies"), _tally(*row.key, "accepted"), row.samples)
                if row.lost:
                    step.hincrby(self._key("tallies"), _tally(row.device, row.lost_signal, "lost"), row.lost)
            step.mset(
                {self._key("rows"): after.rows, self._key("size"): after.size, self._key("last_id"): after.last_id}
            )
            step.execute()
        self._holding, self._unsure = after, False

    def _was_carried_out(self, after: Holding) -> bool:
        """Whether a step whose answer was lost did happen: repeating it would count its samples twice."""
        with self._mapped():
            if int(self._client.get(self._key("last_id")) or 0) != after.last_id:
                return False
        self._holding, self._unsure = after, False
        return True

    def _summaries(self, ids: Sequence[int]) -> list[Held]:
        if not ids:
            return []
        with self._mapped(), self._client.pipeline(transaction=False) as reads:
            for number in ids:
                reads.xrange(self._key("blocks"), f"{number}-1", f"{number}-1")
            found = reads.execute()
        return [_held(entry, fields) for entries in found for entry, fields in entries]

    def _check_durability(self) -> None:
        try:
            settings = {**self._client.config_get("appendonly"), **self._client.config_get("appendfsync")}
        except redis.ResponseError:
            log.warning("this Redis does not show its configuration: whether it is durable is not known")
            return
        if settings.get("appendonly") != "yes" or settings.get("appendfsync") != "always":
            raise ConfigError(
                "spool.redis_url: this Redis loses data in a power cut", hint="set appendonly yes, appendfsync always"
            )

    def _key(self, name: str) -> str:
        return self._prefix + name

    def _index(self, device: str, signal: str) -> str:
        return f"{self._prefix}sequences:{device}{_SEPARATOR}{signal}"

    @contextlib.contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except redis.AuthenticationError as error:
            raise ConfigError(f"outbox in Redis: {error}", hint="credential redis-password") from None
        except redis.RedisError as error:
            raise UnavailableError(f"outbox in Redis: {error}", hint="is the server of spool.redis_url up?") from error


def _tally(device: str, signal: str, name: str) -> str:
    return _SEPARATOR.join((device, signal, name))


def _fields(row: Row) -> dict[Any, Any]:
    return {
        "device": row.device,
        "signal": row.signal,
        "sequence": row.sequence,
        "first_ns": row.first_ns,
        "last_ns": row.last_ns,
        "samples": row.samples,
        "size": row.size,
        "lost": row.lost,
        "lost_signal": row.lost_signal,
        "content_type": row.payload.content_type,
        "schema": row.payload.schema,
        "checksum": row.checksum(),
        "payload": row.payload.data,
    }


def _held(entry: bytes, fields: Mapping[bytes, bytes]) -> Held:
    numbers = (int(fields[name]) for name in (b"sequence", b"first_ns", b"last_ns", b"samples", b"size"))
    return Held(int(entry.split(b"-")[0]), fields[b"device"].decode(), fields[b"signal"].decode(), *numbers)


def _checked(entry: bytes, fields: Mapping[bytes, bytes]) -> StoredRow | DamagedRow:
    held = _held(entry, fields)
    row = Row(
        device=held.device,
        signal=held.signal,
        sequence=held.sequence,
        first_ns=held.first_ns,
        last_ns=held.last_ns,
        samples=held.samples,
        lost=int(fields[b"lost"]),
        lost_signal=fields[b"lost_signal"].decode(),
        payload=Payload(fields[b"content_type"].decode(), fields[b"schema"].decode(), fields[b"payload"]),
    )
    return StoredRow(held.id, row) if row.checksum() == int(fields[b"checksum"]) else DamagedRow(held)
