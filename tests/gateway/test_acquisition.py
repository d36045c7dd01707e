"""One device's life over real links: a Cyton on a pseudo terminal, a strap behind a virtual BlueZ."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from tenacity import RetryCallState, wait_none
from tenacity.wait import wait_base

from gateway import acquisition
from gateway.acquisition import BACKOFF_S_MAX, Acquisition, Outputs, State
from gateway.clock import HostClock
from gateway.devices.base import Event, Reading, SignalSpec
from gateway.devices.cyton import microvolts_per_count
from gateway.devices.registry import DRIVERS, Driver
from gateway.errors import UnavailableError
from gateway.links.base import Chunk, Link
from gateway.links.serial_port import SerialLink
from gateway.reach import link_maker
from gateway.samples import BRAIN_STATE, EEG, VITAL_SIGNS, ElectrodeState, LossRecord, SampleBlock
from gateway.settings import Device
from gateway.signal.features import Features
from gateway.virtual.bluetoothctl import bluetoothctl_stub
from gateway.virtual.bluez import VirtualBlueZ
from gateway.virtual.cyton import CytonFirmware
from gateway.virtual.dbus_daemon import DbusDaemon
from gateway.virtual.recordings import Recording
from gateway.virtual.serial_line import VirtualSerialLine
from gateway.virtual.strap import HeartRateStrap
from gateway.wire.messages import DeviceMeta, ElectrodeMeta

pytestmark = pytest.mark.timeout(90)

DEADLINE_S = 20.0
CYTON = dataclasses.replace(DRIVERS["cyton"], silence_timeout_s=0.4, start_timeout_s=3.0)
ROWS = 100_000


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            if condition():
                return
            await asyncio.sleep(0.005)


def numbered() -> Recording:
    """Its first channel carries the row's number in counts, so that every sample tells which one it is."""
    uv = np.zeros((ROWS, 8))
    uv[:, 0] = np.arange(ROWS) * microvolts_per_count(24)
    uv[:, 1] = np.random.default_rng(1).normal(0, 20, ROWS)
    return Recording(tuple(f"E{k}" for k in range(8)), 250.0, uv)


@dataclass
class Cloud:
    """Everything that an acquisition gives out."""

    items: list[SampleBlock | LossRecord] = field(default_factory=list)
    births: list[DeviceMeta] = field(default_factory=list)
    states: list[tuple[Device, Features]] = field(default_factory=list)

    def outputs(self) -> Outputs:
        return Outputs(
            self.items.append, self.births.append, lambda device, features: self.states.append((device, features))
        )

    def blocks(self, signal: str) -> list[SampleBlock]:
        return [item for item in self.items if isinstance(item, SampleBlock) and item.signal == signal]

    def count(self, signal: str) -> int:
        return sum(map(len, self.blocks(signal)))

    @property
    def lost(self) -> int:
        return sum(item.sample_count for item in self.items if isinstance(item, LossRecord))


class Plug:
    """A virtual Cyton with its dongle in the socket, or not."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "cyton"
        self.firmware = CytonFirmware(numbered())
        self.line: VirtualSerialLine | None = None

    async def plug_in(self) -> None:
        self.line = await VirtualSerialLine(self.firmware, self.path).__aenter__()

    async def unplug(self) -> None:
        line, self.line = self.line, None
        if line is not None:
            await line.__aexit__(None, None, None)


class Attempts(wait_base):
    """Waits a moment, and notes the number of the attempt that failed."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def __call__(self, retry_state: RetryCallState) -> float:
        self.numbers.append(retry_state.attempt_number)
        return 0.02


class Links:
    """Makes real links, and knows which of them are open, or were left without a close."""

    def __init__(self, make: Callable[[], Link]) -> None:
        self._make = make
        self.made = 0
        self.open: list[Link] = []

    def __call__(self) -> Link:
        link = self._make()
        close, reopen = link.close, link.open

        async def closing() -> None:
            await close()
            if link in self.open:
                self.open.remove(link)

        async def opening() -> None:
            self.open.append(link)
            await reopen()
            self.open.append(link)  # opening closes first

        link.close, link.open = closing, opening  # type: ignore[method-assign] - watched, not replaced
        self.made += 1
        return link


@dataclass
class Reader:
    """An acquisition that runs."""

    acquisition: Acquisition
    cloud: Cloud
    links: Links
    waits: Attempts
    task: asyncio.Task[None]
    states: list[State] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    @property
    def state(self) -> State:
        return self.acquisition.condition.state

    @property
    def reason(self) -> str:
        return self.acquisition.condition.reason

    async def streams(self, samples: int = 1) -> None:
        """Wait until data flows and so many more samples have come."""
        await until(lambda: self.state is State.STREAMING)
        enough = self.cloud.count(EEG) + samples
        await until(lambda: self.cloud.count(EEG) >= enough)

    async def waits_because(self, word: str) -> None:
        await until(lambda: word in " | ".join(self.reasons))

    async def end(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


Start = Callable[..., Reader]


def start_reader(device: Device, driver: Driver, make: Callable[[], Link], wait: wait_base | None = None) -> Reader:
    cloud, links, waits = Cloud(), Links(make), Attempts()
    acquisition = Acquisition("gw-1", device, driver, links, HostClock(), cloud.outputs(), wait or waits)
    reader = Reader(acquisition, cloud, links, waits, asyncio.create_task(acquisition.run()))
    change = acquisition._change

    def watched(state: State, reason: str) -> None:
        change(state, reason)
        if not reader.states or reader.states[-1] is not state:
            reader.states.append(acquisition.condition.state)
            reader.reasons.append(acquisition.condition.reason)

    acquisition._change = watched  # type: ignore[method-assign] - watched, not replaced
    return reader


@pytest_asyncio.fixture
async def plug(tmp_path: Path) -> AsyncIterator[Plug]:
    plug = Plug(tmp_path)
    await plug.plug_in()
    yield plug
    await plug.unplug()


@pytest_asyncio.fixture
async def start(plug: Plug) -> AsyncIterator[Start]:
    """Starts readers of the plugged Cyton, and ends them with the test."""
    readers: list[Reader] = []

    def begin(driver: Driver = CYTON, *, port: str = "", wait: wait_base | None = None, **more: Any) -> Reader:
        device = Device(driver="cyton", serial="CYTON-1", port=port or str(plug.path), **more)
        assert device.port is not None
        reader = start_reader(device, driver, lambda: SerialLink(device.port or "", 115_200), wait)
        readers.append(reader)
        return reader

    yield begin
    for reader in readers:
        await reader.end()
        assert reader.links.open == []


def numbers(block: SampleBlock) -> list[int]:
    """Rows of the recording that a block of the first Cyton channel carries."""
    counts: list[int] = block.columns["Fp1"].tolist()
    return counts


def serial_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("serial /")]


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


# --- a Cyton on a pseudo terminal


async def test_a_cyton_streams_and_says_what_it_is(start: Start) -> None:
    reader = start()
    assert (reader.state, reader.reason) == (State.CONNECTING, "gateway started")
    await reader.streams(500)
    assert reader.states == [State.CONNECTING, State.STARTING, State.STREAMING]
    assert (reader.reason, reader.acquisition.condition.segments) == ("data flows", 1)
    birth = reader.cloud.births[-1]
    assert (birth.gateway, birth.device, birth.driver) == ("gw-1", "CYTON-1", "cyton")
    assert (birth.model, birth.firmware, birth.battery_pct) == ("OpenBCI Cyton", "3.1.2", None)
    (signal,) = birth.signals
    assert (signal.signal, signal.rate_hz, signal.channels[0], signal.units[0]) == (EEG, 250.0, "Fp1", "uV")
    assert [row for block in reader.cloud.blocks(EEG) for row in numbers(block)] == list(range(reader.cloud.count(EEG)))
    await until(lambda: bool(reader.cloud.blocks(BRAIN_STATE)))
    assert reader.cloud.states[0][0] is reader.acquisition.device
    assert reader.acquisition.condition.rejected_bytes == 0


async def test_how_the_electrodes_are_is_told_and_told_again_when_it_changes(
    start: Start, plug: Plug, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The second channel of the recording is as EEG; those behind it are flat."""
    caplog.set_level(logging.INFO)
    reader = start()
    assert reader.acquisition.electrodes == {}
    await until(lambda: any(birth.electrodes for birth in reader.cloud.births))
    told = {each.name: each for each in reader.cloud.births[-1].electrodes or ()}
    assert told["Fp2"] == ElectrodeMeta("Fp2", ElectrodeState.OK)
    assert told["C3"] == ElectrodeMeta("C3", ElectrodeState.OFF, "flat: always the same value")
    assert told["C3"].state is reader.acquisition.electrodes["C3"].state
    assert "CYTON-1: electrodes: C3 off (flat: always the same value), " in caplog.text
    births = len(reader.cloud.births)
    plug.firmware.recording = Recording(
        plug.firmware.recording.channel_names, 250.0, np.roll(plug.firmware.recording.uv, 1, axis=1)
    )
    plug.firmware._counts = plug.firmware._digitised()
    await until(lambda: reader.acquisition.electrodes["C3"].state is ElectrodeState.OK)
    assert len(reader.cloud.births) == births, "not twice within ten seconds"
    monkeypatch.setattr(acquisition, "ELECTRODES_TOLD_S", 0.0)
    await until(lambda: len(reader.cloud.births) > births)
    states = {each.name: each.state for each in reader.cloud.births[-1].electrodes or ()}
    assert states["C3"] is ElectrodeState.OK
    await reader.end()
    assert reader.acquisition.electrodes == {}


async def test_the_end_gives_out_what_is_there(start: Start, plug: Plug) -> None:
    reader = start()
    await until(lambda: reader.state is State.STREAMING and plug.firmware.packets_played > 440)
    before = reader.cloud.count(EEG)
    await reader.end()
    after = reader.cloud.count(EEG)
    assert before < after
    assert after % 250
    assert after >= 400, "what has been played and not been read yet, 160 ms of it, is the line's"


async def test_settings_choose_names_and_signals(start: Start) -> None:
    electrodes = tuple(f"X{k}" for k in range(8))
    reader = start(channels=electrodes, raw=False)
    await until(lambda: bool(reader.cloud.blocks(BRAIN_STATE)))
    assert reader.cloud.births[-1].signals[0].channels == list(electrodes)
    assert reader.cloud.count(EEG) == 0


async def test_unplugged_and_plugged_in_again(start: Start, plug: Plug) -> None:
    reader = start()
    await reader.streams(250)
    await plug.unplug()
    await reader.waits_because("lost")
    first_run = reader.cloud.count(EEG)
    await reader.waits_because("there is no such port")
    await until(lambda: len(reader.waits.numbers) >= 3)
    assert str(plug.path) in reader.reason
    assert reader.state in {State.WAITING, State.CONNECTING}
    assert reader.waits.numbers[:3] == [1, 2, 3], "the back-off grows with every attempt"
    assert reader.cloud.count(EEG) == first_run, "what was complete is given out at once"
    assert serial_threads() == []
    await plug.plug_in()
    await reader.streams(250)
    blocks = reader.cloud.blocks(EEG)
    assert sorted({block.segment for block in blocks}) == [0, 1]
    old = [row for block in blocks if block.segment == 0 for row in numbers(block)]
    new = [row for block in blocks if block.segment == 1 for row in numbers(block)]
    assert old == list(range(len(old)))
    assert new == list(range(new[0], new[0] + len(new)))
    assert new[0] > old[-1] + 1
    times = np.concatenate([block.times_ns for block in blocks])
    assert np.all(np.diff(times) > 0)
    states = np.concatenate([block.times_ns for block in reader.cloud.blocks(BRAIN_STATE)] or [times[:0]])
    assert np.all(np.diff(states) > 0)
    assert reader.cloud.lost == 0, "time without a link is a gap, not a count of lost samples"
    cycle = [State.WAITING, State.CONNECTING]
    assert reader.states[:7] == [State.CONNECTING, State.STARTING, State.STREAMING, *cycle, *cycle]
    assert reader.states[-2:] == [State.STARTING, State.STREAMING]
    assert len(reader.links.open) == 1


async def test_after_a_good_run_the_back_off_begins_anew(
    start: Start, plug: Plug, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.acquisition.STEADY_S", 0.5)
    reader = start()
    await reader.streams(250)
    await plug.unplug()
    await until(lambda: len(reader.waits.numbers) >= 3)
    await plug.plug_in()
    await reader.streams(250)
    failed = len(reader.waits.numbers)
    await plug.unplug()
    await until(lambda: len(reader.waits.numbers) > failed)
    assert reader.waits.numbers[failed] == 1


def test_the_back_off_is_random_grows_and_has_a_limit(tmp_path: Path) -> None:
    device = Device(driver="cyton", serial="CYTON-1", port=str(tmp_path))
    chosen = Acquisition("gw-1", device, CYTON, link_maker(device), HostClock(), Cloud().outputs())._wait

    def waits(attempt: int) -> list[float]:
        state = RetryCallState(None, None, (), {})  # type: ignore[arg-type] - only its number is looked at
        state.attempt_number = attempt
        return [chosen(state) for _ in range(200)]

    assert max(waits(1)) < 1
    assert max(waits(50)) == pytest.approx(BACKOFF_S_MAX, rel=0.2)
    assert max(waits(50)) <= BACKOFF_S_MAX
    assert min(waits(50)) < BACKOFF_S_MAX / 4


async def test_silence_ends_the_segment_and_begins_the_start_sequence_anew(start: Start, plug: Plug) -> None:
    reader = start()
    await reader.streams(250)
    plug.firmware.faults.silent = True
    await reader.waits_because("no data from")
    assert f"no data from {plug.path} for 0.4 s" in " ".join(reader.reasons)
    plug.firmware.faults.silent = False
    await reader.streams(250)
    segments = [block.segment for block in reader.cloud.blocks(EEG)]
    assert segments == sorted(segments)
    assert segments[-1] == reader.acquisition.condition.segments - 1 >= 1
    for block in reader.cloud.blocks(EEG):
        assert np.all(np.diff(numbers(block)) == 1)


async def test_a_board_that_is_off_says_so_itself(start: Start, plug: Plug) -> None:
    plug.firmware.faults.board_off = True
    reader = start()
    await reader.waits_because("Communications timeout")
    assert "switch the board on" in " ".join(reader.reasons)
    assert reader.cloud.items == []
    plug.firmware.faults.board_off = False
    await reader.streams()


async def test_a_failure_in_the_middle_of_the_stream_is_the_reason_not_the_silence_after_it(
    start: Start, plug: Plug
) -> None:
    reader = start()
    await reader.streams(250)
    assert plug.line is not None
    plug.line.send(plug.firmware.fail())
    await until(lambda: State.WAITING in reader.states)
    assert "buffer overflowed" in reader.reasons[reader.states.index(State.WAITING)]
    await reader.streams(250)
    assert reader.acquisition.condition.rejected_bytes > 0


async def test_lost_packets_are_counted(start: Start, plug: Plug) -> None:
    plug.firmware.faults.lost = {100, 101, 300}
    reader = start()
    await until(lambda: reader.cloud.lost == 3 and reader.cloud.count(EEG) >= 500)
    rows = [row for block in reader.cloud.blocks(EEG) for row in numbers(block)]
    assert set(range(rows[-1] + 1)) - set(rows) == {100, 101, 300}


@pytest.mark.parametrize(
    ("port", "word"),
    [("/dev/null", "/dev/null"), ("missing", "there is no such port"), ("folder", "directory"), ("text", "text")],
)
async def test_a_wrong_port_is_tried_again_with_its_reason_visible(
    start: Start, tmp_path: Path, port: str, word: str
) -> None:
    (tmp_path / "text").write_text("no serial port")
    (tmp_path / "folder").mkdir()
    reader = start(port=port if port.startswith("/") else str(tmp_path / port))
    await until(lambda: len(reader.waits.numbers) >= 3)
    assert word in " ".join(reader.reasons)
    assert "cannot be opened" in reader.reason
    assert "hint" in reader.reason
    assert reader.acquisition.condition.segments == 0
    assert not reader.task.done()


class SickDecoder:
    """A decoder with a bug."""

    signals = (SignalSpec(VITAL_SIGNS, None, ("heart_rate",), ("/min",)),)

    def start(self) -> list[Event]:
        return [Reading(VITAL_SIGNS, {"heart_rate": 60.0}, 5)]

    def receive(self, chunk: Chunk) -> list[Event]:
        raise ZeroDivisionError("a bug")


async def test_a_bug_in_a_driver_is_logged_as_one_and_ends_nothing(
    start: Start, caplog: pytest.LogCaptureFixture, plug: Plug
) -> None:
    reader = start(dataclasses.replace(CYTON, decoder=lambda _names: SickDecoder(), start_timeout_s=0.3))
    await until(lambda: len(reader.waits.numbers) >= 2)
    assert "ZeroDivisionError" in reader.reason
    record = next(record for record in caplog.records if record.levelno == logging.ERROR)
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError
    assert not reader.task.done()
    times = [time for block in reader.cloud.blocks(VITAL_SIGNS) for time in block.times_ns]
    assert len(times) >= 2
    assert np.all(np.diff(times) > 0), "the segments' readings are stamped alike, and still do not turn back"


@pytest.mark.parametrize("state", list(State))
async def test_cancelled_in_any_state_nothing_is_left(start: Start, plug: Plug, state: State) -> None:
    if state is State.WAITING:
        await plug.unplug()
    plug.firmware.faults.silent = state is State.STARTING  # a state that lasts long enough to be met
    gc.collect()
    before = (len(asyncio.all_tasks()), open_descriptors())
    reader = start()
    if state is State.CONNECTING:
        await until(lambda: reader.links.made == 1)
    else:
        await until(lambda: reader.state is state)
    await reader.end()
    assert reader.task.cancelled()
    assert reader.links.open == []
    await until(lambda: serial_threads() == [])  # it tells that the port is closed shortly before it ends
    # A port that was just being opened is closed by a thread of its own; one of the test before may have been open.
    await until(lambda: open_descriptors() <= before[1])
    await until(lambda: len(asyncio.all_tasks()) <= before[0])  # the device's own end of the line ends a turn later


async def test_cancelled_at_any_moment_nothing_is_left(start: Start, plug: Plug) -> None:
    reader = start(wait=wait_none())
    await reader.end()
    await until(lambda: serial_threads() == [])
    gc.collect()
    before = (len(asyncio.all_tasks()), open_descriptors())
    for number in range(30):
        reader = start(wait=wait_none())
        await asyncio.wait({reader.task}, timeout=number * 0.004)
        await reader.end()
        assert reader.links.open == []
    # a port that was being opened is closed by a thread of its own
    await until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("serial")])
    gc.collect()
    await until(lambda: len(asyncio.all_tasks()) <= before[0] and open_descriptors() <= before[1])


# --- a strap behind BlueZ


@pytest.fixture(scope="module")
def bus() -> Iterator[DbusDaemon]:
    with DbusDaemon() as daemon, bluetoothctl_stub():
        yield daemon


@pytest_asyncio.fixture
async def bluez(bus: DbusDaemon, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[VirtualBlueZ]:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus.address)
    async with VirtualBlueZ(bus.address) as virtual:
        yield virtual


@pytest_asyncio.fixture
async def strap(bluez: VirtualBlueZ) -> HeartRateStrap:
    strap = HeartRateStrap(seed=5, speed=20.0)
    bluez.add(strap)
    return strap


@pytest_asyncio.fixture
async def worn(strap: HeartRateStrap) -> AsyncIterator[Reader]:
    device = Device(driver="heart_rate", serial="STRAP-1", address=strap.address.lower())
    driver = dataclasses.replace(DRIVERS["heart_rate"], silence_timeout_s=0.6)
    reader = start_reader(device, driver, link_maker(device))
    yield reader
    await reader.end()
    assert reader.links.open == []


async def test_a_strap_reports_with_its_battery_and_firmware(worn: Reader) -> None:
    await until(lambda: worn.cloud.count(VITAL_SIGNS) >= 30)
    birth = worn.cloud.births[-1]
    assert (birth.device, birth.model, birth.firmware, birth.battery_pct) == ("STRAP-1", "Virtual strap", "1.0.0", 87.0)
    times = np.concatenate([block.times_ns for block in worn.cloud.blocks(VITAL_SIGNS)])
    assert np.all(np.diff(times) > 0)
    assert {name for block in worn.cloud.blocks(VITAL_SIGNS) for name in block.columns} == {"heart_rate", "rr_interval"}


async def test_a_battery_that_falls_is_told(worn: Reader, strap: HeartRateStrap) -> None:
    await until(lambda: worn.state is State.STREAMING)
    strap._battery_pct = 12.0
    await until(lambda: worn.cloud.births[-1].battery_pct == 12.0)


async def test_a_strap_whose_link_drops_comes_back_in_a_new_segment(
    worn: Reader, strap: HeartRateStrap, bluez: VirtualBlueZ
) -> None:
    await until(lambda: worn.cloud.count(VITAL_SIGNS) >= 10)
    sessions = bluez.notify_sessions(strap.address)
    bluez.drop_link(strap.address)
    await worn.waits_because("the link was lost")
    await until(lambda: worn.cloud.blocks(VITAL_SIGNS)[-1].segment == 1)
    times = np.concatenate([block.times_ns for block in worn.cloud.blocks(VITAL_SIGNS)])
    assert np.all(np.diff(times) > 0)
    assert bluez.notify_sessions(strap.address) == sessions


async def test_a_strap_that_goes_silent_is_connected_anew(worn: Reader, strap: HeartRateStrap) -> None:
    await until(lambda: worn.cloud.count(VITAL_SIGNS) >= 5)
    strap.silent = True
    await worn.waits_because(f"no data from {strap.address}")
    strap.silent = False
    seen = worn.cloud.count(VITAL_SIGNS)
    await until(lambda: worn.state is State.STREAMING and worn.cloud.count(VITAL_SIGNS) > seen)


async def test_a_strap_that_is_not_there_is_waited_for(bluez: VirtualBlueZ, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.links.ble.SCAN_S_MAX", 0.3)
    device = Device(driver="heart_rate", serial="STRAP-1", address="00:22:D0:3A:10:01")
    reader = start_reader(device, DRIVERS["heart_rate"], link_maker(device))
    await reader.waits_because("was not heard")
    bluez.add(HeartRateStrap(speed=20.0))
    await until(lambda: reader.cloud.count(VITAL_SIGNS) >= 3)
    await reader.end()


async def test_a_link_that_cannot_be_made_is_an_expected_error() -> None:
    class Broken:
        name = "broken"

        async def open(self) -> None:
            raise UnavailableError("broken", hint="mend it")

        async def read(self) -> Chunk:
            raise AssertionError

        async def write(self, data: bytes, channel: str = "") -> None:
            raise AssertionError

        async def close(self) -> None:
            return

    device = Device(driver="cyton", serial="CYTON-1", port="/dev/null")
    reader = start_reader(device, CYTON, Broken)
    await until(lambda: len(reader.waits.numbers) >= 3)
    assert reader.reason == "broken (hint: mend it)"
    await reader.end()
