"""The Cyton's packet of 33 bytes: finding it in a stream, its eight channels, its auxiliary bytes, its units.

Source: OpenBCI documentation, Cyton data format; OpenBCI_Cyton_Library `OpenBCI_32bit_Library.cpp`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PACKETS_PER_S = 250
"""What the radio sends, with and without a Daisy."""
CHANNELS_PER_PACKET = 8
COUNTER_PERIOD = 256
"""The sample number is one byte."""

PACKET_BYTES = 33
PACKET_START = 0xA0
STOP_BYTES = frozenset(range(0xC0, 0xC7))
STOP_ACCELERATION = 0xC0
STOP_RAW = 0xC1

FULL_SCALE = (-(2**23), 2**23 - 1)
"""Of the ADS1299, in counts."""
GAINS = (1, 2, 4, 6, 8, 12, 24)
"""Gains of the ADS1299, in the order of the digit G of the command `x C P G I B S2 S1 X`."""
DEFAULT_GAIN = 24
"""The gain of every channel after a reset (`v`)."""
ACCELERATION_G_PER_COUNT = 0.002 / 16


def microvolts_per_count(gain: int) -> float:
    """Microvolts of one count at this gain: 4.5 V reference, 24 bit (OpenBCI documentation, Cyton data format)."""
    return 4.5e6 / gain / (2**23 - 1)


@dataclass(frozen=True, slots=True)
class Auxiliary:
    """The six bytes after the channels, whose meaning the stop byte tells. None: not in this packet."""

    acceleration: tuple[int | None, int | None, int | None] | None = None
    """X, Y, Z in counts of `ACCELERATION_G_PER_COUNT`; time-stamped packets carry one axis at a time."""
    words: tuple[int, int, int] | None = None
    """Analog or digital inputs, raw (stop byte C1)."""
    board_time_ms: int | None = None


def auxiliary(packet: bytes) -> Auxiliary:
    """Decode bytes 26 to 31 of one packet of 33 bytes."""
    stop = packet[32]
    words: tuple[int, int, int] = struct.unpack(">3h", packet[26:32])
    if stop == STOP_ACCELERATION:
        # 25 Hz: the packets in between carry zeros, which are not a measurement.
        return Auxiliary(acceleration=words if any(words) else None)
    if stop == STOP_RAW:
        return Auxiliary(words=words)
    if stop in (0xC3, 0xC4):
        axes: list[int | None] = [None, None, None]
        axis = packet[1] % 10 - 7
        if axis >= 0:
            axes[axis] = words[0]
        x, y, z = axes
        board_time_ms = int.from_bytes(packet[28:32], "big")
        return Auxiliary((x, y, z) if axis >= 0 else None, board_time_ms=board_time_ms)
    if stop in (0xC5, 0xC6):
        return Auxiliary(board_time_ms=int.from_bytes(packet[28:32], "big"))
    return Auxiliary()


def channel_counts(packets: Sequence[bytes]) -> NDArray[np.int32]:
    """int32 (8, n): the 24-bit big-endian two's complement values of n packets."""
    frames = np.frombuffer(b"".join(packets), dtype=np.uint8).reshape(-1, PACKET_BYTES)
    octets = frames[:, 2:26].reshape(-1, CHANNELS_PER_PACKET, 3).transpose(2, 1, 0).astype(np.int32)
    counts: NDArray[np.int32] = octets[0] << 16 | octets[1] << 8 | octets[2]
    counts ^= 0x800000
    counts -= 0x800000
    return counts


class PacketCutter:
    """Finds packets in a byte stream. 0xA0 occurs inside data, so after a failed candidate it goes on by one byte."""

    def __init__(self) -> None:
        self.rest = b""
        """The beginning of a packet that is not whole yet: less than 33 bytes."""

    def cut(self, data: bytes) -> tuple[list[bytes], bytes]:
        """Whole packets, and the stray bytes that belong to none."""
        buffer = self.rest + data
        packets: list[bytes] = []
        stray = bytearray()
        at = 0
        self.rest = b""
        while True:
            start = buffer.find(PACKET_START, at)
            if start < 0:
                stray += buffer[at:]
                return packets, bytes(stray)
            stray += buffer[at:start]
            end = start + PACKET_BYTES
            if end > len(buffer):
                self.rest = buffer[start:]
                return packets, bytes(stray)
            if buffer[end - 1] in STOP_BYTES and (end == len(buffer) or buffer[end] == PACKET_START):
                packets.append(buffer[start:end])
                at = end
            else:
                stray.append(PACKET_START)
                at = start + 1
