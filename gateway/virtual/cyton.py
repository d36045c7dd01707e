"""A virtual Cyton, with or without a Daisy: board and dongle as a sans-IO model that plays a recording, with faults.

Written from the firmware's side (OpenBCI_Cyton_Library 3.1.2, OpenBCI_Radios), without the decoder's code, so that
each checks the other. Knows no port and no clock: the time comes with each call.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from gateway.samples import NS_PER_S
from gateway.virtual.recordings import CYTON_CHANNELS_MAX, CYTON_RATE_HZ, Recording, fit_to_cyton

PACKETS_PER_CALL_MAX = 10 * CYTON_RATE_HZ
"""After a long sleep of the host the rest follows with the next calls."""
COMMAND_TIMEOUT_NS = NS_PER_S
"""A command of several bytes must be whole within 1 s."""

DAISY_CHANNELS_MAX = 2 * CYTON_CHANNELS_MAX
RESET_TEXT = b"OpenBCI V3 8-16 channel\nOn Board ADS1299 Device ID: 0x3E\nLIS3DH Device ID: 0x33\nFirmware: v3.1.2\n$$$"
DAISY_RESET_TEXT = RESET_TEXT.replace(b"LIS3DH", b"On Daisy ADS1299 Device ID: 0x3E\nLIS3DH")
POLL_FAILURE = b"Failure: Communications timeout - Device failed to poll Host$$$"
OVERFLOW_FAILURE = b"Failure: Board RFduino buffer overflowed. Soft reset command sent to Board.$$$"

_GAINS = (1, 2, 4, 6, 8, 12, 24)
_COUNT_MIN, _COUNT_MAX = -(2**23), 2**23 - 1
_G_PER_COUNT = 0.002 / 16
_UPRIGHT_G = (0.0, 0.0, 1.0)
_CHANNELS_OFF = b"12345678qwertyui"
_CHANNELS_ON = b"!@#$%^&*QWERTYUI"
_CHANNEL_LETTERS = "12345678QWERTYUI"
_TEST_CURRENT_A = 6e-9
_TEST_CURRENT_HZ = 31.25
"""2.048 MHz / 2^16 (ADS1299 data sheet, lead-off detection): called 31.2 Hz."""
_SERIES_OHM = 2200
_SKIN_OHM = 10_000
_COMMAND_BYTES = {ord("x"): 9, ord("z"): 5, ord("/"): 2, ord("~"): 2, ord("`"): 2}
_MODES = {b"0": "default", b"1": "debug", b"2": "analog", b"3": "digital", b"4": "marker", b"5": "BLE"}
_ACCELERATION_MODES = ("default", "debug", "BLE")


NO_ELECTRODES: Mapping[int, float] = MappingProxyType({})


def seeded_skin_ohm(seed: int) -> dict[int, float]:
    """Resistances of sixteen electrodes, some 2 to 60 kOhm as under gel: the same for the same seed."""
    ohm = np.exp(np.random.default_rng((seed, 31)).normal(np.log(_SKIN_OHM), 0.8, DAISY_CHANNELS_MAX))
    return {column: float(value) for column, value in enumerate(ohm)}


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
    test_current: bool = False


class CytonFirmware:
    """Board and dongle. The recording begins at its first row with the first `b`, and goes on in real time from then.

    Times are CLOCK_MONOTONIC of whoever runs it, ns. Inputs that the recording does not have read 0.
    """

    def __init__(
        self, recording: Recording, *, daisy: bool = False, skin_ohm: Mapping[int, float] = NO_ELECTRODES
    ) -> None:
        """Any recording: it is fitted to the board (`fit_to_cyton`). It loops at its end.

        `skin_ohm`: resistance of an electrode by its column in the recording, 10 kOhm where none is set.
        """
        self.has_daisy = daisy
        self.channel_count = DAISY_CHANNELS_MAX if daisy else CYTON_CHANNELS_MAX
        """8 or 16, as the commands `c` and `C` have it."""
        self.recording = fit_to_cyton(recording, self.channel_count)
        self.faults = Faults()
        self.first_row = 0
        """Row of the recording that packet 0 since the last `b` carries."""
        self.skin_ohm: dict[int, float] = dict(skin_ohm)
        self._channels = [_Channel() for _ in range(DAISY_CHANNELS_MAX)]
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
    def test_currents(self) -> list[int]:
        """Columns of the electrodes through which a test current flows."""
        return [column for column, channel in enumerate(self._channels) if channel.test_current]

    @property
    def packets_played(self) -> int:
        """Packets since the last `b` whose time has come, those that a fault swallowed counted."""
        return self._next_packet

    def counts_of(self, packet_number: int) -> NDArray[np.int32]:
        """int32 (8,): what the packet with this number since the last `b` carries.

        With a Daisy the mean of this sample and the one before, of the Daisy in even packets, of the board in odd ones.
        """
        row = (self.first_row + packet_number) % len(self._counts)
        counts: NDArray[np.int32] = self._counts[row]
        if self.channel_count == CYTON_CHANNELS_MAX:
            return counts[:CYTON_CHANNELS_MAX]
        # There is no sample before the start: the first packet is the mean with a zero, and worth nothing.
        before = self._counts[row - 1] if packet_number else np.zeros_like(counts)
        mean = ((counts.astype(np.int64) + before) // 2).astype(np.int32)
        return mean[:CYTON_CHANNELS_MAX] if packet_number % 2 else mean[CYTON_CHANNELS_MAX:]

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
        channels = (self.counts_of(number).astype(">i4").view(np.uint8).reshape(-1, 4)[:, 1:]).tobytes()
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
            b"c": lambda: self._use_channels(CYTON_CHANNELS_MAX),
            b"C": lambda: self._use_channels(DAISY_CHANNELS_MAX),
        }
        settings: dict[bytes, Callable[[bytes], None]] = {
            b"x": self._set_channel,
            b"z": self._set_test_current,
            b"/": self._set_mode,
        }
        if name in plain:
            plain[name]()
        elif name == b"b":
            self._begin(now_ns)
        elif name in settings:
            settings[name](argument)
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
        self.channel_count = DAISY_CHANNELS_MAX if self.has_daisy else CYTON_CHANNELS_MAX
        self._channels = [_Channel() for _ in range(DAISY_CHANNELS_MAX)]
        self._counts = self._digitised()
        self._said += DAISY_RESET_TEXT if self.has_daisy else RESET_TEXT

    def _use_channels(self, count: int) -> None:
        """`c` and `C`, with the texts of the firmware, which says nothing where nothing changes."""
        attached = self.channel_count == DAISY_CHANNELS_MAX
        if count == CYTON_CHANNELS_MAX:
            if attached:
                self._say("daisy removed")
        elif not self.has_daisy:
            self._say("no daisy to attach!8")
            return
        else:
            self._say("16" if attached else "daisy attached16")
        self.channel_count = count

    def _restore_defaults(self) -> None:
        self._channels = [_Channel() for _ in range(DAISY_CHANNELS_MAX)]
        self._counts = self._digitised()
        self._say("updating channel settings to default")

    def _set_channel(self, argument: bytes) -> None:
        """`x C P G I B S2 S1 X`."""
        digits, end = argument[:-1].decode("latin-1"), argument[-1:]
        if end != b"X":
            self._say("Failure: Err: 9th char not X")
            return
        limits = "1" + "67" + "111"
        place = _CHANNEL_LETTERS.find(digits[0])
        sound = all("0" <= digit <= limit for digit, limit in zip(digits[1:], limits, strict=True))
        if not sound or not 0 <= place < self.channel_count:
            self._say("Failure: Err: invalid value in channel settings")
            return
        power_down, gain, input_type, bias, srb2, srb1 = (int(digit) for digit in digits[1:])
        self._channels[place] = _Channel(not power_down, _GAINS[gain], input_type, bias, srb2, srb1)
        self._counts = self._digitised()
        self._say(f"Success: Channel set for {place + 1}")

    def _set_test_current(self, argument: bytes) -> None:
        """`z C P N Z`."""
        letters, end = argument[:-1].decode("latin-1"), argument[-1:]
        place = _CHANNEL_LETTERS.find(letters[0])
        if end != b"Z" or not 0 <= place < self.channel_count or not set(letters[1:]) <= {"0", "1"}:
            self._say("Failure: Err: invalid value in lead off settings")
            return
        self._channels[place].test_current = "1" in letters[1:]
        self._counts = self._digitised()
        self._say(f"Success: Lead off set for {place + 1}")

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
        for number, channel in enumerate(self._channels[:CYTON_CHANNELS_MAX], start=1):
            value = (not channel.on) << 7 | _GAINS.index(channel.gain) << 4 | channel.srb2 << 3 | channel.input_type
            lines.append(f"CH{number}SET, {number + 4:02X}, {value:02X}")
        return "\n".join([*lines, "LIS3DH Registers", "0x0F, 33"]) + "\n"

    def _digitised(self) -> NDArray[np.int32]:
        """int32 (rows, 16): the recording in counts of the channels' gains, saturated at the rails."""
        uv = self.recording.uv
        counts = np.zeros((len(uv), DAISY_CHANNELS_MAX), dtype=np.int32)
        tone = np.sin(2 * np.pi * _TEST_CURRENT_HZ / CYTON_RATE_HZ * np.arange(len(uv)))
        for column in range(uv.shape[1]):
            channel = self._channels[column]
            if channel.on and channel.input_type == 0:
                ohm = _SERIES_OHM + self.skin_ohm.get(column, _SKIN_OHM)
                driven = tone * (_TEST_CURRENT_A * ohm * 1e6) if channel.test_current else 0.0
                scaled = np.rint((uv[:, column] + driven) * (channel.gain * _COUNT_MAX / 4.5e6))
                counts[:, column] = np.clip(scaled, _COUNT_MIN, _COUNT_MAX)
        return counts

    def _digitised_acceleration(self) -> NDArray[np.int16]:
        g = self.recording.acceleration_g
        if g is None:
            g = np.broadcast_to(np.array(_UPRIGHT_G), (len(self.recording), 3))
        return np.clip(np.rint(g / _G_PER_COUNT), -(2**15), 2**15 - 1).astype(np.int16)
