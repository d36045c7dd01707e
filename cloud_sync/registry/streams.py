"""Streams and their bindings as rows: opening one, binding it from its organisation's template, moving its start.

The caller holds the lock of the device's row (`lock_device`), so that nobody opens the same stream beside it.
Locks are always taken in the order ledger, devices, streams.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from cloud_sync.registry.database import Connection

DEFAULT_BUCKET = "wardlink"
"""Where points go when an organisation has no template; the measurement is then the signal's code."""

OPENED_BY_DEFAULT = "default"
OPENED_BY_OPERATOR = "operator"

RATE_HZ_MAX = 9_999_999.0
"""What numeric(10,3) holds."""


@dataclass(frozen=True, slots=True)
class StreamRow:
    """A stream's period. `ended_at` None: open."""

    id: UUID
    patient_id: UUID
    started_at: datetime
    ended_at: datetime | None
    opened_by: str


def storable_rate(rate_hz: float | None) -> float | None:
    """A sampling rate as the table can hold it, None for what is no rate."""
    if rate_hz is None or not math.isfinite(rate_hz) or not 0.001 <= rate_hz <= RATE_HZ_MAX:
        return None
    return round(rate_hz, 3)


async def lock_device(connection: Connection, device_id: UUID) -> None:
    """Hold the device's row to the end of the transaction: one at a time changes its owners and streams."""
    await connection.execute("SELECT FROM devices WHERE id = %s FOR NO KEY UPDATE", (device_id,))


async def stream_after(connection: Connection, device_id: UUID, signal_type_id: int, at: datetime) -> StreamRow | None:
    """The first stream that starts at or after a time."""
    cursor = await connection.execute(
        "SELECT id, patient_id, started_at, ended_at, opened_by FROM signal_streams "
        "WHERE device_id = %s AND signal_type_id = %s AND started_at >= %s AND ended_at IS DISTINCT FROM started_at "
        "ORDER BY started_at LIMIT 1",
        (device_id, signal_type_id, at),
    )
    row = await cursor.fetchone()
    return None if row is None else StreamRow(*row)


async def insert_stream(
    connection: Connection,
    *,
    device_id: UUID,
    signal_type_id: int,
    patient_id: UUID,
    started_at: datetime,
    ended_at: datetime | None,
    sample_rate_hz: float | None,
    opened_by: str,
) -> UUID:
    """A new stream without bindings."""
    cursor = await connection.execute(
        "INSERT INTO signal_streams (device_id, signal_type_id, patient_id, started_at, ended_at, sample_rate_hz, "
        "opened_by) VALUES (%s, %s, %s, %s, %s, %s, %s) RETURNING id",
        (device_id, signal_type_id, patient_id, started_at, ended_at, storable_rate(sample_rate_hz), opened_by),
    )
    row = await cursor.fetchone()
    assert row is not None
    stream_id: UUID = row[0]
    return stream_id


async def move_start(connection: Connection, stream_id: UUID, started_at: datetime) -> None:
    """Let a stream begin earlier."""
    await connection.execute("UPDATE signal_streams SET started_at = %s WHERE id = %s", (started_at, stream_id))


async def bind_from_template(connection: Connection, stream_id: UUID) -> None:
    """Bind a stream to what its organisation's template says, or to the built-in default where it has none."""
    cursor = await connection.execute(
        "INSERT INTO timeseries_binding (stream_id, influx_org, influx_bucket, measurement, retention_hint) "
        "SELECT s.id, t.influx_org, t.influx_bucket, t.measurement, t.retention_hint "
        "FROM signal_streams s JOIN patients p ON p.id = s.patient_id "
        "JOIN binding_templates t ON t.org_id = p.org_id AND t.signal_type_id = s.signal_type_id WHERE s.id = %s",
        (stream_id,),
    )
    if cursor.rowcount:
        await connection.execute(
            "INSERT INTO timeseries_binding_tag (binding_id, tag_key, tag_value) "
            "SELECT b.id, tag.key, tag.value "
            "FROM timeseries_binding b JOIN signal_streams s ON s.id = b.stream_id "
            "JOIN patients p ON p.id = s.patient_id "
            "JOIN binding_templates t ON t.org_id = p.org_id AND t.signal_type_id = s.signal_type_id "
            "AND t.influx_bucket = b.influx_bucket AND t.measurement = b.measurement, jsonb_each_text(t.tags) tag "
            "WHERE s.id = %s",
            (stream_id,),
        )
        return
    await connection.execute(
        "INSERT INTO timeseries_binding (stream_id, influx_bucket, measurement) "
        "SELECT s.id, %s, t.code FROM signal_streams s JOIN signal_types t ON t.id = s.signal_type_id WHERE s.id = %s",
        (DEFAULT_BUCKET, stream_id),
    )
