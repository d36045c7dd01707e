"""Hours of a Cyton in virtual time, through decoder, time axis and blocks: no drift of time, of count, or of memory.

The suite simulates half an hour; WARDLINK_LONG=1 the eight hours of a night (about a minute).
"""

from __future__ import annotations

import gc
import os
import random

import psutil
import pytest

from gateway.assembly import RawAssembler
from gateway.clock import HostClock
from gateway.devices.base import Missing, Samples
from gateway.devices.cyton import CytonDecoder
from gateway.kernel_clock import Discipline
from gateway.links.base import Chunk
from gateway.samples import NS_PER_S, ClockState, LossRecord, SampleBlock

HOURS = 8.0 if os.environ.get("WARDLINK_LONG") else 0.5
RATE_HZ = 250
SKEW = 40e-6
"""The board's clock is slow by this much: 1.15 s in eight hours, if nobody followed it."""
LUMP = 16
"""Packets that arrive as one, 64 ms."""
LATE_MS_MEAN = 8.0
LOST_EVERY = 50_000
"""Packets; one is lost by the radio."""
TIME_ERROR_NS_MAX = 2_000_000
GROWTH_BYTES_MAX = 3_000_000
BEGIN_NS = 1_000 * NS_PER_S

PACKETS = [bytes([0xA0, number]) + bytes([0, 1, number]) * 8 + bytes(6) + b"\xc0" for number in range(256)]


class Night:
    """The blocks as they are given out: only sums are kept."""

    def __init__(self) -> None:
        self.samples = 0
        self.lost = 0
        self.last_ns = -1
        self.worst_ns = 0
        self.time_ran_back = False

    def take(self, content: SampleBlock | LossRecord) -> None:
        if isinstance(content, LossRecord):
            self.lost += content.sample_count
            return
        self.time_ran_back |= content.first_ns <= self.last_ns
        self.last_ns = content.last_ns
        index = self.samples + self.lost
        if index > 300 * RATE_HZ:
            true_ns = BEGIN_NS + index * NS_PER_S / RATE_HZ * (1 + SKEW)
            self.worst_ns = max(self.worst_ns, abs(content.first_ns - round(true_ns)))
        self.samples += len(content)


@pytest.mark.timeout(600)
def test_a_night_drifts_neither_in_time_nor_in_memory() -> None:
    now_ns = BEGIN_NS
    host = HostClock(lambda: now_ns, lambda: now_ns, lambda: Discipline(ClockState.SYNCED, 0))
    decoder, night = CytonDecoder(), Night()
    decoder.start()
    decoder.receive(Chunk(b"OpenBCI V3 8-16 channel\r\nFirmware: v3.1.2\r\n$$$", now_ns))
    assembler = RawAssembler("C-1", decoder.signals[0], 0, host, night.take)
    draw = random.Random(7)
    total = round(HOURS * 3600 * RATE_HZ)
    process, early_bytes = psutil.Process(), 0
    for first in range(0, total, LUMP):
        numbers = [
            number for number in range(first, min(first + LUMP, total)) if number % LOST_EVERY != LOST_EVERY // 2
        ]
        due_ns = BEGIN_NS + (numbers[-1] * NS_PER_S / RATE_HZ) * (1 + SKEW)
        now_ns = max(now_ns, round(due_ns + draw.expovariate(1 / LATE_MS_MEAN) * 1e6))
        data = b"".join(PACKETS[number % 256] for number in numbers)
        for event in decoder.receive(Chunk(data, now_ns)):
            if isinstance(event, Samples | Missing):
                assembler.take(event)
        if first < total // 8 <= first + LUMP:
            gc.collect()
            early_bytes = process.memory_info().rss
    assembler.finish()
    gc.collect()

    assert night.lost == len(range(LOST_EVERY // 2, total, LOST_EVERY))
    assert night.samples + night.lost == total
    assert not night.time_ran_back
    assert night.worst_ns < TIME_ERROR_NS_MAX
    assert process.memory_info().rss - early_bytes < GROWTH_BYTES_MAX
