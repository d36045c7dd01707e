"""The JSON Schemas of the contract, made from its types: `python -m gateway.wire.schemas` writes the files.

JSON Schema 2020-12. What a type cannot say is added here: which keys `fields` may have, and the two forms of the
time axis. That lists are as long as `n` and ranges in order no schema can say: the decoder checks it.
"""

from __future__ import annotations

import inspect
import json
import typing
from pathlib import Path
from typing import Any

import msgspec

from gateway.wire import asyncapi
from gateway.wire.messages import (
    BrainState,
    DeviceMeta,
    Loss,
    Raw,
    Receipt,
    ReceiptRequest,
    Status,
    TimeReply,
    TimeRequest,
    VitalSigns,
)
from gateway.wire.topics import VERSION

FOLDER = Path(__file__).parent
DIALECT = "https://json-schema.org/draft/2020-12/schema"

MESSAGES: dict[str, type[msgspec.Struct]] = {
    "brain_state": BrainState,
    "vital_signs": VitalSigns,
    "raw": Raw,
    "loss": Loss,
    "receipt": Receipt,
    "receipt_request": ReceiptRequest,
    "time_request": TimeRequest,
    "time": TimeReply,
    "status": Status,
    "meta": DeviceMeta,
}
_TITLES = {
    "brain_state": "Block of EEG features",
    "vital_signs": "Block of vital signs",
    "raw": "Block of raw samples (CBOR)",
    "loss": "Loss record",
    "receipt": "Receipt",
    "receipt_request": "Request for receipts",
    "time_request": "Question for the time",
    "time": "Time at a bridge",
    "status": "Presence of a gateway or bridge",
    "meta": "Birth of a device",
}
_TIME_AXIS = [
    {"required": ["t"], "not": {"anyOf": [{"required": ["t0"]}, {"required": ["dt"]}]}},
    {"required": ["t0", "dt"], "not": {"required": ["t"]}},
]


def schema(name: str) -> dict[str, Any]:
    """The JSON Schema of the messages whose `schema` is this name."""
    message = MESSAGES[name]
    (_,), components = msgspec.json.schema_components([message], ref_template="#/$defs/{name}")
    tidy = {key: _tidy(component) for key, component in components.items()}
    top: dict[str, Any] = tidy.pop(message.__name__)
    top["title"] = _TITLES[name]
    if fields := top["properties"].get("fields"):
        fields["propertyNames"] = {"enum": sorted(_field_names(message))}
    if "t0" in top["properties"]:
        top["oneOf"] = _TIME_AXIS
    if tidy:
        top["$defs"] = tidy
    return {"$schema": DIALECT, "$id": f"urn:wardlink:wire:v{VERSION}:{name}", **top}


def documents() -> dict[Path, str]:
    """Every file of the contract that is made from its code, with its content."""
    found = {FOLDER / "schemas" / f"{name}.schema.json": schema(name) for name in MESSAGES}
    found[FOLDER / "asyncapi.json"] = asyncapi.document(_TITLES)
    return {path: json.dumps(content, indent=2, ensure_ascii=False) + "\n" for path, content in found.items()}


def _field_names(message: type[msgspec.Struct]) -> tuple[str, ...]:
    keys, _values = typing.get_args(typing.get_type_hints(message)["fields"])
    return typing.get_args(keys)


def _tidy(node: Any) -> Any:
    """One value is a constant, and the text of a docstring loses its indentation."""
    if isinstance(node, list):
        return [_tidy(part) for part in node]
    if not isinstance(node, dict):
        return node
    tidy = {key: _tidy(part) for key, part in node.items()}
    if isinstance(tidy.get("description"), str):
        tidy["description"] = inspect.cleandoc(tidy["description"])
    if isinstance(tidy.get("enum"), list) and len(tidy["enum"]) == 1:
        tidy["const"] = tidy.pop("enum")[0]
    return tidy


def main() -> None:
    """Write the files."""
    for path, text in documents().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
