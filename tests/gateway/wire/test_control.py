"""Receipts, time, requests, presence, births: there and back, by their schemas, on their own topics only."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import MalformedError, UnknownSchemaError, UnknownVersionError, WireError
from gateway.samples import ElectrodeState
from gateway.wire import control, schemas
from gateway.wire.codec import PAYLOAD_BYTES_MAX
from gateway.wire.control import ControlMessage
from gateway.wire.messages import (
    Clock,
    CommittedRanges,
    DeviceMeta,
    ElectrodeMeta,
    Receipt,
    ReceiptRequest,
    SignalMeta,
    Status,
    TimeReply,
    TimeRequest,
    WantedRange,
)

KINDS: tuple[type[ControlMessage], ...] = (Receipt, ReceiptRequest, TimeRequest, TimeReply, Status, DeviceMeta)
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,79}", fullmatch=True)
numbers = st.integers(0, 2**63 - 2)
pairs = st.tuples(numbers, numbers).map(lambda pair: (min(pair), max(pair)))
texts = st.text(max_size=20)
receipts = st.builds(
    Receipt,
    v=st.just(1),
    schema=st.just("receipt"),
    gateway=names,
    committed=st.lists(st.builds(CommittedRanges, names, names, names, st.lists(pairs, max_size=4)), max_size=4),
)
requests = st.builds(
    ReceiptRequest,
    v=st.just(1),
    schema=st.just("receipt_request"),
    gateway=names,
    wanted=st.lists(st.builds(lambda pair, *who: WantedRange(*who, *pair), pairs, names, names, names), max_size=4),
)
time_requests = st.builds(
    TimeRequest, v=st.just(1), schema=st.just("time_request"), gateway=names, asked=st.integers(0, 2**63 - 1)
)
times = st.integers(-(2**63), 2**63 - 1)
time_replies = st.builds(
    lambda pair, **others: TimeReply(v=1, schema="time", received=min(pair), replied=max(pair), **others),
    st.tuples(times, times),
    gateway=names,
    bridge=names,
    asked=st.integers(0, 2**63 - 1),
    clock=st.builds(Clock, st.sampled_from(["synced", "unsynced", "unknown"]), st.integers(0, 2**63 - 1)),
)
statuses = st.builds(
    Status,
    v=st.just(1),
    schema=st.just("status"),
    name=names,
    online=st.booleans(),
    version=texts,
    since=st.none() | st.integers(-(2**63), 2**63 - 1),
)


@st.composite
def signal_metas(draw: st.DrawFn) -> SignalMeta:
    channels = draw(st.lists(names, max_size=3))
    per_channel = st.lists(texts, min_size=len(channels), max_size=len(channels))
    codes = st.none() | st.lists(st.none() | texts, min_size=len(channels), max_size=len(channels))
    rate = draw(st.none() | st.floats(0.1, 1e6))
    return SignalMeta(
        signal=draw(names),
        channels=channels,
        units=draw(per_channel),
        rate_hz=rate,
        loinc=draw(codes),
        mdc=draw(codes),
    )


metas = st.builds(
    DeviceMeta,
    v=st.just(1),
    schema=st.just("meta"),
    gateway=names,
    device=names,
    driver=names,
    signals=st.lists(signal_metas(), max_size=3),
    model=st.none() | texts,
    firmware=st.none() | texts,
    battery_pct=st.none() | st.floats(0, 100),
    electrodes=st.none()
    | st.lists(st.builds(ElectrodeMeta, names, st.sampled_from(ElectrodeState), texts), max_size=3),
)


@given(receipts | requests | time_requests | time_replies | statuses | metas)
def test_any_message_comes_back_equal_and_is_valid_by_its_schema(message: ControlMessage) -> None:
    payload = control.encode(message)
    assert payload == control.encode(message)
    assert control.decode(payload.data, type(message)) == message
    jsonschema.validate(json.loads(payload.data), schemas.schema(payload.schema), jsonschema.Draft202012Validator)


@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode), st.sampled_from(KINDS))
def test_any_bytes_are_refused(payload: bytes, kind: Any) -> None:
    with pytest.raises(WireError):
        control.decode(payload, kind)


@pytest.mark.parametrize("payload", [b'"\xff"', b'{"v":1,"schema":"\xff"}', b"[" * 100_000, b'{"v":1}', b"{}", b""])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_message(payload: bytes, kind: Any) -> None:
    with pytest.raises(MalformedError):
        control.decode(payload, kind)


RECEIPT = {"v": 1, "schema": "receipt", "gateway": "g", "committed": []}


def test_version_schema_and_size() -> None:
    assert control.decode(json.dumps(RECEIPT).encode(), Receipt).committed == []
    with pytest.raises(UnknownVersionError):
        control.decode(json.dumps({**RECEIPT, "v": 2}).encode(), Receipt)
    for schema in ("status", "x" * 100_000):
        with pytest.raises(UnknownSchemaError) as caught:
            control.decode(json.dumps({**RECEIPT, "schema": schema}).encode(), Receipt)
        assert len(str(caught.value)) < 500
    with pytest.raises(MalformedError, match="at most"):
        control.decode(json.dumps(RECEIPT).encode() + b" " * PAYLOAD_BYTES_MAX, Receipt)
    assert control.decode(json.dumps({**RECEIPT, "later": 1}).encode(), Receipt)


def entry(*ranges: Any) -> dict[str, Any]:
    return {"device": "d", "signal": "eeg", "epoch": "e", "ranges": list(ranges)}


TIME = {
    "v": 1,
    "schema": "time",
    "gateway": "g",
    "bridge": "b",
    "asked": 5,
    "received": 7,
    "replied": 7,
    "clock": {"state": "synced", "error_ns": 0},
}
META = {"v": 1, "schema": "meta", "gateway": "g", "device": "d", "driver": "x"}
SIGNAL = {"signal": "eeg", "channels": ["A", "B"], "units": ["uV", "uV"]}


@pytest.mark.parametrize(
    ("document", "kind"),
    [
        ({**RECEIPT, "committed": [entry([2, 1])]}, Receipt),
        ({**RECEIPT, "committed": [entry([0, 1], [5, 4])]}, Receipt),
        ({**RECEIPT, "committed": [entry([0])]}, Receipt),
        ({**RECEIPT, "committed": [entry([0, 1, 2])]}, Receipt),
        ({**RECEIPT, "committed": [entry([-1, 1])]}, Receipt),
        ({**RECEIPT, "committed": [entry([0, 2**63 - 1])]}, Receipt),
        ({**RECEIPT, "committed": [entry(*[[0, 1]] * 4097)]}, Receipt),
        ({**RECEIPT, "committed": [entry()] * 1025}, Receipt),
        ({**RECEIPT, "gateway": "a/b"}, Receipt),
        ({**RECEIPT, "gateway": "a\n"}, Receipt),
        (
            {
                "v": 1,
                "schema": "receipt_request",
                "gateway": "g",
                "wanted": [{"device": "d", "signal": "s", "epoch": "e", "first": 2, "last": 1}],
            },
            ReceiptRequest,
        ),
        ({**TIME, "replied": 6}, TimeReply),
        ({**TIME, "asked": -1}, TimeReply),
        ({**TIME, "clock": {"state": "good", "error_ns": 0}}, TimeReply),
        ({"v": 1, "schema": "time_request", "gateway": "g", "asked": 0.5}, TimeRequest),
        ({"v": 1, "schema": "status", "name": "g", "online": "yes"}, Status),
        ({"v": 1, "schema": "status", "name": "g", "online": True, "version": "x" * 201}, Status),
        ({**META, "signals": [{**SIGNAL, "units": ["uV"]}]}, DeviceMeta),
        ({**META, "signals": [{**SIGNAL, "loinc": [None]}]}, DeviceMeta),
        ({**META, "signals": [{**SIGNAL, "mdc": ["a", "b", "c"]}]}, DeviceMeta),
        ({**META, "signals": [SIGNAL] * 33}, DeviceMeta),
        ({**META, "signals": [], "battery_pct": 101}, DeviceMeta),
        ({**META, "signals": [], "electrodes": [{"name": "C3", "state": "gone"}]}, DeviceMeta),
    ],
    ids=lambda value: str(value)[:70],
)
def test_malformed_content_is_an_error(document: dict[str, Any], kind: Any) -> None:
    with pytest.raises(MalformedError):
        control.decode(json.dumps(document).encode(), kind)


@pytest.mark.parametrize(
    ("topic", "document", "kind", "fits"),
    [
        ("wardlink/v1/g/receipt", RECEIPT, Receipt, True),
        ("wardlink/v1/other/receipt", RECEIPT, Receipt, False),
        ("wardlink/v1/g/receipt/request", RECEIPT, Receipt, False),
        ("wardlink/v1/g/time", TIME, TimeReply, True),
        ("wardlink/v1/h/time", TIME, TimeReply, False),
        ("wardlink/v1/g/time/request", TIME, TimeReply, False),
        ("wardlink/v1/g/meta/d", {**META, "signals": []}, DeviceMeta, True),
        ("wardlink/v1/g/meta/e", {**META, "signals": []}, DeviceMeta, False),
        ("wardlink/v1/h/meta/d", {**META, "signals": []}, DeviceMeta, False),
        ("wardlink/v1/g/data/d/eeg", {**META, "signals": []}, DeviceMeta, False),
        ("wardlink/v1/g/status", {"v": 1, "schema": "status", "name": "g", "online": True}, Status, True),
        ("wardlink/v1/_cloud/status/g", {"v": 1, "schema": "status", "name": "g", "online": True}, Status, True),
        ("wardlink/v1/_cloud/status/h", {"v": 1, "schema": "status", "name": "g", "online": True}, Status, False),
        ("wardlink/v2/g/receipt", RECEIPT, Receipt, False),
    ],
)
def test_a_message_belongs_on_its_topic(topic: str, document: dict[str, Any], kind: Any, fits: bool) -> None:
    payload = json.dumps(document).encode()
    if fits:
        assert control.decode_on(topic, payload, kind) == control.decode(payload, kind)
    else:
        with pytest.raises(WireError):
            control.decode_on(topic, payload, kind)
