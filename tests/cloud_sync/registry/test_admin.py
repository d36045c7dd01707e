"""What an operator and the bridge may do to the registry, what is refused, and that every act is on record."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest

from cloud_sync.registry import admin, stream_admin
from cloud_sync.registry.binding_rows import resolve
from cloud_sync.registry.ledger import Batch, BlockCommit, BlockKey, Part, commit
from gateway.errors import ConfigError, RefusedError

HOUR = timedelta(hours=1)


@pytest.fixture
async def connection(ward):
    async with ward.database.connection() as opened:
        yield opened


async def store(connection, ward, at: datetime) -> None:
    """One sample of CYTON-1 at a time, bound and counted."""
    time_ns = int(at.timestamp()) * ward.second_ns
    (period,) = (await resolve(connection, "CYTON-1", "eeg", time_ns, time_ns)).periods
    part = Part(period.stream_id, 1, time_ns, time_ns)
    key = BlockKey("CYTON-1", "eeg", str(uuid4()))
    await commit(connection, Batch(blocks=[BlockCommit("gw-1", key, 0, (part,))]))


async def test_unknown_names_list_what_exists(connection) -> None:
    cases = [
        (admin.add_patient(connection, "nowhere", "C"), "no organisation 'nowhere'", "there are: st-anna"),
        (admin.assign_device(connection, "CYTON-9", "A"), "no device 'CYTON-9'", "there are: CYTON-1"),
        (admin.assign_device(connection, "CYTON-1", "Z"), "no patient 'Z'", "there are: A, B"),
        (
            stream_admin.open_stream(connection, "CYTON-1", "smell"),
            "no signal type 'smell'",
            "brain_state, ecg, eeg",
        ),
        (
            admin.add_device(connection, "X", org="st-anna", device_type="toaster"),
            "no device type 'toaster'",
            "bp_monitor",
        ),
        (stream_admin.close_stream(connection, uuid4()), "no stream", "stream list"),
        (stream_admin.add_tag(connection, 99, "a", "b"), "no binding 99", "binding list"),
        (stream_admin.add_binding(connection, uuid4(), bucket="b"), "no stream", "stream list"),
        (stream_admin.find_open_stream(connection, "CYTON-1", "eeg"), "no open stream of eeg", "stream list"),
    ]
    for act, said, hint in cases:
        with pytest.raises(ConfigError, match=said) as caught:
            await act
        assert hint in caught.value.hint


async def test_first_names_say_that_there_is_none_yet(registry) -> None:
    async with registry.connection() as connection:
        with pytest.raises(ConfigError) as caught:
            await admin.add_patient(connection, "nowhere", "C")
    assert caught.value.hint == "there is none yet"


@pytest.mark.parametrize("code", ["", "a b", "a\0", "ä", "x" * 81, "a\n"])
async def test_codes_that_fit_no_tag_are_refused(connection, code: str) -> None:
    for act in (
        admin.add_organization(connection, code),
        admin.add_patient(connection, "st-anna", code),
        admin.add_device(connection, code, org="st-anna", device_type="gps"),
    ):
        with pytest.raises(ConfigError, match="cannot be used"):
            await act


async def test_what_exists_is_not_made_twice(connection) -> None:
    for act in (
        admin.add_organization(connection, "st-anna"),
        admin.add_patient(connection, "st-anna", "A"),
        admin.add_device(connection, "CYTON-1", org="st-anna", device_type="eeg_headset"),
    ):
        with pytest.raises(RefusedError, match="exists already"):
            await act


async def test_device_makes_what_is_missing_only_when_told(connection, ward) -> None:
    new = {"org": "new-ward", "device_type": "hr_strap", "patient": "P-1"}
    with pytest.raises(ConfigError, match="no organisation 'new-ward'"):
        await admin.add_device(connection, "AA:BB", **new)
    await admin.add_device(connection, "AA:BB", **new, create=True)
    await admin.add_device(connection, "AA:CC", **{**new, "patient": "P-2"}, create=True)
    rows = await admin.list_devices(connection, "new-ward")
    assert [(row["serial"], row["patient"], row["type"]) for row in rows] == [
        *(("AA:BB", "P-1", "hr_strap"), ("AA:CC", "P-2", "hr_strap"))
    ]
    with pytest.raises(RefusedError, match="exists already"):
        await admin.add_device(connection, "AA:BB", org="third", device_type="gps", create=True)
    assert await ward.value("SELECT count(*) FROM organizations WHERE code = 'third'") == 0, "all or nothing"


async def test_device_worn_since_a_time_was_not_worn_before(connection, ward) -> None:
    await admin.add_device(connection, "X", org="st-anna", device_type="gps", patient="A", since=ward.noon)
    assert await ward.value("SELECT valid_from FROM device_owners ORDER BY id DESC LIMIT 1") == ward.noon


async def test_assign_in_the_past_ends_the_stream_there(connection, ward) -> None:
    await store(connection, ward, ward.noon)
    await admin.assign_device(connection, "CYTON-1", "B", since=ward.noon + HOUR)
    assert await ward.value("SELECT ended_at FROM signal_streams") == ward.noon + HOUR


async def test_assign_over_stored_samples_needs_a_word(connection, ward) -> None:
    await store(connection, ward, ward.noon)
    with pytest.raises(RefusedError, match="already stored for patient A") as caught:
        await admin.assign_device(connection, "CYTON-1", "B", since=ward.noon)
    assert "--keep-stored" in caught.value.hint
    await admin.assign_device(connection, "CYTON-1", "B", since=ward.noon, keep_stored=True)
    assert await ward.rows("SELECT started_at = ended_at, point_count FROM signal_streams") == [(True, 1)]
    await store(connection, ward, ward.noon)
    assert (
        await ward.value(
            "SELECT p.code FROM signal_streams s JOIN patients p ON p.id = s.patient_id WHERE ended_at IS NULL"
        )
        == "B"
    )


async def assign_anew(ward, patient: str, since: datetime) -> None:
    async with ward.database.connection() as connection:
        await admin.assign_device(connection, "CYTON-1", patient, since=since)


async def test_assign_before_the_last_change_or_to_the_same_or_in_the_future(connection, ward) -> None:
    await admin.assign_device(connection, "CYTON-1", "B", since=ward.noon)
    with pytest.raises(RefusedError, match="last changed at 2024-05-01 12:00:00"):
        await assign_anew(ward, "A", ward.noon - HOUR)
    with pytest.raises(RefusedError, match="worn by B already"):
        await admin.assign_device(connection, "CYTON-1", "B")
    with pytest.raises(ConfigError, match="in the future"):
        await admin.assign_device(connection, "CYTON-1", "A", since=datetime.now(UTC) + HOUR)
    await admin.assign_device(connection, "CYTON-1", None)
    with pytest.raises(RefusedError, match="worn by nobody already"):
        await admin.assign_device(connection, "CYTON-1", None)


async def test_since_is_forgotten_after_its_transaction(connection, ward) -> None:
    await admin.assign_device(connection, "CYTON-1", "B", since=ward.noon)
    await admin.assign_device(connection, "CYTON-1", "A")
    assert await ward.value("SELECT now() - max(valid_from) < interval '1 min' FROM device_owners")


async def test_operators_stream_takes_over_from_the_default_one(connection, ward) -> None:
    await store(connection, ward, ward.noon)
    with pytest.raises(RefusedError, match="already stored in stream"):
        await stream_admin.open_stream(connection, "CYTON-1", "eeg", since=ward.noon)
    stream = await stream_admin.open_stream(connection, "CYTON-1", "eeg", since=ward.noon + HOUR, sample_rate_hz=250)
    rows = await ward.rows("SELECT opened_by, started_at, ended_at FROM signal_streams ORDER BY started_at")
    assert rows == [*(("default", ward.noon, ward.noon + HOUR), ("operator", ward.noon + HOUR, None))]
    assert await ward.value("SELECT measurement FROM timeseries_binding WHERE stream_id = %s", stream) == "eeg"
    with pytest.raises(RefusedError, match="stands in the way") as caught:
        await stream_admin.open_stream(connection, "CYTON-1", "eeg")
    assert f"stream close {stream}" in caught.value.hint
    assert await stream_admin.find_open_stream(connection, "CYTON-1", "eeg") == stream


async def test_stream_is_opened_for_whoever_wears_the_device_then(connection, ward) -> None:
    await admin.assign_device(connection, "CYTON-1", None, since=ward.noon)
    with pytest.raises(ConfigError, match="nobody wears device"):
        await stream_admin.open_stream(connection, "CYTON-1", "eeg")
    await stream_admin.open_stream(connection, "CYTON-1", "eeg", patient="B")
    with pytest.raises(RefusedError, match="worn by somebody else than B"):
        await stream_admin.open_stream(connection, "CYTON-1", "ecg", patient="B", since=ward.noon - HOUR)
    await stream_admin.open_stream(connection, "CYTON-1", "ecg", since=ward.noon - HOUR)
    who = await ward.rows(
        "SELECT t.code, p.code FROM signal_streams s JOIN patients p ON p.id = s.patient_id "
        "JOIN signal_types t ON t.id = s.signal_type_id ORDER BY 1"
    )
    assert who == [("ecg", "A"), ("eeg", "B")]


async def test_closing_a_stream(connection, ward) -> None:
    stream = await stream_admin.open_stream(connection, "CYTON-1", "eeg", since=ward.noon)
    await store(connection, ward, ward.noon + HOUR)
    with pytest.raises(RefusedError, match="has samples up to 2024-05-01T13:00:00"):
        await stream_admin.close_stream(connection, stream, at=ward.noon + HOUR)
    with pytest.raises(RefusedError, match="began at"):
        await stream_admin.close_stream(connection, stream, at=ward.noon - HOUR)
    assert await stream_admin.close_stream(connection, stream, at=ward.noon + 2 * HOUR) == ward.noon + 2 * HOUR
    with pytest.raises(RefusedError, match="was closed at"):
        await stream_admin.close_stream(connection, stream)
    await store(connection, ward, ward.noon + 3 * HOUR)
    rows = await stream_admin.list_streams(connection, serial="CYTON-1")
    assert [(row["opened_by"], row["point_count"]) for row in rows] == [("default", 1), ("operator", 1)]
    assert len(await stream_admin.list_streams(connection, open_only=True)) == 1


async def test_bindings_and_tags(connection, ward) -> None:
    stream = await stream_admin.open_stream(connection, "CYTON-1", "eeg", since=ward.noon)
    binding = await stream_admin.add_binding(connection, stream, bucket="raw", tags={"location": "ICU-5"})
    await stream_admin.add_tag(connection, binding, "priority", "high")
    await stream_admin.add_tag(connection, binding, "location", "ICU-6")
    rows = await stream_admin.list_bindings(connection, serial="CYTON-1")
    assert [(row["influx_bucket"], row["measurement"], row["tags"]) for row in rows] == [
        *(("wardlink", "eeg", None), ("raw", "eeg", "location=ICU-6,priority=high"))
    ]
    with pytest.raises(RefusedError, match="has that binding already"):
        await stream_admin.add_binding(connection, stream, bucket="raw")
    for key, value in (("patient_id", "x"), ("_field", "x"), ("a\n", "x"), ("a", "\0"), ("a", "x" * 241)):
        with pytest.raises(ConfigError, match="cannot be used") as caught:
            await stream_admin.add_tag(connection, binding, key, value)
        assert "belong to wardlink" in caught.value.hint
        with pytest.raises(ConfigError, match="cannot be used"):
            await stream_admin.add_template(connection, "st-anna", "ppg", bucket="b", tags={key: value})
    assert await stream_admin.list_templates(connection) == []


async def test_template_is_replaced_not_doubled(connection) -> None:
    for tags in ({"a": "1"}, {"b": "2"}):
        await stream_admin.add_template(connection, "st-anna", "eeg", bucket="raw", tags=tags)
    (row,) = await stream_admin.list_templates(connection, "st-anna")
    assert (row["measurement"], row["tags"]) == ("eeg", {"b": "2"})


async def test_facts_of_a_device(connection, ward) -> None:
    facts = {"model": "Cyton" * 30, "firmware": "3.1.2\0", "battery_pct": 81.6, "gateway_id": "gw-1"}
    assert await admin.update_device_facts(connection, "CYTON-1", **facts)
    assert await admin.update_device_facts(connection, "CYTON-1", battery_pct=250, firmware="3.1.2\0")
    assert await ward.rows("SELECT model, firmware, battery_pct, gateway_id FROM devices") == [
        ("Cyton" * 16, "3.1.2\ufffd", 82, "gw-1")
    ]
    assert not await admin.update_device_facts(connection, "NEVER-SEEN", battery_pct=1)
    assert await ward.value("SELECT count(*) FROM audit WHERE what = 'device.facts'") == 1


async def test_status_of_a_gateway_may_be_anything_json_can_say(connection, ward) -> None:
    await admin.update_gateway_status(connection, "gw-1", {"up": True})
    odd = {"nan": float("nan"), "zero": "\0", "list": [1, None, "\ud800"], "deep": {"x": 2**70}}
    await admin.update_gateway_status(connection, "gw-1", odd)
    assert await ward.rows("SELECT id, status FROM gateways") == [
        ("gw-1", {"nan": None, "zero": "\ufffd", "list": [1, None, "?"], "deep": {"x": 2**70}})
    ]


async def test_every_act_is_on_record(connection, ward) -> None:
    await admin.assign_device(connection, "CYTON-1", "B")
    stream = await stream_admin.open_stream(connection, "CYTON-1", "eeg")
    binding = await stream_admin.add_binding(connection, stream, bucket="b")
    await stream_admin.add_tag(connection, binding, "location", "ICU")
    await stream_admin.add_template(connection, "st-anna", "eeg", bucket="b")
    await stream_admin.close_stream(connection, stream)
    with pytest.raises(RefusedError):
        await stream_admin.close_stream(connection, stream)
    acts = await ward.rows(
        "SELECT what, who = current_user, now() - \"when\" < interval '1 min' FROM audit ORDER BY id"
    )
    assert [what for what, _, _ in acts] == [
        *("organization.add", "patient.add", "patient.add", "device.add", "device.assign", "stream.open"),
        *("binding.add", "binding.tag", "template.add", "stream.close"),
    ]
    assert all(who and recent for _, who, recent in acts)
    detail = await ward.value("SELECT detail FROM audit WHERE what = 'device.assign'")
    assert detail == {"serial": "CYTON-1", "patient": "B", "since": None, "keep_stored": False}
