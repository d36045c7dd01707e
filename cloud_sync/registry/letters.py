"""What waits is settled: parked messages when their device is bound, dead letters when somebody drives them again.

The row itself is the token of exactly one count: whoever removes it (or marks it as re-driven) counts the points,
in the same transaction. Writing the points to the time-series store before that, twice if need be, is harmless.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from cloud_sync.registry import dead_letters, losses
from cloud_sync.registry.database import Connection
from cloud_sync.registry.dead_letters import LETTERS_ALERT
from cloud_sync.registry.entries import DeadLetter, LossCommit, Part
from cloud_sync.registry.instants import NS_PER_US, us_of_instant
from cloud_sync.registry.ledger import PARKED_ALERT, lock_rows
from cloud_sync.registry.stream_counts import count_points


@dataclass(frozen=True, slots=True)
class ParkedMessage:
    """A parked message. Of its samples only those in [from_ns, to_ns) wait; others of it are already written."""

    id: int
    device: str
    signal: str
    epoch: str
    sequence: int
    gateway: str
    topic: str
    content_type: str
    properties: Mapping[str, str]
    payload: bytes
    first_at: datetime
    last_at: datetime
    sample_count: int
    reason: str
    received_at: datetime

    @property
    def from_ns(self) -> int:
        return us_of_instant(self.first_at) * NS_PER_US

    @property
    def to_ns(self) -> int:
        """Exclusive."""
        return (us_of_instant(self.last_at) + 1) * NS_PER_US


@dataclass(frozen=True, slots=True)
class ParkedDevice:
    """How much of one device waits."""

    device: str
    messages: int
    samples: int
    first_at: datetime
    last_at: datetime
    reason: str
    """Of the message that came last."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What an operator looks at first."""

    parked_messages: int
    parked_devices: int
    dead_letters: int
    open_gaps: int
    open_alerts: int
    open_streams: int


async def take_parked(
    connection: Connection, device_serial: str, limit: int, after: ParkedMessage | None = None
) -> list[ParkedMessage]:
    """Parked messages of a device in order of time, those beyond `after` where given. They stay until settled."""
    cursor = await connection.execute(
        "SELECT id, device_serial, signal, epoch, sequence, gateway_id, topic, content_type, properties, payload, "
        "first_at, last_at, sample_count, reason, received_at FROM parked_messages "
        "WHERE device_serial = %(device)s AND (%(id)s::bigint IS NULL OR (first_at, id) > (%(first_at)s, %(id)s)) "
        "ORDER BY first_at, id LIMIT %(limit)s",
        {
            "device": device_serial,
            "limit": limit,
            "first_at": None if after is None else after.first_at,
            "id": None if after is None else after.id,
        },
    )
    return [ParkedMessage(*row) for row in await cursor.fetchall()]


async def settle_parked(connection: Connection, ids: Sequence[int], parts: Sequence[Sequence[Part]]) -> set[int]:
    """Remove written messages and count their points, `parts[i]` those of `ids[i]`; returns what this call removed.

    An id that is gone was settled by somebody else: its points are not counted again.
    """
    of = dict(zip(ids, parts, strict=True))
    if not of:
        return set()
    async with connection.transaction():
        cursor = await connection.execute(
            "DELETE FROM parked_messages WHERE id IN "
            "(SELECT id FROM parked_messages WHERE id = ANY(%s) ORDER BY id FOR UPDATE) RETURNING id, device_serial",
            (list(of),),
        )
        settled = {int(row[0]): str(row[1]) for row in await cursor.fetchall()}
        await count_points(connection, [(part, None) for ident in settled for part in of[ident]])
        await _close_alerts(connection, PARKED_ALERT, sorted(set(settled.values())))
    return set(settled)


async def settle_letter(connection: Connection, ident: int, parts: Sequence[Part], *, is_done: bool = True) -> bool:
    """Count what is not yet counted of a claimed letter's points, and mark it as re-driven where that `is_done`.

    `parts`: all of its points that are stored. False where it waits no more: somebody else counted them.
    """
    async with connection.transaction():
        counted = await dead_letters.lock_waiting(connection, ident)
        if counted is None:
            return False
        fresh: list[tuple[Part, None]] = []
        for part in parts:
            before = counted.get(part.stream_id, 0)
            if part.point_count > before:
                fresh.append((replace(part, point_count=part.point_count - before), None))
                counted[part.stream_id] = part.point_count
        await count_points(connection, fresh)
        await dead_letters.note_counted(connection, ident, counted)
        if is_done:
            await mark_redriven(connection, ident)
    return True


async def settle_loss(connection: Connection, ident: int, loss: LossCommit) -> bool:
    """Record the loss that a claimed letter tells of, once; as `settle_letter`."""
    async with connection.transaction():
        await lock_rows(connection, [loss])
        if await dead_letters.lock_waiting(connection, ident) is None:
            return False
        await losses.record(connection, [loss])
        await mark_redriven(connection, ident)
    return True


async def mark_redriven(connection: Connection, ident: int) -> None:
    """A letter waits no more; it stays to be read."""
    async with connection.transaction():
        cursor = await connection.execute(
            "UPDATE dead_letters SET redriven_at = now() WHERE id = %s AND redriven_at IS NULL RETURNING gateway_id",
            (ident,),
        )
        row = await cursor.fetchone()
        if row is not None:
            await _close_alerts(connection, LETTERS_ALERT, [row[0]])


async def bury_parked(connection: Connection, ident: int, reason: str, detail: str = "") -> bool:
    """Move a parked message that turns out never to be writable to the dead letters; False where it is gone."""
    async with connection.transaction():
        cursor = await connection.execute(
            "DELETE FROM parked_messages WHERE id = %s "
            "RETURNING device_serial, gateway_id, topic, content_type, properties, payload, first_at, last_at",
            (ident,),
        )
        row = await cursor.fetchone()
        if row is None:
            return False
        device, gateway, topic, content_type, properties, payload, first_at, last_at = row
        letter = DeadLetter(
            *(gateway, topic, content_type, payload, reason, detail),
            properties=properties,
            is_claimed=True,
            left_at=(first_at, last_at),
        )
        await dead_letters.bury(connection, [letter])
        await _close_alerts(connection, PARKED_ALERT, [device])
    return True


_STILL_WAITING = {
    PARKED_ALERT: b"SELECT FROM parked_messages WHERE device_serial = a.subject",
    LETTERS_ALERT: b"SELECT FROM dead_letters WHERE gateway_id = a.subject AND redriven_at IS NULL",
}


async def _close_alerts(connection: Connection, kind: str, subjects: Sequence[str]) -> None:
    """Close the alerts of those for whom nothing waits any more."""
    # First the lock, then the look: a commit that parks more at this moment holds the alert until its rows are visible.
    await connection.execute(
        "SELECT FROM alerts WHERE kind = %s AND subject = ANY(%s) AND closed_at IS NULL ORDER BY subject FOR UPDATE",
        (kind, list(subjects)),
    )
    await connection.execute(
        b"UPDATE alerts a SET closed_at = now() WHERE kind = %s AND subject = ANY(%s) AND closed_at IS NULL "
        b"AND NOT EXISTS (" + _STILL_WAITING[kind] + b")",
        (kind, list(subjects)),
    )


async def parked_devices(connection: Connection, limit: int = 1000) -> list[ParkedDevice]:
    """Devices whose data waits, the one that waits longest first."""
    cursor = await connection.execute(
        "SELECT device_serial, count(*), sum(sample_count)::bigint, min(first_at), max(last_at), "
        "(array_agg(reason ORDER BY id DESC))[1] FROM parked_messages GROUP BY device_serial "
        "ORDER BY min(received_at), device_serial LIMIT %s",
        (limit,),
    )
    return [ParkedDevice(*row) for row in await cursor.fetchall()]


async def counts(connection: Connection) -> Counts:
    """Everything that waits, in numbers."""
    cursor = await connection.execute(
        "SELECT (SELECT count(*) FROM parked_messages), (SELECT count(DISTINCT device_serial) FROM parked_messages), "
        "(SELECT count(*) FROM dead_letters WHERE redriven_at IS NULL), "
        "(SELECT count(*) FROM stream_gaps WHERE closed_at IS NULL), "
        "(SELECT count(*) FROM alerts WHERE closed_at IS NULL), "
        "(SELECT count(*) FROM signal_streams WHERE ended_at IS NULL)"
    )
    row = await cursor.fetchone()
    assert row is not None
    return Counts(*row)
