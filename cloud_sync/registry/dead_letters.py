"""Dead letters: kept with their reason until they are driven again. What is counted of one is on it.

A claimed letter's sequence is in the ledger on its account: the letter itself is the token of the count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from psycopg.types.json import Jsonb

from cloud_sync.registry.alerts import open_alerts
from cloud_sync.registry.database import Connection
from cloud_sync.registry.entries import DeadLetter, Part, short, storable
from cloud_sync.registry.instants import NS_PER_US, us_of_instant

LETTERS_ALERT = "dead_letters"
"""An alert of this kind is about a gateway."""


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
    is_claimed: bool | None
    first_at: datetime | None
    last_at: datetime | None

    @property
    def span_ns(self) -> tuple[int, int] | None:
        """First time, and the exclusive last one, of the samples that are left to write; None: all."""
        if self.first_at is None or self.last_at is None:
            return None
        return us_of_instant(self.first_at) * NS_PER_US, (us_of_instant(self.last_at) + 1) * NS_PER_US


_BURY = """
    INSERT INTO dead_letters AS d (gateway_id, topic, content_type, properties, payload, reason, detail, digest,
                                   is_claimed, counted, first_at, last_at)
    VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
        ON CONFLICT (digest) WHERE redriven_at IS NULL DO UPDATE
       SET repeats = d.repeats + 1, reason = excluded.reason, detail = excluded.detail,
           is_claimed = d.is_claimed OR excluded.is_claimed,
           counted = CASE WHEN excluded.is_claimed THEN d.counted || excluded.counted ELSE d.counted END
"""


async def bury(connection: Connection, letters: Sequence[DeadLetter]) -> None:
    """Keep letters; one that waits already is kept once, with its newest reason. Their points are not counted here."""
    if not letters:
        return
    async with connection.cursor() as cursor:
        await cursor.executemany(
            _BURY,
            [
                (
                    short(letter.gateway),
                    storable(letter.topic),
                    storable(letter.content_type),
                    properties_of(letter.properties),
                    letter.payload,
                    storable(letter.reason),
                    storable(letter.detail),
                    letter.digest,
                    letter.is_claimed or letter.key is not None,
                    Jsonb(_counts(letter.parts)),
                    *(letter.left_at or (None, None)),
                )
                for letter in sorted(letters, key=lambda letter: letter.digest)
            ],
        )
    await open_alerts(connection, LETTERS_ALERT, {short(letter.gateway): storable(letter.reason) for letter in letters})


def properties_of(properties: Mapping[str, str]) -> Jsonb:
    """User properties of a message as jsonb can hold them."""
    return Jsonb({storable(name): storable(value) for name, value in properties.items()})


def _counts(parts: Sequence[Part]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for part in parts:
        counts[str(part.stream_id)] = counts.get(str(part.stream_id), 0) + part.point_count
    return counts


_LETTERS = (
    b"SELECT id, gateway_id, topic, content_type, properties, payload, reason, detail, received_at, redriven_at, "
    b"repeats, is_claimed, first_at, last_at FROM dead_letters "
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


async def waiting_ids(connection: Connection) -> list[int]:
    """Letters that wait, the oldest first."""
    cursor = await connection.execute("SELECT id FROM dead_letters WHERE redriven_at IS NULL ORDER BY id")
    return [int(row[0]) for row in await cursor.fetchall()]


async def lock_waiting(connection: Connection, ident: int) -> dict[UUID, int] | None:
    """Hold a letter to the end of the transaction; what is counted of it by stream, None where it waits no more."""
    cursor = await connection.execute(
        "SELECT counted FROM dead_letters WHERE id = %s AND redriven_at IS NULL FOR UPDATE", (ident,)
    )
    row = await cursor.fetchone()
    return None if row is None else {UUID(stream): int(points) for stream, points in row[0].items()}


async def note_counted(connection: Connection, ident: int, counted: Mapping[UUID, int]) -> None:
    """Keep how many points of a letter are counted, by stream."""
    points = Jsonb({str(stream): count for stream, count in counted.items()})
    await connection.execute("UPDATE dead_letters SET counted = %s WHERE id = %s", (points, ident))


async def note_failure(connection: Connection, ident: int, reason: str, detail: str = "") -> None:
    """A letter that was driven again and stays, with its new reason."""
    await connection.execute(
        "UPDATE dead_letters SET reason = %s, detail = %s WHERE id = %s AND redriven_at IS NULL",
        (storable(reason), storable(detail), ident),
    )
