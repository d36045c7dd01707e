"""What a service owes systemd: ready, status, watchdog, stopping; signals; log lines with their level in the journal.

The only file that imports systemd-python, and only when systemd is there: without either the service runs the same.
Knows nothing of what the service does.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

US_PER_S: Final = 1_000_000
STATUS_CHARS_MAX: Final = 200
"""`systemctl status` shows it on one line."""
PINGS_PER_WATCHDOG: Final = 2
"""sd_watchdog_enabled(3) advises to ping at half the interval."""

STDERR_FORMAT: Final = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
JOURNAL_FORMAT: Final = "%(name)s: %(message)s"
"""The journal keeps time and level itself."""
NEEDS: Final = "systemd-python is not installed (pip install 'wardlink[systemd]')"

log = logging.getLogger(__name__)


def _version() -> str:
    try:
        return version("wardlink")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return ""


VERSION: Final = _version()
"""Of the installed wardlink. Read here, once: it is read from the disk, so not in an event loop."""


class Service:
    """The service's side of sd_notify(3). Every method may be called where nobody listens, and then does nothing."""

    def __init__(self) -> None:
        self._notify = _notifier()

    def ready(self) -> None:
        """Everything that was configured is open: systemd starts what comes after this service."""
        self._notify("READY=1")

    def status(self, text: str) -> None:
        """One line for `systemctl status`: what works, what is waited for."""
        self._notify("STATUS=" + " ".join(text.split())[:STATUS_CHARS_MAX])

    def stopping(self) -> None:
        """The service has begun to end."""
        self._notify("STOPPING=1")

    async def watch(self, health: Callable[[], bool]) -> None:
        """Ping systemd's watchdog as long as `health` says that the service is alive; returns if none is set.

        `health` is asked in the event loop, so it must not block, and a blocked loop asks nothing: either way the pings
        end, and after WatchdogSec systemd restarts the service.
        """
        interval_s = watchdog_s() / PINGS_PER_WATCHDOG
        was_alive = True
        while interval_s > 0:
            alive = health()
            if alive:
                self._notify("WATCHDOG=1")
            elif was_alive:
                log.error("not healthy: the watchdog is not pinged until this is over")
            was_alive = alive
            await asyncio.sleep(interval_s)


def watchdog_s() -> float:
    """WatchdogSec= of the unit for this very process, in s; 0 where there is none. See sd_watchdog_enabled(3)."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    usec = os.environ.get("WATCHDOG_USEC", "")
    return int(usec) / US_PER_S if usec.isdecimal() else 0.0


def install_signals(stop: asyncio.Event) -> None:
    """Let SIGTERM and SIGINT (Ctrl-C) set `stop`; a second one of the kind ends the process at once."""
    loop = asyncio.get_running_loop()

    def asked(number: signal.Signals) -> None:
        loop.remove_signal_handler(number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, functools.partial(asked, number))


def set_up_logging(identifier: str, level: int | str = logging.INFO) -> None:
    """Log to the journal when systemd runs this, else to standard error; Python's warnings as well.

    `identifier` is what `journalctl -t` selects by.
    """
    logging.basicConfig(handlers=[_handler(identifier)], level=level, force=True)
    logging.captureWarnings(capture=True)


class LevelPrefix(logging.Formatter):
    """Puts the syslog level before each line, for a standard error that is the journal. See sd-daemon(3)."""

    _LEVELS: Final = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))

    def format(self, record: logging.LogRecord) -> str:
        """The record's lines, each with its level: the journal makes an entry of every line."""
        number = next((number for level, number in self._LEVELS if record.levelno >= level), 7)
        return "\n".join(f"<{number}>{line}" for line in super().format(record).splitlines())


def _handler(identifier: str) -> logging.Handler:
    if not _stderr_is_journal():
        handler: logging.Handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(STDERR_FORMAT))
        return handler
    journal = _systemd("journal")
    if journal is None:
        handler = logging.StreamHandler()
        handler.setFormatter(LevelPrefix(JOURNAL_FORMAT))
        return handler
    handler = journal.JournalHandler(SYSLOG_IDENTIFIER=identifier)
    handler.setFormatter(logging.Formatter(JOURNAL_FORMAT))
    return handler


def _stderr_is_journal() -> bool:
    """Whether standard error is still the stream that systemd named in $JOURNAL_STREAM. See systemd.exec(5)."""
    try:
        standing = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{standing.st_dev}:{standing.st_ino}"


def _notifier() -> Callable[[str], object]:
    if not os.environ.get("NOTIFY_SOCKET"):
        return lambda _state: None
    daemon = _systemd("daemon")
    if daemon is None:
        log.warning("systemd waits for this service to say that it is ready, but %s", NEEDS)
        return lambda _state: None
    notify: Callable[[str], object] = daemon.notify
    return notify


def _systemd(name: str) -> Any:
    """A module of systemd-python, None if it is not installed. It has no type stubs."""
    try:
        return importlib.import_module(f"systemd.{name}")
    except ImportError:
        return None
