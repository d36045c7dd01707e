"""What happens on a disk, one frozen value an operation: the record that the file system writes and the cuts replay.

Files and folders are named by number, so that a rename changes an entry and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

ROOT = 1
"""Number of the outermost folder."""


@dataclass(frozen=True, slots=True)
class Write:
    """Bytes written into a file."""

    file: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Truncate:
    """A file cut off, or extended with zeros."""

    file: int
    length: int


@dataclass(frozen=True, slots=True)
class Sync:
    """fsync or fdatasync of a file that returned without error: its content is durable, its entry is not."""

    file: int


@dataclass(frozen=True, slots=True)
class FailedSync:
    """fsync of a file that returned an error: the kernel counts its pages as clean all the same."""

    file: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A name in a folder, and what it stands for from now on; nothing after an unlink."""

    name: str
    number: int | None
    is_folder: bool = False


@dataclass(frozen=True, slots=True)
class Entries:
    """Changes of a folder that happen together: one for create, unlink and mkdir, two for rename."""

    folder: int
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class SyncFolder:
    """fsync of a folder: its entries are durable."""

    folder: int


@dataclass(frozen=True, slots=True)
class Mark:
    """The program said something to the outside: from here on it must be true after a power cut, too."""

    number: int


Operation = Write | Truncate | Sync | FailedSync | Entries | SyncFolder | Mark
