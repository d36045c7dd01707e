"""The time axis of a device's samples, in simulated time: no test looks at how fast this machine is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gateway.sample_clock import SampleClock, TimeLine
from gateway.samples import NS_PER_S

TIMESYNC = Path(__file__).parents[3] / "shared" / "data" / "cyton" / "cyton_timesync_samples1.csv"
MS = 1_000_000
PPM = 1e-6


@dataclass
class Device:
    """A device whose samples reach the host in bursts, each late by up to `delay_ms_max`, never early."""

    rate_hz: float
    skew: float = 0.0
    """Its own clock against the host's: 1e-4 is 100 ppm slow."""
    seed: int = 1
    delay_ms_max: float = 60.0
    delay_ms_min: float = 0.0
    loss: float = 0.0
    """Share of bursts that never arrive; their samples are counted all the same."""
    start_ns: int = 7 * NS_PER_S
    pause_after: int | None = None
    """Number of a sample after which the device sleeps for `pause_ns`, and its counter with it."""
    pause_ns: int = 0

    def true_ns(self, index: int) -> float:
        paused = self.pause_ns if self.pause_after is not None and index > self.pause_after else 0
        return self.start_ns + index * NS_PER_S / self.rate_hz * (1 + self.skew) + paused

    def bursts(self, seconds: float) -> Iterator[tuple[int, int, int]]:
        """(first sample, last sample, arrival in ns) of every burst that arrives."""
        random = np.random.default_rng(self.seed)
        first, arrival_ns = 0, 0
        while first < seconds * self.rate_hz:
            last = first + int(random.integers(4, 13)) - 1
            delay_ns = random.uniform(self.delay_ms_min, self.delay_ms_max) * MS
            arrival_ns = max(arrival_ns, round(self.true_ns(last) + delay_ns))
            if random.random() >= self.loss:
                yield first, last, arrival_ns
            first = last + 1


@dataclass
class Axis:
    """What a clock said of a device: one entry a sample."""

    clock: SampleClock
    indexes: list[int] = field(default_factory=list)
    stated_ns: list[int] = field(default_factory=list)
    bounds_ns: list[int] = field(default_factory=list)
    lines: list[TimeLine] = field(default_factory=list)
    jumps: int = 0

    def follow(self, bursts: Iterator[tuple[int, int, int]]) -> Axis:
        """State the time of every sample, a new line each second, as the assembly does."""
        through = None
        held: list[tuple[int, int]] = []
        for first, last, arrival_ns in bursts:
            self.clock.observe(last, arrival_ns)
            held.append((first, last))
            if not self.clock.settled:
                continue
            for begin, end in held:
                if not self.lines or begin - self.lines[-1].index >= round(self.clock.rate_hz):
                    self.lines.append(self.clock.line_from(begin, through))
                    self.jumps += self.clock.jumped
                line = self.lines[-1]
                self.indexes += range(begin, end + 1)
                self.stated_ns += [line.at(index) for index in range(begin, end + 1)]
                self.bounds_ns += [line.error_ns] * (end + 1 - begin)
                through = end
            held = []
        return self

    def errors_ns(self, device: Device) -> NDArray[np.float64]:
        true = np.array([device.true_ns(index) for index in self.indexes])
        return np.array(self.stated_ns, dtype=np.float64) - true

    def seconds(self, rate_hz: float) -> NDArray[np.float64]:
        return np.array(self.indexes) / rate_hz


def rms_ms(errors_ns: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(errors_ns**2))) / MS


@pytest.mark.parametrize("loss", [0.0, 0.05])
@pytest.mark.parametrize("skew_ppm", [-100, 0, 100])
@pytest.mark.parametrize("rate_hz", [250.0, 256.0, 160.0])
def test_times_are_true_continuous_and_bounded_under_jitter(rate_hz: float, skew_ppm: int, loss: float) -> None:
    for seed in (1, 2):
        device = Device(rate_hz, skew_ppm * PPM, seed=seed, loss=loss)
        axis = Axis(SampleClock(rate_hz)).follow(device.bursts(400))
        errors_ns, at_s = axis.errors_ns(device), axis.seconds(rate_hz)
        assert rms_ms(errors_ns[at_s > 30]) < 1.0
        assert np.abs(errors_ns[at_s > 30]).max() < 5 * MS
        assert axis.clock.rate_hz == pytest.approx(rate_hz / (1 + device.skew), rel=10 * PPM)
        last_minute = at_s > 340
        period_ns = np.polyfit(np.array(axis.indexes)[last_minute], np.array(axis.stated_ns)[last_minute], 1)[0]
        assert period_ns == pytest.approx(NS_PER_S / rate_hz * (1 + device.skew), rel=10 * PPM)
        assert np.all(np.abs(errors_ns) <= axis.bounds_ns)
        assert max(np.array(axis.bounds_ns)[at_s > 30]) < 60 * MS
        assert axis.jumps == 0
        steps_ns = np.diff(axis.stated_ns) / np.diff(axis.indexes)
        assert np.abs(steps_ns * rate_hz / NS_PER_S - 1).max() < 2 * SampleClock.SLEW_MAX


def test_each_line_begins_where_the_one_before_would_have_gone_on() -> None:
    axis = Axis(SampleClock(250.0)).follow(Device(250.0, 100 * PPM).bursts(60))
    assert len(axis.lines) > 50
    assert all(after.start_ns == before.at(after.index) for before, after in pairwise(axis.lines))


def test_the_delay_that_all_arrivals_share_is_not_in_the_bound() -> None:
    """Arrivals cannot show it: the stated times are late by it, and the bound speaks of the rest."""
    device = Device(250.0, delay_ms_min=20.0, delay_ms_max=40.0)
    axis = Axis(SampleClock(250.0)).follow(device.bursts(60))
    errors_ns = axis.errors_ns(device)
    assert rms_ms(errors_ns[axis.seconds(250.0) > 30] - 20 * MS) < 1.0
    assert np.all(np.abs(errors_ns - 20 * MS) <= axis.bounds_ns)


def test_a_device_far_off_its_nominal_rate_is_followed_within_half_a_minute() -> None:
    for skew in (2.5e-3, -2.5e-3):
        device = Device(250.0, skew, delay_ms_max=20.0)
        axis = Axis(SampleClock(250.0)).follow(device.bursts(90))
        errors_ns = axis.errors_ns(device)
        assert rms_ms(errors_ns[axis.seconds(250.0) > 30]) < 1.0
        assert np.all(np.abs(errors_ns) <= axis.bounds_ns)
        assert axis.jumps == 0


def test_after_a_lost_packet_later_samples_keep_their_time() -> None:
    """muse-lsl 2.5.3 moves them by 94 ms."""

    def states(lost: bool) -> dict[int, int]:
        packets = [(first, first + 11, (first + 11) * 3_906_250 + NS_PER_S) for first in range(0, 60 * 256, 12)]
        if lost:
            del packets[800]
        axis = Axis(SampleClock(256.0)).follow(iter(packets))
        return dict(zip(axis.indexes, axis.stated_ns, strict=True))

    whole, holed = states(lost=False), states(lost=True)
    assert len(whole) - len(holed) == 12
    assert max(abs(holed[index] - whole[index]) for index in holed) < 10_000


def test_one_stalled_second_neither_moves_the_axis_nor_the_bound() -> None:
    device = Device(250.0, delay_ms_max=10.0)
    bursts = [
        (first, last, max(arrival_ns, 42 * NS_PER_S) if 39 * NS_PER_S < arrival_ns < 42 * NS_PER_S else arrival_ns)
        for first, last, arrival_ns in device.bursts(60)
    ]
    axis = Axis(SampleClock(250.0)).follow(iter(bursts))
    errors_ns, at_s = axis.errors_ns(device), axis.seconds(250.0)
    assert np.abs(errors_ns[at_s > 20]).max() < 3 * MS
    assert np.array(axis.bounds_ns)[at_s > 38].max() < 15 * MS
    assert axis.jumps == 0


def test_a_device_that_slept_makes_the_axis_jump_once_and_the_bound_tells_before() -> None:
    """The counter did not run on, so only the arrivals show it: late, for good."""
    device = Device(250.0, delay_ms_max=20.0, pause_after=60 * 250, pause_ns=NS_PER_S)
    axis = Axis(SampleClock(250.0)).follow(device.bursts(120))
    errors_ns, at_s = axis.errors_ns(device), axis.seconds(250.0)
    assert axis.jumps == 1
    assert np.all(np.diff(axis.stated_ns) > 0)
    assert rms_ms(errors_ns[at_s > 60 + SampleClock.JUMP_BINS + 10]) < 1.0
    doubted = (at_s < 60) | (at_s > 60 + SampleClock.DOUBT_BINS + 2)
    assert np.all(np.abs(errors_ns[doubted]) <= np.array(axis.bounds_ns)[doubted])
    assert axis.clock.rate_hz == pytest.approx(250.0, rel=100 * PPM)


def test_samples_wrongly_counted_as_lost_are_taken_back_from_the_axis() -> None:
    """256 that were not lost put the axis 1.024 s ahead of the arrivals. Times of samples do not go back for it."""
    device = Device(250.0, delay_ms_max=20.0)
    bursts = [
        (first + 256, last + 256, arrival_ns) if first > 40 * 250 else (first, last, arrival_ns)
        for first, last, arrival_ns in device.bursts(90)
    ]
    axis = Axis(SampleClock(250.0)).follow(iter(bursts))
    assert axis.jumps == 1
    assert np.all(np.diff(axis.stated_ns) > 0)
    at_s = axis.seconds(250.0)
    true = np.array([device.true_ns(index if index <= 40 * 250 + 20 else index - 256) for index in axis.indexes])
    late_ns = np.array(axis.stated_ns) - true
    assert np.abs(late_ns[at_s > 45]).max() < 30 * MS
    assert np.array(axis.bounds_ns)[at_s > 65].max() < 30 * MS
    assert rms_ms(late_ns[at_s > 60]) < 1.0


def test_a_late_beginning_is_made_good_without_turning_back() -> None:
    """The first second came out of a queue, 400 ms late: the samples are packed closer until they are right."""
    device = Device(250.0, delay_ms_max=10.0)
    bursts = [
        (first, last, arrival_ns + 400 * MS if first < 300 else arrival_ns + 10)
        for first, last, arrival_ns in device.bursts(150)
    ]
    axis = Axis(SampleClock(250.0)).follow((a, b, c) for a, b, c in sorted(bursts, key=lambda burst: burst[2]))
    assert np.all(np.diff(sorted(axis.stated_ns)) > 0)
    errors_ns, at_s = axis.errors_ns(device), axis.seconds(250.0)
    assert rms_ms(errors_ns[at_s > 120]) < 1.0
    assert np.all(np.abs(errors_ns[at_s > 5]) <= np.array(axis.bounds_ns)[at_s > 5])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rate_hz=st.sampled_from([1.0, 52.0, 130.0, 250.0, 2000.0]),
    arrivals=st.lists(st.integers(0, 3 * NS_PER_S), min_size=1, max_size=80),
    skips=st.lists(st.integers(0, 600), min_size=80, max_size=80),
)
def test_times_never_go_back_whatever_arrives(seed: int, rate_hz: float, arrivals: list[int], skips: list[int]) -> None:
    """Arbitrary delays, losses and pauses, far beyond what a sound transport does."""
    clock, through, stated, now_ns = SampleClock(rate_hz), None, [], 0
    index = seed
    for gap_ns, skip in zip(arrivals, skips, strict=False):
        now_ns += gap_ns
        index += skip
        clock.observe(index + 9, now_ns)
        line = clock.line_from(index, through)
        assert line.error_ns >= 0
        stated += [line.at(number) for number in range(index, index + 10)]
        through = index + 9
        index += 10
    assert all(before < after for before, after in pairwise(stated))


def test_the_first_time_lies_behind_what_the_segment_before_stated() -> None:
    clock = SampleClock(250.0, after_ns=2 * NS_PER_S)
    clock.observe(0, NS_PER_S)
    assert clock.line_from(0).at(0) == 2 * NS_PER_S + 4 * MS
    free = SampleClock(250.0)
    free.observe(0, NS_PER_S)
    assert free.line_from(0).at(0) == NS_PER_S


def test_memory_is_bounded() -> None:
    clock = SampleClock(250.0)
    for second in range(4 * SampleClock.BINS_MAX):
        clock.observe(second * 250, second * NS_PER_S)
    assert len(clock._bins) == SampleClock.BINS_MAX


def read_timesync() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Host and board time in ns of 60 s of a real Cyton."""
    if not TIMESYNC.exists():
        pytest.skip(f"{TIMESYNC} is not on this machine: nothing real to measure the sample clock on")
    rows = np.loadtxt(TIMESYNC, delimiter=",", skiprows=2, usecols=(0, 2))
    return (rows[:, 0] - rows[0, 0]) * MS, (rows[:, 1] - rows[0, 1]) * MS


@pytest.mark.parametrize("jitter_ms", [0, 60])
def test_a_real_cyton(jitter_ms: int) -> None:
    """Its board time is the truth, in whole ms; it runs at 250.64 Hz. Once as it came, once with jitter added."""
    host_ns, board_ns = read_timesync()
    random = np.random.default_rng(3)
    bursts, arrival_ns, first = [], 0, 0
    while first < len(host_ns):
        last = min(len(host_ns), first + int(random.integers(4, 13))) - 1
        arrival_ns = max(arrival_ns, round(host_ns[last] + random.uniform(0, jitter_ms) * MS))
        bursts.append((first, last, arrival_ns))
        first = last + 1
    axis = Axis(SampleClock(250.0)).follow(iter(bursts))
    assert len(axis.indexes) == len(host_ns)
    errors_ns = np.array(axis.stated_ns) - board_ns
    settled = np.array(axis.indexes) > 30 * 250
    assert rms_ms(errors_ns[settled]) < 1.0
    assert np.all(np.abs(errors_ns) <= np.array(axis.bounds_ns) + 2 * MS)
    assert axis.clock.rate_hz == pytest.approx(250.64, rel=100 * PPM)
    assert axis.jumps == 0
