"""The outbox in a Redis server beside the gateway, for places that run one anyway.

Rows are a stream, in order of arrival; a sorted set a signal and epoch finds them by sequence. Every step is one
script.
Durable only as far as the server is: what that takes is checked at the start.

A step whose answer was lost may have been carried out, or may be carried out later: it may still wait in a socket.
So every step names the state that it was made for, and of two that were made for the same state only one can happen.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from gateway.errors import ConfigError, DamagedError, UnavailableError
from gateway.spool.redis_rows import (
    FORMAT,
    SEPARATOR,
    Entry,
    checked,
    entry_of,
    fields_of,
    held_of,
    id_of,
    of_held,
    renewing,
)
from gateway.spool.store import (
    UNBOUNDED,
    DamagedRow,
    EpochKey,
    FullError,
    Held,
    Holding,
    Place,
    Range,
    Row,
    StoredRow,
    StreamKey,
    Suspect,
    Tally,
)

log = logging.getLogger(__name__)

TIMEOUT_S = 5.0
SIZES_AT_ONCE = 10_000
"""Index entries read in one answer."""
RENEWED_AT_ONCE = 200
"""Rows of a former format that are taken over in one step."""
FORGOTTEN_AT_ONCE = 1000
"""Rows named in one command of a script, which has room for some 8,000 words."""
_TALLY = ("blocks", "accepted", "lost")
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
        self._carried_out: set[tuple[str, str, str, int]] = set()
        """Rows of steps that turned out to have happened, until their caller tries them again."""

    @property
    def epoch(self) -> str:
        return self._epoch

    def open(self) -> None:
        with self._mapped():
            if not self._read_only:
                check_durability(self._client)
                self._take_over()
                self._in_doubt = False
                self._carried_out.clear()
                self._renew()
                self._count()
                self._begin_epoch()
                self._forget_empty_indexes()
                return
            found = self._client.get(self._key("epoch"))
            if found is None:
                raise UnavailableError("outbox in Redis is empty", hint="has its gateway run yet?")
            self._epoch = found.decode()
            self._count()

    def append(self, rows: Sequence[Row]) -> None:
        self._step(list, rows)

    def replace(
        self,
        ids: Sequence[int],
        rows: Sequence[Row],
        receipted: Sequence[Place] = (),
        settled: Sequence[Suspect] = (),
    ) -> None:
        if settled:
            raise ValueError("an outbox in Redis has no suspects")
        self._step(lambda: [*map(of_held, self._summaries(ids)), *self._still_there(receipted)], rows)

    def fetch(self, after: int, through: int, limit: int) -> list[StoredRow | DamagedRow]:
        rows: list[StoredRow | DamagedRow] = []
        while through > after and len(rows) < limit:
            with self._mapped():
                found = self._client.xrange(self._key("blocks"), f"({after}-1", f"{through}-1", count=limit)
            rows += [checked(entry, fields) for entry, fields in found if not fields.get(b"boot")]
            if len(found) < limit:
                break
            after = id_of(found[-1][0])
        return rows[:limit]

    def unstamped(self, limit: int) -> list[StoredRow | DamagedRow]:
        with self._mapped():
            ids = self._client.zrange(self._key("unstamped"), 0, limit - 1)
            return [checked(entry, fields) for entry, fields in self._entries(int(number) for number in ids)]

    def find(self, device: str, signal: str, epoch: str, ranges: Sequence[Range]) -> list[Place]:
        key = (device, signal, epoch)
        found: dict[bytes, float] = {}  # ranges may overlap
        with self._mapped():
            for first, last in ranges:
                found.update(self._client.zrangebyscore(self._index(key), first, last, withscores=True))
        entries = ((entry_of(key, member), int(score)) for member, score in found.items())
        return [Place(entry.id, *key, sequence, entry.size) for entry, sequence in entries]

    def suspects(self) -> list[Suspect]:
        return []

    def room(self) -> int:
        return UNBOUNDED

    def oldest(self, signals: Sequence[str], limit: int) -> list[Held]:
        candidates: list[int] = []
        with self._mapped():
            for key in self._epoch_keys():
                if key[1] in signals:
                    found = self._client.zrange(self._index(key), 0, limit - 1)
                    candidates.extend(entry_of(key, member).id for member in found)
        return self._summaries(sorted(candidates)[:limit])

    def held(self) -> Mapping[EpochKey, Range]:
        held: dict[EpochKey, Range] = {}
        with self._mapped():
            for key in self._epoch_keys():
                ends = [self._client.zrange(self._index(key), at, at, withscores=True) for at in (0, -1)]
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

    def _still_there(self, receipted: Sequence[Place]) -> list[Entry]:
        """An earlier attempt, the answer to which was lost, may have forgotten them."""
        if not receipted:
            return []
        entries = [Entry(place.id, *place.epoch_key, place.size) for place in receipted]
        with self._client.pipeline(transaction=False) as reads:
            for entry in entries:
                reads.zscore(self._index((entry.device, entry.signal, entry.epoch)), entry.member)
            return [entry for entry, score in zip(entries, reads.execute(), strict=True) if score is not None]

    def _step(self, find: Callable[[], list[Entry]], rows: Sequence[Row]) -> None:
        """Forget what `find` finds and add rows, with all that is counted."""
        if self._read_only:
            raise UnavailableError("outbox in Redis was opened to be looked at only")
        with self._mapped():
            while True:
                repeated = {row.identity for row in rows} & self._carried_out
                new = [row for row in rows if row.identity not in repeated]
                removed = find()
                if not (removed or new) or self._happens(removed, new):
                    self._carried_out -= repeated
                    return
                self._learn()

    def _happens(self, removed: Sequence[Entry], rows: Sequence[Row]) -> bool:
        """Try a step. False where an earlier one, without an answer, has happened after all."""
        before = self._holding
        there = self._first_there(removed, rows)
        commands = [] if there else [*self._forgetting(removed), *self._adding(rows, removed)]
        was_in_doubt, self._in_doubt = self._in_doubt, True
        answer = self._carry_out(commands)
        self._in_doubt = False
        if answer == b"done" and there:
            raise DamagedError(f"outbox in Redis: {' '.join(there.epoch_key)} {there.sequence} is there already")
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

    def _carry_out(self, commands: Iterable[list[Any]]) -> Any:
        before = self._holding
        words: list[Any] = [self._owner, f"{before.last_id}-1" if before.last_id else "0-0", before.rows]
        for command in commands:
            words += [len(command), *command]
        return self._client.eval(_STEP, 2, self._key("blocks"), self._key("owner"), *words)

    def _forgetting(self, removed: Sequence[Entry]) -> Iterator[list[Any]]:
        """Only commands that a Redis out of memory takes, but for loss records."""
        for start in range(0, len(removed), FORGOTTEN_AT_ONCE):
            some = removed[start : start + FORGOTTEN_AT_ONCE]
            yield ["XDEL", self._key("blocks"), *(f"{entry.id}-1" for entry in some)]
            yield ["ZREM", self._key("unstamped"), *(entry.id for entry in some)]
            members: dict[str, list[str]] = {}
            for entry in some:
                index = self._index((entry.device, entry.signal, entry.epoch))
                members.setdefault(index, []).append(entry.member)
            for index, these in members.items():
                yield ["ZREM", index, *these]
        for entry in removed:
            if entry.lost:
                yield self._counting(entry.device, entry.lost_signal, "lost", -entry.lost)

    def _adding(self, rows: Sequence[Row], removed: Sequence[Entry]) -> Iterator[list[Any]]:
        gone = {(entry.device, entry.signal, entry.epoch, entry.sequence): entry.samples for entry in removed}
        if rows:
            yield ["SADD", self._key("streams"), *{SEPARATOR.join(row.epoch_key): None for row in rows}]
        for number, row in enumerate(rows, start=self._holding.last_id + 1):
            fields = [word for pair in fields_of(number, row).items() for word in pair]
            yield ["XADD", self._key("blocks"), f"{number}-1", *fields]
            yield ["ZADD", self._index(row.epoch_key), row.sequence, Entry(number, *row.epoch_key, row.size).member]
            if row.boot:
                yield ["ZADD", self._key("unstamped"), number, number]
            if row.identity not in gone:
                yield self._counting(*row.key, "blocks", 1)
            if samples := row.samples - gone.get(row.identity, 0):
                yield self._counting(*row.key, "accepted", samples)
            if row.lost:
                yield self._counting(row.device, row.lost_signal, "lost", row.lost)

    def _counting(self, device: str, signal: str, name: str, by: int) -> list[Any]:
        return ["HINCRBY", self._key("tallies"), SEPARATOR.join((device, signal, name)), by]

    def _learn(self) -> None:
        """What became of the step in doubt, now that it is settled."""
        for entry, fields in self._client.xrange(self._key("blocks"), f"({self._holding.last_id}-1", "+"):
            held = held_of(entry, fields)
            self._carried_out.add((held.device, held.signal, held.epoch, held.sequence))
        self._count()

    def _first_there(self, removed: Sequence[Entry], rows: Sequence[Row]) -> Row | None:
        """The first row whose sequence is there already, unless it takes the place of one that goes."""
        going = {entry.member.encode() for entry in removed}
        with self._client.pipeline(transaction=False) as reads:
            for row in rows:
                reads.zrangebyscore(self._index(row.epoch_key), row.sequence, row.sequence)
            found = reads.execute()
        return next((row for row, members in zip(rows, found, strict=True) if not going.issuperset(members)), None)

    def _count(self) -> None:
        """What is there, from the stream's own numbers and the index, which is short."""
        last_id = row_count = size = 0
        if self._client.exists(self._key("blocks")):
            found = self._client.xinfo_stream(self._key("blocks"))
            last_id, row_count = int(found["last-generated-id"].split(b"-")[0]), int(found["length"])
        for key in self._epoch_keys():
            start = 0
            while members := self._client.zrange(self._index(key), start, start + SIZES_AT_ONCE - 1):
                size += sum(entry_of(key, member).size for member in members)
                start += SIZES_AT_ONCE
        self._holding = Holding(row_count, size, last_id)

    def _epoch_keys(self) -> list[EpochKey]:
        """Streams and epochs of which rows are here, or were since the outbox was opened."""
        members = self._client.smembers(self._key("streams"))
        return [(device, signal, epoch) for device, signal, epoch in (m.decode().split(SEPARATOR) for m in members)]

    def _tallies(self) -> dict[StreamKey, Tally]:
        numbers: dict[StreamKey, dict[str, int]] = {}
        for (device, signal, name), value in self._counted().items():
            numbers.setdefault((device, signal), {})[name] = value
        return {key: Tally(*(values.get(name, 0) for name in _TALLY)) for key, values in numbers.items()}

    def _counted(self) -> dict[tuple[str, str, str], int]:
        found = self._client.hgetall(self._key("tallies"))
        split = ((field.decode().split(SEPARATOR), int(value)) for field, value in found.items())
        return {(device, signal, name): value for (device, signal, name), value in split}

    def _summaries(self, ids: Sequence[int]) -> list[Held]:
        if not ids:
            return []
        with self._mapped():
            return [held_of(entry, fields) for entry, fields in self._entries(sorted(set(ids)))]

    def _entries(self, ids: Iterable[int]) -> list[tuple[bytes, dict[bytes, bytes]]]:
        with self._client.pipeline(transaction=False) as reads:
            for number in ids:
                reads.xrange(self._key("blocks"), f"{number}-1", f"{number}-1")
            return [item for entries in reads.execute() for item in entries]

    def _take_over(self) -> None:
        """Fence off whoever wrote before: a step of its that is still on its way names another owner."""
        self._client.delete(self._key("owner"))
        try:
            self._client.set(self._key("owner"), self._owner)
        except redis.OutOfMemoryError:
            self._owner = ""  # a full outbox must open all the same, to be emptied

    def _renew(self) -> None:
        """Take an outbox of the former format over, some rows a step; cut off, it goes on at the next start."""
        former = self._client.get(self._key("epoch"))
        if former is None or self._client.get(self._key("format")) == FORMAT:
            return
        self._count()
        after, last_former_id = 0, self._holding.last_id
        while found := self._client.xrange(
            self._key("blocks"), f"({after}-1", f"{last_former_id}-1", count=RENEWED_AT_ONCE
        ):
            old = [(entry, fields) for entry, fields in found if b"epoch" not in fields]
            answer = self._carry_out(renewing(self._prefix, old, self._holding.last_id + 1, former.decode()))
            if answer != b"done":
                raise DamagedError(f"outbox in Redis: another program writes {self._prefix}*: {answer.decode()}")
            after = id_of(found[-1][0])
            before = self._holding
            self._holding = Holding(before.rows, before.size, before.last_id + len(old))
        for (device, signal, name), value in self._counted().items():
            if name == "next_sequence":
                tallies = self._key("tallies")
                self._client.hset(tallies, SEPARATOR.join((device, signal, "blocks")), value)
                self._client.hdel(tallies, SEPARATOR.join((device, signal, name)))

    def _begin_epoch(self) -> None:
        self._epoch = secrets.token_hex(8)
        with contextlib.suppress(redis.OutOfMemoryError):  # a full outbox must open all the same
            self._client.set(self._key("format"), FORMAT)
            self._client.set(self._key("epoch"), self._epoch)

    def _forget_empty_indexes(self) -> None:
        for key in self._epoch_keys():
            if not self._client.exists(self._index(key)):
                self._client.srem(self._key("streams"), SEPARATOR.join(key))

    def _key(self, name: str) -> str:
        return self._prefix + name

    def _index(self, key: EpochKey) -> str:
        return f"{self._prefix}sequences:{SEPARATOR.join(key)}"

    @contextlib.contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except redis.AuthenticationError as error:
            raise ConfigError(f"outbox in Redis: {error}", hint="credential redis-password") from None
        except redis.OutOfMemoryError as error:
            raise FullError(
                f"outbox in Redis: {error}", hint="raise its maxmemory, or lower spool.bytes_max"
            ) from error
        except redis.RedisError as error:
            raise UnavailableError(f"outbox in Redis: {error}", hint="is the server of spool.redis_url up?") from error


def check_durability(client: Any) -> None:
    """Raises `ConfigError` for a server that a power cut robs."""
    try:
        found = {name: client.config_get(name).get(name) for name in _DURABLE}
    except redis.ResponseError:
        log.warning("this Redis does not show its configuration: whether it is durable is not known")
        return
    wrong = [f"{name} {value}" for name, value in _DURABLE.items() if found[name] != value]
    if wrong:
        raise ConfigError("spool.redis_url: this Redis loses data in a power cut", hint="set " + ", ".join(wrong))
