"""The host's UTC with its trust.

The monotonic clock never steps; UTC is monotonic time plus an offset that changes only when somebody sets the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from gateway.kernel_clock import UNKNOWN_ERROR_NS, Discipline, kernel_discipline
from gateway.samples import ClockStamp, ClockState

STEP_NS = 50_000_000
"""A change of UTC against the monotonic clock beyond this is a step, not the noise of reading both."""
OFFSET_READINGS = 3
"""Two clocks cannot be read at once; of so many tries the quickest is taken."""


class HostClock:
    """UTC of monotonic instants.

    A step forward is followed at once. A step back is not: it would make time run back within a stream, so the old
    offset is kept, and the difference counts as error. So does a change that is too small to be called a step.
    """

    def __init__(
        self,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
        utc_ns: Callable[[], int] = time.time_ns,
        discipline: Callable[[], Discipline] = kernel_discipline,
    ) -> None:
        self._monotonic_ns = monotonic_ns
        self._utc_ns = utc_ns
        self._discipline = discipline
        self._offset_ns = self._read_offset_ns()
        self.steps = 0
        """How often UTC was set forward; the brain state begins anew when it changes."""
        self.stamp = ClockStamp(ClockState.UNKNOWN, UNKNOWN_ERROR_NS)
        self.refresh()

    def refresh(self) -> None:
        """Look at the system's clocks; to be called about once a second."""
        change_ns = self._read_offset_ns() - self._offset_ns
        if change_ns > STEP_NS:
            self._offset_ns += change_ns
            self.steps += 1
            change_ns = 0
        discipline = self._discipline()
        state = ClockState.UNSYNCED if change_ns < -STEP_NS else discipline.state
        self.stamp = ClockStamp(state, discipline.error_ns + abs(change_ns))

    def utc_ns(self, monotonic_ns: int) -> int:
        """UTC in ns since 1970 of an instant of the monotonic clock."""
        return monotonic_ns + self._offset_ns

    def monotonic_ns(self, utc_ns: int) -> int:
        """The inverse of `utc_ns`."""
        return utc_ns - self._offset_ns

    def now_ns(self) -> int:
        """UTC of this instant, as blocks are stamped."""
        return self.utc_ns(self._monotonic_ns())

    def _read_offset_ns(self) -> int:
        best_width_ns, best_offset_ns = 2**63, 0
        for _ in range(OFFSET_READINGS):
            before_ns, utc_ns, after_ns = self._monotonic_ns(), self._utc_ns(), self._monotonic_ns()
            if after_ns - before_ns < best_width_ns:
                best_width_ns, best_offset_ns = after_ns - before_ns, utc_ns - (before_ns + after_ns) // 2
        return best_offset_ns
