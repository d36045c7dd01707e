"""Bugs put into the running code on purpose: a simulation that does not find them proves nothing."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from cloud_sync import receipts
from cloud_sync.consumer import Consumer
from cloud_sync.delivery import Block, Delivery
from cloud_sync.registry import ledger
from cloud_sync.registry.entries import LossCommit
from gateway.errors import UnavailableError
from gateway.mqtt import Inbound
from gateway.spool.store import Row, StoredRow
from gateway.uplink.sender import Sender
from tests.simulation.disk import Disk, WatchedStore

Plant = Callable[[pytest.MonkeyPatch], None]


def delete_on_puback(patch: pytest.MonkeyPatch) -> None:
    """The broker's word is enough to forget: what most tutorials do."""
    publish = Sender._publish
    deleting: set[asyncio.Task[None]] = set()

    async def delete(sender: Sender, row: Row) -> None:
        with_receipt = (row.sequence, row.sequence)
        try:
            sender.receipted(await sender._outbox.forget(row.device, row.signal, row.epoch, [with_receipt]))
        except UnavailableError:
            return

    def answered(sender: Sender, row: Row, answer: asyncio.Future[None]) -> None:
        if not answer.cancelled() and answer.exception() is None:
            task = asyncio.get_running_loop().create_task(delete(sender, row))
            deleting.add(task)
            task.add_done_callback(deleting.discard)

    def planted(sender: Sender, stored: StoredRow, *lane: Any) -> bool:
        session = sender._session
        real = session.publish

        def noted(*message: Any) -> asyncio.Future[None]:
            answer = real(*message)
            answer.add_done_callback(partial(answered, sender, stored.row))
            return answer

        session.publish = noted  # type: ignore[method-assign]
        try:
            return publish(sender, stored, *lane)
        finally:
            session.publish = real  # type: ignore[method-assign]

    patch.setattr(Sender, "_publish", planted)


def receipt_before_the_stores(patch: pytest.MonkeyPatch) -> None:
    """A receipt for what is in the bridge's memory and nowhere else."""
    take = Consumer._take

    async def planted(consumer: Consumer, messages: Sequence[Inbound], deliveries: Sequence[Delivery]) -> None:
        found = [each.content for each in deliveries if isinstance(each.content, Block | LossCommit)]
        consumer._publish(receipts.receipts((each.gateway, each.key, each.sequence) for each in found))
        await take(consumer, messages, deliveries)

    patch.setattr(Consumer, "_take", planted)


def every_delivery_counts(patch: pytest.MonkeyPatch) -> None:
    """A ledger that finds everything new."""
    claim = ledger._claim

    async def planted(connection: Any, entries: Mapping[Any, Any]) -> Any:
        found = await claim(connection, entries)
        found.new = set(entries)
        return found

    async def nothing_is_known(_connection: Any, _identities: Any) -> set[Any]:
        return set()

    patch.setattr(ledger, "_claim", planted)
    patch.setattr(ledger, "known", nothing_is_known)


def commits_are_not_synced(patch: pytest.MonkeyPatch) -> None:
    """A power cut takes the last commit with it, as it may with synchronous=OFF."""
    write = WatchedStore.write

    def planted(store: WatchedStore, *step: Any) -> None:
        before = _before_the_last_commit(store.disk)
        shutil.rmtree(before, ignore_errors=True)
        shutil.copytree(store.disk.folder, before)
        write(store, *step)

    patch.setattr(WatchedStore, "write", planted)
    patch.setattr(Disk, "survivor", property(_before_the_last_commit))


def _before_the_last_commit(disk: Disk) -> Path:
    return disk.folder.with_suffix(".before")


PLANTED: Mapping[str, tuple[Plant, str]] = MappingProxyType(
    {
        "delete on PUBACK": (delete_on_puback, "LOST"),
        "receipt before the stores": (receipt_before_the_stores, "LOST"),
        "every delivery counts": (every_delivery_counts, "point_count"),
        "commits are not synced": (commits_are_not_synced, "LOST"),
    }
)
"""By name: what plants it, and what the broken promise is called."""
