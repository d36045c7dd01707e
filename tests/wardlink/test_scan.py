"""`wardlink gateway scan`: BLE devices of a virtual BlueZ, serial ports as pyserial lists them, sides that fail."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from dbus_fast import Variant
from serial.tools import list_ports
from serial.tools.list_ports_common import ListPortInfo

from gateway.devices import gatt
from gateway.errors import UnavailableError
from gateway.links import serial_names
from gateway.links.ble import BleLink, discover
from gateway.virtual.bluetoothctl import bluetoothctl_stub
from gateway.virtual.bluez import VirtualBlueZ
from gateway.virtual.bluez_device import DEVICE
from gateway.virtual.dbus_daemon import DbusDaemon
from gateway.virtual.muse import VirtualMuse
from gateway.virtual.strap import HeartRateStrap
from gateway.virtual.vitals import Thermometer
from wardlink import cli

pytestmark = pytest.mark.timeout(60)

DEADLINE_S = 20.0
LISTEN_S = 0.6
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bus() -> Iterator[DbusDaemon]:
    with DbusDaemon() as daemon, bluetoothctl_stub():
        yield daemon


@pytest_asyncio.fixture
async def bluez(bus: DbusDaemon, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[VirtualBlueZ]:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus.address)
    async with VirtualBlueZ(bus.address) as virtual:
        yield virtual


@pytest.fixture
def no_bus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/none")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - what it waits for is told by nobody
            await asyncio.sleep(0.01)


# --- what a scan hears


async def test_what_advertises_strongest_first(bluez: VirtualBlueZ) -> None:
    far, near, gone = HeartRateStrap("00:22:D0:3A:10:01"), VirtualMuse(), Thermometer()
    far.rssi_dbm, near.rssi_dbm = -91, -40
    for one in (far, near, gone):
        bluez.add(one)
    bluez.set_in_range(gone.address, in_range=False)
    first, second = await discover(LISTEN_S)
    assert (first.address, first.name, first.rssi_dbm) == (near.address, near.name, -40)
    assert (second.address, second.rssi_dbm, second.battery_pct, second.connected) == (far.address, -91, None, False)
    assert gatt.HEART_RATE_SERVICE in second.service_uuids
    assert not any("Connect" in call for call in bluez.calls), "nothing is connected to"


async def test_a_battery_that_is_advertised(bluez: VirtualBlueZ) -> None:
    strap = HeartRateStrap()
    bluez.add(strap)
    scan = asyncio.create_task(discover(LISTEN_S))
    await until(lambda: bluez.known(strap.address))
    level = Variant("a{sv}", {gatt.BATTERY_SERVICE: Variant("ay", b"\x2a")})
    bluez._tree.change(bluez._devices[strap.address].path, DEVICE, {"ServiceData": level})
    (found,) = await scan
    assert found.battery_pct == 42.0


async def test_what_has_a_link_is_told_of_though_it_does_not_advertise(bluez: VirtualBlueZ) -> None:
    strap = HeartRateStrap()
    bluez.add(strap)
    link = BleLink(strap.address, (gatt.HEART_RATE_MEASUREMENT,), ())
    await link.open()
    try:
        (found,) = await discover(LISTEN_S)
        assert (found.address, found.rssi_dbm, found.connected) == (strap.address, None, True)
        assert bluez.connected(strap.address), "a scan takes no link away"
    finally:
        await link.close()


async def test_a_scan_says_why_it_hears_nothing(bluez: VirtualBlueZ) -> None:
    with pytest.raises(UnavailableError, match="no Bluetooth adapter hci7, there is hci0"):
        await discover(LISTEN_S, "hci7")
    bluez.set_powered(powered=False)
    with pytest.raises(UnavailableError, match="hci0 is off") as caught:
        await discover(LISTEN_S)
    assert "power on" in caught.value.hint


async def test_a_daemon_that_dies_in_the_middle_ends_the_scan(bluez: VirtualBlueZ) -> None:
    scan = asyncio.create_task(discover(10 * DEADLINE_S))
    await until(lambda: any("StartDiscovery" in call for call in bluez.calls))
    await bluez.kill()
    done, _ = await asyncio.wait({scan}, timeout=DEADLINE_S)  # not cancelled, which would end it, too
    assert done
    with pytest.raises(UnavailableError, match="gone"):
        await scan


# --- the command


async def scan(*words: str) -> tuple[int, str, str]:
    """The command as a process of its own."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "wardlink", "gateway", "scan", "--seconds", "1", *words,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


async def test_the_command_names_the_drivers(bluez: VirtualBlueZ) -> None:
    strap, muse = HeartRateStrap("00:22:D0:3A:10:01"), VirtualMuse()
    strap.name = "evil\x1b[2Jstrap"
    strap.rssi_dbm = -70
    for one in (strap, muse):
        bluez.add(one)
    code, out, err = await scan("--json")
    assert (code, err) == (0, "")
    rows = {row["place"]: row for row in json.loads(out) if row["link"] == "BLE"}
    assert rows[strap.address]["drivers"] == ["heart_rate"]
    assert (rows[strap.address]["name"], rows[strap.address]["rssi_dbm"]) == (strap.name, -70)
    assert rows[muse.address]["drivers"][0] == "muse"
    code, out, err = await scan()
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    assert "evil\ufffd[2Jstrap" in out
    assert f"next: wardlink gateway add muse SERIAL --address {muse.address}" in out


@pytest.fixture
def ports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dongle and an unknown port, as pyserial lists them; the folder of their stable names."""

    def port(name: str, vendor: int | None, product_id: int | None, product: str | None) -> ListPortInfo:
        (tmp_path / name).touch()
        info = ListPortInfo(str(tmp_path / name))
        info.vid, info.pid, info.product = vendor, product_id, product
        return info

    by_id = tmp_path / "by-id"
    by_id.mkdir()
    (by_id / "usb-FTDI_FT231X_USB_UART_DM00D7TM").symlink_to(tmp_path / "ttyUSB0")
    found = [port("ttyUSB0", 0x0403, 0x6015, "FT231X USB UART"), port("ttyS4", None, None, None)]
    monkeypatch.setattr(list_ports, "comports", lambda: found)
    monkeypatch.setattr(serial_names, "BY_ID", by_id)
    return by_id


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(["gateway", "scan", "--seconds", "0.5", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_without_bluetooth_the_serial_ports_are_listed(
    no_bus: None, ports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = command(capsys, "--json")
    assert code == 0
    assert err.startswith("warning: BLE not scanned: no D-Bus system bus: ")
    assert err.count("\n") == 1
    unknown, dongle = json.loads(out)
    assert dongle["place"] == str(ports / "usb-FTDI_FT231X_USB_UART_DM00D7TM")
    assert dongle["drivers"] == ["cyton", "cyton_daisy"]
    assert (unknown["place"], unknown["drivers"], unknown["name"]) == (str(tmp_path / "ttyS4"), [], "")
    code, out, _ = command(capsys)
    assert code == 0
    assert "(unknown)" in out
    assert f"next: wardlink gateway add cyton SERIAL --port {dongle['place']}\n" in out


def test_with_nothing_to_scan_it_fails(
    no_bus: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(list_ports, "comports", refuse)
    code, out, err = command(capsys, "--json")
    assert (code, out) == (1, "")
    assert [line.split(":")[1] for line in err.splitlines()] == [" serial not scanned", " BLE not scanned"]


def test_a_library_that_is_not_installed_is_a_side_that_fails(
    no_bus: None, ports: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gateway.links.ble", None)
    code, out, err = command(capsys, "--json")
    assert code == 0
    assert len(json.loads(out)) == 2
    assert err.startswith("warning: BLE not scanned: ")
    assert "(hint: pip install 'wardlink[gateway]')" in err


@pytest.mark.parametrize("seconds", ["0", "-1", "soon", "nan", "1e9"])
def test_seconds_that_make_no_sense(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["gateway", "scan", f"--seconds={seconds}"])
    assert ended.value.code == 2
    assert "expected seconds, above 0" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["scan", "add", "watch", "status"])
def test_help_has_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["gateway", name, "--help"])
    assert ended.value.code == 0
    assert f"examples:\n  wardlink gateway {name}" in capsys.readouterr().out


def test_the_service_loads_none_of_it() -> None:
    code = (
        "import sys; from wardlink import cli; cli._parser('gateway');"
        "print(*(name for name in sys.modules if name.startswith(('wardlink', 'rich', 'serial', 'gateway.signal'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(done.stdout.split())
    assert "wardlink.device_commands" in loaded
    own = {
        "wardlink.scanning",
        "wardlink.adding",
        "wardlink.watching",
        "wardlink.status_view",
        "wardlink.live_values",
        "wardlink.impedance",
    }
    assert not loaded & (own | {"rich", "serial", "prometheus_client"})
