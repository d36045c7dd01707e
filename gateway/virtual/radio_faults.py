"""What can go wrong between a device and its host, by chance but seeded: on the air, or on a serial line."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from gateway.virtual.serial_line import Firmware

GARBAGE_BYTES_MAX = 19
"""Shorter than a whole packet: what has a packet's length and no checksum cannot be told from one."""


@dataclass(slots=True)
class RadioFaults:
    """Each a probability for one notification or packet; may be changed at any time. All 0: everything arrives once."""

    seed: int = 1
    loss: float = 0.0
    duplicates: float = 0.0
    reordering: float = 0.0
    """It comes after the next one of its characteristic."""
    halves: float = 0.0
    """Only its first half arrives."""
    garbage: float = 0.0
    """Random bytes come before it."""
    silent: bool = False
    """Nothing arrives any more, and the link stays up."""
    spared: Collection[str] = ()
    """Characteristics to which nothing of this happens, silence apart."""
    lost: Counter[str] = field(default_factory=Counter)
    """Notifications that did not arrive whole, by characteristic."""
    _random: random.Random = field(init=False)
    _held: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def __call__(self, uuid: str, value: bytes) -> list[bytes]:
        """What arrives of this notification, and of the one that was held back."""
        if self.silent:
            self.lost[uuid] += 1
            return []
        if uuid in self.spared:
            return [value]
        arriving = self._arriving(uuid, value)
        held = self._held.pop(uuid, None)
        if held is not None:
            return [*arriving, held]
        if arriving == [value] and self._happens(self.reordering):
            self._held[uuid] = value
            return []
        return arriving

    def _arriving(self, uuid: str, value: bytes) -> list[bytes]:
        garbage = []
        if self._happens(self.garbage):
            garbage.append(self._random.randbytes(self._random.randint(1, GARBAGE_BYTES_MAX)))
        if self._happens(self.loss):
            self.lost[uuid] += 1
            return garbage
        if self._happens(self.halves):
            self.lost[uuid] += 1
            return [*garbage, value[: len(value) // 2]]
        return [*garbage, value, value] if self._happens(self.duplicates) else [*garbage, value]

    def _happens(self, probability: float) -> bool:
        return self._random.random() < probability


class DistortedFirmware:
    """A serial device whose packets suffer these faults on their way; its answers to commands do not."""

    def __init__(self, firmware: Firmware, faults: RadioFaults) -> None:
        self._firmware = firmware
        self._faults = faults

    @property
    def streaming(self) -> bool:
        """See `Firmware`."""
        return self._firmware.streaming

    def receive(self, data: bytes, now_ns: int) -> bytes:
        """See `Firmware`."""
        return self._firmware.receive(data, now_ns)

    def packets_until(self, now_ns: int) -> list[bytes]:
        """What arrives of the packets that are due."""
        packets = self._firmware.packets_until(now_ns)
        return [arriving for packet in packets for arriving in self._faults("", packet)]
