"""Somebody loses a database or brings an old one back: each ends well, counts nothing twice, and is on record."""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest

from gateway.uplink import uplink
from tests.cloud_sync.conftest import Chain
from tests.faults.edge import POINTS_A_BLOCK, Edge, running_edge
from wardlink.servers import PostgreSQL

pytestmark = pytest.mark.faults

SECONDS_MAX = 60.0
"""For anything awaited here: a deadline, not a measure."""
LEDGER = "SELECT committed::text FROM ledger WHERE signal = 'vital_signs' ORDER BY opened_at"
GAPS = (
    "SELECT cause, lower(sequences)::int, upper(sequences)::int, outcome FROM stream_gaps WHERE signal <> 'loss' "
    "ORDER BY opened_at, sequences"
)
POINTS = "SELECT coalesce(sum(point_count), 0)::int FROM signal_streams"
LOST = "SELECT coalesce(sum(sample_count), 0)::int FROM stream_gaps WHERE outcome = 'lost'"
ALERTS = "SELECT kind, subject FROM alerts WHERE closed_at IS NULL AND kind NOT LIKE 'unknown%%' ORDER BY 1"

_numbers = itertools.count(1)


async def delivered(edge: Edge) -> None:
    """Until all that the outbox holds is receipted."""
    await asyncio.wait_for(edge.outbox.empty.wait(), SECONDS_MAX)


def delete_outbox(folder: Path, *, are_marks_kept: bool) -> None:
    for path in folder.glob("outbox.db*"):
        if not (are_marks_kept and path.name.endswith("marks")):
            path.unlink()


def restore(backup: Path, state: Path, *, with_marks: bool) -> None:
    """Put an outbox back as it was; what the marks say may be newer."""
    for path in list(state.iterdir()):
        if with_marks or not path.name.endswith("marks"):
            path.unlink()
    for path in backup.iterdir():
        if with_marks or not path.name.endswith("marks"):
            shutil.copy2(path, state)


@pytest.fixture
def asks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uplink, "ASK_S", 0.05)


@pytest.fixture
async def fresh(ward: Any, postgres_server: PostgreSQL) -> AsyncIterator[Any]:
    """The ward once more, with a registry that has seen nothing yet; everything else is the same."""
    name = f"fresh_{next(_numbers)}"
    url = urlsplit(await asyncio.to_thread(postgres_server.create_database, name))
    postgres = msgspec.structs.replace(ward.settings.postgres, dbname=url.path.lstrip("/"))
    made = Chain(msgspec.structs.replace(ward.settings, postgres=postgres), ward.mosquitto, ward.influx, ward.bucket)
    async with made.registry:
        await made.furnish()
        yield made
        await made.stop()
    await asyncio.to_thread(postgres_server.drop_database, name)


async def test_a_bridge_with_a_fresh_database_takes_what_is_left_and_says_what_is_elsewhere(
    ward: Any, fresh: Any, tmp_path: Path, asks_often: None
) -> None:
    async with running_edge(ward, "gw-fresh", tmp_path) as edge:
        await ward.start()
        edge.send(20)
        await delivered(edge)
        await ward.stop()
        edge.send(10)
        await fresh.start()
        await delivered(edge)

        async def is_on_record() -> bool:
            edge.send(1)  # the question names what is held, so something must be
            await fresh.bridge.gaps.look()
            return await fresh.rows(GAPS) == [("transport", 0, 20, "elsewhere")]

        await fresh.wait_for(is_on_record, "the gap of what the former database has")
        await delivered(edge)
        assert await fresh.rows(LEDGER) == [(f"{{[20,{edge.at})}}",)]
        assert await fresh.value(POINTS) == POINTS_A_BLOCK * (edge.at - 20)
        assert ("samples_elsewhere", "STRAP-1 vital_signs") in await fresh.rows(ALERTS)
    assert await ward.value(POINTS) == POINTS_A_BLOCK * 20
    assert len(await ward.points("vital_signs")) == POINTS_A_BLOCK * edge.at
    assert await fresh.count("dead_letters") == 0


@pytest.mark.parametrize("are_marks_newer", [False, True], ids=["whole folder", "database alone"])
async def test_a_gateway_restored_from_an_old_backup_sends_nothing_that_counts_twice_and_reports_no_false_loss(
    ward: Any, tmp_path: Path, asks_often: None, are_marks_newer: bool
) -> None:
    state, backup = tmp_path / "state", tmp_path / "backup"
    async with running_edge(ward, "gw-restored", state) as edge:
        await ward.start()
        edge.send(10)
        await delivered(edge)
        await ward.stop()
        edge.send(10)
        await edge.outbox.commit()
    await asyncio.to_thread(shutil.copytree, state, backup)  # ten are not receipted yet
    async with running_edge(ward, "gw-restored", state, at=20) as edge:
        await ward.start()
        edge.send(5)
        await delivered(edge)
    await asyncio.to_thread(restore, backup, state, with_marks=not are_marks_newer)
    async with running_edge(ward, "gw-restored", state, at=25, resend_after_s=0.5) as edge:
        edge.send(5)
        await delivered(edge)

        async def is_settled() -> bool:
            return not await edge.outbox.suspects()

        await ward.wait_for(is_settled, "the cloud's word on what the marks know and the database does not")
        await delivered(edge)
        await ward.bridge.gaps.look()
    assert await ward.rows(LEDGER) == [("{[0,20)}",), ("{[0,5)}",), ("{[0,5)}",)]
    assert await ward.value(POINTS) == POINTS_A_BLOCK * 30
    assert len(await ward.points("vital_signs")) == POINTS_A_BLOCK * 30
    assert await ward.value(LOST) == 0
    assert await ward.count("dead_letters") == 0


async def test_control_with_the_epoch_of_the_backup_its_new_blocks_would_be_taken_for_old_ones(
    ward: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an epoch for each opening is good for: the restored outbox gives sequences that were given before."""
    monkeypatch.setattr("gateway.spool.sqlite_store.secrets.token_hex", lambda _: "the-same-for-ever")
    state, backup = tmp_path / "state", tmp_path / "backup"
    async with running_edge(ward, "gw-control", state) as edge:
        await edge.outbox.commit()
    await asyncio.to_thread(shutil.copytree, state, backup)
    await ward.start()
    for at in (0, 5):
        async with running_edge(ward, "gw-control", state, at=at) as edge:
            edge.send(5)
            await delivered(edge)
        await asyncio.to_thread(shutil.rmtree, state)
        await asyncio.to_thread(shutil.copytree, backup, state)
    assert await ward.value(POINTS) == POINTS_A_BLOCK * 5


@pytest.mark.parametrize("are_marks_kept", [True, False], ids=["marks kept", "marks gone"])
async def test_a_gateway_whose_outbox_was_deleted_goes_on_and_says_what_was_in_it(
    ward: Any, tmp_path: Path, asks_often: None, are_marks_kept: bool
) -> None:
    """Five blocks were accepted and not sent. Only the marks beside the file can know of them; they are the control."""
    async with running_edge(ward, "gw-deleted", tmp_path) as edge:
        await ward.start()
        edge.send(10)
        await delivered(edge)
    async with running_edge(ward, "gw-deleted", tmp_path, port=1, at=10) as edge:  # nobody listens there
        edge.send(5)
        await edge.outbox.commit()
    await asyncio.to_thread(delete_outbox, tmp_path, are_marks_kept=are_marks_kept)
    async with running_edge(ward, "gw-deleted", tmp_path, at=15, resend_after_s=0.5) as edge:
        edge.send(5)
        await delivered(edge)

        async def is_on_record() -> bool:
            await ward.bridge.gaps.look()
            return bool(await ward.value(LOST))

        if are_marks_kept:
            await ward.wait_for(is_on_record, "the loss of what was in the outbox")
            await delivered(edge)
        await ward.bridge.gaps.look()
        assert await ward.value(POINTS) == POINTS_A_BLOCK * 15
        assert len(await ward.points("vital_signs")) == POINTS_A_BLOCK * 15
        assert await ward.value(LOST) == (POINTS_A_BLOCK * 5 if are_marks_kept else 0)
        assert await ward.value("SELECT count(*)::int FROM stream_gaps WHERE closed_at IS NULL") == 0
