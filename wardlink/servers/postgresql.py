"""A private PostgreSQL cluster on a loopback port and a unix socket in its folder, passwords by SCRAM.

Knows how a cluster is made and that it answers `SELECT 1`; tables are the registry's. Run by root it becomes user
postgres, as PostgreSQL refuses root.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import select
import shutil
import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from gateway.errors import UnavailableError
from wardlink.servers.process import (
    HOST,
    STOP_SECONDS_MAX,
    PrivateServer,
    check_socket_path,
    find_program,
    free_port,
    new_secret,
    write_private,
)

PROGRAM_FOLDERS: Final = Path("/usr/lib/postgresql")
"""Debian keeps the programs of each version in <version>/bin, outside of PATH."""
SYSTEM_USER: Final = "postgres"
CONNECTIONS_MAX: Final = 50
SHARED_BUFFERS_MB: Final = 32
"""A demo's tables are a few MB; a Raspberry Pi may have 1 GB for everything."""
NAME_PATTERN: Final = re.compile(r"[a-z_][a-z0-9_]{0,62}")
SEGMENT_LINE: Final = 6
"""Of postmaster.pid, counted from 0: key and id of the cluster's System V shared memory segment."""

# mmap keeps dynamic shared memory in the folder; in /dev/shm a killed server would leave it behind.
CONFIG: Final = """\
listen_addresses = '{host}'
port = {port}
unix_socket_directories = '{folder}'
unix_socket_permissions = 0700
max_connections = {connections}
shared_buffers = {buffers}MB
dynamic_shared_memory_type = mmap
password_encryption = scram-sha-256
timezone = 'UTC'
log_timezone = 'UTC'
log_line_prefix = '%m [%p] %d '
"""


class PostgreSQL(PrivateServer):
    """PostgreSQL cluster at `host`:`port` with one superuser, `user_name`."""

    name = "postgresql"
    package = "postgresql"
    stop_signal = signal.SIGINT
    """Fast shutdown: open transactions are rolled back, clients are disconnected."""
    death_signal = "QUIT"
    """Immediate shutdown: the postmaster takes its children and shared memory with it; KILL would leave them."""

    def __init__(self, folder: Path, *, cancelled: threading.Event | None = None) -> None:
        super().__init__(folder, cancelled=cancelled)
        self.host = HOST
        self.port = free_port()
        self.user_name = "wardlink"
        self.password = new_secret()
        self._data = self.folder / "data"

    @property
    def user(self) -> str | None:
        """User postgres where this program runs as root, else its own."""
        return SYSTEM_USER if os.geteuid() == 0 else None

    def conninfo(self, database: str = "postgres") -> str:
        """Connection URI with the password."""
        return f"postgresql://{self.user_name}:{self.password}@{self.host}:{self.port}/{database}"

    def create_database(self, database: str) -> str:
        """Create an empty database and return its connection URI. Raises `UnavailableError`."""
        self._sql(f"CREATE DATABASE {_checked(database)}")
        return self.conninfo(database)

    def drop_database(self, database: str) -> None:
        """Drop a database if it is there, disconnecting whoever uses it. Raises `UnavailableError`."""
        self._sql(f"DROP DATABASE IF EXISTS {_checked(database)} WITH (FORCE)")

    def _prepare(self) -> None:
        check_socket_path(self.folder / f".s.PGSQL.{self.port}")
        initdb = self._program("initdb")
        self._give_folder()
        password_file = self.folder / "password"
        write_private(password_file, self.password + "\n")
        self._give(password_file)
        try:
            self._run(
                [
                    *(initdb, "-D", str(self._data), "-U", self.user_name, f"--pwfile={password_file}"),
                    *("--auth=scram-sha-256", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync", "--no-instructions"),
                ]
            )
        finally:
            password_file.unlink()
        config = CONFIG.format(
            host=self.host,
            port=self.port,
            folder=self.folder,
            connections=CONNECTIONS_MAX,
            buffers=SHARED_BUFFERS_MB,
        )
        write_private(self._data / "postgresql.conf", config)
        self._give(self._data / "postgresql.conf")

    def _command(self) -> Sequence[str]:
        return [self._program("postgres"), "-D", str(self._data)]

    def _answers(self) -> bool:
        try:
            return self._sql("SELECT 1") == "1\n"
        except UnavailableError:
            return False

    def _kill_all(self, process: subprocess.Popen[bytes]) -> None:
        """Kill the postmaster and its children, each of which leads a process group of its own.

        Stopped first, the postmaster starts no more of them; held by pidfd, none can be mistaken for a later process.
        """
        segment = self._shared_memory()
        process.send_signal(signal.SIGSTOP)
        children = _children(process.pid)
        try:
            process.kill()
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(child, signal.SIGKILL)
            process.wait()
            for child in children:
                select.select([child], [], [], STOP_SECONDS_MAX)
        finally:
            for child in children:
                os.close(child)
        if segment is not None:
            # Gone already if PostgreSQL never got as far as making it.
            with contextlib.suppress(UnavailableError):
                self._run([find_program("ipcrm", "util-linux"), "-m", segment], cancellable=False)

    def _shared_memory(self) -> str | None:
        with contextlib.suppress(OSError, IndexError):
            return (self._data / "postmaster.pid").read_text().splitlines()[SEGMENT_LINE].split()[1]
        return None

    def _sql(self, statement: str) -> str:
        """Run one statement as the superuser in database postgres; rows as lines."""
        psql = [self._program("psql"), "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-f", "-"]
        to = ["-h", self.host, "-p", str(self.port), "-U", self.user_name, "-d", "postgres"]
        return self._run([*psql, *to], text=statement, env={"PGPASSWORD": self.password})

    def _program(self, name: str) -> str:
        """Of the newest version installed by Debian, else of PATH."""
        versions = [folder for folder in PROGRAM_FOLDERS.glob("*/bin") if folder.parent.name.isdecimal()]
        versions.sort(key=lambda folder: int(folder.parent.name), reverse=True)
        complete = [folder for folder in versions if (folder / "initdb").exists()]
        return find_program(name, self.package, [str(folder) for folder in complete[:1]])

    def _give_folder(self) -> None:
        """Let the server's user own its folder, and enter the folder above, which is this program's own."""
        if self.user is None:
            return
        self._give(self.folder)
        above = self.folder.parent
        above.chmod(above.stat().st_mode | 0o011)
        closed = [folder for folder in self.folder.parents if not folder.stat().st_mode & 0o001]
        if closed:
            raise UnavailableError(
                f"user {self.user}, as whom PostgreSQL runs when started by root, may not enter {closed[-1]}",
                hint="use a folder below /tmp, or do not run this as root",
            )

    def _give(self, path: Path) -> None:
        if self.user is not None:
            try:
                entry = pwd.getpwnam(self.user)
            except KeyError:
                hint = f"apt-get install {self.package}"
                raise UnavailableError(f"there is no system user {self.user}", hint=hint) from None
            shutil.chown(path, entry.pw_uid, entry.pw_gid)


def _children(pid: int) -> list[int]:
    """A pidfd of each child process of `pid`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and _parent(entry) == pid:
            with contextlib.suppress(ProcessLookupError):
                child = os.pidfd_open(int(entry.name))
                found.append(child)
                if _parent(entry) != pid:
                    found.pop()
                    os.close(child)
    return found


def _parent(entry: Path) -> int | None:
    """Parent's pid from /proc/<pid>/stat, None if the process is gone. See proc(5)."""
    with contextlib.suppress(OSError):
        after_name = (entry / "stat").read_text().rpartition(")")[2]
        return int(after_name.split()[1])
    return None


def _checked(database: str) -> str:
    if NAME_PATTERN.fullmatch(database) is None:
        raise ValueError(f"{database!r} is no database name, expected {NAME_PATTERN.pattern}")
    return database
