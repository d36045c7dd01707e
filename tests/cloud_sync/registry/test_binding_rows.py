"""The resolver: whose data it was at the time of the sample, and where it goes."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from cloud_sync.registry import admin, stream_admin
from cloud_sync.registry.binding_rows import (
    NO_BINDING,
    NO_OWNER,
    STREAMS_IN_SPAN,
    UNKNOWN_DEVICE,
    UNKNOWN_SIGNAL_TYPE,
    Resolution,
    resolve,
)

HOUR = timedelta(hours=1)


async def ask(ward, first_ns: int, last_ns: int, signal: str = "eeg", serial: str = "CYTON-1") -> Resolution:
    async with ward.database.connection() as connection:
        return await resolve(connection, serial, signal, first_ns, last_ns, 250.0)


async def assign(ward, patient: str | None, since) -> None:
    async with ward.database.connection() as connection:
        await admin.assign_device(connection, "CYTON-1", patient, since=since)


async def test_unknown_device_signal_and_owner(ward) -> None:
    at = ward.noon_ns
    assert await ask(ward, at, at, serial="NEVER-SEEN") == Resolution((), UNKNOWN_DEVICE)
    assert await ask(ward, at, at, signal="smell") == Resolution((), UNKNOWN_SIGNAL_TYPE)
    async with ward.database.connection() as connection:
        await admin.add_device(connection, "SPARE", org="st-anna", device_type="hr_strap")
    assert await ask(ward, at, at, serial="SPARE") == Resolution((), NO_OWNER)
    assert await ward.value("SELECT count(*) FROM signal_streams") == 0


async def test_default_stream_has_all_tags_and_the_default_place(ward) -> None:
    found = await ask(ward, ward.noon_ns, ward.noon_ns + ward.second_ns)
    assert found.unbound is None
    (period,) = found.periods
    assert (period.from_ns, period.to_ns, period.patient_id) == (ward.noon_ns, None, ward.patients["A"])
    (target,) = period.targets
    assert (target.influx_org, target.bucket, target.measurement) == ("", "wardlink", "eeg")
    assert target.tags == (
        ("device_id", str(ward.device_id)),
        ("org_id", str(ward.org_id)),
        ("patient_id", str(ward.patients["A"])),
        ("signal_type", "eeg"),
        ("stream_id", str(period.stream_id)),
    )
    row = await ward.rows("SELECT opened_by, sample_rate_hz::text, started_at FROM signal_streams")
    assert row == [("default", "250.000", ward.noon)]


async def test_template_of_the_organisation_binds_a_default_stream(ward) -> None:
    async with ward.database.connection() as connection:
        for bucket, tags in (("raw_30d", {"location": "ICU-5", "zone": "a"}), ("research", {})):
            await stream_admin.add_template(connection, "st-anna", "eeg", bucket=bucket, influx_org="clinic", tags=tags)
    (period,) = (await ask(ward, ward.noon_ns, ward.noon_ns)).periods
    raw, research = period.targets
    assert (raw.influx_org, raw.bucket, raw.measurement) == ("clinic", "raw_30d", "eeg")
    assert [key for key, _ in raw.tags] == [
        *("device_id", "location", "org_id", "patient_id", "signal_type", "stream_id", "zone")
    ]
    assert dict(raw.tags)["location"] == "ICU-5"
    assert (research.bucket, len(research.tags)) == ("research", 5)


async def test_resolving_again_changes_nothing(ward) -> None:
    first = await ask(ward, ward.noon_ns, ward.noon_ns + ward.second_ns)
    assert await ask(ward, ward.noon_ns, ward.noon_ns + ward.second_ns) == first
    assert await ask(ward, ward.noon_ns + 5 * ward.hour_ns, ward.noon_ns + 5 * ward.hour_ns) == first


async def test_yesterdays_data_after_the_move_carries_yesterdays_patient_and_stream(ward) -> None:
    (yesterday,) = (await ask(ward, ward.noon_ns, ward.noon_ns + ward.second_ns)).periods
    await assign(ward, "B", ward.noon + 24 * HOUR)
    (today,) = (await ask(ward, ward.noon_ns + 25 * ward.hour_ns, ward.noon_ns + 25 * ward.hour_ns)).periods
    assert (today.patient_id, today.from_ns) == (ward.patients["B"], ward.noon_ns + 25 * ward.hour_ns)

    (late,) = (await ask(ward, ward.noon_ns + ward.hour_ns, ward.noon_ns + ward.hour_ns)).periods
    assert (late.stream_id, late.patient_id) == (yesterday.stream_id, ward.patients["A"])
    assert dict(late.targets[0].tags)["patient_id"] == str(ward.patients["A"])
    assert late.to_ns == ward.noon_ns + 24 * ward.hour_ns


async def test_late_data_of_a_former_owner_without_a_stream_gets_one_inside_that_owners_time(ward) -> None:
    await assign(ward, "B", ward.noon)
    await ask(ward, ward.noon_ns + ward.hour_ns, ward.noon_ns + ward.hour_ns)
    (late,) = (await ask(ward, ward.noon_ns - ward.hour_ns, ward.noon_ns - ward.hour_ns)).periods
    assert (late.patient_id, late.from_ns, late.to_ns) == (
        *(ward.patients["A"], ward.noon_ns - ward.hour_ns, ward.noon_ns),
    )


async def test_block_across_the_change_of_owner_is_split_at_the_border(ward) -> None:
    await assign(ward, "B", ward.noon)
    found = await ask(ward, ward.noon_ns - 500, ward.noon_ns + 500)
    assert found.unbound is None
    before, after = found.periods
    assert (before.patient_id, before.to_ns) == (ward.patients["A"], ward.noon_ns)
    assert (after.patient_id, after.from_ns, after.to_ns) == (ward.patients["B"], ward.noon_ns, None)
    for time_ns in range(ward.noon_ns - 500, ward.noon_ns + 501):
        assert before.holds(time_ns) != after.holds(time_ns)
    assert before.from_ns == ward.noon_ns - 1000, "rounded down to the microsecond that holds the first sample"


async def test_part_without_owner_is_named_and_the_rest_is_bound(ward) -> None:
    await assign(ward, None, ward.noon)
    found = await ask(ward, ward.noon_ns - 1, ward.noon_ns)
    assert found.unbound == NO_OWNER
    (period,) = found.periods
    assert (period.patient_id, period.to_ns) == (ward.patients["A"], ward.noon_ns)
    assert (await ask(ward, ward.noon_ns, ward.noon_ns)) == Resolution((), NO_OWNER)


async def test_hole_between_two_owners_is_unbound(ward) -> None:
    await assign(ward, None, ward.noon)
    await assign(ward, "B", ward.noon + HOUR)
    found = await ask(ward, ward.noon_ns - 1, ward.noon_ns + ward.hour_ns)
    assert found.unbound == NO_OWNER
    assert [period.patient_id for period in found.periods] == [ward.patients["A"], ward.patients["B"]]


async def test_operators_streams_are_used_and_what_is_between_them_is_filled(ward) -> None:
    first = await ward.stream(ward.noon, ward.noon + HOUR)
    second = await ward.stream(ward.noon + 2 * HOUR, ward.noon + 3 * HOUR)
    await ward.run(
        "INSERT INTO timeseries_binding (stream_id, influx_bucket, measurement) "
        "SELECT id, 'b', 'eeg' FROM signal_streams"
    )
    found = await ask(ward, ward.noon_ns - ward.hour_ns, ward.noon_ns + 4 * ward.hour_ns)
    assert found.unbound is None
    hours = [(period.from_ns - ward.noon_ns) // ward.hour_ns for period in found.periods]
    assert hours == [-1, 0, 1, 2, 3]
    assert [period.stream_id for period in found.periods][1::2] == [first, second]
    ends = [period.to_ns for period in found.periods]
    assert ends[:-1] == [period.from_ns for period in found.periods[1:]]
    assert ends[-1] is None


async def test_stream_without_a_binding_is_unbound(ward) -> None:
    await ward.stream(ward.noon, None)
    assert await ask(ward, ward.noon_ns, ward.noon_ns) == Resolution((), NO_BINDING)


async def test_emptied_stream_is_not_seen(ward) -> None:
    await ward.stream(ward.noon, ward.noon)
    (period,) = (await ask(ward, ward.noon_ns - 1000, ward.noon_ns + 1000)).periods
    assert period.to_ns is None


async def test_emptied_stream_hides_none_that_runs(ward) -> None:
    (running,) = (await ask(ward, ward.noon_ns, ward.noon_ns)).periods
    await ward.stream(ward.noon + HOUR, ward.noon + HOUR)
    assert (await ask(ward, ward.noon_ns + 2 * ward.hour_ns, ward.noon_ns + 2 * ward.hour_ns)).periods == (running,)


async def test_start_of_another_patients_stream_does_not_move(ward) -> None:
    await ward.stream(ward.noon, None, by="default", patient="B")
    (late,) = (await ask(ward, ward.noon_ns - 1, ward.noon_ns - 1)).periods
    assert (late.patient_id, late.to_ns) == (ward.patients["A"], ward.noon_ns)


async def test_start_of_a_default_stream_moves_back_for_late_data(ward) -> None:
    (stream,) = (await ask(ward, ward.noon_ns, ward.noon_ns)).periods
    (late,) = (await ask(ward, ward.noon_ns - ward.hour_ns, ward.noon_ns - ward.hour_ns)).periods
    assert (late.stream_id, late.from_ns, late.to_ns) == (stream.stream_id, ward.noon_ns - ward.hour_ns, None)
    assert await ward.value("SELECT count(*) FROM signal_streams") == 1


async def test_start_of_an_operators_stream_does_not_move(ward) -> None:
    await ward.stream(ward.noon, None, by="operator")
    (late,) = (await ask(ward, ward.noon_ns - 1, ward.noon_ns - 1)).periods
    assert (late.from_ns, late.to_ns) == (ward.noon_ns - 1000, ward.noon_ns)


async def test_start_does_not_move_over_another_wear(ward) -> None:
    """A, nobody, A again: two wears, two streams."""
    await assign(ward, None, ward.noon)
    await assign(ward, "A", ward.noon + HOUR)
    (second,) = (await ask(ward, ward.noon_ns + 2 * ward.hour_ns, ward.noon_ns + 2 * ward.hour_ns)).periods
    (first,) = (await ask(ward, ward.noon_ns - 1000, ward.noon_ns - 1000)).periods
    assert first.stream_id != second.stream_id
    assert first.to_ns == ward.noon_ns
    (late,) = (await ask(ward, ward.noon_ns + ward.hour_ns, ward.noon_ns + ward.hour_ns)).periods
    assert (late.stream_id, late.from_ns) == (second.stream_id, ward.noon_ns + ward.hour_ns)


async def test_start_moves_back_no_further_than_the_stream_before(ward) -> None:
    before = await ward.stream(ward.noon - 2 * HOUR, ward.noon - HOUR, by="operator")
    await ward.run(
        "INSERT INTO timeseries_binding (stream_id, influx_bucket, measurement) VALUES (%s, 'b', 'm')", before
    )
    (stream,) = (await ask(ward, ward.noon_ns, ward.noon_ns)).periods
    first, second = (await ask(ward, ward.noon_ns - 2 * ward.hour_ns, ward.noon_ns)).periods
    assert (first.stream_id, second.stream_id) == (before, stream.stream_id)
    assert second.from_ns == first.to_ns == ward.noon_ns - ward.hour_ns


async def test_many_resolvers_at_once_open_one_stream(ward) -> None:
    spans = [(ward.noon_ns + hour * ward.hour_ns, ward.noon_ns + hour * ward.hour_ns + 5) for hour in range(-8, 8)]
    found = await asyncio.gather(*(ask(ward, *span) for span in spans * 2))
    streams = {period.stream_id for resolution in found for period in resolution.periods}
    assert len(streams) == 1
    assert await ward.rows("SELECT started_at, ended_at FROM signal_streams") == [(ward.noon - 8 * HOUR, None)]
    assert await ward.value("SELECT count(*) FROM timeseries_binding") == 1


async def test_owner_that_changes_while_streams_are_opened_leaves_no_stream_across_the_border(ward) -> None:
    await asyncio.gather(
        *(ask(ward, ward.noon_ns + n * ward.hour_ns, ward.noon_ns + n * ward.hour_ns) for n in range(-5, 5)),
        assign(ward, "B", ward.noon),
        *(ask(ward, ward.noon_ns + n * ward.hour_ns, ward.noon_ns + n * ward.hour_ns) for n in range(-5, 5)),
    )
    across = await ward.rows(
        "SELECT s.id FROM signal_streams s JOIN device_owners o ON o.device_id = s.device_id "
        "AND o.patient_id <> s.patient_id AND tstzrange(o.valid_from, o.valid_to) "
        "&& tstzrange(s.started_at, s.ended_at)"
    )
    assert across == []


@pytest.mark.parametrize("time_ns", [-(2**63), -1, 0, 2**63 - 1])
async def test_any_time_of_an_int64_can_be_bound(ward, time_ns: int) -> None:
    (period,) = (await ask(ward, time_ns, time_ns)).periods
    assert period.holds(time_ns)


async def test_resolver_uses_its_index_among_many_streams(ward) -> None:
    await ward.run(
        "INSERT INTO signal_streams (device_id, patient_id, signal_type_id, started_at, ended_at) "
        "SELECT %s, %s, t.id, %s + n * interval '1 minute', %s + (n + 1) * interval '1 minute' "
        "FROM generate_series(0, 9999) n, signal_types t WHERE t.code IN ('eeg', 'ppg')",
        *(ward.device_id, ward.patients["A"], ward.noon, ward.noon),
    )
    await ward.run("ANALYZE signal_streams")
    async with ward.database.connection() as connection:
        cursor = await connection.execute(
            b"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + STREAMS_IN_SPAN.encode(),
            {
                "device": ward.device_id,
                "signal": 3,
                "first": ward.noon + 5000 * timedelta(minutes=1),
                "stop": ward.noon + 5001 * timedelta(minutes=1),
            },
        )
        ((plans,),) = await cursor.fetchall()
    assert str(plans).count("'Index Name': 'signal_streams_resolver'") == 2
    assert plans[0]["Plan"]["Shared Hit Blocks"] + plans[0]["Plan"]["Shared Read Blocks"] < 30
