"""The `[mqtt]` table of both sides' configuration, and the broker that it names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from gateway import config
from gateway.config import Section
from gateway.mqtt import Broker, Tls

PASSWORD = "mqtt-password"  # noqa: S105 - the credential's name, not its value

_HOST = re.compile(r"([A-Za-z0-9_](\.?[A-Za-z0-9_-]+)*\.?|[0-9A-Fa-f:]+(%\w+)?)")
"""A name, an IPv4 or an IPv6 address: no scheme, port or path."""


class TlsFiles(Section, frozen=True):
    """PEM files; without `ca_file` the system's authorities are trusted."""

    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None


class Mqtt(Section, frozen=True):
    """The broker. TLS is on, and its certificate verified, unless `tls = false` says otherwise."""

    host: Annotated[str, Meta(min_length=1, max_length=255)]
    port: Annotated[int, Meta(ge=1, le=65_535)] = 8883
    username: Annotated[str, Meta(min_length=1, max_length=255)] | None = None
    tls: bool | TlsFiles = True


def check(path: Path, mqtt: Mqtt) -> None:
    """What a type cannot express. Raises `ConfigError`."""
    if not _HOST.fullmatch(mqtt.host):
        raise config.problem(
            path, "mqtt.host", f"{mqtt.host!r} is no host name or address", hint="the port has a key of its own"
        )
    tls = mqtt.tls
    if isinstance(tls, TlsFiles) and (tls.cert_file is None) != (tls.key_file is None):
        missing = "cert_file" if tls.cert_file is None else "key_file"
        raise config.problem(
            path, "mqtt.tls", "cert_file and key_file belong together", hint=f"mqtt.tls.{missing} is missing"
        )


def broker(mqtt: Mqtt, client_id: str) -> Broker:
    """The broker with the credential that belongs to it. Raises `ConfigError` where that is missing."""
    password = None
    if mqtt.username is not None:
        password = config.required_secret(PASSWORD, f"mqtt.username {mqtt.username!r}")
    tls = None
    if mqtt.tls:
        files = mqtt.tls if isinstance(mqtt.tls, TlsFiles) else TlsFiles()
        tls = Tls(*(Path(name) if name else None for name in (files.ca_file, files.cert_file, files.key_file)))
    return Broker(mqtt.host, mqtt.port, client_id, mqtt.username, password, tls)
