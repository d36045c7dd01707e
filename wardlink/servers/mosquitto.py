"""A private Mosquitto: MQTT 5 on a loopback port, a login for each gateway and one for the bridge.

Knows the topics' first levels for its access list, and of MQTT only CONNECT and CONNACK, to see that it is up.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gateway.errors import UnavailableError
from wardlink.servers.process import (
    HOST,
    POLL_SECONDS,
    PrivateServer,
    find_program,
    free_port,
    new_secret,
    write_private,
)

QUEUED_BYTES_MAX: Final = 256 * 1024 * 1024
"""Per client: hours of blocks for a bridge that is away. Bytes, because the default of 1000 messages is minutes."""
MESSAGE_BYTES_MAX: Final = 1024 * 1024
"""Far above a block of 1 s of any headset, far below what would hurt a subscriber."""
INFLIGHT_MAX: Final = 1000
"""Above any client's Receive Maximum, which then decides; the default of 20 would throttle a bridge that
acknowledges a whole batch at a time."""
AUTOSAVE_SECONDS: Final = 30
LOGIN_SECONDS_MAX: Final = 5.0
"""Until a running broker has read a new login."""
PROBE_SECONDS_MAX: Final = 2.0

CONNACK_ACCEPTED: Final = 0
NAME_PATTERN: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""A name is a topic level and a field of the password file."""

CONFIG: Final = """\
listener {port} {host}
allow_anonymous false
password_file {folder}/passwords
acl_file {folder}/acl
persistence true
persistence_location {folder}/data/
autosave_interval {autosave}
max_queued_messages 0
max_queued_bytes {queued_bytes}
max_inflight_messages {inflight}
message_size_limit {message_bytes}
set_tcp_nodelay true
log_dest stdout
log_timestamp_format %Y-%m-%dT%H:%M:%S
{user}
"""

ACL: Final = """\
# A gateway reads and writes below its own id, which is its user name, and nothing else.
pattern readwrite wardlink/v1/%u/#
pattern read wardlink/v1/_cloud/status/+

user bridge
topic read wardlink/v1/#
topic write wardlink/v1/_cloud/status/+
topic write wardlink/v1/+/receipt
topic write wardlink/v1/+/time
topic write wardlink/v1/+/cmd/#
topic read $SYS/#
"""


@dataclass(frozen=True, slots=True)
class Login:
    """A user name and its password."""

    user: str
    password: str

    def __repr__(self) -> str:
        return f"Login(user={self.user!r})"


class Mosquitto(PrivateServer):
    """MQTT 5 broker at `host`:`port`; persistent sessions, no anonymous access, subscribers filtered by topic."""

    name = "mosquitto"
    package = "mosquitto"

    def __init__(self, folder: Path, *, cancelled: threading.Event | None = None) -> None:
        super().__init__(folder, cancelled=cancelled)
        self.host = HOST
        self.port = free_port()
        self.bridge = Login("bridge", new_secret())
        """Reads everything below wardlink/v1, writes receipts, the time and commands."""
        self._logins = {self.bridge.user: self.bridge}

    def gateway(self, gateway_id: str) -> Login:
        """The login of a gateway, who may read and write wardlink/v1/<gateway_id>/# only; made when first asked for.

        A running broker takes it up without dropping anybody.
        """
        if NAME_PATTERN.fullmatch(gateway_id) is None:
            raise ValueError(f"{gateway_id!r} is no gateway id, expected {NAME_PATTERN.pattern}")
        if gateway_id not in self._logins:
            self._logins[gateway_id] = Login(gateway_id, new_secret())
            if self._prepared:
                self._write_passwords()
            if self.pid is not None:
                os.kill(self.pid, signal.SIGHUP)
                self._await_login(self._logins[gateway_id])
        return self._logins[gateway_id]

    def _prepare(self) -> None:
        find_program("mosquitto", self.package)
        (self.folder / "data").mkdir(mode=0o700, exist_ok=True)
        config = CONFIG.format(
            host=self.host,
            port=self.port,
            folder=self.folder,
            autosave=AUTOSAVE_SECONDS,
            queued_bytes=QUEUED_BYTES_MAX,
            inflight=INFLIGHT_MAX,
            message_bytes=MESSAGE_BYTES_MAX,
            # Started by root it would become user mosquitto, who may not enter the folder.
            user="user root" if os.geteuid() == 0 else "",
        )
        write_private(self.folder / "mosquitto.conf", config)
        write_private(self.folder / "acl", ACL)
        self._write_passwords()

    def _write_passwords(self) -> None:
        plain = self.folder / "passwords.plain"
        write_private(plain, "".join(f"{login.user}:{login.password}\n" for login in self._logins.values()))
        try:
            self._run([find_program("mosquitto_passwd", self.package), "-U", str(plain)])
            plain.chmod(0o600)
            plain.replace(self.folder / "passwords")
        finally:
            plain.unlink(missing_ok=True)

    def _command(self) -> Sequence[str]:
        return [find_program("mosquitto", self.package), "-c", str(self.folder / "mosquitto.conf")]

    def _answers(self) -> bool:
        return self._accepts(self.bridge)

    def _await_login(self, login: Login) -> None:
        deadline = time.monotonic() + LOGIN_SECONDS_MAX
        while not self._accepts(login):
            if time.monotonic() > deadline:
                raise UnavailableError(f"mosquitto does not take up the login of {login.user}{self._log_end()}")
            time.sleep(POLL_SECONDS)

    def _accepts(self, login: Login) -> bool:
        """Whether a CONNECT (MQTT 3.1.1, section 3.1) with this login is answered by an accepting CONNACK."""
        fields = (b"", login.user.encode(), login.password.encode())
        payload = b"".join(len(field).to_bytes(2, "big") + field for field in fields)
        variable = b"\x00\x04MQTT\x04\xc2\x00\x0a" + payload  # user name, password, clean session; keep alive 10 s
        with socket.create_connection((self.host, self.port), PROBE_SECONDS_MAX) as probe:
            probe.sendall(bytes([0x10, len(variable)]) + variable)
            answer = probe.recv(4, socket.MSG_WAITALL)
            probe.sendall(b"\xe0\x00")
        return len(answer) == 4 and answer[0] == 0x20 and answer[3] == CONNACK_ACCEPTED
