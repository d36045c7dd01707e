"""Losses on record: what loss records say becomes closed rows of `stream_gaps`, and is corrected by what comes anyway.

Committed wins: of the blocks that a record names only those count as lost that are not here and that no other row
counts. The caller holds the locks of the ledger rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from psycopg.types.multirange import Int8Multirange
from psycopg.types.range import Int8Range

from cloud_sync.registry.database import Connection
from cloud_sync.registry.entries import BlockKey, Identity, LossCommit, Span, short
from cloud_sync.registry.instants import instant_of_ns
from gateway.samples import LossRecord

TRANSPORT = "transport"
"""Cause of a gap that only the ledger knows of."""
LOST, ARRIVED, RECORDED = "lost", "arrived", "recorded"

INSERT_GAP = """
    INSERT INTO stream_gaps (device_serial, device_id, stream_id, signal, epoch, gateway_id, cause, first_at, last_at,
                             sample_count, is_estimated, sequences, opened_at, closed_at, outcome)
    SELECT n.serial, d.id,
           (SELECT s.id FROM signal_streams s JOIN signal_types t ON t.id = s.signal_type_id
             WHERE s.device_id = d.id AND t.code = n.signal AND s.started_at <= n.first_at
               AND (s.ended_at IS NULL OR s.ended_at > n.first_at) ORDER BY s.started_at DESC LIMIT 1),
           n.signal, %(epoch)s, %(gateway)s, %(cause)s, n.first_at, %(last_at)s, %(samples)s, %(is_estimated)s,
           %(sequences)s, coalesce(%(opened_at)s, now()), CASE WHEN %(outcome)s::text IS NOT NULL THEN now() END,
           %(outcome)s::text
      FROM (SELECT %(device)s::text AS serial, %(signal)s::text AS signal, %(first_at)s::timestamptz AS first_at) n
      LEFT JOIN devices d ON d.serial = n.serial
"""
_GIVE_UP = """
    UPDATE ledger l
       SET lost = l.lost + n.given_up, updated_at = now(), missing = n.missing,
           review_due = l.review_due OR l.missing > 0 OR n.missing > 0
      FROM (SELECT g.given_up, g.is_here, missing_of(committed, lost + g.given_up, known_through) AS missing
              FROM ledger, LATERAL (SELECT int8multirange(%(named)s::int8range) - committed - lost AS given_up,
                                           committed && %(named)s::int8range AS is_here) g
             WHERE (device_serial, signal, epoch) = (%(device)s, %(signal)s, %(epoch)s)) n
     WHERE (device_serial, signal, epoch) = (%(device)s, %(signal)s, %(epoch)s)
    RETURNING n.given_up, n.is_here
"""
_FINAL_ROW_OF = """
    SELECT id, cause FROM stream_gaps
     WHERE (device_serial, signal, epoch) = (%(device)s, %(signal)s, %(epoch)s)
       AND outcome IN ('lost', 'elsewhere') AND sequences @> %(sequence)s::int8
     ORDER BY cause = 'transport', id LIMIT 1 FOR UPDATE
"""
_FINAL_ROWS_WITH = """
    SELECT id, sequences, int8multirange(sequences) - int8multirange(%(taken)s::int8range), sample_count
      FROM stream_gaps
     WHERE (device_serial, signal, epoch) = (%(device)s, %(signal)s, %(epoch)s)
       AND cause = 'transport' AND outcome IN ('lost', 'elsewhere') AND sequences && %(taken)s::int8range
     ORDER BY id FOR UPDATE
"""
_COPY_ROW = """
    INSERT INTO stream_gaps (device_serial, device_id, stream_id, signal, epoch, gateway_id, cause, first_at, last_at,
                             sample_count, is_estimated, sequences, opened_at, closed_at, outcome)
    SELECT device_serial, device_id, stream_id, signal, epoch, gateway_id, cause, first_at, last_at,
           %(samples)s, is_estimated, %(sequences)s, opened_at, closed_at, outcome FROM stream_gaps WHERE id = %(id)s
"""
_TAKE_OUT_OF_LOST = """
    UPDATE ledger
       SET lost = lost - (SELECT range_agg(r) FROM unnest(%(rows)s::int8range[]) r)
                         * int8multirange(%(taken)s::int8range)
     WHERE (device_serial, signal, epoch) = (%(device)s, %(signal)s, %(epoch)s)
"""


async def record(connection: Connection, losses: Sequence[LossCommit]) -> None:
    """Record new losses. They are final: their rows are closed from the start."""
    rows = [
        _row(entry, entry.loss.sample_count, LOST, is_estimated=False)
        if entry.loss.sequences is None
        else await _of_blocks(connection, entry, Int8Range(*entry.loss.sequences, "[]"))
        for entry in losses
    ]
    if rows:
        async with connection.cursor() as cursor:
            await cursor.executemany(INSERT_GAP, rows)


async def take_back(connection: Connection, given_up: Mapping[Identity, Span | None]) -> None:
    """These came although they were on record as lost: their samples are taken off the rows that count them."""
    for (key, sequence), span in given_up.items():
        cursor = await connection.execute(
            _FINAL_ROW_OF,
            {**_names(key), "sequence": sequence},
        )
        row = await cursor.fetchone()
        if row is None:
            continue
        ident, cause = row
        if cause == TRANSPORT:
            await _shrink(connection, key, Int8Range(sequence, sequence, "[]"), ARRIVED)
            continue
        await connection.execute(
            "UPDATE stream_gaps g SET sample_count = CASE WHEN n.is_over THEN 0 ELSE n.samples END, "
            "outcome = CASE WHEN n.is_over OR n.samples = 0 THEN %(arrived)s ELSE g.outcome END FROM ("
            "SELECT greatest(g.sample_count - %(samples)s, 0) AS samples, NOT (l.lost && g.sequences) AS is_over "
            "FROM stream_gaps g JOIN ledger l USING (device_serial, signal, epoch) WHERE g.id = %(id)s) n "
            "WHERE g.id = %(id)s",
            {"id": ident, "samples": span.sample_count if span else 0, "arrived": ARRIVED},
        )


async def _of_blocks(connection: Connection, entry: LossCommit, named: Int8Range) -> dict[str, Any]:
    """Give up the named blocks that are not here; the row that says so."""
    key = entry.lost_key
    await _shrink(connection, key, named, RECORDED)
    cursor = await connection.execute(
        _GIVE_UP,
        {**_names(key), "named": named},
    )
    row = await cursor.fetchone()
    assert row is not None, "the caller made and locked it"
    given_up, is_here = _ranges(row[0]), row[1]
    samples, is_estimated = samples_of(entry.loss, given_up)
    outcome = LOST if samples else ARRIVED if is_here else RECORDED
    return _row(entry, samples, outcome, is_estimated=is_estimated)


def samples_of(loss: LossRecord, ranges: Sequence[tuple[int, int]]) -> tuple[int, bool]:
    """How many of a record's samples are in these (first, stop) ranges of its blocks; and whether that is a guess.

    Exact where the record tells the size of its blocks, or where all of them are meant.
    """
    assert loss.sequences is not None
    first, last = loss.sequences
    blocks = sum(stop - start for start, stop in ranges)
    if blocks == last - first + 1:
        return loss.sample_count, False
    if not loss.block_runs:
        guess = -(-loss.sample_count * blocks // (last - first + 1))
        return guess, bool(blocks)
    samples, start = 0, first
    for count, size in loss.block_runs:
        stop = start + count
        samples += size * sum(max(0, min(stop, high) - max(start, low)) for low, high in ranges)
        start = stop
    return samples, False


async def _shrink(connection: Connection, key: BlockKey, taken: Int8Range, outcome: str) -> None:
    """Take sequences out of the final rows of transport, which name exactly what is missing, and out of `lost`.

    A row of which nothing is left gets the outcome and no samples.
    """
    named = {**_names(key), "taken": taken}
    rows = await (await connection.execute(_FINAL_ROWS_WITH, named)).fetchall()
    for ident, sequences, rest, samples in rows:
        parts = _ranges(rest)
        if not parts:
            await connection.execute(
                "UPDATE stream_gaps SET sample_count = 0, outcome = %s WHERE id = %s", (outcome, ident)
            )
        for start, stop in reversed(parts):
            share = max(1, round(samples * (stop - start) / (sequences.upper - sequences.lower)))
            await connection.execute(
                "UPDATE stream_gaps SET sequences = %(sequences)s, sample_count = %(samples)s WHERE id = %(id)s"
                if (start, stop) == parts[0]
                else _COPY_ROW,
                {"sequences": Int8Range(start, stop), "samples": share, "id": ident},
            )
    if rows:
        await connection.execute(_TAKE_OUT_OF_LOST, {**named, "rows": [row[1] for row in rows]})


def _row(entry: LossCommit, samples: int, outcome: str, *, is_estimated: bool) -> dict[str, Any]:
    loss = entry.loss
    return {
        "device": loss.device,
        "signal": loss.signal,
        "epoch": None if loss.sequences is None else entry.lost_key.epoch,
        "gateway": short(entry.gateway),
        "cause": loss.cause.value,
        "first_at": instant_of_ns(loss.first_ns),
        "last_at": instant_of_ns(loss.last_ns),
        "samples": samples,
        "is_estimated": is_estimated,
        "sequences": None if loss.sequences is None else Int8Range(*loss.sequences, "[]"),
        "opened_at": None,
        "outcome": outcome,
    }


def _names(key: BlockKey) -> dict[str, str]:
    return {"device": key.device, "signal": key.signal, "epoch": key.epoch}


def _ranges(found: Int8Multirange) -> list[tuple[int, int]]:
    """A multirange as PostgreSQL gives it: (first, stop)."""
    return [(part.lower, part.upper) for part in found if part.lower is not None and part.upper is not None]
