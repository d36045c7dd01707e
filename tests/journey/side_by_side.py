"""wardlink and what most tutorials build, on the same servers, under the same kills: what each of them lost.

Blocking. A test and the bench run it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import psycopg

from gateway.errors import UnavailableError
from tests.journey import tutorial
from tests.journey.storm import Storm
from wardlink.demo.account import Books, outbox_tallies, settle
from wardlink.demo.chain import BUCKET, Chain
from wardlink.servers import Login
from wardlink.servers.process import PrivateServer, write_private

PROGRAM = Path(tutorial.__file__)
PUBLISHER = "tutorial"
TOPIC = f"wardlink/v1/{PUBLISHER}/rows"
WAIT_S_MAX = 180.0
POLL_S = 0.1
QUIET_S = 3.0
"""Longer than the tutorial's subscriber takes to come back."""
LEFT_MAX = 10
"""Blocks in the outbox of a gateway that runs and has no backlog."""


@dataclass(frozen=True, slots=True)
class Sides:
    """The account of both."""

    books: Books
    point_count: int
    """What the registry says that wardlink's streams have."""
    tutorial_produced: int
    """Rows that the publisher stored before it sent them."""
    tutorial_points: int
    kills: Counter[str]
    revived: Counter[str]

    @property
    def produced(self) -> int:
        return sum(stream.produced for stream in self.books.streams.values())

    @property
    def points(self) -> int:
        return sum(stream.points for stream in self.books.streams.values())

    @property
    def tutorial_lost(self) -> int:
        return self.tutorial_produced - self.tutorial_points


class TutorialProcess(PrivateServer):
    """One of the tutorial's two programs."""

    package = "wardlink"
    role: ClassVar[str]

    def __init__(self, folder: Path, config: Path) -> None:
        super().__init__(folder)
        self._config = config

    def _prepare(self) -> None:
        """Its configuration is there already."""

    def _command(self) -> Sequence[str]:
        return [sys.executable, "-u", str(PROGRAM), self.role, str(self._config)]

    def _answers(self) -> bool:
        return True


class Publisher(TutorialProcess):
    name = "tutorial-publisher"
    role = "publish"


class Subscriber(TutorialProcess):
    name = "tutorial-subscriber"
    role = "subscribe"


class Tutorial:
    """Publisher and subscriber on the servers of a chain."""

    def __init__(self, chain: Chain) -> None:
        folder, servers = chain.folder, chain.servers
        self._chain = chain
        self._queue = folder / "tutorial.db"
        config = folder / "tutorial.json"
        self.publisher = Publisher(folder, config)
        self.subscriber = Subscriber(folder, config)
        own: Login = servers.mosquitto.gateway(PUBLISHER)
        content = {
            "queue": str(self._queue),
            "topic": TOPIC,
            "broker": servers.mosquitto.host,
            "broker_port": servers.mosquitto.port,
            "tutorial-publisher_user": own.user,
            "tutorial-publisher_password": own.password,
            "tutorial-subscriber_user": servers.mosquitto.bridge.user,
            "tutorial-subscriber_password": servers.mosquitto.bridge.password,
            "influx": servers.influxdb.url,
            "influx_user": servers.influxdb.user_name,
            "influx_password": servers.influxdb.password,
            "influx_database": BUCKET,
        }
        write_private(config, json.dumps(content))

    def points(self) -> int:
        """Rows that can be read back."""
        series = self._chain.servers.influxdb.query(f"SELECT count(value) FROM {tutorial.MEASUREMENT}", BUCKET)
        return int(series[0]["values"][0][1]) if series else 0

    def produced(self) -> int:
        """Rows that were ever stored."""
        with contextlib.closing(sqlite3.connect(self._queue)) as connection:
            found = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'queue'").fetchone()
        return int(found[0]) if found else 0

    def start(self) -> None:
        self.subscriber.start()
        self.publisher.start()

    def finish(self) -> None:
        """Let the publisher send what it has, and the subscriber write what it gets, for as long as anything comes."""
        self.publisher.stop()
        points, since = -1, time.monotonic()
        while time.monotonic() - since < QUIET_S:
            time.sleep(POLL_S)
            if (now := self.points()) != points:
                points, since = now, time.monotonic()
        self.subscriber.stop()


def counted_points(chain: Chain) -> int:
    """What the registry has counted over all streams."""
    with psycopg.connect(chain.conninfo, connect_timeout=2) as connection:
        found = connection.execute("SELECT coalesce(sum(point_count), 0) FROM signal_streams").fetchone()
    return int(found[0]) if found else 0


def run(folder: Path, kills: int, seed: int) -> Sides:
    """Both through one storm, then the accounts of both. Raises `WardlinkError`."""
    with contextlib.ExitStack() as running:
        chain = running.enter_context(Chain(folder))
        peer = Tutorial(chain)
        running.callback(peer.publisher.kill)
        running.callback(peer.subscriber.kill)
        peer.start()
        _await(lambda: counted_points(chain) > 0 and peer.points() > 0, "first points of both")
        servers = chain.servers
        storm = Storm(
            {
                "gateway": [chain.gateway, peer.publisher],
                "bridge": [chain.bridge, peer.subscriber],
                "broker": [servers.mosquitto],
                "InfluxDB": [servers.influxdb],
                "PostgreSQL": [servers.postgresql],
            },
            seed,
        )
        storm.run(kills)
        stored = counted_points(chain)
        _await(lambda: counted_points(chain) > stored, "points committed after the storm")
        _await(lambda: outbox_tallies(chain)[1] < LEFT_MAX, "the backlog drained")
        peer.finish()
        books = asyncio.run(settle(chain))
        return Sides(books, counted_points(chain), peer.produced(), peer.points(), storm.kills, storm.revived)


def _await(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S_MAX
    while not condition():
        if time.monotonic() > deadline:
            raise UnavailableError(f"not within {WAIT_S_MAX:.0f} s: {what}")
        time.sleep(POLL_S)
