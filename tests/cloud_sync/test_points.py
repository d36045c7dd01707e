"""Blocks as line protocol, and what becomes of each block of a batch."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

import numpy as np
import pytest

from cloud_sync import points
from cloud_sync.binding import BoundSamples
from cloud_sync.point_batch import PointBatch
from cloud_sync.registry.binding_rows import BoundPeriod, Target
from cloud_sync.timeseries import Outcome, PlaceError, Refusal
from gateway.errors import RefusedError, UnavailableError
from gateway.samples import ClockStamp, ClockState, SampleBlock

CLOCK = ClockStamp(ClockState.SYNCED, 0)
TAGS = tuple(sorted({
    "patient_id": "p", "device_id": "d", "stream_id": "s", "org_id": "o", "signal_type": "vital_signs",
    "location": "ICU 5", "a=b": "x,y",
}.items()))  # fmt: skip
TARGET = Target("", "ward", "vital_signs", TAGS)


def block(n: int = 2, **columns: Any) -> SampleBlock:
    fields = columns or {"heart_rate": np.arange(n) + 60.0}
    return SampleBlock("d", "vital_signs", np.arange(n, dtype=np.int64) + 1_700_000_000_000_000_000, fields, CLOCK)


def bound(samples: SampleBlock, stream: int = 1, *targets: Target) -> BoundSamples:
    return BoundSamples(BoundPeriod(UUID(int=stream), UUID(int=9), -(2**63), None, targets or (TARGET,)), samples)


def test_the_worked_example() -> None:
    samples = SampleBlock(
        "d", "vital_signs", np.array([1_700_000_000_000_000_000]),
        {name: np.array([value]) for name, value in (
            ("diastolic_bp", 80.0), ("heart_rate", 72.0), ("spo2", 98.0), ("systolic_bp", 120.0), ("temperature", 36.5)
        )}, CLOCK,
    )  # fmt: skip
    series = b"vital_signs,a\\=b=x\\,y,device_id=d,location=ICU\\ 5,org_id=o,patient_id=p,"
    series += b"signal_type=vital_signs,stream_id=s"
    fields = b"diastolic_bp=80i,heart_rate=72i,spo2=98i,systolic_bp=120i,temperature=36.5"
    assert points.lines(samples, TARGET) == (series + b" " + fields + b" 1700000000000000000\n", 1)


def test_quality_bits_beyond_float_precision_are_exact() -> None:
    quality = np.array([2**62 + 1, 0], dtype=np.int64)
    raw = SampleBlock(
        "d", "eeg", np.array([1, 2]), {"Fp1": np.array([3, -4], dtype=np.int32), "quality": quality}, CLOCK,
        scales={"Fp1": 0.5},
    )  # fmt: skip
    text, count = points.lines(raw, Target("", "b", "eeg", (("t", "v"),)))
    assert text == b"eeg,t=v Fp1=1.5,quality=4611686018427387905i 1\neeg,t=v Fp1=-2,quality=0i 2\n"
    assert count == 2


class Store:
    """Refuses lines by number, or raises."""

    where = "a store"

    def __init__(self, *refused: int, error: Exception | None = None) -> None:
        self.refused = refused
        self.error = error
        self.written: list[tuple[str, str, bytes]] = []

    async def ping(self) -> None: ...
    async def close(self) -> None: ...

    async def write(self, org: str, bucket: str, lines: bytes) -> Outcome:
        await asyncio.sleep(0)
        if self.error is not None and bucket == "ward":
            error, self.error = self.error, None
            raise error
        self.written.append((org, bucket, lines))
        return Outcome(tuple(Refusal(line, f"reason {line}") for line in self.refused))


async def test_blocks_of_one_place_go_out_in_one_request_and_refusals_find_their_block() -> None:
    batch = PointBatch()
    for number in range(3):
        batch.add(number, [bound(block(4), number + 1)])
    store = Store(5, 6, 11)
    await batch.write(store)
    ((_, _, lines),) = store.written
    assert lines.count(b"\n") == 12
    assert [[part.point_count for part in batch.parts(number)] for number in range(3)] == [[4], [2], [3]]
    assert batch.refusal(0) is None
    reason, detail = batch.refusal(1) or ("", "")
    assert reason == "reason 5"
    assert [line.split()[2] for line in detail.splitlines()] == ["heart_rate=61i", "heart_rate=62i"]
    assert (batch.refusal(2) or ("", ""))[0] == "reason 11"


async def test_a_block_that_is_refused_as_a_whole_has_no_part() -> None:
    batch = PointBatch()
    batch.add(0, [bound(block(7))])
    await batch.write(Store(*range(7)))
    assert batch.parts(0) == ()
    assert "and 2 more" in (batch.refusal(0) or ("", ""))[1]


async def test_a_sample_counts_once_however_many_targets_took_it() -> None:
    other = Target("", "ward", "long_term", TAGS)
    batch = PointBatch()
    batch.add(0, [bound(block(3), 1, TARGET, other)])
    await batch.write(Store(0))
    assert [part.point_count for part in batch.parts(0)] == [3]
    assert batch.refusal(0) is not None


async def test_samples_without_values_are_no_points() -> None:
    batch = PointBatch()
    batch.add(0, [bound(block(2, heart_rate=np.array([np.nan, np.nan])))])
    batch.add(1, [bound(block(2, heart_rate=np.array([np.nan, 60.0])))])
    store = Store()
    await batch.write(store)
    assert batch.parts(0) == ()
    assert [part.point_count for part in batch.parts(1)] == [1]


async def test_a_retry_goes_on_where_it_was() -> None:
    batch = PointBatch()
    batch.add(0, [bound(block(), 1, Target("", "other", "m", TAGS), TARGET)])
    store = Store(error=UnavailableError("away"))
    with pytest.raises(UnavailableError):
        await batch.write(store)
    await batch.write(store)
    assert [bucket for _, bucket, _ in store.written] == ["other", "ward"]
    assert [part.point_count for part in batch.parts(0)] == [2]


async def test_a_place_that_cannot_be_written_holds_up_its_own_blocks_alone() -> None:
    batch = PointBatch()
    batch.add(0, [bound(block())])
    batch.add(1, [bound(block(), 2, Target("", "other", "m", TAGS))])
    await batch.write(Store(error=PlaceError("no bucket")))
    assert (batch.unusable(0), batch.unusable(1)) == ("no bucket", "")
    assert [part.point_count for part in batch.parts(1)] == [2]


def test_a_field_that_line_protocol_cannot_write_is_refused() -> None:
    batch = PointBatch()
    with pytest.raises(RefusedError, match="time"):
        batch.add(0, [bound(block(1, time=np.array([1.0])))])
    assert batch.parts(0) == ()
