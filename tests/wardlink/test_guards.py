"""The suite's own guards can fail: blocking calls in an event loop, and processes that a test leaves behind."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from blockbuster import BlockingError

from wardlink.servers.process import write_private

CONFTEST = Path(__file__).parents[1] / "conftest.py"

LEAVING = """
import subprocess

def test_leaves_an_orphan(tmp_path):
    script = f"sleep 300 & echo $! > {tmp_path}/../pid"
    subprocess.run(["sh", "-c", script], check=True, stdout=subprocess.DEVNULL)
"""


async def test_a_blocking_call_in_the_loop_raises(tmp_path: Path) -> None:
    with pytest.raises(BlockingError):
        write_private(tmp_path / "file", "content")


def test_a_call_outside_of_a_loop_may_block(tmp_path: Path) -> None:
    write_private(tmp_path / "file", "content")
    assert (tmp_path / "file").read_text() == "content"


def test_a_run_that_leaves_a_process_fails_and_kills_it(tmp_path: Path) -> None:
    shutil.copy(CONFTEST, tmp_path)
    (tmp_path / "test_leaving.py").write_text(LEAVING)
    options = ["-p", "no:cacheprovider", "--rootdir", tmp_path, "--basetemp", tmp_path / "temp", "-c", "/dev/null"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, tmp_path],
        capture_output=True,
        text=True,
        check=False,
        cwd=CONFTEST.parents[1],
    )
    pid = int((tmp_path / "temp" / "pid").read_text())
    assert "1 passed, 1 error" in run.stdout
    assert f"{pid}: sleep 300" in run.stdout
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
