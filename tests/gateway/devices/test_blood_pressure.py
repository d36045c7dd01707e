from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.devices import blood_pressure, gatt
from gateway.devices.base import Decoder, Event, NoValue, Reading, Rejected, Streaming
from gateway.devices.blood_pressure import BloodPressure, BloodPressureDecoder
from gateway.links.base import Chunk
from gateway.samples import NS_PER_S

ARRIVAL_NS = 5_000_000_000_000
NORDIC = "1e 8a00 5800 7800 0000 04 11 14 29 3b 3c00 01 2700"
GOOD = "1e 8a00 5800 7800 e507 04 11 14 29 3b 3c00 01 0400"
"""As Nordic's, with a year, and of its status only the irregular pulse."""


def received(octets: str) -> list[Event]:
    """Events of one indication, without the Streaming that the first one brings."""
    chunk = Chunk(bytes.fromhex(octets), ARRIVAL_NS, gatt.BLOOD_PRESSURE_MEASUREMENT)
    return [event for event in BloodPressureDecoder().receive(chunk) if not isinstance(event, Streaming)]


def values(events: list[Event]) -> list[dict[str, float]]:
    return [dict(event.fields) for event in events if isinstance(event, Reading)]


def test_the_vector_in_millimetres_of_mercury() -> None:
    measured = blood_pressure.measurement(gatt.Fields(bytes.fromhex(NORDIC)))
    assert measured == BloodPressure(138.0, 88.0, 120.0, None, (60.0,), 1, 0x27)
    assert measured.faults == ["the body moved", "the cuff was loose", "the cuff was in a wrong position"]


def test_the_vector_in_kilopascal() -> None:
    measured = blood_pressure.measurement(gatt.Fields(bytes.fromhex("15 bdf0 0b00 9ff0 3c00 1200")))
    assert [measured.systolic, measured.diastolic, measured.mean_arterial] == pytest.approx(
        [141.8, 82.5, 119.3], abs=0.05
    )
    assert measured.pulse_rate == (60.0,)
    assert measured.status == 0x12
    assert measured.faults == ["the cuff was loose"]


def test_the_stamp_and_an_unknown_user() -> None:
    measured = blood_pressure.measurement(gatt.Fields(bytes.fromhex("0a 8a00 5800 7800 e507 04 11 14 29 3b ff")))
    assert measured.stamp == datetime(2021, 4, 17, 20, 41, 59, tzinfo=UTC)
    assert measured.user is None


def test_the_decoder_follows_the_protocol() -> None:
    decoder: Decoder = BloodPressureDecoder()
    assert decoder.start() == []
    assert [(spec.channels, spec.units) for spec in decoder.signals] == [
        (("systolic_bp", "diastolic_bp", "heart_rate"), ("mm[Hg]", "mm[Hg]", "/min"))
    ]
    first = decoder.receive(Chunk(bytes.fromhex(GOOD), ARRIVAL_NS, gatt.BLOOD_PRESSURE_MEASUREMENT))
    fields = {"systolic_bp": 138.0, "diastolic_bp": 88.0, "heart_rate": 60.0}
    assert first == [Streaming(), Reading("vital_signs", fields, ARRIVAL_NS)]


@pytest.mark.parametrize("bit", [0, 1, 5])
def test_a_questionable_measurement_is_kept_out(bit: int) -> None:
    (event,) = received("10 8a00 5800 7800" + (1 << bit).to_bytes(2, "little").hex())
    assert isinstance(event, NoValue)
    assert event.reason == f"questionable: {blood_pressure.FAULTS[bit]}"
    assert event.byte_count == 9


@pytest.mark.parametrize("ranges", [1, 2])
def test_a_pulse_out_of_range_is_kept_out_alone(ranges: int) -> None:
    events = received("14 8a00 5800 7800 3c00" + (ranges << 3).to_bytes(2, "little").hex())
    assert values(events) == [{"systolic_bp": 138.0, "diastolic_bp": 88.0}]
    assert sum(isinstance(event, Rejected) for event in events) == 1


@pytest.mark.parametrize(
    ("octets", "expected"),
    [
        ("00 ff07 5800 7800", [{"diastolic_bp": 88.0}]),
        ("00 ff07 ff07 ff07", []),
        ("04 ff07 0008 0108 ff07", []),
        ("00 fe07 5800 7800", [{"diastolic_bp": 88.0}]),
        ("00 0000 5800 7800", [{"diastolic_bp": 88.0}]),
    ],
)
def test_a_value_that_is_none_is_left_out(octets: str, expected: list[dict[str, float]]) -> None:
    events = received(octets)
    assert values(events) == expected
    assert any(isinstance(event, Rejected) for event in events)


@pytest.mark.parametrize("cut", range(1, len(bytes.fromhex(GOOD))))
def test_a_cut_measurement_is_rejected_whole(cut: int) -> None:
    data = bytes.fromhex(GOOD)[:-cut]
    (event,) = received(data.hex())
    assert isinstance(event, Rejected)
    assert event.byte_count == len(data)


def test_an_intermediate_cuff_pressure_is_no_blood_pressure() -> None:
    assert gatt.INTERMEDIATE_CUFF_PRESSURE not in BloodPressureDecoder.NOTIFY
    chunk = Chunk(bytes.fromhex("00 b400 ff07 ff07"), ARRIVAL_NS, gatt.INTERMEDIATE_CUFF_PRESSURE)
    assert BloodPressureDecoder().receive(chunk) == [
        Rejected(7, "unexpected characteristic Intermediate Cuff Pressure")
    ]


def test_measurements_that_were_kept_get_the_times_at_which_they_were_taken() -> None:
    decoder = BloodPressureDecoder()
    # 20:41:59 is the newest one's stamp; the cuff's clock shows half a minute later when it is connected.
    assert decoder.receive(Chunk(bytes.fromhex("e507 04 11 14 2a 1d"), ARRIVAL_NS, gatt.DATE_TIME)) == []
    arrivals = []
    for stamp in ("e507 04 11 11 29 3b", "e507 04 11 14 0b 3b", "e507 04 11 14 29 3b"):
        data = bytes.fromhex(f"02 8a00 5800 7800 {stamp}")
        events = decoder.receive(Chunk(data, ARRIVAL_NS + NS_PER_S, gatt.BLOOD_PRESSURE_MEASUREMENT))
        arrivals += [event.arrival_ns for event in events if isinstance(event, Reading)]
    assert arrivals == [
        ARRIVAL_NS - (3 * 3600 + 30) * NS_PER_S,
        ARRIVAL_NS - (30 * 60 + 30) * NS_PER_S,
        ARRIVAL_NS + NS_PER_S,
    ]


@pytest.mark.parametrize(
    ("clock", "channel", "rejected"),
    [
        ("0000 04 11 14 2a 1d", gatt.DATE_TIME, False),
        ("e507 04 11 14 29 3a", gatt.DATE_TIME, False),
        ("e507 04 17 14 2a 1d", gatt.DATE_TIME, False),
        ("e507 04 19 14 2a 1d 02 80 00", gatt.CURRENT_TIME, True),
    ],
)
def test_a_clock_that_cannot_be_right(clock: str, channel: str, *, rejected: bool) -> None:
    decoder = BloodPressureDecoder()
    decoder.receive(Chunk(bytes.fromhex(clock), ARRIVAL_NS, channel))
    data = bytes.fromhex("02 8a00 5800 7800 e507 04 11 14 29 3b")
    events = decoder.receive(Chunk(data, ARRIVAL_NS, gatt.BLOOD_PRESSURE_MEASUREMENT))
    assert not values(events) if rejected else values(events)


@given(st.binary(max_size=600), st.sampled_from([*BloodPressureDecoder.NOTIFY, *BloodPressureDecoder.READ]))
def test_any_bytes_give_events_that_stand_for_them(data: bytes, channel: str) -> None:
    events = BloodPressureDecoder().receive(Chunk(data, ARRIVAL_NS, channel))
    assert sum(event.byte_count for event in events if isinstance(event, Rejected)) <= len(data)
    for fields in values(events):
        assert fields
        assert all(0 < value <= 400 for value in fields.values())


@given(st.integers(1, 400), st.integers(1, 400), st.booleans(), st.booleans())
def test_what_is_put_in_comes_out(systolic: int, diastolic: int, stamp: bool, user: bool) -> None:
    data = bytes([0x04 | 0x02 * stamp | 0x08 * user])
    data += b"".join(value.to_bytes(2, "little") for value in (systolic, diastolic, 0x7FF))
    data += bytes.fromhex("e507 04 11 14 29 3b") * stamp + b"\x3c\x00" + b"\x01" * user
    assert values(received(data.hex())) == [{"systolic_bp": systolic, "diastolic_bp": diastolic, "heart_rate": 60.0}]
