"""Keeps blocks back while the time is not known, puts them right when it is, and remembers it over restarts.

Knows the host's clock and the outbox; who tells the time is none of its business.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from gateway import clock_memory
from gateway.anchor import Source
from gateway.clock import HostClock
from gateway.clock_memory import BOOTS_MAX, PUT_RIGHT_MAX, BootTime, ClockMemory
from gateway.errors import UnavailableError
from gateway.held_times import REMEMBER_S, HeldTimes
from gateway.kernel_clock import boot_id, boot_ns
from gateway.samples import NS_PER_S, ClockState, LossRecord, SampleBlock
from gateway.spool.outbox import Outbox

log = logging.getLogger(__name__)

REFRESH_S = 1.0
"""Between two looks at the system's clocks."""
UNWRITTEN_NS = 2 * REMEMBER_S * NS_PER_S
"""Of times that went out, how much may not have been written down when a process ended."""
STAMPED_ROWS_MAX = 32
"""Rows put right in one step: about 20 ms of decoding and encoding, in which no other commit is made."""


class Timekeeper:
    """Between the devices and the outbox. `accept` takes what devices give; `run` must be running."""

    def __init__(
        self,
        outbox: Outbox,
        gateway: str,
        folder: Path,
        *,
        hold_s: float,
        is_online: Callable[[], bool],
        boot: str | None = None,
        host: Callable[..., HostClock] = HostClock,
    ) -> None:
        """Reads `clock.json` in `folder`, which blocks. `hold_s`: how long blocks are held back while the broker is
        there; 0: never. `boot`, `host`: other than this machine's. Raises `UnavailableError`.
        """
        self._outbox = outbox
        self._gateway = gateway
        self._folder = folder
        self._hold_s = hold_s
        self._is_online = is_online
        self._boot = boot_id() if boot is None else boot
        memory = clock_memory.read(folder)
        known = memory.of(self._boot)
        self.clock = host(
            boot_ns=boot_ns,
            holds=hold_s > 0,
            anchor=known.anchor if known else None,
            not_before_ns=memory.passed_ns,
            stated_ns=known.stated_ns if known else None,
            sent_through_ns=memory.sent_through_ns,
        )
        self._online_s = 0.0
        self._may_wait = True
        """Whether there may be rows that wait for their time; some may be left from before."""
        self.waiting = 0
        """Blocks that were held back by this process and still are."""
        self._written_at_ns = 0
        self._problem = ""
        """Why the last attempt to write down what is known failed."""
        now_ns = self.clock.boot_now_ns()
        begun = BootTime(boot=self._boot, after_ns=memory.passed_ns, stated_ns=self.clock.offset_ns, seen_at_ns=now_ns)
        others = [one for one in memory.boots if one.boot != self._boot]
        self._earlier = others[-BOOTS_MAX + 1 :]
        self._begun = known or begun
        self._right_ns: int | None = None
        """What takes the place of offsets that nobody wrote down, once the time is known; the same one for all."""
        self._due = asyncio.Event()
        self._memory = memory
        self.clock.put_right.update(self._begun.put_right)
        is_later = known is not None and self.clock.now_ns() > memory.sent_through_ns
        unwritten_ns = 0 if is_later or not memory.sent_through_ns else UNWRITTEN_NS
        self._went_through_ns = memory.sent_through_ns + unwritten_ns
        """Newest time that may have gone out before this process."""

    @property
    def boot(self) -> str:
        """The boot that times since boot belong to."""
        return self._boot

    @property
    def source(self) -> Source:
        """Who told the time."""
        return self.clock.anchor.source if self.clock.anchor else Source.NONE

    def accept(self, content: SampleBlock | LossRecord) -> None:
        """Hand on to the outbox, to be sent or to be held back."""
        offset_ns = self.clock.give_out(content.first_ns, content.last_ns)
        if offset_ns is None:
            self._outbox.append(content)
            return
        self._outbox.append(content, self._boot, offset_ns)
        self._may_wait = True
        self.waiting += 1

    async def run(self) -> None:
        """Look at the clock, and put right what waits, until cancelled."""
        await self._remember()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._put_right_when_due())
            while True:
                await asyncio.sleep(REFRESH_S)
                await self.turn(REFRESH_S)

    async def turn(self, elapsed_s: float) -> None:
        """What is due once a second."""
        was_held, had_setback_ns = self.clock.is_held, self.clock.setback_ns
        self.clock.refresh()
        if self.clock.is_held:
            self._watch_deadline(elapsed_s)
        else:
            self._online_s = 0.0
        is_old = self.clock.boot_now_ns() - self._written_at_ns >= REMEMBER_S * NS_PER_S
        if is_old or (was_held, had_setback_ns) != (self.clock.is_held, self.clock.setback_ns):
            await self._remember()
        if self._may_wait and not self.clock.is_held:
            self._due.set()

    def _watch_deadline(self, elapsed_s: float) -> None:
        self._online_s += elapsed_s if self._is_online() else 0.0
        if self._online_s >= self._hold_s:
            log.warning("nobody has told the time in %.0f s online: data goes out as it is, marked", self._online_s)
            self.clock.release(self._went_through_ns)

    async def _put_right_when_due(self) -> None:
        while True:
            await self._due.wait()
            self._due.clear()
            await self.put_right()

    async def put_right(self) -> None:
        """Give all that waits its time. What cannot be done now is tried again in a second."""
        try:
            if self._right_ns is None and self.clock.known.state is ClockState.SYNCED:
                self._right_ns = self.clock.offset_ns
                self.clock.put_right.setdefault(self._begun.stated_ns, self._right_ns)
            if not await self._remember():
                return  # after a crash the same times must come out
            while not self.clock.is_held:
                count = await self._outbox.stamp(self._held_times(), STAMPED_ROWS_MAX)
                if count == 0 and not self.waiting:
                    self._may_wait = False
                    return
                self.waiting = max(0, self.waiting - count) if count else 0
                await self._outbox.commit()  # what else waits is pending, or damaged and now given up
        except UnavailableError as error:
            log.warning("blocks wait for their time: %s", error)

    def _held_times(self) -> HeldTimes:
        return HeldTimes(self._gateway, [*self._earlier, self._this_boot()], self.clock.known, self._right_ns)

    def _this_boot(self) -> BootTime:
        clock, begun = self.clock, self._begun
        anchor = clock.anchor
        return BootTime(
            boot=self._boot,
            after_ns=begun.after_ns,
            stated_ns=begun.stated_ns,
            seen_at_ns=clock.boot_now_ns(),
            offset_ns=anchor.offset_ns if anchor else 0,
            error_ns=anchor.error_ns if anchor else 0,
            known_at_ns=anchor.at_ns if anchor else 0,
            source=self.source,
            put_right=list(clock.put_right.items())[-PUT_RIGHT_MAX:],
        )

    def _sent_through_ns(self) -> int:
        """Newest time that will have gone out when this is written down again; only what lies ahead needs it."""
        through_ns = self.clock.sent_through_ns
        return through_ns if through_ns <= self.clock.now_ns() else through_ns + UNWRITTEN_NS

    async def _remember(self) -> bool:
        """Write down what is known; whether it is."""
        clock, passed_ns = self.clock, self._memory.passed_ns
        if clock.known.state is ClockState.SYNCED:
            passed_ns = max(passed_ns, clock.now_ns() - clock.known.error_ns)
        self._memory = ClockMemory(
            passed_ns=passed_ns,
            sent_through_ns=self._sent_through_ns(),
            boots=[*self._earlier, self._this_boot()],
        )
        try:
            await asyncio.to_thread(clock_memory.write, self._folder, self._memory)
        except UnavailableError as error:
            if self._problem != str(error):
                log.warning("%s", error)
            self._problem = str(error)
            return False
        self._problem = ""
        self._written_at_ns = clock.boot_now_ns()
        return True
