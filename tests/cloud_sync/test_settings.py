"""cloud.toml: wrong keys named with file and hint, credentials asked for, no secret shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cloud_sync import settings
from cloud_sync.registry.database import describe
from gateway.errors import ConfigError
from wardlink.cli import main

EXAMPLE = Path(__file__).parents[2] / "systemd" / "cloud.toml.example"
SECRETS = {"mqtt-password": "s3cret-m", "influx-token": "s3cret-t", "influx-password": "s3cret-i"}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (*SECRETS, "postgres-password"):
        monkeypatch.delenv(settings.config.environment_name(name), raising=False)
    folder = tmp_path / "credentials"
    folder.mkdir()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    return tmp_path / "cloud.toml"


def give(file: Path, *names: str, **more: str) -> None:
    for name in names:
        (file.parent / "credentials" / name).write_text(SECRETS[name] + "\n")
    for name, value in more.items():
        (file.parent / "credentials" / name.replace("_", "-")).write_text(value)


def test_the_example_is_complete_and_valid(file: Path) -> None:
    give(file, *SECRETS)
    chosen = settings.load(EXAMPLE)
    settings.check(chosen)
    text = EXAMPLE.read_text()
    for section in chosen.__struct_fields__:
        assert f"[{section}]" in text
        for key in getattr(chosen, section).__struct_fields__:
            assert f"{key} =" in text or f"[{section}.{key}]" in text, f"{section}.{key} is not in the example"


def test_defaults_are_private_and_verified(file: Path) -> None:
    file.write_text('[influx]\norg = "o"\n')
    chosen = settings.load(file)
    assert chosen.mqtt.tls is True
    assert chosen.mqtt.host == chosen.postgres.host == "localhost"
    assert settings.warnings(chosen) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[influx]\norg="o"\nbucket="x"', "influx.bucket: no such key"),
        ('[influx]\norg="o"\nbatch_lines=0', "influx.batch_lines: expected"),
        ('[influx]\norg="o"\ndialect="v3"', "influx.dialect: "),
        ("[influx]", "influx.org: missing"),
        ('[influx]\ndialect="v1"\norg="o"', 'influx.org: is for dialect "v2"'),
        ('[influx]\norg="o"\nusername="u"', 'influx.username: is for dialect "v1"'),
        ('[influx]\norg="o"\nurl="localhost:8086"', "influx.url: 'localhost:8086' is not a URL"),
        ('[influx]\norg="o"\nurl="http://h:99999"', "influx.url: not a URL"),
        ('[influx]\norg="o"\nurl="http://u:hidden@h"', "influx.url: has more than scheme, host, port and path"),
        ('[influx]\norg="o"\n[bridge]\nid="a/b"', "bridge.id: expected"),
        ('[influx]\norg="o"\n[bridge]\nstate_dir="here"', "bridge.state_dir: expected an absolute path"),
        ('[influx]\norg="o"\n[mqtt.tls]\ncert_file="c"', "mqtt.tls: cert_file and key_file belong together"),
        ('[influx]\norg="o"\n[mqtt]\npassword="hidden"', "mqtt.password: no such key"),
        ('[influx]\norg="o"\n[postgres]\nport=0', "postgres.port: expected"),
        ('[influx]\norg="o"\n[postgres]\nconninfo="host=h password=hidden"', "postgres.conninfo: expected key=value"),
        (
            '[influx]\norg="o"\n[postgres]\nconninfo="postgresql://u:hidden@h/d"',
            "postgres.conninfo: expected key=value",
        ),
        ('[influx]\norg="o"\n[postgres]\nconninfo="nonsense"', "postgres.conninfo: "),
        ('[influx]\norg="o"\n[postgres]\nconninfo="host=h"\nport=1', "postgres.port: is beside postgres.conninfo"),
    ],
)
def test_a_wrong_key_is_named(file: Path, text: str, expected: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        settings.load(file)
    assert f"{file}: {expected}" in str(caught.value)
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ('[influx]\norg="o"', "influx-token"),
        ('[influx]\norg="o"\n[mqtt]\nusername="u"', "mqtt-password"),
        ('[influx]\ndialect="v1"\nusername="u"', "influx-password"),
    ],
)
def test_a_missing_credential_is_named(file: Path, text: str, missing: str) -> None:
    file.write_text(text)
    give(file, *(name for name in SECRETS if name != missing))
    with pytest.raises(ConfigError, match=f"credential '{missing}' is missing") as caught:
        settings.check(settings.load(file))
    assert missing in caught.value.hint
    give(file, missing)
    settings.check(settings.load(file))


def test_influxdb_1_may_have_no_user(file: Path) -> None:
    file.write_text('[influx]\ndialect="v1"')
    settings.check(settings.load(file))
    assert settings.influx_secret(settings.load(file)) is None


def test_the_connection_string_survives_any_password(file: Path) -> None:
    file.write_text('[influx]\norg="o"\n[postgres]\nhost="db.example.org"\nuser="o\'neil"')
    give(file, postgres_password="it's \\ 'x'=y")
    text = settings.conninfo(settings.load(file))
    assert describe(text) == "db.example.org:5432/wardlink"
    assert "password='it\\'s \\\\ \\'x\\'=y'" in text
    assert "sslmode='verify-full'" in text
    assert "sslrootcert='system'" in text


def test_a_conninfo_gets_the_password_alone(file: Path) -> None:
    file.write_text('[postgres]\nconninfo="host=/run/postgresql dbname=ward"\n[influx]\norg="o"')
    assert settings.conninfo(settings.load(file)) == "host=/run/postgresql dbname=ward"
    give(file, postgres_password="x")
    assert settings.conninfo(settings.load(file)) == "host=/run/postgresql dbname=ward password='x'"


def test_data_in_clear_to_another_machine_is_warned_of(file: Path) -> None:
    file.write_text('[mqtt]\nhost="10.0.0.1"\ntls=false\n[influx]\norg="o"\nurl="http://10.0.0.2:8086"')
    first, second = settings.warnings(settings.load(file))
    assert "mqtt.tls is off" in first
    assert "influx.url has no TLS" in second


@pytest.mark.parametrize("as_json", [True, False])
def test_check_config_shows_what_is_used_and_no_secret(
    file: Path, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    file.write_text('[mqtt]\nhost="broker"\nusername="u"\n[influx]\norg="o"')
    give(file, *SECRETS, postgres_password="s3cret-p")
    assert main(["cloud", "check-config", "--config", str(file), *(["--json"] if as_json else [])]) == 0
    shown = capsys.readouterr().out
    assert "s3cret" not in shown
    if as_json:
        assert json.loads(shown)["broker"] == "broker:8883, TLS, user u"
    for word in ("broker:8883", "TLS", "dialect v2", "localhost:5432/wardlink", "influx-token"):
        assert word in shown


def test_a_wrong_configuration_is_one_line_and_exit_code_2(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text('[influx]\norgg = "o"')
    for command in ("check-config", "run", "tail"):
        assert main(["cloud", command, "--config", str(file)]) == 2
        told = capsys.readouterr().err
        assert "influx.orgg: no such key" in told
        assert "did you mean 'org'?" in told
        assert "Traceback" not in told
