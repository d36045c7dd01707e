"""A stream of the lab streaming layer: the only file that knows the library `pylsl` (an extra).

A chunk is rows of float64, little-endian: the sample's time stamp in seconds of this host's LSL clock, which on Linux
is CLOCK_MONOTONIC, then its channels.
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from typing import Any

import numpy as np

from gateway.errors import ConfigError, UnavailableError
from gateway.links.polled import PolledLink

RESOLVE_S = 5.0
"""A stream that is there answers within a second."""
POLL_S = 0.05
POLL_SAMPLES_MAX = 4096
BUFFER_S = 60
"""What LSL itself keeps while nobody pulls."""
CHANNELS_MAX = 256
INSTALL_HINT = "pip install wardlink[lsl]; on ARM the library liblsl must be installed beside it"
LOST_HINT = "is the program that streams running, and in the same network?"


@dataclass(frozen=True, slots=True)
class LslStream:
    """What a stream says of itself."""

    name: str
    kind: str
    """Content type: EEG, ECG, …"""
    rate_hz: float
    """0: irregular."""
    channels: tuple[str, ...]
    """Labels; empty texts where the stream has none."""
    units: tuple[str, ...]
    source_id: str
    host: str


def find_streams(wait_s: float = 1.0) -> list[LslStream]:
    """All streams in the network with numbers in them, without labels and units. Blocks for this time."""
    library = _library()
    infos = library.resolve_streams(wait_s)
    return [_stream(info, detailed=False) for info in infos if _has_numbers(info)]


def describe_stream(name: str) -> LslStream:
    """Everything that the stream of this name says of itself. Blocks. Raises `UnavailableError`, `ConfigError`."""
    inlet = _open_inlet(name)
    try:
        return _stream(inlet.info(RESOLVE_S), detailed=True)
    finally:
        inlet.close_stream()


class LslLink(PolledLink):
    """A `Link` to the stream of this name."""

    def __init__(self, name: str, channel_count: int, rate_hz: float) -> None:
        """The stream must have so many channels and this nominal rate, for which its decoder is made."""
        super().__init__(f"LSL stream {name!r}", lambda: _Inlet(name, channel_count, rate_hz))


class _Inlet:
    """One subscription, see `gateway.links.polled.Source`."""

    def __init__(self, name: str, channel_count: int, rate_hz: float) -> None:
        self._stream_name = name
        self._channel_count = channel_count
        self._rate_hz = rate_hz
        self._inlet: Any = None

    def open(self) -> None:
        self._inlet = _open_inlet(self._stream_name)
        info = self._inlet.info(RESOLVE_S)
        count, rate_hz = info.channel_count(), info.nominal_srate()
        if count != self._channel_count or abs(rate_hz - self._rate_hz) > 1e-6 * self._rate_hz:
            raise UnavailableError(
                f"LSL stream {self._stream_name!r} has {count} channels at {rate_hz:g} Hz,"
                f" expected {self._channel_count} at {self._rate_hz:g} Hz",
                hint="set the device's channels and rate as the stream has them",
            )

    def poll(self) -> bytes:
        library = _library()
        try:
            samples, stamps = self._inlet.pull_chunk(timeout=POLL_S, max_samples=POLL_SAMPLES_MAX)
        except (library.util.LostError, RuntimeError) as error:
            raise UnavailableError(f"LSL stream {self._stream_name!r} was lost", hint=LOST_HINT) from error
        if not len(stamps):
            return b""
        rows = np.column_stack([np.asarray(stamps, dtype=np.float64), np.asarray(samples, dtype=np.float64)])
        return np.ascontiguousarray(rows, dtype="<f8").tobytes()

    def close(self) -> None:
        inlet, self._inlet = self._inlet, None
        if inlet is not None:
            inlet.close_stream()


def _open_inlet(name: str) -> Any:
    library = _library()
    infos = library.resolve_byprop("name", name, minimum=1, timeout=RESOLVE_S)
    if not infos:
        raise UnavailableError(f"no LSL stream is called {name!r}", hint=LOST_HINT)
    if not _has_numbers(infos[0]):
        raise ConfigError(f"LSL stream {name!r} holds texts or more than {CHANNELS_MAX} channels, expected numbers")
    try:
        # Without recovery a stream that ends is an error at once, and the gateway connects anew by its own rules.
        inlet = library.StreamInlet(
            infos[0], max_buflen=BUFFER_S, recover=False, processing_flags=library.proc_clocksync
        )
        inlet.open_stream(RESOLVE_S)
    except (library.util.LostError, library.util.TimeoutError, RuntimeError) as error:
        raise UnavailableError(f"LSL stream {name!r} cannot be opened: {error}", hint=LOST_HINT) from error
    return inlet


def _has_numbers(info: Any) -> bool:
    library = _library()
    return bool(info.channel_format() != library.cf_string and 0 < info.channel_count() <= CHANNELS_MAX)


def _stream(info: Any, *, detailed: bool) -> LslStream:
    count = info.channel_count()
    labels = (info.get_channel_labels() if detailed else None) or [None] * count
    units = (info.get_channel_units() if detailed else None) or [None] * count
    return LslStream(
        info.name(),
        info.type(),
        float(info.nominal_srate()),
        tuple(label or "" for label in labels),
        tuple(unit or "" for unit in units),
        info.source_id(),
        info.hostname(),
    )


@functools.cache
def _library() -> types.ModuleType:
    """The module pylsl with its shared library. Raises `ConfigError`."""
    try:
        import pylsl  # noqa: PLC0415 - an extra
    except (ImportError, RuntimeError, OSError) as error:
        # It raises RuntimeError where liblsl itself is not found.
        raise ConfigError(f"pylsl cannot be used: {error}", hint=INSTALL_HINT) from error
    module: types.ModuleType = pylsl
    return module
