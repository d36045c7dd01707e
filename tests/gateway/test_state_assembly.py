"""Brain states of streams of any rate: one every 200 ms of the stream's own time, of the samples that belong to it."""

from __future__ import annotations

import math
from dataclasses import astuple
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from gateway.assembly import RawAssembler
from gateway.clock import HostClock
from gateway.devices.base import Samples, SignalSpec
from gateway.samples import BRAIN_STATE, BRAIN_STATE_FIELDS, BRAIN_STATE_PERIOD_NS, EEG, NS_PER_S, SampleBlock
from gateway.signal.bands import DEFAULT_SETTINGS
from gateway.signal.features import FeatureEngine

CHANNELS = ("C3", "C4")
SECONDS = 10
BURST = 7
FLOAT32 = 1e-6


@pytest.mark.parametrize("rate_hz", [100.0, 128.0, 160.0, 173.0, 249.7, 250.0, 256.0, 512.0, 1000.0, 2000.0])
def test_a_state_every_200_ms_of_the_streams_own_time(rate_hz: float) -> None:
    uv = 20 * np.random.default_rng(4).standard_normal((round(SECONDS * rate_hz), len(CHANNELS)))
    items: list[Any] = []
    assembler = RawAssembler(
        "E-1",
        SignalSpec(EEG, rate_hz, CHANNELS, ("uV",) * len(CHANNELS)),
        0,
        HostClock(lambda: 0, lambda: 1_700_000_000 * NS_PER_S + 77_000_001),
        items.append,
        brain_state=DEFAULT_SETTINGS,
    )
    for index in range(0, len(uv), BURST):
        part = uv[index : index + BURST]
        columns = {name: part[:, k].copy() for k, name in enumerate(CHANNELS)}
        assembler.take(Samples(EEG, index, columns, round((index + len(part)) / rate_hz * NS_PER_S)))
    assembler.finish()

    blocks = [item for item in items if isinstance(item, SampleBlock)]
    states = [block for block in blocks if block.signal == BRAIN_STATE]
    times_ns = np.concatenate([block.times_ns for block in states])
    assert (np.diff(times_ns) == BRAIN_STATE_PERIOD_NS).all()
    assert len(times_ns) in {5 * SECONDS - 5, 5 * SECONDS - 4}

    # The same values come from an engine that is given, for each state, what was sampled up to half a second after it.
    sample_times_ns = np.concatenate([block.times_ns for block in blocks if block.signal == EEG])
    ends = np.searchsorted(sample_times_ns, times_ns + NS_PER_S // 2, side="right")
    assert all(abs(stop - start - rate_hz / 5) <= 1 for start, stop in pairwise(ends.tolist()))
    found = [np.concatenate([block.columns[name] for block in states]) for name in BRAIN_STATE_FIELDS]
    engine = FeatureEngine(rate_hz, len(CHANNELS))
    engine.push(uv[: ends[0]])
    for number, (start, stop) in enumerate(pairwise([ends[0], *ends.tolist()])):
        engine.push(uv[start:stop])
        state = engine.step()
        assert state is not None
        values = [column[number] for column in found]
        np.testing.assert_allclose(values[:5], astuple(state)[:5], rtol=0, atol=FLOAT32)
        assert math.isnan(values[5]) == math.isnan(state.coherence)
