"""What a disk may hold after a power cut, by plain POSIX rules. Pure: a record in, the files of every cut out.

Durable is what fsync returned for: a file's content by its own, a file's name by the fsync of its folder. All else is
undecided at the moment of the cut, and a mode decides: nothing of it survives, or a beginning, or any part of it, down
to single sectors of one write.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import PurePosixPath

from tests.faults.operations import (
    ROOT,
    Entries,
    Entry,
    FailedSync,
    Mark,
    Operation,
    Sync,
    SyncFolder,
    Truncate,
    Write,
)

SECTOR_BYTES = 512
"""The least that a disk writes as a whole."""
Survives = Callable[[int], bool]
"""Whether an undecided operation survives, by its place in the record."""


class Mode(Enum):
    """Which of the undecided operations survive a cut."""

    NONE = "none"
    PREFIX = "prefix"
    SUBSET = "subset"
    TORN = "torn"


@dataclass(frozen=True, slots=True)
class Cut:
    """The disk after a power cut."""

    place: int
    """How many operations of the record had happened."""
    mark: int
    """The newest mark before it; -1 if there was none."""
    mode: Mode
    files: Mapping[PurePosixPath, bytes]
    folders: frozenset[PurePosixPath]

    def __str__(self) -> str:
        return f"cut {self.mode.value} after operation {self.place}"


@dataclass(slots=True)
class File:
    """What of a file is durable, and what is undecided, in order, with its place in the record."""

    durable: bytearray = field(default_factory=bytearray)
    undecided: list[tuple[int, Write | Truncate]] = field(default_factory=list)


@dataclass(slots=True)
class Folder:
    """The same of a folder's names."""

    durable: dict[str, Entry] = field(default_factory=dict)
    undecided: list[tuple[int, Entries]] = field(default_factory=list)


class Medium:
    """A disk on which a record is replayed."""

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        self._files: dict[int, File] = {}
        self._folders: dict[int, Folder] = {ROOT: Folder()}
        self._place = 0

    def apply(self, operation: Operation) -> None:
        """One more operation of the record."""
        self._place += 1
        match operation:
            case Write(file=number) | Truncate(file=number):
                self._files.setdefault(number, File()).undecided.append((self._place, operation))
            case Entries(folder=number):
                self._folders.setdefault(number, Folder()).undecided.append((self._place, operation))
            case Sync(file=number):
                self._settle(self._files.setdefault(number, File()), lambda _: True)
            case FailedSync(file=number):
                # Some of it is on the disk. The rest is not and never comes: its pages count as clean.
                self._settle(self._files.setdefault(number, File()), lambda _: self._draw.random() < 0.5)
            case SyncFolder(folder=number):
                folder = self._folders.setdefault(number, Folder())
                for _, change in folder.undecided:
                    _enter(folder.durable, change)
                folder.undecided.clear()

    def cut(self, mode: Mode, mark: int) -> Cut:
        """What is there if the power goes now."""
        survives = self._choice(mode)
        files: dict[PurePosixPath, bytes] = {}
        folders: set[PurePosixPath] = set()
        waiting = [(ROOT, PurePosixPath())]
        while waiting:
            number, path = waiting.pop()
            folders.add(path)
            for name, entry in self._names(number, survives).items():
                assert entry.number is not None
                if entry.is_folder:
                    waiting.append((entry.number, path / name))
                else:
                    files[path / name] = self._content(entry.number, mode, survives)
        return Cut(self._place, mark, mode, files, frozenset(folders))

    def _choice(self, mode: Mode) -> Survives:
        if mode is Mode.NONE:
            return lambda _: False
        undecided = [place for part in (*self._files.values(), *self._folders.values()) for place, _ in part.undecided]
        if mode is Mode.PREFIX:
            last = self._draw.choice([0, *undecided])
            return lambda place: place <= last
        share = self._draw.choice((0.1, 0.5, 0.9))
        kept = {place for place in undecided if self._draw.random() < share}
        return lambda place: place in kept

    def _names(self, number: int, survives: Survives) -> dict[str, Entry]:
        folder = self._folders.get(number, Folder())
        names = dict(folder.durable)
        for place, change in folder.undecided:
            if survives(place):
                _enter(names, change)
        return names

    def _content(self, number: int, mode: Mode, survives: Survives) -> bytes:
        file = self._files.get(number, File())
        content = bytearray(file.durable)
        for place, change in file.undecided:
            if mode is Mode.TORN and isinstance(change, Write):
                for sector in _sectors(change):
                    if self._draw.random() < 0.5:
                        _change(content, sector)
            elif survives(place):
                _change(content, change)
        return bytes(content)

    @staticmethod
    def _settle(file: File, survives: Survives) -> None:
        for place, change in file.undecided:
            if survives(place):
                _change(file.durable, change)
        file.undecided.clear()


def cuts(record: Sequence[Operation], modes: Sequence[Mode], seed: int, modes_each: int = 0) -> Iterator[Cut]:
    """A cut after every operation of a record, in every mode; or each in so many of the modes, drawn."""
    draw = random.Random(seed)
    medium = Medium(random.Random(seed + 1))
    mark = -1
    for operation in record:
        medium.apply(operation)
        if isinstance(operation, Mark):
            mark = operation.number
        for mode in draw.sample(modes, modes_each) if modes_each else modes:
            yield medium.cut(mode, mark)


def without_folder_syncs(record: Iterable[Operation]) -> list[Operation]:
    """The record of a program that does not sync folders."""
    return [operation for operation in record if not isinstance(operation, SyncFolder)]


def _enter(names: dict[str, Entry], change: Entries) -> None:
    for entry in change.entries:
        if entry.number is None:
            names.pop(entry.name, None)
        else:
            names[entry.name] = entry


def _change(content: bytearray, change: Write | Truncate) -> None:
    if isinstance(change, Truncate):
        del content[change.length :]
        content.extend(bytes(change.length - len(content)))
        return
    content.extend(bytes(max(0, change.offset - len(content))))
    content[change.offset : change.offset + len(change.data)] = change.data


def _sectors(write: Write) -> Iterator[Write]:
    """A write as the disk sees it, a sector or a part of one at a time."""
    start = 0
    while start < len(write.data):
        length = SECTOR_BYTES - (write.offset + start) % SECTOR_BYTES
        yield Write(write.file, write.offset + start, write.data[start : start + length])
        start += length
