"""A file system in memory that records all that happens on it, and fails when told to. A process of its own.

Mounted through FUSE: the outbox on it is the real one, with the real SQLite, unchanged. The only file that imports
mfusepy. `mount.py` starts it and speaks to it over a socket; when that closes, it unmounts and ends. Files are read and
written past the kernel's page cache by whoever may write, except the index of a write-ahead log, which SQLite maps.

usage: python -m tests.faults.disk MOUNT_POINT DESCRIPTOR
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import mfusepy

from tests.faults.operations import ROOT, Entries, Entry, FailedSync, Mark, Operation, Sync, SyncFolder, Truncate, Write

BLOCK_BYTES = 4096
BLOCKS_UNLIMITED = 1 << 20
"""A disk of 4 GB, unless told otherwise."""
HIDDEN = ".fuse_hidden"
"""libfuse renames a file to this that is deleted while somebody has it open."""
MAPPED = "-shm"


@dataclass(slots=True)
class Node:
    """A file with its content, or a folder with its names."""

    number: int
    mode: int
    content: bytearray = field(default_factory=bytearray)
    names: dict[str, Node] = field(default_factory=dict)

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def blocks(self) -> int:
        return -(-len(self.content) // BLOCK_BYTES)


class Faults:
    """What is wrong with the disk now. Each of them may be set and cleared while files are open."""

    def __init__(self) -> None:
        self.blocks_max = BLOCKS_UNLIMITED
        self.is_read_only = False
        self.write_error = 0
        """errno of every write."""
        self.sync_error = 0
        """errno of every fsync of a file."""
        self.failing_name = ""
        """Both of them only for files whose names end so."""
        self.stalled = threading.Event()
        """Set while an fsync does not return."""
        self.released = threading.Event()
        """Not set: an fsync does not return until it is."""
        self.released.set()


class RecordingDisk(mfusepy.Operations):  # type: ignore[misc]
    """The operations that libfuse calls, each from any of its threads."""

    use_ns = True

    def __init__(self, ready: threading.Event) -> None:
        self._ready = ready
        self._last_number = ROOT
        self._open: dict[int, Node] = {}
        self._last_handle = 0
        self.faults = Faults()
        self.record: list[Operation] | None = []
        """All that happened; None: not kept."""
        self.guard = threading.RLock()
        self.root = Node(ROOT, stat.S_IFDIR | 0o700)

    def init(self, path: str) -> None:
        self._ready.set()

    def getattr(self, path: str, fh: Any = None) -> dict[str, Any]:
        with self.guard:
            node = self.find(path)
            return {
                "st_mode": node.mode,
                "st_nlink": 2 if node.is_folder else 1,
                "st_size": len(node.content),
                "st_blocks": node.blocks * (BLOCK_BYTES // 512),
                "st_uid": os.getuid(),
                "st_gid": os.getgid(),
            }

    def readdir(self, path: str, fh: int) -> Iterator[str]:
        with self.guard:
            names = [name for name in self.find(path).names if not name.startswith(HIDDEN)]
        return iter([".", "..", *names])

    def statfs(self, path: str) -> dict[str, int]:
        with self.guard:
            free = max(self.faults.blocks_max - self.blocks(self.root), 0)
            total = self.faults.blocks_max
        return {"f_bsize": BLOCK_BYTES, "f_frsize": BLOCK_BYTES, "f_blocks": total, "f_bfree": free, "f_bavail": free}

    def mkdir(self, path: str, mode: int) -> int:
        self._make(path, stat.S_IFDIR | mode)
        return 0

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        self._make(path, stat.S_IFREG | stat.S_IMODE(mode))
        return self.open(path, fi)

    def open(self, path: str, fi: Any) -> int:
        with self.guard:
            if self.faults.is_read_only and fi.flags & (os.O_WRONLY | os.O_RDWR):
                raise mfusepy.FuseOSError(errno.EROFS)
            self._last_handle += 1
            self._open[self._last_handle] = self.find(path)
            fi.fh = self._last_handle
            fi.direct_io = int(not path.endswith(MAPPED) and fi.flags & (os.O_WRONLY | os.O_RDWR) != 0)
        return 0

    def release(self, path: str, fi: Any) -> int:  # type: ignore[override]
        with self.guard:
            self._open.pop(fi.fh, None)
        return 0

    def read(self, path: str, size: int, offset: int, fi: Any) -> bytes:
        with self.guard:
            return bytes(self._open[fi.fh].content[offset : offset + size])

    def write(self, path: str, data: bytes, offset: int, fi: Any) -> int:
        with self.guard:
            self._may_change()
            if self.faults.write_error and path.endswith(self.faults.failing_name):
                raise mfusepy.FuseOSError(self.faults.write_error)
            node = self._open[fi.fh]
            self._need(node, offset + len(data))
            node.content.extend(bytes(max(0, offset - len(node.content))))
            node.content[offset : offset + len(data)] = data
            self.note(Write(node.number, offset, data))
        return len(data)

    def truncate(self, path: str, length: int, fi: Any = None) -> int:
        with self.guard:
            self._may_change()
            node = self.find(path)
            self._need(node, length)
            del node.content[length:]
            node.content.extend(bytes(length - len(node.content)))
            self.note(Truncate(node.number, length))
        return 0

    def fallocate(self, path: str, mode: int, offset: int, size: int, fi: Any) -> int:
        if mode:
            raise mfusepy.FuseOSError(errno.EOPNOTSUPP)
        with self.guard:
            return self.truncate(path, max(len(self.find(path).content), offset + size))

    def fsync(self, path: str, datasync: int, fi: Any) -> int:
        if not self.faults.released.is_set():
            self.faults.stalled.set()
            self.faults.released.wait()
        with self.guard:
            node = self._open[fi.fh]
            if self.faults.sync_error and path.endswith(self.faults.failing_name):
                self.note(FailedSync(node.number))
                raise mfusepy.FuseOSError(self.faults.sync_error)
            self.note(Sync(node.number))
        return 0

    def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
        with self.guard:
            self.note(SyncFolder(self.find(path).number))
        return 0

    def unlink(self, path: str) -> int:
        with self.guard:
            self._may_change()
            folder, name = self._place(path)
            del folder.names[name]
            if not name.startswith(HIDDEN):
                self.note(Entries(folder.number, (Entry(name, None),)))
        return 0

    def rmdir(self, path: str) -> int:
        with self.guard:
            if self.find(path).names:
                raise mfusepy.FuseOSError(errno.ENOTEMPTY)
            return self.unlink(path)

    def rename(self, old: str, new: str) -> int:
        with self.guard:
            self._may_change()
            folder, name = self._place(old)
            target, new_name = self._place(new, must_exist=False)
            node = target.names[new_name] = folder.names.pop(name)
            gone = Entry(name, None)
            if new_name.startswith(HIDDEN):
                self.note(Entries(folder.number, (gone,)))
            elif folder is target:
                self.note(Entries(folder.number, (gone, Entry(new_name, node.number, node.is_folder))))
            else:
                self.note(Entries(target.number, (Entry(new_name, node.number, node.is_folder),)))
                self.note(Entries(folder.number, (gone,)))
        return 0

    def chmod(self, path: str, mode: int) -> int:
        with self.guard:
            self._may_change()
            node = self.find(path)
            node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(mode)
        return 0

    def utimens(self, path: str, times: Any = None) -> int:
        return 0

    def note(self, operation: Operation) -> None:
        with self.guard:
            if self.record is not None:
                self.record.append(operation)

    def find(self, path: str) -> Node:
        node = self.root
        for name in path.strip("/").split("/"):
            if name:
                if name not in node.names:
                    raise mfusepy.FuseOSError(errno.ENOENT)
                node = node.names[name]
        return node

    def _place(self, path: str, *, must_exist: bool = True) -> tuple[Node, str]:
        """The folder that a path is in, and its name there."""
        parent, _, name = path.rpartition("/")
        folder = self.find(parent)
        if must_exist and name not in folder.names:
            raise mfusepy.FuseOSError(errno.ENOENT)
        return folder, name

    def _make(self, path: str, mode: int) -> None:
        with self.guard:
            self._may_change()
            folder, name = self._place(path, must_exist=False)
            self._last_number += 1
            node = folder.names[name] = Node(self._last_number, mode)
            self.note(Entries(folder.number, (Entry(name, node.number, node.is_folder),)))

    def _may_change(self) -> None:
        if self.faults.is_read_only:
            raise mfusepy.FuseOSError(errno.EROFS)

    def _need(self, node: Node, length: int) -> None:
        """Refuse what there is no room for; what overwrites needs none."""
        more = -(-length // BLOCK_BYTES) - node.blocks
        if more > 0 and self.blocks(self.root) + more > self.faults.blocks_max:
            raise mfusepy.FuseOSError(errno.ENOSPC)

    def blocks(self, node: Node) -> int:
        """What a file takes, or all in a folder."""
        return node.blocks + sum(map(self.blocks, node.names.values()))


class Console:
    """What the other end of the socket may ask for, by name."""

    def __init__(self, disk: RecordingDisk) -> None:
        self._disk = disk

    def mark(self, number: int) -> None:
        """Note in the record that the program spoke."""
        self._disk.note(Mark(number))

    def take_record(self) -> list[Operation]:
        """All that happened, and forget it."""
        with self._disk.guard:
            record, self._disk.record = self._disk.record or [], []
            return record

    def stop_record(self) -> None:
        """Keep no record from now on."""
        with self._disk.guard:
            self._disk.record = None

    def files(self) -> dict[str, bytes]:
        """Content of every file, by path below the mount point: what a kill -9 would leave."""
        with self._disk.guard:
            return dict(_walk(self._disk.root, ""))

    def blocks_used(self) -> int:
        """What the files take."""
        with self._disk.guard:
            return self._disk.blocks(self._disk.root)

    def flip(self, path: str, bit: int) -> None:
        """Let one bit of a file decay; nobody who wrote it notices."""
        with self._disk.guard:
            self._disk.find(path).content[bit // 8] ^= 1 << bit % 8

    def set_fault(self, name: str, value: Any) -> None:
        """Set one of `Faults`' plain values."""
        with self._disk.guard:
            setattr(self._disk.faults, name, value)

    def stall(self) -> None:
        """Let no fsync of a file return from now on."""
        self._disk.faults.released.clear()

    def await_stalled(self, seconds: float) -> bool:
        """Wait until an fsync is held up."""
        return self._disk.faults.stalled.wait(seconds)

    def let_go(self) -> None:
        """Let every fsync return."""
        self._disk.faults.released.set()
        self._disk.faults.stalled.clear()

    def serve(self, control: Connection) -> None:
        """Answer until the other end closes."""
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                name, *arguments = control.recv()
                control.send(getattr(self, name)(*arguments))
        self.let_go()


def _walk(folder: Node, path: str) -> Iterator[tuple[str, bytes]]:
    for name, node in folder.names.items():
        if node.is_folder:
            yield from _walk(node, f"{path}{name}/")
        elif not name.startswith(HIDDEN):
            yield f"{path}{name}", bytes(node.content)


def answer(disk: RecordingDisk, ready: threading.Event, control: Connection, mount_point: str) -> None:
    """Do what the other end asks for; when it is gone, unmount and end the process."""
    ready.wait()
    control.send("mounted")
    Console(disk).serve(control)
    unmounted = subprocess.run(["fusermount3", "-u", "-z", mount_point], check=False)
    # Not by the end of libfuse's loop: a container that was started meanwhile may hold a copy of the mount.
    sys.stderr.flush()
    os._exit(unmounted.returncode)


def main(mount_point: str, descriptor: int) -> None:
    """Mount, and serve until unmounted. Exit code 3: libfuse could not mount."""
    ready = threading.Event()
    disk = RecordingDisk(ready)
    control = Connection(descriptor)
    threading.Thread(target=answer, args=(disk, ready, control, mount_point), daemon=True).start()
    try:
        mfusepy.FUSE(disk, mount_point, raw_fi=True, foreground=True, attr_timeout=0, entry_timeout=0)
    except RuntimeError:
        sys.exit(3)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
