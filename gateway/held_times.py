"""Which time a block gets that was accepted before the time was known. Pure: what is known goes in, rows come out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gateway.anchor import Anchor
from gateway.clock import SYNCED_ERROR_NS_MAX, WIDEST_ERROR_NS
from gateway.clock_memory import BootTime
from gateway.samples import NS_PER_S, ClockStamp, ClockState
from gateway.spool.stamping import stamped
from gateway.spool.store import Row

REMEMBER_S = 300
"""How often it is written down what is known."""
UNWRITTEN_NS = REMEMBER_S * NS_PER_S
"""So much later a boot may have ended than was written down: an estimate keeps clear of its neighbours by that."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """The offset of a boot that nobody told the time, as far as it can be told from what came before and after."""

    offset_ns: int
    error_ns: int


@dataclass(frozen=True, slots=True)
class HeldTimes:
    """Makes rows with final times. `boots`: all that is remembered, this boot last."""

    gateway: str
    boots: Sequence[BootTime]
    now: ClockStamp
    """The trust in the clock of this boot, for blocks that go out though nobody told the time."""
    right_ns: int | None = None
    """This boot's offset for blocks that were held back with one that is not remembered."""

    def __call__(self, row: Row) -> Row:
        """The row with final times. Raises `WireError` on a damaged payload."""
        known = next((boot for boot in self.boots if boot.boot == row.boot), None)
        is_this_boot = known is not None and known is self.boots[-1]
        if known is None:
            return stamped(self.gateway, row, 0, ClockStamp(ClockState.UNSYNCED, WIDEST_ERROR_NS))
        anchor = known.anchor
        if is_this_boot and (anchor is None or self.now.state is not ClockState.SYNCED):
            right_ns = dict(known.put_right).get(row.offset_ns, row.offset_ns)
            return stamped(
                self.gateway, row, right_ns - row.offset_ns, ClockStamp(ClockState.UNSYNCED, self.now.error_ns)
            )
        if anchor is not None:
            fallback_ns = self.right_ns if is_this_boot and self.right_ns is not None else anchor.offset_ns
            right_ns = dict(known.put_right).get(row.offset_ns, fallback_ns)
            trust = _trust(anchor, right_ns, row)
            return stamped(self.gateway, row, right_ns - row.offset_ns, trust)
        found = estimates(self.boots)[row.boot]
        shift_ns = found.offset_ns - row.offset_ns
        return stamped(self.gateway, row, shift_ns, ClockStamp(ClockState.UNSYNCED, found.error_ns))


def _trust(anchor: Anchor, right_ns: int, row: Row) -> ClockStamp:
    """What the host's clock deserves at the times of a row, which are those of `right_ns`."""
    drifted_ns = max(anchor.error_at(time_ns - row.offset_ns) for time_ns in (row.first_ns, row.last_ns))
    error_ns = drifted_ns + abs(right_ns - anchor.offset_ns)
    state = ClockState.SYNCED if error_ns <= SYNCED_ERROR_NS_MAX else ClockState.UNSYNCED
    return ClockStamp(state, error_ns)


def estimates(boots: Sequence[BootTime]) -> Mapping[str, Estimate]:
    """Offsets of the boots before the last that nobody told the time.

    Such a boot began after the UTC that had passed by then and after the boot before it, and ended before the next one
    began whose time is known. Within that it is where its own clock was; the bound reaches to both ends.
    """
    found: dict[str, Estimate] = {}
    ended_low_ns = ended_ns = 0
    """End of the boot before: at the earliest, and as it was estimated."""
    for place, boot in enumerate(boots[:-1]):
        if boot.anchor is not None:
            ended_low_ns = ended_ns = boot.anchor.offset_ns + boot.seen_at_ns
            continue
        low_ns = max(boot.after_ns, ended_low_ns)
        high_ns, kept_clear_ns = _latest(boots[place:])
        earliest_ns = max(low_ns, ended_ns) + UNWRITTEN_NS
        offset_ns = max(boot.stated_ns, earliest_ns)
        error_ns = WIDEST_ERROR_NS
        if high_ns is not None:
            offset_ns = min(offset_ns, max(low_ns, ended_ns, high_ns - kept_clear_ns))
            error_ns = min(error_ns, max(abs(offset_ns - low_ns), abs(high_ns - offset_ns)))
        found[boot.boot] = Estimate(offset_ns, error_ns)
        ended_low_ns, ended_ns = low_ns + boot.seen_at_ns, offset_ns + boot.seen_at_ns
    return found


def _latest(boots: Sequence[BootTime]) -> tuple[int | None, int]:
    """When the first of these began at the latest, if one of the others is known; and what to keep clear of that."""
    spans_ns = kept_clear_ns = 0
    for boot in boots:
        if boot.anchor is not None:
            return boot.anchor.offset_ns + boot.anchor.error_at(0) - spans_ns, kept_clear_ns
        spans_ns += boot.seen_at_ns
        kept_clear_ns += UNWRITTEN_NS
    return None, 0
