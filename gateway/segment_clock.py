"""The time that a device's blocks are made with: the host's, but never back within one run of the device."""

from __future__ import annotations

from typing import Protocol

from gateway.clock import HostClock
from gateway.samples import NS_PER_S, ClockStamp, ClockState

LEAD_NS_MIN = 2 * NS_PER_S
"""What a segment lies ahead of the time, to be called so: less is the jitter of the segment before."""


class UtcClock(Protocol):
    """What blocks are made with."""

    @property
    def stamp(self) -> ClockStamp:
        """The trust that times deserve which are stated now."""

    @property
    def shift_ns(self) -> int:
        """By how much all times were put right that were held back, so far. What is kept of them moves along."""

    def utc_ns(self, monotonic_ns: int) -> int:
        """UTC in ns since 1970 of an instant of the monotonic clock."""

    def monotonic_ns(self, utc_ns: int) -> int:
        """The inverse of `utc_ns`."""

    def now_ns(self) -> int:
        """UTC of this instant, as blocks are stamped."""


class SegmentClock:
    """The time of one uninterrupted run of a device, in which it never goes back.

    Where the run before stated times that are still to come, or the host's clock is set back in the midst of it, the
    run keeps that lead to its end: its samples stay evenly apart, and the lead counts as error.
    """

    def __init__(self, host: HostClock, newest_ns: int | None = None) -> None:
        """`newest_ns`: newest UTC of the runs before, of all signals."""
        self._host = host
        self._setback_before_ns = host.setback_ns
        lead_ns = 0 if newest_ns is None else newest_ns - host.now_ns()
        self._lead_ns = lead_ns if lead_ns > LEAD_NS_MIN else 0

    @property
    def lead_ns(self) -> int:
        """How far its times lie ahead of the host's."""
        return self._lead_ns + self._host.setback_ns - self._setback_before_ns

    @property
    def stamp(self) -> ClockStamp:
        """See `UtcClock`."""
        if not self.lead_ns:
            return self._host.stamp
        return ClockStamp(ClockState.UNSYNCED, self._host.stamp.error_ns + self.lead_ns)

    @property
    def shift_ns(self) -> int:
        """See `UtcClock`."""
        return self._host.shift_ns

    def utc_ns(self, monotonic_ns: int) -> int:
        """See `UtcClock`."""
        return self._host.utc_ns(monotonic_ns) + self.lead_ns

    def monotonic_ns(self, utc_ns: int) -> int:
        """See `UtcClock`."""
        return self._host.monotonic_ns(utc_ns - self.lead_ns)

    def now_ns(self) -> int:
        """See `UtcClock`."""
        return self._host.now_ns() + self.lead_ns
