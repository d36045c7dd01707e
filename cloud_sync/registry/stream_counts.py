"""What new blocks change beside the ledger: a device's last sight, and counts and last times of streams.

Within the transaction that proves that they are new. Locks are taken in the order devices, streams, each sorted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from uuid import UUID

from cloud_sync.registry.database import Connection
from cloud_sync.registry.entries import Part
from cloud_sync.registry.instants import instant_of_ns
from cloud_sync.registry.streams import storable_rate
from gateway.errors import RefusedError


async def see_devices(connection: Connection, seen: Mapping[str, tuple[int, str]]) -> None:
    """Keep `last_seen_at` and, of the newest data, `gateway_id` of devices: serial to (time in ns, gateway)."""
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
