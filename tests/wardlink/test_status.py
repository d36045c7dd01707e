"""`status.json` and `wardlink gateway status`; the states of a device's connection as a table."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from gateway import status
from gateway.acquisition import TRANSITIONS, Acquisition, Outputs, State
from gateway.clock import HostClock
from gateway.devices.registry import DRIVERS
from gateway.errors import DamagedError, UnavailableError
from gateway.links.base import Link
from gateway.settings import Device
from gateway.status import BrokerStatus, ClockStatus, DeviceStatus, ElectrodeStatus, GatewayStatus, OutboxStatus
from wardlink import cli

pytestmark = pytest.mark.timeout(60)

DEADLINE_S = 30.0
ROOT = Path(__file__).parents[2]
DEVICE = DeviceStatus("CYTON-1", "cyton", "/dev/x", "waiting", "no such port", "2026-01-01T00:00:00+00:00", 3, 17)


CLOCK = ClockStatus("synced", 12_345_678, "ntp", holds=False, waiting=0)


def said(
    written: datetime, *, running: bool = True, problem: str = "", away: str = "", clock: ClockStatus = CLOCK
) -> GatewayStatus:
    outbox, broker = OutboxStatus(5, 1234, problem), BrokerStatus(not away, away)
    kernels = {"features": "numpy"}
    return GatewayStatus("gw-1", 42, written.isoformat(), running, [DEVICE], outbox, clock, broker, kernels)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "gateway.toml"
    path.write_text(
        f'[gateway]\nid = "gw-1"\nstate_dir = "{tmp_path}/state"\n[mqtt]\nhost = "127.0.0.1"\nport = 1\ntls = false\n'
        f'[[device]]\ndriver = "cyton"\nserial = "CYTON-1"\nport = "{tmp_path}/none"\n'
    )
    return path


def show(config: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(["gateway", "status", "--config", str(config), *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# --- the command


def test_a_gateway_that_runs(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status.write(tmp_path / "state", said(datetime.now(UTC) - timedelta(seconds=3), away="refused"))
    code, out, err = show(config, capsys)
    assert (code, err) == (0, "")
    assert out.startswith("gateway gw-1 runs (process 42); this is 3 s old\n")
    for word in ("CYTON-1", "waiting", "no such port", "2026-01-01T00:00:00+00:00", " 17 "):
        assert word in out
    assert "was waiting" not in out
    assert "outbox: 5 blocks, 1234 bytes wait for their receipt\n" in out
    assert "\nclock: synced, told by the system's time service, good to 0.012 s\n" in out
    assert "\nbroker: away: refused\nfeatures: numpy\n" in out
    code, out, _ = show(config, capsys, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["runs"] is True
    assert 3 <= found["age_s"] < DEADLINE_S
    assert found["devices"] == [msgspec.to_builtins(DEVICE)]
    assert found["outbox"] == {"rows": 5, "bytes": 1234, "problem": ""}


def test_how_the_electrodes_are(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    electrodes = [ElectrodeStatus("Fp1", "ok", ""), ElectrodeStatus("C3", "off", "flat: always the same value")]
    device = msgspec.structs.replace(DEVICE, electrodes=electrodes)
    status.write(tmp_path / "state", msgspec.structs.replace(said(datetime.now(UTC)), devices=[device]))
    code, out, _ = show(config, capsys)
    assert code == 0
    assert "CYTON-1 electrodes: 1 of 2 ok; C3 off (flat: always the same value)\n" in out
    _, out, _ = show(config, capsys, "--json")
    assert json.loads(out)["devices"][0]["electrodes"][1]["reason"] == "flat: always the same value"


@pytest.mark.parametrize(
    ("age_s", "running", "headline"),
    [
        (status.AGE_S_MAX + 45, True, "DOES NOT RUN, or hangs: what it said last is 60 s old"),
        (-3600.0, True, "DOES NOT RUN, or hangs: what it said last is 3600 s in the future: the clock was set back"),
        (2.0, False, "DOES NOT RUN: it was stopped; what it said last is 2 s old"),
    ],
)
def test_one_that_does_not(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    age_s: float,
    running: bool,
    headline: str,
) -> None:
    # 0.3 s of slack: a second begins while the test runs
    status.write(tmp_path / "state", said(datetime.now(UTC) - timedelta(seconds=age_s - 0.3), running=running))
    code, out, _ = show(config, capsys)
    assert code == 1
    assert out.startswith(f"gateway gw-1 {headline}")
    assert "was waiting" in out
    code, out, _ = show(config, capsys, "--json")
    assert (code, json.loads(out)["runs"]) == (1, False)


@pytest.mark.parametrize(
    ("clock", "line"),
    [
        (
            ClockStatus("synced", 21_000_000, "bridge", holds=False, waiting=0),
            "synced, told by a bridge, good to 0.021 s",
        ),
        (
            ClockStatus("unsynced", 16_000_000_000, "none", holds=True, waiting=31),
            "unsynced, told by nobody, good to 16.000 s; 31 blocks WAIT FOR THE TIME",
        ),
    ],
)
def test_the_clock(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: ClockStatus, line: str
) -> None:
    status.write(tmp_path / "state", said(datetime.now(UTC), clock=clock))
    assert f"\nclock: {line}\n" in show(config, capsys)[1]
    _, out, _ = show(config, capsys, "--json")
    assert json.loads(out)["clock"] == msgspec.to_builtins(clock)


def test_an_outbox_that_takes_nothing(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status.write(tmp_path / "state", said(datetime.now(UTC), problem="disk is full"))
    code, out, _ = show(config, capsys)
    assert code == 0
    assert "outbox: NOTHING IS ACCEPTED NOW: disk is full\n" in out
    assert "broker: connected\n" in out


def test_one_that_never_ran(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = show(config, capsys)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: there is no {tmp_path}/state/status.json: the gateway has not run yet\nhint: ")


@pytest.mark.parametrize("content", ["", "{}", '{"gateway": 1}', "[" * 5000, "\ufeff{}"])
def test_what_is_no_status(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "status.json").write_text(content)
    code, out, err = show(config, capsys)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {tmp_path}/state/status.json is not a gateway's status: ")


def test_a_time_that_is_none() -> None:
    with pytest.raises(DamagedError, match="'soon' is no time"):
        msgspec.structs.replace(said(datetime.now(UTC)), written="soon").age_s(datetime.now(UTC))


def test_a_folder_that_takes_no_file(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(UnavailableError, match=r"status\.json cannot be written"):
        status.write(tmp_path / "state", said(datetime.now(UTC)))


def test_the_old_one_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    status.write(tmp_path, said(datetime.now(UTC), away="first"))
    (tmp_path / ".status.json.new").mkdir()  # in the way of the next one
    with pytest.raises(UnavailableError):
        status.write(tmp_path, said(datetime.now(UTC), away="second"))
    found = status.read(tmp_path)
    assert found is not None
    assert found.broker.last_error == "first"


# --- the gateway itself


def test_the_gateway_writes_it_while_it_runs_and_when_it_ends(config: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "wardlink", "gateway", "run", "--config", str(config)],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    try:
        found, deadline = None, time.monotonic() + DEADLINE_S
        while found is None or found.devices[0].segments != 0 or "no such port" not in found.devices[0].reason:
            assert time.monotonic() < deadline, found
            assert process.poll() is None
            time.sleep(0.05)
            found = status.read(tmp_path / "state")
        assert (found.gateway, found.pid, found.running) == ("gw-1", process.pid, True)
        assert found.is_fresh(datetime.now(UTC))
        device = found.devices[0]
        assert (device.serial, device.driver, device.place) == ("CYTON-1", "cyton", f"{tmp_path}/none")
        assert device.state in {State.WAITING, State.CONNECTING}
        assert abs(datetime.fromisoformat(device.since) - datetime.now(UTC)) < timedelta(seconds=DEADLINE_S)
        assert not found.broker.connected
        assert found.broker.last_error
        assert found.implementations["features"]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
    last = status.read(tmp_path / "state")
    assert last is not None
    assert not last.running
    left = {file.name for file in (tmp_path / "state").iterdir() if not file.name.startswith("outbox.db")}
    assert left == {"status.json", "clock.json"}


# --- the states


def acquisition() -> Acquisition:
    def no_link() -> Link:
        raise AssertionError

    outputs = Outputs(lambda _content: None, lambda _birth: None, lambda _device, _features: None)
    device = Device(driver="cyton", serial="CYTON-1", port="/dev/x")
    return Acquisition("gw-1", device, DRIVERS["cyton"], no_link, HostClock(), outputs)


def test_every_state_is_in_the_table_and_none_follows_on_itself() -> None:
    assert set(TRANSITIONS) == set(State)
    for state, following in TRANSITIONS.items():
        assert following
        assert state not in following
    assert [state for state in State if State.STREAMING in TRANSITIONS[state]] == [State.STARTING]
    assert TRANSITIONS[State.WAITING] == {State.CONNECTING}, "it begins from the beginning"


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("following", State)
def test_what_the_table_does_not_have_is_logged_as_a_bug(
    state: State, following: State, caplog: pytest.LogCaptureFixture
) -> None:
    one = acquisition()
    one.condition.state = state
    before_ns = one.condition.since_ns
    with caplog.at_level(logging.ERROR):
        one._change(following, "because")
    allowed = following is state or following in TRANSITIONS[state]
    assert bool(caplog.records) is not allowed
    assert one.condition.state is following
    assert (one.condition.since_ns > before_ns) is (following is not state)


def test_since_is_utc() -> None:
    since = datetime.fromisoformat(acquisition().since)
    assert since.utcoffset() == timedelta(0)
    assert abs(since - datetime.now(UTC)) < timedelta(seconds=DEADLINE_S)
