from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from gateway.virtual.bluetoothctl import bluetoothctl_stub
from gateway.virtual.bluez import VirtualBlueZ
from gateway.virtual.dbus_daemon import DbusDaemon


@pytest.fixture(scope="module")
def dbus_daemon() -> Iterator[DbusDaemon]:
    with DbusDaemon() as daemon, bluetoothctl_stub():
        yield daemon


@pytest.fixture
def system_bus(dbus_daemon: DbusDaemon, monkeypatch: pytest.MonkeyPatch) -> str:
    """Address of a private bus that this process takes for the system's."""
    for name, value in dbus_daemon.environment().items():
        monkeypatch.setenv(name, value)
    return dbus_daemon.address


@pytest_asyncio.fixture
async def bluez(system_bus: str) -> AsyncIterator[VirtualBlueZ]:
    async with VirtualBlueZ(system_bus) as virtual:
        yield virtual
