"""The virtual BlueZ as a program sees it that speaks D-Bus by itself, and the private daemon it lives on."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from dbus_fast import Message, MessageType, Variant, unpack_variants
from dbus_fast.aio import MessageBus

from gateway.devices import gatt
from gateway.errors import UnavailableError
from gateway.virtual.bluetoothctl import bluetoothctl_stub
from gateway.virtual.bluez import VirtualBlueZ
from gateway.virtual.dbus_daemon import DbusDaemon
from gateway.virtual.strap import HeartRateStrap

pytestmark = pytest.mark.timeout(60)

ADAPTER = "/org/bluez/hci0"
STRAP = f"{ADAPTER}/dev_00_22_D0_3A_10_01"
MEASUREMENT = f"{STRAP}/service0010/char0013"
DEADLINE_S = 10.0


class Program:
    """A D-Bus client that keeps what it hears from org.bluez, signals and replies in their order."""

    def __init__(self, bus: MessageBus) -> None:
        self.bus = bus
        self.heard: list[str] = []
        self._news = asyncio.Event()
        bus.add_message_handler(self._hear)

    def _hear(self, message: Message) -> bool:
        if message.message_type is MessageType.SIGNAL and message.member == "PropertiesChanged":
            interface, changed, _ = message.body
            self.heard += [f"{interface.rsplit('.')[-1]}.{key}={value.value}" for key, value in changed.items()]
        elif message.message_type is MessageType.SIGNAL and message.member == "InterfacesAdded":
            self.heard.append(f"added {'/'.join(message.body[0].split('/')[4:])}")
        elif message.message_type is not MessageType.SIGNAL and message.reply_serial:
            self.heard.append(message.error_name or "reply")
        self._news.set()
        return False

    async def call(self, path: str, method: str, signature: str = "", *body: Any) -> Message:
        interface, member = method.rsplit(".", 1)
        return await self.bus.call(Message("org.bluez", path, interface, member, signature=signature, body=list(body)))

    async def hear(self, what: str) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while what not in self.heard:
                self._news.clear()
                await self._news.wait()

    async def close(self) -> None:
        untyped: Any = self.bus
        self.bus.disconnect()
        await untyped.wait_for_disconnect()


@pytest.fixture(scope="module")
def daemon() -> Iterator[DbusDaemon]:
    with DbusDaemon() as running:
        yield running


@pytest.fixture
def strap() -> HeartRateStrap:
    return HeartRateStrap(speed=25)


@pytest_asyncio.fixture
async def bluez(daemon: DbusDaemon, strap: HeartRateStrap) -> AsyncIterator[VirtualBlueZ]:
    async with VirtualBlueZ(daemon.address) as virtual:
        virtual.add(strap)
        yield virtual


async def joined(daemon: DbusDaemon) -> Program:
    program = Program(await MessageBus(daemon.address).connect())
    await program.bus.call(
        Message(
            "org.freedesktop.DBus",
            "/org/freedesktop/DBus",
            "org.freedesktop.DBus",
            "AddMatch",
            signature="s",
            body=["type='signal',sender='org.bluez'"],
        )
    )
    return program


@pytest_asyncio.fixture
async def program(daemon: DbusDaemon, bluez: VirtualBlueZ) -> AsyncIterator[Program]:
    """A program on the bus that has discovered the strap and stopped discovering."""
    program = await joined(daemon)
    await program.call(ADAPTER, "org.bluez.Adapter1.StartDiscovery")
    await program.hear("added dev_00_22_D0_3A_10_01")
    await program.call(ADAPTER, "org.bluez.Adapter1.StopDiscovery")
    program.heard.clear()
    yield program
    await program.close()


async def test_the_order_of_a_connect(program: Program) -> None:
    await program.call(STRAP, "org.bluez.Device1.Connect")
    await program.hear("Device1.ServicesResolved=True")
    assert program.heard[:2] == ["Device1.Connected=True", "reply"]
    assert program.heard[2:4] == ["added dev_00_22_D0_3A_10_01/service0010", f"added {MEASUREMENT[len(ADAPTER) + 1 :]}"]
    assert program.heard[-1] == "Device1.ServicesResolved=True"


async def test_an_aborted_connect_comes_up_and_goes_down(bluez: VirtualBlueZ, program: Program) -> None:
    bluez.refuse_connects("00:22:D0:3A:10:01", 1)
    reply = await program.call(STRAP, "org.bluez.Device1.Connect")
    assert program.heard == ["Device1.Connected=True", "Device1.Connected=False", "org.bluez.Error.Failed"]
    assert reply.body == ["le-connection-abort-by-local"]


async def test_a_lost_link_and_a_reconnect_keep_services_and_sessions(bluez: VirtualBlueZ, program: Program) -> None:
    await program.call(STRAP, "org.bluez.Device1.Connect")
    await program.hear("Device1.ServicesResolved=True")
    await program.call(MEASUREMENT, "org.bluez.GattCharacteristic1.StartNotify")
    program.heard.clear()
    bluez.drop_link("00:22:D0:3A:10:01")
    await program.hear("Device1.Connected=False")
    assert [line for line in program.heard if line.startswith("Device1")] == [
        "Device1.ServicesResolved=False",
        "Device1.Connected=False",
    ]
    program.heard.clear()
    await program.call(STRAP, "org.bluez.Device1.Connect")
    await program.hear("Device1.ServicesResolved=True")
    assert not any(line.startswith("added") for line in program.heard)
    assert bluez.notify_sessions("00:22:D0:3A:10:01") == 1


async def test_nothing_counts_as_delivered_while_the_daemon_is_being_killed(
    bluez: VirtualBlueZ, program: Program, strap: HeartRateStrap
) -> None:
    await program.call(STRAP, "org.bluez.Device1.Connect")
    await program.hear("Device1.ServicesResolved=True")
    await program.call(MEASUREMENT, "org.bluez.GattCharacteristic1.StartNotify")
    strap.notify(gatt.HEART_RATE_MEASUREMENT, b"\x00\x01")
    before = bluez.delivered(strap.address, gatt.HEART_RATE_MEASUREMENT)
    kill = asyncio.create_task(bluez.kill())
    await asyncio.sleep(0)
    assert not kill.done()
    strap.notify(gatt.HEART_RATE_MEASUREMENT, b"\x00\x02")
    await kill
    assert before > 0
    assert bluez.delivered(strap.address, gatt.HEART_RATE_MEASUREMENT) == before
    assert not bluez.connected(strap.address)


async def test_a_daemon_that_hangs_delivers_nothing(
    bluez: VirtualBlueZ, program: Program, strap: HeartRateStrap
) -> None:
    await program.call(STRAP, "org.bluez.Device1.Connect")
    await program.hear("Device1.ServicesResolved=True")
    await program.call(MEASUREMENT, "org.bluez.GattCharacteristic1.StartNotify")
    strap.silent = True
    bluez.hang()
    before = bluez.delivered(strap.address, gatt.HEART_RATE_MEASUREMENT)
    strap.notify(gatt.HEART_RATE_MEASUREMENT, b"\x00\x01")
    assert bluez.delivered(strap.address, gatt.HEART_RATE_MEASUREMENT) == before


async def test_two_programs_hear_everything_twice_until_one_leaves(
    daemon: DbusDaemon, bluez: VirtualBlueZ, program: Program
) -> None:
    other = await joined(daemon)
    await program.call(STRAP, "org.bluez.Device1.Connect")
    await program.hear("Device1.ServicesResolved=True")
    for each in (program, other):
        await each.call(MEASUREMENT, "org.bluez.GattCharacteristic1.StartNotify")

    async def values_per_notification() -> float:
        delivered = bluez.delivered("00:22:D0:3A:10:01", gatt.HEART_RATE_MEASUREMENT)
        program.heard.clear()
        async with asyncio.timeout(DEADLINE_S):
            while bluez.delivered("00:22:D0:3A:10:01", gatt.HEART_RATE_MEASUREMENT) < delivered + 10:
                program._news.clear()
                await program._news.wait()
        await program.call(ADAPTER, "org.freedesktop.DBus.Properties.GetAll", "s", "org.bluez.Adapter1")
        return sum(line.startswith("GattCharacteristic1.Value") for line in program.heard) / 10

    assert await values_per_notification() == pytest.approx(2, abs=0.3)
    await other.close()
    async with asyncio.timeout(DEADLINE_S):
        while bluez.notify_sessions("00:22:D0:3A:10:01") > 1:
            program._news.clear()
            await program._news.wait()
    assert await values_per_notification() == pytest.approx(1, abs=0.15)


async def test_discovery_finds_only_what_the_filter_asks_for(daemon: DbusDaemon, bluez: VirtualBlueZ) -> None:
    program = await joined(daemon)
    try:
        wanted = {"UUIDs": Variant("as", [gatt.PULSE_OXIMETER_SERVICE])}
        await program.call(ADAPTER, "org.bluez.Adapter1.SetDiscoveryFilter", "a{sv}", wanted)
        await program.call(ADAPTER, "org.bluez.Adapter1.StartDiscovery")
        again = await program.call(ADAPTER, "org.bluez.Adapter1.StartDiscovery")
        assert again.error_name == "org.bluez.Error.InProgress"
        oximeter = HeartRateStrap("00:22:D0:00:00:02", "other")
        oximeter.services[0].uuid = gatt.PULSE_OXIMETER_SERVICE
        bluez.add(oximeter)
        await program.hear("added dev_00_22_D0_00_00_02")
        assert "added dev_00_22_D0_3A_10_01" not in program.heard
        await bluez.remove("00:22:D0:00:00:02")
        reply = await program.call("/", "org.freedesktop.DBus.ObjectManager.GetManagedObjects")
        assert list(reply.body[0]) == ["/org/bluez", ADAPTER]
    finally:
        await program.close()


@pytest.mark.parametrize(
    ("path", "method", "arguments", "error"),
    [
        (f"{ADAPTER}/dev_00", "org.bluez.Device1.Connect", (), "org.freedesktop.DBus.Error.UnknownObject"),
        (STRAP, "org.bluez.Device1.Dance", (), "org.freedesktop.DBus.Error.UnknownMethod"),
        (ADAPTER, "org.bluez.Adapter1.Dance", (), "org.freedesktop.DBus.Error.UnknownMethod"),
        (STRAP, "org.bluez.Device1.Disconnect", (), "org.bluez.Error.NotConnected"),
        (ADAPTER, "org.bluez.Adapter1.StopDiscovery", (), "org.bluez.Error.Failed"),
        (ADAPTER, "org.bluez.Adapter1.RemoveDevice", ("o", "/org/none"), "org.bluez.Error.DoesNotExist"),
        (
            STRAP,
            "org.freedesktop.DBus.Properties.Get",
            ("ss", "org.bluez.Device1", "Shoe"),
            "org.freedesktop.DBus.Error.UnknownProperty",
        ),
        (
            STRAP,
            "org.freedesktop.DBus.Properties.GetAll",
            ("s", "org.none"),
            "org.freedesktop.DBus.Error.UnknownInterface",
        ),
        (
            STRAP,
            "org.freedesktop.DBus.Properties.Set",
            ("ssv", "org.bluez.Device1", "Address", Variant("s", "x")),
            "org.freedesktop.DBus.Error.PropertyReadOnly",
        ),
    ],
)
async def test_errors(program: Program, path: str, method: str, arguments: tuple[Any, ...], error: str) -> None:
    assert (await program.call(path, method, *arguments)).error_name == error


async def test_properties_and_introspection(program: Program) -> None:
    trusted = ("org.bluez.Device1", "Trusted")
    await program.call(STRAP, "org.freedesktop.DBus.Properties.Set", "ssv", *trusted, Variant("b", value=True))
    reply = await program.call(STRAP, "org.freedesktop.DBus.Properties.Get", "ss", *trusted)
    assert reply.body[0].value is True
    await program.call(STRAP, "org.bluez.Device1.Pair")
    reply = await program.call(STRAP, "org.freedesktop.DBus.Properties.GetAll", "s", "org.bluez.Device1")
    properties = unpack_variants(reply.body[0])
    assert properties["Paired"] is True
    assert properties["UUIDs"] == sorted(
        [gatt.HEART_RATE_SERVICE, gatt.BATTERY_SERVICE, gatt.DEVICE_INFORMATION_SERVICE]
    )
    assert "RSSI" not in properties
    node = await program.bus.introspect("org.bluez", ADAPTER)
    assert [child.name for child in node.nodes] == ["dev_00_22_D0_3A_10_01"]


async def test_one_bus_carries_one_bluez(daemon: DbusDaemon, bluez: VirtualBlueZ) -> None:
    with pytest.raises(UnavailableError, match="taken"):
        async with VirtualBlueZ(daemon.address):
            pass
    with pytest.raises(ValueError, match="already"):
        bluez.add(HeartRateStrap())


def test_the_daemon_leaves_nothing_behind() -> None:
    daemon = DbusDaemon()
    with pytest.raises(UnavailableError, match="not running"):
        _ = daemon.address
    daemon.start()
    daemon.start()
    folder = Path(daemon.address.removeprefix("unix:path=").split(",")[0]).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    assert daemon.pid is not None
    pid = daemon.pid
    daemon.stop()
    daemon.stop()
    assert not Path(f"/proc/{pid}").exists()
    assert not folder.exists()


def test_without_the_program_there_is_a_hint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match="not installed") as caught:
        DbusDaemon().start()
    assert "apt install dbus" in caught.value.hint


def test_a_daemon_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with pytest.raises(UnavailableError, match="did not start"):
        DbusDaemon().start()
    assert not list(long.iterdir())


def test_the_stub_answers_the_version_and_goes() -> None:
    before = shutil.which("bluetoothctl")
    with bluetoothctl_stub() as folder:
        assert shutil.which("bluetoothctl") == str(folder / "bluetoothctl")
        said = subprocess.run(["bluetoothctl", "--version"], capture_output=True, text=True, check=True).stdout
    assert said == "bluetoothctl: 5.82\n"
    assert shutil.which("bluetoothctl") == before
    assert not folder.exists()
