"""Clinical thermometers: the Health Thermometer service 0x1809.

Intermediate temperatures (0x2A1E) are not subscribed to: they show a thermometer that is still warming up.
Where on the body it measures (the type) is not stored with the value: the data model has no place for it.
Source: Bluetooth SIG, Health Thermometer Service 1.0, 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import ClassVar

from gateway.devices import gatt
from gateway.devices.base import Event, SignalSpec
from gateway.devices.gatt_clock import MeasurementClock
from gateway.devices.gatt_sensor import GattSensor, behind, reading
from gateway.links.base import Chunk
from gateway.samples import VITAL_SIGNS

SITES = {
    1: "armpit",
    2: "body",
    3: "ear",
    4: "finger",
    5: "gastro-intestinal tract",
    6: "mouth",
    7: "rectum",
    8: "toe",
    9: "tympanum",
}

_FLOAT_BYTES = 4
_DECIMALS = 4
"""A FLOAT in Fahrenheit has at most a few decimals; more would only be what the conversion adds."""


@dataclass(frozen=True, slots=True)
class Temperature:
    """One measurement as it was sent; None: no value, or not told."""

    celsius: float | None
    stamp: datetime | None = None
    """By the thermometer's own clock, of no known zone."""
    site: str | None = None


def measurement(fields: gatt.Fields) -> Temperature:
    """A Temperature Measurement (0x2A1C). Raises `gatt.MalformedValueError`."""
    flags = fields.uint(1)
    value = fields.float32()
    if value is not None and flags & 0x01:
        value = round((value - 32) / 1.8, _DECIMALS)
    stamp = fields.date_time() if flags & 0x02 else None
    return Temperature(value, stamp, SITES.get(fields.uint(1)) if flags & 0x04 else None)


class ThermometerDecoder(GattSensor):
    """Decoder of one connection to one thermometer (see `gateway.devices.base.Decoder`).

    A measurement that was kept while there was no link gets the time at which it was taken, where the thermometer
    tells its clock (see `gatt_clock`).
    """

    NOTIFY: ClassVar[tuple[str, ...]] = (gatt.TEMPERATURE_MEASUREMENT, *GattSensor.NOTIFY)
    READ: ClassVar[tuple[str, ...]] = (*GattSensor.READ, *MeasurementClock.CHARACTERISTICS)

    def __init__(self) -> None:
        self._clock = MeasurementClock()
        super().__init__(
            {gatt.TEMPERATURE_MEASUREMENT: self._measurement},
            dict.fromkeys(MeasurementClock.CHARACTERISTICS, self._clock.learn),
        )

    @property
    def signals(self) -> Sequence[SignalSpec]:
        """Body temperature in Cel, whenever the thermometer reports."""
        return (SignalSpec(VITAL_SIGNS, None, ("temperature",), ("Cel",)),)

    def _measurement(self, chunk: Chunk) -> list[Event]:
        fields = gatt.Fields(chunk.data)
        measured = measurement(fields)
        measured_ns = self._clock.measured_ns(measured.stamp, chunk.arrival_ns)
        return [*behind(fields), *reading({"temperature": measured.celsius}, _FLOAT_BYTES, measured_ns)]
