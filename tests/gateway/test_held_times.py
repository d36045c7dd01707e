"""Boots that nobody told the time: where their blocks go, and how far that may be wrong."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.anchor import Source
from gateway.clock import WIDEST_ERROR_NS
from gateway.clock_memory import BootTime
from gateway.held_times import UNWRITTEN_NS, estimates
from gateway.samples import NS_PER_S

HOUR_NS = 3_600 * NS_PER_S
NOON_NS = 1_714_564_800 * NS_PER_S


def dark(name: str, *, after_ns: int, stated_ns: int, seen_ns: int) -> BootTime:
    return BootTime(boot=name, after_ns=after_ns, stated_ns=stated_ns, seen_at_ns=seen_ns)


def known(name: str, offset_ns: int, *, seen_ns: int = HOUR_NS, error_ns: int = 0) -> BootTime:
    return BootTime(
        boot=name,
        after_ns=0,
        stated_ns=offset_ns,
        seen_at_ns=seen_ns,
        offset_ns=offset_ns,
        error_ns=error_ns,
        known_at_ns=0,
        source=Source.NTP,
    )


@given(
    gaps=st.lists(st.integers(2 * UNWRITTEN_NS, 100 * HOUR_NS), min_size=4, max_size=4),
    spans=st.lists(st.integers(NS_PER_S, 50 * HOUR_NS), min_size=2, max_size=2),
    unwritten=st.lists(st.integers(0, UNWRITTEN_NS), min_size=2, max_size=2),
    stated=st.lists(st.integers(-(2**61), 2**62), min_size=2, max_size=2),
)
def test_the_truth_lies_in_the_bound_and_boots_stay_in_order(
    gaps: list[int], spans: list[int], unwritten: list[int], stated: list[int]
) -> None:
    """Synced until noon, then two boots in the dark, one after the other, then a known one."""
    passed_ns = NOON_NS
    begun = [passed_ns + gaps[0]]
    begun.append(begun[0] + spans[0] + unwritten[0] + gaps[1])
    last = known("last", begun[1] + spans[1] + unwritten[1] + gaps[2])
    boots = [dark(f"dark-{k}", after_ns=passed_ns, stated_ns=stated[k], seen_ns=spans[k]) for k in (0, 1)]
    found = estimates([*boots, last])
    for boot, true_ns in zip(boots, begun, strict=True):
        assert abs(found[boot.boot].offset_ns - true_ns) <= found[boot.boot].error_ns
        assert found[boot.boot].offset_ns >= passed_ns
    first, second = (found[boot.boot].offset_ns for boot in boots)
    assert first + spans[0] <= second, "in order"


def test_its_own_clock_counts_where_it_can_be_right() -> None:
    stated_ns = NOON_NS + 5 * HOUR_NS
    boot = dark("dark", after_ns=NOON_NS, stated_ns=stated_ns, seen_ns=HOUR_NS)
    found = estimates([boot, known("last", NOON_NS + 10 * HOUR_NS)])["dark"]
    assert found.offset_ns == stated_ns
    assert found.error_ns == 5 * HOUR_NS


def test_a_clock_that_was_ahead_is_brought_before_the_next_boot() -> None:
    boot = dark("dark", after_ns=NOON_NS, stated_ns=NOON_NS + 99 * HOUR_NS, seen_ns=HOUR_NS)
    found = estimates([boot, known("last", NOON_NS + 10 * HOUR_NS)])["dark"]
    assert found.offset_ns == NOON_NS + 9 * HOUR_NS - UNWRITTEN_NS


def test_with_nothing_known_behind_it_the_bound_is_the_widest() -> None:
    boots = [
        dark("dark", after_ns=NOON_NS, stated_ns=NOON_NS + HOUR_NS, seen_ns=HOUR_NS),
        dark("now", after_ns=NOON_NS, stated_ns=NOON_NS + HOUR_NS, seen_ns=HOUR_NS),
    ]
    found = estimates(boots)["dark"]
    assert (found.offset_ns, found.error_ns) == (NOON_NS + HOUR_NS, WIDEST_ERROR_NS)
