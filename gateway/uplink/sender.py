"""Drains the outbox to the broker within a window. The broker's acknowledgement frees the window, never the disk."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from functools import partial

from gateway.errors import RefusedError, UnavailableError
from gateway.mqtt import MqttSession, Outbound
from gateway.samples import LOSS
from gateway.spool.outbox import Outbox
from gateway.spool.store import StoredRow
from gateway.uplink.lanes import Lane, Lanes, Span
from gateway.wire import topics

log = logging.getLogger(__name__)

UNRECEIPTED_MAX = 20_000
"""Rows sent and not receipted of which the time is remembered, about 2 MB. Beyond it the backlog waits."""
RESEND_CHECKS = 4
"""How often a resend is considered within the time that a hole may stand."""
FETCH_RETRY_S = 1.0
ATTEMPTS_MAX = 3
"""A row that failed so often may be what makes the broker drop the connection: it is set aside."""
NEXT_ATTEMPT_S = 5.0
"""Before the second and later attempts, in which a row keeps its place in the window: a broker that declines everything
is asked no faster than that. The first failure is most often a lost connection."""


class Sender:
    """Sends rows in two lanes and remembers which of them wait for their receipt."""

    def __init__(
        self, outbox: Outbox, session: MqttSession, gateway: str, *, window_messages: int, resend_after_s: float
    ) -> None:
        self._outbox = outbox
        self._session = session
        self._gateway = gateway
        self._window = window_messages
        self._resend_after_s = resend_after_s
        self._lanes = Lanes(outbox.holding.last_id)
        self._in_flight: set[int] = set()
        self._sent_at: dict[int, float] = {}
        """When each row that waits for its receipt was sent, oldest first."""
        self._failures: dict[int, int] = {}
        """How often each row that is still here was not taken, since it last was."""
        self._has_blamed = False
        self._wake = asyncio.Event()
        self.bridge_present = False
        """Whether resending makes sense: nobody receipts what nobody reads."""
        self.resent = 0

    def wake(self) -> None:
        """There may be something to send."""
        self._wake.set()

    def receipted(self, ids: Iterable[int]) -> None:
        """These rows are gone from the outbox."""
        for number in ids:
            self._sent_at.pop(number, None)
            self._failures.pop(number, None)
        self._wake.set()

    async def run(self) -> None:
        """Send whenever there is a connection, until cancelled. Raises `DamagedError` from the outbox."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._resend())
            while True:
                await self._session.connected.wait()
                self._lanes.interrupt(self._outbox.holding.last_id)
                while self._session.connected.is_set():
                    await self._fill_window()
                    await self._wake.wait()
                    self._wake.clear()

    async def _fill_window(self) -> None:
        """Live rows first, then backlog for the rest."""
        try:
            while self._room() and (span := self._lanes.live(self._outbox.holding.last_id)):
                if not await self._send(span):
                    return
            while self._room() and len(self._sent_at) < UNRECEIPTED_MAX and (span := self._lanes.backlog()):
                if not await self._send(span) or self._lanes.live(self._outbox.holding.last_id):
                    self._wake.set()
                    return
        except UnavailableError as error:
            log.warning("sending waits: %s", error)
            asyncio.get_running_loop().call_later(FETCH_RETRY_S, self._wake.set)

    def _room(self) -> int:
        return self._window - len(self._in_flight)

    async def _send(self, span: Span) -> bool:
        """Send the beginning of a span, as far as the window has room. False when the connection is lost."""
        room = self._room()
        rows = await self._outbox.fetch(span.after, span.through, room)
        after = span.after
        for stored in rows:
            if stored.id not in self._in_flight:
                try:
                    self._publish(stored, span.lane)
                except UnavailableError:
                    return False
            self._lanes.sent(Span(span.lane, after, stored.id))
            self._remember(stored.id)
            after = stored.id
        if len(rows) < room:
            self._lanes.sent(Span(span.lane, after, span.through))
        return True

    def _publish(self, stored: StoredRow, lane: Lane) -> None:
        row = stored.row
        topic = (
            topics.loss(self._gateway, row.device)
            if row.signal == LOSS
            else topics.data(self._gateway, row.device, row.signal)
        )
        historical = "1" if lane is Lane.BACKLOG else "0"
        published = self._session.publish(
            Outbound(
                topic,
                row.payload.data,
                row.payload.content_type,
                {"schema": row.payload.schema, "historical": historical},
            )
        )
        self._in_flight.add(stored.id)
        published.add_done_callback(partial(self._published, stored.id))

    def _remember(self, number: int) -> None:
        """When a row was sent; where that is too much to remember, it waits in the backlog."""
        self._sent_at.pop(number, None)
        if len(self._sent_at) < UNRECEIPTED_MAX:
            self._sent_at[number] = asyncio.get_running_loop().time()
        else:
            self._lanes.put_back([number])

    def _published(self, number: int, published: asyncio.Future[None]) -> None:
        error = None if published.cancelled() else published.exception()
        if isinstance(error, RefusedError):
            self._set_aside(number, error)
        elif error is not None or published.cancelled():
            failures = self._blame(number)
            if failures >= ATTEMPTS_MAX:
                self._set_aside(number, error)
            elif failures > 1:
                asyncio.get_running_loop().call_later(NEXT_ATTEMPT_S, self._give_back, number)
                return
            else:
                self._give_back(number)
        else:
            self._failures.pop(number, None)
        self._in_flight.discard(number)
        self._wake.set()

    def _blame(self, number: int) -> int:
        """How often this row failed through its own fault, as far as can be told.

        A broker takes messages in order. Of those that fail together only the first can have been the cause.
        """
        if self._has_blamed:
            return 0
        self._has_blamed = True
        asyncio.get_running_loop().call_soon(self._forgive)  # after all that failed together
        self._failures[number] = self._failures.get(number, 0) + 1
        return self._failures[number]

    def _forgive(self) -> None:
        self._has_blamed = False

    def _set_aside(self, number: int, error: BaseException | None) -> None:
        """It stays in the outbox, and waits like what was sent and has no receipt; the others go on."""
        log.error("block %d of the outbox does not get through: %s", number, error or "interrupted")

    def _give_back(self, number: int) -> None:
        self._in_flight.discard(number)
        self._sent_at.pop(number, None)
        self._lanes.put_back([number])
        self._wake.set()

    async def _resend(self) -> None:
        """Put back what was sent long ago and never receipted, while somebody is there to receipt it."""
        loop = asyncio.get_running_loop()
        attended_since: float | None = None
        while True:
            await asyncio.sleep(self._resend_after_s / RESEND_CHECKS)
            if not (self.bridge_present and self._session.connected.is_set()):
                attended_since = None
                continue
            attended_since = attended_since or loop.time()
            stale = []
            for number, sent_at in self._sent_at.items():
                # A bridge that has just come has the broker's queue to read first.
                if max(sent_at, attended_since) > loop.time() - self._resend_after_s:
                    break
                if number not in self._in_flight:
                    stale.append(number)
            for number in stale:
                del self._sent_at[number]
            if stale:
                log.info("%d blocks have no receipt after %.0f s: sending again", len(stale), self._resend_after_s)
                self.resent += len(stale)
                self._lanes.put_back(stale)
                self._wake.set()
