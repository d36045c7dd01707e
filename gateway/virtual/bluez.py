"""A virtual BlueZ: org.bluez on a private D-Bus, one adapter, any number of virtual peripherals, faults on demand.

Programs that use BlueZ over D-Bus run against it unchanged. It owns discovery, the peripherals' lives and the name;
what a single device answers is in `bluez_device`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from types import TracebackType
from typing import Any, Self

from dbus_fast import DBusError, ErrorType, Message, MessageType, RequestNameReply, Variant
from dbus_fast.aio import MessageBus

from gateway.errors import UnavailableError
from gateway.virtual.bluez_device import DEVICE, FAILED, Reply, VirtualDevice
from gateway.virtual.bluez_objects import FALSE, TRUE, Answer, ObjectTree
from gateway.virtual.paced_bus import PacedBus
from gateway.virtual.peripheral import Peripheral

log = logging.getLogger(__name__)

NAME = "org.bluez"
ADAPTER = "org.bluez.Adapter1"
AGENT = "org.bluez.Agent1"
AGENT_MANAGER = "org.bluez.AgentManager1"
AGENT_MANAGER_PATH = "/org/bluez"
AGENT_S_MAX = 5.0
"""A pairing agent that has not answered by then has refused."""
NEVER = 1 << 40
"""So many connects are refused: all of them."""
ADVERTISING_PERIOD_S = 0.1
"""Vitals sensors and headsets advertise every 20 to 250 ms while nobody is connected."""
NAME_LOST = (
    "type='signal',sender='org.freedesktop.DBus',interface='org.freedesktop.DBus',member='NameOwnerChanged',arg2=''"
)


class VirtualBlueZ:
    """Runs while its context is entered. All methods are for the event loop that it was entered in.

    A fault is a signal on the bus: programs learn of it a moment after the method has returned.
    """

    def __init__(self, bus_address: str, *, adapter: str = "hci0") -> None:
        self.calls: Counter[str] = Counter()
        """Method calls by `interface.member`, since the start."""
        self._bus_address = bus_address
        self._adapter_path = f"/org/bluez/{adapter}"
        self._bus: PacedBus | None = None
        self._tree = ObjectTree(self._send)
        self._tree.allow_set(ADAPTER, "Powered", lambda powered: None if powered else self._power_is_off())
        self._tree.allow_set(DEVICE, "Trusted")
        self._devices: dict[str, VirtualDevice] = {}
        self._lives: dict[str, asyncio.Task[None]] = {}
        self._calls: set[asyncio.Task[None]] = set()
        self._discovery: dict[str, set[str]] = {}
        self._filters: dict[str, set[str]] = {}
        self._agents: dict[str, str] = {}
        """Path of each program's pairing agent; the last one is the default."""
        self._advertising: asyncio.Task[None] | None = None
        self._hanging = False
        self._wedged = 0

    async def __aenter__(self) -> Self:
        await self.restart()
        self._advertising = asyncio.create_task(self._advertise())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = [*self._lives.values(), *self._calls]
        if self._advertising is not None:
            tasks.append(self._advertising)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._lives.clear()
        await self.kill()

    # -- peripherals ----------------------------------------------------------------------------

    def add(self, peripheral: Peripheral) -> None:
        """Bring a peripheral into range and switch it on. Raises `ValueError` if its address is taken."""
        if peripheral.address in self._devices:
            raise ValueError(f"there is a peripheral {peripheral.address} already")
        self._devices[peripheral.address] = VirtualDevice(peripheral, self._adapter_path, self._tree, self._authorize)
        life = asyncio.create_task(peripheral.run(), name=f"peripheral {peripheral.address}")
        life.add_done_callback(_tell_how_it_ended)
        self._lives[peripheral.address] = life

    async def remove(self, address: str) -> None:
        """Switch a peripheral off and let everybody forget it."""
        device = self._devices.pop(address)
        device.forget()
        device.peripheral.listen(None)
        life = self._lives.pop(address)
        life.cancel()
        await asyncio.gather(life, return_exceptions=True)

    def connected(self, address: str) -> bool:
        """The peripheral has a link."""
        return self._devices[address].linked

    def settled(self, address: str) -> bool:
        """The peripheral has a link and its services are known: the daemon has nothing more to tell by itself."""
        device = self._devices[address]
        return device.linked and bool(self._tree.value(device.path, DEVICE, "ServicesResolved"))

    def known(self, address: str) -> bool:
        """The daemon has discovered the peripheral, and has not forgotten it."""
        return self._devices[address].path in self._tree

    def paired(self, address: str) -> bool:
        """There is a bond with the peripheral."""
        return self._devices[address].paired

    def notify_sessions(self, address: str) -> int:
        """Notify sessions of all programs on this peripheral, over all characteristics."""
        return self._devices[address].session_count

    def delivered(self, address: str, uuid: str) -> int:
        """Notifications of a characteristic that a subscribed program should have got, each counted once."""
        return self._devices[address].delivered.get(uuid, 0)

    # -- faults -----------------------------------------------------------------------------------

    def drop_link(self, address: str) -> None:
        """The link is lost; the device stays in range."""
        self._devices[address].drop_link()

    def refuse_connects(self, address: str, count: int) -> None:
        """The next `count` connects fail with le-connection-abort-by-local."""
        self._devices[address].connects_to_refuse = count

    def jam(self, address: str) -> None:
        """Every connect is answered InProgress until the device is removed, as after a client that was killed."""
        self._devices[address].jammed = True

    def set_in_range(self, address: str, *, in_range: bool) -> None:
        """Carry a device out of range (the link is lost, no advertisement is heard) or back."""
        device = self._devices[address]
        device.in_range = in_range
        if not in_range:
            device.drop_link()

    def set_powered(self, *, powered: bool) -> None:
        """Switch the adapter off (all links are lost, a discovery ends) or on."""
        self._tree.change(self._adapter_path, ADAPTER, {"Powered": Variant("b", powered)})
        if not powered:
            self._power_is_off()

    def wedge(self, *, times: int = 1) -> None:
        """The adapter gets into a state in which no connect succeeds, until it was off so many times."""
        self._wedged = times
        for device in self._devices.values():
            device.connects_to_refuse = NEVER

    def _power_is_off(self) -> None:
        self._discovery.clear()
        self._tree.change(self._adapter_path, ADAPTER, {"Discovering": FALSE})
        self._wedged = max(0, self._wedged - 1)
        for device in self._devices.values():
            device.drop_link()
            device.discovery_ended()
            if not self._wedged and device.connects_to_refuse >= NEVER // 2:
                device.connects_to_refuse = 0

    def hang(self) -> None:
        """The daemon keeps its name, and says and answers nothing more until it is killed."""
        self._hanging = True

    async def kill(self) -> None:
        """The daemon is gone at once: its name vanishes, nobody is told anything, links and sessions are lost."""
        bus, self._bus = self._bus, None
        for call in self._calls:
            call.cancel()
        for device in self._devices.values():
            device.vanish()
        self._tree.clear()
        self._discovery.clear()
        self._filters.clear()
        self._agents.clear()
        self._hanging = False
        # Last, as it takes a while: a peripheral that notifies meanwhile has no link, and nothing of it is counted.
        if bus is not None:
            await bus.close()

    async def restart(self) -> None:
        """The daemon is there (again): name and adapter appear, devices once they are discovered."""
        bus = await MessageBus(self._bus_address).connect()
        bus.add_message_handler(self._receive)
        await bus.call(
            Message(
                destination="org.freedesktop.DBus",
                path="/org/freedesktop/DBus",
                interface="org.freedesktop.DBus",
                member="AddMatch",
                signature="s",
                body=[NAME_LOST],
            )
        )
        if await bus.request_name(NAME) is not RequestNameReply.PRIMARY_OWNER:
            await PacedBus(bus).close()
            raise UnavailableError(f"{NAME} is taken on {self._bus_address}", hint="give the virtual BlueZ its own bus")
        self._bus = PacedBus(bus)
        self._tree.add(AGENT_MANAGER_PATH, {AGENT_MANAGER: {}})
        self._tree.add(
            self._adapter_path,
            {
                ADAPTER: {
                    "Address": Variant("s", "00:00:00:00:00:01"),
                    "Name": Variant("s", "virtual"),
                    "Alias": Variant("s", "virtual"),
                    "Powered": TRUE,
                    "Discovering": FALSE,
                    "Roles": Variant("as", ["central", "peripheral"]),
                    "UUIDs": Variant("as", []),
                }
            },
        )

    # -- methods of Adapter1 --------------------------------------------------------------------

    def _adapter_call(self, message: Message) -> Answer:
        client = message.sender or ""
        match message.member:
            case "SetDiscoveryFilter":
                uuids = message.body[0].get("UUIDs")
                self._filters[client] = {uuid.lower() for uuid in uuids.value} if uuids else set()
            case "StartDiscovery":
                self._start_discovery(client)
            case "StopDiscovery":
                if client not in self._discovery:
                    raise DBusError(FAILED, "No discovery started")
                self._stop_discovery(client)
            case "RemoveDevice":
                self._device_at(message.body[0]).forget()
            case _:
                raise _unknown_method(message)
        return "", []

    def _start_discovery(self, client: str) -> None:
        if not self._tree.value(self._adapter_path, ADAPTER, "Powered"):
            raise DBusError("org.bluez.Error.NotReady", "Resource Not Ready")
        if client in self._discovery:
            raise DBusError("org.bluez.Error.InProgress", "Operation already in progress")
        self._discovery[client] = self._filters.get(client, set())
        self._tree.change(self._adapter_path, ADAPTER, {"Discovering": TRUE})

    def _stop_discovery(self, client: str) -> None:
        self._discovery.pop(client)
        if self._discovery:
            return
        self._tree.change(self._adapter_path, ADAPTER, {"Discovering": FALSE})
        for device in self._devices.values():
            device.discovery_ended()

    async def _advertise(self) -> None:
        while True:
            await asyncio.sleep(ADVERTISING_PERIOD_S)
            filters = list(self._discovery.values())
            for device in self._devices.values():
                if any(not uuids or uuids & device.service_uuids() for uuids in filters):
                    device.advertise()

    # -- pairing ----------------------------------------------------------------------------------

    def _agent_call(self, message: Message) -> Answer:
        client = message.sender or ""
        match message.member:
            case "RegisterAgent":
                if client in self._agents:
                    raise DBusError("org.bluez.Error.AlreadyExists", "Already Exists")
                # In front: it is the default only once that is asked for.
                self._agents = {client: message.body[0], **self._agents}
            case "RequestDefaultAgent" | "UnregisterAgent":
                if self._agents.get(client) != message.body[0]:
                    raise DBusError("org.bluez.Error.DoesNotExist", "Does Not Exist")
                path = self._agents.pop(client)
                if message.member == "RequestDefaultAgent":
                    self._agents[client] = path
            case _:
                raise _unknown_method(message)
        return "", []

    async def _authorize(self, device_path: str) -> bool:
        """Ask the default agent, as for a pairing with no display and no buttons that the other side began."""
        if not self._agents or self._bus is None:
            return False
        client, path = list(self._agents.items())[-1]
        question = Message(client, path, AGENT, "RequestAuthorization", signature="o", body=[device_path])
        try:
            async with asyncio.timeout(AGENT_S_MAX):
                answer = await self._bus.bus.call(question)
        except (TimeoutError, OSError, EOFError):
            return False
        return answer.message_type is MessageType.METHOD_RETURN

    # -- the bus ------------------------------------------------------------------------------------

    def _send(self, message: Message) -> bool:
        """False where nobody will hear it: the daemon is gone, or hangs."""
        return self._bus is not None and not self._hanging and self._bus.send(message)

    def _receive(self, message: Message) -> bool:
        if message.message_type is MessageType.SIGNAL and message.member == "NameOwnerChanged":
            self._client_gone(message.body[0])
            return False
        if message.message_type is not MessageType.METHOD_CALL:
            return False
        if self._hanging:
            return True
        self.calls[f"{message.interface}.{message.member}"] += 1
        call = asyncio.create_task(self._call(message))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return True

    def _client_gone(self, client: str) -> None:
        if not client.startswith(":"):
            return
        self._filters.pop(client, None)
        self._agents.pop(client, None)
        if client in self._discovery:
            self._stop_discovery(client)
        for device in self._devices.values():
            device.client_gone(client)

    async def _call(self, message: Message) -> None:
        replied = False

        def reply(signature: str = "", body: list[Any] | None = None) -> None:
            nonlocal replied
            if not replied:
                replied = True
                self._send(Message.new_method_return(message, signature, body or []))

        try:
            answer = self._tree.answer(message)
            if answer is None:
                answer = await self._object_call(message, reply)
            reply(*(answer or ("", [])))
        except DBusError as error:
            self._send(Message.new_error(message, error.type, error.text))

    async def _object_call(self, message: Message, reply: Reply) -> Answer | None:
        path = message.path or ""
        if path not in self._tree:
            raise DBusError(ErrorType.UNKNOWN_OBJECT, f"Method on {path} doesn't exist")
        if path == self._adapter_path and message.interface == ADAPTER:
            return self._adapter_call(message)
        if path == AGENT_MANAGER_PATH and message.interface == AGENT_MANAGER:
            return self._agent_call(message)
        method = VirtualDevice.METHODS.get((message.interface or "", message.member or ""))
        if method is None:
            raise _unknown_method(message)
        return await method(self._device_at(path), message, reply)

    def _device_at(self, path: str) -> VirtualDevice:
        for device in self._devices.values():
            if path == device.path or path.startswith(f"{device.path}/"):
                return device
        raise DBusError("org.bluez.Error.DoesNotExist", "Does Not Exist")


def _unknown_method(message: Message) -> DBusError:
    return DBusError(ErrorType.UNKNOWN_METHOD, f"no method {message.interface}.{message.member} at {message.path}")


def _tell_how_it_ended(life: asyncio.Task[None]) -> None:
    if not life.cancelled() and (error := life.exception()) is not None:
        log.error("%s stopped: %r", life.get_name(), error)
