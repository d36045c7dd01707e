"""A heart-rate strap with a seeded heart: beats first, and from them the measurements that a strap would send.

The heart is a model of time alone (seconds since the start), so that hours of it can be made in a moment.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from collections.abc import Sequence

from gateway.devices import gatt
from gateway.virtual.peripheral import Characteristic, Peripheral, Service

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
BATTERY_PCT_PER_HOUR = 0.25
"""400 hours on one coin cell."""

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


class HeartRateStrap(Peripheral):
    """The strap: one measurement a second with the intervals since the last one, battery, device information.

    `speed` makes its time run faster than the clock's (10: ten measurements a second).
    Faults, to be set at any time: `contact` False, `rr_without_heart_rate` True, `silent` True.
    """

    def __init__(
        self,
        address: str = "00:22:D0:3A:10:01",
        name: str = "Virtual strap",
        *,
        seed: int = 1,
        battery_pct: float = 87.0,
        speed: float = 1.0,
    ) -> None:
        super().__init__(address, name, _services(name, address, battery_pct))
        self.contact = True
        self.rr_without_heart_rate = False
        self.silent = False
        """The strap sends nothing more, and the link stays up."""
        self._heart = Heart(seed)
        self._speed = speed
        self._battery_pct = battery_pct
        self._time_s = 0.0
        self._beat_ticks: list[int] = []

    def measurement(self) -> bytes:
        """Let the next second pass and give the Heart Rate Measurement (2A37) at its end.

        Beats are rounded to ticks and then subtracted, so that the intervals add up over any time.
        """
        self._time_s += MEASUREMENT_PERIOD_S
        beats = [round(beat * RR_TICKS_PER_S) for beat in self._heart.beats_until(self._time_s)]
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

    def battery_pct(self) -> int:
        """Charge in whole %, which falls with the strap's own time."""
        return max(0, round(self._battery_pct - BATTERY_PCT_PER_HOUR * self._time_s / 3600))

    async def run(self) -> None:
        """Notify once a second of the strap's time, at points of time that do not drift."""
        loop = asyncio.get_running_loop()
        start_s, number = loop.time(), 0
        while True:
            number += 1
            await asyncio.sleep(start_s + number * MEASUREMENT_PERIOD_S / self._speed - loop.time())
            measurement = self.measurement()
            if self.silent:
                continue
            self.notify(gatt.HEART_RATE_MEASUREMENT, measurement)
            battery = bytes([self.battery_pct()])
            if battery != self.characteristic(gatt.BATTERY_LEVEL).value:
                self.notify(gatt.BATTERY_LEVEL, battery)


def _services(name: str, address: str, battery_pct: float) -> Sequence[Service]:
    def readable(uuid: str, value: bytes) -> Characteristic:
        return Characteristic(uuid, ("read",), value)

    chest = b"\x01"
    return (
        Service(
            gatt.HEART_RATE_SERVICE,
            (
                Characteristic(gatt.HEART_RATE_MEASUREMENT, ("notify",)),
                readable(gatt.BODY_SENSOR_LOCATION, chest),
            ),
        ),
        Service(
            gatt.BATTERY_SERVICE,
            (Characteristic(gatt.BATTERY_LEVEL, ("read", "notify"), bytes([round(battery_pct)])),),
        ),
        Service(
            gatt.DEVICE_INFORMATION_SERVICE,
            (
                readable(gatt.MANUFACTURER_NAME, b"wardlink"),
                readable(gatt.MODEL_NUMBER, name.encode()),
                readable(gatt.SERIAL_NUMBER, address.replace(":", "").encode()),
                readable(gatt.FIRMWARE_REVISION, b"1.0.0"),
                readable(gatt.HARDWARE_REVISION, b"1"),
            ),
        ),
    )
