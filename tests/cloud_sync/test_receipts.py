"""Ranges of sequences: merged, answered from the ledger, and cut into messages of bounded size."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

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


def told(found: list[Receipt]) -> list[tuple[str, list[tuple[int, int]]]]:
    """Every entry of receipts as they arrive: signal and ranges."""
    return [
        (entry.signal, entry.ranges)
        for receipt in found
        for entry in control.decode(receipts.outbound(receipt).payload, Receipt).committed
    ]


def test_an_answer_has_an_entry_for_everything_asked() -> None:
    wanted = [WantedRange("d", "eeg", "e", 0, 9), WantedRange("d", "ppg", "e", 0, 9)]
    request = ReceiptRequest(v=1, schema="receipt_request", gateway="g", wanted=wanted)
    asked = receipts.wanted(request)
    assert asked == [(KEY, 0, 9), (BlockKey("d", "ppg", "e"), 0, 9)]
    assert told(receipts.answer("g", asked, [[(1, 2), (4, 4)], []])) == [("eeg", [(1, 2), (4, 4)]), ("ppg", [])]


def test_of_very_many_ranges_an_answer_tells_the_lowest() -> None:
    wanted = [(KEY, 0, 2**62), (BlockKey("d", "ppg", "e"), 0, 2**62)]
    ranges = [(2 * n, 2 * n) for n in range(100_000)]
    found = receipts.answer("g", wanted, [ranges, ranges])
    assert sum(len(receipts.outbound(receipt).payload) for receipt in found) < 500_000
    pieces = told(found)
    assert [pair for signal, some in pieces if signal == "eeg" for pair in some] == ranges[: receipts.ANSWER_RANGES_MAX]
    assert pieces[-1] == ("ppg", [])


def test_an_answer_says_between_which_sequences_it_is_complete() -> None:
    many = [(2 * n, 2 * n) for n in range(RANGES_MAX + 2)]
    wanted = [(KEY, 0, 10**6), (BlockKey("d", "ppg", "e"), 3, 9)]
    found = [entry for receipt in receipts.answer("g", wanted, [many, []]) for entry in receipt.committed]
    split = 2 * (RANGES_MAX - 1)
    assert [(entry.signal, entry.asked) for entry in found] == [
        ("eeg", (0, split)),
        ("eeg", (split + 1, 10**6)),
        ("ppg", (3, 9)),
    ]
    beyond = [(2 * n, 2 * n) for n in range(receipts.ANSWER_RANGES_MAX + 1)]
    cut = [entry for receipt in receipts.answer("g", wanted, [beyond, [(4, 4)]]) for entry in receipt.committed]
    assert cut[-1].asked is UNSET, "what is left out is not told to be missing"
    assert max(entry.asked[1] for entry in cut if entry.asked is not UNSET) == beyond[-2][1]
    (told,) = receipts.receipts([("g", KEY, 3)])
    assert told.committed[0].asked is UNSET


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
    committed = [(2**60 + 2 * n, 2**60 + 2 * n) for n in range(holes)]
    asked = [(BlockKey(longest, f"s{k}", longest), 0, 2**62) for k in range(keys)]
    told: dict[str, list[tuple[int, int]]] = {}
    for receipt in receipts.answer("g", asked, [committed] * keys):
        message = receipts.outbound(receipt)
        assert len(message.payload) < 500_000
        decoded = control.decode(message.payload, Receipt)
        assert len(decoded.committed) <= receipts.ENTRIES_MAX
        assert sum(len(entry.ranges) for entry in decoded.committed) <= RANGES_MAX
        for entry in decoded.committed:
            told.setdefault(entry.signal, []).extend(entry.ranges)
    assert told == {key.signal: committed for key, _, _ in asked}
