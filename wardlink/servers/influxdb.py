"""A private InfluxDB 1.x on a loopback port, with an administrator of its own.

Knows /ping and /query; writing points is the bridge's work.
"""

from __future__ import annotations

import base64
import http.client
import json
import threading
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from gateway.errors import RefusedError, UnavailableError
from wardlink.servers.process import HOST, PrivateServer, find_program, free_port, new_secret, write_private

REQUEST_SECONDS_MAX: Final = 30.0
"""A count over a demo's points takes milliseconds; a shard that is being made on a slow card takes seconds."""
ANSWER_BYTES_MAX: Final = 64 * 1024 * 1024
BODY_BYTES_MAX: Final = 25_000_000
"""Of one write request, InfluxDB's own default."""

CONFIG: Final = """\
reporting-disabled = true
bind-address = "{host}:{backup_port}"

[meta]
  dir = "{folder}/meta"

[data]
  dir = "{folder}/data"
  wal-dir = "{folder}/wal"
  query-log-enabled = false

[http]
  enabled = true
  bind-address = "{host}:{port}"
  auth-enabled = true
  log-enabled = false
  max-body-size = {body_bytes}

[monitor]
  store-enabled = false

[subscriber]
  enabled = false
"""


class InfluxDB(PrivateServer):
    """InfluxDB 1.x at `url`; every request needs `user` and `password`, by HTTP basic authentication."""

    name = "influxdb"
    package = "influxdb"

    def __init__(self, folder: Path, *, cancelled: threading.Event | None = None) -> None:
        super().__init__(folder, cancelled=cancelled)
        self.host = HOST
        self.port = free_port()
        self._backup_port = free_port()
        self.user_name = "wardlink"
        self.password = new_secret()

    @property
    def url(self) -> str:
        """Base URL, without credentials."""
        return f"http://{self.host}:{self.port}"

    def create_database(self, database: str) -> None:
        """Create a database if it is not there."""
        self.query(f"CREATE DATABASE {_quoted(database)}")

    def drop_database(self, database: str) -> None:
        """Drop a database if it is there."""
        self.query(f"DROP DATABASE {_quoted(database)}")

    def query(self, statement: str, database: str = "") -> list[dict[str, Any]]:
        """Run one InfluxQL statement and return its series: objects with `name`, `tags`, `columns`, `values`.

        Times are integers, ns since 1970. Raises `RefusedError` with InfluxDB's reason, `UnavailableError` if it is
        away.
        """
        try:
            status, answer = self._post(statement, database)
        except (OSError, http.client.HTTPException) as error:
            raise UnavailableError(f"InfluxDB at {self.url} does not answer: {error}") from error
        content = json.loads(answer) if answer else {}
        results = content.get("results", [{}])
        reason = content.get("error") or results[0].get("error")
        if status != http.client.OK or reason:
            raise RefusedError(f"InfluxDB refused {statement!r} with {status}: {reason}")
        series: list[dict[str, Any]] = results[0].get("series", [])
        return series

    def _prepare(self) -> None:
        program = find_program("influxd", self.package)
        version = self._run([program, "version"])
        if "v1." not in version:
            raise UnavailableError(
                f"{program} is {version.strip()!r}, expected InfluxDB 1.x",
                hint=f"apt-get install {self.package}, or take it out of PATH",
            )
        config = CONFIG.format(
            host=self.host,
            port=self.port,
            backup_port=self._backup_port,
            folder=self.folder,
            body_bytes=BODY_BYTES_MAX,
        )
        write_private(self.folder / "influxdb.conf", config)

    def _command(self) -> Sequence[str]:
        return [find_program("influxd", self.package), "run", "-config", str(self.folder / "influxdb.conf")]

    def _answers(self) -> bool:
        """The first time this makes the administrator, which InfluxDB lets anybody do as long as there is none."""
        try:
            status, _ = self._post("SHOW DATABASES", "")
            if status in (http.client.UNAUTHORIZED, http.client.FORBIDDEN):
                self._post(f"CREATE USER {self.user_name} WITH PASSWORD '{self.password}' WITH ALL PRIVILEGES", "")
                status, _ = self._post("SHOW DATABASES", "")
        except http.client.HTTPException:
            return False
        return status == http.client.OK

    def _post(self, statement: str, database: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=REQUEST_SECONDS_MAX)
        try:
            body = urllib.parse.urlencode({"q": statement, "db": database, "epoch": "ns"})
            token = base64.b64encode(f"{self.user_name}:{self.password}".encode()).decode()
            headers = {"Authorization": f"Basic {token}", "Content-Type": "application/x-www-form-urlencoded"}
            connection.request("POST", "/query", body, headers)
            response = connection.getresponse()
            return response.status, response.read(ANSWER_BYTES_MAX)
        finally:
            connection.close()


def _quoted(identifier: str) -> str:
    escaped = identifier.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
