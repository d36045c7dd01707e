"""The virtual vitals sensors and the H10 over the real BLE library, faults included."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager

import pytest

from gateway.devices import gatt, polar
from gateway.devices.base import Event, Facts, Missing, NoValue, Reading, Rejected, Samples, Send, Streaming
from gateway.devices.blood_pressure import BloodPressureDecoder
from gateway.devices.gatt_sensor import GattSensor
from gateway.devices.polar import PolarDecoder
from gateway.devices.pulse_oximeter import PulseOximeterDecoder
from gateway.devices.thermometer import ThermometerDecoder
from gateway.errors import DeviceError
from gateway.links.ble import BleLink
from gateway.virtual.bluez import VirtualBlueZ
from gateway.virtual.polar import PolarH10
from gateway.virtual.sensor import VirtualSensor
from gateway.virtual.vitals import BloodPressureCuff, PulseOximeter, Thermometer

pytestmark = pytest.mark.timeout(60)

SPEED = 25.0
DEADLINE_S = 10.0


async def events(sensor: VirtualSensor, decoder: GattSensor) -> AsyncGenerator[Event, None]:
    """What the decoder makes of the sensor, for as long as somebody asks; what it sends is written."""
    link = BleLink(sensor.address, decoder.NOTIFY, decoder.READ)
    try:
        await link.open()
        waiting = decoder.start()
        async with asyncio.timeout(DEADLINE_S):
            while True:
                for event in waiting:
                    if isinstance(event, Send):
                        await link.write(event.data, event.channel)
                    yield event
                waiting = decoder.receive(await link.read())
    finally:
        await link.close()


async def until(condition: Callable[[Event], bool], stream: AsyncIterator[Event]) -> list[Event]:
    """Events up to and including the first that is so."""
    got: list[Event] = []
    async for event in stream:
        got.append(event)
        if condition(event):
            return got
    raise AssertionError("the events ended")


@asynccontextmanager
async def heard(bluez: VirtualBlueZ, sensor: VirtualSensor, decoder: GattSensor) -> AsyncIterator[AsyncIterator[Event]]:
    bluez.add(sensor)
    async with aclosing(events(sensor, decoder)) as stream:
        yield stream


def has(field: str) -> Callable[[Event], bool]:
    return lambda event: isinstance(event, Reading) and field in event.fields


def says(reason: str) -> Callable[[Event], bool]:
    return lambda event: isinstance(event, Rejected) and reason in event.reason


async def test_an_oximeter_and_its_faults(bluez: VirtualBlueZ) -> None:
    oximeter = PulseOximeter(seed=2, speed=SPEED)
    async with heard(bluez, oximeter, PulseOximeterDecoder()) as stream:
        begun = await until(has("spo2"), stream)
        assert begun[:3] == [Facts(model="Virtual oximeter"), Facts(firmware="1.0.0"), Facts(battery_pct=87.0)]
        oximeter.contact = False
        await until(says("sensor is not on the user"), stream)
        oximeter.contact, oximeter.without_value = True, True
        await until(says("spo2: the sensor has no value"), stream)
        oximeter.without_value, oximeter.malformed = False, True
        malformed = (await until(says("too short"), stream))[-1]
        assert not isinstance(malformed, NoValue)
        oximeter.malformed = False
        await until(has("perfusion_index"), stream)
        oximeter.spot_check(stored=True)
        await until(says("stored measurement"), stream)


async def test_a_cuff_that_indicates_what_it_kept(bluez: VirtualBlueZ) -> None:
    cuff = BloodPressureCuff(seed=2, speed=SPEED, interval_s=600)
    for _ in range(1800):
        cuff.measurements()
    async with heard(bluez, cuff, BloodPressureDecoder()) as stream:
        readings: list[Reading] = []
        while len(readings) < 3:
            readings += [event for event in await until(has("systolic_bp"), stream) if isinstance(event, Reading)]
    ages_s = [round((readings[-1].arrival_ns - reading.arrival_ns) / 1e9) for reading in readings]
    # The last was just taken, and counts from its arrival.
    assert ages_s == pytest.approx([1200, 600, 0], abs=3)


async def test_a_thermometer_in_fahrenheit(bluez: VirtualBlueZ) -> None:
    thermometer = Thermometer(seed=2, speed=SPEED * 4, fahrenheit=True)
    async with heard(bluez, thermometer, ThermometerDecoder()) as stream:
        reading = (await until(has("temperature"), stream))[-1]
        assert isinstance(reading, Reading)
        assert 36 < reading.fields["temperature"] < 37.5
        thermometer.without_value = True
        await until(says("temperature: the sensor has no value"), stream)


async def test_an_h10(bluez: VirtualBlueZ) -> None:
    sensor = PolarH10(seed=2, speed=5)
    async with heard(bluez, sensor, PolarDecoder()) as stream:
        await until(lambda event: isinstance(event, Streaming), stream)
        got = await until(lambda event: isinstance(event, Samples) and event.index >= 10 * 73, stream)
        assert not any(isinstance(event, Missing) for event in got)
        sensor.distort = lambda uuid, value: () if uuid == polar.PMD_DATA else (value,)
        await until(has("heart_rate"), stream)
        await until(has("heart_rate"), stream)
        sensor.distort = None
        lost = (await until(lambda event: isinstance(event, Missing), stream))[-1]
        assert isinstance(lost, Missing)
        assert lost.count % 73 == 0
        assert lost.count > 0


async def test_an_h10_that_is_charging(bluez: VirtualBlueZ) -> None:
    sensor = PolarH10(seed=2, speed=5)
    sensor.start_error = 13
    async with heard(bluez, sensor, PolarDecoder()) as stream:
        with pytest.raises(DeviceError, match="charger"):
            await until(lambda event: isinstance(event, Streaming), stream)


async def test_an_adapter_with_small_packets(bluez: VirtualBlueZ) -> None:
    async with heard(bluez, PolarH10(seed=2, speed=5, mtu_bytes=100), PolarDecoder()) as stream:
        with pytest.raises(DeviceError, match="too small"):
            await until(lambda event: isinstance(event, Streaming), stream)


async def test_what_has_no_listener_is_not_subscribed_to(bluez: VirtualBlueZ) -> None:
    cuff = BloodPressureCuff(seed=2, speed=SPEED, interval_s=31)
    async with heard(bluez, cuff, BloodPressureDecoder()) as stream:
        await until(has("systolic_bp"), stream)
        assert bluez.delivered(cuff.address, gatt.INTERMEDIATE_CUFF_PRESSURE) == 0
