"""Ranges of sequences: merged, answered from the ledger, and cut into messages of bounded size."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_sync import receipts
from cloud_sync.registry.entries import BlockKey
from gateway.wire import control
from gateway.wire.messages import RANGES_MAX, Receipt, ReceiptRequest, WantedRange

KEY = BlockKey("d", "eeg", "e")
Sequences = st.sets(st.integers(0, 40))


@given(Sequences)
def test_merged_ranges_hold_exactly_the_sequences(sequences: set[int]) -> None:
    ranges = receipts.merged(sequences)
    assert {n for first, last in ranges for n in range(first, last + 1)} == sequences
    assert all(before[1] + 1 < after[0] for before, after in itertools.pairwise(ranges))
    assert {n for n in range(50) if receipts.holds(ranges, n)} == sequences


@given(Sequences, st.integers(0, 40), st.integers(0, 40))
def test_an_answer_is_what_of_the_wanted_is_committed(sequences: set[int], one: int, other: int) -> None:
    first, last = sorted((one, other))
    request = ReceiptRequest(
        v=1, schema="receipt_request", gateway="g", wanted=[WantedRange("d", "eeg", "e", first, last)]
    )
    (receipt,) = receipts.answer(request, {KEY: receipts.merged(sequences)})
    (entry,) = receipt.committed
    told = {n for low, high in entry.ranges for n in range(low, high + 1)}
    assert told == {n for n in sequences if first <= n <= last}


def test_each_gateway_gets_its_own() -> None:
    other = BlockKey("d2", "eeg", "e")
    found = receipts.receipts([("g1", KEY, 3), ("g2", other, 1), ("g1", KEY, 1), ("g1", KEY, 2), ("g1", other, 9)])
    assert [(one.gateway, [(entry.device, entry.ranges) for entry in one.committed]) for one in found] == [
        ("g1", [("d", [(1, 3)]), ("d2", [(9, 9)])]),
        ("g2", [("d2", [(1, 1)])]),
    ]


@pytest.mark.parametrize(("keys", "holes"), [(1, 10_000), (1200, 1), (3, 3000), (600, 20)])
def test_large_receipts_are_cut_and_nothing_is_left_out(keys: int, holes: int) -> None:
    longest = "x" * 80
    ledger = {
        BlockKey(longest, f"s{k}", longest): [(2**60 + 2 * n, 2**60 + 2 * n) for n in range(holes)] for k in range(keys)
    }
    wanted = [WantedRange(one.device, one.signal, one.epoch, 0, 2**62) for one in ledger]
    told: dict[str, list[tuple[int, int]]] = {}
    for start in range(0, keys, 1000):
        request = ReceiptRequest(v=1, schema="receipt_request", gateway="g", wanted=wanted[start : start + 1000])
        for receipt in receipts.answer(request, ledger):
            message = receipts.outbound(receipt)
            assert len(message.payload) < 500_000
            decoded = control.decode(message.payload, Receipt)
            assert len(decoded.committed) <= receipts.ENTRIES_MAX
            assert sum(len(entry.ranges) for entry in decoded.committed) <= RANGES_MAX
            for entry in decoded.committed:
                told.setdefault(entry.signal, []).extend(entry.ranges)
    assert told == {key.signal: ranges for key, ranges in ledger.items()}
