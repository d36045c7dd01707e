"""A block and a place to write it: line protocol. Pure: knows no server, no registry, no clock.

Every point carries all tags of its target; the fields are typed as the data model says.
"""

from __future__ import annotations

from functools import lru_cache

from cloud_sync import line_protocol
from cloud_sync.registry.binding_rows import Target
from gateway.samples import INTEGER_FIELDS, SampleBlock

PREFIXES_MAX = 16_384
"""Targets whose measurement and tags are kept escaped: some 8 MB, a hospital's streams of a day."""
NAMES_MAX = 4_096
"""Field names that are kept escaped: the electrodes of many montages."""


@lru_cache(maxsize=PREFIXES_MAX)
def prefix(target: Target) -> bytes:
    """Measurement and tags, sorted by key, as every line for this target begins. Raises `UnwritableError`."""
    return line_protocol.series_prefix(target.measurement, dict(target.tags))


@lru_cache(maxsize=NAMES_MAX)
def _field(name: str) -> bytes:
    return line_protocol.escape_key(name).encode()


def columns(block: SampleBlock) -> list[line_protocol.Column]:
    """The block's fields in physical units, integers where the data model has integers. Raises `UnwritableError`."""
    fields: list[line_protocol.Column] = []
    for name, values in block.columns.items():
        is_integer = name in INTEGER_FIELDS
        if is_integer and values.dtype.kind == "i" and name not in block.scales:
            fields.append((_field(name), values.astype("int64", copy=False), True))
        else:
            fields.append((_field(name), block.physical(name), is_integer))
    return fields


def lines(block: SampleBlock, target: Target) -> tuple[bytes, int]:
    """Line protocol of the block, precision ns, and how many lines: samples without any value have none.

    Raises `UnwritableError` for a name that line protocol cannot write.
    """
    return line_protocol.encode(prefix(target), block.times_ns, columns(block))
