"""What must hold for every driver: it has a twin, its silence is noticed in time, and the twin's data comes back."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

import pytest
from tenacity import wait_fixed

from gateway.acquisition import Acquisition, Outputs, State
from gateway.clock import HostClock
from gateway.devices.registry import CUFF_SILENCE_S, DRIVERS, Asked
from gateway.reach import link_maker
from gateway.samples import LossRecord, SampleBlock
from gateway.settings import Device
from gateway.virtual.bluetoothctl import bluetoothctl_stub
from gateway.virtual.bluez import VirtualBlueZ
from gateway.virtual.dbus_daemon import DbusDaemon
from gateway.virtual.fault_plan import FaultPlan, Suffering
from gateway.virtual.peripheral import Peripheral
from gateway.virtual.serial_line import VirtualSerialLine
from gateway.virtual.twins import TWINS

pytestmark = pytest.mark.timeout(120)

DEADLINE_S = 60.0
SILENCE_S = 2.5
"""In place of each driver's own: longer than the longest period."""
PACKET_PERIOD_S = {
    "cyton": 1 / 250,
    "cyton_daisy": 1 / 250,
    "muse": 12 / 256,
    "muse_aux": 12 / 256,
    "muse_ppg": 12 / 256,
    "muse_athena": 4 / 256,
    "heart_rate": 1.0,
    "pulse_oximeter": 1.0,
    "polar_h10": 73 / 130,
    "nonin": 1 / 3,
    "nonin_wristox2": 1 / 3,
    "nonin_onyx": 1 / 3,
    "contec": 1 / 60,
    "contec_old": 1 / 60,
    "gps": 1.0,
}
"""Of what says most often that a device is alive."""
SPOKEN_TO = {"blood_pressure", "thermometer"}
"""They report when somebody uses them: the link alone says that they are there."""
OF_THE_SAME_TWIN = {"muse_aux", "muse_ppg"}
"""Other presets of the virtual Muse."""


def test_every_driver_of_a_device_has_a_twin() -> None:
    devices = {name for name, driver in DRIVERS.items() if not isinstance(driver.line, Asked)}
    assert {twin.driver for twin in TWINS.values()} == devices - OF_THE_SAME_TWIN


def test_connected_means_data_within_so_many_packet_periods() -> None:
    assert set(PACKET_PERIOD_S) | SPOKEN_TO == {
        name for name, driver in DRIVERS.items() if not isinstance(driver.line, Asked)
    }
    for name, period_s in PACKET_PERIOD_S.items():
        periods = DRIVERS[name].silence_timeout_s / period_s
        assert periods >= 5, f"{name}: one report that fails on the air is no silence"
        assert periods <= 250, name
        assert DRIVERS[name].silence_timeout_s <= 30, name
    assert {DRIVERS[name].silence_timeout_s for name in SPOKEN_TO} == {CUFF_SILENCE_S}


@dataclass
class Read:
    """A twin that is read, and what its acquisition did."""

    name: str
    suffering: Suffering
    acquisition: Acquisition
    task: asyncio.Task[None]
    samples: list[int] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    @property
    def streams(self) -> bool:
        return self.acquisition.condition.state is State.STREAMING


async def until(condition: Callable[[], bool], what: Callable[[], object]) -> None:
    try:
        async with asyncio.timeout(DEADLINE_S):
            while True:
                if condition():
                    return
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(what()) from None


@pytest.fixture(scope="module")
def bus() -> Iterator[DbusDaemon]:
    with DbusDaemon() as daemon, bluetoothctl_stub():
        yield daemon


@contextlib.asynccontextmanager
async def all_read(bus: DbusDaemon) -> AsyncIterator[list[Read]]:
    """Every twin that talks by itself, read by its own driver over its own link, all at once."""
    found: list[Read] = []
    async with contextlib.AsyncExitStack() as stack:
        bluez = await stack.enter_async_context(VirtualBlueZ(bus.address))
        for name, twin in TWINS.items():
            if twin.driver in SPOKEN_TO:
                continue
            model = await asyncio.to_thread(twin.make, None, 1)
            suffering = Suffering.of(FaultPlan(), 1)
            if isinstance(model, Peripheral):
                suffering.befall(model)
                suffering.radio.spared = ()
                bluez.add(model)
                device = Device(driver=twin.driver, serial=name, address=model.address)
            else:
                line = await stack.enter_async_context(VirtualSerialLine(suffering.befallen(model)))
                device = Device(driver=twin.driver, serial=name, port=line.port)
            found.append(start(name, device, suffering))
        try:
            yield found
        finally:
            for one in found:
                one.task.cancel()
            await asyncio.gather(*(one.task for one in found), return_exceptions=True)


def start(name: str, device: Device, suffering: Suffering) -> Read:
    samples: list[int] = []

    def emit(content: SampleBlock | LossRecord) -> None:
        if isinstance(content, SampleBlock):
            samples.append(len(content))

    driver = dataclasses.replace(DRIVERS[device.driver], silence_timeout_s=SILENCE_S)
    outputs = Outputs(emit, lambda _birth: None, lambda _device, _features: None)
    acquisition = Acquisition("gw-1", device, driver, link_maker(device), HostClock(), outputs, wait_fixed(0.2))
    read = Read(name, suffering, acquisition, asyncio.create_task(acquisition.run()), samples)
    change = acquisition._change

    def watched(state: State, reason: str) -> None:
        read.reasons.append(reason)
        change(state, reason)

    acquisition._change = watched  # type: ignore[method-assign] - watched, not replaced
    return read


async def test_a_silence_of_any_device_is_noticed_and_it_is_begun_anew(
    bus: DbusDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus.address)
    async with all_read(bus) as found:
        assert len(found) == len(TWINS) - len(SPOKEN_TO)
        await until(lambda: all(one.samples for one in found), lambda: [one.name for one in found if not one.samples])
        assert {one.acquisition.condition.segments for one in found} == {1}
        for one in found:
            one.suffering.radio.silent = True
        await until(
            lambda: all(any("no data from " in reason for reason in one.reasons) for one in found),
            lambda: {one.name: one.reasons for one in found},
        )
        before = {one.name: len(one.samples) for one in found}
        for one in found:
            one.suffering.radio.silent = False
        await until(
            lambda: all(one.streams and len(one.samples) > before[one.name] for one in found),
            lambda: {one.name: one.reasons for one in found if not one.streams},
        )
        assert all(one.acquisition.condition.segments >= 2 for one in found)
