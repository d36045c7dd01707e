"""A ward's sensors together on one adapter, through lost links and a killed daemon: nothing lost, nothing doubled.

All times are the bus's (see `bus_time`), so that a busy machine makes it slow and nothing else. A device is added by
one line in `beds`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from dbus_fast import Message
from dbus_fast.aio import MessageBus

from gateway.devices import gatt, muse, muse_control, polar
from gateway.devices.base import Decoder, Event, Missing, Reading, Rejected, Samples, Send, Streaming
from gateway.devices.blood_pressure import BloodPressureDecoder
from gateway.devices.gatt_sensor import GattSensor
from gateway.devices.heart_rate import HeartRateDecoder
from gateway.devices.polar import PolarDecoder
from gateway.devices.pulse_oximeter import PulseOximeterDecoder
from gateway.devices.thermometer import ThermometerDecoder
from gateway.errors import DeviceError, UnavailableError
from gateway.links.ble import BleLink
from gateway.virtual.bluez import VirtualBlueZ
from gateway.virtual.muse import VirtualMuse
from gateway.virtual.peripheral import Peripheral
from gateway.virtual.polar import PolarH10
from gateway.virtual.sensor import VirtualSensor
from gateway.virtual.strap import HeartRateStrap
from gateway.virtual.vitals import BloodPressureCuff, PulseOximeter, Thermometer
from tests.gateway.links import bus_time

pytestmark = pytest.mark.timeout(900)
"""Against a hang alone: real seconds prove nothing here."""

SPEED = 10.0
"""The sensors' time runs so much faster."""
MUSE_SPEED = 3.0
"""Some 350 notifications a second."""
TOGETHER_S = 60.0
"""Of each device's own time, at the least."""
RECOVERY_S_MAX = 5.0
"""From the loss of a link to the data over the next one."""
DEADLINE_S = 20.0
SETTLED = 20
"""So many looks in a row that see the same: nothing is under way any more."""
PAUSE_S = 0.05
"""Before a link is opened anew."""
DROPS = 20
RECONNECTS = 50
CONTROLS = {gatt.BATTERY_LEVEL, polar.PMD_CONTROL, muse_control.CONTROL}
"""Characteristics that carry no data."""
FIRST_SECOND = "heart rate 0: the strap found no rate"
"""In its first second a strap has seen no two beats."""


def beds() -> list[Bed]:
    """The sensors, and what decodes each."""
    return [
        Bed(HeartRateStrap(seed=1, speed=SPEED), HeartRateDecoder),
        Bed(PulseOximeter(seed=2, speed=SPEED), PulseOximeterDecoder),
        Bed(BloodPressureCuff(seed=3, speed=SPEED, interval_s=31), BloodPressureDecoder),
        Bed(Thermometer(seed=4, speed=SPEED), ThermometerDecoder),
        Bed(PolarH10(seed=5, speed=SPEED), PolarDecoder),
        Bed(VirtualMuse(seed=6, speed=MUSE_SPEED), muse.MuseDecoder, muse.notified("p21"), ()),
    ]


class Bed:
    """One sensor and who listens to it: opens the link, decodes, begins anew when the link is lost."""

    def __init__(
        self,
        sensor: Peripheral,
        decoder: Callable[[], Decoder],
        notify: Iterable[str] | None = None,
        read: Iterable[str] | None = None,
    ) -> None:
        self.sensor = sensor
        if notify is None or read is None:
            assert isinstance(decoder, type)
            assert issubclass(decoder, GattSensor)
            notify, read = decoder.NOTIFY, decoder.READ
        self._new_decoder = decoder
        self.link = BleLink(sensor.address, tuple(notify), tuple(read))
        self.streams = [uuid for uuid in notify if uuid not in CONTROLS]
        """Characteristics whose every notification counts."""
        self.opened = 0
        self.streaming = False
        self.received: dict[str, list[bytes]] = {uuid: [] for uuid in self.streams}
        self.sent: dict[str, list[bytes]] = {uuid: [] for uuid in self.streams}
        self.events: list[Event] = []
        sensor.distort = self._note

    def _note(self, uuid: str, value: bytes) -> tuple[bytes]:
        if uuid in self.sent:
            self.sent[uuid].append(value)
        return (value,)

    async def listen(self) -> None:
        while True:
            try:
                await self.link.open()
                self.opened += 1
                await self._decode(self._new_decoder())
            except (UnavailableError, DeviceError):
                self.streaming = False
                await asyncio.sleep(PAUSE_S)
            finally:
                await self.link.close()

    async def _decode(self, decoder: Decoder) -> None:
        await self._act(decoder.start())
        # A cuff says nothing until it has measured.
        self.streaming = isinstance(decoder, BloodPressureDecoder)
        while True:
            chunk = await self.link.read()
            if chunk.channel in self.received:
                self.received[chunk.channel].append(chunk.data)
            await self._act(decoder.receive(chunk))

    async def _act(self, events: list[Event]) -> None:
        self.events += events
        for event in events:
            match event:
                case Send(data, channel):
                    await self.link.write(data, channel)
                case Streaming():
                    self.streaming = True


async def until(condition: Callable[[], bool], seconds: float = DEADLINE_S) -> float:
    """Wait for a condition, and give how long it took in s."""
    loop = asyncio.get_running_loop()
    begun_s = loop.time()
    async with asyncio.timeout(seconds):
        while True:
            if condition():
                return loop.time() - begun_s
            await asyncio.sleep(0.005)


async def held(address: str) -> tuple[int, int, int]:
    """File descriptors and tasks of this process, and all match rules on the bus."""
    bus = await MessageBus(address).connect()
    reply = await bus.call(
        Message(
            "org.freedesktop.DBus",
            "/org/freedesktop/DBus",
            "org.freedesktop.DBus.Debug.Stats",
            "GetAllMatchRules",
        )
    )
    untyped: Any = bus
    bus.disconnect()
    await untyped.wait_for_disconnect()
    descriptors = await asyncio.to_thread(lambda: len(list(Path("/proc/self/fd").iterdir())))
    return descriptors, len(asyncio.all_tasks()), sum(len(rules) for rules in reply.body[0].values())


async def settled(address: str) -> tuple[int, int, int]:
    """What is held once nothing is under way any more: a discovery that ends, a program that leaves the bus."""
    async with asyncio.timeout(DEADLINE_S):
        seen, looks = await held(address), 1
        while looks < SETTLED:
            await asyncio.sleep(0.02)
            now = await held(address)
            seen, looks = now, (looks + 1 if now == seen else 1)
    return seen


class Ward:
    """Beds on one adapter, and what befalls them."""

    def __init__(self, bluez: VirtualBlueZ, beds: list[Bed]) -> None:
        self.bluez = bluez
        self.beds = beds
        self.drops = 0
        self.recoveries_s: list[float] = []

    async def drop(self, dropped: Sequence[Bed]) -> None:
        """Their links are lost at one moment; each streams again within the time allowed."""
        opened = [bed.opened for bed in dropped]
        for bed in dropped:
            bed.streaming = False
            self.bluez.drop_link(bed.sensor.address)
            self.drops += 1
        await self._recover(
            lambda: all(bed.streaming and bed.opened > before for bed, before in zip(dropped, opened, strict=True))
        )
        assert [bed.opened for bed in dropped] == [before + 1 for before in opened]

    async def kill_and_restart(self) -> None:
        """The daemon is killed; everybody notices, and streams again within the time allowed after its restart."""
        for bed in self.beds:
            bed.streaming = False
        await self.bluez.kill()
        await until(lambda: not any(bed.link.connected for bed in self.beds))
        await self.bluez.restart()
        await self._recover(lambda: all(bed.streaming for bed in self.beds))

    async def _recover(self, recovered: Callable[[], bool]) -> None:
        try:
            self.recoveries_s.append(await until(recovered, RECOVERY_S_MAX))
        except TimeoutError:
            still = {bed.sensor.name: (bed.link.connected, bed.streaming) for bed in self.beds}
            pytest.fail(f"not back within {RECOVERY_S_MAX:g} s; connected, streaming: {still}")

    async def fall_silent(self) -> None:
        """Nothing more is said; what was said is received."""
        for bed in self.beds:
            bed.sensor.distort = lambda _uuid, _value: ()
        try:
            await until(lambda: not self.owed())
        except TimeoutError:
            pytest.fail(f"delivered and never received, of how many: {self.owed()}")

    def owed(self) -> dict[str, tuple[int, int]]:
        """By sensor and characteristic where more was delivered than received: how many, and of how many."""
        return {
            f"{bed.sensor.name} {gatt.name_of(uuid)}": (self.delivered(bed, uuid) - len(got), self.delivered(bed, uuid))
            for bed in self.beds
            for uuid, got in bed.received.items()
            if len(got) < self.delivered(bed, uuid)
        }

    def delivered(self, bed: Bed, uuid: str) -> int:
        return self.bluez.delivered(bed.sensor.address, uuid)


def own_time_s(sensor: Peripheral) -> float:
    """How long it has been on, by its own time."""
    assert isinstance(sensor, VirtualSensor | VirtualMuse)
    return sensor.time_s


def groups(beds: list[Bed], size: int) -> list[list[Bed]]:
    return [beds[start : start + size] for start in range(0, len(beds), size)]


def test_a_ward_through_lost_links_and_a_killed_daemon(system_bus: str) -> None:
    bus_time.run(through_lost_links_and_a_killed_daemon(system_bus))


async def through_lost_links_and_a_killed_daemon(address: str) -> None:
    async with bus_time.asked(address), VirtualBlueZ(address) as bluez:
        ward = Ward(bluez, beds())
        for bed in ward.beds:
            bluez.add(bed.sensor)
        async with asyncio.TaskGroup() as tasks:
            listening = [tasks.create_task(bed.listen()) for bed in ward.beds]
            await until(lambda: all(bed.streaming for bed in ward.beds))
            await befall(ward, address)
            await until(lambda: all(own_time_s(bed.sensor) >= TOGETHER_S for bed in ward.beds))
            cuffs = [bed for bed in ward.beds if isinstance(bed.sensor, BloodPressureCuff)]
            await until(lambda: all(len(bed.received[gatt.BLOOD_PRESSURE_MEASUREMENT]) > 2 for bed in cuffs))
            await ward.fall_silent()
            for task in listening:
                task.cancel()
        for bed in ward.beds:
            judge(bed, ward)
        for bed in cuffs:
            results = bed.received[gatt.BLOOD_PRESSURE_MEASUREMENT]
            assert results == bed.sent[gatt.BLOOD_PRESSURE_MEASUREMENT], "also what was measured without a link"
        print(f"back after {max(ward.recoveries_s):.2f} s at the most, {len(ward.recoveries_s)} times")


async def befall(ward: Ward, address: str) -> None:
    """Links that are lost one after the other, two at once and all at once; a killed daemon; the reconnects."""
    for size in (1, 2, len(ward.beds)):
        for dropped in groups(ward.beds, size):
            await ward.drop(dropped)
    while ward.drops < DROPS:
        await ward.drop(ward.beds)
    await ward.kill_and_restart()
    before = await settled(address)
    # Rounded up: fifty or more.
    for _ in range(-(-RECONNECTS // len(ward.beds))):
        await ward.drop(ward.beds)
    assert await settled(address) == before


def judge(bed: Bed, ward: Ward) -> None:
    """All that went over the link was received, once and in order, and decoded without a gap."""
    name = bed.sensor.name
    for uuid, received in bed.received.items():
        assert len(received) == ward.delivered(bed, uuid), f"{name}: {gatt.name_of(uuid)}"
        rest = iter(bed.sent[uuid])
        assert all(value in rest for value in received), f"{name}: {gatt.name_of(uuid)} out of order, or doubled"
    assert not [event for event in bed.events if isinstance(event, Missing)]
    assert {event.reason for event in bed.events if isinstance(event, Rejected)} <= {FIRST_SECOND}
    assert sum(isinstance(event, Reading | Samples) for event in bed.events) > 2
