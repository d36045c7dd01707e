"""The host's UTC with its trust.

UTC is the time since boot plus an offset. The offset that is stated follows whoever knows the time (the kernel's
disciplined clock, or a bridge), and not every step of a clock that anybody may set: a step is doubtful until it is
confirmed. Knows neither the outbox nor devices; who holds blocks back and puts them right is `gateway.timekeeper`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from gateway.anchor import DRIFT_PPM, PPM, UNSEEN_ERROR_NS, Anchor, Source
from gateway.kernel_clock import UNKNOWN_ERROR_NS, Discipline, kernel_discipline
from gateway.samples import NS_PER_S, ClockStamp, ClockState

log = logging.getLogger(__name__)

STEP_NS = 50_000_000
"""A change of UTC against the time since boot beyond this is a step, not the noise of reading both."""
OFFSET_READINGS = 3
"""Two clocks cannot be read at once; of so many tries the quickest is taken."""
CONFIRM_NS = 10 * NS_PER_S
"""A step that has stood for so long is meant: time services that step do it once, and say so within seconds."""
SYNCED_ERROR_NS_MAX = UNKNOWN_ERROR_NS
"""A time that is known no better than this is not known: the kernel's own limit."""
SLEW_PPM = 500
"""How fast a small correction is worked in: as fast as the kernel does it. A raw block of 1 s bends by 0.5 ms."""
SLEW_NS_MAX = NS_PER_S
"""Corrections up to a leap second are worked in, without a break; larger ones are steps."""
RTC_ERROR_NS = NS_PER_S
"""What the time slept may be wrong by: it comes from a clock that counts whole seconds. The kernel's bound ignores it;
its time service mends it with the next poll, at which the bound falls."""
SLEEP_NS = 100_000_000
"""The machine slept, if the time since boot gained so much on the monotonic clock, which stands still then."""
NOISE_NS = 1_000_000
"""Two readings of the same clocks differ by less, unless the machine is overloaded: no reason to put times right."""
WIDEST_ERROR_NS = 100 * 366 * 86_400 * NS_PER_S
"""Of a clock that is certainly wrong and nobody can say by how much."""


@dataclass(slots=True)
class _Stretch:
    """What was given out since time was broken last."""

    went_out: bool = False
    """Whether anything can no longer be changed."""
    held_from_ns: int | None = None
    """Earliest UTC that is held back."""
    held_with: set[int] = field(default_factory=set)
    """Offsets that it is held back with: they move together."""


class HostClock:
    """UTC of monotonic instants. `refresh` looks at the system's clocks, `learn` takes the word of a bridge.

    A correction is
    - a shift, where all that was stated so far is held back: it is put right together with what comes;
    - slewed, where it is small: no break, and the rest counts as error;
    - a leap forward with a break before it, where times have gone out that can no longer be changed;
    - a setback, where they have and lie in the future: who is running keeps his time (see `SegmentClock`).
    """

    def __init__(
        self,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
        utc_ns: Callable[[], int] = time.time_ns,
        discipline: Callable[[], Discipline] = kernel_discipline,
        *,
        boot_ns: Callable[[], int] | None = None,
        holds: bool = False,
        anchor: Anchor | None = None,
        not_before_ns: int = 0,
        stated_ns: int | None = None,
        sent_through_ns: int = 0,
    ) -> None:
        """`boot_ns`: time since boot, sleep included; None for a machine that never sleeps. `holds`: blocks can be
        held back while the time is unknown. `anchor`: known from an earlier process of this boot. `not_before_ns`: UTC
        that has certainly passed. `stated_ns`: the offset that an earlier process of this boot began with.
        `sent_through_ns`: newest UTC that went out before.
        """
        self._monotonic_ns = monotonic_ns
        self._utc_ns = utc_ns
        self._discipline = discipline
        self._boot_ns = boot_ns
        self._may_hold = holds
        self._released = False
        self._asleep_ns = self._read_asleep_ns()
        self.anchor = anchor
        """The best that is known of this boot's time."""
        self._rival: Anchor | None = None
        """What the system's clock says instead, since when."""
        self._other: Anchor | None = None
        """What a bridge said that contradicts the anchor."""
        self._doubts = dict.fromkeys((Source.NTP, Source.BRIDGE), 0)
        """How far who else speaks of the time is away from it, ns, where that is doubtful; by source."""
        boot, self._followed_ns = self._read_offset_ns()
        self._unfollowed_ns = 0
        """`_followed_ns`: the system's own offset, as last found credible. `_unfollowed_ns`: its change since then."""
        self._floor_ns = not_before_ns - boot
        self.offset_ns = max(self._followed_ns if stated_ns is None else stated_ns, self._floor_ns)
        """UTC minus boot time, as it is stated."""
        self._slewed_ns = boot
        self.shift_ns = 0
        self.setback_ns = 0
        """Sum of all setbacks."""
        self.put_right: dict[int, int] = {}
        """Which offset takes the place of the one that blocks were held back with. It is the same one where they cannot
        be put right: later times have gone out already, or nobody told the time in time."""
        self._stretch = _Stretch()
        self.sent_through_ns = sent_through_ns
        """Newest time that went out."""
        self.began_after_ns = sent_through_ns
        """The same, when this process began: its first segments lie behind it."""
        self.is_held = False
        """Whether blocks are to be held back until the time is known."""
        self._unrenewed_ns = 0
        """Error that sleep may have added and the kernel does not know of, until its discipline is renewed."""
        self._said_error_ns = 0
        self.disciplined = False
        """Whether the kernel says that somebody disciplines its clock."""
        self.on_break: list[Callable[[], None]] = []
        """Called before time is broken: give out what is there, and begin anew."""
        self.known = self.stamp = ClockStamp(ClockState.UNKNOWN, UNKNOWN_ERROR_NS)
        """`known`: what is known of the clock. `stamp`: what blocks carry; of one that is held back only the part that
        is its own, the clock's part comes when the time is known."""
        said = self._discipline()
        if said.state is ClockState.SYNCED and anchor is None:
            self.anchor = Anchor(self._followed_ns, said.error_ns + UNSEEN_ERROR_NS, boot, Source.NTP)
        self._target_ns = self.offset_ns = self.anchor.offset_ns if self.anchor else self.offset_ns
        self.refresh()

    def refresh(self) -> None:
        """Look at the system's clocks; to be called about once a second."""
        self._note_sleep()
        boot, offset_ns = self._read_offset_ns()
        said = self._discipline()
        self.disciplined = said.state is ClockState.SYNCED
        if said.error_ns < self._said_error_ns or not self.disciplined:
            self._unrenewed_ns = 0
        self._said_error_ns = said.error_ns
        if self.disciplined:
            error_ns = said.error_ns + UNSEEN_ERROR_NS + self._unrenewed_ns
            self._weigh_disciplined(Anchor(offset_ns, error_ns, boot, Source.NTP))
        elif self.anchor is None:
            self._weigh_hearsay(Anchor(offset_ns, said.error_ns, boot, Source.NONE))
        else:
            self._rival = None
            apart_ns = offset_ns - self.anchor.offset_ns if self.anchor.source is Source.NTP else 0
            self._doubts[Source.NTP] = _beyond(apart_ns, STEP_NS)
        self._slew(boot)
        self._judge(boot, said)

    def learn(self, word: Anchor) -> None:
        """Take the word of a bridge. The kernel's is worth more, where it is disciplined and not in doubt."""
        known = self.anchor
        if known is not None and not self.is_in_doubt:
            if known.source is Source.NTP and self.disciplined:
                return
            apart_ns = abs(word.offset_ns - known.offset_ns)
            if apart_ns > word.error_ns + known.error_at(word.at_ns):
                self._other, self._doubts[Source.BRIDGE] = word, apart_ns
            elif word.error_ns < known.error_at(word.at_ns):
                self._settle(word)
        elif self._other is None or abs(word.offset_ns - self._other.offset_ns) <= word.error_ns + self._other.error_ns:
            self._settle(word)
        else:
            self._other = word
        self._judge(word.at_ns, self._discipline())

    def release(self, went_through_ns: int = 0) -> None:
        """Hold nothing back any more until the time was known once.

        `went_through_ns`: newest UTC that an earlier boot may have sent with. A clock that says less is behind: what is
        held goes out with times after it, so that none is given twice.
        """
        self._released = True
        behind_ns = went_through_ns + 1 - self._first_unsent_ns()
        if self.anchor is None and not self._stretch.went_out and behind_ns > 0:
            log.warning("the clock is behind what went out before by %.0f s", behind_ns / NS_PER_S)
            self._shift(behind_ns)
            self.offset_ns = self._target_ns = self._floor_ns = self.offset_ns + behind_ns
        if self._stretch.held_from_ns is not None:
            self.sent_through_ns = max(self.sent_through_ns, self.now_ns())
        self._judge(self.boot_now_ns(), self._discipline())

    def give_out(self, first_ns: int, last_ns: int) -> int | None:
        """Something with these times is given out. The offset that it was stated with, where it is to be held back."""
        if self.is_held:
            stretch = self._stretch
            stretch.held_from_ns = min(first_ns, first_ns if stretch.held_from_ns is None else stretch.held_from_ns)
            if self.offset_ns not in stretch.held_with:
                stretch.held_with.add(self.offset_ns)
                self.put_right[self.offset_ns] = self.offset_ns
            return self.offset_ns
        self._stretch.went_out = True
        self.sent_through_ns = max(self.sent_through_ns, last_ns)
        return None

    @property
    def is_in_doubt(self) -> bool:
        """Whether two who should know the time say different things."""
        return any(self._doubts.values())

    @property
    def wants_time(self) -> bool:
        """Whether a bridge is worth asking: the kernel's word is missing, or doubtful."""
        return not self.disciplined or self.is_in_doubt

    def utc_ns(self, monotonic_ns: int) -> int:
        """UTC in ns since 1970 of an instant of the monotonic clock."""
        return monotonic_ns + self._asleep_ns + self.offset_ns

    def monotonic_ns(self, utc_ns: int) -> int:
        """The inverse of `utc_ns`."""
        return utc_ns - self.offset_ns - self._asleep_ns

    def now_ns(self) -> int:
        """UTC of this instant, as blocks are stamped."""
        return self.utc_ns(self._monotonic_ns())

    def boot_now_ns(self) -> int:
        """Time since boot, ns: the clock of an `Anchor`. Unlike the monotonic clock it runs while the machine sleeps,
        so that one offset holds for all of a boot.
        """
        return self._monotonic_ns() if self._boot_ns is None else self._boot_ns()

    def _weigh_disciplined(self, said: Anchor) -> None:
        known = self.anchor
        if known is not None:
            apart_ns = abs(said.offset_ns - known.offset_ns)
            if known.source is Source.NTP and apart_ns <= STEP_NS:
                self._settle(said)
                return
            self._doubts[Source.NTP] = _beyond(apart_ns, STEP_NS + said.error_ns + known.error_at(said.at_ns))
        if self._confirmed(said):
            self._settle(said)

    def _weigh_hearsay(self, said: Anchor) -> None:
        """Nobody knows the time. Who sets the clock by hand means it."""
        self._unfollowed_ns = abs(said.offset_ns - self._followed_ns)
        self._doubts[Source.NTP] = _beyond(self._unfollowed_ns, STEP_NS)
        if not self._doubts[Source.NTP]:
            self._rival = None
        elif self._confirmed(said):
            self._followed_ns, self._unfollowed_ns, self._rival = said.offset_ns, 0, None
            self._doubts[Source.NTP] = 0
            self._move_to(max(said.offset_ns, self._floor_ns))

    def _confirmed(self, said: Anchor) -> bool:
        if self._rival is None or abs(self._rival.offset_ns - said.offset_ns) > STEP_NS:
            self._rival = said
        return said.at_ns - self._rival.at_ns >= CONFIRM_NS

    def _settle(self, anchor: Anchor) -> None:
        if self.anchor is None or self.anchor.source is not anchor.source:
            log.info("time is known from %s, to %.3f s", anchor.source, anchor.error_ns / NS_PER_S)
        self.anchor, self._rival, self._other = anchor, None, None
        self._doubts = dict.fromkeys(self._doubts, 0)
        self._move_to(anchor.offset_ns)

    def _move_to(self, offset_ns: int) -> None:
        change_ns = offset_ns - self.offset_ns
        is_free = self._is_free(change_ns)
        if abs(change_ns) <= (NOISE_NS if is_free else SLEW_NS_MAX):
            self._leave_held()
            self._target_ns = offset_ns
            return
        if is_free:
            self._shift(change_ns)
        elif change_ns > 0:
            log.warning("time leaps forward by %.3f s", change_ns / NS_PER_S)
            self._break()
            self._begin()
        else:
            log.warning("time was %.3f s ahead; what runs keeps its time", -change_ns / NS_PER_S)
            self._leave_held()
            self.setback_ns -= change_ns
        self.offset_ns = self._target_ns = offset_ns

    def _is_free(self, change_ns: int) -> bool:
        """Whether all that was stated since the last break can be moved, and stays behind what went out before."""
        stays_behind = self._first_unsent_ns() + change_ns > self.sent_through_ns
        return not self._stretch.went_out and (change_ns > 0 or stays_behind)

    def _first_unsent_ns(self) -> int:
        held_from_ns = self._stretch.held_from_ns
        return self.now_ns() if held_from_ns is None else held_from_ns

    def _shift(self, change_ns: int) -> None:
        self.shift_ns += change_ns
        if self._stretch.held_from_ns is not None:
            self._stretch.held_from_ns += change_ns
        for offset_ns in self._stretch.held_with:
            self.put_right[offset_ns] += change_ns

    def _leave_held(self) -> None:
        """What is held back keeps its times."""
        if self.is_held and self._stretch.held_from_ns is not None:
            self._stretch.held_from_ns, self._stretch.went_out = None, True

    def _slew(self, boot_ns: int) -> None:
        room_ns = max(0, boot_ns - self._slewed_ns) * SLEW_PPM // PPM
        self._slewed_ns = boot_ns
        if not self.is_held:
            self.offset_ns += min(max(self._target_ns - self.offset_ns, -room_ns), room_ns)

    def _judge(self, boot_ns: int, said: Discipline) -> None:
        doubt_ns = max(self._doubts.values())
        if self.anchor is not None:
            error_ns = self.anchor.error_at(boot_ns) + abs(self.anchor.offset_ns - self.offset_ns) + doubt_ns
            is_good = not doubt_ns and error_ns <= SYNCED_ERROR_NS_MAX
            state = ClockState.SYNCED if is_good else ClockState.UNSYNCED
        else:
            certainly_wrong = self._followed_ns < self._floor_ns
            error_ns = WIDEST_ERROR_NS if certainly_wrong else said.error_ns + self._unfollowed_ns
            is_unconfirmed = said.state is ClockState.SYNCED
            state = ClockState.UNSYNCED if doubt_ns or certainly_wrong or is_unconfirmed else said.state
        if state is ClockState.SYNCED:
            self._released = False
        is_held = self._may_hold and not self._released and state is ClockState.UNSYNCED
        if is_held and not self.is_held:
            self._break()
            self._begin()
        elif self.is_held and not is_held:
            self._leave_held()
        self.is_held = is_held
        self.known = ClockStamp(state, error_ns)
        self.stamp = ClockStamp(state, 0) if is_held else self.known

    def _break(self) -> None:
        for listener in tuple(self.on_break):
            listener()

    def _begin(self) -> None:
        """From here on nothing has gone out with the offset that is stated."""
        self._stretch = _Stretch()

    def _note_sleep(self) -> None:
        asleep_ns = self._read_asleep_ns()
        if asleep_ns - self._asleep_ns > SLEEP_NS:
            log.warning("the machine slept for %.1f s", (asleep_ns - self._asleep_ns) / NS_PER_S)
            self._break()
            self._unrenewed_ns += RTC_ERROR_NS + (asleep_ns - self._asleep_ns) * DRIFT_PPM // PPM
            self._asleep_ns = asleep_ns
            if self.anchor is not None:
                self.anchor = replace(self.anchor, error_ns=self.anchor.error_ns + RTC_ERROR_NS)

    def _read_asleep_ns(self) -> int:
        if self._boot_ns is None:
            return 0
        return _quickest(self._monotonic_ns, self._boot_ns)[1]

    def _read_offset_ns(self) -> tuple[int, int]:
        """Time since boot, and UTC minus it."""
        return _quickest(self.boot_now_ns, self._utc_ns)


def _beyond(apart_ns: int, limit_ns: int) -> int:
    return abs(apart_ns) if abs(apart_ns) > limit_ns else 0


def _quickest(base_ns: Callable[[], int], other_ns: Callable[[], int]) -> tuple[int, int]:
    """The reading of a clock between two of another that lay closest together: (base, other - base), ns."""
    best = (2**63, 0, 0)
    for _ in range(OFFSET_READINGS):
        before_ns, other, after_ns = base_ns(), other_ns(), base_ns()
        middle_ns = (before_ns + after_ns) // 2
        best = min(best, (after_ns - before_ns, middle_ns, other - middle_ns), key=lambda reading: reading[0])
    return best[1:]
