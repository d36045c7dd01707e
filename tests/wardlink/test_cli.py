"""The command as users meet it: exit codes, one clear line and a hint, help with examples, only its own side loaded."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.errors import DeviceError, UnavailableError, WardlinkError
from wardlink import cli
from wardlink.terminal import show_error, show_rows

SECONDS_MAX = 60
ROOT = Path(__file__).parents[2]
CONFIG = '[gateway]\nid = "gw-1"\nstate_dir = "{state}"\n[mqtt]\nhost = "127.0.0.1"\ntls = false\n'


def wardlink(*words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command as a program of its own, without the credentials of whoever runs the tests."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("WARDLINK_", "CREDENTIALS"))}
    return subprocess.run(
        [sys.executable, "-m", "wardlink", *words],
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
        cwd=ROOT,
        env=inherited | {"COLUMNS": "120"} | (env or {}),
    )


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "gateway.toml"
    path.write_text(CONFIG.format(state=tmp_path / "state"))
    return path


def assert_one_error(done: subprocess.CompletedProcess[str], code: int, words: str) -> None:
    """One line that says what, one that says what helps, and nothing that only a programmer reads."""
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if not re.match(r"\d{4}-\d\d-\d\d ", line)]
    assert len(lines) == 2, done.stderr
    assert lines[0].startswith("error: ")
    assert words in lines[0]
    assert re.fullmatch(r"hint: .+", lines[1])
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


# --- what goes wrong


@pytest.mark.parametrize("command", [["check-config"], ["run"], ["spool", "status"]])
def test_a_missing_file(tmp_path: Path, command: list[str]) -> None:
    done = wardlink("gateway", *command, "--config", str(tmp_path / "none.toml"))
    assert_one_error(done, 2, f"{tmp_path / 'none.toml'}: no such file")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[gateway\n", "not valid TOML"),
        ('[gateway]\nid = "a"\nid = "b"\n', "not valid TOML"),
        (CONFIG + "[uplnk]\n", "uplnk: no such key"),
        (CONFIG.replace("host", "#"), "mqtt.host: missing"),
        (CONFIG + '[[device]]\ndriver = "citon"\nserial = "1"\nport = "/dev/x"\n', "no driver 'citon'"),
        (CONFIG + 'username = "gw-1"\n', "credential 'mqtt-password' is missing"),
    ],
)
@pytest.mark.parametrize("action", ["check-config", "run"])
def test_a_wrong_configuration(tmp_path: Path, action: str, text: str, words: str) -> None:
    path = tmp_path / "gateway.toml"
    path.write_text(text.replace("{state}", str(tmp_path)))
    assert_one_error(wardlink("gateway", action, "--config", str(path)), 2, words)
    assert list(tmp_path.iterdir()) == [path], "nothing is opened before all is checked"


def test_a_certificate_that_is_not_there(tmp_path: Path, config: Path) -> None:
    """Only a person can mend it, so the service ends, and systemd does not start it again."""
    config.write_text(config.read_text().replace("tls = false", f'[mqtt.tls]\nca_file = "{tmp_path}/ca.pem"\n'))
    done = wardlink("gateway", "run", "--config", str(config))
    assert_one_error(done, 2, "ca.pem")


def test_a_state_folder_that_cannot_be_written(tmp_path: Path, config: Path) -> None:
    (tmp_path / "state").write_text("a file is in the way")
    assert_one_error(wardlink("gateway", "run", "--config", str(config)), 1, str(tmp_path / "state"))


@pytest.mark.parametrize("command", [["run"], ["spool", "status"]])
def test_a_corrupt_outbox(tmp_path: Path, config: Path, command: list[str]) -> None:
    outbox = tmp_path / "state" / "outbox.db"
    outbox.parent.mkdir()
    outbox.write_bytes(b"no database at all" * 999)
    assert_one_error(wardlink("gateway", *command, "--config", str(config)), 1, str(outbox))
    assert outbox.read_bytes() == b"no database at all" * 999, "it may be all that there is of somebody's data"


def test_an_outbox_that_is_not_there_yet(tmp_path: Path, config: Path) -> None:
    assert_one_error(wardlink("gateway", "spool", "status", "--config", str(config)), 2, "outbox.db")
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    "words", [[], ["gatway"], ["gateway"], ["gateway", "spool"], ["gateway", "drivers", "--jsn"], ["cloud"]]
)
def test_a_wrong_command_line_is_answered_with_the_usage(words: list[str]) -> None:
    done = wardlink(*words)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: wardlink")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_the_cloud_side_keeps_to_the_same(tmp_path: Path) -> None:
    assert_one_error(wardlink("cloud", "check-config", "--config", str(tmp_path / "none.toml")), 2, "no such file")


@pytest.mark.parametrize(
    ("side", "package", "extra"),
    [("gateway", "paho", "gateway"), ("cloud", "psycopg", "cloud"), ("demo", "rich", "gateway,cloud")],
)
def test_a_side_that_is_not_installed_says_what_to_install(side: str, package: str, extra: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from wardlink.cli import main; sys.exit(main([{side!r}]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert_one_error(done, 2, f"the Python package {package} is not installed")
    assert f"wardlink[{extra}]" in done.stderr


def test_a_module_of_our_own_that_is_missing_is_a_bug_and_shows_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gateway.app", None)
    monkeypatch.delitem(sys.modules, "wardlink.gateway_service", raising=False)
    monkeypatch.delattr("wardlink.gateway_service", raising=False)
    monkeypatch.delattr("gateway.app", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"gateway\.app"):
        cli.main(["gateway", "drivers"])


def failing(error: BaseException) -> int:
    def fail(_args: object) -> int:
        raise error

    class Parser:
        def parse_args(self, _words: object) -> object:
            return type("Args", (), {"handler": staticmethod(fail)})()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_parser", lambda _side: Parser())
        return cli.main([])


def test_errors_of_tasks_that_fail_together_are_one_error(capsys: pytest.CaptureFixture[str]) -> None:
    group = BaseExceptionGroup("tasks", [ExceptionGroup("inner", [DeviceError("broken", hint="mend it")])])
    assert failing(group) == 1
    assert capsys.readouterr().err == "error: broken\nhint: mend it\n"


def test_a_bug_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        failing(ZeroDivisionError())
    with pytest.raises(ExceptionGroup):
        failing(ExceptionGroup("tasks", [UnavailableError("away"), ZeroDivisionError()]))


def test_ctrl_c_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(KeyboardInterrupt()) == 128 + signal.SIGINT
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("words", [["gateway", "drivers", "--json"], ["gateway", "simulate", "--list"]])
def test_a_reader_that_goes_away_is_no_error(words: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "wardlink", *words]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False, cwd=ROOT, env=buffered)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


# --- help


def help_pages() -> Iterator[tuple[list[str], str]]:
    """Every command that there is, found by following the help pages themselves."""
    waiting: list[list[str]] = [[]]
    while waiting:
        words = waiting.pop()
        with contextlib.redirect_stdout(io.StringIO()) as page, pytest.raises(SystemExit) as ended:
            cli.main([*words, "--help"])
        assert ended.value.code == 0
        yield words, page.getvalue()
        listed = page.getvalue().partition("positional arguments:")[2]
        found = re.findall(r"^    ([a-z][a-z-]*)(?:  |$)", listed, re.MULTILINE)
        waiting += [[*words, word] for word in found]


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "120")
        return {" ".join(words): page for words, page in help_pages()}


def test_every_command_has_help(pages: dict[str, str]) -> None:
    assert {"", "gateway", "gateway run", "gateway spool status", "cloud run", "cloud device add", "demo"} <= set(pages)
    assert all(page.startswith("usage: wardlink") for page in pages.values())


def test_every_command_of_the_gateway_shows_how_it_is_used(pages: dict[str, str]) -> None:
    groups = {name for name in pages if any(other.startswith(f"{name} ") for other in pages)} - {""}
    ours = {name for name in pages if not name.startswith("cloud")} - groups
    without = [name for name in ours if "examples:\n  wardlink " not in pages[name]]
    assert without == []


@pytest.mark.parametrize("name", ["", "demo", "gateway run", "gateway spool status", "gateway simulate"])
def test_the_examples_are_commands_that_exist(pages: dict[str, str], name: str) -> None:
    examples = re.findall(r"^  wardlink (.+)$", pages[name].partition("examples:")[2], re.MULTILINE)
    assert examples
    for example in examples:
        words = re.split(r" {2,}", example)[0].split()
        assert any(" ".join(words[:count]) in pages for count in range(1, len(words) + 1)), example
        known = max((count for count in range(len(words) + 1) if " ".join(words[:count]) in pages), default=0)
        for option in (word for word in words[known:] if word.startswith("--")):
            assert option in pages[" ".join(words[:known])], example


def test_the_version() -> None:
    done = wardlink("--version")
    assert done.returncode == 0
    assert re.fullmatch(r"wardlink \d+\.\d+.*\n", done.stdout)


# --- what is loaded


def loaded(code: str, *arguments: str) -> set[str]:
    """Top-level modules that a program has loaded at its end, and ours in full."""
    report = (
        "import sys, json; print('\\n' + json.dumps(sorted(m for m in sys.modules"
        " if '.' not in m or m.startswith(('gateway.', 'cloud_sync.', 'wardlink.')))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}", *arguments], capture_output=True, text=True, check=True, cwd=ROOT
    )
    names: list[str] = json.loads(done.stdout.splitlines()[-1])
    return set(names)


CLOUD_LIBRARIES = {"psycopg", "psycopg_pool", "influxdb_client", "cloud_sync"}
GATEWAY_LIBRARIES = {"bleak", "bleak_retry_connector", "serial", "dbus_fast"}


def test_the_gateway_loads_nothing_of_the_cloud_and_only_what_it_uses(config: Path) -> None:
    code = "from wardlink.cli import main; import sys; assert main(sys.argv[1:]) == 0"
    got = loaded(code, "gateway", "check-config", "--config", str(config))
    assert "gateway.app" in got
    assert not got & CLOUD_LIBRARIES
    assert not got & GATEWAY_LIBRARIES
    assert not got & {"rich", "redis", "scipy", "edfio", "pandas", "matplotlib", "wardlink.demo", "gateway.virtual"}


def test_a_gateway_that_is_made_loads_no_redis_that_it_does_not_use(config: Path) -> None:
    code = "import sys; from pathlib import Path; from gateway import app, settings; "
    code += "app.Gateway(settings.load(Path(sys.argv[1])))"
    assert not loaded(code, str(config)) & {"redis", "rich", "bleak", "serial"}
    config.write_text(config.read_text() + '[live.redis]\nurl = "redis://localhost"\n')
    assert "redis" in loaded(code, str(config))


def test_a_gateway_loads_the_links_of_its_devices() -> None:
    code = (
        "from gateway.reach import link_maker; from gateway.settings import Device;"
        "link_maker(Device(driver='cyton', serial='C', port='/dev/x'))"
    )
    got = loaded(code)
    assert "serial" in got
    assert not got & {"bleak", "dbus_fast", "rich", "redis"}
    code = code.replace("cyton", "heart_rate").replace("port='/dev/x'", "address='00:22:D0:3A:10:01'")
    got = loaded(code)
    assert "bleak" in got
    assert not got & {"serial", "rich", "redis"}


def test_the_cloud_loads_nothing_of_the_gateways_devices() -> None:
    got = loaded("import wardlink.cloud_service, wardlink.cloud_admin, cloud_sync.app")
    assert "psycopg" in got
    assert not got & (GATEWAY_LIBRARIES | {"scipy", "edfio", "redis"})
    parts = {name.split(".")[1] for name in got if name.startswith("gateway.")}
    assert not parts & {"app", "acquisition", "devices", "links", "live", "settings", "signal", "spool", "uplink"}


@pytest.mark.parametrize("side", ["", "demo"])
def test_help_loads_no_side(side: str) -> None:
    got = loaded("from wardlink import cli; cli._parser('')")
    assert not got & (CLOUD_LIBRARIES | GATEWAY_LIBRARIES | {"numpy", "rich", "paho", "gateway.app"})


# --- terminal


def test_what_others_wrote_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    error = WardlinkError("said \x1b[2Jhello\r\x07 [bold]x[/] :key:\nsecond line", hint="\x9b31m")
    assert show_error(error) == 1
    assert capsys.readouterr().err == (
        "error: said \ufffd[2Jhello\ufffd\ufffd [bold]x[/] :key:\nsecond line\nhint: \ufffd31m\n"
    )


def test_rows_for_people_and_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"name_of": "[red]:key:", "count": None}]
    show_rows(("name_of", "count"), rows, as_json=True)
    assert json.loads(capsys.readouterr().out) == rows
    show_rows(("name_of", "count"), rows, as_json=False, title="what")
    out = capsys.readouterr().out
    assert out.splitlines()[0].strip() == "what"
    assert "name of" in out
    assert "[red]:key:" in out
    assert "None" not in out
    assert "\x1b" not in out
