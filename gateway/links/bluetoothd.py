"""What has to be asked of the Bluetooth daemon itself, beside the BLE library: is it there, is its adapter on,
does it hold a link that nobody owns, and when does it vanish. It is given a pairing agent, and its adapter switched.

One D-Bus connection of its own. Knows devices by address alone, no services and no data.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from dbus_fast import (
    AuthError,
    BusType,
    DBusError,
    InvalidAddressError,
    Message,
    MessageType,
    Variant,
    unpack_variants,
)
from dbus_fast.aio import MessageBus

from gateway.errors import UnavailableError
from gateway.links import pairing

log = logging.getLogger(__name__)

NAME = "org.bluez"
ADAPTER = "org.bluez.Adapter1"
DEVICE = "org.bluez.Device1"
BATTERY = "org.bluez.Battery1"
BUS = "org.freedesktop.DBus"
PROPERTIES = "org.freedesktop.DBus.Properties"
SYSTEMD = "org.freedesktop.systemd1"
UNIT = "bluetooth.service"

CALL_S_MAX = 5.0
"""A daemon that lives answers within milliseconds; only cutting a link takes it up to two seconds."""

DAEMON_HINT = "sudo systemctl start bluetooth (package bluez); its log: journalctl -u bluetooth"
BUS_HINT = "is the D-Bus system bus running (package dbus), and may this user connect to it?"
ADAPTER_HINT = "bluetoothctl list shows the adapters; rfkill list shows whether one is blocked"
RESTART_HINT = (
    "install systemd/60-wardlink-bluetooth.rules in /etc/polkit-1/rules.d/, or sudo systemctl restart bluetooth"
)
POWER_HINT = "bluetoothctl power on; rfkill unblock bluetooth"

OFF_S = 1.0
"""Between off and on: the controller's firmware is started anew."""

_NAME_WATCH = f"type='signal',sender='{BUS}',interface='{BUS}',member='NameOwnerChanged',arg0='{NAME}'"


def _nobody(_address: str) -> bool:
    return False


class Bluetoothd:
    """A connection to the daemon. `on_gone` is called in the event loop when the daemon or the bus vanishes."""

    def __init__(self, on_gone: Callable[[], None]) -> None:
        self._on_gone = on_gone
        self._may_pair: Callable[[str], bool] = _nobody
        self._bus: MessageBus | None = None

    async def connect(self) -> None:
        """Connect to the system bus and watch the daemon's name. Raises `UnavailableError`."""
        try:
            # The address is read from the environment here: DBUS_SYSTEM_BUS_ADDRESS.
            bus = MessageBus(bus_type=BusType.SYSTEM, auth_timeout=CALL_S_MAX)
            self._bus = await bus.connect()
        except (OSError, EOFError, AuthError, InvalidAddressError) as error:
            raise UnavailableError(f"no D-Bus system bus: {error!r}", hint=BUS_HINT) from error
        self._bus.add_message_handler(self._heard)
        await self._call(BUS, "/org/freedesktop/DBus", BUS, "AddMatch", "s", [_NAME_WATCH])

    async def offer_pairing(self, may_pair: Callable[[str], bool]) -> None:
        """Be the default pairing agent until this connection ends; `may_pair` is asked with a device's address.

        A daemon that takes none is no failure: few sensors need one. Raises `UnavailableError`.
        """
        self._may_pair = may_pair
        try:
            await self._call_agent_manager("RegisterAgent", "os", [pairing.AGENT_PATH, pairing.CAPABILITY])
            await self._call_agent_manager("RequestDefaultAgent", "o", [pairing.AGENT_PATH])
        except DBusError as error:
            log.warning("no pairing: the Bluetooth daemon takes no agent: %s", error)

    async def check_adapter(self, adapter: str | None) -> str:
        """Name of the adapter to use: that one, or the first that is on. Raises `UnavailableError` if there is none."""
        adapters = {
            path.rsplit("/", 1)[-1]: interfaces[ADAPTER]
            for path, interfaces in (await self._objects()).items()
            if ADAPTER in interfaces
        }
        if not adapters:
            raise UnavailableError("this host has no Bluetooth adapter", hint=ADAPTER_HINT)
        if adapter is not None and adapter not in adapters:
            there = ", ".join(sorted(adapters))
            raise UnavailableError(f"no Bluetooth adapter {adapter}, there is {there}", hint=ADAPTER_HINT)
        usable = adapters if adapter is None else {adapter: adapters[adapter]}
        powered = sorted(name for name, properties in usable.items() if properties.get("Powered"))
        if not powered:
            raise UnavailableError(f"Bluetooth adapter {', '.join(sorted(usable))} is off", hint=POWER_HINT)
        return powered[0]

    async def switch_off_and_on(self, adapter: str) -> None:
        """Restart the adapter's firmware; all its links are lost. Raises `UnavailableError`."""
        for powered in (False, True):
            value = Variant("b", powered)
            path = f"/org/bluez/{adapter}"
            try:
                await self._call(NAME, path, PROPERTIES, "Set", "ssv", [ADAPTER, "Powered", value])
            except DBusError as error:
                state = "on" if powered else "off"
                raise UnavailableError(
                    f"{adapter} cannot be switched {state}: {error.text}", hint=POWER_HINT
                ) from error
            if not powered:
                await asyncio.sleep(OFF_S)

    async def restart(self) -> None:
        """Ask systemd to restart the daemon: all links of all adapters are lost.

        polkit allows that where a rule says so (systemd/60-wardlink-bluetooth.rules); nobody is asked for a password.
        Raises `UnavailableError`.
        """
        try:
            await self._call(
                SYSTEMD, "/org/freedesktop/systemd1", f"{SYSTEMD}.Manager", "RestartUnit", "ss", [UNIT, "replace"]
            )
        except DBusError as error:
            raise UnavailableError(f"{UNIT} cannot be restarted: {error.text}", hint=RESTART_HINT) from error

    async def connected_devices(self) -> list[tuple[dict[str, Any], int | None]]:
        """Properties (`Device1`) and battery level, %, of the devices that have a link, and so do not advertise.

        Raises `UnavailableError`.
        """
        return [
            (interfaces[DEVICE], interfaces.get(BATTERY, {}).get("Percentage"))
            for interfaces in (await self._objects()).values()
            if DEVICE in interfaces and interfaces[DEVICE].get("Connected")
        ]

    async def release(self, address: str) -> None:
        """Cut the links to a device that the daemon still holds, as after a program that was killed.

        A device with a link does not advertise, so nobody would find it again. Raises `UnavailableError`.
        """
        for path, properties in await self._devices(address):
            if properties.get("Connected"):
                log.info("%s: cutting a link that was left open", address)
                try:
                    await self._call(NAME, path, DEVICE, "Disconnect")
                except DBusError as error:
                    log.debug("%s: Disconnect: %s", address, error)

    async def forget(self, address: str) -> None:
        """Remove what the daemon knows of a device, unless they are paired: cached services, an operation that hangs.

        Raises `UnavailableError`.
        """
        for path, properties in await self._devices(address):
            if properties.get("Paired"):
                continue
            try:
                await self._call(NAME, path.rsplit("/", 1)[0], ADAPTER, "RemoveDevice", "o", [path])
            except DBusError as error:
                log.debug("%s: RemoveDevice: %s", address, error)

    async def close(self) -> None:
        """Leave the bus; any number of times, does not raise."""
        bus, self._bus = self._bus, None
        if bus is None:
            return
        untyped: Any = bus
        bus.disconnect()
        try:
            await untyped.wait_for_disconnect()
        except (OSError, EOFError) as error:
            log.debug("the D-Bus connection was broken: %r", error)

    async def _call_agent_manager(self, member: str, signature: str, body: list[Any]) -> None:
        await self._call(NAME, pairing.AGENT_MANAGER_PATH, pairing.AGENT_MANAGER, member, signature, body)

    def _heard(self, message: Message) -> Message | bool:
        if (
            message.message_type is MessageType.SIGNAL
            and message.member == "NameOwnerChanged"
            and message.body[0] == NAME
            and message.body[1]
        ):
            self._on_gone()
        return pairing.answer(message, self._may_pair) or False

    async def _devices(self, address: str) -> list[tuple[str, dict[str, Any]]]:
        objects = await self._objects()
        devices = ((path, interfaces[DEVICE]) for path, interfaces in objects.items() if DEVICE in interfaces)
        return [(path, device) for path, device in devices if str(device.get("Address", "")).upper() == address.upper()]

    async def _objects(self) -> dict[str, dict[str, dict[str, Any]]]:
        try:
            reply = await self._call(NAME, "/", "org.freedesktop.DBus.ObjectManager", "GetManagedObjects")
        except DBusError as error:
            raise UnavailableError(f"the Bluetooth daemon is not running ({error.text})", hint=DAEMON_HINT) from error
        objects: dict[str, dict[str, dict[str, Any]]] = {
            path: {name: _plain(properties) for name, properties in interfaces.items()}
            for path, interfaces in reply[0].items()
        }
        return objects

    async def _call(
        self, to: str, path: str, interface: str, member: str, signature: str = "", body: list[Any] | None = None
    ) -> list[Any]:
        """Body of the reply. Raises `DBusError` for an error reply, `UnavailableError` for none."""
        if self._bus is None or not self._bus.connected:
            raise UnavailableError("the connection to the D-Bus system bus is lost", hint=BUS_HINT)
        message = Message(
            destination=to, path=path, interface=interface, member=member, signature=signature, body=body or []
        )
        try:
            async with asyncio.timeout(CALL_S_MAX):
                reply = await self._bus.call(message)
        except TimeoutError as error:
            raise UnavailableError(
                f"{to} does not answer {member} within {CALL_S_MAX:g} s", hint=DAEMON_HINT
            ) from error
        except (OSError, EOFError) as error:
            raise UnavailableError(f"the D-Bus system bus is gone: {error!r}", hint=BUS_HINT) from error
        if reply.message_type is MessageType.ERROR:
            raise DBusError(reply.error_name or "", str(reply.body[0]) if reply.body else "no reason given")
        return list(reply.body)


async def caught_up(bus: MessageBus | None) -> None:
    """Wait until all that was sent to this connection so far is here: a bus keeps the order. Does not raise."""
    if bus is None or not bus.connected:
        return
    try:
        async with asyncio.timeout(CALL_S_MAX):
            await bus.call(Message(BUS, "/org/freedesktop/DBus", BUS, "GetId"))
    except (OSError, EOFError, TimeoutError) as error:
        log.debug("the bus does not answer: %r", error)


def _plain(properties: dict[str, Variant]) -> dict[str, Any]:
    plain: dict[str, Any] = unpack_variants(properties)
    return plain
