"""A message as the broker delivered it, read: a block, a loss, a control message, or the reason why it is none.

Pure: knows the wire contract and the ledger's identities, no broker and no store.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from cloud_sync.registry.entries import BlockKey, DeadLetter, LossCommit, Span
from gateway.errors import MalformedError, WireError
from gateway.samples import LossRecord, SampleBlock
from gateway.wire import codec, control, topics
from gateway.wire.messages import DeviceMeta, ReceiptRequest, Status
from gateway.wire.topics import TopicKind


class Envelope(Protocol):
    """What is needed of a delivered message to read it; `gateway.mqtt.Inbound` is one."""

    @property
    def topic(self) -> str: ...
    @property
    def payload(self) -> bytes: ...
    @property
    def content_type(self) -> str | None: ...
    @property
    def properties(self) -> Mapping[str, str]: ...


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Samples, with the identity under which the ledger counts them."""

    gateway: str
    key: BlockKey
    sequence: int
    samples: SampleBlock

    @property
    def span(self) -> Span:
        return Span(self.samples.first_ns, self.samples.last_ns, len(self.samples))


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Nothing can be made of it."""

    reason: str


Content: TypeAlias = Block | LossCommit | DeviceMeta | Status | ReceiptRequest | Unreadable


@dataclass(frozen=True, slots=True, eq=False)
class Delivery:
    """A delivered message and what it says."""

    envelope: Envelope
    content: Content

    @property
    def line_count(self) -> int:
        """Lines that it will become, roughly: one a sample and at least one a message."""
        return len(self.content.samples) if isinstance(self.content, Block) else 1

    def letter(self, reason: str, detail: str = "") -> DeadLetter:
        """The dead letter that keeps this message."""
        content, envelope = self.content, self.envelope
        counted = content if isinstance(content, Block | LossCommit) else None
        return DeadLetter(
            gateway=gateway_of(envelope.topic),
            topic=envelope.topic,
            content_type=envelope.content_type or "",
            payload=envelope.payload,
            reason=reason,
            detail=detail,
            key=counted.key if counted else None,
            sequence=counted.sequence if counted else None,
            properties=envelope.properties,
            span=counted.span if counted else None,
        )


def read(envelope: Envelope) -> Delivery:
    """Decode a message. Never raises: what cannot be decoded is `Unreadable`."""
    try:
        return Delivery(envelope, _content(envelope))
    except WireError as error:
        return Delivery(envelope, Unreadable(str(error)))


def gateway_of(topic: str) -> str:
    """The gateway that a topic belongs to, empty where it is none of wardlink's."""
    try:
        return topics.parse(topic).gateway
    except WireError:
        return ""


def _content(envelope: Envelope) -> Content:
    where = topics.parse(envelope.topic)
    match where.kind:
        case TopicKind.DATA | TopicKind.LOSS:
            return _counted(codec.decode_on(envelope.topic, envelope.payload, envelope.content_type))
        case TopicKind.META:
            meta = control.decode(envelope.payload, DeviceMeta)
            return _on_its_topic(meta, (meta.gateway, meta.device), (where.gateway, where.device))
        case TopicKind.STATUS:
            status = control.decode(envelope.payload, Status)
            return _on_its_topic(status, status.name, where.gateway)
        case TopicKind.RECEIPT_REQUEST:
            request = control.decode(envelope.payload, ReceiptRequest)
            return _on_its_topic(request, request.gateway, where.gateway)
    raise MalformedError(f"topic {envelope.topic!r} is not for a bridge")


def _counted(message: codec.Message) -> Block | LossCommit:
    who = message.identity
    key = BlockKey(who.device, who.signal, who.epoch)
    if isinstance(message.content, LossRecord):
        return LossCommit(who.gateway, key, who.sequence, message.content)
    return Block(who.gateway, key, who.sequence, message.content)


def _on_its_topic(message: Content, said: object, expected: object) -> Content:
    if said != expected:
        raise MalformedError(f"the payload is of {said!r}, its topic of {expected!r}")
    return message
