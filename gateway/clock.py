"""Time: the host's UTC with its trust, and the axis of a device's samples on it.

The monotonic clock never steps; UTC is monotonic time plus an offset that changes only when somebody sets the clock.
A device's samples lie on a line, index x period + offset, that is fitted to their arrivals from below: transport
makes arrivals late, never early. The line is followed slowly, so that stated times never go back and hardly bend.
"""

from __future__ import annotations

import ctypes
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from gateway.samples import NS_PER_S, ClockStamp, ClockState

STEP_NS = 50_000_000
"""A change of UTC against the monotonic clock beyond this is a step, not the noise of reading both."""
UNKNOWN_ERROR_NS = 16 * NS_PER_S
"""The kernel's own figure for a clock that nobody disciplines (NTP_PHASE_MAX)."""

_STA_UNSYNC = 0x0040
_TIME_ERROR = 5


class _Timex(ctypes.Structure):
    """`struct timex` of <sys/timex.h>, as far as it is read; the rest is room for the kernel."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_char * 256),
    )


@dataclass(frozen=True, slots=True)
class Discipline:
    """What the kernel says of its own clock."""

    state: ClockState
    error_ns: int


def kernel_discipline() -> Discipline:
    """Ask the kernel (adjtimex, no privilege needed) whether the clock is disciplined, and its maximal error."""
    timex = _Timex()
    outcome = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(timex))
    if outcome < 0:
        return Discipline(ClockState.UNKNOWN, UNKNOWN_ERROR_NS)
    error_ns = timex.maxerror * 1000
    if outcome == _TIME_ERROR or timex.status & _STA_UNSYNC:
        return Discipline(ClockState.UNSYNCED, max(error_ns, UNKNOWN_ERROR_NS))
    return Discipline(ClockState.SYNCED, error_ns)


class HostClock:
    """UTC of monotonic instants.

    A step forward is followed at once. A step back is not: it would make time run back within a stream, so the old
    offset is kept, and the difference counts as error.
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
        self._offset_ns = utc_ns() - monotonic_ns()
        self.steps = 0
        """How often UTC was set forward; a stream begins a new segment when it changes."""
        self.stamp = ClockStamp(ClockState.UNKNOWN, UNKNOWN_ERROR_NS)
        self.refresh()

    def refresh(self) -> None:
        """Look at the system's clocks; to be called about once a second."""
        change_ns = self._utc_ns() - self._monotonic_ns() - self._offset_ns
        behind_ns = 0
        if change_ns > STEP_NS:
            self._offset_ns += change_ns
            self.steps += 1
        elif change_ns < -STEP_NS:
            behind_ns = -change_ns
        discipline = self._discipline()
        state = ClockState.UNSYNCED if behind_ns else discipline.state
        self.stamp = ClockStamp(state, discipline.error_ns + behind_ns)

    def utc_ns(self, monotonic_ns: int) -> int:
        """UTC in ns since 1970 of an instant of the monotonic clock."""
        return monotonic_ns + self._offset_ns


@dataclass(frozen=True, slots=True)
class TimeLine:
    """Times of a run of samples: `start_ns` for sample `index`, then one every `period_ns`."""

    index: int
    start_ns: int
    period_ns: int
    error_ns: int
    """Bound of the error of these times against the host's own clock."""

    def at(self, index: int) -> int:
        """Monotonic time of a sample, ns."""
        return self.start_ns + (index - self.index) * self.period_ns


class SampleClock:
    """The time axis of a signal with a fixed nominal rate, from the arrivals of its samples.

    Lower-envelope fit: of every second the earliest arrival (against the nominal rate) is kept; the line is the edge
    of the lower convex hull of the last two minutes under their middle (Moon, Skelly & Towsley 1999, "Estimation and
    removal of clock skew from network delay measurements").
    """

    SETTLE_NS = NS_PER_S
    """Observed before the first time is stated: the earliest of a second's arrivals is late by little."""
    BINS_MAX = 120
    """Seconds of arrivals that the fit looks at."""
    SKEW_BINS_MIN = 10
    """Seconds before the rate is fitted; until then the nominal one holds."""
    FOLLOW_S = 10.0
    """An offset is taken out over this time."""
    SLEW_MAX = 5e-4
    """The stated period never differs more than this from the fitted one."""
    SKEW_MAX = 5e-3
    """A device's clock that is further off than this is not believed."""
    JUMP_NS = NS_PER_S // 4
    """An axis that is wrong by more is begun anew instead of being bent."""

    def __init__(self, rate_hz: float) -> None:
        self._nominal_ns = NS_PER_S / rate_hz
        self._bins: deque[tuple[int, float]] = deque(maxlen=self.BINS_MAX)
        """(index, earliest arrival - index x nominal period) of each second."""
        self._bin_start_index = 0
        self._first_arrival_ns: int | None = None
        self._newest_arrival_ns = 0
        self._line: TimeLine | None = None
        self._bin_samples = max(1, round(rate_hz))
        self.jumped = False
        """True after `line_from` began the axis anew."""

    @property
    def settled(self) -> bool:
        """Whether times can be stated."""
        first = self._first_arrival_ns
        return first is not None and self._newest_arrival_ns - first >= self.SETTLE_NS

    def observe(self, index: int, arrival_ns: int) -> None:
        """Sample `index` (lost ones counted) had arrived at this monotonic time."""
        late_ns = arrival_ns - index * self._nominal_ns
        if self._first_arrival_ns is None:
            self._first_arrival_ns = arrival_ns
            self._bin_start_index = index
            self._bins.append((index, late_ns))
        elif index - self._bin_start_index >= self._bin_samples:
            self._bin_start_index = index
            self._bins.append((index, late_ns))
        elif late_ns < self._bins[-1][1]:
            self._bins[-1] = (index, late_ns)
        self._newest_arrival_ns = arrival_ns

    def line_from(self, index: int) -> TimeLine:
        """Times of the samples from `index` on; continuous with the line before. To be asked once a block."""
        offset_ns, skew_ns = self._fit()
        target_ns = index * (self._nominal_ns + skew_ns) + offset_ns
        period_ns = self._nominal_ns + skew_ns
        error_ns = self._spread(offset_ns, skew_ns)
        self.jumped = False
        if self._line is None:
            start_ns = round(target_ns)
        else:
            start_ns = self._line.at(index)
            behind_ns = target_ns - start_ns
            if abs(behind_ns) > self.JUMP_NS:
                self.jumped = True
                start_ns = max(round(target_ns), start_ns)
                behind_ns = target_ns - start_ns
            slew = behind_ns / (self.FOLLOW_S * NS_PER_S)
            period_ns *= 1 + min(max(slew, -self.SLEW_MAX), self.SLEW_MAX)
            error_ns += abs(behind_ns)
        self._line = TimeLine(index, start_ns, max(1, round(period_ns)), round(error_ns))
        return self._line

    def _fit(self) -> tuple[float, float]:
        """Offset (ns) and period above the nominal one (ns) of the line below all arrivals."""
        points = list(self._bins)
        if len(points) < self.SKEW_BINS_MIN:
            return min(late for _, late in points), 0.0
        hull = _lower_hull(points)
        middle = (points[0][0] + points[-1][0]) / 2
        for (x0, y0), (x1, y1) in pairwise(hull):
            if x0 <= middle <= x1:
                skew_ns = (y1 - y0) / (x1 - x0)
                if abs(skew_ns) <= self.SKEW_MAX * self._nominal_ns:
                    return y0 - skew_ns * x0, skew_ns
        return min(late for _, late in points), 0.0

    def _spread(self, offset_ns: float, skew_ns: float) -> float:
        """How far the earliest arrivals of the seconds lie above the line at most, ns."""
        return max(late - (offset_ns + skew_ns * index) for index, late in self._bins)


def _lower_hull(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Lower convex hull of points in order of x (Andrew's monotone chain)."""
    hull: list[tuple[int, float]] = []
    for x, y in points:
        while len(hull) >= 2:
            (x0, y0), (x1, y1) = hull[-2], hull[-1]
            if (x1 - x0) * (y - y0) - (y1 - y0) * (x - x0) > 0:
                break
            hull.pop()
        hull.append((x, y))
    return hull
