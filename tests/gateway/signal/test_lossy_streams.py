"""Brain states of a stream that loses packets: how many there are, and how near to those of the same stream whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gateway import state_assembly
from gateway.assembly import RawAssembler
from gateway.clock import HostClock
from gateway.devices.base import Missing, Samples, SignalSpec
from gateway.samples import BRAIN_STATE, BRAIN_STATE_FIELDS, EEG, NS_PER_S, QUALITY, SampleBlock
from gateway.signal import bridging
from gateway.signal.bands import DEFAULT_SETTINGS

Floats = NDArray[np.float64]
Lost = NDArray[np.bool_]
"""Which packets are lost, (packets, channels)."""
LOST_SHARE = 0.01
CYTON_PACKET = 1
MUSE_PACKET = 12
CYTON_SAMPLES = 12_000
"""Of the recording: blinks, jaw, and 18 s of alpha."""
COHERENCE, PLV = BRAIN_STATE_FIELDS.index("coherence"), BRAIN_STATE_FIELDS.index("plv")


def all_channels(packets: int, channels: int) -> Lost:
    return np.repeat(np.random.default_rng(1).random((packets, 1)) < LOST_SHARE, channels, axis=1)


def each_channel(packets: int, channels: int) -> Lost:
    return np.random.default_rng(1).random((packets, channels)) < LOST_SHARE


def states(uv: Floats, rate_hz: float, lost: Lost) -> dict[int, Floats]:
    """Time -> state of a device whose packets hold `len(uv) / len(lost)` samples; lost channels have a quality bit."""
    channels, size = uv.shape[1], len(uv) // len(lost)
    names = tuple(f"E{k}" for k in range(channels))
    spec = SignalSpec(EEG, rate_hz, names, ("uV",) * channels)
    items: list[Any] = []
    assembler = RawAssembler(
        "E-1",
        spec,
        0,
        HostClock(lambda: 0, lambda: 1_700_000_000 * NS_PER_S),
        items.append,
        brain_state=DEFAULT_SETTINGS,
    )
    for packet, gone in enumerate(lost):
        first = packet * size
        if gone.all():
            assembler.take(Missing(EEG, first, size))
            continue
        part = np.where(gone, 0.0, uv[first : first + size])
        columns: dict[str, Any] = {name: part[:, k].copy() for k, name in enumerate(names)}
        columns[QUALITY] = np.full(size, int(gone @ (1 << np.arange(channels))), np.int64)
        assembler.take(Samples(EEG, first, columns, round((first + size) / rate_hz * NS_PER_S)))
    assembler.finish()
    blocks = [item for item in items if isinstance(item, SampleBlock) and item.signal == BRAIN_STATE]
    return {
        int(time_ns): np.array([block.columns[name][row] for name in BRAIN_STATE_FIELDS])
        for block in blocks
        for row, time_ns in enumerate(block.times_ns)
    }


@dataclass(frozen=True)
class Compared:
    """A stream with losses beside itself without."""

    share: float
    """Grid points with a state, of those that have one in the whole stream."""
    coherent: float
    """The same for those with coherence and PLV."""
    off: Floats
    """Median absolute difference of each field; NaN where the stream with losses never has it."""


def compare(recording: tuple[Floats, float], packet: int, pattern: Callable[[int, int], Lost]) -> Compared:
    uv, rate_hz = recording
    uv = uv[: len(uv) // packet * packet]
    lost = pattern(len(uv) // packet, uv.shape[1])
    whole, lossy = states(uv, rate_hz, np.zeros_like(lost)), states(uv, rate_hz, lost)
    assert set(lossy) <= set(whole), "a state stands off the grid of the whole stream"
    both = [COHERENCE, PLV]
    coherent = [sum(bool(np.isfinite(row[both]).all()) for row in each.values()) for each in (lossy, whole)]
    off = np.abs([lossy[time_ns] - whole[time_ns] for time_ns in lossy])
    medians = [np.median(column[np.isfinite(column)]) if np.isfinite(column).any() else np.nan for column in off.T]
    return Compared(len(lossy) / len(whole), coherent[0] / coherent[1], np.array(medians))


def assert_held(found: Compared, off_max: float) -> None:
    assert found.share == 1
    assert found.coherent == 1
    assert (found.off < off_max).all(), found.off.tolist()


@pytest.fixture
def nothing_bridged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything begins anew after every loss."""
    monkeypatch.setattr(bridging, "BRIDGE_S", 0.0)
    monkeypatch.setattr(state_assembly, "GAP_S_MAX", 0.0)


@pytest.fixture
def no_hum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gaps become a straight line and nothing else."""
    monkeypatch.setattr(bridging, "HUM_SHARE_MIN", float("inf"))


def white(rate_hz: float, channels: int) -> tuple[Floats, float]:
    return 20 * np.random.default_rng(3).standard_normal((round(60 * rate_hz), channels)), rate_hz


def test_one_percent_of_a_cytons_packets(cyton: tuple[Floats, float]) -> None:
    assert_held(compare((cyton[0][:CYTON_SAMPLES], cyton[1]), CYTON_PACKET, all_channels), 0.01)


def test_one_percent_of_a_muses_packets_of_each_electrode(muse: tuple[Floats, float]) -> None:
    assert_held(compare(muse, MUSE_PACKET, each_channel), 0.02)


def test_one_percent_of_a_muses_packets_of_all_electrodes(muse: tuple[Floats, float]) -> None:
    assert_held(compare(muse, MUSE_PACKET, all_channels), 0.01)


def test_one_percent_of_noise() -> None:
    assert_held(compare(white(250.0, 8), CYTON_PACKET, all_channels), 0.01)
    assert_held(compare(white(256.0, 4), MUSE_PACKET, each_channel), 0.015)


@pytest.mark.usefixtures("nothing_bridged")
def test_control_with_nothing_bridged_a_cyton_has_next_to_no_state(cyton: tuple[Floats, float]) -> None:
    found = compare((cyton[0][:CYTON_SAMPLES], cyton[1]), CYTON_PACKET, all_channels)
    assert found.share < 0.2
    assert found.coherent == 0


@pytest.mark.usefixtures("nothing_bridged")
def test_control_with_nothing_bridged_a_muse_has_next_to_no_coherence(muse: tuple[Floats, float]) -> None:
    assert compare(muse, MUSE_PACKET, each_channel).coherent < 0.3


@pytest.mark.usefixtures("no_hum")
def test_control_a_straight_line_through_hum_is_heard_in_every_band(cyton: tuple[Floats, float]) -> None:
    found = compare((cyton[0][:CYTON_SAMPLES], cyton[1]), CYTON_PACKET, all_channels)
    assert found.share == 1
    assert found.off[BRAIN_STATE_FIELDS.index("delta")] > 0.03
    assert found.off[BRAIN_STATE_FIELDS.index("entropy")] > 0.03


@pytest.mark.parametrize("rate_hz", [100.0, 125.0, 250.0, 256.0, 1000.0])
def test_hum_goes_on_through_a_gap_at_any_rate(rate_hz: float) -> None:
    """Also where it lies above half the rate, and is heard as another frequency."""
    time_s = np.arange(round(rate_hz)) / rate_hz
    uv = (1_000 + 50 * time_s + 300 * np.sin(2 * np.pi * 60 * time_s) + 200 * np.sin(2 * np.pi * 50 * time_s + 1))[
        :, None
    ]
    count, start = int(bridging.BRIDGE_S * rate_hz), len(uv) - 5 - int(bridging.BRIDGE_S * rate_hz)
    bridge = bridging.GapBridge(rate_hz, 1)
    good = np.zeros(uv.shape, np.bool_)
    bridge.push(uv[:start], good[:start])
    bridge.miss(count)
    filled = bridge.push(uv[start + count :], good[start + count :])
    np.testing.assert_allclose(filled.uv, uv[start:], rtol=0, atol=1e-6)
