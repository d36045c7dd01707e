"""Registering a ward: organisations, patients (pseudonyms only), devices and who wears them; and what a device reports.

Every act of an operator is one transaction with its line in `audit`. What the bridge reports on its own (battery,
newest gateway) is not an act; a changed firmware or model is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias
from uuid import UUID

from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from cloud_sync.registry.database import Connection
from cloud_sync.registry.entries import short, storable, storable_json
from cloud_sync.registry.streams import lock_device
from gateway.errors import ConfigError, RefusedError

Rows: TypeAlias = list[dict[str, Any]]
"""Rows for a table, column name to value."""

CODE_LENGTH_MAX = 80
MODEL_LENGTH_MAX = 80
LISTED_MAX = 20
"""How many existing names an error lists."""
FUTURE_MAX = timedelta(minutes=1)
"""How far the operator's clock may be ahead of the server's."""

_CODE = re.compile(r"[!-~]+")


async def record_act(connection: Connection, what: str, **detail: object) -> None:
    """One line in `audit`, within the transaction of the act."""
    await connection.execute(
        "INSERT INTO audit (what, detail) VALUES (%s, %s)",
        (what, Jsonb({name: value if isinstance(value, bool | int | None) else str(value)
                      for name, value in detail.items()})),
    )  # fmt: skip


async def rows_of(connection: Connection, query: str, parameters: Mapping[str, object] | None = None) -> Rows:
    """The rows of a query as dictionaries."""
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(query.encode(), parameters)
        return await cursor.fetchall()


def checked_code(text: str, what: str) -> str:
    """A code that fits a tag, a topic and a table. Raises `ConfigError`."""
    if len(text) > CODE_LENGTH_MAX or _CODE.fullmatch(text) is None:
        raise ConfigError(
            f"{what} {text!r} cannot be used", hint=f"1 to {CODE_LENGTH_MAX} visible ASCII characters, no spaces"
        )
    return text


def checked_time(at: datetime | None, what: str) -> datetime | None:
    """A time that is not in the future. Raises `ConfigError`."""
    if at is not None and at > datetime.now(UTC) + FUTURE_MAX:
        raise ConfigError(f"{what} {at.isoformat()} is in the future", hint="give it when it has happened")
    return at


async def _id_of(connection: Connection, query: bytes, parameters: tuple[object, ...]) -> Any:
    row = await (await connection.execute(query, parameters)).fetchone()
    return None if row is None else row[0]


async def _unknown(connection: Connection, what: str, code: str, query: bytes, *parameters: object) -> ConfigError:
    cursor = await connection.execute(query + b" ORDER BY 1 LIMIT %s", (*parameters, LISTED_MAX + 1))
    known = [str(row[0]) for row in await cursor.fetchall()]
    more = ", …" if len(known) > LISTED_MAX else ""
    hint = f"there are: {', '.join(known[:LISTED_MAX])}{more}" if known else "there is none yet"
    return ConfigError(f"no {what} {code!r}", hint=hint)


async def organization_id(connection: Connection, code: str) -> UUID:
    """Raises `ConfigError` that lists what exists."""
    found: UUID | None = await _id_of(connection, b"SELECT id FROM organizations WHERE code = %s", (code,))
    if found is None:
        raise await _unknown(connection, "organisation", code, b"SELECT code FROM organizations")
    return found


async def patient_id(connection: Connection, org_id: UUID, code: str) -> UUID:
    """Raises `ConfigError` that lists what exists."""
    found: UUID | None = await _id_of(
        connection, b"SELECT id FROM patients WHERE org_id = %s AND code = %s", (org_id, code)
    )
    if found is None:
        raise await _unknown(connection, "patient", code, b"SELECT code FROM patients WHERE org_id = %s", org_id)
    return found


async def device_row(connection: Connection, serial: str) -> tuple[UUID, UUID]:
    """(device id, organisation id). Raises `ConfigError` that lists what exists."""
    cursor = await connection.execute("SELECT id, org_id FROM devices WHERE serial = %s", (serial,))
    row = await cursor.fetchone()
    if row is None:
        raise await _unknown(connection, "device", serial, b"SELECT serial FROM devices")
    return row[0], row[1]


async def signal_type_id(connection: Connection, code: str) -> int:
    """Raises `ConfigError` that lists what exists."""
    found: int | None = await _id_of(connection, b"SELECT id FROM signal_types WHERE code = %s", (code,))
    if found is None:
        raise await _unknown(connection, "signal type", code, b"SELECT code FROM signal_types")
    return found


async def add_organization(connection: Connection, code: str, name: str = "") -> UUID:
    """Raises `RefusedError` where it exists."""
    checked_code(code, "organisation")
    async with connection.transaction():
        made: UUID | None = await _id_of(
            connection,
            b"INSERT INTO organizations (code, name) VALUES (%s, %s) ON CONFLICT DO NOTHING RETURNING id",
            (code, storable(name or code)),
        )
        if made is None:
            raise RefusedError(f"organisation {code!r} exists already")
        await record_act(connection, "organization.add", code=code, id=made)
    return made


async def list_organizations(connection: Connection) -> Rows:
    return await rows_of(
        connection,
        "SELECT o.code, o.name, (SELECT count(*) FROM patients WHERE org_id = o.id) AS patients, "
        "(SELECT count(*) FROM devices WHERE org_id = o.id) AS devices, o.id FROM organizations o ORDER BY o.code",
    )


async def add_patient(connection: Connection, org: str, code: str) -> UUID:
    """`code` is a pseudonym. Raises `ConfigError` for an unknown organisation, `RefusedError` where it exists."""
    checked_code(code, "patient")
    async with connection.transaction():
        org_id = await organization_id(connection, org)
        made: UUID | None = await _id_of(
            connection,
            b"INSERT INTO patients (org_id, code) VALUES (%s, %s) ON CONFLICT DO NOTHING RETURNING id",
            (org_id, code),
        )
        if made is None:
            raise RefusedError(f"patient {code!r} exists already in organisation {org!r}")
        await record_act(connection, "patient.add", org=org, code=code, id=made)
    return made


async def list_patients(connection: Connection, org: str | None = None) -> Rows:
    if org is not None:
        await organization_id(connection, org)
    return await rows_of(
        connection,
        "SELECT o.code AS org, p.code, (SELECT string_agg(d.serial, ', ' ORDER BY d.serial) FROM devices d "
        "WHERE d.owner_patient_id = p.id) AS wears, p.id FROM patients p JOIN organizations o ON o.id = p.org_id "
        "WHERE %(org)s::text IS NULL OR o.code = %(org)s ORDER BY 1, 2",
        {"org": org},
    )


async def add_device(
    connection: Connection,
    serial: str,
    *,
    org: str,
    device_type: str,
    patient: str | None = None,
    brand: str | None = None,
    model: str | None = None,
    since: datetime | None = None,
    create: bool = False,
) -> UUID:
    """Register a device, and the patient who wears it: since ever, where `since` is not given.

    `create` also makes an organisation and a patient that do not exist. Raises `ConfigError`, `RefusedError`.
    """
    checked_code(serial, "serial")
    if model is not None and len(model) > MODEL_LENGTH_MAX:
        raise ConfigError(f"model {model!r} is too long", hint=f"at most {MODEL_LENGTH_MAX} characters")
    async with connection.transaction():
        if create:
            await _create_missing(connection, org, patient)
        org_id = await organization_id(connection, org)
        owner = None if patient is None else await patient_id(connection, org_id, patient)
        type_id = await _id_of(connection, b"SELECT id FROM device_types WHERE code = %s", (device_type,))
        if type_id is None:
            raise await _unknown(connection, "device type", device_type, b"SELECT code FROM device_types")
        await _tell_since(connection, checked_time(since, "--since"))
        made: UUID | None = await _id_of(
            connection,
            b"INSERT INTO devices (serial, org_id, device_type_id, owner_patient_id, brand, model) "
            b"VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING RETURNING id",
            (serial, org_id, type_id, owner, brand, model),
        )
        if made is None:
            raise RefusedError(f"device {serial!r} exists already", hint="`wardlink cloud device assign` gives it on")
        await record_act(
            connection, "device.add", serial=serial, org=org, type=device_type, patient=patient, since=since, id=made
        )
    return made


async def _create_missing(connection: Connection, org: str, patient: str | None) -> None:
    known = await _id_of(connection, b"SELECT id FROM organizations WHERE code = %s", (org,))
    if known is None:
        known = await add_organization(connection, org)
    if patient is not None and not await _id_of(
        connection, b"SELECT id FROM patients WHERE org_id = %s AND code = %s", (known, patient)
    ):
        await add_patient(connection, org, patient)


async def _tell_since(connection: Connection, since: datetime | None) -> None:
    """Tell the trigger that keeps `device_owners`, for this transaction, when the change was."""
    await connection.execute(
        "SELECT set_config('wardlink.owner_since', %s, true)", ("" if since is None else since.isoformat(),)
    )


async def assign_device(
    connection: Connection,
    serial: str,
    patient: str | None,
    *,
    since: datetime | None = None,
    keep_stored: bool = False,
) -> None:
    """Give a device to a patient of its organisation, or (None) to nobody, from `since` or from now on.

    Streams of whoever wore it before end there. Where samples after `since` are already stored for somebody else,
    raises `RefusedError`, unless `keep_stored` says that they shall stay as they are. Raises `ConfigError`.
    """
    checked_time(since, "--since")
    async with connection.transaction():
        device_id, org_id = await device_row(connection, serial)
        await lock_device(connection, device_id)
        owner = None if patient is None else await patient_id(connection, org_id, patient)
        current = await _id_of(connection, b"SELECT owner_patient_id FROM devices WHERE id = %s", (device_id,))
        if current == owner:
            raise RefusedError(f"device {serial!r} is worn by {patient or 'nobody'} already")
        if since is not None and not keep_stored:
            await _refuse_stored(connection, device_id, owner, since)
        await _tell_since(connection, since)
        await connection.execute("UPDATE devices SET owner_patient_id = %s WHERE id = %s", (owner, device_id))
        await record_act(
            connection, "device.assign", serial=serial, patient=patient, since=since, keep_stored=keep_stored
        )


async def _refuse_stored(connection: Connection, device_id: UUID, owner: UUID | None, since: datetime) -> None:
    cursor = await connection.execute(
        "SELECT p.code, max(s.last_sample_at) FROM signal_streams s JOIN patients p ON p.id = s.patient_id "
        "WHERE s.device_id = %s AND s.patient_id IS DISTINCT FROM %s AND s.last_sample_at >= %s "
        "GROUP BY p.code ORDER BY 2 DESC LIMIT 1",
        (device_id, owner, since),
    )
    row = await cursor.fetchone()
    if row is not None:
        raise RefusedError(
            f"samples up to {row[1].isoformat()} are already stored for patient {row[0]}",
            hint="give a later --since, or --keep-stored to leave them there",
        )


async def list_devices(connection: Connection, org: str | None = None) -> Rows:
    if org is not None:
        await organization_id(connection, org)
    return await rows_of(
        connection,
        "SELECT d.serial, o.code AS org, t.code AS type, p.code AS patient, d.brand, d.model, d.firmware, "
        "d.battery_pct, d.gateway_id, d.last_seen_at, d.active, d.id FROM devices d "
        "JOIN organizations o ON o.id = d.org_id "
        "JOIN device_types t ON t.id = d.device_type_id LEFT JOIN patients p ON p.id = d.owner_patient_id "
        "WHERE %(org)s::text IS NULL OR o.code = %(org)s ORDER BY d.serial",
        {"org": org},
    )


async def update_device_facts(
    connection: Connection,
    serial: str,
    *,
    model: str | None = None,
    firmware: str | None = None,
    battery_pct: float | None = None,
    gateway_id: str | None = None,
) -> bool:
    """Keep what a device reports of itself; None leaves a fact as it is. False where the device is unknown."""
    facts = {
        "serial": serial,
        "model": None if model is None else storable(model)[:MODEL_LENGTH_MAX],
        "firmware": None if firmware is None else short(firmware),
        "battery": round(battery_pct) if battery_pct is not None and 0 <= battery_pct <= 100 else None,
        "gateway": None if gateway_id is None else short(gateway_id),
    }
    async with connection.transaction():
        cursor = await connection.execute(
            "SELECT id, model, firmware FROM devices WHERE serial = %(serial)s FOR NO KEY UPDATE", facts
        )
        row = await cursor.fetchone()
        if row is None:
            return False
        await connection.execute(
            "UPDATE devices SET model = coalesce(%(model)s, model), firmware = coalesce(%(firmware)s, firmware), "
            "battery_pct = coalesce(%(battery)s, battery_pct), gateway_id = coalesce(%(gateway)s, gateway_id) "
            "WHERE serial = %(serial)s AND (model, firmware, battery_pct, gateway_id) IS DISTINCT FROM "
            "(coalesce(%(model)s, model), coalesce(%(firmware)s, firmware), coalesce(%(battery)s, battery_pct), "
            "coalesce(%(gateway)s, gateway_id))",
            facts,
        )
        changed = {
            name: facts[name]
            for name, old in (("model", row[1]), ("firmware", row[2]))
            if facts[name] not in (None, old)
        }
        if changed:
            await record_act(connection, "device.facts", serial=serial, **changed)
    return True


async def update_gateway_status(connection: Connection, gateway_id: str, status: Mapping[str, object]) -> None:
    """Keep a gateway's newest status as it reported it."""
    await connection.execute(
        "INSERT INTO gateways (id, status) VALUES (%s, %s) "
        "ON CONFLICT (id) DO UPDATE SET last_seen_at = now(), status = excluded.status",
        (short(gateway_id), Jsonb(storable_json(status))),
    )
