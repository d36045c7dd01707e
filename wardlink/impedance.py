"""`wardlink gateway impedance`: each electrode's impedance, measured one after the other with the board's test current.

Whatever happens, the board is left as a reset leaves it: with no test current, and as the gateway begins with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gateway import settings
from gateway.devices.base import Decoder, Missing, Samples, Send
from gateway.devices.registry import DRIVERS, Driver, LeadOff
from gateway.errors import EXIT_FAILURE, EXIT_OK, ConfigError, UnavailableError, WardlinkError
from gateway.links.base import Link
from gateway.reach import link_maker
from gateway.samples import QUALITY
from gateway.service import install_signals
from gateway.settings import Device
from gateway.signal.impedance import impedance_kohm
from gateway.signal.quality import railed
from wardlink.device_choice import chosen_device, refuse_busy_port, refuse_while_it_is_read
from wardlink.terminal import harmless, show_rows

GOOD_KOHM_MAX = 10.0
"""What guidelines ask for (ACNS guideline 1, 2016; IFCN 1999: 5 to 10)."""
FAIR_KOHM_MAX = 50.0
"""What today's amplifiers of high input impedance still read without a loss (Ferree et al. 2001, Clin. Neurophysiol.
112:536: 40 kOhm)."""
SETTLE_S = 0.5
"""After the current is on: the step dies away."""
TRIES_S_MAX = 10.0
"""For an uninterrupted stretch of one electrode, beyond its length: the radio loses packets."""
RESTORE_S_MAX = 5.0
"""A reset takes up to 1.5 s."""
EXIT_INTERRUPTED = 130
COLUMNS = ("input", "electrode", "kohm", "rating", "reason")


@dataclass(frozen=True, slots=True)
class Contact:
    """What was measured of one electrode."""

    input: int
    """Its number on the board, from 1."""
    electrode: str
    kohm: float | None
    rating: str
    """good, fair, poor, or none where nothing could be measured."""
    reason: str = ""


def impedance(config: Path, serial: str, seconds: float, *, as_json: bool) -> int:
    """Measure and print. Exit code 1 where an electrode could not be measured. Raises `WardlinkError`."""
    chosen = settings.load(config)
    device = chosen_device(chosen, serial)
    driver = DRIVERS[device.driver]
    if driver.lead_off is None:
        able = ", ".join(sorted(name for name, one in DRIVERS.items() if one.lead_off is not None))
        raise ConfigError(
            f"{serial} is a {device.driver}, which has no test current to measure an impedance with",
            hint=f"drivers that measure it: {able}",
        )
    refuse_while_it_is_read(chosen, device)
    found, ended = asyncio.run(_measure(device, driver, driver.lead_off, seconds))
    if as_json:
        print(json.dumps([asdict(contact) for contact in found], indent=2))
    elif found:
        rows = [asdict(one) | {"kohm": None if one.kohm is None else f"{one.kohm:.1f}"} for one in found]
        show_rows(COLUMNS, rows, as_json=False)
    if ended:
        print(f"interrupted after {len(found)} electrodes; the board is reset", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_OK if all(contact.kohm is not None for contact in found) else EXIT_FAILURE


async def _measure(device: Device, driver: Driver, lead_off: LeadOff, seconds: float) -> tuple[list[Contact], bool]:
    """What was measured, and whether a signal ended it before the last electrode."""
    stop = asyncio.Event()
    install_signals(stop)
    make = link_maker(device)
    await refuse_busy_port(device, make)
    found: list[Contact] = []
    measuring = asyncio.create_task(_measure_all(device, driver, lead_off, make, seconds, found))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({measuring, stopping}, return_when=asyncio.FIRST_COMPLETED)
    ended = not measuring.done()
    measuring.cancel()
    stopping.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await measuring
    return found, ended


async def _measure_all(
    device: Device,
    driver: Driver,
    lead_off: LeadOff,
    make: Callable[[], Link],
    seconds: float,
    found: list[Contact],
) -> None:
    electrodes = driver.decoder(device.options).signals[0].channels
    with _progress() as tell:
        async with _restored(make, lead_off) as link:
            for number, electrode in enumerate(electrodes, start=1):
                tell(f"{electrode} ({number} of {len(electrodes)})")
                decoder = lead_off.decoder(device.options, number)
                reading = _Reading(decoder, number, seconds)
                try:
                    async with asyncio.timeout(driver.start_timeout_s + SETTLE_S + seconds + TRIES_S_MAX):
                        await _read(link, decoder, reading)
                except TimeoutError:
                    reason = f"no uninterrupted {seconds:g} s came: bring the dongle closer to the board"
                    found.append(Contact(number, electrode, None, "none", reason))
                    continue
                found.append(reading.contact(electrode, lead_off.averaged))


async def _read(link: Link, decoder: Decoder, reading: _Reading) -> None:
    """Until the reading has enough. Raises `WardlinkError`."""
    events = decoder.start()
    while True:
        for event in events:
            if isinstance(event, Send):
                await link.write(event.data, event.channel)
            elif isinstance(event, Samples | Missing):
                reading.take(event)
        if reading.is_complete:
            return
        events = decoder.receive(await link.read())


class _Reading:
    """The newest uninterrupted samples of one input."""

    def __init__(self, decoder: Decoder, number: int, seconds: float) -> None:
        (self._spec,) = decoder.signals
        assert self._spec.rate_hz is not None
        self._rate_hz = self._spec.rate_hz
        self._column = number - 1
        self._settling = round(SETTLE_S * self._rate_hz)
        self._wanted = round(seconds * self._rate_hz)
        self._uv: list[NDArray[np.float64]] = []
        self._at_the_end = 0
        self._count = 0

    @property
    def is_complete(self) -> bool:
        return self._count >= self._wanted

    def take(self, event: Samples | Missing) -> None:
        if isinstance(event, Missing) or (
            QUALITY in event.columns and bool(np.any(event.columns[QUALITY].astype(np.int64) >> self._column & 1))
        ):
            self._uv, self._count, self._at_the_end = [], 0, 0
            return
        name = self._spec.channels[self._column]
        fresh = event.columns[name][max(0, self._settling - event.index) :]
        assert self._spec.full_scale is not None
        self._at_the_end += int(railed(fresh.astype(np.int64), self._spec.full_scale).sum())
        self._uv.append(fresh.astype(np.float64) * event.scales[name])
        self._count += len(fresh)

    def contact(self, electrode: str, averaged: int) -> Contact:
        """What the samples say."""
        number = self._column + 1
        if self._at_the_end:
            return Contact(number, electrode, None, "none", "at the end of the range: not on the skin, or a loose lead")
        uv = np.concatenate(self._uv)[: self._wanted, np.newaxis]
        kohm = round(float(impedance_kohm(uv, self._rate_hz, averaged=averaged)[0]), 1)
        return Contact(number, electrode, kohm, rating(kohm))


def rating(kohm: float) -> str:
    """In a word what an impedance is worth."""
    if kohm <= GOOD_KOHM_MAX:
        return "good"
    return "fair" if kohm <= FAIR_KOHM_MAX else "poor"


@contextlib.asynccontextmanager
async def _restored(make: Callable[[], Link], lead_off: LeadOff) -> AsyncIterator[Link]:
    """An open link to a board that is reset in the end, also after an error or a cancellation."""
    link = make()
    try:
        await link.open()
        try:
            yield link
        finally:
            try:
                await _restore(link, lead_off)
            except WardlinkError as error:
                print(
                    f"warning: the board was not reset: {harmless(error.message)}; the gateway resets it when it starts"
                    " to read, or switch it off and on",
                    file=sys.stderr,
                )
    finally:
        await link.close()


async def _restore(link: Link, lead_off: LeadOff) -> None:
    """Reset the board. Raises `UnavailableError` where it does not confirm that."""
    text = b""
    try:
        async with asyncio.timeout(RESTORE_S_MAX):
            for command in lead_off.restore:
                await link.write(command)
            while lead_off.restored not in text:
                # what was on its way before the reset is drained unread
                text = text[-len(lead_off.restored) :] + (await link.read()).data
    except TimeoutError:
        raise UnavailableError(f"no answer from {link.name} in {RESTORE_S_MAX:g} s") from None


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A line on standard error that goes away, on a terminal alone."""
    if not sys.stderr.isatty():
        yield lambda _text: None
        return
    from rich.console import Console  # noqa: PLC0415 - only where somebody looks

    with Console(stderr=True).status("resetting the board") as shown:
        yield shown.update
