"""What is known of a boot's time: UTC minus the time since boot, at one instant, with its error bound."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

DRIFT_PPM = 100
"""How far a host's crystal may be off its nominal rate: those of the Raspberry Pi are good to 50, heat included."""
PPM = 1_000_000
UNSEEN_ERROR_NS = 100_000
"""Of each anchor: what may drift in the second until clocks are looked at again."""


class Source(StrEnum):
    """Who knows the time."""

    NTP = "ntp"
    """The kernel's clock, which a time service disciplines."""
    BRIDGE = "bridge"
    """A bridge, asked over MQTT."""
    NONE = "none"
    """Nobody: the clock is as it was found."""


@dataclass(frozen=True, slots=True)
class Anchor:
    """UTC minus boot time, and how far it may be wrong at boot time `at_ns`. All in ns."""

    offset_ns: int
    error_ns: int
    at_ns: int
    source: Source

    def error_at(self, boot_ns: int) -> int:
        """Its error at another instant of the same boot, before or after: the crystal drifts meanwhile."""
        return self.error_ns + abs(boot_ns - self.at_ns) * DRIFT_PPM // PPM
