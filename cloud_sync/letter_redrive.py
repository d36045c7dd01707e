"""Dead letters driven again, by an operator: what can be made of one now is written, and counted once.

A letter whose sequence the ledger has on its account is the token of its count; any other goes the way of a message
that has just come. One that fails again stays, with its new reason.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from cloud_sync.binding import Bindings, position
from cloud_sync.delivery import Block, Delivery, Unreadable, read
from cloud_sync.ingest import Ingest
from cloud_sync.point_batch import PointBatch
from cloud_sync.registry import dead_letters, ledger, letters
from cloud_sync.registry.admin import record_act
from cloud_sync.registry.database import Database
from cloud_sync.registry.dead_letters import Letter
from cloud_sync.registry.entries import LossCommit
from cloud_sync.timeseries import TimeSeries
from gateway.errors import ConfigError, RefusedError
from gateway.samples import SampleBlock

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Redriven:
    """What became of a letter."""

    id: int
    is_done: bool
    result: str


@dataclass(frozen=True, slots=True)
class _Envelope:
    topic: str
    payload: bytes
    content_type: str | None
    properties: Mapping[str, str]


class LetterRedrive:
    """Drives letters again, one at a time."""

    def __init__(self, database: Database, timeseries: TimeSeries, bindings: Bindings) -> None:
        self._database = database
        self._timeseries = timeseries
        self._bindings = bindings
        self._ingest = Ingest(database, timeseries, bindings)

    async def waiting(self) -> list[int]:
        """Letters that can be driven again, the oldest first."""
        async with self._database.connection() as connection:
            return await dead_letters.waiting_ids(connection)

    async def redrive(self, ident: int) -> Redriven:
        """Drive one letter again. Raises `ConfigError` where there is none of that id, `UnavailableError`."""
        async with self._database.connection() as connection:
            letter = await dead_letters.find_letter(connection, ident)
        if letter is None:
            raise ConfigError(f"no dead letter {ident}", hint="`wardlink cloud letters list --all` shows them")
        if letter.redriven_at is not None:
            return Redriven(
                ident, is_done=True, result=f"was re-driven at {letter.redriven_at.isoformat(' ', 'seconds')}"
            )
        delivery = read(_Envelope(letter.topic, letter.payload, letter.content_type or None, letter.properties))
        try:
            redriven = await self._drive(letter, delivery)
        except RefusedError as error:
            redriven = Redriven(ident, is_done=False, result=error.message)
        async with self._database.connection() as connection:
            if not redriven.is_done:
                await dead_letters.note_failure(connection, ident, redriven.result)
            await record_act(connection, "letter.redrive", id=ident, done=redriven.is_done, result=redriven.result)
        return redriven

    async def _drive(self, letter: Letter, delivery: Delivery) -> Redriven:
        content = delivery.content
        if isinstance(content, Unreadable):
            return Redriven(letter.id, is_done=False, result=content.reason)
        if not isinstance(content, Block | LossCommit) or not await self._is_claimed(letter, content):
            return await self._take_in(letter, delivery)
        if isinstance(content, LossCommit):
            async with self._database.connection() as connection:
                await letters.settle_loss(connection, letter.id, content)
            return Redriven(letter.id, is_done=True, result="loss recorded")
        return await self._write(letter, content.samples)

    async def _is_claimed(self, letter: Letter, content: Block | LossCommit) -> bool:
        if letter.is_claimed is not None:
            return letter.is_claimed
        identity = (content.key, content.sequence)
        async with self._database.connection() as connection:
            return identity in await ledger.known(connection, [identity])

    async def _take_in(self, letter: Letter, delivery: Delivery) -> Redriven:
        """As a message that has just come: the ledger decides whether it is new."""
        outcome = await self._ingest.begin([delivery]).finish()
        async with self._database.connection() as connection:
            if outcome.letter_count:
                again = await dead_letters.find_letter(connection, letter.id)
                return Redriven(letter.id, is_done=False, result=again.reason if again else "refused")
            await letters.mark_redriven(connection, letter.id)
        if outcome.parked_devices:
            return Redriven(letter.id, is_done=True, result="parked until its device is bound")
        return Redriven(letter.id, is_done=True, result=f"{outcome.point_count} points written")

    async def _write(self, letter: Letter, samples: SampleBlock) -> Redriven:
        """Write what is left of a claimed block, and count what was not counted."""
        if letter.span_ns is not None:
            start, stop = (position(samples, time_ns) for time_ns in letter.span_ns)
            if start == stop:
                return Redriven(letter.id, is_done=False, result="none of its samples is in the span that is left")
            samples = samples.part(start, stop)
        async with self._database.connection() as connection:
            await self._bindings.refresh(connection, [samples.device])
        binding = await self._bindings.bind(samples)
        if binding.waiting is not None:
            return Redriven(letter.id, is_done=False, result=f"{len(binding.waiting)} samples: {binding.reason}")
        points = PointBatch()
        points.add(0, binding.bound)
        await points.write(self._timeseries)
        if unusable := points.unusable(0):
            return Redriven(letter.id, is_done=False, result=unusable)
        parts, refusal = points.parts(0), points.refusal(0)
        async with self._database.connection() as connection:
            settled = await letters.settle_letter(connection, letter.id, parts, is_done=refusal is None)
        if refusal is not None:
            return Redriven(letter.id, is_done=False, result=refusal[0])
        stored = sum(part.point_count for part in parts)
        return Redriven(letter.id, is_done=True, result=f"{stored} points written" if settled else "settled meanwhile")
