"""The schema itself: names and types of the data model, and every constraint bites."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import timedelta

import pytest

from cloud_sync.registry.database import Database
from gateway.errors import RefusedError

DATA_MODEL = {
    "organizations": {"id": "uuid", "code": "text", "name": "text"},
    "patients": {"id": "uuid", "org_id": "uuid", "code": "text"},
    "device_types": {"id": "integer", "code": "text", "description": "text"},
    "signal_types": {"id": "integer", "code": "text", "unit": "text", "loinc": "text", "mdc": "text"},
    "devices": {
        "id": "uuid",
        "org_id": "uuid",
        "serial": "character varying(80)",
        "brand": "text",
        "model": "character varying(80)",
        "device_type_id": "integer",
        "owner_patient_id": "uuid",
        "registered_at": "timestamp with time zone",
        "active": "boolean",
        "last_seen_at": "timestamp with time zone",
        "gateway_id": "text",
        "battery_pct": "smallint",
        "firmware": "text",
    },
    "signal_streams": {
        "id": "uuid",
        "patient_id": "uuid",
        "device_id": "uuid",
        "signal_type_id": "integer",
        "sample_rate_hz": "numeric(10,3)",
        "started_at": "timestamp with time zone",
        "ended_at": "timestamp with time zone",
        "last_sample_at": "timestamp with time zone",
        "point_count": "bigint",
        "opened_by": "text",
    },
    "timeseries_binding": {
        "id": "bigint",
        "stream_id": "uuid",
        "influx_org": "character varying(120)",
        "influx_bucket": "character varying(120)",
        "measurement": "character varying(120)",
        "retention_hint": "character varying(60)",
        "created_at": "timestamp with time zone",
    },
    "timeseries_binding_tag": {
        "id": "bigint",
        "binding_id": "bigint",
        "tag_key": "character varying(120)",
        "tag_value": "character varying(240)",
    },
}


async def test_tables_are_those_of_the_data_model(registry: Database) -> None:
    async with registry.connection() as connection:
        cursor = await connection.execute(
            "SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod) FROM pg_attribute a "
            "JOIN pg_class c ON c.oid = a.attrelid WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' "
            "AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum"
        )
        columns = await cursor.fetchall()
    tables: dict[str, dict[str, str]] = {}
    for table, column, kind in columns:
        tables.setdefault(table, {})[column] = kind
    assert {name: tables[name] for name in DATA_MODEL} == DATA_MODEL
    assert [(table, column) for table, column, kind in columns if kind == "timestamp without time zone"] == []


async def test_reference_rows(registry: Database) -> None:
    async with registry.connection() as connection:
        devices = await (await connection.execute("SELECT code FROM device_types ORDER BY id")).fetchall()
        signals = await (
            await connection.execute("SELECT code, unit, loinc, mdc FROM signal_types ORDER BY id")
        ).fetchall()
    assert [code for (code,) in devices] == [
        "eeg_headset",
        "pulse_oximeter",
        "bp_monitor",
        "thermometer",
        "hr_strap",
        "gps",
    ]
    assert signals == [
        ("vital_signs", None, None, None),
        ("brain_state", "1", None, None),
        ("eeg", "uV", None, None),
        ("ecg", "uV", None, "131328"),
        ("ppg", None, None, "150452"),
        ("acceleration", "[g]", None, None),
        ("gyro", "deg/s", None, None),
        ("optics", "1", None, None),
        ("aux", "1", None, None),
    ]


STREAM = (
    "INSERT INTO signal_streams (device_id, patient_id, signal_type_id, started_at, ended_at) "
    "SELECT d.id, p.id, t.id, {start}, {end} FROM devices d, patients p, signal_types t "
    "WHERE d.serial = 'CYTON-1' AND p.code = 'A' AND t.code = '{signal}'"
)
GAP = (
    "INSERT INTO stream_gaps (device_serial, signal, gateway_id, outcome, cause, first_at, last_at, sample_count) "
    "VALUES ('x', 'eeg', 'g', NULL, {})"
)
TAG = (
    "INSERT INTO timeseries_binding_tag (binding_id, tag_key, tag_value) "
    "SELECT b.id, {} FROM timeseries_binding b WHERE b.measurement = 'eeg'"
)
TEMPLATE = (
    "INSERT INTO binding_templates (org_id, signal_type_id, influx_bucket, measurement, tags) "
    "SELECT o.id, t.id, 'b', 'm', {} FROM organizations o, signal_types t WHERE o.code = 'st-anna' AND t.code = 'eeg'"
)
PARKED = (
    "INSERT INTO parked_messages (device_serial, signal, epoch, sequence, gateway_id, topic, content_type, payload, "
    "first_at, last_at, sample_count, reason) VALUES ('x', 'eeg', 'e', {}, 'g', 't', 'c', '', {}, 'r')"
)
LETTER = "INSERT INTO dead_letters (topic, payload, reason, digest) VALUES ('t', '', 'r', {})"
DAY = "'2024-05-01 {:02}:00Z'"

REFUSED = {
    "organisation twice": "INSERT INTO organizations (code, name) VALUES ('st-anna', 'x')",
    "organisation with a space": "INSERT INTO organizations (code, name) VALUES ('st anna', 'x')",
    "organisation without name": "INSERT INTO organizations (code, name) VALUES ('x', '')",
    "patient twice": "INSERT INTO patients (org_id, code) SELECT org_id, code FROM patients WHERE code = 'A'",
    "patient of nowhere": "INSERT INTO patients (org_id, code) VALUES (gen_random_uuid(), 'C')",
    "device twice": "INSERT INTO devices (org_id, serial, device_type_id) SELECT org_id, serial, 1 FROM devices",
    "device of no type": "INSERT INTO devices (org_id, serial, device_type_id) SELECT org_id, 'y', 99 FROM devices",
    "serial too long": "INSERT INTO devices (org_id, serial, device_type_id) "
    "SELECT org_id, repeat('x', 81), 1 FROM devices",
    "battery over 100": "UPDATE devices SET battery_pct = 101",
    "owner of another tenant": "UPDATE devices SET owner_patient_id = (SELECT id FROM patients WHERE code = 'Z')",
    "worn device changes tenant": "UPDATE devices SET owner_patient_id = NULL, "
    "org_id = (SELECT id FROM organizations WHERE code = 'other')",
    "stream of another tenant": STREAM.replace("'A'", "'Z'").format(start="now()", end="NULL", signal="ppg"),
    "two open streams": STREAM.format(start=DAY.format(20), end="NULL", signal="eeg"),
    "stream into an open one": STREAM.format(start=DAY.format(14), end=DAY.format(15), signal="eeg"),
    "stream over a closed one": STREAM.format(start=DAY.format(8), end=DAY.format(10), signal="eeg"),
    "stream inside a closed one": STREAM.format(start="'2024-05-01 09:10Z'", end="'2024-05-01 09:11Z'", signal="eeg"),
    "stream that ends before it starts": STREAM.format(start=DAY.format(8), end=DAY.format(7), signal="eeg"),
    "stream from -infinity": STREAM.format(start="'-infinity'", end="NULL", signal="ppg"),
    "stream to infinity": STREAM.format(start="now()", end="'infinity'", signal="ppg"),
    "rate of nothing": "UPDATE signal_streams SET sample_rate_hz = 0",
    "negative count": "UPDATE signal_streams SET point_count = -1",
    "opened by a stranger": "UPDATE signal_streams SET opened_by = 'me'",
    "counted stream deleted": "DELETE FROM signal_streams WHERE point_count > 0",
    "binding twice": "INSERT INTO timeseries_binding (stream_id, influx_bucket, measurement) "
    "SELECT stream_id, influx_bucket, measurement FROM timeseries_binding",
    "binding without bucket": "UPDATE timeseries_binding SET influx_bucket = NULL",
    "binding with an empty bucket": "UPDATE timeseries_binding SET influx_bucket = ''",
    "measurement with a line break": "UPDATE timeseries_binding SET measurement = E'a\\nb'",
    "tag twice": TAG.format("'location', 'ICU-2'"),
    "tag without value": TAG.format("'x', ''"),
    "tag with a line break": TAG.format("'x', E'a\\nb'"),
    "template that shadows": TEMPLATE.format("""'{"org_id": "x"}'"""),
    "template with a number": TEMPLATE.format("""'{"x": 1}'"""),
    "template with a list": TEMPLATE.format("'[]'"),
    "owners at one time": "INSERT INTO device_owners (device_id, patient_id, valid_from) "
    "SELECT device_id, patient_id, now() FROM device_owners",
    "gap of unknown cause": GAP.format("'gremlins', now(), now(), 1"),
    "gap that ends before it starts": GAP.format("'radio', now(), now() - interval '1 s', 1"),
    "gap of nothing": GAP.format("'radio', now(), now(), 0"),
    "gap that is closed without an outcome": "INSERT INTO stream_gaps (device_serial, signal, gateway_id, cause, "
    "first_at, last_at, sample_count, closed_at, outcome) "
    "VALUES ('x', 'eeg', 'g', 'shed', now(), now(), 1, now(), NULL)",
    "gap that is open with an outcome": "INSERT INTO stream_gaps (device_serial, signal, gateway_id, cause, "
    "first_at, last_at, sample_count, outcome) VALUES ('x', 'eeg', 'g', 'shed', now(), now(), 1, 'arrived')",
    "ledger with a negative sequence": "INSERT INTO ledger (device_serial, signal, epoch, gateway_id, committed) "
    "VALUES ('x', 'eeg', 'e', 'g', '{[-1,2)}')",
    "parked twice": PARKED.format("1", "now(), now(), 1"),
    "parked out of order": PARKED.format("2", "now(), now() - interval '1 s', 1"),
    "parked nothing": PARKED.format("3", "now(), now(), 0"),
    "letter without digest": LETTER.format("''"),
    "letter that waits already": LETTER.format("sha256('1')"),
    "alert that is open already": "INSERT INTO alerts (kind, subject) VALUES ('parked_data', 'x')",
    "audit changed": "UPDATE audit SET who = 'nobody'",
    "audit deleted": "DELETE FROM audit",
    "audit emptied": "TRUNCATE audit",
}
FIXED = ["patient_id", "device_id", "stream_id", "org_id", "signal_type", "user_id", "session_id"]
for key in [*FIXED, "Patient_ID", "time", "_measurement"]:
    REFUSED[f"tag {key}"] = TAG.format(f"'{key}', 'x'")


@pytest.fixture
async def filled(ward):
    """A ward with two streams, a binding with a tag, and one row of everything else."""
    await ward.run("INSERT INTO organizations (code, name) VALUES ('other', 'Other')")
    await ward.run("INSERT INTO patients (org_id, code) SELECT id, 'Z' FROM organizations WHERE code = 'other'")
    await ward.run(STREAM.format(start=DAY.format(9), end=DAY.format(12), signal="eeg"))
    await ward.run("UPDATE signal_streams SET point_count = 10")
    await ward.run(STREAM.format(start=DAY.format(13), end="NULL", signal="eeg"))
    await ward.run(
        "INSERT INTO timeseries_binding (stream_id, influx_bucket, measurement) "
        "SELECT id, 'b', 'eeg' FROM signal_streams WHERE ended_at IS NULL"
    )
    await ward.run(TAG.format("'location', 'ICU-1'"))
    await ward.run(PARKED.format("1", "now(), now(), 1"))
    await ward.run(LETTER.format("sha256('1')"))
    await ward.run("INSERT INTO alerts (kind, subject) VALUES ('parked_data', 'x')")
    return ward


async def test_every_constraint_bites(filled) -> None:
    accepted = []
    for what, statement in REFUSED.items():
        with suppress(RefusedError):
            await filled.run(statement)
            accepted.append(what)
    assert accepted == []


async def test_what_the_constraints_allow(filled) -> None:
    await filled.run(STREAM.format(start=DAY.format(12), end=DAY.format(13), signal="eeg"))  # touches both neighbours
    await filled.run(STREAM.format(start=DAY.format(10), end=DAY.format(10), signal="eeg"))  # an emptied period
    await filled.run(STREAM.format(start=DAY.format(10), end="NULL", signal="ecg"))  # another signal
    await filled.run(TAG.format("'priority', 'high'"))
    await filled.run(TEMPLATE.format("""'{"location": "ICU-1"}'"""))
    await filled.run("UPDATE alerts SET closed_at = now()")
    await filled.run("INSERT INTO alerts (kind, subject) VALUES ('parked_data', 'x')")
    await filled.run("UPDATE dead_letters SET redriven_at = now()")
    await filled.run(LETTER.format("sha256('1')"))
    await filled.run("DELETE FROM signal_streams WHERE point_count = 0")


async def test_owners_are_kept(ward) -> None:
    await ward.run("UPDATE devices SET owner_patient_id = %s", ward.patients["B"])
    await ward.run("UPDATE devices SET owner_patient_id = NULL")
    await ward.run("UPDATE devices SET owner_patient_id = %s", ward.patients["A"])
    history = await ward.rows(
        "SELECT p.code, valid_from = '-infinity', valid_to IS NULL FROM device_owners o "
        "JOIN patients p ON p.id = o.patient_id ORDER BY valid_from"
    )
    assert history == [("A", True, False), ("B", False, False), ("A", False, True)]
    assert await ward.value(
        "SELECT bool_and(before.valid_to <= after.valid_from) FROM device_owners before JOIN device_owners after "
        "ON after.id = before.id + 1"
    )


async def test_two_changes_of_owner_in_one_transaction_leave_the_last(ward) -> None:
    async with ward.database.transaction() as connection:
        for code in ("B", "A", "B"):
            await connection.execute("UPDATE devices SET owner_patient_id = %s", (ward.patients[code],))
    history = await ward.rows(
        "SELECT p.code, valid_to IS NULL FROM device_owners o JOIN patients p ON p.id = o.patient_id "
        "ORDER BY valid_from"
    )
    assert history == [("A", False), ("B", True)]


async def test_change_of_owner_ends_the_streams_of_others(ward) -> None:
    hour = timedelta(hours=1)
    past = await ward.stream(ward.noon - 2 * hour, ward.noon - hour)
    running = await ward.stream(ward.noon, None)
    later = await ward.stream(ward.noon + 2 * hour, ward.noon + 3 * hour, signal="ppg")
    own = await ward.stream(ward.noon + 2 * hour, None, signal="ecg", patient="B")
    async with ward.database.transaction() as connection:
        await connection.execute("SELECT set_config('wardlink.owner_since', %s, true)", (str(ward.noon + hour),))
        await connection.execute("UPDATE devices SET owner_patient_id = %s", (ward.patients["B"],))
    ends = dict(await ward.rows("SELECT id, ended_at FROM signal_streams"))
    assert ends == {past: ward.noon - hour, running: ward.noon + hour, later: ward.noon + 2 * hour, own: None}


async def test_gaps_find_their_device_and_stream_afterwards(ward) -> None:
    await ward.run(GAP.replace("'x'", "'LATE'").format(f"'radio', {DAY.format(10)}, {DAY.format(10)}, 5"))
    await ward.run(
        "INSERT INTO devices (serial, org_id, device_type_id, owner_patient_id) "
        "SELECT 'LATE', org_id, 1, owner_patient_id FROM devices"
    )
    assert await ward.value("SELECT d.serial FROM stream_gaps g JOIN devices d ON d.id = g.device_id") == "LATE"
    await ward.run(STREAM.replace("CYTON-1", "LATE").format(start=DAY.format(11), end="NULL", signal="eeg"))
    assert await ward.value("SELECT stream_id FROM stream_gaps") is None
    await ward.run("UPDATE signal_streams SET started_at = %s", ward.noon - timedelta(hours=3))
    assert await ward.value("SELECT stream_id = (SELECT id FROM signal_streams) FROM stream_gaps")


async def test_listeners_are_told_of_bindings_and_not_of_counts(ward) -> None:
    told: list[str] = []

    async def next_until(mark: str) -> list[str]:
        await ward.run("SELECT pg_notify('wardlink_bindings', %s)", mark)
        told.clear()
        async for payload in listening:
            if payload == mark:
                return list(told)
            told.append(payload)
        raise AssertionError("unreachable")

    async with asyncio.timeout(20):
        listening = ward.database.listen("wardlink_bindings")
        assert await anext(listening) == ""
        expected = ["CYTON-1"]
        stream = await ward.stream(ward.noon, None)
        assert await next_until("stream") == expected
        await ward.run("UPDATE signal_streams SET point_count = 5, last_sample_at = now()")
        await ward.run("UPDATE devices SET last_seen_at = now(), battery_pct = 5, gateway_id = 'g'")
        assert await next_until("counts") == []
        await ward.run(
            "INSERT INTO timeseries_binding (stream_id, influx_bucket, measurement) VALUES (%s, 'b', 'eeg')", stream
        )
        assert await next_until("binding") == expected
        await ward.run(TAG.format("'location', 'ICU-1'"))
        assert await next_until("tag") == expected
        await ward.run("UPDATE devices SET owner_patient_id = NULL")
        assert await next_until("owner") == expected
        await ward.run("UPDATE devices SET serial = 'CYTON-2'")
        assert await next_until("serial") == ["CYTON-1", "CYTON-2"]
        await ward.run("DELETE FROM timeseries_binding")
        assert set(await next_until("deleted")) <= {"*", "CYTON-2"}
        await ward.run("UPDATE signal_types SET code = 'eeg2' WHERE code = 'eeg'")
        assert await next_until("signal type") == ["*"]
        await listening.aclose()
