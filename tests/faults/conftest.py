"""Disks and folders for the fault rigs. The suite runs a bounded share of each; WARDLINK_LONG=1 the long form."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cloud_sync.conftest import bridge_settings  # noqa: F401 - a fixture
from tests.cloud_sync.conftest import chain as ward  # noqa: F401 - a fixture
from tests.faults.mount import MountedDisk, NoFuseError

MEMORY = Path("/dev/shm")


@pytest.fixture(scope="session")
def is_long() -> bool:
    """Whether the long form is asked for."""
    return bool(os.environ.get("WARDLINK_LONG"))


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """An empty folder in memory, where there is such a place."""
    if not MEMORY.is_dir():
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(prefix="wardlink-faults-", dir=MEMORY))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[MountedDisk]:
    """A recording disk, mounted for the test."""
    with contextlib.ExitStack() as mounted:
        try:
            yield mounted.enter_context(MountedDisk(tmp_path / "disk"))
        except NoFuseError as error:
            pytest.skip(f"NOT PROVEN HERE, what an outbox survives on a failing disk: no FUSE, {error}")
