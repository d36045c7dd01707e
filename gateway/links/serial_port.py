"""The serial port: the only file that knows pyserial, and the owner of one reader thread per open port.

The thread stamps what arrives and hands it to the event loop through a bounded queue. Knows no device.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import functools
import logging
import termios
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import serial

from gateway.errors import ConfigError, UnavailableError
from gateway.links.base import Chunk
from gateway.links.serial_names import latency_ms, stable_name, stable_names

log = logging.getLogger(__name__)

READ_BYTES_MAX = 64 * 1024
"""Of one chunk: what the kernel can have collected while the thread did not run."""
QUEUE_BYTES_MAX = 256 * 1024
"""31 s of a Cyton's stream: an event loop that has not read for so long has failed."""
QUEUE_CHUNKS_MAX = 8192
"""Bounds what the chunks themselves take, when each has only a few bytes."""
WRITE_TIMEOUT_S = 2.0
"""Commands are a few bytes; a port that does not take them for so long is blocked."""
READ_TURN_S = 0.1
"""How soon the reader thread of a silent port sees that it shall end."""
CLOSE_TIMEOUT_S = 3.0
"""After this the port is left to its (daemon) thread: a driver that hangs must not hold the gateway."""

LATENCY_MS_MAX = 1
"""Of an FTDI chip, whose default of 16 ms makes four of a Cyton's packets arrive as one."""
LATENCY_HINT = (
    "install systemd/60-wardlink-serial.rules in /usr/lib/udev/rules.d, run 'udevadm control --reload', plug in again"
)

Parity = Literal["none", "even", "odd"]
FlowControl = Literal["none", "xon_xoff"]

_PARITIES = {"none": serial.PARITY_NONE, "even": serial.PARITY_EVEN, "odd": serial.PARITY_ODD}
_FLOW_CONTROLS = ("none", "xon_xoff")

_OPEN_HINTS = {
    errno.ENOENT: "plug the device in; /dev/serial/by-id lists what is there under names that do not change",
    errno.EACCES: "add the gateway's user to the group dialout, then log in again",
    errno.EPERM: "add the gateway's user to the group dialout, then log in again",
    errno.EBUSY: "another program has the port: close it",
    errno.EAGAIN: "another program has the port: close it",
    errno.EIO: "unplug the device and plug it in again",
    errno.ENXIO: "unplug the device and plug it in again",
    errno.ENODEV: "unplug the device and plug it in again",
}
_OPEN_REASONS = {
    errno.ENOENT: "there is no such port",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EBUSY: "the port is in use",
    errno.EAGAIN: "the port is in use",
}
_UNPLUGGED_HINT = "check the plug and the USB cable; a device that is away is tried again by itself"


@dataclass(frozen=True, slots=True)
class _Line:
    """How a port is driven: always 8 data bits and one stop bit."""

    path: str
    baud_rate: int
    parity: Parity
    flow_control: FlowControl


class PortBusyError(UnavailableError):
    """Another program has the port."""


@dataclass(frozen=True, slots=True)
class FoundPort:
    """A serial port that is there. What is not known is None or empty."""

    path: str
    """Its name in /dev/serial/by-id, else its device file."""
    vendor_id: int | None
    product_id: int | None
    product: str


def found_ports() -> list[FoundPort]:
    """The serial ports of this host, in order of their names. Nothing is opened. Blocks; raises `UnavailableError`."""
    from serial.tools import list_ports  # noqa: PLC0415 - a gateway that runs need not hold it

    names = stable_names()
    try:
        ports = sorted(list_ports.comports())
    except (OSError, ValueError) as error:  # a port that goes away while it is looked at has no number to read
        raise UnavailableError(f"the serial ports cannot be listed: {error}", hint="try again") from error
    return [
        FoundPort(names.get(str(Path(port.device).resolve()), port.device), port.vid, port.pid, port.product or "")
        for port in ports
    ]


class SerialLink:
    """A `Link` over a serial port, 8 data bits, 1 stop bit, in exclusive use."""

    def __init__(
        self, path: str, baud_rate: int, *, parity: Parity = "none", flow_control: FlowControl = "none"
    ) -> None:
        """`path`: the port's device file, best by /dev/serial/by-id. `baud_rate`: bits per second.

        `parity`: a byte whose parity is wrong is thrown away, so that its packet is short and not false.
        `flow_control`: `xon_xoff` lets this side stop the device when it is full (IXOFF). The device cannot stop this
        side (IXON stays off): 0x11 and 0x13 that come from it are data, and the kernel would swallow them.
        Raises `ConfigError`.
        """
        if baud_rate <= 0:
            raise ConfigError(f"baud rate {baud_rate} of {path}: expected a positive number")
        if parity not in _PARITIES:
            raise ConfigError(f"parity {parity!r} of {path}: expected one of {', '.join(_PARITIES)}")
        if flow_control not in _FLOW_CONTROLS:
            raise ConfigError(f"flow control {flow_control!r} of {path}: expected one of {', '.join(_FLOW_CONTROLS)}")
        self._path = path
        self._line = _Line(path, baud_rate, parity, flow_control)
        self._session: _Session | None = None

    @property
    def name(self) -> str:
        """The port's path."""
        return self._path

    async def open(self) -> None:
        """Open the port for this process alone; what waited in it is thrown away. Raises `UnavailableError`."""
        await self.close()
        opening = asyncio.ensure_future(asyncio.to_thread(_open_port, self._line))
        try:
            port = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_unwanted)
            raise
        self._session = _Session(self._path, port, asyncio.get_running_loop())

    async def read(self) -> Chunk:
        """Wait for the next chunk. Raises `UnavailableError` on unplug, or when too much waits unread."""
        return await self._open_session().read()

    async def write(self, data: bytes, channel: str = "") -> None:  # noqa: ARG002 - a serial line has one channel
        """Send to the device. Raises `UnavailableError` on unplug, or when the port takes nothing for 2 s."""
        await self._open_session().write(data)

    async def close(self) -> None:
        """Release the port; may be called in any state and does not raise."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _open_session(self) -> _Session:
        if self._session is None:
            raise UnavailableError(f"serial port {self._path} is not open")
        return self._session


class _Session:
    """One open port, from open to close, with its reader thread."""

    def __init__(self, path: str, port: serial.Serial, loop: asyncio.AbstractEventLoop) -> None:
        self._path = path
        self._port = port
        self._loop = loop
        self._queue: deque[Chunk] = deque()
        # Each total is written by one side alone, so that the bound needs no lock.
        self._bytes_in = 0
        self._bytes_out = 0
        self._end: UnavailableError | None = None
        self._arrived = asyncio.Event()
        self._wake_pending = False
        self._closing = threading.Event()
        self._closed = asyncio.Event()
        self._writing = threading.Lock()
        self._reader = threading.Thread(target=self._own_port, name=f"serial {path}", daemon=True)
        self._reader.start()

    async def read(self) -> Chunk:
        while True:
            self._arrived.clear()
            if self._queue:
                chunk = self._queue.popleft()
                self._bytes_out += len(chunk.data)
                return chunk
            if self._end is not None:
                raise UnavailableError(self._end.message, hint=self._end.hint)
            await self._arrived.wait()

    async def write(self, data: bytes) -> None:
        await asyncio.to_thread(self._write_port, data)

    async def close(self) -> None:
        self._closing.set()
        try:
            # Not wait_for: before Python 3.12 it forgets a cancellation that comes together with the event.
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._closed.wait()
        except TimeoutError:
            log.warning("serial port %s did not close within %.0f s", self._path, CLOSE_TIMEOUT_S)

    def _write_port(self, data: bytes) -> None:
        with self._writing:
            if self._end is not None or self._closing.is_set():
                raise self._end or _closed(self._path)
            try:
                self._port.write(data)
            except serial.SerialTimeoutException as error:
                raise UnavailableError(
                    f"serial port {self._path} took no data for {WRITE_TIMEOUT_S:.0f} s", hint=_UNPLUGGED_HINT
                ) from error
            except (OSError, termios.error) as error:
                raise _lost(self._path, error) from error

    def _own_port(self) -> None:
        """The reader thread: it reads the port until the end, and closes it."""
        end = _closed(self._path)
        try:
            end = self._read_port()
        except (OSError, termios.error) as error:
            end = _lost(self._path, error)
        finally:
            with self._writing:
                self._end = end
            self._on_loop(self._arrived.set)
            _close(self._port)
            self._on_loop(self._closed.set)

    def _read_port(self) -> UnavailableError:
        while not self._closing.is_set():
            data = self._port.read(1)
            waiting = self._port.in_waiting if data else 0
            if waiting:
                data += self._port.read(min(waiting, READ_BYTES_MAX))
            # Stamped after the last byte is here: an arrival may be late, never early.
            if data and not self._enqueue(Chunk(data, time.monotonic_ns())):
                return UnavailableError(
                    f"serial port {self._path}: the gateway did not read for too long,"
                    f" {self._bytes_in - self._bytes_out} bytes wait and no more are kept",
                    hint="the machine is overloaded or the gateway hangs: see its journal",
                )
        return _closed(self._path)

    def _enqueue(self, chunk: Chunk) -> bool:
        waiting = self._bytes_in - self._bytes_out + len(chunk.data)
        if waiting > QUEUE_BYTES_MAX or len(self._queue) >= QUEUE_CHUNKS_MAX:
            return False
        self._bytes_in += len(chunk.data)
        self._queue.append(chunk)
        if not self._wake_pending:
            # One call at a time: a loop that stands still must not collect them without bound.
            self._wake_pending = True
            self._on_loop(self._on_arrival)
        return True

    def _on_loop(self, callback: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is gone, and with it whoever could read
            self._loop.call_soon_threadsafe(callback)

    def _on_arrival(self) -> None:
        self._wake_pending = False
        self._arrived.set()


def _open_port(line: _Line) -> serial.Serial:
    path = line.path
    parity = _PARITIES[line.parity]
    try:
        port = serial.Serial(
            path, line.baud_rate, parity=parity, timeout=READ_TURN_S, write_timeout=WRITE_TIMEOUT_S, exclusive=True
        )
    except ValueError as error:
        raise ConfigError(f"serial port {path} cannot run at {line.baud_rate} baud: {error}") from error
    except (OSError, termios.error) as error:
        raise _not_opened(path, error) from error
    try:
        # pyserial's own lock (flock) stops only programs that ask for it; this one stops all but root's.
        fcntl.ioctl(port.fileno(), termios.TIOCEXCL)
        _set_input_modes(port, line)
    except (OSError, termios.error) as error:
        port.close()
        raise _not_opened(path, error) from error
    _look_at_names(path)
    return port


def _set_input_modes(port: serial.Serial, line: _Line) -> None:
    """What pyserial cannot set: drop bytes of wrong parity, and flow control in one direction alone."""
    modes = termios.tcgetattr(port.fileno())
    if line.parity != "none":
        modes[0] |= termios.INPCK | termios.IGNPAR
    if line.flow_control == "xon_xoff":
        modes[0] |= termios.IXOFF
    termios.tcsetattr(port.fileno(), termios.TCSANOW, modes)


def _look_at_names(path: str) -> None:
    latency = latency_ms(path)
    if latency is not None and latency > LATENCY_MS_MAX:
        _warn_of_latency(path, latency)
    stable = stable_name(path)
    if stable is not None and not path.startswith("/dev/serial/"):
        _tell_stable_name(path, stable)


@functools.cache
def _warn_of_latency(path: str, latency: int) -> None:
    """Once for each port and value: a device that comes and goes must not fill the log with it."""
    log.warning(
        "serial port %s holds bytes back for up to %d ms, expected %d (hint: %s)",
        path,
        latency,
        LATENCY_MS_MAX,
        LATENCY_HINT,
    )


@functools.cache
def _tell_stable_name(path: str, stable: str) -> None:
    log.info("serial port %s may be another device after the next plug; %s will not", path, stable)


def _close(port: serial.Serial) -> None:
    with contextlib.suppress(OSError, termios.error):
        # The mark outlives this descriptor where another program holds the port open too.
        fcntl.ioctl(port.fileno(), termios.TIOCNXCL)
    with contextlib.suppress(OSError, termios.error):
        # Closing waits until unsent bytes are out: 30 s and more on a device that takes none.
        port.reset_output_buffer()
    with contextlib.suppress(OSError, termios.error):
        port.close()


def _close_unwanted(opening: asyncio.Future[serial.Serial]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        threading.Thread(target=_close, args=(opening.result(),), name="serial close", daemon=True).start()


def _not_opened(path: str, error: Exception) -> UnavailableError:
    number = error.errno if isinstance(error, OSError) and error.errno is not None else 0
    reason = _OPEN_REASONS.get(number, str(error))
    hint = _OPEN_HINTS.get(number, "see that the path is a serial port: ls -l /dev/serial/by-id")
    kind = PortBusyError if number in {errno.EBUSY, errno.EAGAIN} else UnavailableError
    return kind(f"serial port {path} cannot be opened: {reason}", hint=hint)


def _closed(path: str) -> UnavailableError:
    return UnavailableError(f"serial port {path} was closed")


def _lost(path: str, error: Exception) -> UnavailableError:
    return UnavailableError(f"serial port {path} was lost: {error}", hint=_UNPLUGGED_HINT)
