"""Exact-once accounting: one transaction decides which blocks are new, and counts only those.

A redelivered block changes nothing, order does not matter, and of two bridges that commit the same block at once
one finds it new. Locks are always taken in the order ledger, devices, streams, each sorted, so none can deadlock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeAlias

from psycopg.types.multirange import Int8Multirange

from cloud_sync.registry import dead_letters, losses
from cloud_sync.registry.alerts import open_alerts
from cloud_sync.registry.database import Connection
from cloud_sync.registry.entries import (
    INT64_MAX,
    Batch,
    BlockCommit,
    BlockKey,
    DeadLetter,
    Identity,
    LossCommit,
    ParkedBlock,
    Part,
    Ranges,
    Span,
    short,
    storable,
)
from cloud_sync.registry.instants import instant_of_ns
from cloud_sync.registry.stream_counts import count_points, see_devices

__all__ = [
    "Batch",
    "BlockCommit",
    "BlockKey",
    "DeadLetter",
    "LossCommit",
    "ParkedBlock",
    "Part",
    "Ranges",
    "commit",
    "committed",
    "committed_within",
    "known",
    "lock_rows",
]

PARKED_ALERT = "parked_data"
"""An alert of this kind is about a device serial."""

_Entry: TypeAlias = BlockCommit | LossCommit | ParkedBlock | DeadLetter


async def known(connection: Connection, identities: Iterable[Identity]) -> set[Identity]:
    """Which of these are committed."""
    offered = _by_key(identities)
    if not offered:
        return set()
    cursor = await connection.execute(
        "SELECT number - 1, committed * sequences "
        "FROM unnest(%s::text[], %s::text[], %s::text[], %s::text[]::int8multirange[]) WITH ORDINALITY "
        "AS o(device_serial, signal, epoch, sequences, number) JOIN ledger USING (device_serial, signal, epoch) "
        "WHERE committed && sequences",
        (*_key_columns(offered), [_multirange(sequences) for sequences in offered.values()]),
    )
    keys = list(offered)
    return {(keys[number], sequence) async for number, found in cursor for sequence in _sequences(found)}


async def committed(connection: Connection, keys: Iterable[BlockKey]) -> dict[BlockKey, Ranges]:
    """All committed sequences of each key; an empty list for one that was never heard of."""
    ordered = list(dict.fromkeys(keys))
    found = await committed_within(connection, [(key, 0, INT64_MAX - 1) for key in ordered], INT64_MAX)
    return dict(zip(ordered, found, strict=True))


async def committed_within(
    connection: Connection, wanted: Sequence[tuple[BlockKey, int, int]], limit: int
) -> list[Ranges]:
    """Of each (key, first, last) what is committed; at most `limit` ranges in all, the lowest of the first keys."""
    found: list[Ranges] = [[] for _ in wanted]
    cursor = await connection.execute(
        "SELECT number - 1, lower(run), upper(run) - 1 "
        "FROM unnest(%s::text[], %s::text[], %s::text[], %s::int8[], %s::int8[]) WITH ORDINALITY "
        "AS asked(device_serial, signal, epoch, first, last, number) "
        "JOIN ledger l USING (device_serial, signal, epoch), LATERAL "
        "(SELECT run FROM unnest(l.committed * int8multirange(int8range(first, last, '[]'))) AS run LIMIT %s) AS runs "
        "ORDER BY 1, 2 LIMIT %s",
        (
            *_key_columns(key for key, _, _ in wanted),
            [first for _, first, _ in wanted],
            [last for _, _, last in wanted],
            limit,
            limit,
        ),
    )
    async for number, first, last in cursor:
        found[number].append((first, last))
    return found


async def commit(connection: Connection, batch: Batch) -> set[Identity]:
    """Record a batch in one transaction; returns the identities that were new.

    When it returns, all of the batch is durable, what was new and what was known before. Parked and dead-lettered
    blocks are new like others: they are kept, and no point of theirs is counted but those in `parts`.
    Raises `RefusedError`, with nothing recorded, where a stream does not exist any more.
    """
    entries: dict[Identity, _Entry] = {}
    nameless: list[DeadLetter] = []
    offered: list[_Entry] = [*batch.blocks, *batch.losses, *batch.parked, *batch.letters]
    for entry in offered:
        if entry.key is None or entry.sequence is None:
            assert isinstance(entry, DeadLetter)
            nameless.append(entry)
        else:
            entries.setdefault((entry.key, entry.sequence), entry)
    if not entries and not nameless:
        return set()
    async with connection.transaction():
        await lock_rows(connection, entries.values())
        claim = await _claim(connection, entries)
        new = claim.new
        fresh = [entry for identity, entry in entries.items() if identity in new]
        await see_devices(connection, _newest_of_devices(fresh))
        await count_points(
            connection,
            [(part, entry.rate_hz if isinstance(entry, BlockCommit) else None)
             for entry in fresh if not isinstance(entry, LossCommit) for part in entry.parts],
        )  # fmt: skip
        if claim.beside_holes:
            await _keep_edges(connection, claim, entries)
        if claim.given_up:
            await losses.take_back(connection, {one: _span_of(entries[one]) for one in claim.given_up})
        await losses.record(connection, [entry for entry in fresh if isinstance(entry, LossCommit)])
        await _park(connection, [entry for entry in fresh if isinstance(entry, ParkedBlock)])
        await dead_letters.bury(connection, [*(entry for entry in fresh if isinstance(entry, DeadLetter)), *nameless])
    return new


def _key_columns(keys: Iterable[BlockKey]) -> tuple[list[str], list[str], list[str]]:
    ordered = list(keys)
    return [key.device for key in ordered], [key.signal for key in ordered], [key.epoch for key in ordered]


@dataclass(slots=True)
class _Claim:
    """What of a batch is new, and what the gaps have to know of it."""

    new: set[Identity] = field(default_factory=set)
    given_up: list[Identity] = field(default_factory=list)
    """New ones that were on record as lost."""
    beside_holes: set[BlockKey] = field(default_factory=set)
    """Keys that have, or had, holes."""
    edges: list[tuple[BlockKey, int, datetime]] = field(default_factory=list)
    """What was the newest sequence and is below a hole now, with the time of its last sample."""


async def lock_rows(connection: Connection, entries: Collection[_Entry]) -> None:
    """Make the ledger rows of these entries, and lock those of the sequences that their loss records speak of.

    All in one order, with those that `_claim` locks: it comes after, and may add none.
    """
    gateways: dict[BlockKey, str] = {}
    has_losses = False
    for entry in entries:
        assert entry.key is not None
        gateways[entry.key] = short(entry.gateway)
        if isinstance(entry, LossCommit) and entry.loss.sequences is not None:
            gateways.setdefault(entry.lost_key, short(entry.gateway))
            has_losses = True
    if not gateways:
        return
    await connection.execute(
        "INSERT INTO ledger (device_serial, signal, epoch, gateway_id) "
        "SELECT * FROM unnest(%s::text[], %s::text[], %s::text[], %s::text[]) ORDER BY 1, 2, 3 ON CONFLICT DO NOTHING",
        (*_key_columns(gateways), list(gateways.values())),
    )
    if has_losses:
        await connection.execute(
            "SELECT FROM ledger WHERE (device_serial, signal, epoch) IN (SELECT * FROM "
            "unnest(%s::text[], %s::text[], %s::text[])) ORDER BY device_serial, signal, epoch FOR UPDATE",
            _key_columns(gateways),
        )


# A ledger row may be megabytes of ranges: it is read a fixed number of times however many of its sequences are offered,
# and only the union, in the update, takes as long as it is. A row that had to be waited for is read as it then is.
_OFFER = """
    SELECT number - 1,
           CASE WHEN l.committed && o.sequences THEN l.committed * o.sequences END,
           CASE WHEN l.lost && o.sequences THEN l.lost * o.sequences END,
           l.missing, upper(l.committed) - 1, l.newest_at,
           greatest(upper(l.committed), upper(l.lost), l.known_through + 1)
      FROM unnest(%s::text[], %s::text[], %s::text[], %s::text[]::int8multirange[]) WITH ORDINALITY
               AS o(device_serial, signal, epoch, sequences, number)
      JOIN ledger l USING (device_serial, signal, epoch)
     ORDER BY device_serial, signal, epoch
       FOR UPDATE OF l
"""
_GROW = """
    UPDATE ledger l
       SET committed = l.committed + n.added,
           lost = CASE WHEN l.lost && n.added THEN l.lost - n.added ELSE l.lost END,
           gateway_id = n.gateway_id, updated_at = now(), missing = n.missing,
           block_count = l.block_count + n.blocks, sample_count = l.sample_count + n.samples,
           newest_at = CASE WHEN n.is_newest THEN n.newest_at ELSE l.newest_at END,
           review_due = l.review_due OR l.missing > 0 OR n.missing > 0
      FROM unnest(%s::text[], %s::text[], %s::text[], %s::text[]::int8multirange[], %s::text[], %s::int8[], %s::int8[],
                  %s::int8[], %s::bool[], %s::timestamptz[])
               AS n(device_serial, signal, epoch, added, gateway_id, missing, blocks, samples, is_newest, newest_at)
     WHERE (l.device_serial, l.signal, l.epoch) = (n.device_serial, n.signal, n.epoch)
"""


async def _claim(connection: Connection, entries: Mapping[Identity, _Entry]) -> _Claim:
    """Lock the ledger rows and add what they lack; returns what that was."""
    claim = _Claim()
    offered = _by_key(entries)
    if not offered:
        return claim
    cursor = await connection.execute(
        _OFFER, (*_key_columns(offered), [_multirange(sequences) for sequences in offered.values()])
    )
    keys = list(offered)
    grown: list[tuple[BlockKey, str, str, int, int, int, bool, datetime | None]] = []
    async for number, here, lost, missing, newest, newest_at, stop in cursor:
        key = keys[number]
        known = set(_sequences(here))
        new = [sequence for sequence in offered[key] if sequence not in known] if known else offered[key]
        if not new:
            continue
        given_up = _sequences(lost)
        claim.new.update((key, sequence) for sequence in new)
        claim.given_up += [(key, sequence) for sequence in given_up]
        missing_now = missing + max(new[-1] + 1 - stop, 0) - (len(new) - len(given_up))
        if missing or missing_now:
            claim.beside_holes.add(key)
            if newest_at is not None and new[-1] > newest and newest + 1 not in new:
                claim.edges.append((key, newest, newest_at))
        spans = [span for sequence in new if (span := _span_of(entries[key, sequence]))]
        last = _span_of(entries[key, new[-1]])
        grown.append(
            (
                key,
                _multirange(new),
                short(entries[key, new[-1]].gateway),
                missing_now,
                len(spans),
                sum(span.sample_count for span in spans),
                newest is None or new[-1] > newest,
                instant_of_ns(last.last_ns) if last else None,
            )
        )
    if grown:
        columns = list(zip(*grown, strict=True))
        await connection.execute(_GROW, (*_key_columns(row[0] for row in grown), *map(list, columns[1:])))
    return claim


def _by_key(identities: Iterable[Identity]) -> dict[BlockKey, list[int]]:
    """Sequences of each key, in order."""
    found: dict[BlockKey, list[int]] = {}
    for key, sequence in identities:
        found.setdefault(key, []).append(sequence)
    for sequences in found.values():
        sequences.sort()
    return found


def _multirange(sequences: Sequence[int]) -> str:
    """Sequences in order as PostgreSQL reads them."""
    ranges: Ranges = []
    for sequence in sequences:
        if ranges and sequence == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], sequence)
        else:
            ranges.append((sequence, sequence))
    return "{" + ",".join(f"[{first},{last}]" for first, last in ranges) + "}"


def _sequences(found: Int8Multirange | None) -> list[int]:
    """The sequences in a multirange from PostgreSQL."""
    return [n for part in found or () for n in range(part.lower or 0, part.upper or 0)]


def _span_of(entry: _Entry) -> Span | None:
    """All samples of a message, as far as the entry tells."""
    if isinstance(entry, LossCommit) or entry.span is not None:
        return entry.span
    if isinstance(entry, ParkedBlock):
        return Span(entry.first_ns, entry.last_ns, entry.sample_count)
    if not entry.parts:
        return None
    return Span(
        min(part.first_ns for part in entry.parts),
        max(part.last_ns for part in entry.parts),
        max(sum(part.point_count for part in entry.parts), 1),
    )


async def _keep_edges(connection: Connection, claim: _Claim, entries: dict[Identity, _Entry]) -> None:
    """Note the times at the ends of each run of new sequences beside a hole, for those of the gap."""
    rows: list[tuple[BlockKey, int, int, datetime, datetime]] = []
    rows += [(key, sequence, sequence, at, at) for key, sequence, at in claim.edges]
    for key, sequence in sorted(identity for identity in claim.new if identity[0] in claim.beside_holes):
        span = _span_of(entries[key, sequence])
        if span is None:
            continue
        first_at, last_at = instant_of_ns(span.first_ns), instant_of_ns(span.last_ns)
        if rows and rows[-1][0] == key and rows[-1][2] == sequence - 1:
            rows[-1] = (*rows[-1][:2], sequence, rows[-1][3], last_at)
        else:
            rows.append((key, sequence, sequence, first_at, last_at))
    await connection.execute(
        "INSERT INTO ledger_edges (device_serial, signal, epoch, first, last, first_at, last_at) SELECT * FROM "
        "unnest(%s::text[], %s::text[], %s::text[], %s::int8[], %s::int8[], %s::timestamptz[], %s::timestamptz[]) "
        "ON CONFLICT DO NOTHING",
        (
            *_key_columns(row[0] for row in rows),
            [row[1] for row in rows],
            [row[2] for row in rows],
            [row[3] for row in rows],
            [row[4] for row in rows],
        ),
    )


def _newest_of_devices(entries: Sequence[_Entry]) -> dict[str, tuple[int, str]]:
    """The newest time, ns, that the new blocks of each device have, and the gateway that sent it."""
    seen: dict[str, tuple[int, str]] = {}
    for entry in entries:
        if isinstance(entry, BlockCommit | ParkedBlock) and (isinstance(entry, ParkedBlock) or entry.parts):
            last_ns = entry.last_ns if isinstance(entry, ParkedBlock) else max(part.last_ns for part in entry.parts)
            seen[entry.key.device] = max(seen.get(entry.key.device, (last_ns, "")), (last_ns, short(entry.gateway)))
    return seen


async def _park(connection: Connection, parked: Sequence[ParkedBlock]) -> None:
    if not parked:
        return
    async with connection.cursor() as cursor:
        await cursor.executemany(
            # Without the ledger's word that it is new (a ledger that was lost) the identity still decides.
            "INSERT INTO parked_messages (device_serial, signal, epoch, sequence, gateway_id, topic, content_type, "
            "properties, payload, first_at, last_at, sample_count, reason) "
            "VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING",
            [
                (
                    entry.key.device,
                    entry.key.signal,
                    entry.key.epoch,
                    entry.sequence,
                    short(entry.gateway),
                    storable(entry.topic),
                    storable(entry.content_type),
                    dead_letters.properties_of(entry.properties),
                    entry.payload,
                    instant_of_ns(entry.first_ns),
                    instant_of_ns(entry.last_ns),
                    entry.sample_count,
                    storable(entry.reason),
                )
                for entry in parked
            ],
        )
    await open_alerts(connection, PARKED_ALERT, {entry.key.device: storable(entry.reason) for entry in parked})
