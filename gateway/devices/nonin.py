"""Decoders of Nonin oximeters: OEM III and Xpod in data format 2, WristOx2 3150 and Onyx II in data format 7.

Both send 75 frames of 5 bytes a second, 25 of which make a packet that begins with the SYNC bit. The frames have no
number: a packet with fewer than 25 has lost some, at the place of the damage or, where none is seen, at its end.
Source: Nonin OEM III Module specification; OpenICE `org.mdpnp.devices.nonin.pulseox`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from gateway.devices.base import Event, Facts, Missing, NoValue, Reading, Rejected, Samples, Send, SignalSpec, Streaming
from gateway.devices.lateness import HiddenLoss
from gateway.devices.oximetry import HEART_RATE, PLETH, PLETH_SCALES, PPG, SPO2
from gateway.errors import DeviceError
from gateway.links.base import Chunk
from gateway.samples import NS_PER_S, QUALITY, VITAL_SIGNS, Column

RATE_HZ = 75
FRAME_BYTES = 5
PACKET_FRAMES = 25
CONFIRM_NS = NS_PER_S
"""A Bluetooth serial line that stalled gives everything at once within this time; a real loss stays."""
HELD_SAMPLES_MAX = 1024
START_BYTES_MAX = 4096
"""Eleven seconds of the line: an oximeter in the right format is recognised after a third of one."""

SELECT_WRISTOX2 = bytes.fromhex("027004020761de03")
"""Data format 7, Bluetooth on at power-on, spot-check mode as it was delivered (options 0x61)."""
SELECT_ONYX = bytes.fromhex("027002020703")
ACK, NAK = 0x06, 0x15

NO_HEART_RATE = 511
NO_SPO2 = 127

_ALWAYS = 0x80
_DISCONNECTED = 0x40
_ARTIFACT = 0x20
_OUT_OF_TRACK = 0x10
_ALARM = 0x08
_SYNC = 0x01
_UNUSABLE = _DISCONNECTED | _ARTIFACT | _OUT_OF_TRACK | _ALARM
_TROUBLES = {
    _DISCONNECTED: "the sensor is disconnected",
    _ALARM: "sensor alarm: what it measures is not usable",
    _OUT_OF_TRACK: "out of track: no good pulses one after the other",
}


@dataclass(frozen=True, slots=True)
class _Frame:
    status: int
    pleth: int
    value: int
    arrival_ns: int


@dataclass(slots=True)
class _Packet:
    """From one SYNC to the next."""

    frames: list[_Frame] = field(default_factory=list)
    lost: int = 0
    gap_at: int | None = None
    """How many frames came before the first damage that was seen."""
    whole: bool = False


class NoninDecoder:
    """Sans-IO decoder of one connection to a Nonin oximeter; subclasses know a frame's layout."""

    MODEL: ClassVar[str]
    FULL_SCALE: ClassVar[tuple[int, int]]

    def __init__(self) -> None:
        self._rest = b""
        self._in_step = False
        """The last bytes were a frame."""
        self._packet: _Packet | None = None
        """None until the first SYNC."""
        self._held: list[_Packet] = []
        self._held_since_ns = 0
        self._next_index = 0
        self._start_bytes = 0
        self._revision: int | None = None
        self._model = self.MODEL
        self._hidden = HiddenLoss(NS_PER_S / RATE_HZ, PACKET_FRAMES, CONFIRM_NS, HELD_SAMPLES_MAX)

    @property
    def signals(self) -> Sequence[SignalSpec]:
        """The plethysmogram at 75 Hz in counts; heart rate and SpO2 (means of 4 beats) three times a second."""
        return (
            SignalSpec(PPG, float(RATE_HZ), (PLETH,), ("1",), full_scale=self.FULL_SCALE),
            SignalSpec(VITAL_SIGNS, None, (HEART_RATE, SPO2), ("/min", "%")),
        )

    def start(self) -> list[Event]:
        """Nothing to send: the device talks unasked."""
        return []

    def receive(self, chunk: Chunk) -> list[Event]:
        """Decode what came. Raises `DeviceError` when it is not this format, whatever comes."""
        events: list[Event] = []
        data = self._before_frames(chunk.data)
        for found in self._cut(data):
            if isinstance(found, int):
                events.append(Rejected(found, "not part of a frame"))
                if self._packet is not None and self._packet.gap_at is None:
                    self._packet.gap_at = len(self._packet.frames)
            else:
                self._take_frame(self._frame(found, chunk.arrival_ns), events)
        if self._packet is None:
            self._start_bytes += len(chunk.data)
            if self._start_bytes > START_BYTES_MAX:
                raise DeviceError(
                    f"the oximeter sent {self._start_bytes} bytes that are not the data of a {self._model}",
                    hint="check the driver's name against the oximeter's model and its data format",
                )
        return events

    def finish(self) -> list[Event]:
        """Give out the packets that are held, and the frames of the one that did not end."""
        events: list[Event] = []
        packet, self._packet = self._packet, None
        self._release(self._hidden.suspected_samples, events)
        if packet is not None and packet.frames:
            self._held = [packet]
            self._release(0, events)
        return events

    def _before_frames(self, data: bytes) -> bytes:
        return data

    def _is_frame(self, candidate: bytes) -> bool:
        raise NotImplementedError

    def _frame(self, data: bytes, arrival_ns: int) -> _Frame:
        raise NotImplementedError

    def _stands_alone(self) -> bool:
        """Whether one frame by itself is enough to get into step again."""
        raise NotImplementedError

    def _cut(self, data: bytes) -> list[bytes | int]:
        """Frames, and between them the number of bytes that belong to none; after a failure on by one byte."""
        buffer, at, stray = self._rest + data, 0, 0
        found: list[bytes | int] = []
        while len(buffer) - at >= FRAME_BYTES:
            candidate, following = buffer[at : at + FRAME_BYTES], buffer[at + FRAME_BYTES : at + 2 * FRAME_BYTES]
            sound = self._is_frame(candidate)
            if sound and not self._in_step and not self._stands_alone():
                if len(following) < FRAME_BYTES:
                    break
                sound = self._is_frame(following)
            self._in_step = sound
            if not sound:
                stray += 1
                at += 1
                continue
            if stray:
                found.append(stray)
                stray = 0
            found.append(candidate)
            at += FRAME_BYTES
        if stray:
            found.append(stray)
        self._rest = buffer[at:]
        return found

    def _take_frame(self, frame: _Frame, events: list[Event]) -> None:
        packet = self._packet
        if packet is None:
            if not frame.status & _SYNC:
                events.append(Rejected(FRAME_BYTES, "before the first packet's beginning"))
                return
            events.append(Streaming())
        elif frame.status & _SYNC or len(packet.frames) == PACKET_FRAMES:
            self._end_packet(packet, frame, events)
        if packet is None or frame.status & _SYNC:
            self._packet = _Packet()
        elif len(packet.frames) == PACKET_FRAMES:
            # A packet is full and no SYNC came: that frame is lost, and so stands the gap at the beginning.
            self._packet = _Packet(gap_at=0)
        assert self._packet is not None
        self._packet.frames.append(frame)

    def _end_packet(self, packet: _Packet, following: _Frame, events: list[Event]) -> None:
        packet.lost = PACKET_FRAMES - len(packet.frames)
        packet.whole = not packet.lost and bool(following.status & _SYNC)
        if not self._held:
            self._held_since_ns = following.arrival_ns
        self._held.append(packet)
        index = self._next_index + PACKET_FRAMES * len(self._held)
        waiting = PACKET_FRAMES * len(self._held)
        hidden = self._hidden.judge(index, following.arrival_ns, self._held_since_ns, waiting)
        if hidden is not None:
            self._release(hidden, events)

    def _release(self, hidden: int, events: list[Event]) -> None:
        held, self._held = self._held, []
        for packet in held:
            packet.lost += hidden
            packet.whole = packet.whole and not hidden
            hidden = 0
            events += self._pleth(packet)
            events += self._vital_signs(packet)

    def _pleth(self, packet: _Packet) -> list[Event]:
        events: list[Event] = []
        gap_at = packet.gap_at if packet.gap_at is not None and packet.lost else len(packet.frames)
        for part in (packet.frames[:gap_at], packet.frames[gap_at:]):
            if part:
                pleth = np.array([frame.pleth for frame in part], dtype=np.int32)
                bad = np.array([bool(frame.status & _UNUSABLE) for frame in part], dtype=np.int64)
                columns: dict[str, Column] = {PLETH: pleth, QUALITY: bad}
                events.append(Samples(PPG, self._next_index, columns, part[-1].arrival_ns, PLETH_SCALES))
                self._next_index += len(part)
            if packet.lost:
                events.append(Missing(PPG, self._next_index, packet.lost))
                self._next_index += packet.lost
                packet.lost = 0
        return events

    def _vital_signs(self, packet: _Packet) -> list[Event]:
        """Only a packet that is known to be whole tells which frame carries which value."""
        if not packet.whole:
            return []
        events: list[Event] = []
        values = [frame.value for frame in packet.frames]
        if self._revision != values[3]:
            self._revision = values[3]
            events.append(Facts(model=self._model, firmware=str(self._revision)))
        status = 0
        for frame in packet.frames:
            status |= frame.status
        troubles = [text for bit, text in _TROUBLES.items() if status & bit]
        heart_rate = (values[0] & 0x03) << 7 | values[1] & 0x7F
        spo2 = values[2] & 0x7F
        fields = {}
        if heart_rate != NO_HEART_RATE:
            fields[HEART_RATE] = float(heart_rate)
        if spo2 != NO_SPO2:
            fields[SPO2] = float(spo2)
        size = PACKET_FRAMES * FRAME_BYTES
        if troubles or not fields:
            return [*events, NoValue(size, "; ".join(troubles) or "no heart rate and no SpO2")]
        return [*events, Reading(VITAL_SIGNS, fields, packet.frames[-1].arrival_ns)]


class NoninFormat2Decoder(NoninDecoder):
    """OEM III and Xpod: 9600 8-N-1, frame 01, status, pleth, value, sum. It talks unasked."""

    MODEL = "Nonin OEM III"
    FULL_SCALE = (0, 255)

    def _stands_alone(self) -> bool:
        # 01, bit 7 and the sum are 17 bits.
        return True

    def _is_frame(self, candidate: bytes) -> bool:
        return candidate[0] == 0x01 and bool(candidate[1] & _ALWAYS) and sum(candidate[:4]) % 256 == candidate[4]

    def _frame(self, data: bytes, arrival_ns: int) -> _Frame:
        return _Frame(data[1], data[2], data[3], arrival_ns)


class NoninFormat7Decoder(NoninDecoder):
    """WristOx2 3150 and Onyx II: frame status, pleth high, pleth low, value, sum. The format is selected first."""

    MODEL = "Nonin WristOx2"
    FULL_SCALE = (0, 65_535)

    def __init__(self, select: bytes = SELECT_WRISTOX2, model: str = MODEL) -> None:
        """`select`: the command that selects data format 7 on this `model`."""
        super().__init__()
        self._model = model
        self._select = select
        self._asked = False

    def start(self) -> list[Event]:
        """Select the format; the device answers ACK or NAK and talks."""
        self._asked = True
        return [Send(self._select)]

    def _before_frames(self, data: bytes) -> bytes:
        """Take the answer away. It is the first byte, unless the device was talking already."""
        if not self._asked or not data:
            return data
        self._asked = False
        if data == bytes((NAK,)):
            raise DeviceError(
                "the oximeter refuses data format 7", hint="WristOx2 and Onyx have drivers of their own: try the other"
            )
        return data[1:] if data[0] == ACK else data

    def _stands_alone(self) -> bool:
        # Bit 7 and the sum are only 9 bits: two frames in a row are asked for.
        return False

    def _is_frame(self, candidate: bytes) -> bool:
        return bool(candidate[0] & _ALWAYS) and sum(candidate[:4]) % 256 == candidate[4]

    def _frame(self, data: bytes, arrival_ns: int) -> _Frame:
        return _Frame(data[0], data[1] << 8 | data[2], data[3], arrival_ns)
