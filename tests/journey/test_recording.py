"""A real recording through the whole chain: what comes out is what went in, once, with its tags."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gateway.samples import BRAIN_STATE_FIELDS, BRAIN_STATE_PERIOD_NS
from gateway.virtual.recordings import load_recording
from wardlink.demo.account import settle
from wardlink.demo.chain import BINDING_TAGS, BUCKET, Chain

ELECTRODES = ("Fp1", "Fp2", "C3", "C4", "P7", "P8", "O1", "O2")
SECONDS = 20
RATE_HZ = 250
HALF_COUNT_UV = 4.5e6 / 24 / (2**23 - 1) / 2
ROUNDING_UV = 0.005
"""The file gives hundredths of a microvolt."""
TAGS = {"patient_id", "device_id", "stream_id", "org_id", "signal_type", *BINDING_TAGS}


def points(chain: Chain, measurement: str) -> list[dict[str, Any]]:
    """All points of a measurement, in order of time, as they are read back."""
    series = chain.servers.influxdb.query(f'SELECT * FROM "{measurement}" ORDER BY time', BUCKET)
    return [dict(zip(found["columns"], values, strict=True)) for found in series for values in found["values"]]


@pytest.mark.timeout(180)
def test_recording_arrives_once_and_exact(
    chain_folder: Path,
    recording: Path,
    eventually: Callable[..., None],
    accepted: Callable[[Chain, str], int],
) -> None:
    with Chain(chain_folder, recording=recording) as chain:
        eventually(lambda: accepted(chain, "eeg") >= SECONDS * RATE_HZ, "20 s of EEG accepted")
        books = asyncio.run(settle(chain))
        eeg, states, vitals = (points(chain, name) for name in ("eeg", "brain_state", "vital_signs"))

    assert set(books.streams) == {("CYTON-1", "eeg"), ("CYTON-1", "brain_state"), ("STRAP-1", "vital_signs")}
    for key, stream in books.streams.items():
        assert stream.produced == stream.committed == stream.points > 0, key
        assert (stream.lost, stream.parked, stream.duplicates) == (0, 0, 0), key
    assert books.dead_letters == 0
    assert len(eeg) == books.of("CYTON-1", "eeg").produced >= SECONDS * RATE_HZ

    played = load_recording(recording).uv[: len(eeg)]
    stored = np.array([[point[name] for name in ELECTRODES] for point in eeg])
    assert np.abs(stored - played).max() <= HALF_COUNT_UV + ROUNDING_UV
    assert {point["quality"] for point in eeg} == {0}
    steps = np.diff([point["time"] for point in eeg])
    assert np.abs(steps - 1e9 / RATE_HZ).max() < 1e9 / RATE_HZ / 100

    times = np.array([point["time"] for point in states])
    assert (np.diff(times) == BRAIN_STATE_PERIOD_NS).all()
    powers = np.array([[point[name] for name in BRAIN_STATE_FIELDS[:5]] for point in states])
    assert np.abs(powers.sum(axis=1) - 1).max() <= 1e-6
    assert len(states) >= (SECONDS - 2) * 5

    for point in (*eeg, *states, *vitals):
        assert {tag for tag in TAGS if point.get(tag)} == TAGS
        assert all(point[tag] == value for tag, value in BINDING_TAGS.items())
    rates = [point["heart_rate"] for point in vitals if point["heart_rate"] is not None]
    assert rates
    assert all(isinstance(rate, int) and 40 < rate < 120 for rate in rates)
