"""Recordings that virtual devices play: read from a file, and fitted to a Cyton.

Rows are taken as they follow in the file. Knows no device's packets and no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from gateway import recording_files
from gateway.recording_files import ACCELERATION_AXES, RATE_HZ_MAX, RATE_HZ_MIN, read_recording

CYTON_RATE_HZ = 250
CYTON_CHANNELS_MAX = 8
CYTON_MONTAGE = ("Fp1", "Fp2", "C3", "C4", "P7", "P8", "O1", "O2")
"""The usual places of a Cyton's eight electrodes."""
DAISY_MONTAGE = (*CYTON_MONTAGE, "F7", "F8", "F3", "F4", "T7", "T8", "P3", "P4")
"""The usual places of the sixteen electrodes of a Cyton with a Daisy."""
MUSE_RATE_HZ = recording_files.MUSE_RATE_HZ

FILTER_PERIODS = 48
"""Half length of the resampling filter in samples of the slower side: flat to 0.1 % up to 88 % of Nyquist."""
FILTER_BETA = 8.0
"""Kaiser window: 80 dB of stop band."""
FILTER_CUTOFF = 0.94
"""Of the lower Nyquist frequency, so that the stop band begins there."""
PHASES_MAX = 1000
"""Bound of the rational ratio of two rates, and with it of the filter table."""
BLOCK_ROWS = 4096


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
        if self.acceleration_g is not None and self.acceleration_g.shape != (rows, ACCELERATION_AXES):
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
    """Read a recording (see `gateway.recording_files`). Raises `ConfigError` for anything that is not a sound one."""
    recorded = read_recording(Path(path))
    return Recording(recorded.channel_names, recorded.rate_hz, recorded.uv, recorded.acceleration_g)


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
