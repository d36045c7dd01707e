"""Settings from TOML: every error names the file, the key, what was expected and what helps; secrets stay secret."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import pytest
from msgspec import Meta

from gateway import config
from gateway.config import Section
from gateway.errors import EXIT_CONFIG, ConfigError

SECRET = "correct-horse-battery-staple"


class Server(Section, frozen=True):
    host: Annotated[str, Meta(min_length=1)]
    port: Annotated[int, Meta(ge=1, le=65535)] = 1883
    mode: Literal["fast", "safe"] = "safe"
    ratio: float = 0.5
    tls: bool | dict[str, str] = True


class Probe(Section, frozen=True):
    serial: Annotated[str, Meta(pattern="^[a-z]+$", description="small letters")]
    channels: Annotated[tuple[Annotated[str, Meta(max_length=4)], ...], Meta(max_length=8)] | None = None
    gains: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.channels is not None and len(self.gains) > len(self.channels):
            raise ValueError("more gains than channels")


class Tree(Section, frozen=True):
    server: Server
    device: tuple[Probe, ...] = ()
    wards: dict[str, Probe] = {}  # noqa: RUF012 - msgspec copies it


GOOD = '[server]\nhost = "here"\n'


@pytest.fixture
def main(tmp_path: Path) -> Path:
    (tmp_path / "conf.d").mkdir()
    file = tmp_path / "gateway.toml"
    file.write_text(GOOD)
    return file


def fragment(main: Path, name: str, text: str) -> Path:
    file = main.parent / "conf.d" / name
    file.write_text(text)
    return file


def error_of(path: Path) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        config.load(path, Tree)
    assert caught.value.exit_code == EXIT_CONFIG
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    return caught.value


def test_defaults_and_values(main: Path) -> None:
    main.write_text(GOOD + 'port = 8883\ntls = false\n[[device]]\nserial = "abc"\nchannels = ["O1"]\ngains = [1]\n')
    tree = config.load(main, Tree)
    assert tree.server == Server(host="here", port=8883, tls=False)
    assert tree.device == (Probe(serial="abc", channels=("O1",), gains=(1,)),)


@pytest.mark.parametrize(
    ("text", "key", "said", "helps"),
    [
        (GOOD + "prot = 1", "server.prot", "no such key", "'port'"),
        (GOOD + "nothing_like_it = 1", "server.nothing_like_it", "no such key", "host, port, mode, ratio, tls"),
        (GOOD + "[servre]", "servre", "no such key", "'server'"),
        (GOOD + f'password = "{SECRET}"', "server.password", "no such key", "credentials"),
        ("[server]\nport = 1", "server.host", "missing, expected text", "add it"),
        ("", "server", "missing, expected a table", "add it"),
        (GOOD + 'port = "1"', "server.port", "expected `int`, got `str`", "without quotes"),
        (GOOD + "port = 1.5", "server.port", "expected `int`, got `float`", "whole number"),
        (GOOD + "port = 0", "server.port", "expected `int` >= 1", "a number >= 1 <= 65535"),
        (GOOD + "port = 65536", "server.port", "<= 65535", "a number >= 1 <= 65535"),
        (GOOD + 'mode = "slow"', "server.mode", "'slow'", '"fast", "safe"'),
        (GOOD + 'ratio = "much"', "server.ratio", "expected `float`, got `str`", "without quotes"),
        ("[server]\nhost = 7", "server.host", "expected `str`, got `int`", "quotes"),
        ('[server]\nhost = ""', "server.host", "length >= 1", "text"),
        ('server = "here"', "server", "expected `object`, got `str`", "[name]"),
        (GOOD + "tls = 1", "server.tls", "expected `bool | object`, got `int`", "true or false"),
        (GOOD + "[server.tls]\nca = 1", "server.tls.*", "expected `str`, got `int`", "quotes"),
        (GOOD + "[device]\nserial = 'a'", "device", "expected `array`, got `object`", "[[name]]"),
        (GOOD + "[[device]]\n", "device[0].serial", "missing, expected small letters", "add it"),
        (GOOD + "[[device]]\nserial = 'A'", "device[0].serial", "matching regex", "small letters"),
        (GOOD + "[[device]]\nserial = 'a'\n[[device]]\nserail = 'b'", "device[1].serail", "no such key", "'serial'"),
        (
            GOOD + "[[device]]\nserial = 'a'\n[[device]]\nserial='b'\ngains = [1, 2, '3']",
            "device[1].gains[2]",
            "expected `int`, got `str`",
            "without quotes",
        ),
        (
            GOOD + "[[device]]\nserial = 'a'\nchannels = ['O1', 'toolong']",
            "device[0].channels[1]",
            "length <= 4",
            "text",
        ),
        (GOOD + "[[device]]\nserial='a'\nchannels=['O1']\ngains=[1,2]", "device[0]", "more gains than channels", "tab"),
        (GOOD + "[wards.icu]\nserail = 'a'", "wards.*.serail", "no such key", "'serial'"),
        (GOOD + "[wards.icu]\nserial = 'a'\ngains = [true]", "wards.*.gains[0]", "expected `int`, got `bool`", "whole"),
    ],
)
def test_an_error_names_file_key_expectation_and_help(main: Path, text: str, key: str, said: str, helps: str) -> None:
    main.write_text(text)
    error = error_of(main)
    assert error.message.startswith(f"{main}: {key}: ")
    assert said in error.message
    assert helps in error.hint
    assert SECRET not in str(error)


def test_fragments_are_merged_in_order_of_their_names(main: Path) -> None:
    main.write_text(GOOD + "port = 1\n[[device]]\nserial = 'a'")
    fragment(main, "20-last.toml", "[server]\nport = 3\n[[device]]\nserial = 'c'")
    fragment(main, "10-first.toml", "[server]\nport = 2\nmode = 'fast'\n[[device]]\nserial = 'b'")
    fragment(main, "30-not-read.conf", "this is not TOML")
    fragment(main, ".hidden.toml", "neither is this")
    tree = config.load(main, Tree)
    assert tree.server == Server(host="here", port=3, mode="fast")
    assert [probe.serial for probe in tree.device] == ["a", "b", "c"]
    assert config.load(main, Tree, fragments=False).server.port == 1


def test_no_conf_d_is_fine(tmp_path: Path) -> None:
    (tmp_path / "gateway.toml").write_text(GOOD)
    assert config.load(tmp_path / "gateway.toml", Tree).server.host == "here"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[server]\nport = 'x'", "server.port"),
        ("[server]\nprot = 1", "server.prot"),
        ("[[device]]\nserial = 'A'", "device[1].serial"),
        ("[[device]]\nserial = 'b'\ngains = ['x']", "device[1].gains[0]"),
        ("[[device]]", "device[1].serial"),
        ("server = 1", "server"),
        ("device = 1", "device"),
        ("[other]\nx = 1", "other"),
    ],
)
def test_an_error_names_the_fragment_that_has_the_key(main: Path, text: str, key: str) -> None:
    main.write_text(GOOD + "[[device]]\nserial = 'a'")
    fragment(main, "05-good.toml", "[server]\nmode = 'fast'")
    file = fragment(main, "10-wrong.toml", text)
    fragment(main, "20-empty.toml", "# nothing\n")
    assert error_of(main).message.startswith(f"{file}: {key}: ")


def test_a_value_replaced_by_a_good_one_is_no_error_and_the_other_way_round(main: Path) -> None:
    main.write_text("[server]\nhost = 1")
    file = fragment(main, "10.toml", "[server]\nhost = 'good'")
    assert config.load(main, Tree).server.host == "good"
    file.write_text("[server]\nhost = 2")
    assert error_of(main).message.startswith(f"{file}: server.host: ")


def test_a_problem_found_later_names_the_file_too(main: Path) -> None:
    main.write_text(GOOD + "[[device]]\nserial = 'a'")
    file = fragment(main, "10.toml", "[server]\nport = 2\n[[device]]\nserial = 'b'")
    config.load(main, Tree)
    for key, owner in [
        ("server.port", file),
        ("server.host", main),
        ("server.mode", main),
        ("device[0].serial", main),
        ("device[1].serial", file),
        ("device[1].port", file),
        ("nowhere", main),
    ]:
        assert config.problem(main, key, "wrong", hint="right").message == f"{owner}: {key}: wrong"
    never_read = Path("/never/read.toml")
    assert config.problem(never_read, "a.b", "wrong").message == f"{never_read}: a.b: wrong"


@pytest.mark.parametrize("where", ["main", "fragment"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[server\nhost = 1", "line 1"),
        (b'[server]\nhost = "a"\nhost = "b"\n', "line 3"),
        (b'a = 1\nb = "caf\xe9"\n', "line 2: not UTF-8"),
        (b"\xff\xfe[\x00s\x00", "line 1: not UTF-8"),
        (b"a = " + b"[" * 100_000, "not valid TOML"),
        (b"#" * (config.CONFIG_BYTES_MAX + 1), "more than"),
        (b"\x00", "not valid TOML"),
    ],
)
def test_a_file_that_is_no_toml_is_named(main: Path, content: bytes, said: str, where: str) -> None:
    file = main if where == "main" else fragment(main, "10.toml", "")
    file.write_bytes(content)
    error = error_of(main)
    assert error.message.startswith(f"{file}: ")
    assert said in error.message


def test_endless_files_are_not_read_to_the_end() -> None:
    assert "more than" in error_of(Path("/dev/zero")).message


def test_what_is_not_there_or_not_a_file_is_named(tmp_path: Path) -> None:
    missing = error_of(tmp_path / "missing.toml")
    assert missing.message == f"{tmp_path / 'missing.toml'}: no such file"
    assert "--config" in missing.hint
    assert "directory" in error_of(tmp_path).message


def test_an_unreadable_conf_d_is_an_error_and_not_an_empty_one(main: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (main.parent / "conf.d").rmdir()
    (main.parent / "conf.d").write_text("a file")
    assert error_of(main).message.startswith(f"{main.parent / 'conf.d'}: cannot be read")


class TestSecrets:
    @pytest.fixture(autouse=True)
    def credentials(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
        monkeypatch.delenv("WARDLINK_MQTT_PASSWORD", raising=False)
        return tmp_path

    def test_a_credential_file_comes_before_the_environment(
        self, credentials: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert config.secret("mqtt-password") is None
        monkeypatch.setenv("WARDLINK_MQTT_PASSWORD", "from the environment")
        assert config.secret("mqtt-password") == "from the environment"
        (credentials / "mqtt-password").write_text(f"{SECRET}\n")
        assert config.secret("mqtt-password") == SECRET
        monkeypatch.delenv("CREDENTIALS_DIRECTORY")
        assert config.required_secret("mqtt-password", "mqtt.username") == "from the environment"

    def test_a_missing_one_says_where_it_is_looked_for(self) -> None:
        with pytest.raises(ConfigError, match=r"'mqtt-password' is missing, needed for mqtt\.username 'x'") as caught:
            config.required_secret("mqtt-password", "mqtt.username 'x'")
        assert "LoadCredential=mqtt-password" in caught.value.hint
        assert "WARDLINK_MQTT_PASSWORD" in caught.value.hint

    def test_an_empty_one_is_not_taken_for_a_missing_one(self, credentials: Path) -> None:
        (credentials / "mqtt-password").write_text("\n")
        with pytest.raises(ConfigError, match="'mqtt-password' is empty"):
            config.required_secret("mqtt-password", "mqtt.username")

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (SECRET.encode() * 1000, "more than 4096 bytes"),
            (b"\xff" + SECRET.encode(), "not text in UTF-8"),
            (SECRET.encode() + b"\0", "not text in UTF-8"),
        ],
    )
    def test_one_that_cannot_be_used_is_an_error_without_its_content(
        self, credentials: Path, content: bytes, said: str
    ) -> None:
        file = credentials / "mqtt-password"
        file.write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            config.secret("mqtt-password")
        assert str(file) in caught.value.message
        assert said in caught.value.message
        assert caught.value.hint
        assert SECRET not in str(caught.value)
        assert "\\xff" not in str(caught.value)

    def test_a_folder_or_a_device_in_its_place_is_an_error(self, credentials: Path) -> None:
        (credentials / "mqtt-password").mkdir()
        with pytest.raises(ConfigError, match="cannot be read"):
            config.secret("mqtt-password")
        (credentials / "mqtt-password").rmdir()
        (credentials / "mqtt-password").symlink_to("/dev/zero")
        with pytest.raises(ConfigError, match="more than"):
            config.secret("mqtt-password")

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody who may not read the file")
    def test_a_credential_of_somebody_else_is_an_error(self, credentials: Path) -> None:
        file = credentials / "mqtt-password"
        file.write_text(SECRET)
        file.chmod(0o600)
        credentials.chmod(0o700)
        os.seteuid(65534)
        try:
            with pytest.raises(ConfigError, match="cannot be read: Permission denied"):
                config.secret("mqtt-password")
        finally:
            os.seteuid(0)

    def test_a_line_break_in_the_middle_is_kept(self, credentials: Path) -> None:
        (credentials / "mqtt-password").write_text(" two\nlines \r\n")
        assert config.secret("mqtt-password") == " two\nlines "


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "127.0.0.1", "127.9.9.9", "::1", "[::1]", "/run/pg"])
def test_loopback(host: str) -> None:
    assert config.is_loopback(host)


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::", "10.0.0.1", "localhost.example", "127.0.0.1.example", "1"])
def test_not_loopback(host: str) -> None:
    assert not config.is_loopback(host)


def test_settings_are_frozen(main: Path) -> None:
    tree = config.load(main, Tree)
    with pytest.raises(AttributeError):
        tree.server.port = 2  # type: ignore[misc]
