"""Gaps through the whole bridge: holes, loss records and questions of a gateway, as messages on the broker."""

from __future__ import annotations

from typing import Any

import pytest

from cloud_sync.registry import gap_rows
from cloud_sync.registry.entries import BlockKey
from gateway.samples import LossCause, LossRecord
from gateway.wire import topics
from gateway.wire.messages import ReceiptRequest, WantedRange

GAPS = (
    "SELECT cause, lower(sequences)::int, upper(sequences)::int, sample_count::int, outcome FROM stream_gaps "
    "WHERE signal <> 'loss' ORDER BY sequences, id"
)
BOOKS = (
    "SELECT (SELECT sum(point_count) FROM signal_streams)::int, "
    "(SELECT sum(sample_count) FROM stream_gaps WHERE outcome = 'lost')::int"
)


async def send(chain: Any, gateway: Any, *sequences: int, epoch: str = "e1") -> None:
    for sequence in sequences:
        await gateway.send(chain.vitals(first_ns=chain.noon_ns + sequence * 10**10), sequence, epoch=epoch)
    await gateway.until_receipted("STRAP-1", "vital_signs", *sequences, epoch=epoch)


async def ask(chain: Any, gateway: Any, *wanted: WantedRange) -> None:
    gateway.heard.clear()
    request = ReceiptRequest(v=1, schema="receipt_request", gateway=gateway.name, wanted=list(wanted))
    await gateway.say(topics.receipt_request(gateway.name), request)

    async def answered() -> bool:
        return bool(gateway.heard)

    await chain.wait_for(answered, "an answer")


async def test_a_hole_is_a_gap_until_its_blocks_come(chain: Any) -> None:
    await chain.start()
    async with chain.gateway() as gateway:
        await send(chain, gateway, 0, 3)
        await chain.bridge.gaps.look()
        assert await chain.rows(GAPS) == [("transport", 1, 3, 10, None)]
        stream = await chain.rows(
            "SELECT g.stream_id = s.id, g.first_at, g.last_at FROM stream_gaps g, signal_streams s"
        )
        assert stream == [(True, chain.at(chain.noon_ns + 4 * 10**9), chain.at(chain.noon_ns + 30 * 10**9))]
        await send(chain, gateway, 2, 1)
        await chain.bridge.gaps.look()
    assert await chain.rows(GAPS) == [("transport", 1, 3, 10, "arrived")]
    assert await chain.rows(BOOKS) == [(20, None)]


async def test_stored_and_recorded_losses_are_what_was_produced(chain: Any) -> None:
    """Eight blocks of five samples: four come, one of them after it was given up, and another that was here before."""
    await chain.start()
    async with chain.gateway() as gateway:
        await send(chain, gateway, 0, 3, 7)
        first_ns, last_ns = chain.noon_ns + 10**10, chain.noon_ns + 65 * 10**9
        loss = LossRecord("STRAP-1", "vital_signs", LossCause.SHED, first_ns, last_ns, 30, (1, 6), block_runs=((6, 5),))
        await gateway.send(loss, 0)
        await gateway.until_receipted("STRAP-1", "loss", 0)
        await send(chain, gateway, 5)
        await chain.bridge.gaps.look()
    assert await chain.rows(GAPS) == [("shed", 1, 7, 20, "lost")]
    assert await chain.rows(BOOKS) == [(20, 20)]


async def test_what_nobody_holds_any_more_is_final_and_alerted(chain: Any) -> None:
    await chain.start()
    async with chain.gateway() as gateway:
        await send(chain, gateway, 2, 5)
        await ask(chain, gateway, WantedRange("STRAP-1", "vital_signs", "e1", 2, 6))
        await chain.bridge.gaps.look()
        assert await chain.rows(GAPS) == [
            ("transport", 0, 2, 10, "elsewhere"),
            ("transport", 3, 5, 10, None),
            ("transport", 6, 7, 5, None),
        ]
        await ask(chain, gateway, WantedRange("STRAP-1", "vital_signs", "e2", 0, 0))
        await chain.run("UPDATE ledger SET asked_at = asked_at - interval '2 min' WHERE epoch = 'e1'")
        await chain.run("UPDATE ledger SET asked_at = asked_at - interval '1 min' WHERE epoch = 'e2'")
        await chain.bridge.gaps.look()
        await send(chain, gateway, 0, epoch="e2")
        await chain.bridge.gaps.look()
    assert await chain.rows(GAPS) == [
        ("transport", 0, 1, 5, "arrived"),
        ("transport", 0, 2, 10, "elsewhere"),
        ("transport", 3, 5, 10, "lost"),
        ("transport", 6, 7, 5, "lost"),
    ]
    alerts = await chain.rows("SELECT kind, subject FROM alerts WHERE closed_at IS NULL ORDER BY 1")
    assert alerts == [("samples_elsewhere", "STRAP-1 vital_signs"), ("samples_lost", "STRAP-1 vital_signs")]


async def test_a_gap_that_stays_open_is_alerted_after_the_configured_time(chain: Any) -> None:
    settings = chain.settings
    bridge = type(settings.bridge)(id=settings.bridge.id, state_dir=settings.bridge.state_dir, gap_alert_s=5)
    chain.settings = type(settings)(
        bridge=bridge, mqtt=settings.mqtt, influx=settings.influx, postgres=settings.postgres
    )
    await chain.start()
    async with chain.gateway() as gateway:
        await send(chain, gateway, 0, 3)
        await chain.bridge.gaps.look()
        assert await chain.count("alerts") == 0
        await chain.run("UPDATE stream_gaps SET opened_at = opened_at - interval '6 s'")
        await chain.bridge.gaps.look()
        assert await chain.rows("SELECT kind, closed_at FROM alerts") == [("stream_gap", None)]
        await send(chain, gateway, 1, 2)
        await chain.bridge.gaps.look()
    assert await chain.value("SELECT closed_at IS NOT NULL FROM alerts")


async def test_one_row_that_cannot_be_reviewed_stops_no_other(chain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    review = gap_rows.review

    async def picky(connection: Any, key: BlockKey) -> None:
        if key.device == "CYTON-1":
            await connection.execute("SELECT 1/0")
        await review(connection, key)

    monkeypatch.setattr(gap_rows, "review", picky)
    await chain.start()
    async with chain.gateway() as gateway:
        await gateway.send(chain.eeg(), 1)
        await send(chain, gateway, 1)
        await gateway.until_receipted("CYTON-1", "eeg", 1)
        assert await chain.bridge.gaps.look() == 2
        assert await chain.rows("SELECT device_serial FROM stream_gaps") == [("STRAP-1",)]
        await chain.bridge.gaps.look()
        monkeypatch.setattr(gap_rows, "review", review)
        await chain.bridge.gaps.look()
    assert await chain.count("stream_gaps") == 2


async def test_a_bridge_reviews_by_itself(chain: Any) -> None:
    await chain.start()
    async with chain.gateway() as gateway:
        await send(chain, gateway, 1)
        await chain.until_count("stream_gaps", 1)
