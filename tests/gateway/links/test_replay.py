"""Link to a recording."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from gateway.errors import RefusedError, UnavailableError
from gateway.links.base import Chunk
from gateway.links.replay import ReplayLink

MS = 1_000_000
PARTS = [Chunk(b"a", 0, "eeg"), Chunk(b"b", 40 * MS, "aux"), Chunk(b"c", 80 * MS, "eeg")]


def parts() -> Iterator[Chunk]:
    return iter(PARTS)


async def played(link: ReplayLink) -> list[Chunk]:
    chunks: list[Chunk] = []
    message = ""
    try:
        while True:
            chunks.append(await asyncio.wait_for(link.read(), 10))
    except UnavailableError as end:
        message = end.message
    assert "has ended" in message
    return chunks


async def test_at_real_speed_parts_come_at_their_times() -> None:
    link = ReplayLink("night.edf", parts, 80 * MS)
    await link.open()
    begin_ns = time.monotonic_ns()
    chunks = await played(link)
    assert [(chunk.data, chunk.channel) for chunk in chunks] == [(b"a", "eeg"), (b"b", "aux"), (b"c", "eeg")]
    for chunk, part in zip(chunks, PARTS, strict=True):
        # Late by what the machine takes, never early.
        assert chunk.arrival_ns >= begin_ns + part.arrival_ns - 10 * MS
    assert chunks[2].arrival_ns - chunks[0].arrival_ns >= 70 * MS
    assert link.name == "night.edf"


async def test_as_fast_as_possible_times_keep_their_distances_and_end_now() -> None:
    hour_ns = 3600 * 10**9
    link = ReplayLink("night.edf", lambda: iter([Chunk(b"a", 0), Chunk(b"b", hour_ns)]), hour_ns, paced=False)
    before_ns = time.monotonic_ns()
    await link.open()
    first, last = await played(link)
    assert last.arrival_ns - first.arrival_ns == hour_ns
    assert before_ns <= last.arrival_ns <= time.monotonic_ns()


async def test_the_event_loop_stays_free() -> None:
    link = ReplayLink("many", lambda: (Chunk(b"x", k) for k in range(1000)), 1000, paced=False)
    await link.open()
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    assert len(await played(link)) == 1000
    task.cancel()
    assert turns >= 999


async def test_once_is_once() -> None:
    link = ReplayLink("night.edf", parts, 80 * MS, paced=False)
    with pytest.raises(UnavailableError, match="is not open"):
        await link.read()
    await link.open()
    await played(link)
    assert link.ended
    await link.close()
    with pytest.raises(RefusedError, match="to its end") as refused:
        await link.open()
    assert "repeat" in refused.value.hint


async def test_repeated_it_begins_anew() -> None:
    link = ReplayLink("night.edf", parts, 80 * MS, paced=False, repeat=True)
    for _ in range(3):
        await link.open()
        assert len(await played(link)) == 3
    # A connection that was closed early begins at the beginning, too, and is not the end.
    link = ReplayLink("night.edf", parts, 80 * MS, paced=False)
    await link.open()
    await link.read()
    await link.write(b"forgotten")
    await link.close()
    await link.open()
    assert len(await played(link)) == 3
