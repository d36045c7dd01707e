"""What every store must do, whatever it is made of: one body of tests for both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gateway.errors import DamagedError, UnavailableError
from gateway.spool.redis_store import RedisStore
from gateway.spool.store import DamagedRow, Holding, Store, StoredRow, Tally

ALL = 10**9


@pytest.fixture(params=["sqlite", "redis", "sealed"])
def place(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(f"{request.param}_place")


def ids(found: list[StoredRow | DamagedRow]) -> list[int]:
    return [item.id if isinstance(item, StoredRow) else item.held.id for item in found]


def sequences(store: Store) -> list[tuple[str, str, int]]:
    found = store.fetch(0, ALL, ALL)
    return [(item.row.device, item.row.signal, item.row.sequence) for item in found if isinstance(item, StoredRow)]


def test_what_was_appended_comes_back_the_same_and_in_order(place: Any, make: Any) -> None:
    store = place.open()
    rows = [make.row(0), make.row(0, "OTHER", "vital_signs"), make.row(1), make.loss_row(0)]
    store.append(rows[:3])
    store.append(rows[3:])
    assert store.fetch(0, ALL, ALL) == [StoredRow(number, row) for number, row in enumerate(rows, start=1)]


def test_everything_is_there_after_reopening(place: Any, make: Any) -> None:
    store = place.open()
    store.append(make.rows(0, 4))
    make.forget(store, "DEV", "eeg", make.epoch, [(1, 2)])
    before = (store.holding(), store.tallies(), store.held(), store.fetch(0, ALL, ALL))
    store.close()
    again = place.open()
    assert (again.holding(), again.tallies(), again.held(), again.fetch(0, ALL, ALL)) == before


def test_each_opening_by_a_writer_has_an_epoch_of_its_own_and_a_reader_sees_the_last(place: Any, make: Any) -> None:
    epochs = []
    for _ in range(3):
        store = place.open()
        epochs.append(store.epoch)
        assert place.open(read_only=True).epoch == store.epoch
        store.close()
    assert len(set(epochs)) == 3
    assert all(len(epoch) == 16 for epoch in epochs)
    store.open()
    assert store.epoch not in epochs


def test_the_same_sequence_in_two_epochs_is_two_rows(place: Any, make: Any) -> None:
    store = place.open()
    rows = [make.row(0, epoch="a"), make.row(0, epoch="b"), make.row(1, epoch="b"), make.row(1, epoch="a")]
    store.append(rows)
    assert store.held() == {("DEV", "eeg", "a"): (0, 1), ("DEV", "eeg", "b"): (0, 1)}
    assert store.tallies() == {("DEV", "eeg"): Tally(4, 40, 0)}
    assert make.forget(store, "DEV", "eeg", "c", [(0, 9)]) == []
    assert make.forget(store, "DEV", "eeg", "b", [(0, 0)]) == [2]
    assert store.held() == {("DEV", "eeg", "a"): (0, 1), ("DEV", "eeg", "b"): (1, 1)}
    assert [item.row for item in store.fetch(0, ALL, ALL)] == [rows[0], rows[2], rows[3]]


def test_ids_are_never_given_again_while_the_store_is_open(place: Any, make: Any) -> None:
    store = place.open()
    store.append(make.rows(0, 4))
    make.forget(store, "DEV", "eeg", make.epoch, [(0, 4)])
    assert store.holding() == Holding(0, 0, 5)
    store.append([make.row(5)])
    assert ids(store.fetch(0, ALL, ALL)) == [6]


def test_rows_with_provisional_times_are_kept_and_counted_but_not_fetched(place: Any, make: Any) -> None:
    store = place.open()
    rows = [make.row(number, boot="" if number % 3 else "boot", offset_ns=number) for number in range(7)]
    store.append(rows)
    assert store.fetch(0, ALL, ALL) == [StoredRow(number + 1, rows[number]) for number in (1, 2, 4, 5)]
    assert store.fetch(0, ALL, 3) == store.fetch(0, ALL, ALL)[:3]
    assert ids(store.fetch(1, 4, 1)) == [2]
    assert ids(store.fetch(3, 6, 2)) == [5, 6]
    unstamped = [StoredRow(number + 1, rows[number]) for number in (0, 3, 6)]
    assert store.unstamped(ALL) == unstamped
    assert store.unstamped(2) == unstamped[:2]
    assert store.holding() == Holding(7, place.size_of(rows), 7)
    assert store.held() == {("DEV", "eeg", make.epoch): (0, 6)}
    assert [held.boot for held in store.oldest(["eeg"], 2)] == ["boot", ""]
    assert [held.offset_ns for held in store.oldest(["eeg"], 2)] == [0, 1]
    store.close()
    store = place.open()
    assert store.unstamped(ALL) == unstamped
    assert make.forget(store, "DEV", "eeg", make.epoch, [(0, 2)]) == [1, 2, 3]
    assert store.unstamped(ALL) == unstamped[1:]


def test_a_row_takes_the_place_of_one_of_the_same_identity_and_counts_once(place: Any, make: Any) -> None:
    store = place.open()
    rows = [make.row(number, boot="boot", samples=10) for number in range(3)]
    loss = make.loss_row(0, lost=7, boot="boot")
    store.append([*rows, loss])
    final = [make.row(number, samples=10 + number) for number in range(2)]
    final_loss = make.loss_row(0, lost=7)
    store.replace([1, 2, 4], [*final, final_loss])
    assert [item.row for item in store.fetch(0, ALL, ALL)] == [*final, final_loss]
    assert ids(store.fetch(0, ALL, ALL)) == [5, 6, 7]
    assert ids(store.unstamped(ALL)) == [3]
    assert store.tallies() == {("DEV", "eeg"): Tally(3, 31, 7), ("DEV", "loss"): Tally(1, 0, 0)}
    assert store.holding() == Holding(4, place.size_of([*final, final_loss, rows[2]]), 7)
    assert store.held() == {("DEV", "eeg", make.epoch): (0, 2), ("DEV", "loss", make.epoch): (0, 0)}


def test_a_sequence_that_is_there_already_is_refused_and_nothing_changes(place: Any, make: Any) -> None:
    store = place.open()
    store.append(make.rows(0, 2))
    before = (store.holding(), store.tallies())
    with pytest.raises(DamagedError):
        store.append([make.row(3), make.row(1)])
    assert (store.holding(), store.tallies()) == before
    store.append([make.row(3)])
    assert [sequence for _, _, sequence in sequences(store)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("after", "through", "limit", "expected"),
    [
        (0, 6, 10, [1, 2, 4, 5, 6]),
        (1, 6, 10, [2, 4, 5, 6]),
        (1, 5, 10, [2, 4, 5]),
        (2, 4, 10, [4]),
        (2, 3, 10, []),
        (4, 4, 10, []),
        (5, 4, 10, []),
        (0, 6, 2, [1, 2]),
        (2, 6, 2, [4, 5]),
        (6, ALL, 10, []),
    ],
)
def test_fetch_takes_what_is_in_its_window(
    place: Any, make: Any, after: int, through: int, limit: int, expected: list[int]
) -> None:
    store = place.open()
    store.append(make.rows(0, 5))
    make.forget(store, "DEV", "eeg", make.epoch, [(2, 2)])
    assert ids(store.fetch(after, through, limit)) == expected


def test_remove_takes_these_sequences_of_this_stream_once(place: Any, make: Any) -> None:
    store = place.open()
    store.append(make.rows(0, 9) + make.rows(0, 9, "OTHER") + make.rows(0, 9, signal="brain_state"))
    assert sorted(make.forget(store, "DEV", "eeg", make.epoch, [(0, 1), (4, 4), (8, 100)])) == [1, 2, 5, 9, 10]
    assert make.forget(store, "DEV", "eeg", make.epoch, [(0, 1), (4, 4), (8, 100)]) == []
    assert sorted(make.forget(store, "DEV", "eeg", make.epoch, [(2, 3), (3, 5)])) == [3, 4, 6]
    assert make.forget(store, "NOBODY", "eeg", make.epoch, [(0, 100)]) == []
    assert make.forget(store, "DEV", "eeg", make.epoch, []) == []
    left = [sequence for device, signal, sequence in sequences(store) if (device, signal) == ("DEV", "eeg")]
    assert left == [6, 7]
    assert store.holding().rows == 22
    assert store.held() == {
        ("DEV", "eeg", make.epoch): (6, 7),
        ("OTHER", "eeg", make.epoch): (0, 9),
        ("DEV", "brain_state", make.epoch): (0, 9),
    }


def test_the_holding_is_exact_after_every_step(place: Any, make: Any) -> None:
    store = place.open()
    assert store.holding() == Holding(0, 0, 0)
    rows = [make.row(sequence, size=100 + sequence) for sequence in range(10)]
    store.append(rows)
    assert store.holding() == Holding(10, place.size_of(rows), 10)
    make.forget(store, "DEV", "eeg", make.epoch, [(0, 2)])
    assert store.holding() == Holding(7, place.size_of(rows[3:]), 10)
    records = [make.loss_row(0), make.loss_row(1)]
    store.replace([5, 6, 6, 77], records)
    assert store.holding() == Holding(7, place.size_of(rows[3:4] + rows[6:] + records), 12)
    store.close()
    assert place.open().holding() == Holding(7, place.size_of(rows[3:4] + rows[6:] + records), 12)


def test_the_tallies_are_exact_and_outlive_their_rows(place: Any, make: Any) -> None:
    store = place.open()
    store.append([make.row(0, samples=250), make.row(1, samples=249), make.row(0, "STRAP", "vital_signs", samples=1)])
    store.append([make.loss_row(0, lost=3), make.loss_row(1, lost=4), make.loss_row(0, "STRAP", "vital_signs", 9)])
    make.forget(store, "DEV", "eeg", make.epoch, [(0, 9)])
    make.forget(store, "DEV", "loss", make.epoch, [(0, 9)])
    expected = {
        ("DEV", "eeg"): Tally(2, 499, 7),
        ("DEV", "loss"): Tally(2, 0, 0),
        ("STRAP", "vital_signs"): Tally(1, 1, 9),
        ("STRAP", "loss"): Tally(1, 0, 0),
    }
    assert store.tallies() == expected
    store.close()
    assert place.open().tallies() == expected


def test_replace_does_all_or_nothing(place: Any, make: Any) -> None:
    store = place.open()
    store.append(make.rows(0, 4))
    before = (store.holding(), store.tallies(), sequences(store))
    with pytest.raises(DamagedError):
        store.replace([1, 2], [make.loss_row(0), make.row(4)])
    assert (store.holding(), store.tallies(), sequences(store)) == before
    store.replace([1, 2], [make.loss_row(0)])
    assert sequences(store) == [("DEV", "eeg", 2), ("DEV", "eeg", 3), ("DEV", "eeg", 4), ("DEV", "loss", 0)]


def test_a_loss_record_that_is_issued_again_counts_once(place: Any, make: Any) -> None:
    store = place.open()
    store.append([make.row(0), make.loss_row(0, lost=5), make.loss_row(1, lost=6)])
    store.replace([2], [make.loss_row(0, lost=5)])
    assert store.tallies()["DEV", "eeg"] == Tally(1, 10, 11)
    assert sequences(store) == [("DEV", "eeg", 0), ("DEV", "loss", 1), ("DEV", "loss", 0)]


def test_oldest_are_the_first_of_these_signals_over_all_devices(place: Any, make: Any) -> None:
    store = place.open()
    rows = [
        make.row(0, "A"),
        make.row(0, "B", "brain_state"),
        make.row(0, "B"),
        make.row(1, "A"),
        make.row(0, "A", "ppg"),
    ]
    store.append(rows)
    found = store.oldest(["eeg", "ppg"], 3)
    assert [(held.id, held.device, held.signal, held.sequence) for held in found] == [
        (1, "A", "eeg", 0),
        (3, "B", "eeg", 0),
        (4, "A", "eeg", 1),
    ]
    assert [(held.first_ns, held.last_ns, held.samples, held.size) for held in found] == [
        (row.first_ns, row.last_ns, row.samples, place.size_of([row])) for row in (rows[0], rows[2], rows[3])
    ]
    assert [held.id for held in store.oldest(["eeg", "ppg"], 10)] == [1, 3, 4, 5]
    assert store.oldest(["vital_signs"], 10) == []
    store.append([make.loss_row(0, lost=8)])
    assert [(held.lost, held.lost_signal) for held in store.oldest(["loss"], 1)] == [(8, "eeg")]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("payload", b"not what was stored"),
        ("payload", b""),
        ("samples", 11),
        ("first_ns", 5),
        ("last_ns", 5),
        ("lost", 1),
        ("lost_signal", "eeg"),
        ("offset_ns", 1),
        ("content_type", "application/json"),
        ("schema", "loss"),
        ("checksum", 1),
    ],
)
def test_a_row_that_is_not_what_was_stored_is_noticed(place: Any, make: Any, column: str, value: object) -> None:
    store = place.open()
    store.append(make.rows(0, 2))
    store.close()
    place.damage(2, column, value)
    found = place.open().fetch(0, ALL, ALL)
    assert [type(item) for item in found] == [StoredRow, DamagedRow, StoredRow]
    held = found[1].held
    assert (held.id, held.device, held.signal, held.epoch, held.sequence) == (2, "DEV", "eeg", make.epoch, 1)


def test_damage_is_noticed_among_rows_with_provisional_times_too(place: Any, make: Any) -> None:
    store = place.open()
    store.append([make.row(0), make.row(1), make.row(2, boot="boot"), make.row(3, boot="boot")])
    store.close()
    place.damage(1, "checksum", 1)
    place.damage(4, "payload", b"damaged")
    store = place.open()
    assert [type(item) for item in store.fetch(0, ALL, ALL)] == [DamagedRow, StoredRow]
    assert [type(item) for item in store.unstamped(ALL)] == [StoredRow, DamagedRow]


def test_a_reader_beside_the_writer_sees_what_is_committed_and_changes_nothing(place: Any, make: Any) -> None:
    writer = place.open()
    writer.append(make.rows(0, 4))
    reader = place.open(read_only=True)
    assert (reader.epoch, reader.holding(), reader.tallies()) == (writer.epoch, writer.holding(), writer.tallies())
    writer.append(make.rows(5, 6))
    assert reader.tallies()["DEV", "eeg"].blocks == 7
    assert ids(reader.fetch(0, ALL, ALL)) == [1, 2, 3, 4, 5, 6, 7]
    changes: list[Callable[[], object]] = [
        lambda: reader.append([make.row(7)]),
        lambda: reader.replace([1], []),
        lambda: make.forget(reader, "DEV", "eeg", make.epoch, [(0, 1)]),
    ]
    for change in changes:
        with pytest.raises(UnavailableError):
            change()
    writer.append([make.row(7)])
    assert writer.holding().rows == 8


def test_a_reader_where_no_outbox_is_makes_none(place: Any) -> None:
    with pytest.raises(UnavailableError):
        place.open(read_only=True)
    with pytest.raises(UnavailableError):
        place.open(read_only=True)


def test_two_places_have_two_epochs(sqlite_place: Any, redis_place: Any) -> None:
    assert sqlite_place.open().epoch != redis_place.open().epoch


def test_a_second_writer_is_refused_or_fences_the_first_off_and_takes_nothing_away(place: Any, make: Any) -> None:
    first = place.open()
    first.append([make.row(0)])
    if not isinstance(first, RedisStore):
        with pytest.raises(UnavailableError, match="another program"):
            place.open()
        last = first
        last.append([make.row(1)])
    else:
        last = place.open()
        last.append([make.row(1)])
        with pytest.raises(DamagedError):
            first.append([make.row(1)])
    assert sequences(last) == [("DEV", "eeg", 0), ("DEV", "eeg", 1)]
    assert last.tallies()["DEV", "eeg"] == Tally(2, 20, 0)


def test_closing_is_allowed_in_any_state(place: Any, make: Any) -> None:
    store = place.store()
    store.close()
    store.open()
    store.append([make.row(0)])
    store.close()
    store.close()
    store.open()
    assert store.holding().rows == 1
    store.close()
