"""gateway.toml: what is accepted, what is refused, and with which words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from gateway import settings
from gateway.broker import TlsFiles
from gateway.devices.cyton import DEFAULT_ELECTRODES
from gateway.errors import EXIT_CONFIG, ConfigError
from gateway.links.ble import BleLink
from gateway.mqtt import Tls
from gateway.reach import link_maker
from gateway.settings import Device, LiveRedis, Settings

EXAMPLE = Path(__file__).parents[2] / "systemd" / "gateway.toml.example"
UNIT = EXAMPLE.with_name("wardlink-gateway.service")
MINIMAL = '[gateway]\nid = "gw-1"\n[mqtt]\nhost = "broker"\n'
CYTON = '[[device]]\ndriver = "cyton"\nserial = "C-1"\nport = "/dev/ttyUSB0"\n'
STRAP = '[[device]]\ndriver = "heart_rate"\nserial = "S-1"\naddress = "00:22:d0:3a:10:01"\n'
UUID = "6b1f5f0e-6f3a-4b1e-9c50-0d9c5a3c7a11"

Load = Callable[..., Settings]


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CREDENTIALS_DIRECTORY", "WARDLINK_MQTT_PASSWORD", "WARDLINK_REDIS_PASSWORD"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def write_and_load(text: str = "", **fragments: str) -> Settings:
        (tmp_path / "gateway.toml").write_text(MINIMAL + text)
        (tmp_path / "conf.d").mkdir(exist_ok=True)
        for name, fragment in fragments.items():
            (tmp_path / "conf.d" / f"{name}.toml").write_text(fragment)
        return settings.load(tmp_path / "gateway.toml")

    return write_and_load


def refused(load: Load, text: str, **fragments: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(text, **fragments)
    assert caught.value.exit_code == EXIT_CONFIG
    assert caught.value.hint
    return caught.value


# --- defaults


def test_what_is_not_said_has_a_safe_default(load: Load) -> None:
    chosen = load()
    assert chosen.mqtt.port == 8883
    assert chosen.mqtt.tls is True
    assert chosen.spool.backend == "sqlite"
    assert (chosen.spool.commit_interval_s, chosen.spool.commit_blocks) == (1.0, 64)
    assert chosen.uplink.resend_after_s == 60
    assert (chosen.clock.hold_s, chosen.clock.trust_bridge) == (600, False)
    assert (chosen.live.redis, chosen.device) == (None, ())
    assert chosen.outbox_path == Path("/var/lib/wardlink-gateway/outbox.db")


def test_the_default_folder_is_the_one_that_the_unit_makes() -> None:
    folder = re.search(r"^StateDirectory=(.+)$", UNIT.read_text(), re.MULTILINE)
    assert folder is not None
    assert settings.Gateway(id="x").state_dir == f"/var/lib/{folder[1]}"


def test_the_outbox_can_be_elsewhere(load: Load) -> None:
    assert load('[spool]\npath = "/data/box.db"').outbox_path == Path("/data/box.db")


def test_tls_is_verified_unless_it_is_turned_off(load: Load) -> None:
    assert settings.broker(load()).tls == Tls()
    assert settings.broker(load("tls = false")).tls is None
    assert settings.broker(load("tls = true")).tls == Tls()
    files = '[mqtt.tls]\nca_file = "/ca"\ncert_file = "/c"\nkey_file = "/k"'
    assert settings.broker(load(files)).tls == Tls(Path("/ca"), Path("/c"), Path("/k"))
    assert settings.broker(load('[mqtt.tls]\nca_file = "/ca"')).tls == Tls(Path("/ca"))


def test_the_broker_knows_a_gateway_by_its_id(load: Load) -> None:
    broker = settings.broker(load("port = 1883\ntls = false"))
    assert (broker.host, broker.port, broker.client_id) == ("broker", 1883, "wardlink-gw-1")
    assert (broker.username, broker.password) == (None, None)


@pytest.mark.parametrize(
    ("host", "sound"),
    [
        ("broker", True),
        ("broker.ward-5.example.org", True),
        ("broker.example.org.", True),
        ("my_broker", True),
        ("192.168.1.7", True),
        ("::1", True),
        ("fe80::1%eth0", True),
        ("", False),
        ("broker:8883", False),
        ("mqtts://broker", False),
        ("broker/path", False),
        ("two words", False),
        ("broker\n", False),
        (".broker", False),
    ],
)
def test_a_host_is_a_name_or_an_address(tmp_path: Path, host: str, *, sound: bool) -> None:
    path = tmp_path / "gateway.toml"
    path.write_text(f'[gateway]\nid = "gw-1"\n[mqtt]\nhost = {msgspec.json.encode(host).decode()}\n')
    if sound:
        assert settings.load(path).mqtt.host == host
    else:
        with pytest.raises(ConfigError, match=r"mqtt\.host"):
            settings.load(path)


# --- refusals


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        # the tree
        ("[mqtt2]\nhost = 1", "mqtt2", "no such key"),
        ("prot = 1", "mqtt.prot", "did you mean 'port'"),
        ("port = 0", "mqtt.port", ">= 1"),
        ("port = 65536", "mqtt.port", "<= 65535"),
        ('port = "8883"', "mqtt.port", "a whole number stands without quotes"),
        ('tls = "yes"', "mqtt.tls", "true or false"),
        ("[mqtt.tls]\nverify = false", "mqtt.tls.verify", "no such key"),
        ('password = "s3cret"', "mqtt.password", "no such key"),
        ('[gateway2]\nid = "a b"', "gateway2", "no such key"),
        ('[spool]\nbackend = "files"', "spool.backend", '"redis", "sqlite"'),
        ("[spool]\ncommit_interval_s = 0", "spool.commit_interval_s", ">= 0.01"),
        ("[spool]\ncommit_blocks = 0", "spool.commit_blocks", ">= 1"),
        ("[spool]\nbytes_max = 1000", "spool.bytes_max", ">= 1048576"),
        ("[uplink]\nwindow_bytes_max = 0", "uplink.window_bytes_max", ">= 4096"),
        ("[uplink]\nbacklog_delay_s = 0", "uplink.backlog_delay_s", ">= 0.05"),
        ("[uplink]\nresend_after_s = 0", "uplink.resend_after_s", "> 0"),
        ("[clock]\nhold_s = -1", "clock.hold_s", ">= 0"),
        ("[clock]\nhold_s = 1e9", "clock.hold_s", "<= 604800"),
        ("[uplink]\ndrain_s = -1", "uplink.drain_s", ">= 0"),
        ("[uplink]\ndrain_s = 61", "uplink.drain_s", "<= 60"),
        # what types cannot say
        ('[mqtt.tls]\ncert_file = "/c"', "mqtt.tls", "mqtt.tls.key_file is missing"),
        ('[mqtt.tls]\nkey_file = "/k"', "mqtt.tls", "mqtt.tls.cert_file is missing"),
        ('[spool]\npath = "box.db"', "spool.path", "absolute"),
        ('[spool]\nbackend = "redis"', "spool.redis_url", "missing"),
        ('[spool]\nredis_url = "localhost:6379"', "spool.redis_url", "redis://host:6379/0"),
        ('[live.redis]\nurl = "http://localhost"', "live.redis.url", "redis://host:6379/0"),
        ('[live.redis]\nurl = "redis://localhost:port"', "live.redis.url", "redis://host:6379/0"),
        ('[live.redis]\nurl = "redis://localhost:70000"', "live.redis.url", "redis://host:6379/0"),
        ('[live.redis]\nurl = "unix://"', "live.redis.url", "redis://host:6379/0"),
        ('[bluetooth]\nadapter = "bluetooth0"', "bluetooth.adapter", "an adapter, as hci1"),
        ("[bluetooth]\nslots = 0", "bluetooth.slots", ">= 1"),
        ('[metrics]\ntextfile = "wardlink.prom"', "metrics.textfile", "absolute path that ends with .prom"),
        ('[metrics]\ntextfile = "/x/wardlink.txt"', "metrics.textfile", "absolute path that ends with .prom"),
        ('[metrics]\nlisten = "9464"', "metrics.listen", "expected host:port"),
        ('[metrics]\nlisten = ":9464"', "metrics.listen", "expected host:port"),
        ('[metrics]\nlisten = "localhost:70000"', "metrics.listen", "expected host:port"),
        ('[metrics]\nlisten = "localhost:http"', "metrics.listen", "expected host:port"),
        # devices
        (CYTON.replace("cyton", "citon"), "device[0].driver", "known drivers: "),
        (CYTON.replace("C-1", "C 1"), "device[0].serial", "letters, digits"),
        (CYTON.replace("C-1", ""), "device[0].serial", "letters, digits"),
        (CYTON.replace('serial = "C-1"\n', ""), "device[0].serial", "missing"),
        (CYTON.replace('port = "/dev/ttyUSB0"', ""), "device[0].port", "/dev/serial/by-id"),
        (CYTON.replace("/dev/ttyUSB0", "ttyUSB0"), "device[0].port", "no path"),
        (CYTON + 'address = "00:22:d0:3a:10:01"', "device[0].address", "serial device"),
        (STRAP.replace("address", "#"), "device[0].address", "00:11:22:AA:BB:CC"),
        (STRAP.replace("00:22", "0022"), "device[0].address", "00:11:22:AA:BB:CC"),
        (STRAP + 'port = "/dev/ttyUSB0"', "device[0].port", "BLE device"),
        (CYTON + CYTON.replace("USB0", "USB1"), "device[1].serial", "'C-1' is there twice"),
        (CYTON + CYTON.replace("C-1", "C-2"), "device[1].port", "device[0] has it, too"),
        (STRAP + STRAP.replace("S-1", "S-2").replace(":d0:", ":D0:"), "device[1].address", "is there twice"),
        (CYTON + 'channels = ["A"]', "device[0].channels", "1 names, cyton has 8"),
        (CYTON + "channels = []", "device[0].channels", ">= 1"),
        (STRAP + 'channels = ["A"]', "device[0].channels", "remove it"),
        (CYTON + 'channels = ["A", "B", "C", "D", "E", "F", "G", "A"]', "device[0].channels", "'A' is there twice"),
        (CYTON + 'channels = ["A", "B", "C", "D", "E", "F", "G", "quality"]', "device[0].channels", "name of a field"),
        (CYTON + 'channels = ["A", "B", "C", "D", "E", "F", "G", "a/b"]', "device[0].channels[7]", "letters, digits"),
        (CYTON + 'user_id = "Anna"', "device[0].user_id", "a UUID"),
        (CYTON + 'session_id = "1"', "device[0].session_id", "a UUID"),
        (CYTON + f'session_id = "{UUID}\\n"', "device[0].session_id", "a UUID"),
        (STRAP.replace(":01", ":01\\n"), "device[0].address", "00:11:22:AA:BB:CC"),
        (CYTON + "raw = 1", "device[0].raw", "true or false"),
        (CYTON + "colour = 1", "device[0].colour", "known here"),
    ],
)
def test_a_wrong_key_is_named_with_its_file_and_what_was_expected(
    load: Load, tmp_path: Path, text: str, key: str, words: str
) -> None:
    error = refused(load, text)
    assert error.message.startswith(f"{tmp_path / 'gateway.toml'}: {key}: ")
    assert words in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("text", ["", '[gateway]\nid = "gw-1"\n', '[mqtt]\nhost = "b"\n'])
def test_what_must_be_there_is_asked_for(tmp_path: Path, text: str) -> None:
    (tmp_path / "gateway.toml").write_text(text)
    with pytest.raises(ConfigError, match="missing"):
        settings.load(tmp_path / "gateway.toml")


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a+", "_cloud", "x" * 81])
def test_a_gateways_id_is_a_topic_level(tmp_path: Path, name: str) -> None:
    (tmp_path / "gateway.toml").write_text(f'[gateway]\nid = "{name}"\n[mqtt]\nhost = "b"\n')
    with pytest.raises(ConfigError, match=r"gateway\.id"):
        settings.load(tmp_path / "gateway.toml")


def test_a_relative_state_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "gateway.toml").write_text('[gateway]\nid = "g"\nstate_dir = "state"\n[mqtt]\nhost = "b"\n')
    with pytest.raises(ConfigError, match=r"gateway\.state_dir: expected an absolute path"):
        settings.load(tmp_path / "gateway.toml")


def test_the_file_that_has_the_key_is_named(load: Load, tmp_path: Path) -> None:
    error = refused(load, CYTON, **{"20-strap": STRAP.replace("heart_rate", "heart")})
    assert error.message.startswith(f"{tmp_path / 'conf.d' / '20-strap.toml'}: device[1].driver: no driver 'heart'")


def test_devices_of_all_files_are_read_in_order(load: Load) -> None:
    chosen = load(CYTON, **{"20-b": STRAP, "10-a": CYTON.replace("C-1", "C-2").replace("USB0", "USB1")})
    assert [device.serial for device in chosen.device] == ["C-1", "C-2", "S-1"]


def test_too_many_devices_are_refused(load: Load) -> None:
    many = "".join(CYTON.replace("C-1", f"C-{n}").replace("USB0", f"USB{n}") for n in range(65))
    assert "device" in refused(load, many).message


# --- secrets


def test_a_password_comes_from_a_credential_only(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = load('username = "gw-1"')
    with pytest.raises(ConfigError, match="mqtt-password") as caught:
        settings.broker(chosen)
    assert "WARDLINK_MQTT_PASSWORD" in caught.value.hint
    monkeypatch.setenv("WARDLINK_MQTT_PASSWORD", "from the environment")
    assert settings.broker(chosen).password == "from the environment"
    (tmp_path / "mqtt-password").write_text("from a file\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    broker = settings.broker(chosen)
    assert (broker.username, broker.password) == ("gw-1", "from a file")
    assert "from a file" not in f"{broker!r} {broker}"


@pytest.mark.parametrize("key", ["password", "mqtt_password", "token"])
def test_a_secret_in_the_file_is_refused_and_not_repeated(load: Load, key: str) -> None:
    assert "s3cret" not in str(refused(load, f'{key} = "s3cret"'))


@pytest.mark.parametrize("url", ["redis://:s3cret@", "redis://x:s3cret@h:port", "s3cret:port", "http://:s3cret@h"])
@pytest.mark.parametrize("text", ['[spool]\nredis_url = "{}"', '[live.redis]\nurl = "{}"'])
def test_a_url_that_is_refused_is_not_repeated(load: Load, text: str, url: str) -> None:
    assert "s3cret" not in str(refused(load, text.format(url)))


@pytest.mark.parametrize("place", [":s3cret@localhost", "user:s3cret@localhost", "localhost?password=s3cret"])
@pytest.mark.parametrize("text", ['[spool]\nredis_url = "{}"\n', '[live.redis]\nurl = "{}"\n'])
def test_a_password_in_a_url_is_refused_and_not_repeated(load: Load, text: str, place: str) -> None:
    error = str(refused(load, text.format(f"redis://{place}") + CYTON))
    assert "holds a password" in error
    assert "'redis-password'" in error
    assert "s3cret" not in error


@pytest.mark.parametrize("url", ["redis://localhost", "rediss://user@cache:6380/2", "unix:///run/r.sock?db=1"])
def test_urls_of_redis_servers(load: Load, url: str) -> None:
    chosen = load(f'[spool]\nbackend = "redis"\nredis_url = "{url}"\n[live.redis]\nurl = "{url}"')
    assert chosen.spool.redis_url == url
    assert chosen.live.redis == LiveRedis(url=url)


def test_what_travels_in_clear_is_warned_of(load: Load) -> None:
    assert settings.warnings(load(CYTON)) == []
    assert settings.warnings(load("tls = false\n" + CYTON)) == [
        "mqtt.tls is off and broker is another machine: data travels in clear"
    ]
    redis = '[live.redis]\nurl = "redis://cache"\n[spool]\nredis_url = "redis://localhost"\n'
    assert [line.split()[0] for line in settings.warnings(load(redis + CYTON))] == ["live.redis.url"]
    assert "nothing will be read" in settings.warnings(load())[0]


@pytest.mark.parametrize(
    ("listen", "address", "warned"),
    [
        ("127.0.0.1:9464", ("127.0.0.1", 9464), False),
        ("[::1]:9464", ("::1", 9464), False),
        ("localhost:0", ("localhost", 0), False),
        ("0.0.0.0:9464", ("0.0.0.0", 9464), True),
    ],
)
def test_metrics_are_off_and_local_unless_told(load: Load, listen: str, address: tuple[str, int], warned: bool) -> None:
    assert load().metrics.address is load().metrics.textfile is None
    chosen = load(f'{CYTON}[metrics]\nlisten = "{listen}"\n')
    assert chosen.metrics.address == address
    assert any("other machines can read it" in line for line in settings.warnings(chosen)) is warned


def test_ble_links_get_the_adapter_and_its_slots(load: Load) -> None:
    chosen = load(STRAP + '[bluetooth]\nadapter = "hci1"\nslots = 3\n')
    link = link_maker(chosen.device[0], chosen.bluetooth)()
    assert isinstance(link, BleLink)
    assert (link._adapter, link._slots) == ("hci1", 3)


def test_a_local_broker_in_clear_is_fine(tmp_path: Path) -> None:
    (tmp_path / "gateway.toml").write_text(MINIMAL.replace("broker", "127.0.0.1") + "tls = false\n" + CYTON)
    assert settings.warnings(settings.load(tmp_path / "gateway.toml")) == []


# --- the example


def uncommented(text: str) -> str:
    return re.sub(r"^# (?=\[|[a-z_]+ = )", "", text, flags=re.MULTILINE)


def keys_of(struct: type[msgspec.Struct]) -> Iterator[tuple[str, object]]:
    info = msgspec.inspect.type_info(struct)
    assert isinstance(info, msgspec.inspect.StructType)
    for one in info.fields:
        yield one.name, one.default


def test_the_example_is_accepted_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "gateway.toml").write_text(EXAMPLE.read_text())
    chosen = settings.load(tmp_path / "gateway.toml")
    assert chosen == Settings(gateway=chosen.gateway, mqtt=chosen.mqtt)
    assert chosen.mqtt.tls is True


def test_the_example_is_accepted_uncommented_and_shows_every_key_with_its_default(tmp_path: Path) -> None:
    (tmp_path / "gateway.toml").write_text(uncommented(EXAMPLE.read_text()))
    chosen = settings.load(tmp_path / "gateway.toml")
    assert "#" not in re.sub(r"^#.*$", "", (tmp_path / "gateway.toml").read_text(), flags=re.MULTILINE)
    assert isinstance(chosen.mqtt.tls, TlsFiles)
    assert chosen.live.redis is not None
    assert [device.driver for device in chosen.device] == ["cyton", "heart_rate", "replay", "brainflow", "lsl"]
    shown: list[msgspec.Struct] = [
        chosen.gateway,
        chosen.mqtt,
        chosen.mqtt.tls,
        chosen.spool,
        chosen.uplink,
        chosen.live,
        chosen.live.redis,
        chosen.features,
        chosen.features.bands,
        chosen.device[0],
    ]
    for section in shown:
        for name, default in keys_of(type(section)):
            value = getattr(section, name)
            if type(section) is Device and value is None:
                assert any(getattr(other, name) is not None for other in chosen.device), f"{name} is not shown"
            elif default in (None, msgspec.NODEFAULT) or name in {"tls", "redis", "features", "bands"}:
                assert value is not None, f"{name} is not shown"
            else:
                assert value == default, f"{name} is shown with another default"
                assert re.search(rf"^# {name} = ", EXAMPLE.read_text(), re.MULTILINE), f"{name} is not shown"
    assert chosen.device[0].channels == DEFAULT_ELECTRODES
    assert chosen.device[1].address is not None
    assert chosen.outbox_path == Path(settings.Gateway(id="x").state_dir) / "outbox.db"
