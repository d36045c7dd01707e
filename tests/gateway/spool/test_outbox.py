"""The outbox on both real stores: groups, disk faults, cancellation, quota, damage. Nothing lost, nothing twice."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gateway.errors import UnavailableError
from gateway.samples import LossCause, LossRecord, SampleBlock
from gateway.spool import outbox as outbox_module
from gateway.spool.outbox import Limits, Outbox
from gateway.spool.store import Row, Store, StoredRow, StreamKey, Tally
from gateway.wire import codec

ALL = 10**9
SECONDS_MAX = 10.0
GATEWAY = "gw-spool"
ON_CALL = Limits(commit_interval_s=60.0, commit_blocks=10**6)
"""Commits only when told to."""


class Watched:
    """A real store of which the writing calls can be made to fail or to wait, and are counted."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.failures = 0
        self.replacing_failures = 0
        self.read_failures = 0
        self.steps: list[list[Row]] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.has_begun = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def append(self, rows: Sequence[Row]) -> None:
        self._wait_and_fail()
        self._store.append(rows)
        self.steps.append(list(rows))

    def replace(self, ids: Sequence[int], rows: Sequence[Row], *more: Any) -> None:
        if self.replacing_failures:
            self.replacing_failures -= 1
            raise UnavailableError("the disk is full")
        self._wait_and_fail()
        self._store.replace(ids, rows, *more)
        self.steps.append(list(rows))

    def oldest(self, signals: Sequence[str], limit: int) -> Any:
        if self.read_failures:
            self.read_failures -= 1
            raise UnavailableError("the disk cannot be read")
        return self._store.oldest(signals, limit)

    def _wait_and_fail(self) -> None:
        self.has_begun.set()
        assert self.may_go_on.wait(SECONDS_MAX)
        if self.failures:
            self.failures -= 1
            raise UnavailableError("the disk is full")


@pytest.fixture
def store(place: Any) -> Any:
    return Watched(place.store())


@asynccontextmanager
async def opened(store: Any, limits: Limits = ON_CALL) -> AsyncIterator[Outbox]:
    outbox = Outbox(store, GATEWAY, limits)
    await outbox.open()
    try:
        yield outbox
    finally:
        if isinstance(store, Watched):
            store.may_go_on.set()
        await outbox.close()


@asynccontextmanager
async def running(outbox: Outbox) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(outbox.run())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(SECONDS_MAX):
        while not condition():  # noqa: ASYNC110 - these conditions have no event of their own
            await asyncio.sleep(0.005)


async def begun(store: Watched) -> None:
    assert await asyncio.to_thread(store.has_begun.wait, SECONDS_MAX)


def contents(rows: Sequence[StoredRow]) -> list[SampleBlock | LossRecord]:
    return [codec.decode(item.row.payload.data, item.row.payload.content_type).content for item in rows]


async def losses(outbox: Outbox) -> list[LossRecord]:
    found = contents(await outbox.fetch(0, ALL, ALL))
    return [content for content in found if isinstance(content, LossRecord)]


async def identities(outbox: Outbox) -> list[tuple[str, str, int]]:
    found = await outbox.fetch(0, ALL, ALL)
    return [(item.row.device, item.row.signal, item.row.sequence) for item in found]


async def test_what_is_committed_decodes_to_what_was_appended(store: Any, make: Any) -> None:
    async with opened(store) as outbox:
        blocks = [make.block(at=0), make.block(signal="brain_state", n=5), make.block("STRAP", "vital_signs", n=1)]
        for content in [*blocks, make.loss(at=1, count=7), make.block(at=2)]:
            outbox.append(content)
        await outbox.commit()
        found = await outbox.fetch(0, ALL, ALL)
        assert [(item.row.device, item.row.signal, item.row.sequence) for item in found] == [
            ("DEV", "eeg", 0),
            ("DEV", "brain_state", 0),
            ("STRAP", "vital_signs", 0),
            ("DEV", "loss", 0),
            ("DEV", "eeg", 1),
        ]
        for item in found:
            message = codec.decode(item.row.payload.data, item.row.payload.content_type)
            assert message.identity == outbox.identity_of(item.row)
            assert message.identity.epoch == outbox.epoch
        decoded = contents(found)
        assert isinstance(decoded[0], SampleBlock)
        assert decoded[0].columns["Fp1"].tolist() == blocks[0].columns["Fp1"].tolist()
        assert decoded[3] == make.loss(at=1, count=7)
        assert await outbox.tallies() == {
            ("DEV", "eeg"): Tally(2, 20, 7),
            ("DEV", "brain_state"): Tally(1, 5, 0),
            ("DEV", "loss"): Tally(1, 0, 0),
            ("STRAP", "vital_signs"): Tally(1, 1, 0),
        }


async def test_a_commit_comes_as_soon_as_enough_blocks_wait_and_takes_them_in_one_step(store: Any, make: Any) -> None:
    async with opened(store, Limits(commit_interval_s=60.0, commit_blocks=5)) as outbox, running(outbox):
        for at in range(4):
            outbox.append(make.block(at=at))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not outbox._due.is_set()
        assert not store.steps
        outbox.append(make.block(at=4))
        await until(lambda: outbox.holding.rows == 5)
        assert [len(step) for step in store.steps] == [5]


async def test_a_commit_comes_when_the_interval_is_over(store: Any, make: Any) -> None:
    committed = asyncio.Event()
    async with opened(store, Limits(commit_interval_s=0.02, commit_blocks=10**6)) as outbox, running(outbox):
        outbox.on_commit = committed.set
        for at in range(3):
            committed.clear()
            outbox.append(make.block(at=at))
            await asyncio.wait_for(committed.wait(), SECONDS_MAX)
            assert outbox.holding.rows == at + 1


async def test_what_comes_during_a_commit_is_in_the_next_one(store: Any, make: Any) -> None:
    async with opened(store) as outbox:
        store.may_go_on.clear()
        outbox.append(make.block(at=0))
        first = asyncio.create_task(outbox.commit())
        await begun(store)
        outbox.append(make.block(at=1))
        second = asyncio.create_task(outbox.commit())
        store.may_go_on.set()
        await asyncio.gather(first, second)
        assert [len(step) for step in store.steps] == [1, 1]
        assert await identities(outbox) == [("DEV", "eeg", 0), ("DEV", "eeg", 1)]


async def test_a_commit_waits_for_one_that_is_under_way(store: Any, make: Any) -> None:
    async with opened(store) as outbox:
        store.may_go_on.clear()
        outbox.append(make.block())
        first = asyncio.create_task(outbox.commit())
        await begun(store)
        second = asyncio.create_task(outbox.commit())
        for _ in range(10):
            await asyncio.sleep(0)
        assert not second.done()
        store.may_go_on.set()
        await second
        assert first.done()
        assert outbox.holding.rows == 1


@pytest.mark.parametrize("cancels", [1, 3])
@pytest.mark.parametrize("failures", [0, 1])
async def test_cancelling_in_mid_commit_neither_loses_nor_doubles(
    store: Any, make: Any, cancels: int, failures: int
) -> None:
    told: list[int] = []
    async with opened(store) as outbox:
        outbox.on_commit = lambda: told.append(outbox.holding.rows)
        store.may_go_on.clear()
        store.failures = failures
        for at in range(3):
            outbox.append(make.block(at=at))
        commit = asyncio.create_task(outbox.commit())
        await begun(store)
        outbox.append(make.block(at=3))
        for _ in range(cancels):
            commit.cancel()
            await asyncio.sleep(0)
        assert not commit.done()
        store.may_go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await commit
        assert outbox.holding.rows == (0 if failures else 3)
        await outbox.commit()
        expected = [("DEV", "eeg", at) for at in range(4)]
        assert await identities(outbox) == expected
        assert outbox._pending_bytes == 0
    async with opened(store) as outbox:
        assert await identities(outbox) == expected
        assert (await outbox.tallies())["DEV", "eeg"] == Tally(4, 40, 0)


async def test_cancelling_between_two_attempts_loses_nothing(store: Any, make: Any) -> None:
    async with opened(store) as outbox:
        store.failures = 10**6
        outbox.append(make.block())
        commit = asyncio.create_task(outbox.commit())
        await until(lambda: outbox.problem)
        commit.cancel()
        await asyncio.gather(commit, return_exceptions=True)
        store.failures = 0
        await outbox.commit()
        assert await identities(outbox) == [("DEV", "eeg", 0)]


async def test_a_disk_that_fails_is_tried_again_with_nothing_lost_and_the_problem_shown(
    store: Any, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    shown: list[str] = []
    async with opened(store, Limits(commit_interval_s=0.01)) as outbox, running(outbox):
        store.failures = 3
        outbox.append(make.block(at=0))
        await until(lambda: outbox.problem)
        shown.append(outbox.problem)
        outbox.append(make.block(at=1))
        await until(lambda: outbox.holding.rows == 2)
        assert outbox.problem == ""
        assert await identities(outbox) == [("DEV", "eeg", 0), ("DEV", "eeg", 1)]
        assert (await outbox.tallies())["DEV", "eeg"] == Tally(2, 20, 0)
    assert shown == ["the disk is full"]
    assert caplog.text.count("the disk is full; trying again") == 3


async def test_the_stall_of_a_commit_is_seen_and_ends(store: Any, make: Any) -> None:
    async with opened(store) as outbox:
        assert outbox.stalled_s() == 0
        store.may_go_on.clear()
        outbox.append(make.block())
        commit = asyncio.create_task(outbox.commit())
        await begun(store)
        before = outbox.stalled_s()
        await until(lambda: outbox.stalled_s() > before > 0)
        store.may_go_on.set()
        await commit
        assert outbox.stalled_s() == 0


async def test_each_start_begins_an_epoch_and_receipts_of_all_that_are_held_count(place: Any, make: Any) -> None:
    epochs = []
    for start in range(3):
        async with opened(place.store()) as outbox:
            epochs.append(outbox.epoch)
            for at in range(2):
                outbox.append(make.block(at=10 * start + at))
            outbox.append(make.loss())
            await outbox.commit()
    async with opened(place.store()) as outbox:
        assert outbox.epoch not in epochs
        assert await outbox.held() == {
            ("DEV", signal, epoch): (0, last) for signal, last in (("eeg", 1), ("loss", 0)) for epoch in epochs
        }
        found = await outbox.fetch(0, ALL, ALL)
        assert [(item.row.epoch, *item.row.key, item.row.sequence) for item in found] == [
            (epoch, "DEV", signal, number)
            for epoch in epochs
            for signal, number in (("eeg", 0), ("eeg", 1), ("loss", 0))
        ]
        for item in found:
            message = codec.decode(item.row.payload.data, item.row.payload.content_type)
            assert message.identity == outbox.identity_of(item.row)
        assert await outbox.forget("DEV", "eeg", epochs[1], [(0, 9)]) == [4, 5]
        assert await outbox.forget("DEV", "loss", epochs[2], [(0, 9)]) == [9]
        assert await outbox.forget("DEV", "eeg", outbox.epoch, [(0, 9)]) == []
        assert outbox.holding.rows == 6


async def test_what_is_given_up_of_a_former_epoch_is_on_record_under_its_epoch(place: Any, make: Any) -> None:
    async with opened(place.store()) as outbox:
        former = outbox.epoch
        for at in range(2):
            outbox.append(make.block(at=at))
    place.damage(2)
    async with opened(place.store()) as outbox:
        outbox.append(make.block(at=2))
        await outbox.commit()
        place.damage(3)
        await outbox.fetch(0, ALL, ALL)
        await outbox.commit()
        found = await losses(outbox)
        assert sorted((loss.epoch, loss.sequences, loss.sample_count) for loss in found) == [
            ("", (0, 0), 10),
            (former, (1, 1), 10),
        ]


async def test_what_was_never_committed_has_never_had_a_sequence(place: Any, make: Any) -> None:
    store = Watched(place.store())
    outbox = Outbox(store, GATEWAY, ON_CALL)
    await outbox.open()
    outbox.append(make.block(at=0))
    await outbox.commit()
    store.failures = 1
    outbox.append(make.block(at=1))
    await outbox.close()
    async with opened(place.store()) as again:
        again.append(make.block(at=2))
        await again.commit()
        found = await again.fetch(0, ALL, ALL)
        assert [(item.row.epoch, item.row.sequence) for item in found] == [(outbox.epoch, 0), (again.epoch, 0)]


async def test_a_block_with_provisional_times_is_durable_and_not_sent(place: Any, make: Any) -> None:
    async with opened(place.store()) as outbox:
        outbox.append(make.block(at=0), "boot", 7)
        outbox.append(make.loss(at=0), "boot", 7)
        outbox.append(make.block(at=1))
        await outbox.commit()
        assert await identities(outbox) == [("DEV", "eeg", 1)]
        assert outbox.holding.rows == 3
        assert not outbox.empty.is_set()
    async with opened(place.store()) as outbox:
        found = await outbox._thread.run(outbox._store.unstamped, ALL)
        assert [(item.row.signal, item.row.boot, item.row.offset_ns) for item in found] == [
            ("eeg", "boot", 7),
            ("loss", "boot", 7),
        ]


async def test_the_record_of_a_loss_with_provisional_times_has_them_too(place: Any, make: Any) -> None:
    async with opened(place.store(), Limits(60.0, 10**6, 6000)) as outbox:
        for at in range(20):
            outbox.append(make.block(at=at), "boot", 7 if at < 2 else 8)
        await outbox.commit()
        assert await losses(outbox) == []
        assert outbox.holding.size <= 6000
        unstamped = await outbox._thread.run(outbox._store.unstamped, ALL)
    found = [item.row for item in unstamped if item.row.signal == "loss"]
    assert {row.offset_ns for row in found} == {7, 8}
    assert {row.boot for row in found} == {"boot"}
    assert sum(row.lost for row in found if row.offset_ns == 7) == 20


async def test_closing_commits_what_is_pending(place: Any, make: Any) -> None:
    async with opened(place.store()) as outbox:
        outbox.append(make.block())
    async with opened(place.store()) as outbox:
        assert outbox.holding.rows == 1


async def test_closing_with_a_disk_that_fails_says_how_much_is_lost(
    store: Any, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(store) as outbox:
        store.failures = 1
        outbox.append(make.block(at=0))
        outbox.append(make.block(at=1))
    assert "2 blocks could not be committed at the end: the disk is full" in caplog.text


async def test_a_receipt_of_another_epoch_forgets_nothing(store: Any, make: Any) -> None:
    async with opened(store) as outbox:
        outbox.append(make.block())
        await outbox.commit()
        assert await outbox.forget("DEV", "eeg", "another", [(0, 9)]) == []
        assert await outbox.forget("DEV", "eeg", outbox.epoch, []) == []
        assert outbox.holding.rows == 1
        assert await outbox.held() == {("DEV", "eeg", outbox.epoch): (0, 0)}


async def test_empty_is_set_only_while_nothing_waits_anywhere(store: Any, make: Any) -> None:
    async with opened(store) as outbox:
        assert outbox.empty.is_set()
        outbox.append(make.block(at=0))
        assert not outbox.empty.is_set()
        await outbox.commit()
        assert not outbox.empty.is_set()
        await outbox.forget("DEV", "eeg", outbox.epoch, [(0, 0)])
        assert outbox.empty.is_set()


async def test_empty_is_not_set_by_a_receipt_while_a_commit_is_under_way(store: Any, make: Any) -> None:
    async with opened(store) as outbox:
        outbox.append(make.block(at=0))
        await outbox.commit()
        store.has_begun.clear()
        store.may_go_on.clear()
        receipt = asyncio.create_task(outbox.forget("DEV", "eeg", outbox.epoch, [(0, 0)]))
        await asyncio.sleep(0)  # its step is in the thread's queue before that of the commit
        outbox.append(make.block(at=1))
        commit = asyncio.create_task(outbox.commit())
        await begun(store)
        assert await receipt == [1]
        assert outbox.holding.rows == 0
        assert not outbox.empty.is_set()
        store.may_go_on.set()
        await commit
        await outbox.forget("DEV", "eeg", outbox.epoch, [(1, 1)])
        assert outbox.empty.is_set()


async def test_a_receipt_that_is_heard_when_the_step_has_just_ended_takes_nothing_off_twice(
    store: Any, make: Any
) -> None:
    has_ended = threading.Event()
    replace = store._store.replace

    def replace_and_tell(*arguments: Any) -> None:
        replace(*arguments)
        has_ended.set()

    store._store.replace = replace_and_tell
    async with opened(store) as outbox:
        for at in range(3):
            outbox.append(make.block(at=at))
        await outbox.commit()
        await outbox.forget("DEV", "eeg", outbox.epoch, [(0, 0)])
        receipt = asyncio.create_task(outbox.forget("DEV", "eeg", outbox.epoch, [(1, 1)]))
        commit = asyncio.create_task(outbox.commit())
        await asyncio.sleep(0)  # both are in the thread's queue
        assert has_ended.wait(SECONDS_MAX)  # and done, before the event loop hears of either
        await receipt
        assert (outbox.holding.rows, outbox.empty.is_set()) == (1, False)
        await commit
        assert (outbox.holding.rows, outbox.empty.is_set()) == (1, False)


async def test_with_no_disk_memory_is_bounded_and_what_found_no_room_is_on_record(
    store: Any, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "PENDING_BYTES_MAX", 3000)
    async with opened(store) as outbox:
        store.failures = 1
        outbox.append(make.block(at=0))
        commit = asyncio.create_task(outbox.commit())
        await until(lambda: outbox.problem)
        for at in range(1, 200):
            outbox.append(make.block(at=at))
            outbox.append(make.block("STRAP", "vital_signs", at=at, n=1))
            outbox.append(make.loss(at=at, count=3))
            outbox.append(make.loss("STRAP", "vital_signs", at=at, count=1))
        assert outbox._pending_bytes < 5000
        assert len(outbox._unaccepted) == 4
        await commit
        await outbox.commit()
        tallies = await outbox.tallies()
        assert tallies["DEV", "eeg"].accepted + tallies["DEV", "eeg"].lost == 200 * 10 + 199 * 3
        assert tallies["STRAP", "vital_signs"].accepted + tallies["STRAP", "vital_signs"].lost == 199 + 199
        found = Counter((loss.device, loss.signal, loss.cause) for loss in await losses(outbox))
        assert found["DEV", "eeg", LossCause.SHED] == 1
        assert found["STRAP", "vital_signs", LossCause.SHED] == 1
        (shed,) = [loss for loss in await losses(outbox) if (loss.device, loss.cause) == ("DEV", LossCause.SHED)]
        assert shed.sequences is None
        assert shed.last_ns == make.block(at=199).last_ns
        assert shed.sample_count % 10 == 0
        stored = [item for item in contents(await outbox.fetch(0, ALL, ALL)) if isinstance(item, SampleBlock)]
        assert shed.first_ns == max(block.last_ns for block in stored if block.signal == "eeg") + 100_000_000
        sequences: dict[StreamKey, list[int]] = {}
        for device, signal, sequence in await identities(outbox):
            sequences.setdefault((device, signal), []).append(sequence)
        assert all(found == list(range(len(found))) for found in sequences.values())


async def test_with_memory_full_of_raw_samples_states_and_then_vital_signs_still_have_room(
    store: Any, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "PENDING_BYTES_MAX", 16_000)

    def append(*signals: str, until_refused: str) -> None:
        """A block of each in turn, until one of that signal finds no room."""
        while not outbox.losses["DEV", until_refused, LossCause.SHED]:
            for signal in signals:
                outbox.append(make.block(signal=signal, at=made[signal], n=10))
                made[signal] += 1

    def refused() -> set[str]:
        return {signal for _, signal, _ in outbox.losses}

    made: Counter[str] = Counter()
    async with opened(store) as outbox:
        store.failures = 1
        outbox.append(make.block("OTHER"))
        commit = asyncio.create_task(outbox.commit())
        await until(lambda: outbox.problem)
        append("eeg", until_refused="eeg")
        assert refused() == {"eeg"}
        append("eeg", "brain_state", "vital_signs", until_refused="brain_state")
        assert refused() == {"eeg", "brain_state"}
        vitals_before = made["vital_signs"]
        append("eeg", "brain_state", "vital_signs", until_refused="vital_signs")
        assert made["brain_state"] > 3
        assert made["vital_signs"] > vitals_before + 2
        assert outbox._pending_bytes < 16_000 * 3 / 2
        await commit
        await outbox.commit()
        tallies = await outbox.tallies()
        for signal, count in made.items():
            assert tallies["DEV", signal].accepted + tallies["DEV", signal].lost == 10 * count
            assert tallies["DEV", signal].lost == outbox.losses["DEV", signal, LossCause.SHED] > 0


async def test_what_found_no_room_is_on_record_even_if_the_end_comes_first(
    place: Any, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "PENDING_BYTES_MAX", 1000)
    async with opened(place.store()) as outbox:
        for at in range(20):
            outbox.append(make.block(at=at))
        assert outbox._unaccepted
    async with opened(place.store()) as outbox:
        tally = (await outbox.tallies())["DEV", "eeg"]
        assert tally.accepted + tally.lost == 200
        assert tally.lost > 0


def given_up(loss: LossRecord) -> list[int]:
    assert loss.sequences is not None
    return list(range(loss.sequences[0], loss.sequences[1] + 1))


async def test_a_full_outbox_sheds_by_class_then_age_and_the_account_is_exact(place: Any, make: Any) -> None:
    produced: Counter[StreamKey] = Counter()
    states_gone_before = 0
    async with opened(place.store(), Limits(60.0, 10**6, 76_000)) as outbox:
        for at in range(80):
            for device, signal, n in (
                ("A", "eeg", 250),
                ("B", "ppg", 25),
                ("A", "brain_state", 5),
                ("B", "vital_signs", 1),
            ):
                outbox.append(make.block(device, signal, at=at, n=n))
                produced[device, signal] += n
            await outbox.commit()
            assert outbox.holding.size <= 76_000
            rows = await outbox.fetch(0, ALL, ALL)
            assert outbox.holding.size == sum(item.row.size for item in rows)
            here: dict[StreamKey, list[int]] = {}
            for item in rows:
                here.setdefault(item.row.key, []).append(item.row.sequence)
            found = await losses(outbox)
            states_gone = sum(len(given_up(loss)) for loss in found if loss.signal == "brain_state")
            if here.get(("A", "eeg")) or here.get(("B", "ppg")):
                assert states_gone == states_gone_before
            states_gone_before = states_gone
            tallies = await outbox.tallies()
            for key in produced:
                gone = sorted(
                    number for loss in found if (loss.device, loss.signal) == key for number in given_up(loss)
                )
                assert sorted(gone + here.get(key, [])) == list(range(at + 1))
                assert gone == list(range(len(gone)))  # oldest first
                lost = sum(loss.sample_count for loss in found if (loss.device, loss.signal) == key)
                stored = sum(item.row.samples for item in rows if item.row.key == key)
                assert stored + lost == produced[key] == tallies[key].accepted
                assert tallies[key].lost == lost == outbox.losses[*key, LossCause.SHED]
        assert {loss.cause for loss in found} == {LossCause.SHED}
        assert 0 < states_gone < 80
        assert len(here["B", "vital_signs"]) == 80


async def test_vital_signs_go_last_but_they_go(place: Any, make: Any, caplog: pytest.LogCaptureFixture) -> None:
    async with opened(place.store(), Limits(60.0, 10**6, 16_000)) as outbox:
        outbox.append(make.block("A", "brain_state", n=5))
        for at in range(60):
            outbox.append(make.block("B", "vital_signs", at=at, n=1))
        await outbox.commit()
        assert outbox.holding.size <= 16_000
        found = await losses(outbox)
        assert [(loss.device, loss.signal, loss.sequences and loss.sequences[0]) for loss in found] == [
            ("A", "brain_state", 0),
            ("B", "vital_signs", 0),
        ]
        tally = (await outbox.tallies())["B", "vital_signs"]
        assert tally.lost == found[1].sample_count
        assert len(await identities(outbox)) == 60 - tally.lost + 2
    assert "nothing left" not in caplog.text


async def test_shedding_takes_steps_of_many_rows_so_that_loss_records_stay_few(place: Any, make: Any) -> None:
    """One by one, each small row would only become a loss record of its own size."""
    async with opened(place.store(), Limits(60.0, 10**6, 200_000)) as outbox:
        for at in range(1200):
            outbox.append(make.block("B", "vital_signs", at=at, n=1))
            if at % 2:
                await outbox.commit()
        tally = (await outbox.tallies())["B", "vital_signs"]
        assert tally.lost > 500
        assert len(await losses(outbox)) < tally.lost / 5
        assert outbox.holding.size <= 200_000


async def test_loss_records_alone_are_never_given_up(place: Any, make: Any, caplog: pytest.LogCaptureFixture) -> None:
    async with opened(place.store(), Limits(60.0, 10**6, 4000)) as outbox:
        for at in range(20):
            outbox.append(make.loss(at=at))
            await outbox.commit()
        outbox.append(make.block(at=21))
        await outbox.commit()
        found = await losses(outbox)
        assert len(found) == 21
        assert found[-1].sequences == (0, 0)
    assert caplog.text.count("nothing left to give up") == 1


async def test_a_disk_that_fails_while_shedding_does_not_end_the_outbox(store: Any, make: Any) -> None:
    async with opened(store, Limits(0.01, 10**6, 5000)) as outbox, running(outbox) as task:
        store.read_failures = 1
        for at in range(40):
            outbox.append(make.block(at=at))
        await until(lambda: outbox.holding.rows == 40 and not store.read_failures)
        outbox.append(make.block(at=40))
        store.failures = 2
        await until(lambda: outbox.holding.rows and outbox.holding.size <= 5000)
        assert not task.done()
        tally = (await outbox.tallies())["DEV", "eeg"]
        stored = sum(item.row.samples for item in await outbox.fetch(0, ALL, ALL))
        assert stored + tally.lost == tally.accepted == 410


async def test_rows_that_are_about_to_go_are_not_sent_any_more(store: Any, make: Any) -> None:
    async with opened(store, Limits(60.0, 10**6, 6000)) as outbox:
        for at in range(8):
            outbox.append(make.block(at=at))
        await outbox.commit()
        assert len(await identities(outbox)) == 8
        for at in range(8, 30):
            outbox.append(make.block(at=at))
        store.replacing_failures = 1
        commit = asyncio.create_task(outbox.commit())
        await until(lambda: outbox.problem)
        given = set(outbox._given_up)
        assert given
        found = await outbox.fetch(0, ALL, ALL)
        assert outbox.problem
        assert {item.id for item in found} == set(range(1, 31)) - given
        await commit
        assert {item.id for item in await outbox.fetch(0, 30, ALL)} == set(range(1, 31)) - given


async def test_a_damaged_row_becomes_a_loss_record_once_and_the_others_go_on(place: Any, make: Any) -> None:
    async with opened(place.store()) as outbox:
        for at in range(6):
            outbox.append(make.block(at=at, n=10 + at))
        await outbox.commit()
    for number in (2, 3, 5):
        place.damage(number)
    async with opened(place.store()) as outbox:
        assert [item.id for item in await outbox.fetch(0, ALL, 2)] == [1, 4]
        assert [item.id for item in await outbox.fetch(4, ALL, 2)] == [6]
        assert [item.id for item in await outbox.fetch(0, ALL, ALL)] == [1, 4, 6]
        assert not outbox.empty.is_set()
        await outbox.commit()
        assert await identities(outbox) == [
            *(("DEV", "eeg", sequence) for sequence in (0, 3, 5)),
            *(("DEV", "loss", sequence) for sequence in range(len(await losses(outbox)))),
        ]
        found = await losses(outbox)
        assert {loss.cause for loss in found} == {LossCause.CORRUPT}
        gone = [number for loss in found for number in given_up(loss)]
        assert sorted(gone) == [1, 2, 4]
        assert sum(loss.sample_count for loss in found) == 11 + 12 + 14
        assert (await outbox.tallies())["DEV", "eeg"] == Tally(6, 75, 37)
        assert outbox.holding.rows == 3 + len(found)


async def test_damaged_rows_that_follow_each_other_share_a_record(place: Any, make: Any) -> None:
    async with opened(place.store()) as outbox:
        for at in range(6):
            outbox.append(make.block(at=at))
        await outbox.commit()
    for number in (2, 3, 4):
        place.damage(number)
    async with opened(place.store(), Limits(60.0)) as outbox, running(outbox):
        await outbox.fetch(0, ALL, ALL)
        await until(lambda: outbox.holding.rows == 4)  # it asks for a commit by itself
        (found,) = await losses(outbox)
        assert (found.sequences, found.sample_count) == ((1, 3), 30)
        assert (found.first_ns, found.last_ns) == (make.block(at=1).first_ns, make.block(at=3).last_ns)


async def test_a_damaged_loss_record_is_issued_again_under_its_sequence_and_counts_once(place: Any, make: Any) -> None:
    async with opened(place.store()) as outbox:
        former = outbox.epoch
        outbox.append(make.loss(at=0, count=5))
        outbox.append(make.loss(at=3, count=8))
        await outbox.commit()
    place.damage(1)
    async with opened(place.store()) as outbox:
        assert await identities(outbox) == [("DEV", "loss", 1)]
        outbox.append(make.loss(at=5, count=1))
        await outbox.commit()
        found = await outbox.fetch(0, ALL, ALL)
        assert [(item.row.epoch == former, item.row.sequence) for item in found] == [(True, 1), (True, 0), (False, 0)]
        assert (await outbox.tallies())["DEV", "eeg"].lost == 14
        assert (await outbox.tallies())["DEV", "loss"].blocks == 3
        (again,) = [loss for loss in await losses(outbox) if loss.cause is LossCause.CORRUPT]
        assert (again.signal, again.sample_count) == ("eeg", 5)
        assert (again.first_ns, again.last_ns) == (make.loss(at=0).first_ns, make.loss(at=0).last_ns)


async def test_a_damaged_row_that_names_no_stream_is_taken_out_and_logged(
    redis_place: Any, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(redis_place.store()) as outbox:
        for at in range(3):
            outbox.append(make.block(at=at))
        await outbox.commit()
    redis_place.damage(2, "signal", b"\xff\xfe/")
    async with opened(redis_place.store()) as outbox:
        assert [item.id for item in await outbox.fetch(0, ALL, ALL)] == [1, 3]
        await outbox.commit()
        assert [item.id for item in await outbox.fetch(0, ALL, ALL)] == [1, 3]
        assert await losses(outbox) == []
    assert "not even the stream is readable" in caplog.text


async def test_loss_sequences_stay_in_order_when_damage_is_found_while_others_wait(place: Any, make: Any) -> None:
    """Committed out of order, the sequences that follow a kill would leave a hole, or be given twice."""
    async with opened(place.store()) as outbox:
        outbox.append(make.block(at=0))
        await outbox.commit()
    place.damage(1)
    async with opened(place.store()) as outbox:
        outbox.append(make.loss(at=1))
        await outbox.fetch(0, ALL, ALL)
        outbox.append(make.loss(at=2))
        await outbox.commit()
        assert await identities(outbox) == [("DEV", "loss", sequence) for sequence in range(3)]
        assert [loss.cause for loss in await losses(outbox)] == [LossCause.RADIO, LossCause.CORRUPT, LossCause.RADIO]
        assert (await outbox.tallies())["DEV", "loss"].blocks == 3


async def test_a_failure_in_the_thread_of_a_cancelled_wait_is_no_noise(
    store: Any, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(store) as outbox:
        store.may_go_on.clear()
        store.failures = 1
        outbox.append(make.block())
        commit = asyncio.create_task(outbox.commit())
        await begun(store)
        commit.cancel()
        await asyncio.sleep(0)
        store.may_go_on.set()
        await asyncio.gather(commit, return_exceptions=True)
    del commit
    gc.collect()
    assert "never retrieved" not in caplog.text


async def test_loss_records_that_nobody_has_seen_become_fewer_before_they_fill_the_quota(place: Any, make: Any) -> None:
    async with opened(place.store(), Limits(60.0, 10**6, 60_000)) as outbox:
        for at in range(600):
            outbox.append(make.loss(at=at, count=3))
            outbox.append(make.loss("DEV", "ppg", at=at, count=2))
            outbox.append(make.block(at=at))
            await outbox.commit()
            assert outbox.holding.size <= 60_000
        rows = await outbox._thread.run(outbox._store.find, "DEV", "loss", outbox.epoch, [(0, 10**6)])
        numbers = sorted(row.sequence for row in rows)
        assert numbers == list(range(len(numbers))), "no sequence is left out"
        assert len(numbers) < 200
        found = await losses(outbox)
        assert sum(loss.sample_count for loss in found if loss.signal == "ppg") == 1200
        assert (
            sum(loss.sample_count for loss in found if loss.cause is LossCause.RADIO and loss.signal == "eeg") == 1800
        )
        tallies = await outbox.tallies()
        assert (tallies["DEV", "eeg"].accepted, tallies["DEV", "ppg"].lost) == (6000, 1200)
        stored = sum(item.row.samples for item in await outbox.fetch(0, ALL, ALL))
        given = sum(loss.sample_count for loss in found if loss.cause is LossCause.SHED)
        assert stored + given == 6000
        assert tallies["DEV", "eeg"].lost == given + 1800


async def test_loss_records_that_were_shown_keep_their_identity_and_content(place: Any, make: Any) -> None:
    async with opened(place.store(), Limits(60.0, 10**6, 60_000)) as outbox:
        shown: dict[Any, bytes] = {}
        for at in range(400):
            outbox.append(make.loss(at=at, count=3))
            await outbox.commit()
            if at % 97 == 0:
                for item in await outbox.fetch(0, ALL, ALL):
                    assert shown.setdefault(item.row.identity, item.row.payload.data) == item.row.payload.data
        after = {item.row.identity: item.row.payload.data for item in await outbox.fetch(0, ALL, ALL)}
        assert {identity: after[identity] for identity in shown} == shown
        assert sum(loss.sample_count for loss in await losses(outbox)) == 1200
        assert len(shown) < len(after) < 400
