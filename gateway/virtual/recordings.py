"""Recordings that virtual devices play: read from OpenBCI GUI text, Muse CSV and EDF/BDF, and fitted to a Cyton.

Rows are taken as they follow in the file. Knows no device's packets and no clock.
"""

from __future__ import annotations

import re
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import edfio
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
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

CYTON_RATE_HZ = 250
CYTON_CHANNELS_MAX = 8
CYTON_MONTAGE = ("Fp1", "Fp2", "C3", "C4", "P7", "P8", "O1", "O2")
"""The usual places of a Cyton's eight electrodes."""
DAISY_MONTAGE = (*CYTON_MONTAGE, "F7", "F8", "F3", "F4", "T7", "T8", "P3", "P4")
"""The usual places of the sixteen electrodes of a Cyton with a Daisy."""
MUSE_RATE_HZ = 256.0

FILTER_PERIODS = 48
"""Half length of the resampling filter in samples of the slower side: flat to 0.1 % up to 88 % of Nyquist."""
FILTER_BETA = 8.0
"""Kaiser window: 80 dB of stop band."""
FILTER_CUTOFF = 0.94
"""Of the lower Nyquist frequency, so that the stop band begins there."""
PHASES_MAX = 1000
"""Bound of the rational ratio of two rates, and with it of the filter table."""
BLOCK_ROWS = 4096

_VOLTS = {"uv": 1.0, "µv": 1.0, "μv": 1.0, "mv": 1e3, "v": 1e6, "nv": 1e-3}
_GUI_RATE = re.compile(r"^%\s*Sample Rate\s*=\s*([0-9.]{1,12})\s*Hz", re.IGNORECASE)
_GUI_CHANNELS = re.compile(r"^%\s*Number of channels\s*=\s*([0-9]{1,3})\s*$", re.IGNORECASE)
_REFERENCE = re.compile(r"-(REF|LE|AR|AVG|CAR)$", re.IGNORECASE)
_ACCELERATION_AXES = 3


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """EEG of n consecutive samples. The arrays are read-only.

    `uv`: float64 (n, channels), microvolts, finite. `acceleration_g`: float64 (n, 3), X Y Z, where there is any.
    """

    channel_names: tuple[str, ...]
    rate_hz: float
    uv: NDArray[np.float64]
    acceleration_g: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        rows, channels = self.uv.shape
        if rows == 0 or channels == 0 or channels != len(self.channel_names):
            raise ValueError(f"{rows} rows of {channels} channels, {len(self.channel_names)} names")
        if not RATE_HZ_MIN <= self.rate_hz <= RATE_HZ_MAX:
            raise ValueError(f"sampling rate {self.rate_hz} Hz")
        if self.acceleration_g is not None and self.acceleration_g.shape != (rows, _ACCELERATION_AXES):
            raise ValueError(f"acceleration has shape {self.acceleration_g.shape}, expected ({rows}, 3)")
        for name in ("uv", "acceleration_g"):
            values = getattr(self, name)
            if values is not None:
                view = values.view()
                view.flags.writeable = False
                object.__setattr__(self, name, view)

    def __len__(self) -> int:
        return int(self.uv.shape[0])

    @property
    def seconds(self) -> float:
        """How long it plays."""
        return len(self) / self.rate_hz


def load_recording(path: Path | str) -> Recording:
    """Read a recording; what it is, is told by its content (EDF, BDF) or its first line (texts).

    Raises `ConfigError` with file, line and what was expected, for anything that is not a whole, sound recording.
    """
    path = Path(path)
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


def fit_to_cyton(recording: Recording, channels_max: int = CYTON_CHANNELS_MAX) -> Recording:
    """The recording as a Cyton can play it: at 250 Hz, one to eight channels, with a Daisy sixteen.

    Channels: if all places of the usual montage are there, these in its order; else the first ones of the file.
    A recording at 250 Hz keeps its values exactly; another rate is resampled with a polyphase filter, acceleration
    by holding the newest value.
    """
    columns = _chosen_channels(recording.channel_names, channels_max)
    names = tuple(recording.channel_names[column] for column in columns)
    uv = recording.uv[:, columns]
    if recording.rate_hz == CYTON_RATE_HZ:
        return Recording(names, recording.rate_hz, uv, recording.acceleration_g)
    resampled = resample(uv, recording.rate_hz, CYTON_RATE_HZ)
    acceleration_g = recording.acceleration_g
    if acceleration_g is not None:
        newest = np.arange(len(resampled)) * (recording.rate_hz / CYTON_RATE_HZ)
        acceleration_g = acceleration_g[np.minimum(newest.astype(np.int64), len(recording) - 1)]
    return Recording(names, float(CYTON_RATE_HZ), resampled, acceleration_g)


def resample(values: NDArray[np.float64], from_hz: float, to_hz: float) -> NDArray[np.float64]:
    """Resample (n, channels) by a rational ratio; sample 0 stays at its time, and nothing is delayed.

    Windowed-sinc polyphase filter (Crochiere & Rabiner 1983, section 2.3) of unit gain at 0 Hz in every phase. The
    ends are continued by point reflection, so that an electrode's offset of tens of millivolts does not ring.
    """
    ratio = Fraction(to_hz).limit_denominator(PHASES_MAX) / Fraction(from_hz).limit_denominator(PHASES_MAX)
    ratio = ratio.limit_denominator(PHASES_MAX)
    up, down = ratio.numerator, ratio.denominator
    half = int(np.ceil(FILTER_PERIODS * max(1.0, down / up)))
    bank = _filter_bank(up, half, min(1.0, up / down) * FILTER_CUTOFF)
    padded = _reflected(values, half)
    count = (len(values) - 1) * up // down + 1
    resampled = np.empty((count, values.shape[1]))
    windows = sliding_window_view(padded, 2 * half + 1, axis=0)
    for start in range(0, count, BLOCK_ROWS):
        position = np.arange(start, min(start + BLOCK_ROWS, count)) * down
        taken = windows[position // up]
        resampled[start : start + BLOCK_ROWS] = np.einsum("nct,nt->nc", taken, bank[position % up])
    return resampled


def _filter_bank(phases: int, half: int, cutoff: float) -> NDArray[np.float64]:
    """(phases, 2 half + 1): the filter seen from an output that lies phase / phases after an input sample."""
    offset = np.arange(-half, half + 1)[None, :] - np.arange(phases)[:, None] / phases
    window = np.i0(FILTER_BETA * np.sqrt(np.clip(1 - (offset / (half + 1)) ** 2, 0, None)))
    bank: NDArray[np.float64] = np.sinc(offset * cutoff) * window
    bank /= bank.sum(axis=1, keepdims=True)
    return bank


def _reflected(values: NDArray[np.float64], by: int) -> NDArray[np.float64]:
    before = 2 * values[0] - values[np.clip(np.arange(by, 0, -1), 0, len(values) - 1)]
    after = 2 * values[-1] - values[np.clip(len(values) - 2 - np.arange(by), 0, len(values) - 1)]
    return np.concatenate([before, values, after])


def _chosen_channels(names: Sequence[str], channels_max: int) -> list[int]:
    places = {name.casefold(): column for column, name in reversed(list(enumerate(names)))}
    wanted = [name.casefold() for name in DAISY_MONTAGE[:channels_max]]
    if all(name in places for name in wanted):
        return [places[name] for name in wanted]
    return list(range(min(len(names), channels_max)))


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


def _load_text(path: Path) -> Recording:
    lines = _lines(path)
    number, first = next(lines, (1, ""))
    if first.startswith("%"):
        return _load_gui(path, first, lines)
    if first.split(",")[0].strip().casefold() in ("timestamps", "timestamp"):
        return _load_muse(path, first, lines)
    raise _unknown(path, number)


def _load_gui(path: Path, first: str, lines: Iterator[tuple[int, str]]) -> Recording:
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
        rows = _rows(path, lines, eeg + axes)
    else:
        # Before version 5 no names: the sample index, the channels, the three axes.
        eeg, axes = list(range(1, channels + 1)), list(range(channels + 1, channels + 1 + _ACCELERATION_AXES))
        axes = axes if len(columns) > axes[-1] else []
        rows = _rows(path, _again(number, line, lines), eeg + axes)
    acceleration_g = rows[:, channels:].copy() if len(axes) == _ACCELERATION_AXES else None
    names = tuple(f"EXG {number}" for number in range(1, channels + 1))
    return Recording(names, rate_hz, rows[:, :channels].copy(), acceleration_g)


def _load_muse(path: Path, first: str, lines: Iterator[tuple[int, str]]) -> Recording:
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
    return Recording(tuple(names[column] for column in eeg), MUSE_RATE_HZ, rows[:, 1:].copy())


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


def _load_edf(path: Path, read: Callable[[Path], edfio.Edf | edfio.Bdf]) -> Recording:
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
    return Recording(names, float(rate_hz), uv)


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
