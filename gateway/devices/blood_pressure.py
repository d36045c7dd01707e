"""Blood-pressure cuffs: the Blood Pressure service 0x1810.

Vital signs have no quality field: a measurement during which the body moved, the cuff was loose or in a wrong
position is kept out, with the reason, rather than being stored as if it were a good one. A pulse out of the cuff's
range is kept out alone. An irregular pulse is a finding and not a fault.
Intermediate cuff pressures (0x2A36) are not subscribed to: what the cuff is inflated to is nobody's blood pressure.
Source: Bluetooth SIG, Blood Pressure Service 1.1, 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import ClassVar

from gateway.devices import gatt
from gateway.devices.base import Event, NoValue, SignalSpec
from gateway.devices.gatt_clock import MeasurementClock
from gateway.devices.gatt_sensor import GattSensor, behind, names_of_bits, reading
from gateway.links.base import Chunk
from gateway.samples import VITAL_SIGNS

MM_HG_PER_KPA = 1 / 0.133322387415
"""The conventional millimetre of mercury (ISO 80000-4) in Pa is 133.322387415."""

FAULTS = {0: "the body moved", 1: "the cuff was loose", 5: "the cuff was in a wrong position"}
"""Bits of the measurement status with which a blood pressure is questionable."""

PULSE_RANGE_SHIFT = 3
PULSE_RANGES = {1: "above", 2: "below"}

_SFLOAT_BYTES = 2


@dataclass(frozen=True, slots=True)
class BloodPressure:
    """One measurement as it was sent, pressures in mm[Hg]; None: no value, or not told."""

    systolic: float | None
    diastolic: float | None
    mean_arterial: float | None
    stamp: datetime | None = None
    """By the cuff's own clock, of no known zone."""
    pulse_rate: tuple[float | None] | None = None
    """/min; in a tuple, because it can be absent, or there without a value."""
    user: int | None = None
    status: int = 0

    @property
    def faults(self) -> list[str]:
        """Why the pressures are not to be trusted; empty where they are."""
        return names_of_bits(self.status, FAULTS)


def measurement(fields: gatt.Fields) -> BloodPressure:
    """A Blood Pressure Measurement (0x2A35). Raises `gatt.MalformedValueError`."""
    flags = fields.uint(1)
    factor = MM_HG_PER_KPA if flags & 0x01 else 1.0
    systolic, diastolic, mean = (None if p is None else p * factor for p in [fields.sfloat() for _ in range(3)])
    stamp = fields.date_time() if flags & 0x02 else None
    pulse_rate = (fields.sfloat(),) if flags & 0x04 else None
    user = fields.uint(1) if flags & 0x08 else None
    status = fields.uint(2) if flags & 0x10 else 0
    return BloodPressure(systolic, diastolic, mean, stamp, pulse_rate, None if user == 0xFF else user, status)


class BloodPressureDecoder(GattSensor):
    """Decoder of one connection to one cuff (see `gateway.devices.base.Decoder`).

    Cuffs that could not connect send later what they measured meanwhile: such a measurement gets the time at which
    it was taken where the cuff tells its clock (see `gatt_clock`).
    A cuff's user number is not looked at: whose cuff it is, the registry knows.
    """

    NOTIFY: ClassVar[tuple[str, ...]] = (gatt.BLOOD_PRESSURE_MEASUREMENT, *GattSensor.NOTIFY)
    READ: ClassVar[tuple[str, ...]] = (*GattSensor.READ, *MeasurementClock.CHARACTERISTICS)

    def __init__(self) -> None:
        self._clock = MeasurementClock()
        super().__init__(
            {gatt.BLOOD_PRESSURE_MEASUREMENT: self._measurement},
            dict.fromkeys(MeasurementClock.CHARACTERISTICS, self._clock.learn),
        )

    @property
    def signals(self) -> Sequence[SignalSpec]:
        """Blood pressures in mm[Hg] and pulse rate in /min, when a measurement is done."""
        channels = ("systolic_bp", "diastolic_bp", "heart_rate")
        return (SignalSpec(VITAL_SIGNS, None, channels, ("mm[Hg]", "mm[Hg]", "/min")),)

    def _measurement(self, chunk: Chunk) -> list[Event]:
        fields = gatt.Fields(chunk.data)
        measured = measurement(fields)
        if measured.faults:
            return [NoValue(len(chunk.data), f"questionable: {', '.join(measured.faults)}")]
        events = behind(fields)
        values = {"systolic_bp": measured.systolic, "diastolic_bp": measured.diastolic}
        if measured.pulse_rate is not None:
            out_of_range = PULSE_RANGES.get(measured.status >> PULSE_RANGE_SHIFT & 0b11)
            if out_of_range:
                events.append(NoValue(_SFLOAT_BYTES, f"heart_rate: {out_of_range} the range of the cuff"))
            else:
                (values["heart_rate"],) = measured.pulse_rate
        measured_ns = self._clock.measured_ns(measured.stamp, chunk.arrival_ns)
        return [*events, *reading(values, _SFLOAT_BYTES, measured_ns)]
