"""What is true: every sample that was handed over, accepted, given up, stored. The invariants are checked against it.

A sample carries its own number as its value, so that a point in the store tells which sample it is.
"""

from __future__ import annotations

import zlib
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from gateway.samples import LOSS, NS_PER_S, QUALITY, ClockState, LossCause, LossRecord, SampleBlock
from gateway.spool.store import Row
from gateway.wire import codec
from tests.simulation.host import BEGIN_NS

Stream = tuple[str, str]
"""Device serial and signal."""
Block = tuple[str, str, str, int]
"""A row's identity: device, signal, epoch and sequence."""
TROUBLE_SHOWN_MAX = 12
TRACE_SHOWN_MAX = 60
ON_ITS_WAY_NS = 100_000_000
"""What no bound can tell: a packet's way to the host."""


@dataclass(slots=True)
class StreamBook:
    """One signal of one device."""

    handed: dict[int, float] = field(default_factory=dict)
    """Number of each sample that the decoder gave out -> when it was taken, s."""
    radio: int = 0
    """Samples that the decoder reported as missing."""
    accepted: dict[int, int] = field(default_factory=dict)
    """Time, ns -> number, of every sample that the outbox committed."""
    numbers: set[int] = field(default_factory=set)
    """Of the accepted samples."""
    forgone: set[int] = field(default_factory=set)
    """Samples in memory when the power went: never accepted."""
    radio_forgone: int = 0
    given_up: set[int] = field(default_factory=set)
    """Times of accepted samples that the outbox gave up."""
    losses: Counter[str] = field(default_factory=Counter)
    """Samples in the loss records that the outbox committed, by cause."""
    destroyed: set[int] = field(default_factory=set)
    """Times of accepted samples on a disk that is no more."""
    given_up_untimed: int = 0
    """Samples that the outbox gave up before their times were final."""

    def true_ns(self, number: int) -> int:
        """When a sample was taken, UTC."""
        return BEGIN_NS + round(self.handed[number] * NS_PER_S)


class Books:
    """The truth of one simulation, and every breach of it that was seen."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self.streams: dict[Stream, StreamBook] = {}
        self.blocks: dict[Block, tuple[int, ...]] = {}
        """Every accepted block -> the times of its samples."""
        self.provisional: dict[Block, list[int]] = {}
        """Accepted blocks whose times are not final -> their numbers."""
        self.losses: dict[Block, LossRecord] = {}
        """Every accepted loss record."""
        self.shed: set[Block] = set()
        self.again: set[Block] = set()
        """Blocks that get their times a second time."""
        self.gone: set[Block] = set()
        """Rows on disks that are no more."""
        self.disturbed: set[str] = set()
        """Gateways that lost a disk: of what was on it nobody knows how much it was."""
        self.troubles: list[str] = []
        self.trace: deque[str] = deque(maxlen=TRACE_SHOWN_MAX)
        self._before_first: list[str] = []
        """What led to the first breach."""
        self.digest = 0
        self.counts: Counter[str] = Counter()
        self.is_stored: Callable[[Stream, int], bool] = lambda _stream, _time_ns: True
        """Whether the time-series store has a sample."""
        self._now_s = now_s

    def stream(self, device: str, signal: str) -> StreamBook:
        return self.streams.setdefault((device, signal), StreamBook())

    # --- what happens

    def note(self, text: str) -> None:
        """One line of the trace."""
        line = f"{moment(self._now_s())} {text}"
        self.trace.append(line)
        self.digest = zlib.crc32(line.encode(), self.digest)

    def trouble(self, text: str) -> None:
        self.note(f"BROKEN: {text}")
        self.troubles.append(f"{moment(self._now_s())} {text}")
        if len(self.troubles) == 1:
            self._before_first = [*self.trace]

    def handed(self, device: str, signal: str, numbers: Sequence[int], step_s: float = 0.0) -> None:
        """The newest of the samples was taken now."""
        now_s = self._now_s()
        newest = numbers[-1]
        self.stream(device, signal).handed.update({number: now_s - (newest - number) * step_s for number in numbers})

    def missed(self, device: str, signal: str, count: int) -> None:
        self.stream(device, signal).radio += count

    def opened(self, gateway: str, rows: Sequence[Row]) -> None:
        """What waits for its time on a disk from a backup may have got it already."""
        self.again |= {row.identity for row in rows if row.boot and row.identity in self.blocks}
        self.note(f"{gateway} opens its outbox of {len(rows)} rows")

    def destroyed(self, gateway: str, rows: set[Block]) -> None:
        """These were on a disk that is no more."""
        self.gone |= rows
        for identity in rows:
            device, signal = identity[:2]
            if signal != LOSS:
                self.stream(device, signal).destroyed.update(self.blocks.get(identity, ()))
        self.disturbed.add(gateway)
        self.note(f"{gateway} loses its disk with {len(rows)} rows")

    def accepted(self, gateway: str, rows: Sequence[Row]) -> None:
        """The outbox committed these; of one with provisional times only its final ones count."""
        if not rows:
            return
        for row in rows:
            message = codec.decode(row.payload.data, row.payload.content_type)
            if isinstance(message.content, LossRecord):
                self._accepted_loss(row, message.content)
            else:
                self._accepted_block(row, message.content)
        self.counts["rows"] += len(rows)
        self.note(f"{gateway} commits {len(rows)} rows")

    def _accepted_loss(self, row: Row, loss: LossRecord) -> None:
        known = self.losses.get(row.identity)
        self.losses[row.identity] = loss
        book = self.stream(loss.device, loss.signal)
        if known is None:
            book.losses[loss.cause] += loss.sample_count
        elif (known.cause, known.sample_count) != (loss.cause, loss.sample_count):
            self.trouble(f"a loss record changed: {known} to {loss}")

    def _accepted_block(self, row: Row, block: SampleBlock) -> None:
        book, values = self.stream(block.device, block.signal), numbers_of(block)
        if row.identity in self.provisional:
            if self.provisional.pop(row.identity) != values:
                self.trouble(f"a block changed when it got its times: {row.identity}")
        elif row.identity in self.again:
            return
        elif row.identity in self.blocks:
            self.trouble(f"sequence given twice: {row.identity}")
        elif not book.numbers.isdisjoint(values):
            self.trouble(f"accepted twice: {block.device} {block.signal} {sorted(book.numbers & set(values))[:5]}")
        book.numbers.update(values)
        if row.boot:
            self.provisional[row.identity] = values
            return
        times = tuple(block.times_ns.tolist())
        self.blocks[row.identity] = times
        if taken := book.accepted.keys() & set(times):
            self.trouble(f"a time is given twice in {block.device} {block.signal}: {sorted(taken)[:3]}")
        book.accepted.update(zip(times, values, strict=True))
        if block.clock.state is ClockState.SYNCED:
            self._check_times(block, times, values)

    def _check_times(self, block: SampleBlock, times: Sequence[int], values: Sequence[int]) -> None:
        """Who says that the time is known states it within the bound."""
        book = self.stream(block.device, block.signal)
        worst_ns = max(abs(at - book.true_ns(number)) for at, number in zip(times, values, strict=True))
        if worst_ns > block.clock.error_ns + ON_ITS_WAY_NS:
            self.trouble(
                f"{block.device} {block.signal}: time is wrong by {worst_ns / NS_PER_S:.3f} s, "
                f"the bound says {block.clock.error_ns / NS_PER_S:.3f} s"
            )

    def given_up(self, gateway: str, rows: Sequence[Row]) -> None:
        """The outbox gave these up, and says so in loss records."""
        if not rows:
            return
        for row in rows:
            if row.identity in self.blocks:
                self.shed.add(row.identity)
                self.stream(*row.key).given_up.update(self.blocks[row.identity])
            elif row.identity in self.provisional:
                self.shed.add(row.identity)
                self.stream(*row.key).given_up_untimed += len(self.provisional.pop(row.identity))
        self.counts["rows given up"] += len(rows)
        self.note(f"{gateway} gives up {len(rows)} rows")

    def withdrawn(self, rows: Sequence[Row]) -> None:
        """Loss records that others take the place of, which say the same in fewer rows."""
        for row in rows:
            if (loss := self.losses.pop(row.identity, None)) is not None:
                self.stream(loss.device, loss.signal).losses[loss.cause] -= loss.sample_count

    def forgotten(self, gateway: str, rows: Sequence[Row]) -> None:
        """The outbox deleted these because of a receipt: then they are stored."""
        if not rows:
            return
        for row in rows:
            if row.signal == LOSS:
                continue
            missing = [at for at in self.blocks[row.identity] if not self.is_stored(row.key, at)]
            if missing:
                self.trouble(f"{gateway} forgot {row.device} {row.signal} {row.sequence}, which is not stored")
        self.note(f"{gateway} forgets {len(rows)} rows")

    def forgo(self, stream: Stream, grace_s: float) -> None:
        """What was in memory alone is no more; nothing had been there for longer than `grace_s`."""
        now_s, book = self._now_s(), self.stream(*stream)
        lost = book.handed.keys() - book.numbers - book.forgone
        book.forgone |= lost
        book.radio_forgone = book.radio - book.losses[LossCause.RADIO]
        self.counts["samples in memory alone"] += len(lost)
        oldest_s = min((book.handed[number] for number in lost), default=now_s)
        if now_s - oldest_s > grace_s:
            self.trouble(f"{' '.join(stream)}: a sample was in memory alone for {now_s - oldest_s:.0f} s")

    # --- the verdict

    def check_stream(
        self,
        stream: Stream,
        stored: Mapping[int, int],
        counted: int,
        recorded: Mapping[str, int],
        *,
        is_disturbed: bool,
    ) -> None:
        """`stored`: time -> number of every point; `counted`: `point_count`; `recorded`: lost samples by cause.

        `is_disturbed`: loss records may have gone with a disk.
        """
        book, name = self.stream(*stream), " ".join(stream)
        if back := _times_that_go_back(book.accepted):
            self.trouble(f"{name}: {len(back)} times go back, such as {back[:3]}")
        if wrong := [at for at, number in stored.items() if book.accepted.get(at) != number]:
            self.trouble(f"{name}: {len(wrong)} points are no accepted sample, such as {wrong[:3]}")
        if lost := book.accepted.keys() - stored.keys() - book.given_up - book.destroyed:
            self.trouble(
                f"{name}: {len(lost)} of {len(book.accepted)} accepted samples are LOST, such as {sorted(lost)[:3]}"
            )
        if counted != len(stored):
            self.trouble(f"{name}: point_count is {counted}, there are {len(stored)} points")
        if unaccounted := book.handed.keys() - book.numbers - book.forgone:
            self.trouble(f"{name}: {len(unaccounted)} samples were read and never accepted: {sorted(unaccounted)[:3]}")
        if is_disturbed:
            return
        shed = len(book.accepted) - len(stored) + book.given_up_untimed
        if recorded.get(LossCause.SHED, 0) != shed:
            self.trouble(f"{name}: {recorded.get(LossCause.SHED, 0)} samples recorded as shed, {shed} are")
        if recorded.get(LossCause.RADIO, 0) != book.radio - book.radio_forgone:
            self.trouble(
                f"{name}: {recorded.get(LossCause.RADIO, 0)} samples recorded as lost by radio, "
                f"{book.radio - book.radio_forgone} were"
            )

    def report(self, seed: object) -> str:
        """What a failing test says."""
        shown = [*self.troubles[:TROUBLE_SHOWN_MAX]]
        if len(self.troubles) > len(shown):
            shown.append(f"… and {len(self.troubles) - len(shown)} more")
        return "\n".join(
            [
                f"seed {seed}: {len(self.troubles)} promises broken. To see it again:",
                f"WARDLINK_SEED={seed} python -m pytest tests/simulation",
                *shown,
                "before the first of them:",
                *self._before_first,
            ]
        )


def _times_that_go_back(accepted: Mapping[int, int]) -> list[tuple[int, int]]:
    """Neighbours in the device's own order whose times are the other way round."""
    in_order = sorted((number, at) for at, number in accepted.items())
    return [(before, after) for (_, before), (_, after) in pairwise(in_order) if after <= before]


def numbers_of(block: SampleBlock) -> list[int]:
    """The numbers that the samples of a block carry."""
    (name,) = (name for name in block.columns if name != QUALITY)
    return np.rint(block.physical(name)).astype(np.int64).tolist()


def moment(seconds: float) -> str:
    """Virtual time as days and a time of day since the beginning."""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    days, hours = divmod(hours, 24)
    return f"day {days:2d} {hours:02d}:{minutes:02d}:{rest:06.3f}"
