"""Reads XDF, what LabRecorder writes: the streams with a fixed rate and a signal that is known here. Needs pyxdf."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError

import numpy as np
from numpy.typing import NDArray

from gateway.devices import tables
from gateway.devices.base import SignalSpec
from gateway.errors import ConfigError
from gateway.recording_files import RATE_HZ_MAX, RATE_HZ_MIN, index_of_times
from gateway.samples import NS_PER_S, VITAL_SIGNS

CHANNELS_MAX = 256

XdfTrack = tuple[SignalSpec, NDArray[np.int64], NDArray[np.float64], int]
"""Signal, sample numbers (n,), values (n, channels) in its units, ns from the recording's beginning to sample 0."""


def read_xdf(path: Path) -> list[XdfTrack]:
    """The streams of a file, clocks synchronised and jitter removed by pyxdf. Blocks.

    Of several streams of one signal the one with the most samples is taken. Raises `ConfigError`, also where pyxdf
    is not installed.
    """
    try:
        import pyxdf  # noqa: PLC0415 - an extra
    except ImportError:
        raise ConfigError(
            f"recording {path} is XDF, and pyxdf is not installed", hint="pip install wardlink[xdf]"
        ) from None
    try:
        streams, _ = pyxdf.load_xdf(str(path), verbose=False)
    except (ValueError, KeyError, IndexError, EOFError, ParseError, struct.error, TypeError) as error:
        raise ConfigError(f"recording {path} is not sound XDF: {error}") from error
    chosen: dict[str, Mapping[str, Any]] = {}
    for stream in streams:
        signal = _signal_of(stream)
        if signal and (signal not in chosen or len(stream["time_stamps"]) > len(chosen[signal]["time_stamps"])):
            chosen[signal] = stream
    if not chosen:
        kinds = Counter(_text(stream["info"], "type") or "?" for stream in streams)
        raise ConfigError(
            f"recording {path}: expected a stream of type {', '.join(sorted(tables.STREAM_SIGNALS))}"
            f" with a fixed rate, found {', '.join(kinds) or 'none'}"
        )
    begin_s = min(float(stream["time_stamps"][0]) for stream in chosen.values())
    return [_track(signal, stream, begin_s) for signal, stream in chosen.items()]


def _signal_of(stream: Mapping[str, Any]) -> str | None:
    """The signal's name; None for streams that are not played: markers, texts, without a rate, empty."""
    rate_hz, values = _rate(stream), stream["time_series"]
    usable = isinstance(values, np.ndarray) and values.ndim == 2 and 0 < values.shape[1] <= CHANNELS_MAX
    if not RATE_HZ_MIN <= rate_hz <= RATE_HZ_MAX or not usable or not len(stream["time_stamps"]):
        return None
    signal = tables.STREAM_SIGNALS.get((_text(stream["info"], "type") or "").casefold())
    return None if signal == VITAL_SIGNS else signal


def _rate(stream: Mapping[str, Any]) -> float:
    try:
        return float(_text(stream["info"], "nominal_srate") or 0)
    except ValueError:
        return 0.0


def _track(signal: str, stream: Mapping[str, Any], begin_s: float) -> XdfTrack:
    values = np.asarray(stream["time_series"], dtype=np.float64)
    labels, units = [], []
    for channel in _channels(stream["info"], values.shape[1]):
        labels.append(_text(channel, "label") or "")
        units.append(_text(channel, "unit") or "")
    known = [tables.UNITS.get(unit.casefold(), (tables.DEFAULT_UNITS.get(signal, "1"), 1.0)) for unit in units]
    rate_hz = _rate(stream)
    spec = SignalSpec(signal, rate_hz, tables.channel_names(labels), tuple(unit for unit, _ in known))
    times_s = np.asarray(stream["time_stamps"], dtype=np.float64)
    offset_ns = round((float(times_s[0]) - begin_s) * NS_PER_S)
    return spec, index_of_times(times_s, rate_hz), values * np.array([factor for _, factor in known]), offset_ns


def _channels(info: Mapping[str, Any], count: int) -> Iterator[Mapping[str, Any]]:
    """The descriptions of the channels, empty ones where there are none; every level of XDF's XML is a list."""
    node: Any = info
    for name in ("desc", "channels"):
        node = (node.get(name) or [{}])[0] if isinstance(node, Mapping) else {}
    described = node.get("channel") or [] if isinstance(node, Mapping) else []
    for place in range(count):
        channel = described[place] if place < len(described) else {}
        yield channel if isinstance(channel, Mapping) else {}


def _text(node: Mapping[str, Any], name: str) -> str | None:
    found = node.get(name)
    text = found[0] if isinstance(found, list) and found else found
    return text.strip() if isinstance(text, str) else None
