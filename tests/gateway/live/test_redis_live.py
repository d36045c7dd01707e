"""Newest states in a real Redis: what is there, for how long, and that nothing suffers when it is away."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from gateway.errors import ConfigError
from gateway.live import redis_live
from gateway.live.redis_live import RedisLive, Wearer, channel, current_key, state_of
from gateway.signal.features import Features
from wardlink.servers import Redis

SECONDS_MAX = 20.0
SYNTERGIC = Features(0.1, 0.1, 0.7, 0.05, 0.05, 0.9, 0.5, 0.25)
ORDINARY = Features(0.4, 0.2, 0.2, 0.1, 0.1, 0.3, 0.2, 0.75)
_numbers = count(1)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(SECONDS_MAX):
        while not condition():  # noqa: ASYNC110 - what another program holds has no event here
            await asyncio.sleep(0.005)


@pytest.fixture
def client(redis_url: str) -> Iterator[Any]:
    client = redis.Redis.from_url(redis_url, decode_responses=True)
    yield client
    client.close()


@pytest.fixture
def wearer() -> Wearer:
    return Wearer(f"user-{next(_numbers)}", "session-1")


@asynccontextmanager
async def showing(url: str) -> AsyncIterator[RedisLive]:
    live = RedisLive(url)
    running = asyncio.create_task(live.run())
    try:
        yield live
        assert not running.done()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert running.cancelled()


async def test_a_state_is_a_hash_of_numbers_that_expires_and_a_message(
    redis_url: str, client: Any, wearer: Wearer
) -> None:
    assert current_key("7") == "user:7:current"
    with client.pubsub() as listener:
        listener.subscribe(channel(wearer.user_id))
        assert listener.get_message(timeout=SECONDS_MAX)["type"] == "subscribe"
        async with showing(redis_url) as live:
            live.show(wearer, SYNTERGIC)
            await until(lambda: client.exists(current_key(wearer.user_id)))
        found = client.hgetall(current_key(wearer.user_id))
        message = await asyncio.to_thread(listener.get_message, timeout=SECONDS_MAX)
    numbers = {name: getattr(SYNTERGIC, name) for name in SYNTERGIC.__slots__}
    assert {name: float(found[name]) for name in numbers} == numbers
    assert set(found) == {*numbers, "state", "session_id"}
    assert (found["state"], found["session_id"]) == ("syntergic", "session-1")
    assert 0 < client.ttl(current_key(wearer.user_id)) <= 300
    assert message["channel"] == f"user:{wearer.user_id}:states"
    assert json.loads(message["data"]) == {**numbers, "state": "syntergic", "session_id": "session-1"}


async def test_a_field_without_a_value_is_not_there_and_keeps_no_old_one(
    redis_url: str, client: Any, wearer: Wearer
) -> None:
    key = current_key(wearer.user_id)
    without = Features(0.4, 0.2, 0.2, 0.1, 0.1, math.nan, math.inf, 0.75)
    with client.pubsub() as listener:
        listener.subscribe(channel(wearer.user_id))
        assert listener.get_message(timeout=SECONDS_MAX)["type"] == "subscribe"
        async with showing(redis_url) as live:
            live.show(wearer, SYNTERGIC)
            await until(lambda: client.hget(key, "state") == "syntergic")
            live.show(wearer, without)
            await until(lambda: client.hget(key, "state") == "ordinary")
        assert set(client.hkeys(key)) == {*SYNTERGIC.__slots__, "state", "session_id"} - {"coherence", "plv"}
        assert await asyncio.to_thread(listener.get_message, timeout=SECONDS_MAX)
        second = await asyncio.to_thread(listener.get_message, timeout=SECONDS_MAX)
    assert "coherence" not in json.loads(second["data"], parse_constant=pytest.fail)


async def test_the_time_to_live_begins_anew_with_every_state(redis_url: str, client: Any, wearer: Wearer) -> None:
    key = current_key(wearer.user_id)
    async with showing(redis_url) as live:
        live.show(wearer, ORDINARY)
        await until(lambda: client.exists(key))
        client.expire(key, 10)
        live.show(wearer, SYNTERGIC)
        await until(lambda: client.hget(key, "state") == "syntergic")
    assert client.ttl(key) > 200


async def test_numbers_of_numpy_are_numbers_there_too(redis_url: str, client: Any, wearer: Wearer) -> None:
    features = Features(*(np.float64(value) for value in (0.1, 0.1, 0.7, 0.05, 0.05, 0.9, 0.5, 0.25)))
    async with showing(redis_url) as live:
        live.show(wearer, features)
        await until(lambda: client.exists(current_key(wearer.user_id)))
    assert float(client.hget(current_key(wearer.user_id), "alpha")) == 0.7


async def test_each_wearer_has_a_state_and_a_session_may_be_unknown(
    redis_url: str, client: Any, wearer: Wearer
) -> None:
    other = Wearer(f"user-{next(_numbers)}")
    async with showing(redis_url) as live:
        live.show(wearer, SYNTERGIC)
        live.show(other, ORDINARY)
        await until(lambda: client.exists(current_key(wearer.user_id), current_key(other.user_id)) == 2)
    assert client.hget(current_key(wearer.user_id), "state") == "syntergic"
    assert client.hmget(current_key(other.user_id), "state", "session_id") == ["ordinary", ""]


@pytest.mark.parametrize(
    ("coherence", "alpha", "state"),
    [
        (0.81, 0.61, "syntergic"),
        (0.8, 0.9, "ordinary"),
        (0.9, 0.6, "ordinary"),
        (math.nan, 0.9, "ordinary"),
        (0.9, math.nan, "ordinary"),
    ],
)
def test_the_state_follows_coherence_and_alpha(coherence: float, alpha: float, state: str) -> None:
    assert state_of(Features(0.1, 0.1, alpha, 0.1, 0.1, coherence, 0.5, 0.5)) == state


async def test_only_the_newest_state_waits_while_redis_is_away_and_it_is_shown_when_it_is_back(
    redis_server: Redis,
    redis_url: str,
    wearer: Wearer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(redis_live, "RETRY_S", 0.01)
    caplog.set_level(logging.INFO)
    async with showing(redis_url) as live:
        live.show(wearer, ORDINARY)
        client = redis.Redis.from_url(redis_url, decode_responses=True)
        await until(lambda: client.exists(current_key(wearer.user_id)))
        await asyncio.to_thread(redis_server.kill)
        live.show(wearer, ORDINARY)
        await until(lambda: live.problem)
        for _ in range(1000):
            live.show(wearer, ORDINARY)
        live.show(wearer, SYNTERGIC)
        assert len(live._newest) == 1
        await until(lambda: not live._newest)  # tried, and dropped
        await asyncio.to_thread(redis_server.start)
        live.show(wearer, SYNTERGIC)
        await until(lambda: not live.problem)
        assert client.hget(current_key(wearer.user_id), "state") == "syntergic"
        client.close()
    assert caplog.text.count("live states are not shown") == 1
    assert caplog.text.count("live states are shown again") == 1


async def test_a_redis_that_is_never_there_harms_nobody(tmp_path: Path, wearer: Wearer) -> None:
    beats = 0

    async def beat() -> None:
        nonlocal beats
        while True:
            await asyncio.sleep(0)
            beats += 1

    others = asyncio.create_task(beat())
    async with showing(f"unix://{tmp_path}/none") as live:
        live.show(wearer, ORDINARY)
        await until(lambda: live.problem)
        known = beats
        live.show(wearer, ORDINARY)
        await until(lambda: beats > known + 100)
    others.cancel()


async def test_a_wrong_password_is_a_problem_that_is_shown(redis_server: Redis, redis_url: str, wearer: Wearer) -> None:
    live = RedisLive(f"unix://{redis_server.socket_path}", "wrong")
    running = asyncio.create_task(live.run())
    live.show(wearer, ORDINARY)
    await until(lambda: live.problem or running.done())
    assert "password" in live.problem
    assert not running.done()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


@pytest.mark.parametrize("url", ["http://127.0.0.1", "redis://127.0.0.1:many", "nonsense"])
def test_a_url_that_is_none_is_the_operators(url: str) -> None:
    with pytest.raises(ConfigError, match=r"live\.redis\.url"):
        RedisLive(url)
