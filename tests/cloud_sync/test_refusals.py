"""What a store or the registry refuses for good: kept as a dead letter with its reason, while all else goes on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cloud_sync import ingest
from cloud_sync.redrive import Redrive
from cloud_sync.registry import admin
from cloud_sync.registry.entries import BlockCommit
from gateway.errors import RefusedError
from gateway.wire import topics


async def make_conflict(chain: Any, gateway: Any) -> None:
    """Let `heart_rate` be a float in InfluxDB from one second after noon on, in a shard of its own."""
    await gateway.send(chain.eeg(), 0)
    await gateway.until_receipted("CYTON-1", "eeg", 0)
    line = f"vital_signs,other=x heart_rate=1.5 {chain.noon_ns}\n".encode()
    outcome = await chain.bridge.timeseries.write("", chain.bucket, line)
    assert outcome.refused == ()


async def test_a_type_conflict_is_a_dead_letter_and_the_rest_of_the_batch_is_stored(chain: Any) -> None:
    await chain.start()
    week = 7 * 86_400 * 10**9
    async with chain.gateway() as gateway:
        await make_conflict(chain, gateway)
        await gateway.send(chain.vitals(), 0)
        await gateway.send(chain.vitals(first_ns=chain.noon_ns + 2 * week), 1)
        await gateway.send(chain.eeg(first_ns=chain.noon_ns + 10**9), 1)
        await gateway.until_receipted("STRAP-1", "vital_signs", 0, 1)
        await gateway.until_receipted("CYTON-1", "eeg", 1)
    ((reason, detail, topic),) = await chain.rows("SELECT reason, detail, topic FROM dead_letters")
    assert "field type conflict" in reason
    assert detail.count("heart_rate=") == 5
    assert topic == topics.data(gateway.name, "STRAP-1", "vital_signs")
    assert len(await chain.points("vital_signs", "WHERE other = ''")) == 5
    assert len(await chain.points("eeg")) == 500
    assert sorted(await chain.rows("SELECT point_count FROM signal_streams")) == [(5,), (500,)]
    assert await chain.value("SELECT committed::text FROM ledger WHERE signal = 'vital_signs'") == "{[0,2)}"


async def test_one_bad_line_of_a_block_leaves_the_others_counted(chain: Any) -> None:
    await chain.start()
    async with chain.gateway() as gateway:
        await make_conflict(chain, gateway)
        block = chain.vitals()
        heart_rate = block.columns["heart_rate"].copy()
        heart_rate[[0, 1, 3, 4]] = float("nan")
        columns = {"heart_rate": heart_rate, "temperature": block.columns["temperature"]}
        await gateway.send(type(block)(block.device, block.signal, block.times_ns, columns, block.clock), 0)
        await gateway.until_receipted("STRAP-1", "vital_signs", 0)
    points = await chain.points("vital_signs", "WHERE other = ''")
    assert [point["temperature"] for point in points] == [36.1, 36.2, 36.4, 36.5]
    assert await chain.value("SELECT point_count FROM signal_streams WHERE point_count < 10") == 4
    assert "heart_rate=62i" in await chain.value("SELECT detail FROM dead_letters")


async def test_a_message_that_the_registry_refuses_is_rejected_alone(
    chain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = ingest.ledger.commit
    attempts: list[int] = []

    async def picky(connection: Any, batch: Any) -> Any:
        attempts.append(len(batch.blocks))
        if any(isinstance(block, BlockCommit) and block.sequence == 3 for block in batch.blocks):
            raise RefusedError("the registry will have none of this")
        return await commit(connection, batch)

    monkeypatch.setattr(ingest.ledger, "commit", picky)
    await chain.start()
    async with chain.gateway() as gateway:
        sends = [
            gateway.send(chain.vitals(first_ns=chain.noon_ns + sequence * 10**10), sequence) for sequence in range(6)
        ]
        await asyncio.gather(*sends)
        await gateway.until_receipted("STRAP-1", "vital_signs", *range(6))
    ((reason,),) = await chain.rows("SELECT reason FROM dead_letters")
    assert "the registry will have none of this" in reason
    assert await chain.value("SELECT point_count FROM signal_streams") == 25
    assert max(attempts) > 1, "the messages did not come as a batch"


async def test_an_error_that_nobody_foresaw_costs_one_message(chain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ingest.PointBatch.add

    def broken(batch: Any, number: int, bound: Any) -> None:
        if bound[0].samples.first_ns == chain.noon_ns:
            raise KeyError("a bug")
        lines(batch, number, bound)

    monkeypatch.setattr(ingest.PointBatch, "add", broken)
    await chain.start()
    async with chain.gateway() as gateway:
        await asyncio.gather(*(gateway.send(chain.vitals(first_ns=chain.noon_ns + n * 10**10), n) for n in range(4)))
        await gateway.until_receipted("STRAP-1", "vital_signs", *range(4))
    assert "KeyError" in await chain.value("SELECT reason FROM dead_letters")
    assert await chain.value("SELECT point_count FROM signal_streams") == 15


async def test_a_stream_that_goes_between_write_and_count_is_resolved_again(
    chain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = ingest.ledger.commit
    deleted: list[Any] = []

    async def overtaken(connection: Any, batch: Any) -> Any:
        if batch.blocks and not deleted:
            deleted.extend(await chain.rows("DELETE FROM signal_streams RETURNING id"))
        return await commit(connection, batch)

    monkeypatch.setattr(ingest.ledger, "commit", overtaken)
    await chain.start()
    async with chain.gateway() as gateway:
        await gateway.send(chain.vitals(), 0)
        await gateway.until_receipted("STRAP-1", "vital_signs", 0)
    assert len(deleted) == 1
    assert await chain.count("dead_letters") == 0
    assert await chain.value("SELECT point_count FROM signal_streams") == 5


async def park(chain: Any, gateway: Any, count: int) -> None:
    for sequence in range(count):
        await gateway.send(chain.vitals("NEW-1", chain.noon_ns + sequence * 5 * 10**9), sequence)
    await gateway.until_receipted("NEW-1", "vital_signs", *range(count))


async def test_two_bridges_that_redrive_at_once_count_once(chain: Any) -> None:
    bridge = await chain.start()
    async with chain.gateway() as gateway:
        await park(chain, gateway, 50)
    await chain.stop()
    await chain.add_device("NEW-1", "hr_strap", "A")
    store = type(bridge.timeseries)(chain.influx.url, username=chain.influx.user_name, password=chain.influx.password)
    redrives = [Redrive(chain.registry, store, type(bridge.bindings)(chain.registry)) for _ in range(2)]
    await asyncio.gather(*(redrive.look({""}) for redrive in redrives))
    assert sum(redrive.settled_count for redrive in redrives) == 50
    assert await chain.value("SELECT point_count FROM signal_streams") == 250
    assert await chain.count("parked_messages") == 0
    assert len(await chain.points("vital_signs")) == 250
    await store.close()


async def test_parked_messages_of_before_the_first_wearer_stay(chain: Any) -> None:
    await chain.start()
    async with chain.gateway() as gateway:
        await park(chain, gateway, 4)
        since = chain.noon_ns + 10 * 10**9
        await chain.add_device(
            "NEW-1", "hr_strap", "A", since=(await chain.rows("SELECT to_timestamp(%s)", since / 1e9))[0][0]
        )
        await chain.until_count("parked_messages", 2)
    assert await chain.value("SELECT point_count FROM signal_streams") == 10


async def test_a_parked_message_that_is_damaged_is_buried_and_the_others_written(chain: Any) -> None:
    await chain.start()
    async with chain.gateway() as gateway:
        await park(chain, gateway, 5)
        await chain.run("UPDATE parked_messages SET payload = 'x' WHERE sequence = 2")
        await chain.add_device("NEW-1", "hr_strap", "A")
        await chain.until_count("parked_messages", 0)
    assert await chain.value("SELECT point_count FROM signal_streams") == 20
    assert await chain.count("dead_letters") == 1


async def test_parked_lines_that_the_store_refuses_are_kept_as_a_letter(chain: Any) -> None:
    await chain.start()
    async with chain.gateway() as gateway:
        await park(chain, gateway, 2)
        await make_conflict(chain, gateway)
        await chain.add_device("NEW-1", "hr_strap", "A")
        await chain.until_count("parked_messages", 0)
    assert await chain.count("dead_letters") == 2
    assert await chain.value("SELECT coalesce(sum(point_count), 0) FROM signal_streams") == 250


async def test_a_notification_that_is_ahead_of_the_data_is_not_lost(
    chain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is bound, and redriven in vain, between the question and the commit that parks."""
    commit = ingest.ledger.commit

    async def late(connection: Any, batch: Any) -> Any:
        if batch.parked and chain.bridge.redrive.settled_count == 0 and not overtaken:
            overtaken.append(True)
            await chain.add_device("NEW-1", "hr_strap", "A")

            async def was_looked_at() -> bool:
                return bool(looked) and not chain.bridge.redrive._devices

            await chain.wait_for(was_looked_at, "the redrive to find nothing")
        return await commit(connection, batch)

    overtaken: list[bool] = []
    looked: list[set[str]] = []
    await chain.start()
    look = chain.bridge.redrive.look

    async def watched(devices: set[str]) -> None:
        await look(devices)
        if "NEW-1" in devices:
            looked.append(devices)

    monkeypatch.setattr(chain.bridge.redrive, "look", watched)
    monkeypatch.setattr(ingest.ledger, "commit", late)
    async with chain.gateway() as gateway:
        await gateway.send(chain.vitals("NEW-1"), 0)
        await gateway.until_receipted("NEW-1", "vital_signs", 0)
        await chain.until_count("parked_messages", 0)
    assert overtaken
    assert await chain.value("SELECT point_count FROM signal_streams") == 5


async def test_only_the_samples_that_wait_are_written_later(chain: Any) -> None:
    await chain.start()
    border = (await chain.rows("SELECT to_timestamp(%s)", chain.noon_ns / 1e9 + 2))[0][0]
    async with chain.registry.connection() as connection:
        await admin.assign_device(connection, "STRAP-1", None, since=border)
    async with chain.gateway() as gateway:
        await gateway.send(chain.vitals(), 0)
        await gateway.until_receipted("STRAP-1", "vital_signs", 0)
        assert await chain.rows("SELECT sample_count FROM parked_messages") == [(3,)]
        assert await chain.rows("SELECT point_count FROM signal_streams") == [(2,)]
        async with chain.registry.connection() as connection:
            await admin.assign_device(connection, "STRAP-1", "B", since=border)
        await chain.until_count("parked_messages", 0)
    assert await chain.rows("SELECT point_count FROM signal_streams ORDER BY started_at") == [(2,), (3,)]
    assert len(await chain.points("vital_signs")) == 5


async def test_what_is_through_is_acknowledged(chain: Any) -> None:
    await chain.start()
    async with chain.gateway() as gateway:
        await gateway.send(chain.vitals(), 0)
        await gateway.publish(topics.data(gateway.name, "STRAP-1", "vital_signs"), b"garbage")
        await gateway.send(chain.vitals("NEW-1"), 0)
        await gateway.until_receipted("NEW-1", "vital_signs", 0)
        await chain.stop()
        gateway.heard.clear()
        await chain.start()
        await gateway.send(chain.vitals(first_ns=chain.noon_ns + 10**10), 1)
        await gateway.until_receipted("STRAP-1", "vital_signs", 1)
        assert gateway.receipted("STRAP-1", "vital_signs") == [(1, 1)]
        assert gateway.receipted("NEW-1", "vital_signs") == []
    assert await chain.value("SELECT repeats FROM dead_letters") == 0
