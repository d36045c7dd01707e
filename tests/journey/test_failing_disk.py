"""The gateway's disk fails under it, in every way in turn: it goes on acquiring, and recovers without a restart.

What a full disk made it give up is on record, sample by sample; no other fault costs anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.faults.mount import MountedDisk, NoFuseError
from wardlink.demo.account import outbox_tallies, settle
from wardlink.demo.chain import BUCKET, Chain

pytestmark = pytest.mark.faults

FAILING_S = 2.0
"""How long each fault lasts: four commits."""
PERIOD_NS = 4_000_000
"""Of the virtual Cyton."""
FAULTS: dict[str, dict[str, Any]] = {
    "full": {"blocks_left": 0},
    "EIO on write": {"write_error": errno.EIO},
    "EIO on fsync": {"sync_error": errno.EIO},
    "read-only": {"is_read_only": True},
}


@pytest.mark.timeout(300)
def test_every_fault_once(
    chain_folder: Path, eventually: Callable[..., None], accepted: Callable[[Chain, str], int]
) -> None:
    with contextlib.ExitStack() as running:
        try:
            disk = running.enter_context(MountedDisk(chain_folder / "gateway" / "state"))
        except NoFuseError as error:
            pytest.skip(f"NOT PROVEN HERE, that a gateway survives a failing disk: no FUSE, {error}")
        disk.ask("stop_record")
        chain = running.enter_context(Chain(chain_folder))
        eventually(lambda: accepted(chain, "eeg") > 500, "data is accepted")
        gateway = chain.gateway.pid
        for fault in FAULTS.values():
            with disk.fault(**fault):
                time.sleep(FAILING_S)  # the fault itself, not a wait for something
            before = accepted(chain, "eeg")
            eventually(lambda before=before: accepted(chain, "eeg") > before + 250, "data is accepted again")
        before = accepted(chain, "eeg")
        with disk.stalled_sync():
            disk.await_stalled()
            time.sleep(FAILING_S)  # the fault itself; nobody can look at the outbox meanwhile
        eventually(lambda: accepted(chain, "eeg") > before + 250 * FAILING_S, "what came meanwhile is accepted")
        assert chain.gateway.pid == gateway
        log = chain.gateway.log_path.read_text(encoding="utf-8")
        assert log.count("outbox commits again") >= len(FAULTS) - 1, log  # a full disk has room for what overwrites
        eventually(lambda: outbox_tallies(chain)[1] < 10, "the backlog is drained")
        books = asyncio.run(settle(chain))
        steps = [round((after - before) / PERIOD_NS) for before, after in pairwise(times_of(chain, "eeg"))]

    for key, stream in books.streams.items():
        assert stream.produced == stream.committed + stream.lost, (key, stream)
        assert stream.committed == stream.points > 0, (key, stream)
        assert (stream.parked, stream.duplicates) == (0, 0), (key, stream)
    assert len(books.streams) == 3
    assert books.of("STRAP-1", "vital_signs").lost == 0
    assert sum(step - 1 for step in steps) == books.of("CYTON-1", "eeg").lost


def times_of(chain: Chain, measurement: str) -> list[int]:
    """Times of all points of a measurement, in ns."""
    series = chain.servers.influxdb.query(f"SELECT Fp1 FROM {measurement}", BUCKET)
    return sorted(int(values[0]) for found in series for values in found["values"])
