"""A virtual Muse S Athena: plays a recording in tagged blocks, with optics, motion and battery.

Written from the device's side (muse-lsl `athena.py`; sizes, order and rates from OpenMuse's captures), without the
decoder's code. Knows no D-Bus and no radio.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gateway.virtual.muse import MONTAGE, SYNTHETIC_S, fit_to_muse
from gateway.virtual.muse_headband import MuseHeadband, data_uuid
from gateway.virtual.recordings import MUSE_RATE_HZ, Recording
from gateway.virtual.synthetic import synthetic_headset
from gateway.virtual.wearer import Wearer

DATA_UUID = data_uuid(0x13)
OTHER_DATA_UUID = data_uuid(0x14)
PACKET_BYTES_MAX = 244
"""An MTU of 247 less the header of a notification."""
OPTICS_RATE_HZ = 64.0
MOTION_RATE_HZ = 52.0
BATTERY_PERIOD_S = 1.0
REFERENCE_PERIOD_S = 0.192
"""Tag 0x53 comes 5.2 times a second; what it holds is not known."""

_PLAIN = ("p20", "p21", "p50", "p51", "p60", "p61")
PRESETS = {
    **dict.fromkeys(_PLAIN, (4, 0)),
    "p1034": (4, 8),
    "p1035": (4, 4),
    "p1041": (8, 16),
    "p1042": (8, 16),
    "p1043": (8, 8),
    "p1044": (8, 8),
    "p1045": (8, 4),
    "p1046": (8, 4),
    "p4129": (8, 4),
}
"""Channels of EEG and of optics."""
_EEG_TAGS = {4: (0x11, 4), 8: (0x12, 2)}
"""By channels: tag, samples in a block."""
_OPTICS_TAGS = {4: (0x34, 3), 8: (0x35, 2), 16: (0x36, 1)}


@dataclass(slots=True)
class _Blocks:
    """Blocks of one tag: number k is due when its last sample was taken."""

    tag: int
    block_s: float
    data: Callable[[int], bytes]
    """Takes the block's number."""
    next: int = 0

    @property
    def due_s(self) -> float:
        return (self.next + 1) * self.block_s


class VirtualMuseAthena(MuseHeadband):
    """The headband. The recording goes on in real time from when it is switched on, and loops at its end.

    Electrodes that the recording does not have read the middle, 0 uV. It is not known to need a keep-alive.
    """

    START_COMMAND = "dc001"
    STARTS_NEEDED = 2

    def __init__(
        self,
        recording: Recording | None = None,
        address: str = "00:55:DA:B9:10:02",
        name: str = "MuseS-1002",
        *,
        seed: int = 1,
        battery_pct: float = 82.0,
        speed: float = 1.0,
    ) -> None:
        uuids = (DATA_UUID, OTHER_DATA_UUID)
        super().__init__(
            address, name, uuids, PRESETS, seed=seed, battery_pct=battery_pct, keep_alive_s=None, speed=speed
        )
        if recording is None:
            recording = synthetic_headset(SYNTHETIC_S, seed=seed, electrodes=MONTAGE, rate_hz=MUSE_RATE_HZ)
        self.recording = fit_to_muse(recording)
        self.first_row = 0
        """Row of the recording that the first sample since the last start has."""
        self.unknown_tag_every = 0
        """Fault: every so many packets end in a block that nobody knows. 0: none."""
        self._wearer = Wearer(seed)
        self._started_s = 0.0
        self._kinds: list[_Blocks] = []
        self._packet = b""
        self._packets = 0
        self._raw = _digitised(self.recording.uv)

    def raw_of(self, sample_number: int) -> NDArray[np.int64]:
        """int64 (8,): the 14-bit values of this sample since the last start: TP9, AF7, AF8, TP10, AUX1 to AUX4."""
        values: NDArray[np.int64] = self._raw[(self.first_row + sample_number) % len(self._raw)]
        return values

    def _identity(self) -> dict[str, object]:
        return {**super()._identity(), "hw": "10.0", "fw": "3.1.6"}

    def _begin(self) -> None:
        self._started_s = self.time_s
        self.first_row = round(self.time_s * MUSE_RATE_HZ) % len(self._raw)
        self._packet, self._packets = b"", 0
        electrodes, optics = PRESETS[self.preset]
        tag, samples = _EEG_TAGS[electrodes]
        self._kinds = [
            _Blocks(0x47, 3 / MOTION_RATE_HZ, self._motion),
            _Blocks(tag, samples / MUSE_RATE_HZ, lambda number: self._eeg(number, electrodes, samples)),
            _Blocks(0x53, REFERENCE_PERIOD_S, lambda _number: bytes(24)),
            _Blocks(
                0x98, BATTERY_PERIOD_S, lambda _number: struct.pack("<H", round(self.battery_pct * 512)) + bytes(18)
            ),
        ]
        if optics:
            optics_tag, count = _OPTICS_TAGS[optics]
            optical = _Blocks(optics_tag, count / OPTICS_RATE_HZ, lambda number: self._optics(number, optics, count))
            self._kinds.append(optical)

    def _due_s(self) -> float:
        return self._started_s + min(kind.due_s for kind in self._kinds)

    def _notify_due(self) -> None:
        """Put the block that is due into the packet; a full packet goes out first."""
        kind = min(self._kinds, key=lambda kind: kind.due_s)
        data = kind.data(kind.next)
        counter = kind.next % 256
        kind.next += 1
        if self._packet and len(self._packet) + 5 + len(data) > PACKET_BYTES_MAX:
            self._send_packet()
        if self._packet:
            self._packet += bytes((kind.tag, counter, 0, 0, 0)) + data
            return
        clock_ms = round(self.time_s * 1000) % 2**32
        header = struct.pack("<BHIBBBB3x", 0, self._packets % 65_536, clock_ms, 0x93, 0x01, kind.tag, counter)
        self._packet = header + data

    def _send_packet(self) -> None:
        packet, self._packet = self._packet, b""
        self._packets += 1
        if self.unknown_tag_every and self._packets % self.unknown_tag_every == 0:
            packet += b"\xee" + bytes(8)
        self.notify(DATA_UUID, bytes((len(packet),)) + packet[1:])

    def _times_s(self, number: int, count: int, rate_hz: float) -> NDArray[np.float64]:
        return self._started_s + (number * count + np.arange(count)) / rate_hz

    def _eeg(self, number: int, electrodes: int, samples: int) -> bytes:
        rows = (self.first_row + number * samples + np.arange(samples)) % len(self._raw)
        return _pack_low_first(self._raw[rows, :electrodes].ravel().tolist(), 14)

    def _optics(self, number: int, channels: int, samples: int) -> bytes:
        pulse = self._wearer.pulse(self._times_s(number, samples, OPTICS_RATE_HZ))
        rest = 200_000 + 30_000 * np.arange(channels)
        values = np.rint(rest * (1 - 0.012 * pulse[:, None])).astype(np.int64)
        return _pack_low_first(values.ravel().tolist(), 20)

    def _motion(self, number: int) -> bytes:
        times_s = self._times_s(number, 3, MOTION_RATE_HZ)
        # The gyroscope is mounted the other way round.
        g, rate = self._wearer.acceleration_g(times_s), -self._wearer.gyro_deg_per_s(times_s)
        both = np.concatenate([g / 2, rate / 245], axis=1) * 32_768
        counts: NDArray[np.int16] = np.clip(np.rint(both), -(2**15), 2**15 - 1).astype("<i2")
        return counts.tobytes()


def _digitised(uv: NDArray[np.float64]) -> NDArray[np.int64]:
    """int64 (n, 8): 14-bit values of 1450/16383 uV around 8192, saturated at both ends."""
    raw = np.full((len(uv), 8), 8192, dtype=np.int64)
    raw[:, : uv.shape[1]] = np.clip(np.rint(uv * (16_383 / 1450)) + 8192, 0, 16_383)
    return raw


def _pack_low_first(values: Sequence[int], bits: int) -> bytes:
    """Values of so many bits, least significant bit first."""
    packed = 0
    for place, value in enumerate(values):
        packed |= value << (place * bits)
    return packed.to_bytes(len(values) * bits // 8, "little")
