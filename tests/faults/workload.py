"""Work for an outbox that does all it does in its life: blocks, losses, receipts, shedding, checkpoints, reopening."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gateway.samples import EEG
from gateway.spool.outbox import Limits, Outbox
from gateway.spool.sqlite_store import SqliteStore
from gateway.spool.store import StoredRow, StreamKey
from gateway.wire.codec import Identity
from tests.faults.witness import ALL, GATEWAY, STREAMS, Told, block, radio_loss, read

MakeStore = Callable[[Path], SqliteStore]
QUOTA_BYTES = 24_000
"""Some sixty rows: blocks are shed now and then."""
REOPEN_EVERY = 17
"""Rounds between two openings."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """A commit returned: so many more blocks."""

    counts: Counter[StreamKey]
    shown: tuple[StoredRow, ...]
    """Rows that are there now and were not before."""


@dataclass(frozen=True, slots=True)
class Receipted:
    """The outbox is about to be told to forget these."""

    rows: tuple[StoredRow, ...]


Event = Accepted | Receipted


def tell(told: Told, event: Event) -> None:
    """The outside learns of an event."""
    if isinstance(event, Accepted):
        for stream, count in event.counts.items():
            told.accept(stream, count)
        for row in event.shown:
            told.show(row)
    else:
        for row in event.rows:
            told.receipt(row)


class Workload:
    """Drives an outbox in a folder, and reports each event by its number before anything else happens."""

    def __init__(
        self,
        path: Path,
        make_store: MakeStore,
        on_event: Callable[[int], None],
        *,
        seed: int,
        quota_bytes: int = QUOTA_BYTES,
        receipts_share: float = 0.3,
    ) -> None:
        """`receipts_share`: of the rounds, at the end of which a receipt comes."""
        self.events: list[Event] = []
        self._path = path
        self._make_store = make_store
        self._on_event = on_event
        self._limits = Limits(commit_interval_s=3600.0, commit_blocks=ALL, bytes_max=quota_bytes)
        self._receipts_share = receipts_share
        self._draw = random.Random(seed)
        self._next: Counter[StreamKey] = Counter()
        self._pending: Counter[StreamKey] = Counter()
        self._shown: set[Identity] = set()

    async def run(self, rounds: int) -> None:
        """Work from an empty folder on, and leave the outbox closed."""
        outbox = await self._open()
        for turn in range(1, rounds + 1):
            self._append(outbox)
            await self._commit(outbox)
            await self._accepted(outbox)
            if self._draw.random() < self._receipts_share:
                await self._receipt(outbox)
            if turn % REOPEN_EVERY == 0:
                await outbox.close()
                outbox = await self._open()
        await outbox.close()

    async def _open(self) -> Outbox:
        outbox = Outbox(self._make_store(self._path), GATEWAY, self._limits)
        await outbox.open()
        return outbox

    async def _commit(self, outbox: Outbox) -> None:
        await outbox.commit()

    def _append(self, outbox: Outbox) -> None:
        for stream in STREAMS:
            for _ in range(self._draw.randint(0, 3)):
                self._take(outbox, stream)
        if self._draw.random() < 0.2:
            key = (STREAMS[0][0], "radio")
            outbox.append(radio_loss(key[0], self._next[key]))
            self._next[key] += 1
            self._pending[key] += 1

    def _take(self, outbox: Outbox, stream: StreamKey) -> None:
        outbox.append(block(stream, self._next[stream]))
        self._next[stream] += 1
        self._pending[stream] += 1

    async def _accepted(self, outbox: Outbox) -> None:
        rows = await outbox.fetch(0, ALL, ALL)
        new = tuple(row for row in rows if read(row)[0] not in self._shown)
        self._shown.update(read(row)[0] for row in new)
        self._tell(Accepted(self._pending, new))
        self._pending = Counter()

    async def _receipt(self, outbox: Outbox) -> None:
        """A receipt for some rows, most of them of raw signals; or for all that is there."""
        rows = await outbox.fetch(0, ALL, ALL)
        share = self._draw.choice((0.2, 0.5, 1.0))
        chosen = [row for row in rows if self._draw.random() < (share if row.row.signal == EEG else share / 2)]
        self._tell(Receipted(tuple(chosen)))
        for row in chosen:
            who = outbox.identity_of(row.row)
            await outbox.forget(who.device, who.signal, who.epoch, [(who.sequence, who.sequence)])

    def _tell(self, event: Event) -> None:
        self.events.append(event)
        self._on_event(len(self.events) - 1)
