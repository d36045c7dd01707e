"""The features as all others use them: the fastest implementation that `gateway.kernels` allows here."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from gateway import kernels
from gateway.kernels import BASELINE, PLAIN, V3
from gateway.signal import numpy_features
from gateway.signal.state import UV_MAX, Features, WindowFeatures

__all__ = [
    "IMPLEMENTATION",
    "UV_MAX",
    "FeatureEngine",
    "Features",
    "WindowAnalysis",
    "WindowFeatures",
    "implementations",
]

_MODULES = {V3: "gateway.signal._features_v3", BASELINE: "gateway.signal._features"}


def implementations() -> dict[str, ModuleType]:
    """Every implementation that was built and that this machine can run, by name, fastest first; the twin is the last.

    Each is a module with a `FeatureEngine` and a `WindowAnalysis`.
    """
    return {**kernels.built(_MODULES), PLAIN: numpy_features}


IMPLEMENTATION, _compiled = kernels.choose(_MODULES)
"""Which implementation of the features runs."""
if TYPE_CHECKING:
    from gateway.signal.numpy_features import FeatureEngine, WindowAnalysis
else:
    _module = _compiled or numpy_features
    FeatureEngine = _module.FeatureEngine
    WindowAnalysis = _module.WindowAnalysis
