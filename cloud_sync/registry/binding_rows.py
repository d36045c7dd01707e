"""The resolver: (device serial, signal, sample times) to streams, patients and the places where points go.

It asks who wore the device at the time of the sample, never who wears it now, and opens a stream by default where a
patient wore the device and nobody opened one. Borders follow the rule of `instants`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from cloud_sync.registry.database import Connection
from cloud_sync.registry.instants import NS_PER_US, instant, us_of, us_of_instant
from cloud_sync.registry.streams import (
    OPENED_BY_DEFAULT,
    StreamRow,
    bind_from_template,
    insert_stream,
    lock_device,
    move_start,
    stream_after,
)

UNKNOWN_DEVICE = "unknown device"
NO_OWNER = "device has no owner at that time"
UNKNOWN_SIGNAL_TYPE = "unknown signal type"
NO_BINDING = "no binding"
EVERY_DEVICE = "*"
"""Counts the changes that may touch any device."""


@dataclass(frozen=True, slots=True)
class Target:
    """One place a point is written to. `tags`: all of them, fixed and of the binding, sorted by key."""

    influx_org: str
    """Empty: the store's default."""
    bucket: str
    measurement: str
    tags: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class BoundPeriod:
    """A stream's whole period, so that it may be kept and used for other blocks: [from_ns, to_ns)."""

    stream_id: UUID
    patient_id: UUID
    from_ns: int
    to_ns: int | None
    """Exclusive; None: open."""
    targets: tuple[Target, ...]

    def holds(self, time_ns: int) -> bool:
        """Whether a sample of that time belongs here."""
        return self.from_ns <= time_ns and (self.to_ns is None or time_ns < self.to_ns)


@dataclass(frozen=True, slots=True)
class Resolution:
    """What the asked span is bound to.

    `periods`: in order of time, each overlaps the span; they may leave parts of it uncovered.
    `unbound`: why a part of the span is bound to nothing, None where all of it is bound.
    """

    periods: tuple[BoundPeriod, ...]
    unbound: str | None


@dataclass(frozen=True, slots=True)
class _Span:
    """Microseconds [first, stop) of one signal of one device."""

    device_id: UUID
    signal_type_id: int
    first_us: int
    stop_us: int


@dataclass(frozen=True, slots=True)
class _Owner:
    patient_id: UUID
    from_us: int | None
    to_us: int | None


async def resolve(
    connection: Connection,
    device_serial: str,
    signal: str,
    first_ns: int,
    last_ns: int,
    sample_rate_hz: float | None = None,
) -> Resolution:
    """Find, or open by default, the streams of all samples from `first_ns` to `last_ns` (UTC, inclusive).

    Needs a connection outside a transaction, or holds its lock on the device's row until that one ends.
    Raises psycopg errors, which `Database.connection` turns into those of wardlink.
    """
    cursor = await connection.execute(
        "SELECT d.id, (SELECT id FROM signal_types WHERE code = %s) FROM devices d WHERE d.serial = %s",
        (signal, device_serial),
    )
    row = await cursor.fetchone()
    if row is None:
        return Resolution((), UNKNOWN_DEVICE)
    device_id, signal_type_id = row
    if signal_type_id is None:
        return Resolution((), UNKNOWN_SIGNAL_TYPE)

    span = _Span(device_id, signal_type_id, us_of(first_ns), us_of(last_ns) + 1)
    unbound: str | None = None
    streams = await _streams_in(connection, span)
    if _gaps(streams, span):
        async with connection.transaction():
            await lock_device(connection, device_id)
            # Another bridge may have opened them while this one waited for the lock.
            streams = await _streams_in(connection, span)
            for first_us, stop_us in _gaps(streams, span):
                if not await _open_by_default(connection, span, first_us, stop_us, sample_rate_hz):
                    unbound = NO_OWNER
            streams = await _streams_in(connection, span)
    targets = await _targets_of(connection, [stream.id for stream in streams])
    if unbound is None and len(targets) < len(streams):
        unbound = NO_BINDING
    periods = tuple(
        BoundPeriod(
            stream_id=stream.id,
            patient_id=stream.patient_id,
            from_ns=us_of_instant(stream.started_at) * NS_PER_US,
            to_ns=None if stream.ended_at is None else us_of_instant(stream.ended_at) * NS_PER_US,
            targets=targets[stream.id],
        )
        for stream in streams
        if stream.id in targets
    )
    return Resolution(periods, unbound)


async def versions(connection: Connection, serials: Collection[str]) -> dict[str, int]:
    """A number for each device that is another after every committed change of its bindings."""
    cursor = await connection.execute(
        "SELECT device_serial, version FROM binding_versions WHERE device_serial = ANY(%s)",
        ([*serials, EVERY_DEVICE],),
    )
    found: dict[str, int] = dict(await cursor.fetchall())
    everywhere = found.get(EVERY_DEVICE, 0)
    return {serial: everywhere + found.get(serial, 0) for serial in serials}


STREAMS_IN_SPAN = """
    SELECT id, patient_id, started_at, ended_at, opened_by FROM signal_streams
     WHERE device_id = %(device)s AND signal_type_id = %(signal)s AND started_at < %(stop)s
       AND (ended_at IS NULL OR ended_at > %(first)s) AND ended_at IS DISTINCT FROM started_at
       -- Periods never overlap: none but the last that began by then can reach into the span from before it.
       AND started_at >= coalesce((SELECT started_at FROM signal_streams
                                    WHERE device_id = %(device)s AND signal_type_id = %(signal)s
                                      AND started_at <= %(first)s AND ended_at IS DISTINCT FROM started_at
                                    ORDER BY started_at DESC LIMIT 1), %(first)s)
     ORDER BY started_at
"""


async def _streams_in(connection: Connection, span: _Span) -> list[StreamRow]:
    cursor = await connection.execute(
        STREAMS_IN_SPAN,
        {
            "device": span.device_id,
            "signal": span.signal_type_id,
            "first": instant(span.first_us),
            "stop": instant(span.stop_us),
        },
    )
    return [StreamRow(*row) for row in await cursor.fetchall()]


def _gaps(streams: Sequence[StreamRow], span: _Span) -> list[tuple[int, int]]:
    """Parts [first, stop) of the span, us, that no stream covers."""
    gaps = []
    covered_us = span.first_us
    for stream in streams:
        start_us = us_of_instant(stream.started_at)
        if start_us > covered_us:
            gaps.append((covered_us, start_us))
        if stream.ended_at is None:
            return gaps
        covered_us = us_of_instant(stream.ended_at)
    if covered_us < span.stop_us:
        gaps.append((covered_us, span.stop_us))
    return gaps


async def _open_by_default(
    connection: Connection, span: _Span, first_us: int, stop_us: int, sample_rate_hz: float | None
) -> bool:
    """Cover a gap as far as somebody wore the device in it; whether that was all of it."""
    covered_us = first_us
    whole = True
    for owner in await _owners_in(connection, span.device_id, first_us, stop_us):
        start_us = first_us if owner.from_us is None else max(first_us, owner.from_us)
        whole = whole and start_us == covered_us
        covered_us = stop_us if owner.to_us is None else min(stop_us, owner.to_us)
        await _cover(connection, span, owner, start_us, sample_rate_hz)
    return whole and covered_us == stop_us


async def _cover(
    connection: Connection, span: _Span, owner: _Owner, start_us: int, sample_rate_hz: float | None
) -> None:
    """One stream from `start_us` to the next stream or the end of the owner's time, whichever comes first."""
    following = await stream_after(connection, span.device_id, span.signal_type_id, instant(start_us))
    if following is not None:
        following_us = us_of_instant(following.started_at)
        worn_until_then = owner.to_us is None or following_us < owner.to_us
        same_patient = following.patient_id == owner.patient_id
        if following.opened_by == OPENED_BY_DEFAULT and worn_until_then and same_patient:
            # Late data of the same wear: one stream that begins earlier, not a fragment before it.
            await move_start(connection, following.id, instant(start_us))
            return
    ends: list[datetime] = []
    if following is not None:
        ends.append(following.started_at)
    if owner.to_us is not None:
        ends.append(instant(owner.to_us))
    stream_id = await insert_stream(
        connection,
        device_id=span.device_id,
        signal_type_id=span.signal_type_id,
        patient_id=owner.patient_id,
        started_at=instant(start_us),
        ended_at=min(ends, default=None),
        sample_rate_hz=sample_rate_hz,
        opened_by=OPENED_BY_DEFAULT,
    )
    await bind_from_template(connection, stream_id)


async def _owners_in(connection: Connection, device_id: UUID, first_us: int, stop_us: int) -> list[_Owner]:
    cursor = await connection.execute(
        # Python's datetime knows no -infinity.
        "SELECT patient_id, nullif(valid_from, '-infinity'), valid_to FROM device_owners "
        "WHERE device_id = %s AND valid_from < %s AND (valid_to IS NULL OR valid_to > %s) ORDER BY valid_from",
        (device_id, instant(stop_us), instant(first_us)),
    )
    return [
        _Owner(
            patient_id=patient_id,
            from_us=None if valid_from is None else us_of_instant(valid_from),
            to_us=None if valid_to is None else us_of_instant(valid_to),
        )
        for patient_id, valid_from, valid_to in await cursor.fetchall()
    ]


async def _targets_of(connection: Connection, stream_ids: Sequence[UUID]) -> dict[UUID, tuple[Target, ...]]:
    """The targets of each stream that has any, in a fixed order."""
    cursor = await connection.execute(
        "SELECT s.id, s.patient_id, s.device_id, p.org_id, t.code, b.influx_org, b.influx_bucket, b.measurement, "
        "(SELECT coalesce(jsonb_object_agg(g.tag_key, g.tag_value), '{}') FROM timeseries_binding_tag g "
        "WHERE g.binding_id = b.id) "
        "FROM signal_streams s JOIN patients p ON p.id = s.patient_id JOIN signal_types t ON t.id = s.signal_type_id "
        "JOIN timeseries_binding b ON b.stream_id = s.id WHERE s.id = ANY(%s) ORDER BY s.id, b.id",
        (list(stream_ids),),
    )
    targets: dict[UUID, tuple[Target, ...]] = {}
    for (
        stream_id,
        patient_id,
        device_id,
        org_id,
        signal,
        influx_org,
        bucket,
        measurement,
        extra,
    ) in await cursor.fetchall():
        tags: dict[str, str] = {
            **extra,
            "patient_id": str(patient_id),
            "device_id": str(device_id),
            "stream_id": str(stream_id),
            "org_id": str(org_id),
            "signal_type": signal,
        }
        target = Target(influx_org or "", bucket, measurement, tuple(sorted(tags.items())))
        targets[stream_id] = (*targets.get(stream_id, ()), target)
    return targets
