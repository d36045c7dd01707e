"""Which driver fits: checked against what every virtual twin advertises, and against USB ports as Linux shows them."""

from __future__ import annotations

import pytest

from gateway.devices import gatt, muse_control, polar
from gateway.devices.identify import ble_drivers, serial_drivers
from gateway.devices.registry import DRIVERS, LinkKind
from gateway.virtual.peripheral import Peripheral
from gateway.virtual.twins import TWINS

BLE_TWINS = [name for name, twin in TWINS.items() if twin.link is LinkKind.BLE]


@pytest.mark.parametrize("name", BLE_TWINS)
def test_every_ble_twin_is_recognised(name: str) -> None:
    device = TWINS[name].make(None, 1)
    assert isinstance(device, Peripheral)
    found = ble_drivers(device.name, [service.uuid for service in device.services])
    assert TWINS[name].driver in found
    assert all(DRIVERS[driver].link is LinkKind.BLE for driver in found)


@pytest.mark.parametrize(
    ("name", "services", "drivers"),
    [
        ("", [gatt.HEART_RATE_SERVICE.upper()], ("heart_rate",)),
        ("", [gatt.PULSE_OXIMETER_SERVICE, gatt.BATTERY_SERVICE], ("pulse_oximeter",)),
        ("", [gatt.BLOOD_PRESSURE_SERVICE], ("blood_pressure",)),
        ("", [gatt.HEALTH_THERMOMETER_SERVICE], ("thermometer",)),
        ("", [gatt.HEALTH_THERMOMETER_SERVICE, gatt.HEART_RATE_SERVICE], ("heart_rate", "thermometer")),
        ("Muse-1A2B", [muse_control.SERVICE], ("muse", "muse_ppg", "muse_aux")),
        ("MuseS-1A2B", [muse_control.SERVICE], ("muse", "muse_athena", "muse_ppg", "muse_aux")),
        ("Muse-1A2B", [], ()),
        ("Polar H10 A1B2C3D4", [gatt.HEART_RATE_SERVICE], ("polar_h10", "heart_rate")),
        ("Polar H10 A1B2C3D4", [polar.PMD_SERVICE], ("polar_h10",)),
        ("Polar OH1 A1B2C3D4", [polar.PMD_SERVICE, gatt.HEART_RATE_SERVICE], ("heart_rate",)),
        ("Kitchen TV", [gatt.DEVICE_INFORMATION_SERVICE], ()),
        ("", [], ()),
    ],
)
def test_by_what_is_advertised(name: str, services: list[str], drivers: tuple[str, ...]) -> None:
    assert ble_drivers(name, services) == drivers


@pytest.mark.parametrize(
    ("vendor", "product_id", "product", "drivers"),
    [
        (0x0403, 0x6015, "FT231X USB UART", ("cyton", "cyton_daisy")),
        (0x0403, 0x6001, "FT232R USB UART", ()),
        (0x10C4, 0xEA60, "CP2102 USB to UART Bridge Controller", ()),
        (0x1546, 0x01A8, "u-blox 8", ("gps",)),
        (0x067B, 0x2303, "USB GPS Receiver", ("gps",)),
        (None, None, "", ()),
        (None, 0x6015, "", ()),
    ],
)
def test_by_what_a_usb_port_says(vendor: int | None, product_id: int | None, product: str, drivers: object) -> None:
    assert serial_drivers(vendor, product_id, product) == drivers
