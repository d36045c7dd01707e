"""The bridge's end of MQTT: takes batches from the broker, acknowledges what is through, publishes receipts.

Acknowledged is only what both stores have. When they stay away the bridge leaves the broker on purpose, so that
broker and gateways keep the data and its own memory stays flat, and comes back when they answer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from cloud_sync import receipts, time_desk
from cloud_sync.delivery import Delivery, read
from cloud_sync.ingest import Ingest, Intake, Outcome
from gateway.errors import UnavailableError, WardlinkError, WireError
from gateway.mqtt import Broker, Inbound, MqttSession, Outbound
from gateway.service import VERSION
from gateway.wire import control, topics
from gateway.wire.messages import Receipt, Status

log = logging.getLogger(__name__)

SHARE = "wardlink"
"""Name of the shared subscription: every bridge of a broker is in it, and each message goes to one of them."""
BYTES_UNACKNOWLEDGED_MAX = 32 << 20
"""Payloads between the broker's socket and the acknowledgement; the broker does not bound them reliably."""
RECEIVE_MAXIMUM = 2_000
"""Messages on their way: the blocks of a full batch of features, and those that come while it is written."""
QUIET_S = 0.025
"""A batch is closed when nothing came for so long: a broker that waits for acknowledgements sends no more."""
LEAVE_AFTER_S = 10.0
"""A batch that did not get through by then: the stores are away."""
RETRY_S_MAX = 5.0
RECEIPTS_UNANSWERED_MAX = 1_000
"""Receipts that the broker has not yet taken; a gateway that misses one asks."""
REASON_LENGTH_MAX = 500
_ABOUT_ONE_MESSAGE = (
    WardlinkError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What the content of a message can cause, foreseen or not: it is rejected alone and the others go on. Whatever else
goes wrong (no memory, no descriptors) ends the service, and all that is not acknowledged comes again."""


def subscriptions() -> tuple[str, ...]:
    """Data, losses and questions are shared among the bridges; retained presence and births go to each."""
    shared = (topics.data("+", "+", "+"), topics.loss("+", "+"), topics.receipt_request("+"), topics.time_request("+"))
    return (*(f"$share/{SHARE}/{topic}" for topic in shared), topics.meta("+", "+"), topics.status("+"))


@dataclass(slots=True)
class Activity:
    """What the bridge did since it started, and what holds it up."""

    points: int = 0
    blocks: int = 0
    letters: int = 0
    keeping: str = ""
    """Why the batch in hand is not through; empty while all is well."""


class Consumer:
    """Takes messages to the ingest, for ever.

    `stores_answer` returns when both stores do. `on_parked` is told devices whose binding changed while a message of
    theirs was parked.
    """

    def __init__(
        self,
        broker: Broker,
        bridge: str,
        ingest: Ingest,
        *,
        batch_lines: int,
        batch_ms: int,
        stores_answer: Callable[[], Awaitable[None]],
        on_parked: Callable[[str], None],
    ) -> None:
        self.activity = Activity()
        self._bridge = bridge
        self._ingest = ingest
        self._batch_lines = batch_lines
        self._batch_s = batch_ms / 1000
        self._stores_answer = stores_answer
        self._on_parked = on_parked
        self._waiting: deque[Inbound] = deque()
        self._arrived = asyncio.Event()
        self._is_taking = False
        self._leaving = asyncio.Event()
        self._unanswered: set[asyncio.Future[None]] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self.session = MqttSession(
            broker,
            on_message=self._on_message,
            on_connect=self._on_connect,
            subscriptions=subscriptions(),
            will=self._status(online=False),
            receive_maximum=RECEIVE_MAXIMUM,
            bytes_unacknowledged_max=BYTES_UNACKNOWLEDGED_MAX,
        )

    async def run(self) -> None:
        """Until cancelled. Raises `ConfigError` where no retry can help."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._attend(), name="broker")
            tasks.create_task(self._drain(), name="batches")

    # --- presence at the broker

    async def _attend(self) -> None:
        """Be at the broker whenever the stores answer."""
        while True:
            await self._flowing.wait()
            await self._stores_answer()
            self._leaving.clear()
            self._is_taking = True
            session = asyncio.create_task(self.session.run())
            leaving = asyncio.create_task(self._leaving.wait())
            try:
                await asyncio.wait({session, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if session.done():
                    await session
                log.warning("the stores are away: leaving the broker, which keeps the data")
            finally:
                await self._leave(session, leaving)

    async def _leave(self, *tasks: asyncio.Task[object]) -> None:
        """End the connection, with the last will for a goodbye; what is not acknowledged comes again."""
        self._is_taking = False
        while self._waiting:
            self.session.release(self._waiting.popleft())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _status(self, *, online: bool) -> Outbound:
        since = time.time_ns() if online else None
        status = Status(v=1, schema="status", name=self._bridge, online=online, version=VERSION, since=since)
        payload = control.encode(status)
        return Outbound(
            topics.bridge_status(self._bridge),
            payload.data,
            payload.content_type,
            {"schema": payload.schema},
            retain=True,
        )

    def _on_connect(self) -> None:
        self.session.publish(self._status(online=True))

    # --- batches

    def _on_message(self, message: Inbound) -> None:
        if not self._is_taking:
            self.session.release(message)
            return
        if time_desk.is_question(message.topic):
            self._tell_time(message)
            return
        self._waiting.append(message)
        self._arrived.set()

    def _tell_time(self, message: Inbound) -> None:
        try:
            self.session.publish(time_desk.answer(message, self._bridge))
        except UnavailableError:
            pass  # a gateway without an answer asks again
        except WireError as error:
            log.warning("question for the time on %s not understood: %s", message.topic, error)
        message.acknowledge()
        self.session.release(message)

    async def _drain(self) -> None:
        while True:
            await self._take(*await self._next_batch())

    async def _next_batch(self) -> tuple[list[Inbound], list[Delivery]]:
        """Wait for messages, and gather those that come within the batch's time and size."""
        messages: list[Inbound] = []
        deliveries: list[Delivery] = []
        line_count = 0
        loop = asyncio.get_running_loop()
        deadline_s = float("inf")
        while True:
            while self._waiting and line_count < self._batch_lines:
                message = self._waiting.popleft()
                messages.append(message)
                deliveries.append(read(message))
                line_count += deliveries[-1].line_count
            now_s = loop.time()
            deadline_s = min(deadline_s, now_s + self._batch_s) if messages else deadline_s
            if line_count >= self._batch_lines or now_s >= deadline_s:
                return messages, deliveries
            self._arrived.clear()
            try:
                async with asyncio.timeout_at(min(deadline_s, now_s + QUIET_S) if messages else None):
                    await self._arrived.wait()
            except TimeoutError:
                return messages, deliveries

    async def _take(self, messages: Sequence[Inbound], deliveries: Sequence[Delivery]) -> None:
        intake = self._ingest.begin(deliveries)
        try:
            outcome = await self._through(intake.finish)
        except _ABOUT_ONE_MESSAGE as error:
            log.warning("a batch of %d messages is refused, each is tried alone: %s", len(messages), error)
            intake.forget_bindings()
            for message, delivery in zip(messages, deliveries, strict=True):
                await self._take_alone(message, delivery)
        else:
            self._finish(messages, outcome)

    async def _take_alone(self, message: Inbound, delivery: Delivery) -> None:
        intake = self._ingest.begin([delivery])
        try:
            outcome = await self._through(intake.finish)
        except _ABOUT_ONE_MESSAGE as error:
            log.exception("message on %s is rejected", message.topic)
            outcome = await self._bury(intake, f"{type(error).__name__}: {error}"[:REASON_LENGTH_MAX])
        self._finish([message], outcome)

    async def _bury(self, intake: Intake, reason: str) -> Outcome:
        return await self._through(lambda: intake.bury(reason))

    def _finish(self, messages: Sequence[Inbound], outcome: Outcome) -> None:
        for message in messages:
            message.acknowledge()
            self.session.release(message)
        self.activity.points += outcome.point_count
        self.activity.blocks += outcome.block_count
        self.activity.letters += outcome.letter_count
        if outcome.bindings_changed:
            for device in outcome.parked_devices:
                self._on_parked(device)
        self._publish(outcome.receipts)

    def _publish(self, found: Sequence[Receipt]) -> None:
        """Send receipts and do not wait: the broker's answers wait in turn while a full batch is not acknowledged."""
        for receipt in found:
            if len(self._unanswered) >= RECEIPTS_UNANSWERED_MAX:
                log.warning("receipts are not sent, their gateways will ask: the broker does not answer")
                return
            try:
                answer = self.session.publish(receipts.outbound(receipt))
            except UnavailableError as error:
                log.info("receipts are not sent, their gateways will ask: %s", error)
                return
            self._unanswered.add(answer)
            answer.add_done_callback(self._unanswered.discard)

    async def _through(self, step: Callable[[], Awaitable[Outcome]]) -> Outcome:
        """Repeat a step until the stores take it; leave the broker when that takes long."""
        leave = asyncio.get_running_loop().call_later(LEAVE_AFTER_S, self._stall)
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(UnavailableError),
            wait=wait_random_exponential(multiplier=0.2, max=RETRY_S_MAX),
            before_sleep=self._note_retry,
        )
        try:
            async for attempt in retrying:
                with attempt:
                    return await step()
            raise AssertionError("it retries for ever")
        finally:
            leave.cancel()
            self.activity.keeping = ""
            self._flowing.set()

    def _stall(self) -> None:
        self.activity.keeping = self.activity.keeping or "a batch takes long"
        self._flowing.clear()
        self._leaving.set()

    def _note_retry(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        self.activity.keeping = str(error)
        log.warning("a batch is kept: %s", error)
