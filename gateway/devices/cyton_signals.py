"""From a Cyton's numbered packets to its signals: 8 channels, 16 with a Daisy, acceleration, auxiliary inputs.

Each signal takes the same runs of packets and has its own index and its own losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gateway.devices.base import Event, Missing, Samples, SignalSpec
from gateway.devices.cyton_packets import (
    ACCELERATION_G_PER_COUNT,
    CHANNELS_PER_PACKET,
    FULL_SCALE,
    PACKET_BYTES,
    PACKETS_PER_S,
    STOP_RAW,
    auxiliary,
    channel_counts,
)
from gateway.samples import ACCELERATION, QUALITY, Column

AUX = "aux"

DAISY_CHANNELS = 2 * CHANNELS_PER_PACKET
PACKETS_PER_ACCELERATION = 10
AXES = ("x", "y", "z")
AUX_CHANNELS = {"analog": ("A5", "A6", "A7"), "digital": ("D11", "D12", "D13", "D17", "D18")}
ANALOG_FULL_SCALE = (-1, 1024)
"""One beyond the ends of the 10-bit converter: an input that stands at 0 V or 3.3 V is no fault."""
_DIGITAL_BYTES = (26, 27, 28, 29, 31)
_INT16_FULL_SCALE = (-(2**15), 2**15 - 1)


@dataclass(slots=True)
class Run:
    """Packets with consecutive numbers out of one chunk, and what was lost before them."""

    index: int
    """Number of the first packet since the start, lost ones counted."""
    lost: int
    packets: list[bytes]
    arrival_ns: int


class Track(Protocol):
    """One signal on its way out of the packets."""

    @property
    def spec(self) -> SignalSpec:
        """What the signal is."""

    def take(self, run: Run) -> list[Event]:
        """Samples and losses that this run, the next one in order, makes known."""

    def finish(self) -> list[Event]:
        """What is still held when the connection ends."""


class BoardTrack:
    """The channels of a Cyton alone: 250 Hz, a sample a packet."""

    def __init__(self, signal: str, electrodes: Sequence[str], scales: Mapping[str, float]) -> None:
        self.spec = SignalSpec(
            signal, float(PACKETS_PER_S), tuple(electrodes), ("uV",) * len(electrodes), full_scale=FULL_SCALE
        )
        self._scales = scales

    def take(self, run: Run) -> list[Event]:
        """See `Track`."""
        counts = channel_counts(run.packets)
        columns = {name: counts[channel] for channel, name in enumerate(self.spec.channels)}
        lost: list[Event] = [Missing(self.spec.signal, run.index - run.lost, run.lost)] if run.lost else []
        return [*lost, Samples(self.spec.signal, run.index, columns, run.arrival_ns, self._scales)]

    def finish(self) -> list[Event]:
        """Nothing is held."""
        return []


class DaisyTrack:
    """The channels of a Cyton and its Daisy: 125 Hz, a sample for each pair of packets.

    Packet 2k carries the Daisy (inputs 9 to 16), packet 2k + 1 the board (1 to 8); they are joined by their numbers,
    never by their arrival. Where only one of a pair came, the other's electrodes read 0 and have their bits in
    `quality` set; a pair that was lost whole is `Missing`. Packet 0 is not valid: it is the mean with a sample from
    before the start. The two halves are centred 4 ms apart (OpenBCI documentation, Cyton data format).
    """

    def __init__(self, signal: str, electrodes: Sequence[str], scales: Mapping[str, float]) -> None:
        self.spec = SignalSpec(
            signal, PACKETS_PER_S / 2, tuple(electrodes), ("uV",) * len(electrodes), full_scale=FULL_SCALE
        )
        self._scales = scales
        self._next_pair = 0
        self._waiting: Run | None = None
        """An even packet by itself."""
        board = range(min(len(electrodes), CHANNELS_PER_PACKET))
        daisy = range(CHANNELS_PER_PACKET, len(electrodes))
        self._board_bits, self._daisy_bits = (sum(1 << bit for bit in half) for half in (board, daisy))

    def take(self, run: Run) -> list[Event]:
        """See `Track`."""
        events: list[Event] = []
        index, packets = run.index, run.packets
        waiting, self._waiting = self._waiting, None
        if waiting is not None and waiting.index + 1 == index:
            index, packets = waiting.index, [*waiting.packets, *packets]
        elif waiting is not None:
            events += self._pairs(waiting)
        if index == 0:
            index, packets = 1, packets[1:]
        if packets and (index + len(packets)) % 2:
            self._waiting = Run(index + len(packets) - 1, 0, packets[-1:], run.arrival_ns)
            packets = packets[:-1]
        if packets:
            events += self._pairs(Run(index, 0, packets, run.arrival_ns))
        return events

    def finish(self) -> list[Event]:
        """The half of a pair whose other half did not come."""
        waiting, self._waiting = self._waiting, None
        return [] if waiting is None else self._pairs(waiting)

    def _pairs(self, run: Run) -> list[Event]:
        numbers = np.arange(run.index, run.index + len(run.packets))
        first, last = run.index // 2, int(numbers[-1]) // 2
        events: list[Event] = []
        if first > self._next_pair:
            events.append(Missing(self.spec.signal, self._next_pair, first - self._next_pair))
        self._next_pair = last + 1
        counts = np.zeros((DAISY_CHANNELS, last + 1 - first), dtype=np.int32)
        quality = np.full(last + 1 - first, self._board_bits | self._daisy_bits, dtype=np.int64)
        halves = channel_counts(run.packets)
        on_daisy = numbers % 2 == 0
        for of_half, rows, bits in (
            (~on_daisy, slice(0, CHANNELS_PER_PACKET), self._board_bits),
            (on_daisy, slice(CHANNELS_PER_PACKET, DAISY_CHANNELS), self._daisy_bits),
        ):
            pair = numbers[of_half] // 2 - first
            counts[rows, pair] = halves[:, of_half]
            quality[pair] &= ~bits
        columns: dict[str, Column] = {name: counts[row] for row, name in enumerate(self.spec.channels)}
        columns[QUALITY] = quality
        return [*events, Samples(self.spec.signal, first, columns, run.arrival_ns, self._scales)]


class AccelerationTrack:
    """The accelerometer: a value for every ten packets, 25 Hz.

    The sensor runs on its own clock of about 25 Hz and puts a value into some packet; the others carry zeros. Value k
    is the newest that came in packets 10 k to 10 k + 9; where all ten came without one, the value stays as it was, and
    where a packet is lost that may have carried it, value k is `Missing`. Nothing is given before the first value.
    """

    def __init__(self) -> None:
        self.spec = SignalSpec(
            ACCELERATION,
            PACKETS_PER_S / PACKETS_PER_ACCELERATION,
            AXES,
            ("[g]",) * len(AXES),
            full_scale=_INT16_FULL_SCALE,
        )
        self._scales = dict.fromkeys(AXES, ACCELERATION_G_PER_COUNT)
        self._axes: list[int | None] = [None] * len(AXES)
        self._slot = 0
        self._fresh = False
        """A value came in this slot."""
        self._torn = False
        """A packet of this slot is lost."""
        self._given = False
        self._values: list[list[int]] = []
        self._events: list[Event] = []
        self._arrival_ns = 0

    def take(self, run: Run) -> list[Event]:
        """See `Track`."""
        if run.lost:
            self._lose_until(run.index)
        self._arrival_ns = run.arrival_ns
        for number, packet in enumerate(run.packets, start=run.index):
            axes = auxiliary(packet).acceleration if any(packet[26:32]) else None
            if axes is not None:
                self._axes = [old if new is None else new for new, old in zip(axes, self._axes, strict=True)]
                self._fresh = True
            if number % PACKETS_PER_ACCELERATION == PACKETS_PER_ACCELERATION - 1:
                self._close_slot()
        return self._give()

    def finish(self) -> list[Event]:
        """Nothing: a slot that did not end is no value."""
        return []

    def _lose_until(self, end: int) -> None:
        self._torn = True
        whole = end // PACKETS_PER_ACCELERATION - self._slot
        if whole > 0:
            self._close_slot()
            self._miss(whole - 1)
            self._torn = end % PACKETS_PER_ACCELERATION > 0

    def _close_slot(self) -> None:
        x, y, z = self._axes
        if x is None or y is None or z is None:
            self._slot += 1
        elif self._fresh or (self._given and not self._torn):
            self._given = True
            self._values.append([x, y, z])
            self._slot += 1
        else:
            self._miss(1)
        self._fresh = self._torn = False

    def _miss(self, count: int) -> None:
        if self._given and count:
            self._flush()
            self._events.append(Missing(ACCELERATION, self._slot, count))
        self._slot += count

    def _flush(self) -> None:
        if self._values:
            table = np.array(self._values, dtype=np.int32).T
            columns = dict(zip(AXES, table, strict=True))
            first = self._slot - len(self._values)
            self._events.append(Samples(ACCELERATION, first, columns, self._arrival_ns, self._scales))
            self._values = []

    def _give(self) -> list[Event]:
        self._flush()
        events, self._events = self._events, []
        merged: list[Event] = []
        for event in events:
            last = merged[-1] if merged else None
            if isinstance(event, Missing) and isinstance(last, Missing):
                merged[-1] = Missing(event.signal, last.index, last.count + event.count)
            else:
                merged.append(event)
        return merged


class AuxTrack:
    """The auxiliary inputs in analog or digital mode, raw: 250 Hz, a sample a packet.

    A packet whose stop byte says that it carries something else reads 0 and has all bits of `quality` set.
    """

    def __init__(self, mode: str) -> None:
        """`mode`: a key of `AUX_CHANNELS`."""
        channels = AUX_CHANNELS[mode]
        scale = ANALOG_FULL_SCALE if mode == "analog" else None
        self.spec = SignalSpec(AUX, float(PACKETS_PER_S), channels, ("1",) * len(channels), full_scale=scale)
        self._scales = dict.fromkeys(channels, 1.0)
        self._analog = mode == "analog"

    def take(self, run: Run) -> list[Event]:
        """See `Track`."""
        frames = np.frombuffer(b"".join(run.packets), dtype=np.uint8).reshape(-1, PACKET_BYTES)
        other = frames[:, PACKET_BYTES - 1] != STOP_RAW
        table: NDArray[np.int32]
        if self._analog:
            table = np.ascontiguousarray(frames[:, 26:32]).view(">i2").astype(np.int32)
        else:
            table = frames[:, _DIGITAL_BYTES].astype(np.int32)
        table[other] = 0
        columns: dict[str, Column] = {name: table[:, column].copy() for column, name in enumerate(self.spec.channels)}
        columns[QUALITY] = other * np.int64((1 << len(self.spec.channels)) - 1)
        lost: list[Event] = [Missing(AUX, run.index - run.lost, run.lost)] if run.lost else []
        return [*lost, Samples(AUX, run.index, columns, run.arrival_ns, self._scales)]

    def finish(self) -> list[Event]:
        """Nothing is held."""
        return []
