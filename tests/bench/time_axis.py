"""Rows of the bench: a device's time axis from jittered arrivals, side by side with the Lab Streaming Layer's dejitter.

Both see the same arrivals: of a Cyton whose clock is off by 40 ppm, in bursts of 4 to 12 samples, 0 to 60 ms late.
An error is stated minus true time. Lateness has no mean to be subtracted in the field, so the first row leaves it in.
"""

from __future__ import annotations

import csv
import random
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gateway.sample_clock import SampleClock
from gateway.samples import NS_PER_S

RATE_HZ = 250
SKEW = 40e-6
SECONDS = 300
SETTLED_S = 30
BURSTS = (4, 12)
LATE_MS_MAX = 60
RESOLVE_S = 10.0
BEGIN_S = 1_000.0
RMS_S_MAX = 1e-3
"""The goal for the error of a sample's time, once settled."""
REAL = Path(__file__).parents[3] / "shared/data/cyton/cyton_timesync_samples1.csv"

Row = dict[str, object]


def rows() -> list[Row]:
    """All rows of this file; pylsl (the extra `lsl`) is the peer."""
    true_s = BEGIN_S + np.arange(SECONDS * RATE_HZ) / RATE_HZ * (1 + SKEW)
    arrivals_s = bursts(true_s)
    found = compare("jitter 0-60 ms, bursts of 4-12", true_s, arrivals_s)
    stated_s = ours(arrivals_s)
    ppm = abs(np.polyfit(np.arange(RATE_HZ), stated_s[-RATE_HZ:], 1)[0] * RATE_HZ / (1 + SKEW) - 1) * 1e6
    found.append(_row("rate after 5 min, off by ppm (goal: 10)", "true rate", 10 / max(ppm, 1e-3), None, ok=ppm <= 10))
    if REAL.exists():
        # its true level is not known, only how the error moves
        found += compare("a real Cyton's host times", *real())[1:]
    else:
        found.append(_row("a real Cyton's host times", "pylsl", 0.0, None, ok=False))
    return found


def compare(name: str, true_s: NDArray[np.float64], arrivals_s: NDArray[np.float64]) -> list[Row]:
    """RMS errors after 30 s, with and without what is constant in them."""
    settled = slice(np.searchsorted(true_s, true_s[0] + SETTLED_S), None)
    our_error = (ours(arrivals_s) - true_s)[settled]
    try:
        their_error = (theirs(arrivals_s) - true_s)[settled]
    except (ImportError, RuntimeError, TimeoutError) as error:
        return [_row(f"time axis, {name}: {error}", "pylsl dejitter", 0.0, 1.0, ok=False)]
    plain = _rms(our_error), _rms(their_error)
    level = _rms(our_error - our_error.mean()), _rms(their_error - their_error.mean())
    print(f"time axis, {name}: RMS {plain[0] * 1e3:.3f} ms, pylsl {plain[1] * 1e3:.3f} ms;", end=" ")
    print(f"without their means {level[0] * 1e3:.3f} ms, pylsl {level[1] * 1e3:.3f} ms")
    return [
        _row(f"time axis, {name}: RMS error", "pylsl dejitter", plain[1] / plain[0], 1.0, ok=plain[0] < RMS_S_MAX),
        _row(
            f"time axis, {name}: RMS without the mean",
            "pylsl dejitter",
            level[1] / level[0],
            None,
            ok=level[0] < RMS_S_MAX,
        ),
    ]


def bursts(true_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """When each sample arrives: a burst at a time, never before the burst before it."""
    draw = random.Random(3)
    arrivals_s = np.empty_like(true_s)
    first, latest = 0, 0.0
    while first < len(true_s):
        last = min(first + draw.randint(*BURSTS), len(true_s))
        latest = max(latest, true_s[last - 1] + draw.uniform(0, LATE_MS_MAX / 1000))
        arrivals_s[first:last] = latest
        first = last
    return arrivals_s


def real() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Board times as the truth, host times as arrivals; the first row's host time is not yet synchronised.

    The board's clock is put on the host's by the line under its earliest arrivals, which favours neither side's fit.
    """
    with REAL.open(newline="") as file:
        table = np.array([[float(row[0]), float(row[2])] for row in list(csv.reader(file))[2:]]) / 1000
    host_s, board_s = table[:, 0] - table[0, 0], table[:, 1] - table[0, 1]
    slope = np.polyfit(board_s, host_s, 1)[0]
    true_s = board_s * slope
    return true_s + (host_s - true_s).min() + BEGIN_S, host_s + BEGIN_S


def ours(arrivals_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """Stated times of all samples; the line is asked for once a second, as for a block."""
    clock = SampleClock(RATE_HZ)
    stated_s = np.full(arrivals_s.shape, np.nan)
    line, block_end = None, 0
    for index, arrival_s in enumerate(arrivals_s):
        clock.observe(index, round(arrival_s * NS_PER_S))
        if not clock.settled:
            continue
        if line is None or index >= block_end:
            line, block_end = clock.line_from(index, index - 1 if line else None), index + RATE_HZ
        stated_s[index] = line.at(index) / NS_PER_S
    return stated_s


def theirs(arrivals_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """What an inlet with dejitter gives for a stream whose samples are stamped with their arrival."""
    import pylsl  # noqa: PLC0415 - an extra

    name = f"wardlink-bench-{time.monotonic_ns()}"
    outlet = pylsl.StreamOutlet(pylsl.StreamInfo(name, "EEG", 1, RATE_HZ, "float32", name), max_buffered=2 * SECONDS)
    found = pylsl.resolve_byprop("name", name, 1, RESOLVE_S)
    if not found:
        raise TimeoutError("no LSL stream can be found on this machine")
    inlet = pylsl.StreamInlet(found[0], 2 * SECONDS, processing_flags=pylsl.proc_dejitter)
    inlet.open_stream(RESOLVE_S)
    if not outlet.wait_for_consumers(RESOLVE_S):
        raise TimeoutError("the LSL inlet does not connect")
    stated_s: list[float] = []
    for number, arrival_s in enumerate(arrivals_s):
        outlet.push_sample([float(number)], arrival_s)
        if number % RATE_HZ == 0:
            stated_s += inlet.pull_chunk(0.0, 4096)[1]
    deadline_s = time.monotonic() + RESOLVE_S
    while len(stated_s) < len(arrivals_s) and time.monotonic() < deadline_s:
        stated_s += inlet.pull_chunk(0.2, 4096)[1]
    if len(stated_s) != len(arrivals_s):
        raise RuntimeError(f"LSL gave {len(stated_s)} of {len(arrivals_s)} samples")
    return np.array(stated_s)


def _rms(error_s: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(error_s**2)))


def _row(name: str, peer: str, ratio: float, goal: float | None, *, ok: bool) -> Row:
    return {
        "name": name,
        "ratio": float(ratio),
        "peer": peer,
        "goal": goal,
        "ok": bool(ok and (goal is None or ratio >= goal)),
    }


if __name__ == "__main__":
    for one in rows():
        print(one)
