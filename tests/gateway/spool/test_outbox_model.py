"""The outbox against a plain model of it: whatever happens in whatever order, the account of every stream is exact."""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from gateway.errors import UnavailableError
from gateway.samples import LossCause, LossRecord
from gateway.spool.outbox import Limits, Outbox
from gateway.spool.redis_store import RedisStore
from gateway.spool.sqlite_store import SqliteStore
from gateway.spool.store import Row, Store, StreamKey, Tally
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

    def replace(self, ids: Sequence[int], rows: Sequence[Row]) -> None:
        self._fail()
        self._store.replace(ids, rows)

    def _fail(self) -> None:
        if self.failures:
            self.failures -= 1
            raise UnavailableError("the disk is full")


class OutboxMachine(RuleBasedStateMachine):
    """Sequences and samples of each stream: pending, here, given up, forgotten; together they are what was produced."""

    make: Any
    new_place: Callable[[], Any]

    def __init__(self) -> None:
        super().__init__()
        self.place = self.new_place()
        self.runner = asyncio.Runner()
        self.pending: dict[StreamKey, list[int]] = defaultdict(list)
        """Samples of the blocks that are not committed."""
        self.accepted: dict[StreamKey, list[int]] = defaultdict(list)
        """Samples of each block that is, by sequence."""
        self.forgotten: dict[StreamKey, set[int]] = defaultdict(set)
        self.pending_radio: dict[StreamKey, int] = defaultdict(int)
        self.radio: dict[StreamKey, int] = defaultdict(int)
        self.loss_records: dict[tuple[str, int], LossRecord] = {}
        """All that were ever seen, by device and sequence."""
        self.id_of: dict[tuple[str, str, int], int] = {}
        self.last_id = 0
        self.start()

    def start(self) -> None:
        self.store = Failing(self.place.store())
        self.outbox = Outbox(self.store, "gw-model", LIMITS)
        self.runner.run(self.outbox.open())

    def teardown(self) -> None:
        self.runner.run(self.outbox.close())
        self.runner.close()
        self.place.close()

    @rule(stream=streams, n=st.integers(1, 30), count=st.integers(1, 6))
    def append(self, stream: StreamKey, n: int, count: int) -> None:
        for _ in range(count):
            at = len(self.accepted[stream]) + len(self.pending[stream])
            self.outbox.append(self.make.block(*stream, at=at, n=n))
            self.pending[stream].append(n)
        assert not self.outbox.empty.is_set()

    @rule(stream=streams, count=st.integers(1, 99))
    def lose(self, stream: StreamKey, count: int) -> None:
        self.outbox.append(self.make.loss(*stream, count=count))
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

    @rule(stream=streams, first=st.integers(0, 40), count=st.integers(1, 20), loss=st.booleans())
    def forget(self, stream: StreamKey, first: int, count: int, loss: bool) -> None:
        self.commit()
        device, signal = (stream[0], "loss") if loss else stream
        here = {number for name, of, number in self.id_of if (name, of) == (device, signal)}
        expected = here & set(range(first, first + count))
        gone = self.runner.run(self.outbox.forget(device, signal, self.outbox.epoch, [(first, first + count - 1)]))
        assert sorted(gone) == sorted(self.id_of[device, signal, number] for number in expected)
        self.forgotten[device, signal] |= expected
        self.check()

    @rule(which=st.integers(0, 1000), column=st.sampled_from(["payload", "checksum"]))
    def damage(self, which: int, column: str) -> None:
        self.commit()
        if self.id_of:
            number = sorted(self.id_of.values())[which % len(self.id_of)]
            self.place.damage(number, column, b"damaged" if column == "payload" else 1)
            self.check()

    @rule()
    def reopen(self) -> None:
        self.runner.run(self.outbox.close())
        self.everything_pending_is_accepted()
        self.start()
        self.check()

    @rule()
    def crash(self) -> None:
        """What was not committed is lost, and its sequences were never given."""
        self.pending.clear()
        self.pending_radio.clear()
        self.store.close()
        self.outbox._thread.shutdown()
        self.start()
        self.check()

    def everything_pending_is_accepted(self) -> None:
        for stream, samples in self.pending.items():
            self.accepted[stream] += samples
        for stream, count in self.pending_radio.items():
            self.radio[stream] += count
        self.pending.clear()
        self.pending_radio.clear()

    def check(self) -> None:
        rows = self.runner.run(self.outbox.fetch(0, ALL, ALL))
        if self.outbox._given_up:
            self.runner.run(self.outbox.commit())
            self.everything_pending_is_accepted()
            rows = self.runner.run(self.outbox.fetch(0, ALL, ALL))
        ids = [item.id for item in rows]
        assert ids == sorted(set(ids))
        new = {(*item.row.key, item.row.sequence): item.id for item in rows}
        assert len(new) == len(rows)
        assert all(number > self.last_id for identity, number in new.items() if self.id_of.get(identity) != number)
        self.id_of = new
        self.last_id = max([self.last_id, *ids])
        for item in rows:
            content = codec.decode(item.row.payload.data, item.row.payload.content_type).content
            if isinstance(content, LossRecord):
                known = self.loss_records.setdefault((item.row.device, item.row.sequence), content)
                assert (known.signal, known.sample_count) == (content.signal, content.sample_count)
        if any(self.pending.values()) or any(self.pending_radio.values()):
            return
        self.check_account()

    def check_account(self) -> None:
        tallies = self.runner.run(self.outbox.tallies())
        given_up: dict[StreamKey, set[int]] = defaultdict(set)
        lost: dict[StreamKey, int] = defaultdict(int)
        for loss in self.loss_records.values():
            key = (loss.device, loss.signal)
            lost[key] += loss.sample_count
            if loss.cause is LossCause.RADIO:
                continue
            assert loss.sequences is not None
            numbers = set(range(loss.sequences[0], loss.sequences[1] + 1))
            assert not numbers & given_up[key]
            assert loss.sample_count == sum(self.accepted[key][number] for number in numbers)
            given_up[key] |= numbers
        for key, samples in self.accepted.items():
            here = {number for device, signal, number in self.id_of if (device, signal) == key}
            parts = (here, given_up[key], self.forgotten[key])
            assert sorted(itertools.chain(*parts)) == list(range(len(samples)))
            assert tallies.get(key, Tally(0, 0, 0)) == Tally(len(samples), sum(samples), lost[key])
            assert lost[key] == self.radio[key] + sum(samples[number] for number in given_up[key])
        for device in ("A", "B"):
            issued = sorted(number for name, number in self.loss_records if name == device)
            assert issued == list(range(len(issued)))
        holding = self.outbox.holding
        rows = self.runner.run(self.outbox.fetch(0, ALL, ALL))
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
