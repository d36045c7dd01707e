"""The objects that the virtual BlueZ shows on D-Bus: their properties, and a signal for every change.

Knows the D-Bus standard interfaces (ObjectManager, Properties, Introspectable), nothing of Bluetooth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from xml.sax.saxutils import quoteattr

from dbus_fast import DBusError, ErrorType, Message, Variant

OBJECT_MANAGER = "org.freedesktop.DBus.ObjectManager"
PROPERTIES = "org.freedesktop.DBus.Properties"
INTROSPECTABLE = "org.freedesktop.DBus.Introspectable"

Properties = dict[str, Variant]
TRUE = Variant("b", value=True)
FALSE = Variant("b", value=False)
Answer = tuple[str, list[Any]]
"""Signature and body of a reply."""


class ObjectTree:
    """Paths, the interfaces at each, the properties of each interface.

    `emit` sends a signal to everybody on the bus, and tells whether it could. Objects appear and vanish with one
    signal each.
    """

    def __init__(self, emit: Callable[[Message], bool]) -> None:
        self._emit = emit
        self._objects: dict[str, dict[str, Properties]] = {}
        self._writable: dict[tuple[str, str], Callable[[Any], None] | None] = {}

    def __contains__(self, path: str) -> bool:
        return path in self._objects

    def __iter__(self) -> Iterator[str]:
        return iter(self._objects)

    def allow_set(self, interface: str, name: str, then: Callable[[Any], None] | None = None) -> None:
        """Let programs set this property; `then` is told the new value."""
        self._writable[interface, name] = then

    def add(self, path: str, interfaces: Mapping[str, Properties]) -> None:
        """Show an object (signal InterfacesAdded)."""
        self._objects[path] = {name: dict(properties) for name, properties in interfaces.items()}
        self._signal("/", OBJECT_MANAGER, "InterfacesAdded", "oa{sa{sv}}", [path, self._objects[path]])

    def remove(self, path: str) -> None:
        """Take an object and all below it away, deepest first (signal InterfacesRemoved); not there: nothing."""
        for each in sorted((p for p in self._objects if p == path or p.startswith(f"{path}/")), reverse=True):
            interfaces = self._objects.pop(each)
            self._signal("/", OBJECT_MANAGER, "InterfacesRemoved", "oas", [each, list(interfaces)])

    def clear(self) -> None:
        """Forget everything with no signal, as a process that is killed."""
        self._objects.clear()

    def value(self, path: str, interface: str, name: str) -> Any:
        """A property's plain value, None where it is not there."""
        variant = self._objects.get(path, {}).get(interface, {}).get(name)
        return None if variant is None else variant.value

    def change(self, path: str, interface: str, changed: Properties, invalidated: Iterable[str] = ()) -> bool:
        """Set properties and say so (one signal PropertiesChanged, also where a value is the same as before).

        True if the signal is on its way. An object that is gone changes no more: a device may be removed in the
        middle of what it is doing.
        """
        properties = self._objects.get(path, {}).get(interface)
        if properties is None:
            return False
        properties.update(changed)
        gone = [name for name in invalidated if properties.pop(name, None) is not None]
        if not changed and not gone:
            return False
        return self._signal(path, PROPERTIES, "PropertiesChanged", "sa{sv}as", [interface, changed, gone])

    def answer(self, message: Message) -> Answer | None:
        """Answer to a call of a standard interface; None if it is of no standard interface. Raises `DBusError`."""
        match f"{message.interface}.{message.member}":
            case "org.freedesktop.DBus.ObjectManager.GetManagedObjects":
                return "a{oa{sa{sv}}}", [self._objects]
            case "org.freedesktop.DBus.Introspectable.Introspect":
                return "s", [self._introspection(message.path or "/")]
            case "org.freedesktop.DBus.Properties.GetAll":
                return "a{sv}", [self._interface(message)]
            case "org.freedesktop.DBus.Properties.Get":
                name = message.body[1]
                properties = self._interface(message)
                if name not in properties:
                    raise DBusError(ErrorType.UNKNOWN_PROPERTY, f"no property {name}")
                return "v", [properties[name]]
            case "org.freedesktop.DBus.Properties.Set":
                self._set(message)
                return "", []
        return None

    def _interface(self, message: Message) -> Properties:
        interfaces = self._objects.get(message.path or "")
        if interfaces is None:
            raise DBusError(ErrorType.UNKNOWN_OBJECT, f"no object at {message.path}")
        if message.body[0] not in interfaces:
            raise DBusError(ErrorType.UNKNOWN_INTERFACE, f"no interface {message.body[0]} at {message.path}")
        return interfaces[message.body[0]]

    def _set(self, message: Message) -> None:
        interface, name, value = message.body
        if name not in self._interface(message):
            raise DBusError(ErrorType.UNKNOWN_PROPERTY, f"no property {name}")
        if (interface, name) not in self._writable:
            raise DBusError(ErrorType.PROPERTY_READ_ONLY, f"{name} cannot be set")
        self.change(message.path or "", interface, {name: value})
        if then := self._writable[interface, name]:
            then(value.value)

    def _introspection(self, path: str) -> str:
        below = path.rstrip("/") + "/"
        children = sorted({each[len(below) :].split("/", 1)[0] for each in self._objects if each.startswith(below)})
        interfaces = [PROPERTIES, INTROSPECTABLE, *self._objects.get(path, {}), *([OBJECT_MANAGER] * (path == "/"))]
        inner = [f"<interface name={quoteattr(name)}/>" for name in interfaces]
        inner += [f"<node name={quoteattr(name)}/>" for name in children]
        return f"<node>{''.join(inner)}</node>"

    def _signal(self, path: str, interface: str, member: str, signature: str, body: list[Any]) -> bool:
        return self._emit(Message.new_signal(path, interface, member, signature, body))
