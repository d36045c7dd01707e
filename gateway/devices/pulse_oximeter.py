"""Pulse oximeters: the Pulse Oximeter service 0x1822, continuous and spot-check, with the perfusion index (PAI).

Vital signs have no quality field: a value that the oximeter itself does not stand by is kept out, with the reason.
That is everything whose status says invalid, unavailable, questionable, calibrating, demonstration or test, and
everything from a sensor that is off the user, displaced, broken, or sees no usable pulse. What only warns (low
perfusion, a weak signal, an analysis that goes on) comes with a value that the oximeter stands by: that is taken.
The normal averages are used, never the fast or slow ones, so that one field is one kind of average.
Source: Bluetooth SIG, Pulse Oximeter Service 1.0, 3.1 and 3.2.
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

STORED = 0x0200
"""Bit 9 of the measurement status: from the oximeter's memory."""

MEASUREMENT_FAULTS = {
    10: "demonstration data",
    11: "test data",
    12: "calibration goes on",
    13: "no measurement available",
    14: "questionable measurement",
    15: "invalid measurement",
}
"""Bits of the measurement status with which a value is not to be trusted."""

SENSOR_FAULTS = {
    1: "equipment malfunction",
    3: "inadequate signal",
    6: "erratic signal",
    7: "signal does not pulsate",
    8: "questionable pulse",
    10: "interference at the sensor",
    11: "sensor is not on the user",
    13: "sensor is displaced",
    14: "sensor malfunction",
    15: "sensor is disconnected",
}
"""Bits of the device and sensor status with which a value is not to be trusted."""

_SFLOAT_BYTES = 2


@dataclass(frozen=True, slots=True)
class Oximetry:
    """One measurement as it was sent; None: no value, or not told."""

    spo2: float | None
    """%."""
    pulse_rate: float | None
    """/min."""
    fast: tuple[float | None, float | None] | None = None
    """SpO2 and pulse rate, quickly averaged."""
    slow: tuple[float | None, float | None] | None = None
    stamp: datetime | None = None
    """By the oximeter's own clock, of no known zone."""
    measurement_status: int = 0
    sensor_status: int = 0
    perfusion_index: tuple[float | None] | None = None
    """%; in a tuple, because it can be absent, or there without a value."""

    @property
    def faults(self) -> list[str]:
        """Why the values are not to be trusted; empty where they are."""
        return names_of_bits(self.measurement_status, MEASUREMENT_FAULTS) + names_of_bits(
            self.sensor_status, SENSOR_FAULTS
        )


def continuous(fields: gatt.Fields) -> Oximetry:
    """A PLX Continuous Measurement (0x2A5F). Raises `gatt.MalformedValueError`."""
    flags = fields.uint(1)
    return Oximetry(
        spo2=fields.sfloat(),
        pulse_rate=fields.sfloat(),
        fast=(fields.sfloat(), fields.sfloat()) if flags & 0x01 else None,
        slow=(fields.sfloat(), fields.sfloat()) if flags & 0x02 else None,
        measurement_status=fields.uint(2) if flags & 0x04 else 0,
        sensor_status=fields.uint(3) if flags & 0x08 else 0,
        perfusion_index=(fields.sfloat(),) if flags & 0x10 else None,
    )


def spot_check(fields: gatt.Fields) -> Oximetry:
    """A PLX Spot-Check Measurement (0x2A5E). Raises `gatt.MalformedValueError`."""
    flags = fields.uint(1)
    spo2, pulse_rate = fields.sfloat(), fields.sfloat()
    stamp = fields.date_time() if flags & 0x01 else None
    return Oximetry(
        spo2=spo2,
        pulse_rate=pulse_rate,
        # Bit 4: the clock was never set. Its differences would still be true, were it not reset in between.
        stamp=None if flags & 0x10 else stamp,
        measurement_status=fields.uint(2) if flags & 0x02 else 0,
        sensor_status=fields.uint(3) if flags & 0x04 else 0,
        perfusion_index=(fields.sfloat(),) if flags & 0x08 else None,
    )


class PulseOximeterDecoder(GattSensor):
    """Decoder of one connection to one oximeter (see `gateway.devices.base.Decoder`).

    Stored spot-checks are never asked for; what an oximeter sends of them by itself gets the time at which it was
    measured, where that can be known (see `gatt_clock`), and is rejected where it cannot.
    """

    NOTIFY: ClassVar[tuple[str, ...]] = (gatt.PLX_CONTINUOUS, gatt.PLX_SPOT_CHECK, *GattSensor.NOTIFY)
    READ: ClassVar[tuple[str, ...]] = (*GattSensor.READ, *MeasurementClock.CHARACTERISTICS)

    def __init__(self) -> None:
        self._clock = MeasurementClock()
        super().__init__(
            {gatt.PLX_CONTINUOUS: self._continuous, gatt.PLX_SPOT_CHECK: self._spot_check},
            dict.fromkeys(MeasurementClock.CHARACTERISTICS, self._clock.learn),
        )

    @property
    def signals(self) -> Sequence[SignalSpec]:
        """Oxygen saturation and perfusion index in %, pulse rate in /min, whenever the oximeter reports."""
        return (SignalSpec(VITAL_SIGNS, None, ("spo2", "heart_rate", "perfusion_index"), ("%", "/min", "%")),)

    def _continuous(self, chunk: Chunk) -> list[Event]:
        fields = gatt.Fields(chunk.data)
        return _events(continuous(fields), fields, chunk, chunk.arrival_ns)

    def _spot_check(self, chunk: Chunk) -> list[Event]:
        fields = gatt.Fields(chunk.data)
        measured = spot_check(fields)
        stored = bool(measured.measurement_status & STORED)
        measured_ns = self._clock.measured_ns(measured.stamp, chunk.arrival_ns, stored=stored)
        return _events(measured, fields, chunk, measured_ns)


def _events(measured: Oximetry, fields: gatt.Fields, chunk: Chunk, measured_ns: int) -> list[Event]:
    if measured.faults:
        return [NoValue(len(chunk.data), f"not to be trusted: {', '.join(measured.faults)}")]
    values = {"spo2": measured.spo2, "heart_rate": measured.pulse_rate}
    if measured.perfusion_index is not None:
        (values["perfusion_index"],) = measured.perfusion_index
    return [*behind(fields), *reading(values, _SFLOAT_BYTES, measured_ns)]
