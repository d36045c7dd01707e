"""What pulse oximeters on serial lines share: the names of their signals, and how often unchanged values are told."""

from __future__ import annotations

from collections.abc import Mapping

from gateway.devices.base import Event, NoValue, Reading
from gateway.samples import VITAL_SIGNS

PPG = "ppg"
PLETH = "pleth"
"""The one channel of an oximeter's plethysmogram."""
PLETH_SCALES = {PLETH: 1.0}
"""A pleth has no unit: its counts are its values."""
HEART_RATE = "heart_rate"
SPO2 = "spo2"
PERFUSION_INDEX = "perfusion_index"


class Pace:
    """Values that stand in every frame, told when they change and once a second."""

    def __init__(self, frames_per_s: int) -> None:
        self._frames_per_s = frames_per_s
        self._told: tuple[Mapping[str, float], str] | None = None
        self._frames_since = 0

    def take(self, fields: Mapping[str, float], trouble: str, byte_count: int, arrival_ns: int) -> list[Event]:
        """`trouble`: why the fields are no values; empty: they are."""
        self._frames_since += 1
        if self._told == (fields, trouble) and self._frames_since < self._frames_per_s:
            return []
        self._told, self._frames_since = (fields, trouble), 0
        return [NoValue(byte_count, trouble) if trouble else Reading(VITAL_SIGNS, fields, arrival_ns)]
