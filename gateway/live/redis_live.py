"""Newest brain states in Redis, for pages and feedback: a hash and a channel a user. A cache: all of it may be lost.

The gateway runs the same with Redis away: states are dropped here, never in the outbox.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from dataclasses import asdict, dataclass
from typing import Any

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from gateway.errors import ConfigError
from gateway.signal.features import Features

log = logging.getLogger(__name__)

EXPIRY_S = 300
TIMEOUT_S = 2.0
RETRY_S = 5.0
SYNTERGIC_COHERENCE_MIN = 0.8
SYNTERGIC_ALPHA_MIN = 0.6
_NO_LOOKUP: dict[str, Any] = {"driver_info": None} if hasattr(redis, "DriverInfo") else {"lib_version": ""}
"""redis-py would read its own version from the disk for every connection, in the event loop."""


@dataclass(frozen=True, slots=True)
class Wearer:
    """Whose state it is: identifiers, never a name."""

    user_id: str
    session_id: str | None = None


def current_key(user_id: str) -> str:
    """The hash of a user's newest state."""
    return f"user:{user_id}:current"


def channel(user_id: str) -> str:
    """The channel on which every new state of a user is published."""
    return f"user:{user_id}:states"


def state_of(features: Features) -> str:
    """`syntergic` while coherence is above 0.8 and relative alpha above 0.6, else `ordinary`."""
    syntergic = features.coherence > SYNTERGIC_COHERENCE_MIN and features.alpha > SYNTERGIC_ALPHA_MIN
    return "syntergic" if syntergic else "ordinary"


class RedisLive:
    """Keeps the newest state of each wearer in Redis; only the newest waits when Redis is slow."""

    def __init__(self, url: str, password: str | None = None) -> None:
        try:
            self._client = redis.asyncio.Redis.from_url(
                url,
                password=password,
                socket_timeout=TIMEOUT_S,
                socket_connect_timeout=TIMEOUT_S,
                decode_responses=True,
                retry=Retry(NoBackoff(), 0),  # a state is old before the library would give up
                **_NO_LOOKUP,
            )
        except ValueError as error:
            raise ConfigError(f"live.redis.url: {error}", hint="expected redis://, rediss:// or unix://") from None
        self._newest: dict[Wearer, Features] = {}
        self._due = asyncio.Event()
        self.problem = ""

    def show(self, wearer: Wearer, features: Features) -> None:
        """A new state; replaces one of the same wearer that still waits."""
        self._newest[wearer] = features
        self._due.set()

    async def run(self) -> None:
        """Write what is shown, until cancelled."""
        try:
            while True:
                await self._due.wait()
                self._due.clear()
                newest, self._newest = self._newest, {}
                await self._write_all(newest)
        finally:
            await self._client.aclose()

    async def _write_all(self, newest: dict[Wearer, Features]) -> None:
        try:
            for wearer, features in newest.items():
                await self._write(wearer, features)
        except (RedisError, OSError) as error:
            if not self.problem:
                log.warning("live states are not shown: Redis: %s", error)
            self.problem = str(error)
            await asyncio.sleep(RETRY_S)
        else:
            if self.problem:
                log.info("live states are shown again")
            self.problem = ""

    async def _write(self, wearer: Wearer, features: Features) -> None:
        # float(): redis-py writes the repr of a number, and that of numpy's is no number
        state: dict[Any, Any] = {name: float(value) for name, value in asdict(features).items() if math.isfinite(value)}
        state |= {"state": state_of(features), "session_id": wearer.session_id or ""}
        key = current_key(wearer.user_id)
        async with self._client.pipeline(transaction=True) as step:
            step.delete(key)  # a field that has no value now must not keep its old one
            step.hset(key, mapping=state)
            step.expire(key, EXPIRY_S)
            step.publish(channel(wearer.user_id), json.dumps(state))
            await step.execute()
