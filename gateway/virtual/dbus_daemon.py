"""A private D-Bus daemon for the virtual BlueZ: own process, own socket in a temporary folder.

Programs are pointed at it by DBUS_SYSTEM_BUS_ADDRESS, which has to be in their environment before they connect.
"""

from __future__ import annotations

import selectors
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from gateway.errors import UnavailableError

START_S_MAX = 10.0
"""A daemon answers within milliseconds; a loaded single-board computer may take seconds."""
STOP_S_MAX = 3.0

# EXTERNAL alone: the kernel tells the daemon the user id of the caller, and a bus of the type "session" admits only
# its own user's. The folder is closed to others as well.
_CONFIGURATION = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <listen>unix:path={socket}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow send_destination="*" eavesdrop="true"/>
    <allow eavesdrop="true"/>
    <allow own="*"/>
  </policy>
</busconfig>
"""


class DbusDaemon:
    """One private dbus-daemon; a context manager, or `start` and `stop`. Blocking: not for the event loop."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._folder: Path | None = None
        self._address = ""

    @property
    def address(self) -> str:
        """D-Bus address of the running daemon, as it belongs into DBUS_SYSTEM_BUS_ADDRESS."""
        if not self._address:
            raise UnavailableError("the private D-Bus daemon is not running", hint="call start() first")
        return self._address

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return None if self._process is None else self._process.pid

    def environment(self) -> dict[str, str]:
        """What a program needs in its environment to take this bus for the system's."""
        return {"DBUS_SYSTEM_BUS_ADDRESS": self.address}

    def start(self) -> None:
        """Start it and wait until it accepts connections. Raises `UnavailableError`."""
        if self._process is not None:
            return
        program = shutil.which("dbus-daemon")
        if program is None:
            raise UnavailableError("the program dbus-daemon is not installed", hint="sudo apt install dbus")
        self._folder = Path(tempfile.mkdtemp(prefix="wardlink-dbus-"))
        configuration = self._folder / "bus.conf"
        configuration.write_text(_CONFIGURATION.format(socket=self._folder / "bus"), encoding="utf-8")
        with (self._folder / "log").open("w", encoding="utf-8") as log_file:
            # A group of its own: Ctrl-C in a terminal goes to whoever started it, who then stops it in order.
            self._process = subprocess.Popen(
                [
                    *_end_with_parent(),
                    *(program, "--nofork", "--nosyslog", "--print-address=1", f"--config-file={configuration}"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log_file,
                text=True,
                process_group=0,
            )
        assert self._process.stdout is not None
        address = _first_line(self._process.stdout, START_S_MAX)
        if not address:
            reason = (self._folder / "log").read_text(encoding="utf-8", errors="replace").strip()
            self.stop()
            raise UnavailableError(
                f"dbus-daemon did not start: {reason.splitlines()[-1] if reason else 'it said nothing'}",
                hint="the folder for temporary files needs free space and a path below 90 characters",
            )
        self._address = address

    def stop(self) -> None:
        """Stop it by its own process id and remove its folder; may be called any number of times."""
        process, self._process = self._process, None
        folder, self._folder = self._folder, None
        self._address = ""
        if process is not None:
            process.terminate()
            try:
                process.wait(STOP_S_MAX)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _end_with_parent() -> list[str]:
    """What makes the kernel end the daemon when the thread that started it ends, even by SIGKILL of the program."""
    guard = shutil.which("setpriv")
    return [] if guard is None else [guard, "--pdeathsig", "KILL", "--"]


def _first_line(stream: IO[str], seconds_max: float) -> str:
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        if not selector.select(seconds_max):
            return ""
    return stream.readline().strip()
