"""One Bluetooth adapter as all links of the program share it: whose turn it is to connect, one discovery for all who
look for a device, the connections it carries, and what is tried when nothing connects any more.

Knows no library: how to discover and how to switch the adapter off and on, it is told.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from enum import Enum
from typing import Generic, Protocol, TypeVar

from gateway.errors import UnavailableError

log = logging.getLogger(__name__)

SCAN_S_MAX = 5.0
"""Sensors advertise at least every second, and every other second is the radio's own."""
FAILURES_BEFORE_SWITCHING = 4
"""Connects that failed in a row, over all devices, with none connected: each was tried several times over."""
FAILURES_BEFORE_RESTART = 2 * FAILURES_BEFORE_SWITCHING
FAILURES_BEFORE_ALARM = 3 * FAILURES_BEFORE_SWITCHING
"""Sooner where the daemon may not be restarted."""

ALARM_HINT = (
    "nothing connects although the adapter was switched off and on: sudo systemctl restart bluetooth (wardlink does "
    "it itself where systemd/60-wardlink-bluetooth.rules is installed for polkit), then unplug the adapter and plug "
    "it in again; dmesg | grep -i bluetooth"
)

Device = TypeVar("Device")
Discover = Callable[[Callable[[str, Device], None]], AbstractAsyncContextManager[object]]
"""Runs a discovery while its context is entered, and tells address (upper case) and device of what is heard.

Entering and leaving may raise `UnavailableError`."""


class Scanner(Generic[Device]):
    """One discovery for everybody who looks for a device.

    BlueZ knows one discovery per program, and tells of a device once as long as it lasts: so whoever comes later
    makes it begin anew.
    """

    def __init__(self, discover: Discover[Device]) -> None:
        self._discover = discover
        self._waiting: dict[asyncio.Future[Device], str] = {}
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def find(self, address: str, seconds_max: float) -> Device | None:
        """Wait until the device is heard; None if it is not. Raises `UnavailableError` when nobody can be heard."""
        heard: asyncio.Future[Device] = asyncio.get_running_loop().create_future()
        self._waiting[heard] = address.upper()
        self._changed.set()
        if self._task is None:
            self._task = asyncio.create_task(self._scan(), name="Bluetooth discovery")
        try:
            async with asyncio.timeout(seconds_max):
                return await heard
        except TimeoutError:
            return None
        finally:
            del self._waiting[heard]
            if not self._waiting:
                self._changed.set()

    def give_up(self, reason: UnavailableError) -> None:
        """Nothing more will be heard, the daemon is gone: tell all who wait."""
        for heard in self._waiting:
            if not heard.done():
                heard.set_exception(UnavailableError(reason.message, hint=reason.hint))
        self._changed.set()

    async def _scan(self) -> None:
        try:
            while self._waiting:
                self._changed.clear()
                try:
                    async with self._discover(self._heard):
                        await self._changed.wait()
                except UnavailableError as error:
                    log.debug("discovery: %s", error)
                    if not self._changed.is_set():
                        self.give_up(error)
        finally:
            self._task = None

    def _heard(self, address: str, device: Device) -> None:
        for heard, wanted in self._waiting.items():
            if wanted == address and not heard.done():
                heard.set_result(device)


class Step(Enum):
    """What is to be tried after a connect that failed."""

    AGAIN = "try again"
    SWITCH = "switch the adapter off and on"
    RESTART = "restart the daemon"


class Ladder:
    """What is tried when nothing connects: switching the adapter off and on, restarting the daemon, then an alarm.

    Removing a device of which an operation hangs comes before, and is the link's own.
    """

    def __init__(self) -> None:
        self._failures = 0
        self._restart_refused = False

    @property
    def alarm(self) -> bool:
        """All that can be tried from here was tried."""
        return self._failures >= (FAILURES_BEFORE_RESTART if self._restart_refused else FAILURES_BEFORE_ALARM)

    def connected(self) -> None:
        """A device connected, or is connected: the adapter works."""
        self._failures = 0

    def restart_refused(self) -> None:
        """The daemon may not be restarted from here; it is asked for again all the same, a rule may come."""
        self._restart_refused = True

    def restarted(self) -> None:
        """The daemon was restarted."""
        self._restart_refused = False

    def failed(self) -> Step:
        """A device that was heard could not be connected, and no other is connected."""
        self._failures += 1
        if self._failures % FAILURES_BEFORE_SWITCHING:
            return Step.AGAIN
        return Step.SWITCH if self._failures % FAILURES_BEFORE_RESTART else Step.RESTART


class Holder(Protocol):
    """What holds one of the adapter's connections, or is about to make it."""

    @property
    def connected(self) -> bool:
        """The connection is up."""


class Radio(Generic[Device]):
    """What all links over one adapter share."""

    def __init__(self, discover: Discover[Device]) -> None:
        self.turn = asyncio.Lock()
        """Held for a connect: BlueZ confuses those that overlap."""
        self.scanner = Scanner(discover)
        self.ladder = Ladder()
        self.holders: set[Holder] = set()
        self.expected: set[str] = set()
        """Addresses of the devices that links are there for: they alone may pair."""

    def works_for_others(self, holder: Holder) -> bool:
        """Another device is connected: what fails is not the adapter's fault."""
        return any(other.connected for other in self.holders if other is not holder)
