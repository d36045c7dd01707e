"""Blocks and loss records: there and back unchanged; anything else is a typed error in bounded memory."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import cbor2
import jsonschema
import numpy as np
import pytest
import zstandard
from cbor2 import CBORTag
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from gateway.errors import MalformedError, UnknownSchemaError, UnknownVersionError, WireError
from gateway.samples import (
    BRAIN_STATE_FIELDS,
    INTEGER_FIELDS,
    QUALITY,
    ClockStamp,
    ClockState,
    LossCause,
    LossRecord,
    SampleBlock,
)
from gateway.wire import codec, packing, schemas, topics
from gateway.wire.codec import CBOR, JSON, PAYLOAD_BYTES_MAX, Identity
from gateway.wire.messages import CHANNELS_MAX, SAMPLES_MAX, VITAL_SIGNS_FIELDS

INT64 = np.iinfo(np.int64)
MEMORY_MAX = 200 << 20
"""No payload of at most 1 MiB takes more to decode or to refuse."""

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,79}", fullmatch=True)
raw_signals = names.filter(lambda name: name not in {"brain_state", "vital_signs", "loss"})
stamps = st.builds(ClockStamp, st.sampled_from(ClockState), st.integers(0, INT64.max))
int64s = st.integers(INT64.min, INT64.max)


@st.composite
def times(draw: st.DrawFn, n: int) -> np.ndarray:
    """Strictly increasing times, n of them: evenly spaced or not."""
    if draw(st.booleans()):
        first = draw(int64s)
        step = draw(st.integers(1, max(1, (INT64.max - first) // max(n, 1))))
        if first + step * (n - 1) <= INT64.max:
            return np.array([first + step * k for k in range(n)], dtype=np.int64)
    return np.array(sorted(draw(st.sets(int64s, min_size=n, max_size=n))), dtype=np.int64)


@st.composite
def identities(draw: st.DrawFn, signal: str) -> Identity:
    return Identity(draw(names), draw(names), signal, draw(names), draw(st.integers(0, INT64.max - 1)))


@st.composite
def column_blocks(draw: st.DrawFn) -> tuple[Identity, SampleBlock]:
    """A block of features or vital signs."""
    signal, fields = draw(st.sampled_from([("brain_state", BRAIN_STATE_FIELDS), ("vital_signs", VITAL_SIGNS_FIELDS)]))
    n = draw(st.integers(1, 8))
    columns = {}
    for name in draw(st.lists(st.sampled_from(fields), min_size=1, unique=True)):
        values: st.SearchStrategy[float] = st.floats(allow_infinity=False)
        if name in INTEGER_FIELDS:
            values = st.integers(-(2**53), 2**53).map(float) | st.just(math.nan)
        columns[name] = np.array(draw(st.lists(values, min_size=n, max_size=n)), dtype=np.float64)
    identity = draw(identities(signal))
    segment = draw(st.integers(0, INT64.max))
    return identity, SampleBlock(identity.device, signal, draw(times(n)), columns, draw(stamps), segment)


@st.composite
def raw_blocks(draw: st.DrawFn) -> tuple[Identity, SampleBlock]:
    """A block of counts, with quality or without."""
    identity = draw(identities(draw(raw_signals)))
    n = draw(st.integers(1, 40))
    channels = draw(st.lists(names.filter(lambda name: name != QUALITY), min_size=1, max_size=6, unique=True))
    bound = draw(st.sampled_from([3, 2**15, 2**31 - 1]))
    counts = draw(npst.arrays(np.int32, (n, len(channels)), elements=st.integers(-bound - 1, bound), fill=st.nothing()))
    columns: dict[str, Any] = {name: counts[:, k].copy() for k, name in enumerate(channels)}
    if draw(st.booleans()):
        columns[QUALITY] = draw(npst.arrays(np.int64, n, elements=st.integers(0, INT64.max)))
    scales = {name: draw(st.floats(allow_nan=False, allow_infinity=False)) for name in channels}
    block = SampleBlock(
        identity.device, identity.signal, draw(times(n)), columns, draw(stamps), draw(st.integers(0, 9)), scales
    )
    return identity, block


@st.composite
def losses(draw: st.DrawFn) -> tuple[Identity, LossRecord]:
    identity = draw(identities("loss"))
    first, last = sorted((draw(int64s), draw(int64s)))
    count, sequences, epoch, runs = draw(st.integers(1, 2**53)), None, "", ()
    if draw(st.booleans()):
        start, epoch = draw(st.integers(0, 2**62)), draw(st.just("") | names)
        sequences = (start, start + draw(st.integers(0, 2**61)))
        runs = tuple(draw(st.lists(st.tuples(st.integers(1, 2**20), st.integers(1, 2**20)), max_size=9)))
        if runs:
            sequences = (start, start + sum(blocks for blocks, _ in runs) - 1)
            count = sum(blocks * samples for blocks, samples in runs)
    cause = draw(st.sampled_from(LossCause))
    record = LossRecord(identity.device, draw(names), cause, first, last, count, sequences, epoch, runs)
    return identity, record


def same(one: SampleBlock, other: SampleBlock) -> bool:
    """Equal in everything; a raw block without quality comes back with one that is all good."""
    columns = dict(one.columns)
    if one.scales:
        columns.setdefault(QUALITY, np.zeros(len(one), dtype=np.int64))
    return (
        (one.device, one.signal, one.clock, one.segment) == (other.device, other.signal, other.clock, other.segment)
        and dict(one.scales) == dict(other.scales)
        and np.array_equal(one.times_ns, other.times_ns)
        and list(columns) == list(other.columns)
        and all(columns[name].dtype == other.columns[name].dtype for name in columns)
        and all(
            np.array_equal(columns[name], other.columns[name], equal_nan=columns[name].dtype == np.float64)
            for name in columns
        )
    )


def topic_of(identity: Identity) -> str:
    if identity.signal == "loss":
        return topics.loss(identity.gateway, identity.device)
    return topics.data(identity.gateway, identity.device, identity.signal)


@given(column_blocks() | raw_blocks())
def test_any_block_comes_back_equal(made: tuple[Identity, SampleBlock]) -> None:
    identity, block = made
    payload = codec.encode(identity, block)
    assert payload == codec.encode(identity, block)
    assert payload.content_type == (CBOR if block.scales else JSON)
    message = codec.decode_on(topic_of(identity), payload.data, payload.content_type)
    assert message.identity == identity
    assert isinstance(message.content, SampleBlock)
    columns = dict(block.columns)
    if QUALITY in columns:  # comes last, wherever it was
        columns[QUALITY] = columns.pop(QUALITY)
    ordered = SampleBlock(block.device, block.signal, block.times_ns, columns, block.clock, block.segment, block.scales)
    assert same(ordered, message.content)


@given(losses())
def test_any_loss_record_comes_back_equal(made: tuple[Identity, LossRecord]) -> None:
    identity, record = made
    payload = codec.encode(identity, record)
    assert payload == codec.encode(identity, record)
    message = codec.decode_on(topic_of(identity), payload.data, payload.content_type)
    assert (message.identity, message.content) == (identity, record)


@given(column_blocks() | losses())
def test_every_json_payload_is_valid_by_its_schema(made: tuple[Identity, Any]) -> None:
    payload = codec.encode(*made)
    jsonschema.validate(json.loads(payload.data), schemas.schema(payload.schema), jsonschema.Draft202012Validator)


def test_noise_travels_plain_and_a_calm_signal_packed() -> None:
    noise = np.random.default_rng(1).integers(-(2**31), 2**31, size=(256, 8), dtype=np.int32)
    calm = np.cumsum(np.random.default_rng(1).integers(-200, 200, size=(256, 8)), axis=0, dtype=np.int32)
    sizes = []
    for counts, packed in ((noise, False), (calm, True)):
        block = SampleBlock(
            "d",
            "eeg",
            np.arange(256, dtype=np.int64),
            {f"E{k}": counts[:, k] for k in range(8)},
            ClockStamp(ClockState.SYNCED, 0),
            scales={f"E{k}": 1.0 for k in range(8)},
        )
        data = codec.encode(Identity("g", "d", "eeg", "e", 0), block).data
        assert isinstance(cbor2.loads(data)["counts"], dict) == packed
        sizes.append(len(data))
    assert sizes[0] < 256 * 8 * 4 + 400
    assert sizes[1] < sizes[0] * 0.4


RAW = {
    "v": 1,
    "schema": "raw",
    "gateway": "g",
    "device": "d",
    "signal": "eeg",
    "epoch": "e",
    "seq": 0,
    "clock": {"state": "synced", "error_ns": 0},
    "n": 2,
    "t0": 0,
    "dt": 1,
    "channels": ["A", "B"],
    "scales": [1.0, 0.5],
    "counts": CBORTag(40, [[2, 2], CBORTag(77, b"\1\0\2\0\3\0\4\0")]),
    "quality": 0,
}
VITALS = {
    **{key: RAW[key] for key in ("v", "gateway", "device", "epoch", "seq", "clock", "n", "t0", "dt")},
    "schema": "vital_signs",
    "signal": "vital_signs",
    "fields": {"heart_rate": [72, None]},
}
LOSS = {
    **{key: RAW[key] for key in ("v", "gateway", "device", "signal", "epoch", "seq")},
    "schema": "loss",
    "cause": "radio",
    "first": 0,
    "last": 1,
    "count": 2,
}


def zstd(data: bytes, *, size: bool = True) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=size).compress(data)


def typed(tag: int, data: bytes, shape: tuple[int, ...] = (2, 2)) -> CBORTag:
    return CBORTag(40, [list(shape), CBORTag(tag, data)])


def test_the_examples_themselves_are_good() -> None:
    for document, content_type in ((RAW, CBOR), (VITALS, JSON), (LOSS, JSON)):
        encoded = cbor2.dumps(document) if content_type == CBOR else json.dumps(document).encode()
        assert codec.decode(encoded, content_type)
        assert codec.decode(encoded)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"counts": None}, "RFC 8746"),
        ({"counts": b"\1\0\2\0"}, "RFC 8746"),
        ({"counts": typed(77, bytes(7))}, "7 bytes"),
        ({"counts": typed(77, bytes(8), (4, 1))}, "shape"),
        ({"counts": typed(77, bytes(8), (2, 2, 1))}, "shape"),
        ({"counts": CBORTag(77, bytes(8))}, "8 bytes"),
        ({"counts": CBORTag(40, [[2, 2], typed(77, bytes(8))])}, "shape"),
        ({"counts": CBORTag(40, [[2, 2]])}, "shape"),
        ({"counts": CBORTag(40, 7)}, "shape"),
        ({"counts": typed(79, bytes(32))}, "32 bits"),
        ({"counts": typed(85, bytes(16))}, "32 bits"),
        ({"counts": typed(86, bytes(32))}, "32 bits"),
        ({"counts": typed(70, bytes(16))}, "RFC 8746"),
        ({"counts": typed(77, "text")}, "RFC 8746"),  # type: ignore[arg-type]
        ({"counts": {}}, "codec and data"),
        ({"counts": {"codec": "zip", "data": b""}}, "'zip'"),
        ({"counts": {"codec": packing.CODEC, "data": "text"}}, "codec and data"),
        ({"counts": {"codec": packing.CODEC, "data": b"no zstd"}}, "zstd"),
        ({"counts": {"codec": packing.CODEC, "data": b""}}, "zstd"),
        ({"counts": {"codec": packing.CODEC, "data": zstd(bytes(15))}}, "shape"),
        ({"counts": {"codec": packing.CODEC, "data": zstd(bytes(16), size=False)}}, "shape"),
        ({"counts": {"codec": packing.CODEC, "data": zstd(bytes(16))[:-2]}}, "zstd"),
        ({"counts": {"codec": packing.CODEC, "data": zstd(bytes(16)) + b"more"}}, "zstd"),
        ({"quality": -1}, "RFC 8746"),
        ({"quality": 2**63}, "RFC 8746"),
        ({"quality": True}, "RFC 8746"),
        ({"quality": 0.5}, "RFC 8746"),
        ({"quality": None}, "RFC 8746"),
        ({"quality": CBORTag(64, bytes(3))}, "3 bytes"),
        ({"quality": CBORTag(72, b"\1\xff")}, "not negative"),
        ({"quality": CBORTag(86, bytes(16))}, "integers"),
        ({"channels": ["A", "A"]}, "distinct"),
        ({"channels": ["A", "quality"]}, "distinct"),
        ({"channels": ["A"]}, "one scale"),
        ({"channels": []}, "length >= 1"),
        ({"channels": ["A", "B/C"]}, "regex"),
        ({"scales": [1.0]}, "one scale"),
        ({"scales": [1.0, math.nan]}, "finite"),
        ({"scales": [1.0, math.inf]}, "finite"),
        ({"scales": [1.0, "x"]}, "float"),
        ({"signal": "brain_state"}, "JSON"),
        ({"signal": "loss"}, "JSON"),
        ({"signal": "_cloud"}, "regex"),
        ({"device": "d\n"}, "regex"),
        ({"gateway": "+"}, "regex"),
        ({"epoch": ""}, "regex"),
        ({"seq": -1}, "seq"),
        ({"seq": 2**63 - 1}, "seq"),
        ({"seq": True}, "seq"),
        ({"n": 3}, "shape"),
        ({"n": 0}, "n"),
        ({"n": 2**40}, "n"),
        ({"n": 4096}, "shape"),
        ({"dt": 0}, "dt"),
        ({"dt": 2**63}, "dt"),
        ({"t0": 2**63 - 1}, "range"),
        ({"t0": None}, "t0"),
        ({"t": [0, 1]}, "either"),
        ({"clock": {"state": "maybe", "error_ns": 0}}, "state"),
        ({"clock": {"state": "synced", "error_ns": -1}}, "error_ns"),
        ({"clock": {"state": "synced", "error_ns": 2**64}}, "CBOR"),
        ({"segment": -1}, "segment"),
        ({"v": "1"}, "header"),
        ({"v": True}, "header"),
        ({7: 7}, "str"),
        ({b"x": 7}, "str"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value)[:60],
)
def test_a_malformed_raw_block_says_what_is_wrong(change: dict[Any, Any], said: str) -> None:
    with pytest.raises(MalformedError) as caught:
        codec.decode(cbor2.dumps({**RAW, **change}), CBOR)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fields": {}}, "fields"),
        ({"fields": {"heart_rate": [72]}}, "1 values, n is 2"),
        ({"fields": {"heart_rate": [72, 73, 74]}}, "3 values, n is 2"),
        ({"fields": {"heart_rate": [72, "73"]}}, "float | null"),
        ({"fields": {"heart_rate": [72, 1e300]}}, "range of integers"),
        ({"fields": {"heart_rate": 72}}, "array"),
        ({"fields": {"mood": [1, 2]}}, "mood"),
        ({"fields": [1, 2]}, "fields"),
        ({"fields": None}, "fields"),
        ({"fields": {"temperature": [36, 37], "body_temperature": [36, 37]}}, "twice"),
        ({"signal": "eeg"}, "signal"),
        ({"signal": "brain_state"}, "signal"),
        ({"t": [0, 1]}, "either"),
        ({"t": [1, 1], "t0": None}, "t0"),
        ({"clock": 7}, "clock"),
        ({"n": 1.5}, "n"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value)[:60],
)
def test_malformed_vital_signs_say_what_is_wrong(change: dict[str, Any], said: str) -> None:
    with pytest.raises(MalformedError) as caught:
        codec.decode(json.dumps({**VITALS, **change}).encode(), JSON)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "times_given",
    [
        {"t": [1, 1]},
        {"t": [2, 1]},
        {"t": [0]},
        {"t": [0, 1, 2]},
        {"t": []},
        {"t": [0, 2**63]},
        {"t0": 0},
        {"dt": 1},
        {},
    ],
    ids=str,
)
def test_a_time_axis_is_whole_and_increases(times_given: dict[str, Any]) -> None:
    document = {key: value for key, value in VITALS.items() if key not in {"t0", "dt"}}
    with pytest.raises(MalformedError):
        codec.decode(json.dumps({**document, **times_given}).encode(), JSON)


def test_times_at_the_ends_of_the_range() -> None:
    document = {key: value for key, value in VITALS.items() if key not in {"t0", "dt"}}
    for axis in ({"t": [-(2**63), 2**63 - 1]}, {"t0": -(2**63), "dt": 2**63 - 1}, {"t0": 2**63 - 2, "dt": 1}):
        content = codec.decode(json.dumps({**document, **axis}).encode(), JSON).content
        assert isinstance(content, SampleBlock)
        expected = axis.get("t") or [axis["t0"], axis["t0"] + axis["dt"]]
        assert content.times_ns.tolist() == expected


def test_a_step_beyond_64_bits_is_not_taken_for_one() -> None:
    ends = np.array([INT64.min, INT64.max], dtype=np.int64)
    block = SampleBlock("d", "vital_signs", ends, {"spo2": np.zeros(2)}, ClockStamp(ClockState.UNSYNCED, 0))
    content = codec.decode(codec.encode(Identity("g", "d", "vital_signs", "e", 0), block).data).content
    assert isinstance(content, SampleBlock)
    assert content.times_ns.tolist() == ends.tolist()


def test_a_payload_that_is_too_long_is_refused_even_if_it_is_good() -> None:
    text = json.dumps(VITALS).encode()
    longest = text + b" " * (PAYLOAD_BYTES_MAX - len(text))
    assert codec.decode(longest, JSON)
    with pytest.raises(MalformedError, match="at most"):
        codec.decode(longest + b" ", JSON)


@pytest.mark.parametrize(
    "change",
    [
        *({"last": -1}, {"count": 0}, {"count": 2**53 + 1}, {"cause": "theft"}, {"sequences": [2, 1]}),
        *({"sequences": [1]}, {"lost_epoch": "e"}, {"blocks": [[1, 2]]}, {"sequences": [3, 4], "blocks": [[2, 2]]}),
        *({"sequences": [3, 3], "blocks": []}, {"sequences": [3, 5], "blocks": [[2, 1]]}),
        {"sequences": [3, 3], "lost_epoch": "/"},
    ],
    ids=str,
)
def test_a_malformed_loss_record_is_an_error(change: dict[str, Any]) -> None:
    with pytest.raises(MalformedError):
        codec.decode(json.dumps({**LOSS, **change}).encode(), JSON)


def test_an_unknown_version_or_schema_is_an_error_of_its_own() -> None:
    for document in (RAW, VITALS, LOSS):
        dumps: Callable[[Any], bytes] = cbor2.dumps if document is RAW else lambda value: json.dumps(value).encode()
        for version in (0, 2, 2**62, -1):
            with pytest.raises(UnknownVersionError):
                codec.decode(dumps({**document, "v": version}))
            with pytest.raises(UnknownVersionError):
                codec.decode(dumps({"v": version, "schema": "something else", "body": [1, {}]}))
        for schema in ("", "raw2", "Loss", "x" * 1000, "receipt"):
            with pytest.raises(UnknownSchemaError):
                codec.decode(dumps({**document, "schema": schema}))
    with pytest.raises(UnknownSchemaError):
        codec.decode(json.dumps({**VITALS, "schema": "raw"}).encode(), JSON)
    with pytest.raises(UnknownSchemaError):
        codec.decode(cbor2.dumps(VITALS), CBOR)


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON", "", None])
def test_ways_to_write_the_content_type(content_type: str | None) -> None:
    assert codec.decode(json.dumps(VITALS).encode(), content_type)


@pytest.mark.parametrize("content_type", ["text/plain", "application/xml", "json", "x" * 60_000])
def test_another_content_type_is_an_error(content_type: str) -> None:
    with pytest.raises(MalformedError, match="content type") as caught:
        codec.decode(json.dumps(VITALS).encode(), content_type)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("document", "topic"),
    [
        (VITALS, "wardlink/v1/other/data/d/vital_signs"),
        (VITALS, "wardlink/v1/g/data/other/vital_signs"),
        (VITALS, "wardlink/v1/g/data/d/patient_vitals"),
        (VITALS, "wardlink/v1/g/data/d/loss"),
        (VITALS, "wardlink/v1/g/loss/d"),
        (VITALS, "wardlink/v1/g/meta/d"),
        (VITALS, "wardlink/v1/g/status"),
        (VITALS, "wardlink/v1/_cloud/status/g"),
        (VITALS, "wardlink/v1/+/data/d/vital_signs"),
        (VITALS, "wardlink/v1/g/data/#/vital_signs"),
        (LOSS, "wardlink/v1/g/loss/other"),
        (LOSS, "wardlink/v1/other/loss/d"),
        (LOSS, "wardlink/v1/g/data/d/loss"),
        (LOSS, "wardlink/v1/g/data/d/eeg"),
    ],
)
def test_a_message_on_somebody_elses_topic_is_an_error(document: dict[str, Any], topic: str) -> None:
    with pytest.raises(MalformedError):
        codec.decode_on(topic, json.dumps(document).encode(), JSON)


@pytest.mark.parametrize("name", ["+", "#", "a/b", "_cloud", "", "a\n", "x" * 81])
@pytest.mark.parametrize("key", ["gateway", "device", "epoch"])
def test_a_bad_name_is_neither_encoded_nor_decoded(key: str, name: str) -> None:
    with pytest.raises(MalformedError):
        codec.decode(json.dumps({**VITALS, key: name}).encode(), JSON)
    message = codec.decode(json.dumps(VITALS).encode(), JSON)
    fields = {field: getattr(message.identity, field) for field in ("gateway", "device", "signal", "epoch", "sequence")}
    with pytest.raises(ValueError, match="no name"):
        codec.encode(Identity(**{**fields, key: name}), message.content)


def block_of(n: int = 2, signal: str = "eeg", columns: dict[str, Any] | None = None, step: int = 1) -> SampleBlock:
    columns = columns or {"A": np.zeros(n, dtype=np.int32)}
    return SampleBlock(
        "d",
        signal,
        np.arange(n, dtype=np.int64) * step,
        columns,
        ClockStamp(ClockState.SYNCED, 0),
        scales={name: 1.0 for name in columns if signal == "eeg"},
    )


@pytest.mark.parametrize(
    ("block", "signal"),
    [
        (block_of(SAMPLES_MAX + 1), "eeg"),
        (block_of(1, columns={f"E{k}": np.zeros(1, dtype=np.int32) for k in range(CHANNELS_MAX + 2)}), "eeg"),
        (block_of(2, step=0), "eeg"),
        (block_of(2, step=-1), "eeg"),
        (block_of(2, columns={"quality": np.zeros(2, dtype=np.int64)}), "eeg"),
        (block_of(2, columns={"A/B": np.zeros(2, dtype=np.int32)}), "eeg"),
        (block_of(2, columns={"A": np.zeros(2, dtype=np.int32), "quality": np.array([0, -1])}), "eeg"),
        (block_of(2, "vital_signs", {"mood": np.zeros(2)}), "vital_signs"),
        (block_of(2, "vital_signs", {"spo2": np.zeros(2)}), "patient_vitals"),
        (block_of(2, "brain_state", {"spo2": np.zeros(2)}), "brain_state"),
        (block_of(2, "loss", {"spo2": np.zeros(2)}), "loss"),
        (
            block_of(
                2048,
                columns={
                    f"E{k}": np.random.default_rng(k).integers(-(2**31), 2**31, 2048, dtype=np.int32)
                    for k in range(200)
                },
            ),
            "eeg",
        ),
    ],
    ids=range(12),
)
def test_what_could_not_be_decoded_again_is_not_encoded(block: SampleBlock, signal: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        codec.encode(Identity("g", "d", signal, "e", 0), block)


def test_no_value_and_infinity_are_null() -> None:
    block = block_of(3, "vital_signs", {name: np.array([math.nan, math.inf, 71.6]) for name in ("spo2", "temperature")})
    document = json.loads(codec.encode(Identity("g", "d", "vital_signs", "e", 0), block).data)
    assert document["fields"] == {"spo2": [None, None, 72], "temperature": [None, None, 71.6]}


# --- anything at all


def is_refused_or_valid(payload: bytes, content_type: str | None) -> None:
    """A typed, short, printable error, or a message that can be sent again."""
    try:
        message = codec.decode(payload, content_type)
    except WireError as error:
        said = str(error)
    else:
        said = ""
        if message.identity.signal != "patient_vitals":
            again = codec.encode(message.identity, message.content)
            assert codec.decode(again.data, again.content_type).identity == message.identity
    assert len(said) < 500
    assert said.encode().decode().isprintable()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
cbor_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=4), inner, max_size=4)
        | st.builds(CBORTag, st.integers(0, 300) | st.sampled_from([1004, 43000, 55799]), inner)
    ),
    max_leaves=12,
)


@given(st.binary(max_size=300), st.sampled_from([JSON, CBOR, None]))
@example(b'"\xff"', JSON)
@example(b'{"v":1,"schema":"\xff\xfe"}', JSON)
@example(b'{"v":1,"schema":"\\ud800"}', JSON)
@example(b'{"v":1e999,"schema":"loss"}', JSON)
@example(b"{}", None)
@example(b"", None)
@example(b"[]", JSON)
@example(b"null", JSON)
def test_any_bytes_are_refused_or_valid(payload: bytes, content_type: str | None) -> None:
    is_refused_or_valid(payload, content_type)


@given(st.sampled_from(sorted(RAW)), cbor_values)
def test_any_value_at_any_key_of_a_raw_block(key: str, value: object) -> None:
    try:
        payload = cbor2.dumps({**RAW, key: value})
    except (ValueError, TypeError, OverflowError, cbor2.CBORError):
        return
    is_refused_or_valid(payload, CBOR)


@given(st.sampled_from(sorted(VITALS)), json_values)
def test_any_value_at_any_key_of_vital_signs(key: str, value: object) -> None:
    is_refused_or_valid(json.dumps({**VITALS, key: value}).encode(), JSON)


@given(st.sampled_from(sorted(LOSS)), json_values)
def test_any_value_at_any_key_of_a_loss_record(key: str, value: object) -> None:
    is_refused_or_valid(json.dumps({**LOSS, key: value}).encode(), JSON)


@given(column_blocks() | raw_blocks() | losses(), st.data())
def test_a_good_payload_with_a_bit_flipped_or_cut_short(made: tuple[Identity, Any], data: st.DataObject) -> None:
    payload = codec.encode(*made)
    where = data.draw(st.integers(0, len(payload.data) - 1))
    flipped = bytearray(payload.data)
    flipped[where] ^= 1 << data.draw(st.integers(0, 7))
    is_refused_or_valid(bytes(flipped), payload.content_type)
    with pytest.raises(WireError):
        codec.decode(payload.data[:where], payload.content_type)


@pytest.mark.parametrize(
    "nested",
    [b"[" * 100_000, b'{"a":' * 100_000, b'{"v":1,"schema":"loss","x":' + b"[" * 500_000],
    ids=["arrays", "objects", "inside"],
)
def test_deep_nesting_in_json_is_refused(nested: bytes) -> None:
    with pytest.raises(MalformedError):
        codec.decode(nested, JSON)


@pytest.mark.parametrize("depth", [8, 1000, 500_000])
def test_deep_nesting_in_cbor_is_refused(depth: int) -> None:
    nested = cbor2.dumps({**RAW, "later": "here"}).replace(b"\x64here", b"\x81" * depth + b"\x00")
    with pytest.raises(MalformedError, match="depth"):
        codec.decode(nested, CBOR)
    with pytest.raises(MalformedError):
        codec.decode(b"\xd8\x28" * depth + b"\x00", CBOR)


def test_duplicate_keys() -> None:
    """Refused in CBOR, as RFC 8949 asks for; in JSON the last one counts, as everywhere."""
    twice = b"\xa3\x61v\x01\x61v\x01\x66schema\x63raw"
    with pytest.raises(MalformedError, match="Duplicate"):
        codec.decode(twice, CBOR)
    text = json.dumps(VITALS)[:-1] + ', "seq": 5}'
    assert codec.decode(text.encode(), JSON).identity.sequence == 5


@pytest.mark.parametrize(
    "tag", [0, 1, 2, 3, 4, 5, 25, 28, 29, 30, 35, 36, 37, 52, 54, 100, 256, 258, 260, 261, 1004, 43000]
)
def test_tags_that_cbor2_would_interpret_are_refused(tag: int) -> None:
    """cbor2 would compile regular expressions, parse e-mails, follow references and build huge decimals."""
    for value in ("a", b"a", 1, [1, 2], []):
        payload = cbor2.dumps({**RAW, "later": "here"}).replace(b"\x64here", cbor2.dumps(CBORTag(tag, value)))
        with pytest.raises(MalformedError, match="CBOR"):
            codec.decode(payload, CBOR)


def memory_peak(payload: bytes, content_type: str) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            codec.decode(payload, content_type)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


BOMB = zstd(bytes(1 << 28))


@pytest.mark.parametrize(
    ("payload", "content_type", "bytes_max"),
    [
        (cbor2.dumps({**RAW, "counts": {"codec": packing.CODEC, "data": BOMB}}), CBOR, 1 << 20),
        (cbor2.dumps({**RAW, "n": 2**62, "counts": {"codec": packing.CODEC, "data": BOMB}}), CBOR, 1 << 20),
        (cbor2.dumps({**RAW, "n": 4096, "counts": {"codec": packing.CODEC, "data": BOMB}}), CBOR, 1 << 20),
        (bytes.fromhex("5b7fffffffffffffff"), CBOR, 1 << 20),
        (bytes.fromhex("9b7fffffffffffffff"), CBOR, 1 << 20),
        (bytes.fromhex("bb7fffffffffffffff"), CBOR, 1 << 20),
        (b"\x9a\x00\x0f\xff\xf0" + b"\x80" * (PAYLOAD_BYTES_MAX - 16), CBOR, MEMORY_MAX),
        (b"[" + b"{}," * (PAYLOAD_BYTES_MAX // 3 - 2) + b"0]", JSON, MEMORY_MAX),
        (b'{"v":1,"schema":"' + b"x" * (PAYLOAD_BYTES_MAX - 100) + b'"}', JSON, 16 << 20),
        (bytes(PAYLOAD_BYTES_MAX + 1), CBOR, 1 << 16),
        (b"{" * (PAYLOAD_BYTES_MAX + 1), JSON, 1 << 16),
    ],
    ids=["bomb", "huge n", "bomb of another shape", *"abc", "arrays", "objects", "long text", "too long", "too long {"],
)
def test_hostile_payloads_take_bounded_memory(payload: bytes, content_type: str, bytes_max: int) -> None:
    assert memory_peak(payload, content_type) < bytes_max


def test_the_largest_block_takes_bounded_memory() -> None:
    shape = (SAMPLES_MAX, CHANNELS_MAX)
    document = {
        **RAW,
        "n": shape[0],
        "channels": [f"E{k}" for k in range(shape[1])],
        "scales": [1.0] * shape[1],
        "counts": {"codec": packing.CODEC, "data": zstd(bytes(shape[0] * shape[1] * 4))},
    }
    payload = cbor2.dumps(document)
    tracemalloc.start()
    try:
        assert codec.decode(payload, CBOR)
        assert tracemalloc.get_traced_memory()[1] < 16 * shape[0] * shape[1]
    finally:
        tracemalloc.stop()
