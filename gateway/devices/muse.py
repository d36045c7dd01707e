"""Decoder of the Muse 2016, Muse 2 and Muse S: a characteristic for each electrode and sensor, 20 bytes a packet.

Sans-IO: notifications come as chunks, `channel` says which characteristic. A signal whose characteristic a model does
not have stays silent. Not for the Muse S Athena, which speaks otherwise.
Sources: muse-lsl `muse.py`, muse-js `muse-parse.ts` (formats, scales), BrainFlow (UUIDs, presets).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from gateway.devices.base import Event, Facts, Rejected, SignalSpec
from gateway.devices.muse_control import CONTROL, Conversation, Step, uuid_of
from gateway.devices.muse_packets import GroupedStream
from gateway.devices.packets import MUSE_BYTES, MUSE_MIDDLE, muse_counts
from gateway.errors import ConfigError
from gateway.links.base import Chunk
from gateway.samples import ACCELERATION, EEG

ELECTRODES = ("TP9", "AF7", "AF8", "TP10")
AUX = "AUX"
"""The right auxiliary input, at the USB socket; floating unless something is plugged in."""

EEG_UUIDS = tuple(uuid_of(short) for short in (0x0003, 0x0004, 0x0005, 0x0006, 0x0007))
"""TP9, AF7, AF8, TP10, right AUX."""
GYRO_UUID = uuid_of(0x0009)
ACCELERATION_UUID = uuid_of(0x000A)
TELEMETRY_UUID = uuid_of(0x000B)
PPG_UUIDS = tuple(uuid_of(short) for short in (0x000F, 0x0010, 0x0011))
"""Ambient, infrared, red."""

PPG = "ppg"
GYRO = "gyro"

PACKET_BYTES = MUSE_BYTES
TELEMETRY_BYTES_MIN = 10
EEG_RATE_HZ = 256.0
EEG_MICROVOLTS_PER_COUNT = 125 / 256
"""2 mV peak to peak on 12 bits."""
EEG_MIDDLE = MUSE_MIDDLE
PPG_RATE_HZ = 64.0
MOTION_RATE_HZ = 52.0
ACCELERATION_G_PER_COUNT = 0.0000610352
GYRO_DEG_PER_S_PER_COUNT = 0.0074768
BATTERY_PCT_PER_COUNT = 1 / 512


@dataclass(frozen=True, slots=True)
class Preset:
    """What a Muse sends under a preset, beside acceleration, gyro and telemetry."""

    aux: bool
    ppg: bool


PRESETS = {
    "p21": Preset(aux=False, ppg=False),
    "p20": Preset(aux=True, ppg=False),
    "p50": Preset(aux=True, ppg=True),
    "p61": Preset(aux=False, ppg=True),
}
"""p50: Muse 2; p61: Muse S (BrainFlow's documentation). A Muse 2016 has no PPG."""
DEFAULT_PRESET = "p21"


def notified(preset: str = DEFAULT_PRESET) -> tuple[str, ...]:
    """Characteristics to subscribe to. Raises `ConfigError` for an unknown preset.

    Control comes first: a Muse that was just switched on may show nothing else until it was halted and connected anew.
    """
    chosen = _preset(preset)
    eeg = EEG_UUIDS if chosen.aux else EEG_UUIDS[: len(ELECTRODES)]
    ppg = PPG_UUIDS if chosen.ppg else ()
    return (CONTROL, *eeg, *ppg, ACCELERATION_UUID, GYRO_UUID, TELEMETRY_UUID)


class MuseDecoder:
    """Decoder of one connection to one Muse (see `gateway.devices.base.Decoder`).

    Signals: `eeg` in microvolts, `acceleration` in g and `gyro` in degrees/s with X Y Z, `ppg` in the sensor's own
    counts, battery as `Facts`. What is `quality` and when a part counts as lost: see `GroupedStream`.
    """

    def __init__(self, electrodes: Sequence[str] | None = None, preset: str = DEFAULT_PRESET) -> None:
        """`electrodes`: names for TP9, AF7, AF8, TP10 and, where the preset has it, AUX. Raises `ConfigError`."""
        chosen = _preset(preset)
        own = (*ELECTRODES, AUX) if chosen.aux else ELECTRODES
        names = tuple(electrodes or own)
        if len(names) != len(own) or len(set(names)) != len(names) or "" in names:
            raise ConfigError(f"a Muse has {len(own)} electrodes with preset {preset}, not {', '.join(names)}")
        self._control = Conversation(
            (Step("h"), Step("v1", "fw"), Step(preset), Step("s", "bp"), Step("d")), "Muse", preset
        )
        self._streams: list[GroupedStream] = []
        self._decoders: dict[str, Callable[[Chunk], list[Event]]] = {TELEMETRY_UUID: _telemetry}
        self._add(_eeg_spec(names), EEG_MICROVOLTS_PER_COUNT, 12, EEG_UUIDS[: len(names)], eeg_counts)
        if chosen.ppg:
            self._add(_PPG_SPEC, 1.0, 6, PPG_UUIDS, ppg_counts)
        self._add(_ACCELERATION_SPEC, ACCELERATION_G_PER_COUNT, 3, (ACCELERATION_UUID,), motion_counts)
        self._add(_GYRO_SPEC, GYRO_DEG_PER_S_PER_COUNT, 3, (GYRO_UUID,), motion_counts)

    @property
    def signals(self) -> Sequence[SignalSpec]:
        """EEG at 256 Hz, acceleration and gyro at 52 Hz, and PPG at 64 Hz where the preset has it."""
        return tuple(stream.spec for stream in self._streams)

    def start(self) -> list[Event]:
        """Halt a stream that may be running, and ask what device this is."""
        return self._control.start()

    def receive(self, chunk: Chunk) -> list[Event]:
        """Decode one notification.

        Raises `DeviceError` when the Muse refuses the start sequence or begins to count anew by itself.
        """
        if chunk.channel == CONTROL:
            events = self._control.receive(chunk)
        elif not self._control.done:
            # Left over from an earlier connection; its counters have nothing to do with what will come.
            events = [Rejected(len(chunk.data), "data before the start sequence was through")]
        else:
            decode = self._decoders.get(chunk.channel)
            unexpected = Rejected(len(chunk.data), f"unexpected characteristic {chunk.channel or '(none named)'}")
            events = [unexpected] if decode is None else decode(chunk)
        return events + self._control.keep_alive(chunk.arrival_ns)

    def _add(
        self,
        spec: SignalSpec,
        scale: float,
        samples_per_packet: int,
        uuids: Sequence[str],
        counts: Callable[[bytes], NDArray[np.int32]],
    ) -> None:
        stream = GroupedStream(spec, scale, parts=len(uuids), samples_per_packet=samples_per_packet)
        self._streams.append(stream)
        for part, uuid in enumerate(uuids):
            self._decoders[uuid] = partial(_packet, stream, part, counts)


def eeg_counts(packet: bytes) -> NDArray[np.int32]:
    """int32 (1, 12): the 12-bit values of one electrode's packet, two in three bytes, less the middle of 2048."""
    return muse_counts(packet)


def ppg_counts(packet: bytes) -> NDArray[np.int32]:
    """int32 (1, 6): unsigned 24-bit values; BrainFlow takes them as signed, muse-lsl and muse-js do not."""
    octets = np.frombuffer(packet, dtype=np.uint8, offset=2).reshape(-1, 3).astype(np.int32)
    return (octets[:, 0] << 16 | octets[:, 1] << 8 | octets[:, 2])[np.newaxis]


def motion_counts(packet: bytes) -> NDArray[np.int32]:
    """int32 (3, 3): X, Y, Z of three samples."""
    return np.frombuffer(packet, dtype=">i2", offset=2).reshape(3, 3).T.astype(np.int32)


def _packet(
    stream: GroupedStream, part: int, counts: Callable[[bytes], NDArray[np.int32]], chunk: Chunk
) -> list[Event]:
    data = chunk.data
    if len(data) != PACKET_BYTES:
        return [Rejected(len(data), f"{stream.spec.signal} packet is not {PACKET_BYTES} bytes long")]
    return stream.receive(part, int.from_bytes(data[:2], "big"), counts(data), data, chunk.arrival_ns)


def _telemetry(chunk: Chunk) -> list[Event]:
    if not TELEMETRY_BYTES_MIN <= len(chunk.data) <= PACKET_BYTES:
        return [Rejected(len(chunk.data), f"telemetry is not {TELEMETRY_BYTES_MIN} to {PACKET_BYTES} bytes long")]
    battery_pct = int.from_bytes(chunk.data[2:4], "big") * BATTERY_PCT_PER_COUNT
    if battery_pct > 100:
        return [Rejected(len(chunk.data), "telemetry with a battery above 100 %")]
    return [Facts(battery_pct=battery_pct)]


def _preset(name: str) -> Preset:
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r} of a Muse: expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def _eeg_spec(names: tuple[str, ...]) -> SignalSpec:
    return SignalSpec(EEG, EEG_RATE_HZ, names, ("uV",) * len(names), (-EEG_MIDDLE, EEG_MIDDLE - 1))


_PPG_SPEC = SignalSpec(PPG, PPG_RATE_HZ, ("ambient", "infrared", "red"), ("1",) * 3, (0, 2**24 - 1))
_ACCELERATION_SPEC = SignalSpec(ACCELERATION, MOTION_RATE_HZ, ("x", "y", "z"), ("[g]",) * 3, (-(2**15), 2**15 - 1))
_GYRO_SPEC = SignalSpec(GYRO, MOTION_RATE_HZ, ("x", "y", "z"), ("deg/s",) * 3, (-(2**15), 2**15 - 1))
