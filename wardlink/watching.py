"""`wardlink gateway watch`: one device read as the gateway reads it, its values on the screen and nowhere else."""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from gateway import settings, status
from gateway.acquisition import Acquisition, Outputs
from gateway.clock import HostClock
from gateway.devices.registry import DRIVERS, LinkKind
from gateway.errors import EXIT_OK, ConfigError, UnavailableError
from gateway.links.base import Link
from gateway.reach import reach
from gateway.service import install_signals
from gateway.settings import Device, Settings
from gateway.signal.features import Features
from wardlink.live_values import LiveValues, plain_line, table

SHOW_S = 1.0
STOP_HINT = "stop it while you watch: sudo systemctl stop wardlink-gateway; or see: wardlink gateway status"


def watch(config: Path, serial: str, seconds: float | None) -> int:
    """Show a device's values until SIGINT, SIGTERM or `seconds` are over. Raises `WardlinkError`."""
    chosen = settings.load(config)
    device = _device(chosen, serial)
    _refuse_while_it_is_read(chosen, device)
    # Its electrodes are judged by raw samples, whatever is sent of them.
    device = msgspec.structs.replace(device, raw=True)
    asyncio.run(_watch(chosen.gateway.id, device, seconds))
    return EXIT_OK


def _device(chosen: Settings, serial: str) -> Device:
    for device in chosen.device:
        if device.serial == serial:
            return device
    known = ", ".join(device.serial for device in chosen.device) or "(none)"
    raise ConfigError(f"there is no device {serial!r} in the configuration", hint=f"devices there: {known}")


def _refuse_while_it_is_read(chosen: Settings, device: Device) -> None:
    """A port would be busy; a BLE link would be taken away from the service, and its data lost. Blocks."""
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


async def _watch(gateway: str, device: Device, seconds: float | None) -> None:
    stop = asyncio.Event()
    install_signals(stop)
    found = await reach(device)
    driver, make = found.driver, found.link
    await _refuse_busy_port(device, make)
    host, values = HostClock(), LiveValues(driver.decoder(device.options).signals)
    outputs = Outputs(values.take, values.learn, _unseen)
    acquisition = Acquisition(gateway, device, driver, make, host, outputs)
    reading = asyncio.create_task(acquisition.run(), name=f"watch {device.serial}")
    deadline = math.inf if seconds is None else asyncio.get_running_loop().time() + seconds
    try:
        with _screen(acquisition, values) as show:
            while not stop.is_set() and (left_s := deadline - asyncio.get_running_loop().time()) > 0:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), min(SHOW_S, left_s))
                host.refresh()
                show()
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    if not values.heard and not stop.is_set():
        condition = acquisition.condition
        raise UnavailableError(f"no data from {device.serial} in {seconds:g} s: {condition.state}, {condition.reason}")


async def _refuse_busy_port(device: Device, make: Callable[[], Link]) -> None:
    """Raises `UnavailableError` where another program has the port; whatever else is wrong is tried again later."""
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


@contextlib.contextmanager
def _screen(acquisition: Acquisition, values: LiveValues) -> Iterator[Callable[[], None]]:
    """What shows the newest: a table that stays where it is on a terminal, else a further line."""
    if not sys.stdout.isatty():
        yield lambda: print(plain_line(acquisition, values), flush=True)
        return
    from rich.live import Live  # noqa: PLC0415 - only where there is a terminal

    with Live(table(acquisition, values), auto_refresh=False) as live:
        yield lambda: live.update(table(acquisition, values), refresh=True)


def _unseen(_device: Device, _features: Features) -> None:
    """The brain state comes as a block, too."""
