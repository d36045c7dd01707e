"""The use case: messages in; points in InfluxDB, then counts in PostgreSQL; then what to acknowledge and to receipt.

As in telegraf a message is accepted, rejected (a dead letter keeps it) or kept: `Intake.finish` raises
`UnavailableError` as long as the stores do not take a batch, and goes on where it was when it is called again.
Knows no MQTT.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import msgspec

from cloud_sync import receipts
from cloud_sync.binding import Binding, Bindings
from cloud_sync.delivery import Block, Delivery, Unreadable
from cloud_sync.point_batch import PointBatch
from cloud_sync.registry import admin, gap_rows, ledger
from cloud_sync.registry.database import Database
from cloud_sync.registry.entries import (
    Batch,
    BlockCommit,
    BlockKey,
    DeadLetter,
    Identity,
    LossCommit,
    ParkedBlock,
    Part,
)
from cloud_sync.timeseries import TimeSeries
from gateway.errors import MalformedError, RefusedError
from gateway.samples import SampleBlock
from gateway.wire.messages import DeviceMeta, Receipt, ReceiptRequest, Status

log = logging.getLogger(__name__)

RATES_MAX = 10_000
"""Nominal sampling rates that are kept, one for each signal of a device that was announced."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A batch that is through: all of its messages can be acknowledged."""

    receipts: tuple[Receipt, ...]
    block_count: int = 0
    """Blocks that were new."""
    point_count: int = 0
    parked_devices: frozenset[str] = frozenset()
    letter_count: int = 0
    bindings_changed: bool = False
    """Whether a binding changed meanwhile: what was parked may be bound by now."""


class Ingest:
    """What a batch needs on its way: registry, store, bindings."""

    def __init__(self, database: Database, timeseries: TimeSeries, bindings: Bindings) -> None:
        self.database = database
        self.timeseries = timeseries
        self.bindings = bindings
        self.rates: OrderedDict[tuple[str, str], float] = OrderedDict()

    def begin(self, deliveries: Sequence[Delivery]) -> Intake:
        """Take in a batch; `finish` it."""
        return Intake(self, deliveries)

    def note_rates(self, meta: DeviceMeta) -> None:
        """Remember the nominal rates of a device, for the streams that its data opens."""
        for signal in meta.signals:
            if signal.rate_hz is not None:
                self.rates[meta.device, signal.signal] = signal.rate_hz
                self.rates.move_to_end((meta.device, signal.signal))
        while len(self.rates) > RATES_MAX:
            self.rates.popitem(last=False)


@dataclass(slots=True, eq=False)
class _Bound:
    """A block on its way: its number in the point batch is its place in the plan."""

    delivery: Delivery
    block: Block
    binding: Binding


@dataclass(slots=True, eq=False)
class _Plan:
    """What a batch will become: made once, so that a retry writes the very same points."""

    points: PointBatch = field(default_factory=PointBatch)
    blocks: list[_Bound] = field(default_factory=list)
    losses: list[LossCommit] = field(default_factory=list)
    letters: list[DeadLetter] = field(default_factory=list)
    changes: int = 0


class Intake:
    """One batch on its way in."""

    def __init__(self, ingest: Ingest, deliveries: Sequence[Delivery]) -> None:
        self._ingest = ingest
        self._deliveries = deliveries
        self._plan: _Plan | None = None

    async def finish(self) -> Outcome:
        """Bring the batch into both stores; where one of them is away, call again.

        Raises `UnavailableError` (keep everything), and `RefusedError` where the registry refuses the batch for
        what one of its messages says.
        """
        for delivery in self._deliveries:
            if isinstance(delivery.content, DeviceMeta):
                self._ingest.note_rates(delivery.content)
        if self._plan is None:
            self._plan = await self._prepare()
        plan = self._plan
        await plan.points.write(self._ingest.timeseries)
        batch = _batch(plan, self._ingest)
        async with self._ingest.database.connection() as connection:
            new = await ledger.commit(connection, batch)
        await self._note_presence()
        answers = await self._answers()
        entries: tuple[BlockCommit | ParkedBlock | DeadLetter, ...] = (*batch.blocks, *batch.parked, *batch.letters)
        return Outcome(
            receipts=(*receipts.receipts(self._counted()), *answers),
            block_count=len(new),
            point_count=sum(
                part.point_count for entry in entries if (entry.key, entry.sequence) in new for part in entry.parts
            ),
            parked_devices=frozenset(parked.key.device for parked in batch.parked),
            letter_count=len(batch.letters),
            bindings_changed=plan.changes != self._ingest.bindings.changes,
        )

    async def bury(self, reason: str) -> Outcome:
        """Reject the whole batch: every message becomes a dead letter, and counts as committed if it has an identity.

        Raises `UnavailableError`.
        """
        letters = [
            delivery.letter(reason)
            for delivery in self._deliveries
            if isinstance(delivery.content, Block | LossCommit | Unreadable)
        ]
        async with self._ingest.database.connection() as connection:
            await ledger.commit(connection, Batch(letters=letters))
        return Outcome(receipts=tuple(receipts.receipts(self._counted())), letter_count=len(letters))

    def forget_bindings(self) -> None:
        """Ask the registry again for the devices of this batch."""
        for device in {d.content.key.device for d in self._deliveries if isinstance(d.content, Block)}:
            self._ingest.bindings.forget(device)

    def _counted(self) -> list[tuple[str, BlockKey, int]]:
        """Every identity of the batch, those known before as well: their receipt may have been lost."""
        return [
            (content.gateway, content.key, content.sequence)
            for delivery in self._deliveries
            if isinstance(content := delivery.content, Block | LossCommit)
        ]

    async def _prepare(self) -> _Plan:
        """Decide what each message becomes; of one identity that is there twice the first counts."""
        done = await self._known()
        plan = _Plan(changes=self._ingest.bindings.changes)
        for delivery in self._deliveries:
            content = delivery.content
            if isinstance(content, Unreadable):
                plan.letters.append(delivery.letter(content.reason))
            elif isinstance(content, Block | LossCommit):
                identity = (content.key, content.sequence)
                if identity in done:
                    continue
                done.add(identity)
                if isinstance(content, LossCommit):
                    plan.losses.append(content)
                else:
                    await self._plan_block(plan, delivery, content)
        return plan

    async def _plan_block(self, plan: _Plan, delivery: Delivery, block: Block) -> None:
        rate_hz = self._ingest.rates.get((block.samples.device, block.samples.signal))
        try:
            binding = await self._ingest.bindings.bind(block.samples, rate_hz)
            plan.points.add(len(plan.blocks), binding.bound)
        except RefusedError as error:
            plan.letters.append(delivery.letter(error.message, error.hint))
        else:
            plan.blocks.append(_Bound(delivery, block, binding))

    async def _known(self) -> set[Identity]:
        """Identities of the batch that the ledger has; and the bindings of its devices are as the registry has them."""
        asked = [(key, sequence) for _, key, sequence in self._counted()]
        if not asked:
            return set()
        async with self._ingest.database.connection() as connection:
            await self._ingest.bindings.refresh(connection, {key.device for key, _ in asked})
            return await ledger.known(connection, asked)

    async def _note_presence(self) -> None:
        """Keep what devices and gateways say of themselves; the newest word of a batch is enough."""
        metas = {d.content.device: d.content for d in self._deliveries if isinstance(d.content, DeviceMeta)}
        statuses = {d.content.name: d.content for d in self._deliveries if isinstance(d.content, Status)}
        if not metas and not statuses:
            return
        async with self._ingest.database.connection() as connection:
            for meta in metas.values():
                await admin.update_device_facts(
                    connection,
                    meta.device,
                    model=meta.model,
                    firmware=meta.firmware,
                    battery_pct=meta.battery_pct,
                    gateway_id=meta.gateway,
                )
            for status in statuses.values():
                said = msgspec.to_builtins(status)
                await admin.update_gateway_status(connection, status.name, said)

    async def _answers(self) -> list[Receipt]:
        """Answers to the batch's requests, from the ledger as it is after the batch."""
        found: list[Receipt] = []
        for request in [d.content for d in self._deliveries if isinstance(d.content, ReceiptRequest)]:
            try:
                wanted = receipts.wanted(request)
            except MalformedError as error:
                log.warning("receipt request of gateway %s: %s", request.gateway, error)
                continue
            async with self._ingest.database.connection() as connection:
                await gap_rows.note_wanted(connection, request.gateway, wanted)
                committed = await ledger.committed_within(connection, wanted, receipts.ANSWER_RANGES_MAX)
            found += receipts.answer(request.gateway, wanted, committed)
        return found


def _batch(plan: _Plan, ingest: Ingest) -> Batch:
    """What the ledger is to record of a plan whose points are written."""
    blocks: list[BlockCommit] = []
    parked: list[ParkedBlock] = []
    letters = list(plan.letters)
    for number, bound in enumerate(plan.blocks):
        block, waiting = bound.block, bound.binding.waiting
        parts = plan.points.parts(number)
        if unusable := plan.points.unusable(number):
            log.error("device %s waits: %s", block.key.device, unusable)
            # Nothing of it is counted yet: what other places took will be written again, to no effect.
            parked.append(_parked(bound, block.samples, unusable, ()))
        elif refusal := plan.points.refusal(number):
            reason, detail = refusal
            if waiting is not None:
                detail += f"\n{len(waiting)} samples were bound to nobody: {bound.binding.reason}"
            letters.append(replace(bound.delivery.letter(reason, detail), parts=parts))
        elif waiting is not None:
            parked.append(_parked(bound, waiting, bound.binding.reason, parts))
        else:
            rate_hz = ingest.rates.get((block.samples.device, block.samples.signal))
            blocks.append(BlockCommit(block.gateway, block.key, block.sequence, parts, rate_hz, block.span))
    return Batch(blocks=blocks, losses=plan.losses, parked=parked, letters=letters)


def _parked(bound: _Bound, waiting: SampleBlock, reason: str, parts: tuple[Part, ...]) -> ParkedBlock:
    block, envelope = bound.block, bound.delivery.envelope
    return ParkedBlock(
        gateway=block.gateway,
        key=block.key,
        sequence=block.sequence,
        topic=envelope.topic,
        content_type=envelope.content_type or "",
        payload=envelope.payload,
        first_ns=waiting.first_ns,
        last_ns=waiting.last_ns,
        sample_count=len(waiting),
        reason=reason,
        parts=parts,
        properties=envelope.properties,
        span=block.span,
    )
