"""Bits of device packets to counts: frames of the Cyton, 12-bit values of the Muse, packed values of the Athena.

Each function is compiled (ext/packets.pyx) where that was built; the plain one of the same name gives the same and is
its oracle. Knows no signal, no unit and no start sequence.
Sources: OpenBCI documentation, Cyton data format; muse-lsl `muse.py` and `athena.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gateway import kernels
from gateway.kernels import COMPILED

CYTON_BYTES = 33
CYTON_CHANNELS = 8
CYTON_START = 0xA0
CYTON_STOPS = frozenset(range(0xC0, 0xC7))
COUNTER_PERIOD = 256
MUSE_BYTES = 20
MUSE_SAMPLES = 12
MUSE_MIDDLE = 2048
VALUE_BITS_MAX = 24
"""Of `little_values`: no sensor has more."""
BUFFER_BYTES_MAX = 64 * 1024 * 1024
"""Most that one call takes: over two hours of a Cyton. Positions fit 32 bits."""

Counts = NDArray[np.int32]


class ReadPackets(Protocol):
    """The type of `read_packets`."""

    def __call__(
        self, buffer: bytes, starts: NDArray[np.int32], expected: int = -1, sample_major: bool = False
    ) -> tuple[Counts, bytes, bytes, int]:
        """See `read_packets`."""


def find_packets_plain(buffer: bytes) -> tuple[NDArray[np.int32], int]:
    """The same as `find_packets`, in Python."""
    _check_size(buffer)
    starts: list[int] = []
    at = _next_start(buffer, 0)
    while (end := at + CYTON_BYTES) <= len(buffer):
        if buffer[end - 1] in CYTON_STOPS and (end == len(buffer) or buffer[end] == CYTON_START):
            starts.append(at)
            at = end
        else:
            at = _next_start(buffer, at + 1)
    return np.array(starts, dtype=np.int32), at


def read_packets_plain(
    buffer: bytes, starts: NDArray[np.int32], expected: int = -1, sample_major: bool = False
) -> tuple[Counts, bytes, bytes, int]:
    """The same as `read_packets`, in numpy."""
    _check_size(buffer)
    if not -1 <= expected < COUNTER_PERIOD:
        raise ValueError(f"a counter of {expected} is expected, which has one byte")
    if starts.dtype != np.int32 or starts.ndim != 1:
        raise ValueError(f"starts are {starts.dtype} {starts.shape}, expected int32 (n,)")
    if ((starts < 0) | (starts > len(buffer) - CYTON_BYTES)).any():
        raise ValueError(f"a packet of {CYTON_BYTES} bytes begins outside of {len(buffer)} bytes")
    frames = np.frombuffer(buffer, dtype=np.uint8)[starts[:, np.newaxis] + np.arange(CYTON_BYTES)]
    counts = _values_of_24_bits(frames)
    counters = frames[:, 1].astype(np.int64)
    lost = np.diff(counters) - 1
    if expected >= 0:
        lost = np.concatenate((counters[:1] - expected, lost))
    return (
        counts if sample_major else np.ascontiguousarray(counts.T),
        frames[:, 1].tobytes(),
        frames[:, CYTON_BYTES - 1].tobytes(),
        int((lost % COUNTER_PERIOD).sum()),
    )


def channel_counts_plain(packets: bytes) -> Counts:
    """The same as `channel_counts`, in numpy."""
    _check_whole(packets, CYTON_BYTES)
    frames = np.frombuffer(packets, dtype=np.uint8).reshape(-1, CYTON_BYTES)
    return np.ascontiguousarray(_values_of_24_bits(frames).T)


def muse_counts_plain(packets: bytes) -> Counts:
    """The same as `muse_counts`, in numpy."""
    _check_whole(packets, MUSE_BYTES)
    payloads = np.frombuffer(packets, dtype=np.uint8).reshape(-1, MUSE_BYTES)[:, 2:]
    octets = payloads.reshape(-1, MUSE_SAMPLES // 2, 3).astype(np.int32)
    counts = np.empty((octets.shape[0], MUSE_SAMPLES), dtype=np.int32)
    counts[:, 0::2] = octets[..., 0] << 4 | octets[..., 1] >> 4
    counts[:, 1::2] = (octets[..., 1] & 0xF) << 8 | octets[..., 2]
    counts -= MUSE_MIDDLE
    return counts


def little_values_plain(data: bytes, bits: int) -> Counts:
    """The same as `little_values`, in numpy."""
    _check_size(data)
    if not 1 <= bits <= VALUE_BITS_MAX:
        raise ValueError(f"values of {bits} bits, expected 1 to {VALUE_BITS_MAX}")
    if len(data) * 8 % bits:
        raise ValueError(f"{len(data)} bytes are no whole number of values of {bits} bits")
    each = np.unpackbits(np.frombuffer(data, dtype=np.uint8), bitorder="little").reshape(-1, bits)
    return each.astype(np.int32) @ np.left_shift(np.int32(1), np.arange(bits, dtype=np.int32))


def _next_start(buffer: bytes, at: int) -> int:
    found = buffer.find(CYTON_START, at)
    return len(buffer) if found < 0 else found


def _values_of_24_bits(frames: NDArray[np.uint8]) -> Counts:
    octets = frames[:, 2:26].reshape(-1, CYTON_CHANNELS, 3).astype(np.int32)
    counts: Counts = octets[..., 0] << 16 | octets[..., 1] << 8 | octets[..., 2]
    counts ^= 0x800000
    counts -= 0x800000
    return counts


def _check_size(data: bytes) -> None:
    if len(data) > BUFFER_BYTES_MAX:
        raise ValueError(f"{len(data)} bytes at once, expected up to {BUFFER_BYTES_MAX}")


def _check_whole(data: bytes, packet_bytes: int) -> None:
    _check_size(data)
    if len(data) % packet_bytes:
        raise ValueError(f"{len(data)} bytes are no whole number of packets of {packet_bytes}")


find_packets: Callable[[bytes], tuple[NDArray[np.int32], int]]
"""Where the Cyton's packets begin in a buffer, int32 (n,), and where the rest does that may become one.

A packet has its start byte, a known stop byte, and behind it another start byte or the end of the buffer. A start byte
also occurs inside of data: after a candidate that is none, the search goes on one byte later. What lies between packets
is stray. The rest is shorter than a packet; it begins at the buffer's length where there is none.
Raises `ValueError` for more than `BUFFER_BYTES_MAX`.
"""
read_packets: ReadPackets
"""What is in the Cyton's packets that begin at `starts`: counts, counters, stop bytes, number of lost packets.

`starts`: int32 (n,), as from `find_packets`. `expected`: the counter that the first one should have; -1: any.
Counts: int32 (8, n), or (n, 8) where `sample_major` is set. Counters and stop bytes: n bytes each.
Lost: what the counters show missing before and between these packets; a multiple of 256 leaves no trace in them.
Raises `ValueError` for packets that are not wholly in the buffer.
"""
channel_counts: Callable[[bytes], Counts]
"""int32 (8, n): the counts of n packets of the Cyton, one right behind the other. Raises `ValueError`."""
muse_counts: Callable[[bytes], Counts]
"""int32 (n, 12): unsigned 12-bit values less their middle of 2048, from n packets of 20 bytes of the Muse's electrodes.

The first two bytes of each are its counter. Raises `ValueError`.
"""
little_values: Callable[[bytes, int], Counts]
"""int32 (n,): unsigned values of so many bits, least significant bit first, without gaps. Raises `ValueError`."""

IMPLEMENTATION, _compiled = kernels.choose({COMPILED: "gateway.devices._packets"})
"""Which implementation of these functions runs."""
if _compiled is None:
    find_packets = find_packets_plain
    read_packets = read_packets_plain
    channel_counts = channel_counts_plain
    muse_counts = muse_counts_plain
    little_values = little_values_plain
else:
    find_packets = _compiled.find_packets
    read_packets = _compiled.read_packets
    channel_counts = _compiled.channel_counts
    muse_counts = _compiled.muse_counts
    little_values = _compiled.little_values
