"""Which faults a virtual device is to suffer, which device can have which, and how they come over it while it plays."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, fields

from gateway.devices import muse_control, polar
from gateway.devices.registry import LinkKind
from gateway.virtual.bluez import VirtualBlueZ
from gateway.virtual.cyton import POLL_FAILURE, CytonFirmware
from gateway.virtual.peripheral import Peripheral
from gateway.virtual.radio_faults import DistortedFirmware, RadioFaults
from gateway.virtual.serial_line import Firmware, VirtualSerialLine
from gateway.virtual.strap import HeartRateStrap
from gateway.virtual.twins import Twin

SILENCE_S = 5.0
"""Longer than a headset or a strap may be quiet; a device that reports every minute is not noticed to be silent."""
AWAY_S = 3.0
"""How long a port is unplugged, or bluetoothd is dead."""
LINKED_POLL_S = 0.05
CONTROLS = (muse_control.CONTROL, polar.PMD_CONTROL)
"""What carries commands and their answers: BLE repeats that until it arrives."""


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """Shares are of packets or notifications (0 to 1), times are seconds after the devices are there; None: never."""

    loss: float = 0.0
    duplicates: float = 0.0
    reordering: float = 0.0
    garbage: float = 0.0
    half_packets: float = 0.0
    silence_after: float | None = None
    drop_link_after: float | None = None
    failure_message_after: float | None = None
    kill_bluetoothd_after: float | None = None
    rr_without_heart_rate: bool = False

    def wanted(self) -> Iterator[str]:
        """Names of the faults that are to happen."""
        for one in fields(self):
            if getattr(self, one.name) != one.default:
                yield one.name


def possible_faults(twin: Twin) -> tuple[str, ...]:
    """Names of the faults that this device can have, in the order of `FaultPlan`."""
    return tuple(one.name for one in fields(FaultPlan) if not why_not(twin, one.name))


def why_not(twin: Twin, fault: str) -> str:
    """Why this device cannot have this fault; empty where it can."""
    is_ble = twin.link is LinkKind.BLE
    match fault:
        case "reordering" if not is_ble:
            return "a serial line keeps the order"
        case "failure_message_after" if twin.driver not in ("cyton", "cyton_daisy"):
            return "it is the dongle of a Cyton that says it"
        case "kill_bluetoothd_after" if not is_ble:
            return "it is on a serial line"
        case "rr_without_heart_rate" if twin.driver not in ("heart_rate", "polar_h10"):
            return "it measures no RR intervals"
    return ""


@dataclass(slots=True)
class Suffering:
    """The faults of one device while it plays."""

    plan: FaultPlan
    radio: RadioFaults

    @classmethod
    def of(cls, plan: FaultPlan, seed: int) -> Suffering:
        """As the plan has it, by a chance of this seed."""
        radio = RadioFaults(
            seed,
            loss=plan.loss,
            duplicates=plan.duplicates,
            reordering=plan.reordering,
            garbage=plan.garbage,
            halves=plan.half_packets,
            spared=CONTROLS,
        )
        return cls(plan, radio)

    def befall(self, model: Peripheral) -> None:
        """Put a BLE device's notifications and measurements under the faults."""
        model.distort = self.radio
        if self.plan.rr_without_heart_rate and isinstance(model, HeartRateStrap):
            model.rr_without_heart_rate = True

    def befallen(self, firmware: Firmware) -> Firmware:
        """A serial device with its packets under the faults."""
        return DistortedFirmware(firmware, self.radio)

    async def come_over_line(self, line: VirtualSerialLine, firmware: Firmware) -> None:
        """Let what has its time happen to a serial device, until all of it has."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._fall_silent())
            if self.plan.drop_link_after is not None:
                tasks.create_task(_unplug(line, self.plan.drop_link_after))
            if self.plan.failure_message_after is not None and isinstance(firmware, CytonFirmware):
                tasks.create_task(_fail(line, firmware, self.plan.failure_message_after))

    async def come_over_peripheral(self, bluez: VirtualBlueZ, address: str) -> None:
        """Let what has its time happen to a BLE device, until all of it has."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._fall_silent())
            if self.plan.drop_link_after is not None:
                tasks.create_task(_drop_link(bluez, address, self.plan.drop_link_after))

    async def _fall_silent(self) -> None:
        if self.plan.silence_after is not None:
            await asyncio.sleep(self.plan.silence_after)
            self.radio.silent = True
            await asyncio.sleep(SILENCE_S)
            self.radio.silent = False


async def kill_bluetoothd(bluez: VirtualBlueZ, after_s: float) -> None:
    """Kill the daemon, and start it again a little later."""
    await asyncio.sleep(after_s)
    await bluez.kill()
    await asyncio.sleep(AWAY_S)
    await bluez.restart()


async def _unplug(line: VirtualSerialLine, after_s: float) -> None:
    await asyncio.sleep(after_s)
    await line.unplug()
    await asyncio.sleep(AWAY_S)
    await line.plug_in()


async def _fail(line: VirtualSerialLine, firmware: CytonFirmware, after_s: float) -> None:
    await asyncio.sleep(after_s)
    line.send(firmware.fail(POLL_FAILURE))


async def _drop_link(bluez: VirtualBlueZ, address: str, after_s: float) -> None:
    """The link is lost then, or when there is one."""
    await asyncio.sleep(after_s)
    while True:
        if bluez.settled(address):
            bluez.drop_link(address)
            return
        await asyncio.sleep(LINKED_POLL_S)
