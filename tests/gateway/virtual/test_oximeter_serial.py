"""Virtual oximeters on serial lines: the models by themselves, and the whole way to the decoders."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from gateway.devices.base import Decoder, Event, Facts, Missing, NoValue, Reading, Rejected, Samples, Send, finish
from gateway.devices.contec import ContecDecoder, ContecOldDecoder
from gateway.devices.nonin import SELECT_ONYX, NoninFormat2Decoder, NoninFormat7Decoder
from gateway.errors import DeviceError
from gateway.links.base import Chunk
from gateway.links.serial_port import SerialLink
from gateway.samples import NS_PER_S
from gateway.virtual.oximeter_serial import ContecFirmware, ContecOldFirmware, NoninFirmware, OximeterFirmware
from gateway.virtual.serial_line import VirtualSerialLine

DEADLINE_S = 30.0
LUMP_NS = 16_000_000


@dataclass
class Pair:
    """A device's model and the decoder for it."""

    name: str
    firmware: Callable[[], OximeterFirmware]
    decoder: Callable[[], Decoder]
    baud_rate: int = 9600


PAIRS = [
    Pair("format 2", NoninFirmware, NoninFormat2Decoder),
    Pair("format 7", lambda: NoninFirmware(7), NoninFormat7Decoder),
    Pair("Onyx", lambda: NoninFirmware(7, select=SELECT_ONYX), lambda: NoninFormat7Decoder(SELECT_ONYX)),
    Pair("Contec old", ContecOldFirmware, ContecOldDecoder, 19_200),
    Pair("Contec new", ContecFirmware, ContecDecoder, 115_200),
]
EVERY_PAIR = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
NONINS = pytest.mark.parametrize("pair", PAIRS[:3], ids=lambda pair: pair.name)
CONTECS = pytest.mark.parametrize("pair", PAIRS[3:], ids=lambda pair: pair.name)


def played(firmware: OximeterFirmware, decoder: Decoder, until_ns: int, from_ns: int = 0) -> list[Event]:
    """What a decoder makes of a device whose bytes arrive in lumps of 16 ms."""
    events: list[Event] = []
    sends = decoder.start() if from_ns == 0 else []
    for now_ns in range(from_ns, until_ns, LUMP_NS):
        data = b"".join(firmware.receive(send.data, now_ns) for send in sends if isinstance(send, Send))
        data += b"".join(firmware.packets_until(now_ns))
        sends = decoder.receive(Chunk(data, now_ns)) if data else []
        events += sends
    return events


def samples_of(events: list[Event]) -> int:
    return sum(len(event) for event in events if isinstance(event, Samples))


def missing_of(events: list[Event]) -> list[tuple[int, int]]:
    return [(event.index, event.count) for event in events if isinstance(event, Missing)]


@EVERY_PAIR
def test_a_minute_at_rest(pair: Pair) -> None:
    decoder, firmware = pair.decoder(), pair.firmware()
    events = played(firmware, decoder, 60 * NS_PER_S) + finish(decoder)
    assert samples_of(events) == firmware.frames_played >= 60 * 60 - 2
    assert missing_of(events) == []
    assert [event for event in events if isinstance(event, Rejected) and "type" not in event.reason] == []
    assert [event for event in events if isinstance(event, Facts)]
    readings = [event for event in events if isinstance(event, Reading)]
    assert len(readings) >= 59
    assert all(55 <= reading.fields["heart_rate"] <= 95 for reading in readings)
    assert all(94 <= reading.fields["spo2"] <= 100 for reading in readings)
    assert len({reading.fields["heart_rate"] for reading in readings}) > 3
    # The pleth beats as often as the heart rate says.
    pleth = np.concatenate([event.columns["pleth"] for event in events if isinstance(event, Samples)])
    above = pleth > pleth.min() + 0.6 * np.ptp(pleth)
    beats = int(np.count_nonzero(above[1:] & ~above[:-1]))
    mean_rate = np.mean([reading.fields["heart_rate"] for reading in readings])
    assert beats == pytest.approx(mean_rate, abs=3)


@EVERY_PAIR
def test_the_same_seed_gives_the_same(pair: Pair) -> None:
    first, second = (pair.firmware() for _ in range(2))
    for firmware in (first, second):
        for send in pair.decoder().start():
            assert isinstance(send, Send)
            firmware.receive(send.data, 0)
    assert first.packets_until(5 * NS_PER_S) == second.packets_until(5 * NS_PER_S) != []


@EVERY_PAIR
@pytest.mark.parametrize("fault", ["no_finger", "unplugged_sensor"])
def test_without_a_finger_there_is_no_value(pair: Pair, fault: str) -> None:
    decoder, firmware = pair.decoder(), pair.firmware()
    setattr(firmware.faults, fault, True)
    events = played(firmware, decoder, 10 * NS_PER_S)
    assert not [event for event in events if isinstance(event, Reading)]
    assert len([event for event in events if isinstance(event, NoValue)]) >= 9
    # The pleth goes on, marked, so that a device without a finger is not a silent one.
    assert samples_of(events) > 500
    assert all(event.columns["quality"].all() for event in events if isinstance(event, Samples))
    setattr(firmware.faults, fault, False)
    events = played(firmware, decoder, 20 * NS_PER_S, 10 * NS_PER_S)
    assert len([event for event in events if isinstance(event, Reading)]) >= 8


@NONINS
def test_losses_of_a_nonin_are_counted(pair: Pair) -> None:
    decoder, firmware = pair.decoder(), pair.firmware()
    faults = firmware.faults
    faults.lost |= {60, 61, 200, *range(300, 350), 412}
    faults.damaged |= {100}
    faults.cut |= {512: 3}
    faults.garbage |= {600: b"\x02\x03\x04"}
    events = played(firmware, decoder, 20 * NS_PER_S) + finish(decoder)
    assert sum(count for _, count in missing_of(events)) == 2 + 1 + 50 + 1 + 1 + 1
    assert samples_of(events) == firmware.frames_played - 56
    places = sorted(
        [event.index + k for event in events if isinstance(event, Samples) for k in range(len(event))]
        + [first + k for first, count in missing_of(events) for k in range(count)]
    )
    assert places == list(range(firmware.frames_played))
    assert {(100, 1), (512, 1)} <= set(missing_of(events))


@CONTECS
def test_torn_frames_of_a_contec_are_counted(pair: Pair) -> None:
    decoder, firmware = pair.decoder(), pair.firmware()
    firmware.faults.cut |= {60: 1, 90: 2, 91: 4, 200: 3}
    events = played(firmware, decoder, 10 * NS_PER_S)
    assert missing_of(events) == [(60, 1), (90, 2), (200, 1)]
    assert samples_of(events) == firmware.frames_played - 4


def test_a_contec_is_kept_alive_for_as_long_as_it_talks() -> None:
    decoder, firmware = ContecDecoder(), ContecFirmware()
    events = played(firmware, decoder, 120 * NS_PER_S)
    assert firmware.keep_alives == pytest.approx(29, abs=1)
    assert samples_of(events) == firmware.frames_played


def test_a_contec_that_is_not_kept_alive_says_goodbye() -> None:
    firmware = ContecFirmware()
    decoder = ContecDecoder()
    for send in decoder.start():
        assert isinstance(send, Send)
        firmware.receive(send.data, 0)
    decoder.receive(Chunk(b"".join(firmware.packets_until(NS_PER_S)), 0))
    with pytest.raises(DeviceError, match="ends the connection"):
        decoder.receive(Chunk(b"".join(firmware.packets_until(11 * NS_PER_S)), 0))
    assert not firmware.streaming


def test_the_format_must_be_selected() -> None:
    firmware = NoninFirmware(7)
    assert firmware.packets_until(NS_PER_S) == []
    assert firmware.receive(b"\x02\x70\x02\x02\x07\x03", 0) == b"\x15"
    assert firmware.receive(b"\x02\x70\x04\x02", 0) == b""
    assert firmware.receive(b"\x07\x61\xde\x03", 0) == b"\x06"
    assert len(firmware.packets_until(NS_PER_S)) == 1


# The whole way: pseudo terminal, serial link, decoder


@dataclass
class Gateway:
    """A link and a decoder, as the acquisition joins them."""

    link: SerialLink
    decoder: Decoder
    events: list[Event] = field(default_factory=list)

    async def run_until(self, condition: Callable[[list[Event]], bool]) -> None:
        await self.link.open()
        await self._take(self.decoder.start())
        async with asyncio.timeout(DEADLINE_S):
            while not condition(self.events):
                await self._take(self.decoder.receive(await self.link.read()))
        await self.link.close()
        await self._take(finish(self.decoder))

    async def _take(self, events: list[Event]) -> None:
        self.events += events
        for event in events:
            if isinstance(event, Send):
                await self.link.write(event.data)


@EVERY_PAIR
async def test_over_a_port(pair: Pair) -> None:
    firmware = pair.firmware()
    firmware.faults.cut |= {40: 2}
    async with VirtualSerialLine(firmware) as line:
        link = SerialLink(
            line.port,
            pair.baud_rate,
            parity="odd" if pair.name == "Contec old" else "none",
            flow_control="xon_xoff" if pair.name == "Contec old" else "none",
        )
        gateway = Gateway(link, pair.decoder())
        await gateway.run_until(lambda events: samples_of(events) >= 150)
    indices = {event.index + k for event in gateway.events if isinstance(event, Samples) for k in range(len(event))}
    lost = sum(count for _, count in missing_of(gateway.events))
    assert lost == 1
    assert len(indices) + lost == max(indices) + 1
    assert [event for event in gateway.events if isinstance(event, Reading)]
