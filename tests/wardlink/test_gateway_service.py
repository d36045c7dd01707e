"""`wardlink gateway …`: what is printed, for people and for programs, and the service as a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from gateway.devices.registry import DRIVERS
from gateway.errors import ConfigError
from gateway.samples import VITAL_SIGNS, ClockStamp, ClockState, LossCause, LossRecord, SampleBlock
from gateway.spool.outbox import Outbox
from gateway.spool.sqlite_store import SqliteStore
from gateway.spool.store import Store
from wardlink import cli
from wardlink.servers import Mosquitto

pytestmark = pytest.mark.timeout(120)

DEADLINE_S = 30.0
ROOT = Path(__file__).parents[2]
DEVICES = """
[[device]]
driver = "cyton"
serial = "CYTON-1"
port = "/dev/serial/by-id/none"
[[device]]
driver = "heart_rate"
serial = "STRAP-1"
address = "00:22:D0:3A:10:01"
"""


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CREDENTIALS_DIRECTORY", "WARDLINK_MQTT_PASSWORD", "WARDLINK_REDIS_PASSWORD"):
        monkeypatch.delenv(name, raising=False)


def write_config(folder: Path, mqtt: str, more: str = "") -> Path:
    path = folder / "gateway.toml"
    path.write_text(f'[gateway]\nid = "gw-1"\nstate_dir = "{folder}/state"\n[mqtt]\n{mqtt}\n{more}')
    return path


# --- check-config


def test_check_config_says_what_would_be_used_and_opens_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WARDLINK_MQTT_PASSWORD", "s3cret")
    path = write_config(tmp_path, 'host = "broker.example.org"\nusername = "gw-1"', DEVICES)
    assert cli.main(["gateway", "check-config", "--config", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{path}: ok",
        f"gateway: gw-1, state in {tmp_path}/state",
        "broker: broker.example.org:8883, TLS, user gw-1",
        f"outbox: {tmp_path}/state/outbox.db, at most 4294967296 bytes",
        "credentials: mqtt-password",
        "device CYTON-1: cyton at /dev/serial/by-id/none",
        "device STRAP-1: heart_rate at 00:22:D0:3A:10:01",
    ]
    assert list(tmp_path.iterdir()) == [path]


def test_check_config_warns_of_what_travels_in_clear(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, 'host = "broker"\ntls = false')
    assert cli.main(["gateway", "check-config", "--config", str(path)]) == 0
    out = capsys.readouterr().out
    assert "broker: broker:8883, no TLS, user (none)" in out
    assert "warning: mqtt.tls is off and broker is another machine" in out
    assert "warning: there is no [[device]]" in out


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_check_config_shows_no_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, form: list[str]
) -> None:
    monkeypatch.setenv("WARDLINK_MQTT_PASSWORD", "s3cret-1")
    monkeypatch.setenv("WARDLINK_REDIS_PASSWORD", "s3cret-2")
    redis = '[spool]\nbackend = "redis"\nredis_url = "redis://localhost"\n'
    live = '[live.redis]\nurl = "redis://localhost"\n'
    path = write_config(tmp_path, 'host = "broker"\nusername = "gw-1"', redis + live)
    assert cli.main(["gateway", "check-config", "--config", str(path), *form]) == 0
    captured = capsys.readouterr()
    assert "s3cret" not in captured.out + captured.err
    assert "mqtt-password, redis-password" in captured.out
    assert "Redis, at most" in captured.out


def test_check_config_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, 'host = "broker"', DEVICES)
    assert cli.main(["gateway", "check-config", "--config", str(path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["file"], said["ok"], said["warnings"]) == (str(path), True, [])
    assert said["devices"][1] == {"serial": "STRAP-1", "driver": "heart_rate", "place": "00:22:D0:3A:10:01"}


def test_drivers_are_those_of_the_registry(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["gateway", "drivers", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["driver"] for row in rows] == sorted(DRIVERS)
    assert {row["description"] for row in rows} == {driver.description for driver in DRIVERS.values()}
    assert cli.main(["gateway", "drivers"]) == 0
    assert "heart_rate" in capsys.readouterr().out


# --- spool status


async def fill(store: Store) -> str:
    """Two blocks of three readings and a loss of five; gives the outbox's epoch."""
    outbox = Outbox(store, "gw-1")
    await outbox.open()
    stamp = ClockStamp(ClockState.SYNCED, 1)
    for start in (10, 20):
        times = np.arange(start, start + 3, dtype=np.int64)
        columns = {"heart_rate": np.array([60.0, 61.0, np.nan])}
        outbox.append(SampleBlock("STRAP-1", VITAL_SIGNS, times, columns, stamp, 0, {}))
    outbox.append(LossRecord("STRAP-1", VITAL_SIGNS, LossCause.RADIO, 15, 18, 5))
    await outbox.commit()
    epoch = outbox.epoch
    await outbox.close()
    return epoch


def test_spool_status_counts_what_waits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, 'host = "broker"')
    outbox = tmp_path / "state" / "outbox.db"
    epoch = asyncio.run(fill(SqliteStore(outbox)))
    outbox.chmod(0o640)
    assert cli.main(["gateway", "spool", "status", "--config", str(path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["epoch"], said["waiting"]) == (epoch, 3)
    assert said["bytes"] > 300
    assert {row["signal"]: (row["accepted"], row["lost"], row["blocks"]) for row in said["streams"]} == {
        "vital_signs": (6, 5, 2),
        "loss": (0, 0, 1),
    }
    assert cli.main(["gateway", "spool", "status", "--config", str(path)]) == 0
    out = capsys.readouterr().out
    assert f"epoch {epoch}" in out
    assert outbox.stat().st_mode & 0o777 == 0o640, "who only looks changes nothing"
    assert "STRAP-1" in out
    assert f"3 blocks, {said['bytes']} bytes waiting for their receipt" in out


def test_spool_status_of_a_gateway_that_never_ran(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, 'host = "broker"')
    assert cli.main(["gateway", "spool", "status", "--config", str(path)]) == ConfigError.exit_code
    assert "has the gateway run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]


# --- run


class Running:
    """`wardlink gateway run` as a process."""

    def __init__(self, config: Path, log: Path, environment: dict[str, str]) -> None:
        self.log = log
        with log.open("wb") as opened:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "wardlink", "gateway", "run", "--config", str(config)],
                stdout=opened,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=os.environ | environment,
            )

    def until(self, condition: Callable[[str], bool]) -> str:
        deadline = time.monotonic() + DEADLINE_S
        while True:
            text = self.log.read_text()
            if condition(text):
                return text
            assert self.process.poll() is None, text
            assert time.monotonic() < deadline, text
            time.sleep(0.02)

    def end(self, number: signal.Signals) -> tuple[int, str]:
        self.process.send_signal(number)
        return self.process.wait(DEADLINE_S), self.log.read_text()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def start(config: Path, **environment: str) -> Running:
        started.append(Running(config, tmp_path / f"log-{len(started)}", environment))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_service_runs_until_it_is_told_to_stop(
    tmp_path: Path, mosquitto_server: Mosquitto, run: Callable[..., Running], number: signal.Signals
) -> None:
    login = mosquitto_server.gateway("gw-1")
    mqtt = f'host = "{mosquitto_server.host}"\nport = {mosquitto_server.port}\ntls = false\nusername = "{login.user}"'
    service = run(write_config(tmp_path, mqtt), WARDLINK_MQTT_PASSWORD=login.password)
    service.until(lambda text: "connected to broker" in text)
    code, text = service.end(number)
    assert code == 0
    assert "stopping" in text
    assert "Traceback" not in text
    assert login.password not in text
    assert (tmp_path / "state" / "outbox.db").exists()


def test_what_is_away_is_tried_again_and_named(tmp_path: Path, run: Callable[..., Running]) -> None:
    mqtt = 'host = "127.0.0.1"\nport = 1\ntls = false'
    service = run(write_config(tmp_path, mqtt, DEVICES), DBUS_SYSTEM_BUS_ADDRESS=f"unix:path={tmp_path}/no-bus")
    service.until(lambda text: text.count("there is no such port") >= 2 and text.count("127.0.0.1:1") >= 2)
    text = service.until(lambda text: text.count("STRAP-1: ") >= 2)
    assert "next attempt in" in text
    code, text = service.end(signal.SIGTERM)
    assert code == 0
    assert "Traceback" not in text


def test_a_secret_in_a_url_ends_it_and_is_not_repeated(tmp_path: Path, run: Callable[..., Running]) -> None:
    mqtt = 'host = "127.0.0.1"\nport = 1\ntls = false'
    config = write_config(tmp_path, mqtt, '[live.redis]\nurl = "redis://:s3cret@127.0.0.1:1"')
    text = run(config).until(lambda text: "hint:" in text)
    assert f"{config}: live.redis.url: holds a password" in text
    assert "s3cret" not in text
