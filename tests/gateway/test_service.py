"""sd_notify on a real socket, the watchdog's pings, signals, and where log lines go."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway import service
from gateway.service import Service

DEADLINE_SECONDS = 5.0

needs_systemd = pytest.mark.skipif(
    service._systemd("daemon") is None,
    reason="systemd-python is not installed: pip install -e '.[systemd]' (needs libsystemd-dev, pkg-config, gcc)",
)


@pytest.fixture
def notified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The service manager's end of NOTIFY_SOCKET."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(tmp_path / "notify"))
        end.settimeout(0)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield end


@pytest.fixture
def logging_restored() -> Iterator[None]:
    """Put the root logger back as the test found it."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)


async def told(end: socket.socket) -> str:
    """Next message to the service manager."""
    loop = asyncio.get_running_loop()
    return (await asyncio.wait_for(loop.sock_recv(end, 4096), DEADLINE_SECONDS)).decode()


def drain(end: socket.socket) -> None:
    """Read what was sent so far."""
    with contextlib.suppress(BlockingIOError):
        while end.recv(4096):
            pass


@needs_systemd
async def test_ready_status_and_stopping_reach_the_service_manager(notified: socket.socket) -> None:
    it = Service()
    it.ready()
    it.status("2 devices\nspool 3 %")
    it.status("x" * 1000)
    it.stopping()
    assert [await told(notified) for _ in range(4)] == [
        "READY=1",
        "STATUS=2 devices spool 3 %",
        "STATUS=" + "x" * service.STATUS_CHARS_MAX,
        "STOPPING=1",
    ]


@needs_systemd
async def test_watchdog_is_pinged_only_while_healthy(
    notified: socket.socket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    asked = asyncio.Semaphore(0)
    healthy = True

    def health() -> bool:
        asked.release()
        return healthy

    async def asked_again(times: int) -> None:
        for _ in range(times):
            await asyncio.wait_for(asked.acquire(), DEADLINE_SECONDS)

    watch = asyncio.create_task(Service().watch(health))
    assert [await told(notified) for _ in range(3)] == ["WATCHDOG=1"] * 3
    healthy = False
    while not asked.locked():
        await asked.acquire()
    await asked_again(1)
    drain(notified)
    await asked_again(3)
    with pytest.raises(BlockingIOError):
        notified.recv(4096)
    assert [record.message for record in caplog.records if "not healthy" in record.message] == [
        "not healthy: the watchdog is not pinged until this is over"
    ]
    healthy = True
    assert await told(notified) == "WATCHDOG=1"
    watch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watch


@pytest.mark.parametrize(
    ("usec", "pid", "expected_s"),
    [
        (None, None, 0.0),
        ("30000000", None, 30.0),
        ("30000000", str(os.getpid()), 30.0),
        ("30000000", "1", 0.0),
        ("0", None, 0.0),
        ("-5", None, 0.0),
        ("soon", None, 0.0),
    ],
)
async def test_watchdog_interval_is_read_for_this_process_only(
    usec: str | None, pid: str | None, expected_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("WATCHDOG_USEC", usec), ("WATCHDOG_PID", pid)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert service.watchdog_s() == expected_s


async def test_without_systemd_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "systemd", None)
    it = Service()
    it.ready()
    it.status("waiting")
    it.stopping()
    await asyncio.wait_for(it.watch(lambda: False), DEADLINE_SECONDS)


async def test_a_missing_library_is_said_where_systemd_waits(
    notified: socket.socket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "systemd", None)
    monkeypatch.delitem(sys.modules, "systemd.daemon", raising=False)
    Service().ready()
    assert "wardlink[systemd]" in caplog.text
    with pytest.raises(BlockingIOError):
        notified.recv(4096)


SIGNALLED = """
import asyncio, os, signal, sys
from gateway.service import install_signals

async def main():
    stop = asyncio.Event()
    install_signals(stop)
    number = signal.Signals[sys.argv[1]]
    os.kill(os.getpid(), number)
    await stop.wait()
    print("asked to stop", flush=True)
    if sys.argv[2] == "twice":
        os.kill(os.getpid(), number)
        await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_first_signal_asks_and_second_ends(name: str) -> None:
    def run(times: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", SIGNALLED, name, times]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)

    once, twice = run("once"), run("twice")
    assert (once.returncode, once.stdout) == (0, "asked to stop\n")
    assert (twice.returncode, twice.stdout) == (-signal.Signals[name], "asked to stop\n")


LOGGING = """
import logging, os, sys
from gateway.service import set_up_logging
if sys.argv[1] == "no-library":
    sys.modules["systemd"] = None
if sys.argv[1] != "no-journal":
    stat = os.fstat(2)
    os.environ["JOURNAL_STREAM"] = f"{stat.st_dev}:{stat.st_ino}"
set_up_logging("wardlink-gateway")
log = logging.getLogger("gateway.app")
log.debug("hidden")
log.info("started")
log.error("two\\nlines")
print(type(logging.getLogger().handlers[0]).__name__)
"""


def logged(case: str) -> subprocess.CompletedProcess[str]:
    """Run a program that logs; its standard error is what an operator or the journal gets."""
    command = [sys.executable, "-c", LOGGING, case]
    environment = {name: value for name, value in os.environ.items() if name != "JOURNAL_STREAM"}
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True, env=environment)


def test_logs_to_standard_error_with_time_and_level() -> None:
    lines = logged("no-journal").stderr.splitlines()
    assert len(lines) == 3
    assert lines[0].endswith(" INFO    gateway.app: started")
    assert lines[0][:4].isdecimal()


def test_logs_level_prefixes_to_the_journal_without_the_library() -> None:
    assert logged("no-library").stderr == "<6>gateway.app: started\n<3>gateway.app: two\n<3>lines\n"


@needs_systemd
def test_logs_to_the_journal_with_the_library() -> None:
    run = logged("library")
    assert (run.stdout, run.stderr) == ("JournalHandler\n", "")


def test_set_up_twice_logs_once(logging_restored: None, capsys: pytest.CaptureFixture[str]) -> None:
    service.set_up_logging("wardlink-gateway")
    service.set_up_logging("wardlink-gateway", "WARNING")
    logging.getLogger("gateway").info("hidden")
    logging.getLogger("gateway").warning("shown")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].endswith("WARNING gateway: shown")
