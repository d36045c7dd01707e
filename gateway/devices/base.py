"""What a decoder is: chunks in, events out. No socket, no clock, no thread, no log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from gateway.links.base import Chunk
from gateway.samples import Column


@dataclass(frozen=True, slots=True)
class SignalSpec:
    """One signal that a device gives."""

    signal: str
    rate_hz: float | None
    """Nominal sampling rate; None where the device reports when it likes."""
    channels: tuple[str, ...]
    """Field names, in order."""
    units: tuple[str, ...]
    """UCUM unit of each channel."""
    full_scale: tuple[int, int] | None = None
    """Lowest and highest count of the converter, where samples are counts: one that stands there is railed."""


@dataclass(frozen=True, slots=True)
class Send:
    """Bytes that the device must be sent now."""

    data: bytes
    channel: str = ""


@dataclass(frozen=True, slots=True)
class Streaming:
    """The start sequence is done: data is expected from here on."""


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Consecutive samples of a signal with a fixed rate."""

    signal: str
    index: int
    """Number of the first sample since the start, lost ones counted: index / rate is the device's own time."""
    columns: Mapping[str, Column]
    """Name -> (n,), see `SampleBlock.columns`."""
    arrival_ns: int
    """When the chunk that completed the last of them arrived (CLOCK_MONOTONIC, ns)."""
    scales: Mapping[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


@dataclass(frozen=True, slots=True)
class Missing:
    """Samples that the device's counter shows were sent and did not arrive."""

    signal: str
    index: int
    """Number of the first missing sample."""
    count: int


@dataclass(frozen=True, slots=True)
class Reading:
    """Values that a device reports when it likes: a heart rate, a temperature."""

    signal: str
    fields: Mapping[str, float]
    """Only the fields that have a value."""
    arrival_ns: int


@dataclass(frozen=True, slots=True)
class Rejected:
    """Bytes that are not part of any valid packet, dropped with the reason."""

    byte_count: int
    reason: str


@dataclass(frozen=True, slots=True)
class NoValue(Rejected):
    """A sound report that holds no value, and says why: no fix, no finger. The device is not silent."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a device says of itself; only what is known is set."""

    model: str | None = None
    firmware: str | None = None
    battery_pct: float | None = None


Event = Send | Streaming | Samples | Missing | Reading | Rejected | Facts


class Decoder(Protocol):
    """Sans-IO decoder of one connection to one device: a new one is made for every (re)connection."""

    @property
    def signals(self) -> Sequence[SignalSpec]:
        """What this device gives, with rates and channel names."""

    def start(self) -> list[Event]:
        """Events that begin the start sequence, right after the link is open."""

    def receive(self, chunk: Chunk) -> list[Event]:
        """Decode what came. Raises `DeviceError` when the device itself says that it failed."""


@runtime_checkable
class Finishing(Protocol):
    """A decoder that can hold samples back until later ones show what became of those in between."""

    def finish(self) -> list[Event]:
        """What is still held, now that the connection has ended; nothing is received afterwards."""


def finish(decoder: Decoder) -> list[Event]:
    """What a decoder still holds when its connection has ended; one that holds nothing back needs no `finish`."""
    return decoder.finish() if isinstance(decoder, Finishing) else []
