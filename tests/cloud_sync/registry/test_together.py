"""All that writes to the registry, at once: no deadlock, no stream across a change of owner, every count exact."""

from __future__ import annotations

import asyncio
import random
from datetime import timedelta

from cloud_sync.registry import admin, letters
from cloud_sync.registry.binding_rows import resolve
from cloud_sync.registry.ledger import Batch, BlockCommit, BlockKey, LossCommit, ParkedBlock, Part, commit
from gateway.samples import LOSS, LossCause, LossRecord

LIMIT_S = 60
SIGNALS = ("eeg", "brain_state", "vital_signs")
ROUNDS = 25
BLOCKS = 12


async def test_bridges_operators_and_reports_at_once(ward) -> None:
    async with ward.database.connection() as connection:
        await admin.add_device(connection, "STRAP-1", org="st-anna", device_type="hr_strap", patient="B")

    async def bridge(seed: int) -> int:
        """Bind, then commit, blocks that the other bridges offer too; how many were new."""
        chance = random.Random(seed)
        new = 0
        for turn in range(ROUNDS):
            blocks = []
            async with ward.database.connection() as connection:
                for n in range(BLOCKS):
                    serial, signal = ("CYTON-1", "STRAP-1")[n % 2], SIGNALS[n % 3]
                    sequence = chance.randrange(60)
                    at_ns = ward.noon_ns + (sequence - 30) * ward.hour_ns
                    (period,) = (await resolve(connection, serial, signal, at_ns, at_ns)).periods
                    part = Part(period.stream_id, 1, at_ns, at_ns)
                    blocks.append(BlockCommit("gw-1", BlockKey(serial, signal, "e"), sequence, (part,)))
                loss = LossRecord("CYTON-1", "eeg", LossCause.RADIO, ward.noon_ns, ward.noon_ns, 1)
                losses = [LossCommit("gw-1", BlockKey("CYTON-1", LOSS, "e"), turn, loss)]
                key = BlockKey("NEW-1", "eeg", "e")
                parked = [
                    ParkedBlock("gw-1", key, turn, "t", "c", b"", ward.noon_ns, ward.noon_ns, 1, "unknown device")
                ]
                found = await commit(connection, Batch(blocks=blocks, losses=losses, parked=parked))
                new += sum(key.signal != LOSS and key.device != "NEW-1" for key, _ in found)
        return new

    async def operator() -> int:
        for turn in range(ROUNDS):
            async with ward.database.connection() as connection:
                since = ward.noon + timedelta(hours=turn - 10)
                patient = "BA"[turn % 2]
                await admin.assign_device(connection, "CYTON-1", patient, since=since, keep_stored=True)
        return 0

    async def reports() -> int:
        for turn in range(ROUNDS):
            async with ward.database.connection() as connection:
                await admin.update_device_facts(connection, "CYTON-1", battery_pct=turn, firmware=f"1.{turn}")
                await admin.update_gateway_status(connection, "gw-1", {"turn": turn})
        return 0

    async def redriver() -> int:
        for _ in range(ROUNDS):
            async with ward.database.connection() as connection:
                ids = [message.id for message in await letters.take_parked(connection, "NEW-1", 10)]
                await letters.settle_parked(connection, ids, [[]] * len(ids))
        return 0

    async with asyncio.timeout(LIMIT_S):
        new = sum(await asyncio.gather(*map(bridge, range(4)), operator(), reports(), redriver(), redriver()))
    assert new == await ward.value(
        "SELECT sum(upper(run) - lower(run))::bigint FROM ledger, unnest(committed) run "
        "WHERE signal <> %s AND device_serial <> 'NEW-1'",
        LOSS,
    )
    assert await ward.value("SELECT sum(point_count)::bigint FROM signal_streams") == new
    assert await ward.value("SELECT count(*) FROM stream_gaps") == ROUNDS
    across = await ward.rows(
        "SELECT s.id FROM signal_streams s JOIN device_owners o ON o.device_id = s.device_id "
        "AND o.patient_id <> s.patient_id "
        "AND tstzrange(o.valid_from, o.valid_to) && tstzrange(s.started_at, s.ended_at)"
    )
    assert across == []
