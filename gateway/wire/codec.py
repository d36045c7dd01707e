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
from msgspec import UnsetType
from numpy.typing import NDArray

from gateway.errors import MalformedError, UnknownSchemaError, UnknownVersionError
from gateway.samples import (
    BRAIN_STATE,
    BRAIN_STATE_FIELDS,
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
from gateway.wire.excerpt import excerpt, reason
from gateway.wire.messages import (
    CHANNELS_MAX,
    EXACT_MAX,
    INT64_MAX,
    SAMPLES_MAX,
    VITAL_SIGNS_FIELDS,
    BrainState,
    Header,
    Loss,
    Raw,
    VitalSigns,
)
from gateway.wire.topics import VERSION

JSON = "application/json"
CBOR = "application/cbor"

PAYLOAD_BYTES_MAX = 1 << 20
"""1 s of the largest headsets at 500 Hz fits twice; a larger payload is neither made nor decoded."""
RAW = "raw"
"""Schema of signals of device counts, whatever the signal's name."""


def _refuse_tag(_value: object, _immutable: object) -> object:
    raise ValueError("a tag that this contract does not use")


_CBOR_DEPTH_MAX = 8
_CBOR_TAGS_REFUSED = (0, 1, 2, 3, 4, 5, 25, 28, 29, 30, 35, 36, 37, 52, 54, 100, 256, 258, 260, 261, 1004, 43000, 55799)
"""What cbor2 would decode by itself: regular expressions, e-mails, cycles, huge decimals… have no place here."""
_CBOR_TAG_DECODERS = dict.fromkeys(_CBOR_TAGS_REFUSED, _refuse_tag)

_JSON_SCHEMAS: Mapping[str, type[BrainState | VitalSigns | Loss]] = {
    BRAIN_STATE: BrainState,
    VITAL_SIGNS: VitalSigns,
    LOSS: Loss,
}
_FIELDS: Mapping[str, frozenset[str]] = {
    BRAIN_STATE: frozenset(BRAIN_STATE_FIELDS),
    VITAL_SIGNS: frozenset(VITAL_SIGNS_FIELDS),
    LOSS: frozenset(),
}


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a block is: the same identity always has the same bytes."""

    gateway: str
    device: str
    signal: str
    """The sequence that it is counted in: the signal as its sender names it, or `loss`."""
    epoch: str
    """Born with the opening of the outbox that gave the sequence."""
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
    """Encode; raw signals as CBOR, everything else as JSON.

    Raises `ValueError` for what could not be decoded again: a caller's mistake.
    """
    if isinstance(content, LossRecord):
        payload = _json_payload(_loss_message(identity, content))
    else:
        _check_block(identity, content)
        head = _head(identity, content)
        if content.signal in _JSON_SCHEMAS:
            fields = {name: _json_values(name, content.physical(name)) for name in content.columns}
            payload = _json_payload(head | {"schema": content.signal, "fields": fields})
        else:
            payload = Payload(CBOR, RAW, cbor2.dumps(head | {"schema": RAW} | _raw_columns(content)))
    if len(payload.data) > PAYLOAD_BYTES_MAX:
        raise ValueError(f"a block of {len(payload.data)} bytes, at most {PAYLOAD_BYTES_MAX} are allowed: split it")
    return payload


def decode(payload: bytes, content_type: str | None = None) -> Message:
    """Decode a block or a loss record. Raises `WireError`.

    Without a content type (senders of MQTT 3) the first byte decides: a JSON object begins with a brace.
    """
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise MalformedError(f"payload of {len(payload)} bytes, at most {PAYLOAD_BYTES_MAX} are allowed")
    media_type = (content_type or "").partition(";")[0].strip().lower()
    if not media_type:
        media_type = JSON if payload[:1] == b"{" else CBOR
    if media_type == JSON:
        return _decode_json(payload)
    if media_type == CBOR:
        return _decode_cbor(payload)
    raise MalformedError(f"content type {excerpt(content_type)} is not known", hint=f"expected {JSON} or {CBOR}")


def decode_on(topic: str, payload: bytes, content_type: str | None = None) -> Message:
    """Decode, and check that the message belongs on the topic that it came on. Raises `WireError`."""
    where = topics.parse(topic)
    if where.kind not in {topics.TopicKind.DATA, topics.TopicKind.LOSS}:
        raise MalformedError(f"topic {topic!r} carries no blocks")
    message = decode(payload, content_type)
    who = message.identity
    is_loss = isinstance(message.content, LossRecord)
    if is_loss != (where.kind is topics.TopicKind.LOSS):
        raise MalformedError(f"a {'loss record' if is_loss else 'block'} on topic {topic!r}")
    if (where.gateway, where.device, where.signal or LOSS) != (who.gateway, who.device, who.signal):
        raise MalformedError(
            f"payload says gateway {who.gateway!r}, device {who.device!r}, signal {who.signal!r}",
            hint=f"its topic is {topic!r}",
        )
    return message


def _check_block(identity: Identity, block: SampleBlock) -> None:
    names = [identity.gateway, identity.device, identity.signal, identity.epoch]
    if block.signal not in _FIELDS:
        names += block.columns
    elif identity.signal != block.signal or not _FIELDS[block.signal].issuperset(block.columns):
        raise ValueError(f"{identity.signal}: {', '.join(block.columns)} are no fields of {block.signal}")
    if wrong := [name for name in names if not topics.is_name(name)]:
        raise ValueError(f"{wrong[0]!r} is no name: {topics.NAME_RULE}")
    if len(block) > SAMPLES_MAX or len(block.columns) > CHANNELS_MAX + 1:
        raise ValueError(f"{len(block)} samples of {len(block.columns)} columns: at most {SAMPLES_MAX}, {CHANNELS_MAX}")
    if (block.times_ns[1:] <= block.times_ns[:-1]).any():
        raise ValueError("the times of a block increase strictly")
    if not any(name != QUALITY for name in block.columns):
        raise ValueError("a block has at least one column")


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
    steps = np.diff(block.times_ns)  # modulo 2^64: a step of more than 2^63 comes out negative
    if steps.size and steps[0] > 0 and (steps == steps[0]).all():
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
    if loss.sequences:
        message["sequences"] = list(loss.sequences)
    if loss.epoch:
        message["lost_epoch"] = loss.epoch
    if loss.block_runs:
        message["blocks"] = [list(run) for run in loss.block_runs]
    return message


def _json_payload(message: Mapping[str, Any]) -> Payload:
    text = json.dumps(message, separators=(",", ":"), allow_nan=False)
    return Payload(JSON, str(message["schema"]), text.encode())


def _json_values(name: str, values: NDArray[np.float64]) -> list[float | int | None]:
    if name in INTEGER_FIELDS:
        return [round(value) if math.isfinite(value) else None for value in values.tolist()]
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
        "quality": 0 if quality is None else _quality_bits(quality.astype(np.int64, casting="safe")),
    }


def _quality_bits(bits: NDArray[np.int64]) -> Any:
    if (bits < 0).any():
        raise ValueError("quality has at most 63 bits and is never negative")
    return int(bits[0]) if (bits == bits[0]).all() else packing.typed_array(bits)


def _check_header(header: object) -> str:
    try:
        checked = msgspec.convert(header, Header)
    except msgspec.ValidationError as error:
        raise MalformedError(f"message header: {reason(error)}", hint="expected the keys v and schema") from None
    if checked.v != VERSION:
        raise UnknownVersionError(
            f"message of contract version {checked.v}, this program knows {VERSION}",
            hint="update the side that is older",
        )
    return checked.schema


def _decode_json(payload: bytes) -> Message:
    try:
        document = msgspec.json.decode(payload)
    except (ValueError, RecursionError) as error:  # of UTF-8 too, which is no DecodeError of msgspec
        raise MalformedError(f"payload is not JSON: {reason(error)}") from None
    schema = _check_header(document)
    document, schema = legacy.normalise(document, schema)
    if schema not in _JSON_SCHEMAS:
        raise UnknownSchemaError(f"schema {excerpt(schema)} is not known", hint=f"known: {', '.join(_JSON_SCHEMAS)}")
    try:
        message = msgspec.convert(document, _JSON_SCHEMAS[schema])
    except msgspec.ValidationError as error:
        raise MalformedError(f"{schema} message: {reason(error)}") from None
    if isinstance(message, Loss):
        return _loss(message)
    return _columns_block(message)


def _loss(message: Loss) -> Message:
    if message.last < message.first:
        raise MalformedError("loss message: its last time is before its first")
    sequences = None if isinstance(message.sequences, UnsetType) else message.sequences
    if sequences is not None and sequences[1] < sequences[0]:
        raise MalformedError("loss message: its last sequence is before its first")
    identity = Identity(message.gateway, message.device, LOSS, message.epoch, message.seq)
    epoch = "" if isinstance(message.lost_epoch, UnsetType) else message.lost_epoch
    runs = () if isinstance(message.blocks, UnsetType) else tuple(message.blocks)
    try:
        record = LossRecord(
            device=message.device,
            signal=message.signal,
            cause=LossCause(message.cause),
            first_ns=message.first,
            last_ns=message.last,
            sample_count=message.count,
            sequences=sequences,
            epoch=epoch,
            block_runs=runs,
        )
    except ValueError as error:
        raise MalformedError(f"loss message: {error}") from None
    return Message(identity, record)


def _columns_block(message: BrainState | VitalSigns) -> Message:
    columns: dict[str, NDArray[np.float64]] = {}
    for name, values in message.fields.items():
        if len(values) != message.n:
            raise MalformedError(f"field {name!r} has {len(values)} values, n is {message.n}")
        column = np.array([math.nan if value is None else value for value in values], dtype=np.float64)
        if name in INTEGER_FIELDS and (np.abs(column) > EXACT_MAX).any():
            raise MalformedError(f"field {name!r} is beyond the range of integers")
        columns[name] = column
    return Message(_identity(message), _block(message, message.schema, columns, {}))


def _decode_cbor(payload: bytes) -> Message:
    try:
        document = cbor2.loads(
            payload,
            semantic_decoders=_CBOR_TAG_DECODERS,
            max_depth=_CBOR_DEPTH_MAX,
            allow_indefinite=False,
            allow_duplicate_keys=False,
            strict_hashable_types=True,
        )
    except (cbor2.CBORError, ValueError, RecursionError) as error:
        raise MalformedError(f"payload is not CBOR: {reason(error)}") from None
    schema = _check_header(document)
    if schema != RAW:
        raise UnknownSchemaError(f"schema {excerpt(schema)} is not known in CBOR", hint=f"known: {RAW}")
    try:
        message = msgspec.convert(document, Raw)
    except msgspec.ValidationError as error:
        raise MalformedError(f"raw message: {reason(error)}") from None
    if message.signal in _JSON_SCHEMAS:
        raise MalformedError(f"raw message: signal {message.signal!r} travels as JSON")
    width = len(message.channels)
    if len(message.scales) != width or len({*message.channels, QUALITY}) != width + 1:
        raise MalformedError("raw message: expected one scale and one distinct name for each channel")
    if not all(math.isfinite(scale) for scale in message.scales):
        raise MalformedError("raw message: a scale is not finite")
    counts = _counts(message.counts, (message.n, width))
    columns: dict[str, NDArray[Any]] = {
        name: np.ascontiguousarray(counts[:, k], dtype=np.int32) for k, name in enumerate(message.channels)
    }
    columns[QUALITY] = _quality(message.quality, message.n)
    scales = dict(zip(message.channels, message.scales, strict=True))
    return Message(_identity(message), _block(message, message.signal, columns, scales))


def _counts(value: object, shape: tuple[int, int]) -> NDArray[Any]:
    if isinstance(value, dict):
        return packing.unpack(value, shape)
    counts = packing.array_of(value, shape, "counts")
    if not np.can_cast(counts.dtype, np.int32):
        raise MalformedError(f"counts: expected integers of at most 32 bits, not {counts.dtype}")
    return counts


def _quality(value: object, n: int) -> NDArray[np.int64]:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= INT64_MAX:
        return np.full(n, value, dtype=np.int64)
    bits = packing.array_of(value, (n,), "quality")
    if bits.dtype.kind not in "iu" or (bits < 0).any():
        raise MalformedError("quality: expected integers that are not negative")
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
    t, t0, dt = message.t, message.t0, message.dt
    if not isinstance(t, UnsetType) and isinstance(t0, UnsetType) and isinstance(dt, UnsetType):
        times = np.array(t, dtype=np.int64)
        if times.shape[0] != message.n or (times[1:] <= times[:-1]).any():
            raise MalformedError("time axis: expected n strictly increasing times in t")
        return times
    if not isinstance(t, UnsetType) or isinstance(t0, UnsetType) or isinstance(dt, UnsetType):
        raise MalformedError("time axis: expected either t, or t0 and dt")
    if t0 + dt * (message.n - 1) > INT64_MAX:
        raise MalformedError("time axis: beyond the range of 64-bit ns")
    return t0 + dt * np.arange(message.n, dtype=np.int64)
