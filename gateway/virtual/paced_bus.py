"""A D-Bus connection that is written to no faster than the bus reads.

dbus-fast gives a connection up when its socket is full, which some 250 signals at once fill where the bus daemon does
not get its turn. Knows no Bluetooth.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import Any

from dbus_fast import Message
from dbus_fast.aio import MessageBus

UNREAD_MAX = 32
"""Messages that the bus may not have read yet; a socket holds several times as many."""
FLUSH_S_MAX = 10.0
"""Before a close: a bus that reads nothing for so long hangs."""


class PacedBus:
    """Sends in order: at once while the bus keeps up, and what it has not room for when it has."""

    def __init__(self, bus: MessageBus) -> None:
        self.bus = bus
        self._waiting: deque[Message] = deque()
        self._unread = 0
        self._asking: asyncio.Task[None] | None = None

    def send(self, message: Message) -> bool:
        """Send, now or as soon as the bus has read enough; False if the connection is gone."""
        if not self.bus.connected:
            return False
        self._waiting.append(message)
        self._send_what_may_go()
        return True

    async def close(self) -> None:
        """Leave the bus once it has read all that was sent. Does not raise."""
        with contextlib.suppress(OSError, EOFError, TimeoutError):
            async with asyncio.timeout(FLUSH_S_MAX):
                while self._asking is not None:
                    await asyncio.wait([self._asking])
                await self._read_by_the_bus()
        if self._asking is not None:
            self._asking.cancel()
        self.bus.disconnect()
        untyped: Any = self.bus
        with contextlib.suppress(OSError, EOFError):
            await untyped.wait_for_disconnect()

    def _send_what_may_go(self) -> None:
        while self._waiting and self._unread < UNREAD_MAX:
            self.bus.send(self._waiting.popleft())
            self._unread += 1
        if self._unread >= UNREAD_MAX and self._asking is None:
            self._asking = asyncio.create_task(self._ask(), name="virtual BlueZ waits for the bus")

    async def _ask(self) -> None:
        try:
            await self._read_by_the_bus()
        except (OSError, EOFError):
            return
        finally:
            self._asking = None
        self._unread = 0
        self._send_what_may_go()

    async def _read_by_the_bus(self) -> None:
        bus = "org.freedesktop.DBus"
        await self.bus.call(Message(bus, "/org/freedesktop/DBus", bus, "GetId"))
