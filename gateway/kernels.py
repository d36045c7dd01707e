"""Which implementation of each kernel runs: the compiled one, its plain twin only when told. The same for both sides.

The environment tells: WARDLINK_KERNELS=plain takes the twins, WARDLINK_KERNELS=baseline leaves out what only newer
machines have. Knows no kernel: each module that has one says by what names its compiled ones are imported.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from types import ModuleType

from gateway.errors import ConfigError

CHOICE = "WARDLINK_KERNELS"
"""The environment variable: `plain`, `baseline`, or nothing."""
COMPILED = "compiled"
BASELINE = "compiled baseline"
V3 = "compiled x86-64-v3"
PLAIN = "plain"

_CHOICES = {"": (V3, BASELINE, COMPILED), "baseline": (BASELINE, COMPILED), "plain": ()}
_failures: dict[str, str] = {}
"""Why a compiled module cannot be imported, by its name."""


def built(modules: Mapping[str, str]) -> dict[str, ModuleType]:
    """Those of some compiled modules, by kind, that were built and that this machine can run.

    A module that was not built for this machine has an `AVAILABLE` that is false.
    """
    found = {}
    for kind, name in modules.items():
        try:
            module = importlib.import_module(name)
        except ImportError as error:  # `check` tells the operator
            _failures[name] = str(error)
            continue
        if getattr(module, "AVAILABLE", True):
            found[kind] = module
    return found


def choose(modules: Mapping[str, str]) -> tuple[str, ModuleType | None]:
    """Which kind of a kernel is to run, and its module: `PLAIN` and None for the twin.

    `modules`: the names of its compiled modules by kind. Never fails: `check` does.
    """
    wanted = _CHOICES.get(_told(), _CHOICES[""])
    there = built({kind: modules[kind] for kind in wanted if kind in modules})
    return next(((kind, there[kind]) for kind in wanted if kind in there), (PLAIN, None))


def check(running: Mapping[str, str]) -> None:
    """Raise `ConfigError` where a twin runs without having been told to, or for an unknown choice.

    `running`: what `choose` said of each kernel, by its name.
    """
    if _told() not in _CHOICES:
        raise ConfigError(
            f"{CHOICE} is {_told()!r}, expected {' or '.join(repr(name) for name in _CHOICES if name)}, or nothing",
            hint="leave it out: the fastest kernels for this machine are taken",
        )
    missing = [name for name, kind in running.items() if kind == PLAIN]
    if missing and _told() != "plain":
        reasons = "".join(f"; {reason}" for reason in dict.fromkeys(_failures.values()))
        raise ConfigError(
            f"compiled kernels are missing from this installation: {', '.join(missing)}{reasons}",
            hint=f"install wardlink again with a C and C++ compiler there, or set {CHOICE}=plain to run far slower",
        )


def _told() -> str:
    return os.environ.get(CHOICE, "")
