"""Rows of the bench: what the ledger takes, and that a row of very many holes does not slow it down.

A private PostgreSQL on a disk of this machine; the goals leave room for a machine that others use too.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from uuid import UUID

from cloud_sync import receipts
from cloud_sync.registry import admin, gap_rows, ledger
from cloud_sync.registry.binding_rows import resolve
from cloud_sync.registry.database import Connection, Database
from cloud_sync.registry.entries import Batch, BlockCommit, BlockKey, Part, Span
from cloud_sync.registry.migrations import migrate
from wardlink.servers import PostgreSQL

Row = dict[str, object]

DEVICES = 60
BATCHES = 100
BLOCKS_PER_S_GOAL = 1_000
"""A block is a second of one signal of one device: 300 headsets with three signals each."""
RANGES = 100_000
"""Every other sequence of 55 hours of blocks of a second."""
WIDE_ROUNDS = 10
WIDE_MS_GOAL = 250.0
"""A batch is gathered for so long."""
NOON_NS = 1_714_564_800_000_000_000
SECOND_NS = 1_000_000_000


def rows() -> list[Row]:
    """Blocks a second with one block of each of many devices in a batch; batches, answers and review of a wide row."""
    with tempfile.TemporaryDirectory(prefix="wardlink-bench-") as name:
        Path(name).chmod(0o755)
        server = PostgreSQL(Path(name))
        server.start()
        try:
            return asyncio.run(_measured(server.create_database("bench")))
        finally:
            server.stop()


async def _measured(conninfo: str) -> list[Row]:
    async with Database(conninfo, pool_size=1) as database:
        await migrate(database)
        async with database.connection() as connection:
            stream = await _ward(connection)
            blocks_per_s = await _live(connection, stream)
            commit_ms, answer_ms, review_ms = await _wide(connection, stream)
    return [
        _row(
            f"ledger: {blocks_per_s:,.0f} blocks/s", f"{BLOCKS_PER_S_GOAL:,} blocks/s", blocks_per_s / BLOCKS_PER_S_GOAL
        ),
        _row(
            f"{RANGES:,} ranges in a row: commit {commit_ms:.0f} ms", f"{WIDE_MS_GOAL:.0f} ms", WIDE_MS_GOAL / commit_ms
        ),
        _row(
            f"{RANGES:,} ranges in a row: answer {answer_ms:.0f} ms", f"{WIDE_MS_GOAL:.0f} ms", WIDE_MS_GOAL / answer_ms
        ),
        _row(f"{RANGES:,} ranges in a row: review {review_ms:.0f} ms", "1 s", 1000 / review_ms),
    ]


async def _ward(connection: Connection) -> UUID:
    await admin.add_device(connection, "D", org="w", device_type="eeg_headset", patient="A", create=True)
    return (await resolve(connection, "D", "eeg", NOON_NS, NOON_NS)).periods[0].stream_id


def _block(stream: UUID, key: BlockKey, sequence: int) -> BlockCommit:
    first_ns = NOON_NS + sequence * SECOND_NS
    last_ns = first_ns + SECOND_NS - 1
    return BlockCommit("gw", key, sequence, (Part(stream, 250, first_ns, last_ns),), span=Span(first_ns, last_ns, 250))


async def _live(connection: Connection, stream: UUID) -> float:
    keys = [BlockKey(f"D{n}", "eeg", "e") for n in range(DEVICES)]
    batches = [Batch(blocks=[_block(stream, key, turn) for key in keys]) for turn in range(BATCHES)]
    began_s = time.perf_counter()
    for batch in batches:
        await ledger.commit(connection, batch)
    return DEVICES * BATCHES / (time.perf_counter() - began_s)


async def _wide(connection: Connection, stream: UUID) -> tuple[float, float, float]:
    """Milliseconds of one batch, one answer and one review of a row of alternating sequences."""
    key = BlockKey("D", "eeg", "wide")
    await ledger.commit(connection, Batch(blocks=[_block(stream, key, 0)]))
    await connection.execute(
        "UPDATE ledger SET missing = %(n)s - 1, committed = "
        "(SELECT range_agg(int8range(2 * n, 2 * n + 1)) FROM generate_series(0, %(n)s - 1) n) WHERE epoch = 'wide'",
        {"n": RANGES},
    )
    batches = [
        Batch(blocks=[_block(stream, key, 3 * RANGES + turn * DEVICES + n) for n in range(DEVICES)])
        for turn in range(WIDE_ROUNDS)
    ]
    began_s = time.perf_counter()
    for batch in batches:
        await ledger.commit(connection, batch)
    committed_s = time.perf_counter()
    wanted = [(key, 0, 2**62)]
    answer = await ledger.committed_within(connection, wanted, receipts.ANSWER_RANGES_MAX)
    receipts.answer("gw", wanted, answer)
    answered_s = time.perf_counter()
    await gap_rows.review(connection, key)
    reviewed_s = time.perf_counter()
    return (
        1000 * (committed_s - began_s) / WIDE_ROUNDS,
        1000 * (answered_s - committed_s),
        1000 * (reviewed_s - answered_s),
    )


def _row(name: str, peer: str, ratio: float) -> Row:
    return {"name": name, "ratio": ratio, "peer": peer, "goal": 1.0, "ok": ratio >= 1.0}


if __name__ == "__main__":
    for found in rows():
        print(found)
