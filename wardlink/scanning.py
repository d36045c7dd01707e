"""`wardlink gateway scan`: what is there on BLE and on the serial ports, and which driver fits."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from gateway.devices.identify import ble_drivers, serial_drivers
from gateway.errors import EXIT_FAILURE, EXIT_OK, UnavailableError
from wardlink.terminal import harmless, show_rows

Row = dict[str, Any]
COLUMNS = ("link", "place", "name", "drivers", "rssi_dbm", "battery_pct", "note")
NOT_INSTALLED_HINT = "pip install 'wardlink[gateway]'"
CONNECTED_NOTE = "connected already"
CANDIDATES_NOTE = "by its USB chip: may be another device"


def scan(seconds: float, adapter: str | None, *, as_json: bool) -> int:
    """Scan both sides and print what is there. Exit code 1 where neither could be scanned."""
    found: list[Row] = []
    scanned = 0
    for side, look in (("serial", _serial), ("BLE", lambda: _ble(seconds, adapter))):
        try:
            rows = look()
        except UnavailableError as error:
            _warn(side, error)
            continue
        except ModuleNotFoundError as error:
            _warn(side, UnavailableError(f"{error.name} is not installed", hint=NOT_INSTALLED_HINT))
            continue
        scanned += 1
        found.extend(rows)
    if not scanned:
        return EXIT_FAILURE
    if as_json:
        show_rows(COLUMNS, found, as_json=True)
        return EXIT_OK
    show_rows(COLUMNS, [_words(row) for row in found], as_json=False)
    fitting = next((row for row in found if row["drivers"] and not row["connected"]), None)
    if fitting is not None:
        option = "--port" if fitting["link"] == "serial" else "--address"
        print(f"next: wardlink gateway add {fitting['drivers'][0]} SERIAL {option} {harmless(fitting['place'])}")
    return EXIT_OK


def _serial() -> list[Row]:
    from gateway.links.serial_port import found_ports  # noqa: PLC0415 - may not be installed

    return [
        _row("serial", port.path, port.product, serial_drivers(port.vendor_id, port.product_id, port.product))
        for port in found_ports()
    ]


def _ble(seconds: float, adapter: str | None) -> list[Row]:
    from gateway.links.ble import discover  # noqa: PLC0415 - may not be installed

    with _progress(f"listening for BLE devices for {seconds:g} s"):
        devices = asyncio.run(discover(seconds, adapter))
    return [
        _row("BLE", device.address, device.name, ble_drivers(device.name, device.service_uuids))
        | {"rssi_dbm": device.rssi_dbm, "battery_pct": device.battery_pct, "connected": device.connected}
        for device in devices
    ]


def _row(link: str, place: str, name: str, drivers: tuple[str, ...]) -> Row:
    return {
        "link": link,
        "place": place,
        "name": name,
        "drivers": list(drivers),
        "rssi_dbm": None,
        "battery_pct": None,
        "connected": False,
    }


def _words(row: Row) -> Row:
    note = CONNECTED_NOTE if row["connected"] else ""
    if row["link"] == "serial" and row["drivers"]:
        note = CANDIDATES_NOTE
    battery = row["battery_pct"]
    return row | {
        "place": harmless(row["place"]),
        "name": harmless(row["name"]),
        "drivers": ", ".join(row["drivers"]) or "(unknown)",
        "battery_pct": None if battery is None else f"{battery:g}",
        "note": note,
    }


def _warn(side: str, error: UnavailableError) -> None:
    hint = f" (hint: {error.hint})" if error.hint else ""
    print(f"warning: {side} not scanned: {harmless(error.message)}{hint}", file=sys.stderr)


@contextlib.contextmanager
def _progress(text: str) -> Iterator[None]:
    """A line on standard error that goes away, on a terminal alone."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console  # noqa: PLC0415 - only where somebody looks

    with Console(stderr=True).status(text):
        yield
