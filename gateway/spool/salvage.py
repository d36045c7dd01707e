"""Intact records out of a damaged SQLite file and its log, read page by page with no help from SQLite. Pure.

The record's own checksum decides what is intact. Follows the "Database File Format" of sqlite.org: b-tree pages (1.6),
records (2.1), overflow pages (1.6), the write-ahead log (4). Only the outbox's own table is understood.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.spool.sqlite_format import COLUMNS, PAGE_BYTES, checked
from gateway.spool.store import StoredRow

Bytes = Any
"""Bytes, or a file that is mapped into memory."""
MAGIC = b"SQLite format 3\0"
LOG_MAGICS = (0x377F0682, 0x377F0683)
LOG_HEADER, FRAME_HEADER = 32, 24
TABLE_LEAF = 0x0D
PAGE_SIZES = (PAGE_BYTES, 4096, 1024, 2048, 8192, 16384, 32768, 65536)
RECORD_BYTES_MAX = 2 << 20
"""A payload of at most 1 MiB and its columns: a longer record is damage."""
_INTEGERS = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}
"""Bytes by serial type."""


class _UnreadableError(Exception):
    """A record cannot be read."""


@dataclass(frozen=True, slots=True)
class _Pages:
    """Every image of every page: one in the file, others in the log in the order in which they were written."""

    file: Bytes
    log: bytes
    size: int
    frames: dict[int, list[int]]
    """By page number, where its images begin in the log."""
    commits: list[int]
    """Where in the log a transaction ends."""

    def in_file(self, number: int) -> bytes:
        return bytes(self.file[(number - 1) * self.size : number * self.size])

    def in_log(self, number: int, before: int) -> bytes:
        """The last image before a place in the log, or else that in the file."""
        found = [start for start in self.frames.get(number, ()) if start < before]
        return self.log[found[-1] : found[-1] + self.size] if found else self.in_file(number)

    def end_of_transaction(self, place: int) -> int:
        return next((end for end in self.commits if end >= place), len(self.log))


def intact_rows(file: Bytes, log: bytes = b"") -> Iterator[StoredRow]:
    """Every record that is whole, in no order; of one identity several may come, those with higher ids being newer."""
    sizes = [size for size in (_file_page_size(file), _log_page_size(log)) if size] or list(PAGE_SIZES)
    for size in dict.fromkeys(sizes):
        found = False
        for row in _rows(_pages(file, log, size)):
            found = True
            yield row
        if found:
            return


def _rows(pages: _Pages) -> Iterator[StoredRow]:
    end = len(pages.log)
    for number in range(1, len(pages.file) // pages.size + 1):
        if pages.file[(number - 1) * pages.size] == TABLE_LEAF or number == 1:
            yield from _of_leaf(pages, pages.in_file(number), number, (0, end))
    for number, starts in pages.frames.items():
        for start in starts:
            befores = (pages.end_of_transaction(start), end, 0)
            yield from _of_leaf(pages, pages.log[start : start + pages.size], number, befores)


def _of_leaf(pages: _Pages, page: bytes, number: int, befores: Sequence[int]) -> Iterator[StoredRow]:
    """Records of a leaf; their overflow pages are sought in each of these states of the log."""
    head = 100 if number == 1 else 0
    if len(page) < pages.size or page[head] != TABLE_LEAF:
        return
    count = int.from_bytes(page[head + 3 : head + 5], "big")
    for cell in range(min(count, pages.size // 4)):
        at = head + 8 + 2 * cell
        start = int.from_bytes(page[at : at + 2], "big") % pages.size  # SQLite reads no further bits either
        for before in dict.fromkeys(befores):
            try:
                row = _row(pages, page, start, before)
            except (_UnreadableError, IndexError):
                continue
            if row is not None:
                yield row
                break


def _row(pages: _Pages, page: bytes, start: int, before: int) -> StoredRow | None:
    length, start = _varint(page, start)
    identity, start = _varint(page, start)
    if length > RECORD_BYTES_MAX:
        raise _UnreadableError
    usable = pages.size
    most, least = usable - 35, (usable - 12) * 32 // 255 - 23
    local = length
    if length > most:
        local = least + (length - least) % (usable - 4)
        local = local if local <= most else least
    parts = [page[start : start + local]]
    left, following = length - local, int.from_bytes(page[start + local : start + local + 4], "big")
    while left > 0:
        overflow = pages.in_log(following, before) if following > 0 else b""
        if len(overflow) < usable:
            raise _UnreadableError
        parts.append(overflow[4 : 4 + min(left, usable - 4)])
        left -= usable - 4
        following = int.from_bytes(overflow[:4], "big")
    values = _values(b"".join(parts))
    if len(values) != COLUMNS:
        return None
    row = checked([identity, *values[1:]], lambda _: None)
    return row if isinstance(row, StoredRow) else None


def _values(record: bytes) -> list[Any]:
    size, at = _varint(record, 0)
    kinds = []
    while at < size:
        kind, at = _varint(record, at)
        kinds.append(kind)
        if len(kinds) > COLUMNS:
            raise _UnreadableError
    values: list[Any] = []
    for kind in kinds:
        length = _INTEGERS.get(kind, (kind - 12) // 2 if kind >= 12 else 0)
        data, at = record[at : at + length], at + length
        if kind in _INTEGERS:
            values.append(int.from_bytes(data, "big", signed=True))
        elif kind in {8, 9}:
            values.append(kind - 8)
        elif kind >= 12:
            values.append(data.decode(errors="replace") if kind % 2 else data)
        else:
            values.append(None)
    return values


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for number in range(9):
        byte = data[at + number]
        if number == 8:
            return value << 8 | byte, at + 9
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + number + 1
    raise _UnreadableError


def _file_page_size(file: Bytes) -> int:
    if bytes(file[:16]) != MAGIC:
        return 0
    size = int.from_bytes(file[16:18], "big")
    size = 65536 if size == 1 else size
    return size if size in PAGE_SIZES else 0


def _log_page_size(log: bytes) -> int:
    size = int.from_bytes(log[8:12], "big")
    return size if int.from_bytes(log[:4], "big") in LOG_MAGICS and size in PAGE_SIZES else 0


def _pages(file: Bytes, log: bytes, size: int) -> _Pages:
    frames: dict[int, list[int]] = {}
    commits: list[int] = []
    for start in range(LOG_HEADER, len(log) - FRAME_HEADER - size + 1, FRAME_HEADER + size):
        number = int.from_bytes(log[start : start + 4], "big")
        frames.setdefault(number, []).append(start + FRAME_HEADER)
        if any(log[start + 4 : start + 8]):
            commits.append(start + FRAME_HEADER + size)
    return _Pages(file, log, size, frames, commits)
