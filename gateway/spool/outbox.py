"""The durable outbox: gives sequences, encodes, commits in groups, forgets on receipt, sheds when full.

From the moment that a commit returned, a block is accepted and nothing is lost any more. The store's thread is
owned here; everything else runs in the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping, Sequence

from gateway.errors import UnavailableError
from gateway.samples import LOSS, LossCause, LossRecord, SampleBlock
from gateway.spool import marks, retention, stamping
from gateway.spool.stamping import Final
from gateway.spool.steps import Limits, Steps
from gateway.spool.store import (
    DamagedRow,
    EpochKey,
    Place,
    Range,
    Row,
    StoredRow,
    StreamKey,
    Suspect,
    Tally,
    identity,
)
from gateway.wire import codec
from gateway.wire.codec import Identity

__all__ = ["Limits", "Outbox"]

log = logging.getLogger(__name__)

PENDING_BYTES_MAX = 16 << 20
"""Encoded blocks that wait for a disk that does not take them: about 30 min of one headset."""
PENDING_STATES_SHARE = 4
"""A quarter of that more, which raw samples do not get, for brain states at 1.3 kB/s: some 40 min with vital signs."""
PENDING_VITALS_SHARE = 8
"""An eighth more again, for vital signs alone at 0.5 kB/s: another hour."""
SHED_ROWS_MAX = 512
"""Rows given up in one step, so that a step stays short."""
SHED_BYTES = 1 << 20
SHED_SHARE = 16
"""A full outbox frees so much at a time, or this part of its quota if that is less: given up one by one, small rows
would only turn into loss records of their own size."""
LOSSES_JOINED_MIN = 32
"""With fewer records that nobody has seen there is little to gain."""
LOSSES_JOINED_MAX = 512
"""Records that are joined in one step."""
ROOM_BYTES_MIN = 256 << 10
"""So much an outbox must still be able to grow before its disk is as full as it may be; else it gives rows up."""


def pending_bytes_max(signal: str) -> int:
    """Bytes that may be pending already when a block or loss of this signal is still taken."""
    states, vitals = PENDING_BYTES_MAX // PENDING_STATES_SHARE, PENDING_BYTES_MAX // PENDING_VITALS_SHARE
    return PENDING_BYTES_MAX + (0, states, states + vitals)[retention.rank(signal)]


class Outbox(Steps):
    """Accepts blocks and loss records; `run` must be running for them to be committed."""

    async def open(self) -> None:
        """Open the store. Raises `UnavailableError`, `DamagedError`, `ConfigError`."""
        await self._thread.run(self._store.open)
        self._look()

    def append(self, content: SampleBlock | LossRecord, boot: str = "", offset_ns: int = 0) -> None:
        """Take a block or a loss record; it is accepted with the next commit.

        With the id of a boot its times are provisional, taken as `offset_ns` plus that boot's monotonic clock: it is
        kept, but not sent until its times are final.
        """
        self.empty.clear()
        if self._pending_bytes > pending_bytes_max(content.signal):
            self._unaccepted.add(content)
            if isinstance(content, SampleBlock):
                self.losses[content.device, content.signal, LossCause.SHED] += len(content)
            return
        self._take(self._row(content, boot, offset_ns))
        if len(self._pending) - self._in_step >= self._limits.commit_blocks:
            self._due.set()

    async def run(self) -> None:
        """Commit what is pending, every interval or as soon as enough has come, until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._limits.commit_interval_s):
                    await self._due.wait()
            self._due.clear()
            await self.commit()

    async def commit(self) -> None:
        """Make everything pending durable now; tries again for as long as the disk does not take it."""
        async with self._stepping:
            if not self._has_work():
                return
            was_refusing = bool(self._unaccepted)
            await self._commit_pending()
            if was_refusing:
                await self._commit_pending()  # the record of what found no room, too
            try:
                await self._shed()
            except UnavailableError as error:
                log.warning("outbox cannot be kept within its quota now: %s", error)
        self.on_commit()

    async def fetch(self, after: int, through: int, limit: int) -> list[StoredRow]:
        """Committed rows with after < id <= through, oldest first; fewer than `limit` only where there are no more.

        Damaged ones are left out; with the next commit they go, and a loss record comes instead.
        """
        rows: list[StoredRow] = []
        while (wanted := limit - len(rows)) > 0:
            found = await self._thread.run(self._store.fetch, after, through, wanted)
            rows.extend(item for item in found if isinstance(item, StoredRow) and not self._goes(item.id))
            self._note_losses(rows)
            self._give_up_damaged([item.held for item in found if isinstance(item, DamagedRow)])
            if len(found) < wanted:
                break
            last = found[-1]
            after = last.held.id
        return rows

    async def stamp(self, final: Final, limit: int) -> int:
        """Give the oldest rows with provisional times their final ones, in one durable step; returns how many it were.

        Raises `UnavailableError`, after which nothing has changed.
        """
        async with self._stepping:
            before = self._holding.last_id
            try:
                count, damaged = await self._thread.run(
                    stamping.stamp, self._store, final, limit, {*self._given_up, *self._receipted}
                )
            finally:  # a step whose wait was cancelled has happened all the same
                self._look()
                self.on_old_rows(before, self._holding.last_id)
        self._give_up_damaged(damaged)
        self.on_commit()
        return count

    async def forget(self, device: str, signal: str, epoch: str, ranges: Sequence[Range]) -> list[int]:
        """A receipt came: forget these sequences, with the next step. Returns the ids that are no longer held.

        Raises `UnavailableError`.
        """
        if not ranges:
            return []
        found = await self._thread.run(self._store.find, device, signal, epoch, ranges)
        new = [place for place in found if not self._goes(place.id)]
        self._receipted.update((place.id, place) for place in new)
        self._look()
        return [place.id for place in new]

    async def held(self) -> Mapping[EpochKey, Range]:
        """Lowest and highest sequence that each stream still has here, by epoch. Raises `UnavailableError`."""
        found = dict(await self._thread.run(self._store.held))
        going: dict[EpochKey, set[int]] = {}
        for place in self._receipted.values():
            going.setdefault(place.epoch_key, set()).add(place.sequence)
        for key, numbers in going.items():
            first, last = found.pop(key, (0, -1))
            while first in numbers:
                first += 1
            while last in numbers:
                last -= 1
            if first <= last:
                found[key] = (first, last)
        return found

    async def suspects(self) -> list[Suspect]:
        """What was accepted once, is not here, and of which nobody has said yet that it is safe."""
        found = await self._thread.run(self._store.suspects)
        return [suspect for suspect in found if suspect not in self._settled]

    async def settle(
        self, device: str, signal: str, epoch: str, asked: Range, committed: Sequence[Range], *, is_last_word: bool
    ) -> None:
        """The cloud said which of these sequences it has stored: of suspects, the others are lost.

        With `is_last_word` off, blocks may still be on their way there: then only what is wholly stored is settled.
        Raises `UnavailableError`.
        """
        for suspect in await self.suspects():
            is_meant = suspect.epoch_key == (device, signal, epoch)
            if not is_meant or suspect.first < asked[0] or suspect.last > asked[1]:
                continue
            rest = marks.without(suspect, committed)
            if rest and not is_last_word:
                continue
            self._settled.append(suspect)
            for part in rest:
                record, place = retention.disappeared(part, self.epoch)
                log.error("%d samples of %s %s disappeared", record.sample_count, record.device, record.signal)
                self.losses[record.device, record.signal, record.cause] += record.sample_count
                self._take(self._row(record, part.boot, part.offset_ns, place))
            self._due.set()

    async def tallies(self) -> Mapping[StreamKey, Tally]:
        """What each stream has come to since the outbox was born. Raises `UnavailableError`."""
        return await self._thread.run(self._store.tallies)

    def identity_of(self, row: Row) -> Identity:
        """Who the block in a row is."""
        return identity(self._gateway, row)

    async def close(self) -> None:
        """Commit what is pending, once, and close the store."""
        async with self._stepping:
            self._record_unaccepted()
            try:
                if self._has_work():
                    await self._step()
            except UnavailableError as error:
                log.error("%d blocks could not be committed at the end: %s", len(self._pending), error)
            finally:
                await self._thread.run(self._store.close)
                self._thread.shutdown()

    async def _make_room(self) -> None:
        await self._give_oldest_up(self._pending_bytes + min(SHED_BYTES, self._holding.size // SHED_SHARE))

    async def _shed(self) -> None:
        """Give up rows by class and age until the quota holds, and the disk's floor, with some room."""
        if await self._excess() <= 0:
            self._is_overfull = False
            return
        await self._join_losses()
        spare = min(SHED_BYTES, self._holding.size // SHED_SHARE)
        while (excess := await self._excess() + spare) > 0:
            if not await self._give_oldest_up(excess):
                if not self._is_overfull:
                    log.error("outbox is over its quota with nothing left to give up")
                self._is_overfull = True
                return
            await self._commit_pending()

    def _note_losses(self, rows: Sequence[StoredRow]) -> None:
        for item in rows:
            if item.row.signal == LOSS and item.row.epoch == self.epoch:
                shown = self._shown_losses.get(item.row.device, -1)
                self._shown_losses[item.row.device] = max(shown, item.row.sequence)

    async def _join_losses(self) -> None:
        """Loss records are never given up: those that nobody has seen become fewer when there are many.

        They are the last ones of this epoch, so that their sequences can be given anew.
        """
        for (device, signal, epoch), (_, last) in (await self._thread.run(self._store.held)).items():
            first = max(self._shown_losses.get(device, -1) + 1, last - LOSSES_JOINED_MAX + 1)
            if (signal, epoch) != (LOSS, self.epoch) or last - first + 1 < LOSSES_JOINED_MIN:
                continue
            places = await self._thread.run(self._store.find, device, LOSS, epoch, [(first, last)])
            found = await self._thread.run(self._rows_of, places)
            # From here to their replacement nobody else may have a say: no wait in between.
            self._replace_losses(device, found)
        if self._given_up:
            await self._commit_pending()

    def _rows_of(self, places: Sequence[Place]) -> list[StoredRow]:
        """Blocks, in the store's thread."""
        found = [item for place in places for item in self._store.fetch(place.id - 1, place.id, 1)]
        return [item for item in found if isinstance(item, StoredRow)]

    def _replace_losses(self, device: str, found: Sequence[StoredRow]) -> None:
        by_sequence = {item.row.sequence: item for item in found if not self._goes(item.id)}
        following = self._next.get((device, LOSS), 0)
        first = following
        while first - 1 in by_sequence and first - 1 > self._shown_losses.get(device, -1):
            first -= 1
        tail = [by_sequence[number] for number in range(first, following)]
        records = [codec.decode(item.row.payload.data, item.row.payload.content_type).content for item in tail]
        fewer = retention.all_joined([record for record in records if isinstance(record, LossRecord)])
        if 2 * len(fewer) >= len(tail):
            return
        log.info("%d loss records of %s, which nobody has seen, are joined into %d", len(tail), device, len(fewer))
        self._given_up.update((item.id, None) for item in tail)
        for number, record in enumerate(fewer, start=first):
            self._take(self._row(record, place=(self.epoch, number)))
        self._next[device, LOSS] = first + len(fewer)

    async def _excess(self) -> int:
        """Bytes above the quota, or missing on the disk: never more than a part of what is here, since a disk that
        others have filled is not emptied by giving up the little that an outbox holds.
        """
        room = await self._thread.run(self._store.room)
        missing = min(ROOM_BYTES_MIN, self._holding.size // SHED_SHARE) - room
        return max(self._holding.size - self._limits.bytes_max, missing)

    async def _give_oldest_up(self, bytes_to_free: int) -> bool:
        """False where there is nothing left that may be given up."""
        signals = {signal for _, signal, _ in await self._thread.run(self._store.held)}
        for group in retention.shed_order(signals):
            oldest = await self._thread.run(self._store.oldest, group, SHED_ROWS_MAX)
            chosen = retention.choose([held for held in oldest if not self._goes(held.id)], bytes_to_free)
            if chosen:
                log.warning("outbox is full: giving up %d blocks of %s", len(chosen), ", ".join(group))
                self._give_up(chosen, LossCause.SHED)
                return True
        return False
