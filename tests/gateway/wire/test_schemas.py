"""The JSON Schemas and the AsyncAPI document are what the code says, and describe what really travels."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from gateway.wire import schemas, topics
from gateway.wire.topics import TopicKind

VECTORS = Path(__file__).parent / "vectors"
SCHEMAS = {name: schemas.schema(name) for name in schemas.MESSAGES}


def asyncapi() -> dict[str, Any]:
    document: dict[str, Any] = json.loads((schemas.FOLDER / "asyncapi.json").read_text())
    return document


@pytest.mark.parametrize("path", list(schemas.documents()), ids=lambda path: path.name)
def test_the_files_are_what_the_code_says(path: Path) -> None:
    assert path.read_text() == schemas.documents()[path], "run: python -m gateway.wire.schemas"


def test_there_are_no_other_files() -> None:
    written = {path for path in schemas.documents() if path.parent.name == "schemas"}
    assert set((schemas.FOLDER / "schemas").iterdir()) == written


@pytest.mark.parametrize("name", SCHEMAS)
def test_each_is_valid_json_schema_and_explains_itself(name: str) -> None:
    schema = SCHEMAS[name]
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$id"] == f"urn:wardlink:wire:v1:{name}"
    assert schema["title"]
    assert schema["description"]
    assert schema["properties"]["schema"] == {"const": name}
    assert schema["properties"]["v"] == {"const": 1}


def json_vectors() -> list[tuple[str, str]]:
    found = []
    for path in sorted(VECTORS.glob("*.payload")):
        payload = path.read_bytes()
        if payload[:1] == b"{":
            found.append((path.stem, json.loads(payload)["schema"]))
    return found


@pytest.mark.parametrize(("case", "name"), [pair for pair in json_vectors() if "legacy" not in pair[0]])
def test_every_json_vector_is_valid(case: str, name: str) -> None:
    message = json.loads((VECTORS / f"{case}.payload").read_bytes())
    jsonschema.validate(message, SCHEMAS[name], jsonschema.Draft202012Validator)


VITAL_SIGNS = {
    "v": 1,
    "schema": "vital_signs",
    "gateway": "g",
    "device": "d",
    "signal": "vital_signs",
    "epoch": "e",
    "seq": 0,
    "clock": {"state": "synced", "error_ns": 0},
    "n": 1,
    "t": [0],
    "fields": {"spo2": [98]},
}


@pytest.mark.parametrize(
    "change",
    [
        {"v": 2},
        {"schema": "brain_state"},
        {"gateway": "a/b"},
        {"device": "+"},
        {"signal": "eeg"},
        {"seq": -1},
        {"n": 0},
        {"n": 4097},
        {"t": []},
        {"t0": 0},
        {"t0": 0, "dt": 1},
        {"dt": 1},
        {"t": None},
        {"fields": {}},
        {"fields": {"mood": [1]}},
        {"fields": {"spo2": ["98"]}},
        {"clock": {"state": "fine", "error_ns": 0}},
        {"clock": {"state": "synced", "error_ns": -1}},
    ],
    ids=repr,
)
def test_a_schema_refuses_what_the_decoder_refuses(change: dict[str, Any]) -> None:
    validator = jsonschema.Draft202012Validator(SCHEMAS["vital_signs"])
    validator.validate(VITAL_SIGNS)
    assert not validator.is_valid({**VITAL_SIGNS, **change})


def test_a_later_key_is_allowed() -> None:
    jsonschema.validate({**VITAL_SIGNS, "later": 1}, SCHEMAS["vital_signs"], jsonschema.Draft202012Validator)


def test_the_asyncapi_document_is_valid() -> None:
    standard = json.loads((Path(__file__).parent / "asyncapi-3.0.0.json").read_text())
    validator = jsonschema.Draft7Validator(standard)
    validator.validate(asyncapi())
    assert not validator.is_valid({**asyncapi(), "channels": {"data": {"adress": "typo"}}})
    assert not validator.is_valid({**asyncapi(), "info": {}})


def references(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        node = list(node.values())
    if isinstance(node, list):
        for part in node:
            yield from references(part)


def test_every_reference_leads_somewhere() -> None:
    found = list(references(asyncapi()))
    assert len(found) > 30
    for reference in found:
        file, _, fragment = reference.partition("#")
        node = json.loads((schemas.FOLDER / file).read_text()) if file else asyncapi()
        for part in fragment.strip("/").split("/") if fragment else ():
            node = node[part]
        assert node


def test_channels_are_the_topics() -> None:
    addresses = {channel["address"] for channel in asyncapi()["channels"].values()}
    gateway, device, signal, bridge = "{gateway}", "{device}", "{signal}", "{bridge}"
    assert addresses == {
        topics.data(gateway, device, signal),
        topics.loss(gateway, device),
        topics.status(gateway),
        topics.meta(gateway, device),
        topics.receipt(gateway),
        topics.receipt_request(gateway),
        topics.time(gateway),
        topics.time_request(gateway),
        topics.bridge_status(bridge),
    }
    kinds = set()
    for channel in asyncapi()["channels"].values():
        parameters = re.findall(r"{(\w+)}", channel["address"])
        assert parameters == list(channel["parameters"])
        topic = topics.parse(re.sub(r"{(\w+)}", r"\1-1", channel["address"]))
        kinds.add(topic.kind)
        assert all(getattr(topic, parameter) == f"{parameter}-1" for parameter in parameters)
    assert kinds == set(TopicKind)


def test_every_channel_has_one_sender_and_one_receiver() -> None:
    document = asyncapi()
    for name, channel in document["channels"].items():
        ends = [one for one in document["operations"].values() if one["channel"]["$ref"] == f"#/channels/{name}"]
        assert {end["action"] for end in ends} == {"send", "receive"}
        assert {end["tags"][0]["name"] for end in ends} == {"gateway", "bridge"}
        assert all(len(end["messages"]) == len(channel["messages"]) for end in ends)
        assert {end["bindings"]["mqtt"]["qos"] for end in ends} == {0 if name.startswith("time") else 1}


def test_messages_say_their_content_type_and_user_properties() -> None:
    messages = asyncapi()["components"]["messages"]
    assert set(messages) == set(SCHEMAS)
    for name, message in messages.items():
        assert message["contentType"] == ("application/cbor" if name == "raw" else "application/json")
        properties = message["headers"]["properties"]
        assert properties["schema"]["const"] == name
        assert ("historical" in properties) == (name in {"brain_state", "vital_signs", "raw", "loss"})
