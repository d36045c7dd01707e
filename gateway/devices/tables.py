"""Samples that come as rows of numbers: what libraries and files give instead of a device's own bytes.

The bytes between such a link and its decoder are float64, little-endian, row after row. Pure.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gateway.devices.base import Samples, SignalSpec
from gateway.samples import QUALITY, QUALITY_BITS, Column

ROWS_DTYPE = np.dtype("<f8")
COUNTS_MAX = 2**31 - 1

RESOLUTIONS = {"uV": 1e-3, "mV": 1e-6, "[g]": 1e-6, "deg/s": 1e-4}
"""Size of a count by unit: finer than any device's own, and room enough (2 V, 2000 g) for all of them."""
OTHER_RESOLUTION = 1e-3

UNITS = {
    "microvolts": ("uV", 1.0),
    "microvolt": ("uV", 1.0),
    "uv": ("uV", 1.0),
    "µv": ("uV", 1.0),
    "μv": ("uV", 1.0),
    "millivolts": ("uV", 1e3),
    "mv": ("uV", 1e3),
    "volts": ("uV", 1e6),
    "volt": ("uV", 1e6),
    "v": ("uV", 1e6),
    "g": ("[g]", 1.0),
    "[g]": ("[g]", 1.0),
    "m/s^2": ("[g]", 1 / 9.80665),
    "m/s2": ("[g]", 1 / 9.80665),
    "deg/s": ("deg/s", 1.0),
    "dps": ("deg/s", 1.0),
}
"""As labs write them -> UCUM, and by what to multiply."""
STREAM_SIGNALS = {
    "eeg": "eeg",
    "ecg": "ecg",
    "ekg": "ecg",
    "ppg": "ppg",
    "acc": "acceleration",
    "accelerometer": "acceleration",
    "gyro": "gyro",
    "gyroscope": "gyro",
    "aux": "aux",
    "vital_signs": "vital_signs",
}
"""The content type of an LSL or XDF stream (lower case) -> the signal's name here."""
DEFAULT_UNITS = {"eeg": "uV", "ecg": "uV", "acceleration": "[g]", "gyro": "deg/s"}
"""What a stream without units is taken to be in, by signal: the XDF wiki's recommendation for EEG is microvolts."""


def rows_of(data: bytes, width: int) -> NDArray[np.float64] | None:
    """float64 (n, width), or None for bytes that are no whole rows."""
    if not data or len(data) % (width * ROWS_DTYPE.itemsize):
        return None
    return np.frombuffer(data, dtype=ROWS_DTYPE).reshape(-1, width)


def bytes_of(rows: NDArray[np.float64]) -> bytes:
    """The inverse of `rows_of`."""
    return np.ascontiguousarray(rows, dtype=ROWS_DTYPE).tobytes()


def samples_of(spec: SignalSpec, index: int, values: NDArray[np.float64], arrival_ns: int) -> Samples:
    """Samples from values (n, channels) in the signal's own units, rounded to counts of `RESOLUTIONS`.

    What is no number, or too large to be one, reads 0 and has its bit in `quality` set.
    """
    scales = {
        name: RESOLUTIONS.get(unit, OTHER_RESOLUTION) for name, unit in zip(spec.channels, spec.units, strict=True)
    }
    with np.errstate(over="ignore", invalid="ignore"):
        counts = np.rint(values / np.array([scales[name] for name in spec.channels]))
    bad = ~(np.abs(counts) <= COUNTS_MAX)
    counts = np.where(bad, 0, counts).astype(np.int32)
    columns: dict[str, Column] = {name: counts[:, place].copy() for place, name in enumerate(spec.channels)}
    held = bad[:, :QUALITY_BITS]
    columns[QUALITY] = held.astype(np.int64) @ np.left_shift(np.int64(1), np.arange(held.shape[1], dtype=np.int64))
    return Samples(spec.signal, index, columns, arrival_ns, scales)


def channel_name(text: str, place: int) -> str:
    """A field name of at most 40 characters out of what a file or a library calls a channel: letters, digits, ._:-."""
    name = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._:-") else "_" for letter in text)
    name = name.strip("_.:-")[:40]
    return name or f"ch{place + 1}"


def channel_names(texts: list[str]) -> tuple[str, ...]:
    """Field names of all channels, each different from the others."""
    names: list[str] = []
    for place, text in enumerate(texts):
        name = channel_name(text, place)
        names.append(name if name not in names and name != QUALITY else f"{name}_{place + 1}")
    return tuple(names)
