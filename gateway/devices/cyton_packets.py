"""The Cyton's packet of 33 bytes: finding it in a stream, its eight channels, its auxiliary bytes, its units.

Source: OpenBCI documentation, Cyton data format; OpenBCI_Cyton_Library `OpenBCI_32bit_Library.cpp`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.devices import packets as bits
from gateway.devices.packets import Counts

PACKETS_PER_S = 250
"""What the radio sends, with and without a Daisy."""
CHANNELS_PER_PACKET = bits.CYTON_CHANNELS
COUNTER_PERIOD = bits.COUNTER_PERIOD
"""The sample number is one byte."""

PACKET_BYTES = bits.CYTON_BYTES
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


def channel_counts(packets: Sequence[bytes]) -> Counts:
    """int32 (8, n): the 24-bit big-endian two's complement values of n packets."""
    return bits.channel_counts(b"".join(packets))


class PacketCutter:
    """Finds packets in a byte stream. 0xA0 occurs inside data, so after a failed candidate it goes on by one byte."""

    def __init__(self) -> None:
        self.rest = b""
        """The beginning of a packet that is not whole yet: less than 33 bytes."""

    def cut(self, data: bytes) -> tuple[list[bytes], bytes]:
        """Whole packets, and the stray bytes that belong to none."""
        buffer = self.rest + data
        starts, rest = bits.find_packets(buffer)
        self.rest = buffer[rest:]
        packets: list[bytes] = []
        stray: list[bytes] = []
        at = 0
        for start in starts.tolist():
            stray.append(buffer[at:start])
            at = start + PACKET_BYTES
            packets.append(buffer[start:at])
        stray.append(buffer[at:rest])
        return packets, b"".join(stray)
