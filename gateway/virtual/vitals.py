"""An oximeter, a blood-pressure cuff and a thermometer on one seeded patient each: models of time alone.

The same seed gives the same measurements, whenever they are asked for.
"""

from __future__ import annotations

import math
import random
from datetime import UTC, datetime, timedelta

from gateway.devices import gatt
from gateway.virtual.peripheral import Characteristic, Service
from gateway.virtual.sensor import VirtualSensor
from gateway.virtual.strap import Heart

CLOCK_START = datetime(2021, 3, 4, 5, 6, 7, tzinfo=UTC)
"""What a sensor's own clock shows when it is switched on: nobody has set it, and it has no zone."""

SFLOAT_NAN = b"\xff\x07"
FLOAT_NAN = b"\xff\xff\x7f\x00"

SPO2_MEAN_PCT = 97.0
SPO2_SWING_PCT = 1.2
SPO2_PERIOD_S = 173.0
PERFUSION_MEAN_PCT = 4.0
PERFUSION_SWING_PCT = 1.5
PERFUSION_PERIOD_S = 61.0

SYSTOLIC_MEAN_MM_HG = 122.0
DIASTOLIC_MEAN_MM_HG = 78.0
PRESSURE_SWING_MM_HG = 8.0
PRESSURE_PERIOD_S = 7200.0
PRESSURE_NOISE_MM_HG = 2.5
INFLATION_S = 30
"""From the pump's start to the result; the cuff pressure is told every second."""
INFLATED_MM_HG = 180.0
KEPT_MAX = 32
"""Measurements that a cuff keeps while nobody listens; the oldest give way."""

TEMPERATURE_MEAN_C = 36.8
TEMPERATURE_SWING_C = 0.4
TEMPERATURE_PERIOD_S = 86_400.0
AMBIENT_C = 22.0
WARMING_UP_S = 60.0
WARMING_UP_TIME_CONSTANT_S = 8.0


def sfloat_bytes(value: float, decimals: int = 0) -> bytes:
    """A SFLOAT with so many decimals, little-endian."""
    return ((-decimals & 0xF) << 12 | round(value * 10.0**decimals) & 0xFFF).to_bytes(2, "little")


def float_bytes(value: float, decimals: int = 2) -> bytes:
    """An IEEE 11073 FLOAT with so many decimals, little-endian."""
    return ((-decimals & 0xFF) << 24 | round(value * 10.0**decimals) & 0xFFFFFF).to_bytes(4, "little")


def date_time_bytes(time: datetime) -> bytes:
    """A Date Time."""
    return time.year.to_bytes(2, "little") + bytes([time.month, time.day, time.hour, time.minute, time.second])


def _wave(time_s: float, period_s: float, phase: float) -> float:
    return math.sin(2 * math.pi * time_s / period_s + phase)


class PulseOximeter(VirtualSensor):
    """An oximeter on a finger: one continuous measurement a second, with both statuses and the perfusion index.

    Faults: `contact` False (off the finger: no values, and the status says so), `without_value` (NaN and no status),
    `measurement_status` and `sensor_status` (bits that are set beside the values), and those of every sensor.
    """

    def __init__(
        self,
        address: str = "00:1C:05:00:10:02",
        name: str = "Virtual oximeter",
        *,
        seed: int = 1,
        battery_pct: float = 87.0,
        speed: float = 1.0,
    ) -> None:
        continuous = Characteristic(gatt.PLX_CONTINUOUS, ("notify",))
        spot = Characteristic(gatt.PLX_SPOT_CHECK, ("indicate",))
        service = Service(gatt.PULSE_OXIMETER_SERVICE, (spot, continuous))
        super().__init__(address, name, (service,), period_s=1.0, speed=speed, battery_pct=battery_pct)
        self.contact = True
        self.without_value = False
        self.measurement_status = 0
        self.sensor_status = 0
        self._heart = Heart(seed)
        self._random = random.Random(seed)
        self._phases = [self._random.uniform(0, 2 * math.pi) for _ in range(2)]

    def measurements(self) -> list[tuple[str, bytes]]:
        """The next second's PLX Continuous Measurement."""
        self.time_s += 1.0
        status = self.measurement_status | (1 << 5 if self.contact else 1 << 13)
        sensor = self.sensor_status | (0 if self.contact else 1 << 11)
        value = bytes([0x1C]) + self._saturation_and_pulse() + status.to_bytes(2, "little")
        return [(gatt.PLX_CONTINUOUS, value + sensor.to_bytes(3, "little") + self._perfusion())]

    def spot_check(self, stamp: datetime | None = None, *, stored: bool = False) -> None:
        """Indicate one spot-check now, with a stamp by the oximeter's clock, as if it came from its memory."""
        time = b"" if stamp is None else date_time_bytes(stamp)
        status = (self.measurement_status | (1 << 9 if stored else 1 << 8)).to_bytes(2, "little")
        flags = 0x02 | (0x01 if time else 0)
        self.send(gatt.PLX_SPOT_CHECK, bytes([flags]) + self._saturation_and_pulse() + time + status)

    def _saturation_and_pulse(self) -> bytes:
        noise = self._random.gauss(0, 0.3)
        if self.without_value or not self.contact:
            return SFLOAT_NAN * 2
        spo2 = SPO2_MEAN_PCT + SPO2_SWING_PCT * _wave(self.time_s, SPO2_PERIOD_S, self._phases[0]) + noise
        return sfloat_bytes(min(spo2, 100.0)) + sfloat_bytes(self._heart.rate_per_min(self.time_s))

    def _perfusion(self) -> bytes:
        if self.without_value or not self.contact:
            return SFLOAT_NAN
        wave = _wave(self.time_s, PERFUSION_PERIOD_S, self._phases[1])
        return sfloat_bytes(PERFUSION_MEAN_PCT + PERFUSION_SWING_PCT * wave, 1)


class BloodPressureCuff(VirtualSensor):
    """A cuff that measures by itself every `interval_s` of its time and keeps what it cannot send.

    The second before a result it is inflated, and tells the cuff pressure. It tells its clock, unless `clock` is
    False. Faults: `without_value` (NaN), `status` (bits that are set in the result), those of every sensor.
    """

    def __init__(
        self,
        address: str = "00:09:1F:00:10:03",
        name: str = "Virtual cuff",
        *,
        seed: int = 1,
        battery_pct: float = 87.0,
        speed: float = 1.0,
        interval_s: int = 900,
        kilopascal: bool = False,
        clock: bool = True,
    ) -> None:
        """Raises `ValueError` for an interval in which no measurement has room."""
        if interval_s <= INFLATION_S:
            raise ValueError(f"a measurement alone takes {INFLATION_S} s")
        characteristics = [
            Characteristic(gatt.BLOOD_PRESSURE_MEASUREMENT, ("indicate",)),
            Characteristic(gatt.INTERMEDIATE_CUFF_PRESSURE, ("notify",)),
        ]
        if clock:
            characteristics.append(Characteristic(gatt.DATE_TIME, ("read", "write")))
        service = Service(gatt.BLOOD_PRESSURE_SERVICE, tuple(characteristics))
        super().__init__(address, name, (service,), period_s=1.0, speed=speed, battery_pct=battery_pct)
        self.without_value = False
        self.status = 0
        self.measured = 0
        """Results so far."""
        self._interval_s = interval_s
        self._kilopascal = kilopascal
        self._heart = Heart(seed)
        self._random = random.Random(seed)
        self._phase = self._random.uniform(0, 2 * math.pi)
        self._listening = False
        self._kept: list[bytes] = []

    @property
    def clock(self) -> datetime:
        """What the cuff's clock shows."""
        return CLOCK_START + timedelta(seconds=self.time_s)

    def measurements(self) -> list[tuple[str, bytes]]:
        """What the next second brings: nothing, a cuff pressure, or a result; what cannot be sent is kept."""
        self.time_s += 1.0
        second = round(self.time_s) % self._interval_s
        if second == 0:
            self._kept = [*self._kept, self._result()][-KEPT_MAX:]
            return self._sent()
        inflating_s = second - (self._interval_s - INFLATION_S)
        if inflating_s <= 0:
            return []
        pressure = sfloat_bytes(INFLATED_MM_HG * (1 - inflating_s / INFLATION_S))
        return [(gatt.INTERMEDIATE_CUFF_PRESSURE, b"\x00" + pressure + SFLOAT_NAN * 2)]

    def _sent(self) -> list[tuple[str, bytes]]:
        if not self._listening or self.silent:
            return []
        kept, self._kept = self._kept, []
        return [(gatt.BLOOD_PRESSURE_MEASUREMENT, value) for value in kept]

    def _result(self) -> bytes:
        self.measured += 1
        swing = PRESSURE_SWING_MM_HG * _wave(self.time_s, PRESSURE_PERIOD_S, self._phase)
        systolic = SYSTOLIC_MEAN_MM_HG + swing + self._random.gauss(0, PRESSURE_NOISE_MM_HG)
        diastolic = DIASTOLIC_MEAN_MM_HG + swing / 2 + self._random.gauss(0, PRESSURE_NOISE_MM_HG)
        pressures = [systolic, diastolic, diastolic + (systolic - diastolic) / 3]
        if self.without_value:
            values = SFLOAT_NAN * 3
        elif self._kilopascal:
            values = b"".join(sfloat_bytes(each * 0.133322387415, 1) for each in pressures)
        else:
            values = b"".join(sfloat_bytes(each) for each in pressures)
        pulse = sfloat_bytes(self._heart.rate_per_min(self.time_s))
        flags = bytes([0x16 | self._kilopascal])
        return flags + values + date_time_bytes(self.clock) + pulse + self.status.to_bytes(2, "little")

    def read(self, uuid: str) -> bytes:
        """The clock as it is now; the rest as it stands."""
        return date_time_bytes(self.clock) if uuid == gatt.DATE_TIME else super().read(uuid)

    def subscribed(self, uuid: str) -> None:
        """Somebody listens: what was kept is sent, oldest first."""
        if uuid == gatt.BLOOD_PRESSURE_MEASUREMENT:
            self._listening = True
            for each, value in self._sent():
                self.send(each, value)

    def link_down(self) -> None:
        """Nobody listens any more."""
        self._listening = False


class Thermometer(VirtualSensor):
    """A thermometer that warms up for a minute, telling intermediate temperatures, and then measures every 10 s.

    Faults: `without_value` (NaN), those of every sensor.
    """

    def __init__(
        self,
        address: str = "00:15:91:00:10:04",
        name: str = "Virtual thermometer",
        *,
        seed: int = 1,
        battery_pct: float = 87.0,
        speed: float = 1.0,
        fahrenheit: bool = False,
    ) -> None:
        measurement = Characteristic(gatt.TEMPERATURE_MEASUREMENT, ("indicate",))
        intermediate = Characteristic(gatt.INTERMEDIATE_TEMPERATURE, ("notify",))
        service = Service(gatt.HEALTH_THERMOMETER_SERVICE, (measurement, intermediate))
        super().__init__(address, name, (service,), period_s=10.0, speed=speed, battery_pct=battery_pct)
        self.without_value = False
        self._fahrenheit = fahrenheit
        self._random = random.Random(seed)
        self._phase = self._random.uniform(0, 2 * math.pi)

    def measurements(self) -> list[tuple[str, bytes]]:
        """The next temperature: intermediate while it warms up."""
        self.time_s += 10.0
        body = TEMPERATURE_MEAN_C + TEMPERATURE_SWING_C * _wave(self.time_s, TEMPERATURE_PERIOD_S, self._phase)
        shown = body + self._random.gauss(0, 0.02)
        shown -= (body - AMBIENT_C) * math.exp(-self.time_s / WARMING_UP_TIME_CONSTANT_S)
        flags = bytes([0x04 | self._fahrenheit])
        value = float_bytes(shown * 1.8 + 32 if self._fahrenheit else shown)
        mouth = b"\x06"
        measured = flags + (FLOAT_NAN if self.without_value else value) + mouth
        warming_up = self.time_s < WARMING_UP_S
        return [(gatt.INTERMEDIATE_TEMPERATURE if warming_up else gatt.TEMPERATURE_MEASUREMENT, measured)]
