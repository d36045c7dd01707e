"""The time axis of a device's samples on the host's monotonic clock.

A device's samples lie on a line, index x period + offset, that is fitted to their arrivals from below: transport
makes arrivals late, never early. The line is followed slowly, so that stated times never go back and hardly bend.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from gateway.samples import NS_PER_S


@dataclass(frozen=True, slots=True)
class TimeLine:
    """Times of a run of samples: `start_ns` for sample `index`, then one every `period_ns`."""

    index: int
    start_ns: int
    period_ns: int
    error_ns: int
    """Bound of the error of these times against the host's own clock, the shortest transport delay apart:
    what every arrival is late by cannot be seen in arrivals."""

    def at(self, index: int) -> int:
        """Monotonic time of a sample, ns."""
        return self.start_ns + (index - self.index) * self.period_ns


class SampleClock:
    """The time axis of a signal with a fixed nominal rate, from the arrivals of its samples.

    Lower-envelope fit: of every second the earliest arrival (against the nominal rate) is kept; the line is the edge
    of the lower convex hull of the last minutes under a point in their newer half (after Moon, Skelly & Towsley 1999,
    "Estimation and removal of clock skew from network delay measurements", who take the middle).
    Times never go back; they are bent slowly, and leap only where the axis is wrong by more than `JUMP_NS`.
    """

    SETTLE_NS = NS_PER_S
    """Observed before the first time is stated: the earliest of a second's arrivals is late by little."""
    BINS_MAX = 240
    """Seconds of arrivals that the fit looks at: a rate good to 2 ppm under 60 ms of jitter."""
    EDGE_AT = 2 / 3
    """Of the way from the oldest to the newest of them. Later ones follow a crystal that warms up (measured: 60 ppm
    in the first minute), earlier ones see less jitter."""
    SKEW_BINS_MIN = 10
    """Seconds before the rate is fitted; until then the nominal one holds, or that from before a jump."""
    FOLLOW_S = 5.0
    """An offset is taken out over this time."""
    SLEW_MAX = 5e-3
    """The stated period never differs more than this from the fitted one: a Cyton 0.26 % off its nominal rate has
    been measured, and must be followed before its rate is known."""
    TRUST_BINS_MIN = 20
    """Seconds before the bound relies on the fit; until then it holds all jitter that was seen."""
    SKEW_MAX = 5e-3
    """A device's clock that is further off than this is not believed."""
    JUMP_NS = NS_PER_S // 4
    """An axis that is wrong by more is begun anew instead of being bent."""
    JUMP_BINS = 10
    """Arrivals are late for many reasons; late for so many seconds on end, it is the axis."""
    DOUBT_BINS = 3
    """From so many late seconds on the bound counts them, whichever it is."""
    SPREAD_QUANTILE = 0.9
    """Of the seconds' earliest arrivals, how many the bound covers: one stalled second says nothing of the axis."""

    def __init__(self, rate_hz: float, after_ns: int | None = None) -> None:
        """`after_ns`: monotonic time that the first sample must lie behind."""
        self._nominal_ns = NS_PER_S / rate_hz
        self._after_ns = after_ns
        self._bins: deque[tuple[int, float]] = deque(maxlen=self.BINS_MAX)
        """(index, earliest arrival - index x nominal period) of each second."""
        self._bin_start_index = 0
        self._first_arrival_ns: int | None = None
        self._newest_arrival_ns = 0
        self._jitter_ns = 0.0
        """How much later than the earliest of its second an arrival was at most."""
        self._skew_ns = 0.0
        self._offset_ns: float | None = None
        """Of the line as last fitted."""
        self._line: TimeLine | None = None
        self._bin_samples = max(1, round(rate_hz))
        self.jumped = False
        """True after `line_from` began the axis anew."""

    @property
    def observed(self) -> bool:
        """Whether there is any arrival to go by."""
        return self._first_arrival_ns is not None

    @property
    def settled(self) -> bool:
        """Whether times can be stated."""
        first = self._first_arrival_ns
        return first is not None and self._newest_arrival_ns - first >= self.SETTLE_NS

    @property
    def rate_hz(self) -> float:
        """The device's rate by the host's clock, as last fitted."""
        return NS_PER_S / (self._nominal_ns + self._skew_ns)

    def observe(self, index: int, arrival_ns: int) -> None:
        """Sample `index` (lost ones counted) had arrived at this monotonic time."""
        late_ns = arrival_ns - index * self._nominal_ns
        if self._first_arrival_ns is None:
            self._first_arrival_ns = arrival_ns
        if self._offset_ns is not None and self._above(self._offset_ns)((index, late_ns)) < -self.JUMP_NS:
            # Nothing arrives before it was sampled: what was seen so far belongs to another axis.
            self._bins.clear()
            self._offset_ns = None
        if not self._bins or index - self._bin_start_index >= self._bin_samples:
            self._bin_start_index = index
            self._bins.append((index, late_ns))
        elif late_ns < self._bins[-1][1]:
            self._bins[-1] = (index, late_ns)
        else:
            self._jitter_ns = max(self._jitter_ns, late_ns - self._bins[-1][1])
        self._newest_arrival_ns = arrival_ns

    def line_from(self, index: int, stated_through: int | None = None) -> TimeLine:
        """Times of the samples from `index` on; continuous with the line before. To be asked once a block.

        `stated_through`: the newest sample that got a time, where those between it and `index` are lost.
        """
        offset_ns = self._fit()
        period_ns = self._nominal_ns + self._skew_ns
        target_ns = round(index * period_ns + offset_ns)
        error_ns = self._spread(offset_ns)
        self.jumped = False
        if self._line is None:
            start_ns = target_ns if self._after_ns is None else max(target_ns, self._after_ns + round(period_ns))
        else:
            start_ns = self._line.at(index)
            if abs(target_ns - start_ns) > self.JUMP_NS:
                earliest_ns = self._line.at(index if stated_through is None else stated_through + 1)
                self.jumped = max(target_ns, earliest_ns) != start_ns
                start_ns = max(target_ns, earliest_ns)
        behind_ns = target_ns - start_ns
        slew = behind_ns / (self.FOLLOW_S * NS_PER_S)
        period_ns *= 1 + min(max(slew, -self.SLEW_MAX), self.SLEW_MAX)
        self._line = TimeLine(index, start_ns, max(1, round(period_ns)), round(error_ns + abs(behind_ns)))
        return self._line

    def _fit(self) -> float:
        """Fit the line below all arrivals; gives its offset, ns. After a jump only what came later counts."""
        offset_ns = self._envelope()
        newest = list(self._bins)[-self.JUMP_BINS :]
        if len(newest) == self.JUMP_BINS and min(map(self._above(offset_ns), newest)) > self.JUMP_NS:
            self._bins.clear()
            self._bins.extend(newest)
            offset_ns = self._envelope()
        self._offset_ns = offset_ns
        return offset_ns

    def _envelope(self) -> float:
        points = list(self._bins)
        if len(points) >= self.SKEW_BINS_MIN:
            at = points[0][0] + self.EDGE_AT * (points[-1][0] - points[0][0])
            for (x0, y0), (x1, y1) in pairwise(_lower_hull(points)):
                skew_ns = (y1 - y0) / (x1 - x0)
                if x0 <= at <= x1 and abs(skew_ns) <= self.SKEW_MAX * self._nominal_ns:
                    self._skew_ns = skew_ns
                    return y0 - skew_ns * x0
        return min(map(self._above(0.0), points))

    def _above(self, offset_ns: float) -> Callable[[tuple[int, float]], float]:
        """How far an arrival lies above the line with this offset, ns."""
        return lambda point: point[1] - self._skew_ns * point[0] - offset_ns

    def _spread(self, offset_ns: float) -> float:
        """How far the truth may be from the line, as far as the earliest arrivals of the seconds tell, ns."""
        above = [*map(self._above(offset_ns), self._bins)]
        doubt_ns = min(above[-self.DOUBT_BINS :]) if len(above) >= self.DOUBT_BINS else 0.0
        spread_ns = sorted(above)[int(self.SPREAD_QUANTILE * (len(above) - 1))]
        if len(above) < self.TRUST_BINS_MIN:
            # The rate may be off, too: what that does over more than a second shows in the arrivals.
            return max(above) + self._jitter_ns + self.SKEW_MAX * self.SETTLE_NS
        return max(spread_ns, doubt_ns)


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
