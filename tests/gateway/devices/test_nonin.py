"""Nonin decoders: vectors, packets, loss, damage, limits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.devices import nonin
from gateway.devices.base import (
    Event,
    Facts,
    Missing,
    NoValue,
    Reading,
    Rejected,
    Samples,
    Send,
    Streaming,
    finish,
)
from gateway.devices.nonin import (
    PACKET_FRAMES,
    SELECT_ONYX,
    SELECT_WRISTOX2,
    START_BYTES_MAX,
    NoninDecoder,
    NoninFormat2Decoder,
    NoninFormat7Decoder,
)
from gateway.errors import DeviceError
from gateway.links.base import Chunk
from gateway.samples import NS_PER_S

FORMAT_2_VECTOR = [bytes.fromhex(text) for text in ("0181010083", "01800148ca", "01800161e3", "01800130b2")]
FORMAT_7_VECTOR = [bytes.fromhex(text) for text in ("813a980053", "803b004803", "803b10612c")]

Kind = TypeVar("Kind")
Feed = Callable[[NoninDecoder, bytes], list[Event]]
PERIOD_NS = NS_PER_S // 75


def of_kind(kind: type[Kind], events: list[Event]) -> list[Kind]:
    return [event for event in events if isinstance(event, kind)]


def whole(decoder: NoninDecoder, data: bytes) -> list[Event]:
    return decoder.receive(Chunk(data, 0))


def byte_by_byte(decoder: NoninDecoder, data: bytes) -> list[Event]:
    return [event for byte in data for event in decoder.receive(Chunk(bytes((byte,)), 0))]


def after_garbage(decoder: NoninDecoder, data: bytes) -> list[Event]:
    return decoder.receive(Chunk(b"\x00\x01\x55\x01\x01\x02" + data, 0))


FEEDS = pytest.mark.parametrize("feed", [whole, byte_by_byte, after_garbage])
FORMATS = pytest.mark.parametrize("data_format", [2, 7])


def decoder_of(data_format: int) -> NoninDecoder:
    return NoninFormat2Decoder() if data_format == 2 else NoninFormat7Decoder()


def frame(
    number: int,
    data_format: int = 2,
    *,
    status: int = 0,
    heart_rate: int = 72,
    spo2: int = 97,
    pleth: int | None = None,
) -> bytes:
    """Frame `number` since power-on: its pleth is its number (mod 128), so that its place can be checked."""
    place = number % PACKET_FRAMES
    value = {0: heart_rate >> 7, 1: heart_rate & 0x7F, 2: spo2, 3: 48}.get(place, 0)
    status |= 0x80 | (place == 0)
    shown = number % 128 if pleth is None else pleth
    body = bytes((1, status, shown, value)) if data_format == 2 else bytes((status, 0, shown, value))
    return body + bytes((sum(body) % 256,))


def stream(numbers: Iterable[int], data_format: int = 2) -> bytes:
    return b"".join(frame(number, data_format) for number in numbers)


def numbers_of(events: list[Event]) -> list[int]:
    """Indices of the pleth's samples, after a check that each has its own number (mod 128) as its value."""
    numbers: list[int] = []
    for samples in of_kind(Samples, events):
        indices = list(range(samples.index, samples.index + len(samples)))
        assert samples.columns["pleth"].tolist() == [index % 128 for index in indices]
        numbers += indices
    return numbers


# Vectors


@FEEDS
def test_vector_of_format_2(feed: Feed) -> None:
    data = b"".join([*FORMAT_2_VECTOR, *(frame(number, pleth=1) for number in range(4, 25)), frame(25)])
    decoder = NoninFormat2Decoder()
    events = feed(decoder, data)
    assert of_kind(Reading, events) == [Reading("vital_signs", {"heart_rate": 72.0, "spo2": 97.0}, 0)]
    assert of_kind(Facts, events) == [Facts(model="Nonin OEM III", firmware="48")]
    (samples,) = of_kind(Samples, events)
    assert samples.columns["pleth"].tolist() == [1] * 25
    assert samples.columns["pleth"].dtype == np.int32
    assert len(of_kind(Streaming, events)) == 1
    ppg, vitals = decoder.signals
    assert (ppg.rate_hz, ppg.full_scale, vitals.channels) == (75.0, (0, 255), ("heart_rate", "spo2"))


@FEEDS
def test_vector_of_format_7(feed: Feed) -> None:
    data = b"".join([*FORMAT_7_VECTOR, stream(range(3, 26), 7)])
    decoder = NoninFormat7Decoder()
    events = feed(decoder, data)
    assert of_kind(Reading, events) == [Reading("vital_signs", {"heart_rate": 72.0, "spo2": 97.0}, 0)]
    (samples,) = of_kind(Samples, events)
    assert samples.columns["pleth"].tolist()[:3] == [15_000, 15_104, 15_120]
    assert decoder.signals[0].full_scale == (0, 65_535)


@FEEDS
def test_a_packet_of_23_frames_has_lost_two(feed: Feed) -> None:
    events = feed(NoninFormat2Decoder(), stream([*range(25), *range(25, 48), *range(50, 76)]))
    assert of_kind(Missing, events) == [Missing("ppg", 48, 2)]
    assert numbers_of(events) == [*range(48), *range(50, 75)]
    # The values of a packet that is not whole belong to no known frame.
    assert len(of_kind(Reading, events)) == 2


@pytest.mark.parametrize("bad", ["01800148cb", "017f014889", "02800148cb"])
def test_damaged_frames_are_rejected(bad: str) -> None:
    data = FORMAT_2_VECTOR[0] + bytes.fromhex(bad) + stream(range(2, 51))
    events = whole(NoninFormat2Decoder(), data)
    assert of_kind(Missing, events) == [Missing("ppg", 1, 1)]
    assert sum(event.byte_count for event in of_kind(Rejected, events)) == 5


@FORMATS
@pytest.mark.parametrize("feed", [whole, byte_by_byte])
def test_heart_rates_of_nine_bits(data_format: int, feed: Feed) -> None:
    data = b"".join(frame(number, data_format, heart_rate=150, spo2=88) for number in range(26))
    (reading,) = of_kind(Reading, feed(decoder_of(data_format), data))
    assert reading.fields == {"heart_rate": 150.0, "spo2": 88.0}


@FORMATS
@pytest.mark.parametrize(
    ("heart_rate", "spo2", "fields"), [(511, 97, {"spo2": 97.0}), (60, 127, {"heart_rate": 60.0}), (511, 127, None)]
)
def test_missing_values_are_no_values(
    data_format: int, heart_rate: int, spo2: int, fields: dict[str, float] | None
) -> None:
    data = b"".join(frame(number, data_format, heart_rate=heart_rate, spo2=spo2) for number in range(26))
    events = whole(decoder_of(data_format), data)
    assert [reading.fields for reading in of_kind(Reading, events)] == ([] if fields is None else [fields])
    assert [event.reason for event in of_kind(NoValue, events)] == (
        ["no heart rate and no SpO2"] if fields is None else []
    )


@FORMATS
@pytest.mark.parametrize(
    ("status", "reason"),
    [(0x40, "disconnected"), (0x08, "sensor alarm"), (0x10, "out of track"), (0x20, None), (0x04, None)],
)
def test_status_bits(data_format: int, status: int, reason: str | None) -> None:
    data = b"".join(frame(number, data_format, status=status * (number == 7)) for number in range(26))
    events = whole(decoder_of(data_format), data)
    assert len(of_kind(Reading, events)) == (reason is None)
    assert all(reason in event.reason for event in of_kind(NoValue, events) if reason)
    (samples,) = of_kind(Samples, events)
    # Green perfusion is no fault; an artifact spoils the pleth and not the means.
    assert samples.columns["quality"].tolist() == [int(number == 7 and status != 0x04) for number in range(25)]


# Selecting format 7


@pytest.mark.parametrize("select", [SELECT_WRISTOX2, SELECT_ONYX])
def test_the_format_is_selected(select: bytes) -> None:
    decoder = NoninFormat7Decoder(select)
    assert decoder.start() == [Send(select)]
    assert whole(decoder, b"\x06") == []
    assert numbers_of(whole(decoder, stream(range(26), 7))) == list(range(25))


def test_the_model_is_told() -> None:
    decoder = NoninFormat7Decoder(SELECT_ONYX, "Nonin Onyx II")
    assert of_kind(Facts, whole(decoder, stream(range(26), 7))) == [Facts(model="Nonin Onyx II", firmware="48")]


def test_the_select_command_has_its_sum() -> None:
    assert SELECT_WRISTOX2[-2] == sum(SELECT_WRISTOX2[1:-2]) % 256
    assert bytes.fromhex("027002020703") == SELECT_ONYX


def test_a_refusal_is_a_failure() -> None:
    decoder = NoninFormat7Decoder()
    decoder.start()
    with pytest.raises(DeviceError, match="refuses") as refused:
        whole(decoder, b"\x15")
    assert "try the other" in refused.value.hint


def test_an_oximeter_that_was_talking_already() -> None:
    decoder = NoninFormat7Decoder()
    decoder.start()
    data = stream(range(10, 60), 7)
    events = whole(decoder, data[3:20]) + whole(decoder, b"\x06") + whole(decoder, data[20:])
    # Frame 25 begins the first packet; its index is 0.
    assert [event.index for event in of_kind(Samples, events)] == [0]
    assert of_kind(Samples, events)[0].columns["pleth"].tolist() == list(range(25, 50))


@FORMATS
def test_another_device_is_a_failure(data_format: int) -> None:
    decoder = decoder_of(data_format)
    whole(decoder, bytes(START_BYTES_MAX))
    with pytest.raises(DeviceError, match="are not the data of a Nonin"):
        whole(decoder, bytes(1))


# Loss


@FORMATS
@pytest.mark.parametrize("feed", [whole, byte_by_byte])
def test_damage_in_the_middle_shows_where_the_loss_is(data_format: int, feed: Feed) -> None:
    data = stream(range(30), data_format) + frame(30, data_format)[:3] + stream(range(32, 101), data_format)
    events = feed(decoder_of(data_format), data)
    assert of_kind(Missing, events) == [Missing("ppg", 30, 2)]
    assert numbers_of(events) == [*range(30), *range(32, 100)]


@FORMATS
def test_a_lost_beginning_of_a_packet(data_format: int) -> None:
    events = whole(decoder_of(data_format), stream([*range(25), *range(26, 76)], data_format))
    assert of_kind(Missing, events) == [Missing("ppg", 25, 1)]
    assert numbers_of(events) == [*range(25), *range(26, 75)]
    assert len(of_kind(Reading, events)) == 1


def test_garbage_between_frames_is_no_loss() -> None:
    events = whole(NoninFormat2Decoder(), stream(range(7)) + b"\x01\x02\x03" + stream(range(7, 51)))
    assert of_kind(Missing, events) == []
    assert numbers_of(events) == list(range(50))
    assert of_kind(Rejected, events) == [Rejected(3, "not part of a frame")]
    assert len(of_kind(Reading, events)) == 2


@pytest.mark.parametrize("feed", [whole, byte_by_byte])
def test_one_chance_frame_in_garbage_is_not_believed(feed: Feed) -> None:
    garbage = b"\x05" + bytes.fromhex("8000000080") + b"\x07"
    events = feed(NoninFormat7Decoder(), stream(range(30), 7) + garbage + stream(range(30, 51), 7))
    assert numbers_of(events) == list(range(50))
    assert of_kind(Missing, events) == []
    assert sum(event.byte_count for event in of_kind(Rejected, events)) == len(garbage)


def arrive(decoder: NoninDecoder, numbers: Iterable[int], data_format: int) -> list[Event]:
    return [
        event for number in numbers for event in decoder.receive(Chunk(frame(number, data_format), number * PERIOD_NS))
    ]


@FORMATS
@pytest.mark.parametrize("periods", [1, 2, 9])
def test_loss_of_whole_packets_shows_in_the_time(data_format: int, periods: int) -> None:
    decoder = decoder_of(data_format)
    lost = periods * PACKET_FRAMES
    events = arrive(decoder, range(260), data_format) + arrive(decoder, range(260 + lost, 700 + lost), data_format)
    events += finish(decoder)
    # Nothing was damaged, so that the place within the packet is not known: it is put to the packet's end.
    assert of_kind(Missing, events) == [Missing("ppg", 275, lost)]
    assert sum(map(len, of_kind(Samples, events))) == 700
    assert max(event.index + len(event) for event in of_kind(Samples, events)) == 700 + lost


def test_a_host_that_slept_has_lost_nothing() -> None:
    decoder = NoninFormat2Decoder()
    events = arrive(decoder, range(250), 2)
    events += decoder.receive(Chunk(stream(range(250, 1000)), 1000 * PERIOD_NS))
    events += arrive(decoder, range(1000, 1500), 2)
    assert of_kind(Missing, events) == []
    assert numbers_of(events) == list(range(1475))


def test_what_is_held_is_given_out_at_the_end() -> None:
    decoder = NoninFormat2Decoder()
    events = arrive(decoder, range(260), 2)
    assert numbers_of(events) == list(range(250))
    events += finish(decoder)
    assert numbers_of(events) == list(range(260))
    assert finish(decoder) == []


# Properties


@settings(max_examples=150, deadline=None)
@given(
    lost=st.sets(st.integers(25, 270), max_size=60),
    garbage=st.dictionaries(st.integers(30, 270), st.lists(st.integers(2, 127), min_size=1, max_size=20).map(bytes)),
    cuts=st.lists(st.integers(1, 200), max_size=30),
    data_format=st.sampled_from([2, 7]),
)
def test_every_intact_frame_is_found_and_every_loss_counted(
    lost: set[int], garbage: dict[int, bytes], cuts: list[int], data_format: int
) -> None:
    """No packet loses all its frames; that shows in the time alone."""
    lost = {number for number in lost if not set(range(number // 25 * 25, number // 25 * 25 + 25)) <= lost}
    lost -= {number for number in lost if number % 25 == 0}
    sent = [number for number in range(326) if number not in lost]
    data = b"".join(garbage.get(number, b"") + frame(number, data_format) for number in sent)
    decoder = decoder_of(data_format)
    events: list[Event] = []
    for size in [*cuts, len(data)]:
        events += decoder.receive(Chunk(data[:size], 0))
        data = data[size:]
    found = [pleth for samples in of_kind(Samples, events) for pleth in samples.columns["pleth"].tolist()]
    places = {samples.index + k for samples in of_kind(Samples, events) for k in range(len(samples))}
    missing = {k for event in of_kind(Missing, events) for k in range(event.index, event.index + event.count)}
    if data_format == 2:
        assert found == [number % 128 for number in sent if number < 325]
        assert len(missing) == len(lost)
    else:
        # A frame between two pieces of garbage stands alone and is not believed.
        assert set(found) <= {number % 128 for number in sent}
        assert len(missing) + len(found) == 325
    assert missing.isdisjoint(places)
    assert missing | places == set(range(325))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.binary(max_size=60) | st.integers(0, 200).map(frame) | st.integers(0, 200).map(lambda n: frame(n, 7))),
    st.sampled_from([2, 7]),
)
def test_any_bytes_are_survived_in_bounded_memory(chunks: list[bytes], data_format: int) -> None:
    decoder = decoder_of(data_format)
    given_out = 0
    for number, data in enumerate(chunks):
        events = decoder.receive(Chunk(data, number * 100_000_000))
        given_out += sum(map(len, of_kind(Samples, events)))
        assert len(decoder._rest) < 2 * nonin.FRAME_BYTES
        assert decoder._packet is None or len(decoder._packet.frames) <= PACKET_FRAMES
        assert len(decoder._held) <= nonin.HELD_SAMPLES_MAX // PACKET_FRAMES + 1
    given_out += sum(map(len, of_kind(Samples, finish(decoder))))
    assert given_out * nonin.FRAME_BYTES <= sum(map(len, chunks))


def test_a_stream_without_sync_is_no_stream() -> None:
    events = whole(NoninFormat2Decoder(), b"".join(frame(number) for number in range(1, 25)) * 5)
    assert of_kind(Samples, events) == []
    assert {event.reason for event in of_kind(Rejected, events)} == {"before the first packet's beginning"}


@FORMATS
def test_everything_doubled_makes_no_false_values(data_format: int) -> None:
    data = b"".join(frame(number, data_format) * 2 for number in range(76))
    events = whole(decoder_of(data_format), data)
    # Frames have no number, so a doubled one cannot be told; the values of such packets are not believed.
    assert of_kind(Reading, events) == []
