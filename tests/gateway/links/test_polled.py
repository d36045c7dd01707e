"""Link over a library that blocks: its thread, its bounds, its ends."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import pytest

from gateway.errors import ConfigError, UnavailableError, WardlinkError
from gateway.links import polled
from gateway.links.polled import PolledLink

DEADLINE_S = 10.0


class Library:
    """A source that gives what it is told to."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.refusal: Exception | None = None
        self.failure: Exception | None = None
        self.data = b""
        self.polls = 0
        self.closed = 0
        self.threads: set[str] = set()

    def open(self) -> None:
        self.threads.add(threading.current_thread().name)
        self.gate.wait()
        if self.refusal:
            raise self.refusal

    def poll(self) -> bytes:
        self.threads.add(threading.current_thread().name)
        self.polls += 1
        if self.failure:
            raise self.failure
        time.sleep(0.001)
        data, self.data = self.data, b""
        return data

    def close(self) -> None:
        self.threads.add(threading.current_thread().name)
        self.closed += 1


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            if condition():
                return
            await asyncio.sleep(0.005)


async def test_bytes_arrive_with_their_time_and_one_thread_does_it_all() -> None:
    library = Library()
    link = PolledLink("lab", lambda: library)
    await link.open()
    before_ns = time.monotonic_ns()
    library.data = b"abc"
    chunk = await asyncio.wait_for(link.read(), DEADLINE_S)
    assert chunk.data == b"abc"
    assert before_ns < chunk.arrival_ns < time.monotonic_ns()
    await link.close()
    await link.close()
    assert library.closed == 1
    assert library.threads == {"polled lab"}
    assert not [thread for thread in threading.enumerate() if thread.name == "polled lab"] or library.closed
    with pytest.raises(UnavailableError, match="is not open"):
        await link.read()


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (UnavailableError("not there", hint="look"), UnavailableError, "not there"),
        (ConfigError("not installed"), ConfigError, "not installed"),
        (RuntimeError("oops"), UnavailableError, "the library failed"),
    ],
)
async def test_refusals(error: Exception, kind: type[WardlinkError], text: str) -> None:
    library = Library()
    library.refusal = error
    link = PolledLink("lab", lambda: library)
    with pytest.raises(kind, match=text):
        await link.open()
    assert library.closed == 1


@pytest.mark.parametrize("error", [UnavailableError("cut off"), RuntimeError("oops")])
async def test_what_came_before_the_end_is_given_out_first(error: Exception) -> None:
    library = Library()
    link = PolledLink("lab", lambda: library)
    await link.open()
    library.data = b"last"
    await until(lambda: not library.data)
    library.failure = error
    await until(lambda: library.closed == 1)
    assert (await link.read()).data == b"last"
    for _ in range(2):
        with pytest.raises(UnavailableError, match=r"cut off|oops"):
            await link.read()
    await link.close()


async def test_a_waiting_reader_learns_of_the_end() -> None:
    library = Library()
    link = PolledLink("lab", lambda: library)
    await link.open()
    reading = asyncio.create_task(link.read())
    await asyncio.sleep(0)
    library.failure = UnavailableError("cut off")
    with pytest.raises(UnavailableError, match="cut off"):
        await asyncio.wait_for(reading, DEADLINE_S)
    await link.close()


async def test_a_cancelled_opening_closes_what_it_opened() -> None:
    library = Library()
    library.gate.clear()
    link = PolledLink("lab", lambda: library)
    opening = asyncio.create_task(link.open())
    await until(lambda: bool(library.threads))
    opening.cancel()
    library.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await opening
    await until(lambda: library.closed == 1)


async def test_a_library_that_hangs_does_not_hold_the_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polled, "CLOSE_TIMEOUT_S", 0.05)
    library = Library()
    library.gate.clear()
    link = PolledLink("lab", lambda: library)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(link.open(), 0.05)
    library.gate.set()
    await until(lambda: library.closed == 1)


@pytest.mark.parametrize("limit", ["QUEUE_BYTES_MAX", "QUEUE_CHUNKS_MAX"])
async def test_too_much_unread_is_an_error_after_what_was_kept(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polled, limit, 10 if limit == "QUEUE_BYTES_MAX" else 1)
    library = Library()
    link = PolledLink("lab", lambda: library)
    await link.open()
    library.data = b"12345678"
    await until(lambda: not library.data)
    library.data = b"9abc"
    await until(lambda: library.closed == 1)
    assert (await link.read()).data == b"12345678"
    with pytest.raises(UnavailableError, match="did not read for too long"):
        await link.read()
    await link.close()


async def test_there_is_nothing_to_write_to() -> None:
    with pytest.raises(UnavailableError, match="takes no bytes"):
        await PolledLink("lab", Library).write(b"x")
