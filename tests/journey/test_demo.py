"""`wardlink demo` as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

DEMO = [sys.executable, "-m", "wardlink", "demo"]


@pytest.mark.timeout(120)
def test_json_books_agree(chain_folder: Path) -> None:
    kept = chain_folder / "kept"
    done = subprocess.run(
        [*DEMO, "--seconds", "8", "--json", "--keep", str(kept)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert set(result) == {"seconds", "streams", "duplicates", "exit"}
    assert (result["seconds"], result["duplicates"], result["exit"]) == (8, 0, "ok")
    assert {(one["device"], one["signal"]) for one in result["streams"]} == {
        ("CYTON-1", "eeg"),
        ("CYTON-1", "brain_state"),
        ("STRAP-1", "vital_signs"),
    }
    for one in result["streams"]:
        assert one["produced"] == one["committed"] == one["points_in_influx"] > 0
        assert one["lost"] == one["parked"] == 0
        assert 0 < one["latency_ms_p50"] <= one["latency_ms_p99"]
    assert (kept / "gateway.toml").exists()
    assert "Traceback" not in done.stderr + "".join(log.read_text() for log in kept.glob("*/log"))


@pytest.mark.timeout(120)
def test_ctrl_c_leaves_nothing_behind(chain_folder: Path) -> None:
    demo = subprocess.Popen(
        [*DEMO, "--seconds", "60"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TMPDIR": str(chain_folder)},
        start_new_session=True,
    )
    assert demo.stdout is not None
    for line in demo.stdout:
        if "accepted" in line:
            break
    children = psutil.Process(demo.pid).children(recursive=True)
    assert len(children) >= 7
    demo.send_signal(signal.SIGINT)
    rest = demo.communicate(timeout=60)[0]
    assert demo.returncode == 130, rest
    assert "Traceback" not in rest
    _, alive = psutil.wait_procs(children, timeout=5)
    assert alive == []
    assert list(chain_folder.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--recording", "/no/such/file"], "/no/such/file"),
        (["--seconds", "0"], "seconds"),
        (["--keep", "/proc/nowhere"], "--keep"),
    ],
)
def test_wrong_usage_is_one_clear_line(words: list[str], expected: str) -> None:
    done = subprocess.run([*DEMO, *words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
