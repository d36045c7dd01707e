"""The values that travel through the house: blocks of samples and records of loss. Frozen, units in the names.

Knows no device, no clock, no wire: only numpy arrays and what a sample means.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

NS_PER_S = 1_000_000_000

EEG = "eeg"
BRAIN_STATE = "brain_state"
VITAL_SIGNS = "vital_signs"
ACCELERATION = "acceleration"
LOSS = "loss"
"""Not a signal of a device: the sequence in which a device's loss records travel."""

BRAIN_STATE_FIELDS = ("delta", "theta", "alpha", "beta", "gamma", "coherence", "plv", "entropy")
BRAIN_STATE_PERIOD_NS = 200_000_000

INTEGER_FIELDS = frozenset({"heart_rate", "spo2", "systolic_bp", "diastolic_bp", "respiration_rate", "quality"})
"""Fields that are stored as integers; every other field is a float."""

QUALITY = "quality"
"""Integer field of raw signals. Bit k set: the sample of electrode k (in the order of the block's channels)
is not usable. 0: all are good. Up to 63 electrodes; those beyond have no bit."""
QUALITY_BITS = 63


class ElectrodeState(StrEnum):
    """How an electrode is (judged in `gateway.signal.electrodes`)."""

    OK = "ok"
    NOISY = "noisy"
    """Drowned in mains, moved, or too large to be EEG."""
    RAILED = "railed"
    """At the end of the converter's range."""
    OFF = "off"
    """Not on the skin: flat, or nothing but what an open input hears."""
    UNKNOWN = "unknown"
    """There is no whole second yet."""


class ClockState(StrEnum):
    """How far the UTC of a block can be trusted."""

    SYNCED = "synced"
    UNSYNCED = "unsynced"
    """The host's clock was not disciplined: the time stamps may be wrong by more than the bound."""
    UNKNOWN = "unknown"
    """The host cannot tell whether its clock is disciplined."""


@dataclass(frozen=True, slots=True)
class ClockStamp:
    """The trust that the times of a block deserve."""

    state: ClockState
    error_ns: int
    """Bound of |stated time - true time| of any sample, in ns; for `SYNCED` it includes the host's own bound."""


class LossCause(StrEnum):
    """Why samples that a device produced are not in the store."""

    RADIO = "radio"
    """The device's own counter shows that they were sent and never arrived."""
    SHED = "shed"
    """The outbox was full and gave them up, by class and age."""
    CORRUPT = "corrupt"
    """They were stored and the disk gave back something else."""
    CLOCK = "clock"
    """They could not be given a time."""


Column = NDArray[np.float64] | NDArray[np.int32] | NDArray[np.int64]
"""Values of one field: float64 in its unit (NaN = no value), int32 device counts, or int64 bit sets."""


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    view = array.view()
    view.flags.writeable = False
    return view


@dataclass(frozen=True, slots=True, eq=False)
class SampleBlock:
    """Samples of one signal of one device, n of them, in order of time, with no gap inside.

    `times_ns`: int64 (n,), UTC in ns since 1970, strictly increasing.
    `columns`: name -> (n,) array, float64 in the field's own unit with NaN where there is no value,
    or int32 device counts, whose physical value is counts x `scales[name]`.
    The arrays are read-only.
    """

    device: str
    signal: str
    times_ns: NDArray[np.int64]
    columns: Mapping[str, Column]
    clock: ClockStamp
    segment: int = 0
    """Counts the device's uninterrupted runs since the gateway started; never join across two of them."""
    scales: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = self.times_ns.shape[0]
        if count == 0:
            raise ValueError("a block holds at least one sample")
        for name, column in self.columns.items():
            if column.shape != (count,):
                raise ValueError(f"column {name!r} has shape {column.shape}, expected ({count},)")
        columns = {name: _read_only(column) for name, column in self.columns.items()}
        object.__setattr__(self, "times_ns", _read_only(self.times_ns))
        object.__setattr__(self, "columns", MappingProxyType(columns))
        object.__setattr__(self, "scales", MappingProxyType(dict(self.scales)))

    def __len__(self) -> int:
        return int(self.times_ns.shape[0])

    @property
    def first_ns(self) -> int:
        return int(self.times_ns[0])

    @property
    def last_ns(self) -> int:
        return int(self.times_ns[-1])

    def physical(self, name: str) -> NDArray[np.float64]:
        """The column in its physical unit, float64 (n,), NaN where there is no value."""
        column = self.columns[name]
        if name in self.scales:
            return column.astype(np.float64) * self.scales[name]
        return column.astype(np.float64, copy=False)

    def part(self, start: int, stop: int) -> SampleBlock:
        """Samples `start` up to but not including `stop`, as a block of its own."""
        return SampleBlock(
            device=self.device,
            signal=self.signal,
            times_ns=self.times_ns[start:stop],
            columns={name: column[start:stop] for name, column in self.columns.items()},
            clock=self.clock,
            segment=self.segment,
            scales=self.scales,
        )


@dataclass(frozen=True, slots=True)
class LossRecord:
    """Samples that were produced and will not come: a loss that is on record with its cause."""

    device: str
    signal: str
    cause: LossCause
    first_ns: int
    """UTC of the first missing sample, ns."""
    last_ns: int
    """UTC of the last missing sample, ns."""
    sample_count: int
    sequences: tuple[int, int] | None = None
    """First and last block sequence that are gone, where whole accepted blocks were given up."""
    epoch: str = ""
    """The outbox epoch of `sequences`; empty: that of the record itself."""
    block_runs: tuple[tuple[int, int], ...] = ()
    """The blocks of `sequences` in order, as runs of (blocks, samples in each); empty where nobody knows. With it a
    reader whom some of the blocks have reached all the same can tell how many samples are missing, exactly."""

    def __post_init__(self) -> None:
        if self.last_ns < self.first_ns or self.sample_count < 1:
            raise ValueError("a loss has a first and a last time in order and at least one sample")
        if self.sequences is None:
            if self.epoch or self.block_runs:
                raise ValueError("without sequences a loss has neither their epoch nor their blocks")
        elif self.block_runs:
            blocks = sum(blocks for blocks, _ in self.block_runs)
            samples = sum(blocks * samples for blocks, samples in self.block_runs)
            if (blocks, samples) != (self.sequences[1] - self.sequences[0] + 1, self.sample_count):
                raise ValueError("the blocks of a loss are those of its sequences, and have its samples")
