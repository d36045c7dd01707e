"""From a decoder's events to blocks with times: the time axis, the blocks of a second with their quality, the losses,
the readings.

Pure but for the clocks that it is given. One assembler lives as long as one connection to a device: a segment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gateway.devices.base import Missing, Reading, Samples, SignalSpec
from gateway.sample_clock import SampleClock, TimeLine
from gateway.samples import (
    BRAIN_STATE,
    EEG,
    NS_PER_S,
    QUALITY,
    ClockStamp,
    Column,
    LossCause,
    LossRecord,
    SampleBlock,
)
from gateway.segment_clock import UtcClock
from gateway.signal.bands import FeatureSettings
from gateway.signal.electrodes import Electrode, ElectrodeWatch, MotionWatch
from gateway.signal.features import Features
from gateway.signal.quality import COUNTS_24_BIT, quality_bits, railed, unusable
from gateway.state_assembly import Emit, StateAssembler

SETTLE_EVENTS_MAX = 4096
"""Events held until the time axis is known: a second of a 2,000 Hz stream, one event a sample, twice over."""
BLOCK_SAMPLES_MAX = 4096
"""Of one raw block, as the wire contract has it."""
READING_ERROR_NS = NS_PER_S // 10
"""Bound for the way of a reading from the sensor to the host: a BLE connection interval and a queue."""


NOT_YET: Mapping[str, int] = MappingProxyType({})
"""The newest times of a device of which nothing came so far."""


def nothing(_state: Features) -> None:
    """What is told of new brain states where nobody listens."""


class RawAssembler:
    """Samples of a signal with a fixed rate: raw blocks of a second, and for EEG the brain state at 5 Hz.

    Electrodes are judged as the samples come: what is not usable has its bit in `quality`, and no part in the features.
    A radio loss is recorded for what would have been stored: for the raw samples, or where these are not sent for the
    brain states that it cost.
    """

    def __init__(
        self,
        device: str,
        spec: SignalSpec,
        segment: int,
        host: UtcClock,
        emit: Emit,
        *,
        raw: bool = True,
        brain_state: FeatureSettings | None = None,
        on_state: Callable[[Features], None] = nothing,
        after_ns: Mapping[str, int] = NOT_YET,
        motion: MotionWatch | None = None,
    ) -> None:
        """`brain_state`: how it is computed, of samples that stay in the raw blocks as they are; None: it is not.

        `after_ns`: newest time (UTC) of each signal in the segment before, behind which this one must lie.

        `motion`: the device's accelerometer, where it has one.
        """
        assert spec.rate_hz is not None
        self._device = device
        self._spec = spec
        self._segment = segment
        self._host = host
        self._emit = emit
        self._raw = raw
        newest_ns = after_ns.get(spec.signal)
        self._clock = SampleClock(spec.rate_hz, None if newest_ns is None else host.monotonic_ns(newest_ns))
        self._block_samples = min(max(1, round(spec.rate_hz)), BLOCK_SAMPLES_MAX)
        self._held: list[Samples | Missing] = []
        self._line: TimeLine | None = None
        self._parts: list[Samples] = []
        self._bad: list[NDArray[np.bool_]] = []
        """For each part: bool (n, channels), not usable by what was known when it came."""
        self._count = 0
        self._placed_through: int | None = None
        """The newest sample that has a time."""
        self._newest_ns: int | None = None
        """That time (UTC) less what held times were put right by, of the last block."""
        self._motion = motion
        self._watch = ElectrodeWatch(spec.rate_hz, len(spec.channels)) if spec.signal == EEG else None
        self._states = (
            StateAssembler(
                device,
                segment,
                spec,
                host,
                emit,
                on_state,
                after_ns.get(BRAIN_STATE),
                records_losses=not raw,
                settings=brain_state,
            )
            if brain_state is not None and spec.signal == EEG
            else None
        )

    @property
    def electrodes(self) -> dict[str, Electrode]:
        """How each electrode is now, by name; empty for what is no EEG."""
        return {} if self._watch is None else dict(zip(self._spec.channels, self._watch.electrodes, strict=True))

    @property
    def judgement(self) -> object:
        """Another object after each judgement of the electrodes: tells cheaply whether there is news."""
        return None if self._watch is None else self._watch.electrodes

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
            self._states.finish()

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
            self._placed_through = event.index + stop - 1
            self._judge(part, line)
            if self._count >= self._block_samples:
                self._close_block()
            start = stop

    def _judge(self, part: Samples, line: TimeLine) -> None:
        at_the_ends, left_out = _railed(part, self._spec), _left_out(part, self._spec)
        if self._watch is None:
            self._bad.append(at_the_ends | left_out)
            return
        uv = _physical(part, self._spec)
        motion_g = 0.0
        if self._motion is not None and self._watch.judges(len(part)):
            motion_g = self._motion.motion_g(part.arrival_ns)
        bad = self._watch.push(uv, at_the_ends, left_out, motion_g)
        self._bad.append(bad)
        if self._states:
            absent = left_out | ~np.isfinite(uv)
            self._states.push(part.index, uv, bad, line, absent if absent.any() else None)

    def _begin_block(self, index: int) -> TimeLine:
        self._line = self._clock.line_from(index, self._placed_through)
        if self._clock.jumped and self._states:
            self._states.interrupt()
        return self._line

    def _close_block(self) -> None:
        parts, self._parts, self._count = self._parts, [], 0
        bad, self._bad = self._bad, []
        line, self._line = self._line, None
        if not parts or line is None or not self._raw:
            return
        first = parts[0].index
        count = parts[-1].index + len(parts[-1]) - first
        names = self._spec.channels
        columns: dict[str, Column] = {name: np.concatenate([part.columns[name] for part in parts]) for name in names}
        columns[QUALITY] = quality_bits(np.concatenate(bad) if self._watch is None else self._watch.marked(count))
        wanted_ns = start_ns = self._host.utc_ns(line.at(first))
        if self._newest_ns is not None:  # the host's time may be on its way back, slower than it runs
            start_ns = max(start_ns, self._newest_ns + self._host.shift_ns + 1)
        times_ns = start_ns + line.period_ns * np.arange(count, dtype=np.int64)
        self._newest_ns = int(times_ns[-1]) - self._host.shift_ns
        stamp = self._host.stamp
        clock = ClockStamp(stamp.state, stamp.error_ns + line.error_ns + start_ns - wanted_ns)
        self._emit(
            SampleBlock(self._device, self._spec.signal, times_ns, columns, clock, self._segment, parts[0].scales)
        )

    def _lose(self, event: Missing) -> None:
        line = self._line
        if line is None and self._clock.observed:
            line = self._clock.line_from(event.index, self._placed_through)
            if self._clock.jumped and self._states:
                self._states.interrupt(lost=True)
        self._close_block()
        if self._watch:
            self._watch.miss(event.count)
        if self._states and line is not None:
            self._states.miss(event.index, event.count, line)
        if not self._raw:
            return
        if line is None:  # nothing ever arrived that could tell when it was
            first_ns = last_ns = self._host.now_ns()
        else:
            first_ns = self._host.utc_ns(line.at(event.index))
            last_ns = self._host.utc_ns(line.at(event.index + event.count - 1))
        self._emit(LossRecord(self._device, event.signal, LossCause.RADIO, first_ns, last_ns, event.count))


class ReadingAssembler:
    """Readings of a device that reports when it likes: a block for what came together."""

    def __init__(
        self, device: str, signal: str, segment: int, host: UtcClock, emit: Emit, after_ns: int | None = None
    ) -> None:
        self._device = device
        self._signal = signal
        self._segment = segment
        self._host = host
        self._emit = emit
        self._last_ns = -(2**63) if after_ns is None else after_ns - host.shift_ns
        """Newest time, less what held times were put right by."""

    def take(self, readings: Sequence[Reading]) -> None:
        """Take readings that came together, oldest first."""
        if not readings:
            return
        times: list[int] = []
        for reading in readings:
            # beats are stamped back from a notification's arrival, whose jitter must not turn their order round
            self._last_ns = max(self._host.utc_ns(reading.arrival_ns) - self._host.shift_ns, self._last_ns + 1)
            times.append(self._last_ns + self._host.shift_ns)
        names = sorted({name for reading in readings for name in reading.fields})
        columns: Mapping[str, Column] = {
            name: np.array([reading.fields.get(name, math.nan) for reading in readings]) for name in names
        }
        stamp = self._host.stamp
        clock = ClockStamp(stamp.state, stamp.error_ns + READING_ERROR_NS)
        block = SampleBlock(self._device, self._signal, np.array(times, np.int64), columns, clock, self._segment)
        self._emit(block)


def _part(event: Samples, start: int, stop: int) -> Samples:
    if start == 0 and stop == len(event):
        return event
    columns: dict[str, Column] = {name: column[start:stop] for name, column in event.columns.items()}
    return Samples(event.signal, event.index + start, columns, event.arrival_ns, event.scales)


def _physical(part: Samples, spec: SignalSpec) -> NDArray[np.float64]:
    """Float64 (n, channels) in the signal's unit."""
    columns = [part.columns[name].astype(np.float64) * part.scales.get(name, 1.0) for name in spec.channels]
    return np.stack(columns, axis=1)


def _railed(part: Samples, spec: SignalSpec) -> NDArray[np.bool_]:
    """Bool (n, channels): what stands at an end of the converter's range. Physical values have none to be seen."""
    channels = [part.columns[name] for name in spec.channels]
    if not all(np.issubdtype(column.dtype, np.integer) for column in channels):
        return np.zeros((len(part), len(channels)), dtype=np.bool_)
    counts: NDArray[np.integer[Any]] = np.stack(channels, axis=1)
    return railed(counts, spec.full_scale or COUNTS_24_BIT)


def _left_out(part: Samples, spec: SignalSpec) -> NDArray[np.bool_]:
    """Bool (n, channels): what the decoder says is no sample."""
    if QUALITY not in part.columns:
        return np.zeros((len(part), len(spec.channels)), dtype=np.bool_)
    return unusable(part.columns[QUALITY].astype(np.int64), len(spec.channels))
