"""A BLE peripheral as a model: address, services, characteristics with values, what it notifies and what it is written.

Knows no D-Bus and no radio; a virtual BlueZ shows it to programs and carries what it notifies.
A device family is a subclass: it fills the services and overrides `run`, `read`, `write`,
`subscribed`, `link_up`, `link_down`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

_ADDRESS = re.compile(r"(?:[0-9A-F]{2}:){5}[0-9A-F]{2}")

MTU_BYTES = 247
"""What today's sensors agree to: one packet of the link layer (251 bytes) less its header."""
NOTIFICATION_HEADER_BYTES = 3

NotificationListener = Callable[[str, bytes], None]
"""Takes the characteristic's UUID and the value."""


class AttributeRefusedError(Exception):
    """A peripheral refuses a read or a write with an ATT error code (Bluetooth Core, vol. 3 part F, 3.4.1.1)."""

    def __init__(self, att_code: int) -> None:
        super().__init__(f"ATT error 0x{att_code:02x}")
        self.att_code = att_code


@dataclass(slots=True)
class Characteristic:
    """One characteristic: full UUID in lower case, the flags as BlueZ names them, the value that a read gives."""

    uuid: str
    flags: tuple[str, ...]
    """Of: read, write, write-without-response, notify, indicate."""
    value: bytes = b""
    encrypted: bool = False
    """Only a paired central may read, write or subscribe; nothing that is shown tells so before."""


@dataclass(slots=True)
class Service:
    """One primary service and its characteristics, in the order of their handles."""

    uuid: str
    characteristics: tuple[Characteristic, ...]


class Peripheral:
    """A device that can be found, connected, read, written and subscribed to."""

    def __init__(
        self,
        address: str,
        name: str,
        services: Sequence[Service],
        *,
        rssi_dbm: int = -58,
        mtu_bytes: int = MTU_BYTES,
    ) -> None:
        """Raises `ValueError` for an address that is not six upper-case octets, or a characteristic named twice."""
        if not _ADDRESS.fullmatch(address):
            raise ValueError(f"not a Bluetooth address: {address!r}")
        self.address = address
        self.name = name
        self.services = tuple(services)
        self.rssi_dbm = rssi_dbm
        self.mtu_bytes = mtu_bytes
        """What it agrees to with a central; the value of a notification is cut to three bytes less."""
        self.distort: Callable[[str, bytes], Iterable[bytes]] | None = None
        """A fault on the radio: what arrives for one notification (nothing, the same twice, other bytes)."""
        self._characteristics = {each.uuid: each for service in self.services for each in service.characteristics}
        if len(self._characteristics) != sum(len(service.characteristics) for service in self.services):
            raise ValueError("a characteristic is there twice")
        self._listener: NotificationListener | None = None

    def characteristic(self, uuid: str) -> Characteristic:
        """The characteristic with this UUID. Raises `KeyError`."""
        return self._characteristics[uuid]

    def listen(self, listener: NotificationListener | None) -> None:
        """Hand all further notifications to this one listener, or to nobody."""
        self._listener = listener

    def notify(self, uuid: str, value: bytes) -> None:
        """Set the value and send it to whoever is subscribed; nobody subscribed: it is gone, as on the air."""
        self.characteristic(uuid).value = value
        if self._listener is None:
            return
        sent = value[: self.mtu_bytes - NOTIFICATION_HEADER_BYTES]
        for arrived in (sent,) if self.distort is None else self.distort(uuid, sent):
            self._listener(uuid, arrived)

    async def run(self) -> None:
        """The device's own life, from its being there until it is taken away: notifies when it has something to say."""
        await asyncio.Event().wait()

    def read(self, uuid: str) -> bytes:
        """Answer to a read. Raises `AttributeRefusedError`."""
        return self.characteristic(uuid).value

    def write(self, uuid: str, value: bytes) -> None:
        """Take what was written. Raises `AttributeRefusedError`."""
        self.characteristic(uuid).value = value

    def subscribed(self, uuid: str) -> None:
        """A central has subscribed to a characteristic; that ends with the link."""

    def link_up(self) -> None:
        """A central has connected."""

    def link_down(self) -> None:
        """The link is lost or was closed."""
