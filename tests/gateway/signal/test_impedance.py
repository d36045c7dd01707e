"""Impedance from the test current."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from gateway.signal.impedance import SERIES_OHM, TEST_CURRENT_HZ, impedance_kohm


def reading(kohm: float, rate_hz: float, seconds: float = 2.0, phase: float = 0.3) -> NDArray[np.float64]:
    """Microvolts of one electrode with the test current on, by Ohm's law."""
    times_s = np.arange(round(seconds * rate_hz)) / rate_hz
    return 6e-9 * (kohm * 1000 + SERIES_OHM) * 1e6 * np.sin(2 * np.pi * TEST_CURRENT_HZ * times_s + phase)


@pytest.mark.parametrize("seconds", [1.0, 1.37, 5.0])
def test_ohms_law(seconds: float) -> None:
    uv = np.column_stack([reading(kohm, 250.0, seconds) for kohm in (0.0, 5.0, 50.0, 1000.0)])
    assert impedance_kohm(uv, 250.0) == pytest.approx([0.0, 5.0, 50.0, 1000.0], rel=1e-3, abs=1e-3)


def test_offset_and_hum_do_not_count() -> None:
    times_s = np.arange(500) / 250
    clean = reading(10.0, 250.0)
    disturbed = clean + 40_000 + 60 * np.sin(2 * np.pi * 50 * times_s) + 60 * np.sin(2 * np.pi * 60 * times_s)
    # 60 uV stand for 10 kOhm: a hum as large as the signal moves it by less than half a percent.
    assert impedance_kohm(disturbed[:, None], 250.0) == pytest.approx([10.0], abs=0.05)


def test_the_mean_of_two_samples_of_a_daisy_is_undone() -> None:
    full = reading(20.0, 250.0, 4.0)
    means = ((full[1:] + full[:-1]) / 2)[::2]
    assert impedance_kohm(means[:, None], 125.0, averaged=2) == pytest.approx([20.0], rel=1e-3)
    assert impedance_kohm(means[:, None], 125.0)[0] < 18.5


def test_nothing_to_read_is_no_negative_impedance() -> None:
    assert impedance_kohm(np.zeros((250, 1)), 250.0).tolist() == [0.0]


def test_no_value_gives_no_value() -> None:
    uv = np.column_stack([reading(10.0, 250.0), reading(10.0, 250.0)])
    uv[17, 0] = np.nan
    first, second = impedance_kohm(uv, 250.0)
    assert np.isnan(first)
    assert second == pytest.approx(10.0, rel=1e-3)


def test_too_little_is_refused() -> None:
    with pytest.raises(ValueError, match="1 s"):
        impedance_kohm(np.zeros((249, 1)), 250.0)
