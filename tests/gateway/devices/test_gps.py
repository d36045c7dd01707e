"""GPS decoder: vectors, real logs, no fix, damage, limits."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import xor
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.devices.base import Event, NoValue, Reading, Rejected, Streaming
from gateway.devices.gps import SENTENCE_BYTES_MAX, START_BYTES_MAX, GpsDecoder
from gateway.errors import DeviceError
from gateway.links.base import Chunk

LOGS = Path(__file__).parents[3] / ".." / "shared" / "data" / "nmea"
VECTORS = [
    ("$GNGGA,103607.00,5327.03942,N,00214.42462,W,1,06,5.88,56.0,M,48.5,M,,*64", (53.450657, -2.2404103)),
    ("$GPGGA,092750.000,3352.1234,S,15112.5678,E,2,8,1.03,61.7,M,55.2,M,,*7A", (-33.8687233, 151.2094633)),
    ("$GNRMC,103607.00,A,5327.03942,N,00214.42462,W,0.046,,060321,,,A,V*0F", (53.450657, -2.2404103)),
]
NO_FIX = "$GPRMC,092751.000,V,,,,,,,280511,,,N*4A"

Kind = TypeVar("Kind")
Feed = Callable[[GpsDecoder, bytes], list[Event]]


def of_kind(kind: type[Kind], events: list[Event]) -> list[Kind]:
    return [event for event in events if isinstance(event, kind)]


def whole(decoder: GpsDecoder, data: bytes) -> list[Event]:
    return decoder.receive(Chunk(data, 7))


def byte_by_byte(decoder: GpsDecoder, data: bytes) -> list[Event]:
    return [event for byte in data for event in decoder.receive(Chunk(bytes((byte,)), 7))]


def after_garbage(decoder: GpsDecoder, data: bytes) -> list[Event]:
    return decoder.receive(Chunk(b"\xb5b\x01$GN\xff*00$" + data, 7))


def doubled(decoder: GpsDecoder, data: bytes) -> list[Event]:
    return decoder.receive(Chunk(data * 2, 7))


def positions(events: list[Event]) -> list[tuple[float, float]]:
    return [(reading.fields["gps_latitude"], reading.fields["gps_longitude"]) for reading in of_kind(Reading, events)]


def sentence(body: str) -> bytes:
    return f"${body}*{reduce(xor, body.encode(), 0):02X}\r\n".encode()


@pytest.mark.parametrize("feed", [whole, byte_by_byte, after_garbage, doubled])
@pytest.mark.parametrize(("text", "position"), VECTORS)
def test_vectors(feed: Feed, text: str, position: tuple[float, float]) -> None:
    events = feed(GpsDecoder(), text.encode() + b"\r\n")
    (found,) = positions(events)
    assert found == pytest.approx(position, abs=1e-7)
    assert of_kind(Reading, events)[0].arrival_ns == 7
    assert of_kind(NoValue, events) == []
    assert len(of_kind(Streaming, events)) == 1


@pytest.mark.parametrize("feed", [whole, byte_by_byte, after_garbage])
def test_without_a_fix_there_is_no_position(feed: Feed) -> None:
    events = feed(GpsDecoder(), f"{NO_FIX}\r\n".encode() + b"$GNGGA,,,,,,0,00,99.99,,,,,,*56\r\n")
    assert positions(events) == []
    assert [event.reason for event in of_kind(NoValue, events)] == ["the receiver has no fix"] * 2
    assert len(of_kind(Streaming, events)) == 1


def test_a_position_with_the_status_void_is_no_position() -> None:
    void = "GNRMC,103607.00,V,5327.03942,N,00214.42462,W,0.046,,060321,,,A,V"
    none = "GNGGA,103607.00,5327.03942,N,00214.42462,W,0,06,5.88,56.0,M,48.5,M,,"
    assert positions(whole(GpsDecoder(), sentence(void) + sentence(none))) == []


@pytest.mark.parametrize(
    "body",
    [
        "GNRMC,103607.00,A,0000.00000,N,00000.00000,E,0.046,,060321,,,A,V",
        "GNRMC,103607.00,A,9130.00000,N,00000.00000,E,0.046,,060321,,,A,V",
        "GNRMC,103607.00,A,5327.03942,N,18100.00000,E,0.046,,060321,,,A,V",
        "GNRMC,103607.00,A,53x7.03942,N,00100.00000,E,0.046,,060321,,,A,V",
    ],
)
def test_impossible_positions(body: str) -> None:
    events = whole(GpsDecoder(), sentence(body))
    assert positions(events) == []
    assert of_kind(Rejected, events)


def test_rmc_and_gga_of_a_second_are_one_position() -> None:
    decoder = GpsDecoder()
    data = b"".join(
        sentence(f"GNRMC,1036{second:02d}.00,A,5327.0394{second},N,00214.42462,W,0.046,,060321,,,A,V")
        + sentence(f"GNGGA,1036{second:02d}.00,5327.0394{second},N,00214.42462,W,1,06,5.88,56.0,M,48.5,M,,")
        for second in range(5)
    )
    found = positions(whole(decoder, data))
    assert len(found) == 5
    assert len(set(found)) == 5


@pytest.mark.parametrize("spoil", [b"*65", b"*", b"", b"*6"])
def test_a_wrong_checksum(spoil: bytes) -> None:
    events = whole(GpsDecoder(), VECTORS[0][0].encode().replace(b"*64", spoil) + b"\r\n")
    assert of_kind(Reading, events) == []
    assert [event.reason for event in of_kind(Rejected, events)] == ["wrong checksum"]


def test_a_sentence_that_was_cut_costs_only_itself() -> None:
    first, second = (text.encode() + b"\r\n" for text, _ in VECTORS[:2])
    events = whole(GpsDecoder(), first[:30] + second)
    assert len(positions(events)) == 1
    assert of_kind(Rejected, events) == [Rejected(30, "not part of a sentence")]


# Real logs


def log_of(name: str) -> bytes:
    path = LOGS / f"pygpsdata-{name}.log"
    if not path.exists():
        pytest.skip("the shared NMEA logs are not on this machine")
    return path.read_bytes()


@pytest.mark.parametrize("feed", [whole, byte_by_byte])
@pytest.mark.parametrize(
    ("name", "count", "rejected"),
    [("nmea2", 2, 0), ("nmeastartup", 0, 0), ("nmeabadck", 1, 2), ("badeof", 1, 0)],
)
def test_logs(feed: Feed, name: str, count: int, rejected: int) -> None:
    events = feed(GpsDecoder(), log_of(name))
    assert len(positions(events)) == count
    assert len([event for event in of_kind(Rejected, events) if not isinstance(event, NoValue)]) == rejected
    assert all(latitude == pytest.approx(53.45, abs=0.01) for latitude, _ in positions(events))


@pytest.mark.parametrize("feed", [whole, byte_by_byte])
def test_a_log_mixed_with_binary(feed: Feed) -> None:
    events = feed(GpsDecoder(), log_of("mixed"))
    assert positions(events) == [
        pytest.approx((53.45059283, -2.240372333), abs=1e-8),
        pytest.approx((53.45059267, -2.240361), abs=1e-8),
    ]
    assert of_kind(Rejected, events)


def test_a_log_with_many_kinds_of_sentences() -> None:
    events = whole(GpsDecoder(), log_of("nmea4"))
    # The first RMC and the GGA are of the same second.
    assert positions(events)[0] == pytest.approx((53.450657, -102.2404103), abs=1e-6)
    assert not [event for event in of_kind(Rejected, events) if "impossible" in event.reason]


# Limits


def test_endless_bytes_without_a_line_end_are_not_kept() -> None:
    decoder = GpsDecoder()
    whole(decoder, f"{NO_FIX}\r\n".encode())
    for _ in range(100):
        whole(decoder, b"$" + bytes(1000))
        assert len(decoder._line) <= SENTENCE_BYTES_MAX
    (found,) = positions(whole(decoder, b"\n" + VECTORS[0][0].encode() + b"\r\n"))
    assert found == pytest.approx(VECTORS[0][1], abs=1e-7)


def test_another_device_is_a_failure() -> None:
    decoder = GpsDecoder()
    whole(decoder, b"x\n" * (START_BYTES_MAX // 2))
    with pytest.raises(DeviceError, match="no NMEA sentence") as failure:
        whole(decoder, b"x")
    assert "baud" in failure.value.hint


TEXTS = [text.encode() + b"\r\n" for text, _ in VECTORS]


@settings(max_examples=150, deadline=None)
@given(
    parts=st.lists(
        st.tuples(st.integers(0, 59), st.binary(max_size=40).map(lambda any_bytes: any_bytes.replace(b"$", b"")))
    ),
    cuts=st.lists(st.integers(1, 60), max_size=30),
)
def test_every_intact_sentence_is_found(parts: list[tuple[int, bytes]], cuts: list[int]) -> None:
    expected, data, last = [], b"", -1
    for number, garbage in parts:
        data += garbage + sentence(f"GPRMC,0000{number:02d}.00,A,10{number:02d}.00000,N,00214.00000,E,0,,060321,,,A")
        if number != last:
            expected.append(10 + number / 60)
        last = number
    decoder = GpsDecoder()
    events: list[Event] = []
    for size in [*cuts, len(data)]:
        events += whole(decoder, data[:size])
        data = data[size:]
    assert [latitude for latitude, _ in positions(events)] == pytest.approx(expected)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.binary(max_size=100)
        | st.sampled_from(TEXTS)
        | st.text("0123456789.,NSEWAV-", max_size=60).map(lambda fields: sentence(f"GPGGA,{fields}"))
        | st.text("0123456789.,NSEWAV-", max_size=60).map(lambda fields: sentence(f"GPRMC,{fields}")),
        max_size=20,
    )
)
def test_any_bytes_are_survived(chunks: list[bytes]) -> None:
    decoder = GpsDecoder()
    for data in chunks:
        events = whole(decoder, data)
        assert len(decoder._line) <= SENTENCE_BYTES_MAX
        assert all(abs(latitude) <= 90 and abs(longitude) <= 180 for latitude, longitude in positions(events))
