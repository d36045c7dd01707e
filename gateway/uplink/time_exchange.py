"""The time from a bridge, for a gateway that no time server answers: request and reply with four time stamps.

RFC 5905, section 8: offset = ((T2 - T1) + (T3 - T4)) / 2, delay = (T4 - T1) - (T3 - T2); the truth lies within half the
delay of the offset, whichever way is the slower. Of several exchanges the one with the smallest error counts.
"""

from __future__ import annotations

import asyncio
import logging

from gateway.anchor import DRIFT_PPM, PPM, UNSEEN_ERROR_NS, Anchor, Source
from gateway.clock import HostClock
from gateway.errors import UnavailableError
from gateway.mqtt import Inbound, MqttSession, Outbound
from gateway.mqtt_messages import QOS_AT_MOST_ONCE
from gateway.wire import control, topics
from gateway.wire.messages import TimeReply, TimeRequest

log = logging.getLogger(__name__)

EXCHANGES = 8
"""In a row, as NTP's clock filter keeps: of so many one is mostly spared by queues."""
SPACING_S = 0.25
ANSWER_S_MAX = 2.0
"""A later answer is of no use: its error is at least half of it."""
AGAIN_S = 64.0
"""Between two rows of exchanges while a bridge is the only one who knows: drift adds 6 ms to the bound meanwhile."""
RETRY_S = 10.0
"""After a row that nobody answered."""


def measured(reply: TimeReply, arrived_ns: int, *, trusted: bool = False) -> Anchor | None:
    """The anchor of one exchange, `arrived_ns` after boot; None where its times contradict each other.

    `trusted`: the bridge's clock counts as right, whatever it says of itself.
    """
    delay_ns = (arrived_ns - reply.asked) - (reply.replied - reply.received)
    if delay_ns < 0 or arrived_ns < reply.asked:
        return None
    offset_ns = ((reply.received - reply.asked) + (reply.replied - arrived_ns)) // 2
    drift_ns = (arrived_ns - reply.asked) * DRIFT_PPM // PPM
    error_ns = delay_ns // 2 + 1 + drift_ns + UNSEEN_ERROR_NS
    return Anchor(offset_ns, error_ns + (0 if trusted else reply.clock.error_ns), arrived_ns, Source.BRIDGE)


class TimeExchange:
    """Asks whichever bridge answers for as long as the host's clock wants it, and tells the clock."""

    def __init__(
        self,
        session: MqttSession,
        gateway: str,
        clock: HostClock,
        *,
        trust_bridge: bool = False,
        exchanges: int = EXCHANGES,
        spacing_s: float = SPACING_S,
    ) -> None:
        """`trust_bridge`: take the word of a bridge whose own clock is not synchronised."""
        self._session = session
        self._gateway = gateway
        self._clock = clock
        self._trust = trust_bridge
        self._exchanges = exchanges
        self._spacing_s = spacing_s
        self._open: set[int] = set()
        """When questions were asked that are not answered."""
        self._words: list[Anchor] = []
        """What this row of exchanges brought."""
        self._answered = asyncio.Event()
        self.refused = ""
        """Why the last answer was of no use; empty while answers are."""

    def take(self, message: Inbound) -> None:
        """A reply came just now. Raises `WireError`."""
        arrived_ns = self._clock.boot_now_ns()
        reply = control.decode_on(message.topic, message.payload, TimeReply)
        if reply.asked not in self._open:
            return
        self._open.discard(reply.asked)
        if not self._open:
            self._answered.set()
        if reply.clock.state != "synced" and not self._trust:
            self._refuse(f"bridge {reply.bridge} says that its own clock is {reply.clock.state}")
            return
        word = measured(reply, arrived_ns, trusted=self._trust)
        if word is None:
            self._refuse(f"bridge {reply.bridge} answered before it was asked")
        else:
            self.refused = ""
            self._words.append(word)

    async def run(self) -> None:
        """Ask whenever there is a connection and a need, until cancelled."""
        while True:
            await self._session.connected.wait()
            if not self._clock.wants_time:
                await asyncio.sleep(RETRY_S)
                continue
            await self.ask()
            await asyncio.sleep(AGAIN_S if self._clock.anchor else RETRY_S)

    async def ask(self) -> None:
        """One row of exchanges, and what it brought."""
        self._open.clear()
        self._answered.clear()
        self._words.clear()
        for _ in range(self._exchanges):
            self._send()
            await asyncio.sleep(self._spacing_s)
        try:
            async with asyncio.timeout(ANSWER_S_MAX):
                await self._answered.wait()
        except TimeoutError:
            log.debug("%d questions for the time were not answered", len(self._open))
        if self._words:
            now_ns = self._clock.boot_now_ns()
            self._clock.learn(min(self._words, key=lambda word: word.error_at(now_ns)))

    def _send(self) -> None:
        asked_ns = self._clock.boot_now_ns()
        request = TimeRequest(v=1, schema="time_request", gateway=self._gateway, asked=asked_ns)
        payload = control.encode(request)
        topic, properties = topics.time_request(self._gateway), {"schema": payload.schema}
        try:
            self._session.publish(Outbound(topic, payload.data, payload.content_type, properties, qos=QOS_AT_MOST_ONCE))
        except UnavailableError:
            return
        self._open.add(asked_ns)

    def _refuse(self, reason: str) -> None:
        if reason != self.refused:
            log.info("%s: it is not asked to tell ours", reason)
        self.refused = reason
