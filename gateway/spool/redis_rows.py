"""Rows of the outbox as Redis has them: entries of a stream, members of an index; and a former format taken over."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.spool.store import DamagedRow, EpochKey, Held, Row, StoredRow
from gateway.wire.codec import Payload

FORMAT = b"2"
"""What came before it had one epoch for the whole outbox, no provisional times, and did not name its format."""
SEPARATOR = "\x1f"
"""Between device, signal and epoch in a key: no name may contain it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A row as the index has it."""

    id: int
    device: str
    signal: str
    epoch: str
    size: int
    sequence: int = 0
    samples: int = 0
    lost: int = 0
    lost_signal: str = ""

    @property
    def member(self) -> str:
        return f"{self.id}:{self.size}"


def id_of(entry: bytes) -> int:
    return int(entry.split(b"-")[0])


def entry_of(key: EpochKey, member: bytes) -> Entry:
    number, size = member.split(b":")
    return Entry(int(number), *key, int(size))


def of_held(held: Held) -> Entry:
    """A row as the index has it, with what a step that replaces it must count."""
    where = (held.id, held.device, held.signal, held.epoch, held.size)
    return Entry(*where, held.sequence, held.samples, held.lost, held.lost_signal)


def fields_of(number: int, row: Row) -> dict[Any, Any]:
    return {
        "device": row.device,
        "signal": row.signal,
        "epoch": row.epoch,
        "sequence": row.sequence,
        "first_ns": row.first_ns,
        "last_ns": row.last_ns,
        "samples": row.samples,
        "size": row.size,
        "lost": row.lost,
        "lost_signal": row.lost_signal,
        "boot": row.boot,
        "offset_ns": row.offset_ns,
        "content_type": row.payload.content_type,
        "schema": row.payload.schema,
        "checksum": row.checksum(number),
        "payload": row.payload.data,
    }


def held_of(entry: bytes, fields: Mapping[bytes, bytes]) -> Held:
    def number(name: bytes) -> int:
        digits = fields.get(name, b"")
        return int(digits) if digits.lstrip(b"-").isdigit() else 0

    def text(name: bytes) -> str:
        return fields.get(name, b"").decode(errors="replace")

    return Held(
        id=id_of(entry),
        device=text(b"device"),
        signal=text(b"signal"),
        epoch=text(b"epoch"),
        sequence=number(b"sequence"),
        first_ns=number(b"first_ns"),
        last_ns=number(b"last_ns"),
        samples=number(b"samples"),
        size=number(b"size"),
        lost=number(b"lost"),
        lost_signal=text(b"lost_signal"),
        boot=text(b"boot"),
        offset_ns=number(b"offset_ns"),
    )


def checked(entry: bytes, fields: Mapping[bytes, bytes]) -> StoredRow | DamagedRow:
    held = held_of(entry, fields)
    payload = Payload(
        fields.get(b"content_type", b"").decode(errors="replace"),
        fields.get(b"schema", b"").decode(errors="replace"),
        fields.get(b"payload", b""),
    )
    row = held.row(payload)
    intact = str(row.checksum(held.id)).encode() == fields.get(b"checksum")
    return StoredRow(held.id, row) if intact else DamagedRow(held)


def renewed(entry: bytes, fields: Mapping[bytes, bytes], number: int, epoch: str) -> dict[Any, Any]:
    """The fields of a row of the former format, as this one has them; a damaged row stays damaged."""
    held = held_of(entry, fields)
    about = (held.first_ns, held.last_ns, held.samples, held.lost, held.lost_signal)
    kinds = [fields.get(name, b"").decode(errors="replace") for name in (b"content_type", b"schema")]
    data = fields.get(b"payload", b"")
    payload = Payload(kinds[0], kinds[1], data)
    parts = (held.device, held.signal, held.sequence, *about, *kinds, "")
    row = Row(held.device, held.signal, epoch, held.sequence, *about, payload)
    checksum = zlib.crc32(data, zlib.crc32("\0".join(str(part) for part in parts).encode()))
    if str(checksum).encode() == fields.get(b"checksum"):
        return fields_of(number, row)
    return {**fields, b"epoch": epoch, b"checksum": ~row.checksum(number)}


def renewing(
    prefix: str, old: Sequence[tuple[bytes, Mapping[bytes, bytes]]], first_id: int, epoch: str
) -> Iterator[list[Any]]:
    """Commands that put rows of the former format under new ids, in this format."""
    for number, (entry, fields) in enumerate(old, start=first_id):
        held = held_of(entry, fields)
        key = (held.device, held.signal, epoch)
        yield ["XDEL", f"{prefix}blocks", entry]
        yield ["ZREM", f"{prefix}sequences:{held.device}{SEPARATOR}{held.signal}", f"{held.id}:{held.size}"]
        new = renewed(entry, fields, number, epoch)
        yield ["XADD", f"{prefix}blocks", f"{number}-1", *(word for pair in new.items() for word in pair)]
        yield ["ZADD", f"{prefix}sequences:{SEPARATOR.join(key)}", held.sequence, Entry(number, *key, held.size).member]
        yield ["SADD", f"{prefix}streams", SEPARATOR.join(key)]
