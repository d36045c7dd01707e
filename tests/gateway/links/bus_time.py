"""An event loop whose time is that of the bus: it goes on while the D-Bus daemon and this process both get their turn.

On a machine that is busy with other things the clock stands still, and with it every limit and every sensor that goes
by it; what they allow is the same number of turns everywhere. Where nothing holds them up, it is the real time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from dbus_fast import Message
from dbus_fast.aio import MessageBus

T = TypeVar("T")

STEP_S = 0.010
"""So far the time goes without an answer from the bus."""
ASKING_S = 0.004
"""Between two questions: well within a step, so that the time does not halt on an idle machine."""
BUS = "org.freedesktop.DBus"


class BusTimeLoop(asyncio.SelectorEventLoop):
    """Its clock stops `STEP_S` after the last `go_on`; before the first one it runs as any other."""

    def __init__(self) -> None:
        self._last_s = time.monotonic()
        self._now_s = 0.0
        self._until_s = float("inf")
        super().__init__()

    def time(self) -> float:
        real_s = time.monotonic()
        self._now_s = min(self._now_s + real_s - self._last_s, self._until_s)
        self._last_s = real_s
        return self._now_s

    def go_on(self, step_s: float = STEP_S) -> float:
        """Let so much time pass from now on, and give now."""
        now_s = self.time()
        self._until_s = now_s + step_s
        return now_s


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run in bus time; inside, `asked` lets it pass."""
    with asyncio.Runner(loop_factory=BusTimeLoop) as runner:
        return runner.run(main)


@asynccontextmanager
async def asked(address: str) -> AsyncIterator[None]:
    """Ask the bus something all the time, and let the loop's time pass with its answers."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, BusTimeLoop)
    bus = await MessageBus(address).connect()
    asking = asyncio.create_task(_ask(bus, loop), name="asks the bus for the time")
    try:
        yield
    finally:
        asking.cancel()
        await asyncio.wait([asking])
        untyped: Any = bus
        bus.disconnect()
        await untyped.wait_for_disconnect()


async def _ask(bus: MessageBus, loop: BusTimeLoop) -> None:
    try:
        while True:
            await bus.call(Message(BUS, "/org/freedesktop/DBus", BUS, "GetId"))
            # From the moment at which the time was let go on: sleep() may look at the clock when it stands again,
            # and what is due behind that never comes.
            turn = asyncio.Event()
            loop.call_at(loop.go_on() + ASKING_S, turn.set)
            await turn.wait()
    finally:
        loop.go_on(float("inf"))
