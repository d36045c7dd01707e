"""The outbox in a Redis server beside the gateway, for places that run one anyway.

Rows are a stream, in order of arrival; a sorted set a signal finds them by sequence. Every step is one script.
Durable only as far as the server is: what that takes is checked at the start.

A step whose answer was lost may have been carried out, or may be carried out later: it may still wait in a socket.
So every step names the state that it was made for, and of two that were made for the same state only one can happen.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from gateway.errors import ConfigError, DamagedError, UnavailableError
from gateway.spool.store import DamagedRow, Held, Holding, Range, Row, StoredRow, StreamKey, Tally
from gateway.wire.codec import Payload

log = logging.getLogger(__name__)

TIMEOUT_S = 5.0
SIZES_AT_ONCE = 10_000
"""Index entries read in one answer."""
FORGOTTEN_AT_ONCE = 1000
"""Rows named in one command of a script, which has room for some 8,000 words."""
_SEPARATOR = "\x1f"
"""Between device and signal in a key: no name may contain it."""
_TALLY = ("next_sequence", "accepted", "lost")
_DURABLE = {"appendonly": "yes", "appendfsync": "always", "no-appendfsync-on-rewrite": "no"}
"""With any other value a power cut takes what was accepted."""
_STEP = """
local blocks, owner = KEYS[1], KEYS[2]
if (redis.call('GET', owner) or '') ~= ARGV[1] then return 'another owner' end
local last, rows = '0-0', 0
if redis.call('EXISTS', blocks) == 1 then
  local info = redis.call('XINFO', 'STREAM', blocks)
  for at = 1, #info, 2 do
    if info[at] == 'last-generated-id' then last = info[at + 1] end
    if info[at] == 'length' then rows = info[at + 1] end
  end
end
if last ~= ARGV[2] or rows ~= tonumber(ARGV[3]) then return 'another state' end
local at = 4
while at <= #ARGV do
  local count = tonumber(ARGV[at])
  redis.call(unpack(ARGV, at + 1, at + count))
  at = at + count + 1
end
return 'done'
"""
"""Owner, highest id and number of rows that the step was made for, then its commands, each after its length.
A script, as in a MULTI a Redis out of memory refuses even what frees memory."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """A row as the index has it."""

    id: int
    device: str
    signal: str
    size: int
    lost: int = 0
    lost_signal: str = ""

    @property
    def member(self) -> str:
        return f"{self.id}:{self.size}"


class RedisStore:
    """A `Store` under one prefix of a Redis database, which nobody else may write. `read_only`: to look at it."""

    def __init__(self, url: str, gateway: str, password: str | None = None, *, read_only: bool = False) -> None:
        try:
            self._client: Any = redis.Redis.from_url(  # Any: redis-py types every answer as a union of all answers
                url,
                password=password,
                socket_timeout=TIMEOUT_S,
                socket_connect_timeout=TIMEOUT_S,
                retry=Retry(NoBackoff(), 0),  # a step that is repeated behind our back would count twice
            )
        except ValueError as error:
            raise ConfigError(f"spool.redis_url: {error}", hint="expected redis://, rediss:// or unix://") from None
        self._prefix = f"wardlink:outbox:{gateway}:"
        self._read_only = read_only
        self._owner = secrets.token_hex(8)
        self._epoch = ""
        self._holding = Holding(0, 0, 0)
        self._in_doubt = False
        """The answer to a step was lost: it may have been carried out, or be carried out later."""
        self._carried_out: set[tuple[str, str, int]] = set()
        """Rows of steps that turned out to have happened, until their caller tries them again."""

    @property
    def epoch(self) -> str:
        return self._epoch

    def open(self) -> None:
        with self._mapped():
            if not self._read_only:
                self._check_durability()
                self._take_over()
                if not self._client.exists(self._key("epoch")):
                    self._client.set(self._key("epoch"), secrets.token_hex(8), nx=True)
            found = self._client.get(self._key("epoch"))
            if found is None:
                raise UnavailableError("outbox in Redis is empty", hint="has its gateway run yet?")
            self._epoch = found.decode()
            self._count()
        self._in_doubt = False
        self._carried_out.clear()

    def append(self, rows: Sequence[Row]) -> None:
        self._step(list, rows)

    def replace(self, ids: Sequence[int], rows: Sequence[Row]) -> None:
        def removed() -> list[_Entry]:
            return [
                _Entry(held.id, held.device, held.signal, held.size, held.lost, held.lost_signal)
                for held in self._summaries(ids)
            ]

        self._step(removed, rows)

    def fetch(self, after: int, through: int, limit: int) -> list[StoredRow | DamagedRow]:
        if through <= after:
            return []
        with self._mapped():
            found = self._client.xrange(self._key("blocks"), f"({after}-1", f"{through}-1", count=limit)
        return [_checked(entry, fields) for entry, fields in found]

    def remove(self, device: str, signal: str, ranges: Sequence[Range]) -> list[int]:
        def removed() -> list[_Entry]:
            found: dict[bytes, None] = {}  # ranges may overlap
            for first, last in ranges:
                found.update(dict.fromkeys(self._client.zrangebyscore(self._index(device, signal), first, last)))
            return [_entry(device, signal, member) for member in found]

        return [entry.id for entry in self._step(removed, [])]

    def oldest(self, signals: Sequence[str], limit: int) -> list[Held]:
        candidates: list[int] = []
        for device, signal in self.tallies():
            if signal in signals:
                with self._mapped():
                    found = self._client.zrange(self._index(device, signal), 0, limit - 1)
                candidates.extend(_entry(device, signal, member).id for member in found)
        return self._summaries(sorted(candidates)[:limit])

    def held(self) -> Mapping[StreamKey, Range]:
        held: dict[StreamKey, Range] = {}
        for key in self.tallies():
            with self._mapped():
                ends = [self._client.zrange(self._index(*key), at, at, withscores=True) for at in (0, -1)]
            if ends[0]:
                held[key] = (int(ends[0][0][1]), int(ends[1][0][1]))
        return held

    def tallies(self) -> Mapping[StreamKey, Tally]:
        with self._mapped():
            return self._tallies()

    def holding(self) -> Holding:
        return self._holding

    def close(self) -> None:
        self._client.close()

    def _step(self, find: Callable[[], list[_Entry]], rows: Sequence[Row]) -> list[_Entry]:
        """Forget what `find` finds and add rows, with all that is counted. Returns what was forgotten."""
        if self._read_only:
            raise UnavailableError("outbox in Redis was opened to be looked at only")
        with self._mapped():
            while True:
                repeated = {(*row.key, row.sequence) for row in rows} & self._carried_out
                new = [row for row in rows if (*row.key, row.sequence) not in repeated]
                removed = find()
                if not (removed or new) or self._happens(removed, new):
                    self._carried_out -= repeated
                    return removed
                self._learn()

    def _happens(self, removed: Sequence[_Entry], rows: Sequence[Row]) -> bool:
        """Try a step. False where an earlier one, without an answer, has happened after all."""
        before = self._holding
        next_sequences = {key: tally.next_sequence for key, tally in self._tallies().items()}
        there = self._first_there(next_sequences, removed, rows)
        commands = [] if there else [*self._forgetting(removed), *self._adding(rows, next_sequences)]
        words: list[Any] = [self._owner, f"{before.last_id}-1" if before.last_id else "0-0", before.rows]
        for command in commands:
            words += [len(command), *command]
        was_in_doubt, self._in_doubt = self._in_doubt, True
        answer = self._client.eval(_STEP, 2, self._key("blocks"), self._key("owner"), *words)
        self._in_doubt = False
        if answer == b"done" and there:
            raise DamagedError(f"outbox in Redis: {' '.join(there.key)} {there.sequence} is there already")
        if answer == b"done":
            self._holding = Holding(
                before.rows + len(rows) - len(removed),
                before.size + sum(row.size for row in rows) - sum(entry.size for entry in removed),
                before.last_id + len(rows),
            )
            return True
        if answer == b"another state" and was_in_doubt:
            return False
        raise DamagedError(
            f"outbox in Redis: another program writes {self._prefix}*: {answer.decode()}",
            hint="has another gateway the same id?",
        )

    def _forgetting(self, removed: Sequence[_Entry]) -> Iterator[list[Any]]:
        """Only commands that a Redis out of memory takes, but for loss records."""
        for start in range(0, len(removed), FORGOTTEN_AT_ONCE):
            some = removed[start : start + FORGOTTEN_AT_ONCE]
            yield ["XDEL", self._key("blocks"), *(f"{entry.id}-1" for entry in some)]
            members: dict[str, list[str]] = {}
            for entry in some:
                members.setdefault(self._index(entry.device, entry.signal), []).append(entry.member)
            for index, these in members.items():
                yield ["ZREM", index, *these]
        for entry in removed:
            if entry.lost:
                yield self._counting(entry.device, entry.lost_signal, "lost", -entry.lost)

    def _adding(self, rows: Sequence[Row], next_sequences: dict[StreamKey, int]) -> Iterator[list[Any]]:
        for number, row in enumerate(rows, start=self._holding.last_id + 1):
            fields = [word for pair in _fields(row).items() for word in pair]
            yield ["XADD", self._key("blocks"), f"{number}-1", *fields]
            yield ["ZADD", self._index(*row.key), row.sequence, _Entry(number, *row.key, row.size).member]
            rise = row.sequence + 1 - next_sequences.get(row.key, 0)
            if rise > 0:
                next_sequences[row.key] = row.sequence + 1
                yield self._counting(*row.key, "next_sequence", rise)
            yield self._counting(*row.key, "accepted", row.samples)
            if row.lost:
                yield self._counting(row.device, row.lost_signal, "lost", row.lost)

    def _counting(self, device: str, signal: str, name: str, by: int) -> list[Any]:
        return ["HINCRBY", self._key("tallies"), _SEPARATOR.join((device, signal, name)), by]

    def _learn(self) -> None:
        """What became of the step in doubt, now that it is settled."""
        for entry, fields in self._client.xrange(self._key("blocks"), f"({self._holding.last_id}-1", "+"):
            held = _held(entry, fields)
            self._carried_out.add((held.device, held.signal, held.sequence))
        self._count()

    def _first_there(
        self, next_sequences: Mapping[StreamKey, int], removed: Sequence[_Entry], rows: Sequence[Row]
    ) -> Row | None:
        """The first row whose sequence is there already, unless it takes the place of one that goes."""
        going = {entry.member.encode() for entry in removed}
        for row in rows:
            if row.sequence < next_sequences.get(row.key, 0):
                found = self._client.zrangebyscore(self._index(*row.key), row.sequence, row.sequence)
                if any(member not in going for member in found):
                    return row
        return None

    def _count(self) -> None:
        """What is there, from the stream's own numbers and the index, which is short."""
        last_id = row_count = size = 0
        if self._client.exists(self._key("blocks")):
            found = self._client.xinfo_stream(self._key("blocks"))
            last_id, row_count = int(found["last-generated-id"].split(b"-")[0]), int(found["length"])
        for device, signal in self._tallies():
            start = 0
            while members := self._client.zrange(self._index(device, signal), start, start + SIZES_AT_ONCE - 1):
                size += sum(_entry(device, signal, member).size for member in members)
                start += SIZES_AT_ONCE
        self._holding = Holding(row_count, size, last_id)

    def _tallies(self) -> dict[StreamKey, Tally]:
        numbers: dict[StreamKey, dict[str, int]] = {}
        for field, value in self._client.hgetall(self._key("tallies")).items():
            device, signal, name = field.decode().split(_SEPARATOR)
            numbers.setdefault((device, signal), {})[name] = int(value)
        return {key: Tally(*(values.get(name, 0) for name in _TALLY)) for key, values in numbers.items()}

    def _summaries(self, ids: Sequence[int]) -> list[Held]:
        if not ids:
            return []
        with self._mapped(), self._client.pipeline(transaction=False) as reads:
            for number in sorted(set(ids)):
                reads.xrange(self._key("blocks"), f"{number}-1", f"{number}-1")
            found = reads.execute()
        return [_held(entry, fields) for entries in found for entry, fields in entries]

    def _take_over(self) -> None:
        """Fence off whoever wrote before: a step of its that is still on its way names another owner."""
        self._client.delete(self._key("owner"))
        try:
            self._client.set(self._key("owner"), self._owner)
        except redis.OutOfMemoryError:
            self._owner = ""  # a full outbox must open all the same, to be emptied

    def _check_durability(self) -> None:
        try:
            found = {name: self._client.config_get(name).get(name) for name in _DURABLE}
        except redis.ResponseError:
            log.warning("this Redis does not show its configuration: whether it is durable is not known")
            return
        wrong = [f"{name} {value}" for name, value in _DURABLE.items() if found[name] != value]
        if wrong:
            raise ConfigError("spool.redis_url: this Redis loses data in a power cut", hint="set " + ", ".join(wrong))

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


def _entry(device: str, signal: str, member: bytes) -> _Entry:
    number, size = member.split(b":")
    return _Entry(int(number), device, signal, int(size))


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
    def number(name: bytes) -> int:
        digits = fields.get(name, b"")
        return int(digits) if digits.lstrip(b"-").isdigit() else 0

    def text(name: bytes) -> str:
        return fields.get(name, b"").decode(errors="replace")

    return Held(
        id=int(entry.split(b"-")[0]),
        device=text(b"device"),
        signal=text(b"signal"),
        sequence=number(b"sequence"),
        first_ns=number(b"first_ns"),
        last_ns=number(b"last_ns"),
        samples=number(b"samples"),
        size=number(b"size"),
        lost=number(b"lost"),
        lost_signal=text(b"lost_signal"),
    )


def _checked(entry: bytes, fields: Mapping[bytes, bytes]) -> StoredRow | DamagedRow:
    held = _held(entry, fields)
    row = Row(
        device=held.device,
        signal=held.signal,
        sequence=held.sequence,
        first_ns=held.first_ns,
        last_ns=held.last_ns,
        samples=held.samples,
        lost=held.lost,
        lost_signal=held.lost_signal,
        payload=Payload(
            fields.get(b"content_type", b"").decode(errors="replace"),
            fields.get(b"schema", b"").decode(errors="replace"),
            fields.get(b"payload", b""),
        ),
    )
    intact = str(row.checksum()).encode() == fields.get(b"checksum")
    return StoredRow(held.id, row) if intact else DamagedRow(held)
