"""A stand-in for the program bluetoothctl, of which BLE libraries ask only its version before they use BlueZ."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VERSION = "5.82"


@contextmanager
def bluetoothctl_stub() -> Iterator[Path]:
    """Put a stub first in this process's PATH and give its folder, for the PATH of other processes. Blocking."""
    path_before = os.environ.get("PATH", "")
    with tempfile.TemporaryDirectory(prefix="wardlink-bluetoothctl-") as name:
        folder = Path(name)
        program = folder / "bluetoothctl"
        program.write_text(f'#!/bin/sh\necho "bluetoothctl: {VERSION}"\n', encoding="utf-8")
        program.chmod(0o755)
        os.environ["PATH"] = f"{folder}{os.pathsep}{path_before}"
        try:
            yield folder
        finally:
            os.environ["PATH"] = path_before
