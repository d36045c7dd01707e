from __future__ import annotations

import math
from typing import Any

import pytest

from gateway.signal.bands import (
    ALPHA,
    BANDS,
    DELTA,
    GAMMA,
    Band,
    FeatureSettings,
    check_stream,
    samples_in,
)


def test_bands_take_their_lower_edge_and_leave_their_upper() -> None:
    assert list(DELTA.bins()) == [1, 2, 3]
    assert list(ALPHA.bins()) == [8, 9, 10, 11, 12]
    assert GAMMA.bins()[-1] == 44
    assert [k for band in BANDS for k in band.bins()] == list(range(1, 45))


def test_edges_between_bins() -> None:
    assert list(Band("sigma", 11.5, 14.5).bins()) == [12, 13, 14]


@pytest.mark.parametrize(("low", "high"), [(0, 4), (8, 8), (13, 8), (30, 51), (8.2, 8.8), (math.nan, 4)])
def test_bands_without_meaning_are_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="band 'x'"):
        Band("x", low, high)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"bands": BANDS[::-1]}, "bands"),
        ({"bands": BANDS[:4]}, "bands"),
        ({"entropy_band": Band("entropy", 10, 11)}, "entropy band"),
        ({"power_time_constant_s": 0.1}, "power time constant"),
        ({"power_time_constant_s": math.nan}, "power time constant"),
        ({"coherence_time_constant_s": 1.0}, "coherence time constant"),
        ({"plv_window_s": 0.5}, "PLV window"),
        ({"plv_window_s": 3600.0}, "PLV window"),
    ],
)
def test_settings_without_meaning_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        FeatureSettings(**settings)


@pytest.mark.parametrize(("rate_hz", "channels"), [(99.9, 8), (2000.1, 8), (math.nan, 8), (250, 0), (250, 65)])
def test_streams_outside_the_definitions_are_refused(rate_hz: float, channels: int) -> None:
    with pytest.raises(ValueError, match=r"sampling rate|channels"):
        check_stream(rate_hz, channels)


def test_the_extremes_are_allowed() -> None:
    check_stream(100, 1)
    check_stream(2000, 64)


def test_a_duration_in_samples_rounds_halves_up() -> None:
    assert samples_in(0.5, 129.0) == 65
    assert samples_in(0.5, 256.0) == 128
    assert samples_in(1.0, 249.7) == 250
