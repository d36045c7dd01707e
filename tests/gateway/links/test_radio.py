"""What links over one adapter share, with a discovery that the test leads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from gateway.errors import UnavailableError
from gateway.links import radio
from gateway.links.radio import Ladder, Radio, Scanner, Step

DEADLINE_S = 5.0


class Air:
    """Discoveries as they begin and end, and who is told of what is heard."""

    def __init__(self) -> None:
        self.began = 0
        self.running = 0
        self.together_max = 0
        self.refusal: UnavailableError | None = None
        self._heard: Callable[[str, str], None] | None = None

    @asynccontextmanager
    async def discover(self, heard: Callable[[str, str], None]) -> AsyncIterator[None]:
        await asyncio.sleep(0)
        if self.refusal is not None:
            raise self.refusal
        self._heard = heard
        self.began += 1
        self.running += 1
        self.together_max = max(self.together_max, self.running)
        try:
            yield
        finally:
            self._heard = None
            self.running -= 1
        await asyncio.sleep(0)

    def say(self, address: str) -> None:
        if self._heard is not None:
            self._heard(address, f"device {address}")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            if condition():
                return
            await asyncio.sleep(0.001)


async def test_one_discovery_finds_for_all_and_ends_with_the_last() -> None:
    air = Air()
    scanner: Scanner[str] = Scanner(air.discover)
    finding = [asyncio.create_task(scanner.find(address, DEADLINE_S)) for address in ("A", "B", "A")]
    await until(lambda: air.running == 1)
    air.say("A")
    assert [await finding[0], await finding[2]] == ["device A", "device A"]
    assert air.running == 1
    air.say("B")
    assert await finding[1] == "device B"
    await until(lambda: air.running == 0)
    assert air.together_max == 1


async def test_whoever_comes_later_makes_it_begin_anew() -> None:
    air = Air()
    scanner: Scanner[str] = Scanner(air.discover)
    absent = asyncio.create_task(scanner.find("ABSENT", DEADLINE_S))
    await until(lambda: air.began == 1)
    later = asyncio.create_task(scanner.find("B", DEADLINE_S))
    await until(lambda: air.began == 2 and air.running == 1)
    air.say("B")
    assert await later == "device B"
    assert air.together_max == 1
    absent.cancel()
    await until(lambda: air.running == 0)
    assert len(asyncio.all_tasks()) == 1


async def test_what_is_not_heard_in_time_is_none() -> None:
    air = Air()
    scanner: Scanner[str] = Scanner(air.discover)
    assert await scanner.find("A", 0.02) is None
    await until(lambda: air.running == 0)
    finding = asyncio.create_task(scanner.find("A", DEADLINE_S))
    await until(lambda: air.running == 1)
    air.say("A")
    assert await finding == "device A"


async def test_a_discovery_that_cannot_begin_is_told_to_all_who_wait() -> None:
    air = Air()
    air.refusal = UnavailableError("hci0: off", hint="switch it on")
    scanner: Scanner[str] = Scanner(air.discover)
    finding = [asyncio.create_task(scanner.find(address, DEADLINE_S)) for address in "AB"]
    for each in await asyncio.gather(*finding, return_exceptions=True):
        assert isinstance(each, UnavailableError)
        assert each.hint == "switch it on"
    air.refusal = None
    again = asyncio.create_task(scanner.find("A", DEADLINE_S))
    await until(lambda: air.running == 1)
    air.say("A")
    assert await again == "device A"


async def test_a_daemon_that_is_gone_is_told_to_all_who_wait() -> None:
    air = Air()
    scanner: Scanner[str] = Scanner(air.discover)
    finding = asyncio.create_task(scanner.find("A", DEADLINE_S))
    await until(lambda: air.running == 1)
    scanner.give_up(UnavailableError("the daemon is gone"))
    with pytest.raises(UnavailableError, match="gone"):
        await finding
    await until(lambda: air.running == 0)


def test_the_ladder() -> None:
    ladder = Ladder()
    steps: list[Step] = []
    alarms: list[bool] = []
    for _ in range(2 * radio.FAILURES_BEFORE_ALARM):
        steps.append(ladder.failed())
        alarms.append(ladder.alarm)
    assert [number for number, step in enumerate(steps, start=1) if step is Step.SWITCH] == [4, 12, 20]
    assert [number for number, step in enumerate(steps, start=1) if step is Step.RESTART] == [8, 16, 24]
    assert alarms == [False] * 11 + [True] * 13
    ladder.connected()
    alarms.append(ladder.alarm)
    assert alarms[-1] is False
    assert ladder.failed() is Step.AGAIN


def test_where_the_daemon_may_not_be_restarted_the_alarm_comes_sooner() -> None:
    ladder = Ladder()
    while ladder.failed() is not Step.RESTART:
        assert not ladder.alarm
    assert not ladder.alarm
    ladder.restart_refused()
    assert ladder.alarm
    ladder.restarted()
    assert not ladder.alarm


class Link:
    """Holds a connection that is up or not."""

    def __init__(self, *, connected: bool) -> None:
        self.connected = connected


async def test_an_adapter_that_works_for_others() -> None:
    shared: Radio[str] = Radio(Air().discover)
    mine, other = Link(connected=True), Link(connected=False)
    shared.holders |= {mine, other}
    assert not shared.works_for_others(mine)
    other.connected = True
    assert shared.works_for_others(mine)
