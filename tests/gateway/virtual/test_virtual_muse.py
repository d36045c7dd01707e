"""The virtual Muses against our decoders, against muse-lsl, and over a real D-Bus."""

from __future__ import annotations

import asyncio
import json
import warnings
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from numpy.typing import NDArray

from gateway.devices.base import Decoder, Event, Facts, Missing, Reading, Rejected, Samples, Send, Streaming
from gateway.devices.muse import EEG_UUIDS, MuseDecoder, notified
from gateway.devices.muse_athena import MuseAthenaDecoder
from gateway.devices.muse_control import ReplyReader, command
from gateway.errors import DeviceError
from gateway.links.base import Chunk
from gateway.links.ble import BleLink
from gateway.samples import NS_PER_S
from gateway.virtual.bluetoothctl import bluetoothctl_stub
from gateway.virtual.bluez import VirtualBlueZ
from gateway.virtual.dbus_daemon import DbusDaemon
from gateway.virtual.muse import (
    ACCELERATION_UUID,
    EEG_ORDER,
    GYRO_UUID,
    PPG_UUIDS,
    TELEMETRY_UUID,
    Model,
    VirtualMuse,
    fit_to_muse,
)
from gateway.virtual.muse_athena import DATA_UUID, PRESETS, VirtualMuseAthena
from gateway.virtual.muse_headband import CONTROL_UUID, MuseHeadband
from gateway.virtual.recordings import Recording, load_recording
from gateway.virtual.wearer import Wearer

MUSE_CSV = Path(__file__).parents[3].parent / "shared/data/muse/muse2016_P300_s1_2017-02-04.csv"
DEADLINE_S = 20.0
TICK_S = 0.02


class Journey:
    """A virtual Muse and a decoder joined without a radio, in the Muse's own time."""

    def __init__(self, twin: MuseHeadband, decoder: Decoder) -> None:
        self.twin = twin
        self.decoder = decoder
        self.events: list[Event] = []
        self.arrived: list[tuple[str, bytes]] = []
        twin.listen(self._arrive)
        self._act(decoder.start())

    def play(self, seconds: float) -> None:
        end_s = self.twin.time_s + seconds
        while self.twin.time_s < end_s:
            self.twin.play_until(min(end_s, self.twin.time_s + TICK_S))

    def of(self, kind: type[Any], signal: str | None = None) -> list[Any]:
        return [
            each for each in self.events if isinstance(each, kind) and signal in (None, getattr(each, "signal", None))
        ]

    def counts(self, signal: str, name: str) -> NDArray[np.int32]:
        return np.concatenate([each.columns[name] for each in self.of(Samples, signal)])

    def physical(self, signal: str, name: str) -> NDArray[np.float64]:
        scale = float(self.of(Samples, signal)[0].scales[name])
        return self.counts(signal, name).astype(np.float64) * scale

    def total(self, signal: str) -> tuple[int, int]:
        """Samples and missing samples, after a look that they are a whole."""
        seen = missing = 0
        for event in self.events:
            if isinstance(event, Samples | Missing) and event.signal == signal:
                assert event.index == seen
                count = event.count if isinstance(event, Missing) else len(event)
                missing += count if isinstance(event, Missing) else 0
                seen += count
        return seen - missing, missing

    def _arrive(self, uuid: str, value: bytes) -> None:
        self.arrived.append((uuid, value))
        self._act(self.decoder.receive(Chunk(value, round(self.twin.time_s * NS_PER_S), uuid)))

    def _act(self, events: Iterable[Event]) -> None:
        self.events += events
        for event in list(events):
            if isinstance(event, Send):
                self.twin.write(event.channel, event.data)


def started(twin: MuseHeadband, preset: str) -> MuseHeadband:
    """The Muse streaming, with nobody who listens."""
    for text in ("h", preset, *[twin.START_COMMAND] * twin.STARTS_NEEDED):
        twin.write(CONTROL_UUID, command(text))
    assert twin.streaming
    return twin


def heard(twin: MuseHeadband, seconds: float) -> list[tuple[str, bytes]]:
    got: list[tuple[str, bytes]] = []
    twin.listen(lambda uuid, value: got.append((uuid, value)))
    twin.play_until(twin.time_s + seconds)
    twin.listen(None)
    return got


def recorded() -> Recording:
    if not MUSE_CSV.exists():
        pytest.skip(f"no recording of a Muse at {MUSE_CSV}")
    return load_recording(MUSE_CSV)


# -- without a radio ------------------------------------------------------------------------------


def test_a_recorded_muse_comes_out_of_the_decoder_as_it_was() -> None:
    recording = recorded()
    journey = Journey(VirtualMuse(recording, model=Model.MUSE_2016), MuseDecoder(preset="p20"))
    journey.play(recording.seconds + 1)
    assert Streaming() in journey.events
    for column, name in enumerate(("TP9", "AF7", "AF8", "TP10", "AUX")):
        whole = journey.physical("eeg", name)[: len(recording)]
        # The file has three decimals.
        assert np.abs(whole - recording.uv[: len(whole), column]).max() < 0.0006
    assert len(whole) == len(recording)
    assert not journey.of(Missing) + journey.of(Rejected)


@pytest.mark.parametrize("preset", ["p21", "p20", "p50", "p61"])
def test_every_stream_at_its_rate(preset: str) -> None:
    journey = Journey(VirtualMuse(model=Model.MUSE_S, first_counter=65_400), MuseDecoder(preset=preset))
    journey.play(60)
    rates = {"eeg": 256, "acceleration": 52, "gyro": 52, **({"ppg": 64} if preset in ("p50", "p61") else {})}
    assert {spec.signal for spec in journey.decoder.signals} == set(rates)
    for signal, rate in rates.items():
        count, missing = journey.total(signal)
        assert missing == 0
        assert 60 * rate - 12 <= count <= 60 * rate
    assert not journey.of(Rejected)
    twin = journey.twin
    assert isinstance(twin, VirtualMuse)
    sent = np.array([twin.raw_of(number) for number in range(journey.total("eeg")[0])]) - 2048
    names = journey.decoder.signals[0].channels
    assert all((journey.counts("eeg", name) == sent[:, column]).all() for column, name in enumerate(names))
    battery = [each.battery_pct for each in journey.of(Facts) if each.battery_pct is not None]
    assert len(battery) == 7
    assert battery == pytest.approx([82] * 7, abs=0.3)


def test_pulse_and_position_are_a_persons() -> None:
    journey = Journey(VirtualMuse(seed=4), MuseDecoder(preset="p50"))
    journey.play(60)
    infrared = journey.physical("ppg", "infrared")
    below = infrared < np.percentile(infrared, 30)
    beats = int(np.sum(below[1:] & ~below[:-1]))
    assert 55 <= beats <= 85
    gravity = [journey.physical("acceleration", axis).mean() for axis in "xyz"]
    assert np.linalg.norm(gravity) == pytest.approx(1.0, abs=0.01)
    assert all(abs(journey.physical("gyro", axis).mean()) < 2 for axis in "xyz")


def test_the_same_seed_is_the_same_muse() -> None:
    first, again, other = (heard(started(VirtualMuse(seed=seed), "p50"), 12) for seed in (5, 5, 6))
    assert first == again
    assert first != other
    times = np.arange(100) / 52
    assert (Wearer(5).gyro_deg_per_s(times) == Wearer(5).gyro_deg_per_s(times)).all()


def test_the_radio_carries_what_the_fact_sheet_says() -> None:
    per_second = Counter(uuid for uuid, _ in heard(started(VirtualMuse(keep_alive_s=None), "p50"), 120))
    rates = {uuid: count / 120 for uuid, count in per_second.items()}
    assert sum(rates[uuid] for uuid in EEG_UUIDS) == pytest.approx(107, abs=1)
    assert sum(rates[uuid] for uuid in PPG_UUIDS) == pytest.approx(32, abs=0.3)
    assert rates[ACCELERATION_UUID] + rates[GYRO_UUID] == pytest.approx(34.7, abs=0.2)
    assert rates[TELEMETRY_UUID] == pytest.approx(0.1)


def test_a_keep_alive_is_needed_and_sent() -> None:
    twin = started(VirtualMuse(), "p21")
    assert len(heard(twin, 29)) > 29 * 100
    assert len(heard(twin, 2)) == pytest.approx(120, abs=10)
    assert heard(twin, 10) == []
    assert not twin.streaming

    journey = Journey(VirtualMuse(), MuseDecoder())
    journey.play(300)
    assert journey.twin.streaming
    assert 28 <= journey.twin.commands.count("k") <= 30
    count, missing = journey.total("eeg")
    assert missing == 0
    assert count == pytest.approx(300 * 256, abs=12)


def test_the_replies_of_a_muse_2016() -> None:
    twin = VirtualMuse(model=Model.MUSE_2016)
    pieces: list[bytes] = []
    twin.listen(lambda uuid, value: pieces.append(value))
    for text in ("h", "v1", "p50", "p21", "s", "nonsense", "k"):
        twin.write(CONTROL_UUID, command(text))
    twin.write(CONTROL_UUID, b"\x05h\n")
    reader = ReplyReader()
    replies = [reply for piece in pieces for reply in reader.receive(piece)[0]]
    assert [reply["rc"] for reply in replies] == [0, 0, 1, 0, 0, 1, 0]
    assert replies[4]["bp"] == 82
    assert all(len(piece) == 20 for piece in pieces)


def test_a_preset_that_the_model_lacks_is_an_error() -> None:
    with pytest.raises(DeviceError, match="p50"):
        Journey(VirtualMuse(model=Model.MUSE_2016), MuseDecoder(preset="p50"))


def test_a_muse_in_its_boot_loader_is_woken() -> None:
    twin = VirtualMuse()
    twin.bootloader = True
    with pytest.raises(DeviceError, match="boot loader"):
        Journey(twin, MuseDecoder())
    assert twin.commands[-1] == "*1"
    assert not twin.streaming
    journey = Journey(twin, MuseDecoder())
    journey.play(1)
    assert journey.of(Samples)


def test_glued_replies_are_understood() -> None:
    twin = VirtualMuse()
    twin.glued_replies = True
    journey = Journey(twin, MuseDecoder())
    journey.play(1)
    assert any(b'"rc":0}{"' in value for uuid, value in journey.arrived if uuid == CONTROL_UUID)
    assert journey.of(Samples)


def test_a_stream_that_ran_on_is_begun_anew() -> None:
    twin = started(VirtualMuse(), "p50")
    heard(twin, 5)
    journey = Journey(twin, MuseDecoder())
    journey.play(5)
    count, missing = journey.total("eeg")
    assert missing == 0
    assert count == pytest.approx(1280, abs=12)
    assert not journey.of(Rejected)


def test_faults_are_survived_and_accounted_for() -> None:
    twin = VirtualMuse(first_counter=65_000)
    journey = Journey(twin, MuseDecoder(preset="p50"))
    faults = twin.faults
    # The first packets tell where each stream begins.
    journey.play(0.5)
    faults.loss, faults.duplicates, faults.reordering, faults.halves, faults.garbage = 0.03, 0.05, 0.05, 0.02, 0.03
    journey.play(60)
    faults.loss = faults.duplicates = faults.reordering = faults.halves = faults.garbage = 0.0
    journey.play(2)
    assert faults.lost.total() > 300
    for signal, samples, uuids in (
        ("eeg", 12, EEG_UUIDS),
        ("ppg", 6, PPG_UUIDS),
        ("acceleration", 3, (ACCELERATION_UUID,)),
        ("gyro", 3, (GYRO_UUID,)),
    ):
        count, missing = journey.total(signal)
        assert count + missing == pytest.approx(62.5 * {12: 256, 6: 64, 3: 52}[samples], abs=samples)
        marked = 0
        if len(uuids) > 1:
            marked = sum(int(each.columns["quality"][0]).bit_count() for each in journey.of(Samples, signal))
        assert marked + missing // samples * len(uuids) == sum(faults.lost[uuid] for uuid in uuids)
    sent = np.array([twin.raw_of(number) for number in range(63 * 256)]) - 2048
    for each in journey.of(Samples, "eeg"):
        for column, name in enumerate(("TP9", "AF7", "AF8", "TP10", "AUX")):
            if not each.columns["quality"][0] >> column & 1:
                assert (each.columns[name] == sent[each.index : each.index + 12, column]).all()


def test_silence_is_silence() -> None:
    twin = VirtualMuse()
    journey = Journey(twin, MuseDecoder())
    journey.play(2)
    twin.faults.silent = True
    before = len(journey.events)
    journey.play(2)
    assert len(journey.events) == before


def test_a_recording_without_the_four_electrodes_is_taken_in_order() -> None:
    fitted = fit_to_muse(Recording(("C3", "C4"), 128.0, np.random.default_rng(1).normal(0, 10, (1280, 2))))
    assert (fitted.channel_names, fitted.rate_hz) == (("TP9", "AF7"), 256.0)
    twin = VirtualMuse(fitted)
    assert twin.raw_of(100)[2:].tolist() == [2048] * 3


# -- Athena ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_an_athena_comes_out_of_the_decoder_as_it_was(preset: str) -> None:
    twin = VirtualMuseAthena(seed=3)
    journey = Journey(twin, MuseAthenaDecoder(preset=preset))
    journey.play(20)
    rates = {"eeg": 256, "acceleration": 52, "gyro": 52, **({"optics": 64} if PRESETS[preset][1] else {})}
    for signal, rate in rates.items():
        count, missing = journey.total(signal)
        assert missing == 0
        assert 20 * rate * 0.985 <= count <= 20 * rate
    names = journey.decoder.signals[0].channels
    sent = np.array([twin.raw_of(number) for number in range(journey.total("eeg")[0])]) - 8192
    assert all((journey.counts("eeg", name) == sent[:, column]).all() for column, name in enumerate(names))
    assert Facts(model="Muse S Athena", firmware="3.1.6") in journey.events
    assert journey.of(Facts)[-1].battery_pct == pytest.approx(82, abs=0.1)
    assert not journey.of(Rejected)
    assert journey.physical("acceleration", "z").mean() == pytest.approx(0.99, abs=0.02)
    assert journey.physical("gyro", "x").mean() == pytest.approx(1.1, abs=0.2)


def test_an_athena_wants_its_start_twice() -> None:
    twin = VirtualMuseAthena()
    for text in ("h", "p21", "dc001", "s", "dc001"):
        twin.write(CONTROL_UUID, command(text))
    assert not twin.streaming
    twin.write(CONTROL_UUID, command("dc001"))
    assert twin.streaming


def test_an_athenas_faults_are_survived_and_accounted_for() -> None:
    twin = VirtualMuseAthena(seed=3)
    journey = Journey(twin, MuseAthenaDecoder(preset="p1041"))
    journey.play(2)
    faults = twin.faults
    faults.loss, faults.duplicates, faults.reordering, faults.halves, faults.garbage = 0.05, 0.05, 0.05, 0.02, 0.03
    twin.unknown_tag_every = 50
    journey.play(60)
    # Long enough for the block counter of the EEG to come round.
    faults.silent = True
    journey.play(3)
    faults.silent = False
    faults.loss = faults.duplicates = faults.reordering = faults.halves = faults.garbage = 0.0
    journey.play(2)
    for signal, rate in {"eeg": 256, "optics": 64, "acceleration": 52, "gyro": 52}.items():
        count, missing = journey.total(signal)
        assert count + missing == pytest.approx(67 * rate, abs=0.1 * rate)
        assert missing > 3 * rate
    reasons = Counter(each.reason for each in journey.of(Rejected))
    assert reasons["unknown tag 0xee"] > 20
    sent = np.array([twin.raw_of(number) for number in range(68 * 256)]) - 8192
    for each in journey.of(Samples, "eeg"):
        assert (each.columns["AF8"] == sent[each.index : each.index + len(each), 2]).all()


# -- muse-lsl as an oracle ------------------------------------------------------------------------


def muselsl(part: str) -> ModuleType:
    """muse-lsl, or a skip that says what to install."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module: ModuleType = pytest.importorskip(
            f"muselsl.{part}", reason="muse-lsl is not here: pip install muselsl 'bitstring<5'"
        )
        return module


def test_muse_lsl_decodes_our_virtual_muse_alike() -> None:
    muse = muselsl("muse").Muse.__new__(muselsl("muse").Muse)
    twin = started(VirtualMuse(keep_alive_s=None, seed=8), "p50")
    theirs: dict[str, list[Any]] = defaultdict(list)
    muse.first_sample, muse.time_func, muse.last_tm, muse.last_tm_ppg = True, lambda: 0.0, 0, 0
    muse._init_sample()
    muse._init_ppg_sample()
    muse.callback_eeg = lambda data, _times: theirs["eeg"].append(data.copy())
    muse.callback_ppg = lambda data, _times: theirs["ppg"].append(data.copy())
    muse.callback_acc = lambda data, _times: theirs["acceleration"].append(np.array(data))
    muse.callback_gyro = lambda data, _times: theirs["gyro"].append(np.array(data))
    muse.callback_telemetry = lambda *values: theirs["telemetry"].append(values)
    muse._init_control()
    muse.callback_control = lambda text: theirs["control"].append(json.loads(text))
    handles = {uuid: (muse._handle_eeg, 32 + 3 * part) for part, uuid in enumerate(EEG_UUIDS)}
    handles |= {uuid: (muse._handle_ppg, 56 + 3 * part) for part, uuid in enumerate(PPG_UUIDS)}
    handles |= {ACCELERATION_UUID: (muse._handle_acc, 23), GYRO_UUID: (muse._handle_gyro, 20)}
    handles |= {TELEMETRY_UUID: (muse._handle_telemetry, 26), CONTROL_UUID: (muse._handle_control, 14)}

    journey = Journey(twin, MuseDecoder(preset="p50"))
    journey.play(60)
    for uuid, value in journey.arrived:
        handle, number = handles[uuid]
        handle(number, value)

    names = {"eeg": ("TP9", "AF7", "AF8", "TP10", "AUX"), "ppg": ("ambient", "infrared", "red")}
    for signal, blocks in theirs.items():
        if signal in ("telemetry", "control"):
            continue
        ours = np.stack([journey.physical(signal, name) for name in names.get(signal, ("x", "y", "z"))])
        both = np.concatenate(blocks, axis=1)
        assert both.shape == ours.shape
        assert np.abs(both - ours).max() < 1e-9
    assert [values[1] for values in theirs["telemetry"]] == [
        each.battery_pct for each in journey.of(Facts) if each.battery_pct is not None and each.battery_pct % 1
    ]
    assert {"fw", "bp"} <= {key for reply in theirs["control"] for key in reply}
    assert set(theirs) == {"eeg", "ppg", "acceleration", "gyro", "telemetry", "control"}


@pytest.mark.parametrize("preset", ["p21", "p1034", "p1035", "p1041"])
def test_muse_lsl_decodes_our_virtual_athena_alike(preset: str) -> None:
    athena = muselsl("athena").Athena.__new__(muselsl("athena").Athena)
    theirs: dict[str, list[Any]] = defaultdict(list)
    athena.time_func, athena._correctors, athena._battery, athena.last_timestamp = lambda: 0.0, {}, 0.0, 0.0
    for theirs_name, name in {"eeg": "eeg", "acc": "acceleration", "gyro": "gyro", "optics": "optics"}.items():
        setattr(athena, f"enable_{theirs_name}", True)
        setattr(athena, f"callback_{theirs_name}", lambda data, _times, name=name: theirs[name].append(data))
    journey = Journey(VirtualMuseAthena(seed=2), MuseAthenaDecoder(preset=preset))
    journey.play(20)
    for uuid, value in journey.arrived:
        if uuid == DATA_UUID:
            athena._handle_data(0, value)
    for spec in journey.decoder.signals:
        ours = np.stack([journey.physical(spec.signal, name) for name in spec.channels])
        both = np.concatenate(theirs[spec.signal], axis=1)
        if spec.signal == "eeg":
            ours = ours[:4]
        elif spec.signal == "optics":
            first = 4 if len(ours) == 4 else 0
            both = both[first : first + len(ours)]
        # They compute in 32 bits.
        assert np.allclose(both, ours, rtol=1e-5, atol=1e-4)
    assert athena._battery == pytest.approx(82, abs=0.1)


# -- over a real D-Bus ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dbus_daemon() -> Iterator[DbusDaemon]:
    with DbusDaemon() as daemon, bluetoothctl_stub():
        yield daemon


@pytest_asyncio.fixture
async def bluez(dbus_daemon: DbusDaemon, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[VirtualBlueZ]:
    for name, value in dbus_daemon.environment().items():
        monkeypatch.setenv(name, value)
    async with VirtualBlueZ(dbus_daemon.address) as virtual:
        yield virtual


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


async def read(link: BleLink, decoder: Decoder, samples: int) -> list[Event]:
    """One connection: the start sequence and then so many EEG samples."""
    events: list[Event] = []
    await link.open()
    try:
        todo = list(decoder.start())
        async with asyncio.timeout(DEADLINE_S):
            while sum(len(each) for each in events if isinstance(each, Samples) and each.signal == "eeg") < samples:
                for event in todo:
                    if isinstance(event, Send):
                        await link.write(event.data, event.channel)
                events += todo
                todo = decoder.receive(await link.read())
    finally:
        await link.close()
    return events


@pytest.mark.timeout(60)
async def test_a_muse_over_the_virtual_bluez(bluez: VirtualBlueZ) -> None:
    twin = VirtualMuse(seed=2)
    bluez.add(twin)
    link = BleLink(twin.address, notified("p50"), ())
    for connection in range(3):
        events = await read(link, MuseDecoder(preset="p50"), 512)
        first_row = twin.first_row
        samples = [each for each in events if isinstance(each, Samples) and each.signal == "eeg"]
        assert [each.index for each in samples] == [12 * number for number in range(len(samples))]
        assert (first_row > 0) or connection == 0
        expected = np.array([twin.raw_of(number) for number in range(12 * len(samples))]) - 2048
        assert (np.concatenate([each.columns["TP10"] for each in samples]) == expected[:, 3]).all()
        assert not [each for each in events if isinstance(each, Missing | Rejected | Reading)]
        assert {each.signal for each in events if isinstance(each, Samples)} == {"eeg", "ppg", "acceleration", "gyro"}
        await until(lambda: not twin.streaming)


@pytest.mark.timeout(60)
async def test_an_athena_over_the_virtual_bluez(bluez: VirtualBlueZ) -> None:
    twin = VirtualMuseAthena(seed=2)
    bluez.add(twin)
    events = await read(BleLink(twin.address, MuseAthenaDecoder.NOTIFY, ()), MuseAthenaDecoder(), 512)
    samples = [each for each in events if isinstance(each, Samples) and each.signal == "eeg"]
    expected = np.array([twin.raw_of(number) for number in range(4 * len(samples))]) - 8192
    assert (np.concatenate([each.columns["AF7"] for each in samples]) == expected[:, 1]).all()
    assert not [each for each in events if isinstance(each, Missing | Rejected)]


@pytest.mark.timeout(60)
async def test_a_model_without_ppg_gives_the_rest(bluez: VirtualBlueZ) -> None:
    twin = VirtualMuse(model=Model.MUSE_2016)
    bluez.add(twin)
    events = await read(BleLink(twin.address, notified("p20"), ()), MuseDecoder(preset="p20"), 128)
    assert {each.signal for each in events if isinstance(each, Samples)} >= {"eeg", "acceleration"}
    assert set(EEG_ORDER) == set(EEG_UUIDS)
