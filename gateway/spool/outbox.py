"""The durable outbox: gives sequences, encodes, commits in groups, forgets on receipt, sheds when full.

From the moment that a commit returned, a block is accepted and nothing is lost any more. The store's thread is
owned here; everything else runs in the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_exponential

from gateway.errors import UnavailableError
from gateway.samples import LOSS, LossCause, LossRecord, SampleBlock
from gateway.spool import marks, retention, stamping
from gateway.spool.rows import Unaccepted, encoded
from gateway.spool.stamping import Final
from gateway.spool.store import (
    DamagedRow,
    EpochKey,
    FullError,
    Held,
    Holding,
    Place,
    Range,
    Row,
    Store,
    StoredRow,
    StreamKey,
    Suspect,
    Tally,
    identity,
)
from gateway.spool.store_thread import StoreThread
from gateway.wire.codec import Identity

log = logging.getLogger(__name__)

PENDING_BYTES_MAX = 16 << 20
"""Encoded blocks that wait for a disk that does not take them: about 30 min of one headset."""
SHED_ROWS_MAX = 512
"""Rows given up in one step, so that a step stays short."""
SHED_BYTES = 1 << 20
SHED_SHARE = 16
"""A full outbox frees so much at a time, or this part of its quota if that is less: given up one by one, small rows
would only turn into loss records of their own size."""
ROOM_BYTES_MIN = 256 << 10
"""So much an outbox must still be able to grow before its disk is as full as it may be; else it gives rows up."""
COMMIT_RETRY_S_MAX = 5.0


@dataclass(frozen=True, slots=True)
class Limits:
    """When the outbox commits and how much it keeps."""

    commit_interval_s: float = 1.0
    commit_blocks: int = 64
    bytes_max: int = 4 << 30


class Outbox:
    """Accepts blocks and loss records; `run` must be running for them to be committed."""

    def __init__(self, store: Store, gateway: str, limits: Limits = Limits()) -> None:
        self._store = store
        self._gateway = gateway
        self._limits = limits
        self._thread = StoreThread()
        self._next: dict[StreamKey, int] = {}
        """The next sequence of each stream in this epoch."""
        self._pending: list[Row] = []
        """In the order of their sequences, which is kept: what a failed or cancelled step left stays first."""
        self._pending_bytes = 0
        self._given_up: dict[int, None] = {}
        """Rows that go with the next step, in which the records of their loss come."""
        self._receipted: dict[int, Place] = {}
        """Rows that are safe in the cloud and go with the next step: one of their own would wear the card."""
        self._settled: list[Suspect] = []
        """Suspects of which the truth is known; it goes on record with the next step."""
        self._in_step = 0
        """How many of the pending rows are in the step that is under way."""
        self._unaccepted = Unaccepted()
        self.losses: Counter[tuple[str, str, LossCause]] = Counter()
        """Samples that were given up since the opening, by device, signal and cause."""
        self._stepping = asyncio.Lock()
        self._due = asyncio.Event()
        self._stored = Holding(0, 0, 0)
        """What the store held when nothing was under way."""
        self._holding = Holding(0, 0, 0)
        self._commit_began: float | None = None
        self._is_overfull = False
        self.empty = asyncio.Event()
        """Set while nothing is pending and nothing waits for its receipt."""
        self.problem = ""
        """Why commits fail now; empty when they do not."""
        self.on_commit: Callable[[], None] = lambda: None
        """Called in the event loop after every commit."""
        self.on_old_rows: Callable[[int, int], None] = lambda _after, _through: None
        """Called before that where rows with after < id <= through are older than their ids say."""

    async def open(self) -> None:
        """Open the store. Raises `UnavailableError`, `DamagedError`, `ConfigError`."""
        await self._thread.run(self._store.open)
        self._look()

    @property
    def epoch(self) -> str:
        """Born with this opening: rows from before have others."""
        return self._store.epoch

    @property
    def holding(self) -> Holding:
        """How much waits for its receipt, as of the last step."""
        return self._holding

    def append(self, content: SampleBlock | LossRecord, boot: str = "", offset_ns: int = 0) -> None:
        """Take a block or a loss record; it is accepted with the next commit.

        With the id of a boot its times are provisional, taken as `offset_ns` plus that boot's monotonic clock: it is
        kept, but not sent until its times are final.
        """
        self.empty.clear()
        if self._pending_bytes > PENDING_BYTES_MAX:
            self._unaccepted.add(content)
            if isinstance(content, SampleBlock):
                self.losses[content.device, content.signal, LossCause.SHED] += len(content)
            return
        self._take(self._row(content, boot, offset_ns))
        if len(self._pending) - self._in_step >= self._limits.commit_blocks:
            self._due.set()

    def stalled_s(self) -> float:
        """For how long the commit that is under way has been, in s; 0 if none is."""
        return 0.0 if self._commit_began is None else time.monotonic() - self._commit_began

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

    def _has_work(self) -> bool:
        return bool(self._pending or self._given_up or self._receipted or self._settled or self._unaccepted)

    def _goes(self, number: int) -> bool:
        """Whether a row goes with the next step."""
        return number in self._given_up or number in self._receipted

    async def _commit_pending(self) -> None:
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(UnavailableError),
            wait=wait_exponential(multiplier=0.1, max=COMMIT_RETRY_S_MAX),
            before_sleep=self._log_retry,
        )
        is_full = False
        async for attempt in retrying:
            with attempt:
                if is_full and not self._given_up:
                    # The first time the store had its reserve to free.
                    await self._give_oldest_up(self._pending_bytes + min(SHED_BYTES, self._holding.size // SHED_SHARE))
                try:
                    await self._step()
                except FullError:
                    is_full = True
                    raise
        if self.problem:
            log.info("outbox commits again")
        self.problem = ""

    async def _step(self) -> None:
        """One durable step of the store: all that is pending, and all that goes. Only under the lock."""
        rows, ids, settled = list(self._pending), list(self._given_up), list(self._settled)
        receipted = dict(self._receipted)
        committed = threading.Event()

        def change() -> None:
            if ids or receipted or settled:
                self._store.replace(ids, rows, list(receipted.values()), settled)
            else:
                self._store.append(rows)
            committed.set()  # told by the thread itself: a cancelled wait must still learn the outcome

        self._in_step = len(rows)
        self._commit_began = time.monotonic()
        try:
            await self._thread.run(change)
        finally:
            self._commit_began = None
            self._in_step = 0
            if committed.is_set():
                del self._pending[: len(rows)]
                self._pending_bytes -= sum(row.size for row in rows)
                for number in ids:
                    del self._given_up[number]
                for number in receipted:
                    del self._receipted[number]
                del self._settled[: len(settled)]
                self._record_unaccepted()  # before anything else is taken: one record speaks of no more than one gap
                self._look()

    def _look(self) -> None:
        """See what the store holds after a step, without what is only waiting to go."""
        if self._commit_began is None:
            # While a step is in the thread, the store may be before it or after it; what is receipted is before.
            self._stored = self._store.holding()
        found = self._stored
        size = found.size - sum(place.size for place in self._receipted.values())
        self._holding = Holding(found.rows - len(self._receipted), size, found.last_id)
        if not (self._holding.rows or self._pending or self._unaccepted):
            self.empty.set()

    def _take(self, row: Row) -> None:
        self._pending.append(row)
        self._pending_bytes += row.size

    def _row(
        self,
        content: SampleBlock | LossRecord,
        boot: str = "",
        offset_ns: int = 0,
        place: tuple[str, int] | None = None,
    ) -> Row:
        """With the next sequence, unless epoch and sequence are those of one that was given before."""
        key = (content.device, LOSS if isinstance(content, LossRecord) else content.signal)
        epoch, number = place or (self.epoch, self._next.get(key, 0))
        row = encoded(self._gateway, content, epoch, number, boot, offset_ns)
        if place is None:
            self._next[key] = number + 1
        return row

    def _record_unaccepted(self) -> None:
        for loss in self._unaccepted.taken():
            log.warning("outbox had no room: %d samples of %s %s lost", loss.sample_count, loss.device, loss.signal)
            self._take(self._row(loss))

    def _give_up(self, rows: Sequence[Held], cause: LossCause) -> None:
        """These rows go with the next step, and the records of their loss come with it."""
        named = [held for held in rows if retention.is_named(held)]
        if len(named) < len(rows):
            log.error("of %d rows that are given up not even the stream is readable", len(rows) - len(named))
        by_clock: dict[tuple[str, int], list[Held]] = {}
        for held in named:
            if held.signal == LOSS:
                # Under its old sequence: if the first issue has arrived, this one is nothing new there.
                place = (held.epoch, held.sequence)
                self._take(self._row(retention.reissued(held), held.boot, held.offset_ns, place))
            else:
                by_clock.setdefault((held.boot, held.offset_ns), []).append(held)
        for clock, of_it in by_clock.items():
            for record in retention.losses(of_it, cause, self.epoch):
                self.losses[record.device, record.signal, cause] += record.sample_count
                self._take(self._row(record, *clock))
        self._given_up.update((held.id, None) for held in rows)

    def _give_up_damaged(self, rows: Sequence[Held]) -> None:
        damaged = [held for held in rows if not self._goes(held.id)]
        if not damaged:
            return
        log.error("%d damaged rows in the outbox are taken out", len(damaged))
        self._give_up(damaged, LossCause.CORRUPT)
        self._due.set()

    async def _shed(self) -> None:
        """Give up rows by class and age until the quota holds, and the disk's floor, with some room."""
        if await self._excess() <= 0:
            self._is_overfull = False
            return
        spare = min(SHED_BYTES, self._holding.size // SHED_SHARE)
        while (excess := await self._excess() + spare) > 0:
            if not await self._give_oldest_up(excess):
                if not self._is_overfull:
                    log.error("outbox is over its quota with nothing left to give up")
                self._is_overfull = True
                return
            await self._commit_pending()

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

    def _log_retry(self, state: RetryCallState) -> None:
        self.problem = str(state.outcome.exception() if state.outcome else "")
        log.error("%s; trying again", self.problem)
