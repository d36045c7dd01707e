"""A heart-rate strap with a seeded heart: beats first, and from them the measurements that a strap would send.

The heart is a model of time alone (seconds since the start), so that hours of it can be made in a moment.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

from gateway.devices import gatt
from gateway.virtual.peripheral import MTU_BYTES, Characteristic, Service
from gateway.virtual.sensor import VirtualSensor, readable

MEASUREMENT_PERIOD_S = 1.0
RR_TICKS_PER_S = 1024
RATE_MEAN_PER_MIN = 70.0
RATE_SWING_PER_MIN = 9.0
"""The rate wanders within 61 to 79 per minute, so that breathing does not carry its mean out of 60 to 80."""
RATE_PERIODS_S = (97.0, 41.0)
"""Two slow waves whose periods share no small multiple: the rate does not repeat itself within an hour."""
BREATHING_PERIOD_S = 4.2
BREATHING_SHARE = 0.04
"""Respiratory sinus arrhythmia: RR intervals shorten by up to this share while breathing in."""
RR_NOISE_SHARE = 0.008
RATE_BEATS = 5
"""A strap shows the mean rate of its last few beats."""
CONTACT_GOOD_FLAGS = 0x06
CONTACT_LOST_FLAGS = 0x04
RR_FLAG = 0x10


class Heart:
    """Times of beats, seeded: the same seed gives the same heart."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._phases = [self._random.uniform(0, 2 * math.pi) for _ in range(len(RATE_PERIODS_S) + 1)]
        self._next_s = self._random.uniform(0, 1)

    def rate_per_min(self, time_s: float) -> float:
        """Rate without breathing and noise, in /min."""
        waves = zip(RATE_PERIODS_S, self._phases, strict=False)
        mean_wave = sum(math.sin(2 * math.pi * time_s / period + phase) for period, phase in waves) / len(
            RATE_PERIODS_S
        )
        return RATE_MEAN_PER_MIN + RATE_SWING_PER_MIN * mean_wave

    def beats_until(self, time_s: float) -> list[float]:
        """Times in s of the beats since the last call, up to and including `time_s`."""
        beats = []
        while self._next_s <= time_s:
            beats.append(self._next_s)
            breathing = math.sin(2 * math.pi * self._next_s / BREATHING_PERIOD_S + self._phases[-1])
            share = 1 - BREATHING_SHARE * breathing + self._random.gauss(0, RR_NOISE_SHARE)
            self._next_s += 60 / self.rate_per_min(self._next_s) * share
        return beats


class HeartRateStrap(VirtualSensor):
    """The strap: one measurement a second with the intervals since the last one, battery, device information.

    Faults, to be set at any time: `contact` False, `rr_without_heart_rate` True, and those of every sensor.
    """

    def __init__(
        self,
        address: str = "00:22:D0:3A:10:01",
        name: str = "Virtual strap",
        *,
        seed: int = 1,
        battery_pct: float = 87.0,
        speed: float = 1.0,
        period_s: float = MEASUREMENT_PERIOD_S,
        more_services: Sequence[Service] = (),
        mtu_bytes: int = MTU_BYTES,
    ) -> None:
        super().__init__(
            address,
            name,
            (_heart_rate_service(), *more_services),
            period_s=period_s,
            speed=speed,
            battery_pct=battery_pct,
            mtu_bytes=mtu_bytes,
        )
        self.contact = True
        self.rr_without_heart_rate = False
        self._heart = Heart(seed)
        self._beat_ticks: list[int] = []

    def measurements(self) -> list[tuple[str, bytes]]:
        """The next second's Heart Rate Measurement."""
        return [(gatt.HEART_RATE_MEASUREMENT, self.measurement())]

    def measurement(self) -> bytes:
        """Let the next second pass and give the Heart Rate Measurement (2A37) at its end.

        Beats are rounded to ticks and then subtracted, so that the intervals add up over any time.
        """
        self.time_s += MEASUREMENT_PERIOD_S
        beats = [round(beat * RR_TICKS_PER_S) for beat in self._heart.beats_until(self.time_s)]
        ticks = [*self._beat_ticks[-1:], *beats]
        intervals = [later - earlier for earlier, later in itertools.pairwise(ticks)]
        self._beat_ticks = [*self._beat_ticks, *beats][-(RATE_BEATS + 1) :]
        if not self.contact:
            return bytes([CONTACT_LOST_FLAGS, 0])
        rate = 0 if self.rr_without_heart_rate else self._rate_per_min()
        flags = CONTACT_GOOD_FLAGS | (RR_FLAG if intervals else 0)
        return bytes([flags, rate]) + b"".join(interval.to_bytes(2, "little") for interval in intervals)

    def _rate_per_min(self) -> int:
        if len(self._beat_ticks) < 2:
            return 0
        span_s = (self._beat_ticks[-1] - self._beat_ticks[0]) / RR_TICKS_PER_S
        return round(60 * (len(self._beat_ticks) - 1) / span_s)


def _heart_rate_service() -> Service:
    chest = b"\x01"
    return Service(
        gatt.HEART_RATE_SERVICE,
        (
            Characteristic(gatt.HEART_RATE_MEASUREMENT, ("notify",)),
            readable(gatt.BODY_SENSOR_LOCATION, chest),
        ),
    )
