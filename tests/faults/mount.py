"""The recording disk, mounted: starts its process, and speaks to it. Blocking, a round trip of some 50 us a call."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.faults.operations import Operation

MOUNT_S_MAX = 30.0
UNMOUNT_S_MAX = 10.0
REFUSED = 3
"""Exit code of a process that may not mount."""
NO_FAULT = {"blocks_max": 1 << 20, "is_read_only": False, "write_error": 0, "sync_error": 0, "failing_name": ""}
"""A disk of 4 GB that works."""
HERE = Path(__file__).parents[2]


class NoFuseError(Exception):
    """What is missing here for the disk to be mounted."""


class MountedDisk:
    """A disk at `path`; a context manager. Raises `NoFuseError`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Self:
        _need_fuse()
        self.path.mkdir(parents=True)
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "tests.faults.disk", str(self.path), str(theirs.fileno())]
        self._process = subprocess.Popen(command, cwd=HERE, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE)
        theirs.close()
        self._control = Connection(ours.detach())
        try:
            if not self._control.poll(MOUNT_S_MAX):
                raise AssertionError("the disk's process says nothing")
            self._control.recv()
        except (EOFError, ConnectionError):
            said = self._end()
            if self._process.returncode == REFUSED:
                raise NoFuseError(said.strip()) from None
            raise AssertionError(f"the disk's process ended: {said}") from None
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        said = self._end()
        assert self._process.returncode == 0, said
        assert "Traceback" not in said, said

    def ask(self, name: str, *arguments: Any) -> Any:
        """Call a method of the disk's `Console`."""
        self._control.send((name, *arguments))
        return self._control.recv()

    def mark(self, number: int) -> None:
        """Note in the record that the program spoke; noted before any operation that follows."""
        self.ask("mark", number)

    def take_record(self) -> list[Operation]:
        """All operations since the last call."""
        record: list[Operation] = self.ask("take_record")
        return record

    def files(self) -> dict[str, bytes]:
        """Content of every file, by path."""
        found: dict[str, bytes] = self.ask("files")
        return found

    @contextmanager
    def fault(self, **faults: Any) -> Iterator[None]:
        """Values of `Faults` for as long as the block lasts. `blocks_left`: a disk that is full but for so many."""
        if "blocks_left" in faults:
            faults = {"blocks_max": faults["blocks_left"] + self.ask("blocks_used")}
        for name, value in faults.items():
            self.ask("set_fault", name, value)
        try:
            yield
        finally:
            for name in faults:
                self.ask("set_fault", name, NO_FAULT[name])

    @contextmanager
    def stalled_sync(self) -> Iterator[None]:
        """No fsync returns for as long as the block lasts."""
        self.ask("stall")
        try:
            yield
        finally:
            self.ask("let_go")

    def await_stalled(self, seconds: float = 30.0) -> None:
        """Wait until an fsync is held up."""
        assert self.ask("await_stalled", seconds), "no fsync came"

    def _end(self) -> str:
        """Close the socket, upon which the process unmounts and ends. Returns what it wrote to its standard error."""
        self._control.close()
        try:
            _, said = self._process.communicate(timeout=UNMOUNT_S_MAX)
        except subprocess.TimeoutExpired:
            subprocess.run(["fusermount3", "-u", "-z", str(self.path)], check=False)
            self._process.kill()
            _, said = self._process.communicate()
        return said.decode(errors="replace")


def _need_fuse() -> None:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise NoFuseError("/dev/fuse is not there, or not for this user")
    if not shutil.which("fusermount3"):
        raise NoFuseError("fusermount3 is not there (Debian package fuse3)")
