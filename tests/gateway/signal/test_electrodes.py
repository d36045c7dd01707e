"""One word and a reason for each electrode."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from gateway.signal.electrodes import Electrode, ElectrodeState, electrode_states
from gateway.signal.quality import quality_bits

RATE_HZ = 250.0


def eeg(rms_uv: float = 15.0, count: int = 250) -> NDArray[np.float64]:
    return np.random.default_rng(5).normal(0.0, rms_uv, count)


def sine(hz: float, rms_uv: float, rate_hz: float = RATE_HZ) -> NDArray[np.float64]:
    wave: NDArray[np.float64] = rms_uv * np.sqrt(2) * np.sin(2 * np.pi * hz * np.arange(round(rate_hz)) / rate_hz)
    return wave


def judge(uv: NDArray[np.float64], bad: NDArray[np.bool_] | None = None, rate_hz: float = RATE_HZ) -> Electrode:
    unusable = np.zeros(uv.shape[0], dtype=np.bool_) if bad is None else bad
    (found,) = electrode_states(uv[:, np.newaxis], quality_bits(unusable[:, np.newaxis]), rate_hz)
    return found


@pytest.mark.parametrize("rate_hz", [125.0, 250.0, 256.0])
def test_ordinary_eeg_is_ok_whatever_its_offset_and_drift(rate_hz: float) -> None:
    count = round(rate_hz)
    found = judge(eeg(count=count) + sine(10.0, 30.0, rate_hz) - 12_000 + np.linspace(0, 900, count), rate_hz=rate_hz)
    assert (found.state, found.reason) == (ElectrodeState.OK, "")
    assert found.rms_uv == pytest.approx(np.hypot(15, 30), rel=0.15)


@pytest.mark.parametrize("hz", [50.0, 50.4, 60.0])
def test_mains_is_noise_once_it_is_most_of_what_is_heard(hz: float) -> None:
    found = judge(eeg() + sine(hz, 40.0))
    assert found.state is ElectrodeState.NOISY
    assert found.reason.startswith(f"{hz:.0f} Hz mains: ")
    assert judge(eeg() + sine(hz, 10.0)).state is ElectrodeState.OK
    assert judge(eeg() + sine(44.0, 40.0)).state is ElectrodeState.OK


def test_a_slow_stream_hears_no_mains() -> None:
    assert judge(eeg(count=100), rate_hz=100.0).state is ElectrodeState.OK


def test_movement_is_noise() -> None:
    found = judge(eeg(260.0))
    assert found.state is ElectrodeState.NOISY
    assert "uV rms" in found.reason
    assert judge(eeg(150.0)).state is ElectrodeState.OK


def test_flat() -> None:
    assert judge(np.full(250, -37.5)) == Electrode(ElectrodeState.FLAT, "always the same value", 0.0)
    found = judge(np.full(250, 1e5) + 0.2 * (np.arange(250) % 2))
    assert (found.state, found.reason) == (ElectrodeState.FLAT, "0.20 uV p-p")
    assert judge(0.3 * np.where(np.arange(250) % 2, 1.0, -1.0)).state is ElectrodeState.OK


def test_railed_comes_before_flat_and_says_how_much() -> None:
    bad = np.arange(250) < 25
    found = judge(np.full(250, 187_500.0), bad)
    assert (found.state, found.reason) == (ElectrodeState.RAILED, "10 % of the samples at the end of the range")
    assert np.isnan(found.rms_uv)


def test_what_says_nothing_is_unknown() -> None:
    uv = eeg()
    assert judge(uv[:7]).state is ElectrodeState.UNKNOWN
    uv[3] = np.nan
    assert judge(uv).state is ElectrodeState.UNKNOWN


def test_each_electrode_has_its_own_bit() -> None:
    uv = np.stack([eeg(), np.zeros(250), eeg(), eeg() + sine(50.0, 100.0)], axis=1)
    bad = np.zeros((250, 4), dtype=np.bool_)
    bad[100, 2] = True
    states = [each.state.value for each in electrode_states(uv, quality_bits(bad), RATE_HZ)]
    assert states == ["ok", "flat", "railed", "noisy"]


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="expected"):
        electrode_states(np.zeros(250), np.zeros(250, np.int64), RATE_HZ)
    with pytest.raises(ValueError, match="expected"):
        electrode_states(np.zeros((250, 2)), np.zeros(249, np.int64), RATE_HZ)
