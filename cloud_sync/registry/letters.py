"""What waits: parked messages until their device is bound, dead letters until somebody looks at them.

The row itself is the token of exactly one count: whoever removes it (or marks it as re-driven) counts the points,
in the same transaction. Writing the points to the time-series store before that, twice if need be, is harmless.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from psycopg.types.json import Jsonb

from cloud_sync.registry.database import Connection
from cloud_sync.registry.entries import DeadLetter, Part, storable
from cloud_sync.registry.instants import NS_PER_US, us_of_instant
from cloud_sync.registry.ledger import LETTERS_ALERT, PARKED_ALERT, count_points, open_alerts


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
class Letter:
    """A dead letter as it is kept."""

    id: int
    gateway: str
    topic: str
    content_type: str
    properties: Mapping[str, str]
    payload: bytes
    reason: str
    detail: str
    received_at: datetime
    redriven_at: datetime | None
    repeats: int


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
    return await _settle(
        connection,
        "DELETE FROM parked_messages WHERE id IN "
        "(SELECT id FROM parked_messages WHERE id = ANY(%s) ORDER BY id FOR UPDATE) RETURNING id, device_serial",
        PARKED_ALERT,
        ids,
        parts,
    )


async def settle_letters(connection: Connection, ids: Sequence[int], parts: Sequence[Sequence[Part]]) -> set[int]:
    """Mark dead letters as re-driven and count their points; as `settle_parked`, but the letters stay to be read."""
    return await _settle(
        connection,
        "UPDATE dead_letters SET redriven_at = now() WHERE id IN (SELECT id FROM dead_letters WHERE id = ANY(%s) "
        "AND redriven_at IS NULL ORDER BY id FOR UPDATE) RETURNING id, gateway_id",
        LETTERS_ALERT,
        ids,
        parts,
    )


async def _settle(
    connection: Connection, statement: str, alert: str, ids: Sequence[int], parts: Sequence[Sequence[Part]]
) -> set[int]:
    of = dict(zip(ids, parts, strict=True))
    if not of:
        return set()
    async with connection.transaction():
        cursor = await connection.execute(statement.encode(), (list(of),))
        settled = {int(row[0]): str(row[1]) for row in await cursor.fetchall()}
        await count_points(connection, [(part, None) for ident in settled for part in of[ident]])
        await _close_alerts(connection, alert, sorted(set(settled.values())))
    return set(settled)


async def bury_parked(connection: Connection, ident: int, reason: str, detail: str = "") -> bool:
    """Move a parked message that turns out never to be writable to the dead letters; False where it is gone."""
    async with connection.transaction():
        cursor = await connection.execute(
            "DELETE FROM parked_messages WHERE id = %s "
            "RETURNING device_serial, gateway_id, topic, content_type, properties, payload",
            (ident,),
        )
        row = await cursor.fetchone()
        if row is None:
            return False
        device, gateway, topic, content_type, properties, payload = row
        letter = DeadLetter(gateway, topic, content_type, payload, reason, detail)
        await connection.execute(
            "INSERT INTO dead_letters (gateway_id, topic, content_type, properties, payload, reason, detail, digest) "
            "VALUES (%s, %s, %s, %s, %s, %s, %s, %s) "
            "ON CONFLICT (digest) WHERE redriven_at IS NULL DO UPDATE SET repeats = dead_letters.repeats + 1",
            (
                gateway,
                topic,
                content_type,
                Jsonb(properties),
                payload,
                storable(reason),
                storable(detail),
                letter.digest,
            ),
        )
        await _close_alerts(connection, PARKED_ALERT, [device])
        await open_alerts(connection, LETTERS_ALERT, {gateway: storable(reason)})
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


_LETTERS = (
    b"SELECT id, gateway_id, topic, content_type, properties, payload, reason, detail, received_at, redriven_at, "
    b"repeats FROM dead_letters "
)


async def list_letters(connection: Connection, limit: int, *, with_redriven: bool = False) -> list[Letter]:
    """Dead letters, the newest first."""
    cursor = await connection.execute(
        _LETTERS + b"WHERE redriven_at IS NULL OR %s ORDER BY id DESC LIMIT %s",
        (with_redriven, limit),
    )
    return [Letter(*row) for row in await cursor.fetchall()]


async def find_letter(connection: Connection, ident: int) -> Letter | None:
    """One dead letter, None where there is none of that id."""
    cursor = await connection.execute(_LETTERS + b"WHERE id = %s", (ident,))
    row = await cursor.fetchone()
    return None if row is None else Letter(*row)


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
