"""What an operator can set on a gateway: `gateway.toml` and `conf.d/*.toml`, checked before anything is opened."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import parse_qs, urlsplit

import msgspec
from msgspec import Meta

from gateway import broker as mqtt_broker
from gateway import config
from gateway.broker import Mqtt
from gateway.config import Section
from gateway.devices import registry
from gateway.feature_settings import Features, MeaninglessError
from gateway.mqtt import Broker
from gateway.samples import EEG, QUALITY
from gateway.signal.bands import FeatureSettings
from gateway.signal.conditioning import check_settings
from gateway.wire.topics import NAME_PATTERN, NAME_RULE

DEFAULT_PATH = Path("/etc/wardlink/gateway.toml")
MQTT_PASSWORD = mqtt_broker.PASSWORD
REDIS_PASSWORD = "redis-password"  # noqa: S105 - the credential's name, not its value

Name = Annotated[str, Meta(pattern=NAME_PATTERN, description=NAME_RULE)]
Seconds = Annotated[float, Meta(gt=0, le=86_400)]
_UUID = r"^[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}$(?!\n)"
Uuid = Annotated[str, Meta(pattern=_UUID, description="a UUID, as 6b1f5f0e-6f3a-4b1e-9c50-0d9c5a3c7a11")]
_BLUETOOTH_ADDRESS = re.compile(r"([0-9A-F]{2}:){5}[0-9A-F]{2}")


class Gateway(Section, frozen=True):
    """Who this gateway is and where it keeps its data."""

    id: Name
    state_dir: str = "/var/lib/wardlink-gateway"


class Spool(Section, frozen=True):
    """The durable outbox."""

    backend: Literal["sqlite", "redis"] = "sqlite"
    path: str | None = None
    """SQLite file; default: `outbox.db` in `gateway.state_dir`."""
    redis_url: str | None = None
    commit_interval_s: Annotated[float, Meta(ge=0.01, le=60)] = 1.0
    commit_blocks: Annotated[int, Meta(ge=1, le=4096)] = 64
    bytes_max: Annotated[int, Meta(ge=1 << 20)] = 4 << 30
    free_bytes_min: Annotated[int, Meta(ge=0)] = 64 << 20
    """SQLite: the outbox grows no further where less of its disk would be free."""
    reserve_bytes: Annotated[int, Meta(ge=0, le=1 << 30)] = 8 << 20
    """SQLite: a file that is deleted when the disk is full all the same; twice its log fits into it."""
    encrypt: bool = False
    """Seal every record with the key in the credential `spool-key`."""


class Uplink(Section, frozen=True):
    """How the outbox is sent."""

    backlog_delay_s: Annotated[float, Meta(ge=0.05, le=10)] = 0.5
    """How long backlog that drains may make live data wait on the link."""
    window_bytes_max: Annotated[int, Meta(ge=1 << 12, le=16 << 20)] = 256 << 10
    """Bytes of backlog on their way to the broker at a time, on the fastest link: 20 Mbit/s over 100 ms."""
    resend_after_s: Seconds = 60.0
    """A block that was sent and passed by receipts of later ones, or while no receipt came at all, is sent again after
    this time, if a bridge is present."""
    drain_s: Annotated[float, Meta(ge=0, le=60)] = 5.0
    """How long a gateway that is asked to stop waits for the receipts of what it has."""


class Clock(Section, frozen=True):
    """What to do while the host's clock is not synchronised."""

    hold_s: Annotated[float, Meta(ge=0, le=7 * 86_400)] = 600.0
    """How long blocks are held back for their right time while the broker is there; 0: never, they go out marked."""
    trust_bridge: bool = False
    """Take the time from a bridge whose own clock is not synchronised, as if it were."""


class LiveRedis(Section, frozen=True):
    """The cache of newest states for pages and feedback; all of it can be lost with no harm."""

    url: str


class Live(Section, frozen=True):
    """Where newest states are shown besides MQTT."""

    redis: LiveRedis | None = None


class Bluetooth(Section, frozen=True):
    """The adapter that the BLE devices share."""

    adapter: Annotated[str, Meta(pattern=r"^hci[0-9]{1,3}$(?!\n)", description="an adapter, as hci1")] | None = None
    """Default: the first one that is on."""
    slots: Annotated[int, Meta(ge=1, le=64)] | None = None
    """Connections that it carries at once: no adapter says so, and one too many breaks others. Default: no limit."""


class Metrics(Section, frozen=True):
    """The gateway's state for Prometheus; off where neither is set."""

    textfile: str | None = None
    """File for node_exporter's textfile collector."""
    listen: str | None = None
    """Address to be scraped at, as 127.0.0.1:9464."""

    @property
    def address(self) -> tuple[str, int] | None:
        """Host and port of `listen`. Raises `ValueError` for what is no address."""
        if self.listen is None:
            return None
        host, colon, port = self.listen.rpartition(":")
        if not colon or not host or not port.isascii() or not port.isdigit() or int(port) >= 1 << 16:
            raise ValueError(self.listen)
        return host.strip("[]"), int(port)


class Device(Section, frozen=True):
    """One device that this gateway reads."""

    driver: Name
    serial: Name
    """The serial number under which the registry knows the device."""
    port: str | None = None
    """Serial devices: the port, best by `/dev/serial/by-id/…`."""
    address: str | None = None
    """BLE devices: the Bluetooth address."""
    channels: Annotated[tuple[Name, ...], Meta(min_length=1, max_length=256)] | None = None
    """Electrode names in the order of the device's inputs."""
    file: str | None = None
    """Replay only: the recording."""
    paced: bool = True
    """Replay only: at real speed, not as fast as possible."""
    repeat: bool = False
    """Replay only: from the beginning again at its end."""
    board_id: int | None = None
    """BrainFlow only: its number of the board."""
    stream: Annotated[str, Meta(min_length=1, max_length=200)] | None = None
    """LSL only: the name of the stream."""
    auxiliary: Literal["acceleration", "analog", "digital"] | None = None
    """Cyton only: a further signal from its auxiliary bytes."""
    brain_state: bool = True
    """EEG only: compute features."""
    features: Features = Features()
    """EEG only: where they are to be computed otherwise than `[features]` says."""
    raw: bool = True
    """EEG only: send raw samples too."""
    user_id: Uuid | None = None
    """Whose live state this is (a UUID, no name)."""
    session_id: Uuid | None = None

    @property
    def options(self) -> registry.Options:
        """What the driver is to know of it."""
        return registry.Options(self.channels, self.auxiliary)


class Settings(Section, frozen=True):
    """All of `gateway.toml`."""

    gateway: Gateway
    mqtt: Mqtt
    spool: Spool = Spool()
    uplink: Uplink = Uplink()
    clock: Clock = Clock()
    live: Live = Live()
    bluetooth: Bluetooth = Bluetooth()
    metrics: Metrics = Metrics()
    features: Features = Features()
    """How the brain state is computed; `load` has put it beneath that of each device."""
    device: Annotated[tuple[Device, ...], Meta(max_length=64)] = ()

    @property
    def outbox_path(self) -> Path:
        """File of the SQLite outbox."""
        return Path(self.spool.path or Path(self.gateway.state_dir) / "outbox.db")


def load(path: Path) -> Settings:
    """Read and check everything that can be checked without opening anything. Raises `ConfigError`."""
    settings = config.load(path, Settings)
    if not Path(settings.gateway.state_dir).is_absolute():
        raise config.problem(path, "gateway.state_dir", "expected an absolute path", hint="it begins with /")
    mqtt_broker.check(path, settings.mqtt)
    _check_spool(path, settings.spool)
    if settings.live.redis is not None:
        _check_redis_url(path, "live.redis.url", settings.live.redis.url)
    _check_metrics(path, settings.metrics)
    _check_devices(path, settings.device)
    return msgspec.structs.replace(settings, device=_with_features(path, settings))


def warnings(settings: Settings) -> list[str]:
    """What is allowed but should be known."""
    found = []
    mqtt = settings.mqtt
    if not mqtt.tls and not config.is_loopback(mqtt.host):
        found.append(f"mqtt.tls is off and {mqtt.host} is another machine: data travels in clear")
    live = settings.live.redis
    for key, text in (("spool.redis_url", settings.spool.redis_url), ("live.redis.url", live.url if live else None)):
        url = urlsplit(text or "")
        if url.scheme == "redis" and not config.is_loopback(url.hostname or ""):
            found.append(f"{key} has no TLS and {url.hostname} is another machine: data travels in clear")
    address = settings.metrics.address
    if address is not None and not config.is_loopback(address[0]):
        found.append(f"metrics.listen is {settings.metrics.listen}: other machines can read it, with no login")
    if not settings.device:
        found.append("there is no [[device]]: nothing will be read")
    return found


def broker(settings: Settings) -> Broker:
    """The broker with the credential that belongs to it. Raises `ConfigError` where that is missing."""
    return mqtt_broker.broker(settings.mqtt, f"wardlink-{settings.gateway.id}")


def _check_spool(path: Path, spool: Spool) -> None:
    if spool.path is not None and not Path(spool.path).is_absolute():
        raise config.problem(path, "spool.path", "expected an absolute path", hint="it begins with /")
    if spool.redis_url is not None:
        _check_redis_url(path, "spool.redis_url", spool.redis_url)
    elif spool.backend == "redis":
        raise config.problem(
            path, "spool.redis_url", "missing", hint='backend = "redis" needs the URL, as redis://localhost:6379/0'
        )


def _check_metrics(path: Path, metrics: Metrics) -> None:
    file = metrics.textfile
    if file is not None and not (Path(file).is_absolute() and file.endswith(".prom")):
        raise config.problem(
            path, "metrics.textfile", "expected an absolute path that ends with .prom", hint="others are not collected"
        )
    try:
        _ = metrics.address
    except ValueError:
        raise config.problem(
            path, "metrics.listen", f"{metrics.listen!r} is no address", hint="expected host:port, as 127.0.0.1:9464"
        ) from None


def _check_redis_url(path: Path, key: str, text: str) -> None:
    """The URL is not repeated in the error: it may hold a password."""
    expected = "expected redis://host:6379/0, rediss://host:6379/0 (TLS) or unix:///run/redis/redis.sock"
    try:
        url = urlsplit(text)
        port_is_valid = url.port is None or url.port > 0
    except ValueError:
        raise config.problem(path, key, "not a URL of a Redis server", hint=expected) from None
    place = url.path if url.scheme == "unix" else url.hostname
    if url.scheme not in {"redis", "rediss", "unix"} or not place or not port_is_valid:
        raise config.problem(path, key, "not a URL of a Redis server", hint=expected)
    if url.password is not None or "password" in parse_qs(url.query):
        raise config.problem(path, key, "holds a password", hint=f"it belongs into the credential {REDIS_PASSWORD!r}")


def _check_devices(path: Path, devices: tuple[Device, ...]) -> None:
    seen: dict[tuple[str, str], int] = {}
    for number, device in enumerate(devices):
        key = f"device[{number}]"
        driver = registry.DRIVERS.get(device.driver)
        if driver is None:
            known = ", ".join(sorted(registry.DRIVERS))
            raise config.problem(path, f"{key}.driver", f"no driver {device.driver!r}", hint=f"known drivers: {known}")
        _check_place(path, key, device, driver)
        for name in ("serial", "port", "address"):
            value = getattr(device, name)
            if value is None:
                continue
            other = seen.setdefault((name, value.upper() if name == "address" else value), number)
            if other != number:
                raise config.problem(
                    path, f"{key}.{name}", f"{value!r} is there twice", hint=f"device[{other}] has it, too"
                )
        if device.channels is not None:
            _check_channels(path, key, device, driver)


def _with_features(path: Path, settings: Settings) -> tuple[Device, ...]:
    """The devices with what holds for their features."""
    _meaning(path, "features", settings.features)
    devices = []
    for number, device in enumerate(settings.device):
        key = f"device[{number}].features"
        chosen = msgspec.structs.replace(device, features=device.features.over(settings.features))
        meaning = _meaning(path, key, chosen.features)
        driver = registry.DRIVERS[device.driver]
        if not isinstance(driver.line, registry.Asked):  # those say their rate only when they are asked
            streams = [spec for spec in driver.decoder(device.options).signals if spec.signal == EEG]
            if not streams and device.features != Features():
                raise config.problem(path, key, f"a {device.driver} has no EEG", hint="remove it")
            for spec in streams if device.brain_state else ():
                assert spec.rate_hz is not None
                try:
                    check_settings(spec.rate_hz, len(spec.channels), meaning)
                except ValueError as error:
                    raise config.problem(path, key, str(error), hint=f"[{key}] goes over [features]") from None
        devices.append(chosen)
    return tuple(devices)


def _meaning(path: Path, key: str, features: Features) -> FeatureSettings:
    try:
        return features.settings()
    except MeaninglessError as error:
        raise config.problem(path, f"{key}.{error.key}", str(error)) from None


def _check_place(path: Path, key: str, device: Device, driver: registry.Driver) -> None:
    """Where the device is: a port, an address, or what else its link needs."""
    needed = {
        registry.LinkKind.FILE: ("file", device.file, "the path of a recording"),
        registry.LinkKind.BRAINFLOW: ("board_id", device.board_id, "brainflow.readthedocs.io lists the boards"),
        registry.LinkKind.LSL: ("stream", device.stream, "the stream's name, as the program that streams shows it"),
    }.get(driver.link)
    if needed is not None:
        name, value, hint = needed
        if value is None:
            raise config.problem(path, f"{key}.{name}", "missing", hint=hint)
        return
    if driver.link is registry.LinkKind.SERIAL:
        if not device.port:
            raise config.problem(path, f"{key}.port", "missing", hint="ls -l /dev/serial/by-id shows stable names")
        if not Path(device.port).is_absolute():
            raise config.problem(
                path, f"{key}.port", f"{device.port!r} is no path", hint="ls -l /dev/serial/by-id shows stable names"
            )
        if device.address is not None:
            raise config.problem(path, f"{key}.address", f"a {device.driver} is a serial device", hint="remove it")
    else:
        if not _BLUETOOTH_ADDRESS.fullmatch((device.address or "").upper()):
            raise config.problem(
                path,
                f"{key}.address",
                "expected a Bluetooth address like 00:11:22:AA:BB:CC",
                hint="bluetoothctl scan on shows the addresses around",
            )
        if device.port is not None:
            raise config.problem(path, f"{key}.port", f"a {device.driver} is a BLE device", hint="remove it")


def _check_channels(path: Path, key: str, device: Device, driver: registry.Driver) -> None:
    channels = device.channels or ()
    where = f"{key}.channels"
    if len(channels) != driver.channel_count:
        raise config.problem(
            path,
            where,
            f"{len(channels)} names, {device.driver} has {driver.channel_count} electrodes",
            hint="name them in the order of the inputs" if driver.channel_count else "remove it",
        )
    if len(set(channels)) != len(channels):
        twice = next(name for name in channels if channels.count(name) > 1)
        raise config.problem(path, where, f"{twice!r} is there twice", hint="every electrode has a name of its own")
    if QUALITY in channels:
        raise config.problem(path, where, f"{QUALITY!r} is the name of a field", hint="name the electrode otherwise")
