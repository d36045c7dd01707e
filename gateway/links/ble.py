"""A BLE device as a link, over bleak and BlueZ: connects, reads once, subscribes, hands on what is notified.

The only file that imports bleak. Knows no device family: which characteristics, it is told. What links share is in
`radio`: one process owns the adapter and connects to one device at a time. Reconnecting is the caller's: `open` again,
after whatever pause.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

from bleak import BleakClient, BleakScanner
from bleak.args.bluez import BlueZClientArgs, BlueZScannerArgs
from bleak.backends.bluezdbus.manager import get_global_bluez_manager
from bleak.backends.bluezdbus.version import BlueZFeatures
from bleak.backends.characteristic import BleakGATTCharacteristic
from bleak.backends.device import BLEDevice
from bleak.backends.scanner import AdvertisementData
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
from gateway.links.bluetoothd import ADAPTER_HINT, DAEMON_HINT, POWER_HINT, Bluetoothd, caught_up
from gateway.links.pairing import PAIRING_HINT
from gateway.links.radio import ALARM_HINT, SCAN_S_MAX, Radio, Step

log = logging.getLogger(__name__)

CONNECT_S_MAX = 15.0
CONNECT_ATTEMPTS_MAX = 3
TURN_S_MAX = 20.0
"""Above that: it cuts the library's own cleaning up when the daemon hangs, so that the others get their turn."""
SETUP_S_MAX = 15.0
"""For all reads and subscriptions: each takes a connection interval or two, 4 s on the slowest links, and pairing
takes seconds."""
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

NOT_HEARD_DBM = -127
"""What the library tells as the signal strength of news that are no advertisement."""

FOUND_MAX = 1000
"""Devices of one scan: phones change their address every few minutes, and a busy place has hundreds."""
BATTERY_SERVICE = "0000180f-0000-1000-8000-00805f9b34fb"
"""Its data in an advertisement is the level in %, one byte."""

_radios: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, Radio[BLEDevice]]] = WeakKeyDictionary()


def _radio(adapter: str) -> Radio[BLEDevice]:
    """What the links of this event loop share over this adapter."""
    radios = _radios.setdefault(asyncio.get_running_loop(), {})
    return radios.setdefault(adapter, Radio(partial(_discovery, adapter)))


def connections() -> dict[str, int]:
    """How many connections each adapter carries, or is about to make, for the links of this event loop."""
    radios = _radios.get(asyncio.get_running_loop(), {})
    return {adapter: len(radio.holders) for adapter, radio in radios.items()}


def _carries_links(*, but: Radio[BLEDevice]) -> bool:
    """Another adapter has a connection, which a restart of the daemon would cut."""
    radios = _radios.get(asyncio.get_running_loop(), {}).values()
    return any(holder.connected for radio in radios if radio is not but for holder in radio.holders)


@asynccontextmanager
async def _discovery(adapter: str, heard: Callable[[str, BLEDevice], None]) -> AsyncIterator[None]:
    def advertised(device: BLEDevice, advertisement: AdvertisementData) -> None:
        if advertisement.rssi > NOT_HEARD_DBM:
            heard(device.address.upper(), device)

    scanning: BlueZScannerArgs = {"adapter": adapter}
    try:
        async with BleakScanner(advertised, bluez=scanning):
            yield
    except (BleakError, OSError, EOFError) as error:
        raise _unavailable(adapter, error) from error


@dataclass(frozen=True, slots=True)
class FoundDevice:
    """A BLE device that is there. What is not known is None or empty."""

    address: str
    """Upper case."""
    name: str
    service_uuids: tuple[str, ...]
    """Full, lower case, as advertised."""
    rssi_dbm: int | None
    """None for a device that has a link: it does not advertise."""
    battery_pct: float | None = None
    connected: bool = False


async def discover(seconds: float, adapter: str | None = None) -> list[FoundDevice]:
    """Listen for so long: what advertises, strongest first, then what has a link. No device is connected to.

    Raises `UnavailableError` where nothing can be heard.
    """
    heard: dict[str, FoundDevice] = {}

    def advertised(device: BLEDevice, advertisement: AdvertisementData) -> None:
        address = device.address.upper()
        if advertisement.rssi <= NOT_HEARD_DBM or (address not in heard and len(heard) >= FOUND_MAX):
            return
        level = advertisement.service_data.get(BATTERY_SERVICE, b"")
        heard[address] = FoundDevice(
            address,
            advertisement.local_name or "",
            tuple(uuid.lower() for uuid in advertisement.service_uuids),
            advertisement.rssi,
            float(level[0]) if len(level) == 1 else None,
        )

    gone = asyncio.Event()
    daemon = Bluetoothd(gone.set)
    try:
        await daemon.connect()
        name = await daemon.check_adapter(adapter)
        scanning: BlueZScannerArgs = {"adapter": name}
        try:
            async with BleakScanner(advertised, bluez=scanning):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(gone.wait(), seconds)
        except (BleakError, OSError, EOFError) as error:
            if not gone.is_set():
                raise _unavailable(name, error) from error
        if gone.is_set():
            raise UnavailableError(f"{name}: the Bluetooth daemon is gone", hint=DAEMON_HINT)
        linked = [_linked(*each) for each in await daemon.connected_devices()]
    finally:
        await daemon.close()
    heard.update((device.address, device) for device in linked)
    return sorted(heard.values(), key=lambda device: (device.connected, -(device.rssi_dbm or 0), device.address))


def _linked(properties: Mapping[str, Any], battery_pct: int | None) -> FoundDevice:
    return FoundDevice(
        str(properties.get("Address", "")).upper(),
        str(properties.get("Name", "")),
        tuple(str(uuid).lower() for uuid in properties.get("UUIDs", ())),
        None,
        None if battery_pct is None else float(battery_pct),
        connected=True,
    )


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
        self._radio: Radio[BLEDevice] | None = None
        self._arrived: asyncio.Queue[Chunk | UnavailableError] = asyncio.Queue()
        self._taking = False
        self._up = False
        self._signals: Any = None
        """The library's connection to the bus over which notifications come."""
        self._ending: asyncio.Task[None] | None = None
        """Takes what the daemon said before it vanished."""

    @property
    def name(self) -> str:
        """The device's address."""
        return self._address

    @property
    def connected(self) -> bool:
        """The link is up, as far as anybody knows."""
        return self._up

    async def open(self) -> None:
        """Find the device, connect, read, subscribe. Raises `UnavailableError`; then nothing is left open.

        What an earlier `open` left is closed first: BlueZ would renew the subscriptions of a client
        that did not disconnect after its link was lost, and everything would come twice.
        """
        await self.close()
        self._arrived = asyncio.Queue()
        self._taking = True
        try:
            await self._find_and_connect()
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
        """Write to a characteristic, with a response where it offers that.

        Over a link that was lost, or is lost by it, nothing is written and nothing raised: `read` tells of the loss
        once it has delivered what came before. Raises `UnavailableError` for a link that is not open, and where
        the device cannot take it.
        """
        client = self._client
        if client is None:
            raise UnavailableError(f"{self._address} is not open")
        if not self._up:
            return
        characteristic = client.services.get_characteristic(channel)
        if characteristic is None:
            raise UnavailableError(f"{self._address} has no characteristic {channel or '(none named)'}")
        if "write" not in characteristic.properties and len(data) > characteristic.max_write_without_response_size:
            raise UnavailableError(
                f"{self._address} takes {characteristic.max_write_without_response_size} bytes at a time,"
                f" not {len(data)}"
            )
        try:
            async with asyncio.timeout(WRITE_S_MAX):
                await client.write_gatt_char(characteristic, data)
        except BleakGATTProtocolError as error:
            raise _unavailable(self._address, error) from error
        except (BleakError, OSError, EOFError, TimeoutError) as error:
            self._lose(_unavailable(self._address, error))

    async def close(self) -> None:
        """Cut the link and leave the bus within a few seconds; any number of times, in any state."""
        self._lose(UnavailableError(f"{self._address} is closed"))
        if self._ending is not None:
            self._ending.cancel()
            self._ending = None
        self._signals = None
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
            radio, self._radio = self._radio, None
            if radio is not None:
                radio.holders.discard(self)
                radio.expected.discard(self._address)
            if daemon is not None:
                await daemon.close()

    # -- opening ------------------------------------------------------------------------------

    async def _find_and_connect(self) -> None:
        daemon = self._daemon = Bluetoothd(self._daemon_gone)
        await daemon.connect()
        adapter = await daemon.check_adapter(self._adapter)
        radio = self._radio = _radio(adapter)
        radio.expected.add(self._address)
        await daemon.offer_pairing(radio.expected.__contains__)
        await daemon.release(self._address)
        device = await radio.scanner.find(self._address, SCAN_S_MAX)
        if device is None:
            raise UnavailableError(f"{self._address} was not heard within {SCAN_S_MAX:g} s", hint=ABSENT_HINT)
        async with radio.turn:
            self._take_slot(radio)
            try:
                async with asyncio.timeout(TURN_S_MAX):
                    self._client = await self._connect(daemon, device, adapter)
            except (UnavailableError, TimeoutError) as error:
                await self._climb(radio, daemon, adapter, error)
            radio.ladder.connected()
        self._signals = getattr(await get_global_bluez_manager(), "_bus", None)
        try:
            async with asyncio.timeout(SETUP_S_MAX):
                await self._set_up(self._client)
        except (BleakError, OSError, EOFError, TimeoutError) as error:
            raise _unavailable(self._address, error) from error
        self._up = True

    def _take_slot(self, radio: Radio[BLEDevice]) -> None:
        if self._slots is not None and len(radio.holders) >= self._slots:
            raise UnavailableError(
                f"{self._address}: all {self._slots} connections of the Bluetooth adapter are in use", hint=SLOTS_HINT
            )
        radio.holders.add(self)

    async def _connect(self, daemon: Bluetoothd, device: BLEDevice, adapter: str) -> BleakClient:
        connecting: BlueZClientArgs = {"adapter": adapter}
        try:
            # Asked for here, where a cancelled `open` cannot cut it off: the library would wait for ever
            # for the answer to a question that it believes to be under way.
            await asyncio.shield(asyncio.ensure_future(BlueZFeatures.check_bluez_version()))
            async with asyncio.timeout(CONNECT_S_MAX):
                # Without the cache: after a restart of the daemon it names objects that are no more.
                return await establish_connection(
                    BleakClient,
                    device,
                    self._address,
                    self._disconnected,
                    max_attempts=CONNECT_ATTEMPTS_MAX,
                    use_services_cache=False,
                    bluez=connecting,
                )
        except (BleakError, OSError, EOFError, TimeoutError) as error:
            if "org.bluez.Error.InProgress" in str(error):
                # Left over from a killed program; nothing else helps.
                await daemon.forget(self._address)
            raise _unavailable(self._address, error) from error

    async def _climb(
        self, radio: Radio[BLEDevice], daemon: Bluetoothd, adapter: str, error: UnavailableError | TimeoutError
    ) -> NoReturn:
        """Try the next that helps an adapter over which nothing connects, and raise what went wrong."""
        failure = error
        if isinstance(failure, TimeoutError):
            failure = UnavailableError(f"{self._address}: BlueZ does not get on", hint=DAEMON_HINT)
        if radio.works_for_others(self):
            radio.ladder.connected()
            raise failure from error
        step = radio.ladder.failed()
        try:
            if step is Step.SWITCH:
                log.warning("nothing connects over %s: switching it off and on", adapter)
                await daemon.switch_off_and_on(adapter)
            elif step is Step.RESTART and not _carries_links(but=radio):
                log.warning("nothing connects over %s: restarting the Bluetooth daemon", adapter)
                # Until the answer says otherwise.
                radio.ladder.restart_refused()
                await daemon.restart()
                radio.ladder.restarted()
        except UnavailableError as refusal:
            log.warning("%s", refusal)
        if radio.ladder.alarm:
            raise UnavailableError(f"{failure.message}; nothing connects over {adapter}", hint=ALARM_HINT) from error
        raise failure from error

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
        if client is self._client and (self._up or self._ending is not None):
            self._lose(UnavailableError(f"{self._address}: the link was lost", hint=RADIO_HINT))

    def _daemon_gone(self) -> None:
        # The library notices nothing of it and would believe the link to be up for ever.
        gone = UnavailableError(f"{self._address}: the Bluetooth daemon is gone", hint=DAEMON_HINT)
        if self._radio is not None:
            self._radio.scanner.give_up(gone)
        if self._up:
            self._up = False
            self._ending = asyncio.create_task(self._take_the_rest(gone), name=f"{self._address}: last notifications")

    async def _take_the_rest(self, reason: UnavailableError) -> None:
        # The news came over our own connection to the bus, notifications come over the library's: there, some that
        # the daemon sent before it vanished may still be under way.
        await caught_up(self._signals)
        self._lose(reason)

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
        "Not paired": PAIRING_HINT,
        "Authentication": PAIRING_HINT,
        "NotReady": POWER_HINT,
        "adapter": ADAPTER_HINT,
        "ot connected": RADIO_HINT,
        "disconnected": RADIO_HINT,
    }.items():
        if sign in text:
            return UnavailableError(f"{address}: {text}", hint=hint)
    return UnavailableError(f"{address}: {text}")
