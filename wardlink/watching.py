"""`wardlink gateway watch`: one device read as the gateway reads it, its values on the screen and nowhere else."""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from gateway import settings
from gateway.acquisition import Acquisition, Outputs
from gateway.clock import HostClock
from gateway.errors import EXIT_OK, UnavailableError
from gateway.reach import reach
from gateway.service import install_signals
from gateway.settings import Device, Settings
from gateway.signal.features import Features
from wardlink.device_choice import chosen_device, refuse_busy_port, refuse_while_it_is_read
from wardlink.live_values import LiveValues, plain_line, table

SHOW_S = 1.0


def watch(config: Path, serial: str, seconds: float | None) -> int:
    """Show a device's values until SIGINT, SIGTERM or `seconds` are over. Raises `WardlinkError`."""
    chosen = settings.load(config)
    device = chosen_device(chosen, serial)
    refuse_while_it_is_read(chosen, device)
    # Its rate and its losses are told by raw samples, whatever is sent of them.
    device = msgspec.structs.replace(device, raw=True)
    asyncio.run(_watch(chosen, device, seconds))
    return EXIT_OK


async def _watch(chosen: Settings, device: Device, seconds: float | None) -> None:
    stop = asyncio.Event()
    install_signals(stop)
    found = await reach(device, chosen.bluetooth)
    driver, make = found.driver, found.link
    await refuse_busy_port(device, make)
    host, values = HostClock(), LiveValues(driver.decoder(device.options).signals)
    outputs = Outputs(values.take, values.learn, _unseen)
    acquisition = Acquisition(chosen.gateway.id, device, driver, make, host, outputs)
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
