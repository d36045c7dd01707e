"""The whole chain on one machine: private servers, virtual devices, a gateway, a bridge, and a registered ward.

Blocking. The demo runs it, and so do the tests of the whole journey, which kill its parts.
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from cloud_sync import settings as cloud_settings
from cloud_sync.registry import admin, migrations, stream_admin
from cloud_sync.registry.database import Database
from gateway import settings as gateway_settings
from gateway.errors import UnavailableError
from wardlink.demo.processes import Bridge, Devices, Gateway, WardlinkProcess
from wardlink.servers import PrivateServers
from wardlink.servers.process import write_private

GATEWAY_ID = "demo-gateway"
ORGANISATION = "demo-ward"
PATIENT = "P-001"
DATABASE = "wardlink"
BUCKET = "wardlink"
BINDING_TAGS = {"location": "demo-room-1", "priority": "normal"}
USER_ID = "6b1f5f0e-6f3a-4b1e-9c50-0d9c5a3c7a11"
"""Whose live state the headset shows; any UUID."""

_GATEWAY_TOML = """\
[gateway]
id = "{gateway}"
state_dir = "{folder}/gateway/state"

[mqtt]
host = "{broker_host}"
port = {broker_port}
username = "{gateway}"
tls = false

[uplink]
resend_after_s = {resend_after_s}

[clock]
{clock}

[live.redis]
url = "{redis_url}"
"""
CLOCK_TOML = "hold_s = 0"
"""Whether this machine's clock is synchronised or not: the demo shows its data at once."""
_SERIAL_TOML = """
[[device]]
driver = "{driver}"
serial = "{serial}"
port = "{port}"
user_id = "{user}"
"""
_BLE_TOML = """
[[device]]
driver = "{driver}"
serial = "{serial}"
address = "{address}"
"""
_CLOUD_TOML = """\
[bridge]
id = "demo-bridge"
state_dir = "{folder}/bridge/state"

[mqtt]
host = "{broker_host}"
port = {broker_port}
username = "{broker_user}"
tls = false

[influx]
dialect = "v1"
url = "{influx_url}"
username = "{influx_user}"

[postgres]
host = "{postgres_host}"
port = {postgres_port}
dbname = "{database}"
user = "{postgres_user}"
"""


@dataclass(frozen=True, slots=True)
class Twin:
    """A virtual device of the demo: its name for `simulate`, its serial, its type in the registry."""

    name: str
    serial: str
    device_type: str


TWINS = (Twin("cyton", "CYTON-1", "eeg_headset"), Twin("strap", "STRAP-1", "hr_strap"))


class Chain:
    """Everything between a device and the stores; a context manager that leaves no process behind."""

    def __init__(
        self,
        folder: Path,
        *,
        recording: Path | None = None,
        resend_after_s: float = 3.0,
        register: bool = True,
        clock: str = CLOCK_TOML,
    ) -> None:
        """`register` False: the devices are unknown to the registry, so what they send is parked. `clock`: the keys
        of the gateway's `[clock]`.
        """
        self.folder = folder
        self.servers = PrivateServers(folder)
        self._cancelled = threading.Event()
        self._resend_after_s = resend_after_s
        self._register_devices = register
        self._clock = clock
        self.gateway_config = folder / "gateway.toml"
        self.cloud_config = folder / "cloud.toml"
        played = ["--recording", str(recording.absolute())] if recording else []
        twins = [twin.name for twin in TWINS]
        self.devices = Devices(folder, ["gateway", "simulate", *twins, "--json", *played], self._cancelled)
        self.gateway = Gateway(
            folder,
            ["gateway", "run", "--config", str(self.gateway_config)],
            self._cancelled,
            folder / "gateway" / "state" / "outbox.db",
        )
        self.bridge = Bridge(
            folder,
            ["cloud", "run", "--config", str(self.cloud_config)],
            self._cancelled,
            folder / "bridge" / "state" / "demo-bridge.lock",
        )

    @property
    def conninfo(self) -> str:
        """Connection string of the registry, with its password."""
        return self.servers.postgresql.conninfo(DATABASE)

    @property
    def processes(self) -> tuple[WardlinkProcess, ...]:
        """Our own, in the order in which they are stopped."""
        return (self.gateway, self.bridge, self.devices)

    def start(self) -> None:
        """Start all of it. Raises `WardlinkError`, with nothing left running."""
        try:
            self.servers.start()
            self._configure_cloud()
            self.servers.influxdb.create_database(BUCKET)
            asyncio.run(self._register())
            self.devices.start()
            self.bridge.start()
            self._configure_gateway()
            self.gateway.start()
        except BaseException:
            self.stop()
            raise

    def cancel(self) -> None:
        """Make a `start` that is under way in another thread give up."""
        self._cancelled.set()
        self.servers.cancel()

    def stop(self) -> None:
        """Stop all that runs, gracefully, each within a bounded time."""
        for process in self.processes:
            process.stop()
        self.servers.stop()

    def kill(self) -> None:
        """End everything at once."""
        for process in (self.gateway, self.bridge, *self.servers.servers):
            process.kill()
        self.devices.stop()  # it has a D-Bus daemon of its own to end

    def check(self) -> None:
        """Raise `UnavailableError` with the end of its log if one of wardlink's own processes has ended."""
        for process in self.processes:
            ended = process.ended()
            if ended:
                raise UnavailableError(ended)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _configure_cloud(self) -> None:
        servers = self.servers
        servers.postgresql.create_database(DATABASE)
        text = _CLOUD_TOML.format(
            folder=self.folder.absolute(),
            broker_host=servers.mosquitto.host,
            broker_port=servers.mosquitto.port,
            broker_user=servers.mosquitto.bridge.user,
            influx_url=servers.influxdb.url,
            influx_user=servers.influxdb.user_name,
            postgres_host=servers.postgresql.host,
            postgres_port=servers.postgresql.port,
            postgres_user=servers.postgresql.user_name,
            database=DATABASE,
        )
        write_private(self.cloud_config, text)
        self.bridge.credentials = {
            cloud_settings.MQTT_PASSWORD: servers.mosquitto.bridge.password,
            cloud_settings.INFLUX_PASSWORD: servers.influxdb.password,
            cloud_settings.POSTGRES_PASSWORD: servers.postgresql.password,
        }

    def _configure_gateway(self) -> None:
        login = self.servers.mosquitto.gateway(GATEWAY_ID)
        text = _GATEWAY_TOML.format(
            gateway=GATEWAY_ID,
            folder=self.folder.absolute(),
            broker_host=self.servers.mosquitto.host,
            broker_port=self.servers.mosquitto.port,
            resend_after_s=self._resend_after_s,
            clock=self._clock,
            redis_url=f"unix://{self.servers.redis.socket_path}?db=0",
        )
        places = self.devices.places()
        for twin in TWINS:
            place = places[twin.name]
            template = _SERIAL_TOML if "port" in place else _BLE_TOML
            text += template.format(serial=twin.serial, user=USER_ID, **place)
        write_private(self.gateway_config, text)
        self.gateway.credentials = {
            gateway_settings.MQTT_PASSWORD: login.password,
            gateway_settings.REDIS_PASSWORD: self.servers.redis.password,
        }
        strap = places["strap"]
        self.gateway.environment = {name: strap[name] for name in ("DBUS_SYSTEM_BUS_ADDRESS", "PATH")}

    async def _register(self) -> None:
        """What an operator does with `wardlink cloud …` before the first patient."""
        async with Database(self.conninfo) as database:
            await migrations.migrate(database)
            async with database.connection() as connection:
                await admin.add_organization(connection, ORGANISATION)
                for signal in ("eeg", "brain_state", "vital_signs"):
                    await stream_admin.add_template(
                        connection, ORGANISATION, signal, bucket=BUCKET, measurement=signal, tags=BINDING_TAGS
                    )
                if self._register_devices:
                    await self.register_devices(database)

    async def register_devices(self, database: Database) -> None:
        """Tell the registry which patient wears the devices."""
        async with database.connection() as connection:
            for twin in TWINS:
                await admin.add_device(
                    connection,
                    twin.serial,
                    org=ORGANISATION,
                    device_type=twin.device_type,
                    patient=PATIENT,
                    create=True,
                )
