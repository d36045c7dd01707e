"""Holes as gaps: whatever comes, is lost or is asked about in whatever order, the rows say exactly what is missing."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloud_sync.registry import gap_rows, ledger
from cloud_sync.registry.entries import Batch, BlockCommit, BlockKey, LossCommit, Span
from gateway.samples import LOSS, LossCause, LossRecord

TOP = 40
_devices = itertools.count(1)


def size(sequence: int) -> int:
    """Samples of a block."""
    return 1 + sequence % 3


def runs(sequences: Iterable[int]) -> list[tuple[int, int]]:
    """Numbers as (first, stop)."""
    found: list[tuple[int, int]] = []
    for number in sorted(sequences):
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return found


@dataclass
class Model:
    """What a ledger row is, as plain sets."""

    committed: set[int] = field(default_factory=set)
    recorded: set[int] = field(default_factory=set)
    """Lost by loss records."""
    elsewhere: set[int] = field(default_factory=set)
    gone: set[int] = field(default_factory=set)
    known_through: int = -1
    settled_below: int = 0
    is_gone: bool = False

    @property
    def lost(self) -> set[int]:
        return self.recorded | self.elsewhere | self.gone

    @property
    def holes(self) -> set[int]:
        top = max([self.known_through, *self.committed, *self.lost])
        return set(range(top + 1)) - self.committed - self.lost

    def commit(self, sequences: set[int]) -> None:
        self.committed |= sequences
        self.recorded -= sequences
        self.elsewhere -= sequences
        self.gone -= sequences

    def lose(self, first: int, last: int) -> None:
        named = set(range(first, last + 1))
        self.elsewhere -= named
        self.gone -= named
        self.recorded |= named - self.committed

    def ask(self, first: int, last: int) -> None:
        self.settled_below = max(self.settled_below, first)
        self.known_through = max(self.known_through, last)
        self.is_gone = False

    def review(self) -> None:
        self.elsewhere |= {n for n in self.holes if n < self.settled_below}
        if self.is_gone:
            self.gone |= self.holes


class Key:
    """One ledger row of a device of its own, beside its model."""

    def __init__(self, ward: Any, connection: Any) -> None:
        self.ward = ward
        self.connection = connection
        self.key = BlockKey(f"D-{next(_devices)}", "eeg", "e1")
        self.model = Model()
        self.loss_count = 0

    def at(self, sequence: int, *, end: bool) -> Any:
        return self.ward.noon + timedelta(seconds=sequence, milliseconds=900 if end else 0)

    async def commit(self, *sequences: int) -> None:
        self.model.commit(set(sequences))
        blocks = []
        for n in sequences:
            first_ns = self.ward.noon_ns + n * self.ward.second_ns
            span = Span(first_ns, first_ns + 900_000_000, size(n))
            blocks.append(BlockCommit("gw-1", self.key, n, (), span=span))
        await ledger.commit(self.connection, Batch(blocks=blocks))

    async def lose(self, first: int, last: int, *, epoch: str = "e1", has_runs: bool = True) -> None:
        self.model.lose(first, last)
        block_runs = tuple((1, size(n)) for n in range(first, last + 1))
        record = LossRecord(
            self.key.device, "eeg", LossCause.SHED, self.ward.noon_ns, self.ward.noon_ns + 1,
            sum(samples for _, samples in block_runs), (first, last), "e1" if epoch != "e1" else "",
            block_runs if has_runs else (),
        )  # fmt: skip
        loss = LossCommit("gw-1", BlockKey(self.key.device, LOSS, epoch), self.loss_count, record)
        self.loss_count += 1
        await ledger.commit(self.connection, Batch(losses=[loss]))

    async def ask(self, first: int, last: int, gateway: str = "gw-1") -> None:
        if gateway == "gw-1":
            self.model.ask(first, last)
        await gap_rows.note_wanted(self.connection, gateway, [(self.key, first, last)])

    async def vanish(self) -> None:
        """The gateway holds nothing of it any more."""
        if await self.value("SELECT has_holes FROM ledger WHERE device_serial = %s AND signal = 'eeg'"):
            self.model.is_gone = True
            await self.connection.execute(
                "UPDATE ledger SET is_gone = true, review_due = true WHERE device_serial = %s AND signal = 'eeg'",
                (self.key.device,),
            )

    async def review(self) -> None:
        self.model.review()
        keys = await gap_rows.due(self.connection, 1000)
        for key in keys:
            await gap_rows.review(self.connection, key)
        assert self.key not in await gap_rows.due(self.connection, 1000)

    async def value(self, query: str) -> Any:
        row = await (await self.connection.execute(query.encode(), (self.key.device,))).fetchone()
        return row and row[0]

    async def gaps(self, where: str) -> list[tuple[Any, ...]]:
        query = (
            "SELECT lower(sequences)::int, upper(sequences)::int, sample_count::int, first_at, last_at FROM "
            f"stream_gaps WHERE device_serial = %s AND signal = 'eeg' AND epoch = 'e1' AND {where} ORDER BY 1, id"
        )
        return list(await (await self.connection.execute(query.encode(), (self.key.device,))).fetchall())

    async def check(self) -> None:
        """After a review: the rows are the model."""
        model = self.model
        numbers = await self.connection.execute(
            "SELECT missing, committed::text, lost::text, lost * committed = '{}' FROM ledger "
            "WHERE device_serial = %s AND signal = 'eeg' AND epoch = 'e1'", (self.key.device,)
        )  # fmt: skip
        (row,) = await numbers.fetchall()
        assert row == (len(model.holes), text(model.committed), text(model.lost), True)
        opened = await self.gaps("closed_at IS NULL")
        assert [found[:2] for found in opened] == runs(model.holes)
        for first, stop, samples, *times in opened:
            assert stop - first <= samples <= 3 * (stop - first)
            ends = []
            if first - 1 in model.committed:
                ends.append(self.at(first - 1, end=True))
            if stop in model.committed:
                ends.append(self.at(stop, end=False))
            if len(ends) == 2:
                assert times == [min(ends), max(ends)]
        shed = await self.gaps("cause = 'shed' AND outcome = 'lost'")
        assert sum(found[2] for found in shed) == sum(map(size, model.recorded))
        for outcome, lost in (("elsewhere", model.elsewhere), ("lost", model.gone)):
            finals = await self.gaps(f"cause = 'transport' AND outcome = '{outcome}'")
            covered = [n for first, stop, *_ in finals for n in range(first, stop)]
            assert sorted(covered) == sorted(lost)


def text(sequences: set[int]) -> str:
    return "{" + ",".join(f"[{first},{stop})" for first, stop in runs(sequences)) + "}"


numbers = st.integers(0, TOP)
pairs = st.tuples(numbers, numbers).map(lambda pair: tuple(sorted(pair)))
steps = st.one_of(
    st.tuples(st.just("commit"), st.lists(numbers, min_size=1, max_size=8, unique=True)),
    st.tuples(st.just("lose"), pairs),
    st.tuples(st.just("ask"), pairs),
    st.tuples(st.just("review"), st.just(())),
    st.tuples(st.just("vanish"), st.just(())),
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(steps, max_size=16))
async def test_open_gaps_are_the_holes_whatever_happens(ward: Any, plan: list[tuple[str, Any]]) -> None:
    async with ward.database.connection() as connection:
        one = Key(ward, connection)
        await one.commit(0)
        for step, arguments in plan:
            await getattr(one, step)(*arguments)
        await one.review()
        await one.check()


@pytest.fixture
async def connection(ward: Any) -> Any:
    async with ward.database.connection() as opened:
        yield opened


@pytest.fixture
async def one(ward: Any, connection: Any) -> Key:
    return Key(ward, connection)


async def test_a_gap_opens_shrinks_splits_and_closes(one: Key) -> None:
    await one.commit(0, 1, 10)
    await one.review()
    ((first, stop, samples, first_at, last_at),) = await one.gaps("closed_at IS NULL")
    assert (first, stop, first_at, last_at) == (2, 10, one.at(1, end=True), one.at(10, end=False))
    assert samples == round(8 * sum(map(size, (0, 1, 10))) / 3)
    opened_at = await one.value("SELECT opened_at FROM stream_gaps WHERE device_serial = %s")
    await one.commit(2, 3, 6)
    await one.review()
    await one.check()
    assert [row[:2] for row in await one.gaps("closed_at IS NULL")] == [(4, 6), (7, 10)]
    since = await one.connection.execute("SELECT DISTINCT opened_at FROM stream_gaps WHERE closed_at IS NULL")
    assert await since.fetchall() == [(opened_at,)], "both parts are as old as the whole"
    await one.commit(4, 5, 7, 8, 9)
    await one.review()
    await one.check()
    outcomes = await one.connection.execute("SELECT outcome, closed_at >= opened_at FROM stream_gaps")
    assert await outcomes.fetchall() == [("arrived", True)] * 2
    assert await one.value("SELECT count(*) FROM ledger_edges WHERE device_serial = %s") == 0


async def test_what_is_complete_is_never_looked_at(one: Key) -> None:
    for start in range(0, 30, 3):
        await one.commit(start + 1, start, start + 2)
    assert await gap_rows.due(one.connection, 10) == []
    assert await one.value("SELECT count(*) FROM ledger_edges WHERE device_serial = %s") == 0


async def test_committed_wins_over_a_loss_record_and_what_comes_later_corrects_it(one: Key) -> None:
    await one.commit(0, 1, 4, 9)
    await one.lose(3, 6)
    rows = await one.gaps("outcome = 'lost'")
    assert [row[:3] for row in rows] == [(3, 7, size(3) + size(5) + size(6))]
    await one.commit(5)
    rows = await one.gaps("outcome = 'lost'")
    assert [row[:3] for row in rows] == [(3, 7, size(3) + size(6))]
    await one.commit(3, 6)
    assert await one.gaps("outcome = 'lost'") == []
    assert [row[:3] for row in await one.gaps("outcome = 'arrived'")] == [(3, 7, 0)]
    await one.review()
    await one.check()


async def test_a_record_without_block_sizes_that_is_partly_here_is_marked_as_estimated(one: Key) -> None:
    await one.commit(4)
    await one.lose(3, 6, has_runs=False)
    cursor = await one.connection.execute(
        "SELECT sample_count, is_estimated FROM stream_gaps WHERE device_serial = %s AND cause = 'shed'",
        (one.key.device,),
    )
    assert await cursor.fetchall() == [(-(-sum(map(size, range(3, 7))) * 3 // 4), True)]


async def test_two_records_of_the_same_blocks_count_them_once(one: Key) -> None:
    await one.lose(0, 5)
    await one.lose(3, 8)
    await one.lose(1, 2)
    assert sum(row[2] for row in await one.gaps("outcome = 'lost'")) == sum(map(size, range(9)))
    assert [row[:3] for row in await one.gaps("outcome = 'recorded'")] == [(1, 3, 0)]
    await one.commit(4)
    await one.review()
    await one.check()


async def test_a_record_of_a_later_outbox_speaks_of_an_earlier_one(one: Key) -> None:
    await one.commit(0, 9)
    await one.lose(1, 8, epoch="e2")
    await one.review()
    await one.check()
    epochs = await one.connection.execute("SELECT DISTINCT epoch FROM stream_gaps")
    assert await epochs.fetchall() == [("e1",)]


async def test_what_a_gateway_does_not_hold_and_nobody_has_is_elsewhere(one: Key) -> None:
    await one.commit(8, 9)
    await one.ask(5, 12)
    await one.review()
    await one.check()
    assert [row[:2] for row in await one.gaps("outcome = 'elsewhere'")] == [(0, 5)]
    assert [row[:2] for row in await one.gaps("closed_at IS NULL")] == [(5, 8), (10, 13)]
    alerts = await one.connection.execute("SELECT kind, subject, detail FROM alerts")
    ((kind, subject, detail),) = await alerts.fetchall()
    assert (kind, subject) == ("samples_elsewhere", f"{one.key.device} eeg")
    assert "5 blocks" in detail
    assert "epoch e1" in detail
    what = await one.connection.execute("SELECT detail->>'blocks' FROM audit WHERE what = 'gap.elsewhere'")
    assert await what.fetchall() == [("5",)]


async def test_another_gateway_settles_nothing(one: Key) -> None:
    await one.commit(8)
    await one.ask(8, 100, gateway="gw-other")
    await one.review()
    await one.check()
    assert [row[:2] for row in await one.gaps("closed_at IS NULL")] == [(0, 8)]


async def test_holes_wait_for_the_loss_records_that_are_on_their_way(one: Key) -> None:
    await one.commit(5)
    loss_key = BlockKey(one.key.device, LOSS, "e1")
    await gap_rows.note_wanted(one.connection, "gw-1", [(one.key, 5, 5), (loss_key, 0, 0)])
    for _ in range(2):
        await gap_rows.review(one.connection, one.key)
        assert [row[:2] for row in await one.gaps("closed_at IS NULL")] == [(0, 5)]
    await one.lose(0, 2)
    one.model.settled_below = 5
    for key in await gap_rows.due(one.connection, 10):
        await gap_rows.review(one.connection, key)
    assert [row[:2] for row in await one.gaps("outcome = 'lost'")] == [(0, 3)]
    assert [row[:2] for row in await one.gaps("outcome = 'elsewhere'")] == [(3, 5)]
    assert await one.gaps("closed_at IS NULL") == []


async def test_an_outbox_that_its_gateway_no_longer_names_is_gone(one: Key) -> None:
    await one.commit(0, 4)
    await one.ask(2, 6)
    newer = BlockKey(one.key.device, "eeg", "e2")
    await gap_rows.note_wanted(one.connection, "gw-1", [(newer, 0, 3)])
    assert await gap_rows.mark_gone(one.connection) == []
    when = "UPDATE ledger SET asked_at = now() - %s * interval '1 s' WHERE epoch = %s"
    for old_s, new_s in ((0, 60), (60, 60), (3600, 20)):  # the last: so lately that the rest of the question may follow
        await one.connection.execute(when, (old_s, "e1"))
        await one.connection.execute(when, (new_s, "e2"))
        assert await gap_rows.mark_gone(one.connection) == []
    await one.connection.execute(when, (60, "e2"))
    assert await gap_rows.mark_gone(one.connection) == [one.key]
    one.model.is_gone = True
    await one.review()
    await one.check()
    assert [row[:2] for row in await one.gaps("outcome = 'lost'")] == [(2, 4), (5, 7)]
    alerts = await one.connection.execute("SELECT kind FROM alerts ORDER BY 1")
    assert await alerts.fetchall() == [("samples_elsewhere",), ("samples_lost",)]
    assert await gap_rows.mark_gone(one.connection) == []
    await one.commit(5)
    assert [row[:2] for row in await one.gaps("outcome = 'lost'")] == [(2, 4), (6, 7)]


async def test_only_so_many_rows_are_open_and_the_others_follow(one: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gap_rows, "HOLES_MAX", 3)
    await one.commit(*range(1, 21, 2))
    await gap_rows.review(one.connection, one.key)
    assert [row[0] for row in await one.gaps("closed_at IS NULL")] == [0, 2, 4]
    await one.commit(0, 4)
    for _ in range(3):
        await gap_rows.review(one.connection, one.key)
    assert [row[0] for row in await one.gaps("closed_at IS NULL")] == [2, 6, 8]
    await one.ask(20, 20)
    while await gap_rows.due(one.connection, 10):
        await gap_rows.review(one.connection, one.key)
    one.model.review()
    assert [row[0] for row in await one.gaps("outcome = 'elsewhere'")] == [2, 6, 8, 10, 12, 14, 16, 18]


async def test_a_gap_that_stays_open_raises_one_alert_until_it_closes(one: Key) -> None:
    await one.commit(0, 2, 5)
    await one.review()

    async def alerts() -> list[tuple[Any, ...]]:
        cursor = await one.connection.execute("SELECT subject, closed_at IS NULL FROM alerts WHERE kind = 'stream_gap'")
        return list(await cursor.fetchall())

    await gap_rows.watch(one.connection, timedelta(hours=1))
    assert await alerts() == []
    await one.connection.execute("UPDATE stream_gaps SET opened_at = opened_at - interval '2 h'")
    for _ in range(2):
        await gap_rows.watch(one.connection, timedelta(hours=1))
    assert await alerts() == [(f"{one.key.device} eeg", True)]
    await one.commit(1)
    await one.review()
    await gap_rows.watch(one.connection, timedelta(hours=1))
    assert await alerts() == [(f"{one.key.device} eeg", True)]
    await one.commit(3, 4)
    await one.review()
    await gap_rows.watch(one.connection, timedelta(hours=1))
    assert await alerts() == [(f"{one.key.device} eeg", False)]


async def test_bridges_that_commit_and_review_at_once_agree(ward: Any) -> None:
    async with ward.database.connection() as connection:
        one = Key(ward, connection)
        await one.commit(0)
        plan = [[n for n in range(1, 200) if n % 7 == part] for part in range(6)]

        async def bridge(sequences: list[int]) -> None:
            async with ward.database.connection() as own:
                other = Key(ward, own)
                other.key = one.key
                for start in range(0, len(sequences), 4):
                    await other.commit(*sequences[start : start + 4])

        async def reviewer() -> None:
            async with ward.database.connection() as own:
                for _ in range(20):
                    for key in await gap_rows.due(own, 10):
                        await gap_rows.review(own, key)

        await asyncio.gather(*map(bridge, plan), reviewer(), reviewer())
        one.model.commit({n for part in plan for n in part})
        await one.review()
        await one.check()
