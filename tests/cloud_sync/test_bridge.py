"""From a published block to points, counts, acknowledgement and receipt, on real servers."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import cbor2
import numpy as np
import pytest

from cloud_sync.binding import Bindings
from cloud_sync.registry import admin, stream_admin
from gateway.samples import BRAIN_STATE_FIELDS, LossCause, LossRecord, SampleBlock
from gateway.wire import codec, topics
from gateway.wire.messages import DeviceMeta, ReceiptRequest, SignalMeta, Status, WantedRange

COUNTS = (
    "SELECT t.code, s.point_count, s.last_sample_at, s.sample_rate_hz::float, p.code FROM signal_streams s "
    "JOIN signal_types t ON t.id = s.signal_type_id JOIN patients p ON p.id = s.patient_id ORDER BY s.started_at"
)


def at(time_ns: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=time_ns // 1000)


async def test_a_block_becomes_points_with_all_tags_and_a_receipt(chain: Any) -> None:
    await chain.start()
    async with chain.gateway() as gateway:
        await gateway.send(chain.vitals(n=3), 0)
        await gateway.until_receipted("STRAP-1", "vital_signs", 0)
        points = await chain.points("vital_signs")
    tags = await chain.tags("STRAP-1", "vital_signs") | {"location": "ICU 5", "priority": "high"}
    step = 1000 * chain.ms
    assert points == [
        {"time": chain.noon_ns + k * step, "heart_rate": 60 + k, "temperature": 36.1 + 0.1 * k} | tags for k in range(3)
    ]
    assert [type(point["heart_rate"]) for point in points] == [int] * 3
    assert await chain.rows(COUNTS) == [("vital_signs", 3, at(chain.noon_ns + 2 * step), None, "A")]
    seen = await chain.value("SELECT last_seen_at FROM devices WHERE serial = 'STRAP-1'")
    assert seen == at(chain.noon_ns + 2 * step)


async def test_raw_eeg_is_exact_and_quality_is_an_integer(chain: Any) -> None:
    await chain.start()
    block: SampleBlock = chain.eeg()
    async with chain.gateway() as gateway:
        await gateway.send(block, 7)
        await gateway.until_receipted("CYTON-1", "eeg", 7)
        points = await chain.points("eeg")
    assert [point["time"] for point in points] == block.times_ns.tolist()
    for name in ("Fp1", "Fp2"):
        assert [point[name] for point in points] == block.physical(name).tolist()
    assert [point["quality"] for point in points] == block.columns["quality"].tolist()
    types = await asyncio.to_thread(chain.influx.query, "SHOW FIELD KEYS FROM eeg", chain.bucket)
    assert types[0]["values"] == [["Fp1", "float"], ["Fp2", "float"], ["quality", "integer"]]


async def test_brain_state_keeps_its_200_ms(chain: Any) -> None:
    await chain.start()
    times = chain.noon_ns + 200 * chain.ms * np.arange(10, dtype=np.int64)
    columns = {name: np.linspace(0.1, 0.9, 10) + k / 100 for k, name in enumerate(BRAIN_STATE_FIELDS)}
    block = SampleBlock("CYTON-1", "brain_state", times, columns, chain.vitals().clock)
    async with chain.gateway() as gateway:
        await gateway.send(block, 0)
        await gateway.until_receipted("CYTON-1", "brain_state", 0)
    points = await chain.points("brain_state")
    assert np.diff([point["time"] for point in points]).tolist() == [200 * chain.ms] * 9
    assert [point["plv"] for point in points] == columns["plv"].tolist()


async def test_a_value_that_is_missing_is_no_field_and_a_sample_without_values_no_point(chain: Any) -> None:
    await chain.start()
    block = chain.vitals(n=3)
    columns = {"heart_rate": np.array([60.0, np.nan, 62.0]), "spo2": np.array([98.0, np.nan, np.nan])}
    async with chain.gateway() as gateway:
        await gateway.send(SampleBlock("STRAP-1", "vital_signs", block.times_ns, columns, block.clock), 0)
        await gateway.until_receipted("STRAP-1", "vital_signs", 0)
    points = await chain.points("vital_signs")
    assert [(point["heart_rate"], point["spo2"]) for point in points] == [(60, 98), (62, None)]
    assert await chain.value("SELECT point_count FROM signal_streams") == 2


async def test_what_comes_again_changes_nothing_and_is_receipted_again(chain: Any) -> None:
    await chain.start()
    async with chain.gateway() as gateway:
        for _ in range(3):
            for sequence in (4, 2, 4):
                await gateway.send(chain.vitals(first_ns=chain.noon_ns + sequence * 10**10), sequence)
            await gateway.until_receipted("STRAP-1", "vital_signs", 2, 4)
            gateway.heard.clear()
    assert await chain.value("SELECT point_count FROM signal_streams") == 10
    assert len(await chain.points("vital_signs")) == 10
    assert await chain.value("SELECT committed::text FROM ledger") == "{[2,3),[4,5)}"


async def test_data_of_before_a_move_is_not_written_again_for_the_new_patient(chain: Any) -> None:
    await chain.start()
    moved_at = at(chain.noon_ns)
    block = chain.vitals(first_ns=chain.noon_ns + 10**12)
    async with chain.gateway() as gateway:
        await gateway.send(block, 0)
        await gateway.until_receipted("STRAP-1", "vital_signs", 0)
        async with chain.registry.connection() as connection:
            await admin.assign_device(connection, "STRAP-1", "B", since=moved_at, keep_stored=True)
        gateway.heard.clear()
        await gateway.send(block, 0)
        await gateway.until_receipted("STRAP-1", "vital_signs", 0)
    assert len({point["patient_id"] for point in await chain.points("vital_signs")}) == 1
    assert len(await chain.points("vital_signs")) == 5


async def test_yesterdays_data_after_the_device_moved(chain: Any) -> None:
    await chain.start()
    day = 86_400 * 10**9
    patients = dict(await chain.rows("SELECT code, id::text FROM patients"))
    async with chain.gateway() as gateway:
        await gateway.send(chain.vitals(), 0)
        await gateway.until_receipted("STRAP-1", "vital_signs", 0)
        async with chain.registry.connection() as connection:
            await admin.assign_device(connection, "STRAP-1", "B", since=at(chain.noon_ns + day))
        await gateway.send(chain.vitals(first_ns=chain.noon_ns + day + 10**9), 1)
        await gateway.until_receipted("STRAP-1", "vital_signs", 1)
        # late data: of yesterday, and a block in the middle of which the device moved
        await gateway.send(chain.vitals(first_ns=chain.noon_ns + 10**12), 2)
        await gateway.send(chain.vitals(first_ns=chain.noon_ns + day - 2 * 10**9 - 1, n=2), 3)
        await gateway.send(chain.vitals(first_ns=chain.noon_ns + 10 * day, device="CYTON-1"), 4)
        await gateway.until_receipted("STRAP-1", "vital_signs", 2, 3)
    points = await chain.points("vital_signs", "WHERE time < 1800000000000000000")
    of = {
        code: [p["time"] for p in points if p["patient_id"] == patients[code] and p["time"] < chain.noon_ns + 9 * day]
        for code in "AB"
    }
    assert len(of["A"]) == 5 + 5 + 2
    assert len(of["B"]) == 5
    assert max(of["A"]) < chain.noon_ns + day <= min(of["B"])
    streams = await chain.rows(
        "SELECT p.code, s.point_count FROM signal_streams s JOIN patients p ON p.id = s.patient_id "
        "JOIN devices d ON d.id = s.device_id WHERE d.serial = 'STRAP-1' ORDER BY s.started_at"
    )
    assert streams == [("A", 12), ("B", 5)]


async def test_a_block_across_a_move_is_cut_at_the_border(chain: Any) -> None:
    await chain.start()
    async with chain.registry.connection() as connection:
        await admin.assign_device(connection, "STRAP-1", "B", since=at(chain.noon_ns + 2 * 10**9))
    async with chain.gateway() as gateway:
        await gateway.send(chain.vitals(), 0)
        await gateway.until_receipted("STRAP-1", "vital_signs", 0)
    assert [row[1:5:3] for row in await chain.rows(COUNTS)] == [(2, "A"), (3, "B")]
    points = await chain.points("vital_signs")
    assert [point["heart_rate"] for point in points] == [60, 61, 62, 63, 64]
    assert len({point["stream_id"] for point in points[:2]} | {point["stream_id"] for point in points[2:]}) == 2


async def test_old_names_arrive_under_todays(chain: Any) -> None:
    await chain.start()
    message = {
        "v": 1, "schema": "patient_vitals", "gateway": "", "device": "STRAP-1", "signal": "patient_vitals",
        "epoch": "e1", "seq": 3, "clock": {"state": "synced", "error_ns": 1}, "n": 1, "t": [chain.noon_ns],
        "fields": {"body_temperature": [36.6], "heart_rate": [72]},
    }  # fmt: skip
    async with chain.gateway() as gateway:
        message["gateway"] = gateway.name
        topic = topics.data(gateway.name, "STRAP-1", "patient_vitals")
        await gateway.publish(topic, json.dumps(message).encode())
        await gateway.until_receipted("STRAP-1", "patient_vitals", 3)
    (point,) = await chain.points("vital_signs")
    assert (point["temperature"], point["heart_rate"], point["signal_type"]) == (36.6, 72, "vital_signs")
    assert await chain.rows("SELECT signal FROM ledger") == [("patient_vitals",)]


GARBAGE = [
    (b"", "application/json"),
    (b"\xff\x00garbage", "application/cbor"),
    (b'{"v":1,"schema":"nonsense"}', "application/json"),
    (b'{"v":99,"schema":"vital_signs"}', "application/json"),
    (cbor2.dumps({"v": 1, "schema": "raw", "n": 10**9}), "application/cbor"),
    (b"[" * 100_000, "application/json"),
    (b'{"v":1}', "text/html"),
]


async def test_garbage_is_a_dead_letter_and_the_stream_goes_on(chain: Any) -> None:
    await chain.start()
    async with chain.gateway() as gateway:
        for number, (payload, content_type) in enumerate(GARBAGE):
            await gateway.send(chain.vitals(first_ns=chain.noon_ns + number * 10**10), number)
            await gateway.publish(topics.data(gateway.name, "STRAP-1", "vital_signs"), payload, content_type)
        await gateway.until_receipted("STRAP-1", "vital_signs", *range(len(GARBAGE)))
        await chain.until_count("dead_letters", len(GARBAGE))
        letters = await chain.rows("SELECT payload, reason, topic, gateway_id FROM dead_letters")
        assert {bytes(row[0]) for row in letters} == {payload for payload, _ in GARBAGE}
        assert all(row[1] and row[2] and row[3] == gateway.name for row in letters)
    assert await chain.value("SELECT point_count FROM signal_streams") == 5 * len(GARBAGE)


async def test_a_payload_of_another_gateway_than_its_topic_is_a_dead_letter(chain: Any) -> None:
    await chain.start()
    async with chain.gateway() as gateway:
        block = chain.vitals()
        payload = codec.encode(codec.Identity("somebody-else", "STRAP-1", "vital_signs", "e1", 0), block)
        await gateway.publish(topics.data(gateway.name, "STRAP-1", "vital_signs"), payload.data, payload.content_type)
        await chain.until_count("dead_letters", 1)
    assert "somebody-else" in await chain.value("SELECT reason FROM dead_letters")
    assert await chain.count("signal_streams") == 0


async def test_times_at_the_ends_of_the_range_stop_nobody(chain: Any) -> None:
    await chain.start()
    async with chain.gateway() as gateway:
        ends = (-(2**63), -(2**63) + 1, 2**63 - 1, 0)
        for sequence, first_ns in enumerate(ends):
            await gateway.send(chain.vitals(first_ns=first_ns, n=1), sequence)
        await gateway.send(chain.vitals(), 9)
        await gateway.until_receipted("STRAP-1", "vital_signs", 0, 1, 2, 3, 9)
    stored = await chain.value("SELECT sum(point_count) FROM signal_streams")
    letters = await chain.count("dead_letters")
    assert stored + letters == 9
    assert letters >= 2


async def test_an_unknown_device_is_parked_then_bound_then_written(chain: Any) -> None:
    await chain.start()
    async with chain.gateway() as gateway:
        for sequence in range(40):
            await gateway.send(chain.vitals("NEW-1", chain.noon_ns + sequence * 5 * 10**9), sequence)
        await gateway.until_receipted("NEW-1", "vital_signs", *range(40))
        assert await chain.count("parked_messages") == 40
        assert await chain.points("vital_signs") == []
        assert await chain.rows("SELECT subject FROM alerts WHERE closed_at IS NULL") == [("NEW-1",)]
        await chain.add_device("NEW-1", "hr_strap", None)
        await gateway.send(chain.vitals("NEW-1", chain.noon_ns + 200 * 10**9), 40)
        await gateway.until_receipted("NEW-1", "vital_signs", 40)
        assert await chain.count("parked_messages") == 41
        async with chain.registry.connection() as connection:
            await admin.assign_device(connection, "NEW-1", "B")
        await chain.until_count("parked_messages", 0)
        await gateway.send(chain.vitals("NEW-1", chain.noon_ns + 205 * 10**9), 41)
        await gateway.until_receipted("NEW-1", "vital_signs", 41)
    assert len(await chain.points("vital_signs")) == 42 * 5
    assert await chain.value("SELECT sum(point_count) FROM signal_streams") == 42 * 5
    assert await chain.rows("SELECT subject FROM alerts WHERE closed_at IS NULL") == []


async def test_messages_that_are_parked_while_their_device_is_bound_are_not_forgotten(chain: Any) -> None:
    await chain.start()
    async with chain.gateway() as gateway:

        async def flood() -> None:
            for sequence in range(150):
                await gateway.send(chain.vitals("NEW-1", chain.noon_ns + sequence * 5 * 10**9), sequence)

        async def bind() -> None:
            await chain.wait_for(lambda: chain.count("parked_messages"), "something parked")
            await chain.add_device("NEW-1", "hr_strap", "B")

        await asyncio.gather(flood(), bind())
        await gateway.until_receipted("NEW-1", "vital_signs", *range(150))
        await chain.until_count("parked_messages", 0)
    assert await chain.value("SELECT sum(point_count) FROM signal_streams") == 750
    assert len(await chain.points("vital_signs")) == 750


async def test_losses_reach_the_gaps_once(chain: Any) -> None:
    await chain.start()
    loss = LossRecord("CYTON-1", "eeg", LossCause.RADIO, chain.noon_ns, chain.noon_ns + 10**9, 250)
    shed = LossRecord("NOBODY", "eeg", LossCause.SHED, chain.noon_ns, chain.noon_ns + 10**9, 50, (3, 7))
    async with chain.gateway() as gateway:
        await gateway.send(chain.eeg(), 0)
        await gateway.until_receipted("CYTON-1", "eeg", 0)
        for _ in range(2):
            await gateway.send(loss, 0)
            await gateway.send(shed, 1)
            await gateway.until_receipted("CYTON-1", "loss", 0)
            await gateway.until_receipted("NOBODY", "loss", 1)
            gateway.heard.clear()
    gaps = await chain.rows(
        "SELECT device_serial, cause, sample_count, stream_id IS NULL, first_at FROM stream_gaps ORDER BY 1"
    )
    noon = at(chain.noon_ns)
    assert gaps == [("CYTON-1", "radio", 250, False, noon), ("NOBODY", "shed", 50, True, noon)]


async def test_births_and_presence_are_kept(chain: Any) -> None:
    await chain.start()
    async with chain.gateway() as gateway:
        signals = [SignalMeta(signal="eeg", channels=["Fp1"], units=["uV"], rate_hz=250.0)]
        meta = DeviceMeta(
            v=1, schema="meta", gateway=gateway.name, device="CYTON-1", driver="cyton", signals=signals,
            model="Cyton 8", firmware="v3.1.2", battery_pct=81.6,
        )  # fmt: skip
        await gateway.say(topics.meta(gateway.name, "CYTON-1"), meta)
        await gateway.say(
            topics.status(gateway.name), Status(v=1, schema="status", name=gateway.name, online=True, version="9")
        )

        async def told() -> bool:
            devices = await chain.rows(
                "SELECT model, firmware, battery_pct, gateway_id FROM devices WHERE serial = 'CYTON-1'"
            )
            gateways = await chain.rows("SELECT status->>'version' FROM gateways WHERE id = %s", gateway.name)
            return bool(devices == [("Cyton 8", "v3.1.2", 82, gateway.name)] and gateways == [("9",)])

        await chain.wait_for(told, "device and gateway in the registry")
        await gateway.send(chain.eeg(), 0)
        await gateway.until_receipted("CYTON-1", "eeg", 0)
    assert [row[:2] + row[3:4] for row in await chain.rows(COUNTS)] == [("eeg", 250, 250.0)]


async def test_requests_are_answered_from_the_ledger(chain: Any) -> None:
    await chain.start()
    async with chain.gateway() as gateway:
        for sequence in (0, 1, 2, 5, 9):
            await gateway.send(chain.vitals(first_ns=chain.noon_ns + sequence * 10**10), sequence)
        await gateway.until_receipted("STRAP-1", "vital_signs", 0, 1, 2, 5, 9)
        await chain.stop()
        await chain.start()
        gateway.heard.clear()
        wanted = [WantedRange("STRAP-1", "vital_signs", "e1", 1, 7), WantedRange("STRAP-1", "eeg", "e1", 0, 3)]
        request = ReceiptRequest(v=1, schema="receipt_request", gateway=gateway.name, wanted=wanted)
        await gateway.say(topics.receipt_request(gateway.name), request)

        async def answered() -> bool:
            return bool(gateway.heard)

        await chain.wait_for(answered, "an answer")
        (receipt,) = gateway.heard
        assert [(entry.signal, entry.ranges) for entry in receipt.committed] == [
            ("vital_signs", [(1, 2), (5, 5)]),
            ("eeg", []),
        ]


async def test_a_stream_with_two_bindings_is_written_to_both_and_counted_once(chain: Any) -> None:
    async with chain.registry.connection() as connection:
        await stream_admin.add_template(connection, "ward", "vital_signs", bucket=chain.bucket, measurement="long_term")
    await chain.start()
    async with chain.gateway() as gateway:
        await gateway.send(chain.vitals(), 0)
        await gateway.until_receipted("STRAP-1", "vital_signs", 0)
    assert len(await chain.points("vital_signs")) == len(await chain.points("long_term")) == 5
    assert await chain.value("SELECT point_count FROM signal_streams") == 5


async def test_a_changed_tag_holds_from_the_next_block_on(chain: Any) -> None:
    await chain.start()
    async with chain.gateway() as gateway:
        await gateway.send(chain.vitals(), 0)
        await gateway.until_receipted("STRAP-1", "vital_signs", 0)
        async with chain.registry.connection() as connection:
            binding = await chain.value("SELECT id FROM timeseries_binding")
            await stream_admin.add_tag(connection, binding, "monitor_brand", "Philips")
        changes = chain.bridge.bindings.changes

        async def heard() -> bool:
            return bool(chain.bridge.bindings.changes > changes) or not chain.bridge.bindings._known

        await chain.wait_for(heard, "the notification")
        await gateway.send(chain.vitals(first_ns=chain.noon_ns + 10**10, n=1), 1)
        await gateway.until_receipted("STRAP-1", "vital_signs", 1)
    assert [point.get("monitor_brand") for point in await chain.points("vital_signs")] == [None] * 5 + ["Philips"]


async def test_a_change_holds_for_the_next_block_though_its_notification_is_still_on_its_way(
    chain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(Bindings, "listen", never)
    await chain.start()
    brands = [f"brand-{n}" for n in range(6)]
    async with chain.gateway() as gateway:
        await gateway.send(chain.vitals(n=1), 0)
        await gateway.until_receipted("STRAP-1", "vital_signs", 0)
        binding = await chain.value("SELECT id FROM timeseries_binding")
        for number, brand in enumerate(brands, 1):
            async with chain.registry.connection() as connection:
                await stream_admin.add_tag(connection, binding, "monitor_brand", brand)
            await gateway.send(chain.vitals(first_ns=chain.noon_ns + number * 10**9, n=1), number)
            await gateway.until_receipted("STRAP-1", "vital_signs", number)
        async with chain.registry.connection() as connection:
            await admin.assign_device(connection, "STRAP-1", "B", since=at(chain.noon_ns + 50 * 10**9))
        await gateway.send(chain.vitals(first_ns=chain.noon_ns + 60 * 10**9, n=1), 9)
        await gateway.until_receipted("STRAP-1", "vital_signs", 9)
    points = await chain.points("vital_signs")
    assert [point.get("monitor_brand") for point in points] == [None, *brands, None]
    patients = dict(await chain.rows("SELECT id::text, code FROM patients"))
    assert [patients[point["patient_id"]] for point in points] == [*"AAAAAAA", "B"]


async def test_the_bridge_says_when_it_is_there_and_when_not(chain: Any) -> None:
    name = chain.settings.bridge.id
    async with chain.gateway() as gateway:
        await chain.start()

        async def is_online() -> bool:
            return bool(gateway.bridges.get(name))

        async def is_offline() -> bool:
            return gateway.bridges.get(name) is False

        await chain.wait_for(is_online, "online")
        assert "stores and broker answer" in chain.bridge.status_line(0)
        await chain.stop()
        await chain.wait_for(is_offline, "offline")


@pytest.mark.parametrize("batch_lines", [1, 50])
async def test_small_batches_lose_nothing(chain: Any, batch_lines: int) -> None:
    chain.settings = type(chain.settings)(
        bridge=chain.settings.bridge,
        mqtt=chain.settings.mqtt,
        postgres=chain.settings.postgres,
        influx=type(chain.settings.influx)(
            url=chain.settings.influx.url,
            dialect="v1",
            username=chain.settings.influx.username,
            batch_lines=batch_lines,
            batch_ms=1,
            gzip=False,
        ),
    )
    await chain.start()
    async with chain.gateway() as gateway:
        for sequence in range(30):
            await gateway.send(chain.vitals(first_ns=chain.noon_ns + sequence * 10**10), sequence)
        await gateway.until_receipted("STRAP-1", "vital_signs", *range(30))
    assert len(await chain.points("vital_signs")) == 150


async def test_a_binding_to_an_impossible_bucket_holds_up_nobody_else(chain: Any) -> None:
    async with chain.registry.connection() as connection:
        await stream_admin.add_template(connection, "ward", "vital_signs", bucket="no/such")
    await chain.start()
    async with chain.gateway() as gateway:
        await gateway.send(chain.vitals(), 0)
        await gateway.send(chain.eeg(), 0)
        await gateway.until_receipted("STRAP-1", "vital_signs", 0)
        await gateway.until_receipted("CYTON-1", "eeg", 0)
        assert len(await chain.points("eeg")) == 250
        ((reason,),) = await chain.rows("SELECT reason FROM parked_messages")
        assert "invalid name" in reason
        await chain.bridge.redrive.look({""})
        assert await chain.count("parked_messages") == 1
        await chain.run("DELETE FROM timeseries_binding WHERE influx_bucket = 'no/such'")
        await chain.until_count("parked_messages", 0)
    assert len(await chain.points("vital_signs")) == 5
    assert sorted(await chain.rows("SELECT point_count FROM signal_streams")) == [(5,), (250,)]
