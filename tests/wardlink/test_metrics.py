"""`wardlink gateway metrics`, and the metrics of a gateway that runs."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from wardlink import cli

pytestmark = pytest.mark.timeout(60)

DEADLINE_S = 30.0
ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def write_config(folder: Path, metrics: str) -> Path:
    path = folder / "gateway.toml"
    path.write_text(
        f'[gateway]\nid = "gw-1"\nstate_dir = "{folder}/state"\n[mqtt]\nhost = "127.0.0.1"\nport = 1\ntls = false\n'
        f'{metrics}[[device]]\ndriver = "cyton"\nserial = "CYTON-1"\nport = "{folder}/none"\n'
    )
    return path


def values(text: str) -> dict[str, float]:
    """Name and labels, as one text -> value."""
    return {
        f"{sample.name}{sorted(sample.labels.items())}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def state(found: dict[str, float]) -> list[str]:
    return [key for key, value in found.items() if key.startswith("wardlink_device_state") and value == 1]


def test_a_gateway_that_runs_tells_file_address_and_command_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port, textfile = free_port(), tmp_path / "wardlink.prom"
    config = write_config(tmp_path, f'[metrics]\nlisten = "127.0.0.1:{port}"\ntextfile = "{textfile}"\n')
    process = subprocess.Popen(
        [sys.executable, "-m", "wardlink", "gateway", "run", "--config", str(config)],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not textfile.exists() or "there is no such port" not in textfile.read_text():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            scraped = values(answer.read().decode())
        assert cli.main(["gateway", "metrics", "--config", str(config)]) == 0
        shown = values(capsys.readouterr().out)
        assert shown.keys() == scraped.keys() == values(textfile.read_text()).keys()
        assert shown["wardlink_gateway_running[]"] == 1
        assert shown["wardlink_broker_connected[]"] == 0
        (now,) = state(shown)
        assert "('device', 'CYTON-1')" in now
        assert "'waiting'" in now or "'connecting'" in now
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
    assert values(textfile.read_text())["wardlink_gateway_running[]"] == 0
    assert cli.main(["gateway", "metrics", "--config", str(config)]) == 1
    assert values(capsys.readouterr().out)["wardlink_gateway_running[]"] == 0


def test_before_it_ever_ran(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["gateway", "metrics", "--config", str(write_config(tmp_path, ""))]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: there is no {tmp_path}/state/status.json: the gateway has not run yet\n")
