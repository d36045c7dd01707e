"""From samples of EEG to blocks of brain states, on a grid of 200 ms.

Pure but for the clock that it is given.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray

from gateway.devices.base import SignalSpec
from gateway.sample_clock import TimeLine
from gateway.samples import (
    BRAIN_STATE,
    BRAIN_STATE_FIELDS,
    BRAIN_STATE_PERIOD_NS,
    NS_PER_S,
    ClockStamp,
    Column,
    LossCause,
    LossRecord,
    SampleBlock,
)
from gateway.segment_clock import UtcClock
from gateway.signal.bands import DEFAULT_SETTINGS, SEGMENT_S, FeatureSettings, samples_in
from gateway.signal.bridging import Bridged, GapBridge
from gateway.signal.features import FeatureEngine, Features

Emit = Callable[[SampleBlock | LossRecord], None]

GAP_S_MAX = SEGMENT_S
"""After a longer gap of all electrodes everything begins anew: no segment reaches across it, and what the averages hold
is by then older than what they are meant to show."""


@dataclass(frozen=True, slots=True)
class _GridPoint:
    """A state that waits for samples which are not decided yet."""

    due_ns: int
    before: int
    """Number of the first sample that is too late for it."""
    error_ns: int


class StateAssembler:
    """The brain state on the grid of whole 200 ms of UTC.

    A step is taken when the newest sample before a grid point, less the features' latency, has come: so the times
    are exactly 200 ms apart for as long as the stream lasts, whatever the device's rate and drift, and the window
    is true to within a sample. Where held times are put right, the whole grid moves with them: it keeps its phase.
    All times in here are UTC less `shift_ns`.

    Short gaps are bridged (`gateway.signal.bridging`). A longer one, up to `GAP_S_MAX`, costs the states whose newest
    second is not whole in any electrode; the averages of the spectra wait for the next that is, and go on. So do the
    electrodes that are whole while others are not: an electrode that a gap takes out of a state begins anew.
    """

    def __init__(
        self,
        device: str,
        segment: int,
        spec: SignalSpec,
        host: UtcClock,
        emit: Emit,
        on_state: Callable[[Features], None],
        after_ns: int | None = None,
        *,
        records_losses: bool = False,
        settings: FeatureSettings = DEFAULT_SETTINGS,
    ) -> None:
        """`records_losses`: say which grid points have no state because samples were lost on the radio.

        For a device whose raw samples are not sent: else their own loss record says it.
        """
        assert spec.rate_hz is not None
        self._device = device
        self._segment = segment
        self._spec = spec
        self._host = host
        self._emit = emit
        self._on_state = on_state
        self._engine = FeatureEngine(spec.rate_hz, len(spec.channels), settings)
        self._bridge = GapBridge(spec.rate_hz, len(spec.channels))
        self._second = samples_in(SEGMENT_S, spec.rate_hz)
        self._gap_max = samples_in(GAP_S_MAX, spec.rate_hz)
        self._gap = 0
        """Samples of all electrodes that did not come since the last that did."""
        self._placed = 0
        """Samples that have their place on the grid."""
        self._fed = 0
        """Of these, those that the engine has."""
        self._waiting: deque[_GridPoint] = deque()
        self._lost_through: NDArray[np.int64] = np.full(len(spec.channels), -self._second)
        """Of each electrode, the number of samples up to and including the newest one that is lost."""
        self._latency_ns = round(self._engine.latency_s * NS_PER_S)
        self._due_ns: int | None = None
        """Grid point of the state after those that wait."""
        self._phase_ns: int | None = None
        """A grid point: of whole 200 ms of UTC, as they were when the segment began."""
        self._after_ns = None if after_ns is None else after_ns - host.shift_ns
        """Grid point that a state already has."""
        self._records_losses = records_losses
        self._given = False
        """There was a state in this segment."""
        self._lost_from_ns: int | None = None
        """First of the grid points in a row that have no state because of a loss."""
        self._times: list[int] = []
        self._rows: list[tuple[float, ...]] = []
        self._error_ns = 0
        """Bound of the axis' own error, of all rows."""

    def push(
        self,
        index: int,
        uv: NDArray[np.float64],
        bad: NDArray[np.bool_],
        line: TimeLine,
        absent: NDArray[np.bool_] | None = None,
    ) -> None:
        """Take the next samples, (n, channels) in uV and whether unusable, from `index` on this line.

        `absent`: bool (n, channels), those of them that did not come; None: all did.
        """
        self._gap = 0
        start_ns = self._host.utc_ns(line.at(index)) - self._host.shift_ns
        if self._due_ns is None:
            self._due_ns = self._first_due_ns(start_ns)
        self._place(start_ns, len(uv), line)
        self._feed(self._bridge.push(uv, bad, absent))

    def miss(self, index: int, count: int, line: TimeLine) -> None:
        """So many samples of all electrodes did not come, from `index` on this line."""
        self._gap += count
        if self._gap > self._gap_max:
            self.interrupt(lost=True)
        elif self._due_ns is not None:
            self._place(self._host.utc_ns(line.at(index)) - self._host.shift_ns, count, line)
            self._feed(self._bridge.miss(count))

    def interrupt(self, *, lost: bool = False) -> None:
        """The stream is broken here, `lost`: by samples that did not come. Nothing is joined across."""
        self._feed(self._bridge.give_up())
        self.flush()
        if lost:
            self._lost_through[:] = self._fed
            if self._due_ns is not None:
                self._note_loss(self._due_ns)
        self._bridge.reset()
        self._engine.reset()
        self._due_ns = None

    def finish(self) -> None:
        """The connection is over, or the grid is another one from here: give out what is there."""
        self._feed(self._bridge.give_up())
        self.flush()
        if self._due_ns is not None:
            self._record_loss(self._due_ns)

    def flush(self) -> None:
        """Give out the states that are there."""
        if not self._times:
            return
        table = np.array(self._rows, dtype=np.float64)
        columns: dict[str, Column] = {name: table[:, k].copy() for k, name in enumerate(BRAIN_STATE_FIELDS)}
        times_ns = np.array(self._times, dtype=np.int64) + self._host.shift_ns
        stamp = self._host.stamp
        clock = ClockStamp(stamp.state, stamp.error_ns + self._error_ns)
        self._times, self._rows, self._error_ns = [], [], 0
        self._emit(SampleBlock(self._device, BRAIN_STATE, times_ns, columns, clock, self._segment))

    def _first_due_ns(self, start_ns: int) -> int:
        """The first grid point for which samples from `start_ns` on can count, and that has no state yet."""
        earliest_ns = start_ns - self._latency_ns
        if self._after_ns is not None:
            earliest_ns = max(earliest_ns, self._after_ns + 1)
        if self._phase_ns is None:
            self._phase_ns = -self._host.shift_ns
        return _grid_after(earliest_ns - self._phase_ns) + self._phase_ns

    def _place(self, start_ns: int, count: int, line: TimeLine) -> None:
        """Find which grid points lie before the last of so many samples, and between which of them."""
        assert self._due_ns is not None
        # the window ends with the last sample before the grid point: up to a period too early
        error_ns = line.error_ns + line.period_ns
        before = 0
        # samples up to and including the last one that is not later than the grid point's own window end
        while (upto := (self._due_ns + self._latency_ns - start_ns) // line.period_ns + 1) < count:
            before = max(before, upto)
            self._waiting.append(_GridPoint(self._due_ns, self._placed + before, error_ns))
            self._due_ns += BRAIN_STATE_PERIOD_NS
        self._placed += count

    def _feed(self, samples: Bridged) -> None:
        done, fed = 0, self._fed
        while self._waiting and self._waiting[0].before <= fed + len(samples):
            point = self._waiting.popleft()
            done = self._push(samples, done, point.before - fed)
            self._step(point)
        self._push(samples, done, len(samples))

    def _push(self, samples: Bridged, start: int, stop: int) -> int:
        if stop > start:
            self._engine.push(samples.uv[start:stop], samples.bad[start:stop])
            if samples.lost is not None:
                lost = samples.lost[start:stop]
                newest = self._fed + (stop - start) - np.argmax(lost[::-1], axis=0)
                self._lost_through = np.where(lost.any(axis=0), newest, self._lost_through)
            self._fed += stop - start
        return max(start, stop)

    def _step(self, point: _GridPoint) -> None:
        whole = self._fed - self._lost_through >= self._second
        # A step would take the averages back to nothing where there is nothing to add to them.
        state = self._engine.step() if whole.any() else None
        if state is not None and not math.isnan(state.alpha):
            self._record_loss(point.due_ns)
            self._given = True
            self._times.append(point.due_ns)
            self._rows.append(astuple(state))
            self._error_ns = max(self._error_ns, point.error_ns)
            self._after_ns = point.due_ns
            self._on_state(state)
        elif not whole.all():
            self._note_loss(point.due_ns)
        else:
            self._record_loss(point.due_ns)
        if (point.due_ns + BRAIN_STATE_PERIOD_NS + self._host.shift_ns) % NS_PER_S < BRAIN_STATE_PERIOD_NS:
            self.flush()

    def _note_loss(self, due_ns: int) -> None:
        """A loss left this grid point without a state."""
        if self._records_losses and self._given and self._lost_from_ns is None:
            self._lost_from_ns = due_ns

    def _record_loss(self, until_ns: int) -> None:
        """Of the grid points from the first that a loss left without a state to the last one before this one."""
        first_ns, self._lost_from_ns = self._lost_from_ns, None
        if first_ns is None or until_ns <= first_ns:
            return
        count = (until_ns - first_ns) // BRAIN_STATE_PERIOD_NS
        first_ns, last_ns = (ns + self._host.shift_ns for ns in (first_ns, until_ns - BRAIN_STATE_PERIOD_NS))
        self._emit(LossRecord(self._device, BRAIN_STATE, LossCause.RADIO, first_ns, last_ns, count))


def _grid_after(time_ns: int) -> int:
    """The first grid point that is not before this time."""
    return -(-time_ns // BRAIN_STATE_PERIOD_NS) * BRAIN_STATE_PERIOD_NS
