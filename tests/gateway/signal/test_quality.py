from __future__ import annotations

import numpy as np
import pytest

from gateway.signal.quality import quality_bits, railed, unusable


def test_only_the_ends_of_the_range_are_railed() -> None:
    counts = np.array([[8_388_607, 8_388_606], [-8_388_608, -8_388_607], [0, 1]], dtype=np.int32)
    assert railed(counts).tolist() == [[True, False], [True, False], [False, False]]


def test_another_converter_has_another_range() -> None:
    assert railed(np.array([[0, 4095, 2048]], dtype=np.int32), (0, 4095)).tolist() == [[True, True, False]]


def test_bit_k_stands_for_electrode_k() -> None:
    bad = np.zeros((4, 8), dtype=np.bool_)
    bad[1, 0] = bad[2, 7] = bad[3, 2] = bad[3, 3] = True
    quality = quality_bits(bad)
    assert quality.dtype == np.int64
    assert quality.tolist() == [0, 1, 128, 12]


@pytest.mark.parametrize("channels", [1, 8, 63])
def test_bits_and_back(channels: int) -> None:
    bad = np.random.default_rng(channels).random((500, channels)) < 0.3
    bad[0] = True
    quality = quality_bits(bad)
    assert quality.tolist() == [sum(1 << k for k in range(channels) if row[k]) for row in bad]
    assert (unusable(quality, channels) == bad).all()


def test_electrodes_beyond_the_63rd_have_no_bit() -> None:
    bad = np.ones((2, 64), dtype=np.bool_)
    quality = quality_bits(bad)
    assert quality.tolist() == [2**63 - 1] * 2
    assert unusable(quality, 64)[0].tolist() == [True] * 63 + [False]
