"""An outbox that is too small gives up what the cloud may have: stored and recorded losses are what was produced."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from cloud_sync.registry import losses
from gateway.samples import VITAL_SIGNS
from tests.faults.edge import Edge, running_edge

pytestmark = pytest.mark.faults

QUOTA_BYTES = 24_000
"""About 40 blocks of a strap."""
BLOCKS = 120
SECONDS_MAX = 60.0
"""For anything awaited here: a deadline, not a measure."""
LOST = "SELECT coalesce(sum(sample_count), 0)::int FROM stream_gaps WHERE outcome = 'lost' AND signal = 'vital_signs'"
STORED = "SELECT coalesce(sum(point_count), 0)::int FROM signal_streams"
LEDGER = "SELECT coalesce(sum(sample_count), 0)::int FROM ledger WHERE signal = 'vital_signs'"


async def lived(ward: Any, folder: Path) -> tuple[int, int, int]:
    """Produced, stored, lost: of a gateway whose receipts do not come while it sheds what the bridge has taken."""
    await ward.start()
    publish = ward.bridge.consumer._publish
    ward.bridge.consumer._publish = lambda _: None
    async with running_edge(ward, "gw-small", folder, bytes_max=QUOTA_BYTES) as edge:
        await fill(ward, edge)

        async def took_many() -> bool:
            return bool(await ward.value(LEDGER) > 30)

        await ward.wait_for(took_many, "blocks that the bridge takes and does not receipt")
        await fill(ward, edge)
        ward.bridge.consumer._publish = publish
        edge.uplink._asking.set()
        await asyncio.wait_for(edge.outbox.empty.wait(), SECONDS_MAX)
        tally = (await edge.outbox.tallies())["STRAP-1", VITAL_SIGNS]
    await ward.bridge.gaps.look()
    assert tally.lost > 0, "nothing was shed"
    assert len(await ward.points("vital_signs")) == await ward.value(STORED)
    return tally.accepted, await ward.value(STORED), await ward.value(LOST)


async def fill(ward: Any, edge: Edge) -> None:
    """Blocks of one to five samples, more than the outbox can keep."""
    for _ in range(BLOCKS):
        first_ns = ward.noon_ns + edge.at * 10**10
        edge.outbox.append(ward.vitals(first_ns=first_ns, n=1 + edge.at % 5))
        edge.at += 1
    await edge.outbox.commit()


async def test_stored_and_recorded_losses_are_what_was_produced(ward: Any, tmp_path: Path) -> None:
    produced, stored, lost = await lived(ward, tmp_path)
    assert stored + lost == produced
    assert await ward.count("stream_gaps") > 0
    open_gaps = await ward.rows("SELECT cause, sequences::text FROM stream_gaps WHERE outcome IS NULL")
    assert open_gaps == []


async def test_control_where_a_loss_record_is_taken_at_its_word_the_books_are_wrong(
    ward: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "samples_of", lambda loss, _: (loss.sample_count, False))
    produced, stored, lost = await lived(ward, tmp_path)
    assert stored + lost > produced
