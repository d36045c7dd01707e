"""Drains the outbox to the broker within a window. The broker's acknowledgement frees the window, never the disk."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Container, Iterable
from functools import partial

from gateway.errors import RefusedError, UnavailableError
from gateway.mqtt import MqttSession, Outbound
from gateway.samples import BRAIN_STATE, LOSS, VITAL_SIGNS
from gateway.spool.outbox import Outbox
from gateway.spool.store import StoredRow
from gateway.uplink.lanes import Lane, Lanes, Span
from gateway.uplink.unreceipted import CHECKS, Unreceipted
from gateway.uplink.window import Window
from gateway.wire import topics

log = logging.getLogger(__name__)

SMALL = frozenset({BRAIN_STATE, VITAL_SIGNS, LOSS})
"""Goes at once even where the link does not keep up with live raw signals, which then become backlog."""
ROWS_MAX = 64
"""Rows in one look at the outbox."""
MESSAGE_BYTES = 200
"""Topic, properties and headers of a message, beside its payload."""
FETCH_RETRY_S = 1.0
ATTEMPTS_MAX = 3
"""A row that failed so often may be what makes the broker drop the connection: it is set aside."""
REFUSED_MAX = 1000
"""Rows of which it is remembered that the broker does not take them."""
NEXT_ATTEMPT_S = 5.0
"""Before the second and later attempts, in which a row keeps its place in the window: a broker that declines everything
is asked no faster than that. The first failure is most often a lost connection."""


class Sender:
    """Sends rows in two lanes and remembers which of them wait for their receipt."""

    def __init__(
        self, outbox: Outbox, session: MqttSession, gateway: str, *, window: Window, resend_after_s: float
    ) -> None:
        self._outbox = outbox
        self._session = session
        self._gateway = gateway
        self._window = window
        self._lanes = Lanes(outbox.holding.last_id)
        self._row_bytes = 0.0
        """Of the rows that went last, on average."""
        self._unreceipted = Unreceipted(resend_after_s)
        self._failures: dict[int, int] = {}
        """How often each row that is still here was not taken, since it last was."""
        self._has_blamed = False
        self.refused: dict[int, str] = {}
        """Rows that the broker did not take when it last was offered them, and why. They wait in the outbox."""
        self._wake = asyncio.Event()
        self.bridge_present = False
        """Whether resending makes sense: nobody receipts what nobody reads."""
        self.on_overdue: Callable[[], None] = lambda: None
        """Called when receipts are overdue: to ask costs less than to send again."""
        self.resent = 0

    def defer(self, after: int, through: int) -> None:
        """Rows with after < id <= through are older than their ids say: they must not delay live data."""
        self._lanes.defer(after, through)

    def wake(self) -> None:
        """There may be something to send."""
        self._wake.set()

    def receipted(self, ids: Iterable[int]) -> None:
        """These rows are gone from the outbox."""
        numbers = list(ids)
        self._unreceipted.receipted(numbers, _now_s())
        for number in numbers:
            self._failures.pop(number, None)
            self.refused.pop(number, None)
        self._wake.set()

    async def run(self) -> None:
        """Send whenever there is a connection, until cancelled. Raises `DamagedError` from the outbox."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._resend())
            while True:
                await self._session.connected.wait()
                self._lanes.interrupt(self._outbox.holding.last_id)
                self._window.begin()
                while self._session.connected.is_set():
                    await self._send_due()
                    await self._wake.wait()
                    self._wake.clear()

    async def _send_due(self) -> None:
        """All live rows, then as much backlog as the window has room for."""
        try:
            while span := self._lanes.live(self._outbox.holding.last_id):
                if not await self._send_live(span):
                    return
            while (
                (room := self._window.backlog_room(_now_s())) > 0
                and not self._unreceipted.is_full
                and (span := self._lanes.backlog())
            ):
                if not await self._send_backlog(span, room) or self._lanes.live(self._outbox.holding.last_id):
                    self._wake.set()
                    return
        except UnavailableError as error:
            log.warning("sending waits: %s", error)
            asyncio.get_running_loop().call_later(FETCH_RETRY_S, self._wake.set)

    async def _send_live(self, span: Span) -> bool:
        """Send the beginning of a span; what has no room becomes backlog. False when the connection is lost."""
        rows = await self._outbox.fetch(span.after, span.through, ROWS_MAX)
        for stored in rows:
            has_room = self._window.live_room(is_small=stored.row.signal in SMALL)
            if has_room and not self._publish(stored, Lane.LIVE):
                return False
            self._lanes.sent(Span(Lane.LIVE, span.after, stored.id))
            if has_room:
                self._remember(stored.id)
            else:
                self._lanes.put_back([stored.id])
        if len(rows) < ROWS_MAX:
            self._lanes.sent(span)
        return True

    async def _send_backlog(self, span: Span, room: int) -> bool:
        """Send the beginning of a span, as far as there is room. False when the connection is lost."""
        limit = min(ROWS_MAX, 1 + int(room / self._row_bytes) if self._row_bytes else 1)
        rows = await self._outbox.fetch(span.after, span.through, limit)
        after = span.after
        for stored in rows:
            if stored.id not in self._window:
                if self._window.backlog_room(_now_s()) <= 0:
                    return True
                if not self._publish(stored, Lane.BACKLOG):
                    return False
            self._lanes.sent(Span(Lane.BACKLOG, after, stored.id))
            self._remember(stored.id)  # which may put it back: what is behind `after` is not touched again
            after = stored.id
        through = span.through if len(rows) < limit else after
        self._lanes.sent(Span(Lane.BACKLOG, after, through))
        self._forget_refused(span.after, through, {stored.id for stored in rows})
        return True

    def _forget_refused(self, after: int, through: int, here: Container[int]) -> None:
        """Refused rows that are no longer in the outbox: they were given up, which is on record as a loss."""
        for number in [one for one in self.refused if after < one <= through and one not in here]:
            del self.refused[number]

    def _publish(self, stored: StoredRow, lane: Lane) -> bool:
        """Hand a row to the session. False when the connection is lost."""
        row = stored.row
        topic = (
            topics.loss(self._gateway, row.device)
            if row.signal == LOSS
            else topics.data(self._gateway, row.device, row.signal)
        )
        is_backlog = lane is Lane.BACKLOG
        properties = {"schema": row.payload.schema, "historical": "1" if is_backlog else "0"}
        try:
            published = self._session.publish(
                Outbound(topic, row.payload.data, row.payload.content_type, properties, gives_way=is_backlog)
            )
        except UnavailableError:
            return False
        size = len(row.payload.data) + MESSAGE_BYTES
        self._row_bytes += (size - self._row_bytes) / 8 if self._row_bytes else size
        self._window.sent(stored.id, size, _now_s(), is_backlog=is_backlog)
        published.add_done_callback(partial(self._published, stored.id))
        return True

    def _remember(self, number: int) -> None:
        """That a row was sent; where that is too much to remember, it waits in the backlog."""
        if not self._unreceipted.sent(number, _now_s()):
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
            self.refused.pop(number, None)
            self._window.acknowledged(number, _now_s())
        self._window.forget(number)
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
        reason = str(error or "interrupted")
        if number not in self.refused:
            log.error("block %d of the outbox does not get through: %s", number, reason)
        if len(self.refused) < REFUSED_MAX:
            self.refused[number] = reason

    def _give_back(self, number: int) -> None:
        self._window.forget(number)
        self._unreceipted.forget(number)
        self._lanes.put_back([number])
        self._wake.set()

    async def _resend(self) -> None:
        """Put back what was sent and never receipted, while somebody is there to receipt it."""
        hole_s = self._unreceipted.hole_s
        while True:
            await asyncio.sleep(hole_s / CHECKS)
            is_attended = self.bridge_present and self._session.connected.is_set()
            holes = self._unreceipted.holes(_now_s(), self._window, is_attended=is_attended)
            if holes:
                log.info("%d blocks have no receipt after %.0f s: sending again", len(holes), hole_s)
                self.resent += len(holes)
                self._lanes.put_back(holes)
                self._wake.set()
            elif is_attended and self._unreceipted.is_overdue(_now_s()):
                self.on_overdue()


def _now_s() -> float:
    return asyncio.get_running_loop().time()
