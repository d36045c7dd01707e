"""What a store holds, in a few hundred bytes: by stream and epoch, runs of sequences with samples and times. Pure.

Kept beside a database, it tells what the database has lost. Loss records stand with the samples that they speak of.
"""

from __future__ import annotations

import json
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

from gateway.spool.store import EpochKey, Held, Range, Row, StreamKey, Suspect, Tally

RUNS_MAX = 256
"""Runs of one stream and epoch: enough for every hole that receipts leave for a moment."""
RUNS_EXACT = 64
"""The oldest runs are the first to be sent, the newest the first to vanish with a log: both keep their block sizes."""
TEXT_BYTES_MAX = 1 << 20
"""Of marks when they are unpacked: what is larger was not written by this program."""

Columns = tuple[int, int, int, int, str, int, str]
"""Sequence, samples, first and last time, boot, offset, lost signal of a row."""


@dataclass(frozen=True, slots=True)
class Run:
    """Blocks with sequences one after the other, from the same clock."""

    first: int
    last: int
    samples: int
    """In all of them; of a loss record those that it speaks of."""
    even: bool
    """Whether each block has as many."""
    first_ns: int
    last_ns: int
    boot: str = ""
    offset_ns: int = 0
    lost_signal: str = ""
    """Of a loss record, which always stands alone."""

    @property
    def blocks(self) -> int:
        return self.last - self.first + 1

    def part(self, first: int, last: int, samples: int | None = None) -> Run:
        """Some of its blocks; times in between are interpolated, and so are samples where sizes are unknown."""
        if (first, last) == (self.first, self.last):
            return self
        start, stop = (
            self.first_ns + (self.last_ns + 1 - self.first_ns) * (number - self.first) // self.blocks
            for number in (first, last + 1)
        )
        share = samples
        if share is None:
            share = self.samples * (last - first + 1) // self.blocks
        first_ns = self.first_ns if first == self.first else start
        last_ns = self.last_ns if last == self.last else max(stop - 1, first_ns)
        return replace(self, first=first, last=last, samples=share, first_ns=first_ns, last_ns=last_ns)


@dataclass(slots=True)
class Marks:
    """Runs by stream and epoch, in order of their sequences, and the tallies of all streams."""

    runs: dict[EpochKey, list[Run]] = field(default_factory=dict)
    tallies: dict[StreamKey, Tally] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        """A row is here."""
        samples = row.lost if row.lost_signal else row.samples
        times = (row.first_ns, row.last_ns)
        self.add_columns(row.epoch_key, (row.sequence, samples, *times, row.boot, row.offset_ns, row.lost_signal))
        self._bound(row.epoch_key)

    def add_columns(self, key: EpochKey, columns: Columns) -> None:
        """The same from its columns, with every run kept."""
        sequence, samples, first_ns, last_ns, boot, offset_ns, lost_signal = columns
        run = Run(sequence, sequence, samples, True, first_ns, last_ns, boot, offset_ns, lost_signal)  # noqa: FBT003
        runs = self.runs.setdefault(key, [])
        at = bisect_right(runs, sequence, key=attrgetter("first")) if runs and runs[-1].last >= sequence else len(runs)
        if at and runs[at - 1].last >= sequence:
            return
        runs.insert(at, run)
        for place in (at, at - 1):
            if 0 <= place < len(runs) - 1 and (both := _joined(runs[place], runs[place + 1], exact=True)):
                runs[place : place + 2] = [both]

    def copy(self) -> Marks:
        """Marks that can be changed without these."""
        return Marks({key: list(runs) for key, runs in self.runs.items()}, dict(self.tallies))

    def count(self, counts: Mapping[StreamKey, tuple[int, int, int]]) -> None:
        """Add blocks, samples accepted and samples lost to the tallies."""
        for key, (blocks, accepted, lost) in counts.items():
            before = self.tallies.get(key, Tally(0, 0, 0))
            if blocks or accepted or lost:
                self.tallies[key] = Tally(before.blocks + blocks, before.accepted + accepted, before.lost + lost)

    def take(self, key: EpochKey, sequence: int, samples: int) -> None:
        """A row is no longer here."""
        runs = self.runs.get(key, [])
        at = bisect_right(runs, sequence, key=attrgetter("first")) - 1
        if at < 0 or runs[at].last < sequence:
            return
        run = runs[at]
        rest = run.samples - (run.samples // run.blocks if run.even else min(samples, run.samples))
        before, after = sequence - run.first, run.last - sequence
        left = rest * before // max(before + after, 1)
        parts = []
        if before:
            parts.append(run.part(run.first, sequence - 1, left))
        if after:
            parts.append(run.part(sequence + 1, run.last, rest - left))
        runs[at : at + 1] = parts
        if not runs:
            del self.runs[key]

    def holds(self, key: EpochKey, sequence: int) -> bool:
        """Whether a row should be here."""
        return self._run_of(key, sequence) is not None

    def known(self, held: Held) -> Held:
        """A row of which only the identity is trusted, with what stands of it here.

        Exact as long as each block's size is kept; times at least are within those of its run.
        """
        run = self._run_of(held.epoch_key, held.sequence)
        if run is None:
            return held
        samples = run.samples // run.blocks if run.even else held.samples
        alone = run.blocks == 1
        return replace(
            held,
            first_ns=run.first_ns if alone else min(max(held.first_ns, run.first_ns), run.last_ns),
            last_ns=run.last_ns if alone else min(max(held.last_ns, run.first_ns), run.last_ns),
            samples=0 if run.lost_signal else samples,
            lost=run.samples if run.lost_signal else 0,
            lost_signal=run.lost_signal,
            boot=run.boot,
            offset_ns=run.offset_ns,
        )

    def held(self) -> dict[EpochKey, Range]:
        """Lowest and highest sequence of each stream and epoch."""
        return {key: (runs[0].first, runs[-1].last) for key, runs in self.runs.items()}

    def lacking(self, found: Marks) -> list[Suspect]:
        """What stands here and was not found."""
        suspects = []
        for key, runs in self.runs.items():
            there = found.runs.get(key, [])
            for run in runs:
                suspects += [suspect(key, part) for part in _without(run, there)]
        return suspects

    def agreed(self, found: Marks) -> Marks:
        """What was found, with the numbers that stand here where it does: a damaged row gives others."""
        runs: dict[EpochKey, list[Run]] = {}
        for key in {**self.runs, **found.runs}:
            mine, there = self.runs.get(key, []), found.runs.get(key, [])
            parts = [part for run in there for part in _without(run, mine)]
            for run in mine:
                after = run.first
                for gap in [*_without(run, there), None]:
                    last = gap.first - 1 if gap else run.last
                    if after <= last:
                        parts.append(run.part(after, last))
                    after = gap.last + 1 if gap else after
            if parts:
                runs[key] = _all_joined(sorted(parts, key=attrgetter("first")))
        return Marks(runs, dict(self.tallies))

    def encode(self, size_max: int) -> bytes:
        """A few hundred bytes; where they would be more than there is room for, only the newest runs are in them."""
        tallies = [[*key, tally.blocks, tally.accepted, tally.lost] for key, tally in self.tallies.items()]
        for count in (RUNS_MAX, RUNS_EXACT, 8, 1, 0):
            runs = [[*key, [_numbers(run) for run in of[-count:]]] for key, of in self.runs.items() if count]
            text = json.dumps({"tallies": tallies, "runs": runs}, separators=(",", ":"))
            data = zlib.compress(text.encode())
            if len(data) <= size_max:
                return data
        raise ValueError(f"tallies of {len(data)} bytes, there is room for {size_max}")

    def bound(self) -> None:
        """Keep no more runs of any stream than there is room for."""
        for key in self.runs:
            self._bound(key)

    @classmethod
    def decode(cls, data: bytes) -> Marks:
        """Raises `ValueError`."""
        try:
            content = json.loads(zlib.decompressobj().decompress(data, TEXT_BYTES_MAX))
            runs = {(d, s, e): [_run(numbers) for numbers in of] for d, s, e, of in content["runs"]}
            return cls(runs, {(d, s): Tally(*numbers) for d, s, *numbers in content["tallies"]})
        except (zlib.error, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"marks: {error}") from None

    def _run_of(self, key: EpochKey, sequence: int) -> Run | None:
        runs = self.runs.get(key, [])
        at = bisect_right(runs, sequence, key=attrgetter("first")) - 1
        return runs[at] if at >= 0 and runs[at].last >= sequence else None

    def _bound(self, key: EpochKey) -> None:
        """Forget block sizes, or in the end the oldest runs, where there are too many."""
        runs = self.runs[key]
        while len(runs) > RUNS_MAX:
            middle = range(RUNS_EXACT, len(runs) - RUNS_EXACT)
            joined = ((at, _joined(runs[at], runs[at + 1], exact=False)) for at in middle)
            at, run = next(((at, run) for at, run in joined if run), (0, None))
            runs[at : at + 2] = [run] if run else runs[1:2]


def suspect(key: EpochKey, run: Run) -> Suspect:
    """A run that is missing."""
    device, signal, epoch = key
    return Suspect(
        device,
        signal,
        epoch,
        run.first,
        run.last,
        run.samples,
        run.even,
        run.first_ns,
        run.last_ns,
        run.boot,
        run.offset_ns,
        run.lost_signal,
    )


def without(found: Suspect, ranges: Iterable[Range]) -> list[Suspect]:
    """What is left of a suspect when these sequences are accounted for."""
    run = Run(
        found.first,
        found.last,
        found.samples,
        found.even,
        found.first_ns,
        found.last_ns,
        found.boot,
        found.offset_ns,
        found.lost_signal,
    )
    there = sorted((max(first, run.first), min(last, run.last)) for first, last in ranges)
    parts = _without(run, [run.part(first, last) for first, last in there if first <= last])
    return [suspect((found.device, found.signal, found.epoch), part) for part in parts]


def apart(found: Suspect, alone: Iterable[int]) -> list[Suspect]:
    """A suspect in parts, of which these sequences each are one."""
    numbers = sorted(number for number in alone if found.first <= number <= found.last)
    parts = without(found, [(number, number) for number in numbers])
    for number in numbers:
        parts += without(found, [(found.first, number - 1), (number + 1, found.last)])
    return parts


def _without(run: Run, there: Sequence[Run]) -> Iterator[Run]:
    """The parts of a run that other runs do not cover; with their own samples where that can be known."""
    gaps, after, counted = [], run.first, 0
    start = max(bisect_right(there, run.first, key=attrgetter("first")) - 1, 0)
    for other in there[start:]:
        if other.first > run.last:
            break
        first, last = max(other.first, run.first), min(other.last, run.last)
        if first > last:
            continue
        counted += other.part(first, last).samples
        if after < first:
            gaps.append((after, first - 1))
        after = max(after, last + 1)
    if after <= run.last:
        gaps.append((after, run.last))
    rest, blocks = max(run.samples - counted, len(gaps)), sum(last - first + 1 for first, last in gaps)
    for first, last in gaps:
        number = last - first + 1
        share = run.samples // run.blocks * number if run.even else rest * number // blocks
        rest, blocks = rest - share, blocks - number
        yield run.part(first, last, share)


def _all_joined(runs: Sequence[Run]) -> list[Run]:
    joined: list[Run] = []
    for run in runs:
        both = _joined(joined[-1], run, exact=True) if joined else None
        joined[-1:] = [both] if both else [*joined[-1:], run]
    return joined


def _joined(before: Run, after: Run, *, exact: bool) -> Run | None:
    same_clock = (before.boot, before.offset_ns) == (after.boot, after.offset_ns)
    if before.last + 1 != after.first or not same_clock or before.lost_signal or after.lost_signal:
        return None
    even = before.even and after.even and before.samples * after.blocks == after.samples * before.blocks
    if exact and not even:
        return None
    first_ns, last_ns = min(before.first_ns, after.first_ns), max(before.last_ns, after.last_ns)
    samples = before.samples + after.samples
    return Run(before.first, after.last, samples, even, first_ns, last_ns, before.boot, before.offset_ns)


def _numbers(run: Run) -> list[Any]:
    numbers = [run.first, run.last, run.samples, int(run.even), run.first_ns, run.last_ns]
    return [*numbers, run.boot, run.offset_ns, run.lost_signal] if run.boot or run.lost_signal else numbers


def _run(numbers: Sequence[Any]) -> Run:
    first, last, samples, even, *rest = numbers
    return Run(first, last, samples, bool(even), *rest)
