"""What the bridge asks the ledger to record: frozen values, checked so that no peer's bytes can break a whole batch.

Knows no database.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeAlias
from uuid import UUID

from gateway.errors import MalformedError
from gateway.samples import LossRecord

NAME_LENGTH_MAX = 200
"""Characters of a serial, signal or epoch: three, at up to 4 bytes each, must fit an index row of PostgreSQL: 2,704."""
TEXT_LENGTH_MAX = 8192
"""Characters of a topic, reason or detail that are kept; payloads are kept whole."""
INT64_MAX = 2**63 - 1

Ranges: TypeAlias = list[tuple[int, int]]
"""Inclusive (first, last), in order, never touching."""


def storable(text: str) -> str:
    """Text as PostgreSQL can hold it: no zero character, no lone surrogate, bounded."""
    return text[:TEXT_LENGTH_MAX].replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def short(text: str) -> str:
    """`storable`, and short enough for an index: the name of a gateway."""
    return storable(text[:NAME_LENGTH_MAX])


def storable_json(value: object) -> object:
    """A decoded JSON value as jsonb can hold it: texts as `storable`, null for what JSON has no number for."""
    match value:
        case str():
            return storable(value)
        case bool() | int() | None:
            return value
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {storable(str(name)): storable_json(inner) for name, inner in value.items()}
        case list() | tuple():
            return [storable_json(inner) for inner in value]
        case _:
            return storable(str(value))


def _name(text: str, what: str) -> None:
    if not text or len(text) > NAME_LENGTH_MAX or "\0" in text or storable(text) != text:
        raise MalformedError(f"{what} {text[:40]!r} cannot be an identity", hint=f"1 to {NAME_LENGTH_MAX} characters")


def _within(value: int, what: str, low: int, high: int = INT64_MAX) -> None:
    if not low <= value <= high:
        raise MalformedError(f"{what} {str(value)[:40]} is out of range", hint=f"expected {low} to {high}")


@dataclass(frozen=True, slots=True, order=True)
class BlockKey:
    """One outbox's sequence of one signal of one device. Raises `MalformedError`."""

    device: str
    signal: str
    epoch: str

    def __post_init__(self) -> None:
        _name(self.device, "device")
        _name(self.signal, "signal")
        _name(self.epoch, "epoch")


Identity: TypeAlias = tuple[BlockKey, int]


@dataclass(frozen=True, slots=True)
class Part:
    """Points of one block that went to one stream. `point_count`: samples, however many targets the stream has."""

    stream_id: UUID
    point_count: int
    first_ns: int
    last_ns: int


@dataclass(frozen=True, slots=True)
class Span:
    """All samples of a message, whatever becomes of them."""

    first_ns: int
    last_ns: int
    sample_count: int


@dataclass(frozen=True, slots=True)
class BlockCommit:
    """A block whose points are all in the time-series store."""

    gateway: str
    key: BlockKey
    sequence: int
    parts: tuple[Part, ...]
    rate_hz: float | None = None
    span: Span | None = None

    def __post_init__(self) -> None:
        _within(self.sequence, "sequence", 0, INT64_MAX - 1)


@dataclass(frozen=True, slots=True)
class LossCommit:
    """A loss record. Its key's signal is `gateway.samples.LOSS`, the record names the signal that lost."""

    gateway: str
    key: BlockKey
    sequence: int
    loss: LossRecord

    def __post_init__(self) -> None:
        _within(self.sequence, "sequence", 0, INT64_MAX - 1)
        _name(self.loss.device, "device")
        _name(self.loss.signal, "signal")
        _within(self.loss.first_ns, "first time", -INT64_MAX)
        _within(self.loss.last_ns, "last time", -INT64_MAX)
        _within(self.loss.sample_count, "sample count", 1)
        if self.loss.sequences is not None:
            first, last = self.loss.sequences
            _within(first, "first sequence", 0)
            _within(last, "last sequence", first, INT64_MAX - 1)

    @property
    def lost_key(self) -> BlockKey:
        """The sequence that the record's `sequences` are of."""
        return BlockKey(self.loss.device, self.loss.signal, self.loss.epoch or self.key.epoch)

    @property
    def span(self) -> Span:
        """The record counts as one sample of its own sequence."""
        return Span(self.loss.first_ns, self.loss.last_ns, 1)


@dataclass(frozen=True, slots=True)
class ParkedBlock:
    """A message that waits for its device to be bound.

    `first_ns`..`last_ns` and `sample_count` are those of the samples that wait. Where others of the same message
    are already written, `parts` counts them; none of theirs may lie inside the span of those that wait.
    """

    gateway: str
    key: BlockKey
    sequence: int
    topic: str
    content_type: str
    payload: bytes
    first_ns: int
    last_ns: int
    sample_count: int
    reason: str
    parts: tuple[Part, ...] = ()
    properties: Mapping[str, str] = field(default_factory=dict)
    span: Span | None = None

    def __post_init__(self) -> None:
        _within(self.sequence, "sequence", 0, INT64_MAX - 1)
        _within(self.first_ns, "first time", -INT64_MAX)
        _within(self.last_ns, "last time", self.first_ns)
        _within(self.sample_count, "sample count", 1)


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that can never be written as it is.

    With `key` and `sequence` it counts as committed; without (nothing could be read from it) it is only kept.
    `parts`: points of it that the store took all the same. `is_claimed`: its sequence is committed on its account
    although it has no key here, and its parts are counted by whoever made it.
    """

    gateway: str
    topic: str
    content_type: str
    payload: bytes
    reason: str
    detail: str = ""
    key: BlockKey | None = None
    sequence: int | None = None
    parts: tuple[Part, ...] = ()
    properties: Mapping[str, str] = field(default_factory=dict)
    span: Span | None = None
    is_claimed: bool = False
    left_at: tuple[datetime, datetime] | None = None
    """First and last time of the samples that are left to write; None: all."""

    def __post_init__(self) -> None:
        if (self.key is None) != (self.sequence is None):
            raise ValueError("a dead letter has a whole identity or none")
        if self.sequence is not None:
            _within(self.sequence, "sequence", 0, INT64_MAX - 1)

    @property
    def digest(self) -> bytes:
        """The same for the same message, whoever delivers it and how often."""
        return hashlib.sha256(storable(self.topic).encode() + b"\0" + self.payload).digest()


@dataclass(frozen=True, slots=True)
class Batch:
    """What one transaction records. An identity that occurs twice is taken the first time, in this order."""

    blocks: Sequence[BlockCommit] = ()
    losses: Sequence[LossCommit] = ()
    parked: Sequence[ParkedBlock] = ()
    letters: Sequence[DeadLetter] = ()
