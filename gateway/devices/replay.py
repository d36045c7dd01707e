"""A recording as a device: what a file holds, cut into parts with their times, and the decoder of these parts.

`load` reads the file once, at the start; parts and decoder are pure. A link plays the parts at their times and knows
nothing of their content. Text, EDF and XDF give rows of numbers, an NMEA log is given out as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gateway.devices import tables
from gateway.devices.base import Decoder, Event, Missing, Rejected, SignalSpec, Streaming
from gateway.devices.gps import GpsDecoder
from gateway.devices.xdf import read_xdf
from gateway.errors import ConfigError
from gateway.links.base import Chunk
from gateway.recording_files import FILE_BYTES_MAX, read_recording
from gateway.samples import EEG, NS_PER_S

PART_NS = NS_PER_S // 20
"""Length of a part: what a device with a fast link gives at a time."""
INDEX_MAX = 2**53
"""Beyond this a float64 does not hold every number."""
HEAD_BYTES = 4096
EPOCH_S_MAX = 60.0
"""Between two reports of a GPS log; a longer pause is played as one second."""

_NMEA = re.compile(rb"\$[A-Z]{2}(?:RMC|GGA|GSA|GSV|GNS|TXT|VTG|DTM),")
_EPOCH = re.compile(rb"\$..(?:RMC|GGA),(\d\d)(\d\d)(\d\d(?:\.\d+)?),")


@dataclass(frozen=True, slots=True, eq=False)
class Track:
    """One signal of a recording.

    `index`: int64 (n,), number of each sample, lost ones counted. `values`: float64 (n, channels), in `spec.units`.
    `offset_ns`: when sample 0 was, after the recording's beginning.
    """

    spec: SignalSpec
    index: NDArray[np.int64]
    values: NDArray[np.float64]
    offset_ns: int = 0


@dataclass(frozen=True, slots=True)
class Replay:
    """A recording that can be played any number of times."""

    name: str
    signals: Sequence[SignalSpec]
    duration_ns: int
    parts: Callable[[], Iterator[Chunk]]
    """Makes the parts in order of time; `arrival_ns` counts from the recording's beginning."""
    new_decoder: Callable[[], Decoder] = field(repr=False)


def load(path: Path | str) -> Replay:
    """Read OpenBCI text, Muse CSV, EDF, BDF, XDF or an NMEA log; which it is, its content tells. Blocks.

    Raises `ConfigError` for anything that is not a whole, sound recording.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        if size > FILE_BYTES_MAX:
            raise ConfigError(f"recording {path} has {size} bytes, expected at most {FILE_BYTES_MAX}")
        if head.startswith(b"XDF:"):
            return _of_tracks(path, [Track(*track) for track in read_xdf(path)])
        if _NMEA.search(head):
            return _of_log(path, path.read_bytes())
    except OSError as error:
        raise ConfigError(f"recording {path} cannot be read: {error.strerror or error}") from error
    return _of_tracks(path, _eeg_tracks(path))


def _eeg_tracks(path: Path) -> list[Track]:
    recorded = read_recording(path)
    names = tables.channel_names(list(recorded.channel_names))
    eeg = SignalSpec(EEG, recorded.rate_hz, names, ("uV",) * len(names))
    tracks = [Track(eeg, recorded.index, recorded.uv)]
    if recorded.acceleration_g is not None:
        motion = SignalSpec("acceleration", recorded.rate_hz, ("x", "y", "z"), ("[g]",) * 3)
        tracks.append(Track(motion, recorded.index, recorded.acceleration_g))
    return tracks


def _of_tracks(path: Path, tracks: Sequence[Track]) -> Replay:
    specs = [track.spec for track in tracks]
    duration_ns = max(int(_times_ns(track)[-1]) for track in tracks)
    return Replay(str(path), specs, duration_ns, lambda: _parts(tracks), lambda: ReplayDecoder(specs))


def _times_ns(track: Track) -> NDArray[np.int64]:
    assert track.spec.rate_hz is not None
    times: NDArray[np.int64] = np.rint(track.index * (NS_PER_S / track.spec.rate_hz)).astype(np.int64) + track.offset_ns
    return times


def _parts(tracks: Sequence[Track]) -> Iterator[Chunk]:
    """Of every track what falls into the next 50 ms, at the time of its last sample."""
    times = [_times_ns(track) for track in tracks]
    done = [0] * len(tracks)
    while True:
        due = [int(own[at]) for own, at in zip(times, done, strict=True) if at < len(own)]
        if not due:
            return
        until_ns = min(due) + PART_NS
        for number, (track, own) in enumerate(zip(tracks, times, strict=True)):
            start, stop = done[number], int(np.searchsorted(own, until_ns))
            if stop > start:
                rows = np.column_stack([track.index[start:stop].astype(np.float64), track.values[start:stop]])
                yield Chunk(tables.bytes_of(rows), int(own[stop - 1]), track.spec.signal)
                done[number] = stop


def _of_log(path: Path, log: bytes) -> Replay:
    parts = _epochs(log)
    signals = GpsDecoder().signals
    return Replay(str(path), signals, parts[-1].arrival_ns, lambda: iter(parts), GpsDecoder)


def _epochs(log: bytes) -> list[Chunk]:
    """The log cut where the receiver's time changes; times from the sentences."""
    parts: list[Chunk] = []
    begin, at_ns = 0, 0
    last: float | None = None
    for found in _EPOCH.finditer(log):
        hours, minutes, seconds = found.groups()
        time_s = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
        if last is not None and time_s != last:
            parts.append(Chunk(log[begin : found.start()], at_ns))
            begin = found.start()
            pause_s = time_s - last if 0 < time_s - last <= EPOCH_S_MAX else 1.0
            at_ns += round(pause_s * NS_PER_S)
        last = time_s
    return [*parts, Chunk(log[begin:], at_ns)]


class ReplayDecoder:
    """Decoder of the parts of a recording: rows of sample number and values; numbers that jump are losses."""

    def __init__(self, signals: Sequence[SignalSpec]) -> None:
        self._signals = tuple(signals)
        self._specs = {spec.signal: spec for spec in self._signals}
        self._next_index: dict[str, int] = {}

    @property
    def signals(self) -> Sequence[SignalSpec]:
        """What the file holds."""
        return self._signals

    def start(self) -> list[Event]:
        """A recording waits for nothing."""
        return [Streaming()]

    def receive(self, chunk: Chunk) -> list[Event]:
        """Decode a part of one signal, which `chunk.channel` names."""
        spec = self._specs.get(chunk.channel)
        rows = None if spec is None else tables.rows_of(chunk.data, 1 + len(spec.channels))
        if spec is None or rows is None or not (np.abs(rows[:, 0]) <= INDEX_MAX).all():
            return [Rejected(len(chunk.data), f"no rows of a signal {chunk.channel!r}")]
        events: list[Event] = []
        numbers = rows[:, 0].astype(np.int64)
        cuts = [0, *(np.flatnonzero(np.diff(numbers) != 1) + 1).tolist(), len(rows)]
        for start, stop in pairwise(cuts):
            first = int(numbers[start])
            expected = self._next_index.get(spec.signal, 0)
            if first < expected:
                events.append(Rejected((stop - start) * rows.itemsize * rows.shape[1], "numbers that go back"))
                continue
            if first > expected:
                events.append(Missing(spec.signal, expected, first - expected))
            events.append(tables.samples_of(spec, first, rows[start:stop, 1:], chunk.arrival_ns))
            self._next_index[spec.signal] = first + stop - start
        return events
