"""Blocks cut at the borders of streams, and a cache that never outlives a change."""

from __future__ import annotations

import itertools
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_sync import binding
from cloud_sync.binding import Bindings, cut
from cloud_sync.registry import admin
from cloud_sync.registry.binding_rows import BoundPeriod
from gateway.samples import ClockStamp, ClockState, SampleBlock


def block(*times_ns: int) -> SampleBlock:
    times = np.array(times_ns, dtype=np.int64)
    return SampleBlock("d", "eeg", times, {"x": times.astype(float)}, ClockStamp(ClockState.SYNCED, 0))


def period(stream: int, from_ns: int, to_ns: int | None) -> BoundPeriod:
    return BoundPeriod(UUID(int=stream), UUID(int=0), from_ns, to_ns, ())


Borders = st.lists(st.integers(0, 60), min_size=2, max_size=8, unique=True).map(sorted)


@given(st.sets(st.integers(0, 60), min_size=1), Borders, st.sets(st.integers(0, 7)))
def test_every_sample_is_in_its_stream_or_waits(times: set[int], borders: list[int], holes: set[int]) -> None:
    periods = [
        period(number, first, last)
        for number, (first, last) in enumerate(itertools.pairwise(borders))
        if number not in holes
    ]
    found = cut(block(*sorted(times)), periods, "why")
    placed = {int(t): part.period for part in found.bound for t in part.samples.times_ns}
    waiting = set() if found.waiting is None else set(found.waiting.times_ns.tolist())
    assert placed.keys() | waiting == times
    assert not placed.keys() & waiting
    assert all(of.holds(t) for t, of in placed.items())
    unbound = {t for t in times if not any(one.holds(t) for one in periods)}
    assert unbound <= waiting
    if waiting:
        assert {min(waiting), max(waiting)} <= unbound
        assert not [t for t in placed if min(waiting) < t < max(waiting)]


def test_the_last_stream_is_open() -> None:
    found = cut(block(1, 5, 10**18), [period(1, 0, 5), period(2, 5, None)], "")
    assert [len(part.samples) for part in found.bound] == [1, 2]


@pytest.mark.parametrize("times", [(-(2**63), -(2**63) + 1), (2**63 - 2, 2**63 - 1), (-(2**63), 2**63 - 1)])
def test_borders_beyond_64_bits(times: tuple[int, int]) -> None:
    found = cut(block(*times), [period(1, -(2**63) - 10**12, 2**63 + 10**12)], "")
    assert found.waiting is None
    assert cut(block(*times), [period(1, -(2**63) - 10**12, -(2**63))], "").bound == ()
    assert cut(block(*times), [period(1, 2**63, None)], "").bound == ()


async def test_a_period_is_asked_for_once_until_something_changes(chain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    resolve = binding.resolve

    async def counted(connection: Any, device: str, *more: Any) -> Any:
        asked.append(device)
        return await resolve(connection, device, *more)

    monkeypatch.setattr(binding, "resolve", counted)
    bindings = Bindings(chain.registry)
    for second in range(5):
        found = await bindings.bind(chain.vitals(first_ns=chain.noon_ns + second * 10**10))
        assert found.waiting is None
    assert asked == ["STRAP-1"]
    await bindings.bind(chain.vitals(first_ns=chain.noon_ns - 10**12))
    assert len(asked) == 2
    bindings.forget("CYTON-1")
    await bindings.bind(chain.vitals())
    assert len(asked) == 2
    for told in ("STRAP-1", "*", ""):
        bindings.forget(told)
        await bindings.bind(chain.vitals())
    assert len(asked) == 5


async def test_nobody_is_remembered_until_the_next_change_only(chain: Any) -> None:
    bindings = Bindings(chain.registry)
    assert (await bindings.bind(chain.vitals("NEW-1"))).reason == "unknown device"
    await chain.add_device("NEW-1", "hr_strap", "A")
    assert (await bindings.bind(chain.vitals("NEW-1"))).reason == "unknown device"
    bindings.forget("NEW-1")
    assert (await bindings.bind(chain.vitals("NEW-1"))).waiting is None


async def test_a_change_during_the_question_is_not_papered_over(chain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bindings = Bindings(chain.registry)
    resolve = binding.resolve

    async def overtaken(connection: Any, device: str, *more: Any) -> Any:
        found = await resolve(connection, device, *more)
        bindings.forget(device)
        return found

    monkeypatch.setattr(binding, "resolve", overtaken)
    await bindings.bind(chain.vitals())
    assert not bindings._known


async def test_an_old_answer_is_asked_again(chain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bindings = Bindings(chain.registry)
    first = await bindings.bind(chain.vitals())
    moved = chain.noon_ns + 10**9
    async with chain.registry.connection() as connection:
        await admin.assign_device(
            connection, "STRAP-1", "B", since=admin.datetime.fromtimestamp(moved / 1e9, admin.UTC)
        )
    assert len((await bindings.bind(chain.vitals())).bound) == len(first.bound) == 1
    monkeypatch.setattr(binding, "AGE_S_MAX", 0.0)
    assert len((await bindings.bind(chain.vitals())).bound) == 2


async def test_the_cache_is_bounded(chain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "SIGNALS_MAX", 3)
    bindings = Bindings(chain.registry)
    for number in range(6):
        await bindings.bind(chain.vitals(f"NEW-{number}"))
    assert [device for device, _ in bindings._known] == ["NEW-3", "NEW-4", "NEW-5"]


async def test_a_tag_that_cannot_be_written_makes_its_samples_wait(chain: Any) -> None:
    bindings = Bindings(chain.registry)
    await bindings.bind(chain.vitals())
    await chain.run("UPDATE timeseries_binding_tag SET tag_value = 'ends in \\'")
    bindings.forget("")
    found = await bindings.bind(chain.vitals())
    assert found.bound == ()
    assert "backslash" in found.reason
