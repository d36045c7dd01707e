"""One body for the compiled unpacking and the plain one: data sheets, random bytes, garbage, cut input."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gateway.devices import _packets, packets
from gateway.devices.packets import BUFFER_BYTES_MAX, CYTON_BYTES, MUSE_BYTES

FUNCTIONS = ("find_packets", "read_packets", "channel_counts", "muse_counts", "little_values")
PLAIN = SimpleNamespace(**{name: getattr(packets, f"{name}_plain") for name in FUNCTIONS})
COMPILED = _packets

VECTOR_A = bytes.fromhex("a004 000001 ffffff 7fffff 800000 0003e8 fffc18 123456 000000 0010ffe01f40 c0")
COUNTS_A = [1, -1, 2**23 - 1, -(2**23), 1000, -1000, 0x123456, 0]


@pytest.fixture(params=["plain", "compiled"])
def kernels(request: pytest.FixtureRequest) -> Any:
    return PLAIN if request.param == "plain" else COMPILED


def packet(counter: int, stop: int = 0xC0) -> bytes:
    """A packet whose content is no start byte."""
    return bytes([0xA0, counter % 256, *range(24), *range(6), stop])


def every(*values: int) -> NDArray[np.int32]:
    return np.array(values, dtype=np.int32)


def values_of_24_bits(frame: bytes) -> list[int]:
    return [int.from_bytes(frame[at : at + 3], "big", signed=True) for at in range(2, 26, 3)]


def test_the_compiled_one_runs_where_it_is_built() -> None:
    assert packets.IMPLEMENTATION == "compiled"
    for name in FUNCTIONS:
        assert getattr(packets, name) is getattr(COMPILED, name)


def test_packets_are_found_between_garbage(kernels: Any) -> None:
    buffer = b"\x01\xa0\xc0" + packet(1) + b"\xa0\xa0" + packet(2) + packet(3) + b"stray" + packet(4)[:20]
    starts, rest = kernels.find_packets(buffer)
    # The stray bytes behind packet 3 are no start byte: it is not accepted.
    assert starts.tolist() == [3, 38]
    assert starts.dtype == np.int32
    assert rest == len(buffer) - 20
    assert kernels.find_packets(packet(1) + packet(2))[0].tolist() == [0, 33]


@pytest.mark.parametrize("stop", range(256))
def test_only_known_stop_bytes_end_a_packet(kernels: Any, stop: int) -> None:
    starts, rest = kernels.find_packets(packet(1, stop))
    assert starts.tolist() == ([0] if 0xC0 <= stop <= 0xC6 else [])
    # The candidate failed; a stop byte that is a start byte may begin the next packet.
    assert rest == (32 if stop == 0xA0 else 33)


@pytest.mark.parametrize("size", range(CYTON_BYTES + 1))
def test_a_cut_packet_is_the_rest(kernels: Any, size: int) -> None:
    starts, rest = kernels.find_packets(packet(7) + packet(8)[:size])
    assert starts.tolist() == ([0] if size < CYTON_BYTES else [0, 33])
    assert rest == (33 if size < CYTON_BYTES else 66)


def test_start_bytes_alone_are_no_packets_and_leave_less_than_one(kernels: Any) -> None:
    starts, rest = kernels.find_packets(b"\xa0" * 1000)
    assert starts.shape == (0,)
    assert rest == 1000 - CYTON_BYTES + 1
    assert kernels.find_packets(b"")[1] == 0


def test_the_vector_of_the_data_sheet(kernels: Any) -> None:
    counts, counters, stops, lost = kernels.read_packets(VECTOR_A, every(0))
    assert counts.tolist() == [[value] for value in COUNTS_A]
    assert (counts.dtype, counters, stops, lost) == (np.int32, b"\x04", b"\xc0", 0)
    assert kernels.channel_counts(VECTOR_A).tolist() == counts.tolist()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 31, 127, 128, 129, 300])
def test_counts_of_any_number_of_packets_in_both_orders(kernels: Any, count: int) -> None:
    rng = np.random.default_rng(count)
    data = rng.bytes(count * CYTON_BYTES + 10)
    starts = (np.arange(count) * CYTON_BYTES + rng.integers(0, 11, count)).astype(np.int32)
    expected = [values_of_24_bits(data[start : start + CYTON_BYTES]) for start in starts]
    by_sample, counters, stops, _ = kernels.read_packets(data, starts, sample_major=True)
    by_channel, *_ = kernels.read_packets(data, starts)
    assert by_sample.tolist() == expected
    assert by_channel.T.tolist() == expected
    assert by_sample.flags.c_contiguous
    assert by_channel.flags.c_contiguous
    assert counters == bytes(data[start + 1] for start in starts)
    assert stops == bytes(data[start + 32] for start in starts)
    whole = data[: count * CYTON_BYTES]
    expected = [values_of_24_bits(whole[at : at + CYTON_BYTES]) for at in range(0, len(whole), CYTON_BYTES)]
    assert kernels.channel_counts(whole).T.tolist() == expected


@pytest.mark.parametrize(
    ("counters", "expected", "lost"),
    [
        ([5, 6, 7], -1, 0),
        ([5, 6, 7], 5, 0),
        ([5, 6, 7], 3, 2),
        ([254, 255, 0, 1], 254, 0),
        ([254, 1], 254, 2),
        ([5, 5], 5, 255),
        ([0], 255, 1),
        ([0], 0, 0),
        ([0, 2, 4, 6, 9], 0, 5),
        ([], 17, 0),
    ],
)
def test_lost_packets_are_counted(kernels: Any, counters: list[int], expected: int, lost: int) -> None:
    data = b"".join(map(packet, counters))
    starts = np.arange(len(counters), dtype=np.int32) * CYTON_BYTES
    counts, read, _, found = kernels.read_packets(data, starts, expected)
    assert found == lost
    assert read == bytes(counters)
    assert counts.shape == (8, len(counters))


@pytest.mark.parametrize("starts", [every(-1), every(0, 1), every(2**31 - 1), every(-(2**31))])
def test_packets_outside_of_the_buffer_are_refused(kernels: Any, starts: NDArray[np.int32]) -> None:
    with pytest.raises(ValueError, match="begins"):
        kernels.read_packets(VECTOR_A, starts)


def test_what_does_not_fit_is_refused(kernels: Any) -> None:
    for expected in (-2, 256):
        with pytest.raises(ValueError, match="counter"):
            kernels.read_packets(VECTOR_A, every(0), expected)
    for starts in (np.zeros(1), np.zeros((1, 1), dtype=np.int32), np.zeros(1, dtype=np.int64)):
        with pytest.raises(ValueError, match=r"\w"):
            kernels.read_packets(VECTOR_A, starts)
    with pytest.raises(ValueError, match="no whole number of packets"):
        kernels.channel_counts(VECTOR_A[:-1])
    with pytest.raises(ValueError, match="no whole number of packets"):
        kernels.muse_counts(bytes(MUSE_BYTES + 1))
    for bits in (0, -1, 25):
        with pytest.raises(ValueError, match="bits"):
            kernels.little_values(bytes(100), bits)
    with pytest.raises(ValueError, match="no whole number of values"):
        kernels.little_values(bytes(3), 14)
    for read in (kernels.find_packets, kernels.channel_counts, kernels.muse_counts):
        with pytest.raises(ValueError, match="at once"):
            read(bytes(BUFFER_BYTES_MAX + 1))


@pytest.mark.parametrize("count", range(5))
def test_muse_values_against_whole_numbers(kernels: Any, count: int) -> None:
    data = np.random.default_rng(count).bytes(MUSE_BYTES * count)
    counts = kernels.muse_counts(data)
    assert counts.shape == (count, 12)
    assert counts.dtype == np.int32
    for k in range(count):
        payload = int.from_bytes(data[MUSE_BYTES * k + 2 : MUSE_BYTES * (k + 1)], "big")
        assert counts[k].tolist() == [(payload >> 12 * place & 0xFFF) - 2048 for place in reversed(range(12))]


@pytest.mark.parametrize("bits", range(1, 25))
def test_little_values_against_whole_numbers(kernels: Any, bits: int) -> None:
    data = np.random.default_rng(bits).bytes(5 * bits)
    whole = int.from_bytes(data, "little")
    values = kernels.little_values(data, bits)
    assert values.dtype == np.int32
    assert values.tolist() == [whole >> bits * place & (1 << bits) - 1 for place in range(40)]
    assert kernels.little_values(b"", bits).shape == (0,)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.binary(max_size=50)
        | st.integers(0, 255).map(packet)
        | st.just(b"\xa0")
        | st.tuples(st.integers(0, 255), st.integers(0, 32)).map(lambda cut: packet(cut[0])[: cut[1]]),
        max_size=25,
    ),
    st.integers(-1, 255),
    st.booleans(),
)
def test_both_read_the_same_from_any_bytes(pieces: list[bytes], expected: int, sample_major: bool) -> None:
    buffer = b"".join(pieces)
    starts, rest = COMPILED.find_packets(buffer)
    starts_plain, rest_plain = PLAIN.find_packets(buffer)
    assert starts.tolist() == starts_plain.tolist()
    assert rest == rest_plain
    ours = COMPILED.read_packets(buffer, starts, expected, sample_major)
    plain = PLAIN.read_packets(buffer, starts, expected, sample_major)
    assert ours[0].tolist() == plain[0].tolist()
    assert ours[1:] == plain[1:]


def test_both_read_the_same_from_much() -> None:
    data = np.random.default_rng(4).bytes(CYTON_BYTES * MUSE_BYTES * 21 * 10)
    assert (COMPILED.channel_counts(data) == PLAIN.channel_counts(data)).all()
    assert (COMPILED.muse_counts(data) == PLAIN.muse_counts(data)).all()
    for bits in (14, 20):
        assert (COMPILED.little_values(data, bits) == PLAIN.little_values(data, bits)).all()
