"""Recordings as devices: every format, jumps as losses, damaged files."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from pathlib import Path

import edfio
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gateway.devices.base import Event, Missing, Reading, Rejected, Samples, SignalSpec, Streaming
from gateway.devices.replay import Replay, ReplayDecoder, load
from gateway.devices.tables import bytes_of, channel_names
from gateway.errors import ConfigError, UnavailableError
from gateway.links.base import Chunk
from gateway.links.replay import ReplayLink
from gateway.recording_files import index_of_counter, index_of_times, read_recording

SHARED = Path(__file__).parents[3] / ".." / "shared" / "data"


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"the shared recording {name} is not on this machine")
    return path


def played(replay: Replay) -> list[Event]:
    decoder = replay.new_decoder()
    events = decoder.start()
    for part in replay.parts():
        events += decoder.receive(part)
    return events


def values_of(events: list[Event], signal: str) -> dict[int, list[float]]:
    """Index -> physical values."""
    found: dict[int, list[float]] = {}
    for event in events:
        if isinstance(event, Samples) and event.signal == signal:
            table = np.column_stack([event.columns[name] * scale for name, scale in event.scales.items()])
            assert not event.columns["quality"].any()
            found |= {event.index + k: row for k, row in enumerate(table.tolist())}
    return found


def missing_of(events: list[Event], signal: str) -> list[tuple[int, int]]:
    return [(e.index, e.count) for e in events if isinstance(e, Missing) and e.signal == signal]


def table(values: dict[int, list[float]]) -> NDArray[np.float64]:
    return np.array([values[index] for index in sorted(values)])


# Real recordings


@pytest.mark.parametrize(
    ("name", "rate_hz", "first_names"),
    [
        ("cyton/cyton_v6_blinks_jaw_alpha.txt", 250.0, ("EXG_1", "EXG_2")),
        ("muse/muse2016_P300_s1_2017-02-04.csv", 256.0, ("TP9", "AF7")),
        ("eeg_edf/eegmmidb_S001R01.edf", 160.0, ("Fc5", "Fc3")),
    ],
)
def test_every_value_of_a_recording_is_played(name: str, rate_hz: float, first_names: tuple[str, ...]) -> None:
    path = shared(name)
    replay = load(path)
    recorded = read_recording(path)
    eeg = replay.signals[0]
    assert (eeg.signal, eeg.rate_hz, eeg.channels[:2]) == ("eeg", rate_hz, first_names)
    assert eeg.units == ("uV",) * len(eeg.channels)
    events = played(replay)
    assert missing_of(events, "eeg") == []
    found = table(values_of(events, "eeg"))
    assert found.shape == recorded.uv.shape
    assert np.abs(found - recorded.uv).max() <= 0.00051
    assert replay.duration_ns == pytest.approx((len(recorded.uv) - 1) / rate_hz * 1e9)
    offsets = [part.arrival_ns for part in replay.parts()]
    assert offsets == sorted(offsets)
    assert offsets[-1] == replay.duration_ns
    assert max(np.diff(offsets)) <= 110e6


def test_acceleration_is_played_beside_the_eeg() -> None:
    path = shared("cyton/cyton_v6_blinks_jaw_alpha.txt")
    replay = load(path)
    recorded = read_recording(path)
    assert [spec.signal for spec in replay.signals] == ["eeg", "acceleration"]
    assert recorded.acceleration_g is not None
    assert table(values_of(played(replay), "acceleration")) == pytest.approx(recorded.acceleration_g)


def test_a_gps_log() -> None:
    replay = load(shared("nmea/pygpsdata-nmea2.log"))
    parts = list(replay.parts())
    assert b"".join(part.data for part in parts) == shared("nmea/pygpsdata-nmea2.log").read_bytes()
    assert [part.arrival_ns for part in parts] == [0, 1_000_000_000]
    readings = [event for event in played(replay) if isinstance(event, Reading)]
    assert [reading.arrival_ns for reading in readings] == [0, 1_000_000_000]
    assert replay.signals[0].channels == ("gps_latitude", "gps_longitude")


@pytest.mark.parametrize("name", ["badeof", "mixed", "nmea4", "nmeabadck", "nmeastartup"])
def test_every_gps_log_can_be_played(name: str) -> None:
    path = shared(f"nmea/pygpsdata-{name}.log")
    replay = load(path)
    assert b"".join(part.data for part in replay.parts()) == path.read_bytes()
    played(replay)


def test_a_pause_in_a_gps_log_is_played_and_a_long_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "walk.log"
    lines = [f"$GPRMC,{clock},V,,,,,,,280511,,,N*00" for clock in ("235958.00", "235959.50", "000000.50", "120000")]
    path.write_text("\r\n".join(lines))
    assert [part.arrival_ns / 1e9 for part in load(path).parts()] == [0, 1.5, 2.5, 3.5]


# Jumps


def openbci(path: Path, counters: list[int], rate_hz: int = 250) -> Path:
    head = f"%OpenBCI Raw EXG Data\n%Number of channels = 1\n%Sample Rate = {rate_hz} Hz\n"
    path.write_text(head + "".join(f"{counter}, {row}.5, 0, 0, 1\n" for row, counter in enumerate(counters)))
    return path


def test_a_jump_of_the_sample_index_is_a_loss(tmp_path: Path) -> None:
    numbers = [number for number in range(700) if number not in {10, 300, 301, *range(500, 520)}]
    events = played(load(openbci(tmp_path / "gaps.txt", [number % 256 for number in numbers])))
    assert missing_of(events, "eeg") == missing_of(events, "acceleration") == [(10, 1), (300, 2), (500, 20)]
    found = values_of(events, "eeg")
    assert {index: row[0] for index, row in found.items()} == {n: row + 0.5 for row, n in enumerate(numbers)}


def test_a_jump_of_the_time_stamps_is_a_loss(tmp_path: Path) -> None:
    numbers = [number for number in range(600) if not 200 <= number < 212]
    path = tmp_path / "muse.csv"
    rows = "".join(f"{1486223115 + number / 256:.3f},{row / 8},0,0\n" for row, number in enumerate(numbers))
    path.write_text("timestamps,TP9,AF7,Marker\n" + rows)
    events = played(load(path))
    assert missing_of(events, "eeg") == [(200, 12)]
    assert max(values_of(events, "eeg")) == 599


@pytest.mark.parametrize(
    ("counter", "index"),
    [
        ([250, 251, 252, 253, 254, 255, 0, 1], list(range(8))),
        ([250, 252, 254, 0, 2, 6, 8], [0, 1, 2, 3, 4, 6, 7]),
        ([98, 99, 100, 0, 1, 2, 3, 5], [0, 1, 2, 3, 4, 5, 6, 8]),
        ([7, 7, 7, 7], [0, 1, 2, 3]),
        ([5], [0]),
        ([1000, 1001, 1002, 1009], [0, 1, 2, 3]),
        ([0, 1, 2, 2, 3, 4], [0, 1, 2, 3, 4, 5]),
    ],
)
def test_counters(counter: list[int], index: list[int]) -> None:
    assert index_of_counter(np.array(counter, dtype=np.float64)).tolist() == index


def test_times_with_jitter_make_no_loss() -> None:
    random = np.random.default_rng(1)
    times_s = np.arange(1000) / 256 + random.uniform(-0.0009, 0.0009, 1000)
    assert index_of_times(times_s, 256.0).tolist() == list(range(1000))


# EDF and XDF


def test_edf_with_other_rates_and_units(tmp_path: Path) -> None:
    path = tmp_path / "mixed.edf"
    wave = np.sin(np.arange(2000) / 20)
    edfio.Edf(
        [
            edfio.EdfSignal(wave * 100, 200, label="EEG Cz-REF", physical_dimension="uV"),
            edfio.EdfSignal(wave, 200, label="Pz", physical_dimension="mV"),
            edfio.EdfSignal(wave[:100], 10, label="SpO2", physical_dimension="%"),
        ]
    ).write(path)
    replay = load(path)
    assert replay.signals == [SignalSpec("eeg", 200.0, ("Cz", "Pz"), ("uV", "uV"))]
    found = table(values_of(played(replay), "eeg"))
    assert found[:, 1] == pytest.approx(1000 * wave, abs=0.1)


def xdf_chunk(tag: int, content: bytes) -> bytes:
    body = struct.pack("<H", tag) + content
    return b"\x04" + struct.pack("<I", len(body)) + body


def xdf_stream(number: int, kind: str, rate_hz: float, values: NDArray[np.float32], stamps: list[float]) -> bytes:
    labels = "".join(
        f"<channel><label>{kind} {k}</label><unit>{'millivolts' if kind == 'EEG' else 'g'}</unit></channel>"
        for k in range(values.shape[1])
    )
    header = (
        f"<?xml version='1.0'?><info><name>{kind}</name><type>{kind}</type>"
        f"<channel_count>{values.shape[1]}</channel_count><nominal_srate>{rate_hz}</nominal_srate>"
        f"<channel_format>float32</channel_format><created_at>0</created_at>"
        f"<desc><channels>{labels}</channels></desc></info>"
    )
    identity = struct.pack("<I", number)
    rows = b"".join(
        b"\x08" + struct.pack("<d", stamp) + row.astype("<f4").tobytes()
        for stamp, row in zip(stamps, values, strict=True)
    )
    samples = identity + b"\x04" + struct.pack("<I", len(values)) + rows
    footer = (
        f"<?xml version='1.0'?><info><first_timestamp>{stamps[0]}</first_timestamp>"
        f"<last_timestamp>{stamps[-1]}</last_timestamp><sample_count>{len(values)}</sample_count></info>"
    )
    return b"".join(
        (
            xdf_chunk(2, identity + header.encode()),
            xdf_chunk(3, samples),
            xdf_chunk(6, identity + footer.encode()),
        )
    )


def xdf(path: Path, *streams: bytes) -> Path:
    path.write_bytes(
        b"XDF:" + xdf_chunk(1, b"<?xml version='1.0'?><info><version>1.0</version></info>") + b"".join(streams)
    )
    return path


def test_xdf(tmp_path: Path) -> None:
    pytest.importorskip("pyxdf", reason="pyxdf (the extra xdf) is not installed")
    numbers = [number for number in range(1000) if not 400 <= number < 900]
    eeg = np.column_stack([numbers, np.negative(numbers)]).astype(np.float32) / 1000
    motion = np.tile(np.array([[0.0, 0.5, 1.0]], dtype=np.float32), (100, 1))
    path = xdf(
        tmp_path / "lab.xdf",
        xdf_stream(1, "EEG", 250.0, eeg, [100 + number / 250 for number in numbers]),
        xdf_stream(2, "Accelerometer", 50.0, motion, [100.5 + k / 50 for k in range(100)]),
        xdf_stream(3, "Markers", 0.0, motion[:2], [101.0, 102.0]),
    )
    replay = load(path)
    assert [(spec.signal, spec.rate_hz, spec.units[0]) for spec in replay.signals] == [
        ("eeg", 250.0, "uV"),
        ("acceleration", 50.0, "[g]"),
    ]
    assert replay.signals[0].channels == ("EEG_0", "EEG_1")
    events = played(replay)
    assert missing_of(events, "eeg") == [(400, 500)]
    found = values_of(events, "eeg")
    assert sorted(found) == numbers
    assert all(row == pytest.approx([index, -index], abs=0.01) for index, row in found.items())
    starts = [part.arrival_ns for part in replay.parts() if part.channel == "acceleration"]
    assert starts[0] == pytest.approx(0.5e9, abs=0.06e9)


def test_xdf_without_a_stream_to_play(tmp_path: Path) -> None:
    pytest.importorskip("pyxdf", reason="pyxdf (the extra xdf) is not installed")
    values = np.zeros((2, 1), dtype=np.float32)
    with pytest.raises(ConfigError, match="found Markers"):
        load(xdf(tmp_path / "markers.xdf", xdf_stream(1, "Markers", 0.0, values, [1.0, 2.0])))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", [4, 5, 20, 200])
def test_damaged_xdf(tmp_path: Path, size: int) -> None:
    pytest.importorskip("pyxdf", reason="pyxdf (the extra xdf) is not installed")
    path = tmp_path / "cut.xdf"
    xdf(path, xdf_stream(1, "EEG", 250.0, np.zeros((10, 1), dtype=np.float32), [k / 250 for k in range(10)]))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ConfigError, match=r"cut\.xdf"):
        load(path)


# Refusals


@pytest.mark.parametrize("content", [b"", b"hello\n", b"\x00" * 100, b"%OpenBCI\n1,2\n", b"PK\x03\x04"])
def test_what_is_no_recording(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "thing"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="thing"):
        load(path)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "absent.edf")


def test_names_become_field_names() -> None:
    names = channel_names(["EEG Fp1", "", "Fp1", "Fp1", "±°", "quality", "x" * 90])
    assert names == ("EEG_Fp1", "ch2", "Fp1", "Fp1_4", "ch5", "quality_6", "x" * 40)


# The decoder on anything

SPEC = SignalSpec("eeg", 250.0, ("a", "b"), ("uV", "1"))


def rows(*numbers: float) -> bytes:
    return bytes_of(np.array([[number, 1.0, 2.0] for number in numbers]))


def test_numbers_that_jump_within_and_between_parts() -> None:
    decoder = ReplayDecoder([SPEC])
    assert decoder.start() == [Streaming()]
    events = decoder.receive(Chunk(rows(0, 1, 5, 6), 1, "eeg")) + decoder.receive(Chunk(rows(9), 2, "eeg"))
    assert [e.index for e in events if isinstance(e, Samples)] == [0, 5, 9]
    assert missing_of(events, "eeg") == [(2, 3), (7, 2)]
    (back,) = decoder.receive(Chunk(rows(3), 3, "eeg"))
    assert isinstance(back, Rejected)


def test_what_is_no_number_is_marked() -> None:
    decoder = ReplayDecoder([SPEC])
    data = bytes_of(np.array([[0, np.nan, 2.0], [1, 1.0, np.inf], [2, 1e300, 7.0]]))
    (samples,) = [event for event in decoder.receive(Chunk(data, 1, "eeg")) if isinstance(event, Samples)]
    assert samples.columns["quality"].tolist() == [1, 2, 1]
    assert samples.columns["a"].tolist() == [0, 1000, 0]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=120) | st.integers(0, 90).map(lambda n: rows(n, n + 1)), st.booleans())))
def test_any_bytes_are_survived(chunks: list[tuple[bytes, bool]]) -> None:
    decoder = ReplayDecoder([SPEC])
    for data, known in chunks:
        events = decoder.receive(Chunk(data, 0, "eeg" if known else "other"))
        assert known or all(isinstance(event, Rejected) for event in events)


# The whole way


async def test_a_recording_through_its_link(tmp_path: Path) -> None:
    path = openbci(tmp_path / "short.txt", [number % 256 for number in range(1000) if number != 500])
    replay = await asyncio.to_thread(load, path)
    link = ReplayLink(replay.name, replay.parts, replay.duration_ns, paced=False)
    decoder = replay.new_decoder()
    events = decoder.start()
    await link.open()
    while not link.ended:
        with contextlib.suppress(UnavailableError):
            events += decoder.receive(await link.read())
    assert missing_of(events, "eeg") == [(500, 1)]
    samples = [event for event in events if isinstance(event, Samples) and event.signal == "eeg"]
    lateness = [event.arrival_ns - (event.index + len(event) - 1) * 4_000_000 for event in samples]
    # Only what stands before a loss in the same part is late, and nothing is early.
    assert sum(late > min(lateness) for late in lateness) <= 1
