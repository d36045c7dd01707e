"""LSL: a real outlet through our link, and the decoder by itself."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.devices.base import Event, Missing, Reading, Rejected, Samples, SignalSpec
from gateway.devices.lsl import LslDecoder
from gateway.devices.tables import bytes_of
from gateway.errors import ConfigError, UnavailableError
from gateway.links import lsl_link
from gateway.links.base import Chunk
from gateway.links.lsl_link import LslLink, describe_stream, find_streams
from gateway.samples import NS_PER_S

DEADLINE_S = 30.0
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def pylsl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The library, kept to this machine; skips where it is not installed."""
    settings_file: Path = tmp_path_factory.mktemp("lsl") / "lsl_api.cfg"
    settings_file.write_text("[multicast]\nResolveScope = machine\n[log]\nlevel = -3\n")
    before = os.environ.get("LSLAPICFG")
    os.environ["LSLAPICFG"] = str(settings_file)
    yield pytest.importorskip("pylsl", reason="pylsl (the extra lsl) is not installed", exc_type=ImportError)
    if before is None:
        del os.environ["LSLAPICFG"]


class Outlet:
    """A lab's program that streams."""

    def __init__(self, library: Any, kind: str, rate_hz: float, labels: list[str], units: list[str] | None) -> None:
        self.name = f"wardlink-{os.getpid()}-{next(_numbers)}"
        info = library.StreamInfo(self.name, kind, len(labels), rate_hz, library.cf_float32, self.name)
        info.set_channel_labels(labels)
        if units:
            info.set_channel_units(units)
        self.outlet: Any = library.StreamOutlet(info)
        self._library = library
        self.rate_hz = rate_hz

    def push(self, numbers: range, begin_s: float) -> None:
        """Samples whose values are their number and its negative, all at once, with their own stamps."""
        for number in numbers:
            self.outlet.push_sample([float(number), -float(number)], begin_s + number / (self.rate_hz or 1.0))


@pytest.fixture
def eeg(pylsl: Any) -> Outlet:
    return Outlet(pylsl, "EEG", 500.0, ["C3", "C4"], ["microvolts", "millivolts"])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


async def read(link: LslLink, decoder: LslDecoder, samples: int) -> list[Event]:
    events: list[Event] = []
    async with asyncio.timeout(DEADLINE_S):
        while sum(len(event) for event in events if isinstance(event, Samples)) < samples:
            events += decoder.receive(await link.read())
    return events


# With the library


async def test_what_a_lab_streams_arrives(pylsl: Any, eeg: Outlet) -> None:
    stream = await asyncio.to_thread(describe_stream, eeg.name)
    assert (stream.kind, stream.rate_hz, stream.channels) == ("EEG", 500.0, ("C3", "C4"))
    assert stream.units == ("microvolts", "millivolts")
    decoder = LslDecoder(stream.kind, stream.rate_hz, stream.channels, stream.units)
    assert decoder.signals == (SignalSpec("eeg", 500.0, ("C3", "C4"), ("uV", "uV")),)
    link = LslLink(eeg.name, 2, 500.0)
    await link.open()
    await until(eeg.outlet.have_consumers)
    begin_s = pylsl.local_clock() - 3.0
    await asyncio.to_thread(eeg.push, range(400), begin_s)
    await asyncio.to_thread(eeg.push, range(700, 1000), begin_s)
    events = await read(link, decoder, 700)
    await link.close()
    assert [(event.index, event.count) for event in events if isinstance(event, Missing)] == [(400, 300)]
    for event in events:
        if isinstance(event, Samples):
            expected = np.arange(event.index, event.index + len(event))
            assert event.columns["C3"] * event.scales["C3"] == pytest.approx(expected)
            assert event.columns["C4"] * event.scales["C4"] == pytest.approx(-1000.0 * expected)
            # The stamps are of this host's clock, so they tell when the samples were taken.
            true_ns = (begin_s + (event.index + len(event) - 1) / 500) * NS_PER_S
            assert event.arrival_ns == pytest.approx(true_ns, abs=2_000_000)


async def test_a_stream_that_ends_is_an_error_with_a_hint(pylsl: Any, eeg: Outlet) -> None:
    link = LslLink(eeg.name, 2, 500.0)
    await link.open()
    await until(eeg.outlet.have_consumers)
    eeg.outlet = None
    with pytest.raises(UnavailableError, match="was lost") as lost:
        await asyncio.wait_for(link.read(), DEADLINE_S)
    assert "running" in lost.value.hint
    await link.close()


async def test_a_stream_of_another_shape_is_refused(pylsl: Any, eeg: Outlet) -> None:
    for link in (LslLink(eeg.name, 3, 500.0), LslLink(eeg.name, 2, 250.0)):
        with pytest.raises(UnavailableError, match="has 2 channels at 500 Hz"):
            await link.open()


async def test_no_such_stream(pylsl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lsl_link, "RESOLVE_S", 0.2)
    with pytest.raises(UnavailableError, match="no LSL stream is called 'nothing'"):
        await LslLink("nothing", 2, 500.0).open()


async def test_streams_are_found_and_texts_are_not(pylsl: Any, eeg: Outlet) -> None:
    texts = pylsl.StreamOutlet(pylsl.StreamInfo(f"{eeg.name}-texts", "Markers", 1, 0.0, pylsl.cf_string, "texts"))
    deadline = time.monotonic() + DEADLINE_S
    names: set[str] = set()
    while eeg.name not in names and time.monotonic() < deadline:
        names = {stream.name for stream in await asyncio.to_thread(find_streams, 0.5)}
    assert eeg.name in names
    assert f"{eeg.name}-texts" not in names
    with pytest.raises(ConfigError, match="holds texts"):
        await LslLink(f"{eeg.name}-texts", 1, 0.0).open()
    del texts


def test_where_it_is_not_installed_the_hint_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    lsl_link._library.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "pylsl", None)
    try:
        with pytest.raises(ConfigError, match="cannot be used") as missing:
            find_streams(0.1)
    finally:
        lsl_link._library.cache_clear()
    assert "wardlink[lsl]" in missing.value.hint


# The decoder by itself


def table(*stamps: float) -> bytes:
    return bytes_of(np.array([[stamp, 1.0, 2.0] for stamp in stamps]))


def test_jitter_is_no_loss_and_a_jump_is() -> None:
    decoder = LslDecoder("EEG", 100.0, ["a", "b"])
    stamps = [100.0, 100.012, 100.018, 100.2, 100.21, 101.22, 101.23]
    events = decoder.receive(Chunk(table(*stamps[:3]), 0)) + decoder.receive(Chunk(table(*stamps[3:]), 0))
    assert [(event.index, event.count) for event in events if isinstance(event, Missing)] == [(5, 100)]
    assert [(event.index, len(event)) for event in events if isinstance(event, Samples)] == [(0, 3), (3, 2), (105, 2)]


@pytest.mark.parametrize(("stamp_s", "arrival_s"), [(50.0, 50.0), (101.0, 100.0), (1.7e9, 100.0), (85.0, 100.0)])
def test_stamps_of_another_clock_are_not_believed(stamp_s: float, arrival_s: float) -> None:
    decoder = LslDecoder("EEG", 100.0, ["a", "b"])
    (samples,) = decoder.receive(Chunk(table(stamp_s), int(arrival_s * NS_PER_S)))
    assert isinstance(samples, Samples)
    assert samples.arrival_ns == int(arrival_s * NS_PER_S)


def test_units_and_names() -> None:
    (spec,) = LslDecoder("Accelerometer", 52.0, ["", "Y axis", "Y axis"], ["m/s^2", "", "g"]).signals
    assert spec == SignalSpec("acceleration", 52.0, ("ch1", "Y_axis", "Y_axis_3"), ("[g]", "[g]", "[g]"))
    (spec,) = LslDecoder("NIRS", 10.0, ["a"], ["mmol/L"]).signals
    assert (spec.signal, spec.units) == ("NIRS", ("mmol/L",))


def test_values_without_a_rate_are_readings() -> None:
    decoder = LslDecoder("vital_signs", 0.0, ["heart_rate", "spo2"])
    data = bytes_of(np.array([[99.0, 61.0, np.nan], [99.5, 62.0, 98.0], [99.6, np.nan, np.nan]]))
    assert decoder.receive(Chunk(data, 100 * NS_PER_S)) == [
        Reading("vital_signs", {"heart_rate": 61.0}, 99 * NS_PER_S),
        Reading("vital_signs", {"heart_rate": 62.0, "spo2": 98.0}, int(99.5 * NS_PER_S)),
    ]


@pytest.mark.parametrize(
    ("kind", "rate_hz", "channels"), [("EEG", 0.0, ["a"]), ("EEG", 1.0, []), ("vital_signs", 5.0, ["a"])]
)
def test_streams_that_mean_nothing_here(kind: str, rate_hz: float, channels: list[str]) -> None:
    with pytest.raises(ConfigError, match="expected channels"):
        LslDecoder(kind, rate_hz, channels)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.binary(max_size=100) | st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5).map(lambda s: table(*s)))
)
def test_any_bytes_are_survived(chunks: list[bytes]) -> None:
    decoder = LslDecoder("EEG", 250.0, ["a", "b"])
    for data in chunks:
        events = decoder.receive(Chunk(data, 0))
        assert sum(len(e) for e in events if isinstance(e, Samples)) == len(data) // 24 or isinstance(
            events[0], Rejected
        )
