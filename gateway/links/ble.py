"""A BLE device as a link, over bleak and BlueZ: connects, reads once, subscribes, hands on what is notified.

The only file that imports bleak. Knows no device family: which characteristics, it is told. One process owns the
adapter and connects to one device at a time. Reconnecting is the caller's: `open` again, after whatever pause.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from bleak import BleakClient, BleakScanner
from bleak.args.bluez import BlueZClientArgs, BlueZScannerArgs
from bleak.backends.bluezdbus.version import BlueZFeatures
from bleak.backends.characteristic import BleakGATTCharacteristic
from bleak.exc import (
    BleakBluetoothNotAvailableError,
    BleakBluetoothNotAvailableReason,
    BleakDeviceNotFoundError,
    BleakError,
    BleakGATTProtocolError,
)
from bleak_retry_connector import BleakAbortedError, BleakNotFoundError, establish_connection

from gateway.errors import UnavailableError
from gateway.links.base import Chunk
from gateway.links.bluetoothd import ADAPTER_HINT, DAEMON_HINT, POWER_HINT, Bluetoothd

log = logging.getLogger(__name__)

SCAN_S_MAX = 5.0
"""Sensors advertise at least every second; longer would keep the other devices waiting for their turn."""
CONNECT_S_MAX = 15.0
CONNECT_ATTEMPTS_MAX = 3
SETUP_S_MAX = 10.0
"""For all reads and subscriptions: each takes a connection interval or two, 4 s on the slowest links."""
OPEN_S_MAX = 45.0
"""Above the sum of the others: it cuts the library's own cleaning up when the daemon hangs."""
WRITE_S_MAX = 5.0
CLOSE_S_MAX = 3.0
"""BlueZ takes up to two seconds to cut a link, and the library would wait ten."""
CHUNKS_MAX = 4096
"""About 20 s of a headset with 174 notifications a second: a reader that slow is broken, and memory stays flat."""

RADIO_HINT = (
    "mostly radio: move the device closer, take Wi-Fi beside it to 5 GHz or to a cable, or use a Bluetooth dongle "
    "on an extension lead; BlueZ calls it le-connection-abort-by-local"
)
ABSENT_HINT = "is it switched on, worn, in range, and not connected to a phone?"
RIGHTS_HINT = "sudo usermod -aG bluetooth USER, then log in again"

SLOTS_HINT = "raise the number of slots if the adapter can carry more, or give the device an adapter of its own"

_connect_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


def _connect_turn() -> asyncio.Lock:
    """The lock of this event loop: BlueZ knows one scan per program and confuses connects that overlap."""
    return _connect_turns.setdefault(asyncio.get_running_loop(), asyncio.Lock())


_slots_taken: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str | None, set[BleLink]]] = WeakKeyDictionary()


def _slots(adapter: str | None) -> set[BleLink]:
    """The links of this event loop that hold, or are about to make, a connection over this adapter."""
    return _slots_taken.setdefault(asyncio.get_running_loop(), {}).setdefault(adapter, set())


class BleLink:
    """One device behind BlueZ (see `gateway.links.base.Link`).

    `notify`: characteristics to subscribe to, full UUIDs; the first one must be there, the others may be missing.
    `read`: characteristics to read once after connecting, their values are the first chunks; each may be missing.
    `adapter`: such as hci1; None takes the first one that is on.
    `slots`: connections that the adapter carries at once, None for no limit. Radios carry 3 to 10 and do not
    say so: one too many ends in connects that fail with no reason, or breaks those that are there.
    """

    def __init__(
        self,
        address: str,
        notify: Sequence[str],
        read: Sequence[str],
        adapter: str | None = None,
        *,
        slots: int | None = None,
    ) -> None:
        self._address = address.upper()
        self._notify = tuple(uuid.lower() for uuid in notify)
        self._read = tuple(uuid.lower() for uuid in read)
        if not self._notify:
            raise ValueError("a BLE link needs a characteristic to subscribe to")
        self._adapter = adapter
        self._slots = slots
        self._client: BleakClient | None = None
        self._daemon: Bluetoothd | None = None
        self._arrived: asyncio.Queue[Chunk | UnavailableError] = asyncio.Queue()
        self._taking = False
        self._up = False

    @property
    def name(self) -> str:
        """The device's address."""
        return self._address

    async def open(self) -> None:
        """Find the device, connect, read, subscribe. Raises `UnavailableError`; then nothing is left open.

        What an earlier `open` left is closed first: BlueZ would renew the subscriptions of a client
        that did not disconnect after its link was lost, and everything would come twice.
        """
        await self.close()
        self._arrived = asyncio.Queue()
        self._taking = True
        try:
            async with _connect_turn():
                self._take_slot()
                async with asyncio.timeout(OPEN_S_MAX):
                    await self._connect()
        except TimeoutError as error:
            await self.close()
            raise UnavailableError(f"{self._address}: BlueZ does not get on", hint=DAEMON_HINT) from error
        except BaseException:
            await self.close()
            raise

    async def read(self) -> Chunk:
        """The next chunk; all that arrived before a loss is delivered first. Raises `UnavailableError`."""
        if not self._taking and self._arrived.empty():
            raise UnavailableError(f"{self._address} is not open")
        arrived = await self._arrived.get()
        if isinstance(arrived, UnavailableError):
            self._arrived.put_nowait(arrived)
            raise UnavailableError(arrived.message, hint=arrived.hint)
        return arrived

    async def write(self, data: bytes, channel: str = "") -> None:
        """Write to a characteristic, with a response where it offers that. Raises `UnavailableError`."""
        client = self._client
        if client is None or not self._up:
            raise UnavailableError(f"{self._address} is not open")
        characteristic = client.services.get_characteristic(channel)
        if characteristic is None:
            raise UnavailableError(f"{self._address} has no characteristic {channel or '(none named)'}")
        try:
            async with asyncio.timeout(WRITE_S_MAX):
                await client.write_gatt_char(characteristic, data)
        except (BleakError, OSError, EOFError, TimeoutError) as error:
            raise _unavailable(self._address, error) from error

    async def close(self) -> None:
        """Cut the link and leave the bus within a few seconds; any number of times, in any state."""
        self._lose(UnavailableError(f"{self._address} is closed"))
        client, self._client = self._client, None
        daemon, self._daemon = self._daemon, None
        try:
            if client is not None:
                async with asyncio.timeout(CLOSE_S_MAX):
                    await client.disconnect()
        except (BleakError, OSError, EOFError, TimeoutError) as error:
            # The client has left the bus all the same, and its subscriptions with it.
            log.debug("%s: disconnect: %r", self._address, error)
        finally:
            _slots(self._adapter).discard(self)
            if daemon is not None:
                await daemon.close()

    # -- opening ------------------------------------------------------------------------------

    def _take_slot(self) -> None:
        taken = _slots(self._adapter)
        if self._slots is not None and len(taken) >= self._slots:
            raise UnavailableError(
                f"{self._address}: all {self._slots} connections of the Bluetooth adapter are in use", hint=SLOTS_HINT
            )
        taken.add(self)

    async def _connect(self) -> None:
        daemon = self._daemon = Bluetoothd(self._daemon_gone)
        await daemon.connect()
        await daemon.check_adapter(self._adapter)
        await daemon.release(self._address)
        scanning: BlueZScannerArgs = {} if self._adapter is None else {"adapter": self._adapter}
        connecting: BlueZClientArgs = {} if self._adapter is None else {"adapter": self._adapter}
        try:
            # Asked for here, where a cancelled `open` cannot cut it off: the library would wait for ever
            # for the answer to a question that it believes to be under way.
            await asyncio.shield(asyncio.ensure_future(BlueZFeatures.check_bluez_version()))
            device = await BleakScanner.find_device_by_address(self._address, SCAN_S_MAX, bluez=scanning)
            if device is None:
                raise UnavailableError(f"{self._address} was not heard within {SCAN_S_MAX:g} s", hint=ABSENT_HINT)
            async with asyncio.timeout(CONNECT_S_MAX):
                # Without the cache: after a restart of the daemon it names objects that are no more.
                client = await establish_connection(
                    BleakClient,
                    device,
                    self._address,
                    self._disconnected,
                    max_attempts=CONNECT_ATTEMPTS_MAX,
                    use_services_cache=False,
                    bluez=connecting,
                )
            self._client = client
            async with asyncio.timeout(SETUP_S_MAX):
                await self._set_up(client)
        except (BleakError, OSError, EOFError, TimeoutError) as error:
            if "org.bluez.Error.InProgress" in str(error):
                # Left over from a killed program; nothing else helps.
                await daemon.forget(self._address)
            raise _unavailable(self._address, error) from error
        self._up = True

    async def _set_up(self, client: BleakClient) -> None:
        main = client.services.get_characteristic(self._notify[0])
        if main is None:
            # BlueZ may remember the services of an earlier firmware.
            if self._daemon is not None:
                await self._daemon.forget(self._address)
            raise UnavailableError(
                f"{self._address} has no characteristic {self._notify[0]}",
                hint="is the configured device type the right one?",
            )
        # Reading before subscribing: BlueZ signals a value that is read as if it had been notified.
        for uuid in self._read:
            await self._read_once(client, uuid)
        for uuid in self._notify:
            characteristic = client.services.get_characteristic(uuid)
            if characteristic is None or {"notify", "indicate"}.isdisjoint(characteristic.properties):
                log.debug("%s: nothing to subscribe to at %s", self._address, uuid)
                continue
            await client.start_notify(characteristic, self._notified, bluez={"use_start_notify": True})
        if not client.is_connected:
            raise UnavailableError(f"{self._address}: the link was lost while it was set up", hint=RADIO_HINT)

    async def _read_once(self, client: BleakClient, uuid: str) -> None:
        characteristic = client.services.get_characteristic(uuid)
        if characteristic is None or "read" not in characteristic.properties:
            log.debug("%s: nothing to read at %s", self._address, uuid)
            return
        try:
            value = await client.read_gatt_char(characteristic)
        except BleakGATTProtocolError as error:
            log.warning("%s: %s cannot be read: %s", self._address, uuid, error)
            return
        self._take(Chunk(bytes(value), time.monotonic_ns(), uuid))

    # -- what comes ---------------------------------------------------------------------------

    def _notified(self, characteristic: BleakGATTCharacteristic, value: bytearray) -> None:
        self._take(Chunk(bytes(value), time.monotonic_ns(), characteristic.uuid))

    def _take(self, chunk: Chunk) -> None:
        if not self._taking:
            return
        if self._arrived.qsize() >= CHUNKS_MAX:
            self._lose(UnavailableError(f"{self._address}: {CHUNKS_MAX} chunks were not read in time"))
            return
        self._arrived.put_nowait(chunk)

    def _disconnected(self, client: BleakClient) -> None:
        # Also called for connects that fail and are tried again, and at closing: those are not losses.
        if client is self._client and self._up:
            self._lose(UnavailableError(f"{self._address}: the link was lost", hint=RADIO_HINT))

    def _daemon_gone(self) -> None:
        # The library notices nothing of it and would believe the link to be up for ever.
        if self._up:
            self._lose(UnavailableError(f"{self._address}: the Bluetooth daemon is gone", hint=DAEMON_HINT))

    def _lose(self, reason: UnavailableError) -> None:
        """Let `read` end with this reason once it has delivered what came before; take nothing more."""
        self._up = False
        if self._taking:
            self._taking = False
            self._arrived.put_nowait(reason)


def _unavailable(address: str, error: BaseException) -> UnavailableError:
    """What an error of the library means to an operator."""
    text = str(error) or type(error).__name__
    if isinstance(error, BleakBluetoothNotAvailableError):
        powered_off = error.reason is BleakBluetoothNotAvailableReason.POWERED_OFF
        return UnavailableError(f"{address}: {error.args[0]}", hint=POWER_HINT if powered_off else ADAPTER_HINT)
    if isinstance(error, BleakNotFoundError | BleakDeviceNotFoundError):
        return UnavailableError(f"{address} went away while connecting: {text}", hint=ABSENT_HINT)
    if isinstance(error, TimeoutError):
        return UnavailableError(f"{address} does not answer in time", hint=RADIO_HINT)
    if isinstance(error, BleakAbortedError) or "le-connection-abort-by-local" in text:
        return UnavailableError(f"{address}: the link broke while it was set up: {text}", hint=RADIO_HINT)
    for sign, hint in {
        "ServiceUnknown": DAEMON_HINT,
        "NameHasNoOwner": DAEMON_HINT,
        "NoReply": DAEMON_HINT,
        "AccessDenied": RIGHTS_HINT,
        "NotReady": POWER_HINT,
        "adapter": ADAPTER_HINT,
        "ot connected": RADIO_HINT,
        "disconnected": RADIO_HINT,
    }.items():
        if sign in text:
            return UnavailableError(f"{address}: {text}", hint=hint)
    return UnavailableError(f"{address}: {text}")
