"""Stores, broker and the bridge itself taken away in mid-stream: everything is there afterwards, counted once."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cloud_sync import consumer
from wardlink.servers import InfluxDB, PostgreSQL, PrivateServer

BLOCKS = 60
POINTS = 5 * BLOCKS


async def send(chain: Any, gateway: Any, first: int, stop: int) -> None:
    for sequence in range(first, stop):
        await gateway.send(chain.vitals(first_ns=chain.noon_ns + sequence * 10**10), sequence)


async def all_is_there_once(chain: Any, gateway: Any, points: int = POINTS) -> None:
    await gateway.until_receipted("STRAP-1", "vital_signs", *range(points // 5))
    assert len(await chain.points("vital_signs")) == points
    assert await chain.value("SELECT sum(point_count) FROM signal_streams") == points
    assert await chain.value("SELECT committed::text FROM ledger") == f"{{[0,{points // 5})}}"
    assert await chain.count("dead_letters") == 0


@pytest.fixture(params=["influxdb", "postgresql"])
def store(request: pytest.FixtureRequest, influx_server: InfluxDB, postgres_server: PostgreSQL) -> PrivateServer:
    return {"influxdb": influx_server, "postgresql": postgres_server}[request.param]


async def test_a_store_is_killed_and_started_again(chain: Any, store: PrivateServer) -> None:
    await chain.start()
    async with chain.gateway() as gateway:
        await send(chain, gateway, 0, 20)
        await asyncio.to_thread(store.kill)
        await send(chain, gateway, 20, 40)

        async def is_kept() -> bool:
            return bool(chain.bridge.consumer.activity.keeping)

        await chain.wait_for(is_kept, "a batch that is kept")
        assert "waiting" in chain.bridge.status_line(0)
        await asyncio.to_thread(store.start)
        await send(chain, gateway, 40, BLOCKS)
        await all_is_there_once(chain, gateway)
    assert "waiting" not in chain.bridge.status_line(0)


async def test_both_stores_are_killed_several_times(
    chain: Any, influx_server: InfluxDB, postgres_server: PostgreSQL
) -> None:
    await chain.start()
    async with chain.gateway() as gateway:
        sending = asyncio.create_task(send(chain, gateway, 0, BLOCKS))
        for _ in range(2):
            for server in (influx_server, postgres_server):
                await asyncio.to_thread(server.kill)
                await asyncio.to_thread(server.start)
        await sending
        await all_is_there_once(chain, gateway)


async def test_stores_that_stay_away_make_the_bridge_leave_and_come_back(
    chain: Any, store: PrivateServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer, "LEAVE_AFTER_S", 0.5)
    await chain.start()
    name = chain.settings.bridge.id
    async with chain.gateway() as gateway:
        await send(chain, gateway, 0, 5)
        await gateway.until_receipted("STRAP-1", "vital_signs", *range(5))
        await asyncio.to_thread(store.kill)
        await send(chain, gateway, 5, 10)

        async def has_left() -> bool:
            return gateway.bridges.get(name) is False and not chain.bridge.consumer.session.connected.is_set()

        await chain.wait_for(has_left, "the bridge to leave the broker")
        await send(chain, gateway, 10, BLOCKS)
        assert len(chain.bridge.consumer._waiting) == 0
        await asyncio.to_thread(store.start)

        async def is_back() -> bool:
            return bool(gateway.bridges.get(name))

        await chain.wait_for(is_back, "the bridge to come back")
        await all_is_there_once(chain, gateway)


async def test_a_store_that_hangs_makes_the_bridge_leave_as_well(
    chain: Any, influx_server: InfluxDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer, "LEAVE_AFTER_S", 0.5)
    await chain.start()
    name = chain.settings.bridge.id
    async with chain.gateway() as gateway:
        await send(chain, gateway, 0, 5)
        await gateway.until_receipted("STRAP-1", "vital_signs", *range(5))
        assert influx_server.pid is not None
        os.kill(influx_server.pid, signal.SIGSTOP)
        try:
            await send(chain, gateway, 5, 10)

            async def has_left() -> bool:
                return gateway.bridges.get(name) is False

            await chain.wait_for(has_left, "the bridge to leave the broker")
        finally:
            os.kill(influx_server.pid, signal.SIGCONT)
        await send(chain, gateway, 10, 20)
        await all_is_there_once(chain, gateway, points=100)


async def test_a_flood_stays_in_the_broker(
    chain: Any, postgres_server: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    bytes_max = 20_000
    monkeypatch.setattr(consumer, "BYTES_UNACKNOWLEDGED_MAX", bytes_max)
    await chain.start()
    held: list[int] = []
    on_message = chain.bridge.consumer._on_message

    def watch(message: Any) -> None:
        on_message(message)
        held.append(sum(len(one.payload) for one in chain.bridge.consumer._waiting))

    chain.bridge.consumer.session._on_message = watch
    async with chain.gateway() as gateway:
        await send(chain, gateway, 0, 1)
        await gateway.until_receipted("STRAP-1", "vital_signs", 0)
        await asyncio.to_thread(postgres_server.kill)
        await send(chain, gateway, 1, 200)
        await asyncio.to_thread(postgres_server.start)
        await all_is_there_once(chain, gateway, points=1000)
    assert max(held, default=0) < bytes_max + 10_000


async def test_a_start_without_stores_waits_and_says_so(chain: Any, store: PrivateServer) -> None:
    await asyncio.to_thread(store.kill)
    bridge = await chain.start(is_connected=False)

    async def says_so() -> bool:
        return "waiting" in bridge.status_line(0)

    await chain.wait_for(says_so, "a status")
    assert {"influxdb": "InfluxDB", "postgresql": "PostgreSQL"}[store.name] in bridge.status_line(0)
    assert not bridge.consumer.session.connected.is_set()
    await asyncio.to_thread(store.start)
    async with chain.gateway() as gateway:
        await chain.wait_for(lambda: asyncio.wait_for(bridge.consumer.session.connected.wait(), 40), "the broker")
        await send(chain, gateway, 0, 3)
        await all_is_there_once(chain, gateway, points=15)


async def test_the_broker_is_killed_and_what_it_lost_is_sent_again(chain: Any) -> None:
    await chain.start()
    async with chain.gateway() as gateway:
        await send(chain, gateway, 0, 10)
        await asyncio.to_thread(chain.mosquitto.kill)
        await asyncio.to_thread(chain.mosquitto.start)
        await gateway.session.connected.wait()
        await chain.wait_for(lambda: asyncio.wait_for(chain.bridge.consumer.session.connected.wait(), 40), "the bridge")
        await send(chain, gateway, 0, 20)
        await all_is_there_once(chain, gateway, points=100)


CONFIG = """
[bridge]
id = "{id}"
state_dir = "{state}"
[mqtt]
host = "{mqtt.host}"
port = {mqtt.port}
username = "{mqtt.username}"
tls = false
[influx]
dialect = "v1"
url = "{influx.url}"
username = "{influx.username}"
[postgres]
host = "{postgres.host}"
port = {postgres.port}
dbname = "{postgres.dbname}"
user = "{postgres.user}"
"""


async def test_the_bridge_is_killed_again_and_again(chain: Any, tmp_path: Path) -> None:
    settings = chain.settings
    config = tmp_path / "cloud.toml"
    config.write_text(
        CONFIG.format(
            id=settings.bridge.id,
            state=tmp_path,
            mqtt=settings.mqtt,
            influx=settings.influx,
            postgres=settings.postgres,
        )
    )
    command = [sys.executable, "-c", "from wardlink.cli import main; raise SystemExit(main())", "cloud", "run"]

    async def start() -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *command, "--config", str(config), stderr=asyncio.subprocess.DEVNULL
        )

    async def committed() -> int:
        return int(await chain.value("SELECT coalesce(sum(point_count), 0) FROM signal_streams"))

    def more_than(count: int) -> Callable[[], Any]:
        async def there() -> bool:
            return await committed() > count

        return there

    process = await start()
    async with chain.gateway() as gateway:

        async def is_online() -> bool:
            return bool(gateway.bridges.get(settings.bridge.id))

        await chain.wait_for(is_online, "the bridge")
        for round_number in range(3):
            sending = asyncio.create_task(send(chain, gateway, round_number * BLOCKS, (round_number + 1) * BLOCKS))
            await chain.wait_for(more_than(await committed()), "the bridge to commit")
            process.kill()
            await process.wait()
            gateway.bridges.clear()
            process = await start()
            await sending
        await all_is_there_once(chain, gateway, points=3 * POINTS)
        await chain.wait_for(is_online, "the bridge")
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 20) == 0
