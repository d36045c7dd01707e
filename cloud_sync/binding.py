"""Which stream a sample belongs to: a bounded cache in front of the registry's resolver, and blocks cut at its borders.

The cache lives by the registry's notifications, and by its version numbers where a batch begins: a change that is
committed by then holds for the batch, however late its notification. Knows no store and no broker.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from cloud_sync import points
from cloud_sync.line_protocol import UnwritableError
from cloud_sync.registry.binding_rows import (
    UNKNOWN_DEVICE,
    UNKNOWN_SIGNAL_TYPE,
    BoundPeriod,
    Resolution,
    resolve,
    versions,
)
from cloud_sync.registry.database import Connection, Database
from gateway.samples import SampleBlock

log = logging.getLogger(__name__)

CHANNEL = "wardlink_bindings"
EVERY_DEVICE = frozenset({"", "*"})
"""What the channel says when any binding may have changed; empty: after an interruption."""
SIGNALS_MAX = 10_000
"""Signals of devices whose periods are kept, those used last; one takes about 1 KB."""
PERIODS_MAX = 32
"""Periods kept of one signal: a replay of weeks crosses that many wards rounds."""
AGE_S_MAX = 30.0
"""Then a period is asked for again: a notification lost on a half-open connection misleads no longer than this."""
_INT64_MAX = 2**63 - 1
_FOR_ALL_TIMES = frozenset({UNKNOWN_DEVICE, UNKNOWN_SIGNAL_TYPE})


@dataclass(frozen=True, slots=True, eq=False)
class BoundSamples:
    """Samples of a block that belong to one stream."""

    period: BoundPeriod
    samples: SampleBlock


@dataclass(frozen=True, slots=True, eq=False)
class Binding:
    """A block cut at the borders of its streams.

    `waiting`: the samples that belong to nobody yet, from the first of them to the last; a bound sample between two
    of them waits too, so that one span says what is still to be written.
    """

    bound: tuple[BoundSamples, ...]
    waiting: SampleBlock | None
    reason: str


@dataclass(frozen=True, slots=True)
class _Known:
    periods: tuple[tuple[BoundPeriod, float], ...]
    """Each with the monotonic time, s, when the registry was asked."""
    unbound: str | None
    """Why no sample of any time is bound, None where the periods say more."""


class Bindings:
    """Answers from memory where nothing changed since the registry was asked."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: OrderedDict[tuple[str, str], _Known] = OrderedDict()
        self._versions: OrderedDict[str, int] = OrderedDict()
        """Of the devices that were asked for last: the version that what is known of them is as new as."""
        self.changes = 0
        """Counts notifications: two equal readings mean that no binding changed between them."""

    async def listen(self, on_change: Callable[[str], None]) -> None:
        """Forget what changes, and tell; for ever. `on_change` gets a device serial, or one of `EVERY_DEVICE`."""
        async for told in self._database.listen(CHANNEL):
            self.forget(told)
            on_change(told)

    def forget(self, device: str) -> None:
        """Ask the registry again for a device, or for all of `EVERY_DEVICE`."""
        self.changes += 1
        if device in EVERY_DEVICE:
            self._known.clear()
            return
        for key in [key for key in self._known if key[0] == device]:
            del self._known[key]

    async def refresh(self, connection: Connection, devices: Collection[str]) -> None:
        """Forget what is not as new as the registry. One small query; what changes after it holds from the next on."""
        for device, version in (await versions(connection, devices)).items():
            if self._versions.get(device) != version:
                self.forget(device)
            self._versions[device] = version
            self._versions.move_to_end(device)
        while len(self._versions) > SIGNALS_MAX:
            self._versions.popitem(last=False)

    async def bind(self, block: SampleBlock, sample_rate_hz: float | None = None) -> Binding:
        """Cut a block into the streams of its samples' times; opens streams by default where the registry does.

        Raises `UnavailableError`, and `RefusedError` where the registry can make nothing of it.
        """
        key = (block.device, block.signal)
        known = self._known.get(key)
        if known is not None:
            self._known.move_to_end(key)
            if known.unbound is not None:
                return Binding((), block, known.unbound)
            binding = cut(block, _fresh(known), "")
            if binding.waiting is None:
                return binding
        changes = self.changes
        async with self._database.connection() as connection:
            resolution = await resolve(
                connection, block.device, block.signal, block.first_ns, block.last_ns, sample_rate_hz
            )
        resolution = _writable(resolution)
        if changes == self.changes:
            self._keep(key, resolution)
        return cut(block, resolution.periods, resolution.unbound or "")

    def _keep(self, key: tuple[str, str], resolution: Resolution) -> None:
        now_s = time.monotonic()
        periods = [(period, now_s) for period in resolution.periods]
        old = self._known.get(key)
        for period, asked_at_s in old.periods if old is not None else ():
            if not any(_overlap(period, fresh) for fresh in resolution.periods):
                periods.append((period, asked_at_s))
        unbound = resolution.unbound if resolution.unbound in _FOR_ALL_TIMES else None
        self._known[key] = _Known(tuple(periods[:PERIODS_MAX]), unbound)
        self._known.move_to_end(key)
        while len(self._known) > SIGNALS_MAX:
            self._known.popitem(last=False)


def _fresh(known: _Known) -> list[BoundPeriod]:
    oldest_s = time.monotonic() - AGE_S_MAX
    return [period for period, asked_at_s in known.periods if asked_at_s > oldest_s]


def _overlap(one: BoundPeriod, other: BoundPeriod) -> bool:
    return (other.to_ns is None or one.from_ns < other.to_ns) and (one.to_ns is None or other.from_ns < one.to_ns)


def cut(block: SampleBlock, periods: Sequence[BoundPeriod], reason: str) -> Binding:
    """Cut a block at the borders of periods that do not overlap."""
    is_bound = np.zeros(len(block), dtype=bool)
    spans: list[tuple[int, int, BoundPeriod]] = []
    for period in periods:
        start = position(block, period.from_ns)
        stop = len(block) if period.to_ns is None else position(block, period.to_ns)
        if start < stop:
            is_bound[start:stop] = True
            spans.append((start, stop, period))
    unbound = np.flatnonzero(~is_bound)
    if unbound.size == 0:
        parts = (BoundSamples(period, block.part(start, stop)) for start, stop, period in spans)
        return Binding(tuple(parts), None, "")
    first, end = int(unbound[0]), int(unbound[-1]) + 1
    outside = [(start, stop, period) for start, stop, period in spans if stop <= first or start >= end]
    parts = (BoundSamples(period, block.part(start, stop)) for start, stop, period in outside)
    return Binding(tuple(parts), block.part(first, end), reason)


def position(block: SampleBlock, time_ns: int) -> int:
    """How many samples are before a time, which may lie beyond what 64 bits hold."""
    if time_ns > _INT64_MAX:
        return len(block)
    return int(np.searchsorted(block.times_ns, max(time_ns, -_INT64_MAX - 1)))


def _writable(resolution: Resolution) -> Resolution:
    """Without the periods whose tags line protocol cannot write: their samples wait until an operator mends the tag."""
    fit: list[BoundPeriod] = []
    unbound = resolution.unbound
    for period in resolution.periods:
        try:
            for target in period.targets:
                points.prefix(target)
        except UnwritableError as error:
            unbound = error.message
            log.error("stream %s cannot be written: %s", period.stream_id, error)
        else:
            fit.append(period)
    return Resolution(tuple(fit), unbound)
