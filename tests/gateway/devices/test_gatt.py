from __future__ import annotations

import math
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.devices import gatt


@pytest.mark.parametrize(
    ("octets", "value"),
    [
        ("6200", 98.0),
        ("bdf0", 18.9),
        ("8a00", 138.0),
        ("72f1", 37.0),
        ("f6ff", -1.0),
        ("0ce3", 7.8),
        ("1200", 18.0),
        ("ff07", None),
        ("0008", None),
        ("0108", None),
        ("fe07", math.inf),
        ("0208", -math.inf),
    ],
)
def test_sfloat_vectors(octets: str, value: float | None) -> None:
    assert gatt.sfloat(int.from_bytes(bytes.fromhex(octets), "little")) == value


@pytest.mark.parametrize(
    ("octets", "value"),
    [
        ("b00e00fe", 37.60),
        ("6c0100ff", 36.4),
        ("72010000", 370.0),
        ("8efeffff", -37.0),
        ("ffff7f00", None),
        ("00008000", None),
        ("01008000", None),
        ("feff7f00", math.inf),
        ("02008000", -math.inf),
    ],
)
def test_float_vectors(octets: str, value: float | None) -> None:
    assert gatt.float32(int.from_bytes(bytes.fromhex(octets), "little")) == value


@pytest.mark.parametrize("exponent", [0x0, 0x7, 0x8, 0xF])
@pytest.mark.parametrize("mantissa", [0x7FF, 0x800, 0x801])
def test_sfloat_specials_are_told_by_the_mantissa_alone(exponent: int, mantissa: int) -> None:
    assert gatt.sfloat(exponent << 12 | mantissa) is None


@given(st.integers(-2045, 2045), st.integers(-8, 7))
def test_sfloat_gives_mantissa_times_ten_to_the_exponent(mantissa: int, exponent: int) -> None:
    assert gatt.sfloat((exponent & 0xF) << 12 | mantissa & 0xFFF) == pytest.approx(mantissa * 10.0**exponent, rel=1e-15)


@given(st.integers(-0x7FFFFD, 0x7FFFFD), st.integers(-128, 127))
def test_float_gives_mantissa_times_ten_to_the_exponent(mantissa: int, exponent: int) -> None:
    raw = (exponent & 0xFF) << 24 | mantissa & 0xFFFFFF
    assert gatt.float32(raw) == pytest.approx(mantissa * 10.0**exponent, rel=1e-14)


def test_uuid_expansion() -> None:
    assert gatt.uuid_of(0x2A37) == "00002a37-0000-1000-8000-00805f9b34fb"
    with pytest.raises(ValueError, match="16 bits"):
        gatt.uuid_of(0x12A37)


def test_names() -> None:
    assert gatt.name_of("00002A37-0000-1000-8000-00805F9B34FB") == "Heart Rate Measurement"
    assert gatt.name_of("273e0001-4c4d-454d-96be-f03bac821358") == "273e0001-4c4d-454d-96be-f03bac821358"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"H10\0\0\0", "H10"),
        (b"H10\0\xff\x01", "H10"),
        ("Gurt für Müller ".encode(), "Gurt für Müller"),
        (b"", None),
        (b"\0\0", None),
        (b"\xff\xfe", None),
        (b"a\x07b", None),
        (b"x" * 200, "x" * 80),
    ],
)
def test_text(value: bytes, expected: str | None) -> None:
    assert gatt.text(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(b"\x57", 87.0), (b"\0", 0.0), (b"\x65", None), (b"", None), (b"12", None)]
)
def test_battery(value: bytes, expected: float | None) -> None:
    assert gatt.battery_pct(value) == expected


def test_fields_are_read_in_order_and_end() -> None:
    fields = gatt.Fields(bytes.fromhex("01 0203 040506 6200 b00e00fe e507 03 04 05 06 07 aabb"))
    assert [fields.uint(1), fields.uint(2), fields.uint(3), fields.sfloat(), fields.float32()] == [
        1,
        0x0302,
        0x060504,
        98.0,
        37.60,
    ]
    assert fields.date_time() == datetime(2021, 3, 4, 5, 6, 7, tzinfo=UTC)
    assert fields.left == 2
    with pytest.raises(gatt.MalformedValueError, match="too short"):
        fields.uint(3)
    assert fields.rest() == b"\xaa\xbb"
    assert fields.rest() == b""


@pytest.mark.parametrize(
    "octets", ["0000 04 11 14 29 3b", "e507 00 11 14 29 3b", "e507 04 00 14 29 3b", "e507 04 11 19 29 3b"]
)
def test_a_date_that_is_unknown_or_none(octets: str) -> None:
    assert gatt.date_time(bytes.fromhex(octets)) is None


def test_a_date_and_time_has_seven_bytes() -> None:
    with pytest.raises(gatt.MalformedValueError, match="7 bytes"):
        gatt.date_time(bytes(6))
