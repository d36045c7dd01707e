"""Exact-once accounting: one transaction decides which blocks are new, and counts only those.

A redelivered block changes nothing, order does not matter, and of two bridges that commit the same block at once
one finds it new. Locks are always taken in the order ledger, devices, streams, each sorted, so none can deadlock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias
from uuid import UUID

from psycopg.types.json import Jsonb
from psycopg.types.range import Int8Range

from cloud_sync.registry.database import Connection
from cloud_sync.registry.entries import (
    Batch,
    BlockCommit,
    BlockKey,
    DeadLetter,
    LossCommit,
    ParkedBlock,
    Part,
    Ranges,
    short,
    storable,
)
from cloud_sync.registry.instants import instant_of_ns
from cloud_sync.registry.streams import storable_rate
from gateway.errors import RefusedError

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
    "count_points",
]

PARKED_ALERT = "parked_data"
"""An alert of this kind is about a device serial."""
LETTERS_ALERT = "dead_letters"
"""An alert of this kind is about a gateway."""

_Entry: TypeAlias = BlockCommit | LossCommit | ParkedBlock | DeadLetter
Identity: TypeAlias = tuple[BlockKey, int]


async def committed(connection: Connection, keys: Iterable[BlockKey]) -> dict[BlockKey, Ranges]:
    """The committed sequences of each key; an empty list for one that was never heard of."""
    found: dict[BlockKey, Ranges] = {key: [] for key in keys}
    cursor = await connection.execute(
        "SELECT l.device_serial, l.signal, l.epoch, lower(run), upper(run) - 1 "
        "FROM unnest(%s::text[], %s::text[], %s::text[]) AS asked(device_serial, signal, epoch) "
        "JOIN ledger l USING (device_serial, signal, epoch), unnest(l.committed) AS run "
        "ORDER BY 1, 2, 3, 4",
        _key_columns(found),
    )
    async for device, signal, epoch, first, last in cursor:
        found[BlockKey(device, signal, epoch)].append((first, last))
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
        new = await _claim(connection, entries)
        fresh = [entry for identity, entry in entries.items() if identity in new]
        await _see_devices(connection, fresh)
        await count_points(
            connection,
            [(part, entry.rate_hz if isinstance(entry, BlockCommit) else None)
             for entry in fresh if not isinstance(entry, LossCommit) for part in entry.parts],
        )  # fmt: skip
        await _record_losses(connection, [entry for entry in fresh if isinstance(entry, LossCommit)])
        await _park(connection, [entry for entry in fresh if isinstance(entry, ParkedBlock)])
        await _bury(connection, [*(entry for entry in fresh if isinstance(entry, DeadLetter)), *nameless])
    return new


def _key_columns(keys: Iterable[BlockKey]) -> tuple[list[str], list[str], list[str]]:
    ordered = list(keys)
    return [key.device for key in ordered], [key.signal for key in ordered], [key.epoch for key in ordered]


async def _claim(connection: Connection, entries: dict[Identity, _Entry]) -> set[Identity]:
    """Lock the ledger rows, add what they lack, return what that was."""
    if not entries:
        return set()
    gateways = {key: short(entry.gateway) for (key, _), entry in entries.items()}
    columns = _key_columns(gateways)
    await connection.execute(
        "INSERT INTO ledger (device_serial, signal, epoch, gateway_id) "
        "SELECT * FROM unnest(%s::text[], %s::text[], %s::text[], %s::text[]) ORDER BY 1, 2, 3 ON CONFLICT DO NOTHING",
        (*columns, list(gateways.values())),
    )
    await connection.execute(
        "SELECT FROM ledger WHERE (device_serial, signal, epoch) IN "
        "(SELECT * FROM unnest(%s::text[], %s::text[], %s::text[])) ORDER BY device_serial, signal, epoch FOR UPDATE",
        columns,
    )
    # A statement of its own: it sees what others committed while this one waited for the locks.
    cursor = await connection.execute(
        """
        WITH offered AS (
            SELECT * FROM unnest(%s::text[], %s::text[], %s::text[], %s::int8[], %s::text[])
                       AS o(device_serial, signal, epoch, sequence, gateway_id)
        ), new AS (
            SELECT o.* FROM offered o JOIN ledger l USING (device_serial, signal, epoch)
             WHERE NOT l.committed @> o.sequence
        ), grown AS (
            UPDATE ledger l
               SET committed = l.committed + n.added, gateway_id = n.gateway_id, updated_at = now()
              FROM (SELECT device_serial, signal, epoch, max(gateway_id) AS gateway_id,
                           range_agg(int8range(sequence, sequence, '[]')) AS added
                      FROM new GROUP BY device_serial, signal, epoch) n
             WHERE (l.device_serial, l.signal, l.epoch) = (n.device_serial, n.signal, n.epoch)
        )
        SELECT device_serial, signal, epoch, sequence FROM new
        """,
        (
            *_key_columns(key for key, _ in entries),
            [sequence for _, sequence in entries],
            [gateways[key] for key, _ in entries],
        ),
    )
    return {(BlockKey(*key), sequence) async for *key, sequence in cursor}


async def _see_devices(connection: Connection, entries: Sequence[_Entry]) -> None:
    """Keep `last_seen_at` and, of the newest data, `gateway_id` of the devices that sent the new blocks."""
    seen: dict[str, tuple[int, str]] = {}
    for entry in entries:
        if isinstance(entry, BlockCommit | ParkedBlock) and (isinstance(entry, ParkedBlock) or entry.parts):
            last_ns = entry.last_ns if isinstance(entry, ParkedBlock) else max(part.last_ns for part in entry.parts)
            seen[entry.key.device] = max(seen.get(entry.key.device, (last_ns, "")), (last_ns, short(entry.gateway)))
    if not seen:
        return
    await connection.execute("SELECT FROM devices WHERE serial = ANY(%s) ORDER BY id FOR NO KEY UPDATE", (list(seen),))
    await connection.execute(
        # A device whose clock is ahead was still not seen later than now.
        "UPDATE devices d SET last_seen_at = greatest(d.last_seen_at, least(s.last_at, now())), "
        "gateway_id = CASE WHEN d.gateway_id IS NULL OR d.last_seen_at IS NULL OR s.last_at >= d.last_seen_at "
        "THEN s.gateway_id ELSE d.gateway_id END "
        "FROM unnest(%s::text[], %s::timestamptz[], %s::text[]) AS s(serial, last_at, gateway_id) "
        "WHERE d.serial = s.serial",
        (
            list(seen),
            [instant_of_ns(last_ns) for last_ns, _ in seen.values()],
            [gateway for _, gateway in seen.values()],
        ),
    )


async def count_points(connection: Connection, parts: Sequence[tuple[Part, float | None]]) -> None:
    """Add points to their streams' counts and last times, and set the sampling rate of those that have none.

    Within the transaction that proves that these parts were never counted. Raises `RefusedError`.
    """
    points: dict[UUID, int] = {}
    last_ns: dict[UUID, int] = {}
    rates: dict[UUID, float | None] = {}
    for part, rate_hz in parts:
        stream = part.stream_id
        points[stream] = points.get(stream, 0) + part.point_count
        last_ns[stream] = max(last_ns.get(stream, part.last_ns), part.last_ns)
        rates[stream] = storable_rate(rate_hz) or rates.get(stream)
    if not points:
        return
    streams = list(points)
    await connection.execute("SELECT FROM signal_streams WHERE id = ANY(%s) ORDER BY id FOR NO KEY UPDATE", (streams,))
    cursor = await connection.execute(
        "UPDATE signal_streams s SET point_count = s.point_count + n.points, "
        "last_sample_at = greatest(s.last_sample_at, n.last_at), "
        "sample_rate_hz = coalesce(s.sample_rate_hz, n.rate_hz) "
        "FROM unnest(%s::uuid[], %s::int8[], %s::timestamptz[], %s::float8[]) AS n(id, points, last_at, rate_hz) "
        "WHERE s.id = n.id",
        (
            streams,
            [points[stream] for stream in streams],
            [instant_of_ns(last_ns[stream]) for stream in streams],
            [rates[stream] for stream in streams],
        ),
    )
    if cursor.rowcount != len(streams):
        raise RefusedError(
            f"{len(streams) - cursor.rowcount} of {len(streams)} streams to count points of do not exist",
            hint="they were deleted after their points were written: resolve the blocks again",
        )


async def _record_losses(connection: Connection, losses: Sequence[LossCommit]) -> None:
    """These losses are final: their rows are closed from the start."""
    if not losses:
        return
    async with connection.cursor() as cursor:
        await cursor.executemany(
            "INSERT INTO stream_gaps (device_serial, device_id, stream_id, signal, gateway_id, cause, first_at, "
            "last_at, sample_count, sequences, opened_at, closed_at) "
            "SELECT n.serial, d.id, (SELECT s.id FROM signal_streams s JOIN signal_types t ON t.id = s.signal_type_id "
            "WHERE s.device_id = d.id AND t.code = n.signal AND s.started_at <= n.first_at "
            "AND (s.ended_at IS NULL OR s.ended_at > n.first_at) ORDER BY s.started_at DESC LIMIT 1), "
            "n.signal, %s, %s, n.first_at, %s, %s, %s, now(), now() "
            "FROM (SELECT %s::text AS serial, %s::text AS signal, %s::timestamptz AS first_at) n "
            "LEFT JOIN devices d ON d.serial = n.serial",
            [
                (
                    short(entry.gateway),
                    entry.loss.cause.value,
                    instant_of_ns(entry.loss.last_ns),
                    entry.loss.sample_count,
                    None if entry.loss.sequences is None else Int8Range(*entry.loss.sequences, "[]"),
                    entry.loss.device,
                    entry.loss.signal,
                    instant_of_ns(entry.loss.first_ns),
                )
                for entry in losses
            ],
        )


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
                    _properties(entry.properties.items()),
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


async def _bury(connection: Connection, letters: Sequence[DeadLetter]) -> None:
    if not letters:
        return
    async with connection.cursor() as cursor:
        await cursor.executemany(
            "INSERT INTO dead_letters (gateway_id, topic, content_type, properties, payload, reason, detail, digest) "
            "VALUES (%s, %s, %s, %s, %s, %s, %s, %s) "
            "ON CONFLICT (digest) WHERE redriven_at IS NULL DO UPDATE SET repeats = dead_letters.repeats + 1",
            [
                (
                    short(letter.gateway),
                    storable(letter.topic),
                    storable(letter.content_type),
                    _properties(letter.properties.items()),
                    letter.payload,
                    storable(letter.reason),
                    storable(letter.detail),
                    letter.digest,
                )
                for letter in sorted(letters, key=lambda letter: letter.digest)
            ],
        )
    await open_alerts(connection, LETTERS_ALERT, {short(letter.gateway): storable(letter.reason) for letter in letters})


def _properties(items: Iterable[tuple[str, str]]) -> Jsonb:
    return Jsonb({storable(name): storable(value) for name, value in items})


async def open_alerts(connection: Connection, kind: str, details: dict[str, str]) -> None:
    """One open alert for each subject; a later reason replaces the one before."""
    await connection.execute(
        "INSERT INTO alerts (kind, subject, detail) "
        "SELECT %s, subject, detail FROM unnest(%s::text[], %s::text[]) AS a(subject, detail) ORDER BY subject "
        "ON CONFLICT (kind, subject) WHERE closed_at IS NULL DO UPDATE SET detail = excluded.detail "
        "WHERE alerts.detail <> excluded.detail",
        (kind, list(details), list(details.values())),
    )
