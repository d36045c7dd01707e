"""The golden vectors: what was sent once decodes for ever, to the same content."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from gateway.samples import LossRecord, SampleBlock
from gateway.wire import codec, control
from gateway.wire.codec import CBOR, Message
from gateway.wire.messages import DeviceMeta, Receipt, ReceiptRequest, Status, TimeReply, TimeRequest

VECTORS = Path(__file__).parent / "vectors"
CASES = sorted(path.name.removesuffix(".payload") for path in VECTORS.glob("*.payload"))
CASES_MIN = 45
"""That many were frozen with the first version."""
CONTROL = {
    "receipt": Receipt,
    "receipt_request": ReceiptRequest,
    "time_request": TimeRequest,
    "time": TimeReply,
    "status": Status,
    "meta": DeviceMeta,
}


def expected_of(case: str) -> dict[str, Any]:
    expected: dict[str, Any] = json.loads((VECTORS / f"{case}.expected.json").read_text())
    return expected


def payload_of(case: str) -> bytes:
    return (VECTORS / f"{case}.payload").read_bytes()


def shown(message: Message) -> dict[str, Any]:
    """A decoded message in the form of the expected files."""
    who, content = message.identity, message.content
    identity = {name: getattr(who, name) for name in ("gateway", "device", "signal", "epoch", "sequence")}
    if isinstance(content, LossRecord):
        names = ("device", "signal", "first_ns", "last_ns", "sample_count")
        loss = {name: getattr(content, name) for name in names}
        loss |= {"cause": content.cause, "sequences": list(content.sequences) if content.sequences else None}
        if content.epoch:
            loss["epoch"] = content.epoch
        if content.block_runs:
            loss["block_runs"] = [list(run) for run in content.block_runs]
        return {"identity": identity, "kind": "loss", "loss": loss}
    return {"identity": identity, "kind": "block", "block": shown_block(content)}


def shown_block(block: SampleBlock) -> dict[str, Any]:
    return {
        "device": block.device,
        "signal": block.signal,
        "times_ns": block.times_ns.tolist(),
        "columns": {
            name: [None if isinstance(value, float) and math.isnan(value) else value for value in column.tolist()]
            for name, column in block.columns.items()
        },
        "clock": {"state": block.clock.state, "error_ns": block.clock.error_ns},
        "segment": block.segment,
        "scales": dict(block.scales),
    }


@pytest.mark.parametrize("case", CASES)
def test_a_vector_decodes_to_the_same_content_for_ever(case: str) -> None:
    expected = expected_of(case)
    topic, content_type, kind = expected.pop("topic"), expected.pop("content_type"), expected["kind"]
    if kind in CONTROL:
        message = control.decode_on(topic, payload_of(case), CONTROL[kind])
        assert json.loads(msgspec.json.encode(message)) == expected["message"]
        return
    assert shown(codec.decode_on(topic, payload_of(case), content_type)) == expected
    # MQTT 3 has no content type: the payload says what it is
    assert shown(codec.decode_on(topic, payload_of(case))) == expected


@pytest.mark.parametrize("case", [case for case in CASES if expected_of(case)["kind"] == "block"])
def test_the_types_of_columns_are_those_of_samples(case: str) -> None:
    content = codec.decode(payload_of(case)).content
    assert isinstance(content, SampleBlock)
    counts = expected_of(case)["content_type"] == CBOR
    for name, column in content.columns.items():
        assert column.dtype == (np.int64 if name == "quality" else np.int32 if counts else np.float64)
        assert not column.flags.writeable
    assert not content.times_ns.flags.writeable


def test_no_vector_was_changed_or_removed() -> None:
    frozen = dict(line.split("  ")[::-1] for line in (VECTORS / "SHA256SUMS").read_text().splitlines())
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in VECTORS.iterdir()
        if path.name not in {"README.md", "SHA256SUMS"}
    }
    assert found == frozen
    assert len(CASES) >= CASES_MIN
    assert {f"{case}.{end}" for case in CASES for end in ("payload", "expected.json")} == set(found)
