"""Exact-once accounting: whatever is delivered how often, in which order and by how many bridges."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from datetime import timedelta
from uuid import UUID, uuid4

import pytest

from cloud_sync.registry.ledger import (
    Batch,
    BlockCommit,
    BlockKey,
    DeadLetter,
    LossCommit,
    ParkedBlock,
    Part,
    commit,
    committed,
    committed_within,
    known,
)
from gateway.errors import MalformedError, RefusedError
from gateway.samples import LOSS, LossCause, LossRecord

KEY = BlockKey("CYTON-1", "eeg", "epoch-1")


def block(ward, stream: UUID, sequence: int, key: BlockKey = KEY, count: int = 250) -> BlockCommit:
    first_ns = ward.noon_ns + sequence * ward.second_ns
    part = Part(stream, count, first_ns, first_ns + ward.second_ns - 4_000_000)
    return BlockCommit("gw-1", key, sequence, (part,), 250.0)


def parked(ward, sequence: int, serial: str = "NEW-1") -> ParkedBlock:
    first_ns = ward.noon_ns + sequence * ward.second_ns
    key = BlockKey(serial, "eeg", "epoch-1")
    return ParkedBlock(
        *("gw-1", key, sequence, f"wardlink/v1/gw-1/data/{serial}/eeg", "application/cbor", b"\0payload"),
        *(first_ns, first_ns + ward.second_ns - 1, 250, "unknown device"),
    )


async def take(ward, *entries) -> set[tuple[BlockKey, int]]:
    kinds = {BlockCommit: "blocks", LossCommit: "losses", ParkedBlock: "parked", DeadLetter: "letters"}
    sorts: dict[str, list[object]] = {}
    for entry in entries:
        sorts.setdefault(kinds[type(entry)], []).append(entry)
    async with ward.database.connection() as connection:
        return await commit(connection, Batch(**sorts))


async def ranges(ward, key: BlockKey = KEY) -> list[tuple[int, int]]:
    async with ward.database.connection() as connection:
        return (await committed(connection, [key]))[key]


async def counted(ward) -> int:
    return await ward.value("SELECT sum(point_count)::bigint FROM signal_streams")


@pytest.fixture
async def stream(ward) -> UUID:
    return await ward.stream(ward.noon, None)


async def test_new_blocks_are_counted_and_on_record(ward, stream) -> None:
    assert await take(ward, *(block(ward, stream, n) for n in (0, 1, 2, 5))) == {(KEY, n) for n in (0, 1, 2, 5)}
    assert await ranges(ward) == [(0, 2), (5, 5)]
    row = await ward.rows("SELECT point_count, last_sample_at, sample_rate_hz::text FROM signal_streams")
    assert row == [(1000, ward.noon + timedelta(seconds=5, milliseconds=996), "250.000")]
    device = await ward.rows("SELECT last_seen_at, gateway_id FROM devices")
    assert device == [(ward.noon + timedelta(seconds=5, milliseconds=996), "gw-1")]


async def test_redelivery_changes_nothing(ward, stream) -> None:
    batch = [block(ward, stream, n) for n in range(4)]
    await take(ward, *batch)
    before = await ward.rows("SELECT point_count, last_sample_at FROM signal_streams")
    assert await take(ward, *batch) == set()
    assert await take(ward, batch[1], block(ward, stream, 4), batch[1], block(ward, stream, 4)) == {(KEY, 4)}
    assert await ward.rows("SELECT point_count - 250, last_sample_at - interval '1 s' FROM signal_streams") == before


async def test_order_does_not_matter(ward, stream) -> None:
    order = list(range(40))
    random.Random(1).shuffle(order)
    for some in (order[start : start + 7] for start in range(0, 40, 7)):
        await take(ward, *(block(ward, stream, n) for n in some))
    assert await ranges(ward) == [(0, 39)]
    assert await ward.rows("SELECT point_count, last_sample_at FROM signal_streams") == [
        (10_000, ward.noon + timedelta(seconds=39, milliseconds=996))
    ]


async def test_late_data_of_another_gateway_does_not_take_the_device_over(ward, stream) -> None:
    await take(ward, block(ward, stream, 100))
    await take(ward, replace(block(ward, stream, 7), gateway="gw-old"))
    assert await ward.rows("SELECT gateway_id, last_seen_at FROM devices") == [
        ("gw-1", ward.noon + timedelta(seconds=100, milliseconds=996))
    ]
    await take(ward, replace(block(ward, stream, 200), gateway="gw-2"))
    assert await ward.value("SELECT gateway_id FROM devices") == "gw-2"


async def test_device_with_a_clock_ahead_was_not_seen_in_the_future(ward, stream) -> None:
    await take(ward, block(ward, stream, 10 * 365 * 86400))
    assert await ward.value("SELECT last_seen_at <= now() FROM devices")


async def test_epochs_are_apart(ward, stream) -> None:
    other = replace(KEY, epoch="epoch-2")
    assert await take(ward, block(ward, stream, 1), block(ward, stream, 1, other)) == {(KEY, 1), (other, 1)}
    async with ward.database.connection() as connection:
        never = replace(KEY, signal="ppg")
        assert await committed(connection, [KEY, other, never]) == {KEY: [(1, 1)], other: [(1, 1)], never: []}
        assert await committed(connection, []) == {}


async def test_what_is_known_and_what_of_the_wanted_is_committed(ward, stream) -> None:
    other = replace(KEY, epoch="epoch-2")
    await take(ward, *(block(ward, stream, n) for n in (0, 1, 2, 5, 6, 9)), block(ward, stream, 1, other))
    async with ward.database.connection() as connection:
        asked = {(KEY, n) for n in range(12)} | {(other, n) for n in range(3)} | {(replace(KEY, signal="ppg"), 1)}
        assert await known(connection, asked) == {*((KEY, n) for n in (0, 1, 2, 5, 6, 9)), (other, 1)}
        assert await known(connection, []) == set()
        wanted = [(other, 1, 9), (KEY, 1, 5), (replace(KEY, signal="ppg"), 0, 1), (KEY, 6, 7), (KEY, 0, 99)]
        answers = [[(1, 1)], [(1, 2), (5, 5)], [], [(6, 6)], [(0, 2), (5, 6), (9, 9)]]
        assert await committed_within(connection, wanted, 100) == answers
        assert await committed_within(connection, wanted[:2], 2) == [[(1, 1)], [(1, 2)]]


async def test_a_ledger_row_of_alternating_sequences_is_read_and_grown_like_any_other(ward, stream) -> None:
    """Row of 100,000 ranges: what is offered decides, and the answer is bounded."""
    await take(ward, block(ward, stream, 0))
    await ward.run(
        "UPDATE ledger SET committed = (SELECT range_agg(int8range(2 * n, 2 * n + 1)) "
        "FROM generate_series(0, 99999) n), missing = 99999"
    )
    fresh = [1, 3, 5, 199_999, 200_000, 200_003]
    offered = [block(ward, stream, n) for n in (*fresh, 0, 2, 4, 199_998)]
    assert await take(ward, *offered) == {(KEY, n) for n in fresh}
    assert await take(ward, *offered) == set()
    assert await ward.value("SELECT missing FROM ledger") == 99_999 - 3 + 2
    assert await ward.value("SELECT missing = missing_of(committed, lost, known_through) FROM ledger")
    async with ward.database.connection() as connection:
        (answer,) = await committed_within(connection, [(KEY, 10, 2**62)], 1000)
        assert answer == [(10 + 2 * n, 10 + 2 * n) for n in range(1000)]
    storage = "SELECT attstorage FROM pg_attribute WHERE attrelid = 'ledger'::regclass AND attname = 'committed'"
    assert await ward.value(storage) in ("e", b"e"), "compressing such a row takes most of the time of its commit"


async def test_block_over_two_streams_counts_in_both(ward) -> None:
    first = await ward.stream(ward.noon, ward.noon + timedelta(seconds=1))
    second = await ward.stream(ward.noon + timedelta(seconds=1), None)
    parts = (Part(first, 100, ward.noon_ns, ward.noon_ns + 1), Part(second, 150, ward.noon_ns + 2, ward.noon_ns + 3))
    await take(ward, BlockCommit("gw-1", KEY, 0, parts))
    assert dict(await ward.rows("SELECT id, point_count FROM signal_streams")) == {first: 100, second: 150}


async def test_concurrent_commits_of_the_same_blocks_count_once(ward, stream) -> None:
    """Eight bridges, keys in every order: each block is new to exactly one of them, and none deadlocks."""
    keys = [replace(KEY, epoch=f"epoch-{n}") for n in range(6)]
    blocks = [block(ward, stream, n, key) for key in keys for n in range(10)]
    batches = []
    for seed in range(8):
        shuffled = blocks.copy()
        random.Random(seed).shuffle(shuffled)
        batches.append(shuffled[: 40 + seed])
    found = await asyncio.gather(*(take(ward, *batch) for batch in batches))
    offered = {(entry.key, entry.sequence) for batch in batches for entry in batch}
    assert set().union(*found) == offered
    assert sum(map(len, found)) == len(offered)
    assert await counted(ward) == 250 * len(offered)


async def test_concurrent_commits_of_new_keys_do_not_deadlock(ward, stream) -> None:
    blocks = [block(ward, stream, 0, replace(KEY, epoch=f"epoch-{n}")) for n in range(400)]
    for turn in range(3):
        fresh = [replace(entry, key=replace(entry.key, signal=f"s{turn}")) for entry in blocks]
        found = await asyncio.gather(*(take(ward, *fresh[:: 1 - 2 * (n % 2)]) for n in range(6)))
        assert sum(map(len, found)) == len(fresh)


async def test_nothing_is_recorded_when_a_stream_is_gone(ward, stream) -> None:
    with pytest.raises(RefusedError, match="1 of 2 streams"):
        await take(ward, block(ward, stream, 0), block(ward, uuid4(), 1))
    assert await ranges(ward) == []
    assert await counted(ward) == 0


async def test_loss_reaches_its_stream_once(ward, stream) -> None:
    loss = LossRecord("CYTON-1", "eeg", LossCause.SHED, ward.noon_ns + 1999, ward.noon_ns + 9000, 500, (3, 4))
    early = replace(loss, cause=LossCause.RADIO, first_ns=ward.noon_ns - 1, sample_count=7, sequences=None)
    stranger = replace(loss, device="NEW-1", cause=LossCause.CLOCK, sample_count=1)
    key = BlockKey("CYTON-1", LOSS, "epoch-1")
    commits = [LossCommit("gw-1", key, n, record) for n, record in enumerate([loss, early, stranger])]
    assert await take(ward, *commits) == {(key, 0), (key, 1), (key, 2)}
    assert await take(ward, *commits) == set()
    rows = await ward.rows(
        "SELECT cause, device_serial, device_id, stream_id, sample_count, sequences::text, first_at, "
        "closed_at IS NOT NULL FROM stream_gaps ORDER BY id"
    )
    first_at = ward.noon + timedelta(microseconds=1)
    assert rows == [
        ("shed", "CYTON-1", ward.device_id, stream, 500, "[3,5)", first_at, True),
        ("radio", "CYTON-1", ward.device_id, None, 7, None, ward.noon - timedelta(microseconds=1), True),
        ("clock", "NEW-1", None, None, 1, "[3,5)", first_at, True),
    ]


async def test_parked_blocks_are_kept_committed_and_alerted(ward, stream) -> None:
    entries = [parked(ward, n) for n in range(3)]
    key = entries[0].key
    assert await take(ward, *entries, block(ward, stream, 0)) == {(KEY, 0), *((key, n) for n in range(3))}
    assert await take(ward, *entries) == set()
    assert await ranges(ward, key) == [(0, 2)]
    assert await counted(ward) == 250
    rows = await ward.rows("SELECT sequence, payload, sample_count, reason, first_at FROM parked_messages ORDER BY id")
    assert rows == [(n, b"\0payload", 250, "unknown device", ward.noon + timedelta(seconds=n)) for n in range(3)]
    assert await ward.rows("SELECT kind, subject, detail, closed_at FROM alerts") == [
        ("parked_data", "NEW-1", "unknown device", None)
    ]


async def test_alert_names_the_newest_reason(ward) -> None:
    await take(ward, parked(ward, 0))
    await take(ward, replace(parked(ward, 1), reason="no binding"))
    assert await ward.rows("SELECT detail, closed_at FROM alerts") == [("no binding", None)]


async def test_part_of_a_parked_block_that_is_written_is_counted(ward, stream) -> None:
    part = Part(stream, 100, ward.noon_ns, ward.noon_ns + 5)
    await take(ward, replace(parked(ward, 0, "CYTON-1"), parts=(part,), sample_count=150))
    assert await counted(ward) == 100


async def test_dead_letters_are_kept_committed_and_alerted(ward) -> None:
    named = DeadLetter(
        "gw-1", "t/1", "application/json", b"{", "malformed", "line 1", KEY, 7, properties={"schema": "x"}
    )
    nameless = DeadLetter("gw-1", "t/2", "", b"\xff\0garbage", "no envelope")
    assert await take(ward, named, nameless) == {(KEY, 7)}
    assert await take(ward, named, nameless, nameless) == set()
    assert await ranges(ward) == [(7, 7)]
    rows = await ward.rows(
        "SELECT topic, payload, reason, detail, properties, repeats FROM dead_letters ORDER BY topic"
    )
    assert rows == [
        ("t/1", b"{", "malformed", "line 1", {"schema": "x"}, 0),
        ("t/2", b"\xff\0garbage", "no envelope", "", {}, 2),
    ]
    assert await ward.rows("SELECT kind, subject FROM alerts WHERE closed_at IS NULL") == [("dead_letters", "gw-1")]


async def test_hostile_texts_break_no_batch(ward, stream) -> None:
    ugly = "\0\ud800[/x]" + "y" * 100_000
    letter = DeadLetter(ugly, ugly, ugly, b"\0", ugly, ugly, properties={ugly: ugly})
    good = replace(parked(ward, 1), gateway=ugly, topic=ugly, content_type=ugly, reason=ugly, properties={"\0": "\0"})
    assert len(await take(ward, letter, good, replace(block(ward, stream, 1), gateway=ugly, rate_hz=float("nan")))) == 2
    longest = BlockKey("\U0001f9e0" * 200, "\U0001f9e1" * 200, "\U0001f9e2" * 200)
    assert await take(ward, replace(parked(ward, 1), key=longest)) == {(longest, 1)}


@pytest.mark.parametrize("text", ["", "a\0", "\ud800", "x" * 201])
def test_what_cannot_be_an_identity_is_refused_before_it_reaches_a_batch(text: str) -> None:
    for names in ((text, "eeg", "e"), ("d", text, "e"), ("d", "eeg", text)):
        with pytest.raises(MalformedError):
            BlockKey(*names)


def test_numbers_out_of_range_are_refused_before_they_reach_a_batch() -> None:
    loss = LossRecord("d", "eeg", LossCause.RADIO, 0, 1, 1)
    for sequence in (-1, 2**63 - 1, 2**80):
        with pytest.raises(MalformedError):
            BlockCommit("g", KEY, sequence, ())
    for wrong in ({"last_ns": 2**63}, {"first_ns": -(2**64)}, {"sample_count": 2**63}, {"sequences": (5, 4)}):
        with pytest.raises(MalformedError):
            LossCommit("g", KEY, 0, replace(loss, **wrong))


async def test_highest_sequence_fits(ward, stream) -> None:
    top = 2**63 - 2
    await take(ward, BlockCommit("g", KEY, top, (Part(stream, 1, 0, 0),)))
    assert await ranges(ward) == [(top, top)]


async def test_empty_batch(ward) -> None:
    assert await take(ward) == set()
