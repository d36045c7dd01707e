"""Decoder of BrainFlow's tables: EEG and acceleration of any board that BrainFlow knows, by its own description.

A chunk is rows of the board's table (float64). BrainFlow gives microvolts and g. Its `package_num` is the device's
own counter only for some boards; for the others no loss can be seen here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gateway.devices import tables
from gateway.devices.base import Event, Facts, Missing, Rejected, SignalSpec, Streaming
from gateway.errors import ConfigError
from gateway.links.base import Chunk
from gateway.samples import ACCELERATION, EEG

COUNTERS = {-1: (256, 1), 0: (256, 1), 2: (256, 2)}
"""Board -> period and step of its counter: synthetic, Cyton, Cyton with Daisy (BrainFlow gives every second number)."""
ROWS_MAX = 1024


class BrainFlowDecoder:
    """Decoder of one session with one board (see `gateway.devices.base.Decoder`)."""

    def __init__(
        self, description: Mapping[str, Any], board_id: int | None = None, electrodes: Sequence[str] | None = None
    ) -> None:
        """`description`: what BrainFlow says of the board. `electrodes`: names for its EEG channels, in their order.

        Raises `ConfigError` for a board without EEG, and for too many names.
        """
        self._board = str(description.get("name", board_id))
        self._width = int(description.get("num_rows", 0))
        self._eeg = [int(row) for row in description.get("eeg_channels", ())]
        self._motion = [int(row) for row in description.get("accel_channels", ())]
        rows = [*self._eeg, *self._motion, int(description.get("package_num_channel", 0))]
        if not self._eeg or not 0 < self._width <= ROWS_MAX or not all(0 <= row < self._width for row in rows):
            raise ConfigError(
                f"BrainFlow's board {self._board} has no EEG channels",
                hint="choose a board that BrainFlow lists with EEG",
            )
        stated = str(description.get("eeg_names", "")).split(",")
        names = list(electrodes) if electrodes else stated if len(stated) == len(self._eeg) else [""] * len(self._eeg)
        if len(names) != len(self._eeg) or len(set(tables.channel_names(names))) != len(names):
            raise ConfigError(f"board {self._board} has {len(self._eeg)} EEG channels, {len(names)} names are given")
        rate_hz = float(description["sampling_rate"])
        self._specs = [(SignalSpec(EEG, rate_hz, tables.channel_names(names), ("uV",) * len(names)), self._eeg)]
        if len(self._motion) == 3:
            self._specs.append((SignalSpec(ACCELERATION, rate_hz, ("x", "y", "z"), ("[g]",) * 3), self._motion))
        self._counter = int(description.get("package_num_channel", 0))
        self._period, self._step = COUNTERS.get(board_id, (0, 0)) if board_id is not None else (0, 0)
        self._last: int | None = None
        self._next_index = 0

    @property
    def signals(self) -> Sequence[SignalSpec]:
        """EEG in microvolts at the board's rate, and acceleration where it has three axes."""
        return [spec for spec, _ in self._specs]

    def start(self) -> list[Event]:
        """BrainFlow has started the board already."""
        return [Streaming(), Facts(model=f"BrainFlow {self._board}")]

    def receive(self, chunk: Chunk) -> list[Event]:
        """Decode rows of the table. Never raises, whatever the bytes."""
        table = tables.rows_of(chunk.data, self._width)
        if table is None:
            return [Rejected(len(chunk.data), f"no whole rows of {self._width} numbers")]
        events: list[Event] = []
        lost = self._lost_before(table[:, self._counter])
        cuts = [0, *np.flatnonzero(lost[1:] > 0) + 1, len(table)]
        for start, stop in pairwise(cuts):
            for spec, rows in self._specs:
                if lost[start]:
                    events.append(Missing(spec.signal, self._next_index, int(lost[start])))
                values = table[start:stop][:, rows]
                events.append(tables.samples_of(spec, self._next_index + int(lost[start]), values, chunk.arrival_ns))
            self._next_index += int(lost[start]) + int(stop - start)
        return events

    def _lost_before(self, counter: NDArray[np.float64]) -> NDArray[np.int64]:
        """How many samples are missing before each row, int64 (n,)."""
        lost = np.zeros(len(counter), dtype=np.int64)
        if not self._period or not ((counter >= 0) & (counter < self._period)).all():
            return lost
        numbers = counter.astype(np.int64)
        before = numbers[0] - self._step if self._last is None else self._last
        self._last = int(numbers[-1])
        ahead = np.diff(numbers, prepend=before) % self._period
        lost[:] = np.maximum(ahead // self._step - 1, 0)
        return lost
