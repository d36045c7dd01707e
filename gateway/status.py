"""`status.json` in the state folder: how the gateway is, for an operator and for other programs on the same machine.

What is in it, and its reading and writing. Knows neither devices nor the outbox: the values are given to it.
"""

from __future__ import annotations

import contextlib
import os
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from gateway.errors import DamagedError, UnavailableError

FILE_NAME = "status.json"
PERIOD_S = 5.0
"""Between two writings."""
AGE_S_MAX = 3 * PERIOD_S
"""A gateway that has not written for longer does not run, or hangs."""
BYTES_MAX = 1 << 20
"""64 devices with a long reason each take less than a tenth of it."""
REASON_CHARACTERS_MAX = 500
RUN_HINT = "systemctl status wardlink-gateway; journalctl -u wardlink-gateway"


class ElectrodeStatus(msgspec.Struct, frozen=True):
    """One electrode of an EEG device."""

    name: str
    state: str
    """ok, noisy, railed, off or unknown."""
    reason: str


class StreamStatus(msgspec.Struct, frozen=True):
    """One signal of a device, since the gateway started."""

    signal: str
    samples: int
    """Given to the outbox."""
    lost: dict[str, int]
    """By cause: on record as lost."""


class BluetoothStatus(msgspec.Struct, frozen=True):
    """One Bluetooth adapter that is in use."""

    adapter: str
    connections: int
    slots: int | None
    """Connections that it may carry at once; None: nobody said."""


class DeviceStatus(msgspec.Struct, frozen=True):
    """One configured device."""

    serial: str
    driver: str
    place: str
    """Its port or address."""
    state: str
    reason: str
    """Of the last change of state."""
    since: str
    """Of the last change of state: UTC, ISO 8601."""
    segments: int
    """Uninterrupted runs of data since the gateway started."""
    rejected_bytes: int
    electrodes: list[ElectrodeStatus] = msgspec.field(default_factory=list)
    """Empty for a device that has none, or that gives no data now."""
    streams: list[StreamStatus] = msgspec.field(default_factory=list)


class OutboxStatus(msgspec.Struct, frozen=True):
    """What waits for its receipt."""

    rows: int
    bytes: int
    problem: str
    """Why commits fail now; empty when they do not."""


class ClockStatus(msgspec.Struct, frozen=True):
    """How far the time is known."""

    state: str
    """`synced`, `unsynced` or `unknown`: the host cannot tell."""
    error_ns: int
    """Bound of its error, ns; of a clock that is not synced it may be more."""
    source: str
    """Who told the time: `ntp`, `bridge` or `none`."""
    holds: bool
    """Whether blocks are held back until the time is known."""
    waiting: int
    """Blocks that are."""


class BrokerStatus(msgspec.Struct, frozen=True):
    """The connection to the broker."""

    connected: bool
    last_error: str
    """Why it is away; empty while it is there."""
    refused: int = 0
    """Blocks that it does not take. They wait in the outbox."""
    refusal: str = ""
    """Why, of the newest."""


class GatewayStatus(msgspec.Struct, frozen=True):
    """All of `status.json`."""

    gateway: str
    pid: int
    written: str
    """When this was written: UTC, ISO 8601."""
    running: bool
    """False in what a gateway that was asked to stop leaves behind."""
    devices: list[DeviceStatus]
    outbox: OutboxStatus
    clock: ClockStatus
    broker: BrokerStatus
    implementations: dict[str, str]
    """Which implementation runs of what has several."""
    bluetooth: list[BluetoothStatus] = msgspec.field(default_factory=list)

    def age_s(self, now: datetime) -> float:
        """How long ago it was written; negative where the clock was set back since. Raises `DamagedError`."""
        try:
            return (now - datetime.fromisoformat(self.written).astimezone(UTC)).total_seconds()
        except ValueError as error:
            raise DamagedError(f"status: {self.written!r} is no time") from error

    def is_fresh(self, now: datetime) -> bool:
        """A gateway runs that wrote this just now. Raises `DamagedError`."""
        return self.running and abs(self.age_s(now)) <= AGE_S_MAX


def write(folder: Path, status: GatewayStatus) -> None:
    """Replace the file in one step: who reads it sees the old or the new one. Raises `UnavailableError`. Blocks.

    Not forced to the disk: after a power cut nobody needs it, and every sync wears an SD card.
    """
    file = folder / FILE_NAME
    new = folder / f".{FILE_NAME}.new"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        new.write_bytes(msgspec.json.format(msgspec.json.encode(status), indent=2))
        os.replace(new, file)  # noqa: PTH105 - the name says that an old one is replaced
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise UnavailableError(
            f"{file} cannot be written: {error.strerror}", hint="check owner and free space of the state folder"
        ) from error


def read(folder: Path) -> GatewayStatus | None:
    """What the gateway wrote last; None if it never did. Raises `UnavailableError`, `DamagedError`. Blocks."""
    file = folder / FILE_NAME
    try:
        with file.open("rb") as opened:
            raw = opened.read(BYTES_MAX + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UnavailableError(
            f"{file} cannot be read: {error.strerror}", hint="it belongs to the gateway's user: try with sudo"
        ) from None
    try:
        return msgspec.json.decode(raw, type=GatewayStatus)
    except (msgspec.DecodeError, RecursionError) as error:
        raise DamagedError(f"{file} is not a gateway's status: {error}", hint="is it of another version?") from None
