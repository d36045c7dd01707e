from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.devices.base import Decoder, Event, Facts, Missing, Rejected, Samples, Send, Streaming
from gateway.devices.muse_athena import (
    DATA_UUIDS,
    LAYOUTS,
    OPTICS_CHANNELS,
    PRESETS,
    MuseAthenaDecoder,
    eeg_counts,
    motion_counts,
    optics_counts,
)
from gateway.devices.muse_control import CONTROL, command
from gateway.devices.muse_packets import STRANGERS_MAX
from gateway.errors import ConfigError, DeviceError
from gateway.links.base import Chunk
from gateway.samples import NS_PER_S

DATA = DATA_UUIDS[0]
PACKET_NS = NS_PER_S // 16
VERSION = '{"ap":"headset","hw":"10.0","fw":"3.1.6","rc":0}'
STATUS = '{"hn":"MuseS-1002","bp":45,"rc":0}'


def told(decoder: Decoder, text: str) -> list[Event]:
    cut = [text[start : start + 19].encode() for start in range(0, len(text), 19)]
    return [event for part in cut for event in decoder.receive(Chunk(bytes((len(part),)) + part, 0, CONTROL))]


def started(preset: str = "p1034") -> MuseAthenaDecoder:
    decoder = MuseAthenaDecoder(preset=preset)
    decoder.start()
    told(decoder, VERSION + STATUS + STATUS)
    return decoder


def packed(values: Sequence[int], bits: int) -> bytes:
    """Bit by bit, least significant first."""
    stream = [value >> bit & 1 for value in values for bit in range(bits)]
    octets = [sum(stream[at + bit] << bit for bit in range(8)) for at in range(0, len(stream), 8)]
    return bytes(octets)


def eeg_block(counter: int) -> tuple[int, int, bytes]:
    """Tag 0x11: four electrodes, four samples, all of one value that tells the block."""
    return 0x11, counter % 256, packed([counter % 16_384] * 16, 14)


def packet(index: int, blocks: Sequence[tuple[int, int, bytes]]) -> bytes:
    tag, counter, data = blocks[0]
    body = struct.pack("<HIBBBB3x", index % 65_536, 0x89E549F3, 0x93, 1, tag, counter) + data
    body += b"".join(bytes((tag, counter, 1, 2, 3)) + data for tag, counter, data in blocks[1:])
    return bytes((len(body) + 1,)) + body


def three(index: int) -> bytes:
    """A packet with the three EEG blocks that this packet of a steady stream has."""
    return packet(index, [eeg_block(3 * index + n) for n in range(3)])


def fed(decoder: Decoder, packets: Iterable[tuple[int, bytes]]) -> list[Event]:
    """Packets with the number that tells when they arrive."""
    return [event for at, data in packets for event in decoder.receive(Chunk(data, at * PACKET_NS, DATA))]


def of(events: Iterable[Event], kind: type[Any], signal: str | None = None) -> list[Any]:
    return [event for event in events if isinstance(event, kind) and signal in (None, getattr(event, "signal", None))]


# -- formats --------------------------------------------------------------------------------------


def test_eeg_is_14_bit_low_bit_first() -> None:
    values = [0, 1, 8191, 8192, 8193, 16_383, 8292, 8092, *range(8000, 8008)]
    counts = eeg_counts(packed(values, 14), 4)
    assert counts.T.ravel().tolist() == [value - 8192 for value in values]
    assert eeg_counts(packed(values, 14), 8).shape == (8, 2)
    assert eeg_counts(bytes([0xFF, 0x3F] + [0] * 26), 4)[:2, 0].tolist() == [8191, -8192]


def test_optics_are_20_bit_low_bit_first() -> None:
    values = [0, 1, 2**20 - 1, 2**19, *range(1000, 1012)]
    counts = optics_counts(packed(values, 20), 8)
    assert counts.T.ravel().tolist() == values
    assert counts.dtype == np.int32


def test_motion_is_16_bit_little_endian() -> None:
    counts = motion_counts(struct.pack("<18h", *range(-9, 9)), 6)
    assert counts[:, 0].tolist() == [-9, -8, -7, -6, -5, -4]
    assert counts[5].tolist() == [-4, 2, 8]


def test_all_sensors_of_one_packet() -> None:
    optics = packed(list(range(1, 17)), 20)
    motion = struct.pack("<6h", 16_384, 0, -16_384, 1000, 0, -1000) * 3
    battery = struct.pack("<H", 45 * 512) + bytes(18)
    data = packet(0, [eeg_block(0), (0x47, 0, motion), (0x53, 0, bytes(24)), (0x35, 0, optics), (0x98, 0, battery)])
    events = fed(started(), [(0, data)])
    assert [getattr(event, "signal", type(event)) for event in events] == [
        *("eeg", "acceleration", "gyro", "optics", Facts)
    ]
    eeg, acceleration, gyro, light = of(events, Samples)
    assert eeg.columns["TP9"][0] * eeg.scales["TP9"] == pytest.approx(-8192 * 1450 / 16_383)
    assert [acceleration.columns[axis][0] * acceleration.scales[axis] for axis in "xyz"] == pytest.approx(
        [1, 0, -1], abs=1e-5
    )
    assert [gyro.columns[axis][0] * gyro.scales[axis] for axis in "xyz"] == pytest.approx([-7.4768, 0, 7.4768])
    assert [light.columns[name].tolist() for name in OPTICS_CHANNELS[:8]] == [[n, n + 8] for n in range(1, 9)]
    assert events[-1] == Facts(battery_pct=45.0)


def test_the_battery_of_newer_firmware_is_all_that_is_left() -> None:
    alone = packet(0, [(0x88, 0, struct.pack("<H", 44 * 512) + bytes(198))])
    behind = packet(1, [eeg_block(0), (0x88, 1, struct.pack("<H", 43 * 512) + bytes(100))])
    assert of(fed(started(), [(0, alone), (1, behind)]), Facts) == [Facts(battery_pct=44.0), Facts(battery_pct=43.0)]


def test_the_status_reply_decides_between_the_two_readings_of_the_battery() -> None:
    data = packet(0, [(0x98, 0, struct.pack("<H", 45 * 256) + bytes(18))])
    assert fed(started(), [(0, data)]) == [Facts(battery_pct=45.0)]


def test_a_battery_that_cannot_be() -> None:
    (event,) = fed(started(), [(0, packet(0, [(0x98, 0, b"\xff\xff" + bytes(18))]))])
    assert isinstance(event, Rejected)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_its_channels(preset: str) -> None:
    decoder: Decoder = MuseAthenaDecoder(preset=preset)
    channels = {spec.signal: len(spec.channels) for spec in decoder.signals}
    assert channels == {
        "eeg": PRESETS[preset].electrodes,
        **({"optics": PRESETS[preset].optics} if PRESETS[preset].optics else {}),
        "acceleration": 3,
        "gyro": 3,
    }


def test_four_optics_are_the_inner_ones() -> None:
    specs = {spec.signal: spec for spec in MuseAthenaDecoder(preset="p1035").signals}
    assert specs["optics"].channels == ("LI_NIR", "RI_NIR", "LI_IR", "RI_IR")


def test_blocks_that_the_preset_does_not_give_are_rejected() -> None:
    data = packet(0, [(0x12, 0, bytes(28)), (0x36, 0, bytes(40)), eeg_block(0)])
    events = fed(started("p21"), [(0, data)])
    assert [type(event) for event in events] == [Rejected, Rejected, Samples]


def test_unknown_presets_and_wrong_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="p99"):
        MuseAthenaDecoder(preset="p99")
    with pytest.raises(ConfigError, match="8 electrodes"):
        MuseAthenaDecoder(["a", "b", "c", "d"], "p1041")


# -- start sequence -------------------------------------------------------------------------------


def test_the_start_sequence_is_the_fact_sheets() -> None:
    decoder = MuseAthenaDecoder(preset="p1041")
    assert decoder.start() == [Send(command("v6"), CONTROL)]
    assert told(decoder, VERSION) == [
        Facts(model="Muse S Athena", firmware="3.1.6"),
        Send(command("s"), CONTROL),
    ]
    sent = of(told(decoder, STATUS), Send)
    assert sent == [Send(command(text), CONTROL) for text in ("h", "p1041", "s")]
    (*_, first, second, last) = told(decoder, '{"rc":0}{"rc":0}' + STATUS)
    assert [first, second, last] == [*[Send(command("dc001"), CONTROL)] * 2, Streaming()]


def test_data_from_before_the_start_is_not_taken() -> None:
    decoder = MuseAthenaDecoder()
    decoder.start()
    (event,) = fed(decoder, [(0, three(4000))])
    assert isinstance(event, Rejected)
    told(decoder, VERSION + STATUS + STATUS)
    assert len(of(fed(decoder, [(1, three(0))]), Samples)) == 3


# -- packets --------------------------------------------------------------------------------------


def test_several_packets_in_one_notification() -> None:
    decoder = started()
    events = decoder.receive(Chunk(three(0) + three(1) + three(2), 0, DATA))
    assert [each.index for each in of(events, Samples)] == [4 * number for number in range(9)]


def test_an_unknown_tag_ends_its_packet_and_no_other() -> None:
    strange = packet(0, [eeg_block(0), (0xEE, 0, bytes(10)), eeg_block(1)])
    decoder = started()
    events = decoder.receive(Chunk(strange + packet(1, [eeg_block(2)]), 0, DATA))
    first, rejected, missing, second = events
    assert rejected == Rejected(5 + 10 + 5 + 28, "unknown tag 0xee")
    assert missing == Missing("eeg", 4, 4)
    assert [each.index for each in of([first, second], Samples)] == [0, 8]


def test_an_unknown_first_tag_rejects_the_packet() -> None:
    data = packet(0, [(0xEE, 0, bytes(28)), eeg_block(0)])
    assert fed(started(), [(0, data)]) == [Rejected(len(data), "unknown tag 0xee")]


@pytest.mark.parametrize("cut", range(len(three(0))))
def test_a_cut_notification_gives_only_what_is_whole(cut: int) -> None:
    decoder = started()
    events = decoder.receive(Chunk(three(0) + three(1)[:cut], 0, DATA))
    assert len(of(events, Samples)) == 3
    assert sum(event.byte_count for event in of(events, Rejected)) == cut


def test_a_block_that_is_cut_inside_a_whole_packet_is_rejected() -> None:
    data = bytearray(packet(0, [eeg_block(0), eeg_block(1)])[:-3])
    data[0] = len(data)
    samples, rejected = fed(started(), [(0, bytes(data))])
    assert isinstance(samples, Samples)
    assert rejected == Rejected(30, "block 0x11 is cut")


def test_doubled_packets_count_once() -> None:
    events = fed(started(), [(n, three(n)) for n in range(100) for _ in range(2)])
    assert len(of(events, Samples)) == 300
    assert len(of(events, Rejected)) == 100
    assert not of(events, Missing)


def test_packets_out_of_order_are_put_right() -> None:
    order = [0, 2, 1, 3, 6, 4, 5, 7, 8]
    events = fed(started(), [(at, three(n)) for at, n in enumerate(order)])
    assert [each.index for each in of(events, Samples)] == [4 * n for n in range(27)]
    assert len(events) == 27


@pytest.mark.parametrize("lost", [1, 2, 80, 85, 86, 100, 300, 600])
def test_a_loss_is_counted_however_often_the_block_counter_came_round(lost: int) -> None:
    sent = [*range(40), *range(40 + lost, 60 + lost)]
    events = fed(started(), [(n, three(n)) for n in sent])
    assert of(events, Missing) == [Missing("eeg", 480, 12 * lost)]
    assert [each.index for each in of(events, Samples)] == [4 * (3 * n + k) for n in sent for k in range(3)]


def test_a_damaged_block_counter_is_no_loss() -> None:
    damaged = packet(40, [eeg_block(120), (0x11, (121 + 90) % 256, eeg_block(7)[2]), eeg_block(122)])
    sent = [(n, damaged if n == 40 else three(n)) for n in range(60)]
    events = fed(started(), sent)
    assert of(events, Missing) == [Missing("eeg", 484, 4)]
    assert len(of(events, Rejected)) == 1
    assert of(events, Samples)[-1].index == 4 * 179


def test_the_packet_counter_wraps() -> None:
    decoder = started()
    events = fed(decoder, [(n, three(n)) for n in range(65_500, 65_600)])
    # A block counter of 8 bits knows nothing of the other's period.
    assert len(of(events, Samples)) == 300
    assert not of(events, Missing)


def test_a_device_that_counts_anew_is_told() -> None:
    decoder = started()
    fed(decoder, [(n, three(n)) for n in range(200)])
    again = [(200 + n, packet(n, [(0x11, (3 * n) % 256, bytes([n]) * 28)])) for n in range(STRANGERS_MAX)]
    assert len(of(fed(decoder, again[:-1]), Rejected)) == STRANGERS_MAX - 1
    with pytest.raises(DeviceError, match="count anew"):
        fed(decoder, again[-1:])


def test_another_characteristic_is_rejected() -> None:
    (event,) = started().receive(Chunk(three(0), 0, "273e0003-4c4d-454d-96be-f03bac821358"))
    assert isinstance(event, Rejected)


# -- properties -----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(st.sets(st.integers(0, 59)), st.integers(0, 45), st.integers(0, 120), st.binary(max_size=13))
def test_every_intact_packet_is_found_and_the_loss_is_right(
    lost: set[int], burst_at: int, burst: int, garbage: bytes
) -> None:
    gone = lost | {*range(burst_at, burst_at + burst)}
    sent = [n for n in range(burst + 70) if n not in gone]
    decoder = started()
    events: list[Event] = []
    for at, number in enumerate(sent):
        if at % 7 == 3:
            events += decoder.receive(Chunk(garbage, number * PACKET_NS, DATA))
        events += fed(decoder, [(number, three(number))])
    seen = 4 * 3 * sent[0]
    found = []
    for event in of(events, Samples) + of(events, Missing):
        assert event.signal == "eeg"
    for event in events:
        if isinstance(event, Missing):
            assert 4 * 3 * sent[0] + event.index == seen
            seen += event.count
        elif isinstance(event, Samples):
            assert 4 * 3 * sent[0] + event.index == seen
            found.append(int(event.columns["TP9"][0]) + 8192)
            assert found[-1] == seen // 4
            seen += len(event)
    assert found == [3 * n + k for n in sent for k in range(3)][: len(found)]
    assert len(found) == 3 * len(sent)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=260),
            st.builds(
                lambda index, tags, filler: packet(
                    index, [(tag, filler[0], (filler * 250)[: LAYOUTS[tag].data_bytes or 30]) for tag in tags]
                ),
                st.integers(0, 65_535),
                st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=1, max_size=4),
                st.binary(min_size=1, max_size=40),
            ),
        ),
        max_size=40,
    )
)
def test_any_bytes_do_no_harm(notifications: list[bytes]) -> None:
    decoder = started("p1041")
    events: list[Event] = []
    for at, data in enumerate(notifications):
        try:
            events += decoder.receive(Chunk(data, at * PACKET_NS, DATA))
        except DeviceError:
            break
    assert sum(event.byte_count for event in of(events, Rejected)) <= sum(map(len, notifications))
    size = sum(len(each) * len(each.columns) for each in of(events, Samples))
    assert size <= sum(map(len, notifications))
