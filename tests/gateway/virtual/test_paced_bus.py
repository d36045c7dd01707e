"""A connection to a bus that does not get its turn."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from dbus_fast import Message
from dbus_fast.aio import MessageBus

from gateway.virtual.dbus_daemon import DbusDaemon
from gateway.virtual.paced_bus import PacedBus

pytestmark = pytest.mark.timeout(60)

SIGNALS = 4000


@pytest.fixture(scope="module")
def daemon() -> Iterator[DbusDaemon]:
    with DbusDaemon() as running:
        yield running


@contextmanager
def standing_still(daemon: DbusDaemon) -> Iterator[None]:
    assert daemon.pid is not None
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(daemon.pid, signal.SIGCONT)


def numbered(number: int) -> Message:
    return Message.new_signal("/ward", "ward.Test", "Said", "u", [number])


async def listener(daemon: DbusDaemon, heard: list[int]) -> PacedBus:
    bus = await MessageBus(daemon.address).connect()
    name = "org.freedesktop.DBus"
    rule = "type='signal',interface='ward.Test'"
    await bus.call(Message(name, "/org/freedesktop/DBus", name, "AddMatch", signature="s", body=[rule]))

    def hear(message: Message) -> bool:
        if message.interface == "ward.Test":
            heard.append(message.body[0])
        return False

    bus.add_message_handler(hear)
    return PacedBus(bus)


async def test_nothing_is_lost_while_the_bus_stands_still(daemon: DbusDaemon) -> None:
    heard: list[int] = []
    listening = await listener(daemon, heard)
    paced = PacedBus(await MessageBus(daemon.address).connect())
    with socket.socket(socket.AF_UNIX) as plain:
        holds = plain.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    # The kernel counts more than this for each.
    assert SIGNALS * len(numbered(0)._marshall(negotiate_unix_fd=False)) > holds
    with standing_still(daemon):
        assert all(paced.send(numbered(number)) for number in range(SIGNALS))
    await paced.close()
    assert not paced.send(numbered(SIGNALS))
    # A round trip of the listener's own comes behind all that the bus had read before.
    await listening.close()
    assert heard == list(range(SIGNALS))
