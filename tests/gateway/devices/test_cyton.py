"""Cyton decoder: vectors, start sequence, resynchronisation, loss, limits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.devices.base import Event, Facts, Missing, Rejected, Samples, Send, Streaming, finish
from gateway.devices.cyton import COUNTER_PERIOD_NS, DEFAULT_ELECTRODES, SAMPLE_PERIOD_NS, CytonDecoder
from gateway.devices.cyton_packets import PACKET_BYTES, PacketCutter, auxiliary
from gateway.devices.cyton_start import START_BYTES_MAX, TEXT_BYTES_MAX
from gateway.errors import ConfigError, DeviceError
from gateway.links.base import Chunk

VECTOR_A = bytes.fromhex("a004000001ffffff7fffff8000000003e8fffc181234560000000010ffe01f40c0")
VECTOR_B = bytes.fromhex("a0ff" + "00" * 24 + "020003ff0000c1")
VECTOR_C = bytes.fromhex("a007" + "ffffd3" * 8 + "fe00000f4240c4")
UV_A = (0.022351744, -0.022351744, 187500.0, -187500.022351744, 22.351744455, -22.351744455, 26666.659315426, 0.0)

RESET_TEXT = b"OpenBCI V3 8-16 channel\nOn Board ADS1299 Device ID: 0x3E\nLIS3DH Device ID: 0x33\nFirmware: v3.1.2\n$$$"

Kind = TypeVar("Kind")
Feed = Callable[[CytonDecoder, bytes], list[Event]]


def whole(decoder: CytonDecoder, data: bytes) -> list[Event]:
    return decoder.receive(Chunk(data, 0))


def byte_by_byte(decoder: CytonDecoder, data: bytes) -> list[Event]:
    return [event for byte in data for event in decoder.receive(Chunk(bytes((byte,)), 0))]


def after_garbage(decoder: CytonDecoder, data: bytes) -> list[Event]:
    return decoder.receive(Chunk(b"\x00\xa0\xa0\xc0\x07" + data, 0))


FEEDS = pytest.mark.parametrize("feed", [whole, byte_by_byte, after_garbage])


def streaming(**options: object) -> CytonDecoder:
    decoder = CytonDecoder(**options)  # type: ignore[arg-type]  # options differ by test
    decoder.start()
    events = decoder.receive(Chunk(RESET_TEXT, 0))
    while not any(isinstance(event, Streaming) for event in events):
        command = next(event.data for event in events if isinstance(event, Send))
        events = decoder.receive(Chunk(b"Success: Channel set for %c$$$" % command[1], 0))
    return decoder


def packet(number: int, *, first_count: int = 0, auxiliary_bytes: bytes = bytes(6), stop: int = 0xC0) -> bytes:
    channels = (first_count & 0xFFFFFF).to_bytes(3, "big") + bytes(21)
    return bytes((0xA0, number % 256)) + channels + auxiliary_bytes + bytes((stop,))


def stream(numbers: Iterable[int]) -> bytes:
    return b"".join(packet(number, first_count=number) for number in numbers)


def of_kind(kind: type[Kind], events: list[Event]) -> list[Kind]:
    return [event for event in events if isinstance(event, kind)]


def numbers_of(events: list[Event]) -> list[int]:
    """Indices of the samples, after a check that each carries its own number as its value."""
    numbers: list[int] = []
    for samples in of_kind(Samples, events):
        indices = list(range(samples.index, samples.index + len(samples)))
        assert samples.columns["Fp1"].tolist() == indices
        numbers += indices
    return numbers


# Vectors


@FEEDS
def test_vector_a(feed: Feed) -> None:
    decoder = streaming()
    events = feed(decoder, VECTOR_A)
    (samples,) = of_kind(Samples, events)
    assert samples.index == 4
    assert of_kind(Missing, events) == [Missing("eeg", 0, 4)]
    assert tuple(samples.columns) == DEFAULT_ELECTRODES
    assert all(column.dtype == np.int32 for column in samples.columns.values())
    uv = [float(samples.columns[name][0]) * samples.scales[name] for name in DEFAULT_ELECTRODES]
    assert uv == pytest.approx(UV_A, abs=1e-9)
    assert auxiliary(VECTOR_A).acceleration == (16, -32, 8000)


@FEEDS
def test_vector_b(feed: Feed) -> None:
    events = feed(streaming(), VECTOR_B)
    (samples,) = of_kind(Samples, events)
    assert samples.index == 255
    assert [int(column[0]) for column in samples.columns.values()] == [0] * 8
    assert auxiliary(VECTOR_B).words == (512, 1023, 0)


@FEEDS
def test_vector_c(feed: Feed) -> None:
    decoder = streaming()
    (samples,) = of_kind(Samples, feed(decoder, VECTOR_C))
    assert samples.index == 7
    uv = [float(samples.columns[name][0]) * samples.scales[name] for name in DEFAULT_ELECTRODES]
    assert uv == pytest.approx([-1.0058285] * 8, abs=1e-9)
    assert auxiliary(VECTOR_C).board_time_ms == 1_000_000
    assert auxiliary(VECTOR_C).acceleration == (-512, None, None)


@FEEDS
@pytest.mark.parametrize("stop", range(0xC7, 0xD0))
def test_vector_d(feed: Feed, stop: int) -> None:
    decoder = streaming()
    damaged = packet(0, stop=stop)
    events = feed(decoder, damaged + packet(1, first_count=1) + packet(2, first_count=2))
    assert numbers_of(events) == [1, 2]
    assert sum(rejected.byte_count for rejected in of_kind(Rejected, events)) == PACKET_BYTES + (
        5 if feed is after_garbage else 0
    )


def test_vector_a_with_a_gain_of_4_on_the_first_channel() -> None:
    decoder = streaming(gains={"Fp1": 4})
    (samples,) = of_kind(Samples, whole(decoder, VECTOR_A))
    assert samples.columns["Fp1"][0] * samples.scales["Fp1"] == pytest.approx(0.134110467, abs=1e-9)
    assert samples.columns["Fp2"][0] * samples.scales["Fp2"] == pytest.approx(-0.022351744, abs=1e-9)


# Start sequence


def test_start_sequence() -> None:
    decoder = CytonDecoder()
    assert decoder.start() == [Send(b"s"), Send(b"v")]
    assert decoder.receive(Chunk(RESET_TEXT[:60], 0)) == []
    assert decoder.receive(Chunk(RESET_TEXT[60:], 0)) == [
        Facts(model="OpenBCI Cyton", firmware="3.1.2"),
        Send(b"b"),
        Streaming(),
    ]


def test_a_stream_that_still_runs_is_drained_before_the_text() -> None:
    decoder = CytonDecoder()
    decoder.start()
    noise = stream(range(300)) + b"$$$" + b"\xa0Open$$"
    events = byte_by_byte(decoder, noise + RESET_TEXT + stream(range(3)))
    assert of_kind(Facts, events) == [Facts(model="OpenBCI Cyton", firmware="3.1.2")]
    assert numbers_of(events) == [0, 1, 2]
    assert of_kind(Missing, events) == []


def test_firmware_without_a_version_line() -> None:
    decoder = CytonDecoder()
    decoder.start()
    text = b"OpenBCI V3 8bit Board\nADS1299 Device ID: 0x3E\nLIS3DH Device ID: 0x33\n$$$"
    assert of_kind(Facts, whole(decoder, text)) == [Facts(model="OpenBCI Cyton", firmware=None)]


def test_a_dongle_without_its_board_is_a_failure_with_a_hint() -> None:
    decoder = CytonDecoder()
    decoder.start()
    with pytest.raises(DeviceError, match="Communications timeout") as failure:
        byte_by_byte(decoder, b"\xa0\x01Failure: Communications timeout - Device failed to poll Host$$$")
    assert "switch the board on" in failure.value.hint


def test_gains_are_set_one_by_one_and_confirmed() -> None:
    decoder = CytonDecoder(gains={"Fp2": 1, "O2": 12})
    decoder.start()
    assert of_kind(Send, whole(decoder, RESET_TEXT)) == [Send(b"x2000110X")]
    assert whole(decoder, b"Success: Channel set for 2$$$") == [Send(b"x8050110X")]
    assert whole(decoder, b"Success: Channel set for 8$$$") == [Send(b"b"), Streaming()]


def test_a_refused_gain_is_a_failure() -> None:
    decoder = CytonDecoder(gains={"Fp2": 1})
    decoder.start()
    whole(decoder, RESET_TEXT)
    with pytest.raises(DeviceError, match="too few chars"):
        whole(decoder, b"Failure: too few chars$$$")


def test_old_firmware_cannot_confirm_a_gain() -> None:
    decoder = CytonDecoder(gains={"Fp2": 1})
    decoder.start()
    with pytest.raises(DeviceError, match="does not confirm"):
        whole(decoder, RESET_TEXT.replace(b"v3.1.2", b"v2.0.1"))


def test_a_daisy_is_switched_off() -> None:
    decoder = CytonDecoder()
    decoder.start()
    text = RESET_TEXT.replace(b"LIS3DH", b"On Daisy ADS1299 Device ID: 0x3E\nLIS3DH")
    assert of_kind(Send, whole(decoder, text)) == [Send(b"c")]
    assert whole(decoder, b"daisy removed$$$") == [Send(b"b"), Streaming()]


def test_a_board_that_never_answers_fails_and_memory_stays_bounded() -> None:
    decoder = CytonDecoder()
    decoder.start()
    for _ in range(START_BYTES_MAX // 1024):
        whole(decoder, bytes(1024))
        assert decoder._start.held_bytes <= TEXT_BYTES_MAX
    with pytest.raises(DeviceError, match="no answer"):
        whole(decoder, bytes(1))


@pytest.mark.parametrize(
    ("electrodes", "gains"),
    [((), {}), (("C3",) * 2, {}), (tuple("ABCDEFGHI"), {}), (("C3",), {"C4": 24}), (("C3",), {"C3": 3}), (("",), {})],
)
def test_impossible_settings(electrodes: tuple[str, ...], gains: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        CytonDecoder(electrodes, gains=gains)


# Loss, repetition, damage


@FEEDS
def test_loss_is_counted_from_the_sample_number(feed: Feed) -> None:
    events = feed(streaming(), stream([0, 1, 5, 6, 250, 300]))
    assert numbers_of(events) == [0, 1, 5, 6, 250, 300]
    assert of_kind(Missing, events) == [Missing("eeg", 2, 3), Missing("eeg", 7, 243), Missing("eeg", 251, 49)]


def test_one_event_for_each_contiguous_run_of_a_chunk() -> None:
    events = whole(streaming(), stream(range(10)) + stream(range(12, 20)))
    assert [(samples.index, len(samples)) for samples in of_kind(Samples, events)] == [(0, 10), (12, 8)]
    assert [type(event) for event in events] == [Samples, Missing, Samples]


@pytest.mark.parametrize("feed", [whole, byte_by_byte])
def test_everything_doubled(feed: Feed) -> None:
    decoder = streaming()
    events = [event for lump in range(100) for event in feed(decoder, stream(range(lump * 4, lump * 4 + 4)) * 2)]
    assert numbers_of(events) == list(range(400))
    assert of_kind(Missing, events) == []
    rejected = of_kind(Rejected, events)
    assert sum(event.byte_count for event in rejected) == 400 * PACKET_BYTES
    assert {event.reason for event in rejected} == {"duplicate packet"}


@pytest.mark.parametrize("cut_at", range(1, PACKET_BYTES))
def test_a_cut_packet_costs_no_other(cut_at: int) -> None:
    events = whole(streaming(), stream(range(3)) + packet(3)[:cut_at] + stream(range(4, 8)))
    # The packet before the cut one is followed by a start byte, so it is intact; 3 is gone.
    assert numbers_of(events) == [0, 1, 2, 4, 5, 6, 7]
    assert sum(event.byte_count for event in of_kind(Rejected, events)) == cut_at


def test_resynchronisation_goes_on_by_one_byte() -> None:
    false_start = bytes((0xA0, 0xA0, 0xA0))
    events = whole(streaming(), packet(0) + false_start + stream(range(1, 5)))
    assert numbers_of(events) == [0, 1, 2, 3, 4]
    assert of_kind(Rejected, events) == [Rejected(3, "not part of a packet")]


def arrive(decoder: CytonDecoder, numbers: Iterable[int], late_ns: int = 0) -> list[Event]:
    """Each packet in a chunk of its own, at its own time."""
    return [
        event
        for number in numbers
        for event in decoder.receive(Chunk(stream([number]), number * SAMPLE_PERIOD_NS + late_ns))
    ]


@pytest.mark.parametrize("periods", [1, 2, 7])
@pytest.mark.parametrize("residue", [0, 5, 255])
def test_loss_of_more_than_a_counter_period_shows_in_the_time(periods: int, residue: int) -> None:
    decoder = streaming()
    lost = periods * 256 + residue
    events = arrive(decoder, range(500)) + arrive(decoder, range(500 + lost, 1500 + lost))
    assert of_kind(Missing, events) == [Missing("eeg", 500, lost)]
    assert numbers_of(events) == [*range(500), *range(500 + lost, 1500 + lost)]


def test_a_host_that_slept_has_lost_nothing() -> None:
    decoder = streaming()
    events = arrive(decoder, range(500))
    woken_ns = 1500 * SAMPLE_PERIOD_NS
    for first in range(500, 1500, 100):
        events += decoder.receive(Chunk(stream(range(first, first + 100)), woken_ns + first * 1000))
    events += arrive(decoder, range(1500, 2000))
    assert of_kind(Missing, events) == []
    assert numbers_of(events) == list(range(2000))


@pytest.mark.parametrize("rate_error", [-0.005, 0.005])
def test_a_board_whose_clock_is_off_loses_nothing(rate_error: float) -> None:
    decoder = streaming()
    events: list[Event] = []
    for number in range(0, 100_000, 4):
        arrival_ns = int(number * SAMPLE_PERIOD_NS * (1 + rate_error)) + (number * 7919 % 30) * 1_000_000
        events += decoder.receive(Chunk(stream(range(number, number + 4)), arrival_ns))
    assert of_kind(Missing, events) == []


def test_a_constant_signal_that_comes_back_after_a_counter_period_is_no_repetition() -> None:
    decoder = streaming()
    same = [packet(number) for number in range(256)]
    for number in range(256):
        decoder.receive(Chunk(same[number], number * SAMPLE_PERIOD_NS))
    late_ns = 255 * SAMPLE_PERIOD_NS + COUNTER_PERIOD_NS - 10 * SAMPLE_PERIOD_NS
    events = decoder.receive(Chunk(same[245], late_ns))
    assert of_kind(Missing, events) == [Missing("eeg", 256, 245)]


def test_what_is_held_when_the_connection_ends_is_given_out_with_its_loss() -> None:
    decoder = streaming()
    events = arrive(decoder, range(500))
    # Late by a whole turn of the counter, and gone before it is clear that nothing catches up.
    assert arrive(decoder, range(756, 760)) == []
    events += finish(decoder)
    assert of_kind(Missing, events) == [Missing("eeg", 500, 256)]
    assert numbers_of(events) == [*range(500), *range(756, 760)]
    assert finish(decoder) == []


@pytest.mark.parametrize("version", [b"v3a.1", b"v9999999999.0", b"v"])
def test_a_strange_firmware_line_is_survived(version: bytes) -> None:
    decoder = CytonDecoder()
    decoder.start()
    assert of_kind(Streaming, whole(decoder, RESET_TEXT.replace(b"v3.1.2", version)))


def test_a_failure_in_the_stream_comes_after_the_samples() -> None:
    decoder = streaming()
    events = whole(decoder, stream(range(3)))
    events += whole(decoder, packet(3, first_count=3) + packet(4)[:20])
    events += whole(decoder, b"Failure: Board RFduino buffer over")
    assert numbers_of(events) == [0, 1, 2, 3]
    end = whole(decoder, b"flowed. Soft reset command sent to Board.$$$")
    assert of_kind(Samples, end) == []
    with pytest.raises(DeviceError, match="buffer overflowed") as failure:
        whole(decoder, stream([5]))
    assert "closer" in failure.value.hint


def test_a_board_that_restarts_by_itself_is_a_failure() -> None:
    decoder = streaming()
    whole(decoder, RESET_TEXT + stream(range(3)))
    whole(decoder, RESET_TEXT)
    with pytest.raises(DeviceError, match="restarted by itself"):
        whole(decoder, b"\x00")


# Properties

PLAIN = st.integers(0, 255).filter(lambda byte: byte != 0xA0)
GARBAGE = st.lists(PLAIN, min_size=1, max_size=80).map(bytes)


def plain_packet(number: int, filling: int) -> bytes:
    """A packet that carries its number, and 0xA0 only where a start byte or the counter has it."""
    digits = bytes((number // 100 // 100, number // 100 % 100, number % 100))
    return bytes((0xA0, number % 256)) + digits + bytes((filling,)) * 27 + bytes((0xC0,))


def identity(count: int) -> int:
    return (count >> 16) * 10_000 + (count >> 8 & 0xFF) * 100 + (count & 0xFF)


@settings(max_examples=150, deadline=None)
@given(
    parts=st.lists(st.tuples(st.integers(0, 5), GARBAGE | st.just(b""), PLAIN), min_size=1, max_size=40),
    cuts=st.lists(st.integers(1, 200), max_size=30),
)
def test_every_intact_packet_is_found_and_every_loss_counted(
    parts: list[tuple[int, bytes, int]], cuts: list[int]
) -> None:
    """`parts`: before each packet so many are lost and this garbage stands; `cuts`: sizes of the chunks."""
    data, number, intact = b"", 0, set()
    for position, (lost, garbage, filling) in enumerate(parts):
        number += lost
        data += garbage + plain_packet(number, filling)
        # The rule asks for a start byte, or nothing yet, after the packet.
        if position + 1 == len(parts) or not parts[position + 1][1]:
            intact.add(number)
        number += 1
    decoder = streaming()
    events: list[Event] = []
    for size in [*cuts, len(data)]:
        events += whole(decoder, data[:size])
        data = data[size:]
    found: dict[int, int] = {}
    missing: set[int] = set()
    for event in events:
        if isinstance(event, Samples):
            found |= {event.index + k: identity(int(count)) for k, count in enumerate(event.columns["Fp1"])}
        elif isinstance(event, Missing):
            missing |= set(range(event.index, event.index + event.count))
    assert intact <= set(found)
    # The counter itself may be 0xA0 (packet 160): a lock there would show as a foreign identity.
    assert all(index == carried for index, carried in found.items())
    assert missing.isdisjoint(found)
    assert missing | set(found) == set(range(max(found) + 1))


def packets_by_the_rule(data: bytes) -> list[bytes]:
    """The accept rule of the data sheet, one byte after the other."""
    found, at = [], 0
    while at + 33 <= len(data):
        candidate = data[at : at + 33]
        if candidate[0] == 0xA0 and 0xC0 <= candidate[32] <= 0xC6 and data[at + 33 : at + 34] in (b"", b"\xa0"):
            found.append(candidate)
            at += 33
        else:
            at += 1
    return found


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=60) | st.integers(0, 255).map(packet) | st.just(b"\xa0"), max_size=20))
def test_framing_agrees_with_the_rule_on_any_bytes(pieces: list[bytes]) -> None:
    data = b"".join(pieces)
    cutter = PacketCutter()
    packets, stray = cutter.cut(data)
    assert packets == packets_by_the_rule(data)
    assert len(packets) * PACKET_BYTES + len(stray) + len(cutter.rest) == len(data)


@settings(max_examples=200, deadline=None)
@given(chunks=st.lists(st.binary(max_size=300) | st.integers(0, 255).map(packet), max_size=40), started=st.booleans())
def test_any_bytes_are_survived_in_bounded_memory(chunks: list[bytes], started: bool) -> None:
    decoder = streaming() if started else CytonDecoder()
    if not started:
        decoder.start()
    for number, data in enumerate(chunks):
        decoder.receive(Chunk(data, number * 300_000_000))
        assert len(decoder._cutter.rest) < PACKET_BYTES
        assert len(decoder._stray) <= TEXT_BYTES_MAX
        assert decoder._start.held_bytes <= TEXT_BYTES_MAX


def test_endless_garbage_is_rejected_and_not_kept() -> None:
    decoder = streaming()
    for _ in range(50):
        assert whole(decoder, bytes(1000)) == [Rejected(1000, "not part of a packet")]
        assert len(decoder._stray) <= TEXT_BYTES_MAX


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=60))
def test_the_cut_into_chunks_changes_nothing(sizes: list[int]) -> None:
    data = stream(range(60))
    decoder = streaming()
    events: list[Event] = []
    for size in [*sizes, len(data)]:
        events += whole(decoder, data[:size])
        data = data[size:]
    assert numbers_of(events) == list(range(60))
    assert of_kind(Missing, events) == []
    assert of_kind(Rejected, events) == []
