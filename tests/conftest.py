"""What all tests share: private real servers, a guard against blocking calls, and a check that no process is left.

Servers start when the first test asks for one and serve the whole run. They block: in an async test call
`await asyncio.to_thread(server.kill)`.
"""

from __future__ import annotations

import ctypes
import itertools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
from blockbuster import blockbuster_ctx

from gateway.errors import UnavailableError
from wardlink.servers import InfluxDB, Mosquitto, PostgreSQL, PrivateServer, Redis
from wardlink.servers.redis import DATABASE_COUNT

PR_SET_CHILD_SUBREAPER = 36
"""prctl(2): a process whose parent died becomes a child of this one, not of init."""
LEAVING_SECONDS_MAX = 2.0
"""For a process that was told to end to be gone when the run ends."""
SCANNED = ["gateway", "cloud_sync", "wardlink"]
"""Packages in which a blocking call fails the test; a test may read a small file itself."""

Server = TypeVar("Server", bound=PrivateServer)

_numbers = itertools.count(1)


@pytest.fixture(autouse=True)
def no_blocking_calls() -> Iterator[None]:
    """Let a blocking call from wardlink's code inside an event loop raise BlockingError."""
    with blockbuster_ctx(SCANNED):
        yield


@pytest.fixture(scope="session", autouse=True)
def no_process_left() -> Iterator[None]:
    """Fail the run if a process that a test started outlives it, orphans included; then kill it."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1)
    yield
    _, left = psutil.wait_procs(psutil.Process().children(recursive=True), LEAVING_SECONDS_MAX)
    left = [process for process in left if process.status() != psutil.STATUS_ZOMBIE]
    shown = [f"{process.pid}: {' '.join(process.cmdline())}" for process in left]
    for process in left:
        process.kill()
    assert not shown, "processes left behind by tests:\n" + "\n".join(shown)


@pytest.fixture(scope="session")
def servers_folder(no_process_left: None) -> Iterator[Path]:
    """A folder for the run's servers; not pytest's own, which PostgreSQL's user may not enter when root runs this."""
    folder = Path(tempfile.mkdtemp(prefix="wardlink-tests-"))
    yield folder
    shutil.rmtree(folder)


def _serving(server: Server) -> Iterator[Server]:
    try:
        server.start()
    except UnavailableError as error:
        pytest.fail(str(error), pytrace=False)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def mosquitto_server(servers_folder: Path) -> Iterator[Mosquitto]:
    """The run's MQTT broker; `mosquitto_server.gateway(id)` makes a login."""
    yield from _serving(Mosquitto(servers_folder))


@pytest.fixture(scope="session")
def influx_server(servers_folder: Path) -> Iterator[InfluxDB]:
    """The run's InfluxDB 1.x."""
    yield from _serving(InfluxDB(servers_folder))


@pytest.fixture(scope="session")
def postgres_server(servers_folder: Path) -> Iterator[PostgreSQL]:
    """The run's PostgreSQL cluster."""
    yield from _serving(PostgreSQL(servers_folder))


@pytest.fixture(scope="session")
def redis_server(servers_folder: Path) -> Iterator[Redis]:
    """The run's Redis."""
    yield from _serving(Redis(servers_folder))


@pytest.fixture
def database(postgres_server: PostgreSQL) -> Iterator[str]:
    """Connection URI of an empty PostgreSQL database of the test's own."""
    postgres_server.start()
    name = f"test_{next(_numbers)}"
    yield postgres_server.create_database(name)
    postgres_server.start()
    postgres_server.drop_database(name)


@pytest.fixture
def influx_database(influx_server: InfluxDB) -> Iterator[str]:
    """Name of an empty InfluxDB database of the test's own."""
    influx_server.start()
    name = f"test_{next(_numbers)}"
    influx_server.create_database(name)
    yield name
    influx_server.start()
    influx_server.drop_database(name)


@pytest.fixture
def redis_url(redis_server: Redis) -> str:
    """URL of an empty Redis database; channels are shared by the whole run."""
    redis_server.start()
    number = next(_numbers) % DATABASE_COUNT
    redis_server.flush(number)
    return redis_server.url(number)
