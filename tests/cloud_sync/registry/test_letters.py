"""What waits: parked data is settled exactly once, dead letters are looked at and re-driven."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from cloud_sync.registry import dead_letters, letters
from cloud_sync.registry.ledger import Batch, BlockKey, DeadLetter, ParkedBlock, Part, commit


async def park(ward, sequences, serial: str = "NEW-1", connection=None) -> None:
    blocks = [
        ParkedBlock(
            *("gw-1", BlockKey(serial, "eeg", "e"), n, f"t/{n}", "application/cbor", bytes([n])),
            *(ward.noon_ns + n * ward.second_ns + 1500, ward.noon_ns + n * ward.second_ns + 9999, 10, "unknown device"),
        )
        for n in sequences
    ]
    if connection is not None:
        await commit(connection, Batch(parked=blocks))
        return
    async with ward.database.connection() as own:
        await commit(own, Batch(parked=blocks))


async def bury(ward, *payloads: bytes, gateway: str = "gw-1") -> None:
    found = [DeadLetter(gateway, "t", "", payload, "malformed") for payload in payloads]
    async with ward.database.connection() as connection:
        await commit(connection, Batch(letters=found))


async def taken(ward, limit: int = 100, after=None) -> list[letters.ParkedMessage]:
    async with ward.database.connection() as connection:
        return await letters.take_parked(connection, "NEW-1", limit, after)


async def settle(ward, ids, parts) -> set[int]:
    async with ward.database.connection() as connection:
        return await letters.settle_parked(connection, ids, parts)


async def open_alerts(ward) -> list[tuple[str, str]]:
    return await ward.rows("SELECT kind, subject FROM alerts WHERE closed_at IS NULL ORDER BY 1, 2")


@pytest.fixture
async def part(ward) -> Part:
    return Part(await ward.stream(ward.noon, None), 10, ward.noon_ns, ward.noon_ns + 5)


async def test_parked_messages_come_in_order_of_time_page_by_page(ward) -> None:
    await park(ward, [5, 1])
    await park(ward, [3, 2, 4])
    await park(ward, [0], serial="OTHER")
    first = await taken(ward, 2)
    rest = await taken(ward, 100, first[-1])
    assert [message.sequence for message in first + rest] == [1, 2, 3, 4, 5]
    message = first[0]
    assert (message.device, message.signal, message.epoch, message.topic, message.payload) == (
        *("NEW-1", "eeg", "e", "t/1", b"\1"),
    )
    assert (message.from_ns, message.to_ns) == (
        ward.noon_ns + ward.second_ns + 1000,
        ward.noon_ns + ward.second_ns + 10_000,
    ), "the microseconds that hold the first and the last sample that wait"


async def test_parked_message_is_settled_exactly_once(ward, part) -> None:
    await park(ward, [0, 1])
    one, two = [message.id for message in await taken(ward)]
    assert await settle(ward, [one], [[part]]) == {one}
    assert await open_alerts(ward) == [("parked_data", "NEW-1")]
    assert await settle(ward, [one, two], [[part], [part, part]]) == {two}
    assert await settle(ward, [one, two], [[part], [part]]) == set()
    assert await ward.value("SELECT point_count FROM signal_streams") == 30
    assert await open_alerts(ward) == []
    assert await taken(ward) == []


async def test_concurrent_settlers_count_once(ward, part) -> None:
    await park(ward, range(20))
    ids = [message.id for message in await taken(ward)]
    found = await asyncio.gather(*(settle(ward, ids[n:] + ids[:n], [[part]] * 20) for n in range(8)))
    assert sorted(ident for settled in found for ident in settled) == ids
    assert await ward.value("SELECT point_count FROM signal_streams") == 200


async def test_alert_stays_or_reopens_while_data_is_parked_and_settled_at_once(ward, part) -> None:
    """After any interleaving: an open alert exactly where something waits."""
    for turn in range(15):
        await park(ward, [turn * 2])
        ids = [message.id for message in await taken(ward)]
        await asyncio.gather(settle(ward, ids, [[part]] * len(ids)), park(ward, [turn * 2 + 1]))
        assert len(await taken(ward)) == 1
        assert await open_alerts(ward) == [("parked_data", "NEW-1")]


async def test_alert_is_not_closed_over_data_that_is_being_parked(ward, part) -> None:
    await park(ward, [0])
    (message,) = await taken(ward)
    async with asyncio.timeout(30):
        async with ward.database.transaction() as bridge:
            await park(ward, [1], connection=bridge)
            settling = asyncio.create_task(settle(ward, [message.id], [[part]]))
            while not await ward.value("SELECT count(*) FROM pg_locks WHERE NOT granted"):
                await ward.run("SELECT pg_sleep(0.01)")
        await settling
    assert len(await taken(ward)) == 1
    assert await open_alerts(ward) == [("parked_data", "NEW-1")]


async def test_parked_message_that_is_never_writable_becomes_a_dead_letter(ward) -> None:
    await park(ward, [0])
    (message,) = await taken(ward)
    async with ward.database.connection() as connection:
        assert await letters.bury_parked(connection, message.id, "refused", "type conflict")
        assert not await letters.bury_parked(connection, message.id, "refused")
        (letter,) = await dead_letters.list_letters(connection, 10)
    assert (letter.topic, letter.payload, letter.reason, letter.detail) == ("t/0", b"\0", "refused", "type conflict")
    assert await open_alerts(ward) == [("dead_letters", "gw-1")]


async def test_letters_are_listed_shown_and_redriven_once(ward, part) -> None:
    await bury(ward, b"1")
    await bury(ward, b"2")
    await bury(ward, b"3", gateway="gw-2")
    async with ward.database.connection() as connection:
        found = await dead_letters.list_letters(connection, 2)
        assert [letter.payload for letter in found] == [b"3", b"2"]
        assert await dead_letters.find_letter(connection, found[0].id) == found[0]
        assert await dead_letters.find_letter(connection, 10**6) is None
        third, second = (letter.id for letter in found)
        assert await letters.settle_letter(connection, third, [part])
        assert await letters.settle_letter(connection, second, [])
        assert not await letters.settle_letter(connection, third, [part])
        assert [letter.payload for letter in await dead_letters.list_letters(connection, 9)] == [b"1"]
        assert await dead_letters.waiting_ids(connection) == [second - 1]
        again = await dead_letters.list_letters(connection, 9, with_redriven=True)
        assert [(letter.payload, letter.redriven_at is None) for letter in again] == [
            *((b"3", False), (b"2", False), (b"1", True))
        ]
    assert await ward.value("SELECT point_count FROM signal_streams") == 10
    assert await open_alerts(ward) == [("dead_letters", "gw-1")]


async def test_only_what_was_not_counted_of_a_letter_is_counted(ward, part) -> None:
    key = BlockKey("CYTON-1", "eeg", "e")
    letter = DeadLetter("gw-1", "t", "", b"1", "refused", "", key, 0, (replace(part, point_count=4),))
    async with ward.database.connection() as connection:
        await commit(connection, Batch(letters=[letter]))
        (kept,) = await dead_letters.list_letters(connection, 9)
        assert kept.is_claimed
        for stored, total in ((7, 7), (7, 7), (5, 7), (9, 9)):
            stored_part = replace(part, point_count=stored)
            assert await letters.settle_letter(connection, kept.id, [stored_part], is_done=False)
            assert await ward.value("SELECT point_count FROM signal_streams") == total
        found = await asyncio.gather(*(settle_in_its_own(ward, kept.id, part) for _ in range(6)))
    assert sum(found) == 1
    assert await ward.value("SELECT point_count FROM signal_streams") == 10


async def settle_in_its_own(ward, ident: int, part: Part) -> bool:
    async with ward.database.connection() as connection:
        return await letters.settle_letter(connection, ident, [part])


async def test_letter_that_comes_again_after_it_was_redriven_waits_again(ward, part) -> None:
    await bury(ward, b"1", b"1")
    async with ward.database.connection() as connection:
        (letter,) = await dead_letters.list_letters(connection, 9)
        assert letter.repeats == 1
        await letters.mark_redriven(connection, letter.id)
    await bury(ward, b"1")
    assert await ward.value("SELECT count(*) FROM dead_letters") == 2
    assert await open_alerts(ward) == [("dead_letters", "gw-1")]


async def test_what_waits_in_numbers(ward, part) -> None:
    await park(ward, [0, 1])
    await park(ward, [0], serial="OTHER")
    await bury(ward, b"1")
    async with ward.database.connection() as connection:
        assert await letters.counts(connection) == letters.Counts(3, 2, 1, 0, 3, 1)
        new, other = await letters.parked_devices(connection)
    assert (new.device, new.messages, new.samples, new.reason) == ("NEW-1", 2, 20, "unknown device")
    assert other.device == "OTHER"
