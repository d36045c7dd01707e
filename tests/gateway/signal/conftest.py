"""Recordings, and an engine that is fed as the acquisition feeds it: cut at each 0.2 s of the stream's own time."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from edfio import read_edf
from numpy.typing import NDArray

from gateway.kernels import PLAIN
from gateway.signal.bands import DEFAULT_SETTINGS, FeatureSettings
from gateway.signal.features import FeatureEngine, Features, implementations

RECORDINGS = Path(__file__).parents[3].parent / "shared" / "data"

Floats = NDArray[np.float64]
Run = Callable[..., list[Features | None]]


def _recording(name: str) -> Path:
    path = RECORDINGS / name
    if not path.exists():
        pytest.skip(f"NOT TESTED on a real recording: {path} is absent")
    return path


@pytest.fixture(scope="session")
def cyton() -> tuple[Floats, float]:
    """OpenBCI Cyton, 8 channels, 250 Hz, 90 s: blinks and jaw, then alpha on channels 7 and 8 from 30 s on."""
    path = _recording("cyton/cyton_v6_blinks_jaw_alpha.txt")
    return np.loadtxt(path, delimiter=",", comments="%", skiprows=5, usecols=range(1, 9)), 250.0


@pytest.fixture(scope="session")
def muse() -> tuple[Floats, float]:
    """Muse, 4 channels, 256 Hz, 120 s."""
    path = _recording("muse/muse2016_P300_s1_2017-02-04.csv")
    return np.loadtxt(path, delimiter=",", skiprows=1, usecols=range(1, 5)), 256.0


@pytest.fixture(scope="session")
def eegmmidb() -> tuple[dict[str, Floats], float]:
    """64 channels by name, 160 Hz, 60 s, eyes open."""
    recording = read_edf(_recording("eeg_edf/eegmmidb_S001R01.edf"))
    signals = recording.signals
    return {signal.label.strip("."): signal.data for signal in signals}, signals[0].sampling_frequency


@pytest.fixture(params=list(implementations()))
def implementation(request: pytest.FixtureRequest) -> str:
    """The name of each implementation of the features that this machine can run."""
    return str(request.param)


@pytest.fixture
def engine_type(implementation: str) -> type[FeatureEngine]:
    """Each implementation of the features."""
    found: type[FeatureEngine] = implementations()[implementation].FeatureEngine
    return found


@pytest.fixture
def exact(implementation: str) -> float:
    """How near to each other two values are that are equal by definition: float64 or float32."""
    return 1e-9 if implementation == PLAIN else 5e-7


@pytest.fixture
def run(engine_type: type[FeatureEngine]) -> Run:
    """Feed samples (n, channels) in steps; returns the state of each step."""

    def feed(
        uv: Floats,
        rate_hz: float,
        settings: FeatureSettings = DEFAULT_SETTINGS,
        bad: NDArray[np.bool_] | NDArray[np.int64] | None = None,
        engine: FeatureEngine | None = None,
    ) -> list[Features | None]:
        engine = engine or engine_type(rate_hz, uv.shape[1], settings)
        states = []
        start = 0
        for step in range(1, math.floor(uv.shape[0] / rate_hz / 0.2 + 1e-9) + 1):
            stop = math.ceil(step * 0.2 * rate_hz - 1e-9)
            engine.push(uv[start:stop], None if bad is None else bad[start:stop])
            states.append(engine.step())
            start = stop
        return states

    return feed
