"""The window on a model of a link: a queue that drains at a rate, behind a path that takes its time."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from gateway.uplink import window as window_module
from gateway.uplink.window import Window

BLOCK = 5000
DELAY_S = 0.5
HALF_MBIT = 62_500.0
Rate = Callable[[float], float]


@dataclass
class Link:
    """Messages one after another at `rate` bytes/s, acknowledged `path_s` later; the sender has always more."""

    window: Window
    rate: Rate
    path_s: Callable[[float], float] = lambda _: 0.03
    sizes: Iterator[int] = field(default_factory=lambda: itertools.repeat(BLOCK))
    live_every_s: float = 0.0
    now_s: float = 0.0
    free_s: float = 0.0
    """When the queue is empty."""
    delivered: list[tuple[float, int, float, bool]] = field(default_factory=list)
    """(when, bytes, how long it took, whether backlog), by acknowledgement."""

    def __post_init__(self) -> None:
        self._pending: list[tuple[float, int, int, float, bool]] = []
        self._numbers = itertools.count()
        self._next_live_s = self.live_every_s

    def _send(self, size: int, *, is_backlog: bool) -> None:
        number = next(self._numbers)
        self.window.sent(number, size, self.now_s, is_backlog=is_backlog)
        self.free_s = max(self.free_s, self.now_s) + size / self.rate(self.now_s)
        arrives = self.free_s + self.path_s(self.now_s)
        heapq.heappush(self._pending, (arrives, number, size, self.now_s, is_backlog))

    def run(self, until_s: float) -> Link:
        while self.now_s < until_s:
            if self.live_every_s and self.now_s >= self._next_live_s:
                self._next_live_s += self.live_every_s
                self._send(600, is_backlog=False)
            while self.window.backlog_room(self.now_s) > 0:
                self._send(next(self.sizes), is_backlog=True)
            due = [self._pending[0][0]] if self._pending else []
            self.now_s = min([*due, *([self._next_live_s] if self.live_every_s else [])])
            while self._pending and self._pending[0][0] <= self.now_s:
                arrives, number, size, sent_s, is_backlog = heapq.heappop(self._pending)
                self.window.acknowledged(number, self.now_s)
                self.delivered.append((arrives, size, arrives - sent_s, is_backlog))
        return self

    def throughput(self, since_s: float) -> float:
        found = [size for when, size, _, is_backlog in self.delivered if when >= since_s and is_backlog]
        return sum(found) / (self.now_s - since_s)

    def waits(self, since_s: float, *, is_backlog: bool) -> list[float]:
        return sorted(took for when, _, took, which in self.delivered if when >= since_s and which is is_backlog)


def new_window(bytes_max: int = 256 << 10) -> Window:
    return Window(delay_s=DELAY_S, bytes_max=bytes_max)


@pytest.mark.parametrize("rate", [8_000.0, HALF_MBIT, 250_000.0])
@pytest.mark.parametrize("path_s", [0.005, 0.3])
def test_a_slow_link_is_full_and_its_queue_is_short(rate: float, path_s: float) -> None:
    link = Link(new_window(), lambda _: rate, lambda _: path_s, live_every_s=1.0).run(120)
    live_share = 600 / rate
    assert link.throughput(20) > 0.95 * (1 - live_share) * rate
    waits = link.waits(20, is_backlog=False)
    message_s = BLOCK / rate
    assert waits[int(0.99 * len(waits))] < path_s + DELAY_S + 2.5 * message_s + 0.1


def test_a_fast_link_gets_the_largest_window_within_a_second() -> None:
    window = new_window()
    link = Link(window, lambda _: 5e6, lambda _: 0.05).run(1.0)
    assert window.bytes > 0.95 * (256 << 10)
    assert window.bytes <= 256 << 10
    assert max(link.waits(0, is_backlog=True)) < 0.2


def test_a_long_path_is_no_queue() -> None:
    """A satellite: 0.6 s there and back, more than the whole wait that is allowed."""
    link = Link(new_window(1 << 20), lambda _: 250_000.0, lambda _: 0.6).run(120)
    assert link.throughput(20) > 0.94 * 250_000
    assert max(link.waits(20, is_backlog=True)) < 0.6 + 1.3 * DELAY_S


def test_a_link_that_becomes_slow_is_noticed_and_one_that_becomes_fast_again_too() -> None:
    rate: Rate = lambda now_s: 1e6 if now_s < 20 or now_s > 60 else HALF_MBIT  # noqa: E731
    link = Link(new_window(), rate, live_every_s=0.5).run(100)
    slow = [took for when, _, took, _ in link.delivered if 35 <= when <= 60]
    assert max(slow) < 1.0
    assert link.throughput(70) > 0.9e6


def test_a_path_that_becomes_longer_does_not_starve_the_backlog() -> None:
    """As by a change from cable to satellite under the same connection."""
    path: Rate = lambda now_s: 0.02 if now_s < 20 else 0.7  # noqa: E731
    link = Link(new_window(), lambda _: HALF_MBIT, path).run(400)
    assert link.throughput(320) > 0.9 * HALF_MBIT


def test_somebody_elses_queue_is_not_believed_to_be_the_path_for_ever() -> None:
    """A path that was 3 s long for a minute and is short again: our own queue must not keep it looking long."""
    path: Rate = lambda now_s: 3.0 if now_s < 60 else 0.02  # noqa: E731
    window = new_window()
    link = Link(window, lambda _: HALF_MBIT, path, live_every_s=1.0).run(200)
    waits = link.waits(150, is_backlog=False)
    assert waits[int(0.99 * len(waits))] < DELAY_S + 0.4


def test_one_late_answer_changes_little() -> None:
    window = new_window()
    link = Link(window, lambda _: HALF_MBIT).run(30)
    before = window.bytes
    window.sent(10**6, BLOCK, link.now_s, is_backlog=True)
    window.acknowledged(10**6, link.now_s + 5.0)
    assert before * 0.7 < window.bytes < before


def test_sizes_of_every_kind_at_once() -> None:
    source = random.Random(7)
    sizes = (source.choice([300, 900, 5000, 20_000]) for _ in itertools.count())
    link = Link(new_window(), lambda _: HALF_MBIT, sizes=sizes, live_every_s=0.5).run(120)
    assert link.throughput(20) > 0.9 * HALF_MBIT
    waits = link.waits(20, is_backlog=False)
    assert waits[int(0.99 * len(waits))] < 1.2


def test_a_message_larger_than_the_window_goes_alone() -> None:
    link = Link(new_window(4096), lambda _: HALF_MBIT, sizes=itertools.repeat(100_000)).run(60)
    assert link.throughput(0) > 0.9 * HALF_MBIT
    assert max(link.waits(10, is_backlog=True)) < 1.8


def test_after_a_pause_it_begins_small_again() -> None:
    window = new_window()
    link = Link(window, lambda _: 5e6).run(5)
    for number in range(10**6):
        if not len(window):
            break
        window.acknowledged(number, link.now_s)
    assert window.backlog_room(link.now_s + 1) > window_module.BYTES_START
    assert window.backlog_room(link.now_s + window_module.PAUSE_S + 1) == window_module.BYTES_START


def test_live_data_goes_at_once_and_is_bounded_too() -> None:
    window = new_window(64 << 10)
    for number in itertools.count():
        if window.backlog_room(0.0) <= 0:
            break
        window.sent(number, BLOCK, 0.0, is_backlog=True)
    assert window.live_room(is_small=False)
    window.sent(1000, window.bytes, 0.0, is_backlog=False)
    assert not window.live_room(is_small=False)
    assert window.live_room(is_small=True)
    window.sent(1001, 64 << 10, 0.0, is_backlog=False)
    assert not window.live_room(is_small=True)
    window.acknowledged(1001, 0.1)
    assert window.live_room(is_small=True)


def test_what_failed_frees_its_room_and_teaches_nothing() -> None:
    window = new_window()
    window.sent(1, BLOCK, 0.0, is_backlog=True)
    window.sent(2, BLOCK, 0.0, is_backlog=False)
    assert (len(window), window.bytes_under_way, 1 in window) == (2, 2 * BLOCK, True)
    before = window.bytes
    for number in (1, 2, 3):
        window.forget(number)
        window.acknowledged(number, 100.0)
    assert (len(window), window.bytes_under_way, window.bytes) == (0, 0, before)
