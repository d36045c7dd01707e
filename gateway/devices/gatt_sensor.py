"""What the decoders of all GATT sensors share: battery, model and firmware, malformed values, values no human has.

Sans-IO: notifications and values that were read at connect come as chunks, `channel` says which characteristic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from gateway.devices import gatt
from gateway.devices.base import Event, Facts, NoValue, Reading, Rejected, Streaming
from gateway.links.base import Chunk
from gateway.samples import VITAL_SIGNS

LIMITS = {
    "spo2": (0.0, 100.0),
    "heart_rate": (0.0, 400.0),
    "perfusion_index": (0.0, 100.0),
    "systolic_bp": (0.0, 400.0),
    "diastolic_bp": (0.0, 400.0),
    "temperature": (0.0, 50.0),
}
"""Above the first and up to the second: what lies outside is no measurement of a human, but a wrong unit
(a Fahrenheit called Celsius) or a damaged value. 0 is what some sensors send for no value."""


class GattSensor:
    """Base of the decoders of one connection to one sensor (see `gateway.devices.base.Decoder`).

    A subclass adds `signals`, its own characteristics to `NOTIFY` and `READ`, and what decodes them.
    """

    NOTIFY: ClassVar[tuple[str, ...]] = (gatt.BATTERY_LEVEL,)
    """Characteristics to subscribe to; the first one is what the device is there for."""
    READ: ClassVar[tuple[str, ...]] = (gatt.MODEL_NUMBER, gatt.FIRMWARE_REVISION, gatt.BATTERY_LEVEL)
    """Characteristics to read once after connecting, where the device has them."""

    def __init__(
        self,
        measurements: Mapping[str, Callable[[Chunk], list[Event]]],
        others: Mapping[str, Callable[[Chunk], list[Event]]] | None = None,
    ) -> None:
        """What decodes a characteristic's value: it may raise `gatt.MalformedValueError`.

        The first well-formed value of `measurements` means that the sensor streams.
        """
        self._measurements = measurements
        self._decoders = {**_FACTS, **(others or {}), **measurements}
        self._streaming = False

    def start(self) -> list[Event]:
        """Nothing to send: a sensor reports as soon as it is subscribed to."""
        return []

    def receive(self, chunk: Chunk) -> list[Event]:
        """Decode one notification or one value that was read. Never raises here, whatever the bytes."""
        count = len(chunk.data)
        decode = self._decoders.get(chunk.channel)
        if decode is None:
            return [Rejected(count, f"unexpected characteristic {gatt.name_of(chunk.channel)}")]
        if count > gatt.ATTRIBUTE_BYTES_MAX:
            return [Rejected(count, f"longer than an attribute can be ({gatt.ATTRIBUTE_BYTES_MAX} bytes)")]
        try:
            events = decode(chunk)
        except gatt.MalformedValueError as error:
            return [Rejected(count, f"{gatt.name_of(chunk.channel)}: {error}")]
        if not self._streaming and chunk.channel in self._measurements:
            self._streaming = True
            return [Streaming(), *events]
        return events


def reading(values: Mapping[str, float | None], byte_count: int, arrival_ns: int) -> list[Event]:
    """One reading of those values that are some, and a rejection for each that is none or no human's.

    `byte_count`: what one value takes up on the air.
    """
    events: list[Event] = []
    fields: dict[str, float] = {}
    for name, value in values.items():
        low, high = LIMITS[name]
        if value is None or value == 0:
            events.append(NoValue(byte_count, f"{name}: the sensor has no value"))
        elif low < value <= high:
            fields[name] = value
        else:
            events.append(Rejected(byte_count, f"{name}: {value:g} is not within {low:g} and {high:g}"))
    if fields:
        events.append(Reading(VITAL_SIGNS, fields, arrival_ns))
    return events


def behind(fields: gatt.Fields) -> list[Event]:
    """A rejection for bytes that follow the last field; what came before them is used."""
    return [Rejected(fields.left, "bytes behind the last field")] if fields.left else []


def names_of_bits(bits: int, names: Mapping[int, str]) -> list[str]:
    """Names of those bits that are set and have one."""
    return [name for bit, name in names.items() if bits >> bit & 1]


def _battery(chunk: Chunk) -> list[Event]:
    charge = gatt.battery_pct(chunk.data)
    if charge is None:
        raise gatt.MalformedValueError("not one byte of 0 to 100 %")
    return [Facts(battery_pct=charge)]


def _model(chunk: Chunk) -> list[Event]:
    return [Facts(model=_text(chunk))]


def _firmware(chunk: Chunk) -> list[Event]:
    return [Facts(firmware=_text(chunk))]


def _text(chunk: Chunk) -> str:
    text = gatt.text(chunk.data)
    if text is None:
        raise gatt.MalformedValueError("no text")
    return text


_FACTS = {gatt.BATTERY_LEVEL: _battery, gatt.MODEL_NUMBER: _model, gatt.FIRMWARE_REVISION: _firmware}
