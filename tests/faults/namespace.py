"""A peer in a network namespace of its own, behind a virtual cable that can be pulled: packets vanish, nobody is told.

Needs root, `ip` and network namespaces. The peer relays TCP to a Unix socket, which both namespaces see.

usage: python -m tests.faults.namespace ADDRESS PORT UNIX_SOCKET
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Self

NETWORK = "10.213.7"
"""Of 10/8, two addresses."""
READY = "ready"
CHUNK_BYTES = 65536


class NoNamespaceError(Exception):
    """The machine, or the user, has none."""


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoNamespaceError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


class FarPeer:
    """Something that listens at `host`:`port` on the far end of a cable, and relays to a Unix socket."""

    host = f"{NETWORK}.2"
    port = 1883

    def __init__(self, relays_to: Path) -> None:
        self._to = relays_to
        self._name = f"wardlink-{os.getpid()}"
        self._near, self._far = f"wl{os.getpid()}a", f"wl{os.getpid()}b"
        self._relay: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        if os.geteuid() != 0:
            raise NoNamespaceError("it needs root")
        if shutil.which("ip") is None:
            raise NoNamespaceError("there is no program ip (package iproute2)")
        try:
            self._connect()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def pull_the_cable(self) -> None:
        _ip("-n", self._name, "link", "set", self._far, "down")

    def _connect(self) -> None:
        _ip("netns", "add", self._name)
        _ip("link", "add", self._near, "type", "veth", "peer", "name", self._far, "netns", self._name)
        _ip("address", "add", f"{NETWORK}.1/30", "dev", self._near)
        _ip("-n", self._name, "address", "add", f"{self.host}/30", "dev", self._far)
        _ip("link", "set", self._near, "up")
        _ip("-n", self._name, "link", "set", self._far, "up")
        command = [sys.executable, "-m", "tests.faults.namespace", self.host, str(self.port), str(self._to)]
        self._relay = subprocess.Popen(
            ["ip", "netns", "exec", self._name, *command],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._relay.stdout is not None
        if self._relay.stdout.readline().strip() != READY:
            raise NoNamespaceError("the peer does not start")

    def _remove(self) -> None:
        if self._relay is not None:
            self._relay.kill()
            self._relay.communicate()
        for arguments in (("link", "del", self._near), ("netns", "del", self._name)):
            subprocess.run(["ip", *arguments], capture_output=True, check=False)


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


async def _relay(host: str, port: int, path: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_unix_connection(path)
        await asyncio.gather(copy(reader, far_writer), copy(far_reader, writer))

    server = await asyncio.start_server(serve, host, port)
    print(READY, flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_relay(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
