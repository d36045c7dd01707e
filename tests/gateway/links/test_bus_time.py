"""The bus's time: it stands still with the bus, and goes on whatever this process was held up by."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest

from gateway.virtual.dbus_daemon import DbusDaemon
from tests.gateway.links import bus_time

pytestmark = pytest.mark.timeout(60)


def test_it_stands_still_with_the_bus(dbus_daemon: DbusDaemon) -> None:
    assert dbus_daemon.pid is not None
    daemon = dbus_daemon.pid

    async def stop_and_go_on() -> tuple[float, float]:
        loop = asyncio.get_running_loop()
        async with bus_time.asked(dbus_daemon.address):
            await asyncio.sleep(0.1)
            os.kill(daemon, signal.SIGSTOP)
            before_s, real_s = loop.time(), time.monotonic()
            await loop.run_in_executor(None, time.sleep, 0.5)
            passed_s, real_s = loop.time() - before_s, time.monotonic() - real_s
            os.kill(daemon, signal.SIGCONT)
            await asyncio.sleep(0.1)
        return passed_s, real_s

    passed_s, real_s = bus_time.run(stop_and_go_on())
    assert passed_s <= 2 * bus_time.STEP_S
    assert real_s >= 0.5


def test_it_goes_on_when_the_process_was_held_up_at_any_moment(
    dbus_daemon: DbusDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go_on = bus_time.BusTimeLoop.go_on

    def held_up(loop: bus_time.BusTimeLoop, step_s: float = bus_time.STEP_S) -> float:
        now_s = let_go_on(loop, step_s)
        time.sleep(2 * bus_time.STEP_S)
        return now_s

    monkeypatch.setattr(bus_time.BusTimeLoop, "go_on", held_up)

    async def pass_some_time() -> None:
        async with bus_time.asked(dbus_daemon.address):
            for _ in range(20):
                await asyncio.sleep(bus_time.ASKING_S)

    bus_time.run(pass_some_time())
