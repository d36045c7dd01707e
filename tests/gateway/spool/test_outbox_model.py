"""The outbox against a plain model of it: whatever happens in whatever order, the account of every stream is exact."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from gateway.errors import UnavailableError
from gateway.samples import LossCause, LossRecord
from gateway.spool.outbox import Limits, Outbox
from gateway.spool.redis_store import RedisStore
from gateway.spool.sqlite_store import SqliteStore
from gateway.spool.store import DamagedRow, EpochKey, Row, Store, StoredRow, StreamKey, Tally
from gateway.wire import codec

ALL = 10**9
LIMITS = Limits(60.0, 10**6, 12_000)
"""Some twenty rows."""
RAW, STATE, VITALS = "eeg", "brain_state", "vital_signs"
streams = st.sampled_from([("A", RAW), ("A", STATE), ("B", RAW), ("B", VITALS)])


class Failing:
    """A store of which writing steps fail when told to, before or after they were carried out."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.failures = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def append(self, rows: Sequence[Row]) -> None:
        self._fail()
        self._store.append(rows)

    def replace(self, ids: Sequence[int], rows: Sequence[Row], *more: Any) -> None:
        self._fail()
        self._store.replace(ids, rows, *more)

    def _fail(self) -> None:
        if self.failures:
            self.failures -= 1
            raise UnavailableError("the disk is full")


@dataclass
class Books:
    """What the outbox as it is now must say; a backup has books of its own."""

    accepted: dict[EpochKey, list[int]] = field(default_factory=lambda: defaultdict(list))
    """Samples of each block, by sequence."""
    forgotten: dict[EpochKey, set[int]] = field(default_factory=lambda: defaultdict(set))
    radio: dict[StreamKey, int] = field(default_factory=lambda: defaultdict(int))
    loss_records: dict[tuple[str, str, str, int], LossRecord] = field(default_factory=dict)
    """All that were ever seen."""
    id_of: dict[tuple[str, str, str, int], int] = field(default_factory=dict)


class OutboxMachine(RuleBasedStateMachine):
    """Sequences and samples of each stream and epoch: pending, here, given up, forgotten; together what was produced.

    A row that is restored from a backup is here again, and one that came after the backup is nowhere.
    """

    make: Any
    new_place: Callable[[], Any]

    def __init__(self) -> None:
        super().__init__()
        self.place = self.new_place()
        self.runner = asyncio.Runner()
        self.pending: dict[StreamKey, list[int]] = defaultdict(list)
        """Samples of the blocks that are not committed."""
        self.pending_radio: dict[StreamKey, int] = defaultdict(int)
        self.books = Books()
        self.backup: Books | None = None
        self.bytes_of: dict[tuple[str, str, str, int], bytes] = {}
        """Of every final block that was ever seen, restored or not: one identity has one content for ever."""
        self.epochs: set[str] = set()
        self.produced = 0
        self.start()

    def start(self) -> None:
        self.store = Failing(self.place.store())
        self.outbox = Outbox(self.store, "gw-model", LIMITS)
        self.runner.run(self.outbox.open())
        assert self.outbox.epoch not in self.epochs
        self.epochs.add(self.outbox.epoch)
        self.last_id = 0

    def teardown(self) -> None:
        self.runner.run(self.outbox.close())
        self.runner.close()
        self.place.close()

    @rule(stream=streams, n=st.integers(1, 30), count=st.integers(1, 6), boot=st.sampled_from(["", "", "boot"]))
    def append(self, stream: StreamKey, n: int, count: int, boot: str) -> None:
        for _ in range(count):
            self.outbox.append(self.make.block(*stream, at=self.produced, n=n), boot, len(boot))
            self.produced += 1
            self.pending[stream].append(n)
        assert not self.outbox.empty.is_set()

    @rule(stream=streams, count=st.integers(1, 99), boot=st.sampled_from(["", "", "boot"]))
    def lose(self, stream: StreamKey, count: int, boot: str) -> None:
        self.outbox.append(self.make.loss(*stream, count=count), boot, len(boot))
        self.pending_radio[stream] += count

    @rule()
    def commit(self) -> None:
        self.runner.run(self.outbox.commit())
        self.everything_pending_is_accepted()
        self.check()

    @rule()
    def commit_after_a_failure(self) -> None:
        self.store.failures = 1
        self.commit()
        self.store.failures = 0

    @rule(cancel_after=st.integers(1, 6))
    def cancel_a_commit(self, cancel_after: int) -> None:
        async def cancelled() -> None:
            commit = asyncio.create_task(self.outbox.commit())
            for _ in range(cancel_after):
                await asyncio.sleep(0)
            commit.cancel()
            await asyncio.gather(commit, return_exceptions=True)

        oldest = self.outbox._pending[:1]
        self.runner.run(cancelled())
        if oldest and not any(row is oldest[0] for row in self.outbox._pending):
            self.everything_pending_is_accepted()  # it was too late to cancel; one step takes all or nothing

    @rule(which=st.integers(0, 1000), first=st.integers(0, 20), count=st.integers(1, 20))
    def forget(self, which: int, first: int, count: int) -> None:
        """A receipt for one of the streams and epochs that are here."""
        self.commit()
        keys = sorted({identity[:3] for identity in self.books.id_of})
        if not keys:
            return
        key = keys[which % len(keys)]
        expected = {number for *of, number in self.books.id_of if tuple(of) == key} & set(range(first, first + count))
        gone = self.runner.run(self.outbox.forget(*key, [(first, first + count - 1)]))
        assert sorted(gone) == sorted(self.books.id_of[*key, number] for number in expected)
        self.books.forgotten[key] |= expected
        self.check()

    @rule(limit=st.integers(1, 9))
    def stamp(self, limit: int) -> None:
        """Give the oldest rows with provisional times their final ones."""
        self.commit()

        def final(row: Row) -> Row:
            return dataclasses.replace(row, boot="", offset_ns=0)

        self.runner.run(self.outbox.stamp(final, limit))
        self.check()

    @rule(which=st.integers(0, 1000), column=st.sampled_from(["payload", "checksum"]))
    def damage(self, which: int, column: str) -> None:
        self.commit()
        final = sorted(self.books.id_of[item.row.identity] for item in self.fetched())
        if final:
            number = final[which % len(final)]
            self.place.damage(number, column, b"damaged" if column == "payload" else 1)
            self.check()

    @rule()
    def reopen(self) -> None:
        self.stop()
        self.start()
        self.check()

    @rule()
    def crash(self) -> None:
        """What was not committed is lost, and its sequences were never given; so are receipts that waited."""
        for place in self.outbox._receipted.values():
            self.books.forgotten[place.epoch_key].discard(place.sequence)
        self.pending.clear()
        self.pending_radio.clear()
        self.store.close()
        self.outbox._thread.shutdown()
        self.start()
        self.check()

    @rule()
    def back_up(self) -> None:
        self.stop()
        self.place.back_up()
        self.backup = copy.deepcopy(self.books)
        self.start()

    @precondition(lambda self: self.backup is not None)
    @rule()
    def restore(self) -> None:
        """Somebody puts an old outbox in the place of this one."""
        assert self.backup is not None
        self.stop()
        self.place.restore()
        self.books = copy.deepcopy(self.backup)
        self.start()
        self.check()

    def stop(self) -> None:
        self.runner.run(self.outbox.close())
        self.everything_pending_is_accepted()

    def everything_pending_is_accepted(self) -> None:
        for stream, samples in self.pending.items():
            self.books.accepted[*stream, self.outbox.epoch] += samples
        for stream, count in self.pending_radio.items():
            self.books.radio[stream] += count
        self.pending.clear()
        self.pending_radio.clear()

    def fetched(self) -> list[StoredRow]:
        return self.runner.run(self.outbox.fetch(0, ALL, ALL))

    def unstamped(self, limit: int = ALL) -> list[StoredRow | DamagedRow]:
        found = self.runner.run(self.outbox._thread.run(self.store.unstamped, limit))
        return [item for item in found if isinstance(item, DamagedRow) or not self.outbox._goes(item.id)]

    def here(self) -> list[StoredRow]:
        final, provisional = self.fetched(), self.unstamped()
        assert all(not item.row.boot for item in final)
        assert all(isinstance(item, StoredRow) and item.row.boot for item in provisional)
        return sorted([*final, *provisional], key=lambda item: item.id)  # type: ignore[list-item]

    def check(self) -> None:
        self.fetched()
        if self.outbox._given_up:
            self.runner.run(self.outbox.commit())
            self.everything_pending_is_accepted()
        rows = self.here()
        ids = [item.id for item in rows]
        assert ids == sorted(set(ids))
        new = {item.row.identity: item.id for item in rows}
        assert len(new) == len(rows)
        if self.last_id:
            appeared = [number for identity, number in new.items() if self.books.id_of.get(identity) != number]
            assert all(number > self.last_id for number in appeared)
        self.books.id_of = new
        self.last_id = max([self.last_id, *ids])
        for item in rows:
            content = codec.decode(item.row.payload.data, item.row.payload.content_type).content
            if isinstance(content, LossRecord):
                known = self.books.loss_records.setdefault(item.row.identity, content)
                assert (known.signal, known.sample_count) == (content.signal, content.sample_count)
            else:
                assert self.bytes_of.setdefault(item.row.identity, item.row.payload.data) == item.row.payload.data
        if any(self.pending.values()) or any(self.pending_radio.values()):
            return
        self.check_account()

    def check_account(self) -> None:
        books, tallies = self.books, self.runner.run(self.outbox.tallies())
        given_up: dict[EpochKey, set[int]] = defaultdict(set)
        lost: dict[StreamKey, int] = defaultdict(int)
        for (_, _, epoch, _), loss in books.loss_records.items():
            lost[loss.device, loss.signal] += loss.sample_count
            if loss.cause is LossCause.RADIO:
                continue
            assert loss.sequences is not None
            key = (loss.device, loss.signal, loss.epoch or epoch)
            numbers = set(range(loss.sequences[0], loss.sequences[1] + 1))
            assert not numbers & given_up[key]
            assert loss.sample_count == sum(books.accepted[key][number] for number in numbers)
            given_up[key] |= numbers
        expected: dict[StreamKey, list[int]] = defaultdict(lambda: [0, 0])
        for key, samples in books.accepted.items():
            here = {number for *of, number in books.id_of if tuple(of) == key}
            parts = (here, given_up[key], books.forgotten[key])
            assert sorted(itertools.chain(*parts)) == list(range(len(samples)))
            expected[key[:2]][0] += len(samples)
            expected[key[:2]][1] += sum(samples)
        for stream, (blocks, samples_accepted) in expected.items():
            assert tallies.get(stream, Tally(0, 0, 0)) == Tally(blocks, samples_accepted, lost[stream])
            of_blocks = sum(
                books.accepted[key][number] for key, gone in given_up.items() if key[:2] == stream for number in gone
            )
            assert lost[stream] == books.radio[stream] + of_blocks
        for device, epoch in itertools.product("AB", self.epochs):
            issued = sorted(number for name, _, of, number in books.loss_records if (name, of) == (device, epoch))
            assert issued == list(range(len(issued)))
        holding, rows = self.outbox.holding, self.here()
        assert (holding.rows, holding.size) == (len(rows), sum(item.row.size for item in rows))
        assert self.outbox.empty.is_set() == (not rows)


class NewPlaces:
    """A place of its own for each example."""

    def __init__(self, place: Any) -> None:
        self._kind = type(place)
        self._place = place
        self._numbers = itertools.count(1)

    def __call__(self) -> Any:
        number = next(self._numbers)
        if hasattr(self._place, "path"):
            return self._kind(self._place.path.with_name(f"outbox-{number}.db"))
        self._place.client.flushdb()
        return self._kind(self._place.url)


@pytest.mark.timeout(120)
def test_the_outbox_is_what_its_model_is(place: Any, make: Any) -> None:
    machine = type("Machine", (OutboxMachine,), {"make": make, "new_place": staticmethod(NewPlaces(place))})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=40,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )


def test_the_places_of_the_model_are_the_real_stores(place: Any) -> None:
    assert isinstance(NewPlaces(place)().store(), SqliteStore | RedisStore)
