"""What to give up when the outbox is full: by class, oldest first, never silently. Pure.

Raw signals go first, then `brain_state`, then `vital_signs`; loss records are never given up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gateway.samples import BRAIN_STATE, LOSS, VITAL_SIGNS, LossCause, LossRecord
from gateway.spool.store import Held, Suspect
from gateway.wire import topics

_RANK = {BRAIN_STATE: 1, VITAL_SIGNS: 2}
RAW_RANK = 0
"""Every signal that is not named above is raw."""
RUNS_MAX = 1000
"""Runs of blocks in one record: far below what a message may hold, and it stays a few kilobytes."""
RECORD_BYTES = 600
"""What a loss record takes in the outbox, with long names: so much less is freed for each stream that loses rows."""


def rank(signal: str) -> int:
    """The lower, the sooner it is given up."""
    return _RANK.get(signal, RAW_RANK)


def shed_order(signals: Iterable[str]) -> list[list[str]]:
    """Signals in the order in which they are given up, those of equal rank together."""
    by_rank: dict[int, list[str]] = {}
    for signal in sorted(set(signals) - {LOSS}):
        by_rank.setdefault(rank(signal), []).append(signal)
    return [by_rank[key] for key in sorted(by_rank)]


def choose(oldest: Sequence[Held], bytes_to_free: int) -> list[Held]:
    """As many of the oldest rows as free that much, their loss records considered, or all of them."""
    chosen: list[Held] = []
    streams: set[tuple[str, str]] = set()
    freed_bytes = 0
    for row in oldest:
        if freed_bytes - RECORD_BYTES * len(streams) >= bytes_to_free:
            break
        chosen.append(row)
        freed_bytes += row.size
        streams.add((row.device, row.signal))
    return chosen


def losses(rows: Sequence[Held], cause: LossCause, epoch: str) -> list[LossRecord]:
    """One record for each uninterrupted range of sequences among rows that are given up; `epoch`: the records' own."""
    records: list[LossRecord] = []
    for row in sorted(rows, key=lambda held: (held.device, held.signal, held.epoch, held.sequence)):
        first_ns, last_ns = sorted((row.first_ns, row.last_ns))  # of a damaged row anything may be wrong
        samples = max(row.samples, 1)
        sequences = (row.sequence, row.sequence)
        record = LossRecord(
            row.device,
            row.signal,
            cause,
            first_ns,
            last_ns,
            samples,
            sequences,
            "" if row.epoch == epoch else row.epoch,
            ((1, samples),),
        )
        if records and follows(records[-1], record):
            records[-1] = joined(records[-1], record)
        else:
            records.append(record)
    return records


def is_named(row: Held) -> bool:
    """Whether a row's stream can be named at all: damage may have taken that too."""
    names = (row.device, row.signal, row.epoch, *([row.lost_signal] if row.signal == LOSS else []))
    return all(topics.is_name(name) for name in names) and row.sequence >= 0


def reissued(row: Held) -> LossRecord:
    """What is still known of the loss that a damaged loss record told: all but its cause and sequences."""
    first_ns, last_ns = sorted((row.first_ns, row.last_ns))
    return LossRecord(row.device, row.lost_signal, LossCause.CORRUPT, first_ns, last_ns, max(row.lost, 1))


def disappeared(suspect: Suspect, epoch: str) -> tuple[LossRecord, tuple[str, int] | None]:
    """The record of rows that nobody has any more, and its epoch and sequence where those are not new.

    `epoch`: that of new records. A loss record that disappeared is issued again under its old identity.
    """
    first_ns, last_ns = sorted((suspect.first_ns, suspect.last_ns))
    samples = max(suspect.samples, 1)
    if suspect.lost_signal:
        record = LossRecord(suspect.device, suspect.lost_signal, LossCause.CORRUPT, first_ns, last_ns, samples)
        return record, (suspect.epoch, suspect.first)
    blocks = suspect.last - suspect.first + 1
    is_even = suspect.even and samples % blocks == 0
    record = LossRecord(
        suspect.device,
        suspect.signal,
        LossCause.CORRUPT,
        first_ns,
        last_ns,
        samples,
        (suspect.first, suspect.last),
        "" if suspect.epoch == epoch else suspect.epoch,
        ((blocks, samples // blocks),) if is_even else (),
    )
    return record, None


def follows(before: LossRecord, after: LossRecord) -> bool:
    """Whether a record goes on where another of the same stream and cause ends."""
    same = (before.device, before.signal, before.cause, before.epoch) == (
        *(after.device, after.signal, after.cause, after.epoch),
    )
    if not same or (before.sequences is None) != (after.sequences is None):
        return False
    if before.sequences is None or after.sequences is None:
        return True
    return before.sequences[1] + 1 == after.sequences[0]


def all_joined(records: Iterable[LossRecord]) -> list[LossRecord]:
    """As few records as say the same: each goes on with the last one of its stream and cause, where it follows that."""
    last: dict[tuple[str, str, LossCause, str, bool], int] = {}
    found: list[LossRecord] = []
    for record in records:
        key = (record.device, record.signal, record.cause, record.epoch, record.sequences is None)
        at = last.get(key)
        if at is not None and follows(found[at], record) and len(found[at].block_runs) < RUNS_MAX:
            found[at] = joined(found[at], record)
        else:
            last[key] = len(found)
            found.append(record)
    return found


def joined(before: LossRecord, after: LossRecord) -> LossRecord:
    """Two records that follow each other, as one."""
    sequences = None
    runs: tuple[tuple[int, int], ...] = ()
    if before.sequences is not None and after.sequences is not None:
        sequences = (before.sequences[0], after.sequences[1])
        if before.block_runs and after.block_runs:
            runs = _joined_runs(before.block_runs, after.block_runs)
    return LossRecord(
        before.device,
        before.signal,
        before.cause,
        min(before.first_ns, after.first_ns),
        max(before.last_ns, after.last_ns),
        before.sample_count + after.sample_count,
        sequences,
        before.epoch,
        runs,
    )


def _joined_runs(
    before: tuple[tuple[int, int], ...], after: tuple[tuple[int, int], ...]
) -> tuple[tuple[int, int], ...]:
    """Runs of blocks of equal size, one after the other."""
    (blocks, samples), (more, same) = before[-1], after[0]
    if samples == same:
        return (*before[:-1], (blocks + more, samples), *after[1:])
    return before + after
