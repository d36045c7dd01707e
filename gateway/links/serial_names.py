"""Serial ports as Linux names them: names that stay the same, and how long an FTDI chip holds bytes back.

Reads /dev and /sys only, never a port itself. Its calls block for as long as a file of those takes.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

BY_ID = Path("/dev/serial/by-id")
"""udev's links, named after maker, model and serial number: the same on every plug and after every boot."""
USB_SERIAL_DEVICES = Path("/sys/bus/usb-serial/devices")


def stable_names() -> dict[str, str]:
    """Device file (/dev/ttyUSB0) -> its name in /dev/serial/by-id, for the ports that are there."""
    names: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for link in sorted(BY_ID.iterdir()):
            names.setdefault(str(link.resolve()), str(link))
    return names


def stable_name(path: str) -> str | None:
    """The name in /dev/serial/by-id of the port that `path` leads to now; None where udev gave none."""
    with contextlib.suppress(OSError, RuntimeError):
        return stable_names().get(str(Path(path).resolve()))
    return None


def latency_ms(path: str) -> int | None:
    """The latency timer of the FTDI chip behind a port, ms; None for a port that has none."""
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        return int((USB_SERIAL_DEVICES / Path(path).resolve().name / "latency_timer").read_text())
    return None
