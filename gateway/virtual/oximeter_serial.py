"""Virtual pulse oximeters on serial lines: Nonin (data formats 2 and 7) and Contec CMS50 (both generations).

Models of the devices' side, written without the decoders' code, so that each checks the other. The same seed gives
the same pulse. They know no port and no clock: the time comes with each call.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from gateway.samples import NS_PER_S

FRAMES_PER_CALL_MAX = 750
"""After a long sleep of the host the rest follows with the next calls."""

_COMMAND_BYTES_MAX = 64


@dataclass(slots=True)
class Faults:
    """What goes wrong, by frame number: 0 is the first frame after power-on. May be changed while it plays."""

    lost: set[int] = field(default_factory=set)
    duplicated: set[int] = field(default_factory=set)
    damaged: set[int] = field(default_factory=set)
    """One bit of the last byte is turned round; what has no checksum does not show it."""
    cut: dict[int, int] = field(default_factory=dict)
    """Frame number -> how many of its bytes arrive."""
    garbage: dict[int, bytes] = field(default_factory=dict)
    """Bytes that come before this frame."""
    silent: bool = False
    """Nothing arrives, though the device goes on measuring."""
    no_finger: bool = False
    """No pulse is found: the values are the device's codes for none."""
    unplugged_sensor: bool = False


@dataclass(frozen=True, slots=True)
class Beat:
    """What an oximeter knows at an instant."""

    heart_rate: int
    spo2: int
    pleth: float
    """0 to 1."""
    is_systole: bool


class Pulse:
    """A finger at rest: heart rate of 58 to 92 /min that breathes, SpO2 of 95 to 99 %, a pulse wave with its notch."""

    def __init__(self, seed: int, frames_per_s: int) -> None:
        self._random = random.Random(seed)
        self._frames_per_s = frames_per_s
        self._resting = self._random.uniform(64, 84)
        self._spo2 = self._random.uniform(96, 98.4)
        self._phase = self._random.random()
        self._frame = 0

    def next(self) -> Beat:
        """The instant of the next frame."""
        time_s = self._frame / self._frames_per_s
        self._frame += 1
        heart_rate = self._resting + 4 * math.sin(2 * math.pi * 0.25 * time_s) + 2 * math.sin(2 * math.pi * time_s / 97)
        self._phase = (self._phase + heart_rate / 60 / self._frames_per_s) % 1.0
        systolic = math.exp(-(((self._phase - 0.20) / 0.09) ** 2))
        dicrotic = 0.35 * math.exp(-(((self._phase - 0.52) / 0.11) ** 2))
        pleth = min(1.0, 0.08 + 0.85 * (systolic + dicrotic) + self._random.uniform(0, 0.01))
        spo2 = self._spo2 + 0.6 * math.sin(2 * math.pi * time_s / 41)
        return Beat(round(heart_rate), round(spo2), pleth, 0.12 < self._phase < 0.3)


class OximeterFirmware:
    """An oximeter that sends frames at a fixed rate from its first moment on, or from a command on."""

    frames_per_s = 60

    def __init__(self, seed: int = 1) -> None:
        self.faults = Faults()
        self._pulse = Pulse(seed, self.frames_per_s)
        self._since_ns: int | None = None
        self._next_frame = 0
        self._command = b""
        self._on = True

    @property
    def streaming(self) -> bool:
        """Whether frames come by themselves."""
        return self._on

    @property
    def frames_played(self) -> int:
        """Frames since the start whose time has come, those that a fault swallowed counted."""
        return self._next_frame

    def receive(self, data: bytes, now_ns: int) -> bytes:
        """Take command bytes from the host; give the answer."""
        self._command += data
        said = b""
        while command := self._first_command():
            said += self._obey(command, now_ns)
        self._command = self._command[-_COMMAND_BYTES_MAX:]
        return said

    def packets_until(self, now_ns: int) -> list[bytes]:
        """What arrives at the host of the frames due by now. Each is whole bytes."""
        if not self._on:
            return []
        if self._since_ns is None:
            self._since_ns = now_ns
        due = (now_ns - self._since_ns) * self.frames_per_s // NS_PER_S + 1
        due = min(due, self._next_frame + FRAMES_PER_CALL_MAX)
        arrived = [self._arriving(number) for number in range(self._next_frame, due)]
        self._next_frame = max(due, self._next_frame)
        return [data for data in arrived if data]

    def _arriving(self, number: int) -> bytes:
        faults = self.faults
        frame = self._frame(number, self._pulse.next())
        if faults.silent:
            return b""
        before = faults.garbage.get(number, b"")
        if number in faults.lost:
            return before
        if number in faults.damaged:
            frame = frame[:-1] + bytes((frame[-1] ^ 0x01,))
        frame = frame[: faults.cut.get(number, len(frame))]
        return before + frame * (2 if number in faults.duplicated else 1)

    def _begin(self) -> None:
        self._on, self._since_ns, self._next_frame = True, None, 0

    def _first_command(self) -> bytes:
        """Take the first whole command out of `_command`; empty: there is none."""
        self._command = b""
        return b""

    def _obey(self, command: bytes, now_ns: int) -> bytes:
        raise NotImplementedError

    def _frame(self, number: int, beat: Beat) -> bytes:
        raise NotImplementedError


class NoninFirmware(OximeterFirmware):
    """A Nonin in data format 2 (talks unasked) or 7 (talks when it was selected)."""

    frames_per_s = 75

    def __init__(
        self, data_format: int = 2, *, seed: int = 1, select: bytes = bytes.fromhex("027004020761de03")
    ) -> None:
        """`select`: the command of this model that selects data format 7."""
        super().__init__(seed)
        self._format = data_format
        self._select = select
        self._on = data_format == 2
        self._beat: Beat | None = None
        """Of the packet's first frame: its values do not change within it."""

    def _first_command(self) -> bytes:
        start, end = self._command.find(b"\x02"), self._command.find(b"\x03")
        if self._format == 2 or start < 0:
            self._command = b""
        if end < start or start < 0:
            return b""
        command, self._command = self._command[start : end + 1], self._command[end + 1 :]
        return command

    def _obey(self, command: bytes, now_ns: int) -> bytes:  # noqa: ARG002 - no answer depends on the time
        if command != self._select:
            return b"\x15"
        self._begin()
        return b"\x06"

    def _frame(self, number: int, beat: Beat) -> bytes:
        place = number % 25
        if place == 0 or self._beat is None:
            self._beat = beat
        off = self.faults.no_finger or self.faults.unplugged_sensor
        status = 0x80 | (place == 0) | (beat.is_systole and not off) << 2
        status |= self.faults.unplugged_sensor << 6 | off << 4
        heart_rate, spo2 = (511, 127) if off else (self._beat.heart_rate, self._beat.spo2)
        high, low = heart_rate >> 7, heart_rate & 0x7F
        values = {0: high, 1: low, 2: spo2, 3: 48, 8: spo2, 9: spo2, 10: spo2, 13: high, 14: low}
        values |= {15: spo2, 16: spo2, 19: high, 20: low, 21: high, 22: low}
        pleth = 0.0 if off else beat.pleth
        if self._format == 2:
            body = bytes((0x01, status, round(pleth * 255), values.get(place, 0)))
        else:
            body = bytes((status, *round(pleth * 0xFFFF).to_bytes(2, "big"), values.get(place, 0)))
        return body + bytes((sum(body) % 256,))


class ContecOldFirmware(OximeterFirmware):
    """CMS50D+ before firmware 4.6: five bytes, bit 7 on the first, unasked."""

    def _obey(self, command: bytes, now_ns: int) -> bytes:  # noqa: ARG002 - it takes no commands
        return b""

    def _frame(self, number: int, beat: Beat) -> bytes:  # noqa: ARG002 - nothing in it counts
        off, broken = self.faults.no_finger, self.faults.unplugged_sensor
        heart_rate, spo2 = (255, 127) if off or broken else (beat.heart_rate, beat.spo2)
        pleth = 0.0 if off or broken else beat.pleth
        first = 0x80 | (0 if off else 7) | off << 4 | beat.is_systole << 6
        third = round(pleth * 15) | broken << 4 | off << 5 | (heart_rate >> 7) << 6
        return bytes((first, round(pleth * 127), third, heart_rate & 0x7F, spo2))


class ContecFirmware(OximeterFirmware):
    """CMS50D+ from firmware 4.6 on, CMS50E, CMS50EW: talks on command, as long as it is kept alive."""

    KEEP_ALIVE_NS = 10 * NS_PER_S
    """Without a keep-alive for so long it says goodbye; the hosts send one every 5 s."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__(seed)
        self._on = False
        self._kept_alive_ns = 0
        self.keep_alives = 0

    def packets_until(self, now_ns: int) -> list[bytes]:
        """See `OximeterFirmware`; the last packet of a session is its goodbye."""
        if self._on and now_ns - self._kept_alive_ns > self.KEEP_ALIVE_NS:
            self._on = False
            return [self._packet(0x0D, (0x02,))]
        return super().packets_until(now_ns)

    def _first_command(self) -> bytes:
        start = self._command.find(b"\x7d")
        self._command = self._command[start:] if start >= 0 else b""
        if len(self._command) < 9:
            return b""
        command, self._command = self._command[:9], self._command[9:]
        return command

    def _obey(self, command: bytes, now_ns: int) -> bytes:
        code = command[2] & 0x7F | (command[1] & 1) << 7
        if code == 0xA1:
            self._begin()
            self._kept_alive_ns = now_ns
        elif code == 0xA2:
            self._on = False
        elif code == 0xAF:
            self.keep_alives += 1
            self._kept_alive_ns = now_ns
        elif code == 0xA7:
            return self._packet(0x0C, (0x00,))
        return b""

    def _frame(self, number: int, beat: Beat) -> bytes:  # noqa: ARG002 - nothing in it counts
        off, broken = self.faults.no_finger, self.faults.unplugged_sensor
        none = off or broken
        heart_rate, spo2, index = (0xFF, 0x7F, 0xFFFF) if none else (beat.heart_rate, beat.spo2, 230)
        pleth = 0.0 if none else beat.pleth
        status = (0 if none else 7) | off << 4 | beat.is_systole << 6 | broken << 7
        bar = round(pleth * 15) | (not none) << 4
        return self._packet(
            0x01, (status, round(pleth * 127) | off << 7, bar, heart_rate, spo2, index & 0xFF, index >> 8)
        )

    @staticmethod
    def _packet(kind: int, payload: tuple[int, ...]) -> bytes:
        high = 0x80
        for place, byte in enumerate(payload):
            high |= (byte >> 7) << place
        return bytes((kind, high, *(byte | 0x80 for byte in payload)))
