"""Single bits of an outbox's files decay: every block that it accepted is there intact, or on record as lost.

The long form takes another seed each time, and shows it; `WARDLINK_SEED=7` runs that one again.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gateway.errors import UnavailableError, WardlinkError
from gateway.samples import LossCause, LossRecord
from gateway.spool.outbox import Limits, Outbox
from gateway.spool.sqlite_format import HELD, typed
from gateway.spool.sqlite_store import SqliteStore
from gateway.spool.store import Held, Row, StoredRow
from tests.faults.witness import ALL, GATEWAY, STREAMS, Found, Told, look, radio_loss, read, settle
from tests.faults.workload import REOPEN_EVERY, Workload, tell

pytestmark = pytest.mark.faults

FILE = "outbox.db"
LOG = FILE + "-wal"
MARKS = FILE + ".marks"
FLIPS = 40
FLIPS_LONG = 300
FLIPS_UNCHECKED = 300
"""So many that some hit what a row says of itself, not only payloads."""
ROUNDS = REOPEN_EVERY + 12
"""What was accepted before the last opening is in the file, the rest in the log alone."""
QUOTA_BYTES = 80_000
QUOTA_CUT_BYTES = 12_000
"""Some twenty rows: of each class much is shed that nobody has read."""
NEW_NUMBER = 5000
"""Of the blocks that are appended after the flip."""
LOSSES_ALLOWED = (LossCause.SHED, LossCause.CORRUPT)

SEED = 2
"""Of the suite's form."""
SEED_FULL = 304
"""Of an outbox from which no receipt has taken anything: much can be shed."""

Files = Mapping[str, bytes]


@dataclass(slots=True)
class Toll:
    """What a series of flips did."""

    recorded: int = 0
    """Flips of which a loss is on record."""
    harmed: list[str] = field(default_factory=list)
    """Flips after which something was wrong and nobody said so."""


class SeededStore(SqliteStore):
    """One whose epochs come from a seed, so that its files do, but for the salts of the log."""

    draw = random.Random()

    def _begin_epoch(self, epoch: str) -> None:
        super()._begin_epoch(f"{self.draw.getrandbits(64):016x}")


def killed(folder: Path, seed: int = SEED) -> tuple[Files, Told]:
    """The files that a kill -9 leaves of a busy outbox, and what it had told."""
    told = Told()
    files: dict[str, bytes] = {}

    def on_event(number: int) -> None:
        tell(told, workload.events[number])
        files.update({path.name: path.read_bytes() for path in folder.iterdir()})

    SeededStore.draw = random.Random(seed)
    workload = Workload(folder / FILE, SeededStore, on_event, seed=seed, quota_bytes=QUOTA_BYTES, receipts_share=0.1)
    asyncio.run(workload.run(ROUNDS))
    return files, told


def flipped(files: Files, name: str, bit: int) -> Files:
    content = bytearray(files[name])
    content[bit // 8] ^= 1 << bit % 8
    return {**files, name: bytes(content)}


def take_toll(
    files: Files, told: Told, name: str, count: int, folder: Path, seed: int = SEED, *, is_quota_cut: bool = False
) -> Toll:
    """Flip one bit of a file at a time, and open what is there."""
    toll, draw = Toll(), random.Random(seed)
    for _ in range(count):
        bit = draw.randrange(len(files[name]) * 8)
        try:
            toll.recorded += survive(flipped(files, name, bit), told, folder / "flipped", is_quota_cut=is_quota_cut)
        except (AssertionError, WardlinkError) as error:
            toll.harmed.append(f"bit {bit} of {name}: {error}")
    return toll


def survive(files: Files, told: Told, folder: Path, *, is_quota_cut: bool = False) -> bool:
    """Shed, if the quota is cut; open, ask the cloud, go on, open again, hold it against what was told.

    Returns whether losses are on record.
    """
    folder.mkdir()
    try:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        if is_quota_cut:
            asyncio.run(shed(folder))
        asyncio.run(look_at(folder, told))
        found = asyncio.run(look_at(folder, told, NEW_NUMBER))
    finally:
        shutil.rmtree(folder)
    found.check(told, LOSSES_ALLOWED)
    return any(is_corrupt(row) for row in found.rows)


async def shed(folder: Path) -> None:
    """Give up what is above a smaller quota, before anything is read."""
    outbox = Outbox(SqliteStore(folder / FILE), GATEWAY, Limits(3600.0, ALL, QUOTA_CUT_BYTES))
    try:
        await outbox.open()
        outbox.append(radio_loss(STREAMS[0][0], NEW_NUMBER))
        await outbox.commit()
    finally:
        await outbox.close()


async def look_at(folder: Path, told: Told, new_number: int | None = None) -> Found:
    """What an outbox holds after it has read everything once and the cloud has answered for what is missed."""
    outbox = Outbox(SqliteStore(folder / FILE), GATEWAY, Limits(3600.0, ALL))
    try:
        await outbox.open()
        try:
            await outbox.fetch(0, ALL, ALL)
        except UnavailableError:
            await outbox.fetch(0, ALL, ALL)  # as the sender does: damage that is met sets the file aside
        await outbox.commit()
        await settle(outbox, told)
        return await look(outbox, new_number)
    finally:
        await outbox.close()


def is_corrupt(row: StoredRow) -> bool:
    """Whether a row is the record of what damage took."""
    _, content = read(row)
    return isinstance(content, LossRecord) and content.cause is LossCause.CORRUPT


def chosen_seed(is_long: bool, seed: int = SEED) -> int:
    return int(os.environ.get("WARDLINK_SEED", random.randrange(10**6) if is_long else seed))


@pytest.mark.parametrize("name", [FILE, LOG, MARKS])
@pytest.mark.timeout(900)
def test_no_flip_is_silent(name: str, tmp_path: Path, scratch: Path, is_long: bool) -> None:
    flips = FLIPS_LONG if is_long else FLIPS
    seed = chosen_seed(is_long)
    toll = take_toll(*killed(tmp_path, seed), name, flips, scratch, seed)
    print(f"WARDLINK_SEED={seed}, {name}: {toll.recorded} of {flips} flips on record, {len(toll.harmed)} silent")
    assert toll.harmed == []
    if seed == SEED and name != MARKS:  # of another seed, the log may say that nothing in the file counts any more
        assert toll.recorded > 0


@pytest.mark.timeout(900)
def test_no_flip_is_silent_in_rows_that_are_shed_before_they_are_read(
    tmp_path: Path, scratch: Path, is_long: bool
) -> None:
    flips = FLIPS_LONG if is_long else FLIPS
    seed = chosen_seed(is_long, SEED_FULL)
    toll = take_toll(*killed(tmp_path, seed), FILE, flips, scratch, seed, is_quota_cut=True)
    print(f"WARDLINK_SEED={seed}: {toll.recorded} of {flips} flips on record, {len(toll.harmed)} silent")
    assert toll.harmed == []


def test_control_rows_that_are_shed_unchecked_are_not_what_they_were(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SqliteStore, "oldest", unchecked_oldest)
    toll = take_toll(*killed(tmp_path, SEED_FULL), FILE, FLIPS_UNCHECKED, scratch, SEED_FULL, is_quota_cut=True)
    print(f"{len(toll.harmed)} of {FLIPS_UNCHECKED} flips silent, such as {toll.harmed[:1]}")
    assert toll.harmed


def unchecked_oldest(store: SqliteStore, signals: Sequence[str], limit: int) -> list[Held]:
    """What the columns say, whatever the checksum says."""
    places = ", ".join("?" * len(signals))
    query = f"SELECT {HELD} FROM block WHERE signal IN ({places}) ORDER BY id LIMIT ?"
    return [Held(*typed(columns)) for columns in store._read(query, (*signals, limit))]


def test_control_rows_without_checksums_pass_when_they_are_not_what_they_were(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Row, "checksum", lambda *_: 0)
    toll = take_toll(*killed(tmp_path), FILE, FLIPS, scratch)
    print(f"{len(toll.harmed)} of {FLIPS} flips silent, such as {toll.harmed[:1]}")
    assert toll.harmed


def test_control_without_marks_a_log_loses_rows_unseen(tmp_path: Path, scratch: Path) -> None:
    files, told = killed(tmp_path)
    toll = take_toll({name: content for name, content in files.items() if name != MARKS}, told, LOG, FLIPS, scratch)
    print(f"{len(toll.harmed)} of {FLIPS} flips silent, such as {toll.harmed[:1]}")
    assert any("accepted blocks lost" in harm for harm in toll.harmed)
