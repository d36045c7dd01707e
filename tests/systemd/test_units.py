"""The units as systemd's own tools see them: no mistake, little exposed, users and folders that can be made."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from gateway.links import bluetoothd

UNITS = Path(__file__).parents[2] / "systemd"
PROGRAM = "/opt/wardlink/bin/wardlink"

EXPOSURE_TENTHS_MAX = {"wardlink-gateway.service": 20, "wardlink-cloud.service": 12}
"""Of 100, by `systemd-analyze security` of systemd 252; an unhardened service has 96. The gateway has more
for its serial ports and for reading the state of the clock."""


def tool(name: str) -> str:
    """Path of one of systemd's tools; a test without it fails."""
    found = shutil.which(name)
    if found is None:
        pytest.fail(f"{name} is not installed: apt-get install systemd", pytrace=False)
    return found


def installed(name: str, folder: Path, *, line: str = "") -> Path:
    """A copy of a unit whose program exists, with `line` added to its [Service] section."""
    text = (UNITS / name).read_text()
    assert f"\nExecStart={PROGRAM} " in text
    unit = folder / name
    unit.write_text(text.replace(PROGRAM, "/bin/true").replace("\n[Install]", f"{line}\n[Install]"))
    return unit


def verified(unit: Path) -> subprocess.CompletedProcess[str]:
    """What `systemd-analyze verify` says; it exits with 0 on a key that it does not know."""
    return subprocess.run(
        [tool("systemd-analyze"), "verify", "--man=no", unit], capture_output=True, text=True, check=False
    )


def assessed(unit: Path, tenths_max: int) -> subprocess.CompletedProcess[str]:
    """What `systemd-analyze security` says of a unit that is not loaded."""
    options = ["--no-pager", "--offline=true", f"--threshold={tenths_max}"]
    command = [tool("systemd-analyze"), "security", *options, str(unit)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", EXPOSURE_TENTHS_MAX)
def test_unit_is_without_mistake(name: str, tmp_path: Path) -> None:
    result = verified(installed(name, tmp_path))
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_a_mistake_would_be_seen(tmp_path: Path) -> None:
    result = verified(installed("wardlink-cloud.service", tmp_path, line="PrivateTmpp=yes\n"))
    assert "PrivateTmpp" in result.stderr


@pytest.mark.parametrize(("name", "tenths_max"), EXPOSURE_TENTHS_MAX.items())
def test_unit_is_little_exposed(name: str, tenths_max: int, tmp_path: Path) -> None:
    result = assessed(installed(name, tmp_path), tenths_max)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(("name", "tenths_max"), EXPOSURE_TENTHS_MAX.items())
def test_more_exposure_would_be_seen(name: str, tenths_max: int, tmp_path: Path) -> None:
    result = assessed(installed(name, tmp_path, line="NoNewPrivileges=no\nProtectSystem=no\n"), tenths_max)
    assert result.returncode != 0


@pytest.mark.parametrize("name", EXPOSURE_TENTHS_MAX)
def test_unit_keeps_its_promises_to_systemd(name: str) -> None:
    lines = (UNITS / name).read_text().splitlines()
    side = name.removeprefix("wardlink-").removesuffix(".service")
    assert {"Type=notify", "WatchdogSec=30s", "Restart=always", f"User=wardlink-{side}"} <= set(lines)
    assert f"ExecStart={PROGRAM} {side} run --config /etc/wardlink/{side}.toml" in lines
    secrets = [line for line in lines if "Environment" in line or ("Credential=" in line and not line.startswith("#"))]
    assert secrets == []


def test_users_of_the_units_are_made(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    shutil.copy(UNITS / "wardlink.sysusers.conf", tmp_path / "users.conf")
    command = [tool("systemd-sysusers"), f"--root={tmp_path}", str(tmp_path / "users.conf")]
    subprocess.run(command, check=True, capture_output=True)
    users = [line.split(":") for line in (tmp_path / "etc" / "passwd").read_text().splitlines()]
    groups = {line.split(":")[0] for line in (tmp_path / "etc" / "group").read_text().splitlines()}
    assert {(user[0], user[5]) for user in users} == {
        ("wardlink-gateway", "/var/lib/wardlink-gateway"),
        ("wardlink-cloud", "/var/lib/wardlink-cloud"),
    }
    assert all(user[6].endswith("nologin") for user in users)
    assert groups >= {"wardlink-gateway", "wardlink-cloud", "bluetooth"}


def test_folders_of_the_configuration_are_made(tmp_path: Path) -> None:
    text = (UNITS / "wardlink.tmpfiles.conf").read_text()
    config = tmp_path / "folders.conf"
    config.write_text(text.replace("root root", f"{os.geteuid()} {os.getegid()}"))
    subprocess.run([tool("systemd-tmpfiles"), "--create", f"--root={tmp_path}", config], check=True)
    modes = {
        str(folder.relative_to(tmp_path)): stat.S_IMODE(folder.stat().st_mode)
        for folder in (tmp_path / "etc").rglob("*")
    }
    assert modes == {"etc/wardlink": 0o755, "etc/wardlink/conf.d": 0o755, "etc/wardlink/credentials": 0o700}


def test_the_rule_names_the_gateway_and_what_it_asks_for() -> None:
    rule = (UNITS / "60-wardlink-bluetooth.rules").read_text()
    (user,) = [
        line.removeprefix("User=")
        for line in (UNITS / "wardlink-gateway.service").read_text().splitlines()
        if line.startswith("User=")
    ]
    assert f'subject.user === "{user}"' in rule
    assert f'action.lookup("unit") === "{bluetoothd.UNIT}"' in rule
    assert 'action.lookup("verb") === "restart"' in rule
