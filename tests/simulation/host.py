"""A machine from one start to its end: its clocks, its way to the broker, and whether it still runs.

Which one a piece of code runs on is a context variable, so that `time` means that machine's own clocks.
"""

from __future__ import annotations

import asyncio
import random
import time
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from gateway.kernel_clock import UNKNOWN_ERROR_NS, Discipline
from gateway.samples import NS_PER_S, ClockState

BEGIN_NS = 1_714_564_800 * NS_PER_S
"""True UTC when a simulation begins: 2024-05-01 12:00."""
DISCIPLINED = Discipline(ClockState.SYNCED, 2_000_000)


class Network:
    """A client's way to the broker. Several troubles may lie on top of each other."""

    def __init__(self, rng: random.Random, latency_s: tuple[float, float]) -> None:
        self.rng = rng
        self._latency_s = latency_s
        self.outages = 0
        """Reasons why there is no way at all."""
        self.silences = 0
        """Reasons why packets vanish without a word."""

    def latency_s(self) -> float:
        return self.rng.uniform(*self._latency_s)


@dataclass(slots=True)
class SystemClock:
    """What a machine's UTC is and what its kernel says of it."""

    error_ns: int = 0
    """Its UTC less the true one."""
    discipline: Discipline = DISCIPLINED

    def set_wrong(self, error_ns: int) -> None:
        """Somebody set it, or nobody did since the machine started."""
        self.error_ns = error_ns
        self.discipline = Discipline(ClockState.UNSYNCED, UNKNOWN_ERROR_NS)

    def set_right(self) -> None:
        """A time server answered."""
        self.error_ns = 0
        self.discipline = DISCIPLINED


class Host:
    """One start of one machine or service."""

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop, network: Network, clock: SystemClock) -> None:
        self.name = name
        self.network = network
        self.boot = f"{name}-{loop.time():.6f}"
        self.is_dead = False
        self.lines: list[Any] = []
        """Its connections to the broker."""
        self.clock = clock
        self._loop = loop
        self._started_s = loop.time()

    def monotonic_ns(self) -> int:
        return round((self._loop.time() - self._started_s) * NS_PER_S)

    def utc_ns(self) -> int:
        return BEGIN_NS + round(self._loop.time() * NS_PER_S) + self.clock.error_ns


HOST: ContextVar[Host] = ContextVar("HOST")


def has_power() -> bool:
    """Whether the machine that this code is on still runs."""
    return not HOST.get().is_dead


class HostTime:
    """Stands for the module `time` in wardlink's own modules."""

    @staticmethod
    def monotonic_ns() -> int:
        return HOST.get().monotonic_ns()

    @staticmethod
    def monotonic() -> float:
        return HOST.get().monotonic_ns() / NS_PER_S

    @staticmethod
    def time_ns() -> int:
        return HOST.get().utc_ns()

    @staticmethod
    def time() -> float:
        return HOST.get().utc_ns() / NS_PER_S

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)
