"""`wardlink gateway watch`: real processes that read virtual devices, and what is made of their values."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from numpy.typing import NDArray

from gateway import status
from gateway.devices.base import SignalSpec
from gateway.links.serial_port import SerialLink
from gateway.samples import (
    EEG,
    QUALITY,
    VITAL_SIGNS,
    ClockStamp,
    ClockState,
    ElectrodeState,
    LossCause,
    LossRecord,
    SampleBlock,
)
from gateway.signal.electrodes import Electrode
from gateway.status import BrokerStatus, ClockStatus, DeviceStatus, GatewayStatus, OutboxStatus
from gateway.virtual.bluetoothctl import bluetoothctl_stub
from gateway.virtual.bluez import VirtualBlueZ
from gateway.virtual.cyton import CytonFirmware
from gateway.virtual.dbus_daemon import DbusDaemon
from gateway.virtual.recordings import Recording
from gateway.virtual.serial_line import VirtualSerialLine
from gateway.virtual.strap import HeartRateStrap
from wardlink.live_values import LiveValues

pytestmark = pytest.mark.timeout(90)

DEADLINE_S = 30.0
ROOT = Path(__file__).parents[2]
ADDRESS = "00:22:D0:3A:10:01"
NAMES = ("Fp1", "Fp2", "C3", "C4", "P7", "P8", "O1", "O2")


@pytest.fixture(scope="module")
def bus() -> Iterator[DbusDaemon]:
    with DbusDaemon() as daemon, bluetoothctl_stub():
        yield daemon


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "gateway.toml"
    path.write_text(
        f'[gateway]\nid = "gw-1"\nstate_dir = "{tmp_path}/state"\n[mqtt]\nhost = "nobody.invalid"\n'
        f'[[device]]\ndriver = "cyton"\nserial = "CYTON-1"\nport = "{tmp_path}/cyton"\nraw = false\n'
        f'[[device]]\ndriver = "heart_rate"\nserial = "STRAP-1"\naddress = "{ADDRESS}"\n'
    )
    return path


@pytest_asyncio.fixture
async def cyton(tmp_path: Path) -> AsyncIterator[VirtualSerialLine]:
    """Its first electrode is ordinary, the second flat, the third railed, the fourth hears the mains."""
    times_s = np.arange(2500) / 250.0
    uv = np.random.default_rng(3).normal(0.0, 15.0, (2500, 8))
    uv[:, 1] = 0.0
    uv[:, 2] = 1e6
    uv[:, 3] += 100.0 * np.sin(2 * np.pi * 50.0 * times_s)
    async with VirtualSerialLine(CytonFirmware(Recording(NAMES, 250.0, uv)), tmp_path / "cyton") as line:
        yield line


async def start(config: Path, *words: str, stdout: int = subprocess.PIPE) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "wardlink", "gateway", "watch", *words, "--config", str(config),
        stdout=stdout, stderr=subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip


async def watch(config: Path, *words: str) -> tuple[int | None, list[str], str]:
    process = await start(config, *words)
    out, err = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    return process.returncode, out.decode().splitlines(), err.decode()


async def line_with(process: asyncio.subprocess.Process, word: str) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(DEADLINE_S):
        while True:
            line = (await process.stdout.readline()).decode()
            assert line, "it ended"
            if word in line:
                return line


async def service_says(config: Path, written: datetime, *, running: bool = True) -> None:
    device = DeviceStatus("CYTON-1", "cyton", "/dev/x", "streaming", "data flows", "", 1, 0)
    strap = DeviceStatus("STRAP-1", "heart_rate", ADDRESS, "streaming", "data flows", "", 1, 0)
    said = GatewayStatus(
        "gw-1",
        4711,
        written.isoformat(),
        running,
        [device, strap],
        OutboxStatus(0, 0, ""),
        ClockStatus("synced", 1_000, "ntp", holds=False, waiting=0),
        BrokerStatus(connected=True, last_error=""),
        {},
    )
    await asyncio.to_thread(status.write, config.parent / "state", said)


# --- the command


async def test_each_electrode_has_its_state_and_reason(config: Path, cyton: VirtualSerialLine) -> None:
    process = await start(config, "CYTON-1")
    line = await line_with(process, "eeg ")
    for pattern in (
        r"^CYTON-1 streaming \| eeg 250\.\d Hz \| ",
        r"\| Fp1 ok \d+\.\d uV rms \|",
        r"\| Fp2 off \(flat: always the same value\)",
        r"\| C3 railed \(100 % of the samples at the end of the range\) \|",
        r"\| C4 noisy \(50 Hz mains: \d\d uV rms, \d\.\d uV in the other electrodes\) \d+\.\d uV rms \|",
        r"\| OpenBCI Cyton \| 3\.1\.2$",
    ):
        assert re.search(pattern, line), pattern
    process.send_signal(signal.SIGINT)
    _, err = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    assert (process.returncode, err) == (0, b"")
    assert not (config.parent / "state").exists(), "nothing is stored"


async def test_vital_signs_and_battery(bus: DbusDaemon, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus.address)
    async with VirtualBlueZ(bus.address) as bluez:
        bluez.add(HeartRateStrap(ADDRESS, speed=10.0))
        process = await start(config, "STRAP-1")
        line = await line_with(process, "vital_signs")
        assert re.search(r"\| vital_signs\.heart_rate \d+ /min \| vital_signs\.rr_interval [\d.]+ ms \|", line)
        assert "battery 87 %" in line
        process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(process.wait(), DEADLINE_S)
        assert process.returncode == 0
        assert not bluez.connected(ADDRESS)


async def test_a_device_that_is_not_there_is_waited_for_with_its_reason(config: Path) -> None:
    code, lines, err = await watch(config, "CYTON-1", "--seconds", "2.5")
    assert code == 1
    assert 2 <= len(lines) <= 3
    assert re.match(r"CYTON-1 (waiting|connecting): serial port .* there is no such port", lines[-1])
    assert re.search(r"error: no data from CYTON-1 in 2.5 s: .*there is no such port", err)


async def test_on_a_terminal_it_is_a_table(config: Path, cyton: VirtualSerialLine) -> None:
    shown, terminal = pty.openpty()
    os.set_blocking(shown, False)
    process = await start(config, "CYTON-1", stdout=terminal)
    os.close(terminal)
    text, deadline = "", time.monotonic() + DEADLINE_S
    while not (re.search(r"C3 .*railed", text) and "┏" in text):
        assert time.monotonic() < deadline, text
        try:
            text += os.read(shown, 65536).decode(errors="replace")
        except BlockingIOError:
            await asyncio.sleep(0.02)
    process.send_signal(signal.SIGINT)
    ended = asyncio.create_task(process.wait())
    while not ended.done():
        try:
            text += os.read(shown, 65536).decode(errors="replace")
        except BlockingIOError:
            await asyncio.sleep(0.02)
        except OSError:  # the other end is closed
            break
    assert await asyncio.wait_for(ended, DEADLINE_S) == 0
    os.close(shown)


# --- a device that somebody else reads


@pytest.mark.parametrize("serial", ["CYTON-1", "STRAP-1"])
async def test_the_service_keeps_its_device(config: Path, serial: str) -> None:
    await service_says(config, datetime.now(UTC) + timedelta(seconds=5))
    code, lines, err = await watch(config, serial)
    assert (code, lines) == (1, [])
    assert err.startswith(f"error: {serial} is busy: the gateway service (process 4711) reads it\nhint: stop it ")


@pytest.mark.parametrize("running", [True, False])
async def test_a_service_that_does_not_run_keeps_nothing(
    config: Path,
    cyton: VirtualSerialLine,
    running: bool,
) -> None:
    age = timedelta(seconds=0 if not running else status.AGE_S_MAX + 5)
    await service_says(config, datetime.now(UTC) - age, running=running)
    code, lines, err = await watch(config, "CYTON-1", "--seconds", "4")
    assert (code, err) == (0, "")
    assert "Fp1 ok" in lines[-1]


async def test_a_port_that_is_busy_is_told_at_once(config: Path, cyton: VirtualSerialLine) -> None:
    holder = SerialLink(cyton.port, 115_200)
    await holder.open()
    try:
        code, lines, err = await watch(config, "CYTON-1")
    finally:
        await holder.close()
    assert (code, lines) == (1, [])
    assert re.match(r"error: CYTON-1 is busy: serial port .* the port is in use; most likely the gateway service", err)


async def test_a_device_that_nobody_configured(config: Path) -> None:
    code, lines, err = await watch(config, "CYTON-2")
    assert (code, lines) == (2, [])
    assert err == ("error: there is no device 'CYTON-2' in the configuration\nhint: devices there: CYTON-1, STRAP-1\n")


# --- what is made of blocks

TRUST = ClockStamp(ClockState.SYNCED, 0)
SPEC = SignalSpec(EEG, 100.0, ("A", "B"), ("uV", "uV"))
VITALS = SignalSpec(VITAL_SIGNS, None, ("heart_rate", "spo2"), ("/min", "%"))


def block(start: int, uv: NDArray[np.float64], segment: int = 0) -> SampleBlock:
    times_ns = 10_000_000 * (start + np.arange(len(uv), dtype=np.int64))
    columns = {"A": uv[:, 0], "B": uv[:, 1], QUALITY: np.zeros(len(uv), np.int64)}
    return SampleBlock("D", EEG, times_ns, columns, TRUST, segment)


def test_electrodes_come_first_with_state_and_reason() -> None:
    values = LiveValues([SPEC])
    random = np.random.default_rng(1)
    values.take(block(0, random.normal(0, 10, (100, 2))))
    values.take(LossRecord("D", EEG, LossCause.RADIO, 6_000_000_000, 6_100_000_000, 11))
    electrodes = {
        "A": Electrode(ElectrodeState.OK, "", 12.34),
        "B": Electrode(ElectrodeState.OFF, "flat: always the same value", 0.0),
    }
    assert list(values.rows(electrodes)) == [
        (EEG, "A", "12.3 uV rms", "ok", ""),
        (EEG, "B", "0.0 uV rms", "off", "flat: always the same value"),
    ]
    assert values.rates() == ["eeg 100.0 Hz, 11 lost"]


def test_a_field_that_is_left_out_keeps_what_was_said_last() -> None:
    values = LiveValues([VITALS])
    assert not values.heard
    for number, columns in enumerate(
        ({"heart_rate": np.array([70.0]), "spo2": np.array([97.0])}, {"heart_rate": np.array([71.0])})
    ):
        values.take(SampleBlock("D", VITAL_SIGNS, np.array([number], np.int64), columns, TRUST))
    assert values.heard
    assert [row[1:3] for row in values.rows({})] == [("heart_rate", "71 /min"), ("spo2", "97 %")]
    assert values.rates() == []
