"""Receipts: what is safely stored, told back to the gateways, as merged ranges of sequences.

Pure. A receipt is only ever made of what the ledger has committed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import itemgetter

from cloud_sync.registry.entries import BlockKey, Ranges
from gateway.mqtt import Outbound
from gateway.wire import control, topics
from gateway.wire.messages import RANGES_MAX, CommittedRanges, Receipt, ReceiptRequest

ENTRIES_MAX = 500
"""Entries and ranges of one receipt: with the longest names it stays well below the payload limit of 1 MiB."""

Entry = tuple[BlockKey, Ranges]


def merged(sequences: Iterable[int]) -> Ranges:
    """Sequences as inclusive ranges, in order."""
    ranges: Ranges = []
    for sequence in sorted(set(sequences)):
        if ranges and sequence == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], sequence)
        else:
            ranges.append((sequence, sequence))
    return ranges


def holds(ranges: Sequence[tuple[int, int]], sequence: int) -> bool:
    """Whether a sequence is in ranges that are in order."""
    after = bisect_right(ranges, sequence, key=itemgetter(0))
    return after > 0 and ranges[after - 1][1] >= sequence


def receipts(committed: Iterable[tuple[str, BlockKey, int]]) -> list[Receipt]:
    """Receipts for (gateway, key, sequence) that are committed: as few as their size allows, per gateway."""
    sequences: dict[str, dict[BlockKey, list[int]]] = {}
    for gateway, key, sequence in committed:
        sequences.setdefault(gateway, {}).setdefault(key, []).append(sequence)
    return [
        receipt
        for gateway, of in sequences.items()
        for receipt in _receipts(gateway, [(key, merged(some)) for key, some in of.items()])
    ]


def keys_wanted(request: ReceiptRequest) -> set[BlockKey]:
    """What must be known to answer a request. Raises `MalformedError`."""
    return {BlockKey(wanted.device, wanted.signal, wanted.epoch) for wanted in request.wanted}


def answer(request: ReceiptRequest, committed: Mapping[BlockKey, Ranges]) -> list[Receipt]:
    """What of the wanted sequences is committed; an entry without ranges says that none of them is."""
    entries: list[Entry] = []
    for wanted in request.wanted:
        key = BlockKey(wanted.device, wanted.signal, wanted.epoch)
        ranges = [
            (max(first, wanted.first), min(last, wanted.last))
            for first, last in committed.get(key, ())
            if first <= wanted.last and last >= wanted.first
        ]
        entries.append((key, ranges))
    return list(_receipts(request.gateway, entries))


def outbound(receipt: Receipt) -> Outbound:
    """The message that carries a receipt."""
    payload = control.encode(receipt)
    return Outbound(topics.receipt(receipt.gateway), payload.data, payload.content_type, {"schema": payload.schema})


def _receipts(gateway: str, entries: Sequence[Entry]) -> Iterator[Receipt]:
    content: list[CommittedRanges] = []
    ranges_left = RANGES_MAX
    for key, ranges in entries:
        start = 0
        while True:
            some = ranges[start : start + ranges_left]
            content.append(CommittedRanges(key.device, key.signal, key.epoch, some))
            ranges_left -= len(some)
            start += len(some)
            if len(content) == ENTRIES_MAX or ranges_left == 0:
                yield _receipt(gateway, content)
                content, ranges_left = [], RANGES_MAX
            if start >= len(ranges):
                break
    if content:
        yield _receipt(gateway, content)


def _receipt(gateway: str, content: list[CommittedRanges]) -> Receipt:
    return Receipt(v=1, schema="receipt", gateway=gateway, committed=content)
