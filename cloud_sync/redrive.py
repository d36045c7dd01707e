"""Parked messages whose device is bound by now: written, counted and settled exactly once.

Looks when a binding changes, at the start and every minute. Several bridges may do so at once: the store does not
mind points that come twice, and the parked row is the token of exactly one count.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from tenacity import AsyncRetrying, before_sleep_log, retry_if_exception_type, wait_random_exponential

from cloud_sync.binding import EVERY_DEVICE, Bindings, position
from cloud_sync.point_batch import PointBatch
from cloud_sync.registry import ledger, letters
from cloud_sync.registry.binding_rows import UNKNOWN_DEVICE
from cloud_sync.registry.database import Database
from cloud_sync.registry.entries import Batch, DeadLetter, Part
from cloud_sync.registry.letters import ParkedMessage
from cloud_sync.timeseries import TimeSeries
from gateway.errors import RefusedError, UnavailableError, WireError
from gateway.samples import SampleBlock
from gateway.wire import codec

log = logging.getLogger(__name__)

INTERVAL_S = 60.0
"""Finds what no notification told of, and what another bridge left unfinished."""
MESSAGES_MAX = 32
"""Parked messages in memory at a time, of up to 1 MiB each."""
RETRY_S_MAX = 10.0


class Redrive:
    """Writes what waited."""

    def __init__(self, database: Database, timeseries: TimeSeries, bindings: Bindings) -> None:
        self._database = database
        self._timeseries = timeseries
        self._bindings = bindings
        self._devices: set[str] = set()
        self._woken = asyncio.Event()
        self.settled_count = 0
        self.parked_count = 0
        """Messages that waited when last looked."""

    def wake(self, device: str) -> None:
        """Look at a device soon, or at all of `EVERY_DEVICE`."""
        self._devices.add(device)
        self._woken.set()

    async def run(self) -> None:
        """Until cancelled."""
        self.wake("")
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(UnavailableError),
            wait=wait_random_exponential(multiplier=0.5, max=RETRY_S_MAX),
            before_sleep=before_sleep_log(log, logging.INFO),
        )
        while True:
            try:
                async with asyncio.timeout(INTERVAL_S):
                    await self._woken.wait()
            except TimeoutError:
                self._devices.add("")
            self._woken.clear()
            devices, self._devices = self._devices, set()
            await retrying(self.look, devices)

    async def look(self, devices: set[str]) -> None:
        """Write what waits of these devices. Raises `UnavailableError`."""
        async with self._database.connection() as connection:
            waiting = await letters.parked_devices(connection)
        self.parked_count = sum(device.messages for device in waiting)
        for device in waiting:
            if devices & EVERY_DEVICE or device.device in devices:
                self.parked_count -= await self._redrive(device.device)

    async def _redrive(self, device: str) -> int:
        """How many messages of a device are settled."""
        count = 0
        after: ParkedMessage | None = None
        while True:
            async with self._database.connection() as connection:
                messages = await letters.take_parked(connection, device, MESSAGES_MAX, after)
                await self._bindings.refresh(connection, [device])
            if not messages:
                break
            after = messages[-1]
            try:
                count += await self._write(messages)
            except _NobodyKnowsError:
                break
        if count:
            self.settled_count += count
            log.info("device %s: %d parked messages written", device, count)
        return count

    async def _write(self, messages: Sequence[ParkedMessage]) -> int:
        points = PointBatch()
        bound: list[ParkedMessage] = []
        for message in messages:
            try:
                samples = _waiting_samples(message)
                binding = await self._bindings.bind(samples)
                if binding.reason == UNKNOWN_DEVICE:
                    raise _NobodyKnowsError
                if binding.waiting is None:
                    points.add(message.id, binding.bound)
                    bound.append(message)
            except (WireError, RefusedError) as error:
                await self._bury(message, error.message)
        await points.write(self._timeseries)
        return await self._settle([message for message in bound if not points.unusable(message.id)], points)

    async def _settle(self, bound: Sequence[ParkedMessage], points: PointBatch) -> int:
        parts: list[tuple[Part, ...]] = [points.parts(message.id) for message in bound]
        refused = [
            _letter(message, *refusal, points.parts(message.id))
            for message in bound
            if (refusal := points.refusal(message.id))
        ]
        async with self._database.connection() as connection:
            if refused:
                # Before the row goes: a letter that is kept twice is one letter, one that is lost is none.
                await ledger.commit(connection, Batch(letters=refused))
            try:
                settled = await letters.settle_parked(connection, [message.id for message in bound], parts)
            except RefusedError as error:
                log.warning("parked messages stay for now: %s", error)
                self._bindings.forget("")
                return 0
        return len(settled)

    async def _bury(self, message: ParkedMessage, reason: str) -> None:
        log.error("parked message on %s is given up: %s", message.topic, reason)
        async with self._database.connection() as connection:
            await letters.bury_parked(connection, message.id, reason)


class _NobodyKnowsError(Exception):
    """The device is not registered: none of its messages can be bound."""


def _waiting_samples(message: ParkedMessage) -> SampleBlock:
    """The samples of a message that still wait. Raises `WireError`."""
    decoded = codec.decode_on(message.topic, message.payload, message.content_type or None).content
    if not isinstance(decoded, SampleBlock):
        raise WireError("a loss record is never parked")
    start, stop = position(decoded, message.from_ns), position(decoded, message.to_ns)
    if start == stop:
        raise WireError("none of its samples is in the span that waits")
    return decoded.part(start, stop)


def _letter(message: ParkedMessage, reason: str, detail: str, parts: tuple[Part, ...]) -> DeadLetter:
    """What the store refused of a parked message; its other points are counted where it is settled."""
    return DeadLetter(
        parts=parts,
        is_claimed=True,
        left_at=(message.first_at, message.last_at),
        gateway=message.gateway,
        topic=message.topic,
        content_type=message.content_type,
        payload=message.payload,
        reason=reason,
        detail=detail,
        properties=message.properties,
    )
