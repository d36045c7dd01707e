"""Streams, bindings, tags and templates as an operator handles them. Each act is one transaction and its audit line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from uuid import UUID

import psycopg
from psycopg.types.json import Jsonb

from cloud_sync.registry.admin import (
    Rows,
    checked_time,
    device_row,
    organization_id,
    patient_id,
    record_act,
    rows_of,
    signal_type_id,
)
from cloud_sync.registry.database import Connection
from cloud_sync.registry.streams import OPENED_BY_OPERATOR, bind_from_template, insert_stream, lock_device
from gateway.errors import ConfigError, RefusedError

_ALLOWED = (
    "no empty names, no control characters, no leading underscore; tag keys at most 120 characters, values 240; "
    "the tags patient_id, device_id, stream_id, org_id, signal_type, user_id, session_id and time belong to wardlink"
)


async def open_stream(
    connection: Connection,
    serial: str,
    signal: str,
    *,
    patient: str | None = None,
    since: datetime | None = None,
    sample_rate_hz: float | None = None,
) -> UUID:
    """Open a stream from `since`, or from now on, for whoever wears the device then, bound by the template.

    A stream that was opened by default ends where this one begins. Raises `RefusedError` where another one stands
    in the way or somebody else wears the device, `ConfigError`.
    """
    checked_time(since, "--since")
    async with connection.transaction():
        device_id, org_id = await device_row(connection, serial)
        type_id = await signal_type_id(connection, signal)
        await lock_device(connection, device_id)
        begin = since or await _now(connection)
        who = await _patient_then(connection, serial, device_id, org_id, patient, begin)
        await _make_room(connection, device_id, type_id, begin, told=since is not None)
        stream_id = await insert_stream(
            connection,
            device_id=device_id,
            signal_type_id=type_id,
            patient_id=who,
            started_at=begin,
            ended_at=None,
            sample_rate_hz=sample_rate_hz,
            opened_by=OPENED_BY_OPERATOR,
        )
        await bind_from_template(connection, stream_id)
        await record_act(
            connection, "stream.open", id=stream_id, serial=serial, signal=signal, patient=who, since=begin
        )
    return stream_id


async def _now(connection: Connection) -> datetime:
    row = await (await connection.execute("SELECT clock_timestamp()")).fetchone()
    assert row is not None
    now: datetime = row[0]
    return now


async def _patient_then(
    connection: Connection, serial: str, device_id: UUID, org_id: UUID, patient: str | None, at: datetime
) -> UUID:
    told = None if patient is None else await patient_id(connection, org_id, patient)
    cursor = await connection.execute(
        "SELECT patient_id FROM device_owners WHERE device_id = %(device)s AND valid_from <= %(at)s "
        "AND (valid_to IS NULL OR valid_to > %(at)s)",
        {"device": device_id, "at": at},
    )
    row = await cursor.fetchone()
    wearer: UUID | None = None if row is None else row[0]
    if wearer is not None and told is not None and wearer != told:
        raise RefusedError(
            f"device {serial!r} is worn by somebody else than {patient} at {at.isoformat()}",
            hint=f"first `wardlink cloud device assign {serial} --patient {patient}`",
        )
    who = told or wearer
    if who is None:
        raise ConfigError(
            f"nobody wears device {serial!r} at {at.isoformat()}", hint="name the patient: --patient CODE"
        )
    return who


async def _make_room(connection: Connection, device_id: UUID, type_id: int, begin: datetime, *, told: bool) -> None:
    cursor = await connection.execute(
        "SELECT id, started_at, ended_at, last_sample_at, opened_by FROM signal_streams WHERE device_id = %s "
        "AND signal_type_id = %s AND (ended_at IS NULL OR ended_at > %s) AND ended_at IS DISTINCT FROM started_at "
        "ORDER BY started_at",
        (device_id, type_id, begin),
    )
    for ident, started_at, ended_at, last_sample_at, opened_by in await cursor.fetchall():
        if opened_by == OPENED_BY_OPERATOR or started_at > begin:
            until = "and is open" if ended_at is None else f"to {ended_at.isoformat()}"
            raise RefusedError(
                f"stream {ident} stands in the way: from {started_at.isoformat()} {until}",
                hint=f"`wardlink cloud stream close {ident}`" if ended_at is None else "give a later --since",
            )
        if told and last_sample_at is not None and last_sample_at >= begin:
            raise RefusedError(
                f"samples up to {last_sample_at.isoformat()} are already stored in stream {ident}",
                hint="give a later --since, or none",
            )
        await connection.execute("UPDATE signal_streams SET ended_at = %s WHERE id = %s", (begin, ident))


async def close_stream(connection: Connection, stream_id: UUID, *, at: datetime | None = None) -> datetime:
    """End an open stream at a time, or now; returns when. Samples of before still find it.

    Raises `ConfigError` for an unknown one, `RefusedError` where it is closed or has later samples than `at`.
    """
    checked_time(at, "--at")
    async with connection.transaction():
        cursor = await connection.execute(
            "SELECT started_at, ended_at, last_sample_at FROM signal_streams WHERE id = %s FOR NO KEY UPDATE",
            (stream_id,),
        )
        row = await cursor.fetchone()
        if row is None:
            raise ConfigError(f"no stream {stream_id}", hint="`wardlink cloud stream list` shows them")
        started_at, ended_at, last_sample_at = row
        if ended_at is not None:
            raise RefusedError(f"stream {stream_id} was closed at {ended_at.isoformat()}")
        if at is not None and at < started_at:
            raise RefusedError(f"stream {stream_id} began at {started_at.isoformat()}, after {at.isoformat()}")
        if at is not None and last_sample_at is not None and last_sample_at >= at:
            raise RefusedError(
                f"stream {stream_id} has samples up to {last_sample_at.isoformat()}", hint="give a later --at, or none"
            )
        end: datetime = max(at or await _now(connection), started_at)
        await connection.execute("UPDATE signal_streams SET ended_at = %s WHERE id = %s", (end, stream_id))
        await record_act(connection, "stream.close", id=stream_id, at=end)
    return end


async def find_open_stream(connection: Connection, serial: str, signal: str) -> UUID:
    """The open stream of a device's signal. Raises `ConfigError`."""
    device_id, _ = await device_row(connection, serial)
    type_id = await signal_type_id(connection, signal)
    cursor = await connection.execute(
        "SELECT id FROM signal_streams WHERE device_id = %s AND signal_type_id = %s AND ended_at IS NULL",
        (device_id, type_id),
    )
    row = await cursor.fetchone()
    if row is None:
        raise ConfigError(f"device {serial!r} has no open stream of {signal}", hint="`wardlink cloud stream list`")
    found: UUID = row[0]
    return found


async def list_streams(
    connection: Connection, *, serial: str | None = None, open_only: bool = False, limit: int = 200
) -> Rows:
    """Streams, the newest first."""
    if serial is not None:
        await device_row(connection, serial)
    return await rows_of(
        connection,
        "SELECT s.id, d.serial AS device, t.code AS signal, p.code AS patient, s.sample_rate_hz, s.started_at, "
        "s.ended_at, s.last_sample_at, s.point_count, s.opened_by FROM signal_streams s "
        "JOIN devices d ON d.id = s.device_id JOIN signal_types t ON t.id = s.signal_type_id "
        "JOIN patients p ON p.id = s.patient_id "
        "WHERE (%(serial)s::text IS NULL OR d.serial = %(serial)s) AND (s.ended_at IS NULL OR NOT %(open)s) "
        "ORDER BY s.started_at DESC, s.id LIMIT %(limit)s",
        {"serial": serial, "open": open_only, "limit": limit},
    )


@contextmanager
def _as_typed(what: str) -> Iterator[None]:
    """What a check of the schema refuses was typed by the operator: say what, and what is allowed."""
    try:
        yield
    except (psycopg.errors.CheckViolation, psycopg.DataError):
        raise ConfigError(f"{what} cannot be used", hint=_ALLOWED) from None


async def add_binding(
    connection: Connection,
    stream_id: UUID,
    *,
    bucket: str,
    measurement: str | None = None,
    influx_org: str | None = None,
    retention_hint: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> int:
    """One more place for a stream's points from now on; `measurement` is the signal's code where not given."""
    async with connection.transaction():
        with _as_typed(f"binding to bucket {bucket!r}, measurement {measurement!r}"):
            cursor = await connection.execute(
                "INSERT INTO timeseries_binding (stream_id, influx_org, influx_bucket, measurement, retention_hint) "
                "SELECT s.id, %s, %s, coalesce(%s, t.code), %s FROM signal_streams s "
                "JOIN signal_types t ON t.id = s.signal_type_id WHERE s.id = %s ON CONFLICT DO NOTHING RETURNING id",
                (influx_org, bucket, measurement, retention_hint, stream_id),
            )
        row = await cursor.fetchone()
        if row is None:
            known = await connection.execute("SELECT FROM signal_streams WHERE id = %s", (stream_id,))
            if known.rowcount:
                raise RefusedError(f"stream {stream_id} has that binding already", hint="`wardlink cloud binding list`")
            raise ConfigError(f"no stream {stream_id}", hint="`wardlink cloud stream list` shows them")
        binding_id = int(row[0])
        for key, value in (tags or {}).items():
            await _insert_tag(connection, binding_id, key, value)
        await record_act(
            connection, "binding.add", id=binding_id, stream=stream_id, bucket=bucket, tags=dict(tags or {})
        )
    return binding_id


async def add_tag(connection: Connection, binding_id: int, key: str, value: str) -> None:
    """Set a tag of a binding, for points from now on. Raises `ConfigError` for a key that wardlink itself uses."""
    async with connection.transaction():
        known = await connection.execute("SELECT FROM timeseries_binding WHERE id = %s", (binding_id,))
        if not known.rowcount:
            raise ConfigError(f"no binding {binding_id}", hint="`wardlink cloud binding list` shows them")
        await _insert_tag(connection, binding_id, key, value)
        await record_act(connection, "binding.tag", id=binding_id, key=key, value=value)


async def _insert_tag(connection: Connection, binding_id: int, key: str, value: str) -> None:
    with _as_typed(f"tag {key!r} = {value!r}"):
        await connection.execute(
            "INSERT INTO timeseries_binding_tag (binding_id, tag_key, tag_value) VALUES (%s, %s, %s) "
            "ON CONFLICT (binding_id, tag_key) DO UPDATE SET tag_value = excluded.tag_value",
            (binding_id, key, value),
        )


async def list_bindings(connection: Connection, *, serial: str | None = None, limit: int = 200) -> Rows:
    """Bindings, those of the newest streams first."""
    if serial is not None:
        await device_row(connection, serial)
    return await rows_of(
        connection,
        "SELECT b.id, d.serial AS device, t.code AS signal, b.influx_org, b.influx_bucket, b.measurement, "
        "b.retention_hint, (SELECT string_agg(g.tag_key || '=' || g.tag_value, ',' ORDER BY g.tag_key) "
        "FROM timeseries_binding_tag g WHERE g.binding_id = b.id) AS tags, b.stream_id "
        "FROM timeseries_binding b JOIN signal_streams s ON s.id = b.stream_id JOIN devices d ON d.id = s.device_id "
        "JOIN signal_types t ON t.id = s.signal_type_id WHERE %(serial)s::text IS NULL OR d.serial = %(serial)s "
        "ORDER BY s.started_at DESC, b.id LIMIT %(limit)s",
        {"serial": serial, "limit": limit},
    )


async def add_template(
    connection: Connection,
    org: str,
    signal: str,
    *,
    bucket: str,
    measurement: str | None = None,
    influx_org: str | None = None,
    retention_hint: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> None:
    """What new streams of an organisation's signal are bound to, one row each place; set again, it is replaced."""
    async with connection.transaction():
        org_id = await organization_id(connection, org)
        type_id = await signal_type_id(connection, signal)
        with _as_typed(f"template for {signal}, bucket {bucket!r}, tags {dict(tags or {})}"):
            await connection.execute(
                "INSERT INTO binding_templates (org_id, signal_type_id, influx_org, influx_bucket, measurement, "
                "retention_hint, tags) VALUES (%s, %s, %s, %s, %s, %s, %s) "
                "ON CONFLICT (org_id, signal_type_id, influx_bucket, measurement) DO UPDATE SET "
                "influx_org = excluded.influx_org, retention_hint = excluded.retention_hint, tags = excluded.tags",
                (org_id, type_id, influx_org, bucket, measurement or signal, retention_hint, Jsonb(dict(tags or {}))),
            )
        await record_act(connection, "template.add", org=org, signal=signal, bucket=bucket, measurement=measurement)


async def list_templates(connection: Connection, org: str | None = None) -> Rows:
    if org is not None:
        await organization_id(connection, org)
    return await rows_of(
        connection,
        "SELECT o.code AS org, t.code AS signal, b.influx_org, b.influx_bucket, b.measurement, b.retention_hint, "
        "b.tags FROM binding_templates b JOIN organizations o ON o.id = b.org_id "
        "JOIN signal_types t ON t.id = b.signal_type_id "
        "WHERE %(org)s::text IS NULL OR o.code = %(org)s ORDER BY 1, 2, b.id",
        {"org": org},
    )
