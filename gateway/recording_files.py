"""Recordings in files: OpenBCI GUI text, Muse CSV, EDF and BDF, as microvolts with the number of every sample.

A file whose sample index or time stamps jump has lost samples there, and its numbers jump too. Blocks for as long as
reading takes. Knows no device and no clock.
"""

from __future__ import annotations

import re
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import edfio
import numpy as np
from numpy.typing import NDArray

from gateway.errors import ConfigError

FILE_BYTES_MAX = 256 * 1024 * 1024
"""Nearly two hours of OpenBCI text; what is read stays in memory."""
LINE_CHARACTERS_MAX = 4096
"""A row of 16 channels with all extras has about 500."""
ROWS_MAX = 8 * 3600 * 256
"""A night."""
RATE_HZ_MIN = 1.0
RATE_HZ_MAX = 20_000.0

MUSE_RATE_HZ = 256.0
FULL_COUNTER_PERIOD = 256
LARGEST_ODD_COUNTER = 201
"""OpenBCI's Ganglion counts to 100 or to 200; whatever counts further counts to 255."""
JUMP_PERIODS = 1.5
"""Time stamps further apart than this have lost samples between them."""

_VOLTS = {"uv": 1.0, "µv": 1.0, "μv": 1.0, "mv": 1e3, "v": 1e6, "nv": 1e-3}
_GUI_RATE = re.compile(r"^%\s*Sample Rate\s*=\s*([0-9.]{1,12})\s*Hz", re.IGNORECASE)
_GUI_CHANNELS = re.compile(r"^%\s*Number of channels\s*=\s*([0-9]{1,3})\s*$", re.IGNORECASE)
_REFERENCE = re.compile(r"-(REF|LE|AR|AVG|CAR)$", re.IGNORECASE)
ACCELERATION_AXES = 3


@dataclass(frozen=True, slots=True, eq=False)
class Recorded:
    """What a file holds of an EEG.

    `uv`: float64 (n, channels), microvolts, finite. `acceleration_g`: float64 (n, 3), X Y Z, where there is any.
    `index`: int64 (n,), the number of each sample since the first, lost ones counted.
    """

    channel_names: tuple[str, ...]
    rate_hz: float
    uv: NDArray[np.float64]
    acceleration_g: NDArray[np.float64] | None
    index: NDArray[np.int64]


def read_recording(path: Path) -> Recorded:
    """Read a recording; what it is, is told by its content (EDF, BDF) or its first line (texts).

    Raises `ConfigError` with file, line and what was expected, for anything that is not a whole, sound recording.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
        if size > FILE_BYTES_MAX:
            raise ConfigError(f"recording {path} has {size} bytes, expected at most {FILE_BYTES_MAX}")
        if head == b"\xffBIOSEMI":
            return _load_edf(path, edfio.read_bdf)
        if head == b"0       ":
            return _load_edf(path, edfio.read_edf)
        return _load_text(path)
    except OSError as error:
        raise ConfigError(f"recording {path} cannot be read: {error.strerror or error}") from error


def index_of_counter(counter: NDArray[np.float64]) -> NDArray[np.int64]:
    """Numbers of samples from a counter that wraps, int64 (n,) from 0. What it skips is lost.

    A Cyton's counts 0 to 255 by one, with a Daisy by two; the step is the commonest difference. A counter that does
    not count is taken for none.
    """
    steps, times = np.unique(np.diff(counter), return_counts=True)
    step = float(steps[np.argmax(times)]) if len(steps) else 1.0
    if not 1 <= step <= 2 or counter.min() < 0 or counter.max() >= FULL_COUNTER_PERIOD:
        return np.arange(len(counter), dtype=np.int64)
    period = FULL_COUNTER_PERIOD if counter.max() >= LARGEST_ODD_COUNTER else counter.max() + step
    advance = np.maximum(np.rint(np.diff(counter) % period / step), 1).astype(np.int64)
    return np.concatenate([[0], np.cumsum(advance)])


def index_of_times(times_s: NDArray[np.float64], rate_hz: float) -> NDArray[np.int64]:
    """Numbers of samples from their time stamps, int64 (n,) from 0. Where they jump, samples are lost."""
    periods = np.diff(times_s) * rate_hz
    advance = np.where(periods > JUMP_PERIODS, np.rint(periods), 1).astype(np.int64)
    return np.concatenate([[0], np.cumsum(advance)])


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not empty. Raises `ConfigError` for what is no text."""
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            while line := file.readline(LINE_CHARACTERS_MAX + 1):
                number += 1
                if len(line) > LINE_CHARACTERS_MAX:
                    raise ConfigError(
                        f"recording {path}, line {number}: expected at most {LINE_CHARACTERS_MAX} characters"
                    )
                if line.strip():
                    yield number, line.strip()
    except UnicodeDecodeError as error:
        raise _unknown(path, number + 1) from error


def _load_text(path: Path) -> Recorded:
    lines = _lines(path)
    number, first = next(lines, (1, ""))
    if first.startswith("%"):
        return _load_gui(path, first, lines)
    if first.split(",")[0].strip().casefold() in ("timestamps", "timestamp"):
        return _load_muse(path, first, lines)
    raise _unknown(path, number)


def _load_gui(path: Path, first: str, lines: Iterator[tuple[int, str]]) -> Recorded:
    """OpenBCI GUI text: `%` lines, from version 5 on a line of column names, then rows of numbers."""
    rate_hz, channels, line, number = 0.0, 0, first, 1
    while line.startswith("%"):
        if rate := _GUI_RATE.match(line):
            rate_hz = _number(rate.group(1), path, number)
        if count := _GUI_CHANNELS.match(line):
            channels = int(count.group(1))
        number, line = next(lines, (number + 1, ""))
    if not RATE_HZ_MIN <= rate_hz <= RATE_HZ_MAX or channels < 1:
        raise ConfigError(
            f"recording {path}, line {number}: expected '%Number of channels = N' and '%Sample Rate = R Hz' above"
        )
    columns = [name.strip() for name in line.split(",")]
    if line.casefold().startswith("sample index"):
        eeg = [column for column, name in enumerate(columns) if name.startswith("EXG Channel")]
        axes = [column for column, name in enumerate(columns) if name.startswith("Accel Channel")]
        if len(eeg) != channels:
            raise ConfigError(f"recording {path}, line {number}: {len(eeg)} EXG columns, expected {channels}")
        rows = _rows(path, lines, [0, *eeg, *axes])
    else:
        # Before version 5 no names: the sample index, the channels, the three axes.
        eeg, axes = list(range(1, channels + 1)), list(range(channels + 1, channels + 1 + ACCELERATION_AXES))
        axes = axes if len(columns) > axes[-1] else []
        rows = _rows(path, _again(number, line, lines), [0, *eeg, *axes])
    acceleration_g = rows[:, 1 + channels :].copy() if len(axes) == ACCELERATION_AXES else None
    names = tuple(f"EXG {number}" for number in range(1, channels + 1))
    return Recorded(names, rate_hz, rows[:, 1 : 1 + channels].copy(), acceleration_g, index_of_counter(rows[:, 0]))


def _load_muse(path: Path, first: str, lines: Iterator[tuple[int, str]]) -> Recorded:
    """Muse CSV of muse-lsl: UNIX seconds, one column of microvolts an electrode, a marker."""
    names = [name.strip() for name in first.split(",")]
    eeg = [column for column, name in enumerate(names) if column and name and not name.startswith("Marker")]
    if not eeg:
        raise ConfigError(f"recording {path}, line 1: expected timestamps and at least one electrode")
    rows = _rows(path, lines, [0, *eeg])
    elapsed_s = float(rows[-1, 0] - rows[0, 0])
    rate_hz = (len(rows) - 1) / elapsed_s if elapsed_s > 0 else 0.0
    if len(rows) > 1 and not 0.95 < rate_hz / MUSE_RATE_HZ < 1.05:
        raise ConfigError(f"recording {path}: its timestamps give {rate_hz:.1f} Hz, expected {MUSE_RATE_HZ:.0f} Hz")
    index = index_of_times(rows[:, 0], MUSE_RATE_HZ)
    return Recorded(tuple(names[column] for column in eeg), MUSE_RATE_HZ, rows[:, 1:].copy(), None, index)


def _again(number: int, line: str, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    if line:
        yield number, line
    yield from lines


def _rows(path: Path, lines: Iterator[tuple[int, str]], columns: Sequence[int]) -> NDArray[np.float64]:
    """float64 (n, len(columns)) of the chosen columns. Raises `ConfigError` with the line."""
    values = array("d")
    needed = max(columns) + 1
    count = 0
    for number, line in lines:
        cells = line.split(",")
        if len(cells) < needed:
            raise ConfigError(f"recording {path}, line {number}: {len(cells)} columns, expected at least {needed}")
        values.extend([_number(cells[column], path, number) for column in columns])
        count += 1
        if count > ROWS_MAX:
            raise ConfigError(f"recording {path}, line {number}: expected at most {ROWS_MAX} rows")
    if not count:
        raise ConfigError(f"recording {path}: expected rows of numbers, it ends after its header")
    return np.frombuffer(values, dtype=np.float64).reshape(count, len(columns))


def _number(cell: str, path: Path, number: int) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = float("nan")
    if not -1e15 < value < 1e15:
        raise ConfigError(f"recording {path}, line {number}: {cell.strip()[:40]!r} where a number was expected")
    return value


def _load_edf(path: Path, read: Callable[[Path], edfio.Edf | edfio.Bdf]) -> Recorded:
    """EDF, EDF+C or BDF: the channels with a unit of voltage, at the rate that most of them have."""
    try:
        with warnings.catch_warnings(record=True) as complaints:
            warnings.simplefilter("always")
            file = read(path)
            if not file.is_continuous:
                raise ConfigError(f"recording {path} has gaps (EDF+D), expected a continuous one")
            voltages = [signal for signal in file.signals if _volt_scale(signal) is not None]
            rates = Counter(signal.sampling_frequency for signal in voltages)
            if not rates:
                raise ConfigError(f"recording {path}: expected at least one channel in uV, mV or V")
            rate_hz = rates.most_common(1)[0][0]
            eeg = [signal for signal in voltages if signal.sampling_frequency == rate_hz]
            uv = np.column_stack([signal.data * (_volt_scale(signal) or 1.0) for signal in eeg])
            names = tuple(_electrode(signal.label) for signal in eeg)
    except (ValueError, IndexError, ArithmeticError) as error:
        raise ConfigError(f"recording {path} is not sound EDF or BDF: {error}") from error
    if complaints or not np.isfinite(uv).all() or not len(uv) or not RATE_HZ_MIN <= rate_hz <= RATE_HZ_MAX:
        reason = complaints[0].message if complaints else "values or sampling rate out of range"
        raise ConfigError(f"recording {path} is not whole EDF or BDF: {reason}")
    return Recorded(names, float(rate_hz), uv, None, np.arange(len(uv), dtype=np.int64))


def _volt_scale(signal: edfio.EdfSignal | edfio.BdfSignal) -> float | None:
    """Microvolts of the channel's own unit; None where that is no voltage."""
    return _VOLTS.get(signal.physical_dimension.strip().casefold())


def _electrode(label: str) -> str:
    """An electrode's name out of an EDF label: `EEG Fp1-REF` and `Fp1.` are both Fp1."""
    name = label.removeprefix("EEG").strip(" .")
    return _REFERENCE.sub("", name) or label


def _unknown(path: Path, line: int) -> ConfigError:
    return ConfigError(
        f"recording {path}, line {line}: expected OpenBCI GUI text ('%OpenBCI Raw EXG Data'), Muse CSV"
        " ('timestamps,TP9,…'), EDF or BDF"
    )
