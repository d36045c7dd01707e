"""The gateway's end of MQTT: presence, births of devices, receipts, the time, and the sender that drains the outbox."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from msgspec import UnsetType

from gateway.clock import HostClock
from gateway.errors import UnavailableError, WireError
from gateway.mqtt import Broker, Inbound, MqttSession, Outbound
from gateway.service import VERSION
from gateway.spool.outbox import Outbox
from gateway.uplink.sender import Sender
from gateway.uplink.time_exchange import TimeExchange
from gateway.uplink.window import Window
from gateway.wire import control, topics
from gateway.wire.control import ControlMessage
from gateway.wire.messages import CommittedRanges, DeviceMeta, Receipt, ReceiptRequest, Status, WantedRange
from gateway.wire.topics import TopicKind

log = logging.getLogger(__name__)


RECEIPTS_MAX = 1000
"""Receipts that wait for the disk; the broker keeps the others."""
RECEIPTS_BYTES_MAX = 8 << 20
"""The same in bytes: above any true receipt, below what garbage could fill."""
DISK_RETRY_S = 1.0
"""Between two attempts at an outbox that does not answer."""
ASK_S = 600.0
"""From one question for receipts to the next while nothing gives cause: the answer tells nothing new, but the cloud
learns what this outbox does not hold, and that no such block can come any more."""
WANTED_MAX = 512
"""Streams and epochs in one receipt request."""


class Uplink:
    """One gateway's connection to the cloud."""

    def __init__(
        self,
        outbox: Outbox,
        broker: Broker,
        gateway: str,
        *,
        window: Window,
        resend_after_s: float,
        clock: HostClock | None = None,
        trust_bridge: bool = False,
    ) -> None:
        """`clock`: what a bridge may tell the time, see `gateway.uplink.time_exchange`."""
        self._outbox = outbox
        self._gateway = gateway
        self._births: dict[str, DeviceMeta] = {}
        self._inbox: asyncio.Queue[Inbound] = asyncio.Queue()
        self._bridges_online: set[str] = set()
        self._asking = asyncio.Event()
        self._resend_after_s = resend_after_s
        self._bridge_since_s = 0.0
        self.session = MqttSession(
            broker,
            on_message=self._arrive,
            on_connect=self._on_connect,
            subscriptions=[topics.receipt(gateway), topics.time(gateway), topics.bridge_status("+")],
            will=_control(topics.status(gateway), self._status(online=False), retain=True),
            receive_maximum=RECEIPTS_MAX,
            bytes_unacknowledged_max=RECEIPTS_BYTES_MAX,
        )
        self.sender = Sender(outbox, self.session, gateway, window=window, resend_after_s=resend_after_s)
        self.time = TimeExchange(self.session, gateway, clock, trust_bridge=trust_bridge) if clock else None
        self.sender.on_overdue = self._asking.set
        outbox.on_commit = self.sender.wake
        outbox.on_old_rows = self.sender.defer

    def announce(self, birth: DeviceMeta) -> None:
        """Tell, now and on every connection, what a device is and how it is."""
        if self._births.get(birth.device) != birth:
            self._births[birth.device] = birth
            self._publish(_control(topics.meta(self._gateway, birth.device), birth, retain=True))

    async def run(self) -> None:
        """Hold the connection, send and take receipts, until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.session.run())
                tasks.create_task(self.sender.run())
                tasks.create_task(self._read())
                tasks.create_task(self._ask())
                if self.time:
                    tasks.create_task(self.time.run())
        finally:
            self.sender.bridge_present = False

    async def say_goodbye(self) -> None:
        """Say that the gateway goes offline, as its last will would."""
        try:
            async with asyncio.timeout(1.0):
                await self.session.publish(
                    _control(topics.status(self._gateway), self._status(online=False), retain=True)
                )
        except (UnavailableError, TimeoutError):
            return

    def _on_connect(self) -> None:
        self._publish(_control(topics.status(self._gateway), self._status(online=True), retain=True))
        for birth in self._births.values():
            self._publish(_control(topics.meta(self._gateway, birth.device), birth, retain=True))
        self._asking.set()
        self.sender.wake()

    def _status(self, *, online: bool) -> Status:
        since = time.time_ns() if online else None
        return Status(v=1, schema="status", name=self._gateway, online=online, version=VERSION, since=since)

    def _publish(self, message: Outbound) -> None:
        try:
            self.session.publish(message)
        except UnavailableError:
            return  # retained messages are published again on every connection

    def _arrive(self, message: Inbound) -> None:
        if self.time is None or message.topic != topics.time(self._gateway):
            self._inbox.put_nowait(message)
            return
        try:
            self.time.take(message)  # at once: the time that it waits is its error
        except WireError as error:
            log.error("message on %s not understood: %s", message.topic, error)
        message.acknowledge()
        self.session.release(message)

    async def _read(self) -> None:
        while True:
            message = await self._inbox.get()
            try:
                await self._take(message)
            except WireError as error:
                log.error("message on %s not understood: %s", message.topic, error)
            message.acknowledge()
            self.session.release(message)

    async def _take(self, message: Inbound) -> None:
        match topics.parse(message.topic):
            case topics.Topic(kind=TopicKind.RECEIPT):
                receipt = control.decode(message.payload, Receipt)
                for entry in receipt.committed:
                    await self._forget(entry)
            case topics.Topic(kind=TopicKind.BRIDGE_STATUS, bridge=bridge):
                # An empty one takes the retained status back: the bridge was given up.
                is_online = bool(message.payload) and control.decode(message.payload, Status).online
                self._bridge(bridge, online=is_online)
            case _:
                log.warning("unexpected message on %s", message.topic)

    async def _forget(self, entry: CommittedRanges) -> None:
        """Tries again for as long as the disk does not answer."""
        while True:
            try:
                gone = await self._outbox.forget(entry.device, entry.signal, entry.epoch, entry.ranges)
                if not isinstance(entry.asked, UnsetType):
                    key = (entry.device, entry.signal, entry.epoch)
                    is_last_word = self._is_bridge_settled()
                    await self._outbox.settle(*key, entry.asked, entry.ranges, is_last_word=is_last_word)
            except UnavailableError as error:
                log.warning("a receipt waits: %s", error)
                await asyncio.sleep(DISK_RETRY_S)
            else:
                self.sender.receipted(gone)
                return

    def _bridge(self, name: str, *, online: bool) -> None:
        before = self.sender.bridge_present
        (self._bridges_online.add if online else self._bridges_online.discard)(name)
        self.sender.bridge_present = bool(self._bridges_online)
        if self.sender.bridge_present and not before:
            log.info("a bridge is there")
            self._bridge_since_s = asyncio.get_running_loop().time()
            self._asking.set()
            asyncio.get_running_loop().call_later(self._resend_after_s, self._asking.set)

    def _is_bridge_settled(self) -> bool:
        """Whether one has been there for so long that it has read what was on its way to it."""
        there_s = asyncio.get_running_loop().time() - self._bridge_since_s
        return self.sender.bridge_present and there_s >= self._resend_after_s

    async def _ask(self) -> None:
        """After every connection, and when receipts are overdue, ask what is stored of what is here, or should be."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ASK_S):
                    await self._asking.wait()
            self._asking.clear()
            try:
                held = [WantedRange(*key, *ends) for key, ends in (await self._outbox.held()).items()]
                missing = await self._outbox.suspects()
            except UnavailableError as error:
                log.warning("receipts cannot be asked for: %s", error)
                await asyncio.sleep(DISK_RETRY_S)
                self._asking.set()
                continue
            wanted = held + [WantedRange(*one.epoch_key, one.first, one.last) for one in missing]
            for start in range(0, len(wanted), WANTED_MAX):
                some = wanted[start : start + WANTED_MAX]
                request = ReceiptRequest(v=1, schema="receipt_request", gateway=self._gateway, wanted=some)
                self._publish(_control(topics.receipt_request(self._gateway), request))


def _control(topic: str, message: ControlMessage, *, retain: bool = False) -> Outbound:
    payload = control.encode(message)
    return Outbound(topic, payload.data, payload.content_type, {"schema": payload.schema}, retain)
