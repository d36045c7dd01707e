"""What an outbox's SQLite file looks like: tables, statements, rows as columns; and a former format taken over."""

from __future__ import annotations

import contextlib
import dataclasses
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from gateway.spool.store import ROW_OVERHEAD_BYTES, DamagedRow, Held, Row, StoredRow
from gateway.wire.codec import JSON, PAYLOAD_BYTES_MAX, Payload

if TYPE_CHECKING:
    import sqlite3

FORMAT = "2"
FORMER = "1"
"""Had one epoch for the whole file, and no provisional times."""
HALF_WAY = "1-2"
"""Rows of the former format are being taken over."""
PAGE_BYTES = 512
"""A commit writes whole pages: small ones make the least of what a second's blocks share with their neighbours."""
TAKEN_OVER_AT_ONCE = 200
"""Rows that move in one transaction: the file and its log hardly grow while they do."""
SCHEMA = """
CREATE TABLE IF NOT EXISTS outbox (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS block (
    id INTEGER PRIMARY KEY,
    device TEXT NOT NULL,
    signal TEXT NOT NULL,
    epoch TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    first_ns INTEGER NOT NULL,
    last_ns INTEGER NOT NULL,
    samples INTEGER NOT NULL,
    size INTEGER NOT NULL,
    lost INTEGER NOT NULL,
    lost_signal TEXT NOT NULL,
    boot TEXT NOT NULL,
    offset_ns INTEGER NOT NULL,
    content_type TEXT NOT NULL,
    schema TEXT NOT NULL,
    checksum INTEGER NOT NULL,
    payload BLOB NOT NULL,
    UNIQUE (epoch, sequence, device, signal)
) STRICT;
CREATE INDEX IF NOT EXISTS unstamped ON block (id) WHERE boot != '';
CREATE TABLE IF NOT EXISTS suspect (
    device TEXT NOT NULL,
    signal TEXT NOT NULL,
    epoch TEXT NOT NULL,
    first INTEGER NOT NULL,
    last INTEGER NOT NULL,
    samples INTEGER NOT NULL,
    even INTEGER NOT NULL,
    first_ns INTEGER NOT NULL,
    last_ns INTEGER NOT NULL,
    boot TEXT NOT NULL,
    offset_ns INTEGER NOT NULL,
    lost_signal TEXT NOT NULL,
    PRIMARY KEY (device, signal, epoch, first)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tally (
    device TEXT NOT NULL,
    signal TEXT NOT NULL,
    blocks INTEGER NOT NULL DEFAULT 0,
    accepted INTEGER NOT NULL DEFAULT 0,
    lost INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (device, signal)
) STRICT, WITHOUT ROWID;
"""
HELD = "id, device, signal, epoch, sequence, first_ns, last_ns, samples, size, lost, lost_signal, boot, offset_ns"
REST = "content_type, schema, checksum, payload"
HELD_COLUMNS = 13
COLUMNS = 17
_TYPES: tuple[type[int | str | bytes], ...] = (
    *(int, str, str, str, int, int, int, int, int, int, str, str, int),
    *(str, str, int, bytes),
)
_FORMER_TYPES = (int, str, str, int, int, int, int, int, str, str, str, bytes, int)
FETCH = f"""
SELECT {HELD}, {REST} FROM block
WHERE id > ? AND id <= ? AND (boot = '' OR NOT EXISTS (
    SELECT 1 FROM block u INDEXED BY unstamped WHERE u.boot != '' AND u.id = block.id
))
ORDER BY id LIMIT ?
"""  # noqa: S608 - constants
"""A row that only damage gave a boot is not among those that wait for their times, and comes here to be noticed."""
UNSTAMPED = f"SELECT {HELD}, {REST} FROM block WHERE boot != '' ORDER BY id LIMIT ?"  # noqa: S608 - constants
INDEXED_IDENTITY = """
SELECT device, signal, epoch, sequence FROM block INDEXED BY sqlite_autoindex_block_1 WHERE epoch >= '' AND id = ?
"""
"""A row's identity as the index has it: a second copy. The comparison makes the index usable at all."""
SCAN = """
SELECT i.device, i.signal, i.epoch, i.sequence, t.id, t.size, t.samples + t.lost, t.first_ns, t.last_ns, t.boot,
       t.offset_ns, t.lost_signal
FROM block i INDEXED BY sqlite_autoindex_block_1 CROSS JOIN block t ON t.id = i.id
WHERE i.epoch >= '' ORDER BY i.epoch, i.sequence
"""
"""Who is here by the index, and how much of it by the table."""
SCAN_TYPES = (str, str, str, int, int, int, int, int, int, str, int, str)
FIND = """
SELECT id, device, signal, epoch, sequence, size FROM block
WHERE epoch = ? AND sequence BETWEEN ? AND ? AND device = ? AND signal = ?
"""
FREE_PAGES = "SELECT freelist_count, page_size FROM pragma_freelist_count, pragma_page_size"
HELD_RANGES = "SELECT device, signal, epoch, min(sequence), max(sequence) FROM block GROUP BY device, signal, epoch"
INSERT = f"INSERT INTO block ({HELD}, {REST}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608 - constants
TAKE_OUT = f"DELETE FROM block WHERE id = ? RETURNING {HELD}"  # noqa: S608 - constants
SUSPECTS = (
    "SELECT device, signal, epoch, first, last, samples, even, first_ns, last_ns, boot, offset_ns, lost_signal"
    " FROM suspect ORDER BY first_ns"
)
ADD_SUSPECT = "INSERT OR REPLACE INTO suspect VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
SETTLE = "DELETE FROM suspect WHERE device = ? AND signal = ? AND epoch = ? AND first = ?"
TALLIES = "SELECT device, signal, blocks, accepted, lost FROM tally"
RAISE_TALLY = """
INSERT INTO tally (device, signal, blocks, accepted, lost) VALUES (?, ?, ?, ?, ?)
ON CONFLICT DO UPDATE SET blocks = max(blocks, excluded.blocks), accepted = max(accepted, excluded.accepted),
                          lost = max(lost, excluded.lost)
"""
COUNT = """
INSERT INTO tally (device, signal, blocks, accepted, lost) VALUES (?, ?, ?, ?, ?)
ON CONFLICT DO UPDATE SET blocks = blocks + excluded.blocks, accepted = accepted + excluded.accepted,
                          lost = lost + excluded.lost
"""


def values(number: int, row: Row) -> tuple[object, ...]:
    """A row as the columns of `INSERT`."""
    content = row.payload
    head = (number, *row.identity, row.first_ns, row.last_ns, row.samples, row.size, row.lost, row.lost_signal)
    rest = (content.content_type, content.schema, row.checksum(number), _packed(content))
    return (*head, row.boot, row.offset_ns, *rest)


def checked(columns: Sequence[Any], indexed_identity: Callable[[int], Sequence[Any] | None]) -> StoredRow | DamagedRow:
    """The row in columns as `FETCH` gives them; of a damaged one the index may know better who it was."""
    columns = typed(columns)
    held = Held(*columns[:HELD_COLUMNS])
    content_type, schema, checksum, data = columns[HELD_COLUMNS:]
    data = _unpacked(data, held.size - ROW_OVERHEAD_BYTES)
    row = held.row(Payload(content_type, schema, data))
    if row.checksum(held.id) == checksum:
        return StoredRow(held.id, row)
    identity = indexed_identity(held.id) or columns[1:5]
    return DamagedRow(Held(*typed((held.id, *identity)), *columns[5:HELD_COLUMNS]))


def _packed(content: Payload) -> bytes:
    """JSON takes half the room, and half of what its writing wears; raw samples are packed as far as they can be."""
    packed = zlib.compress(content.data, 1) if content.content_type == JSON else content.data
    return packed if len(packed) < len(content.data) else content.data


def _unpacked(data: bytes, length: int) -> bytes:
    """The payload of this length. What damage has made of it comes back as it is: its checksum will tell."""
    if len(data) >= length or length > PAYLOAD_BYTES_MAX:
        return data
    with contextlib.suppress(zlib.error):
        return zlib.decompressobj().decompress(data, length)
    return data


def typed(columns: Sequence[Any], kinds: Sequence[type[int | str | bytes]] = _TYPES) -> tuple[Any, ...]:
    """Columns of a row, with nothing in place of one that damage gave another type."""
    pairs = zip(columns, kinds[: len(columns)], strict=True)
    return tuple(value if isinstance(value, kind) else kind() for value, kind in pairs)


def take_over(db: sqlite3.Connection, transaction: Callable[[], AbstractContextManager[None]]) -> None:
    """Turn a file of the former format into one of this: rows keep identity and order. May be cut off at any step."""
    if db.execute("SELECT value FROM outbox WHERE key = 'format'").fetchone() == (FORMER,):
        with transaction():
            db.execute("ALTER TABLE block RENAME TO former_block")
            db.execute("ALTER TABLE tally RENAME TO former_tally")
            for statement in SCHEMA.split(";"):
                db.execute(statement)
            db.execute("INSERT INTO tally SELECT device, signal, next_sequence, accepted, lost FROM former_tally")
            db.execute("UPDATE outbox SET value = ? WHERE key = 'format'", (HALF_WAY,))
    (epoch,) = db.execute("SELECT value FROM outbox WHERE key = 'epoch'").fetchone()
    moving = True
    while moving:
        with transaction():
            moving = _move_former(db, epoch)
    with transaction():
        db.execute("DROP TABLE former_block")
        db.execute("DROP TABLE former_tally")
        db.execute("UPDATE outbox SET value = ? WHERE key = 'format'", (FORMAT,))


def _move_former(db: sqlite3.Connection, epoch: str) -> bool:
    """Move the oldest rows of the former format. False when there are none."""
    found = db.execute(
        "SELECT id, device, signal, sequence, first_ns, last_ns, samples, lost, lost_signal, content_type, schema,"
        " payload, checksum FROM former_block ORDER BY id LIMIT ?",
        (TAKEN_OVER_AT_ONCE,),
    ).fetchall()
    for columns in found:
        number, device, signal, sequence, *about, content_type, schema, data, checksum = typed(columns, _FORMER_TYPES)
        first_ns, last_ns, samples, lost, lost_signal = about
        head = "\0".join(str(part) for part in (device, signal, sequence, *about, content_type, schema, ""))
        payload = Payload(content_type, schema, data)
        row = Row(device, signal, epoch, sequence, first_ns, last_ns, samples, lost, lost_signal, payload)
        if zlib.crc32(data, zlib.crc32(head.encode())) == checksum:
            db.execute(INSERT, values(number, row))
        else:
            _keep_damaged(db, number, row)
        db.execute("DELETE FROM former_block WHERE id = ?", (number,))
    return bool(found)


def _keep_damaged(db: sqlite3.Connection, number: int, row: Row) -> None:
    """A damaged row stays one, for the outbox to put on record; its identity may be that of another row."""
    for sequence in (row.sequence, -1 - number):
        columns = list(values(number, dataclasses.replace(row, sequence=sequence)))
        columns[-2] = ~row.checksum(number)
        if db.execute(INSERT.replace("INSERT", "INSERT OR IGNORE", 1), columns).rowcount:
            return
