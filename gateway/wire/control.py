"""The small messages beside the data: receipts, the time, requests for both, presence, births. All JSON."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from gateway.errors import MalformedError, UnknownSchemaError, UnknownVersionError
from gateway.wire import topics
from gateway.wire.codec import JSON, PAYLOAD_BYTES_MAX, Payload
from gateway.wire.excerpt import excerpt, reason
from gateway.wire.messages import DeviceMeta, Header, Receipt, ReceiptRequest, Status, TimeReply, TimeRequest
from gateway.wire.topics import VERSION, TopicKind

ControlMessage = Receipt | ReceiptRequest | TimeRequest | TimeReply | Status | DeviceMeta
M = TypeVar("M", Receipt, ReceiptRequest, TimeRequest, TimeReply, Status, DeviceMeta)

_SCHEMA_NAMES: dict[type[ControlMessage], str] = {
    Receipt: "receipt",
    ReceiptRequest: "receipt_request",
    TimeRequest: "time_request",
    TimeReply: "time",
    Status: "status",
    DeviceMeta: "meta",
}
_KINDS: dict[type[ControlMessage], frozenset[TopicKind]] = {
    Receipt: frozenset({TopicKind.RECEIPT}),
    ReceiptRequest: frozenset({TopicKind.RECEIPT_REQUEST}),
    TimeRequest: frozenset({TopicKind.TIME_REQUEST}),
    TimeReply: frozenset({TopicKind.TIME}),
    Status: frozenset({TopicKind.STATUS, TopicKind.BRIDGE_STATUS}),
    DeviceMeta: frozenset({TopicKind.META}),
}


def encode(message: ControlMessage) -> Payload:
    """Encode a control message."""
    return Payload(JSON, message.schema, msgspec.json.encode(message))


def decode(payload: bytes, expected: type[M]) -> M:
    """Decode a control message of the expected kind. Raises `WireError`."""
    name = _SCHEMA_NAMES[expected]
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise MalformedError(f"{name} message of {len(payload)} bytes, at most {PAYLOAD_BYTES_MAX} are allowed")
    try:
        header = msgspec.json.decode(payload, type=Header)
        if header.v != VERSION:
            raise UnknownVersionError(
                f"{name} message of contract version {header.v}, this program knows {VERSION}",
                hint="update the side that is older",
            )
        if header.schema != name:
            raise UnknownSchemaError(f"schema {excerpt(header.schema)} where {name!r} is expected")
        message = msgspec.json.decode(payload, type=expected)
    except (ValueError, RecursionError) as error:  # of UTF-8 too, which is no DecodeError of msgspec
        raise MalformedError(f"{name} message: {reason(error)}") from None
    if problem := _problem(message):
        raise MalformedError(f"{name} message: {problem}")
    return message


def decode_on(topic: str, payload: bytes, expected: type[M]) -> M:
    """Decode, and check that the message belongs on the topic that it came on. Raises `WireError`."""
    where = topics.parse(topic)
    if where.kind not in _KINDS[expected]:
        raise MalformedError(f"topic {topic!r} carries no {_SCHEMA_NAMES[expected]} message")
    message = decode(payload, expected)
    if (said := _subject(message)) != (where.bridge or where.gateway, where.device):
        raise MalformedError(f"{message.schema} message of {' '.join(said).strip()}", hint=f"its topic is {topic!r}")
    return message


def _subject(message: ControlMessage) -> tuple[str, str]:
    match message:
        case Status():
            return message.name, ""
        case DeviceMeta():
            return message.gateway, message.device
        case _:
            return message.gateway, ""


def _problem(message: ControlMessage) -> str:
    """What the types cannot express; empty if all is well."""
    match message:
        case Receipt():
            ranges = [pair for entry in message.committed for pair in entry.ranges]
        case ReceiptRequest():
            ranges = [(entry.first, entry.last) for entry in message.wanted]
        case DeviceMeta():
            per_channel = [(signal, signal.units, signal.loinc, signal.mdc) for signal in message.signals]
            for signal, *lists in per_channel:
                if any(values is not None and len(values) != len(signal.channels) for values in lists):
                    return f"signal {signal.signal!r} needs one unit, and one code if any, for each channel"
            return ""
        case TimeReply():
            return "" if message.received <= message.replied else "it was answered before it was asked"
        case _:
            return ""
    return "" if all(first <= last for first, last in ranges) else "a range ends before it begins"
