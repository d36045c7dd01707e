"""What keeps the outbox's rows: an interface so small that SQLite, Redis and a test's dictionary all fit behind it.

Calls block and are made from one thread. A call that returned is durable. One that raised `UnavailableError` may be
repeated, with more rows after its own, and then counts nothing twice.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from gateway.errors import UnavailableError
from gateway.wire.codec import Identity, Payload

StreamKey = tuple[str, str]
"""Device serial and signal: what a tally counts."""
EpochKey = tuple[str, str, str]
"""Device serial, signal and epoch: what a sequence counts."""
Range = tuple[int, int]
"""Sequences, both ends included."""


@dataclass(frozen=True, slots=True)
class Row:
    """One encoded block or loss record."""

    device: str
    signal: str
    epoch: str
    sequence: int
    first_ns: int
    last_ns: int
    samples: int
    """Samples in a block; 0 for a loss record."""
    lost: int
    """Samples that a loss record speaks of; 0 for a block."""
    lost_signal: str
    """The signal that they belonged to; empty for a block."""
    payload: Payload
    boot: str = ""
    """The boot whose clock gave provisional times; empty once they are final. Until then nobody may send the row."""
    offset_ns: int = 0
    """UTC minus the boot's monotonic clock, as it was taken for the provisional times."""

    @property
    def key(self) -> StreamKey:
        return (self.device, self.signal)

    @property
    def epoch_key(self) -> EpochKey:
        return (self.device, self.signal, self.epoch)

    @property
    def identity(self) -> tuple[str, str, str, int]:
        return (self.device, self.signal, self.epoch, self.sequence)

    @property
    def size(self) -> int:
        """Bytes that count against the quota."""
        return len(self.payload.data) + ROW_OVERHEAD_BYTES

    def checksum(self, number: int) -> int:
        """CRC-32 over id, identity and content: a row that the disk changed does not pass as another."""
        head = f"{number}\0{self.device}\0{self.signal}\0{self.epoch}\0{self.sequence}\0{self.first_ns}\0{self.last_ns}"
        head += f"\0{self.samples}\0{self.lost}\0{self.lost_signal}\0{self.boot}\0{self.offset_ns}"
        head += f"\0{self.payload.content_type}\0{self.payload.schema}\0"
        return zlib.crc32(self.payload.data, zlib.crc32(head.encode()))


ROW_OVERHEAD_BYTES = 250
"""Columns, index entry and page share of a row beside its payload, measured on the SQLite store."""
UNBOUNDED = 1 << 62
"""Room where nothing bounds it but the quota."""


@dataclass(frozen=True, slots=True)
class StoredRow:
    """A row with its place in the order of arrival."""

    id: int
    row: Row

    @property
    def held(self) -> Held:
        """The row without its payload."""
        row = self.row
        return Held(
            self.id,
            *row.identity,
            first_ns=row.first_ns,
            last_ns=row.last_ns,
            samples=row.samples,
            size=row.size,
            lost=row.lost,
            lost_signal=row.lost_signal,
            boot=row.boot,
            offset_ns=row.offset_ns,
        )


@dataclass(frozen=True, slots=True)
class Held:
    """What a row that is here is about, without its payload."""

    id: int
    device: str
    signal: str
    epoch: str
    sequence: int
    first_ns: int
    last_ns: int
    samples: int
    size: int
    """Bytes that count against the quota."""
    lost: int
    lost_signal: str
    boot: str
    offset_ns: int

    @property
    def epoch_key(self) -> EpochKey:
        return (self.device, self.signal, self.epoch)

    def row(self, payload: Payload) -> Row:
        """The whole row, with its payload."""
        return Row(
            device=self.device,
            signal=self.signal,
            epoch=self.epoch,
            sequence=self.sequence,
            first_ns=self.first_ns,
            last_ns=self.last_ns,
            samples=self.samples,
            lost=self.lost,
            lost_signal=self.lost_signal,
            payload=payload,
            boot=self.boot,
            offset_ns=self.offset_ns,
        )


@dataclass(frozen=True, slots=True)
class DamagedRow:
    """A row whose checksum does not fit; what is said of it is the best that is known."""

    held: Held


@dataclass(frozen=True, slots=True)
class Tally:
    """What one stream has come to since the outbox was born."""

    blocks: int
    """Blocks, or loss records, accepted."""
    accepted: int
    """Samples accepted."""
    lost: int
    """Samples on record as lost."""


@dataclass(frozen=True, slots=True)
class Holding:
    """How much a store holds now."""

    rows: int
    size: int
    last_id: int
    """The highest id given since the store was opened, or held."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row is that a receipt speaks of."""

    id: int
    device: str
    signal: str
    epoch: str
    sequence: int
    size: int

    @property
    def epoch_key(self) -> EpochKey:
        return (self.device, self.signal, self.epoch)


@dataclass(frozen=True, slots=True)
class Suspect:
    """Rows that were accepted and that the store no longer has: receipted unnoticed, or lost by the disk."""

    device: str
    signal: str
    epoch: str
    first: int
    """First and last sequence."""
    last: int
    samples: int
    """Of a loss record the samples that it spoke of."""
    even: bool
    """Whether each block had as many."""
    first_ns: int
    last_ns: int
    boot: str
    offset_ns: int
    lost_signal: str
    """Of a loss record."""

    @property
    def epoch_key(self) -> EpochKey:
        return (self.device, self.signal, self.epoch)


class FullError(UnavailableError):
    """There is no room for a step; one that forgets more than it adds may still be possible."""


class Store(Protocol):
    """Durable rows in order of arrival, and the tallies of their streams."""

    @property
    def epoch(self) -> str:
        """Born with each opening by a writer; to who only looks, the one that was born last.

        Sequences begin at 0 in each: an outbox that comes from an old backup, or that lost what it accepted last,
        never gives one identity to two blocks.
        """

    def open(self) -> None:
        """Open or create; rows that are there keep their epoch.

        Raises `UnavailableError`, `DamagedError`, `ConfigError`.
        """

    def append(self, rows: Sequence[Row]) -> None:
        """Add rows and raise their streams' tallies, in one durable step.

        Raises `DamagedError` for a sequence that is here already: then somebody else writes too. Raises `FullError`
        where there is no room.
        """

    def fetch(self, after: int, through: int, limit: int) -> list[StoredRow | DamagedRow]:
        """Rows with final times and after < id <= through, in order, at most `limit`."""

    def unstamped(self, limit: int) -> list[StoredRow | DamagedRow]:
        """The oldest rows with provisional times, at most `limit`."""

    def find(self, device: str, signal: str, epoch: str, ranges: Sequence[Range]) -> list[Place]:
        """The rows of these sequences that are here."""

    def replace(
        self,
        ids: Sequence[int],
        rows: Sequence[Row],
        receipted: Sequence[Place] = (),
        settled: Sequence[Suspect] = (),
    ) -> None:
        """Forget rows by id and add others, in one durable step; ids that are not here are no error.

        What a forgotten loss record spoke of is no longer counted as lost. A row may take the place of a forgotten one
        of the same identity: then the stream's tally counts only the difference. Of what is `receipted` and forgotten
        everything stays counted. Suspects that are `settled` are none any more.
        """

    def suspects(self) -> list[Suspect]:
        """What was found missing and is not settled."""

    def oldest(self, signals: Sequence[str], limit: int) -> list[Held]:
        """The oldest rows of these signals, at most `limit`."""

    def held(self) -> Mapping[EpochKey, Range]:
        """Lowest and highest sequence that each stream still has here, by epoch."""

    def tallies(self) -> Mapping[StreamKey, Tally]:
        """Tallies of all streams that were ever here."""

    def holding(self) -> Holding:
        """How much is here; cheap enough to ask after every step."""

    def room(self) -> int:
        """By how many bytes it may still grow before free space falls below its floor."""

    def close(self) -> None:
        """Release the files; may be called in any state."""


def identity(gateway: str, row: Row) -> Identity:
    """Who the block in a row is."""
    return Identity(gateway, *row.identity)
