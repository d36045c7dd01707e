"""`wardlink cloud …`: the schema, and registering a ward without SQL.

Owns arguments, tables and hints; what is done, and whether it may be, is the registry's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any
from uuid import UUID

from cloud_sync.registry import admin, books, letters, migrations, stream_admin
from cloud_sync.registry.database import Connection, Database
from gateway.errors import EXIT_OK, ConfigError, RefusedError
from wardlink import gap_commands, letter_commands
from wardlink.admin_commands import ROWS_MAX, Group, Subparsers, command, limit, moment, rate, say, say_list, tag

SHOWN_MAX = 5
"""Sequences that an error names."""


def add_commands(subparsers: Subparsers, common: argparse.ArgumentParser) -> None:
    """Add the commands below `wardlink cloud`; each sets `admin` to its handler, run as `handler(args, conninfo)`."""
    _add_schema(subparsers, common)
    _add_organizations(subparsers, common)
    _add_devices(subparsers, common)
    _add_streams(subparsers, common)
    _add_bindings(subparsers, common)
    letter_commands.add_commands(subparsers, common)
    gap_commands.add_commands(subparsers, common)


# --- schema


def _add_schema(subparsers: Subparsers, common: argparse.ArgumentParser) -> None:
    command(subparsers, common, "migrate", _migrate, "bring the database's schema up to this version", "migrate")
    command(subparsers, common, "status", _status, "show the schema's state and what waits", "status", "status --json")
    command(
        subparsers,
        common,
        "verify",
        _verify,
        "check that the schema is this version's, unchanged, and that the ledger adds up",
        "verify",
    )


_MIGRATION_COLUMNS = ("version", "name", "sha256", "applied_at")


def _migration_rows(states: Sequence[migrations.MigrationState], args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = [asdict(state) for state in states]
    if not args.json:
        for row in rows:
            row["sha256"] = row["sha256"][:12]
            row["applied_at"] = row["applied_at"] or "pending"
    return rows


async def _migrate(args: argparse.Namespace, conninfo: str) -> int:
    database = Database(conninfo, pool_size=1)
    applied = await migrations.migrate(database)
    title = f"applied now: {len(applied)}" if applied else "nothing to do, the schema is up to date"
    return say(args, _MIGRATION_COLUMNS, _migration_rows(applied, args), title)


async def _status(args: argparse.Namespace, conninfo: str) -> int:
    async with Database(conninfo, pool_size=1) as database:
        states = await migrations.status(database)
        pending = any(state.applied_at is None for state in states)
        waiting: dict[str, Any] = {}
        if not pending:
            async with database.connection() as connection:
                waiting = asdict(await letters.counts(connection))
    rows = _migration_rows(states, args)
    if args.json:
        return say(args, (), [{"migrations": rows, "pending": pending, **waiting}])
    say(args, _MIGRATION_COLUMNS, rows, "migrations")
    if waiting:
        say(args, tuple(waiting), [waiting], "now")
    return EXIT_OK


async def _verify(args: argparse.Namespace, conninfo: str) -> int:
    async with Database(conninfo, pool_size=1) as database:
        states = await migrations.verify(database)
        async with database.connection() as connection:
            wrong = await books.inconsistent(connection)
    say(args, _MIGRATION_COLUMNS, _migration_rows(states, args), "all applied and unchanged")
    if wrong:
        raise RefusedError(
            f"the ledger contradicts itself for {len(wrong)} of its sequences: {', '.join(wrong[:SHOWN_MAX])}",
            hint="committed, lost and missing sequences do not add up: was the table changed by hand?",
        )
    return EXIT_OK


# --- organisations and patients


def _add_organizations(subparsers: Subparsers, common: argparse.ArgumentParser) -> None:
    group = Group(subparsers, common, "org", "organisations: tenants, kept apart from each other")
    parser = group.add("add", _org_add, "register an organisation", 'org add st-anna --name "St. Anna, ward 5"')
    parser.add_argument("code", metavar="CODE", help="short name, used by all other commands")
    parser.add_argument("--name", default="", help="full name (default: the code)")
    group.add("list", _org_list, "list organisations", "org list")

    group = Group(subparsers, common, "patient", "patients: pseudonyms only, never a name or a birth date")
    parser = group.add("add", _patient_add, "register a patient", "patient add P-0001 --org st-anna")
    parser.add_argument("code", metavar="CODE", help="pseudonym, unique within the organisation")
    parser.add_argument("--org", required=True, metavar="CODE", help="organisation")
    parser = group.add("list", _patient_list, "list patients", "patient list", "patient list --org st-anna --json")
    parser.add_argument("--org", metavar="CODE", help="of this organisation only")


async def _org_add(args: argparse.Namespace, connection: Connection) -> int:
    made = await admin.add_organization(connection, args.code, args.name)
    return say(args, ("code", "id"), [{"code": args.code, "id": made}], "organisation added")


async def _org_list(args: argparse.Namespace, connection: Connection) -> int:
    rows = await admin.list_organizations(connection)
    return say_list(args, rows, "code name patients devices id", "organisations")


async def _patient_add(args: argparse.Namespace, connection: Connection) -> int:
    made = await admin.add_patient(connection, args.org, args.code)
    return say(args, ("org", "code", "id"), [{"org": args.org, "code": args.code, "id": made}], "patient added")


async def _patient_list(args: argparse.Namespace, connection: Connection) -> int:
    return say_list(args, await admin.list_patients(connection, args.org), "org code wears id", "patients")


# --- devices


def _add_devices(subparsers: Subparsers, common: argparse.ArgumentParser) -> None:
    group = Group(subparsers, common, "device", "devices and who wears them")
    parser = group.add(
        "add",
        _device_add,
        "register a device; data that was parked for it is then written",
        "device add CYTON-0042 --org st-anna --type eeg_headset --patient P-0001",
        "device add AA:BB:CC:DD:EE:FF --org st-anna --type hr_strap --patient P-0001 --create",
    )
    parser.add_argument("serial", metavar="SERIAL", help="as the gateway names the device")
    parser.add_argument("--org", required=True, metavar="CODE", help="organisation that owns it")
    parser.add_argument("--type", required=True, dest="device_type", metavar="TYPE", help="eeg_headset, hr_strap, …")
    parser.add_argument("--patient", metavar="CODE", help="who wears it")
    parser.add_argument("--since", type=moment, metavar="TIME", help="worn since then (default: since ever)")
    parser.add_argument("--brand", help="maker")
    parser.add_argument("--model", help="model (the device's own report replaces it)")
    parser.add_argument("--create", action="store_true", help="make the organisation and the patient if they are new")

    parser = group.add("list", _device_list, "list devices", "device list", "device list --org st-anna --json")
    parser.add_argument("--org", metavar="CODE", help="of this organisation only")

    parser = group.add(
        "assign",
        _device_assign,
        "give a device to another patient, or to nobody",
        "device assign CYTON-0042 --patient P-0002",
        "device assign CYTON-0042 --patient P-0002 --since 2025-03-01T14:30:00Z",
        "device assign CYTON-0042 --nobody",
    )
    parser.add_argument("serial", metavar="SERIAL")
    wearer = parser.add_mutually_exclusive_group(required=True)
    wearer.add_argument("--patient", metavar="CODE", help="who wears it from then on")
    wearer.add_argument("--nobody", action="store_true", help="nobody does; its data is parked")
    parser.add_argument("--since", type=moment, metavar="TIME", help="since then (default: now)")
    parser.add_argument(
        "--keep-stored", action="store_true", help="accept that samples after --since that are stored stay as they are"
    )


async def _device_add(args: argparse.Namespace, connection: Connection) -> int:
    made = await admin.add_device(
        connection,
        args.serial,
        org=args.org,
        device_type=args.device_type,
        patient=args.patient,
        brand=args.brand,
        model=args.model,
        since=args.since,
        create=args.create,
    )
    row = {"serial": args.serial, "org": args.org, "patient": args.patient, "id": made}
    return say(args, tuple(row), [row], "device added")


async def _device_list(args: argparse.Namespace, connection: Connection) -> int:
    rows = await admin.list_devices(connection, args.org)
    columns = "serial org type patient brand model firmware battery_pct gateway_id last_seen_at active id"
    return say_list(args, rows, columns, "devices")


async def _device_assign(args: argparse.Namespace, connection: Connection) -> int:
    await admin.assign_device(connection, args.serial, args.patient, since=args.since, keep_stored=args.keep_stored)
    row = {"serial": args.serial, "patient": args.patient, "since": args.since}
    return say(args, tuple(row), [row], "device assigned")


# --- streams


def _add_streams(subparsers: Subparsers, common: argparse.ArgumentParser) -> None:
    group = Group(subparsers, common, "stream", "monitoring sessions: one signal of one device on one patient")
    parser = group.add(
        "open",
        _stream_open,
        "open a stream for whoever wears the device",
        "stream open CYTON-0042 --signal eeg",
        "stream open CYTON-0042 --signal eeg --since 2025-03-01T14:30:00Z --rate 250",
    )
    parser.add_argument("serial", metavar="SERIAL")
    parser.add_argument("--signal", required=True, metavar="SIGNAL", help="eeg, brain_state, vital_signs, …")
    parser.add_argument("--patient", metavar="CODE", help="needed only where nobody wears the device")
    parser.add_argument("--since", type=moment, metavar="TIME", help="from then on (default: now)")
    parser.add_argument("--rate", type=rate, metavar="HZ", help="sampling rate (default: as the data has it)")

    parser = group.add(
        "close",
        _stream_close,
        "close an open stream; later samples open a new one while the device is worn",
        "stream close 6f1d3c1e-…",
        "stream close CYTON-0042 --signal eeg",
    )
    parser.add_argument("stream", metavar="STREAM|SERIAL", help="id of the stream, or serial of the device")
    parser.add_argument("--signal", metavar="SIGNAL", help="with a serial: which signal")
    parser.add_argument("--at", type=moment, metavar="TIME", help="when it ended (default: now)")

    parser = group.add("list", _stream_list, "list streams, newest first", "stream list --open")
    parser.add_argument("--device", metavar="SERIAL", help="of this device only")
    parser.add_argument("--open", action="store_true", help="open ones only")
    parser.add_argument("--limit", type=limit, default=ROWS_MAX, help="rows at most (default: %(default)s)")


async def _stream_open(args: argparse.Namespace, connection: Connection) -> int:
    made = await stream_admin.open_stream(
        connection, args.serial, args.signal, patient=args.patient, since=args.since, sample_rate_hz=args.rate
    )
    row = {"device": args.serial, "signal": args.signal, "id": made}
    return say(args, tuple(row), [row], "stream opened")


async def _stream_close(args: argparse.Namespace, connection: Connection) -> int:
    stream_id = await _stream_of(connection, args.stream, args.signal)
    ended_at = await stream_admin.close_stream(connection, stream_id, at=args.at)
    return say(args, ("id", "ended_at"), [{"id": stream_id, "ended_at": ended_at}], "stream closed")


async def _stream_of(connection: Connection, text: str, signal: str | None) -> UUID:
    if signal is not None:
        return await stream_admin.find_open_stream(connection, text, signal)
    try:
        return UUID(text)
    except ValueError:
        raise ConfigError(
            f"{text!r} is no stream id", hint="with a serial, name the signal too: --signal eeg"
        ) from None


async def _stream_list(args: argparse.Namespace, connection: Connection) -> int:
    rows = await stream_admin.list_streams(connection, serial=args.device, open_only=args.open, limit=args.limit)
    columns = "device signal patient sample_rate_hz started_at ended_at last_sample_at point_count opened_by id"
    return say_list(args, rows, columns, "streams")


# --- bindings


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bucket", required=True, help="InfluxDB bucket (1.x: database)")
    parser.add_argument("--measurement", help="default: the signal's name")
    parser.add_argument("--influx-org", help="InfluxDB organisation (default: the store's)")
    parser.add_argument("--retention", metavar="TEXT", help="how long points are meant to be kept, for people")
    parser.add_argument("--tag", type=tag, action="append", default=[], metavar="KEY=VALUE", help="may be repeated")


def _add_bindings(subparsers: Subparsers, common: argparse.ArgumentParser) -> None:
    group = Group(subparsers, common, "binding", "where a stream's points go, and their extra tags")
    parser = group.add(
        "add",
        _binding_add,
        "write a stream's points to one more place, from now on",
        "binding add CYTON-0042 --signal eeg --bucket raw_30d",
        "binding add 6f1d3c1e-… --bucket research --tag location=ICU-Room-5 --tag priority=high",
    )
    parser.add_argument("stream", metavar="STREAM|SERIAL", help="id of the stream, or serial of the device")
    parser.add_argument("--signal", metavar="SIGNAL", help="with a serial: which signal's open stream")
    _add_place(parser)
    parser = group.add("tag", _binding_tag, "set a tag of a binding, from now on", "binding tag 12 location=ICU-Room-5")
    parser.add_argument("binding", type=int, metavar="BINDING", help="id, see `binding list`")
    parser.add_argument("tag", type=tag, metavar="KEY=VALUE")
    parser = group.add("list", _binding_list, "list bindings, newest streams first", "binding list --device CYTON-0042")
    parser.add_argument("--device", metavar="SERIAL", help="of this device only")
    parser.add_argument("--limit", type=limit, default=ROWS_MAX, help="rows at most (default: %(default)s)")

    group = Group(subparsers, common, "template", "what new streams of an organisation are bound to")
    parser = group.add(
        "add",
        _template_add,
        "add a place, or replace its tags; streams that are open already stay as they are",
        "template add --org st-anna --signal vital_signs --bucket vitals --tag location=ICU",
    )
    parser.add_argument("--org", required=True, metavar="CODE", help="organisation")
    parser.add_argument("--signal", required=True, metavar="SIGNAL")
    _add_place(parser)
    parser = group.add("list", _template_list, "list templates", "template list --org st-anna")
    parser.add_argument("--org", metavar="CODE", help="of this organisation only")


async def _binding_add(args: argparse.Namespace, connection: Connection) -> int:
    stream_id = await _stream_of(connection, args.stream, args.signal)
    made = await stream_admin.add_binding(
        connection,
        stream_id,
        bucket=args.bucket,
        measurement=args.measurement,
        influx_org=args.influx_org,
        retention_hint=args.retention,
        tags=dict(args.tag),
    )
    row = {"id": made, "stream_id": stream_id, "influx_bucket": args.bucket}
    return say(args, tuple(row), [row], "binding added")


async def _binding_tag(args: argparse.Namespace, connection: Connection) -> int:
    key, value = args.tag
    await stream_admin.add_tag(connection, args.binding, key, value)
    row = {"binding": args.binding, "tag_key": key, "tag_value": value}
    return say(args, tuple(row), [row], "tag set")


async def _binding_list(args: argparse.Namespace, connection: Connection) -> int:
    rows = await stream_admin.list_bindings(connection, serial=args.device, limit=args.limit)
    columns = "id device signal influx_org influx_bucket measurement retention_hint tags stream_id"
    return say_list(args, rows, columns, "bindings")


async def _template_add(args: argparse.Namespace, connection: Connection) -> int:
    await stream_admin.add_template(
        connection,
        args.org,
        args.signal,
        bucket=args.bucket,
        measurement=args.measurement,
        influx_org=args.influx_org,
        retention_hint=args.retention,
        tags=dict(args.tag),
    )
    row = {"org": args.org, "signal": args.signal, "influx_bucket": args.bucket}
    return say(args, tuple(row), [row], "template set")


async def _template_list(args: argparse.Namespace, connection: Connection) -> int:
    rows = await stream_admin.list_templates(connection, args.org)
    return say_list(args, rows, "org signal influx_org influx_bucket measurement retention_hint tags", "templates")
