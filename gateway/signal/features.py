"""Which implementation of the features runs: the compiled one that fits this machine, the numpy twin only when told.

The environment tells: WARDLINK_FEATURES=numpy takes the twin, WARDLINK_FEATURES=baseline leaves out what only newer
machines have.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import TYPE_CHECKING

from gateway.errors import ConfigError
from gateway.signal import numpy_features
from gateway.signal.state import UV_MAX, Features, WindowFeatures

__all__ = [
    "CHOICE",
    "IMPLEMENTATION",
    "UV_MAX",
    "FeatureEngine",
    "Features",
    "WindowAnalysis",
    "WindowFeatures",
    "check_choice",
    "implementations",
]

CHOICE = "WARDLINK_FEATURES"
"""The environment variable: `numpy`, `baseline`, or nothing."""
V3 = "compiled x86-64-v3"
BASELINE = "compiled baseline"
NUMPY = "numpy"

_MODULES = {V3: "gateway.signal._features_v3", BASELINE: "gateway.signal._features"}
_CHOICES = {"": (V3, BASELINE, NUMPY), "baseline": (BASELINE, NUMPY), "numpy": (NUMPY,)}


def implementations() -> dict[str, ModuleType]:
    """Every implementation that was built and that this machine can run, by name, fastest first.

    Each is a module with a `FeatureEngine` and a `WindowAnalysis`.
    """
    found = {}
    for name, path in _MODULES.items():
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError:  # not built: `check_choice` says so to the operator
            continue
        if getattr(module, "AVAILABLE", True):
            found[name] = module
    return {**found, NUMPY: numpy_features}


def check_choice() -> None:
    """Raise `ConfigError` where the numpy twin would run without having been told to, or for an unknown choice."""
    choice = os.environ.get(CHOICE, "")
    if choice not in _CHOICES:
        raise ConfigError(
            f"{CHOICE} is {choice!r}, expected {' or '.join(repr(name) for name in _CHOICES if name)}, or nothing",
            hint="leave it out: the fastest implementation for this machine is taken",
        )
    if IMPLEMENTATION == NUMPY and choice != NUMPY:
        raise ConfigError(
            "the compiled features are missing from this installation, expected gateway.signal._features",
            hint=f"install wardlink again with a C compiler there, or set {CHOICE}=numpy to run 100 times slower",
        )


def _choose(choice: str) -> tuple[str, ModuleType]:
    there = implementations()
    return next((name, there[name]) for name in _CHOICES.get(choice, _CHOICES[""]) if name in there)


IMPLEMENTATION, _module = _choose(os.environ.get(CHOICE, ""))
"""Which implementation of the features runs."""
if TYPE_CHECKING:
    from gateway.signal.numpy_features import FeatureEngine, WindowAnalysis
else:
    FeatureEngine = _module.FeatureEngine
    WindowAnalysis = _module.WindowAnalysis
