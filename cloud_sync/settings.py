"""What an operator can set on the bridge: `cloud.toml` and `conf.d/*.toml`, checked whole before anything is opened.

Passwords and tokens are credentials, never keys of the file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from msgspec import Meta

from cloud_sync.registry.database import describe
from gateway import broker as mqtt_broker
from gateway import config
from gateway.config import Section
from gateway.errors import ConfigError
from gateway.mqtt import Broker
from gateway.wire.topics import NAME_PATTERN

DEFAULT_PATH = Path("/etc/wardlink/cloud.toml")
MQTT_PASSWORD = mqtt_broker.PASSWORD
INFLUX_TOKEN = "influx-token"  # noqa: S105 - names of credentials, not their values
INFLUX_PASSWORD = "influx-password"  # noqa: S105
POSTGRES_PASSWORD = "postgres-password"  # noqa: S105

Name = Annotated[str, Meta(pattern=NAME_PATTERN, description="letters, digits, '.', '_', ':' or '-', at most 80")]
Text = Annotated[str, Meta(min_length=1, max_length=255)]
Port = Annotated[int, Meta(ge=1, le=65_535)]
_PASSWORD = re.compile(r"(^|\s)(ssl)?password\s*=")


class Bridge(Section, frozen=True):
    """Who this bridge is. Several may share the work, each with an id of its own."""

    id: Name = "bridge-1"
    state_dir: str = "/var/lib/wardlink-cloud"
    """Holds the lock that keeps a second bridge of the same id off; no data."""
    gap_alert_s: Annotated[int, Meta(ge=1, le=31_536_000)] = 3600
    """A gap that is open for longer raises an alert."""


class Mqtt(mqtt_broker.Mqtt, frozen=True):
    """The broker, which is often on the bridge's own machine."""

    host: Annotated[str, Meta(min_length=1, max_length=255)] = "localhost"


class Influx(Section, frozen=True):
    """The time-series store: `v2` is InfluxDB 2.x, Cloud or VictoriaMetrics, `v1` is InfluxDB 1.x."""

    url: Text = "http://localhost:8086"
    dialect: Literal["v1", "v2"] = "v2"
    org: str = ""
    """v2: the organisation of bindings that name none."""
    username: Text | None = None
    """v1: InfluxDB's own user; v2 has a token."""
    batch_lines: Annotated[int, Meta(ge=1, le=50_000)] = 5_000
    batch_ms: Annotated[int, Meta(ge=1, le=10_000)] = 250
    gzip: bool = True


class Postgres(Section, frozen=True):
    """The registry: the keys, or one `conninfo` of key=value pairs without a password."""

    host: Text = "localhost"
    port: Port = 5432
    dbname: Text = "wardlink"
    user: Text = "wardlink"
    sslmode: Literal["disable", "allow", "prefer", "require", "verify-ca", "verify-full"] | None = None
    """Default: `verify-full` for a server on another machine, `prefer` on this one."""
    conninfo: Text | None = None


class Settings(Section, frozen=True):
    """All of `cloud.toml`."""

    bridge: Bridge = Bridge()
    mqtt: Mqtt = Mqtt()
    influx: Influx = Influx()
    postgres: Postgres = Postgres()


def load(path: Path = DEFAULT_PATH) -> Settings:
    """Read the files and check everything that needs no credential and opens nothing. Raises `ConfigError`."""
    settings = config.load(path, Settings, fragments=False)
    if not Path(settings.bridge.state_dir).is_absolute():
        raise config.problem(path, "bridge.state_dir", "expected an absolute path")
    mqtt_broker.check(path, settings.mqtt)
    _check_influx(path, settings.influx)
    _check_postgres(path, settings.postgres)
    return settings


def check(settings: Settings) -> None:
    """Whether every credential that the bridge needs is there. Raises `ConfigError`."""
    broker(settings)
    influx_secret(settings)
    conninfo(settings)


def broker(settings: Settings) -> Broker:
    """The broker with the credential that belongs to it. Raises `ConfigError` where that is missing."""
    return mqtt_broker.broker(settings.mqtt, client_id(settings.bridge.id))


def client_id(bridge: str) -> str:
    """Under which the broker knows a bridge."""
    return f"wardlink-bridge-{bridge}"


def influx_secret(settings: Settings) -> str | None:
    """The token (v2) or the password (v1; None where it is used without a user). Raises `ConfigError`."""
    influx = settings.influx
    if influx.dialect == "v2":
        return config.required_secret(INFLUX_TOKEN, 'influx.dialect "v2"')
    if influx.username is None:
        return None
    return config.required_secret(INFLUX_PASSWORD, f"influx.username {influx.username!r}")


def conninfo(settings: Settings) -> str:
    """PostgreSQL's connection string with the password, which may be missing for peer or certificate login.

    Needs the `postgres` part alone. Raises `ConfigError`.
    """
    postgres = settings.postgres
    parts: list[tuple[str, str | None]] = [("password", config.secret(POSTGRES_PASSWORD))]
    if postgres.conninfo is None:
        sslmode = postgres.sslmode or ("prefer" if config.is_loopback(postgres.host) else "verify-full")
        parts += [
            ("host", postgres.host),
            ("port", str(postgres.port)),
            ("dbname", postgres.dbname),
            ("user", postgres.user),
            ("sslmode", sslmode),
            # libpq looks for authorities in ~/.postgresql alone unless told to use the system's.
            ("sslrootcert", "system" if sslmode == "verify-full" else None),
        ]
    given = [] if postgres.conninfo is None else [postgres.conninfo]
    return " ".join([*given, *(f"{name}={_quoted(value)}" for name, value in parts if value is not None)])


def warnings(settings: Settings) -> list[str]:
    """What is allowed but should be known: passwords and patients' data in clear on a network."""
    found = []
    if not settings.mqtt.tls and not config.is_loopback(settings.mqtt.host):
        found.append(f"mqtt.tls is off and {settings.mqtt.host} is another machine: data travels in clear")
    url = urlsplit(settings.influx.url)
    if url.scheme == "http" and not config.is_loopback(url.hostname or ""):
        found.append(f"influx.url has no TLS and {url.hostname} is another machine: data travels in clear")
    return found


def _check_influx(path: Path, influx: Influx) -> None:
    try:
        url = urlsplit(influx.url)
        port_is_valid = url.port is None or url.port > 0
    except ValueError:
        raise config.problem(path, "influx.url", "not a URL", hint="expected https://host:8086") from None
    if url.scheme not in {"http", "https"} or not url.hostname or not port_is_valid:
        raise config.problem(path, "influx.url", f"{influx.url!r} is not a URL", hint="expected https://host:8086")
    if url.username or url.password or url.query or url.fragment:
        # not repeated in the message: it may hold a password
        raise config.problem(
            path, "influx.url", "has more than scheme, host, port and path", hint="credentials are not part of it"
        )
    if influx.dialect == "v2" and not influx.org:
        raise config.problem(path, "influx.org", "missing", hint='dialect "v2" needs the organisation')
    if influx.dialect == "v2" and influx.username is not None:
        raise config.problem(path, "influx.username", 'is for dialect "v1"', hint=f"v2 uses the secret {INFLUX_TOKEN}")
    if influx.dialect == "v1" and influx.org:
        raise config.problem(path, "influx.org", 'is for dialect "v2"', hint="InfluxDB 1.x has no organisations")


def _check_postgres(path: Path, postgres: Postgres) -> None:
    if postgres.conninfo is None:
        return
    defaults = Postgres()
    beside = [name for name in ("host", "port", "dbname", "user", "sslmode") if _differs(postgres, defaults, name)]
    if beside:
        raise config.problem(path, f"postgres.{beside[0]}", "is beside postgres.conninfo", hint="give one of them")
    if "://" in postgres.conninfo or _PASSWORD.search(postgres.conninfo):
        raise config.problem(
            path,
            "postgres.conninfo",
            "expected key=value pairs without a password",
            hint=f"the password is the credential {POSTGRES_PASSWORD}",
        )
    try:
        describe(postgres.conninfo)
    except ConfigError as error:
        raise config.problem(path, "postgres.conninfo", error.message, hint="expected key=value pairs") from None


def _differs(one: Postgres, other: Postgres, name: str) -> bool:
    return bool(getattr(one, name) != getattr(other, name))


def _quoted(value: str) -> str:
    """A value in libpq's key=value form."""
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
