"""`wardlink gateway impedance`: a real process that measures a virtual Cyton's electrodes over a pseudo terminal."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from gateway.devices.registry import DRIVERS, LeadOff, Options
from gateway.links.serial_port import SerialLink
from gateway.virtual.cyton import CytonFirmware, seeded_skin_ohm
from gateway.virtual.recordings import DAISY_MONTAGE, Recording
from gateway.virtual.serial_line import VirtualSerialLine
from gateway.virtual.synthetic import synthetic_headset
from wardlink import cli, impedance

pytestmark = pytest.mark.timeout(120)

DEADLINE_S = 60.0
ROOT = Path(__file__).parents[2]
SKIN_OHM = {0: 4_000.0, 1: 10_000.0, 2: 25_000.0, 3: 200_000.0}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "gateway.toml"
    path.write_text(
        f'[gateway]\nid = "gw-1"\nstate_dir = "{tmp_path}/state"\n[mqtt]\nhost = "nobody.invalid"\n'
        f'[[device]]\ndriver = "cyton"\nserial = "CYTON-1"\nport = "{tmp_path}/cyton"\n'
        '[[device]]\ndriver = "heart_rate"\nserial = "STRAP-1"\naddress = "00:22:D0:3A:10:01"\n'
    )
    return path


@pytest_asyncio.fixture
async def cyton(tmp_path: Path) -> AsyncIterator[VirtualSerialLine]:
    """Four electrodes on skin that is known; the last input hangs in the air and rails."""
    recording = await asyncio.to_thread(synthetic_headset, 20.0)
    uv = recording.uv.copy()
    uv[:, 7] = 1e6
    firmware = CytonFirmware(Recording(recording.channel_names, 250.0, uv), skin_ohm=SKIN_OHM)
    async with VirtualSerialLine(firmware, tmp_path / "cyton") as line:
        yield line


def firmware_of(line: VirtualSerialLine) -> CytonFirmware:
    assert isinstance(line.firmware, CytonFirmware)
    return line.firmware


async def start(config: Path, *words: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "wardlink", "gateway", "impedance", *words, "--config", str(config),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            if condition():
                return
            await asyncio.sleep(0.005)


async def test_each_electrode_in_turn_and_none_has_a_current_afterwards(config: Path, cyton: VirtualSerialLine) -> None:
    firmware, driven = firmware_of(cyton), set[tuple[int, ...]]()
    process = await start(config, "CYTON-1", "--seconds", "1", "--json")
    ended = asyncio.create_task(process.communicate())
    async with asyncio.timeout(DEADLINE_S):
        while not ended.done():
            driven.add(tuple(firmware.test_currents))
            await asyncio.sleep(0.002)
    out, err = await ended
    assert (process.returncode, err) == (1, b""), "one could not be measured"
    found = json.loads(out)
    assert [row["electrode"] for row in found] == ["Fp1", "Fp2", "C3", "C4", "P7", "P8", "O1", "O2"]
    assert [row["kohm"] for row in found[:7]] == pytest.approx([4, 10, 25, 200, 10, 10, 10], rel=0.05)
    assert [row["rating"] for row in found] == [
        "good", found[1]["rating"], "fair", "poor", *(row["rating"] for row in found[4:7]), "none",
    ]  # fmt: skip
    assert {row["rating"] for row in found[4:7]} <= {"good", "fair"}, "10 kOhm is the border"
    assert found[7]["kohm"] is None
    assert "not on the skin" in found[7]["reason"]
    assert driven == {(), *((column,) for column in range(8))}, "never two: their sum would flow through the reference"
    assert (firmware.test_currents, firmware.streaming) == ([], False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_interrupted_it_resets_the_board_and_shows_what_it_has(
    config: Path, cyton: VirtualSerialLine, number: signal.Signals
) -> None:
    firmware = firmware_of(cyton)
    process = await start(config, "CYTON-1", "--seconds", "1")
    await until(lambda: firmware.test_currents == [1] and firmware.streaming)
    process.send_signal(number)
    out, err = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    assert process.returncode == impedance.EXIT_INTERRUPTED
    assert err == b"interrupted after 1 electrodes; the board is reset\n"
    assert b"Fp1" in out
    assert b"Fp2" not in out
    assert (firmware.test_currents, firmware.streaming) == ([], False)


async def test_a_board_that_goes_silent_is_an_error_and_a_warning(config: Path, cyton: VirtualSerialLine) -> None:
    firmware = firmware_of(cyton)
    process = await start(config, "CYTON-1", "--seconds", "1")
    await until(lambda: firmware.test_currents == [0] and firmware.streaming)
    await cyton.__aexit__(None, None, None)
    out, err = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    assert (process.returncode, out) == (1, b"")
    assert b"warning: the board was not reset: serial port " in err
    assert b"\nerror: serial port " in err
    await cyton.__aenter__()


async def test_lost_packets_begin_the_stretch_anew(cyton: VirtualSerialLine) -> None:
    firmware = firmware_of(cyton)
    firmware.faults.lost = set(range(100, 300, 50))
    lead_off = DRIVERS["cyton"].lead_off
    assert lead_off is not None
    async with reading(cyton, lead_off, 1) as found:
        assert found.contact("Fp1", 1).kohm == pytest.approx(4, rel=0.05)
        assert sum(map(len, found._uv)) < 400


@pytest.mark.parametrize(("number", "seed"), [(1, 5), (12, 5), (12, 6)])
async def test_with_a_daisy_the_mean_of_two_samples_is_undone(tmp_path: Path, number: int, seed: int) -> None:
    recording = await asyncio.to_thread(synthetic_headset, 20.0, electrodes=DAISY_MONTAGE)
    firmware = CytonFirmware(recording, daisy=True, skin_ohm=seeded_skin_ohm(seed))
    lead_off = DRIVERS["cyton_daisy"].lead_off
    assert lead_off is not None
    async with VirtualSerialLine(firmware) as line, reading(line, lead_off, number) as found:
        kohm = found.contact("x", lead_off.averaged).kohm
        assert kohm == pytest.approx(seeded_skin_ohm(seed)[number - 1] / 1000, rel=0.1, abs=0.2)


@contextlib.asynccontextmanager
async def reading(line: VirtualSerialLine, lead_off: LeadOff, number: int) -> AsyncIterator[impedance._Reading]:
    decoder = lead_off.decoder(Options(), number)
    found = impedance._Reading(decoder, number, 1.0)
    async with asyncio.timeout(DEADLINE_S):
        async with impedance._restored(lambda: SerialLink(line.port, 115_200), lead_off) as link:
            await impedance._read(link, decoder, found)
            assert firmware_of(line).test_currents == [number - 1]
        assert firmware_of(line).test_currents == []
        yield found


def test_the_skin_of_a_twin_is_seeded() -> None:
    assert seeded_skin_ohm(3) == seeded_skin_ohm(3) != seeded_skin_ohm(4)
    assert all(500 < ohm < 200_000 for ohm in seeded_skin_ohm(3).values())
    assert sorted(seeded_skin_ohm(3)) == list(range(16))


@pytest.mark.parametrize(
    ("kohm", "word"), [(0.0, "good"), (10.0, "good"), (10.1, "fair"), (50.0, "fair"), (50.1, "poor"), (9e9, "poor")]
)
def test_ratings(kohm: float, word: str) -> None:
    assert impedance.rating(kohm) == word


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["STRAP-1"], 2, "error: STRAP-1 is a heart_rate, which has no test current"),
        (["CYTON-2"], 2, "error: there is no device 'CYTON-2' in the configuration"),
        (["CYTON-1"], 1, "error: serial port "),
    ],
)
def test_what_cannot_be_measured(
    config: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str
) -> None:
    assert cli.main(["gateway", "impedance", *words, "--config", str(config)]) == code
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize("seconds", ["0.5", "61", "much"])
def test_seconds_out_of_range(config: Path, capsys: pytest.CaptureFixture[str], seconds: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["gateway", "impedance", "CYTON-1", "--seconds", seconds])
    assert ended.value.code == 2
    assert "expected" in capsys.readouterr().err


async def test_a_port_that_is_busy(config: Path, cyton: VirtualSerialLine) -> None:
    holder = SerialLink(cyton.port, 115_200)
    await holder.open()
    try:
        process = await start(config, "CYTON-1")
        out, err = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    finally:
        await holder.close()
    assert (process.returncode, out) == (1, b"")
    assert err.startswith(b"error: CYTON-1 is busy: serial port ")
