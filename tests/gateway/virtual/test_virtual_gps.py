"""Virtual GPS receiver, by itself and through a port."""

from __future__ import annotations

import asyncio

import pytest

from gateway.devices.base import Event, NoValue, Reading, Rejected
from gateway.devices.gps import GpsDecoder
from gateway.links.base import Chunk
from gateway.links.serial_port import SerialLink
from gateway.samples import NS_PER_S
from gateway.virtual.gps import GpsFirmware
from gateway.virtual.serial_line import VirtualSerialLine

DEADLINE_S = 20.0


def played(firmware: GpsFirmware, seconds: int) -> list[Event]:
    decoder = GpsDecoder()
    events: list[Event] = []
    for second in range(seconds):
        for data in firmware.packets_until(second * NS_PER_S):
            events += decoder.receive(Chunk(data, second * NS_PER_S))
    return events


def positions(events: list[Event]) -> dict[int, tuple[float, float]]:
    return {
        event.arrival_ns // NS_PER_S: (event.fields["gps_latitude"], event.fields["gps_longitude"])
        for event in events
        if isinstance(event, Reading)
    }


@pytest.mark.parametrize("place", [(52.5, 13.4), (-33.8687, 151.2094), (40.7, -74.0), (0.00001, -179.999)])
def test_the_walk_arrives(place: tuple[float, float]) -> None:
    firmware = GpsFirmware(latitude=place[0], longitude=place[1])
    found = positions(played(firmware, 90))
    assert set(found) == set(range(90))
    for second, position in found.items():
        # A sentence has 1e-5 minutes, 2 cm.
        assert position == pytest.approx(firmware.position(second), abs=2e-7)


def test_no_value_until_there_is_a_fix() -> None:
    events = played(GpsFirmware(seconds_to_fix=5), 10)
    assert set(positions(events)) == {5, 6, 7, 8, 9}
    assert len([event for event in events if isinstance(event, NoValue)]) == 10


def test_faults() -> None:
    firmware = GpsFirmware()
    firmware.faults.lost |= {2}
    firmware.faults.wrong_checksum |= {4}
    firmware.faults.cut |= {6}
    firmware.faults.garbage |= {8: b"\xb5b\x01\x07\n\xff"}
    events = played(firmware, 10)
    assert set(positions(events)) == {0, 1, 3, 5, 7, 8, 9}
    assert len([event for event in events if isinstance(event, Rejected) and event.reason == "wrong checksum"]) == 4
    firmware.faults.no_fix = True
    assert positions(played(firmware, 15)) == {}
    firmware.faults.silent = True
    assert firmware.packets_until(60 * NS_PER_S) == []


async def test_over_a_port() -> None:
    firmware = GpsFirmware()
    async with VirtualSerialLine(firmware) as line:
        link, decoder = SerialLink(line.port, 9600), GpsDecoder()
        await link.open()
        async with asyncio.timeout(DEADLINE_S):
            found: list[Reading] = []
            while len(found) < 2:
                found += [event for event in decoder.receive(await link.read()) if isinstance(event, Reading)]
        await link.close()
    assert 0.5 * NS_PER_S < found[1].arrival_ns - found[0].arrival_ns < 1.5 * NS_PER_S
    assert found[0].fields["gps_latitude"] == pytest.approx(52.5, abs=0.01)
