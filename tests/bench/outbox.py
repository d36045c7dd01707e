"""Rows of the bench: what the outbox makes a disk write for a Cyton's raw EEG and brain state, and how fast it commits.

The real outbox at its defaults, on the file system that holds the temporary folder, with one commit for each second of
data. Bytes handed to the kernel (`wchar`) are WAL, checkpoints and marks; what the kernel in turn hands to the disk
(`write_bytes`) comes in pages of 4 KiB and is what wears a card: the years are reckoned from that.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gateway.samples import BRAIN_STATE, BRAIN_STATE_FIELDS, EEG, NS_PER_S, ClockStamp, ClockState, SampleBlock
from gateway.spool.outbox import Outbox
from gateway.spool.sqlite_store import SqliteStore
from gateway.virtual.synthetic import synthetic_headset

Row = dict[str, object]

DEVICE = "CYTON-0017"
SECONDS = 600
LAG_S = 2
"""From a block's commit to its receipt, with a cloud that answers."""
DRAINED_AT_ONCE = 100
"""Blocks in one receipt while a backlog drains."""
MICROVOLTS_PER_COUNT = 0.02235174
NOON_NS = 1_714_564_800 * NS_PER_S
CLOCK = ClockStamp(ClockState.SYNCED, 1_000_000)

BYTES_GOAL = 3.0
YEARS_GOAL = 5.0
CARD_BYTES = 32e9
CARD_CYCLES = 300
YEAR_S = 365.25 * 86_400


@dataclass(frozen=True, slots=True)
class Cost:
    """What some seconds of data cost."""

    seconds: float
    payload: int
    handed: int
    """Bytes that the process wrote."""
    to_disk: int
    """Bytes that the kernel had to write, pages of 4 KiB."""

    @property
    def years(self) -> float:
        """Until a 32 GB card of 300 cycles is worn, if its controller spreads them evenly."""
        return CARD_BYTES * CARD_CYCLES / (self.to_disk / self.seconds) / YEAR_S


def rows() -> list[Row]:
    """Bytes written a payload byte and years of a card, with the cloud there, and away until all is written."""
    with tempfile.TemporaryDirectory(prefix="wardlink-bench-") as folder:
        online = asyncio.run(cost(Path(folder) / "online.db", is_online=True))
        offline = asyncio.run(cost(Path(folder) / "offline.db", is_online=False))
        rate = asyncio.run(commits_a_second(Path(folder) / "rate.db"))
    return [
        _row(f"outbox, cloud there: {_figures(online)}", "3 B", BYTES_GOAL / (online.handed / online.payload)),
        _row(
            f"outbox, cloud away, then drained: {_figures(offline)}",
            "3 B",
            BYTES_GOAL / (offline.handed / offline.payload),
            None,
        ),
        _row(f"32 GB card of 300 cycles, cloud there: {online.years:.0f} years", "5 years", online.years / YEARS_GOAL),
        _row(f"the same, cloud always away: {offline.years:.0f} years", "5 years", offline.years / YEARS_GOAL),
        _row(f"{rate:.0f} durable commits a second", "1 a second", rate, None),
    ]


def blocks(seconds: int) -> Iterator[tuple[SampleBlock, SampleBlock]]:
    """A second of raw EEG and of brain state each."""
    headset = synthetic_headset(seconds)
    counts = np.round(headset.uv / MICROVOLTS_PER_COUNT).astype(np.int32)
    random = np.random.default_rng(1)
    for second in range(seconds):
        start = NOON_NS + second * NS_PER_S
        part = counts[second * 250 : (second + 1) * 250]
        columns = {name: np.ascontiguousarray(part[:, k]) for k, name in enumerate(headset.channel_names)}
        times = start + np.arange(250, dtype=np.int64) * 4_000_000
        scales = dict.fromkeys(columns, MICROVOLTS_PER_COUNT)
        eeg = SampleBlock(DEVICE, EEG, times, {**columns, "quality": np.zeros(250, np.int64)}, CLOCK, scales=scales)
        features = {name: random.random(5) for name in BRAIN_STATE_FIELDS}
        states = SampleBlock(DEVICE, BRAIN_STATE, start + np.arange(5, dtype=np.int64) * 200_000_000, features, CLOCK)
        yield eeg, states


async def cost(path: Path, *, is_online: bool) -> Cost:
    """Of some minutes of data, with receipts that follow at once or all in the end."""
    outbox = Outbox(SqliteStore(path), "gw-bench")
    await outbox.open()
    before, payload = _written(), 0
    for second, both in enumerate(blocks(SECONDS)):
        for block in both:
            outbox.append(block)
        payload += sum(len(row.payload.data) for row in outbox._pending)
        if is_online and second >= LAG_S:
            await receipt(outbox, 0, second - LAG_S)
        await outbox.commit()
    for last in range(DRAINED_AT_ONCE // 2, SECONDS + DRAINED_AT_ONCE // 2, DRAINED_AT_ONCE // 2):
        await receipt(outbox, 0, last)
        await outbox.commit()
    await outbox.close()
    after = _written()
    return Cost(SECONDS, payload, after[0] - before[0], after[1] - before[1])


async def receipt(outbox: Outbox, first: int, last: int) -> None:
    """The cloud has all of these seconds."""
    for signal in (EEG, BRAIN_STATE):
        await outbox.forget(DEVICE, signal, outbox.epoch, [(first, last)])


async def commits_a_second(path: Path) -> float:
    """Commits of one second's blocks each, one after the other."""
    outbox = Outbox(SqliteStore(path), "gw-bench")
    await outbox.open()
    content = list(blocks(120))
    began = time.perf_counter()
    for both in content:
        for block in both:
            outbox.append(block)
        await outbox.commit()
    rate = len(content) / (time.perf_counter() - began)
    await outbox.close()
    return rate


def _written() -> tuple[int, int]:
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    numbers = {name: int(value) for name, value in (line.split(": ") for line in lines)}
    return numbers["wchar"], numbers["write_bytes"]


def _figures(found: Cost) -> str:
    handed, to_disk = found.handed / found.payload, found.to_disk / found.payload
    return f"{handed:.2f} B written, {to_disk:.2f} B in pages, a payload byte"


def _row(name: str, peer: str, ratio: float, goal: float | None = 1.0) -> Row:
    return {"name": name, "ratio": ratio, "peer": peer, "goal": goal, "ok": goal is None or ratio >= goal}


if __name__ == "__main__":
    for one in rows():
        print(one)
