"""BrainFlow: its synthetic board through our link, and BrainFlow as the oracle for our own Cyton driver."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gateway.devices.base import Decoder, Event, Facts, Missing, Rejected, Samples, Send
from gateway.devices.brainflow_board import BrainFlowDecoder
from gateway.devices.cyton import DAISY_ELECTRODES, DEFAULT_ELECTRODES, CytonDecoder
from gateway.devices.tables import bytes_of
from gateway.errors import ConfigError, UnavailableError
from gateway.links import brainflow_link
from gateway.links.base import Chunk, Link
from gateway.links.brainflow_link import BoardAddress, BrainFlowLink, board_description
from gateway.links.serial_port import SerialLink
from gateway.virtual.cyton import CytonFirmware
from gateway.virtual.recordings import Recording, load_recording
from gateway.virtual.serial_line import VirtualSerialLine

SHARED = Path(__file__).parents[3] / ".." / "shared" / "data"
DEADLINE_S = 40.0
SYNTHETIC, CYTON, CYTON_DAISY = -1, 0, 2


@pytest.fixture(scope="module")
def brainflow() -> Any:
    """The library's module; skips where it is not installed or cannot run."""
    pytest.importorskip("brainflow", reason="BrainFlow (the extra brainflow, x86-64 only) is not installed")
    return brainflow_link._library()


async def read_until(link: Link, decoder: Decoder, condition: Callable[[list[Event]], bool]) -> list[Event]:
    events = decoder.start()
    for event in events:
        if isinstance(event, Send):
            await link.write(event.data)
    async with asyncio.timeout(DEADLINE_S):
        while not condition(events):
            new = decoder.receive(await link.read())
            for event in new:
                if isinstance(event, Send):
                    await link.write(event.data)
            events += new
    return events


def count_of(events: list[Event], signal: str = "eeg") -> int:
    return sum(len(event) for event in events if isinstance(event, Samples) and event.signal == signal)


def values_of(events: list[Event], electrodes: tuple[str, ...]) -> dict[int, list[float]]:
    """Index -> microvolts of the samples that are whole."""
    found: dict[int, list[float]] = {}
    for event in events:
        if isinstance(event, Samples) and event.signal == "eeg":
            uv = np.column_stack([event.columns[name] * event.scales[name] for name in electrodes])
            quality = event.columns.get("quality", np.zeros(len(event), dtype=np.int64))
            found |= {event.index + k: row for k, row in enumerate(uv.tolist()) if not quality[k]}
    return found


# The adapter


async def test_the_synthetic_board(brainflow: Any) -> None:
    description = await asyncio.to_thread(board_description, SYNTHETIC)
    decoder = BrainFlowDecoder(description, SYNTHETIC)
    eeg, motion = decoder.signals
    assert (eeg.signal, eeg.rate_hz, len(eeg.channels), eeg.units[0]) == ("eeg", 250.0, 16, "uV")
    assert (motion.signal, motion.channels, motion.units) == ("acceleration", ("x", "y", "z"), ("[g]",) * 3)
    for _ in range(2):
        link = BrainFlowLink(SYNTHETIC)
        assert link.name == "BrainFlow board -1"
        decoder = BrainFlowDecoder(description, SYNTHETIC)
        await link.open()
        events = await read_until(link, decoder, lambda events: count_of(events) >= 300)
        await link.close()
        assert count_of(events) == count_of(events, "acceleration")
        assert not [event for event in events if isinstance(event, Missing | Rejected)]
        assert Facts(model="BrainFlow Synthetic") in events
        samples = [event for event in events if isinstance(event, Samples) and event.signal == "eeg"]
        uv = np.concatenate([event.columns["Fz"] * event.scales["Fz"] for event in samples])
        assert 1 < np.abs(uv).max() < 10_000


async def test_a_board_that_is_not_there(brainflow: Any, tmp_path: Path) -> None:
    link = BrainFlowLink(CYTON, BoardAddress(serial_port=str(tmp_path / "none"), timeout_s=2))
    with pytest.raises(UnavailableError, match="cannot open board 0") as missing:
        await link.open()
    assert "is it on" in missing.value.hint


def test_an_unknown_board(brainflow: Any) -> None:
    with pytest.raises(ConfigError, match="no board 99999"):
        board_description(99_999)


def test_where_it_is_not_installed_the_hint_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    brainflow_link._library.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "brainflow", None)
    try:
        with pytest.raises(ConfigError, match="not installed") as missing:
            board_description(SYNTHETIC)
    finally:
        brainflow_link._library.cache_clear()
    assert "wardlink[brainflow]" in missing.value.hint
    assert "x86-64 only" in missing.value.hint


# The oracle


@pytest.fixture
def ramp() -> Recording:
    """Every channel of every row is different, and every second sample is even, so that means are whole counts."""
    counts = 1000 * np.arange(1, 17) + 2 * np.arange(2000)[:, None] * np.arange(1, 17)
    return Recording(tuple(f"E{k}" for k in range(1, 17)), 250.0, counts * (4.5e6 / 24 / (2**23 - 1)))


@pytest.fixture(params=["ramp", "blinks"])
def recording(request: pytest.FixtureRequest, ramp: Recording) -> Recording:
    if request.param == "ramp":
        return ramp
    path = SHARED / "cyton" / "cyton_v6_blinks_jaw_alpha.txt"
    if not path.exists():
        pytest.skip("the shared Cyton recording is not on this machine")
    return load_recording(path)


def by_brainflow(library: Any, port: str, board_id: int, samples: int) -> NDArray[np.float64]:
    """What BrainFlow reads from a port: (samples, package number and EEG channels)."""
    parameters = library.BrainFlowInputParams()
    parameters.serial_port = port
    library.BoardShim.disable_board_logger()
    board = library.BoardShim(board_id, parameters)
    board.prepare_session()
    try:
        board.start_stream()
        deadline = time.monotonic() + DEADLINE_S
        while board.get_board_data_count() < samples and time.monotonic() < deadline:
            time.sleep(0.02)
        board.stop_stream()
        table = board.get_board_data()
    finally:
        board.release_session()
    rows = [library.BoardShim.get_package_num_channel(board_id), *library.BoardShim.get_eeg_channels(board_id)]
    return np.ascontiguousarray(table[rows].T)


@pytest.mark.parametrize("daisy", [False, True], ids=["Cyton", "Cyton and Daisy"])
async def test_brainflow_reads_the_same_microvolts(brainflow: Any, recording: Recording, daisy: bool) -> None:
    board_id, electrodes = (CYTON_DAISY, DAISY_ELECTRODES) if daisy else (CYTON, DEFAULT_ELECTRODES)
    async with VirtualSerialLine(CytonFirmware(recording, daisy=daisy)) as line:
        theirs = await asyncio.to_thread(by_brainflow, brainflow, line.port, board_id, 150)
    async with VirtualSerialLine(CytonFirmware(recording, daisy=daisy)) as line:
        link = SerialLink(line.port, 115200)
        await link.open()
        events = await read_until(link, CytonDecoder(electrodes, daisy=daisy), lambda events: count_of(events) >= 200)
        await link.close()
    ours = values_of(events, electrodes)
    numbers = np.cumsum(np.diff(theirs[:, 0], prepend=theirs[:1, 0]) % 256) + theirs[0, 0]
    indices = (numbers // (2 if daisy else 1)).astype(np.int64).tolist()
    compared = [(row[1:].tolist(), ours[index]) for index, row in zip(indices, theirs, strict=True) if index in ours]
    # A pair of a Daisy's first, invalid packet is none of ours.
    assert len(compared) >= 145
    for theirs_uv, ours_uv in compared:
        assert theirs_uv == pytest.approx(ours_uv, abs=1e-9)


# The decoder by itself

DESCRIPTION = {
    "name": "Two", "num_rows": 4, "eeg_channels": [1, 2], "package_num_channel": 0, "sampling_rate": 250,
    "eeg_names": "C3,C4",
}  # fmt: skip


def table(*numbers: float) -> bytes:
    return bytes_of(np.array([[number, number * 10, -1.5, 0.0] for number in numbers]))


@pytest.mark.parametrize(
    ("board_id", "numbers", "missing"),
    [
        (CYTON, [0, 1, 2, 5, 6], [(3, 2)]),
        (CYTON, [254, 255, 0, 1], []),
        (CYTON, [255, 3], [(1, 3)]),
        (CYTON_DAISY, [1, 3, 9, 11], [(2, 2)]),
        (38, [7, 7, 7, 8], []),
    ],
)
def test_counters_of_boards(board_id: int, numbers: list[int], missing: list[tuple[int, int]]) -> None:
    decoder = BrainFlowDecoder(DESCRIPTION, board_id)
    events = decoder.receive(Chunk(table(*numbers[:2]), 1)) + decoder.receive(Chunk(table(*numbers[2:]), 2))
    assert [(event.index, event.count) for event in events if isinstance(event, Missing)] == missing
    samples = [event for event in events if isinstance(event, Samples)]
    assert [value for event in samples for value in (event.columns["C3"] * event.scales["C3"]).tolist()] == (
        pytest.approx([number * 10 for number in numbers])
    )
    last = samples[-1]
    assert last.index + len(last) == len(numbers) + sum(count for _, count in missing)


def test_names_of_electrodes() -> None:
    assert BrainFlowDecoder(DESCRIPTION, electrodes=["O1", "O2"]).signals[0].channels == ("O1", "O2")
    assert BrainFlowDecoder(DESCRIPTION | {"eeg_names": ""}).signals[0].channels == ("ch1", "ch2")
    with pytest.raises(ConfigError, match="2 EEG channels, 3 names"):
        BrainFlowDecoder(DESCRIPTION, electrodes=["O1", "O2", "Oz"])
    with pytest.raises(ConfigError, match="no EEG"):
        BrainFlowDecoder({"name": "PlayBack"})


@pytest.mark.parametrize("data", [b"", b"x", bytes(31), bytes(33)])
def test_what_is_no_table(data: bytes) -> None:
    (rejected,) = BrainFlowDecoder(DESCRIPTION, CYTON).receive(Chunk(data, 0))
    assert isinstance(rejected, Rejected)


def test_impossible_counters_are_no_losses() -> None:
    events = BrainFlowDecoder(DESCRIPTION, CYTON).receive(Chunk(table(1, np.nan, -5, 1e9), 0))
    assert [type(event) for event in events] == [Samples]
    assert events[0].columns["quality"].tolist() == [0, 1, 0, 1]  # type: ignore[union-attr]  # just asserted


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.binary(max_size=200)
        | st.binary(min_size=32, max_size=32)
        | st.lists(st.floats(-1e6, 1e6) | st.integers(0, 255), min_size=1, max_size=5).map(
            lambda numbers: table(*numbers)
        ),
        max_size=20,
    ),
    st.sampled_from([None, CYTON, CYTON_DAISY, 38]),
)
def test_any_bytes_are_survived(chunks: list[bytes], board_id: int | None) -> None:
    decoder = BrainFlowDecoder(DESCRIPTION, board_id)
    index = 0
    for data in chunks:
        events = decoder.receive(Chunk(data, 0))
        if isinstance(events[0], Rejected):
            assert [type(event) for event in events] == [Rejected]
            assert events[0].byte_count == len(data)
            continue
        # Every row is there once, and the numbers go on over what is missing.
        samples = [event for event in events if isinstance(event, Samples)]
        assert sum(len(event) for event in samples) * len(table(0)) == len(data)
        for event in events:
            assert isinstance(event, Samples | Missing)
            assert event.index == index
            index += len(event) if isinstance(event, Samples) else event.count
