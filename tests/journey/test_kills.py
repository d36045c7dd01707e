"""Every part of the chain killed in turn while data flows: afterwards the books agree, sample by sample."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from wardlink.demo.account import outbox_tallies, settle
from wardlink.demo.chain import Chain

AWAY_S = 2.0
"""How long each part is dead."""
PARTS = ("gateway", "bridge", "broker", "InfluxDB", "PostgreSQL")


def committed(chain: Chain) -> int:
    """Points that the registry has counted; as many as before while it is away."""
    try:
        with psycopg.connect(chain.conninfo, connect_timeout=2) as connection:
            found = connection.execute("SELECT coalesce(sum(point_count), 0) FROM signal_streams").fetchone()
    except psycopg.OperationalError:
        return -1
    return int(found[0]) if found else -1


@pytest.mark.timeout(300)
def test_every_part_killed_once(
    chain_folder: Path, eventually: Callable[..., None], accepted: Callable[[Chain, str], int]
) -> None:
    with Chain(chain_folder) as chain:
        eventually(lambda: committed(chain) > 0, "first points committed")
        parts = {
            "gateway": chain.gateway,
            "bridge": chain.bridge,
            "broker": chain.servers.mosquitto,
            "InfluxDB": chain.servers.influxdb,
            "PostgreSQL": chain.servers.postgresql,
        }
        for name in PARTS:
            before = accepted(chain, "eeg")
            parts[name].kill()
            time.sleep(AWAY_S)  # the fault itself, not a wait for something
            parts[name].start()
            stored = committed(chain)
            eventually(lambda stored=stored: committed(chain) > stored, f"points committed after {name} was killed")
            eventually(lambda before=before: accepted(chain, "eeg") > before + 250, f"data accepted after {name}")
        eventually(lambda: outbox_tallies(chain)[1] < 10, "the backlog is drained")
        books = asyncio.run(settle(chain))

    for key, stream in books.streams.items():
        assert stream.produced == stream.committed == stream.points > 0, (key, stream)
        assert (stream.parked, stream.duplicates) == (0, 0), (key, stream)
    assert books.dead_letters == 0
    assert len(books.streams) == 3
