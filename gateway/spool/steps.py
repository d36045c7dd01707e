"""What waits for the outbox's next durable step, and the step itself: tried until the disk takes it, all or nothing."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_exponential

from gateway.errors import UnavailableError
from gateway.samples import LOSS, LossCause, LossRecord, SampleBlock
from gateway.spool import retention
from gateway.spool.rows import Unaccepted, encoded
from gateway.spool.store import FullError, Held, Holding, Place, Row, Store, StreamKey, Suspect
from gateway.spool.store_thread import StoreThread

log = logging.getLogger(__name__)

COMMIT_RETRY_S_MAX = 5.0


@dataclass(frozen=True, slots=True)
class Limits:
    """When the outbox commits and how much it keeps."""

    commit_interval_s: float = 1.0
    commit_blocks: int = 64
    bytes_max: int = 4 << 30


class Steps:
    """The outbox's state between two steps; `gateway.spool.outbox` has what can be done with it."""

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
        self._nameless: set[int] = set()
        """Damaged rows of which not even the stream is readable: taken out once, and told once, even if they stay."""
        self._receipted: dict[int, Place] = {}
        """Rows that are safe in the cloud and go with the next step: one of their own would wear the card."""
        self._settled: list[Suspect] = []
        """Suspects of which the truth is known; it goes on record with the next step."""
        self._shown_losses: dict[str, int] = {}
        """The highest sequence of each device's loss records of this epoch that anybody may have seen."""
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

    @property
    def epoch(self) -> str:
        """Born with this opening: rows from before have others."""
        return self._store.epoch

    @property
    def holding(self) -> Holding:
        """How much waits for its receipt, as of the last step."""
        return self._holding

    def stalled_s(self) -> float:
        """For how long the commit that is under way has been, in s; 0 if none is."""
        return 0.0 if self._commit_began is None else time.monotonic() - self._commit_began

    async def _make_room(self) -> None:
        """The store is full, and its reserve is gone: give something up."""
        raise NotImplementedError

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
                    await self._make_room()
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
        damaged = [held for held in rows if not self._goes(held.id) and held.id not in self._nameless]
        if not damaged:
            return
        log.error("%d damaged rows in the outbox are taken out", len(damaged))
        self._nameless.update(held.id for held in damaged if not retention.is_named(held))
        self._give_up(damaged, LossCause.CORRUPT)
        self._due.set()

    def _log_retry(self, state: RetryCallState) -> None:
        self.problem = str(state.outcome.exception() if state.outcome else "")
        log.error("%s; trying again", self.problem)
