"""Rows of the bench: unpacking of packets against numpy in batches, line protocol against influxdb-client's `Point`.

Each row is a peer and a kernel that do the same work, run in turns; the ratio is that of the medians of
the thread's own time: on a shared machine others' turns do not count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import TypedDict

import numpy as np
from influxdb_client import Point, WritePrecision
from numpy.typing import NDArray

from cloud_sync import line_protocol
from cloud_sync.line_protocol import SHORTEST, Column, escape_key, series_prefix
from gateway.devices import packets
from gateway.devices.packets import CYTON_BYTES, MUSE_BYTES

TURNS = 25
TURN_S = 0.004
"""So long a kernel runs in a turn; the peer runs as often as fits, at least once."""
PACKETS = 250
"""A second of a Cyton; of ten seconds, whose counts leave the first cache, the ratio is a fifth smaller."""
DAMAGED_EVERY = 100
"""So many packets, one has a wrong stop byte: the search has to go on inside of it."""
MUSE_PACKETS = 107
"""A second of five electrodes."""
T0 = 1_700_000_000_000_000_000
TAGS = {
    **dict.fromkeys(("patient_id", "device_id", "stream_id", "org_id"), "0b6f7c1e-2b1d-4f7a-9d55-0f3a5f0c2b1a"),
    "location": "ICU-5",
    "priority": "high",
}
ELECTRODES = ("Fp1", "Fp2", "C3", "C4", "P7", "P8", "O1", "O2")
MICROVOLTS_PER_COUNT = 4.5e6 / 24 / (2**23 - 1)
VITAL_SIGNS = {"diastolic_bp": 80, "heart_rate": 72, "spo2": 98, "systolic_bp": 120, "temperature": 36.5}
VITAL_ROWS = 60


class Row(TypedDict):
    """A line of the table. `goal` None: shown for comparison."""

    name: str
    ratio: float
    peer: str
    goal: float | None
    ok: bool


def row(name: str, peer: str, goal: float | None, theirs: Callable[[], object], ours: Callable[[], object]) -> Row:
    """Time both in turns."""
    repeats = [max(1, int(TURN_S / _seconds(work, 1))) for work in (theirs, ours)]
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(TURNS):
        for work, count, taken in zip((theirs, ours), repeats, times, strict=True):
            taken.append(_seconds(work, count))
    ratio = statistics.median(times[0]) / statistics.median(times[1])
    return Row(name=name, ratio=round(ratio, 1), peer=peer, goal=goal, ok=goal is None or ratio >= goal)


def _seconds(work: Callable[[], object], count: int) -> float:
    begun = time.thread_time()
    for _ in range(count):
        work()
    return (time.thread_time() - begun) / count


def rows() -> list[Row]:
    """All rows of this file. Raises `AssertionError` where a kernel and its peer do not do the same."""
    assert packets.IMPLEMENTATION == line_protocol.IMPLEMENTATION == "compiled"
    return [cyton(), muse(), *vital_signs(), *eeg()]


def cyton() -> Row:
    """Find packets among garbage, read counts and ends, count the lost."""
    rng = np.random.default_rng(1)
    frames = rng.integers(0, 256, (PACKETS, CYTON_BYTES), dtype=np.uint8)
    frames[:, 0], frames[:, 1], frames[:, -1] = 0xA0, np.arange(PACKETS), 0xC0
    frames[DAMAGED_EVERY // 2 :: DAMAGED_EVERY, -1] = 0
    buffer = frames.tobytes()

    def ours() -> tuple[NDArray[np.int32], bytes, bytes, int]:
        starts, _ = packets.find_packets(buffer)
        return packets.read_packets(buffer, starts)

    def theirs() -> tuple[NDArray[np.int32], bytes, bytes, int]:
        return cyton_in_numpy(buffer)

    (counts, *rest), (expected_counts, *expected_rest) = ours(), theirs()
    assert np.array_equal(counts, expected_counts)
    assert rest == expected_rest
    return row("Cyton, 1 s of packets", "numpy, one batch", 20, theirs, ours)


def cyton_in_numpy(buffer: bytes) -> tuple[NDArray[np.int32], bytes, bytes, int]:
    """The accept rule and the bits without a loop over packets, unless candidates overlap."""
    octets = np.frombuffer(buffer, dtype=np.uint8)
    stops = octets[CYTON_BYTES - 1 :]
    candidates = np.flatnonzero((octets[: len(stops)] == 0xA0) & (stops >= 0xC0) & (stops <= 0xC6))
    following = np.minimum(candidates + CYTON_BYTES, len(octets) - 1)
    starts = candidates[(octets[following] == 0xA0) | (candidates + CYTON_BYTES == len(octets))]
    if (np.diff(starts) < CYTON_BYTES).any():
        kept, end = [], 0
        for start in starts.tolist():
            if start >= end:
                kept.append(start)
                end = start + CYTON_BYTES
        starts = np.array(kept)
    frames = octets[starts[:, np.newaxis] + np.arange(CYTON_BYTES)]
    values = frames[:, 2:26].reshape(-1, 8, 3).transpose(2, 1, 0).astype(np.int32)
    counts: NDArray[np.int32] = values[0] << 16 | values[1] << 8 | values[2]
    counts ^= 0x800000
    counts -= 0x800000
    lost = (np.diff(frames[:, 1]) - np.uint8(1)).sum(dtype=np.int64)
    return counts, frames[:, 1].tobytes(), frames[:, CYTON_BYTES - 1].tobytes(), int(lost)


def muse() -> Row:
    """12-bit values."""
    data = np.random.default_rng(2).bytes(MUSE_PACKETS * MUSE_BYTES)
    assert np.array_equal(packets.muse_counts(data), packets.muse_counts_plain(data))
    return row(
        "Muse, 1 s of 5 electrodes",
        "numpy, one batch",
        15,
        lambda: packets.muse_counts_plain(data),
        lambda: packets.muse_counts(data),
    )


def vital_signs() -> list[Row]:
    """A row with five fields: out of a minute's block, and all by itself."""
    prefix = series_prefix("vital_signs", {**TAGS, "signal_type": "vital_signs"})
    found = []
    for name, count, goal in (("in a block of 60", VITAL_ROWS, 110), ("by itself", 1, None)):
        times = T0 + np.arange(count) * 10**9
        columns = _columns({field: np.full(count, float(value)) for field, value in VITAL_SIGNS.items()})
        instants = times.tolist()
        _check(points("vital_signs", [VITAL_SIGNS] * count, instants), line_protocol.encode(prefix, times, columns)[0])
        found.append(
            row(
                f"vital_signs row {name}",
                "influxdb-client Point",
                goal,
                partial(points, "vital_signs", [VITAL_SIGNS] * count, instants),
                partial(line_protocol.encode, prefix, times, columns),
            )
        )
    return found


def eeg() -> list[Row]:
    """A second of eight channels in microvolts."""
    counts = np.random.default_rng(3).integers(-20_000, 20_000, (256, len(ELECTRODES)))
    microvolts = counts * MICROVOLTS_PER_COUNT
    times = T0 + np.arange(256) * 3_906_250
    prefix = series_prefix("eeg", {**TAGS, "signal_type": "eeg"})
    held = [dict(zip(ELECTRODES, values, strict=True)) for values in microvolts.tolist()]
    instants = times.tolist()
    table = {name: np.ascontiguousarray(microvolts[:, k]) for k, name in enumerate(ELECTRODES)}
    columns = _columns(table)
    singles = _columns({name: values.astype(np.float32) for name, values in table.items()})
    _check(points("eeg", held, instants), line_protocol.encode(prefix, times, columns)[0])

    def theirs() -> str:
        return points("eeg", held, instants)

    peer = "influxdb-client Point"
    return [
        row(
            f"eeg 256 x 8, {name}",
            peer,
            goal,
            theirs,
            partial(line_protocol.encode, prefix, times, chosen, decimals),
        )
        for name, goal, chosen, decimals in (
            ("float64 shortest", 60, columns, SHORTEST),
            ("float32 shortest", None, singles, SHORTEST),
            ("3 decimals", 180, columns, 3),
        )
    ]


def points(measurement: str, held: list[dict[str, float]], instants: list[int]) -> str:
    """What a program with influxdb-client does for each row."""
    lines = []
    for values, instant in zip(held, instants, strict=True):
        point = Point(measurement)
        for key, value in TAGS.items():
            point.tag(key, value)
        point.tag("signal_type", measurement)
        for name, number in values.items():
            point.field(name, number)
        point.time(instant, WritePrecision.NS)
        lines.append(point.to_line_protocol())
    return "\n".join(lines)


def _columns(table: dict[str, NDArray[np.float64]] | dict[str, NDArray[np.float32]]) -> list[Column]:
    whole = {name for name, value in VITAL_SIGNS.items() if isinstance(value, int)}
    return [(escape_key(name).encode(), values, name in whole) for name, values in table.items()]


def _check(theirs: str, ours: bytes) -> None:
    """The same lines, but for the order of the fields and the spelling of a number."""
    for one, other in zip(theirs.splitlines(), ours.decode().splitlines(), strict=True):
        (series, fields, time_ns), (expected_series, expected_fields, expected_time_ns) = one.split(), other.split()
        assert (series, time_ns) == (expected_series, expected_time_ns)
        assert _read(fields) == _read(expected_fields)


def _read(fields: str) -> dict[str, float]:
    pairs = (field.partition("=") for field in fields.split(","))
    return {name: float(text.removesuffix("i")) for name, _, text in pairs}


if __name__ == "__main__":
    for found in rows():
        print(f"{found['name']:32} {found['ratio']:7.1f} x  {found['peer']:22} {found['goal']} {found['ok']}")
