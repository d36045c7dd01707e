"""`wardlink gateway simulate`: virtual devices as a program of their own, read by the gateway's own links."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gateway.devices.base import Reading, Samples, Send
from gateway.devices.registry import DRIVERS, Options
from gateway.links.base import Link
from gateway.reach import link_maker
from gateway.settings import Device
from gateway.virtual.recordings import fit_to_cyton, load_recording
from gateway.virtual.twins import TWINS
from wardlink import cli

pytestmark = pytest.mark.timeout(120)

DEADLINE_S = 30.0
ROOT = Path(__file__).parents[2]
RECORDING = ROOT.parent / "shared" / "data" / "cyton" / "cyton_v6_blinks_jaw_alpha.txt"
Play = Callable[..., "Playing"]


class Playing:
    """`wardlink gateway simulate …` as a process."""

    def __init__(self, words: tuple[str, ...]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "wardlink", "gateway", "simulate", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self.children: list[psutil.Process] = []

    def places(self) -> dict[str, dict[str, str]]:
        """Where the devices are: said once they are there."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        self.children = psutil.Process(self.process.pid).children(recursive=True)
        found: dict[str, dict[str, str]] = json.loads(line)
        return found

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(number)
        _, complaints = self.process.communicate(timeout=DEADLINE_S)
        return self.process.returncode, complaints


@pytest.fixture
def play() -> Iterator[Play]:
    started: list[Playing] = []

    def start(*words: str) -> Playing:
        started.append(Playing(words))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()


def is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


async def hear(link: Link, driver: str, kind: type[Any]) -> Any:
    """Connect with the driver's own decoder, and wait for the first event of this kind."""
    decoder = DRIVERS[driver].decoder(Options())
    await link.open()
    try:
        async with asyncio.timeout(DEADLINE_S):
            events = decoder.start()
            while True:
                for event in events:
                    if isinstance(event, kind):
                        return event
                    if isinstance(event, Send):
                        await link.write(event.data, event.channel)
                events = decoder.receive(await link.read())
    finally:
        await link.close()


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["gateway", "simulate", "--list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in TWINS)
    assert cli.main(["gateway", "simulate", "--list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["device"] for row in rows] == list(TWINS)
    for row in rows:
        assert DRIVERS[row["driver"]].link.value == row["link"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["citon"], "error: there is no virtual device 'citon'\nhint: one or more of cyton, cyton_daisy, "),
        (["cyton", "citon"], "error: there is no virtual device 'citon'\n"),
        ([], "error: no virtual device is named\nhint: one or more of cyton, cyton_daisy, "),
        (["cyton", "--recording", "/none.txt"], "error: recording /none.txt cannot be read"),
        (["cyton", "--link", "/none/cyton"], "error: the virtual port's link /none/cyton cannot be made"),
    ],
)
def test_what_cannot_be_played_is_refused(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert cli.main(["gateway", "simulate", *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert captured.out == ""


@pytest.mark.parametrize("bus", ["nonsense", "unix:path=/none"])
def test_a_bus_that_is_not_there(capsys: pytest.CaptureFixture[str], bus: str) -> None:
    assert cli.main(["gateway", "simulate", "strap", "--bus", bus]) == 1
    assert capsys.readouterr().err.startswith(f"error: no D-Bus at {bus}: ")


def test_without_the_bus_daemon_there_is_a_hint(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["gateway", "simulate", "strap"]) == 1
    assert "apt install dbus" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_both_devices_play_until_they_are_stopped_and_leave_nothing(
    play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    playing = await asyncio.to_thread(play, "cyton", "strap", "--json", "--link", str(tmp_path / "cyton"))
    places = await asyncio.to_thread(playing.places)
    assert list(places) == ["cyton", "strap"]
    cyton, strap = places["cyton"], places["strap"]
    assert cyton["port"] == str(tmp_path / "cyton")
    for name in ("DBUS_SYSTEM_BUS_ADDRESS", "PATH"):
        monkeypatch.setenv(name, strap[name])

    eeg = await hear(link_maker(Device(driver="cyton", serial="C", port=cyton["port"]))(), "cyton", Samples)
    assert eeg.index == 0
    assert set(eeg.columns) >= {"Fp1", "O2"}
    device = Device(driver=strap["driver"], serial="S", address=strap["address"])
    reading = await hear(link_maker(device)(), strap["driver"], Reading)
    assert 40 < reading.fields.get("heart_rate", 60) < 120

    assert any("dbus-daemon" in child.name() for child in playing.children)
    stub = Path(strap["PATH"].split(os.pathsep)[0])
    bus_folder = Path(strap["DBUS_SYSTEM_BUS_ADDRESS"].removeprefix("unix:path=").split(",")[0]).parent
    assert is_there(stub)
    assert is_there(bus_folder)
    code, complaints = await asyncio.to_thread(playing.end, number)
    assert (code, complaints) == (0, "")
    assert not is_there(tmp_path / "cyton")
    assert not is_there(stub)
    assert not is_there(bus_folder)
    _, alive = await asyncio.to_thread(psutil.wait_procs, playing.children, 5)
    assert alive == []


async def test_a_recording_is_played_from_its_beginning(play: Play) -> None:
    if not RECORDING.exists():
        pytest.skip(f"{RECORDING} is not on this machine: no real recording to play")
    playing = await asyncio.to_thread(play, "cyton", "--json", "--recording", str(RECORDING))
    place = (await asyncio.to_thread(playing.places))["cyton"]
    eeg = await hear(link_maker(Device(driver="cyton", serial="C", port=place["port"]))(), "cyton", Samples)
    recorded = await asyncio.to_thread(lambda: fit_to_cyton(load_recording(RECORDING)))
    played_uv = eeg.columns["Fp1"] * eeg.scales["Fp1"]
    assert abs(played_uv[0] - recorded.uv[0, 0]) < 0.0112


async def test_the_same_seed_is_the_same_headset(play: Play) -> None:
    first: dict[str, list[int]] = {}
    for run, seed in {"once": "7", "again": "7", "other": "8"}.items():
        playing = await asyncio.to_thread(play, "cyton", "--json", "--seed", seed)
        port = (await asyncio.to_thread(playing.places))["cyton"]["port"]
        eeg = await hear(link_maker(Device(driver="cyton", serial="C", port=port))(), "cyton", Samples)
        first[run] = [int(eeg.columns[name][0]) for name in eeg.columns]
        await asyncio.to_thread(playing.end)
    assert first["once"] == first["again"] != first["other"]


def test_without_json_it_is_said_in_words(play: Play, tmp_path: Path) -> None:
    playing = play("cyton", "--link", str(tmp_path / "cyton"))
    assert playing.process.stdout is not None
    lines = [playing.process.stdout.readline() for _ in range(3)]
    assert lines[0] == "cyton is there; Ctrl-C ends it\n"
    assert f"  port = {tmp_path}/cyton\n" in lines
    assert playing.end()[0] == 0
