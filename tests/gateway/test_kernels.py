"""Which implementation of each kernel runs, what the services say of it, and a build without a compiler."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from cloud_sync import app as cloud_app
from cloud_sync import line_protocol
from gateway import app as gateway_app
from gateway import kernels
from gateway.devices import packets
from gateway.errors import ConfigError
from gateway.kernels import BASELINE, COMPILED, PLAIN, V3
from gateway.signal import features
from gateway.wire import packing

ROOT = Path(__file__).parents[2]
MODULES = [features, packets, packing, line_protocol]
MISSING = {COMPILED: "gateway.no_such_kernel"}

HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name in {"gateway.wire._packing", "cloud_sync._line_protocol"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
from wardlink.cli import main
sys.exit(main(sys.argv[1:]))
"""

BUILD = """
import json, sys
from setuptools import Extension, setup
options = {key.replace("-", "_"): value for key, value in json.loads(sys.argv[1]).items()}
setup(name="one", ext_modules=[Extension(**options)], script_args=["build_ext", "--force", "--build-lib", "built"])
"""


def again(module: ModuleType) -> ModuleType:
    """The module as it would be in a process with the present environment."""
    assert module.__spec__ is not None
    assert module.__spec__.loader is not None
    fresh = importlib.util.module_from_spec(module.__spec__)
    module.__spec__.loader.exec_module(fresh)
    return fresh


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_the_choice(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    there = {V3, BASELINE} & set(features.implementations())
    for told, expected in (
        ("", {V3} & there or {BASELINE}),
        ("baseline", {BASELINE}),
        ("plain", {PLAIN}),
    ):
        monkeypatch.setenv(kernels.CHOICE, told)
        running = again(module).IMPLEMENTATION
        assert running in (expected if module is features or told == "plain" else {COMPILED})
        kernels.check({"one": running})


def test_every_kernel_is_built_here_and_both_services_name_theirs() -> None:
    assert BASELINE in features.implementations()
    assert gateway_app.IMPLEMENTATIONS.keys() == {"features", "packets", "packing"}
    assert cloud_app.IMPLEMENTATIONS.keys() == {"line protocol", "packing"}
    for running in (gateway_app.IMPLEMENTATIONS, cloud_app.IMPLEMENTATIONS):
        kernels.check(running)
        assert PLAIN not in running.values()


def test_an_unknown_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.CHOICE, "fast")
    with pytest.raises(ConfigError, match="WARDLINK_KERNELS is 'fast', expected 'baseline' or 'plain', or nothing"):
        kernels.check({"packing": COMPILED})


def test_a_twin_only_runs_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(kernels.CHOICE, raising=False)
    assert kernels.choose(MISSING) == (PLAIN, None)
    with pytest.raises(ConfigError, match=r"missing from this installation: packing; .*gateway\.no_such_kernel"):
        kernels.check({"packets": COMPILED, "packing": PLAIN})
    monkeypatch.setenv(kernels.CHOICE, "plain")
    kernels.check({"packets": PLAIN, "packing": PLAIN})


@pytest.mark.parametrize(
    ("side", "text", "missing"),
    [
        ("gateway", '[gateway]\nid = "g"\nstate_dir = "{}"\n[mqtt]\nhost = "localhost"\ntls = false\n', "packing"),
        ("cloud", '[bridge]\nstate_dir = "{}"\n[influx]\norg = "o"\n', "line protocol, packing"),
    ],
)
def test_a_service_without_its_kernels_does_not_start(tmp_path: Path, side: str, text: str, missing: str) -> None:
    config = tmp_path / "config.toml"
    config.write_text(text.format(tmp_path))
    environment = {name: value for name, value in os.environ.items() if name != kernels.CHOICE}
    command = [sys.executable, "-c", HIDE, side, "run", "--config", str(config)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert ended.returncode == 2
    assert f"compiled kernels are missing from this installation: {missing}; No module named" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_missing_compiler_fails_the_build(tmp_path: Path) -> None:
    modules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    assert len(modules) == 5
    assert not any("optional" in module for module in modules)
    smallest = next(module for module in modules if module["name"] == "gateway.wire._packing")
    shutil.copytree(ROOT / "ext", tmp_path / "ext")

    def built(compiler: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "CC": compiler}
        command = [sys.executable, "-c", BUILD, json.dumps(smallest)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=100, env=environment, cwd=tmp_path, check=False
        )

    without = built("/nonexistent/cc")
    assert without.returncode != 0
    assert "/nonexistent/cc" in without.stderr
    assert not list(tmp_path.rglob("*.so"))
    control = built("cc")
    assert control.returncode == 0, control.stderr
    assert list(tmp_path.rglob("*.so"))
