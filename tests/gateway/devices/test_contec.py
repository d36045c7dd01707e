"""Contec decoders, both generations: vectors, missing codes, keep-alive, damage, limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.devices.base import Event, Facts, Missing, NoValue, Reading, Rejected, Samples, Send, Streaming
from gateway.devices.contec import (
    HELLO,
    KEEP_ALIVE,
    LIVE,
    LIVE_BYTES,
    START_BYTES_MAX,
    STOP,
    ContecDecoder,
    ContecOldDecoder,
)
from gateway.errors import DeviceError
from gateway.links.base import Chunk
from gateway.samples import NS_PER_S

OLD_A, OLD_B = bytes.fromhex("c52a074861"), bytes.fromhex("851043165f")
NEW = bytes.fromhex("01a8c5aa9796e1e680")

Kind = TypeVar("Kind")
Either = ContecOldDecoder | ContecDecoder
Feed = Callable[[Either, bytes], list[Event]]


def of_kind(kind: type[Kind], events: list[Event]) -> list[Kind]:
    return [event for event in events if isinstance(event, kind)]


def whole(decoder: Either, data: bytes) -> list[Event]:
    return decoder.receive(Chunk(data, 0))


def byte_by_byte(decoder: Either, data: bytes) -> list[Event]:
    return [event for byte in data for event in decoder.receive(Chunk(bytes((byte,)), 0))]


FEEDS = pytest.mark.parametrize("feed", [whole, byte_by_byte])


def pleths(events: list[Event]) -> list[int]:
    return [value for samples in of_kind(Samples, events) for value in samples.columns["pleth"].tolist()]


def readings(events: list[Event]) -> list[dict[str, float]]:
    return [dict(reading.fields) for reading in of_kind(Reading, events)]


def new_packet(*payload: int, kind: int = 1) -> bytes:
    high = 0x80 | sum((byte >> 7) << place for place, byte in enumerate(payload))
    return bytes((kind, high, *(byte | 0x80 for byte in payload)))


# Vectors


@FEEDS
@pytest.mark.parametrize("garbage", [b"", b"\x00\x7f\x11", b"\xff\x01"])
def test_old_vectors(feed: Feed, garbage: bytes) -> None:
    events = feed(ContecOldDecoder(), garbage + OLD_A + OLD_B)
    assert pleths(events) == [42, 16]
    assert readings(events) == [{"heart_rate": 72.0, "spo2": 97.0}, {"heart_rate": 150.0, "spo2": 95.0}]
    assert of_kind(Missing, events) == []
    assert sum(event.byte_count for event in of_kind(Rejected, events)) == len(garbage)
    assert of_kind(Facts, events) == [Facts(model="Contec CMS50D+")]
    assert len(of_kind(Streaming, events)) == 1


@FEEDS
@pytest.mark.parametrize("garbage", [b"", b"\x80\xff", b"\x01\x80\x81"])
def test_new_vector(feed: Feed, garbage: bytes) -> None:
    events = feed(ContecDecoder(perfusion_index_percent=0.01), garbage + NEW + new_packet(7, 3, 0, 60, 99, 0, 0))
    assert pleths(events) == [42, 3]
    first, second = readings(events)
    assert first == pytest.approx({"heart_rate": 150.0, "spo2": 97.0, "perfusion_index": 2.3})
    assert second == {"heart_rate": 60.0, "spo2": 99.0}
    assert sum(event.byte_count for event in of_kind(Rejected, events)) == len(garbage)


def test_the_perfusion_index_has_a_value_only_with_a_unit_and_where_it_is_valid() -> None:
    valid, invalid = new_packet(7, 3, 0x17, 60, 99, 230, 0), new_packet(7, 3, 0x17, 61, 99, 0xFF, 0xFF)
    assert readings(whole(ContecDecoder(), valid)) == [{"heart_rate": 60.0, "spo2": 99.0}]
    decoder = ContecDecoder(perfusion_index_percent=0.01)
    (reading,) = readings(whole(decoder, valid))
    assert reading == pytest.approx({"heart_rate": 60.0, "spo2": 99.0, "perfusion_index": 2.3})
    assert readings(whole(decoder, invalid)) == [{"heart_rate": 61.0, "spo2": 99.0}]
    assert decoder.signals[1].channels == ("heart_rate", "spo2", "perfusion_index")
    assert ContecDecoder().signals[1].channels == ("heart_rate", "spo2")


def test_signals() -> None:
    for decoder in (ContecOldDecoder(), ContecDecoder()):
        ppg, vitals = decoder.signals
        assert (ppg.signal, ppg.rate_hz, ppg.channels, ppg.units) == ("ppg", 60.0, ("pleth",), ("1",))
        assert (vitals.signal, vitals.rate_hz, vitals.units) == ("vital_signs", None, ("/min", "%"))


# No values


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        ("9700277f7f", "no finger"),
        ("8700177f7f", "probe error"),
        ("8700274861", "searching"),
        ("870047" + "7f7f", "no heart rate and no SpO2"),
        ("8700070000", "no heart rate and no SpO2"),
    ],
)
def test_old_status_and_codes(frame: str, reason: str) -> None:
    events = whole(ContecOldDecoder(), bytes.fromhex(frame))
    assert readings(events) == []
    (none,) = of_kind(NoValue, events)
    assert reason in none.reason
    (samples,) = of_kind(Samples, events)
    assert samples.columns["quality"].tolist() == [int("heart rate" not in reason)]


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        ((0x97, 0, 0, 60, 97, 0, 0), "probe error; no finger"),
        ((0x07, 0x80, 0, 60, 97, 0, 0), "searching"),
        ((0x07, 0, 0, 0xFF, 0x7F, 0xFF, 0xFF), "no heart rate and no SpO2"),
    ],
)
def test_new_status_and_codes(payload: tuple[int, ...], reason: str) -> None:
    events = whole(ContecDecoder(), new_packet(*payload))
    assert readings(events) == []
    assert [event.reason.startswith(reason) for event in of_kind(NoValue, events)] == [True]


def test_one_code_leaves_the_other_value() -> None:
    assert readings(whole(ContecOldDecoder(), bytes.fromhex("870007487f"))) == [{"heart_rate": 72.0}]
    assert readings(whole(ContecDecoder(), new_packet(7, 0, 0, 0xFF, 97, 0, 0))) == [{"spo2": 97.0}]


def test_unchanged_values_are_told_once_a_second() -> None:
    decoder = ContecOldDecoder()
    events = [event for _ in range(300) for event in whole(decoder, OLD_A)]
    assert len(readings(events)) == 5
    assert readings(whole(decoder, OLD_B)) == [{"heart_rate": 150.0, "spo2": 95.0}]
    assert len(pleths(events)) == 300


# Commands


def test_start_sequence_and_commands() -> None:
    assert ContecOldDecoder().start() == []
    assert ContecDecoder().start() == [Send(STOP), Send(HELLO), Send(LIVE)]
    for command, code in ((LIVE, 0xA1), (STOP, 0xA2), (KEEP_ALIVE, 0xAF), (HELLO, 0xA7)):
        assert command == new_packet(code, *[0] * 6, kind=0x7D)


def test_a_keep_alive_every_four_seconds_of_arrivals() -> None:
    decoder = ContecDecoder()
    sent = [
        number / 60
        for number in range(60 * 30)
        for event in decoder.receive(Chunk(NEW, 5 * NS_PER_S + number * NS_PER_S // 60))
        if event == Send(KEEP_ALIVE)
    ]
    assert sent == pytest.approx([4, 8, 12, 16, 20, 24, 28], abs=0.1)


def test_a_goodbye_is_a_failure_with_its_reason() -> None:
    decoder = ContecDecoder()
    assert of_kind(Rejected, whole(decoder, new_packet(1, kind=0x0D)))  # of an earlier session
    whole(decoder, NEW)
    with pytest.raises(DeviceError, match="reason 0x82"):
        byte_by_byte(decoder, new_packet(0x82, kind=0x0D))


def test_answers_to_commands_are_no_loss() -> None:
    events = whole(ContecDecoder(), NEW + new_packet(0, kind=0x0C) + NEW)
    assert pleths(events) == [42, 42]
    assert of_kind(Missing, events) == []
    assert of_kind(Rejected, events) == [Rejected(3, "packet of type 0x0c")]


@pytest.mark.parametrize(("decoder", "noise"), [(ContecOldDecoder(), b"\x00"), (ContecDecoder(), b"\x80")])
def test_another_device_is_a_failure(decoder: Either, noise: bytes) -> None:
    whole(decoder, noise * START_BYTES_MAX)
    with pytest.raises(DeviceError, match="are not the data of a Contec"):
        whole(decoder, noise)


# Damage


@FEEDS
@pytest.mark.parametrize("cut_at", range(1, 5))
@pytest.mark.parametrize("kept", ["beginning", "end"])
def test_an_old_frame_that_came_in_pieces_is_lost(feed: Feed, cut_at: int, kept: str) -> None:
    piece = OLD_B[:cut_at] if kept == "beginning" else OLD_B[cut_at:]
    events = feed(ContecOldDecoder(), OLD_A * 3 + piece + OLD_A * 2)
    assert pleths(events) == [42] * 5
    assert of_kind(Missing, events) == [Missing("ppg", 3, 1)]
    assert [samples.index for samples in of_kind(Samples, events)][-1] >= 4


@FEEDS
@pytest.mark.parametrize("cut_at", range(1, LIVE_BYTES))
@pytest.mark.parametrize("kept", ["beginning", "end"])
def test_a_new_packet_that_came_in_pieces_is_lost(feed: Feed, cut_at: int, kept: str) -> None:
    piece = NEW[:cut_at] if kept == "beginning" else NEW[cut_at:]
    events = feed(ContecDecoder(), NEW * 3 + piece + NEW * 2)
    assert pleths(events) == [42] * 5
    assert of_kind(Missing, events) == [Missing("ppg", 3, 1)]


@settings(max_examples=150, deadline=None)
@given(
    pieces=st.lists(st.tuples(st.integers(0, 127), st.integers(0, 5)), min_size=1, max_size=60),
    cuts=st.lists(st.integers(1, 40), max_size=30),
    new=st.booleans(),
)
def test_every_whole_frame_is_found_and_every_torn_one_counted(
    pieces: list[tuple[int, int]], cuts: list[int], new: bool
) -> None:
    """`pieces`: the pleth of a frame, and how many bytes of it are lost at its end."""
    data, expected = b"", []
    torn = 0
    for number, (pleth, wanted) in enumerate(pieces):
        frame = new_packet(7, pleth, 0, 60, 97, 0, 0) if new else bytes((0x87, pleth, 7, 60, 97))
        lost = 0 if number == 0 else min(wanted, 4)
        data += frame[: len(frame) - lost]
        if lost:
            torn += 1
        else:
            expected.append(pleth)
    data += new_packet(7, 1, 0, 60, 97, 0, 0) if new else OLD_A
    decoder: Either = ContecDecoder() if new else ContecOldDecoder()
    events: list[Event] = []
    for size in [*cuts, len(data)]:
        events += whole(decoder, data[:size])
        data = data[size:]
    assert pleths(events)[:-1] == expected
    assert sum(event.count for event in of_kind(Missing, events)) == torn
    places = [samples.index + k for samples in of_kind(Samples, events) for k in range(len(samples))]
    missing = [k for event in of_kind(Missing, events) for k in range(event.index, event.index + event.count)]
    assert sorted(places + missing) == list(range(len(places) + len(missing)))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.binary(max_size=80), max_size=30), st.booleans())
def test_any_bytes_are_survived(chunks: list[bytes], new: bool) -> None:
    decoder: Either = ContecDecoder() if new else ContecOldDecoder()
    counted = 0
    for number, data in enumerate(chunks):
        try:
            events = decoder.receive(Chunk(data, number * NS_PER_S))
        except DeviceError:
            return
        counted += len(pleths(events))
        assert all(0 <= value <= 127 for value in pleths(events))
        assert all(0 < value < 256 for reading in readings(events) for value in reading.values())
        if isinstance(decoder, ContecDecoder):
            assert len(decoder._packet) < LIVE_BYTES
        else:
            assert len(decoder._frame) < 5
    assert counted * 5 <= sum(map(len, chunks))
