"""A virtual GPS receiver: a walk around a point as NMEA sentences, once a second, with faults on demand.

Knows no port and no clock: the time comes with each call. The same seed gives the same walk.
"""

from __future__ import annotations

import functools
import math
import operator
import random
from dataclasses import dataclass, field

from gateway.samples import NS_PER_S

SECONDS_PER_CALL_MAX = 60
METRES_PER_DEGREE = 111_320.0
LOOP_S = 600.0
"""Time of one round."""


@dataclass(slots=True)
class Faults:
    """What goes wrong, by number of the second since power-on. May be changed while it plays."""

    no_fix: bool = False
    lost: set[int] = field(default_factory=set)
    wrong_checksum: set[int] = field(default_factory=set)
    cut: set[int] = field(default_factory=set)
    """The second's sentences stop in their middle, without a line end."""
    garbage: dict[int, bytes] = field(default_factory=dict)
    """Bytes that come before this second's sentences."""
    silent: bool = False


class GpsFirmware:
    """A receiver that reports RMC, GGA, GSA and GSV every second, unasked; at first without a fix."""

    def __init__(
        self,
        *,
        seed: int = 1,
        latitude: float = 52.5,
        longitude: float = 13.4,
        radius_m: float = 60.0,
        seconds_to_fix: int = 0,
    ) -> None:
        self.faults = Faults()
        self._random = random.Random(seed)
        self._centre = latitude, longitude
        self._radius_m = radius_m
        self._seconds_to_fix = seconds_to_fix
        self._start = self._random.uniform(0, 2 * math.pi)
        self._since_ns: int | None = None
        self._next_second = 0

    @property
    def streaming(self) -> bool:
        """It always talks."""
        return True

    def receive(self, data: bytes, now_ns: int) -> bytes:  # noqa: ARG002 - the receiver takes no commands
        """Commands are ignored."""
        return b""

    def position(self, second: int) -> tuple[float, float]:
        """Latitude and longitude in degrees at this second of the walk, as precise as the sentences are."""
        angle = self._start + 2 * math.pi * second / LOOP_S
        latitude, longitude = self._centre
        north_m, east_m = self._radius_m * math.sin(angle), self._radius_m * math.cos(angle)
        return (
            latitude + north_m / METRES_PER_DEGREE,
            longitude + east_m / (METRES_PER_DEGREE * math.cos(math.radians(latitude))),
        )

    def packets_until(self, now_ns: int) -> list[bytes]:
        """The sentences of the seconds due by now, a second in one piece."""
        if self._since_ns is None:
            self._since_ns = now_ns
        due = min((now_ns - self._since_ns) // NS_PER_S + 1, self._next_second + SECONDS_PER_CALL_MAX)
        arrived = [self._arriving(second) for second in range(self._next_second, due)]
        self._next_second = max(due, self._next_second)
        return [data for data in arrived if data]

    def _arriving(self, second: int) -> bytes:
        faults = self.faults
        if faults.silent:
            return b""
        before = faults.garbage.get(second, b"")
        if second in faults.lost:
            return before
        report = b"".join(self._sentence(body, spoilt=second in faults.wrong_checksum) for body in self._bodies(second))
        return before + (report[:40] if second in faults.cut else report)

    def _bodies(self, second: int) -> list[str]:
        clock = f"{second // 3600 % 24:02d}{second // 60 % 60:02d}{second % 60:02d}.00"
        if self.faults.no_fix or second < self._seconds_to_fix:
            return [
                f"GNRMC,{clock},V,,,,,,,010125,,,N,V",
                f"GNGGA,{clock},,,,,0,00,99.99,,,,,,",
                "GNGSA,A,1,,,,,,,,,,,,,,,,1",
            ]
        latitude, longitude = self.position(second)
        where = f"{_degrees(latitude, 2, 'NS')},{_degrees(longitude, 3, 'EW')}"
        return [
            f"GNRMC,{clock},A,{where},0.6,,010125,,,A,V",
            f"GNGGA,{clock},{where},1,09,0.92,44.0,M,47.6,M,,",
            "GNGSA,A,3,05,13,15,18,20,23,,,,,,,1.60,0.92,1.31,1",
            "GPGSV,1,1,01,05,62,183,42,1",
        ]

    @staticmethod
    def _sentence(body: str, *, spoilt: bool) -> bytes:
        checksum = functools.reduce(operator.xor, body.encode("ascii")) ^ spoilt
        return f"${body}*{checksum:02X}\r\n".encode("ascii")


def _degrees(value: float, digits: int, hemispheres: str) -> str:
    """ddmm.mmmmm and the hemisphere."""
    hundred_thousandths = round(abs(value) * 60 * 1e5)
    degrees, minutes = divmod(hundred_thousandths, 60 * 100_000)
    return f"{degrees:0{digits}d}{minutes // 100_000:02d}.{minutes % 100_000:05d},{hemispheres[value < 0]}"
