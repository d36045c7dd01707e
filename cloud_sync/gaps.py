"""The review of gaps: every few seconds, what the ledger's holes have become. Several bridges may do so at once.

Knows when to look; what a gap is, and its rows, are the registry's.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta

from cloud_sync.registry import gap_rows
from cloud_sync.registry.database import Database
from cloud_sync.registry.entries import BlockKey
from gateway.errors import RefusedError, UnavailableError

log = logging.getLogger(__name__)

INTERVAL_S = 5.0
"""A hole that closes sooner, as between live data and the backlog behind it, makes no row."""
KEYS_MAX = 1_000
"""Ledger rows of one look, a few milliseconds each; the next look goes on after them."""


class GapReview:
    """Keeps `stream_gaps` and the alerts about it in step with the ledger."""

    def __init__(self, database: Database, *, alert_after_s: float) -> None:
        self._database = database
        self._alert_after = timedelta(seconds=alert_after_s)
        self._after: BlockKey | None = None

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self.look()
            except (UnavailableError, RefusedError) as error:
                log.warning("gaps are not reviewed for now: %s", error)
            await asyncio.sleep(INTERVAL_S)

    async def look(self) -> int:
        """Review what changed; how many ledger rows that were. Raises `UnavailableError`."""
        async with self._database.connection() as connection:
            gone = await gap_rows.mark_gone(connection)
            keys = await gap_rows.due(connection, KEYS_MAX, self._after)
        for key in gone:
            log.warning("device %s, %s, epoch %s: its gateway holds nothing of it any more", *_named(key))
        self._after = keys[-1] if len(keys) == KEYS_MAX else None
        for key in keys:
            try:
                async with self._database.connection() as connection:
                    await gap_rows.review(connection, key)
            except RefusedError as error:
                log.error("device %s, %s, epoch %s: its gaps stay as they are: %s", *_named(key), error)
        async with self._database.connection() as connection:
            await gap_rows.watch(connection, self._alert_after)
        return len(keys)


def _named(key: BlockKey) -> tuple[str, str, str]:
    return key.device, key.signal, key.epoch
