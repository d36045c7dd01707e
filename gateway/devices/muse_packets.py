"""Numbered packets put in order: counters unwrapped, parts of the same instants joined by counter, loss counted.

Pure. Knows no characteristic and no bit format: it gets counter and counts, it gives `Samples` and `Missing`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gateway.devices.base import Event, Missing, Rejected, Samples, SignalSpec
from gateway.errors import DeviceError
from gateway.samples import NS_PER_S, QUALITY, Column

WINDOW = 4
"""Counter steps that an incomplete group, or a missing one, is waited for: 188 ms of EEG. BLE keeps the order of
what it delivers, so only a host's queues reorder, and by little; longer would only delay what follows a loss."""
ABSENT_STEPS = 32
"""A part that was not heard of for so long (1.5 s of EEG) is not waited for: the preset may not have it."""
EARLY_NS_MAX = 5 * NS_PER_S
"""How far a counter may run ahead of the time of arrival: as much as a stalled host can have queued, several times
over. Further ahead is no loss but a damaged packet: 5 s are 107 of 65,536 values."""
STRANGERS_MAX = 16
"""So many packets in a row whose counter does not fit: not damaged ones, the device began anew."""
REPEATS_REACH = 64
"""How many packets back a repeated one is recognised by its content: a lump that comes twice is smaller."""


class PacketCounter:
    """Unwraps a counter of some bits that goes up by one a packet."""

    def __init__(self, bits: int, period_ns: int) -> None:
        self._span = 1 << bits
        self._period_ns = period_ns
        self._newest: int | None = None
        self._newest_value = 0
        self._arrival_ns = 0

    @property
    def newest(self) -> int:
        """The highest number so far; 0 is the first packet that came."""
        return self._newest or 0

    def number(self, value: int, arrival_ns: int) -> int | None:
        """The packet's number, negative for one from before the first; None for a counter that cannot be.

        The upper half of the counter's span is behind the newest packet, not ahead of it.
        """
        if self._newest is None:
            self._newest, self._newest_value, self._arrival_ns = 0, value, arrival_ns
            return 0
        half = self._span // 2
        step = (value - self._newest_value + half) % self._span - half
        number = self._newest + step
        if step > 0:
            if step * self._period_ns - (arrival_ns - self._arrival_ns) > EARLY_NS_MAX:
                return None
            self._newest, self._newest_value, self._arrival_ns = number, value, arrival_ns
        return number


class Strangers:
    """Counts packets that fit nowhere, one after the other, and tells a restarted device from damage."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._in_a_row = 0
        self._recent: deque[bytes] = deque(maxlen=REPEATS_REACH)

    def fits(self, packet: bytes) -> None:
        """A packet found its place."""
        self._in_a_row = 0
        self._recent.append(packet)

    def reject(self, packet: bytes) -> Rejected:
        """A packet found none. Raises `DeviceError` when that were too many in a row."""
        if packet in self._recent:
            return Rejected(len(packet), f"repeated {self._what} packet")
        self._in_a_row += 1
        if self._in_a_row >= STRANGERS_MAX:
            raise DeviceError(
                f"the {self._what} packets of the device count anew",
                hint="it restarted by itself: check its battery",
            )
        return Rejected(len(packet), f"{self._what} packet out of its time")


@dataclass(slots=True)
class _Group:
    """The parts with one counter value: the same instants."""

    arrival_ns: int = 0
    """Of the newest part."""
    parts: dict[int, NDArray[np.int32]] = field(default_factory=dict)


class GroupedStream:
    """One signal whose packets come in parts (an electrode each), joined by counter, never by order of arrival.

    A group is given out, in order, when it is complete or when `WINDOW` later counter steps have begun. Parts that
    are missing then: counts 0, and their bit set in the int64 column `quality` (bit k: channel k of the signal). A
    group of which nothing came is `Missing`. A signal of a single part has no such column: it is whole or missing.
    """

    def __init__(
        self, spec: SignalSpec, scale: float, *, parts: int, samples_per_packet: int, counter_bits: int = 16
    ) -> None:
        """`spec.channels` are spread evenly over the parts, in order. `scale`: physical unit per count."""
        assert spec.rate_hz is not None
        self.spec = spec
        self._parts = parts
        self._samples = samples_per_packet
        self._scales = dict.fromkeys(spec.channels, scale)
        self._counter = PacketCounter(counter_bits, round(samples_per_packet * NS_PER_S / spec.rate_hz))
        self._strangers = Strangers(spec.signal)
        self._groups: dict[int, _Group] = {}
        self._next: int | None = None
        self._first = 0
        self._heard = [0] * parts

    def receive(
        self, part: int, counter: int, counts: NDArray[np.int32], packet: bytes, arrival_ns: int
    ) -> list[Event]:
        """Take one packet: counts int32 (channels of a part, samples). Raises `DeviceError`, see `Strangers`."""
        number = self._counter.number(counter, arrival_ns)
        if number is None:
            return [self._strangers.reject(packet)]
        self._heard[part] = max(self._heard[part], number)
        if number < (-WINDOW if self._next is None else self._next):
            return [self._strangers.reject(packet)]
        group = self._groups.setdefault(number, _Group())
        if part in group.parts:
            return [Rejected(len(packet), f"repeated {self.spec.signal} packet")]
        self._strangers.fits(packet)
        group.parts[part] = counts
        group.arrival_ns = max(group.arrival_ns, arrival_ns)
        return self._settled()

    def _settled(self) -> list[Event]:
        events: list[Event] = []
        while self._groups:
            number = min(self._groups)
            age = self._counter.newest - number
            # One step more for what would have to come before it.
            earlier_may_come = number != self._next and self._next is not None and age + 1 < WINDOW
            if earlier_may_come or (age < WINDOW and not self._complete(self._groups[number])):
                break
            if self._next is None:
                self._first = self._next = number
            if number > self._next:
                lost = number - self._next
                events.append(Missing(self.spec.signal, self._index(self._next), lost * self._samples))
            events.append(self._given(number, self._groups.pop(number)))
            self._next = number + 1
        return events

    def _complete(self, group: _Group) -> bool:
        newest = self._counter.newest
        return all(part in group.parts or newest - heard > ABSENT_STEPS for part, heard in enumerate(self._heard))

    def _index(self, number: int) -> int:
        return (number - self._first) * self._samples

    def _given(self, number: int, group: _Group) -> Samples:
        names = self.spec.channels
        each = len(names) // self._parts
        columns: dict[str, Column] = {}
        quality = 0
        for channel, name in enumerate(names):
            counts = group.parts.get(channel // each)
            if counts is None:
                quality |= 1 << channel
                columns[name] = np.zeros(self._samples, dtype=np.int32)
            else:
                columns[name] = counts[channel % each]
        if self._parts > 1:
            columns[QUALITY] = np.full(self._samples, quality, dtype=np.int64)
        return Samples(self.spec.signal, self._index(number), columns, group.arrival_ns, self._scales)
