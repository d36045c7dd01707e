"""Decoders of Contec oximeters on serial lines: CMS50D+ with old firmware, and CMS50D+ from 4.6 on, CMS50E, CMS50EW.

Neither protocol has a counter or a checksum: a frame that came in pieces counts as lost, one that vanished whole is
not seen. Sources: atbrask/CMS50Dplus (old), timegrid/CMS50Dplus7 (new).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gateway.devices.base import Event, Facts, Missing, Rejected, Samples, Send, SignalSpec, Streaming
from gateway.devices.oximetry import HEART_RATE, PERFUSION_INDEX, PLETH, PLETH_SCALES, PPG, SPO2, Pace
from gateway.errors import DeviceError
from gateway.links.base import Chunk
from gateway.samples import NS_PER_S, QUALITY, VITAL_SIGNS, Column

RATE_HZ = 60
PLETH_FULL_SCALE = (-1, 128)
"""One beyond the ends of the 7 bits: a pleth is scaled to fill them, and its peaks stand at the top."""
FRAME_BYTES = 5
LIVE_BYTES = 9
START_BYTES_MAX = 8192
"""Some 15 s of either stream."""

NO_HEART_RATE = 0xFF
NO_SPO2 = 0x7F
NO_PERFUSION_INDEX = 0xFFFF

LIVE = bytes.fromhex("7d81a1808080808080")
STOP = bytes.fromhex("7d81a2808080808080")
KEEP_ALIVE = bytes.fromhex("7d81af808080808080")
HELLO = bytes.fromhex("7d81a7808080808080")
KEEP_ALIVE_NS = 4 * NS_PER_S
"""The device wants one every 5 s, else it stops."""

_MARK = 0x80
_TYPE_LIVE = 0x01
_TYPE_DISCONNECT = 0x0D
_DISCONNECT_BYTES = 3

_NO_FRAME = "not part of a frame"
_SEARCHING_TOO_LONG = "no finger, or no pulse found for too long"
_PROBE_ERROR = "probe error"
_SEARCHING = "searching for a pulse"


class _ContecDecoder:
    """What both generations share: pleth with an index, values at their pace, the count of what came in pieces."""

    MODEL: str

    def __init__(self) -> None:
        self._next_index = 0
        self._streaming = False
        self._torn = 0
        """Frames since the last whole one that began and did not end."""
        self._nameless = 0
        """Bytes since the last whole frame without a beginning."""
        self._start_bytes = 0
        self._pace = Pace(RATE_HZ)
        self._pleth: list[int] = []
        self._bad: list[bool] = []
        self._first_index = 0

    def _begin(self, data: bytes) -> None:
        if not self._streaming:
            self._start_bytes += len(data)
            if self._start_bytes > START_BYTES_MAX:
                raise DeviceError(
                    f"the oximeter sent {self._start_bytes} bytes that are not the data of a {self.MODEL}",
                    hint="older and newer Contec oximeters have drivers of their own: try the other",
                )

    def _take(
        self, pleth: int, trouble: str, fields: dict[str, float], size: int, arrival_ns: int, events: list[Event]
    ) -> None:
        """One frame, in order."""
        if not self._streaming:
            self._streaming = True
            events += [Streaming(), Facts(model=self.MODEL)]
            self._torn = self._nameless = 0
        # Bytes vanish on a line, or are damaged and thrown away; none are invented.
        lost = self._torn - (-self._nameless // size)
        self._torn = self._nameless = 0
        if lost:
            self._flush(arrival_ns, events)
            events.append(Missing(PPG, self._next_index, lost))
            self._next_index += lost
        if not self._pleth:
            self._first_index = self._next_index
        self._pleth.append(pleth)
        self._bad.append(bool(trouble))
        self._next_index += 1
        events += self._pace.take(fields, trouble or ("" if fields else "no heart rate and no SpO2"), size, arrival_ns)

    def _flush(self, arrival_ns: int, events: list[Event]) -> None:
        if self._pleth:
            columns: dict[str, Column] = {
                PLETH: np.array(self._pleth, np.int32),
                QUALITY: np.array(self._bad, np.int64),
            }
            events.append(Samples(PPG, self._first_index, columns, arrival_ns, PLETH_SCALES))
            self._pleth, self._bad = [], []

    def _tear(self, count: int, events: list[Event]) -> None:
        """A frame that began and did not end."""
        self._torn += 1
        events.append(Rejected(count, "cut frame"))

    def _reject(self, events: list[Event]) -> None:
        """A byte outside of any frame."""
        self._nameless += 1
        last = events[-1] if events else None
        before = last.byte_count if isinstance(last, Rejected) and last.reason == _NO_FRAME else 0
        if before:
            events.pop()
        events.append(Rejected(before + 1, _NO_FRAME))


def _fields(heart_rate: int, spo2: int) -> dict[str, float]:
    fields = {}
    # 0 stands there while the device has not found a pulse yet.
    if heart_rate not in (0, NO_HEART_RATE):
        fields[HEART_RATE] = float(heart_rate)
    if spo2 not in (0, NO_SPO2):
        fields[SPO2] = float(spo2)
    return fields


def _trouble(*signs: tuple[int, str]) -> str:
    return "; ".join(text for bit, text in signs if bit)


_PPG_SPEC = SignalSpec(PPG, float(RATE_HZ), (PLETH,), ("1",), full_scale=PLETH_FULL_SCALE)


class ContecOldDecoder(_ContecDecoder):
    """CMS50D+ before firmware 4.6: 19200 8-O-1, XON/XOFF, 60 frames a second unasked.

    Five bytes, of which only the first has bit 7 set. See `gateway.devices.base.Decoder`.
    """

    MODEL = "Contec CMS50D+"

    def __init__(self) -> None:
        super().__init__()
        self._frame = bytearray()

    @property
    def signals(self) -> Sequence[SignalSpec]:
        """The plethysmogram at 60 Hz in counts of 0 to 127; heart rate and SpO2."""
        return (_PPG_SPEC, SignalSpec(VITAL_SIGNS, None, (HEART_RATE, SPO2), ("/min", "%")))

    def start(self) -> list[Event]:
        """Nothing to send: the device talks unasked."""
        return []

    def receive(self, chunk: Chunk) -> list[Event]:
        """Decode what came. Raises `DeviceError` when it is not this protocol, whatever comes."""
        events: list[Event] = []
        for byte in chunk.data:
            if byte & _MARK:
                if self._frame:
                    self._tear(len(self._frame), events)
                self._frame = bytearray((byte,))
            elif self._frame:
                self._frame.append(byte)
            else:
                self._reject(events)
            if len(self._frame) == FRAME_BYTES:
                self._decode(bytes(self._frame), chunk.arrival_ns, events)
                self._frame.clear()
        self._flush(chunk.arrival_ns, events)
        self._begin(chunk.data)
        return events

    def _decode(self, frame: bytes, arrival_ns: int, events: list[Event]) -> None:
        trouble = _trouble(
            (frame[2] & 0x10, _PROBE_ERROR), (frame[0] & 0x10, _SEARCHING_TOO_LONG), (frame[2] & 0x20, _SEARCHING)
        )
        fields = _fields((frame[2] & 0x40) << 1 | frame[3], frame[4])
        self._take(frame[1], trouble, fields, FRAME_BYTES, arrival_ns, events)


class ContecDecoder(_ContecDecoder):
    """CMS50D+ from firmware 4.6 on, CMS50E, CMS50EW: 115200 8-N-1, live data on command.

    The first byte of a packet has bit 7 clear and is its type; all others have it set, and the second carries what
    was bit 7 of those that follow. The keep-alive is sent by the arrival times of what comes: every chunk that is 4 s
    or more after the last one brings the next. The device sends 60 packets a second, so while it talks none is late;
    a device that has gone quiet gets none, and a new connection begins with the whole start sequence.
    """

    MODEL = "Contec CMS50"

    def __init__(self, *, perfusion_index_percent: float | None = None) -> None:
        """`perfusion_index_percent`: of one count of the perfusion index, where the model's is known.

        The public sources differ on it by a factor of ten or do not say; without it the index is not given, for a
        wrong unit is worse than none.
        """
        super().__init__()
        self._packet = bytearray()
        self._perfusion_index_percent = perfusion_index_percent
        self._kept_alive_ns: int | None = None

    @property
    def signals(self) -> Sequence[SignalSpec]:
        """The plethysmogram at 60 Hz in counts of 0 to 127; heart rate, SpO2 and, with its unit, perfusion index."""
        names: tuple[str, ...] = (HEART_RATE, SPO2)
        if self._perfusion_index_percent is not None:
            names = (*names, PERFUSION_INDEX)
        return (_PPG_SPEC, SignalSpec(VITAL_SIGNS, None, names, ("/min", "%", "%")[: len(names)]))

    def start(self) -> list[Event]:
        """Stop what may be running, greet, ask for live data."""
        return [Send(STOP), Send(HELLO), Send(LIVE)]

    def receive(self, chunk: Chunk) -> list[Event]:
        """Decode what came. Raises `DeviceError` when the device says goodbye, or it is not this protocol."""
        events: list[Event] = []
        for byte in chunk.data:
            if not byte & _MARK:
                self._end_packet(chunk.arrival_ns, events)
                self._packet.append(byte)
            elif self._packet:
                self._packet.append(byte)
                if len(self._packet) == LIVE_BYTES or self._is_goodbye():
                    self._end_packet(chunk.arrival_ns, events)
            else:
                self._reject(events)
        self._flush(chunk.arrival_ns, events)
        self._begin(chunk.data)
        if self._kept_alive_ns is None:
            self._kept_alive_ns = chunk.arrival_ns
        elif chunk.arrival_ns - self._kept_alive_ns >= KEEP_ALIVE_NS:
            self._kept_alive_ns = chunk.arrival_ns
            events.append(Send(KEEP_ALIVE))
        return events

    def _is_goodbye(self) -> bool:
        return self._packet[0] == _TYPE_DISCONNECT and len(self._packet) == _DISCONNECT_BYTES

    def _end_packet(self, arrival_ns: int, events: list[Event]) -> None:
        packet = bytes(self._packet)
        self._packet.clear()
        if not packet:
            return
        kind = packet[0]
        if kind == _TYPE_LIVE and len(packet) == LIVE_BYTES:
            payload = [byte & 0x7F | (packet[1] >> bit & 1) << 7 for bit, byte in enumerate(packet[2:])]
            self._decode(payload, arrival_ns, events)
        elif kind == _TYPE_DISCONNECT and len(packet) >= _DISCONNECT_BYTES and self._streaming:
            reason = packet[2] & 0x7F | (packet[1] & 1) << 7
            raise DeviceError(
                f"the oximeter ends the connection, reason 0x{reason:02x}",
                hint="leave it switched on, with a finger in it",
            )
        elif kind == _TYPE_LIVE:
            self._tear(len(packet), events)
        else:
            # An answer to a command, or the end of an earlier session: nothing is lost with it.
            events.append(Rejected(len(packet), f"packet of type 0x{kind:02x}"))

    def _decode(self, payload: Sequence[int], arrival_ns: int, events: list[Event]) -> None:
        status, pleth, bar, heart_rate, spo2, index_low, index_high = payload
        trouble = _trouble(
            (status & 0x80, _PROBE_ERROR), (status & 0x10, _SEARCHING_TOO_LONG), (pleth & 0x80, _SEARCHING)
        )
        fields = _fields(heart_rate, spo2)
        index = index_high << 8 | index_low
        if self._perfusion_index_percent is not None and bar & 0x10 and index != NO_PERFUSION_INDEX:
            fields[PERFUSION_INDEX] = index * self._perfusion_index_percent
        self._take(pleth & 0x7F, trouble, fields, LIVE_BYTES, arrival_ns, events)
