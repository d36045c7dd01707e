"""Decoder of streams of the lab streaming layer: rows of a time stamp and the channels' values.

LSL has no counter. It loses samples only where its own buffer of a minute ran over or the sender was cut off, and
then the stamps jump: jumps are counted as losses, the jitter of single stamps is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from gateway.devices import tables
from gateway.devices.base import Event, Missing, Reading, Rejected, SignalSpec, Streaming
from gateway.errors import ConfigError
from gateway.links.base import Chunk
from gateway.samples import NS_PER_S, VITAL_SIGNS

JUMP_S = 0.25
"""Stamps further apart than this have lost samples between them; the jitter of a sender's chunks is less."""
BEHIND_NS_MAX = 10 * NS_PER_S
"""A stamp that is older than this, or from the future, is not of this host's clock: then the arrival counts."""


class LslDecoder:
    """Decoder of one subscription (see `gateway.devices.base.Decoder`)."""

    def __init__(self, kind: str, rate_hz: float, channels: Sequence[str], units: Sequence[str] = ()) -> None:
        """`kind`: the stream's content type. `rate_hz`: its nominal rate, 0 for an irregular one.

        `channels`: a name for each channel, empty ones are numbered. `units`: as the stream has them; EEG without is
        taken for microvolts. Irregular streams are of kind `vital_signs`, and their channels are its fields.
        Raises `ConfigError`.
        """
        signal = tables.STREAM_SIGNALS.get(kind.casefold(), tables.channel_name(kind, 0))
        if not channels or rate_hz < 0 or (signal == VITAL_SIGNS) != (rate_hz == 0):
            raise ConfigError(
                f"an LSL stream of type {kind!r} with {len(channels)} channels at {rate_hz:g} Hz",
                hint="expected channels and a fixed rate, or the type vital_signs and no rate",
            )
        stated = [*units, *[""] * (len(channels) - len(units))][: len(channels)]
        default = tables.DEFAULT_UNITS.get(signal, "1")
        known = [tables.UNITS.get(unit.casefold(), (unit or default, 1.0)) for unit in stated]
        self._factors = np.array([factor for _, factor in known])
        self._spec = SignalSpec(
            signal, rate_hz or None, tables.channel_names(list(channels)), tuple(unit for unit, _ in known)
        )
        self._next_index = 0
        self._last_stamp_s: float | None = None

    @property
    def signals(self) -> Sequence[SignalSpec]:
        """What the stream holds."""
        return (self._spec,)

    def start(self) -> list[Event]:
        """A subscription streams at once."""
        return [Streaming()]

    def receive(self, chunk: Chunk) -> list[Event]:
        """Decode rows. Never raises, whatever the bytes."""
        rows = tables.rows_of(chunk.data, 1 + len(self._spec.channels))
        if rows is None or not np.isfinite(rows[:, 0]).all():
            return [Rejected(len(chunk.data), "no rows of time stamp and values")]
        stamps, values = rows[:, 0], rows[:, 1:] * self._factors
        if self._spec.rate_hz is None:
            return self._readings(stamps, values, chunk.arrival_ns)
        before = stamps[0] if self._last_stamp_s is None else self._last_stamp_s
        ahead_s = np.diff(stamps, prepend=before)
        self._last_stamp_s = float(stamps[-1])
        jumps = ahead_s > max(JUMP_S, 1.5 / self._spec.rate_hz)
        lost = np.where(jumps, np.rint(ahead_s * self._spec.rate_hz) - 1, 0).astype(np.int64)
        cuts = [0, *np.flatnonzero(lost[1:]) + 1, len(stamps)]
        events: list[Event] = []
        for start, stop in pairwise(cuts):
            if lost[start]:
                events.append(Missing(self._spec.signal, self._next_index, int(lost[start])))
                self._next_index += int(lost[start])
            arrival_ns = _true_arrival_ns(float(stamps[stop - 1]), chunk.arrival_ns)
            events.append(tables.samples_of(self._spec, self._next_index, values[start:stop], arrival_ns))
            self._next_index += int(stop - start)
        return events

    def _readings(self, stamps: NDArray[np.float64], values: NDArray[np.float64], arrival_ns: int) -> list[Event]:
        events: list[Event] = []
        for stamp, row in zip(stamps.tolist(), values.tolist(), strict=True):
            fields = {name: value for name, value in zip(self._spec.channels, row, strict=True) if np.isfinite(value)}
            if fields:
                events.append(Reading(self._spec.signal, fields, _true_arrival_ns(stamp, arrival_ns)))
        return events


def _true_arrival_ns(stamp_s: float, arrival_ns: int) -> int:
    """The sample's own time on this host's clock, where its stamp can be one."""
    behind_ns = arrival_ns - stamp_s * NS_PER_S
    return int(arrival_ns - behind_ns) if 0 <= behind_ns <= BEHIND_NS_MAX else arrival_ns
