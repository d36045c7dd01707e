"""Blocks and loss records to payload bytes and back: JSON for features and vital signs, CBOR for raw samples.

Pure. Everything that can be wrong with a payload ends in a `WireError` that says what and where.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cbor2
import msgspec
import numpy as np
from numpy.typing import NDArray

from gateway.errors import MalformedError, UnknownSchemaError, UnknownVersionError
from gateway.samples import (
    BRAIN_STATE,
    INTEGER_FIELDS,
    LOSS,
    QUALITY,
    VITAL_SIGNS,
    ClockStamp,
    ClockState,
    LossCause,
    LossRecord,
    SampleBlock,
)
from gateway.wire import legacy, packing, topics
from gateway.wire.messages import BrainState, Header, Loss, Raw, VitalSigns
from gateway.wire.topics import VERSION

JSON = "application/json"
CBOR = "application/cbor"

PAYLOAD_BYTES_MAX = 1 << 20
"""No block of this contract comes near it; a larger payload is not decoded."""
_CBOR_DEPTH_MAX = 8

_JSON_SCHEMAS: Mapping[str, type[BrainState | VitalSigns | Loss]] = {
    BRAIN_STATE: BrainState,
    VITAL_SIGNS: VitalSigns,
    LOSS: Loss,
}


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a block is: the same identity always has the same bytes."""

    gateway: str
    device: str
    signal: str
    """The sequence that it is counted in: the signal as its sender names it, or `loss`."""
    epoch: str
    """Born with the outbox that gave the sequence."""
    sequence: int


@dataclass(frozen=True, slots=True)
class Payload:
    """Encoded message, ready for MQTT."""

    content_type: str
    schema: str
    data: bytes


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """A decoded block or loss record with its identity."""

    identity: Identity
    content: SampleBlock | LossRecord


def encode(identity: Identity, content: SampleBlock | LossRecord) -> Payload:
    """Encode; raw signals as CBOR, everything else as JSON."""
    if isinstance(content, LossRecord):
        return _json_payload(_loss_message(identity, content))
    head = _head(identity, content)
    if content.signal in _JSON_SCHEMAS:
        fields = {name: _json_values(name, content.physical(name)) for name in content.columns}
        return _json_payload(head | {"schema": content.signal, "fields": fields})
    data = cbor2.dumps(head | {"schema": "raw"} | _raw_columns(content))
    return Payload(CBOR, "raw", data)


def decode(payload: bytes, content_type: str | None = None) -> Message:
    """Decode a block or a loss record. Raises `WireError`.

    Without a content type (senders of MQTT 3) the first byte decides: a JSON object begins with a brace.
    """
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise MalformedError(f"payload of {len(payload)} bytes, at most {PAYLOAD_BYTES_MAX} are allowed")
    if content_type is None:
        content_type = JSON if payload[:1] == b"{" else CBOR
    if content_type == JSON:
        return _decode_json(payload)
    if content_type == CBOR:
        return _decode_cbor(payload)
    raise MalformedError(f"content type {content_type!r} is not known", hint=f"expected {JSON} or {CBOR}")


def decode_on(topic: str, payload: bytes, content_type: str | None = None) -> Message:
    """Decode, and check that the message belongs on the topic that it came on. Raises `WireError`."""
    where = topics.parse(topic)
    message = decode(payload, content_type)
    who = message.identity
    signal = who.signal if where.kind is topics.TopicKind.DATA else LOSS
    if where.kind not in {topics.TopicKind.DATA, topics.TopicKind.LOSS}:
        raise MalformedError(f"topic {topic!r} carries no blocks")
    if (where.gateway, where.device, where.signal or LOSS) != (who.gateway, who.device, signal):
        raise MalformedError(
            f"payload says gateway {who.gateway!r}, device {who.device!r}, signal {who.signal!r}",
            hint=f"its topic is {topic!r}",
        )
    return message


def _head(identity: Identity, block: SampleBlock) -> dict[str, Any]:
    head: dict[str, Any] = {
        "v": VERSION,
        "gateway": identity.gateway,
        "device": identity.device,
        "signal": identity.signal,
        "epoch": identity.epoch,
        "seq": identity.sequence,
        "segment": block.segment,
        "clock": {"state": str(block.clock.state), "error_ns": block.clock.error_ns},
        "n": len(block),
    }
    steps = np.diff(block.times_ns)
    if steps.size and (steps == steps[0]).all():
        return head | {"t0": block.first_ns, "dt": int(steps[0])}
    return head | {"t": block.times_ns.tolist()}


def _loss_message(identity: Identity, loss: LossRecord) -> dict[str, Any]:
    message: dict[str, Any] = {
        "v": VERSION,
        "schema": LOSS,
        "gateway": identity.gateway,
        "device": identity.device,
        "signal": loss.signal,
        "epoch": identity.epoch,
        "seq": identity.sequence,
        "cause": str(loss.cause),
        "first": loss.first_ns,
        "last": loss.last_ns,
        "count": loss.sample_count,
    }
    return message | ({"sequences": list(loss.sequences)} if loss.sequences else {})


def _json_payload(message: Mapping[str, Any]) -> Payload:
    text = json.dumps(message, separators=(",", ":"), allow_nan=False)
    return Payload(JSON, str(message["schema"]), text.encode())


def _json_values(name: str, values: NDArray[np.float64]) -> list[float | int | None]:
    if name in INTEGER_FIELDS:
        return [None if math.isnan(value) else round(value) for value in values.tolist()]
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _raw_columns(block: SampleBlock) -> dict[str, Any]:
    channels = [name for name in block.columns if name != QUALITY]
    stacked = np.stack([block.columns[name] for name in channels], axis=1)
    counts: NDArray[np.int32] = stacked.astype(np.int32, casting="safe")
    plain = packing.typed_array(counts)
    packed = packing.pack(counts)
    smaller = len(packed["data"]) < counts.nbytes
    quality = block.columns.get(QUALITY)
    return {
        "channels": channels,
        "scales": [float(block.scales[name]) for name in channels],
        "counts": packed if smaller else plain,
        "quality": 0 if quality is None or not quality.any() else packing.typed_array(quality.astype(np.int64)),
    }


def _check_header(header: object) -> str:
    try:
        checked = msgspec.convert(header, Header)
    except msgspec.ValidationError as error:
        raise MalformedError(f"message header: {error}", hint="expected the keys v and schema") from None
    if checked.v != VERSION:
        raise UnknownVersionError(
            f"message of contract version {checked.v}, this program knows {VERSION}",
            hint="update the side that is older",
        )
    return checked.schema


def _decode_json(payload: bytes) -> Message:
    try:
        document = msgspec.json.decode(payload)
    except (msgspec.DecodeError, RecursionError) as error:
        raise MalformedError(f"payload is not JSON: {error}") from None
    schema = _check_header(document)
    document, schema = legacy.normalise(document, schema)
    if schema not in _JSON_SCHEMAS:
        raise UnknownSchemaError(f"schema {schema!r} is not known", hint=f"known: {', '.join(_JSON_SCHEMAS)}")
    try:
        message = msgspec.convert(document, _JSON_SCHEMAS[schema])
    except msgspec.ValidationError as error:
        raise MalformedError(f"{schema} message: {error}") from None
    if isinstance(message, Loss):
        return _loss(message)
    return _columns_block(message)


def _loss(message: Loss) -> Message:
    if message.last < message.first:
        raise MalformedError("loss message: its last time is before its first")
    identity = Identity(message.gateway, message.device, LOSS, message.epoch, message.seq)
    cause = LossCause(message.cause)
    return Message(
        identity,
        LossRecord(
            message.device, message.signal, cause, message.first, message.last, message.count, message.sequences
        ),
    )


def _columns_block(message: BrainState | VitalSigns) -> Message:
    columns: dict[str, NDArray[np.float64]] = {}
    for name, values in message.fields.items():
        if len(values) != message.n:
            raise MalformedError(f"field {name!r} has {len(values)} values, n is {message.n}")
        columns[name] = np.array([math.nan if value is None else value for value in values], dtype=np.float64)
    return Message(_identity(message), _block(message, message.schema, columns, {}))


def _decode_cbor(payload: bytes) -> Message:
    try:
        document = cbor2.loads(payload, max_depth=_CBOR_DEPTH_MAX, allow_indefinite=False)
    except (cbor2.CBORDecodeError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise MalformedError(f"payload is not CBOR: {error}") from None
    schema = _check_header(document)
    if schema != "raw":
        raise UnknownSchemaError(f"schema {schema!r} is not known in CBOR", hint="known: raw")
    try:
        message = msgspec.convert(document, Raw)
    except msgspec.ValidationError as error:
        raise MalformedError(f"raw message: {error}") from None
    if message.signal in _JSON_SCHEMAS:
        raise MalformedError(f"raw message: signal {message.signal!r} travels as JSON")
    shape = (message.n, len(message.channels))
    if len(message.scales) != shape[1] or len(set(message.channels)) != shape[1]:
        raise MalformedError("raw message: expected one scale and one distinct name for each channel")
    if isinstance(message.counts, dict):
        counts = packing.unpack(message.counts, shape)
    else:
        counts = packing.array_of(message.counts, shape, "counts")
        if counts.dtype.kind not in "iu":
            raise MalformedError("counts: expected integers")
    columns: dict[str, NDArray[Any]] = {
        name: np.ascontiguousarray(counts[:, k], dtype=np.int32) for k, name in enumerate(message.channels)
    }
    columns[QUALITY] = _quality(message.quality, message.n)
    scales = dict(zip(message.channels, message.scales, strict=True))
    if not all(math.isfinite(scale) for scale in message.scales):
        raise MalformedError("raw message: a scale is not finite")
    return Message(_identity(message), _block(message, message.signal, columns, scales))


def _quality(value: object, n: int) -> NDArray[np.int64]:
    if isinstance(value, int) and 0 <= value < 2**63:
        return np.full(n, value, dtype=np.int64)
    bits = packing.array_of(value, (n,), "quality")
    if bits.dtype.kind not in "iu":
        raise MalformedError("quality: expected integers")
    return bits.astype(np.int64)


def _identity(message: BrainState | VitalSigns | Raw) -> Identity:
    return Identity(message.gateway, message.device, message.signal, message.epoch, message.seq)


def _block(
    message: BrainState | VitalSigns | Raw,
    signal: str,
    columns: Mapping[str, NDArray[Any]],
    scales: Mapping[str, float],
) -> SampleBlock:
    clock = ClockStamp(ClockState(message.clock.state), message.clock.error_ns)
    return SampleBlock(message.device, signal, _times(message), columns, clock, message.segment, scales)


def _times(message: BrainState | VitalSigns | Raw) -> NDArray[np.int64]:
    if message.t is not None:
        times = np.array(message.t, dtype=np.int64)
        if times.shape[0] != message.n or (np.diff(times) <= 0).any():
            raise MalformedError("time axis: expected n strictly increasing times in t")
        return times
    if message.t0 is None or message.dt is None:
        raise MalformedError("time axis: expected either t, or t0 and dt")
    last = message.t0 + message.dt * (message.n - 1)
    if last > 2**63 - 1:
        raise MalformedError("time axis: beyond the range of 64-bit ns")
    return message.t0 + message.dt * np.arange(message.n, dtype=np.int64)
