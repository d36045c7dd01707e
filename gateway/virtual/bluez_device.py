"""One peripheral as BlueZ shows it: Device1, GattService1, GattCharacteristic1, its link and the notify sessions.

Follows bluetoothd where programs depend on it, its traps included:
a notify session belongs to the D-Bus client that began it and outlives the link; every session of a characteristic
makes its own signal for each notification; a value that is read is signalled as if it had been notified.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import ClassVar

from dbus_fast import DBusError, Message, Variant

from gateway.virtual.bluez_objects import FALSE, TRUE, Answer, ObjectTree, Properties
from gateway.virtual.peripheral import AttributeRefusedError, Characteristic, Peripheral

DEVICE = "org.bluez.Device1"
GATT_SERVICE = "org.bluez.GattService1"
GATT_CHARACTERISTIC = "org.bluez.GattCharacteristic1"

FAILED = "org.bluez.Error.Failed"
IN_PROGRESS = "org.bluez.Error.InProgress"
NOT_CONNECTED = "org.bluez.Error.NotConnected"
NOT_PERMITTED = "org.bluez.Error.NotPermitted"
NOT_SUPPORTED = "org.bluez.Error.NotSupported"
ABORT_BY_LOCAL = "le-connection-abort-by-local"

PAGE_TIMEOUT_S = 20.0
"""bluetoothd gives up a connection to a device that does not answer after about this time."""
RADIO_DELAY_S = 0.01
"""A few connection intervals: setting up a link and finding the services each take at least this long."""
FIRST_HANDLE = 0x0010

Reply = Callable[[], None]
"""Answers the call now, before the method is done with what follows."""
Authorize = Callable[[str], Awaitable[bool]]
"""Asks the pairing agent whether a device (its path) may pair without anybody comparing numbers."""


class VirtualDevice:
    """A peripheral's side of the D-Bus objects below `/org/bluez/hciN/dev_…`."""

    def __init__(self, peripheral: Peripheral, adapter_path: str, tree: ObjectTree, authorize: Authorize) -> None:
        self.peripheral = peripheral
        self.path = f"{adapter_path}/dev_{peripheral.address.replace(':', '_')}"
        self.in_range = True
        self.paired = False
        """There is a bond: it outlives links and the daemon, and ends when the device is removed."""
        self.connects_to_refuse = 0
        """The next so many connects end with le-connection-abort-by-local."""
        self.jammed = False
        """An operation hangs in the daemon: connects are InProgress until the device is removed."""
        self.delivered: dict[str, int] = {}
        """Notifications by characteristic that went to at least one session."""
        self._adapter_path = adapter_path
        self._tree = tree
        self._authorize = authorize
        self._paths: dict[str, Characteristic] = {}
        self._path_of: dict[str, str] = {}
        self._sessions: dict[str, set[str]] = {}
        self._linked = False
        self._given_up = asyncio.Event()
        peripheral.listen(self._notified)

    # -- what the adapter does --------------------------------------------------------------

    @property
    def linked(self) -> bool:
        """The link is up."""
        return self._linked

    @property
    def session_count(self) -> int:
        """Notify sessions of all programs, those that outlived their link included."""
        return sum(len(clients) for clients in self._sessions.values())

    def service_uuids(self) -> set[str]:
        """Full UUIDs of the services, as advertised."""
        return {service.uuid for service in self.peripheral.services}

    def advertise(self) -> None:
        """An advertisement was heard: the device appears, or its signal strength is told.

        As long as the discovery lasts, it is told once and not again before it changes: a program that begins to
        wait for a device in the middle of a discovery waits in vain.
        """
        if not self.in_range or self._linked:
            return
        rssi = Variant("n", self.peripheral.rssi_dbm)
        if self.path in self._tree:
            if self._tree.value(self.path, DEVICE, "RSSI") != rssi.value:
                self._tree.change(self.path, DEVICE, {"RSSI": rssi})
            return
        self._tree.add(
            self.path,
            {
                DEVICE: {
                    "Address": Variant("s", self.peripheral.address),
                    "AddressType": Variant("s", "public"),
                    "Name": Variant("s", self.peripheral.name),
                    "Alias": Variant("s", self.peripheral.name),
                    "Adapter": Variant("o", self._adapter_path),
                    "UUIDs": Variant("as", sorted(self.service_uuids())),
                    "Paired": Variant("b", self.paired),
                    "Bonded": Variant("b", self.paired),
                    "Trusted": FALSE,
                    "Blocked": FALSE,
                    "LegacyPairing": FALSE,
                    "Connected": FALSE,
                    "ServicesResolved": FALSE,
                    "RSSI": rssi,
                }
            },
        )

    def discovery_ended(self) -> None:
        """Nobody listens any more: the signal strength is no longer known."""
        self._tree.change(self.path, DEVICE, {}, ["RSSI"])

    def drop_link(self) -> None:
        """The link is lost: services unresolved first, then unconnected. Notify sessions stay."""
        if not self._linked:
            return
        self._linked = False
        self.peripheral.link_down()
        if self._tree.value(self.path, DEVICE, "ServicesResolved"):
            self._tree.change(self.path, DEVICE, {"ServicesResolved": FALSE})
        self._tree.change(self.path, DEVICE, {"Connected": FALSE})

    def forget(self) -> None:
        """Adapter1.RemoveDevice: with all that is below it, and the bond."""
        self.paired = False
        self.vanish()

    def vanish(self) -> None:
        """The daemon is gone, and with it link, sessions and objects; the bond is on its disk."""
        self.drop_link()
        self.jammed = False
        self._sessions.clear()
        self._paths.clear()
        self._path_of.clear()
        self._tree.remove(self.path)

    def client_gone(self, client: str) -> None:
        """A program left the bus: its notify sessions end with it."""
        for path, clients in self._sessions.items():
            if client in clients:
                clients.discard(client)
                self._tell_notifying(path)

    # -- methods of Device1 -----------------------------------------------------------------

    async def connect(self, _message: Message, reply: Reply) -> None:
        """Device1.Connect: Connected, then the reply, then the GATT objects, then ServicesResolved."""
        if self._linked:
            return
        if self.jammed:
            raise DBusError(IN_PROGRESS, "Operation already in progress")
        self._given_up.clear()
        if not self.in_range:
            await self._page()
        await asyncio.sleep(RADIO_DELAY_S)
        if self._given_up.is_set():
            raise DBusError(FAILED, ABORT_BY_LOCAL)
        self._set_connected(connected=True)
        if self.connects_to_refuse:
            self.connects_to_refuse -= 1
            self._set_connected(connected=False)
            raise DBusError(FAILED, ABORT_BY_LOCAL)
        self._linked = True
        self.peripheral.link_up()
        reply()
        await asyncio.sleep(RADIO_DELAY_S)
        if self._linked and self.path in self._tree:
            self._show_services()
            self._tree.change(self.path, DEVICE, {"ServicesResolved": TRUE})

    async def _page(self) -> None:
        try:
            async with asyncio.timeout(PAGE_TIMEOUT_S):
                await self._given_up.wait()
        except TimeoutError:
            pass
        raise DBusError(FAILED, ABORT_BY_LOCAL)

    async def disconnect(self, _message: Message, _reply: Reply) -> None:
        """Device1.Disconnect: also ends a Connect that is under way."""
        self._given_up.set()
        if not self._linked:
            raise DBusError(NOT_CONNECTED, "Not Connected")
        self.drop_link()

    async def pair(self, _message: Message, _reply: Reply) -> None:
        """Device1.Pair: just works; who asks for it wants it, so no agent is asked."""
        self._set_paired()

    async def _secure(self, characteristic: Characteristic) -> None:
        """Pair because a characteristic asks for encryption: this time the agent has to agree."""
        if not characteristic.encrypted or self.paired:
            return
        if not await self._authorize(self.path):
            raise DBusError(NOT_PERMITTED, "Not paired")
        self._set_paired()

    def _set_paired(self) -> None:
        self.paired = True
        self._tree.change(self.path, DEVICE, {"Paired": TRUE, "Bonded": TRUE})

    # -- methods of GattCharacteristic1 -----------------------------------------------------

    async def read(self, message: Message, _reply: Reply) -> Answer:
        """GattCharacteristic1.ReadValue."""
        characteristic = self._characteristic(message)
        if "read" not in characteristic.flags:
            raise DBusError(NOT_PERMITTED, "Read not permitted")
        await self._secure(characteristic)
        try:
            value = self.peripheral.read(characteristic.uuid)
        except AttributeRefusedError as error:
            raise _operation_failed(error) from error
        self._tree.change(message.path or "", GATT_CHARACTERISTIC, {"Value": Variant("ay", value)})
        return "ay", [value]

    async def write(self, message: Message, _reply: Reply) -> None:
        """GattCharacteristic1.WriteValue, with or without response."""
        characteristic = self._characteristic(message)
        value, options = message.body
        kind = options["type"].value if "type" in options else None
        wanted = {"command": {"write-without-response"}, "request": {"write"}}.get(
            str(kind), {"write", "write-without-response"}
        )
        if wanted.isdisjoint(characteristic.flags):
            raise DBusError(NOT_PERMITTED, "Write not permitted")
        if wanted == {"write-without-response"} and len(value) > self.peripheral.mtu_bytes - 3:
            raise DBusError(FAILED, "Invalid Length")
        await self._secure(characteristic)
        try:
            self.peripheral.write(characteristic.uuid, bytes(value))
        except AttributeRefusedError as error:
            raise _operation_failed(error) from error

    async def start_notify(self, message: Message, reply: Reply) -> None:
        """GattCharacteristic1.StartNotify: one session per program and characteristic."""
        characteristic = self._characteristic(message)
        if {"notify", "indicate"}.isdisjoint(characteristic.flags):
            raise DBusError(NOT_SUPPORTED, "Operation is not supported")
        path, client = message.path or "", message.sender or ""
        clients = self._sessions.setdefault(path, set())
        if client in clients:
            raise DBusError(IN_PROGRESS, "In Progress")
        await self._secure(characteristic)
        clients.add(client)
        self._tell_notifying(path)
        reply()
        if len(clients) == 1:
            self.peripheral.subscribed(characteristic.uuid)

    async def stop_notify(self, message: Message, _reply: Reply) -> None:
        """GattCharacteristic1.StopNotify."""
        path, client = message.path or "", message.sender or ""
        if client not in self._sessions.get(path, set()):
            raise DBusError(FAILED, "No notify session started")
        self._sessions[path].discard(client)
        self._tell_notifying(path)

    async def acquire_notify(self, _message: Message, _reply: Reply) -> None:
        """GattCharacteristic1.AcquireNotify: shown as available, as by a real one, and refused."""
        raise DBusError(NOT_SUPPORTED, "Operation is not supported")

    METHODS: ClassVar[dict[tuple[str, str], Callable[[VirtualDevice, Message, Reply], Awaitable[Answer | None]]]] = {
        (DEVICE, "Connect"): connect,
        (DEVICE, "Disconnect"): disconnect,
        (DEVICE, "Pair"): pair,
        (GATT_CHARACTERISTIC, "ReadValue"): read,
        (GATT_CHARACTERISTIC, "WriteValue"): write,
        (GATT_CHARACTERISTIC, "StartNotify"): start_notify,
        (GATT_CHARACTERISTIC, "StopNotify"): stop_notify,
        (GATT_CHARACTERISTIC, "AcquireNotify"): acquire_notify,
    }

    # -- inside -------------------------------------------------------------------------------

    def _characteristic(self, message: Message) -> Characteristic:
        if not self._linked:
            raise DBusError(FAILED, "Not connected")
        return self._paths[message.path or ""]

    def _set_connected(self, *, connected: bool) -> None:
        self._tree.change(self.path, DEVICE, {"Connected": Variant("b", connected)})

    def _show_services(self) -> None:
        """Export the GATT objects; they stay over a lost link, so a reconnect shows nothing new."""
        if self._paths:
            return
        handle = FIRST_HANDLE
        for service in self.peripheral.services:
            service_path = f"{self.path}/service{handle:04x}"
            properties: Properties = {
                "UUID": Variant("s", service.uuid),
                "Device": Variant("o", self.path),
                "Primary": TRUE,
                "Includes": Variant("ao", []),
            }
            self._tree.add(service_path, {GATT_SERVICE: properties})
            for characteristic in service.characteristics:
                # A declaration, the value and, behind it, room for one descriptor.
                handle += 3
                path = f"{service_path}/char{handle:04x}"
                self._paths[path] = characteristic
                self._path_of[characteristic.uuid] = path
                self._tree.add(path, {GATT_CHARACTERISTIC: self._shown(characteristic, service_path)})
            handle += 3

    def _shown(self, characteristic: Characteristic, service_path: str) -> Properties:
        shown = {
            "UUID": Variant("s", characteristic.uuid),
            "Service": Variant("o", service_path),
            "Value": Variant("ay", b""),
            "Flags": Variant("as", list(characteristic.flags)),
            "MTU": Variant("q", self.peripheral.mtu_bytes),
        }
        if not {"notify", "indicate"}.isdisjoint(characteristic.flags):
            shown |= {"Notifying": FALSE, "NotifyAcquired": FALSE}
        return shown

    def _tell_notifying(self, path: str) -> None:
        self._tree.change(path, GATT_CHARACTERISTIC, {"Notifying": Variant("b", bool(self._sessions[path]))})

    def _notified(self, uuid: str, value: bytes) -> None:
        path = self._path_of.get(uuid)
        if not self._linked or path is None or not self._sessions.get(path):
            return
        shown: Properties = {"Value": Variant("ay", value)}
        sent = [self._tree.change(path, GATT_CHARACTERISTIC, shown) for _client in self._sessions[path]]
        if any(sent):
            self.delivered[uuid] = self.delivered.get(uuid, 0) + 1


def _operation_failed(error: AttributeRefusedError) -> DBusError:
    return DBusError(FAILED, f"Operation failed with ATT error: 0x{error.att_code:02x}")
