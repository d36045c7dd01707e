from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.devices import gatt
from gateway.devices.base import Decoder, Event, Facts, NoValue, Reading, Rejected, Streaming
from gateway.devices.heart_rate import HeartRateDecoder
from gateway.links.base import Chunk

ARRIVAL_NS = 5_000_000_000_000


def measured(octets: str) -> list[Event]:
    """Events of one 2A37 notification, without the Streaming that the first one brings."""
    events = HeartRateDecoder().receive(Chunk(bytes.fromhex(octets), ARRIVAL_NS, gatt.HEART_RATE_MEASUREMENT))
    return [event for event in events if not isinstance(event, Streaming)]


def fields(events: list[Event]) -> list[dict[str, float]]:
    return [dict(event.fields) for event in events if isinstance(event, Reading)]


@pytest.mark.parametrize(
    ("octets", "expected"),
    [
        ("00 55", [{"heart_rate": 85.0}]),
        ("04 ff", [{"heart_rate": 255.0}]),
        ("1e 55 3200 2100", [{"heart_rate": 85.0, "rr_interval": 32.2265625}]),
        (
            "1f 0101 3201 0100 0201 ffff",
            [
                {"rr_interval": 0.9765625},
                {"rr_interval": 251.953125},
                {"heart_rate": 257.0, "rr_interval": 63999.0234375},
            ],
        ),
        ("10 48 2004 1904", [{"rr_interval": 1031.25}, {"heart_rate": 72.0, "rr_interval": 1024.4140625}]),
    ],
)
def test_measurement_vectors(octets: str, expected: list[dict[str, float]]) -> None:
    events = measured(octets)
    assert fields(events) == expected
    assert not any(isinstance(event, Rejected) for event in events)


def test_the_decoder_follows_the_protocol() -> None:
    decoder: Decoder = HeartRateDecoder()
    assert decoder.start() == []
    assert [(spec.signal, spec.channels, spec.units) for spec in decoder.signals] == [
        ("vital_signs", ("heart_rate", "rr_interval"), ("/min", "ms"))
    ]


def test_earlier_intervals_are_stamped_before_the_later_ones() -> None:
    readings = [event for event in measured("10 48 0004 0002 0001") if isinstance(event, Reading)]
    assert [reading.arrival_ns for reading in readings] == [
        ARRIVAL_NS - 750_000_000,
        ARRIVAL_NS - 250_000_000,
        ARRIVAL_NS,
    ]


@pytest.mark.parametrize(
    "octets", ["", "00", "01 48", "17 01 01", "08 48 01", "10 48 20", "10 48 2004 19", "1e 55 3200", "10 48"]
)
def test_a_cut_measurement_is_rejected_whole(octets: str) -> None:
    data = bytes.fromhex(octets)
    (event,) = HeartRateDecoder().receive(Chunk(data, ARRIVAL_NS, gatt.HEART_RATE_MEASUREMENT))
    assert isinstance(event, Rejected)
    assert event.byte_count == len(data)


@pytest.mark.parametrize("octets", ["04 00", "14 00 2004"])
def test_contact_lost_gives_no_value_but_says_so(octets: str) -> None:
    (event,) = measured(octets)
    assert isinstance(event, NoValue)
    assert "contact" in event.reason


def test_intervals_without_a_rate_are_kept() -> None:
    rejected, *readings = measured("16 00 2004 1904")
    assert isinstance(rejected, Rejected)
    assert fields(readings) == [{"rr_interval": 1031.25}, {"rr_interval": 1024.4140625}]


def test_an_interval_of_zero_is_no_value() -> None:
    rejected, reading = measured("10 48 0000")
    assert isinstance(rejected, Rejected)
    assert isinstance(reading, Reading)
    assert reading.fields == {"heart_rate": 72.0}


def test_an_interval_of_zero_gives_no_second_reading_at_one_time() -> None:
    rejected, reading = measured("10 48 0004 0000")
    assert isinstance(rejected, Rejected)
    assert isinstance(reading, Reading)
    assert reading.fields == {"heart_rate": 72.0, "rr_interval": 1000.0}


def test_bytes_behind_the_last_field_are_counted_and_the_rate_is_kept() -> None:
    rejected, reading = measured("00 48 00 00")
    assert isinstance(rejected, Rejected)
    assert rejected.byte_count == 2
    assert isinstance(reading, Reading)
    assert reading.fields == {"heart_rate": 72.0}


def test_streaming_is_said_once_at_the_first_good_measurement() -> None:
    decoder = HeartRateDecoder()

    def receive(octets: str, channel: str = gatt.HEART_RATE_MEASUREMENT) -> list[type]:
        return [type(event) for event in decoder.receive(Chunk(bytes.fromhex(octets), ARRIVAL_NS, channel))]

    assert receive("57", gatt.BATTERY_LEVEL) == [Facts]
    assert receive("17 01 01") == [Rejected]
    assert receive("00 48") == [Streaming, Reading]
    assert receive("00 48") == [Reading]


@pytest.mark.parametrize(
    ("channel", "data", "event"),
    [
        (gatt.BATTERY_LEVEL, b"\x57", Facts(battery_pct=87.0)),
        (gatt.MODEL_NUMBER, b"H10\0", Facts(model="H10")),
        (gatt.FIRMWARE_REVISION, b"3.1.1", Facts(firmware="3.1.1")),
    ],
)
def test_facts(channel: str, data: bytes, event: Facts) -> None:
    assert HeartRateDecoder().receive(Chunk(data, ARRIVAL_NS, channel)) == [event]


@pytest.mark.parametrize(
    ("channel", "data"),
    [
        (gatt.BATTERY_LEVEL, b"\xff"),
        (gatt.MODEL_NUMBER, b"\xff\xfe"),
        (gatt.FIRMWARE_REVISION, b""),
        (gatt.SERIAL_NUMBER, b"1"),
        ("", b"\x00\x48"),
        (gatt.HEART_RATE_MEASUREMENT, b"\x10" + bytes(600)),
    ],
)
def test_what_cannot_be_used_is_rejected(channel: str, data: bytes) -> None:
    (event,) = HeartRateDecoder().receive(Chunk(data, ARRIVAL_NS, channel))
    assert isinstance(event, Rejected)
    assert event.byte_count == len(data)
    assert event.reason


@given(st.binary(max_size=600), st.sampled_from([*HeartRateDecoder.NOTIFY, *HeartRateDecoder.READ]))
def test_any_bytes_give_events_that_stand_for_them(data: bytes, channel: str) -> None:
    events = HeartRateDecoder().receive(Chunk(data, ARRIVAL_NS, channel))
    assert events
    assert sum(event.byte_count for event in events if isinstance(event, Rejected)) <= len(data)
    stamps = [event.arrival_ns for event in events if isinstance(event, Reading)]
    assert stamps == sorted(set(stamps))
    for reading in (event for event in events if isinstance(event, Reading)):
        assert reading.arrival_ns <= ARRIVAL_NS
        assert reading.fields
        assert all(value > 0 for value in reading.fields.values())


@given(st.integers(1, 65535), st.lists(st.integers(1, 65535), min_size=1, max_size=9), st.booleans())
def test_what_is_put_in_comes_out(rate: int, ticks: list[int], energy: bool) -> None:
    data = bytes([0x11 | (0x08 if energy else 0)]) + rate.to_bytes(2, "little") + (b"\x32\x01" if energy else b"")
    data += b"".join(interval.to_bytes(2, "little") for interval in ticks)
    events = HeartRateDecoder().receive(Chunk(data, ARRIVAL_NS, gatt.HEART_RATE_MEASUREMENT))
    readings = [event for event in events if isinstance(event, Reading)]
    assert [reading.fields["rr_interval"] for reading in readings] == [interval / 1.024 for interval in ticks]
    assert [reading.fields.get("heart_rate") for reading in readings] == [None] * (len(ticks) - 1) + [float(rate)]
