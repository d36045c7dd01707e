"""Marks on disk: two slots that are written in turn, each with generation and CRC, so that one is always whole.

A sector or two for each commit, past the page cache where the file system allows, since that would write 4 KiB.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import zlib
from pathlib import Path

from gateway.errors import UnavailableError
from gateway.spool.disk import sync_folder
from gateway.spool.marks import Marks

SLOT_BYTES = 64 << 10
"""Marks of some thousand runs."""
SECTORS = (512, 4096)
"""What a disk writes at once; a larger one refuses the smaller writes."""
_HEAD = struct.Struct("<8sQII")
"""Magic, generation, length, CRC-32 of generation and content."""
_MAGIC = b"wlmarks1"


class MarksFile:
    """The file beside a database. Whoever writes it holds a lock on it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._buffer = mmap.mmap(-1, SLOT_BYTES)  # aligned, as O_DIRECT demands
        self._descriptor = -1
        self._sector = SECTORS[0]
        self._generation = 0

    def open(self) -> Marks | None:
        """Make it or read it; None where nothing is in it.

        Raises `UnavailableError`, also when another program has it, and `OSError`.
        """
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            os.close(descriptor)
            sync_folder(self.path.parent)
        self._descriptor = os.open(self.path, os.O_RDWR)
        self._lock()
        data = os.pread(self._descriptor, 2 * SLOT_BYTES, 0)
        if len(data) < 2 * SLOT_BYTES:
            # Written, not only reserved: what is written later must change no metadata.
            os.pwrite(self._descriptor, bytes(2 * SLOT_BYTES), 0)
            os.fsync(self._descriptor)
        self._go_direct()
        generation, marks = newest(data)
        self._generation = generation
        return marks

    def write(self, marks: Marks) -> None:
        """Durable when it returns. Raises `OSError`."""
        content = marks.encode(SLOT_BYTES - _HEAD.size)
        generation = self._generation + 1
        head = _HEAD.pack(_MAGIC, generation, len(content), _checksum(generation, content))
        length = -(-(len(head) + len(content)) // self._sector) * self._sector
        self._buffer[:length] = (head + content).ljust(length, b"\0")
        at = generation % 2 * SLOT_BYTES
        with memoryview(self._buffer) as whole, whole[:length] as part:
            written = os.pwrite(self._descriptor, part, at)
        if written != length:
            raise OSError(f"{self.path}: {written} of {length} bytes written")
        os.fdatasync(self._descriptor)
        self._generation = generation

    def close(self) -> None:
        """May be called in any state."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise UnavailableError(
                f"outbox {self.path.with_suffix('')} is open in another program", hint="does the gateway run already?"
            ) from None

    def _go_direct(self) -> None:
        """Leave the page cache out, if the file system can. A trial write tells the sector's size."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        for sector in SECTORS:
            self._sector = sector
            try:
                fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
                with memoryview(self._buffer) as whole, whole[:sector] as part:
                    os.preadv(self._descriptor, [part], 0)
            except OSError:
                continue
            return
        self._sector = SECTORS[0]
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags)


def newest(data: bytes) -> tuple[int, Marks | None]:
    """Generation and marks of the newest slot that is whole; 0 and None where none is."""
    best: tuple[int, Marks | None] = (0, None)
    for start in (0, SLOT_BYTES):
        slot = data[start : start + SLOT_BYTES]
        if len(slot) < _HEAD.size:
            continue
        magic, generation, length, checksum = _HEAD.unpack_from(slot)
        content = slot[_HEAD.size : _HEAD.size + length]
        if magic != _MAGIC or generation <= best[0] or _checksum(generation, content) != checksum:
            continue
        with contextlib.suppress(ValueError):
            best = (generation, Marks.decode(content))
    return best


def _checksum(generation: int, content: bytes) -> int:
    return zlib.crc32(content, zlib.crc32(generation.to_bytes(8, "little")))
