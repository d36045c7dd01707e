from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.devices import gatt, thermometer
from gateway.devices.base import Decoder, Event, Reading, Rejected, Streaming
from gateway.devices.thermometer import Temperature, ThermometerDecoder
from gateway.links.base import Chunk

ARRIVAL_NS = 5_000_000_000_000
NORDIC = "06 b00e00fe dc07 0c 05 0b 32 1b 04"


def received(octets: str, channel: str = gatt.TEMPERATURE_MEASUREMENT) -> list[Event]:
    """Events of one indication, without the Streaming that the first one brings."""
    events = ThermometerDecoder().receive(Chunk(bytes.fromhex(octets), ARRIVAL_NS, channel))
    return [event for event in events if not isinstance(event, Streaming)]


def temperatures(events: list[Event]) -> list[float]:
    return [event.fields["temperature"] for event in events if isinstance(event, Reading)]


def test_the_vector() -> None:
    measured = thermometer.measurement(gatt.Fields(bytes.fromhex(NORDIC)))
    assert measured == Temperature(37.60, datetime(2012, 12, 5, 11, 50, 27, tzinfo=UTC), "finger")
    assert temperatures(received(NORDIC)) == [37.60]


def test_the_vector_less_its_last_byte_is_too_short() -> None:
    data = bytes.fromhex(NORDIC)[:-1]
    (event,) = received(data.hex())
    assert isinstance(event, Rejected)
    assert event.byte_count == len(data)
    assert "too short" in event.reason


@pytest.mark.parametrize("cut", range(1, len(bytes.fromhex(NORDIC))))
def test_a_cut_measurement_is_rejected_whole(cut: int) -> None:
    assert not temperatures(received(bytes.fromhex(NORDIC)[:-cut].hex()))


@pytest.mark.parametrize(
    ("octets", "celsius"), [("01 da0300ff", 37.0), ("01 560300ff", 29.6667), ("01 b92600fe", 37.2944)]
)
def test_fahrenheit_becomes_celsius(octets: str, celsius: float) -> None:
    assert temperatures(received(octets)) == [celsius]


def test_the_decoder_follows_the_protocol() -> None:
    decoder: Decoder = ThermometerDecoder()
    assert decoder.start() == []
    assert [(spec.channels, spec.units) for spec in decoder.signals] == [(("temperature",), ("Cel",))]
    first = decoder.receive(Chunk(bytes.fromhex("00 6c0100ff"), ARRIVAL_NS, gatt.TEMPERATURE_MEASUREMENT))
    assert first == [Streaming(), Reading("vital_signs", {"temperature": 36.4}, ARRIVAL_NS)]


@pytest.mark.parametrize("special", ["ffff7f00", "00008000", "01008000", "feff7f00", "02008000"])
def test_specials_are_no_value(special: str) -> None:
    (event,) = received("00" + special)
    assert isinstance(event, Rejected)
    assert event.reason


def test_a_fahrenheit_called_celsius_is_kept_out() -> None:
    (event,) = received("00 da0300ff")
    assert event == Rejected(4, "temperature: 98.6 is not within 0 and 50")


def test_an_intermediate_temperature_is_none() -> None:
    assert gatt.INTERMEDIATE_TEMPERATURE not in ThermometerDecoder.NOTIFY
    (event,) = received("00 6c0100ff", gatt.INTERMEDIATE_TEMPERATURE)
    assert isinstance(event, Rejected)


@given(st.binary(max_size=600), st.sampled_from([*ThermometerDecoder.NOTIFY, *ThermometerDecoder.READ]))
def test_any_bytes_give_events_that_stand_for_them(data: bytes, channel: str) -> None:
    events = ThermometerDecoder().receive(Chunk(data, ARRIVAL_NS, channel))
    assert sum(event.byte_count for event in events if isinstance(event, Rejected)) <= len(data)
    assert all(0 < value <= 50 for value in temperatures(events))


@given(st.integers(1, 5000))
def test_what_is_put_in_comes_out(hundredths: int) -> None:
    data = b"\x00" + (0xFE << 24 | hundredths).to_bytes(4, "little")
    assert temperatures(received(data.hex())) == [hundredths / 100]
