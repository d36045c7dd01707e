"""Final times for rows in every kind of store: the same content under the same identity, in bounded durable steps."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from gateway.errors import MalformedError
from gateway.samples import LOSS, ClockStamp, ClockState, LossCause, LossRecord, SampleBlock
from gateway.spool.outbox import Outbox
from gateway.spool.stamping import stamped
from gateway.spool.store import Row
from gateway.wire import codec

MS = 1_000_000
SHIFT_NS = 123_456_789 * MS
HOST = ClockStamp(ClockState.SYNCED, 5 * MS)


def final(row: Row) -> Row:
    return stamped("gw-spool", row, SHIFT_NS, HOST)


def content_of(row: Row) -> Any:
    return codec.decode(row.payload.data, row.payload.content_type).content


@pytest.mark.parametrize("signal", ["eeg", "vital_signs", "brain_state"])
async def test_nothing_but_the_times_and_their_trust_changes(place: Any, make: Any, signal: str) -> None:
    outbox = Outbox(place.store(), place.gateway)
    await outbox.open()
    contents: list[SampleBlock | LossRecord] = [make.block("DEV", signal, at=0, n=50), make.loss(at=3)]
    for content in contents:
        outbox.append(content, "boot-1", 42)
    outbox.append(make.block("DEV", signal, at=9, n=3))
    await outbox.commit()
    told: list[tuple[int, int]] = []
    outbox.on_old_rows = lambda after, through: told.append((after, through))
    (untouched,) = await outbox.fetch(0, 10**9, 10)
    last_id = outbox.holding.last_id
    assert await outbox.stamp(final, 1) == 1
    assert await outbox.stamp(final, 10) == 1
    assert await outbox.stamp(final, 10) == 0
    assert told[0][0] == last_id
    assert told[-1][1] == outbox.holding.last_id
    rows = [stored.row for stored in await outbox.fetch(0, 10**9, 10)]
    assert [row.boot for row in rows] == [""] * 3
    assert untouched.row in rows
    blocks = {row.identity: row for row in rows if row.signal != LOSS}
    (moved,) = [row for row in blocks.values() if row != untouched.row]
    before, after = contents[0], content_of(moved)
    assert isinstance(before, SampleBlock)
    assert (moved.sequence, moved.samples) == (0, 50)
    assert np.array_equal(after.times_ns, before.times_ns + SHIFT_NS)
    assert (moved.first_ns, moved.last_ns) == (after.first_ns, after.last_ns)
    assert after.clock == ClockStamp(ClockState.SYNCED, before.clock.error_ns + HOST.error_ns)
    for name, column in before.columns.items():
        assert np.array_equal(after.physical(name), before.physical(name)), name
        assert after.columns[name].dtype == column.dtype
    assert after.segment == before.segment
    (loss,) = [content_of(row) for row in rows if row.signal == LOSS]
    assert loss == dataclasses.replace(
        contents[1], first_ns=contents[1].first_ns + SHIFT_NS, last_ns=contents[1].last_ns + SHIFT_NS
    )
    tallies = await outbox.tallies()
    assert tallies["DEV", signal].accepted == 53
    await outbox.close()


async def test_a_row_whose_content_cannot_be_read_becomes_a_loss_and_the_others_go_on(place: Any, make: Any) -> None:
    outbox = Outbox(place.store(), place.gateway)
    await outbox.open()
    for at in range(3):
        outbox.append(make.block("DEV", "vital_signs", at=at, n=4), "boot-1", 42)
    await outbox.commit()

    def picky(row: Row) -> Row:
        if row.sequence == 1:
            raise MalformedError("no block")
        return final(row)

    assert await outbox.stamp(picky, 10) == 3
    await outbox.commit()
    rows = [stored.row for stored in await outbox.fetch(0, 10**9, 10)]
    assert [row.sequence for row in rows] == [0, 2]
    assert await outbox.stamp(final, 10) == 1, "the record of its loss has provisional times, too"
    (loss,) = [content_of(stored.row) for stored in await outbox.fetch(0, 10**9, 10) if stored.row.signal == LOSS]
    assert isinstance(loss, LossRecord)
    assert (loss.cause, loss.sample_count, loss.signal) == (LossCause.CORRUPT, 4, "vital_signs")
    await outbox.close()
