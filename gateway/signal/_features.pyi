import numpy as np
from numpy.typing import NDArray

from gateway.signal.bands import FeatureSettings
from gateway.signal.state import Features, WindowFeatures

class FeatureEngine:
    def __init__(self, rate_hz: float, channel_count: int, settings: FeatureSettings = ...) -> None: ...
    @property
    def latency_s(self) -> float: ...
    def reset(self) -> None: ...
    def push(self, uv: NDArray[np.float64], bad: NDArray[np.bool_] | NDArray[np.int64] | None = None) -> None: ...
    def step(self) -> Features | None: ...

class WindowAnalysis:
    def __init__(
        self,
        rate_hz: float,
        channel_count: int,
        sample_count: int,
        settings: FeatureSettings = ...,
        *,
        with_pairs: bool = True,
    ) -> None: ...
    def analyse(self, uv: NDArray[np.float64]) -> WindowFeatures: ...
