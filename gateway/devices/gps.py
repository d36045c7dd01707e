"""Decoder of GPS receivers on serial lines: NMEA 0183, the sentences RMC and GGA; parsed by pynmeagps.

A position comes only with a fix (RMC status A, GGA quality above 0): without one there is no value, never 0, 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import time

from pynmeagps import NMEAMessageError, NMEAParseError, NMEAReader, NMEATypeError
from pynmeagps.nmeahelpers import calc_checksum

from gateway.devices.base import Event, NoValue, Reading, Rejected, SignalSpec, Streaming
from gateway.errors import DeviceError
from gateway.links.base import Chunk
from gateway.samples import VITAL_SIGNS

SENTENCE_BYTES_MAX = 256
"""NMEA 0183 allows 82; receivers' own sentences are longer."""
START_BYTES_MAX = 16 * 1024
"""17 s at 9600 baud: a receiver reports every second."""

LATITUDE, LONGITUDE = "gps_latitude", "gps_longitude"
_POSITIONS = (b"RMC", b"GGA")
_ERRORS = (NMEAParseError, NMEAMessageError, NMEATypeError, ValueError, TypeError, KeyError, IndexError)
"""pynmeagps checks the sum, not the fields; a damaged sentence whose sum fits may end anywhere in it."""


class GpsDecoder:
    """Decoder of one connection to one receiver (see `gateway.devices.base.Decoder`)."""

    def __init__(self) -> None:
        self._line = b""
        self._streaming = False
        self._start_bytes = 0
        self._last_time: time | None = None
        """Of the newest position: RMC and GGA of the same second are one."""

    @property
    def signals(self) -> Sequence[SignalSpec]:
        """Position in degrees (WGS 84, south and west negative), usually once a second."""
        return (SignalSpec(VITAL_SIGNS, None, (LATITUDE, LONGITUDE), ("deg", "deg")),)

    def start(self) -> list[Event]:
        """Nothing to send: a receiver talks unasked."""
        return []

    def receive(self, chunk: Chunk) -> list[Event]:
        """Decode what came. Raises `DeviceError` when it is no NMEA, whatever comes."""
        events: list[Event] = []
        *lines, self._line = (self._line + chunk.data).split(b"\n")
        for line in lines:
            self._read_line(line, chunk.arrival_ns, events)
        if len(self._line) > SENTENCE_BYTES_MAX:
            # Binary messages of the receiver's maker may hold no line end for long.
            kept = max(self._line.rfind(b"$"), len(self._line) - SENTENCE_BYTES_MAX)
            events.append(Rejected(kept, "longer than a sentence can be"))
            self._line = self._line[kept:]
        if not self._streaming:
            self._start_bytes += len(chunk.data)
            if self._start_bytes > START_BYTES_MAX:
                raise DeviceError(
                    f"the receiver sent {self._start_bytes} bytes and no NMEA sentence",
                    hint="check its baud rate, and that its NMEA output is on",
                )
        return events

    def _read_line(self, line: bytes, arrival_ns: int, events: list[Event]) -> None:
        # What stands before the last '$' is binary, or a sentence that was cut.
        start = max(line.rfind(b"$"), 0)
        sentence = line[start:].rstrip(b"\r")
        if start:
            events.append(Rejected(start, "not part of a sentence"))
        if not sentence:
            return
        body, _, stated = sentence[1:].partition(b"*")
        if len(sentence) > SENTENCE_BYTES_MAX or sentence[:1] != b"$" or not sentence.isascii():
            events.append(Rejected(len(sentence), "no NMEA sentence"))
        elif stated.upper() != calc_checksum(body.decode("ascii")).encode("ascii"):
            events.append(Rejected(len(sentence), "wrong checksum"))
        else:
            if not self._streaming:
                self._streaming = True
                events.append(Streaming())
            if body[2:5] in _POSITIONS:
                events += self._position(sentence, arrival_ns)

    def _position(self, sentence: bytes, arrival_ns: int) -> list[Event]:
        try:
            message = NMEAReader.parse(sentence + b"\r\n")
        except _ERRORS as error:
            return [Rejected(len(sentence), f"sentence with impossible fields: {type(error).__name__}")]
        has_fix = getattr(message, "status", "A") == "A" and getattr(message, "quality", 1) != 0
        latitude, longitude = getattr(message, "lat", None), getattr(message, "lon", None)
        if not has_fix or not isinstance(latitude, float) or not isinstance(longitude, float):
            return [NoValue(len(sentence), "the receiver has no fix")]
        if not (abs(latitude) <= 90 and abs(longitude) <= 180) or latitude == longitude == 0:
            return [Rejected(len(sentence), "impossible position")]
        stated_time = getattr(message, "time", None)
        if isinstance(stated_time, time):
            if stated_time == self._last_time:
                return []
            self._last_time = stated_time
        return [Reading(VITAL_SIGNS, {LATITUDE: latitude, LONGITUDE: longitude}, arrival_ns)]
