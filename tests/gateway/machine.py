"""A computer's clocks in simulated time, moved by hand, with the truth beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gateway.clock import HostClock
from gateway.kernel_clock import Discipline
from gateway.samples import NS_PER_S, ClockState

MS = 1_000_000
TRUE_OFFSET_NS = 1_700_000_000 * NS_PER_S + 123_456_789
"""True UTC when the machine booted."""
SYNCED = Discipline(ClockState.SYNCED, 3 * MS)
UNSYNCED = Discipline(ClockState.UNSYNCED, 16 * NS_PER_S)
UNKNOWN = Discipline(ClockState.UNKNOWN, 16 * NS_PER_S)


@dataclass
class Machine:
    """What its clocks show. `boot` runs all the time, `monotonic` stands still while the machine sleeps."""

    boot: int = 5 * NS_PER_S
    asleep: int = 0
    offset: int = TRUE_OFFSET_NS
    """The system's UTC minus boot time."""
    said: Discipline = SYNCED
    drift_ppm: float = 0.0
    """How much slower than true time its crystal runs."""
    true_elapsed: float = field(default=5.0 * NS_PER_S)
    """True time since boot, ns."""
    reading_ns: list[int] = field(default_factory=list)
    """What passes while the clocks are read, reading by reading."""

    @property
    def true_ns(self) -> int:
        """True UTC now."""
        return TRUE_OFFSET_NS + round(self.true_elapsed)

    @property
    def right_offset(self) -> int:
        """What UTC minus boot time should be now."""
        return self.true_ns - self.boot

    def clock(self, **options: Any) -> HostClock:
        return HostClock(self.monotonic, self.utc, lambda: self.said, boot_ns=self.read_boot, **options)

    def monotonic(self) -> int:
        return self.boot - self.asleep

    def utc(self) -> int:
        return self.boot + self.offset

    def read_boot(self) -> int:
        if self.reading_ns:
            self.boot += self.reading_ns.pop(0)
        return self.boot

    def run(self, seconds: float, *clocks: HostClock, each: Callable[[], None] = lambda: None) -> None:
        """Let true time pass, with a look at the clocks every second."""
        for _ in range(round(seconds)):
            self.true_elapsed += NS_PER_S
            self.boot = 5 * NS_PER_S + round((self.true_elapsed - 5 * NS_PER_S) * (1 - self.drift_ppm / 1e6))
            for clock in clocks:
                clock.refresh()
            each()

    def sleep(self, seconds: float) -> None:
        """The lid is closed: the monotonic clock stands still."""
        self.run(seconds)
        self.asleep += round(seconds * NS_PER_S)
