"""The durable outbox: gives sequences, encodes, commits in groups, forgets on receipt, sheds when full.

From the moment that a commit returned, a block is accepted and nothing is lost any more. The store's thread is
owned here; everything else runs in the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_exponential

from gateway.errors import UnavailableError
from gateway.samples import LOSS, LossCause, LossRecord, SampleBlock
from gateway.spool import retention
from gateway.spool.store import DamagedRow, Holding, Range, Row, Store, StoredRow, StreamKey, Tally, identity
from gateway.wire import codec
from gateway.wire.codec import Identity, Payload

log = logging.getLogger(__name__)
T = TypeVar("T")

PENDING_BYTES_MAX = 16 << 20
"""Encoded blocks that wait for a disk that does not take them: about 30 min of one headset."""
SHED_ROWS_MAX = 512
"""Rows given up in one step, so that a step stays short."""
COMMIT_RETRY_S_MAX = 5.0


@dataclass(frozen=True, slots=True)
class Limits:
    """When the outbox commits and how much it keeps."""

    commit_interval_s: float = 0.5
    commit_blocks: int = 64
    bytes_max: int = 4 << 30


class Outbox:
    """Accepts blocks and loss records; `run` must be running for them to be committed."""

    def __init__(self, store: Store, gateway: str, limits: Limits = Limits()) -> None:
        self._store = store
        self._gateway = gateway
        self._limits = limits
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="outbox")
        self._next: dict[StreamKey, int] = {}
        self._pending: list[Row] = []
        self._pending_bytes = 0
        self._unaccepted: dict[StreamKey, LossRecord] = {}
        """Blocks that found no room even in memory, one growing record a stream."""
        self._due = asyncio.Event()
        self._holding = Holding(0, 0, 0)
        self._commit_began: float | None = None
        self.empty = asyncio.Event()
        """Set while nothing is pending and nothing waits for its receipt."""
        self.problem = ""
        """Why commits fail now; empty when they do not."""
        self.on_commit: Callable[[], None] = lambda: None
        """Called in the event loop after every commit."""

    async def open(self) -> None:
        """Open the store. Raises `UnavailableError`, `DamagedError`."""
        await self._in_thread(self._store.open)
        tallies = await self._in_thread(self._store.tallies)
        self._next = {key: tally.next_sequence for key, tally in tallies.items()}
        self._look()

    @property
    def epoch(self) -> str:
        """Born with the store."""
        return self._store.epoch

    @property
    def holding(self) -> Holding:
        """How much waits for its receipt, as of the last step."""
        return self._holding

    def append(self, content: SampleBlock | LossRecord) -> None:
        """Take a block or a loss record; it is accepted with the next commit."""
        self.empty.clear()
        if self._pending_bytes > PENDING_BYTES_MAX and isinstance(content, SampleBlock):
            self._refuse(content)
            return
        row = self._row(content)
        self._pending.append(row)
        self._pending_bytes += row.size
        if len(self._pending) >= self._limits.commit_blocks:
            self._due.set()

    def stalled_s(self) -> float:
        """For how long the commit that is under way has been, in s; 0 if none is."""
        return 0.0 if self._commit_began is None else time.monotonic() - self._commit_began

    async def run(self) -> None:
        """Commit what is pending, every interval or as soon as enough has come, until cancelled."""
        while True:
            try:
                async with asyncio.timeout(self._limits.commit_interval_s):
                    await self._due.wait()
            except TimeoutError:
                pass
            self._due.clear()
            await self.commit()

    async def commit(self) -> None:
        """Make everything pending durable now; tries again for as long as the disk does not take it."""
        if not self._pending:
            return
        rows, self._pending = self._pending, []
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(UnavailableError),
            wait=wait_exponential(multiplier=0.1, max=COMMIT_RETRY_S_MAX),
            before_sleep=self._log_retry,
        )
        committed = threading.Event()

        def append() -> None:
            self._store.append(rows)
            committed.set()  # told by the thread itself: a cancelled wait must still learn the outcome

        try:
            async for attempt in retrying:
                with attempt:
                    self._commit_began = time.monotonic()
                    await self._in_thread(append)
        finally:
            self._commit_began = None
            if not committed.is_set():
                self._pending = rows + self._pending
        self.problem = ""
        self._pending_bytes -= sum(row.size for row in rows)
        self._look()
        for key, loss in list(self._unaccepted.items()):
            del self._unaccepted[key]
            self.append(loss)
        await self._shed()
        self.on_commit()

    async def fetch(self, after: int, through: int, limit: int) -> list[StoredRow]:
        """Committed rows with after < id <= through. Damaged ones are taken out, with a loss record instead."""
        found = await self._in_thread(self._store.fetch, after, through, limit)
        damaged = [item.held for item in found if isinstance(item, DamagedRow)]
        if damaged:
            records = retention.losses(damaged, LossCause.CORRUPT)
            log.error("%d damaged rows in the outbox taken out", len(damaged))
            await self._replace([held.id for held in damaged], records)
        return [item for item in found if isinstance(item, StoredRow)]

    async def forget(self, device: str, signal: str, epoch: str, ranges: Sequence[Range]) -> list[int]:
        """A receipt came: forget these sequences. Returns the ids that are gone; none if the epoch is another."""
        if epoch != self.epoch:
            return []
        removed = await self._in_thread(self._store.remove, device, signal, ranges)
        self._look()
        return removed

    async def held(self) -> Mapping[StreamKey, Range]:
        """Lowest and highest sequence that each stream still has here."""
        return await self._in_thread(self._store.held)

    async def tallies(self) -> Mapping[StreamKey, Tally]:
        """What each stream has come to since the outbox was born."""
        return await self._in_thread(self._store.tallies)

    def identity_of(self, row: Row) -> Identity:
        """Who the block in a row is."""
        return identity(self._gateway, self.epoch, row)

    async def close(self) -> None:
        """Commit what is pending, once, and close the store."""
        rows, self._pending = self._pending, []
        try:
            if rows:
                await self._in_thread(self._store.append, rows)
        except UnavailableError as error:
            log.error("%d blocks could not be committed at the end: %s", len(rows), error)
        finally:
            await self._in_thread(self._store.close)
            self._thread.shutdown(wait=False)

    def _look(self) -> None:
        """See what the store holds after a step."""
        self._holding = self._store.holding()
        if not (self._holding.rows or self._pending):
            self.empty.set()

    def _row(self, content: SampleBlock | LossRecord) -> Row:
        is_loss = isinstance(content, LossRecord)
        signal = LOSS if is_loss else content.signal
        key = (content.device, signal)
        sequence = self._next.get(key, 0)
        payload: Payload = codec.encode(Identity(self._gateway, *key, self.epoch, sequence), content)
        self._next[key] = sequence + 1
        return Row(
            device=content.device,
            signal=signal,
            sequence=sequence,
            first_ns=content.first_ns,
            last_ns=content.last_ns,
            samples=0 if isinstance(content, LossRecord) else len(content),
            lost=content.sample_count if isinstance(content, LossRecord) else 0,
            lost_signal=content.signal if is_loss else "",
            payload=payload,
        )

    def _refuse(self, block: SampleBlock) -> None:
        record = LossRecord(
            block.device, block.signal, LossCause.SHED, block.first_ns, block.last_ns, len(block), sequences=None
        )
        key = (block.device, block.signal)
        before = self._unaccepted.get(key)
        self._unaccepted[key] = retention.joined(before, record) if before else record

    async def _shed(self) -> None:
        """Give up rows by class and age until the quota holds."""
        while (excess := self._holding.size - self._limits.bytes_max) > 0:
            signals = {signal for _, signal in await self._in_thread(self._store.held)}
            for group in retention.shed_order(signals):
                oldest = await self._in_thread(self._store.oldest, group, SHED_ROWS_MAX)
                chosen = retention.choose(oldest, excess)
                if chosen:
                    break
            else:
                log.error("outbox is over its quota with nothing left to give up")
                return
            records = retention.losses(chosen, LossCause.SHED)
            log.warning("outbox is full: gave up %d blocks of %s", len(chosen), ", ".join(group))
            await self._replace([held.id for held in chosen], records)

    async def _replace(self, ids: Sequence[int], records: Sequence[LossRecord]) -> None:
        await self._in_thread(self._store.replace, ids, [self._row(record) for record in records])
        self._look()

    def _log_retry(self, state: RetryCallState) -> None:
        self.problem = str(state.outcome.exception() if state.outcome else "")
        log.error("%s; trying again", self.problem)

    async def _in_thread(self, call: Callable[..., T], *arguments: object) -> T:
        """Run in the store's thread. A step that has begun cannot be called back: cancelling waits for its end."""
        step = asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)
        try:
            return await asyncio.shield(step)
        except asyncio.CancelledError:
            await asyncio.wait({step})
            raise
