"""wardlink's own processes, started like the private servers: the virtual devices, the gateway, the bridge.

Each is the real command that systemd would run, with a configuration file and credentials of its own.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from gateway.errors import UnavailableError
from gateway.spool.sqlite_store import SqliteStore
from wardlink.servers.process import PrivateServer, write_private


class WardlinkProcess(PrivateServer):
    """One `wardlink …` command in the foreground."""

    package = "wardlink"

    def __init__(self, folder: Path, arguments: Sequence[str], cancelled: threading.Event) -> None:
        super().__init__(folder, cancelled=cancelled)
        self.arguments = list(arguments)
        self.credentials: dict[str, str] = {}
        """Secrets by name, as systemd would hand them over."""
        self.environment: dict[str, str] = {}

    def ended(self) -> str | None:
        """Why it is not running although it was started; None while it runs."""
        return None if self.pid is not None else f"{self.name} ended by itself{self._log_end()}"

    def _prepare(self) -> None:
        (self.folder / "credentials").mkdir(mode=0o700, exist_ok=True)
        for name, secret in self.credentials.items():
            write_private(self.folder / "credentials" / name, secret)

    def _command(self) -> Sequence[str]:
        return [sys.executable, "-m", "wardlink", *self.arguments]

    def _environment(self) -> dict[str, str]:
        own = {"CREDENTIALS_DIRECTORY": str(self.folder / "credentials"), "PYTHONUNBUFFERED": "1"}
        return super()._environment() | own | self.environment


class Devices(WardlinkProcess):
    """`wardlink gateway simulate …`: virtual devices that outlive any gateway."""

    name = "devices"

    def places(self) -> Mapping[str, Mapping[str, str]]:
        """Where each device is to be found. Empty until they are there."""
        for line in self.log_path.read_text(encoding="utf-8").splitlines():
            if line.startswith("{"):
                found: dict[str, dict[str, str]] = json.loads(line)
                return found
        return {}

    def _answers(self) -> bool:
        return bool(self.places())


class Gateway(WardlinkProcess):
    """`wardlink gateway run`."""

    name = "gateway"

    def __init__(self, folder: Path, arguments: Sequence[str], cancelled: threading.Event, outbox: Path) -> None:
        super().__init__(folder, arguments, cancelled)
        self.outbox = outbox

    def _answers(self) -> bool:
        store = SqliteStore(self.outbox, read_only=True)
        try:
            store.open()
        except UnavailableError:
            return False
        finally:
            store.close()
        return True


class Bridge(WardlinkProcess):
    """`wardlink cloud run`."""

    name = "bridge"

    def __init__(self, folder: Path, arguments: Sequence[str], cancelled: threading.Event, lock: Path) -> None:
        super().__init__(folder, arguments, cancelled)
        self._lock = lock

    def _answers(self) -> bool:
        return self._lock.exists()
