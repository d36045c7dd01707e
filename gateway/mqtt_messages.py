"""What travels over an MQTT session, as values, and the bound on how much of it is held. Knows no paho, no socket."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

QOS_AT_MOST_ONCE = 0
QOS_AT_LEAST_ONCE = 1
MESSAGE_OVERHEAD_BYTES = 512
"""What a message in memory takes beside its payload: topic, properties, objects."""


@dataclass(frozen=True, slots=True)
class Outbound:
    """A message to publish."""

    topic: str
    payload: bytes
    content_type: str = ""
    properties: Mapping[str, str] = field(default_factory=dict)
    retain: bool = False
    gives_way: bool = False
    """Whether later messages that do not may overtake it, until it is handed to the socket."""
    qos: int = QOS_AT_LEAST_ONCE


@dataclass(frozen=True, slots=True, eq=False)
class Inbound:
    """A message that came; `acknowledge` it when, and only when, it is safely kept."""

    topic: str
    payload: bytes
    content_type: str | None
    properties: Mapping[str, str]
    retain: bool
    _mid: int
    _acknowledge: Callable[[Inbound, int], None] = field(repr=False)

    def acknowledge(self) -> None:
        """Tell the broker that it may forget the message.

        No effect the second time, on a message of QoS 0, and once the connection that brought it is lost.
        """
        self._acknowledge(self, self._mid)


@dataclass(frozen=True, slots=True)
class Hello:
    """What a client tells the broker first."""

    client_id: str
    username: str | None
    password: str | None = field(repr=False)
    clean: bool
    receive_maximum: int
    will: Outbound | None


class Intake:
    """What was handed over and not yet released: bounded in bytes, over all connections."""

    def __init__(self, bytes_max: int | None) -> None:
        self._bytes_max = bytes_max
        self._held: set[Inbound] = set()
        self._bytes = 0
        self.on_room: Callable[[], None] = lambda: None

    @property
    def is_full(self) -> bool:
        return self._bytes_max is not None and self._bytes >= self._bytes_max

    def take(self, message: Inbound) -> None:
        if self._bytes_max is not None:
            self._held.add(message)
            self._bytes += len(message.payload) + MESSAGE_OVERHEAD_BYTES

    def release(self, message: Inbound) -> None:
        if message not in self._held:
            return
        was_full = self.is_full
        self._held.remove(message)
        self._bytes -= len(message.payload) + MESSAGE_OVERHEAD_BYTES
        if was_full and not self.is_full:
            self.on_room()
