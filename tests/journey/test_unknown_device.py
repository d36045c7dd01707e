"""Devices that nobody registered: parked, then bound by the command that an operator uses, with nothing lost."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from gateway.mqtt import Broker, MqttSession, Outbound, connected_session
from gateway.wire import topics
from wardlink.demo.account import settle
from wardlink.demo.chain import GATEWAY_ID, ORGANISATION, PATIENT, TWINS, Chain


def count(chain: Chain, table: str) -> int:
    with psycopg.connect(chain.conninfo) as connection:
        found = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
    return int(found[0]) if found else 0


def admin(chain: Chain, *words: str) -> None:
    """What an operator types, with the bridge's credentials."""
    environment = chain.bridge._environment()
    command = [sys.executable, "-m", "wardlink", "cloud", *words, "--config", str(chain.cloud_config)]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60)


async def publish_garbage(chain: Chain) -> None:
    """Bytes that are no block, on a topic of this gateway's own headset."""
    broker, login = chain.servers.mosquitto, chain.servers.mosquitto.gateway(GATEWAY_ID)
    who = Broker(broker.host, broker.port, "garbage", login.user, login.password)
    async with connected_session(MqttSession(who, clean=True)) as session:
        await session.publish(Outbound(topics.data(GATEWAY_ID, "CYTON-1", "eeg"), b"\xff\x00 no block"))


@pytest.mark.timeout(180)
def test_parked_then_bound_then_written(
    chain_folder: Path, eventually: Callable[..., None], accepted: Callable[[Chain, str], int]
) -> None:
    with Chain(chain_folder, register=False) as chain:
        eventually(lambda: count(chain, "parked_messages") >= 6, "data of unknown devices parked")
        assert count(chain, "signal_streams") == 0

        asyncio.run(publish_garbage(chain))
        eventually(lambda: count(chain, "dead_letters") == 1, "the garbage is a dead letter")

        for twin in TWINS:
            who = ("--org", ORGANISATION, "--type", twin.device_type, "--patient", PATIENT, "--create")
            admin(chain, "device", "add", twin.serial, *who)
        eventually(lambda: count(chain, "parked_messages") == 0, "parked data written once its device is bound")
        before = accepted(chain, "eeg")
        eventually(lambda: accepted(chain, "eeg") > before + 500, "the stream goes on")
        books = asyncio.run(settle(chain))

    for key, stream in books.streams.items():
        assert stream.produced == stream.committed == stream.points > 0, (key, stream)
        assert (stream.lost, stream.parked, stream.duplicates) == (0, 0, 0), (key, stream)
    assert len(books.streams) == 3
    assert books.dead_letters == 1
