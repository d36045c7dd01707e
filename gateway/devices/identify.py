"""Which drivers fit what a scan found: by what a BLE device advertises, by what a USB port says of itself. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from gateway.devices import gatt, muse_control

FTDI_VENDOR = 0x0403
OPENBCI_PRODUCT = 0x6015
"""FT231X, the chip of OpenBCI's dongle; other things have it, too."""
U_BLOX_VENDOR = 0x1546

_BY_SERVICE = (
    (gatt.HEART_RATE_SERVICE, "heart_rate"),
    (gatt.PULSE_OXIMETER_SERVICE, "pulse_oximeter"),
    (gatt.BLOOD_PRESSURE_SERVICE, "blood_pressure"),
    (gatt.HEALTH_THERMOMETER_SERVICE, "thermometer"),
)
_MUSE = ("muse", "muse_ppg", "muse_aux")
_MUSE_S = ("muse", "muse_athena", "muse_ppg", "muse_aux")
"""Muse S and Muse S Athena advertise alike."""


def ble_drivers(name: str, service_uuids: Iterable[str]) -> tuple[str, ...]:
    """Drivers that fit, best first; none for an unknown device.

    `service_uuids`: full UUIDs as advertised. A device advertises what it likes: the H10 mostly leaves its
    measurement service out, so its name is enough, and that service under another name (OH1, Verity) is no ECG.
    """
    uuids = {uuid.lower() for uuid in service_uuids}
    found: list[str] = []
    if muse_control.SERVICE in uuids:
        found.extend(_MUSE_S if name.lower().startswith("muses") else _MUSE)
    if name.lower().startswith("polar h10"):
        found.append("polar_h10")
    found.extend(driver for service, driver in _BY_SERVICE if service in uuids)
    return tuple(found)


def serial_drivers(vendor_id: int | None, product_id: int | None, product: str) -> tuple[str, ...]:
    """Drivers that may fit a USB port, best first: candidates, as a USB chip says little of what is behind it.

    `vendor_id`, `product_id`: of USB, None for a port that is none. `product`: the text beside them.
    """
    if (vendor_id, product_id) == (FTDI_VENDOR, OPENBCI_PRODUCT):
        return ("cyton", "cyton_daisy")
    words = product.lower()
    if vendor_id == U_BLOX_VENDOR or "gps" in words or "gnss" in words:
        return ("gps",)
    return ()
