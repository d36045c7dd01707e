"""The small messages beside the data: receipts, requests for them, presence, births. All JSON."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from gateway.errors import MalformedError, UnknownSchemaError, UnknownVersionError
from gateway.wire.codec import JSON, PAYLOAD_BYTES_MAX, Payload
from gateway.wire.messages import DeviceMeta, Header, Receipt, ReceiptRequest, Status
from gateway.wire.topics import VERSION

ControlMessage = Receipt | ReceiptRequest | Status | DeviceMeta
M = TypeVar("M", Receipt, ReceiptRequest, Status, DeviceMeta)

_SCHEMA_NAMES: dict[type[ControlMessage], str] = {
    Receipt: "receipt",
    ReceiptRequest: "receipt_request",
    Status: "status",
    DeviceMeta: "meta",
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
            raise UnknownVersionError(f"{name} message of contract version {header.v}, this program knows {VERSION}")
        if header.schema != name:
            raise UnknownSchemaError(f"schema {header.schema!r} where {name!r} is expected")
        return msgspec.json.decode(payload, type=expected)
    except (msgspec.DecodeError, RecursionError) as error:
        raise MalformedError(f"{name} message: {error}") from None
