"""Runs the model of a serial device on a pseudo terminal, in real time: any program can open it as its serial port."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import pty
import termios
import time
import tty
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from gateway.errors import ConfigError

log = logging.getLogger(__name__)

LUMP_S = 0.016
"""A USB serial dongle hands over what it collected in 16 ms (FTDI's latency timer)."""
IDLE_S = 0.25
READ_BYTES_MAX = 4096
PENDING_BYTES_MAX = 64 * 1024
"""Replies that nobody reads; a command flood must not fill the memory."""


class Firmware(Protocol):
    """A device's own model, see `gateway.virtual.cyton.CytonFirmware`."""

    @property
    def streaming(self) -> bool:
        """Whether packets come by themselves."""

    def receive(self, data: bytes, now_ns: int) -> bytes:
        """Take what the host sends, give the reply."""

    def packets_until(self, now_ns: int) -> list[bytes]:
        """Packets that are due by now and were not given yet."""


class VirtualSerialLine:
    """A serial port with a device behind it, from `async with` to its end.

    `port` is what a gateway opens: the given link, or else the pseudo terminal itself. Programs may come and go.
    """

    def __init__(self, firmware: Firmware, link: Path | str | None = None) -> None:
        """`link`: where a symbolic link to the port shall be; one that is there already is replaced."""
        self.firmware = firmware
        self.dropped_packets = 0
        """Whole packets for which the port had no room, because nobody read."""
        self.sent_packets = 0
        self.port = ""
        self._link = None if link is None else Path(link)
        self._master = -1
        self._slave = -1
        self._pending = b""
        self._wake = asyncio.Event()
        self._pace: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Plug it in, see `plug_in`."""
        await self.plug_in()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Unplug it."""
        await self.unplug()

    async def plug_in(self) -> None:
        """Open the port, a new one each time. Raises `ConfigError` where the link cannot be made."""
        self._master, self._slave = pty.openpty()
        os.set_blocking(self._master, False)
        # Raw before anybody opens it: an echo would come back to the device as a command.
        tty.setraw(self._slave)
        self.port = os.ttyname(self._slave)
        if self._link is not None:
            try:
                await asyncio.to_thread(_point, self._link, self.port)
            except OSError as error:
                self._close_port()
                raise ConfigError(f"the virtual port's link {self._link} cannot be made: {error.strerror}") from error
            self.port = str(self._link)
        asyncio.get_running_loop().add_reader(self._master, self._on_commands)
        self._pace = asyncio.create_task(self._play(), name=f"virtual serial line {self.port}")

    async def unplug(self) -> None:
        """A program that has the port open sees it vanish. Nothing happens where it is unplugged already."""
        if self._pace is None:
            return
        pace, self._pace = self._pace, None
        asyncio.get_running_loop().remove_reader(self._master)
        terminal = os.ttyname(self._slave)
        pace.cancel()
        await asyncio.gather(pace, return_exceptions=True)
        self._pending = b""
        self._close_port()
        if self._link is not None:
            await asyncio.to_thread(_remove, self._link, terminal)

    def send(self, data: bytes) -> None:
        """Let the device say something by itself, such as a failure."""
        self._pending = (self._pending + data)[:PENDING_BYTES_MAX]
        self._wake.set()

    async def _play(self) -> None:
        while True:
            self._allow_openers()
            self._flush()
            self._send_lump(self.firmware.packets_until(time.monotonic_ns()))
            busy = self.firmware.streaming or self._pending
            self._wake.clear()
            # Not wait_for: before Python 3.12 it forgets a cancellation that comes together with the event.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LUMP_S if busy else IDLE_S):
                    await self._wake.wait()

    def _on_commands(self) -> None:
        try:
            data = os.read(self._master, READ_BYTES_MAX)
        except BlockingIOError:
            return
        self.send(self.firmware.receive(data, time.monotonic_ns()))
        self._flush()

    def _send_lump(self, packets: list[bytes]) -> None:
        room = self._write(b"".join(packets)) if packets and not self._pending else 0
        for packet in packets:
            if room <= 0:
                self.dropped_packets += 1
                continue
            # A packet that began must end, or the next one would be damaged as well.
            self._pending = packet[room:]
            room -= len(packet)
            self.sent_packets += 1

    def _flush(self) -> None:
        if self._pending:
            self._pending = self._pending[self._write(self._pending) :]

    def _write(self, data: bytes) -> int:
        try:
            return os.write(self._master, data)
        except BlockingIOError:
            return 0

    def _allow_openers(self) -> None:
        """Forget the mark of a gateway that was killed: a real port loses it with the last close, this one is held."""
        with contextlib.suppress(OSError):
            fcntl.ioctl(self._slave, termios.TIOCNXCL)

    def _close_port(self) -> None:
        os.close(self._master)
        os.close(self._slave)


def _point(link: Path, target: str) -> None:
    if link.is_symlink():
        link.unlink()
    link.symlink_to(target)


def _remove(link: Path, target: str) -> None:
    with contextlib.suppress(OSError):
        if link.readlink() == Path(target):
            link.unlink()
