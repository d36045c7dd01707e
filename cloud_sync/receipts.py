"""Receipts: what is safely stored, told back to the gateways, as merged ranges of sequences.

Pure. A receipt is only ever made of what the ledger has committed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from msgspec import UNSET, UnsetType

from cloud_sync.registry.entries import BlockKey, Ranges
from gateway.mqtt import Outbound
from gateway.wire import control, topics
from gateway.wire.messages import RANGES_MAX, CommittedRanges, Receipt, ReceiptRequest

ENTRIES_MAX = 500
"""Entries and ranges of one receipt: with the longest names it stays well below the payload limit of 1 MiB."""

ANSWER_RANGES_MAX = 4 * RANGES_MAX
"""Ranges of one answer, about 400 KB in a few messages: a ledger of alternating sequences has any number of them."""

Asked = tuple[int, int]
"""Between these sequences an answer is complete."""
Entry = tuple[BlockKey, Ranges, Asked | None]
Wanted = tuple[BlockKey, int, int]
"""Inclusive first and last sequence."""


def merged(sequences: Iterable[int]) -> Ranges:
    """Sequences as inclusive ranges, in order."""
    ranges: Ranges = []
    for sequence in sorted(set(sequences)):
        if ranges and sequence == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], sequence)
        else:
            ranges.append((sequence, sequence))
    return ranges


def receipts(committed: Iterable[tuple[str, BlockKey, int]]) -> list[Receipt]:
    """Receipts for (gateway, key, sequence) that are committed: as few as their size allows, per gateway."""
    sequences: dict[str, dict[BlockKey, list[int]]] = {}
    for gateway, key, sequence in committed:
        sequences.setdefault(gateway, {}).setdefault(key, []).append(sequence)
    return [
        receipt
        for gateway, of in sequences.items()
        for receipt in _receipts(gateway, [(key, merged(some), None) for key, some in of.items()])
    ]


def wanted(request: ReceiptRequest) -> list[Wanted]:
    """What a request asks for, each (key, first, last). Raises `MalformedError`."""
    return [(BlockKey(one.device, one.signal, one.epoch), one.first, one.last) for one in request.wanted]


def answer(gateway: str, wanted: Sequence[Wanted], committed: Sequence[Ranges]) -> list[Receipt]:
    """What of the wanted sequences is committed; an entry without ranges says that none of them is.

    Of very many ranges only the lowest are told: the others come with the receipts of the blocks when they are sent
    again, which costs nothing but their way.
    """
    entries: list[Entry] = []
    left = ANSWER_RANGES_MAX
    for (key, first, last), ranges in zip(wanted, committed, strict=True):
        told = ranges[:left]
        asked = (first, last) if len(told) == len(ranges) else (first, told[-1][1]) if told else None
        entries.append((key, told, asked))
        left -= len(told)
    return list(_receipts(gateway, entries))


def outbound(receipt: Receipt) -> Outbound:
    """The message that carries a receipt."""
    payload = control.encode(receipt)
    return Outbound(topics.receipt(receipt.gateway), payload.data, payload.content_type, {"schema": payload.schema})


def _receipts(gateway: str, entries: Sequence[Entry]) -> Iterator[Receipt]:
    content: list[CommittedRanges] = []
    ranges_left = RANGES_MAX
    for key, ranges, asked in entries:
        start = 0
        while True:
            some = ranges[start : start + ranges_left]
            content.append(CommittedRanges(key.device, key.signal, key.epoch, some, _part(asked, ranges, start, some)))
            ranges_left -= len(some)
            start += len(some)
            if len(content) == ENTRIES_MAX or ranges_left == 0:
                yield _receipt(gateway, content)
                content, ranges_left = [], RANGES_MAX
            if start >= len(ranges):
                break
    if content:
        yield _receipt(gateway, content)


def _part(asked: Asked | None, ranges: Ranges, start: int, some: Ranges) -> Asked | UnsetType:
    """Between which sequences a part of an entry's ranges is complete."""
    if asked is None:
        return UNSET
    first = ranges[start - 1][1] + 1 if start else asked[0]
    last = some[-1][1] if start + len(some) < len(ranges) else asked[1]
    return (first, last) if first <= last else UNSET


def _receipt(gateway: str, content: list[CommittedRanges]) -> Receipt:
    return Receipt(v=1, schema="receipt", gateway=gateway, committed=content)
