"""From samples of EEG to blocks of brain states, on a grid of 200 ms.

Pure but for the clock that it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple

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
from gateway.signal.bands import DEFAULT_SETTINGS, FeatureSettings
from gateway.signal.features import FeatureEngine, Features

Emit = Callable[[SampleBlock | LossRecord], None]


class StateAssembler:
    """The brain state on the grid of whole 200 ms of UTC.

    A step is taken when the newest sample before a grid point, less the features' latency, has come: so the times
    are exactly 200 ms apart for as long as the stream lasts, whatever the device's rate and drift, and the window
    is true to within a sample. Where held times are put right, the whole grid moves with them: it keeps its phase.
    All times in here are UTC less `shift_ns`.
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
        self._latency_ns = round(self._engine.latency_s * NS_PER_S)
        self._due_ns: int | None = None
        """Grid point of the next state."""
        self._phase_ns: int | None = None
        """A grid point: of whole 200 ms of UTC, as they were when the segment began."""
        self._after_ns = None if after_ns is None else after_ns - host.shift_ns
        """Grid point that a state already has."""
        self._records_losses = records_losses
        self._given = False
        """There was a state in this segment."""
        self._lost_from_ns: int | None = None
        """First grid point that has no state because of a loss, until the next one that has."""
        self._line_error_ns = 0
        self._times: list[int] = []
        self._rows: list[tuple[float, ...]] = []
        self._error_ns = 0
        """Bound of the axis' own error, of all rows."""

    def push(self, index: int, uv: NDArray[np.float64], bad: NDArray[np.bool_], line: TimeLine) -> None:
        """Take the next samples, (n, channels) in uV and whether unusable, from `index` on this line."""
        # the window ends with the last sample before the grid point: up to a period too early
        self._line_error_ns = line.error_ns + line.period_ns
        shift_ns = self._host.shift_ns
        start_ns = self._host.utc_ns(line.at(index)) - shift_ns
        if self._due_ns is None:
            earliest_ns = start_ns - self._latency_ns
            if self._after_ns is not None:
                earliest_ns = max(earliest_ns, self._after_ns + 1)
            if self._phase_ns is None:
                self._phase_ns = -shift_ns
            self._due_ns = _grid_after(earliest_ns - self._phase_ns) + self._phase_ns
        done = 0
        while done < len(uv):
            # samples up to and including the last one that is not later than the grid point's own window end
            end_ns = self._due_ns + self._latency_ns
            upto = min(len(uv), (end_ns - start_ns) // line.period_ns + 1)
            if upto > done:
                self._engine.push(uv[done:upto], bad[done:upto])
                done = upto
            if done < len(uv):
                self._step()

    def interrupt(self, *, lost: bool = False) -> None:
        """The stream is broken here, `lost`: by samples that did not come. Nothing is joined across."""
        self.flush()
        if lost and self._records_losses and self._given and self._lost_from_ns is None:
            self._lost_from_ns = self._due_ns
        self._engine.reset()
        self._due_ns = None

    def finish(self) -> None:
        """The connection is over, or the grid is another one from here: give out what is there."""
        self.flush()
        self._record_loss()

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

    def _step(self) -> None:
        assert self._due_ns is not None
        state = self._engine.step()
        if state is not None and not math.isnan(state.alpha):
            self._record_loss()
            self._given = True
            self._times.append(self._due_ns)
            self._rows.append(astuple(state))
            self._error_ns = max(self._error_ns, self._line_error_ns)
            self._after_ns = self._due_ns
            self._on_state(state)
        self._due_ns += BRAIN_STATE_PERIOD_NS
        if (self._due_ns + self._host.shift_ns) % NS_PER_S < BRAIN_STATE_PERIOD_NS:
            self.flush()

    def _record_loss(self) -> None:
        """Of the grid points from the first that a loss left without a state to the last one before the next."""
        first_ns, self._lost_from_ns = self._lost_from_ns, None
        if first_ns is None or self._due_ns is None or self._due_ns <= first_ns:
            return
        count = (self._due_ns - first_ns) // BRAIN_STATE_PERIOD_NS
        first_ns, last_ns = (ns + self._host.shift_ns for ns in (first_ns, self._due_ns - BRAIN_STATE_PERIOD_NS))
        self._emit(LossRecord(self._device, BRAIN_STATE, LossCause.RADIO, first_ns, last_ns, count))


def _grid_after(time_ns: int) -> int:
    """The first grid point that is not before this time."""
    return -(-time_ns // BRAIN_STATE_PERIOD_NS) * BRAIN_STATE_PERIOD_NS
