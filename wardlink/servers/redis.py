"""A private Redis on a unix socket, no TCP port at all.

Knows PING and FLUSHDB; what is kept in it is the gateway's business.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from gateway.errors import RefusedError
from wardlink.servers.process import PrivateServer, check_socket_path, find_program, new_secret, write_private

DATABASE_COUNT: Final = 64
MEMORY_BYTES_MAX: Final = 256 * 1024 * 1024
"""When it is full, writes are refused: evicting would lose what an outbox was told is stored."""
REQUEST_SECONDS_MAX: Final = 5.0

# appendfsync always: an outbox in Redis may call a block accepted only once it is on the disk.
CONFIG: Final = """\
port 0
unixsocket "{socket}"
unixsocketperm 700
requirepass {password}
dir "{folder}"
databases {databases}
maxmemory {memory_bytes}
maxmemory-policy noeviction
appendonly yes
appendfsync always
save ""
daemonize no
"""


class Redis(PrivateServer):
    """Redis at a unix socket in its folder, with a password, each write on the disk before it is answered."""

    name = "redis"
    package = "redis-server"

    def __init__(self, folder: Path, *, cancelled: threading.Event | None = None) -> None:
        super().__init__(folder, cancelled=cancelled)
        self.socket_path = self.folder / "socket"
        self.password = new_secret()

    def url(self, database: int = 0) -> str:
        """URL with the password, for redis.from_url. `database`: 0 to `DATABASE_COUNT` - 1."""
        if database not in range(DATABASE_COUNT):
            raise ValueError(f"Redis database {database}, expected 0 to {DATABASE_COUNT - 1}")
        return f"unix://:{self.password}@{self.socket_path}?db={database}"

    def flush(self, database: int = 0) -> None:
        """Empty one database. Raises `RefusedError`, or OSError if Redis is away."""
        answers = self._ask(f"SELECT {database}", "FLUSHDB")
        if answers != [b"+OK", b"+OK", b"+OK"]:
            raise RefusedError(f"Redis did not empty database {database}: {answers}")

    def _prepare(self) -> None:
        check_socket_path(self.socket_path)
        config = CONFIG.format(
            socket=self.socket_path,
            password=self.password,
            folder=self.folder,
            databases=DATABASE_COUNT,
            memory_bytes=MEMORY_BYTES_MAX,
        )
        write_private(self.folder / "redis.conf", config)

    def _command(self) -> Sequence[str]:
        return [find_program("redis-server", self.package), str(self.folder / "redis.conf")]

    def _answers(self) -> bool:
        return self._ask("PING")[-1] == b"+PONG"

    def _ask(self, *commands: str) -> list[bytes]:
        """First lines of the answers to AUTH and the commands, sent in Redis' inline form."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(REQUEST_SECONDS_MAX)
            connection.connect(str(self.socket_path))
            lines = [f"AUTH {self.password}", *commands]
            connection.sendall("".join(f"{line}\r\n" for line in lines).encode())
            with connection.makefile("rb") as answers:
                return [answers.readline().strip() for _ in lines]
