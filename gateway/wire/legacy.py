"""Old names that are still sent: normalised on the way in, whoever sends them.

The identity keeps the sender's own name, so that receipts name the sequence as the sender knows it.
"""

from __future__ import annotations

from typing import Any

from gateway.errors import MalformedError
from gateway.samples import VITAL_SIGNS

SIGNALS = {"patient_vitals": VITAL_SIGNS}
FIELDS = {"body_temperature": "temperature"}


def normalise(document: Any, schema: str) -> tuple[Any, str]:
    """A decoded JSON message and its schema name, with today's names.

    Raises `MalformedError` if a field is there under both names.
    """
    schema = SIGNALS.get(schema, schema)
    if schema != VITAL_SIGNS or not isinstance(document.get("fields"), dict):
        return document, schema
    fields = document["fields"]
    for old, new in FIELDS.items():
        if old in fields and new in fields:
            raise MalformedError(f"field {new!r} is there twice, once as {old!r}")
    renamed = {FIELDS.get(name, name): values for name, values in fields.items()}
    return {**document, "schema": schema, "fields": renamed}, schema
