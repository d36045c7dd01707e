"""A virtual Muse 2016, Muse 2 or Muse S: plays a recording as the exact 12-bit packets, with PPG, motion, telemetry.

Written from the device's side (muse-lsl `muse.py`, muse-js), without the decoder's code. Knows no D-Bus and no radio.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from gateway.virtual.muse_headband import KEEP_ALIVE_S, MuseHeadband, data_uuid
from gateway.virtual.recordings import MUSE_RATE_HZ, Recording, resample
from gateway.virtual.synthetic import synthetic_headset
from gateway.virtual.wearer import Wearer

MONTAGE = ("TP9", "AF7", "AF8", "TP10")
SYNTHETIC_S = 60.0
"""Length of the recording that plays when none is given."""
TELEMETRY_PERIOD_S = 10.0
PPG_RATE_HZ = 64.0
MOTION_RATE_HZ = 52.0
COUNTER_PERIOD = 65_536

_AUX_NAMES = ("aux", "right aux")
_UUIDS = {name: data_uuid(short) for name, short in zip((*MONTAGE, "AUX"), range(0x03, 0x08), strict=True)}
EEG_ORDER = tuple(_UUIDS[name] for name in ("AUX", "TP10", "AF8", "TP9", "AF7"))
"""The order in which a Muse sends the electrodes of one instant (muse-lsl, `_handle_eeg`)."""
GYRO_UUID, ACCELERATION_UUID, TELEMETRY_UUID = (data_uuid(short) for short in (0x09, 0x0A, 0x0B))
PPG_UUIDS = tuple(data_uuid(short) for short in (0x0F, 0x10, 0x11))
_UNUSED_UUIDS = (data_uuid(0x02), data_uuid(0x08))
"""Left aux and reference: there, and silent."""
_PPG_LEVELS = ((180_000, 300), (1_450_000, -24_000), (910_000, -11_000))
"""Ambient, infrared, red: counts at rest, and what a pulse adds: blood swallows light."""


class Model(Enum):
    """What differs, as far as it can be seen over the air."""

    MUSE_2016 = "Muse 2016"
    MUSE_2 = "Muse 2"
    MUSE_S = "Muse S"

    @property
    def presets(self) -> tuple[str, ...]:
        """Those that it knows."""
        return {"Muse 2016": ("p20", "p21"), "Muse 2": ("p20", "p21", "p50")}.get(
            self.value, ("p20", "p21", "p50", "p61")
        )

    @property
    def uuids(self) -> tuple[str, ...]:
        """Its characteristics beside control."""
        common = (*_UNUSED_UUIDS, *_UUIDS.values(), GYRO_UUID, ACCELERATION_UUID, TELEMETRY_UUID)
        if self is Model.MUSE_2016:
            return common
        return (*common, *PPG_UUIDS, *((data_uuid(0x12),) if self is Model.MUSE_S else ()))


def fit_to_muse(recording: Recording) -> Recording:
    """The recording as a Muse can play it: 256 Hz, in the order TP9, AF7, AF8, TP10 and, where there is one, AUX.

    Channels are taken by name if those four are there, else the first four or five of the file.
    """
    places = {name.casefold(): column for column, name in reversed(list(enumerate(recording.channel_names)))}
    if all(name.casefold() in places for name in MONTAGE):
        columns = [places[name.casefold()] for name in MONTAGE]
        columns += [places[name] for name in _AUX_NAMES if name in places][:1]
    else:
        columns = list(range(min(len(recording.channel_names), len(_UUIDS))))
    uv = recording.uv[:, columns]
    if recording.rate_hz != MUSE_RATE_HZ:
        uv = resample(uv, recording.rate_hz, MUSE_RATE_HZ)
    return Recording(tuple((*MONTAGE, "AUX")[: len(columns)]), MUSE_RATE_HZ, uv)


@dataclass(slots=True)
class _Stream:
    """Packets of one kind: number k is due when its last sample was taken."""

    packet_s: float
    packets: Callable[[int], Sequence[tuple[str, bytes]]]
    """Takes the packet's number; gives characteristic and body for each part."""
    next: int = 0

    @property
    def due_s(self) -> float:
        return (self.next + 1) * self.packet_s


class VirtualMuse(MuseHeadband):
    """The headband. The recording goes on in real time from when it is switched on, and loops at its end.

    Electrodes that the recording does not have read the middle, 0 uV.
    """

    def __init__(
        self,
        recording: Recording | None = None,
        address: str = "00:55:DA:B0:10:01",
        name: str = "Muse-1001",
        *,
        model: Model = Model.MUSE_2,
        seed: int = 1,
        battery_pct: float = 82.0,
        keep_alive_s: float | None = KEEP_ALIVE_S,
        first_counter: int = 0,
        speed: float = 1.0,
    ) -> None:
        """`first_counter`: what each stream's counter begins with at every start, to see it wrap soon."""
        super().__init__(
            address,
            name,
            model.uuids,
            model.presets,
            seed=seed,
            battery_pct=battery_pct,
            keep_alive_s=keep_alive_s,
            speed=speed,
        )
        if recording is None:
            recording = synthetic_headset(SYNTHETIC_S, seed=seed, electrodes=MONTAGE, rate_hz=MUSE_RATE_HZ)
        self.recording = fit_to_muse(recording)
        self.first_row = 0
        """Row of the recording that the first sample since the last start has."""
        self.first_counter = first_counter
        self._wearer = Wearer(seed)
        self._started_s = 0.0
        self._streams: list[_Stream] = []
        self._raw = _digitised(self.recording.uv)

    def raw_of(self, sample_number: int) -> NDArray[np.int64]:
        """int64 (5,): the 12-bit values of this sample since the last start: TP9, AF7, AF8, TP10, AUX."""
        values: NDArray[np.int64] = self._raw[(self.first_row + sample_number) % len(self._raw)]
        return values

    def _begin(self) -> None:
        self._started_s = self.time_s
        self.first_row = round(self.time_s * MUSE_RATE_HZ) % len(self._raw)
        self._streams = [
            _Stream(12 / MUSE_RATE_HZ, self._eeg),
            _Stream(3 / MOTION_RATE_HZ, self._acceleration),
            _Stream(3 / MOTION_RATE_HZ, self._gyro),
            _Stream(TELEMETRY_PERIOD_S, self._telemetry),
        ]
        if self.preset in ("p50", "p61"):
            self._streams.append(_Stream(6 / PPG_RATE_HZ, self._ppg))

    def _due_s(self) -> float:
        return self._started_s + min(stream.due_s for stream in self._streams)

    def _notify_due(self) -> None:
        stream = min(self._streams, key=lambda stream: stream.due_s)
        counter = ((self.first_counter + stream.next) % COUNTER_PERIOD).to_bytes(2, "big")
        for uuid, body in stream.packets(stream.next):
            self.notify(uuid, counter + body)
        stream.next += 1

    def _times_s(self, number: int, count: int, rate_hz: float) -> NDArray[np.float64]:
        return self._started_s + (number * count + np.arange(count)) / rate_hz

    def _eeg(self, number: int) -> Sequence[tuple[str, bytes]]:
        rows = (self.first_row + number * 12 + np.arange(12)) % len(self._raw)
        bodies = {uuid: _pack_12_bit(self._raw[rows, column]) for column, uuid in enumerate(_UUIDS.values())}
        without = () if self.preset in ("p20", "p50") else (_UUIDS["AUX"],)
        return [(uuid, bodies[uuid]) for uuid in EEG_ORDER if uuid not in without]

    def _ppg(self, number: int) -> Sequence[tuple[str, bytes]]:
        pulse = self._wearer.pulse(self._times_s(number, 6, PPG_RATE_HZ))
        packets = []
        for uuid, (rest, beat) in zip(PPG_UUIDS, _PPG_LEVELS, strict=True):
            values = np.rint(rest + beat * pulse).astype(np.int64)
            packets.append((uuid, b"".join(int(value).to_bytes(3, "big") for value in values)))
        return packets

    def _acceleration(self, number: int) -> Sequence[tuple[str, bytes]]:
        g = self._wearer.acceleration_g(self._times_s(number, 3, MOTION_RATE_HZ))
        return [(ACCELERATION_UUID, _int16(g / 2 * 32_768))]

    def _gyro(self, number: int) -> Sequence[tuple[str, bytes]]:
        rate = self._wearer.gyro_deg_per_s(self._times_s(number, 3, MOTION_RATE_HZ))
        return [(GYRO_UUID, _int16(rate / 245 * 32_768))]

    def _telemetry(self, _number: int) -> Sequence[tuple[str, bytes]]:
        gauge_mv, converter_mv, temperature_c = 4083, 3967, 27
        charge = round(self.battery_pct * 512)
        values = struct.pack(">4H", charge, round(gauge_mv / 2.2), converter_mv, temperature_c)
        return [(TELEMETRY_UUID, values + bytes(10))]


def _digitised(uv: NDArray[np.float64]) -> NDArray[np.int64]:
    """int64 (n, 5): 12-bit values of 125/256 uV around 2048, saturated at both ends."""
    raw = np.full((len(uv), len(_UUIDS)), 2048, dtype=np.int64)
    raw[:, : uv.shape[1]] = np.clip(np.rint(uv * (256 / 125)) + 2048, 0, 4095)
    return raw


def _pack_12_bit(values: NDArray[np.int64]) -> bytes:
    """Two values in three bytes, most significant bit first."""
    packed = 0
    for value in values:
        packed = packed << 12 | int(value)
    return packed.to_bytes(len(values) * 12 // 8, "big")


def _int16(values: NDArray[np.float64]) -> bytes:
    return np.clip(np.rint(values), -(2**15), 2**15 - 1).astype(">i2").tobytes()
