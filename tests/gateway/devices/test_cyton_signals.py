"""Cyton decoder: Daisy, acceleration, auxiliary inputs, test current."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.devices.base import Event, Facts, Missing, Samples, Send, Streaming, finish
from gateway.devices.cyton import DAISY_ELECTRODES, DEFAULT_ELECTRODES, CytonDecoder
from gateway.errors import ConfigError, DeviceError
from gateway.links.base import Chunk

RESET_TEXT = b"OpenBCI V3 8-16 channel\nOn Board ADS1299 Device ID: 0x3E\nLIS3DH Device ID: 0x33\nFirmware: v3.1.2\n$$$"
DAISY_TEXT = RESET_TEXT.replace(b"LIS3DH", b"On Daisy ADS1299 Device ID: 0x3E\nLIS3DH")

BOARD, DAISY = DAISY_ELECTRODES[:8], DAISY_ELECTRODES[8:]
BOARD_BITS, DAISY_BITS = 0x00FF, 0xFF00
Kind = TypeVar("Kind")


def of_kind(kind: type[Kind], events: list[Event]) -> list[Kind]:
    return [event for event in events if isinstance(event, kind)]


def packet(number: int, *, aux: bytes = bytes(6), stop: int = 0xC0) -> bytes:
    """Every channel carries the packet's number and, in its lowest digit, its own."""
    channels = b"".join((number * 10 + channel).to_bytes(3, "big") for channel in range(8))
    return bytes((0xA0, number % 256)) + channels + aux + bytes((stop,))


def stream(numbers: Iterable[int]) -> bytes:
    return b"".join(packet(number) for number in numbers)


def started(decoder: CytonDecoder, replies: Iterable[bytes]) -> CytonDecoder:
    decoder.start()
    events: list[Event] = []
    for reply in replies:
        events = decoder.receive(Chunk(reply, 0))
    assert of_kind(Streaming, events)
    return decoder


def with_daisy() -> CytonDecoder:
    return started(CytonDecoder(DAISY_ELECTRODES, daisy=True), [DAISY_TEXT, b"16$$$"])


def fed(decoder: CytonDecoder, *lumps: bytes) -> list[Event]:
    return [event for lump in lumps for event in decoder.receive(Chunk(lump, 0))]


def pairs_of(events: list[Event], signal: str = "eeg") -> dict[int, tuple[int, int, int]]:
    """Pair -> first count of the board, first count of the Daisy, quality."""
    pairs: dict[int, tuple[int, int, int]] = {}
    for samples in of_kind(Samples, events):
        assert samples.signal == signal
        for k in range(len(samples)):
            column = samples.columns
            row = [int(column[name][k]) for name in DAISY_ELECTRODES]
            for half in (row[:8], row[8:]):
                assert half in ([0] * 8, [half[0] + channel for channel in range(8)])
            pairs[samples.index + k] = (row[0], row[8], int(column["quality"][k]))
    return pairs


def whole_pair(pair: int) -> tuple[int, int, int]:
    return ((2 * pair + 1) * 10, 2 * pair * 10, 0)


# Daisy


def test_start_with_a_daisy() -> None:
    decoder = CytonDecoder(DAISY_ELECTRODES, daisy=True)
    assert decoder.start() == [Send(b"s"), Send(b"v")]
    assert decoder.receive(Chunk(DAISY_TEXT, 0)) == [Facts("OpenBCI Cyton + Daisy", "3.1.2"), Send(b"C")]
    assert decoder.receive(Chunk(b"16$$$", 0)) == [Send(b"b"), Streaming()]
    (spec,) = decoder.signals
    assert (spec.rate_hz, len(spec.channels), spec.full_scale) == (125.0, 16, (-(2**23), 2**23 - 1))


def test_a_daisy_that_is_not_there_is_said() -> None:
    decoder = CytonDecoder(DAISY_ELECTRODES, daisy=True)
    decoder.start()
    with pytest.raises(DeviceError, match="no Daisy") as missing:
        decoder.receive(Chunk(RESET_TEXT, 0))
    assert "press the Daisy on" in missing.value.hint


def test_gains_of_the_daisy_have_letters() -> None:
    decoder = CytonDecoder(DAISY_ELECTRODES, daisy=True, gains={"F7": 1, "P4": 12})
    decoder.start()
    decoder.receive(Chunk(DAISY_TEXT, 0))
    assert decoder.receive(Chunk(b"daisy attached16$$$", 0)) == [Send(b"xQ000110X")]
    assert decoder.receive(Chunk(b"Success: Channel set for 9$$$", 0)) == [Send(b"xI050110X")]
    assert Streaming() in decoder.receive(Chunk(b"Success: Channel set for 16$$$", 0))


def test_too_many_names() -> None:
    CytonDecoder(tuple("abcdefghijklmnop"), daisy=True)
    with pytest.raises(ConfigError, match="one to 16"):
        CytonDecoder(tuple("abcdefghijklmnopq"), daisy=True)


@pytest.mark.parametrize("size", [1, 32, 33, 34, 66, 1000, 100_000])
def test_pairs_are_joined_by_number_whatever_the_chunks(size: int) -> None:
    data = stream(range(600))
    events = fed(with_daisy(), *(data[at : at + size] for at in range(0, len(data), size)))
    # The first packet of the Daisy is not valid.
    assert pairs_of(events) == {0: (10, 0, DAISY_BITS)} | {pair: whole_pair(pair) for pair in range(1, 300)}
    assert of_kind(Missing, events) == []


def test_half_a_pair_is_given_with_the_other_half_marked() -> None:
    # 4 of (4, 5) is lost, 7 of (6, 7), and all of pairs 5 to 7.
    events = fed(with_daisy(), stream([1, 2, 3, 5]), stream([6, 8, 9, 16, 17]))
    assert pairs_of(events) == {
        0: (10, 0, DAISY_BITS),
        1: whole_pair(1),
        2: (50, 0, DAISY_BITS),
        3: (0, 60, BOARD_BITS),
        4: whole_pair(4),
        8: whole_pair(8),
    }
    assert of_kind(Missing, events) == [Missing("eeg", 5, 3)]


def test_the_half_that_waits_is_given_out_at_the_end() -> None:
    decoder = with_daisy()
    fed(decoder, stream([1, 2]))
    assert pairs_of(finish(decoder)) == {1: (0, 20, BOARD_BITS)}
    assert finish(decoder) == []


def test_bits_follow_the_names() -> None:
    decoder = started(CytonDecoder(DAISY_ELECTRODES[:10], daisy=True), [DAISY_TEXT, b"16$$$"])
    (samples,) = of_kind(Samples, fed(decoder, stream([1, 2]), stream([4])))[1:]
    assert len(samples.columns) == 11
    assert samples.columns["quality"].tolist() == [0xFF]
    (samples,) = of_kind(Samples, fed(decoder, stream([5])))
    assert samples.columns["quality"].tolist() == [0]
    (samples,) = of_kind(Samples, fed(decoder, stream([7])))
    assert samples.columns["quality"].tolist() == [0x300]


@settings(max_examples=100, deadline=None)
@given(
    lost=st.sets(st.integers(0, 400), max_size=150).map(lambda few: {number for number in few if number < 395}),
    cuts=st.lists(st.integers(1, 200), max_size=40),
)
def test_with_any_loss_every_packet_is_in_its_place(lost: set[int], cuts: list[int]) -> None:
    decoder = with_daisy()
    data = stream(number for number in range(401) if number not in lost)
    events: list[Event] = []
    for size in [*cuts, len(data)]:
        events += fed(decoder, data[:size])
        data = data[size:]
    events += finish(decoder)
    found = pairs_of(events)
    missing = {pair for event in of_kind(Missing, events) for pair in range(event.index, event.index + event.count)}
    assert missing.isdisjoint(found)
    assert missing | set(found) == set(range(201))
    for pair, (board, daisy, quality) in found.items():
        board_came, daisy_came = 2 * pair + 1 not in lost and pair < 200, 2 * pair not in lost and pair > 0
        assert (board, daisy) == ((2 * pair + 1) * 10 * board_came, 2 * pair * 10 * daisy_came)
        assert quality == (0 if board_came else BOARD_BITS) | (0 if daisy_came else DAISY_BITS)
    assert all({2 * pair, 2 * pair + 1} <= lost | {0} for pair in missing)


# Acceleration


def moving(numbers: Iterable[int], carriers: dict[int, int]) -> bytes:
    """Packets of which some carry an acceleration: the given X, and -1, 8000."""
    return b"".join(
        packet(number, aux=b"".join(axis.to_bytes(2, "big", signed=True) for axis in (carriers[number], -1, 8000)))
        if number in carriers
        else packet(number)
        for number in numbers
    )


def accelerations(events: list[Event]) -> dict[int, int]:
    """Index -> X."""
    found: dict[int, int] = {}
    for samples in of_kind(Samples, events):
        if samples.signal == "acceleration":
            assert samples.columns["y"].tolist() == [-1] * len(samples)
            assert samples.scales == dict.fromkeys("xyz", 0.000125)
            found |= {samples.index + k: int(x) for k, x in enumerate(samples.columns["x"])}
    return found


def missing_accelerations(events: list[Event]) -> list[tuple[int, int]]:
    return [(event.index, event.count) for event in of_kind(Missing, events) if event.signal == "acceleration"]


def with_acceleration() -> CytonDecoder:
    return started(CytonDecoder(auxiliary="acceleration"), [RESET_TEXT])


def test_acceleration_is_a_signal_of_25_hz() -> None:
    decoder = with_acceleration()
    eeg, acceleration = decoder.signals
    assert (eeg.signal, acceleration.signal) == ("eeg", "acceleration")
    assert (acceleration.rate_hz, acceleration.channels, acceleration.units) == (25.0, ("x", "y", "z"), ("[g]",) * 3)
    events = fed(decoder, *(moving([number], {7: 70, 17: -170, 27: 0}) for number in range(35)))
    assert accelerations(events) == {0: 70, 1: -170, 2: 0}
    assert missing_accelerations(events) == []
    last = next(event for event in reversed(events) if isinstance(event, Samples) and event.signal == "acceleration")
    assert last.arrival_ns == 0


def test_without_a_new_value_the_old_one_stands() -> None:
    events = fed(with_acceleration(), moving(range(50), {13: 1, 39: 3}))
    # Nothing before the first value; 20 to 29 came whole and carried none.
    assert accelerations(events) == {1: 1, 2: 1, 3: 3, 4: 3}


def test_a_lost_carrier_is_a_missing_value() -> None:
    carriers = {number: number for number in range(7, 400, 10)}
    numbers = [number for number in range(400) if number not in {27, 33, 100, *range(128, 161)}]
    events = fed(with_acceleration(), moving(numbers, carriers))
    # 33 and 100 are lost, but the value of their ten came; of 120 to 129 it came before the loss.
    gone = {2, 13, 14, 15}
    assert accelerations(events) == {k: 10 * k + 7 for k in range(40) if k not in gone}
    assert missing_accelerations(events) == [(2, 1), (13, 3)]


@settings(max_examples=100, deadline=None)
@given(lost=st.sets(st.integers(0, 300)), size=st.integers(1, 900))
def test_every_place_has_a_value_or_a_loss(lost: set[int], size: int) -> None:
    data = moving((number for number in range(500) if number not in lost), {n: n for n in range(3, 500, 11)})
    events = fed(with_acceleration(), *(data[at : at + size] for at in range(0, len(data), size)))
    found, missing = accelerations(events), missing_accelerations(events)
    places = set(found) | {place for first, count in missing for place in range(first, first + count)}
    assert len(places) == len(found) + sum(count for _, count in missing)
    assert places == set(range(min(found), 50))
    assert all((place - 1) * 10 < x for place, x in found.items() if x // 10 == place)


# Auxiliary inputs


def test_analog_inputs() -> None:
    decoder = CytonDecoder(auxiliary="analog")
    decoder.start()
    assert decoder.receive(Chunk(RESET_TEXT, 0))[-1] == Send(b"/2")
    assert decoder.receive(Chunk(b"Success: analog$$$", 0)) == [Send(b"b"), Streaming()]
    assert [spec.signal for spec in decoder.signals] == ["eeg", "aux"]
    data = bytes.fromhex("020003ff0000")
    events = fed(decoder, packet(0, aux=data, stop=0xC1) + packet(3, aux=data, stop=0xC1) + packet(4, aux=data))
    first, rest = (event for event in of_kind(Samples, events) if event.signal == "aux")
    assert {name: column.tolist() for name, column in first.columns.items()} == {
        "A5": [512], "A6": [1023], "A7": [0], "quality": [0],
    }  # fmt: skip
    assert (rest.index, rest.columns["A5"].tolist(), rest.columns["quality"].tolist()) == (3, [512, 0], [0, 7])
    assert Missing("aux", 1, 2) in events


def test_digital_inputs() -> None:
    decoder = started(CytonDecoder(auxiliary="digital"), [RESET_TEXT, b"Success: digital$$$"])
    (aux,) = of_kind(Samples, fed(decoder, packet(0, aux=bytes((1, 0, 1, 0, 9, 1)), stop=0xC1)))[1:]
    assert {name: int(column[0]) for name, column in aux.columns.items()} == {
        "D11": 1, "D12": 0, "D13": 1, "D17": 0, "D18": 1, "quality": 0,
    }  # fmt: skip


def test_old_firmware_cannot_confirm_a_mode() -> None:
    decoder = CytonDecoder(auxiliary="digital")
    decoder.start()
    with pytest.raises(DeviceError, match="does not confirm"):
        decoder.receive(Chunk(RESET_TEXT.replace(b"v3.1.2", b"v2.0.1"), 0))


# Test current


def test_with_the_test_current_on_there_is_no_eeg() -> None:
    decoder = CytonDecoder(("C3", "C4"), lead_off=(1, 2), auxiliary="acceleration")
    decoder.start()
    assert decoder.receive(Chunk(RESET_TEXT, 0))[-1] == Send(b"z101Z")
    assert decoder.receive(Chunk(b"Success: Lead off set for 1$$$", 0)) == [Send(b"z201Z")]
    assert Streaming() in decoder.receive(Chunk(b"Success: Lead off set for 2$$$", 0))
    assert [spec.signal for spec in decoder.signals] == ["lead_off"]
    (samples,) = of_kind(Samples, fed(decoder, stream([0, 1])))
    assert samples.signal == "lead_off"
    assert samples.columns["C4"].tolist() == [1, 11]


def test_one_input_alone_gets_the_test_current() -> None:
    decoder = CytonDecoder(lead_off=(7,))
    decoder.start()
    assert decoder.receive(Chunk(RESET_TEXT, 0))[-1] == Send(b"z701Z")
    assert Streaming() in decoder.receive(Chunk(b"Success: Lead off set for 7$$$", 0))


def test_all_sixteen_get_the_test_current() -> None:
    decoder = CytonDecoder(DAISY_ELECTRODES, daisy=True, lead_off=range(1, 17))
    decoder.start()
    events = decoder.receive(Chunk(DAISY_TEXT, 0)) + decoder.receive(Chunk(b"16$$$", 0))
    for number in range(1, 17):
        events += decoder.receive(Chunk(b"Success: Lead off set for %d$$$" % number, 0))
    commands = [event.data for event in of_kind(Send, events)]
    assert commands == [b"C", *(b"z%c01Z" % letter for letter in b"12345678QWERTYUI"), b"b"]
    assert set(pairs_of(fed(decoder, stream(range(1, 9))), "lead_off")) == {0, 1, 2, 3}


def test_scales_of_a_pair_follow_the_gains() -> None:
    decoder = CytonDecoder(DAISY_ELECTRODES, daisy=True, gains={"F7": 1})
    decoder.start()
    for reply in (DAISY_TEXT, b"16$$$", b"Success: Channel set for 9$$$"):
        decoder.receive(Chunk(reply, 0))
    (samples,) = of_kind(Samples, fed(decoder, stream([1])))
    assert samples.scales["F7"] == pytest.approx(24 * samples.scales["Fp1"])
    assert all(samples.columns[name].dtype == np.int32 for name in DAISY_ELECTRODES)
    assert BOARD == DEFAULT_ELECTRODES
    assert "F7" in DAISY
