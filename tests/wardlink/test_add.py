"""`wardlink gateway add`: one file more, or nothing at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from gateway import settings
from gateway.links import serial_names
from wardlink import cli

STRAP = ["heart_rate", "STRAP-1", "--address", "00:22:d0:3a:10:01"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "gateway.toml"
    path.write_text(f'[gateway]\nid = "gw-1"\nstate_dir = "{tmp_path}/state"\n[mqtt]\nhost = "localhost"\n')
    return path


def add(config: Path, *words: str) -> int:
    return cli.main(["gateway", "add", *words, "--config", str(config)])


def files(config: Path) -> list[str]:
    return sorted(str(file.relative_to(config.parent)) for file in config.parent.rglob("*"))


def test_what_is_written_is_what_the_gateway_reads(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert add(config, *STRAP) == 0
    out = capsys.readouterr().out
    file = config.parent / "conf.d" / "10-STRAP-1.toml"
    assert out.startswith(f"{file}:\n{file.read_text()}")
    assert f"next: wardlink gateway watch STRAP-1 --config {config}\n" in out
    (device,) = settings.load(config).device
    assert (device.driver, device.serial, device.address) == ("heart_rate", "STRAP-1", "00:22:D0:3A:10:01")
    assert files(config) == ["conf.d", "conf.d/10-STRAP-1.toml", "gateway.toml"]


def test_devices_stay_in_the_order_in_which_they_were_added(config: Path) -> None:
    names = "A,B,C,D,E,F,G,Oz"
    assert add(config, "thermometer", "Z-1", "--address", "00:22:D0:3A:10:02") == 0
    assert add(config, "cyton", "A-1", "--port", "/dev/none", "--channels", names) == 0
    (config.parent / "conf.d" / "notes.toml").write_text("")
    assert add(config, *STRAP) == 0
    devices = settings.load(config).device
    assert [device.serial for device in devices] == ["Z-1", "A-1", "STRAP-1"]
    assert devices[1].channels == tuple(names.split(","))
    assert {"conf.d/11-A-1.toml", "conf.d/12-STRAP-1.toml"} < set(files(config))


def test_whoever_reads_the_configuration_reads_the_new_file(config: Path) -> None:
    config.chmod(0o644)
    config.parent.chmod(0o755)
    before = os.umask(0o077)
    try:
        assert add(config, *STRAP) == 0
    finally:
        os.umask(before)
    folder = config.parent / "conf.d"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    assert stat.S_IMODE((folder / "10-STRAP-1.toml").stat().st_mode) == 0o644


def test_a_port_is_written_by_its_stable_name(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_id, port = tmp_path / "by-id", tmp_path / "ttyUSB0"
    by_id.mkdir()
    port.touch()
    (by_id / "usb-FTDI_FT231X").symlink_to(port)
    monkeypatch.setattr(serial_names, "BY_ID", by_id)
    assert add(config, "cyton", "CYTON-1", "--port", str(port)) == 0
    assert settings.load(config).device[0].port == str(by_id / "usb-FTDI_FT231X")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["citon", "C-1", "--port", "/dev/x"], "error: no driver 'citon'\nhint: known drivers: "),
        (["cyton", "../C-1", "--port", "/dev/x"], "error: serial '../C-1' is not usable\nhint: letters"),
        (["cyton", "C-1", "--port", "ttyUSB0"], "error: {file}: device[0].port: 'ttyUSB0' is no path (nothing was"),
        (["cyton", "C-1", "--address", "00:22:D0:3A:10:01"], "error: {file}: device[0].port: missing (nothing was"),
        (["heart_rate", "C-1", "--address", "strap"], "error: {file}: device[0].address: expected a Bluetooth"),
        (["cyton", "C-1", "--port", "/dev/x", "--channels", "A,B"], "error: {file}: device[0].channels: 2 names"),
        (["cyton", "C-1", "--port", '/dev/x"\n[mqtt]'], ""),
    ],
)
def test_on_an_error_nothing_is_left(
    config: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    before = files(config)
    expected = message.format(file=config.parent / "conf.d" / "10-C-1.toml")
    if not message:  # text that would be TOML of its own stays the text that it is
        assert add(config, *words) == 0
        assert settings.load(config).device[0].port == words[3]
        return
    assert add(config, *words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(expected)
    assert captured.out == ""
    assert files(config) == before


def test_a_serial_is_there_once_and_so_is_a_place(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert add(config, *STRAP) == 0
    before = files(config)
    capsys.readouterr()
    assert add(config, "thermometer", "STRAP-1", "--address", "00:22:D0:3A:10:09") == 2
    assert "there is a device STRAP-1 already: heart_rate at 00:22:D0:3A:10:01" in capsys.readouterr().err
    assert add(config, "thermometer", "T-1", "--address", "00:22:D0:3A:10:01") == 2
    assert "11-T-1.toml: device[1].address: '00:22:D0:3A:10:01' is there twice" in capsys.readouterr().err
    assert files(config) == before


def test_a_configuration_that_was_wrong_before_is_not_added_to(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(config.read_text() + "[spool]\nbackend = 'paper'\n")
    assert add(config, *STRAP) == 2
    assert f"{config}: spool.backend" in capsys.readouterr().err
    assert files(config) == ["gateway.toml"]


@pytest.mark.parametrize("driver", ["cyton", "heart_rate", "replay", "lsl", "brainflow"])
def test_a_place_is_needed(config: Path, capsys: pytest.CaptureFixture[str], driver: str) -> None:
    assert add(config, driver, "X-1") == 2
    assert capsys.readouterr().err.startswith(
        "error: where X-1 is was not said\nhint: one of --port, --address, --file"
    )
    assert files(config) == ["gateway.toml"]


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["replay", "X-1", "--file", "night.edf"], "file", str(Path.cwd() / "night.edf")),
        (["lsl", "X-1", "--stream", 'a "lab" stream'], "stream", 'a "lab" stream'),
        (["brainflow", "X-1", "--board-id", "-1"], "board_id", -1),
        (["brainflow", "X-1", "--board-id", "1", "--port", "/dev/none"], "port", "/dev/none"),
    ],
)
def test_sources_that_are_no_serial_or_ble_device(config: Path, words: list[str], key: str, value: object) -> None:
    assert add(config, *words) == 0
    (device,) = settings.load(config).device
    assert (device.driver, getattr(device, key)) == (words[0], value)


def test_the_wrong_kind_of_place(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert add(config, "cyton", "X-1", "--file", "night.edf") == 2
    assert "device[0].port: missing" in capsys.readouterr().err
    assert files(config) == ["gateway.toml"]


def test_a_folder_that_cannot_be_written(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (config.parent / "conf.d").symlink_to("/proc/self/fdinfo")  # there, readable, and nobody can make a file in it
    assert add(config, *STRAP) == 2
    assert "10-STRAP-1.toml: cannot be written" in capsys.readouterr().err
