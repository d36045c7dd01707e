"""The uninterrupted runs of one connection to a device: events to the assemblers of the run that is under way.

Knows no link and no broker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from gateway.assembly import RawAssembler, ReadingAssembler
from gateway.clock import HostClock
from gateway.devices.base import Decoder, Missing, Reading, Samples
from gateway.samples import ACCELERATION, EEG, QUALITY
from gateway.segment_clock import SegmentClock
from gateway.settings import Device
from gateway.signal.electrodes import Electrode, MotionWatch
from gateway.signal.features import Features
from gateway.state_assembly import Emit


class Segments:
    """The assemblers of one connection: never joined with those of the one before, and made anew where time breaks."""

    def __init__(
        self,
        device: Device,
        decoder: Decoder,
        host: HostClock,
        emit: Emit,
        on_state: Callable[[Device, Features], None],
        begin: Callable[[], tuple[int, Mapping[str, int]]],
    ) -> None:
        """`begin` gives the next segment its number, and the newest time (UTC) of each signal so far."""
        self._device = device
        self._specs = decoder.signals
        self._host = host
        self._emit = emit
        self._on_state = on_state
        self._begin = begin
        self._raw: dict[str, RawAssembler] = {}
        self._motion: MotionWatch | None = None
        self._readings: dict[str, ReadingAssembler] = {}
        self._together: dict[str, list[Reading]] = {}
        for spec in decoder.signals:
            if spec.signal == ACCELERATION and spec.rate_hz is not None and set(spec.units) == {"[g]"}:
                self._motion = MotionWatch(spec.rate_hz)

    @property
    def electrodes(self) -> dict[str, Electrode]:
        """How each electrode is now, by name."""
        return self._raw[EEG].electrodes if EEG in self._raw else {}

    @property
    def judgement(self) -> object:
        """Another object after each judgement of the electrodes; None where there are none."""
        return self._raw[EEG].judgement if EEG in self._raw else None

    def take(self, event: Samples | Missing | Reading) -> None:
        """Put one event where it belongs."""
        if not (self._raw or self._readings):
            self._assemble()
        if isinstance(event, Reading):
            self._together.setdefault(event.signal, []).append(event)
            return
        if self._motion is not None and isinstance(event, Samples) and event.signal == ACCELERATION:
            axes = [column * event.scales.get(name, 1.0) for name, column in event.columns.items() if name != QUALITY]
            self._motion.push(np.stack(axes, axis=1, dtype=np.float64), event.arrival_ns)
        self._raw[event.signal].take(event)

    def flush_readings(self) -> None:
        """What came in one chunk belongs together."""
        together, self._together = self._together, {}
        for signal, readings in together.items():
            self._readings[signal].take(readings)

    def finish(self) -> None:
        """The segment is over: give out what is there."""
        self.flush_readings()
        for assembler in self._raw.values():
            assembler.finish()
        self._raw, self._readings = {}, {}

    def _assemble(self) -> None:
        number, newest_ns = self._begin()
        device, emit = self._device, self._emit
        clock = SegmentClock(self._host, max([*newest_ns.values(), self._host.began_after_ns]))
        for spec in self._specs:
            if spec.rate_hz is None:
                after_ns = newest_ns.get(spec.signal)
                self._readings[spec.signal] = ReadingAssembler(
                    device.serial, spec.signal, number, clock, emit, after_ns
                )
                continue
            self._raw[spec.signal] = RawAssembler(
                device.serial,
                spec,
                number,
                clock,
                emit,
                raw=device.raw,
                brain_state=device.features.settings() if device.brain_state else None,
                on_state=partial(self._on_state, device),
                after_ns=newest_ns,
                motion=self._motion,
            )
