"""Electrode impedance from what an electrode reads while the converter sends its test current through it.

Pure: arrays in, arrays out, sample-major.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

TEST_CURRENT_A = 6e-9
"""Amplitude that the Cyton is set to (ADS1299 data sheet, LOFF register: 6 nA)."""
TEST_CURRENT_HZ = 31.25
"""2.048 MHz / 2^16 (ADS1299 data sheet, AC lead-off detection), commonly called 31.2 Hz."""
SERIES_OHM = 2_200
"""The board's own resistor in series with every electrode."""
SECONDS_MIN = 1.0
"""With less, mains hum of the same size already moves the result by percents."""
CONVERTER_RATE_HZ = 250.0


def impedance_kohm(uv: NDArray[np.float64], rate_hz: float, *, averaged: int = 1) -> NDArray[np.float64]:
    """Impedance of n electrodes in kOhm: amplitude at 31.25 Hz by 6 nA, less the 2.2 kOhm of the board.

    `uv`: float64 (samples, n), microvolts with the test current on, at least a second; NaN gives NaN.
    `averaged`: each value is the mean of so many samples of the converter's 250 Hz (a Cyton with a Daisy: 2), which
    lowers the amplitude; that is undone. The amplitude is the correlation with a complex tone under a Hann window,
    which lets 50 and 60 Hz through by less than 1e-3. The converter's own roll-off (0.67 dB at 31 Hz) is left in, as
    in the OpenBCI GUI, so that figures compare: Z = V rms x sqrt(2) / 6 nA - 2.2 kOhm. Never below 0.
    Raises `ValueError` for less than a second.
    """
    count = uv.shape[0]
    if count < SECONDS_MIN * rate_hz:
        raise ValueError(f"{count} samples at {rate_hz:g} Hz, an impedance takes {SECONDS_MIN:g} s")
    window = np.hanning(count + 2)[1:-1]
    tone = np.exp(-2j * np.pi * TEST_CURRENT_HZ / rate_hz * np.arange(count)) * window
    centred = uv - uv.mean(axis=0)
    amplitude_uv: NDArray[np.float64] = 2 * np.abs(tone @ centred) / window.sum() / _passed(averaged)
    kohm: NDArray[np.float64] = np.maximum(amplitude_uv * 1e-6 / TEST_CURRENT_A - SERIES_OHM, 0.0) / 1000
    return kohm


def _passed(averaged: int) -> float:
    """What a mean over so many samples leaves of the tone's amplitude (Dirichlet kernel)."""
    half = np.pi * TEST_CURRENT_HZ / CONVERTER_RATE_HZ
    return float(np.sin(averaged * half) / (averaged * np.sin(half)))
