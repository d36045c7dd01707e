"""Faults of `wardlink gateway simulate`: each one arrives at the real driver that reads the twin."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tenacity import wait_fixed

from gateway.acquisition import Acquisition, Outputs, State
from gateway.clock import HostClock
from gateway.devices.registry import DRIVERS
from gateway.links.base import Chunk, Link
from gateway.reach import link_maker
from gateway.samples import ACCELERATION, EEG, VITAL_SIGNS, LossRecord, SampleBlock
from gateway.settings import Device
from gateway.virtual.fault_plan import AWAY_S, SILENCE_S, FaultPlan, possible_faults, why_not
from gateway.virtual.twins import TWINS
from wardlink import cli

pytestmark = pytest.mark.timeout(120)

DEADLINE_S = 40.0
ROOT = Path(__file__).parents[2]


@dataclass
class Heard:
    """What an acquisition of the twin gives out, and what came over its link."""

    acquisition: Acquisition
    counts: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    fields: list[dict[str, float]] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def take(self, content: SampleBlock | LossRecord) -> None:
        if isinstance(content, LossRecord):
            self.lost[content.signal] += content.sample_count
            return
        self.counts[content.signal] += len(content)
        if content.signal == VITAL_SIGNS:
            self.fields.append({name: float(content.physical(name)[-1]) for name in content.columns})

    @property
    def segments(self) -> int:
        return self.acquisition.condition.segments

    def streams_again(self) -> bool:
        return self.segments > 1 and self.acquisition.condition.state is State.STREAMING


Play = Callable[..., AbstractAsyncContextManager[Heard]]


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Play]:
    """Plays a twin with faults as a process of its own, and reads it with the gateway's own driver and link."""
    started: list[subprocess.Popen[str]] = []

    def begin(*words: str) -> dict[str, dict[str, str]]:
        process = subprocess.Popen(
            [sys.executable, "-m", "wardlink", "gateway", "simulate", *words, "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        started.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        found: dict[str, dict[str, str]] = json.loads(line)
        return found

    @contextlib.asynccontextmanager
    async def reading(twin: str, *words: str, **more: Any) -> AsyncIterator[Heard]:
        serial = DRIVERS[TWINS[twin].driver].link.value == "serial"
        link = ("--link", str(tmp_path / "port")) if serial else ()
        place = (await asyncio.to_thread(begin, twin, *words, *link))[twin]
        for name in ("DBUS_SYSTEM_BUS_ADDRESS", "PATH"):
            if name in place:
                monkeypatch.setenv(name, place[name])
        driver = place["driver"]
        device = Device(driver=driver, serial="X-1", port=place.get("port"), address=place.get("address"), **more)
        heard: Heard

        def make() -> Link:
            made = link_maker(device)()
            read = made.read

            async def noted() -> Chunk:
                heard.chunks.append(await read())
                return heard.chunks[-1]

            made.read = noted  # type: ignore[method-assign] - watched, not replaced
            return made

        def emit(content: SampleBlock | LossRecord) -> None:
            heard.take(content)

        outputs = Outputs(emit, lambda _birth: None, lambda _device, _features: None)
        acquisition = Acquisition("gw-1", device, DRIVERS[driver], make, HostClock(), outputs, wait_fixed(0.2))
        heard = Heard(acquisition)
        change = acquisition._change

        def watched(state: State, reason: str) -> None:
            heard.reasons.append(reason)
            change(state, reason)

        acquisition._change = watched  # type: ignore[method-assign] - watched, not replaced
        task = asyncio.create_task(acquisition.run())
        try:
            yield heard
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    yield reading
    for process in started:
        process.terminate()
        _, complaints = process.communicate(timeout=DEADLINE_S)
        assert (process.returncode, complaints) == (0, "")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


# --- what happens to packets


async def test_without_faults_nothing_is_lost_or_rejected(play: Play) -> None:
    """The control of all that follow."""
    async with play("cyton") as heard:
        await until(lambda: heard.counts[EEG] >= 1_000)
        assert heard.lost[EEG] == heard.acquisition.condition.rejected_bytes == 0
    assert heard.segments == 1


async def test_loss(play: Play) -> None:
    async with play("cyton", "--loss", "0.1") as heard:
        await until(lambda: heard.counts[EEG] >= 1_000)
    assert 0.05 < heard.lost[EEG] / (heard.counts[EEG] + heard.lost[EEG]) < 0.15


async def test_duplicates(play: Play) -> None:
    async with play("cyton", "--duplicates", "0.1") as heard:
        await until(lambda: heard.counts[EEG] >= 750)
    assert heard.lost[EEG] == 0
    rejected = heard.acquisition.condition.rejected_bytes
    assert rejected % 33 == 0, "whole packets that came before"
    assert rejected / 33 > 0.04 * heard.counts[EEG]


@pytest.mark.parametrize("twin", ["cyton", "nonin"])
async def test_garbage(play: Play, twin: str) -> None:
    signal = EEG if twin == "cyton" else "ppg"
    async with play(twin, "--garbage", "0.2") as heard:
        await until(lambda: heard.counts[signal] >= 500)
    assert heard.acquisition.condition.rejected_bytes > 500


async def test_half_packets(play: Play) -> None:
    async with play("cyton", "--half-packets", "0.1") as heard:
        await until(lambda: heard.counts[EEG] >= 750)
    assert heard.lost[EEG] > 20
    assert heard.acquisition.condition.rejected_bytes >= 16 * (heard.lost[EEG] - 10)


async def test_reordering(play: Play) -> None:
    async with play("muse", "--reordering", "0.1") as heard:
        await until(lambda: heard.counts[EEG] >= 1_000 and heard.counts[ACCELERATION] >= 100)
    accelerations = [
        int.from_bytes(chunk.data[:2], "big") for chunk in heard.chunks if "000a-4c4d" in chunk.channel.lower()
    ]
    assert any(later < earlier for earlier, later in pairwise(accelerations))
    assert heard.segments == 1
    assert heard.lost[EEG] == 0, "what comes late is put where it belongs"


# --- what comes over a device after a time


async def test_silence(play: Play) -> None:
    async with play("cyton", "--silence-after", "2") as heard:
        await until(heard.streams_again)
        since = heard.counts[EEG]
        await until(lambda: heard.counts[EEG] > since)
    assert any("no data from " in reason for reason in heard.reasons)
    assert DRIVERS["cyton"].silence_timeout_s < SILENCE_S


async def test_silence_of_a_ble_device(play: Play) -> None:
    async with play("muse", "--silence-after", "2") as heard:
        await until(heard.streams_again)
    assert any("no data from " in reason for reason in heard.reasons)
    assert DRIVERS["muse"].silence_timeout_s < SILENCE_S


async def test_unplugged_and_plugged_in_again_under_the_same_name(play: Play) -> None:
    async with play("gps", "--drop-link-after", "2") as heard:
        await until(heard.streams_again)
        since = heard.counts[VITAL_SIGNS]
        await until(lambda: heard.counts[VITAL_SIGNS] > since)
    assert any(" was lost: " in reason for reason in heard.reasons)
    assert any("there is no such port" in reason for reason in heard.reasons)


async def test_a_lost_link(play: Play) -> None:
    async with play("strap", "--drop-link-after", "2") as heard:
        await until(heard.streams_again)
    assert any("lost" in reason or "disconnected" in reason for reason in heard.reasons), heard.reasons


async def test_the_dongles_failure_message(play: Play) -> None:
    async with play("cyton", "--failure-message-after", "3") as heard:
        await until(heard.streams_again)
    assert any("Failure: Communications timeout - Device failed to poll Host" in reason for reason in heard.reasons)


async def test_a_killed_bluetoothd(play: Play) -> None:
    async with play("strap", "--kill-bluetoothd-after", "2") as heard:
        await until(heard.streams_again)
    assert any("BlueZ" in reason or "bluetooth" in reason.lower() for reason in heard.reasons), heard.reasons
    assert AWAY_S > 0


async def test_rr_intervals_without_a_heart_rate(play: Play) -> None:
    async with play("strap", "--rr-without-heart-rate") as heard:
        await until(lambda: len(heard.fields) >= 3)
    assert {name for fields in heard.fields for name in fields} == {"rr_interval"}


# --- which device can have which


def test_every_twin_can_have_what_happens_to_packets_and_to_its_link() -> None:
    for twin in TWINS.values():
        assert {"loss", "duplicates", "garbage", "half_packets", "silence_after", "drop_link_after"} <= set(
            possible_faults(twin)
        )
    ble = {name for name, twin in TWINS.items() if "kill_bluetoothd_after" in possible_faults(twin)}
    assert ble == {name for name, twin in TWINS.items() if twin.link.value == "BLE"}
    assert ble == {name for name, twin in TWINS.items() if "reordering" in possible_faults(twin)}
    assert {name for name, twin in TWINS.items() if "failure_message_after" in possible_faults(twin)} == {
        "cyton",
        "cyton_daisy",
    }
    assert why_not(TWINS["gps"], "reordering") == "a serial line keeps the order"


def test_what_is_not_asked_for_does_not_happen() -> None:
    assert list(FaultPlan().wanted()) == []
    assert list(FaultPlan(loss=0.1, silence_after=0.0).wanted()) == ["loss", "silence_after"]


def test_the_list_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["gateway", "simulate", "--list", "--json"]) == 0
    rows = {row["device"]: row["faults"] for row in json.loads(capsys.readouterr().out)}
    assert "--rr-without-heart-rate" in rows["strap"]
    assert "--rr-without-heart-rate" not in rows["cuff"]
    assert "--failure-message-after" in rows["cyton_daisy"]
    assert cli.main(["gateway", "simulate", "--list"]) == 0
    assert "--kill-bluetoothd-after" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cyton", "--reordering", "0.1"], "cyton cannot have --reordering: a serial line keeps the order"),
        (
            ["strap", "gps", "--failure-message-after", "1"],
            "strap cannot have --failure-message-after: it is",
        ),
        (
            ["nonin", "--kill-bluetoothd-after", "1"],
            "nonin cannot have --kill-bluetoothd-after: it is on",
        ),
        (["muse", "--rr-without-heart-rate"], "muse cannot have --rr-without-heart-rate: it measures no RR intervals"),
        (["cyton", "--drop-link-after", "1"], "cyton cannot have --drop-link-after: its port would come back under"),
        (
            ["gps", "cyton", "--link", "/tmp/x", "--drop-link-after", "1"],
            "cyton cannot have --drop-link-after: its port would come back under another name: it must be the first",
        ),
    ],
)
def test_a_device_that_cannot_have_it(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert cli.main(["gateway", "simulate", *words]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("option", "value"), [("--loss", "1.1"), ("--garbage", "-0.1"), ("--loss", "some"), ("--silence-after", "-1")]
)
def test_numbers_out_of_range(capsys: pytest.CaptureFixture[str], option: str, value: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["gateway", "simulate", "cyton", f"{option}={value}"])
    assert ended.value.code == 2
    assert f"{value!r}: expected " in capsys.readouterr().err
