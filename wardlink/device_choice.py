"""One configured device for a command that reads it by itself: which one, and whether somebody else reads it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from gateway import status
from gateway.devices.registry import DRIVERS, LinkKind
from gateway.errors import ConfigError, UnavailableError
from gateway.links.base import Link
from gateway.settings import Device, Settings

STOP_HINT = "stop it for so long: sudo systemctl stop wardlink-gateway; or see: wardlink gateway status"


def chosen_device(chosen: Settings, serial: str) -> Device:
    """The device with this serial number. Raises `ConfigError`."""
    for device in chosen.device:
        if device.serial == serial:
            return device
    known = ", ".join(device.serial for device in chosen.device) or "(none)"
    raise ConfigError(f"there is no device {serial!r} in the configuration", hint=f"devices there: {known}")


def refuse_while_it_is_read(chosen: Settings, device: Device) -> None:
    """A port would be busy; a BLE link would be taken away from the service, and its data lost. Blocks.

    Raises `UnavailableError` where the service reads the device, or that cannot be told.
    """
    try:
        found = status.read(Path(chosen.gateway.state_dir))
    except UnavailableError as error:
        if DRIVERS[device.driver].link is LinkKind.SERIAL:
            return  # the port itself says whether it is busy
        raise UnavailableError(
            f"whether the gateway service reads {device.serial} cannot be told: {error.message}", hint=error.hint
        ) from None
    if found is None or not found.is_fresh(datetime.now(UTC)):
        return
    if any(one.serial == device.serial for one in found.devices):
        raise UnavailableError(
            f"{device.serial} is busy: the gateway service (process {found.pid}) reads it", hint=STOP_HINT
        )


async def refuse_busy_port(device: Device, make: Callable[[], Link]) -> None:
    """Raises `UnavailableError` where another program has the port; whatever else is wrong shows when it is read."""
    if DRIVERS[device.driver].link is not LinkKind.SERIAL:
        return
    from gateway.links.serial_port import PortBusyError  # noqa: PLC0415 - may not be installed

    link = make()
    try:
        await link.open()
    except PortBusyError as error:
        raise UnavailableError(
            f"{device.serial} is busy: {error.message}; most likely the gateway service reads it", hint=STOP_HINT
        ) from None
    except UnavailableError:
        return
    finally:
        await link.close()
