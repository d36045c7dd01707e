"""Marks against a plain dictionary of rows; and their file, of which one slot is whole after any cut."""

from __future__ import annotations

import fcntl
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import UnavailableError
from gateway.spool import marks as marks_module
from gateway.spool.marks import Marks, without
from gateway.spool.marks_file import SLOT_BYTES, MarksFile, newest
from gateway.spool.store import Held, Tally

KEY = ("DEV", "eeg", "e")
SECOND = 10**9

steps = st.lists(
    st.tuples(st.booleans(), st.integers(0, 25), st.integers(1, 3), st.sampled_from(["", "", "boot"])), max_size=80
)


def columns(sequence: int, samples: int, boot: str = "", lost_signal: str = "") -> tuple[Any, ...]:
    first_ns = sequence * SECOND
    return (sequence, samples, first_ns, first_ns + SECOND - 1, boot, len(boot), lost_signal)


def held(sequence: int, samples: int, boot: str = "") -> Held:
    first_ns = sequence * SECOND
    return Held(sequence + 1, *KEY, sequence, first_ns, first_ns + SECOND - 1, samples, 300, 0, "", boot, len(boot))


def filled(rows: dict[int, tuple[int, str]]) -> Marks:
    marks = Marks()
    for sequence, (samples, boot) in rows.items():
        marks.add_columns(KEY, columns(sequence, samples, boot))
    return marks


def sequences(marks: Marks) -> list[int]:
    return [number for run in marks.runs.get(KEY, []) for number in range(run.first, run.last + 1)]


@given(steps)
def test_marks_hold_what_was_added_and_not_taken(walk: list[tuple[bool, int, int, str]]) -> None:
    marks, rows = Marks(), dict[int, tuple[int, str]]()
    for adds, sequence, samples, boot in walk:
        if adds and sequence not in rows:
            marks.add_columns(KEY, columns(sequence, samples, boot))
            rows[sequence] = (samples, boot)
        elif not adds:
            marks.take(KEY, sequence, rows.pop(sequence, (0, ""))[0])
    assert sequences(marks) == sorted(rows)
    assert all(marks.holds(KEY, sequence) == (sequence in rows) for sequence in range(-1, 28))
    for run in marks.runs.get(KEY, []):
        members = [rows[number] for number in range(run.first, run.last + 1)]
        assert run.samples == sum(samples for samples, _ in members)
        assert run.even
        assert {boot for _, boot in members} == {run.boot}
        assert (run.first_ns, run.last_ns) == (run.first * SECOND, (run.last + 1) * SECOND - 1)
    assert Marks.decode(marks.encode(SLOT_BYTES)) == marks


@given(st.dictionaries(st.integers(0, 40), st.tuples(st.integers(1, 3), st.just(""))), st.sets(st.integers(0, 40)))
def test_what_is_lacking_has_its_samples_and_its_times(rows: dict[int, tuple[int, str]], gone: set[int]) -> None:
    expected = filled(rows)
    here = {sequence: row for sequence, row in rows.items() if sequence not in gone}
    suspects = expected.lacking(filled(here))
    missing = {number: suspect for suspect in suspects for number in range(suspect.first, suspect.last + 1)}
    assert set(missing) == gone & rows.keys()
    for suspect in suspects:
        numbers = range(suspect.first, suspect.last + 1)
        assert suspect.samples == sum(rows[number][0] for number in numbers)
        assert (suspect.first_ns, suspect.last_ns) == (suspect.first * SECOND, (suspect.last + 1) * SECOND - 1)
    assert sequences(expected.agreed(filled(here))) == sorted(here)


def test_numbers_of_a_damaged_row_do_not_become_marks() -> None:
    expected = filled(dict.fromkeys(range(5), (10, "")))
    damaged = filled({0: (10, ""), 1: (999, ""), 3: (10, ""), 9: (4, "")})
    agreed = expected.agreed(damaged)
    assert sequences(agreed) == [0, 1, 3, 9]
    assert sum(run.samples for run in agreed.runs[KEY]) == 34


def test_of_a_damaged_row_the_marks_know_all_but_what_they_do_not_keep() -> None:
    whole = [held(n, 10) for n in range(5)] + [held(5, 12, boot="boot"), held(6, 13)]
    marks = Marks()
    for row in whole:
        marks.add_columns(KEY, columns(row.sequence, row.samples, row.boot))
    for row in whole:
        damaged = replace(row, samples=row.samples ^ 4, lost=64, lost_signal="eef", boot="bood", offset_ns=1 << 40)
        assert marks.known(damaged) == row
    alone, among = replace(whole[6], first_ns=-1, last_ns=1 << 60), replace(whole[2], first_ns=-1, last_ns=1 << 60)
    assert marks.known(alone) == whole[6]
    assert marks.known(among) == replace(whole[2], first_ns=0, last_ns=5 * SECOND - 1), "not outside its run"
    stranger = held(7, 14)
    assert marks.known(stranger) is stranger


def test_of_a_damaged_loss_record_the_marks_know_what_it_spoke_of() -> None:
    marks = Marks()
    marks.add_columns(("DEV", "loss", "e"), columns(3, 7, lost_signal="eeg"))
    whole = replace(held(3, 0), signal="loss", lost=7, lost_signal="eeg")
    assert marks.known(replace(whole, samples=1, lost=3, lost_signal="eee", first_ns=5)) == whole


def test_loss_records_stand_alone() -> None:
    marks = Marks()
    for sequence in range(3):
        marks.add_columns(KEY, columns(sequence, 7, lost_signal="eeg"))
    assert [(run.first, run.samples, run.lost_signal) for run in marks.runs[KEY]] == [(n, 7, "eeg") for n in range(3)]


def test_runs_are_bounded_and_their_sum_stays_exact(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    monkeypatch.setattr(marks_module, "RUNS_MAX", 20)
    monkeypatch.setattr(marks_module, "RUNS_EXACT", 4)
    marks = Marks()
    chance = random.Random(1)
    sizes = [chance.randrange(1, 99) for _ in range(300)]
    for sequence, samples in enumerate(sizes):
        marks.add(make.row(sequence, samples=samples, epoch="e"))
    runs = marks.runs[KEY]
    assert len(runs) <= 20
    assert sequences(marks) == list(range(300))
    assert sum(run.samples for run in runs) == sum(sizes)
    assert [run.samples for run in runs[:3]] == sizes[:3]
    assert [run.samples for run in runs[-3:]] == sizes[-3:]
    (whole,) = marks.lacking(Marks())[4:5]
    assert not whole.even


def test_with_more_holes_than_there_is_room_for_the_newest_stay(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    monkeypatch.setattr(marks_module, "RUNS_MAX", 20)
    monkeypatch.setattr(marks_module, "RUNS_EXACT", 4)
    marks = Marks()
    for sequence in range(0, 200, 2):
        marks.add(make.row(sequence, epoch="e"))
    assert sequences(marks) == list(range(160, 200, 2))


def test_marks_that_find_no_room_keep_what_is_newest() -> None:
    marks = Marks(tallies={("DEV", "eeg"): Tally(1, 2, 3)})
    chance = random.Random(2)
    for epoch in range(100):
        for sequence in range(0, 200, 2):
            first_ns = chance.randrange(1 << 60)
            row = (sequence, chance.randrange(1000), first_ns, first_ns + 9, "", 0, "")
            marks.add_columns(("DEV", "eeg", f"{epoch:016x}"), row)
    kept = Marks.decode(marks.encode(SLOT_BYTES))
    assert kept.tallies == marks.tallies
    assert set(kept.runs) == set(marks.runs)
    assert all(runs[-1] == marks.runs[key][-1] for key, runs in kept.runs.items())
    assert sum(map(len, kept.runs.values())) < sum(map(len, marks.runs.values()))


def test_what_is_left_of_a_suspect() -> None:
    (suspect,) = filled(dict.fromkeys(range(10, 20), (10, ""))).lacking(Marks())
    rest = without(suspect, [(0, 10), (13, 14), (19, 99)])
    assert [(part.first, part.last, part.samples) for part in rest] == [(11, 12, 20), (15, 18, 40)]
    assert [(part.first_ns, part.last_ns) for part in rest] == [
        (11 * SECOND, 13 * SECOND - 1),
        (15 * SECOND, 19 * SECOND - 1),
    ]
    assert without(suspect, [(0, 99)]) == []
    assert without(suspect, []) == [suspect]


@pytest.mark.parametrize("data", [b"", b"{}", b"\x78\x9c", os.urandom(200)])
def test_what_are_no_marks_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="marks"):
        Marks.decode(data)


# --- the file


@pytest.fixture
def file(tmp_path: Path) -> MarksFile:
    return MarksFile(tmp_path / "outbox.db.marks")


def test_the_newest_is_read_and_a_new_file_is_empty(file: MarksFile) -> None:
    assert file.open() is None
    for count in range(1, 6):
        file.write(filled(dict.fromkeys(range(count), (1, ""))))
        file.close()
        found = file.open()
        assert found is not None
        assert sequences(found) == list(range(count))
    assert file.path.stat().st_mode & 0o777 == 0o600
    assert file.path.stat().st_size == 2 * SLOT_BYTES
    file.close()


def test_after_a_torn_write_the_marks_before_it_are_there(file: MarksFile) -> None:
    """Whatever sectors of a write a power cut leaves, in whatever order they went."""
    random.seed(3)
    before = filled({number: (number % 50, "") for number in range(0, 200, 2)})
    after = filled({number: (number % 49, "") for number in range(0, 300, 3)})
    file.open()
    file.write(before)
    old = file.path.read_bytes()
    file.write(after)
    new = file.path.read_bytes()
    file.close()
    changed = [at for at in range(0, len(old), 512) if old[at : at + 512] != new[at : at + 512]]
    assert len(changed) > 2
    outcomes = set()
    for number in range(2 ** len(changed)) if len(changed) < 10 else random.sample(range(2 ** len(changed)), 500):
        mixed = bytearray(old)
        for bit, at in enumerate(changed):
            if number >> bit & 1:
                mixed[at : at + 512] = new[at : at + 512]
        _, found = newest(bytes(mixed))
        assert found in (before, after)
        outcomes.add(found == after)
    assert False in outcomes


def test_no_flipped_bit_passes(file: MarksFile) -> None:
    file.open()
    file.write(filled({1: (1, "")}))
    file.write(filled({2: (2, "")}))
    data = bytearray(file.path.read_bytes())
    file.close()
    first, second = (filled({number: (number, "")}) for number in (1, 2))
    for start, other in ((0, first), (SLOT_BYTES, second)):  # the second is in the first slot
        for at in range(start, start + 24 + len(first.encode(SLOT_BYTES))):
            data[at] ^= 4
            assert newest(bytes(data))[1] == other
            data[at] ^= 4


def test_where_the_page_cache_cannot_be_left_out_it_is_written_all_the_same(
    file: MarksFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.fcntl

    def refuses(descriptor: int, command: int, argument: Any = 0) -> Any:
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(descriptor, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", refuses)
    file.open()
    file.write(filled({7: (1, "")}))
    file.close()
    found = file.open()
    assert found is not None
    assert sequences(found) == [7]
    file.close()


def test_one_writer_at_a_time(file: MarksFile) -> None:
    file.open()
    with pytest.raises(UnavailableError, match="another program"):
        MarksFile(file.path).open()
    file.close()
    again = MarksFile(file.path)
    again.open()
    again.close()
