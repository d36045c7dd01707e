"""Holes of the ledger as rows of `stream_gaps`: opened, shrunk, split, closed as data comes, final when none can come.

A ledger row is reviewed under its lock, in a transaction of its own; what it costs is bounded by `HOLES_MAX`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from psycopg.types.range import Int8Range

from cloud_sync.registry.admin import record_act
from cloud_sync.registry.alerts import open_alerts
from cloud_sync.registry.database import Connection
from cloud_sync.registry.entries import BlockKey, short
from cloud_sync.registry.gap_changes import Changes, Hole, OpenRow, changes
from cloud_sync.registry.losses import ARRIVED, INSERT_GAP, LOST, RECORDED, TRANSPORT
from gateway.samples import LOSS

HOLES_MAX = 1_000
"""Open rows of one ledger row, the oldest holes; the others follow as those close. `ledger.missing` counts all."""
SAMPLES_MAX = 2**53
"""Of an estimate: a gateway can claim any sequence."""
ROUND = timedelta(seconds=30)
"""A gateway that asks names everything that it holds, in a few messages: by then all of them are here."""
ELSEWHERE = "elsewhere"
GAP_ALERT = "stream_gap"
LOST_ALERT = "samples_lost"
ELSEWHERE_ALERT = "samples_elsewhere"
"""Alerts of these kinds are about a device and a signal."""


@dataclass(frozen=True, slots=True)
class _Row:
    """A ledger row under its lock."""

    gateway: str
    missing: int
    settled_below: int
    is_gone: bool
    newest: int | None
    newest_at: datetime | None
    seen_at: datetime
    samples_a_block: float


async def note_wanted(connection: Connection, gateway: str, wanted: Sequence[tuple[BlockKey, int, int]]) -> None:
    """A gateway told what it still holds of its sequences, (key, first, last): what is below `first` cannot come.

    Rows of other gateways are left alone.
    """
    told = {key: (first, last) for key, first, last in wanted}
    keys = sorted(told)
    await connection.execute(
        """
        INSERT INTO ledger AS l (device_serial, signal, epoch, gateway_id, settled_below, known_through, asked_at,
                                 missing, review_due)
        SELECT device, signal, epoch, %s, first, last, now(), last + 1, true
          FROM unnest(%s::text[], %s::text[], %s::text[], %s::int8[], %s::int8[])
                   AS w(device, signal, epoch, first, last)
         ORDER BY 1, 2, 3
            ON CONFLICT (device_serial, signal, epoch) DO UPDATE
           SET asked_at = now(), is_gone = false,
               settled_below = greatest(l.settled_below, excluded.settled_below),
               known_through = greatest(l.known_through, excluded.known_through),
               missing = l.missing + greatest(excluded.known_through + 1 - greatest(
                   upper(l.committed), upper(l.lost), l.known_through + 1), 0),
               review_due = l.review_due OR l.missing > 0 OR excluded.known_through >= greatest(
                   upper(l.committed), upper(l.lost), l.known_through + 1)
         WHERE l.gateway_id = excluded.gateway_id
        """,
        (
            short(gateway),
            [key.device for key in keys],
            [key.signal for key in keys],
            [key.epoch for key in keys],
            [told[key][0] for key in keys],
            [told[key][1] for key in keys],
        ),
    )


async def mark_gone(connection: Connection) -> list[BlockKey]:
    """Find sequences with holes that their gateway does not hold any more, and have them reviewed.

    Its newer outbox was asked about, and this one was not.
    """
    cursor = await connection.execute(
        """
        SELECT DISTINCT o.device_serial, o.signal, o.epoch FROM ledger o JOIN ledger n ON n.gateway_id = o.gateway_id
         WHERE o.has_holes AND NOT o.is_gone AND n.epoch <> o.epoch AND n.opened_at > o.opened_at
           AND n.asked_at > coalesce(o.asked_at, o.opened_at) + %(round)s AND n.asked_at < now() - %(round)s
         ORDER BY 1, 2, 3
        """,
        {"round": ROUND},
    )
    keys = [BlockKey(*row) for row in await cursor.fetchall()]
    for key in keys:
        await connection.execute(
            "UPDATE ledger SET is_gone = true, review_due = true "
            "WHERE (device_serial, signal, epoch) = (%s, %s, %s) AND has_holes",
            (key.device, key.signal, key.epoch),
        )
    return keys


async def due(connection: Connection, limit: int, after: BlockKey | None = None) -> list[BlockKey]:
    """Ledger rows that are to be reviewed, in order, those beyond `after` where given."""
    last = ("", "", "") if after is None else (after.device, after.signal, after.epoch)
    cursor = await connection.execute(
        "SELECT device_serial, signal, epoch FROM ledger "
        "WHERE review_due AND (device_serial, signal, epoch) > (%s, %s, %s) ORDER BY 1, 2, 3 LIMIT %s",
        (*last, limit),
    )
    return [BlockKey(*row) for row in await cursor.fetchall()]


async def review(connection: Connection, key: BlockKey) -> None:
    """Bring the gaps of one ledger row up to date."""
    names = {"device": key.device, "signal": key.signal, "epoch": key.epoch}
    async with connection.transaction():
        row = await _lock(connection, names)
        if row is None:
            return
        holes = await _holes(connection, names, row)
        found = changes(holes, await _open_rows(connection, names), are_all=len(holes) < HOLES_MAX)
        await _apply(connection, key, row, found)
        is_waiting, closed_count = False, len(found.filled)
        if row.settled_below or row.is_gone:
            is_waiting = await _awaits_losses(connection, key, row)
            closed_count += 0 if is_waiting else await _settle(connection, key, row)
        await connection.execute(_FORGET_EDGES, names)
        await connection.execute(
            "UPDATE ledger SET review_due = %(due)s AND has_holes "
            "WHERE (device_serial, signal, epoch) = (%(device)s, %(signal)s, %(epoch)s)",
            {**names, "due": is_waiting or (len(holes) == HOLES_MAX and closed_count > 0)},
        )


async def watch(connection: Connection, open_for: timedelta) -> None:
    """One alert for each signal of a device with a gap that has been open so long; closed when it is."""
    async with connection.transaction():
        cursor = await connection.execute(
            "SELECT device_serial || ' ' || signal, 'open since ' || to_char(min(opened_at), 'YYYY-MM-DD HH24:MI') "
            "FROM stream_gaps WHERE closed_at IS NULL AND opened_at < now() - %s GROUP BY device_serial, signal",
            (open_for,),
        )
        late: dict[str, str] = dict(await cursor.fetchall())
        if late:
            await open_alerts(connection, GAP_ALERT, late)
        await connection.execute(
            "UPDATE alerts SET closed_at = now() WHERE id IN (SELECT id FROM alerts WHERE kind = %s "
            "AND closed_at IS NULL AND subject <> ALL(%s) ORDER BY subject FOR UPDATE)",
            (GAP_ALERT, list(late)),
        )


# Of an outbox that has sent nothing yet, the device's others tell how large its blocks are.
_LOCK = """
    SELECT gateway_id, missing, settled_below, is_gone, upper(committed) - 1, newest_at, coalesce(asked_at, updated_at),
           coalesce(sample_count::float8 / nullif(block_count, 0),
                    (SELECT sum(sample_count)::float8 / nullif(sum(block_count), 0) FROM ledger
                      WHERE (device_serial, signal) = (%(device)s, %(signal)s)), 1)
      FROM ledger WHERE (device_serial, signal, epoch) = (%(device)s, %(signal)s, %(epoch)s) FOR UPDATE
"""


async def _lock(connection: Connection, names: dict[str, str]) -> _Row | None:
    cursor = await connection.execute(_LOCK, names)
    found = await cursor.fetchone()
    return None if found is None else _Row(*found)


_HOLES = """
    SELECT DISTINCT lower(h), upper(h), b.last_at, a.first_at
      FROM (SELECT h FROM unnest((SELECT holes_of(committed, lost, known_through) FROM ledger
                                   WHERE (device_serial, signal, epoch) = (%(device)s, %(signal)s, %(epoch)s))) h
             LIMIT %(limit)s) AS holes
      LEFT JOIN ledger_edges b ON (b.device_serial, b.signal, b.epoch) = (%(device)s, %(signal)s, %(epoch)s)
                              AND b.last = lower(h) - 1
      LEFT JOIN ledger_edges a ON (a.device_serial, a.signal, a.epoch) = (%(device)s, %(signal)s, %(epoch)s)
                              AND a.first = upper(h)
     ORDER BY 1
"""
_FORGET_EDGES = """
    WITH holes AS MATERIALIZED (
        SELECT lower(h) AS first, upper(h) AS stop FROM unnest((
            SELECT holes_of(committed, lost, known_through) FROM ledger
             WHERE (device_serial, signal, epoch) = (%(device)s, %(signal)s, %(epoch)s))) h
    )
    DELETE FROM ledger_edges
     WHERE (device_serial, signal, epoch) = (%(device)s, %(signal)s, %(epoch)s)
       AND last + 1 NOT IN (SELECT first FROM holes) AND first NOT IN (SELECT stop FROM holes)
"""
_OPEN = """
    FROM stream_gaps WHERE (device_serial, signal, epoch) = (%(device)s, %(signal)s, %(epoch)s)
     AND cause = 'transport' AND closed_at IS NULL
"""


async def _holes(connection: Connection, names: dict[str, str], row: _Row) -> list[Hole]:
    if not row.missing:
        return []
    cursor = await connection.execute(_HOLES, {**names, "limit": HOLES_MAX})
    return [
        Hole(first, stop, row.newest_at if before_at is None and first - 1 == row.newest else before_at, after_at)
        async for first, stop, before_at, after_at in cursor
    ]


async def _open_rows(connection: Connection, names: dict[str, str]) -> list[OpenRow]:
    cursor = await connection.execute(
        b"SELECT id, lower(sequences), upper(sequences), opened_at" + _OPEN.encode() + b"ORDER BY 2", names
    )
    return [OpenRow(*found) for found in await cursor.fetchall()]


async def _apply(connection: Connection, key: BlockKey, row: _Row, found: Changes) -> None:
    names = {"device": key.device, "signal": key.signal, "epoch": key.epoch}
    for old, hole in found.moved:
        await connection.execute(
            "UPDATE stream_gaps SET sequences = %(sequences)s, first_at = %(first_at)s, last_at = %(last_at)s, "
            "sample_count = %(samples)s WHERE id = %(id)s",
            {**_facts(key, row, hole), "id": old.id},
        )
    if found.opened:
        async with connection.cursor() as cursor:
            await cursor.executemany(
                INSERT_GAP,
                [{**_facts(key, row, hole), "opened_at": opened_at} for opened_at, hole in found.opened],
            )
    if found.merged:
        await connection.execute(
            "UPDATE stream_gaps SET closed_at = now(), outcome = %s, sample_count = 0 WHERE id = ANY(%s)",
            (RECORDED, [old.id for old in found.merged]),
        )
    if found.filled:
        await connection.execute(
            "UPDATE stream_gaps g SET closed_at = now(), "
            "outcome = CASE WHEN l.lost && g.sequences THEN %(recorded)s ELSE %(arrived)s END FROM ledger l "
            "WHERE g.id = ANY(%(ids)s) AND (l.device_serial, l.signal, l.epoch) = (%(device)s, %(signal)s, %(epoch)s)",
            {**names, "ids": [old.id for old in found.filled], "recorded": RECORDED, "arrived": ARRIVED},
        )


def _facts(key: BlockKey, row: _Row, hole: Hole) -> dict[str, Any]:
    """A hole's row. Where the time at one of its ends is not known, the other's stands for it."""
    ends = [at for at in (hole.before_at, hole.after_at) if at is not None] or [row.seen_at]
    return {
        "device": key.device,
        "signal": key.signal,
        "epoch": key.epoch,
        "gateway": row.gateway,
        "cause": TRANSPORT,
        "first_at": min(ends),
        "last_at": max(ends),
        "samples": max(1, min(round((hole.stop - hole.first) * row.samples_a_block), SAMPLES_MAX)),
        "is_estimated": True,
        "sequences": Int8Range(hole.first, hole.stop),
        "opened_at": None,
        "outcome": None,
    }


async def _settle(connection: Connection, key: BlockKey, row: _Row) -> int:
    """Close the rows of what cannot come any more; returns how many."""
    names = {"device": key.device, "signal": key.signal, "epoch": key.epoch}
    count = 0
    await connection.execute(_ADD_UPPER_PART, {**names, "at": row.settled_below})
    await connection.execute(_END_AT_BORDER, {**names, "at": row.settled_below})
    finals: list[tuple[str, int | None]] = [(ELSEWHERE, row.settled_below)]
    if row.is_gone:
        finals.append((LOST, None))
    for outcome, below in finals:
        cursor = await connection.execute(
            b"UPDATE stream_gaps SET closed_at = now(), outcome = %(outcome)s WHERE id IN (SELECT id"
            + _OPEN.encode()
            + b"AND (%(below)s::int8 IS NULL OR upper(sequences) <= %(below)s)) RETURNING sequences, sample_count",
            {**names, "outcome": outcome, "below": below},
        )
        closed = await cursor.fetchall()
        if closed:
            await _give_up(connection, key, row, outcome, closed)
        count += len(closed)
    return count


# A row across the border becomes two: its upper part is made from it first, then it ends at the border.
_ADD_UPPER_PART = """
    INSERT INTO stream_gaps (device_serial, device_id, stream_id, signal, epoch, gateway_id, cause, first_at, last_at,
                             sample_count, is_estimated, sequences, opened_at, closed_at, outcome)
    SELECT device_serial, device_id, stream_id, signal, epoch, gateway_id, cause, first_at, last_at,
           greatest(1, round(sample_count::numeric * (upper(sequences) - %(at)s)
                             / (upper(sequences) - lower(sequences)))::int8),
           is_estimated, int8range(%(at)s, upper(sequences)), opened_at, NULL, NULL
      FROM stream_gaps
     WHERE (device_serial, signal, epoch) = (%(device)s, %(signal)s, %(epoch)s)
       AND cause = 'transport' AND closed_at IS NULL AND lower(sequences) < %(at)s AND upper(sequences) > %(at)s
"""
_END_AT_BORDER = """
    UPDATE stream_gaps
       SET sample_count = greatest(1, round(sample_count::numeric * (%(at)s - lower(sequences))
                                            / (upper(sequences) - lower(sequences)))::int8),
           sequences = int8range(lower(sequences), %(at)s)
     WHERE (device_serial, signal, epoch) = (%(device)s, %(signal)s, %(epoch)s)
       AND cause = 'transport' AND closed_at IS NULL AND lower(sequences) < %(at)s AND upper(sequences) > %(at)s
"""


async def _awaits_losses(connection: Connection, key: BlockKey, row: _Row) -> bool:
    """Whether a loss record of this device and gateway is known that has not come: it may speak of these holes."""
    if key.signal == LOSS:
        return False
    cursor = await connection.execute(
        "SELECT FROM ledger WHERE device_serial = %s AND signal = %s AND gateway_id = %s AND has_holes AND NOT is_gone "
        "LIMIT 1",
        (key.device, LOSS, row.gateway),
    )
    return bool(await cursor.fetchone() is not None)


async def _give_up(
    connection: Connection, key: BlockKey, row: _Row, outcome: str, closed: Sequence[tuple[Any, int]]
) -> None:
    """These sequences are final: the ledger, the audit record and an alert say so."""
    names = {"device": key.device, "signal": key.signal, "epoch": key.epoch}
    await connection.execute(
        "UPDATE ledger SET lost = lost + n.gone, missing = missing_of(committed, lost + n.gone, known_through) "
        "FROM (SELECT range_agg(r) AS gone FROM unnest(%(gone)s::int8range[]) r) n "
        "WHERE (device_serial, signal, epoch) = (%(device)s, %(signal)s, %(epoch)s)",
        {**names, "gone": [sequences for sequences, _ in closed]},
    )
    blocks = sum(sequences.upper - sequences.lower for sequences, _ in closed)
    samples = sum(samples for _, samples in closed)
    await record_act(
        connection, f"gap.{outcome}", serial=key.device, signal=key.signal, epoch=key.epoch, gateway=row.gateway,
        blocks=blocks, samples=samples,
    )  # fmt: skip
    what = (
        "will not come: their gateway holds nothing of that outbox any more"
        if outcome == LOST
        else "are not in this database, though their gateway was told that they are stored, or lost"
    )
    detail = f"gateway {row.gateway}, epoch {key.epoch}: {blocks} blocks, about {samples} samples, {what}"
    kind = LOST_ALERT if outcome == LOST else ELSEWHERE_ALERT
    await open_alerts(connection, kind, {f"{key.device} {key.signal}": detail})
