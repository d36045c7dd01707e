"""Decoder of the Muse S Athena (2025): packets of tagged blocks, all sensors mixed on two characteristics.

Sans-IO: notifications come as chunks, `channel` says which characteristic.
Sources: muse-lsl `athena.py`, BrainFlow `muse_athena.cpp` (format, scales), OpenMuse `decode.py` and its captures of
all presets: what a preset gives, and that each tag counts its own blocks modulo 256 without a gap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from gateway.devices.base import Event, Facts, Missing, Rejected, Samples, SignalSpec
from gateway.devices.muse import (
    ACCELERATION_G_PER_COUNT,
    EEG_RATE_HZ,
    ELECTRODES,
    GYRO,
    GYRO_DEG_PER_S_PER_COUNT,
    MOTION_RATE_HZ,
)
from gateway.devices.muse_control import CONTROL, Conversation, Step, uuid_of
from gateway.devices.muse_packets import WINDOW, PacketCounter, Strangers
from gateway.devices.packets import little_values
from gateway.errors import ConfigError
from gateway.links.base import Chunk
from gateway.samples import ACCELERATION, EEG, NS_PER_S

DATA_UUIDS = (uuid_of(0x0013), uuid_of(0x0014))
AUX_ELECTRODES = ("AUX1", "AUX2", "AUX3", "AUX4")
OPTICS = "optics"
OPTICS_CHANNELS = (
    *("LO_NIR", "RO_NIR", "LO_IR", "RO_IR", "LI_NIR", "RI_NIR", "LI_IR", "RI_IR"),
    *("LO_RED", "RO_RED", "LO_AMB", "RO_AMB", "LI_RED", "RI_RED", "LI_AMB", "RI_AMB"),
)
"""Left or right, outer or inner, colour (OpenMuse). Of four channels, these are the inner ones, 5 to 8 (OpenMuse,
muse-lsl; BrainFlow now counts them from 1)."""

HEADER_BYTES = 14
BLOCK_HEADER_BYTES = 5
EEG_MIDDLE = 8192
EEG_MICROVOLTS_PER_COUNT = 1450 / 16383
OPTICS_RATE_HZ = 64.0
PACKET_PERIOD_NS_MIN = NS_PER_S // 120
"""The busiest preset, p1041, sends 37 packets a second; three times that is no real counter."""
BATTERY_PCT_PER_COUNT = (1 / 512, 1 / 256)
"""BrainFlow and muse-lsl read the first, OpenMuse the second; the status reply, in whole %, tells which it is."""
BLOCK_COUNTER_PERIOD = 256
BLOCKS_AHEAD_MAX = 64
"""How far a block counter may be from what the packet counter lets expect: a quarter of its period."""
LEARNING_PACKETS = 16
"""So many packets weigh as much as what was known of the ratio of blocks to packets beforehand."""
PACKET_CONTENT_BYTES = 216
"""Bytes of blocks in a packet, 214 to 218 on average in the captures of all presets."""
OTHER_BYTES_PER_S = 175.0
"""Of the blocks that every preset has, 0x53 and the battery."""


@dataclass(frozen=True, slots=True)
class Preset:
    """How many channels a Muse S Athena sends under a preset, beside acceleration, gyro and battery."""

    electrodes: int
    optics: int


PRESETS = {
    **dict.fromkeys(("p20", "p21", "p50", "p51", "p60", "p61"), Preset(4, 0)),
    "p1034": Preset(4, 8),
    "p1035": Preset(4, 4),
    **dict.fromkeys(("p1041", "p1042"), Preset(8, 16)),
    **dict.fromkeys(("p1043", "p1044"), Preset(8, 8)),
    **dict.fromkeys(("p1045", "p1046", "p4129"), Preset(8, 4)),
}
DEFAULT_PRESET = "p1034"
"""Optics, and no auxiliary electrodes: those float unless something is plugged in, and would spoil the features."""


def eeg_counts(data: bytes, channels: int) -> NDArray[np.int32]:
    """int32 (channels, samples): 14-bit values, least significant bit first, less the middle of 8192."""
    return little_values(data, 14).reshape(-1, channels).T - EEG_MIDDLE


def optics_counts(data: bytes, channels: int) -> NDArray[np.int32]:
    """int32 (channels, samples): unsigned 20-bit values, least significant bit first."""
    return little_values(data, 20).reshape(-1, channels).T


def motion_counts(data: bytes, channels: int) -> NDArray[np.int32]:
    """int32 (6, 3): acceleration X, Y, Z, then rotation X, Y, Z."""
    return np.frombuffer(data, dtype="<i2").reshape(-1, channels).T.astype(np.int32)


@dataclass(frozen=True, slots=True)
class Layout:
    """What the blocks of one tag hold."""

    data_bytes: int | None
    """None: all that is left of the packet."""
    signals: tuple[str, ...] = ()
    """Which share its channels evenly."""
    channels: int = 0
    samples: int = 0
    counts: Callable[[bytes, int], NDArray[np.int32]] = motion_counts


BATTERY_TAGS = (0x98, 0x88)
LAYOUTS: Mapping[int, Layout] = {
    0x11: Layout(28, (EEG,), 4, 4, eeg_counts),
    0x12: Layout(28, (EEG,), 8, 2, eeg_counts),
    0x34: Layout(30, (OPTICS,), 4, 3, optics_counts),
    0x35: Layout(40, (OPTICS,), 8, 2, optics_counts),
    0x36: Layout(40, (OPTICS,), 16, 1, optics_counts),
    0x47: Layout(36, (ACCELERATION, GYRO), 6, 3, motion_counts),
    0x53: Layout(24),
    0x88: Layout(None),
    0x98: Layout(20),
}
"""0x53 has no known meaning; 0x88 is the battery of newer firmware, with some 200 bytes more behind it."""


@dataclass(frozen=True, slots=True)
class Block:
    """One sensor's part of a packet."""

    tag: int
    counter: int
    data: bytes


class MuseAthenaDecoder:
    """Decoder of one connection to one Muse S Athena (see `gateway.devices.base.Decoder`).

    Signals: `eeg` in microvolts, `optics` in the sensor's own counts, `acceleration` in g, `gyro` in degrees/s,
    battery as `Facts`. Loss is counted for each signal by its own block counter.
    """

    NOTIFY: ClassVar[tuple[str, ...]] = (CONTROL, *DATA_UUIDS)
    """Characteristics to subscribe to."""

    def __init__(self, electrodes: Sequence[str] | None = None, preset: str = DEFAULT_PRESET) -> None:
        """`electrodes`: names for TP9, AF7, AF8, TP10 and, with eight, AUX1 to AUX4. Raises `ConfigError`."""
        if preset not in PRESETS:
            raise ConfigError(f"preset {preset!r} of a Muse S Athena: expected one of {', '.join(PRESETS)}")
        chosen = PRESETS[preset]
        names = tuple(electrodes or (*ELECTRODES, *AUX_ELECTRODES)[: chosen.electrodes])
        if len(names) != chosen.electrodes or len(set(names)) != len(names) or "" in names:
            raise ConfigError(f"a Muse S Athena has {chosen.electrodes} electrodes with {preset}, not {names}")
        questions = (Step("v6", "fw"), Step("s", "bp"))
        # Known from recorded sessions: the start command works only when it is given twice.
        orders = (Step("h"), Step(preset), Step("s", "bp"), Step("dc001"), Step("dc001"))
        self._control = Conversation((*questions, *orders), "Muse S Athena", preset)
        self._specs = {spec.signal: spec for spec in _specs(names, chosen.optics)}
        self._blocks_per_packet = _blocks_per_packet(self._specs)
        self._streams: dict[int, _BlockStream] = {}
        self._orders = {uuid: _PacketOrder() for uuid in DATA_UUIDS}
        self._packets = 0

    @property
    def signals(self) -> Sequence[SignalSpec]:
        """EEG at 256 Hz, acceleration and gyro at 52 Hz, and optics at 64 Hz where the preset has it."""
        return tuple(self._specs.values())

    def start(self) -> list[Event]:
        """Ask what device this is."""
        return self._control.start()

    def receive(self, chunk: Chunk) -> list[Event]:
        """Decode one notification.

        Raises `DeviceError` when the Muse refuses the start sequence or begins to count anew by itself.
        """
        if chunk.channel == CONTROL:
            return self._control.receive(chunk)
        order = self._orders.get(chunk.channel)
        if order is None:
            return [Rejected(len(chunk.data), f"unexpected characteristic {chunk.channel or '(none named)'}")]
        if not self._control.done:
            # Left over from an earlier connection; its counters have nothing to do with what will come.
            return [Rejected(len(chunk.data), "data before the start sequence was through")]
        events: list[Event] = []
        for packet in _packets(chunk.data, events):
            for ready in order.receive(Chunk(packet, chunk.arrival_ns), events):
                self._packets += ready.steps
                for block in _blocks(ready.packet, events):
                    events += self._decode(block, ready.arrival_ns)
        return events

    def _decode(self, block: Block, arrival_ns: int) -> list[Event]:
        if block.tag in BATTERY_TAGS:
            return [self._battery(block.data)]
        layout = LAYOUTS[block.tag]
        if not layout.signals:
            return []
        ratio = self._blocks_per_packet.get(block.tag)
        if ratio is None:
            return [Rejected(len(block.data), f"blocks 0x{block.tag:02x} are not what the preset gives")]
        stream = self._streams.get(block.tag)
        if stream is None:
            specs = [self._specs[signal] for signal in layout.signals]
            stream = self._streams[block.tag] = _BlockStream(layout, specs, ratio, self._packets)
        return stream.receive(block, self._packets, arrival_ns)

    def _battery(self, data: bytes) -> Event:
        count = int.from_bytes(data[:2], "little")
        said_pct = self._control.battery_pct
        readings = [count * scale for scale in BATTERY_PCT_PER_COUNT]
        battery_pct = readings[0] if said_pct is None else min(readings, key=lambda pct: abs(pct - said_pct))
        if len(data) < 2 or battery_pct > 100:
            return Rejected(len(data), "battery block without a charge of 0 to 100 %")
        return Facts(battery_pct=battery_pct)


@dataclass(frozen=True, slots=True)
class _Ready:
    packet: bytes
    arrival_ns: int
    steps: int
    """Of the packet counter since the packet before."""


class _PacketOrder:
    """Puts the packets of one characteristic in the order of their counter; what comes too late is rejected."""

    def __init__(self) -> None:
        self._counter = PacketCounter(16, PACKET_PERIOD_NS_MIN)
        self._strangers = Strangers("Muse S Athena")
        self._held: dict[int, Chunk] = {}
        self._next = 0

    def receive(self, chunk: Chunk, events: list[Event]) -> list[_Ready]:
        number = self._counter.number(int.from_bytes(chunk.data[1:3], "little"), chunk.arrival_ns)
        if number is None or number < self._next:
            events.append(self._strangers.reject(chunk.data))
            return []
        if number in self._held:
            events.append(Rejected(len(chunk.data), "repeated Muse S Athena packet"))
            return []
        self._strangers.fits(chunk.data)
        self._held[number] = chunk
        ready: list[_Ready] = []
        while self._held:
            first = min(self._held)
            if first != self._next and self._counter.newest - first + 1 < WINDOW:
                break
            held = self._held.pop(first)
            ready.append(_Ready(held.data, held.arrival_ns, first - self._next + 1))
            self._next = first + 1
        return ready


class _BlockStream:
    """The blocks of one tag.

    Their counter has 8 bits, 2 s of EEG at its fastest. How often it came round during a loss, the packet counter
    tells: blocks and packets keep a steady ratio, which is roughly known and then learned from what came.
    """

    def __init__(self, layout: Layout, specs: Sequence[SignalSpec], ratio: float, packets: int) -> None:
        """`ratio`: blocks in a packet, roughly. `packets`: the packet counter's steps so far, as in `receive`."""
        self._ratio = ratio
        self._layout = layout
        self._specs = specs
        self._scales = [dict.fromkeys(spec.channels, _SCALES[spec.signal]) for spec in specs]
        self._strangers = Strangers("/".join(spec.signal for spec in specs))
        self._begun_at = self._packets = packets
        self._newest: int | None = None
        self._blocks = 0

    def receive(self, block: Block, packets: int, arrival_ns: int) -> list[Event]:
        """Samples of the block, after what is missing before it."""
        steps = 1
        if self._newest is not None:
            expected = self._expected(packets)
            steps = (block.counter - self._newest) % BLOCK_COUNTER_PERIOD
            steps += BLOCK_COUNTER_PERIOD * max(0, round((expected - steps) / BLOCK_COUNTER_PERIOD))
            if not steps or steps - expected > BLOCKS_AHEAD_MAX:
                return [self._strangers.reject(block.data)]
        self._strangers.fits(block.data)
        self._newest, self._packets = block.counter, packets
        index = self._blocks * self._layout.samples
        lost = (steps - 1) * self._layout.samples
        self._blocks += steps
        events: list[Event] = [Missing(spec.signal, index, lost) for spec in self._specs] if lost else []
        counts = self._layout.counts(block.data, self._layout.channels)
        first = 0
        for spec, scales in zip(self._specs, self._scales, strict=True):
            columns = {name: counts[first + number] for number, name in enumerate(spec.channels)}
            first += len(spec.channels)
            events.append(Samples(spec.signal, index + lost, columns, arrival_ns, scales))
        return events

    def _expected(self, packets: int) -> float:
        """Blocks that should have come since the last one."""
        came = self._packets - self._begun_at
        ratio = (LEARNING_PACKETS * self._ratio + self._blocks) / (LEARNING_PACKETS + came)
        return (packets - self._packets) * ratio


def _packets(data: bytes, events: list[Event]) -> Iterator[bytes]:
    """The packets that a notification is made of; what does not add up is rejected to its end."""
    at = 0
    while at < len(data):
        end = at + data[at]
        if data[at] < HEADER_BYTES or end > len(data):
            events.append(Rejected(len(data) - at, "not a whole Muse S Athena packet"))
            return
        yield data[at:end]
        at = end
    if not data:
        events.append(Rejected(0, "empty notification"))


def _blocks(packet: bytes, events: list[Event]) -> Iterator[Block]:
    """The blocks of a packet, up to the first one that has no known tag or is cut."""
    tag, counter, at = packet[9], packet[10], HEADER_BYTES
    header_at = 0
    while True:
        layout = LAYOUTS.get(tag)
        size = len(packet) - at if layout is None or layout.data_bytes is None else layout.data_bytes
        if layout is None or at + size > len(packet):
            reason = f"unknown tag 0x{tag:02x}" if layout is None else f"block 0x{tag:02x} is cut"
            events.append(Rejected(len(packet) - header_at, reason))
            return
        yield Block(tag, counter, packet[at : at + size])
        header_at = at + size
        at = header_at + BLOCK_HEADER_BYTES
        if header_at == len(packet):
            return
        if at > len(packet):
            events.append(Rejected(len(packet) - header_at, "bytes behind the last block"))
            return
        tag, counter = packet[header_at], packet[header_at + 1]


_SCALES = {
    EEG: EEG_MICROVOLTS_PER_COUNT,
    OPTICS: 1.0,
    ACCELERATION: ACCELERATION_G_PER_COUNT,
    # The Athena's gyroscope is mounted the other way round (muse-lsl, BrainFlow, OpenMuse).
    GYRO: -GYRO_DEG_PER_S_PER_COUNT,
}


def _blocks_per_packet(specs: Mapping[str, SignalSpec]) -> dict[int, float]:
    """For each tag that carries these signals: how many of its blocks there are in a packet on average."""
    rates_hz: dict[int, float] = {}
    bytes_per_s = OTHER_BYTES_PER_S
    for tag, layout in LAYOUTS.items():
        carried = [specs[signal] for signal in layout.signals if signal in specs]
        if not carried or sum(len(spec.channels) for spec in carried) != layout.channels:
            continue
        rates_hz[tag] = (carried[0].rate_hz or 0.0) / layout.samples
        bytes_per_s += rates_hz[tag] * (BLOCK_HEADER_BYTES + (layout.data_bytes or 0))
    return {tag: rate_hz * PACKET_CONTENT_BYTES / bytes_per_s for tag, rate_hz in rates_hz.items()}


def _specs(electrodes: tuple[str, ...], optics: int) -> Iterator[SignalSpec]:
    yield SignalSpec(EEG, EEG_RATE_HZ, electrodes, ("uV",) * len(electrodes), (-EEG_MIDDLE, EEG_MIDDLE - 1))
    if optics:
        first = 4 if optics == 4 else 0
        names = OPTICS_CHANNELS[first : first + optics]
        yield SignalSpec(OPTICS, OPTICS_RATE_HZ, names, ("1",) * optics, (0, 2**20 - 1))
    full_scale = (-(2**15), 2**15 - 1)
    yield SignalSpec(ACCELERATION, MOTION_RATE_HZ, ("x", "y", "z"), ("[g]",) * 3, full_scale)
    yield SignalSpec(GYRO, MOTION_RATE_HZ, ("x", "y", "z"), ("deg/s",) * 3, full_scale)
