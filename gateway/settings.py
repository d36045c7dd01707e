"""What an operator can set on a gateway: `gateway.toml` and `conf.d/*.toml`, checked before anything is opened."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from gateway import config
from gateway.config import Section
from gateway.devices import registry
from gateway.mqtt import Broker, Tls
from gateway.wire.topics import NAME_PATTERN

DEFAULT_PATH = Path("/etc/wardlink/gateway.toml")
MQTT_PASSWORD = "mqtt-password"  # noqa: S105 - the credential's name, not its value
REDIS_PASSWORD = "redis-password"  # noqa: S105

Name = Annotated[str, Meta(pattern=NAME_PATTERN, description="letters, digits, '.', '_', ':' or '-', at most 80")]
Seconds = Annotated[float, Meta(gt=0, le=86_400)]
Port = Annotated[int, Meta(ge=1, le=65_535)]
_UUID = r"^[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}$"
_BLUETOOTH_ADDRESS = re.compile(r"^([0-9A-F]{2}:){5}[0-9A-F]{2}$")


class Gateway(Section, frozen=True):
    """Who this gateway is and where it keeps its data."""

    id: Name
    state_dir: str = "/var/lib/wardlink"


class TlsFiles(Section, frozen=True):
    """PEM files; without `ca_file` the system's authorities are trusted."""

    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None


class Mqtt(Section, frozen=True):
    """The broker. TLS is on, and its certificate verified, unless `tls = false` says otherwise."""

    host: Annotated[str, Meta(min_length=1)]
    port: Port = 8883
    username: str | None = None
    tls: bool | TlsFiles = True


class Spool(Section, frozen=True):
    """The durable outbox."""

    backend: Literal["sqlite", "redis"] = "sqlite"
    path: str | None = None
    """SQLite file; default: `outbox.db` in `gateway.state_dir`."""
    redis_url: str | None = None
    commit_interval_s: Annotated[float, Meta(ge=0.01, le=60)] = 0.5
    commit_blocks: Annotated[int, Meta(ge=1, le=4096)] = 64
    bytes_max: Annotated[int, Meta(ge=1 << 20)] = 4 << 30


class Uplink(Section, frozen=True):
    """How the outbox is sent."""

    window_messages: Annotated[int, Meta(ge=1, le=1000)] = 64
    """Blocks on their way to the broker at a time."""
    resend_after_s: Seconds = 60.0
    """A block that was sent and is not receipted after this time is sent again, if a bridge is present."""
    drain_s: Annotated[float, Meta(ge=0, le=60)] = 5.0
    """How long a gateway that is asked to stop waits for the receipts of what it has."""


class LiveRedis(Section, frozen=True):
    """The cache of newest states for pages and feedback; all of it can be lost with no harm."""

    url: Annotated[str, Meta(pattern=r"^(redis|rediss|unix)://")]


class Live(Section, frozen=True):
    """Where newest states are shown besides MQTT."""

    redis: LiveRedis | None = None


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
    brain_state: bool = True
    """EEG only: compute features."""
    raw: bool = True
    """EEG only: send raw samples too."""
    user_id: Annotated[str, Meta(pattern=_UUID)] | None = None
    """Whose live state this is (a UUID, no name)."""
    session_id: Annotated[str, Meta(pattern=_UUID)] | None = None


class Settings(Section, frozen=True):
    """All of `gateway.toml`."""

    gateway: Gateway
    mqtt: Mqtt
    spool: Spool = Spool()
    uplink: Uplink = Uplink()
    live: Live = Live()
    device: Annotated[tuple[Device, ...], Meta(max_length=64)] = ()

    @property
    def outbox_path(self) -> Path:
        """File of the SQLite outbox."""
        return Path(self.spool.path or Path(self.gateway.state_dir) / "outbox.db")


def load(path: Path) -> Settings:
    """Read and check everything that can be checked without opening anything. Raises `ConfigError`."""
    settings = config.load(path, Settings)
    _check_devices(path, settings)
    if not Path(settings.gateway.state_dir).is_absolute():
        raise config.problem(path, "gateway.state_dir", "expected an absolute path")
    if settings.spool.backend == "redis" and not settings.spool.redis_url:
        raise config.problem(path, "spool.redis_url", "missing", hint='backend = "redis" needs the server\'s URL')
    tls = settings.mqtt.tls
    if isinstance(tls, TlsFiles) and (tls.cert_file is None) != (tls.key_file is None):
        raise config.problem(path, "mqtt.tls", "cert_file and key_file belong together")
    return settings


def broker(settings: Settings) -> Broker:
    """The broker with the credential that belongs to it. Raises `ConfigError` where that is missing."""
    mqtt = settings.mqtt
    password = None
    if mqtt.username is not None:
        password = config.required_secret(MQTT_PASSWORD, f"mqtt.username {mqtt.username!r}")
    files = mqtt.tls if isinstance(mqtt.tls, TlsFiles) else TlsFiles()
    tls = None
    if mqtt.tls:
        tls = Tls(*(Path(name) if name else None for name in (files.ca_file, files.cert_file, files.key_file)))
    return Broker(mqtt.host, mqtt.port, f"wardlink-{settings.gateway.id}", mqtt.username, password, tls)


def _check_devices(path: Path, settings: Settings) -> None:
    serials: set[str] = set()
    for number, device in enumerate(settings.device):
        key = f"device[{number}]"
        driver = registry.DRIVERS.get(device.driver)
        if driver is None:
            known = ", ".join(sorted(registry.DRIVERS))
            raise config.problem(path, f"{key}.driver", f"no driver {device.driver!r}", hint=f"known drivers: {known}")
        if device.serial in serials:
            raise config.problem(path, f"{key}.serial", f"{device.serial!r} is there twice")
        serials.add(device.serial)
        if driver.link is registry.LinkKind.SERIAL and not device.port:
            raise config.problem(path, f"{key}.port", "missing", hint="ls -l /dev/serial/by-id shows stable names")
        if driver.link is registry.LinkKind.BLE and not _BLUETOOTH_ADDRESS.match((device.address or "").upper()):
            raise config.problem(path, f"{key}.address", "expected a Bluetooth address like 00:11:22:AA:BB:CC")
        if device.channels is not None and len(device.channels) != driver.channel_count:
            raise config.problem(
                path, f"{key}.channels", f"{len(device.channels)} names, {device.driver} has {driver.channel_count}"
            )
        if device.channels is not None and len(set(device.channels)) != len(device.channels):
            raise config.problem(path, f"{key}.channels", "a name is there twice")
