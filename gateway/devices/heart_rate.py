"""Heart-rate straps: the Heart Rate service 0x180D with RR intervals, battery and device information.

Sans-IO: notifications and values read at connect come as chunks, `channel` says which characteristic.
Source: Bluetooth SIG, Heart Rate Service 1.0, 3.1 (Heart Rate Measurement, 0x2A37).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from gateway.devices import gatt
from gateway.devices.base import Event, Facts, Reading, Rejected, SignalSpec, Streaming
from gateway.links.base import Chunk
from gateway.samples import NS_PER_S, VITAL_SIGNS

RR_TICKS_PER_S = 1024
"""RR intervals come in 1/1024 s."""

_RATE_IS_16_BIT = 0x01
_CONTACT = 0x06
_CONTACT_LOST = 0x04
"""Contact is supported by the sensor (bit 2) and not there (bit 1 clear)."""
_ENERGY_PRESENT = 0x08
_RR_PRESENT = 0x10


class HeartRateDecoder:
    """Decoder of one connection to one strap (see `gateway.devices.base.Decoder`)."""

    NOTIFY: ClassVar[tuple[str, ...]] = (gatt.HEART_RATE_MEASUREMENT, gatt.BATTERY_LEVEL)
    """Characteristics to subscribe to; the first one is what the device is there for."""
    READ: ClassVar[tuple[str, ...]] = (gatt.MODEL_NUMBER, gatt.FIRMWARE_REVISION, gatt.BATTERY_LEVEL)
    """Characteristics to read once after connecting, where the device has them."""

    def __init__(self) -> None:
        self._streaming = False
        self._decoders: dict[str, Callable[[Chunk], list[Event]]] = {
            gatt.HEART_RATE_MEASUREMENT: self._measurement,
            gatt.BATTERY_LEVEL: self._battery,
            gatt.MODEL_NUMBER: self._model,
            gatt.FIRMWARE_REVISION: self._firmware,
        }

    @property
    def signals(self) -> Sequence[SignalSpec]:
        """Heart rate in /min and RR intervals in ms, whenever the strap reports."""
        return (SignalSpec(VITAL_SIGNS, None, ("heart_rate", "rr_interval"), ("/min", "ms")),)

    def start(self) -> list[Event]:
        """Nothing to send: a strap reports as soon as it is subscribed to."""
        return []

    def receive(self, chunk: Chunk) -> list[Event]:
        """Decode one notification or one value that was read. Never raises, whatever the bytes."""
        decode = self._decoders.get(chunk.channel)
        if decode is None:
            return [Rejected(len(chunk.data), f"unexpected characteristic {gatt.name_of(chunk.channel)}")]
        if len(chunk.data) > gatt.ATTRIBUTE_BYTES_MAX:
            return [Rejected(len(chunk.data), f"longer than an attribute can be ({gatt.ATTRIBUTE_BYTES_MAX} bytes)")]
        return decode(chunk)

    def _measurement(self, chunk: Chunk) -> list[Event]:
        data = chunk.data
        flags = data[0] if data else 0
        rate_end = 3 if flags & _RATE_IS_16_BIT else 2
        rr_start = rate_end + (2 if flags & _ENERGY_PRESENT else 0)
        if not data or len(data) < rr_start:
            return [Rejected(len(data), "heart rate measurement too short for its flags")]
        rest = data[rr_start:]
        if flags & _RR_PRESENT and (not rest or len(rest) % 2):
            return [Rejected(len(data), "heart rate measurement with a missing or cut RR interval")]

        rate = int.from_bytes(data[1:rate_end], "little")
        ticks = (
            [int.from_bytes(rest[i : i + 2], "little") for i in range(0, len(rest), 2)] if flags & _RR_PRESENT else []
        )
        events: list[Event] = []
        if not self._streaming:
            self._streaming = True
            events.append(Streaming())
        if rate == 0 and flags & _CONTACT == _CONTACT_LOST:
            # What a strap off the skin calls RR intervals are no heart beats.
            return [*events, Rejected(len(data), "no skin contact: heart rate 0")]
        if rate == 0:
            events.append(Rejected(rate_end - 1, "heart rate 0: the strap found no rate"))
        if rest and not flags & _RR_PRESENT:
            events.append(Rejected(len(rest), "bytes behind the last field of a heart rate measurement"))
        return [*events, *_readings(rate, ticks, chunk.arrival_ns)]

    def _battery(self, chunk: Chunk) -> list[Event]:
        charge = gatt.battery_pct(chunk.data)
        if charge is None:
            return [Rejected(len(chunk.data), "battery level is not one byte of 0 to 100 %")]
        return [Facts(battery_pct=charge)]

    def _model(self, chunk: Chunk) -> list[Event]:
        model = gatt.text(chunk.data)
        return [Rejected(len(chunk.data), "model number is no text") if model is None else Facts(model=model)]

    def _firmware(self, chunk: Chunk) -> list[Event]:
        firmware = gatt.text(chunk.data)
        if firmware is None:
            return [Rejected(len(chunk.data), "firmware revision is no text")]
        return [Facts(firmware=firmware)]


def _readings(rate: int, ticks: Sequence[int], arrival_ns: int) -> list[Event]:
    """One reading per RR interval, oldest first.

    Each is stamped with its own beat: the arrival less the intervals that follow it.
    The rate goes with the newest beat alone, so that it is counted once.
    """
    beats = [interval for interval in ticks if interval]
    events: list[Event] = [Rejected(2, "RR interval of 0")] * (len(ticks) - len(beats))
    if rate and not beats:
        return [*events, Reading(VITAL_SIGNS, {"heart_rate": float(rate)}, arrival_ns)]
    later_ticks = sum(beats)
    for number, interval in enumerate(beats, start=1):
        later_ticks -= interval
        fields = {"rr_interval": interval * 1000 / RR_TICKS_PER_S}
        if rate and number == len(beats):
            fields["heart_rate"] = float(rate)
        events.append(Reading(VITAL_SIGNS, fields, arrival_ns - later_ticks * NS_PER_S // RR_TICKS_PER_S))
    return events
