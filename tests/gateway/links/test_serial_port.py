"""Serial link against a real pseudo terminal."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import pty
import select
import subprocess
import termios
import threading
import time
import tty
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import serial

from gateway.errors import ConfigError, UnavailableError
from gateway.links import serial_names, serial_port
from gateway.links.serial_port import SerialLink

DEADLINE_S = 10.0


class Terminal:
    """Both ends of a pseudo terminal; the test plays the device on the master's side."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        tty.setraw(self.slave)
        os.set_blocking(self.master, False)
        self.path = os.ttyname(self.slave)

    def say(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self.master, data) :]
            except BlockingIOError:
                time.sleep(0.001)

    def unplug(self) -> None:
        for end in (self.master, self.slave):
            os.close(end)
        self.master = self.slave = -1


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    if terminal.master >= 0:
        terminal.unplug()


@pytest.fixture
async def link(terminal: Terminal) -> AsyncIterator[SerialLink]:
    link = SerialLink(terminal.path, 115200)
    await link.open()
    yield link
    await link.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            if condition():
                return
            await asyncio.sleep(0.005)


def serial_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("serial /")]


async def read_bytes(link: SerialLink, count: int) -> bytes:
    data = b""
    async with asyncio.timeout(DEADLINE_S):
        while len(data) < count:
            data += (await link.read()).data
    return data


async def test_bytes_arrive_unchanged_with_their_time(terminal: Terminal, link: SerialLink) -> None:
    before_ns = time.monotonic_ns()
    terminal.say(bytes(range(256)))
    chunk = await asyncio.wait_for(link.read(), DEADLINE_S)
    assert before_ns < chunk.arrival_ns < time.monotonic_ns()
    assert chunk.channel == ""
    rest = await read_bytes(link, 256 - len(chunk.data)) if len(chunk.data) < 256 else b""
    assert chunk.data + rest == bytes(range(256))
    assert link.name == terminal.path


async def test_the_arrival_is_stamped_when_it_comes_not_when_it_is_read(terminal: Terminal, link: SerialLink) -> None:
    terminal.say(b"early")
    assert link._session is not None
    session = link._session
    await until(lambda: session._bytes_in == 5)
    queued_ns = time.monotonic_ns()
    assert (await link.read()).arrival_ns <= queued_ns


async def test_what_is_written_reaches_the_device(terminal: Terminal, link: SerialLink) -> None:
    await link.write(b"x1060110X")
    await link.write(b"b\x00\xff\r\n\x03\x11\x13")
    got = b""

    def arrived() -> bool:
        nonlocal got
        try:
            got += os.read(terminal.master, 100)
        except BlockingIOError:
            return False
        return len(got) >= 17

    await until(arrived)
    assert got == b"x1060110Xb\x00\xff\r\n\x03\x11\x13"


async def test_what_waited_before_the_opening_is_thrown_away(terminal: Terminal) -> None:
    terminal.say(b"stale")
    await until(lambda: bool(select.select([terminal.slave], [], [], 0)[0]))
    link = SerialLink(terminal.path, 115200)
    await link.open()
    terminal.say(b"fresh")
    assert await read_bytes(link, 5) == b"fresh"
    await link.close()


async def test_a_port_belongs_to_one(terminal: Terminal, link: SerialLink) -> None:
    other = SerialLink(terminal.path, 115200)
    with pytest.raises(UnavailableError, match="in use") as refused:
        await other.open()
    assert "close it" in refused.value.hint
    await link.close()
    await other.open()
    await other.close()


async def test_the_kernel_refuses_programs_that_ask_for_no_lock(terminal: Terminal, link: SerialLink) -> None:
    os.fchmod(terminal.slave, 0o666)
    assert "busy" in await asyncio.to_thread(opened_by_a_shell, terminal.path)
    # The test holds the slave open, as another program might: the mark must be gone all the same.
    await link.close()
    assert await asyncio.to_thread(opened_by_a_shell, terminal.path) == ""


def opened_by_a_shell(path: str) -> str:
    """What a shell complains about when it opens the port; root may open any, so look as nobody."""
    user = 65534 if os.geteuid() == 0 else None
    command = ["sh", "-c", ': <>"$1"', "sh", path]
    return subprocess.run(command, user=user, env={"LC_ALL": "C"}, capture_output=True, text=True, check=False).stderr


async def test_unplugging_gives_what_came_and_then_an_error(terminal: Terminal, link: SerialLink) -> None:
    terminal.say(b"last words")
    assert link._session is not None
    session = link._session
    await until(lambda: session._bytes_in == 10)
    terminal.unplug()
    await until(lambda: session._end is not None)
    assert await read_bytes(link, 10) == b"last words"
    for _ in range(2):
        with pytest.raises(UnavailableError, match="was lost") as lost:
            await link.read()
        assert "cable" in lost.value.hint
    with pytest.raises(UnavailableError, match="was lost"):
        await link.write(b"s")


async def test_a_reader_that_waits_learns_of_the_unplugging(terminal: Terminal, link: SerialLink) -> None:
    reading = asyncio.create_task(link.read())
    await asyncio.sleep(0)
    terminal.unplug()
    with pytest.raises(UnavailableError, match="was lost"):
        await asyncio.wait_for(reading, DEADLINE_S)


@pytest.mark.parametrize("limit", ["QUEUE_BYTES_MAX", "QUEUE_CHUNKS_MAX"])
async def test_too_much_unread_is_an_error_after_what_was_kept(
    limit: str, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serial_port, limit, 1000 if limit == "QUEUE_BYTES_MAX" else 1)
    link = SerialLink(terminal.path, 115200)
    await link.open()
    session = link._session
    assert session is not None
    sent = bytes(range(200)) * 5
    terminal.say(sent)
    await until(lambda: session._bytes_in > 0)
    terminal.say(b"one too many")
    await until(lambda: session._end is not None)
    kept = await read_bytes(link, session._bytes_in)
    assert kept
    assert sent.startswith(kept)
    with pytest.raises(UnavailableError, match="did not read for too long"):
        await link.read()
    await link.close()


async def test_a_port_that_takes_nothing_is_an_error(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serial_port, "WRITE_TIMEOUT_S", 0.1)
    link = SerialLink(terminal.path, 115200)
    await link.open()
    with pytest.raises(UnavailableError, match="took no data"):
        await link.write(bytes(1_000_000))
    await link.close()


async def test_closing_ends_a_waiting_read_and_the_thread(terminal: Terminal, link: SerialLink) -> None:
    assert len(serial_threads()) == 1
    reading = asyncio.create_task(link.read())
    await asyncio.sleep(0)
    await asyncio.gather(link.close(), link.close())
    with pytest.raises(UnavailableError, match="was closed"):
        await asyncio.wait_for(reading, DEADLINE_S)
    await until(lambda: not serial_threads())
    await link.close()
    with pytest.raises(UnavailableError, match="is not open"):
        await link.read()
    with pytest.raises(UnavailableError, match="is not open"):
        await link.write(b"s")


async def test_a_port_can_be_opened_again(terminal: Terminal, link: SerialLink) -> None:
    for _ in range(5):
        await link.open()
        terminal.say(b"hello")
        assert await read_bytes(link, 5) == b"hello"
    assert len(serial_threads()) == 1


async def test_a_cancelled_opening_leaves_no_open_port(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[serial.Serial] = []
    really_open = serial_port._open_port

    def open_and_remember(line: serial_port._Line) -> serial.Serial:
        opened.append(really_open(line))
        return opened[0]

    monkeypatch.setattr(serial_port, "_open_port", open_and_remember)
    opening = asyncio.create_task(SerialLink(terminal.path, 115200).open())
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    await until(lambda: bool(opened) and not opened[0].is_open)


async def test_no_such_port(tmp_path: Path) -> None:
    link = SerialLink(str(tmp_path / "ttyUSB0"), 115200)
    with pytest.raises(UnavailableError, match="there is no such port") as missing:
        await link.open()
    assert "/dev/serial/by-id" in missing.value.hint
    await link.close()


async def test_a_file_that_is_no_port(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnavailableError, match="cannot be opened") as refused:
        await SerialLink(str(tmp_path / "file"), 115200).open()
    assert "is a serial port" in refused.value.hint


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (serial.SerialException(errno.EACCES, "could not open port"), "dialout"),
        (serial.SerialException(errno.EIO, "could not open port"), "plug it in again"),
        (termios.error(25, "Inappropriate ioctl for device"), "is a serial port"),
    ],
)
async def test_refusals_of_the_system(error: Exception, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr(serial, "Serial", refuse)
    with pytest.raises(UnavailableError) as refused:
        await SerialLink("/dev/ttyUSB0", 115200).open()
    assert hint in refused.value.hint


@pytest.mark.parametrize("baud_rate", [0, -9600])
def test_impossible_baud_rate(baud_rate: int) -> None:
    with pytest.raises(ConfigError, match="baud rate"):
        SerialLink("/dev/ttyUSB0", baud_rate)


def modes_of(link: SerialLink) -> tuple[int, serial.Serial]:
    assert link._session is not None
    port = link._session._port
    return termios.tcgetattr(port.fileno())[0], port


async def test_parity_and_flow_control_reach_the_port(terminal: Terminal) -> None:
    link = SerialLink(terminal.path, 19_200, parity="odd", flow_control="xon_xoff")
    await link.open()
    modes, port = modes_of(link)
    assert (port.baudrate, port.bytesize, port.parity, port.stopbits) == (19_200, 8, "O", 1)
    assert modes & (termios.INPCK | termios.IGNPAR) == termios.INPCK | termios.IGNPAR
    assert modes & termios.IXOFF
    await link.close()


async def test_flow_control_takes_no_byte_out_of_the_data(terminal: Terminal) -> None:
    link = SerialLink(terminal.path, 19_200, parity="odd", flow_control="xon_xoff")
    await link.open()
    terminal.say(bytes(range(256)) * 4)
    assert await read_bytes(link, 1024) == bytes(range(256)) * 4
    await link.write(b"still writes")
    await link.close()


async def test_without_a_wish_neither_is_on(link: SerialLink) -> None:
    modes, port = modes_of(link)
    assert port.parity == "N"
    assert not modes & (termios.INPCK | termios.IXOFF | termios.IXON)


@pytest.mark.parametrize(("option", "value"), [("parity", "mark"), ("flow_control", "rts_cts")])
def test_impossible_options(option: str, value: str) -> None:
    with pytest.raises(ConfigError, match="expected one of none"):
        SerialLink("/dev/ttyUSB0", 9600, **{option: value})


@pytest.fixture
def system(tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /sys and a /dev of its own; the terminal is in it as the port of an FTDI chip."""
    by_id, devices = tmp_path / "by-id", tmp_path / "devices"
    (devices / Path(terminal.path).name).mkdir(parents=True)
    by_id.mkdir()
    monkeypatch.setattr(serial_names, "USB_SERIAL_DEVICES", devices)
    monkeypatch.setattr(serial_names, "BY_ID", by_id)
    serial_port._warn_of_latency.cache_clear()
    serial_port._tell_stable_name.cache_clear()
    return tmp_path


@pytest.mark.parametrize(("latency", "warned"), [("16\n", True), ("2\n", True), ("1\n", False), ("?", False)])
async def test_a_slow_ftdi_chip_is_warned_of_once_with_the_rule(
    latency: str, warned: bool, terminal: Terminal, system: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (system / "devices" / Path(terminal.path).name / "latency_timer").write_text(latency)
    link = SerialLink(terminal.path, 115200)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            await link.open()
            await link.close()
    assert len(caplog.records) == warned
    if warned:
        assert f"up to {latency.strip()} ms" in caplog.text
        assert "60-wardlink-serial.rules" in caplog.text
        assert (Path(__file__).parents[3] / "systemd" / "60-wardlink-serial.rules").is_file()


def test_the_latency_is_found_through_a_stable_name(terminal: Terminal, system: Path) -> None:
    (system / "devices" / Path(terminal.path).name / "latency_timer").write_text("16")
    stable = system / "by-id" / "usb-FTDI_FT231X_USB_UART_DM00Q0QR-if00-port0"
    stable.symlink_to(terminal.path)
    assert serial_names.latency_ms(str(stable)) == 16
    assert serial_names.stable_name(terminal.path) == str(stable)
    assert serial_names.stable_names() == {terminal.path: str(stable)}
    assert serial_names.latency_ms("/dev/ttyS0") is None
    assert serial_names.stable_name("/dev/ttyS0") is None


async def test_a_name_that_may_change_is_told(
    terminal: Terminal, system: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stable = system / "by-id" / "usb-Nonin"
    stable.symlink_to(terminal.path)
    with caplog.at_level(logging.INFO):
        link = SerialLink(terminal.path, 9600)
        await link.open()
        await link.close()
    assert str(stable) in caplog.text


def test_no_udev_no_names(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serial_names, "BY_ID", system / "nothing")
    assert serial_names.stable_names() == {}


async def test_a_stable_name_leads_to_the_port_after_a_replug(terminal: Terminal, tmp_path: Path) -> None:
    stable = tmp_path / "usb-Device-if00"
    stable.symlink_to(terminal.path)
    link = SerialLink(str(stable), 115200)
    await link.open()
    terminal.unplug()
    with pytest.raises(UnavailableError, match="was lost"):
        await asyncio.wait_for(link.read(), DEADLINE_S)
    stable.unlink()
    with pytest.raises(UnavailableError, match="no such port"):
        await link.open()
    again = Terminal()
    stable.symlink_to(again.path)
    await link.open()
    again.say(b"back")
    assert await read_bytes(link, 4) == b"back"
    await link.close()
    again.unplug()
