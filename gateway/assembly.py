"""From a decoder's events to blocks with times: the time axis, the brain state, the blocks of a second, the losses.

Pure but for the clocks that it is given. One assembler lives as long as one connection to a device: a segment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple

import numpy as np
from numpy.typing import NDArray

from gateway.clock import HostClock, SampleClock, TimeLine
from gateway.devices.base import Missing, Reading, Samples, SignalSpec
from gateway.samples import (
    BRAIN_STATE,
    BRAIN_STATE_FIELDS,
    BRAIN_STATE_PERIOD_NS,
    NS_PER_S,
    QUALITY,
    ClockStamp,
    Column,
    LossCause,
    LossRecord,
    SampleBlock,
)
from gateway.signal.features import FeatureEngine, Features
from gateway.signal.quality import quality_bits, railed

Emit = Callable[[SampleBlock | LossRecord], None]

SETTLE_EVENTS_MAX = 4096
"""Events held until the time axis is known: a second of a 2,000 Hz stream, one event a sample, twice over."""
READING_ERROR_NS = NS_PER_S // 10
"""Bound for the way of a reading from the sensor to the host: a BLE connection interval and a queue."""


def nothing(_state: Features) -> None:
    """What is told of new brain states where nobody listens."""


class RawAssembler:
    """Samples of a signal with a fixed rate: raw blocks of a second, and for EEG the brain state at 5 Hz."""

    def __init__(
        self,
        device: str,
        spec: SignalSpec,
        segment: int,
        host: HostClock,
        emit: Emit,
        *,
        raw: bool = True,
        brain_state: bool = False,
        on_state: Callable[[Features], None] = nothing,
    ) -> None:
        assert spec.rate_hz is not None
        self._device = device
        self._spec = spec
        self._segment = segment
        self._host = host
        self._emit = emit
        self._raw = raw
        self._clock = SampleClock(spec.rate_hz)
        self._block_samples = round(spec.rate_hz)
        self._held: list[Samples | Missing] = []
        self._line: TimeLine | None = None
        self._parts: list[Samples] = []
        self._count = 0
        self._steps_seen = host.steps
        self._states = (
            StateAssembler(device, segment, spec, host, emit, on_state)
            if brain_state and spec.signal == "eeg"
            else None
        )

    def take(self, event: Samples | Missing) -> None:
        """Take the next event of the signal, in order."""
        if isinstance(event, Samples):
            self._clock.observe(event.index + len(event) - 1, event.arrival_ns)
        if not self._clock.settled and len(self._held) < SETTLE_EVENTS_MAX:
            self._held.append(event)
            return
        held, self._held = self._held, []
        for earlier in held:
            self._place(earlier)
        self._place(event)

    def finish(self) -> None:
        """The connection is over: give out what is there."""
        held, self._held = self._held, []
        for event in held:
            self._place(event)
        self._close_block()
        if self._states:
            self._states.flush()

    def _place(self, event: Samples | Missing) -> None:
        if isinstance(event, Missing):
            self._lose(event)
            return
        start = 0
        while start < len(event):
            line = self._begin_block(event.index + start) if self._line is None else self._line
            stop = min(len(event), start + self._block_samples - self._count)
            part = _part(event, start, stop)
            self._parts.append(part)
            self._count += stop - start
            if self._states:
                self._states.push(part, line)
            if self._count >= self._block_samples:
                self._close_block()
            start = stop

    def _begin_block(self, index: int) -> TimeLine:
        self._line = self._clock.line_from(index)
        if self._clock.jumped or self._host.steps != self._steps_seen:
            self._steps_seen = self._host.steps
            if self._states:
                self._states.interrupt()
        return self._line

    def _close_block(self) -> None:
        parts, self._parts, self._count = self._parts, [], 0
        line, self._line = self._line, None
        if not parts or line is None or not self._raw:
            return
        first = parts[0].index
        count = parts[-1].index + len(parts[-1]) - first
        names = self._spec.channels
        columns: dict[str, Column] = {name: np.concatenate([part.columns[name] for part in parts]) for name in names}
        columns[QUALITY] = _quality([columns[name] for name in names])
        start_ns = self._host.utc_ns(line.at(first))
        times_ns = start_ns + line.period_ns * np.arange(count, dtype=np.int64)
        stamp = self._host.stamp
        clock = ClockStamp(stamp.state, stamp.error_ns + line.error_ns)
        self._emit(
            SampleBlock(self._device, self._spec.signal, times_ns, columns, clock, self._segment, parts[0].scales)
        )

    def _lose(self, event: Missing) -> None:
        line = self._line or self._clock.line_from(event.index)
        self._close_block()
        if self._states:
            self._states.interrupt()
        first_ns = self._host.utc_ns(line.at(event.index))
        last_ns = self._host.utc_ns(line.at(event.index + event.count - 1))
        self._emit(LossRecord(self._device, event.signal, LossCause.RADIO, first_ns, last_ns, event.count))


class StateAssembler:
    """The brain state on the grid of whole 200 ms of UTC.

    A step is taken when the newest sample before a grid point, less the features' latency, has come: so the times
    are exactly 200 ms apart for as long as the stream lasts, whatever the device's rate and drift, and the window
    is true to within a sample.
    """

    def __init__(
        self,
        device: str,
        segment: int,
        spec: SignalSpec,
        host: HostClock,
        emit: Emit,
        on_state: Callable[[Features], None],
    ) -> None:
        assert spec.rate_hz is not None
        self._device = device
        self._segment = segment
        self._channels = spec.channels
        self._host = host
        self._emit = emit
        self._on_state = on_state
        self._engine = FeatureEngine(spec.rate_hz, len(spec.channels))
        self._latency_ns = round(self._engine.latency_s * NS_PER_S)
        self._due_ns: int | None = None
        """Grid point of the next state, UTC."""
        self._times: list[int] = []
        self._rows: list[tuple[float, ...]] = []
        self._error_ns = 0

    def push(self, part: Samples, line: TimeLine) -> None:
        """Take the next samples, whose times lie on this line."""
        uv = np.stack([_physical(part, name) for name in self._channels], axis=1)
        bad = railed(np.stack([part.columns[name] for name in self._channels], axis=1))
        self._error_ns = line.error_ns
        start_ns = self._host.utc_ns(line.at(part.index))
        if self._due_ns is None:
            self._due_ns = _grid_after(start_ns - self._latency_ns)
        done = 0
        while done < len(part):
            # samples up to and including the last one that is not later than the grid point's own window end
            end_ns = self._due_ns + self._latency_ns
            upto = min(len(part), (end_ns - start_ns) // line.period_ns + 1)
            if upto > done:
                self._engine.push(uv[done:upto], bad[done:upto])
                done = upto
            if done < len(part):
                self._step()

    def interrupt(self) -> None:
        """The stream is broken here: nothing is joined across."""
        self.flush()
        self._engine.reset()
        self._due_ns = None

    def flush(self) -> None:
        """Give out the states that are there."""
        if not self._times:
            return
        table = np.array(self._rows, dtype=np.float64)
        columns: dict[str, Column] = {name: table[:, k].copy() for k, name in enumerate(BRAIN_STATE_FIELDS)}
        stamp = self._host.stamp
        clock = ClockStamp(stamp.state, stamp.error_ns + self._error_ns)
        times_ns = np.array(self._times, dtype=np.int64)
        self._times, self._rows = [], []
        self._emit(SampleBlock(self._device, BRAIN_STATE, times_ns, columns, clock, self._segment))

    def _step(self) -> None:
        assert self._due_ns is not None
        state = self._engine.step()
        if state is not None and not math.isnan(state.alpha):
            self._times.append(self._due_ns)
            self._rows.append(astuple(state))
            self._on_state(state)
        self._due_ns += BRAIN_STATE_PERIOD_NS
        if self._due_ns % NS_PER_S == 0:
            self.flush()


class ReadingAssembler:
    """Readings of a device that reports when it likes: a block for what came together."""

    def __init__(self, device: str, signal: str, segment: int, host: HostClock, emit: Emit) -> None:
        self._device = device
        self._signal = signal
        self._segment = segment
        self._host = host
        self._emit = emit
        self._last_ns = -(2**63)

    def take(self, readings: Sequence[Reading]) -> None:
        """Take readings that came together, oldest first."""
        if not readings:
            return
        times: list[int] = []
        for reading in readings:
            # beats are stamped back from a notification's arrival, whose jitter must not turn their order round
            self._last_ns = max(self._host.utc_ns(reading.arrival_ns), self._last_ns + 1)
            times.append(self._last_ns)
        names = sorted({name for reading in readings for name in reading.fields})
        columns: Mapping[str, Column] = {
            name: np.array([reading.fields.get(name, math.nan) for reading in readings]) for name in names
        }
        stamp = self._host.stamp
        clock = ClockStamp(stamp.state, stamp.error_ns + READING_ERROR_NS)
        block = SampleBlock(self._device, self._signal, np.array(times, np.int64), columns, clock, self._segment)
        self._emit(block)


def _grid_after(time_ns: int) -> int:
    """The first grid point that is not before this time."""
    return -(-time_ns // BRAIN_STATE_PERIOD_NS) * BRAIN_STATE_PERIOD_NS


def _part(event: Samples, start: int, stop: int) -> Samples:
    if start == 0 and stop == len(event):
        return event
    columns: dict[str, Column] = {name: column[start:stop] for name, column in event.columns.items()}
    return Samples(event.signal, event.index + start, columns, event.arrival_ns, event.scales)


def _physical(part: Samples, name: str) -> NDArray[np.float64]:
    return part.columns[name].astype(np.float64) * part.scales.get(name, 1.0)


def _quality(channels: Sequence[Column]) -> NDArray[np.int64]:
    return quality_bits(railed(np.stack(channels, axis=1)))
