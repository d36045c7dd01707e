"""Numbered blocks, what the outside was told of them, and what is found afterwards: every block exactly once.

Block number k of a stream fills the k-th second since noon, and its size follows from its number. So a row that is
read back says by itself which block it is, and a loss record says by its times which blocks it means, whatever their
sequences are.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeGuard

import numpy as np

from gateway.samples import (
    BRAIN_STATE,
    EEG,
    NS_PER_S,
    VITAL_SIGNS,
    ClockStamp,
    ClockState,
    LossCause,
    LossRecord,
    SampleBlock,
)
from gateway.spool.outbox import Outbox
from gateway.spool.store import StoredRow, StreamKey, Suspect, Tally
from gateway.wire import codec
from gateway.wire.codec import Identity

GATEWAY = "gw-faults"
NOON_NS = 1_714_564_800 * NS_PER_S
CLOCK = ClockStamp(ClockState.SYNCED, 1000)
STREAMS: tuple[StreamKey, ...] = (("CYTON-1", EEG), ("CYTON-1", BRAIN_STATE), ("STRAP-1", VITAL_SIGNS))
COLUMN = {EEG: "Fp1", BRAIN_STATE: "alpha", VITAL_SIGNS: "heart_rate"}
RADIO_SAMPLES = 3
"""Samples that each loss by radio speaks of."""
ALL = 10**9

BlockKey = tuple[StreamKey, int]
"""A block of a stream; or a loss by radio, of which the stream is (device, "radio")."""


def size_of(number: int) -> int:
    """Samples in block number k."""
    return 5 + number * 7 % 13


def of_these_sizes(numbers: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """Those blocks, in order, that have these sizes, in order: others among them may have been lost in another way."""
    found: list[int] = []
    for number in numbers:
        if len(found) < len(sizes) and size_of(number) == sizes[len(found)]:
            found.append(number)
    return found


def block(stream: StreamKey, number: int) -> SampleBlock:
    """Block number k of a stream, with its number in its values."""
    device, signal = stream
    n = size_of(number)
    times = NOON_NS + number * NS_PER_S + np.arange(n, dtype=np.int64) * (NS_PER_S // n)
    column: Any = np.full(n, number % 200 + 20)
    if signal == EEG:
        return SampleBlock(device, signal, times, {"Fp1": column.astype(np.int32)}, CLOCK, scales={"Fp1": 0.5})
    return SampleBlock(device, signal, times, {COLUMN[signal]: column.astype(np.float64)}, CLOCK)


def radio_loss(device: str, number: int) -> LossRecord:
    """Loss number k of a device: it comes to the outbox as a loss."""
    first_ns = NOON_NS + number * NS_PER_S
    return LossRecord(device, EEG, LossCause.RADIO, first_ns, first_ns + NS_PER_S // 2, RADIO_SAMPLES)


def number_of(time_ns: int) -> int:
    """Which block a time is in."""
    return (time_ns - NOON_NS) // NS_PER_S


@dataclass(frozen=True, slots=True)
class Shown:
    """What had an identity."""

    checksum: int
    keys: tuple[BlockKey, ...]
    """The block, or those of which it is the loss."""
    is_loss: bool


@dataclass(slots=True)
class Told:
    """What the outside may rely on."""

    accepted: Counter[StreamKey] = field(default_factory=Counter)
    """How many blocks of each stream a commit has returned for: numbers 0 up to that."""
    receipted: set[BlockKey] = field(default_factory=set)
    """Blocks that the outbox was told to forget: they may be gone, and need not."""
    losses_receipted: set[BlockKey] = field(default_factory=set)
    """Blocks of which the record of their loss may be gone."""
    shown: dict[Identity, Shown] = field(default_factory=dict)
    """Every identity that a sender could have seen."""

    def accept(self, stream: StreamKey, count: int) -> None:
        """A commit returned for `count` more blocks."""
        self.accepted[stream] += count

    def show(self, row: StoredRow) -> None:
        """A row was there to be sent. Raises `AssertionError` if its identity was given to other bytes before."""
        identity, content = read(row)
        keys = tuple(self.blocks_lost(row)) if is_given_up(content) else (key_of(content),)
        shown = Shown(zlib.crc32(row.row.payload.data), keys, is_given_up(content))
        assert self.shown.setdefault(identity, shown) == shown, f"{identity} was given twice"

    def receipt(self, row: StoredRow) -> None:
        """The outbox will be told to forget a row."""
        if is_given_up(read(row)[1]):
            self.losses_receipted.update(self.blocks_lost(row))
        else:
            self.receipted.add(key_of(read(row)[1]))

    def is_receipted(self, shown: Shown) -> bool:
        """Whether a receipt was given for what had an identity."""
        return set(shown.keys) <= (self.losses_receipted if shown.is_loss else self.receipted)

    def blocks_lost(self, row: StoredRow) -> list[BlockKey]:
        """The blocks that a loss record speaks of, by their sequences if those were seen, or else by its times.

        Raises `AssertionError` if its count is not theirs.
        """
        who, loss = read(row)
        assert isinstance(loss, LossRecord)
        if is_reissued(loss):
            return [((loss.device, LossCause.RADIO), number_of(loss.first_ns))]
        first, last = loss.sequences or (0, -1)
        epoch = loss.epoch or who.epoch
        identities = [Identity(GATEWAY, loss.device, loss.signal, epoch, number) for number in range(first, last + 1)]
        if identities and all(identity in self.shown for identity in identities):
            keys = [key for identity in identities for key in self.shown[identity].keys]
        else:
            numbers = list(range(number_of(loss.first_ns), number_of(loss.last_ns) + 1))
            if loss.block_runs:
                numbers = of_these_sizes(numbers, [size for count, size in loss.block_runs for _ in range(count)])
            keys = [((loss.device, loss.signal), number) for number in numbers]
        samples = sum(size_of(number) for _, number in keys)
        assert loss.sample_count == samples, f"{loss} speaks of {samples} samples"
        return keys


@dataclass(slots=True)
class Found:
    """What an outbox holds."""

    rows: Sequence[StoredRow]
    tallies: Mapping[StreamKey, Tally]
    suspects: Sequence[Suspect] = ()
    """What the outbox believes that the disk took from it."""
    new_rows: Sequence[StoredRow] = ()
    """Rows that were added after it was opened again."""

    def check(self, told: Told, losses_allowed: Iterable[LossCause] = (LossCause.SHED,)) -> None:
        """Raise `AssertionError`, which names all that is wrong, unless every accepted block is here or accounted for,
        once, under one identity.
        """
        wrong = [f"{len(self.suspects)} ranges are missed, such as {self.suspects[0]}"] if self.suspects else []
        wrong += [*self._identities(told), *self._blocks_missing(told, losses_allowed)]
        assert not wrong, "; ".join(wrong)

    def _identities(self, told: Told) -> Iterator[str]:
        identities = Counter(read(row)[0] for row in (*self.rows, *self.new_rows))
        twice = [identity for identity, times in identities.items() if times > 1]
        twice += [read(row)[0] for row in self.new_rows if read(row)[0] in told.shown]
        if twice:
            yield f"{len(twice)} identities given twice, such as {twice[0]}"
        for row in self.rows:
            identity, content = read(row)
            if isinstance(content, LossRecord) and content.cause is LossCause.CORRUPT and content.sequences is None:
                continue  # issued again for a record that was damaged, under its old identity
            checksum = zlib.crc32(row.row.payload.data)
            if identity in told.shown and told.shown[identity].checksum != checksum:
                yield f"{identity} has other bytes than before"

    def _blocks_missing(self, told: Told, losses_allowed: Iterable[LossCause]) -> Iterator[str]:
        stored, lost, refused = self.blocks(told, losses_allowed)
        twice = {key: times for key, times in (stored + lost).items() if times > 1}
        if twice:
            yield f"stored or on record more than once: {twice}"
        gone = told.receipted | told.losses_receipted
        accepted = {(stream, number) for stream, count in told.accepted.items() for number in range(count)}
        missing = accepted - stored.keys() - lost.keys() - gone
        if missing:
            yield f"{len(missing)} accepted blocks lost, such as {min(missing)}"
        known = set(stored) | set(lost) | gone
        yield from self._tallies_wrong(known, known - refused, set(lost) | told.losses_receipted)

    def blocks(
        self, told: Told, losses_allowed: Iterable[LossCause]
    ) -> tuple[Counter[BlockKey], Counter[BlockKey], set[BlockKey]]:
        """How often each block is here, how often it is on record as lost, and which were lost before a sequence."""
        stored: Counter[BlockKey] = Counter()
        lost: Counter[BlockKey] = Counter()
        refused: set[BlockKey] = set()
        for row in self.rows:
            _, content = read(row)
            if not is_given_up(content):
                stored[key_of(content)] += 1
                continue
            assert content.cause in losses_allowed, f"lost for no reason: {content}"
            keys = told.blocks_lost(row)
            lost.update(keys)
            if content.sequences is None:
                refused.update(keys)
        return stored, lost, refused

    def _tallies_wrong(self, known: set[BlockKey], accepted: set[BlockKey], lost: set[BlockKey]) -> Iterator[str]:
        for stream in STREAMS:
            tally = self.tallies.get(stream, Tally(0, 0, 0))
            taken = sum(size_of(number) for of, number in accepted if of == stream)
            if tally.accepted != taken:
                yield f"{stream}: {tally.accepted} samples counted, {taken} were accepted"
            given_up = sum(size_of(number) for of, number in lost if of == stream)
            if stream[1] == EEG:
                given_up += RADIO_SAMPLES * sum(of == (stream[0], LossCause.RADIO) for of, _ in known)
            if tally.lost != given_up:
                yield f"{stream}: {tally.lost} samples counted as lost, {given_up} were"


def read(row: StoredRow) -> tuple[Identity, SampleBlock | LossRecord]:
    """What a receiver makes of a row."""
    return _decoded(row.row.payload.data, row.row.payload.content_type)


@lru_cache(10_000)  # thousands of cuts leave the same rows
def _decoded(data: bytes, content_type: str) -> tuple[Identity, SampleBlock | LossRecord]:
    message = codec.decode(data, content_type)
    return message.identity, message.content


@lru_cache(10_000)
def key_of(content: SampleBlock | LossRecord) -> BlockKey:
    """Which block, or which loss by radio, this is. Raises `AssertionError` for content that was never made."""
    number = number_of(content.first_ns)
    if isinstance(content, LossRecord):
        assert content == radio_loss(content.device, number), f"never made: {content}"
        return (content.device, LossCause.RADIO), number
    stream = (content.device, content.signal)
    made = block(stream, number)
    name = COLUMN[content.signal]
    same = np.array_equal(made.times_ns, content.times_ns) and np.array_equal(made.columns[name], content.columns[name])
    assert same, f"block {number} of {stream} is not what it was"
    return stream, number


def is_reissued(loss: LossRecord) -> bool:
    """Whether this stands for the damaged record of a loss by radio: its cause is no longer known, all else is."""
    made = radio_loss(loss.device, number_of(loss.first_ns))
    return loss.sequences is None and dataclasses.replace(loss, cause=LossCause.RADIO) == made


def is_given_up(content: SampleBlock | LossRecord) -> TypeGuard[LossRecord]:
    """Whether the outbox itself wrote this, of blocks that it had accepted."""
    return isinstance(content, LossRecord) and content.cause is not LossCause.RADIO


async def look(outbox: Outbox, new_number: int | None = None) -> Found:
    """What an open outbox holds; then, with a number, one more block a stream is given to it."""
    rows = await outbox.fetch(0, ALL, ALL)
    tallies = await outbox.tallies()
    new_rows: list[StoredRow] = []
    if new_number is not None:
        for stream in STREAMS:
            outbox.append(block(stream, new_number))
        await outbox.commit()
        old = {row.id for row in rows}
        new_rows = [row for row in await outbox.fetch(0, ALL, ALL) if row.id not in old]
        assert len(new_rows) == len(STREAMS), "the outbox does not take blocks any more"
    return Found(rows, tallies, await outbox.suspects(), new_rows)


async def settle(outbox: Outbox, told: Told) -> int:
    """Answer as the cloud does for what the outbox misses: which of it is stored. Returns how many ranges it was."""
    suspects = await outbox.suspects()
    for missed in suspects:
        numbers = range(missed.first, missed.last + 1)
        who = [Identity(GATEWAY, missed.device, missed.signal, missed.epoch, number) for number in numbers]
        stored = [one.sequence for one in who if one in told.shown and told.is_receipted(told.shown[one])]
        ranges = [(number, number) for number in stored]
        asked = (missed.first, missed.last)
        await outbox.settle(missed.device, missed.signal, missed.epoch, asked, ranges, is_last_word=True)
    await outbox.commit()
    return len(suspects)
