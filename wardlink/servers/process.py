"""One private server: its folder, its process, and that neither outlives the program that started it.

Knows how a server is started, watched, stopped and killed; knows no server's name, configuration or protocol.
Everything here blocks: from asyncio call it through `asyncio.to_thread`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar, Final

from gateway.errors import UnavailableError

HOST: Final = "127.0.0.1"

PORTS: Final = range(20_000, 30_000)
"""Above every default port of the four servers, below Linux's range for outgoing connections (32768 on): there a
client that reconnects to a killed server could take the server's own port, or even connect to itself."""

READY_SECONDS_MAX: Final = 60.0
"""From start to first answer. PostgreSQL on a busy Raspberry Pi, its recovery after a kill included, takes tens."""
STOP_SECONDS_MAX: Final = 10.0
"""For a graceful stop; after it the server is killed."""
SETUP_SECONDS_MAX: Final = 120.0
"""For one set-up command; initdb on a slow SD card is the longest."""
POLL_SECONDS: Final = 0.02
"""Between two looks whether a server answers or a process has ended."""
LOG_LINES_SHOWN: Final = 15
LOG_BYTES_SHOWN: Final = 16_384
"""Of a server's log, the end that goes into an error."""
SOCKET_PATH_BYTES_MAX: Final = 107
"""sun_path of a unix socket, without its closing zero."""
SYSTEM_FOLDERS: Final = ("/usr/local/sbin", "/usr/sbin", "/sbin")
"""Where Debian keeps servers, and where an ordinary user's PATH does not look."""

_spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="wardlink-spawner")
"""Starts all processes. The kernel's parent-death signal fires when the *thread* that forked ends, so that must be one
that lives as long as the program: a server restarted from a worker thread would die with that worker."""

_ports_given: set[int] = set()


def new_secret() -> str:
    """A random password of 192 bits that needs no quoting in a URL, an SQL string or a configuration file."""
    return secrets.token_hex(24)


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nobody listens on and that this program has not given away yet."""
    candidates = random.SystemRandom().sample(PORTS, len(PORTS))
    for port in candidates:
        if port in _ports_given:
            continue
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            _ports_given.add(port)
            return port
    raise UnavailableError(f"no free TCP port on {HOST} in {PORTS.start}..{PORTS.stop - 1}")


def find_program(name: str, package: str, folders: Sequence[str] = ()) -> str:
    """Path of a program: in `folders`, then in PATH, then where Debian keeps servers.

    Raises `UnavailableError` naming the apt package that has it.
    """
    path = os.pathsep.join([*folders, os.environ.get("PATH", os.defpath), *SYSTEM_FOLDERS])
    found = shutil.which(name, path=path)
    if found is None:
        raise UnavailableError(f"{name} is not installed", hint=f"apt-get install {package}")
    return found


class PrivateServer(ABC):
    """A server of our own in `folder`, reachable from this machine alone, gone when this program is gone.

    One thread at a time may call `start`, `stop`, `kill` and `restart`; `cancelled` may be set from anywhere and
    makes a `start` under way give up.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    """Debian's package that has the server."""
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM
    death_signal: ClassVar[str] = "KILL"
    """What the kernel sends the server when this program ends without stopping it, even by SIGKILL."""

    def __init__(self, folder: Path, *, cancelled: threading.Event | None = None) -> None:
        self.folder = folder.absolute() / self.name
        self.log_path = self.folder / "log"
        self._cancelled = cancelled or threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._prepared = False

    @abstractmethod
    def _prepare(self) -> None:
        """Make files and data before the first start."""

    @abstractmethod
    def _command(self) -> Sequence[str]:
        """The server in the foreground, logging to its standard output or error."""

    @abstractmethod
    def _answers(self) -> bool:
        """True if the server serves requests; False or an OSError if not yet."""

    @property
    def user(self) -> str | None:
        """System user that the server runs as; None for the one that this program runs as."""
        return None

    @property
    def pid(self) -> int | None:
        """Process id of the running server, None if it does not run."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self) -> None:
        """Start and wait until the server answers; does nothing if it runs. Same port and data every time.

        Raises `UnavailableError`: a missing program with its apt package, or a server that does not come up with the
        end of its log.
        """
        if self.pid is not None:
            return
        if not self._prepared:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._prepare()
            self._prepared = True
        command = self._guarded(self._command())
        _spawner.submit(self._spawn, command).result()
        try:
            self.ready()
        except BaseException:
            self.kill()
            raise

    def ready(self, seconds_max: float = READY_SECONDS_MAX) -> None:
        """Wait until the server answers. Raises `UnavailableError` with the end of its log if it does not."""
        deadline = time.monotonic() + seconds_max
        while True:
            if self.pid is None:
                raise UnavailableError(f"{self.name} ended instead of starting{self._log_end()}")
            with contextlib.suppress(OSError):
                if self._answers():
                    return
            if time.monotonic() > deadline:
                raise UnavailableError(f"{self.name} does not answer after {seconds_max:.0f} s{self._log_end()}")
            if self._cancelled.wait(POLL_SECONDS):
                raise UnavailableError(f"{self.name} was stopped while it started")

    def stop(self) -> None:
        """Stop gracefully; kill after `STOP_SECONDS_MAX`. Does nothing if it does not run."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(self.stop_signal)
            process.send_signal(signal.SIGCONT)
            try:
                process.wait(STOP_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                self.kill()
        self._process = None

    def kill(self) -> None:
        """SIGKILL to exactly this server's processes, and wait until they are gone. Its data stays as it is."""
        if self._process is not None and self._process.poll() is None:
            self._kill_all(self._process)
        self._process = None

    def restart(self) -> None:
        """Stop gracefully if it runs, then start again on the same port and data."""
        self.stop()
        self.start()

    def _kill_all(self, process: subprocess.Popen[bytes]) -> None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _run(
        self, command: Sequence[str], *, text: str = "", env: Mapping[str, str] | None = None, cancellable: bool = True
    ) -> str:
        """Run one short command beside the server, as its user, and return its output.

        Raises `UnavailableError` if it fails, takes longer than `SETUP_SECONDS_MAX`, or the start is cancelled.
        """
        tool = Path(command[0]).name
        popen: Callable[[], subprocess.Popen[str]] = functools.partial(
            subprocess.Popen,
            self._guarded(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self._environment() | dict(env or {}),
            cwd=self.folder,
            start_new_session=True,
            text=True,
        )
        process = _spawner.submit(popen).result()
        deadline = time.monotonic() + SETUP_SECONDS_MAX
        text_once: str | None = text  # a repeated communicate() goes on with the first one's
        try:
            while True:
                try:
                    output, _ = process.communicate(text_once, timeout=POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired as error:
                    text_once = None
                    if (cancellable and self._cancelled.is_set()) or time.monotonic() > deadline:
                        raise UnavailableError(f"{self.name}: {tool} did not finish") from error
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        if process.returncode != 0:
            raise UnavailableError(f"{self.name}: {tool} failed with exit code {process.returncode}: {output.strip()}")
        return output

    def _spawn(self, command: Sequence[str]) -> None:
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                cwd=self.folder,
                start_new_session=True,  # Ctrl-C in the terminal reaches this program only, which stops in order
            )

    def _guarded(self, command: Sequence[str]) -> list[str]:
        """The command under setpriv, which execs it: same pid, the server's user, and a parent-death signal.

        setpriv sets the signal after changing the user, which would clear it.
        """
        guard = [find_program("setpriv", "util-linux"), "--pdeathsig", self.death_signal]
        if self.user is not None:
            guard += ["--reuid", self.user, "--regid", self.user, "--init-groups"]
        return [*guard, "--", *command]

    def _environment(self) -> dict[str, str]:
        """Nothing of the caller's but PATH: PGHOST, INFLUXDB_… and the like would change what is started."""
        path = os.environ.get("PATH", os.defpath)
        return {"PATH": path, "LC_ALL": "C.UTF-8", "TZ": "UTC", "HOME": str(self.folder)}

    def _log_end(self) -> str:
        with contextlib.suppress(OSError), self.log_path.open("rb") as log:
            log.seek(max(0, self.log_path.stat().st_size - LOG_BYTES_SHOWN))
            lines = log.read().decode(errors="replace").splitlines()[-LOG_LINES_SHOWN:]
            return f"; the end of {self.log_path}:\n" + "\n".join(f"  {line}" for line in lines)
        return f"; it left no log in {self.folder}"


def check_socket_path(path: Path) -> None:
    """Refuse a unix socket's path that the kernel would not take."""
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
        raise UnavailableError(
            f"{path} is too long for a unix socket (at most {SOCKET_PATH_BYTES_MAX} bytes)", hint="use a shorter folder"
        )


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, replacing it at once."""
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    new.replace(path)
