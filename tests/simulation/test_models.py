"""The models do what the real things do where it matters: a simulation is worth no more than they are."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gateway.errors import UnavailableError
from gateway.mqtt_messages import Hello, Inbound, Intake, Outbound
from gateway.samples import NS_PER_S, ClockStamp, ClockState, SampleBlock
from gateway.spool.outbox import Limits, Outbox
from tests.simulation.books import Books
from tests.simulation.broker import NOTICED_AFTER_S, QUEUE_MAX, Broker, Line
from tests.simulation.disk import Disk
from tests.simulation.host import HOST, Host, Network, SystemClock, has_power
from tests.simulation.stores import ModelDatabase, ModelTimeSeries, RegistryServer, SeriesServer
from tests.simulation.virtual_loop import StuckError, VirtualLoop

DAY_S = 86_400.0


def live(life: Callable[[VirtualLoop], Awaitable[None]], seed: str = "models") -> None:
    """Run something in virtual time."""
    loop = VirtualLoop(seed)
    loop.has_power = has_power
    try:
        host = Host("test", loop, Network(random.Random(seed), (0.01, 0.1)), SystemClock())
        context = copy_context()
        context.run(HOST.set, host)
        loop.run_until_complete(loop.create_task(life(loop), context=context))  # type: ignore[arg-type]
    finally:
        loop.close()


class Client:
    """Somebody at the broker."""

    def __init__(
        self, broker: Broker, name: str, *wanted: str, will: Outbound | None = None, window: int = 100
    ) -> None:
        self.got: list[Inbound] = []
        network = Network(random.Random(name), (0.01, 0.1))
        self.host = Host(name, broker.loop, network, SystemClock())
        hello = Hello(name, None, None, clean=False, receive_maximum=window, will=will)
        context = copy_context()
        context.run(HOST.set, self.host)
        self.line: Line = context.run(Line, broker, hello, wanted, self.got.append, Intake(None))

    async def connected(self) -> Client:
        await self.line.greet()
        await asyncio.sleep(1)
        return self

    @property
    def texts(self) -> list[str]:
        return [message.payload.decode() for message in self.got]


def said(text: object, topic: str = "a", *, retain: bool = False) -> Outbound:
    return Outbound(topic, str(text).encode(), retain=retain)


# --- time


def test_a_year_passes_at_once_and_in_order() -> None:
    seen: list[float] = []

    async def life(loop: VirtualLoop) -> None:
        async def wait(seconds: float) -> None:
            await asyncio.sleep(seconds)
            seen.append(loop.time())

        await asyncio.gather(*(wait(days * DAY_S) for days in (365, 1, 30)))

    live(life)
    assert seen == [DAY_S, 30 * DAY_S, 365 * DAY_S]


def test_who_waits_for_ever_or_in_circles_is_found_out() -> None:
    async def for_ever(_loop: VirtualLoop) -> None:
        await asyncio.Event().wait()

    async def in_circles(loop: VirtualLoop) -> None:
        def again() -> None:
            loop.call_soon(again)

        again()
        await asyncio.Event().wait()

    for life in (for_ever, in_circles):
        with pytest.raises(StuckError):
            live(life)


def test_a_thread_works_at_a_moment_of_its_own_and_one_after_the_other() -> None:
    order: list[int] = []

    async def life(loop: VirtualLoop) -> None:
        with ThreadPoolExecutor(1) as thread:
            steps = [loop.run_in_executor(thread, order.append, number) for number in range(20)]
            assert not order, "nothing happens at once"
            await asyncio.gather(*steps)

    live(life)
    assert order == list(range(20))


def test_the_order_of_ready_tasks_is_the_seed_s() -> None:
    def order(seed: str) -> list[int]:
        found: list[int] = []

        async def life(_loop: VirtualLoop) -> None:
            async def step(number: int) -> None:
                await asyncio.sleep(0)
                found.append(number)

            await asyncio.gather(*(step(number) for number in range(10)))

        live(life, seed)
        return found

    assert order("A") == order("A")
    assert order("A") != order("B")


# --- the broker


def test_a_killed_broker_forgets_what_it_acknowledged_since_it_saved() -> None:
    async def life(loop: VirtualLoop) -> None:
        broker = Broker(loop, random.Random(1))
        reader = await Client(broker, "reader", "a").connected()
        reader.line.cut("away")
        writer = await Client(broker, "writer").connected()
        await writer.line.publish(said("saved"))
        broker.save()
        await writer.line.publish(said("acknowledged"))
        broker.kill()
        broker.start()
        assert set((await Client(broker, "reader", "a").connected()).texts) == {"saved"}

    live(life)


def test_what_was_not_acknowledged_comes_again_and_first() -> None:
    async def life(loop: VirtualLoop) -> None:
        broker = Broker(loop, random.Random(2))
        reader = await Client(broker, "reader", "a", window=2).connected()
        writer = await Client(broker, "writer").connected()
        for number in range(4):
            await writer.line.publish(said(number))
        await asyncio.sleep(100)
        assert reader.texts[:2] == ["0", "1"], "no more than its window holds"
        reader.got[0].acknowledge()
        await asyncio.sleep(1)
        reader.line.cut("reset")
        again = await Client(broker, "reader", "a").connected()
        assert again.texts[:3] == ["1", "2", "3"]

    live(life)


def test_those_who_share_get_each_message_once_between_them_and_one_who_is_there_gets_it() -> None:
    async def life(loop: VirtualLoop) -> None:
        broker = Broker(loop, random.Random(3))
        one = await Client(broker, "one", "$share/us/a").connected()
        two = await Client(broker, "two", "$share/us/a").connected()
        writer = await Client(broker, "writer").connected()
        for number in range(40):
            await writer.line.publish(said(number))
        await asyncio.sleep(100)
        assert one.texts
        assert two.texts
        assert {*one.texts, *two.texts} == {str(number) for number in range(40)}
        two.line.cut("away")
        for number in range(40, 60):
            await writer.line.publish(said(number))
        await asyncio.sleep(1)
        assert {str(number) for number in range(40, 60)} <= set(one.texts)

    live(life)


def test_a_queue_has_an_end_and_says_nothing() -> None:
    async def life(loop: VirtualLoop) -> None:
        broker = Broker(loop, random.Random(4))
        (await Client(broker, "reader", "a").connected()).line.cut("away")
        writer = await Client(broker, "writer").connected()
        await asyncio.gather(*(writer.line.publish(said(number)) for number in range(QUEUE_MAX + 50)))
        assert broker.waiting_count == QUEUE_MAX
        assert broker.lost_count >= 50

    live(life)


def test_a_last_will_is_told_at_a_reset_and_after_a_power_cut_only_late() -> None:
    async def life(loop: VirtualLoop) -> None:
        broker = Broker(loop, random.Random(5))
        reader = await Client(broker, "reader", "a").connected()
        reset = await Client(broker, "reset", will=said("reset")).connected()
        dark = await Client(broker, "dark", will=said("dark", retain=True)).connected()
        reset.line.cut("reset")
        dark.host.is_dead = True
        dark.line.abandon(is_silent=True)
        await asyncio.sleep(1)
        assert set(reader.texts) == {"reset"}
        await asyncio.sleep(NOTICED_AFTER_S[1])
        assert "dark" in reader.texts
        assert "dark" in (await Client(broker, "late", "a").connected()).texts, "a retained one is kept"

    live(life)


def test_on_a_silent_network_nothing_arrives_and_both_ends_find_out() -> None:
    async def life(loop: VirtualLoop) -> None:
        broker = Broker(loop, random.Random(6))
        reader = await Client(broker, "reader", "a").connected()
        writer = await Client(broker, "writer", will=said("will")).connected()
        writer.line.silence()
        answer = writer.line.publish(said("swallowed"))
        await asyncio.sleep(NOTICED_AFTER_S[1] + 1)
        assert isinstance(answer.exception(), UnavailableError)
        assert set(reader.texts) == {"will"}

    live(life)


# --- disks and stores


def block(number: int) -> SampleBlock:
    times = np.array([number * NS_PER_S], dtype=np.int64)
    return SampleBlock("D", "vital_signs", times, {"temperature": times / NS_PER_S}, ClockStamp(ClockState.UNKNOWN, 0))


async def until_unanswered(step: Callable[[int], Awaitable[object]]) -> int:
    """Repeat it until an answer is lost; the number of that time."""
    for number in range(100):
        try:
            await step(number)
        except UnavailableError:
            return number
    raise AssertionError("every answer came")


def test_a_power_cut_leaves_what_was_committed_and_nothing_of_what_was_under_way(tmp_path: Path) -> None:
    async def life(loop: VirtualLoop) -> None:
        disk = Disk(tmp_path, "g", Books(loop.time))
        host = Host("g", loop, Network(random.Random(), (0, 1)), SystemClock())
        outbox = Outbox(disk.store(host), "g", Limits())
        await outbox.open()
        for number in range(3):
            outbox.append(block(number))
        await outbox.commit()
        outbox.append(block(3))
        committing = asyncio.create_task(outbox.commit())
        await asyncio.sleep(0)
        disk.cut_power()
        host.is_dead = True
        committing.cancel()
        await asyncio.wait({committing})
        after = Outbox(disk.store(Host("g", loop, host.network, SystemClock())), "g", Limits())
        await after.open()
        assert after.holding.rows == 3
        await after.close()

    live(life)


def test_the_series_store_keeps_a_point_once_and_notices_another_in_its_place() -> None:
    async def life(loop: VirtualLoop) -> None:
        books = Books(loop.time)
        server = SeriesServer(random.Random(1), books)
        client = ModelTimeSeries(server)
        for _ in range(2):
            await client.write("", "", b"m,a=1 v=1 5\n")
        assert server.points == {b"m,a=1": {5: b"v=1"}}
        assert not books.troubles
        await client.write("", "", b"m,a=1 v=2 5\n")
        assert "overwritten" in books.troubles[0]
        server.muteness = 1
        last = await until_unanswered(lambda number: client.write("", "", b"m,a=1 v=1 %d\n" % (10 + number)))
        assert 10 + last in server.points[b"m,a=1"], "it was stored before the answer was lost"

    live(life)


def test_a_transaction_is_undone_by_a_break_and_kept_when_only_the_answer_is_lost(
    new_registry: Callable[[], str],
) -> None:
    conninfo = new_registry()

    async def add(database: ModelDatabase, code: str, breaks: Callable[[], Any]) -> None:
        async with database.connection() as connection, connection.transaction():
            await connection.execute("INSERT INTO organizations (code, name) VALUES (%s, 'x')", (code,))
            breaks()

    async def life(loop: VirtualLoop) -> None:
        server = RegistryServer(conninfo, random.Random(1), loop)
        database = ModelDatabase(server)
        await database.open()
        with pytest.raises(UnavailableError):
            await add(database, "broken", server.fall)
        server.outages = 0
        await add(database, "whole", lambda: None)
        server.muteness = 1
        last = await until_unanswered(lambda number: add(database, f"mute-{number}", lambda: None))
        codes = [code for (code,) in server.real.execute("SELECT code FROM organizations").fetchall()]
        assert "broken" not in codes
        assert {"whole", f"mute-{last}"} <= set(codes)
        server.muteness = 0
        await asyncio.sleep(DAY_S)
        async with database.connection() as connection:
            (now,) = await (await connection.execute("SELECT now()")).fetchone()
        assert now.isoformat().startswith("2024-05-02T12:0"), "its clock is virtual, too"
        server.close()

    live(life)
