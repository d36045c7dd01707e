"""What a link is: a byte pipe to a device that knows no EEG. Serial ports and BLE both look like this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes as they came from a device."""

    data: bytes
    arrival_ns: int
    """CLOCK_MONOTONIC of the host when it got them, ns: late by the transport's delay, never early."""
    channel: str = ""
    """The characteristic's UUID (lower case, 128 bit) for GATT; empty for a serial line."""


class Link(Protocol):
    """An open or openable pipe. One reader at a time."""

    @property
    def name(self) -> str:
        """What an operator calls it: the port's path or the device's address."""

    async def open(self) -> None:
        """Connect; afterwards `read` delivers from now on. Raises `UnavailableError`."""

    async def read(self) -> Chunk:
        """Wait for the next chunk. Raises `UnavailableError` when the link is lost, after all that came before."""

    async def write(self, data: bytes, channel: str = "") -> None:
        """Send to the device. Raises `UnavailableError` where it cannot take it.

        A link that is lost raises here or at the next `read`; only `read` has delivered by then what came before.
        """

    async def close(self) -> None:
        """Release everything; may be called in any state, any number of times, and does not raise."""
