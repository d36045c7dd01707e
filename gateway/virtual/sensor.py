"""What all virtual sensors share: a time of their own that can run fast, a battery, device information, faults.

A sensor is a model of its own time alone, so that hours of it can be made in a moment.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from gateway.devices import gatt
from gateway.virtual.peripheral import MTU_BYTES, Characteristic, Peripheral, Service

BATTERY_PCT_PER_HOUR = 0.25
"""400 hours on one coin cell."""


class VirtualSensor(Peripheral):
    """A sensor that has something to say every so often; a subclass adds its services and `measurements`.

    `speed` makes its time run faster than the clock's (10: ten of its seconds in one).
    Faults, to be set at any time: `silent` (nothing more is sent, and the link stays up), `malformed` (the last byte
    of every measurement is missing), and `distort` for what happens on the radio.
    """

    def __init__(
        self,
        address: str,
        name: str,
        services: Sequence[Service],
        *,
        period_s: float,
        speed: float = 1.0,
        battery_pct: float = 87.0,
        mtu_bytes: int = MTU_BYTES,
    ) -> None:
        super().__init__(
            address, name, (*services, *_standard_services(name, address, battery_pct)), mtu_bytes=mtu_bytes
        )
        self.silent = False
        self.malformed = False
        self.time_s = 0.0
        """The sensor's own time since it was switched on."""
        self._period_s = period_s
        self._speed = speed
        self._battery_pct = battery_pct

    def measurements(self) -> list[tuple[str, bytes]]:
        """Let the next period pass and give what is notified at its end: characteristics and values."""
        raise NotImplementedError

    def battery_pct(self) -> int:
        """Charge in whole %, which falls with the sensor's own time."""
        return max(0, round(self._battery_pct - BATTERY_PCT_PER_HOUR * self.time_s / 3600))

    async def run(self) -> None:
        """Notify at the end of every period of the sensor's time, at points of time that do not drift."""
        loop = asyncio.get_running_loop()
        start_s, number = loop.time(), 0
        while True:
            number += 1
            await asyncio.sleep(start_s + number * self._period_s / self._speed - loop.time())
            for uuid, value in self.measurements():
                self.send(uuid, value)
            battery = bytes([self.battery_pct()])
            if battery != self.characteristic(gatt.BATTERY_LEVEL).value:
                self.send(gatt.BATTERY_LEVEL, battery)

    def send(self, uuid: str, value: bytes) -> None:
        """Notify a value, as the faults let it through."""
        if not self.silent:
            self.notify(uuid, value[:-1] if self.malformed else value)


def readable(uuid: str, value: bytes) -> Characteristic:
    """A characteristic that can only be read."""
    return Characteristic(uuid, ("read",), value)


def _standard_services(name: str, address: str, battery_pct: float) -> tuple[Service, Service]:
    level = Characteristic(gatt.BATTERY_LEVEL, ("read", "notify"), bytes([round(battery_pct)]))
    return (
        Service(gatt.BATTERY_SERVICE, (level,)),
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
