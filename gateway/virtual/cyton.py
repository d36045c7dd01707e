"""A virtual Cyton: board and dongle as a sans-IO model that plays a recording, with faults on demand.

Written from the firmware's side (OpenBCI_Cyton_Library 3.1.2, OpenBCI_Radios), without the decoder's code, so that
each checks the other. Knows no port and no clock: the time comes with each call.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gateway.samples import NS_PER_S
from gateway.virtual.recordings import CYTON_CHANNELS_MAX, CYTON_RATE_HZ, Recording, fit_to_cyton

PACKETS_PER_CALL_MAX = 10 * CYTON_RATE_HZ
"""After a long sleep of the host the rest follows with the next calls."""
COMMAND_TIMEOUT_NS = NS_PER_S
"""A command of several bytes must be whole within 1 s."""

RESET_TEXT = b"OpenBCI V3 8-16 channel\nOn Board ADS1299 Device ID: 0x3E\nLIS3DH Device ID: 0x33\nFirmware: v3.1.2\n$$$"
POLL_FAILURE = b"Failure: Communications timeout - Device failed to poll Host$$$"
OVERFLOW_FAILURE = b"Failure: Board RFduino buffer overflowed. Soft reset command sent to Board.$$$"

_GAINS = (1, 2, 4, 6, 8, 12, 24)
_COUNT_MIN, _COUNT_MAX = -(2**23), 2**23 - 1
_G_PER_COUNT = 0.002 / 16
_UPRIGHT_G = (0.0, 0.0, 1.0)
_CHANNELS_OFF = b"12345678"
_CHANNELS_ON = b"!@#$%^&*"
_COMMAND_BYTES = {ord("x"): 9, ord("z"): 5, ord("/"): 2, ord("~"): 2, ord("`"): 2}
_MODES = {b"0": "default", b"1": "debug", b"2": "analog", b"3": "digital", b"4": "marker", b"5": "BLE"}
_ACCELERATION_MODES = ("default", "debug", "BLE")


@dataclass(slots=True)
class Faults:
    """What goes wrong, by packet number: 0 is the first packet after a `b`. May be changed while it plays."""

    lost: set[int] = field(default_factory=set)
    """Never leave the board's radio."""
    duplicated: set[int] = field(default_factory=set)
    cut: dict[int, int] = field(default_factory=dict)
    """Packet number -> how many of its bytes arrive."""
    garbage: dict[int, bytes] = field(default_factory=dict)
    """Bytes that come before this packet."""
    silent: bool = False
    """Nothing arrives, though the board goes on sampling and counting."""
    board_off: bool = False
    """The dongle answers each command with `POLL_FAILURE`, and there is no stream."""


@dataclass(slots=True)
class _Channel:
    on: bool = True
    gain: int = 24
    input_type: int = 0
    bias: int = 1
    srb2: int = 1
    srb1: int = 0


class CytonFirmware:
    """Board and dongle. The recording begins at its first row with the first `b`, and goes on in real time from then.

    Times are CLOCK_MONOTONIC of whoever runs it, ns. Inputs that the recording does not have read 0.
    """

    def __init__(self, recording: Recording) -> None:
        """Any recording: it is fitted to the board (`fit_to_cyton`). It loops at its end."""
        self.recording = fit_to_cyton(recording)
        self.faults = Faults()
        self.first_row = 0
        """Row of the recording that packet 0 since the last `b` carries."""
        self._channels = [_Channel() for _ in range(CYTON_CHANNELS_MAX)]
        self._mode = "default"
        self._played_since_ns: int | None = None
        self._stream_since_ns: int | None = None
        self._next_packet = 0
        self._command = bytearray()
        self._command_since_ns = 0
        self._said = bytearray()
        self._counts = self._digitised()
        self._acceleration = self._digitised_acceleration()

    @property
    def streaming(self) -> bool:
        """Between `b` and `s`."""
        return self._stream_since_ns is not None

    @property
    def packets_played(self) -> int:
        """Packets since the last `b` whose time has come, those that a fault swallowed counted."""
        return self._next_packet

    def counts_of(self, packet_number: int) -> NDArray[np.int32]:
        """int32 (8,): what the packet with this number since the last `b` carries."""
        counts: NDArray[np.int32] = self._counts[(self.first_row + packet_number) % len(self._counts)]
        return counts

    def receive(self, data: bytes, now_ns: int) -> bytes:
        """Take command bytes from the host; give back what the board or the dongle says to them."""
        for byte in data:
            self._take(byte, now_ns)
        said = bytes(self._said)
        self._said.clear()
        return said

    def fail(self, text: bytes = OVERFLOW_FAILURE) -> bytes:
        """The radio breaks down: the stream ends, and the dongle says this."""
        self._stream_since_ns = None
        return text

    def packets_until(self, now_ns: int) -> list[bytes]:
        """What arrives at the host of the packets due by now: packet k at start + k / 250 s. Each is whole bytes."""
        if self.faults.board_off:
            self._stream_since_ns = None
        if self._stream_since_ns is None:
            return []
        due = (now_ns - self._stream_since_ns) * CYTON_RATE_HZ // NS_PER_S + 1
        due = min(due, self._next_packet + PACKETS_PER_CALL_MAX)
        arrived = [self._arriving(number) for number in range(self._next_packet, due)]
        self._next_packet = max(due, self._next_packet)
        return [data for data in arrived if data]

    def _arriving(self, number: int) -> bytes:
        faults = self.faults
        if faults.silent:
            return b""
        before = faults.garbage.get(number, b"")
        if number in faults.lost:
            return before
        packet = self._packet(number)
        if number in faults.cut:
            packet = packet[: faults.cut[number]]
        return before + packet * (2 if number in faults.duplicated else 1)

    def _packet(self, number: int) -> bytes:
        row = (self.first_row + number) % len(self._counts)
        stop = 0xC0 if self._mode in _ACCELERATION_MODES else 0xC1
        # The LIS3DH gives a value with every tenth sample, 25 Hz; between them the bytes are zero.
        moved = stop == 0xC0 and number % 256 % 10 == 7
        auxiliary = self._acceleration[row] if moved else (0, 0, 0)
        channels = (self._counts[row].astype(">i4").view(np.uint8).reshape(-1, 4)[:, 1:]).tobytes()
        return b"".join((bytes((0xA0, number % 256)), channels, struct.pack(">3h", *auxiliary), bytes((stop,))))

    def _take(self, byte: int, now_ns: int) -> None:
        if self._command and now_ns - self._command_since_ns > COMMAND_TIMEOUT_NS:
            self._command.clear()
            self._say("Timeout processing multi byte message - please send all commands at once as of v2")
        if not self._command:
            self._command_since_ns = now_ns
        self._command.append(byte)
        if len(self._command) < _COMMAND_BYTES.get(self._command[0], 1):
            return
        command = bytes(self._command)
        self._command.clear()
        if self.faults.board_off:
            self._said += POLL_FAILURE
            return
        self._obey(command, now_ns)

    def _obey(self, command: bytes, now_ns: int) -> None:
        name, argument = command[:1], command[1:]
        plain: dict[bytes, Callable[[], None]] = {
            b"s": self._stop,
            b"v": self._reset,
            b"V": lambda: self._say("v3.1.2"),
            b"?": lambda: self._say(self._registers()),
            b"d": self._restore_defaults,
            b"D": lambda: self._say("060110"),
        }
        if name in plain:
            plain[name]()
        elif name == b"b":
            self._begin(now_ns)
        elif name in (b"x", b"/"):
            (self._set_channel if name == b"x" else self._set_mode)(argument)
        elif command[0] in _CHANNELS_OFF or command[0] in _CHANNELS_ON:
            on = command[0] in _CHANNELS_ON
            self._channels[(_CHANNELS_ON if on else _CHANNELS_OFF).index(command[0])].on = on
            self._counts = self._digitised()
        # Everything else the firmware ignores, too.

    def _say(self, text: str) -> None:
        """A text reply; while it streams the board gives none."""
        if not self.streaming:
            self._said += text.encode("ascii") + b"$$$"

    def _begin(self, now_ns: int) -> None:
        if self._stream_since_ns is not None:
            return
        if self._played_since_ns is None:
            self._played_since_ns = now_ns
        rows = round((now_ns - self._played_since_ns) * CYTON_RATE_HZ / NS_PER_S)
        self.first_row = rows % len(self._counts)
        self._stream_since_ns = now_ns
        self._next_packet = 0

    def _stop(self) -> None:
        self._stream_since_ns = None

    def _reset(self) -> None:
        self._stream_since_ns = None
        self._mode = "default"
        self._channels = [_Channel() for _ in range(CYTON_CHANNELS_MAX)]
        self._counts = self._digitised()
        self._said += RESET_TEXT

    def _restore_defaults(self) -> None:
        self._channels = [_Channel() for _ in range(CYTON_CHANNELS_MAX)]
        self._counts = self._digitised()
        self._say("updating channel settings to default")

    def _set_channel(self, argument: bytes) -> None:
        """`x C P G I B S2 S1 X`."""
        digits, end = argument[:-1].decode("latin-1"), argument[-1:]
        if end != b"X":
            self._say("Failure: Err: 9th char not X")
            return
        limits = "81" + "67" + "111"
        if not all("0" <= digit <= limit for digit, limit in zip(digits, limits, strict=True)) or digits[0] == "0":
            self._say("Failure: Err: invalid value in channel settings")
            return
        number, power_down, gain, input_type, bias, srb2, srb1 = (int(digit) for digit in digits)
        self._channels[number - 1] = _Channel(not power_down, _GAINS[gain], input_type, bias, srb2, srb1)
        self._counts = self._digitised()
        self._say(f"Success: Channel set for {number}")

    def _set_mode(self, argument: bytes) -> None:
        if argument != b"/":
            if argument not in _MODES:
                self._say("Failure: board mode value out of bounds")
                return
            self._mode = _MODES[argument]
        self._say(f"Success: {self._mode}")

    def _registers(self) -> str:
        """The register dump: the identity and the eight CHnSET of the ADS1299 (data sheet, 9.6.1)."""
        lines = ["Board ADS Registers", "ADS_ID, 00, 3E"]
        for number, channel in enumerate(self._channels, start=1):
            value = (not channel.on) << 7 | _GAINS.index(channel.gain) << 4 | channel.srb2 << 3 | channel.input_type
            lines.append(f"CH{number}SET, {number + 4:02X}, {value:02X}")
        return "\n".join([*lines, "LIS3DH Registers", "0x0F, 33"]) + "\n"

    def _digitised(self) -> NDArray[np.int32]:
        """int32 (rows, 8): the recording in counts of the channels' gains, saturated at the rails."""
        uv = self.recording.uv
        counts = np.zeros((len(uv), CYTON_CHANNELS_MAX), dtype=np.int32)
        for column in range(uv.shape[1]):
            channel = self._channels[column]
            if channel.on and channel.input_type == 0:
                scaled = np.rint(uv[:, column] * (channel.gain * _COUNT_MAX / 4.5e6))
                counts[:, column] = np.clip(scaled, _COUNT_MIN, _COUNT_MAX)
        return counts

    def _digitised_acceleration(self) -> NDArray[np.int16]:
        g = self.recording.acceleration_g
        if g is None:
            g = np.broadcast_to(np.array(_UPRIGHT_G), (len(self.recording), 3))
        return np.clip(np.rint(g / _G_PER_COUNT), -(2**15), 2**15 - 1).astype(np.int16)
