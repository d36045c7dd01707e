"""An event loop in virtual time: when nothing is ready, the clock jumps to the next timer.

Nothing real is ever waited for: what runs in threads elsewhere runs here at a moment that the seed chooses. The order
of tasks that are ready at the same time, which asyncio does not promise, comes from the seed as well.
"""

from __future__ import annotations

import asyncio
import functools
import random
import selectors
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")

TURNS_MAX = 100_000
"""Turns of the loop at one moment: whatever needs more runs in circles."""
RESOLUTION_S = 1e-6
STEP_S = (0.000_5, 0.01)
"""A step in a worker thread, most often."""
SLOW_STEP_S = (0.1, 3.0)
SLOW_SHARE = 0.02
"""Of the steps: a flash card that tidies up."""


class StuckError(AssertionError):
    """Nothing will ever happen again, or the loop runs in circles."""


class _Timetable(selectors.SelectSelector):
    """Knows no descriptor: `select` is the moment at which time passes."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[Any]:
        self.loop.pass_time(timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """One thread, one clock, one seed."""

    def __init__(self, seed: object) -> None:
        self._now_s = 0.0
        self._turns = 0
        timetable = _Timetable()
        timetable.loop = self
        super().__init__(timetable)
        self._clock_resolution = RESOLUTION_S
        self._order = random.Random(f"order {seed}")
        self._numbers: WeakKeyDictionary[asyncio.Task[Any], int] = WeakKeyDictionary()
        """Of tasks, as they were made."""
        self._count = 0
        self.set_task_factory(self._new_task)
        self._threads = random.Random(f"threads {seed}")
        self.has_power: Callable[[], bool] = lambda: True
        """Whether the machine that the running code is on still runs."""
        self._busy_until: WeakKeyDictionary[Any, float] = WeakKeyDictionary()

    def time(self) -> float:
        return self._now_s

    def pass_time(self, timeout: float | None) -> None:
        """Jump to the next timer."""
        if timeout is None:
            raise StuckError("nothing is ready and no timer runs: everybody waits for ever")
        if timeout > 0:
            self._now_s += timeout
            self._turns = 0
            return
        self._turns += 1
        if self._turns > TURNS_MAX:
            raise StuckError(f"{TURNS_MAX} turns without any time passing")

    def _process_events(self, event_list: list[Any]) -> None:
        """Mix the steps of tasks that are ready; callbacks keep their places, which asyncio promises."""
        ready = self._ready  # type: ignore[attr-defined]
        if len(ready) < 2:
            return
        places = [n for n, handle in enumerate(ready) if _is_step(handle)]
        if len(places) > 1:
            # asyncio keeps tasks in sets, whose order is that of addresses: the same for nobody.
            steps = sorted((ready[place] for place in places), key=self._number_of)
            self._order.shuffle(steps)
            for place, step in zip(places, steps, strict=True):
                ready[place] = step

    def _number_of(self, handle: Any) -> int:
        return self._numbers.get(handle._callback.__self__, 0)

    def _new_task(self, _loop: Any, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(coroutine, loop=self, **options)
        self._count += 1
        self._numbers[task] = self._count
        return task

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """Run at a moment between now and the answer; one after the other in an executor of its own."""
        answer: asyncio.Future[T] = self.create_future()
        begin_s = max(self._now_s, self._busy_until.get(executor, 0.0)) if executor is not None else self._now_s
        is_slow = self._threads.random() < SLOW_SHARE
        took_s = self._threads.uniform(*(SLOW_STEP_S if is_slow else STEP_S))
        if executor is not None:
            self._busy_until[executor] = begin_s + took_s
        acts_at_s = begin_s + self._threads.random() * took_s
        self.call_at(acts_at_s, self._act, begin_s + took_s, answer, functools.partial(func, *args))
        return answer

    def _act(self, answered_at_s: float, answer: asyncio.Future[T], call: Callable[[], T]) -> None:
        if answer.cancelled():
            return
        if not self.has_power():
            answer.cancel()
            return
        try:
            result = call()
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to whoever waits
            self.call_at(answered_at_s, _fail, answer, error)
        else:
            self.call_at(answered_at_s, _succeed, answer, result)


def _is_step(handle: Any) -> bool:
    return isinstance(getattr(handle._callback, "__self__", None), asyncio.Task)


def _succeed(answer: asyncio.Future[T], result: T) -> None:
    if not answer.done():
        answer.set_result(result)


def _fail(answer: asyncio.Future[Any], error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)
