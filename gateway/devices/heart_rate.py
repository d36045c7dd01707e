"""Heart-rate straps: the Heart Rate service 0x180D with RR intervals, battery and device information.

Source: Bluetooth SIG, Heart Rate Service 1.0, 3.1 (Heart Rate Measurement, 0x2A37).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from gateway.devices import gatt
from gateway.devices.base import Event, NoValue, Reading, Rejected, SignalSpec
from gateway.devices.gatt_sensor import GattSensor, behind
from gateway.links.base import Chunk
from gateway.samples import NS_PER_S, VITAL_SIGNS

RR_TICKS_PER_S = 1024
"""RR intervals come in 1/1024 s."""

SIGNAL = SignalSpec(VITAL_SIGNS, None, ("heart_rate", "rr_interval"), ("/min", "ms"))

_RATE_IS_16_BIT = 0x01
_CONTACT = 0x06
_CONTACT_LOST = 0x04
"""Contact is supported by the sensor (bit 2) and not there (bit 1 clear)."""
_ENERGY_PRESENT = 0x08
_RR_PRESENT = 0x10


class HeartRateDecoder(GattSensor):
    """Decoder of one connection to one strap (see `gateway.devices.base.Decoder`)."""

    NOTIFY: ClassVar[tuple[str, ...]] = (gatt.HEART_RATE_MEASUREMENT, *GattSensor.NOTIFY)

    def __init__(self) -> None:
        super().__init__({gatt.HEART_RATE_MEASUREMENT: measurement})

    @property
    def signals(self) -> Sequence[SignalSpec]:
        """Heart rate in /min and RR intervals in ms, whenever the strap reports."""
        return (SIGNAL,)


def measurement(chunk: Chunk) -> list[Event]:
    """Events of one Heart Rate Measurement. Raises `gatt.MalformedValueError`."""
    fields = gatt.Fields(chunk.data)
    flags = fields.uint(1)
    rate_bytes = 2 if flags & _RATE_IS_16_BIT else 1
    rate = fields.uint(rate_bytes)
    if flags & _ENERGY_PRESENT:
        fields.uint(2)
    ticks: list[int] = []
    if flags & _RR_PRESENT:
        if not fields.left or fields.left % 2:
            raise gatt.MalformedValueError("a missing or cut RR interval")
        ticks = [fields.uint(2) for _ in range(fields.left // 2)]
    if rate == 0 and flags & _CONTACT == _CONTACT_LOST:
        # What a strap off the skin calls RR intervals are no heart beats.
        return [NoValue(len(chunk.data), "no skin contact: heart rate 0")]
    events = behind(fields)
    if rate == 0:
        events.append(NoValue(rate_bytes, "heart rate 0: the strap found no rate"))
    return [*events, *_readings(rate, ticks, chunk.arrival_ns)]


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
