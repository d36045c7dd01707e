from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.devices.base import Decoder, Event, Facts, Missing, Rejected, Samples, Send, Streaming
from gateway.devices.muse import (
    ACCELERATION_UUID,
    EEG_UUIDS,
    GYRO_UUID,
    PPG_UUIDS,
    TELEMETRY_UUID,
    MuseDecoder,
    eeg_counts,
    motion_counts,
    notified,
    ppg_counts,
)
from gateway.devices.muse_control import CONTROL, KEEP_ALIVE_PERIOD_NS, REPLY_CHARACTERS_MAX, ReplyReader, command
from gateway.devices.muse_packets import ABSENT_STEPS, EARLY_NS_MAX, STRANGERS_MAX, WINDOW
from gateway.errors import ConfigError, DeviceError
from gateway.links.base import Chunk
from gateway.samples import NS_PER_S

PACKET_NS = 46_875_000
VECTOR_A = bytes.fromhex("0001 8008017ff000fff400c0086479c8027fe800")
VECTOR_B = bytes.fromhex("ffff 5721c05249066af2314058998042fe2c779d")
VECTOR_C = bytes.fromhex("000a 000001 010000 800000 ffffff 0186a0 5721c0")
VECTOR_D = bytes.fromhex("526d 0db20d9d3c73 12050d493c35 11b711e33c8f")
VECTOR_E = bytes.fromhex("014a b5b8 0740 0f7f 001b" + 10 * "00")
VECTOR_F = bytes.fromhex("016d 050c009d0073 050500490035 05b700e3008f")
VERSION = '{"ap":"headset","sp":"RevE","tp":"consumer","hw":"3.1","bn":27,"fw":"1.2.13","bl":"1.2.3","pv":1,"rc":0}'
STATUS = '{"hn":"Muse-1324","sn":"2031-TZRW-1324","ma":"00-55-da-b0-13-24","bp":82,"ts":0,"ps":32,"rc":0}'


def pieces(text: str, size: int = 19) -> list[bytes]:
    """A reply as the Muse notifies it."""
    cut = [text[start : start + size].encode() for start in range(0, len(text), size)]
    return [bytes((len(part),)) + part.ljust(19, b"\0") for part in cut]


def told(decoder: Decoder, text: str, arrival_ns: int = 0) -> list[Event]:
    return [event for piece in pieces(text) for event in decoder.receive(Chunk(piece, arrival_ns, CONTROL))]


def started(preset: str = "p21") -> MuseDecoder:
    """A decoder whose start sequence is through."""
    decoder = MuseDecoder(preset=preset)
    decoder.start()
    for reply in ('{"rc":0}', VERSION, '{"rc":0}', STATUS, '{"rc":0}'):
        told(decoder, reply)
    return decoder


def eeg_packet(counter: int, value: int) -> bytes:
    """A packet whose twelve samples are all this 12-bit value."""
    return (counter % 65_536).to_bytes(2, "big") + (int(f"{value:03x}" * 12, 16)).to_bytes(18, "big")


def fed(decoder: Decoder, packets: Iterable[tuple[str, bytes, int]]) -> list[Event]:
    return [event for uuid, data, arrival_ns in packets for event in decoder.receive(Chunk(data, arrival_ns, uuid))]


def of(events: Iterable[Event], kind: type[Any], signal: str | None = None) -> list[Any]:
    return [event for event in events if isinstance(event, kind) and signal in (None, getattr(event, "signal", None))]


def whole(counter: int, electrodes: Sequence[int] = range(4), value: int = 2048) -> list[tuple[str, bytes, int]]:
    """The packets of one counter value, for some electrodes, arriving when they are due."""
    return [(EEG_UUIDS[part], eeg_packet(counter, value + part), counter * PACKET_NS) for part in electrodes]


# -- vectors ------------------------------------------------------------------------------------


def test_eeg_vector_a() -> None:
    microvolts = eeg_counts(VECTOR_A)[0] * (125 / 256)
    expected = [0, 0.48828125, -0.48828125, -1000, 999.51171875, -500, 500, 48.828125, -48.828125]
    assert microvolts.tolist() == [*expected, 0.9765625, -0.9765625, 0]


def test_eeg_vector_b() -> None:
    raw = (eeg_counts(VECTOR_B)[0] + 2048).tolist()
    assert raw == [1394, 448, 1316, 2310, 1711, 561, 1029, 2201, 2052, 766, 711, 1949]
    microvolts = eeg_counts(VECTOR_B)[0] * (125 / 256)
    assert microvolts[:4].tolist() == [-319.3359375, -781.25, -357.421875, 127.9296875]


def test_eeg_of_all_electrodes_through_the_decoder() -> None:
    events = fed(started(), [(uuid, VECTOR_A, 0) for uuid in EEG_UUIDS[:4]])
    (samples,) = of(events, Samples)
    assert (samples.signal, samples.index, len(samples)) == ("eeg", 0, 12)
    assert samples.columns["TP10"].dtype == np.int32
    assert (samples.columns["TP9"] * samples.scales["TP9"]).tolist()[3:5] == [-1000, 999.51171875]
    assert samples.columns["quality"].tolist() == [0] * 12


def test_ppg_vector() -> None:
    events = fed(started("p50"), [(uuid, VECTOR_C, 0) for uuid in PPG_UUIDS])
    (samples,) = of(events, Samples, "ppg")
    assert samples.columns["infrared"].tolist() == [1, 65536, 8388608, 16777215, 100000, 5710272]
    assert ppg_counts(VECTOR_C).dtype == np.int32


def test_motion_vectors() -> None:
    events = fed(started(), [(ACCELERATION_UUID, VECTOR_D, 0), (GYRO_UUID, VECTOR_F, 0)])
    acceleration, gyro = of(events, Samples)
    assert (acceleration.signal, gyro.signal) == ("acceleration", "gyro")
    g = np.array([acceleration.columns[axis] * acceleration.scales[axis] for axis in "xyz"]).T
    expected = [[0.2139894, 0.2127077, 0.9445197], [0.2815554, 0.2075807, 0.9407355], [0.2767946, 0.2794802, 0.9462287]]
    assert g == pytest.approx(np.array(expected), abs=5e-8)
    rate = [gyro.columns[axis][0] * gyro.scales[axis] for axis in "xyz"]
    assert rate == pytest.approx([9.6600256, 1.1738576, 0.859832], abs=5e-8)
    assert motion_counts(VECTOR_D)[:, 0].tolist() == [3506, 3485, 15475]


def test_telemetry_vector() -> None:
    assert fed(started(), [(TELEMETRY_UUID, VECTOR_E, 0)]) == [Facts(battery_pct=90.859375)]


@pytest.mark.parametrize("data", [b"", VECTOR_E[:9], VECTOR_E + b"\0", bytes.fromhex("014a ffff") + bytes(16)])
def test_telemetry_that_cannot_be(data: bytes) -> None:
    (event,) = fed(started(), [(TELEMETRY_UUID, data, 0)])
    assert isinstance(event, Rejected)
    assert event.byte_count == len(data)


def test_control_vector() -> None:
    reader = ReplyReader()
    got = [reader.receive(bytes((len(text),)) + text) for text in (b'{"rc":0}', b'{"hn":"a","rc":0}{"r', b'c":0}')]
    assert got == [([{"rc": 0}], 0), ([{"hn": "a", "rc": 0}], 0), ([{"rc": 0}], 0)]


@pytest.mark.parametrize("size", range(1, 20))
def test_replies_cut_anywhere(size: int) -> None:
    reader = ReplyReader()
    text = '{"rc":0}' + VERSION + '{"rc":0}{"rc":0}' + STATUS
    found = [reply for piece in pieces(text, size) for reply in reader.receive(piece)[0]]
    assert [sorted(reply) for reply in found].count(["rc"]) == 3
    assert [reply.get("fw") for reply in found] == [None, "1.2.13", None, None, None]
    assert found[-1]["bp"] == 82


@pytest.mark.parametrize("uuid", [*EEG_UUIDS[:4], *PPG_UUIDS, ACCELERATION_UUID, GYRO_UUID])
@pytest.mark.parametrize("length", [0, 1, 10, 19, 21, 40])
def test_a_packet_of_another_length_is_rejected_whole(uuid: str, length: int) -> None:
    data = (VECTOR_A + VECTOR_B)[:length]
    (event,) = fed(started("p50"), [(uuid, data, 0)])
    assert isinstance(event, Rejected)
    assert event.byte_count == length


# -- start sequence, keep-alive -------------------------------------------------------------------


def test_the_start_sequence_is_the_fact_sheets() -> None:
    decoder = MuseDecoder()
    assert decoder.start() == [Send(bytes.fromhex("0268 0a"), CONTROL), Send(bytes.fromhex("03 76 31 0a"), CONTROL)]
    assert told(decoder, '{"rc":0}') == []
    assert told(decoder, VERSION) == [
        Facts(model="Muse", firmware="1.2.13"),
        Send(bytes.fromhex("04 70 32 31 0a"), CONTROL),
        Send(bytes.fromhex("02 73 0a"), CONTROL),
    ]
    assert told(decoder, '{"rc":0}') == []
    assert told(decoder, STATUS) == [Facts(battery_pct=82.0), Send(bytes.fromhex("02 64 0a"), CONTROL), Streaming()]
    assert told(decoder, '{"rc":0}') == []


def test_the_start_sequence_does_not_hang_on_a_reply_that_says_nothing() -> None:
    decoder = MuseDecoder()
    decoder.start()
    assert Streaming() in [*told(decoder, VERSION), *told(decoder, STATUS)]


def test_data_from_before_the_start_is_not_taken() -> None:
    decoder = MuseDecoder()
    decoder.start()
    assert fed(decoder, [(EEG_UUIDS[0], VECTOR_A, 0)]) == [Rejected(20, "data before the start sequence was through")]
    told(decoder, VERSION + STATUS)
    assert len(of(fed(decoder, whole(7)), Samples)) == 1


def test_a_refused_preset_is_an_error_with_a_hint() -> None:
    decoder = MuseDecoder(preset="p50")
    decoder.start()
    told(decoder, '{"rc":0}' + VERSION)
    with pytest.raises(DeviceError, match="code 3, preset p50") as refused:
        told(decoder, '{"rc":3}')
    assert "driver" in refused.value.hint


def test_a_muse_in_its_boot_loader_is_reset() -> None:
    decoder = MuseDecoder()
    decoder.start()
    assert told(decoder, '{"ap":"bootloader","rc":0}') == [Send(bytes.fromhex("03 2a 31 0a"), CONTROL)]
    with pytest.raises(DeviceError, match="boot loader"):
        told(decoder, '{"rc":0}')


def test_keep_alive_goes_with_the_arrivals() -> None:
    decoder = started()
    times = range(0, 60 * NS_PER_S, NS_PER_S // 20)
    sent = [
        at for at in times for event in decoder.receive(Chunk(VECTOR_E, at, TELEMETRY_UUID)) if isinstance(event, Send)
    ]
    assert sent == [KEEP_ALIVE_PERIOD_NS * n for n in range(1, 6)]
    late = decoder.receive(Chunk(VECTOR_E, 300 * NS_PER_S, TELEMETRY_UUID))
    assert of(late, Send) == [Send(bytes.fromhex("02 6b 0a"), CONTROL)]


def test_no_keep_alive_before_the_stream() -> None:
    decoder = MuseDecoder()
    decoder.start()
    assert not of(told(decoder, '{"rc":0}', 60 * NS_PER_S), Send)


@pytest.mark.parametrize(
    ("text", "expected"), [("v1", "0376310a"), ("p20", "047032300a"), ("p50", "047035300a"), ("*1", "032a310a")]
)
def test_command_bytes(text: str, expected: str) -> None:
    assert command(text).hex() == expected


def test_facts_that_cannot_be_are_not_told() -> None:
    decoder = started()
    assert told(decoder, '{"fw":7,"bp":"82"}{"bp":101}{"bp":true}{"fw":"\\u0007"}') == []


def test_a_name_may_have_braces_and_quotes() -> None:
    reader = ReplyReader()
    found = [reply for piece in pieces('{"hn":"a}{\\"b{","rc":0}{"rc":0}') for reply in reader.receive(piece)[0]]
    assert found == [{"hn": 'a}{"b{', "rc": 0}, {"rc": 0}]


def test_replies_that_are_none_are_bounded_and_counted() -> None:
    reader = ReplyReader()
    _, dropped = reader.receive(bytes((7,)) + b"xx}}{a}")
    assert dropped == 7
    total = sum(reader.receive(bytes((19,)) + b"{" * 19)[1] for _ in range(200))
    assert 200 * 19 - REPLY_CHARACTERS_MAX - 20 <= total <= 200 * 19
    assert reader.receive(b"\x14{")[1] == 2


# -- grouping -------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 0, 1), (1, 0, 3, 2)])
def test_electrodes_are_joined_by_counter_whatever_their_order(order: tuple[int, ...]) -> None:
    events = fed(started(), [packet for counter in range(5) for packet in whole(counter, order, 100 * counter)])
    samples = of(events, Samples)
    assert [each.index for each in samples] == [0, 12, 24, 36, 48]
    for number, each in enumerate(samples):
        values = [int(each.columns[name][0]) + 2048 for name in ("TP9", "AF7", "AF8", "TP10")]
        assert values == [100 * number + part for part in range(4)]
    assert len(events) == 5


def test_a_lost_electrode_is_marked_and_the_others_are_kept() -> None:
    decoder = started()
    sent = [packet for counter in range(10) for packet in whole(counter) if (counter, packet[0]) != (3, EEG_UUIDS[1])]
    events = fed(decoder, sent)
    samples = of(events, Samples)
    assert [each.index for each in samples] == [12 * number for number in range(10)]
    assert samples[3].columns["quality"].tolist() == [0b0010] * 12
    assert samples[3].columns["AF7"].tolist() == [0] * 12
    assert samples[3].columns["TP10"].tolist() == [3] * 12
    assert not of(events, Missing)
    assert samples[3].arrival_ns == 3 * PACKET_NS


def test_a_lost_instant_is_missing_once_and_the_axis_stays_true() -> None:
    events = fed(started(), [packet for counter in (0, 1, 2, 5, 6, 7, 8) for packet in whole(counter)])
    assert of(events, Missing) == [Missing("eeg", 36, 24)]
    assert [each.index for each in of(events, Samples)] == [0, 12, 24, 60, 72, 84, 96]
    assert [type(event) for event in events].index(Missing) == 3


def test_what_follows_a_loss_waits_no_longer_than_the_window() -> None:
    decoder = started()
    fed(decoder, whole(0))
    for counter in range(2, WINDOW + 1):
        assert not of(fed(decoder, whole(counter)), Samples)
    assert len(of(fed(decoder, whole(WINDOW + 1)), Samples)) == WINDOW


def test_the_counter_wraps() -> None:
    events = fed(started(), [packet for counter in range(65_530, 65_550) for packet in whole(counter)])
    assert [each.index for each in of(events, Samples)] == [12 * number for number in range(20)]
    assert not of(events, Missing) + of(events, Rejected)


def test_vector_b_is_followed_by_counter_0() -> None:
    decoder = started()
    first = fed(decoder, [(uuid, VECTOR_B, 0) for uuid in EEG_UUIDS[:4]])
    second = fed(decoder, whole(0))
    assert [each.index for each in of([*first, *second], Samples)] == [0, 12]


def test_doubled_packets_count_once() -> None:
    packets = [packet for counter in range(20) for packet in whole(counter)]
    events = fed(started(), [twice for packet in packets for twice in (packet, packet)])
    assert len(of(events, Samples)) == 20
    assert len(of(events, Rejected)) == len(packets)
    assert not of(events, Missing)


def test_a_lump_that_comes_twice_counts_once() -> None:
    packets = [packet for counter in range(30) for packet in whole(counter, value=20 * counter)]
    events = fed(started(), [*packets[:60], *packets[20:60], *packets[60:]])
    assert [each.index for each in of(events, Samples)] == [12 * number for number in range(30)]
    assert len(of(events, Rejected)) == 40


def test_an_electrode_that_never_comes_is_waited_for_only_at_first() -> None:
    decoder = started("p50")
    waits = []
    for counter in range(3 * ABSENT_STEPS):
        samples = of(fed(decoder, whole(counter)), Samples)
        waits += [counter - each.index // 12 for each in samples]
        assert all(each.columns["quality"][0] == 0b10000 for each in samples)
    assert waits[0] == WINDOW
    assert waits[-1] == 0
    assert len(waits) == 3 * ABSENT_STEPS


def test_a_damaged_counter_is_no_loss_of_minutes() -> None:
    decoder = started()
    fed(decoder, [packet for counter in range(10) for packet in whole(counter)])
    damaged = (EEG_UUIDS[0], eeg_packet(20_000, 2048), 9 * PACKET_NS)
    (event,) = fed(decoder, [damaged])
    assert isinstance(event, Rejected)
    assert [each.index for each in of(fed(decoder, whole(10)), Samples)] == [120]


def test_damage_now_and_then_is_no_restart() -> None:
    decoder = started()
    events: list[Event] = []
    for counter in range(3 * STRANGERS_MAX):
        events += fed(decoder, [*whole(counter), (EEG_UUIDS[1], eeg_packet(counter + 9000, 1), counter * PACKET_NS)])
    assert len(of(events, Samples)) == 3 * STRANGERS_MAX


def test_what_came_first_may_not_have_been_sent_first() -> None:
    packets = [*whole(5, (0, 1)), *whole(4), *whole(5, (2, 3)), *whole(6)]
    events = fed(started(), packets)
    assert [(each.index, each.arrival_ns // PACKET_NS) for each in of(events, Samples)] == [(0, 4), (12, 5), (24, 6)]
    assert not of(events, Rejected)


def test_a_long_loss_is_believed_when_so_much_time_has_passed() -> None:
    decoder = started()
    fed(decoder, whole(0))
    counter = 20_000
    events = fed(decoder, [packet for number in range(counter, counter + 5) for packet in whole(number)])
    assert of(events, Missing) == [Missing("eeg", 12, 12 * (counter - 1))]


def test_a_queue_that_stood_still_loses_nothing() -> None:
    late_ns = 2 * EARLY_NS_MAX
    packets = [packet for counter in range(300) for packet in whole(counter)]
    events = fed(started(), [(uuid, data, max(at, late_ns)) for uuid, data, at in packets])
    assert len(of(events, Samples)) == 300
    assert not of(events, Missing) + of(events, Rejected)


@pytest.mark.parametrize("reached", [30, 5_000])
def test_a_device_that_counts_anew_is_told(reached: int) -> None:
    decoder = started()
    fed(decoder, [packet for counter in range(reached, reached + 20) for packet in whole(counter)])
    begun_anew = [
        (uuid, data, at + (reached + 20) * PACKET_NS) for n in range(10) for uuid, data, at in whole(n, value=n)
    ]
    rejected = fed(decoder, begun_anew[: STRANGERS_MAX - 1])
    assert [type(event) for event in rejected if not isinstance(event, Send)] == [Rejected] * (STRANGERS_MAX - 1)
    with pytest.raises(DeviceError, match="count anew"):
        fed(decoder, begun_anew[STRANGERS_MAX - 1 :])


def test_each_stream_counts_its_own_loss() -> None:
    decoder = started("p50")
    packets: list[tuple[str, bytes, int]] = []
    for counter in range(40):
        packets += whole(counter, range(5))
        if counter % 10 != 4:
            packets.append((ACCELERATION_UUID, counter.to_bytes(2, "big") + VECTOR_D[2:], counter * PACKET_NS))
        if counter not in (20, 21):
            packets += [(u, (900 + counter).to_bytes(2, "big") + VECTOR_C[2:], counter * PACKET_NS) for u in PPG_UUIDS]
    events = fed(decoder, packets)
    lost = Counter[str]()
    for event in of(events, Missing):
        lost[event.signal] += event.count
    assert lost == {"acceleration": 12, "ppg": 12}


# -- properties -----------------------------------------------------------------------------------


@st.composite
def journeys(draw: st.DrawFn) -> tuple[int, set[tuple[int, int]], list[tuple[int, int]]]:
    """First counter; (instant, electrode) that are lost; (instant, electrode) in their order of arrival."""
    first = draw(st.sampled_from([0, 1, 300, 65_520, 65_535]))
    count = draw(st.integers(1, 40))
    sent = [(number, part) for number in range(count) for part in range(4)]
    lost = draw(st.sets(st.sampled_from(sent)))
    if draw(st.booleans()):
        burst = draw(st.integers(0, count - 1))
        lost |= {(number, part) for number in range(burst, min(count, burst + 9)) for part in range(4)}
    left = [packet for packet in sent if packet not in lost]
    # Up to three instants late: what the window allows.
    delays = {packet: draw(st.sampled_from([0, 0, 0, 1, 2, WINDOW - 1])) for packet in left}
    arrived = sorted(left, key=lambda packet: (packet[0] + delays[packet], packet[0]))
    doubled = draw(st.sets(st.sampled_from(left))) if left else set()
    return first, lost, [each for packet in arrived for each in ([packet, packet] if packet in doubled else [packet])]


@settings(deadline=None, max_examples=150)
@given(journeys(), st.binary(max_size=19))
def test_every_intact_packet_is_found_and_the_loss_is_right(
    journey: tuple[int, set[tuple[int, int]], list[tuple[int, int]]], garbage: bytes
) -> None:
    first, lost, arrived = journey
    decoder = started()
    packets = [
        (EEG_UUIDS[part], eeg_packet(first + number, (4 * number + part) % 4096), number * PACKET_NS)
        for number, part in arrived
    ]
    if not arrived:
        return
    last = max(number for number, _ in arrived)
    # What follows settles all that is still waited for.
    after = [
        (uuid, data, at - first * PACKET_NS)
        for number in range(last + 1, last + 2 + WINDOW)
        for uuid, data, at in whole(first + number)
    ]
    noise = [(EEG_UUIDS[2], garbage, 0)]
    events = fed(decoder, [*noise, *packets[:5], *noise, *packets[5:], *after])

    first_heard = of(events, Samples)[0]
    offset = min(number for number, part in arrived if 4 * number + part == _first_value(first_heard))
    found: set[tuple[int, int]] = set()
    seen = 0
    for event in events:
        if isinstance(event, Missing):
            assert event.index == seen
            gone = range(offset + event.index // 12, offset + (event.index + event.count) // 12)
            assert all((number, part) in lost for number in gone for part in range(4))
            seen += event.count
        elif isinstance(event, Samples):
            assert event.index == seen
            seen += len(event)
            number = offset + event.index // 12
            quality = int(event.columns["quality"][0])
            for part, name in enumerate(("TP9", "AF7", "AF8", "TP10")):
                if number <= last and quality >> part & 1:
                    assert (number, part) in lost
                elif number <= last:
                    assert event.columns[name].tolist() == [4 * number + part - 2048] * 12
                    found.add((number, part))
    assert seen == 12 * (last + 2 + WINDOW - offset)
    # Before the first one that was given out there is no beginning to count from.
    assert found == {packet for packet in arrived if packet[0] >= offset}


def _first_value(samples: Samples) -> int:
    quality = int(samples.columns["quality"][0])
    part = next(part for part in range(4) if not quality >> part & 1)
    return int(samples.columns[("TP9", "AF7", "AF8", "TP10")[part]][0]) + 2048


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([*notified("p50"), "", "0000180d-0000-1000-8000-00805f9b34fb"]),
            st.one_of(st.binary(max_size=40), st.binary(min_size=20, max_size=20)),
        ),
        max_size=60,
    ),
    st.booleans(),
)
def test_any_bytes_do_no_harm(chunks: list[tuple[str, bytes]], begun: bool) -> None:
    decoder = started("p50") if begun else MuseDecoder(preset="p50")
    events: list[Event] = []
    for number, (uuid, data) in enumerate(chunks):
        try:
            events += decoder.receive(Chunk(data, number * NS_PER_S // 180, uuid))
        except DeviceError:
            break
    assert not begun or len(of(events, Samples)) <= sum(len(data) == 20 for _, data in chunks)
    assert all(len(each) in (3, 6, 12) for each in of(events, Samples))
    assert sum(event.byte_count for event in of(events, Rejected)) <= sum(len(data) for _, data in chunks) + 1024


# -- what it says of itself -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "signals", "electrodes"),
    [
        ("p21", ["eeg", "acceleration", "gyro"], 4),
        ("p20", ["eeg", "acceleration", "gyro"], 5),
        ("p50", ["eeg", "ppg", "acceleration", "gyro"], 5),
        ("p61", ["eeg", "ppg", "acceleration", "gyro"], 4),
    ],
)
def test_a_preset_decides_on_the_signals(preset: str, signals: list[str], electrodes: int) -> None:
    decoder: Decoder = MuseDecoder(preset=preset)
    assert [spec.signal for spec in decoder.signals] == signals
    assert decoder.signals[0].channels == ("TP9", "AF7", "AF8", "TP10", "AUX")[:electrodes]
    assert [spec.rate_hz for spec in decoder.signals if spec.signal == "eeg"] == [256.0]
    assert decoder.signals[0].full_scale == (-2048, 2047)
    assert (EEG_UUIDS[4] in notified(preset)) == (electrodes == 5)
    assert (PPG_UUIDS[0] in notified(preset)) == ("ppg" in signals)
    assert notified(preset)[0] == CONTROL


def test_electrodes_can_be_named() -> None:
    decoder = MuseDecoder(["T9", "Fp1", "Fp2", "T10"])
    decoder.start()
    told(decoder, VERSION + STATUS)
    (samples,) = of(fed(decoder, whole(0)), Samples)
    assert list(samples.columns) == ["T9", "Fp1", "Fp2", "T10", "quality"]


@pytest.mark.parametrize("names", [["TP9"], ["a", "b", "c", "a"], ["a", "b", "c", ""], list("abcde")])
def test_names_that_do_not_fit_are_refused(names: list[str]) -> None:
    with pytest.raises(ConfigError, match="4 electrodes"):
        MuseDecoder(names)


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ConfigError, match="p99"):
        MuseDecoder(preset="p99")
    with pytest.raises(ConfigError, match="p99"):
        notified("p99")
