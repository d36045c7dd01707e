"""What is given up first, and what is said of it."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from gateway.samples import LossCause, LossRecord
from gateway.spool import retention
from gateway.spool.store import Held

SECOND = 1_000_000_000


def held(
    number: int, sequence: int, device: str = "DEV", signal: str = "eeg", samples: int = 10, epoch: str = "now"
) -> Held:
    first_ns = sequence * SECOND
    return Held(number, device, signal, epoch, sequence, first_ns, first_ns + SECOND - 1, samples, 1000, 0, "", "", 0)


def test_raw_signals_go_first_then_states_then_vital_signs_and_loss_records_never() -> None:
    signals = ["vital_signs", "ppg", "loss", "brain_state", "eeg", "eeg"]
    assert retention.shed_order(signals) == [["eeg", "ppg"], ["brain_state"], ["vital_signs"]]
    assert retention.shed_order(["loss"]) == []


def test_as_many_of_the_oldest_as_free_enough_with_their_loss_record() -> None:
    rows = [held(number, number) for number in range(10)]
    assert [row.id for row in retention.choose(rows, 1)] == [0]
    assert [row.id for row in retention.choose(rows, 1000 - retention.RECORD_BYTES)] == [0]
    assert [row.id for row in retention.choose(rows, 1001 - retention.RECORD_BYTES)] == [0, 1]
    assert retention.choose(rows, 10**9) == rows
    assert retention.choose([], 1) == []
    two = [held(0, 0, "A"), held(1, 0, "B"), held(2, 1, "B")]
    assert [row.id for row in retention.choose(two, 2 * (1000 - retention.RECORD_BYTES) + 1)] == [0, 1, 2]


def test_a_record_for_each_unbroken_range_of_each_stream() -> None:
    rows = [held(1, 4), held(2, 5), held(3, 7), held(4, 6, "OTHER"), held(5, 3, samples=7), held(6, 8, signal="ppg")]
    assert retention.losses(rows, LossCause.SHED, "now") == [
        LossRecord("DEV", "eeg", LossCause.SHED, 3 * SECOND, 6 * SECOND - 1, 27, (3, 5), block_runs=((1, 7), (2, 10))),
        LossRecord("DEV", "eeg", LossCause.SHED, 7 * SECOND, 8 * SECOND - 1, 10, (7, 7), block_runs=((1, 10),)),
        LossRecord("DEV", "ppg", LossCause.SHED, 8 * SECOND, 9 * SECOND - 1, 10, (8, 8), block_runs=((1, 10),)),
        LossRecord("OTHER", "eeg", LossCause.SHED, 6 * SECOND, 7 * SECOND - 1, 10, (6, 6), block_runs=((1, 10),)),
    ]


def test_a_record_speaks_of_one_epoch_and_names_it_where_it_is_not_its_own() -> None:
    rows = [held(1, 0), held(2, 1, epoch="before"), held(3, 0, epoch="before"), held(4, 1)]
    records = retention.losses(rows, LossCause.SHED, "now")
    assert [(record.epoch, record.sequences) for record in records] == [("before", (0, 1)), ("", (0, 1))]


def test_a_row_with_damaged_numbers_still_makes_a_record() -> None:
    broken = Held(1, "DEV", "eeg", "now", 5, 90, 10, 0, 1000, 0, "", "", 0)
    (record,) = retention.losses([broken], LossCause.CORRUPT, "now")
    assert (record.first_ns, record.last_ns, record.sample_count, record.sequences) == (10, 90, 1, (5, 5))
    loss = Held(1, "DEV", "loss", "now", 5, 90, 10, 0, 1000, 0, "eeg", "", 0)
    assert retention.reissued(loss) == LossRecord("DEV", "eeg", LossCause.CORRUPT, 10, 90, 1)


def test_a_row_without_a_valid_name_cannot_be_named() -> None:
    assert retention.is_named(held(1, 1))
    assert not retention.is_named(held(1, 1, device="DEV\ufffd"))
    assert not retention.is_named(held(1, 1, signal=""))
    assert not retention.is_named(held(1, 1, epoch=""))
    assert not retention.is_named(held(1, -1))
    assert not retention.is_named(held(1, 1, signal="loss"))
    assert retention.is_named(Held(1, "DEV", "loss", "now", 1, 0, 0, 0, 10, 3, "eeg", "", 0))


@given(
    st.lists(
        st.tuples(st.sampled_from("AB"), st.sampled_from(["eeg", "brain_state"]), st.integers(0, 12)), unique=True
    ),
    st.randoms(use_true_random=False),
)
def test_every_row_is_in_one_record_whatever_the_order(keys: list[tuple[str, str, int]], order: object) -> None:
    rows = [
        held(number, sequence, device, signal, sequence + 1) for number, (device, signal, sequence) in enumerate(keys)
    ]
    order.shuffle(rows)  # type: ignore[attr-defined]
    records = retention.losses(rows, LossCause.SHED, "now")
    covered: Counter[tuple[str, str, int]] = Counter()
    for record in records:
        assert record.sequences is not None
        numbers = range(record.sequences[0], record.sequences[1] + 1)
        covered.update((record.device, record.signal, number) for number in numbers)
        assert record.sample_count == sum(number + 1 for number in numbers)
        sizes = [samples for blocks, samples in record.block_runs for _ in range(blocks)]
        assert sizes == [number + 1 for number in numbers]
        assert record.first_ns == numbers[0] * SECOND
        assert record.last_ns == (numbers[-1] + 1) * SECOND - 1
    assert covered == Counter(keys)
    starts = {(record.device, record.signal, record.sequences[0]) for record in records if record.sequences}
    assert not any(
        (record.device, record.signal, record.sequences[1] + 1) in starts for record in records if record.sequences
    )


def test_records_of_different_kinds_are_not_joined() -> None:
    shed = LossRecord("DEV", "eeg", LossCause.SHED, 0, 9, 1, (0, 0))
    for other in (
        LossRecord("DEV", "eeg", LossCause.CORRUPT, 10, 19, 1, (1, 1)),
        LossRecord("DEV", "ppg", LossCause.SHED, 10, 19, 1, (1, 1)),
        LossRecord("OTHER", "eeg", LossCause.SHED, 10, 19, 1, (1, 1)),
        LossRecord("DEV", "eeg", LossCause.SHED, 10, 19, 1, None),
        LossRecord("DEV", "eeg", LossCause.SHED, 10, 19, 1, (2, 2)),
    ):
        assert not retention.follows(shed, other)
    assert retention.follows(shed, LossRecord("DEV", "eeg", LossCause.SHED, 10, 19, 1, (1, 1)))
    no_sequences = LossRecord("DEV", "eeg", LossCause.SHED, 0, 9, 1, None)
    assert retention.follows(no_sequences, no_sequences)
    joined = retention.joined(no_sequences, LossRecord("DEV", "eeg", LossCause.SHED, 5, 7, 2, None))
    assert joined == LossRecord("DEV", "eeg", LossCause.SHED, 0, 9, 3, None)
