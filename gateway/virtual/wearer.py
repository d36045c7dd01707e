"""Whoever wears a virtual headset, as far as its other sensors see: pulse, head position and its small movements.

A seeded model of time alone (seconds since the start); knows no device and no packets. Ask in the order of time.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gateway.virtual.strap import BREATHING_PERIOD_S, Heart

PULSE_RISE_S = 0.12
PULSE_NOTCH_S = 0.33
PULSE_NOTCH_SHARE = 0.25
PULSE_SECONDS = 2.0
"""After so long nothing is left of a beat."""
UPRIGHT_G = (0.12, 0.04, 0.99)
BREATHING_G = 0.008
BREATHING_DEG_PER_S = 0.6
ACCELERATION_NOISE_G = 0.003
GYRO_NOISE_DEG_PER_S = 0.25
GYRO_OFFSET_DEG_PER_S = (1.1, -0.7, 0.4)
"""What a cheap gyroscope shows at rest."""


class Wearer:
    """The same seed is the same person."""

    def __init__(self, seed: int) -> None:
        self._heart = Heart(seed)
        self._beats_s: list[float] = []
        self._noise = {kind: np.random.default_rng((seed, kind)) for kind in range(2)}

    def pulse(self, times_s: NDArray[np.float64]) -> NDArray[np.float64]:
        """Pulse wave in the skin at these ascending times, (n,): 0 between beats, some 1 at a beat's peak."""
        self._beats_s += self._heart.beats_until(float(times_s[-1]))
        self._beats_s = [beat for beat in self._beats_s if beat > times_s[0] - PULSE_SECONDS]
        wave = np.zeros_like(times_s)
        for beat_s in self._beats_s:
            since_s = np.maximum(times_s - beat_s, 0)
            wave += since_s / PULSE_RISE_S * np.exp(1 - since_s / PULSE_RISE_S)
            notch_s = np.maximum(since_s - PULSE_NOTCH_S, 0)
            wave += PULSE_NOTCH_SHARE * notch_s / PULSE_RISE_S * np.exp(1 - notch_s / PULSE_RISE_S)
        return wave

    def acceleration_g(self, times_s: NDArray[np.float64]) -> NDArray[np.float64]:
        """X, Y, Z in g, (n, 3): gravity, breathing, noise."""
        breathing = BREATHING_G * np.sin(2 * np.pi * times_s / BREATHING_PERIOD_S)
        noise = self._noise[0].normal(0, ACCELERATION_NOISE_G, (len(times_s), 3))
        return np.array(UPRIGHT_G) + breathing[:, None] * (1.0, 0.3, -0.1) + noise

    def gyro_deg_per_s(self, times_s: NDArray[np.float64]) -> NDArray[np.float64]:
        """X, Y, Z in degrees/s, (n, 3): the sensor's own offset, breathing, noise."""
        breathing = BREATHING_DEG_PER_S * np.cos(2 * np.pi * times_s / BREATHING_PERIOD_S)
        noise = self._noise[1].normal(0, GYRO_NOISE_DEG_PER_S, (len(times_s), 3))
        return np.array(GYRO_OFFSET_DEG_PER_S) + breathing[:, None] * (0.2, 1.0, 0.1) + noise
