"""Synthetic headset: the features that it claims, found by an independent spectrum."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.signal import welch

from gateway.errors import ConfigError
from gateway.virtual.recordings import CYTON_MONTAGE, Recording
from gateway.virtual.synthetic import EYES_PERIOD_S, HUM_HZ, eyes_closed, synthetic_headset

RATE_HZ = 250


@pytest.fixture(scope="module")
def minute() -> Recording:
    return synthetic_headset(60.0, seed=5)


def channel(recording: Recording, name: str, *, closed: bool) -> NDArray[np.float64]:
    """One electrode's microvolts while the eyes are closed or open, without the changes."""
    times_s = np.arange(len(recording)) / RATE_HZ
    settled = times_s % EYES_PERIOD_S > 1
    wanted = np.array([eyes_closed(time_s) == closed for time_s in times_s])
    return recording.uv[settled & wanted, recording.channel_names.index(name)]


def power(uv: NDArray[np.float64], low_hz: float, high_hz: float) -> float:
    frequency_hz, density = welch(uv, RATE_HZ, nperseg=2 * RATE_HZ)
    return float(density[(frequency_hz >= low_hz) & (frequency_hz <= high_hz)].sum() * 0.5)


def test_the_same_seed_gives_the_same_person() -> None:
    assert np.array_equal(synthetic_headset(5.0, seed=3).uv, synthetic_headset(5.0, seed=3).uv)
    assert not np.array_equal(synthetic_headset(5.0, seed=3).uv, synthetic_headset(5.0, seed=4).uv)


def test_shape() -> None:
    recording = synthetic_headset(30.0)
    assert recording.channel_names == CYTON_MONTAGE
    assert recording.uv.shape == (7500, 8)
    assert recording.rate_hz == RATE_HZ
    assert np.isfinite(recording.uv).all()
    assert synthetic_headset(2.0, electrodes=("Fz", "Oz"), rate_hz=256).uv.shape == (512, 2)


def test_amplitudes_are_those_of_a_head(minute: Recording) -> None:
    assert ((minute.uv.std(axis=0) > 5) & (minute.uv.std(axis=0) < 40)).all()
    assert np.abs(minute.uv).max() < 300


def test_alpha_waxes_with_closed_eyes_and_is_posterior(minute: Recording) -> None:
    closed, opened = channel(minute, "O1", closed=True), channel(minute, "O1", closed=False)
    assert power(closed, 8, 13) > 10 * power(opened, 8, 13)
    assert power(closed, 8, 13) > 5 * power(channel(minute, "Fp1", closed=True), 8, 13)
    assert power(closed, 8, 13) / power(closed, 1, 45) > 0.6
    frequency_hz, density = welch(closed, RATE_HZ, nperseg=2 * RATE_HZ)
    assert 9 <= frequency_hz[density.argmax()] <= 11


def test_the_background_falls_with_frequency(minute: Recording) -> None:
    uv = channel(minute, "C3", closed=False)
    assert power(uv, 1, 4) > power(uv, 13, 30) > 0
    # 1/f: the same power in each octave, within the scatter of 30 s.
    assert 0.5 < power(uv, 16, 30) / power(uv, 2, 4) < 2


def test_hum(minute: Recording) -> None:
    uv = channel(minute, "C3", closed=False)
    assert power(uv, HUM_HZ - 1, HUM_HZ + 1) > 10 * power(uv, HUM_HZ + 3, HUM_HZ + 5)


def test_blinks_are_frontal_and_need_open_eyes(minute: Recording) -> None:
    assert channel(minute, "Fp1", closed=False).max() > 80
    assert channel(minute, "Fp1", closed=True).max() < 60
    assert channel(minute, "O1", closed=False).max() < 60


@pytest.mark.parametrize("seconds", [0.0, -1.0, 1e9, float("nan")])
def test_impossible_length(seconds: float) -> None:
    with pytest.raises(ConfigError, match="expected 1 to 3600"):
        synthetic_headset(seconds)
