from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.devices import gatt, pulse_oximeter
from gateway.devices.base import Decoder, Event, Facts, NoValue, Reading, Rejected, Streaming
from gateway.devices.pulse_oximeter import Oximetry, PulseOximeterDecoder
from gateway.links.base import Chunk
from gateway.samples import NS_PER_S

ARRIVAL_NS = 5_000_000_000_000
FULL = "0f 61 00 4b 00 60 00 4c 00 62 00 4a 00 00 01 20 00 00"
STAMP = "e507 03 04 05 06 07"
"""2021-03-04 05:06:07."""


def fields(octets: str) -> gatt.Fields:
    return gatt.Fields(bytes.fromhex(octets))


def received(octets: str, channel: str = gatt.PLX_CONTINUOUS) -> list[Event]:
    """Events of one notification, without the Streaming that the first one brings."""
    events = PulseOximeterDecoder().receive(Chunk(bytes.fromhex(octets), ARRIVAL_NS, channel))
    return [event for event in events if not isinstance(event, Streaming)]


def values(events: list[Event]) -> list[dict[str, float]]:
    return [dict(event.fields) for event in events if isinstance(event, Reading)]


@pytest.mark.parametrize(
    ("octets", "expected"),
    [
        ("00 62 00 48 00", Oximetry(98.0, 72.0)),
        (
            FULL,
            Oximetry(97.0, 75.0, fast=(96.0, 76.0), slow=(98.0, 74.0), measurement_status=0x0100, sensor_status=0x20),
        ),
        ("00 ff 07 ff 07", Oximetry(None, None)),
        ("10 62 00 48 00 19 f0", Oximetry(98.0, 72.0, perfusion_index=(2.5,))),
    ],
)
def test_continuous_vectors(octets: str, expected: Oximetry) -> None:
    assert pulse_oximeter.continuous(fields(octets)) == expected


def test_a_spot_check_has_its_fields_in_another_order() -> None:
    measured = pulse_oximeter.spot_check(fields(f"0f 6100 4b00 {STAMP} 0002 200000 19f0"))
    assert measured == Oximetry(
        97.0,
        75.0,
        stamp=datetime(2021, 3, 4, 5, 6, 7, tzinfo=UTC),
        measurement_status=pulse_oximeter.STORED,
        sensor_status=0x20,
        perfusion_index=(2.5,),
    )
    assert pulse_oximeter.spot_check(fields(f"11 6100 4b00 {STAMP}")).stamp is None, "the clock was never set"


def test_the_decoder_follows_the_protocol() -> None:
    decoder: Decoder = PulseOximeterDecoder()
    assert decoder.start() == []
    assert [(spec.signal, spec.rate_hz, spec.channels, spec.units) for spec in decoder.signals] == [
        ("vital_signs", None, ("spo2", "heart_rate", "perfusion_index"), ("%", "/min", "%"))
    ]
    assert decoder.receive(Chunk(b"\x57", ARRIVAL_NS, gatt.BATTERY_LEVEL)) == [Facts(battery_pct=87.0)]
    first = decoder.receive(Chunk(bytes.fromhex("00 62 00 48 00"), ARRIVAL_NS, gatt.PLX_CONTINUOUS))
    assert first == [Streaming(), Reading("vital_signs", {"spo2": 98.0, "heart_rate": 72.0}, ARRIVAL_NS)]


def test_what_only_warns_is_taken() -> None:
    assert values(received(FULL)) == [{"spo2": 97.0, "heart_rate": 75.0}]
    assert values(received("08 6200 4800 300000")) == [{"spo2": 98.0, "heart_rate": 72.0}]


@pytest.mark.parametrize("bit", sorted(pulse_oximeter.MEASUREMENT_FAULTS))
def test_a_measurement_status_that_does_not_stand_by_it(bit: int) -> None:
    octets = "04 6200 4800" + (1 << bit).to_bytes(2, "little").hex()
    assert received(octets) == [NoValue(7, f"not to be trusted: {pulse_oximeter.MEASUREMENT_FAULTS[bit]}")]


@pytest.mark.parametrize("bit", sorted(pulse_oximeter.SENSOR_FAULTS))
def test_a_sensor_status_that_does_not_stand_by_it(bit: int) -> None:
    octets = "08 6200 4800" + (1 << bit).to_bytes(3, "little").hex()
    assert received(octets) == [NoValue(8, f"not to be trusted: {pulse_oximeter.SENSOR_FAULTS[bit]}")]


def test_the_fact_sheets_list_is_dropped() -> None:
    assert {10, 11, 13, 15} <= set(pulse_oximeter.MEASUREMENT_FAULTS)
    assert {3, 11, 15} <= set(pulse_oximeter.SENSOR_FAULTS)


@pytest.mark.parametrize(
    ("octets", "expected", "reasons"),
    [
        ("00 ff07 4800", {"heart_rate": 72.0}, ["spo2: the sensor has no value"]),
        ("00 6200 ff07", {"spo2": 98.0}, ["heart_rate: the sensor has no value"]),
        ("00 6200 0000", {"spo2": 98.0}, ["heart_rate: the sensor has no value"]),
        ("00 6500 4800", {"heart_rate": 72.0}, ["spo2: 101 is not within 0 and 100"]),
        ("00 fe07 0208", None, ["spo2: inf is not within 0 and 100", "heart_rate: -inf is not within 0 and 400"]),
        ("10 6200 4800 ff07", {"spo2": 98.0, "heart_rate": 72.0}, ["perfusion_index: the sensor has no value"]),
        ("00 6200 4800 00", {"spo2": 98.0, "heart_rate": 72.0}, ["bytes behind the last field"]),
    ],
)
def test_a_value_that_is_none_is_left_out(octets: str, expected: dict[str, float] | None, reasons: list[str]) -> None:
    events = received(octets)
    assert values(events) == ([expected] if expected else [])
    assert [event.reason for event in events if isinstance(event, Rejected)] == reasons


@pytest.mark.parametrize(
    "octets", ["", "00", "00 6200 48", "01 6200 4800 6200", "04 6200 4800 00", "08 6200 4800 0000"]
)
def test_a_cut_measurement_is_rejected_whole(octets: str) -> None:
    data = bytes.fromhex(octets)
    (event,) = received(octets)
    assert isinstance(event, Rejected)
    assert event.byte_count == len(data)


def spot_checks(*octets: str, clock: str | None) -> list[Event]:
    """Events of spot-checks that arrive one second apart, the first a second after the clock was read."""
    decoder = PulseOximeterDecoder()
    if clock is not None:
        assert decoder.receive(Chunk(bytes.fromhex(clock), ARRIVAL_NS, gatt.DATE_TIME)) == []
    events: list[Event] = []
    for number, each in enumerate(octets, start=1):
        events += decoder.receive(Chunk(bytes.fromhex(each), ARRIVAL_NS + number * NS_PER_S, gatt.PLX_SPOT_CHECK))
    return [event for event in events if not isinstance(event, Streaming)]


def test_a_spot_check_counts_from_its_arrival() -> None:
    (reading,) = spot_checks(f"01 6200 4800 {STAMP}", clock=None)
    assert isinstance(reading, Reading)
    assert reading.arrival_ns == ARRIVAL_NS + NS_PER_S


def test_a_stored_spot_check_without_a_clock_gets_no_wrong_time() -> None:
    (event,) = spot_checks(f"03 6200 4800 {STAMP} 0002", clock=None)
    assert isinstance(event, Rejected)
    assert "stored" in event.reason


def test_a_stored_spot_check_is_stamped_back_by_the_oximeters_clock() -> None:
    # The clock was read as 05:16:07, the spot-check taken ten minutes before that.
    (reading,) = spot_checks(f"03 6200 4800 {STAMP} 0002", clock="e507 03 04 05 10 07")
    assert isinstance(reading, Reading)
    assert reading.arrival_ns == ARRIVAL_NS - 600 * NS_PER_S


@given(st.binary(max_size=600), st.sampled_from([*PulseOximeterDecoder.NOTIFY, *PulseOximeterDecoder.READ]))
def test_any_bytes_give_events_that_stand_for_them(data: bytes, channel: str) -> None:
    events = PulseOximeterDecoder().receive(Chunk(data, ARRIVAL_NS, channel))
    assert sum(event.byte_count for event in events if isinstance(event, Rejected)) <= len(data)
    for reading in (event for event in events if isinstance(event, Reading)):
        assert reading.fields
        assert all(0 < value <= 400 for value in reading.fields.values())


@given(st.integers(1, 100), st.integers(1, 400), st.integers(0, 0xF), st.integers(1, 200))
def test_what_is_put_in_comes_out(spo2: int, pulse: int, pairs: int, perfusion_tenths: int) -> None:
    data = bytes([0x10 | pairs]) + spo2.to_bytes(2, "little") + pulse.to_bytes(2, "little")
    data += b"\x32\x00\x33\x00" * (pairs & 1) + b"\x32\x00\x33\x00" * (pairs >> 1 & 1)
    data += bytes(2) * (pairs >> 2 & 1) + bytes(3) * (pairs >> 3)
    data += (0xF000 | perfusion_tenths).to_bytes(2, "little")
    assert values(received(data.hex())) == [
        {"spo2": spo2, "heart_rate": pulse, "perfusion_index": perfusion_tenths / 10}
    ]
