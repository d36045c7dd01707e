"""A model of an MQTT broker and of the connections to it, beneath the real `MqttSession`.

What matters of MQTT: QoS 1 with persistent sessions, redelivery, shared subscriptions that keep no order among their
members, retained messages, last wills, a bounded queue that drops in silence. And what matters of real brokers: an
acknowledgement comes before anything is durable, so one that is killed falls back to what it last saved.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from functools import lru_cache

from gateway.errors import UnavailableError
from gateway.mqtt_messages import QOS_AT_MOST_ONCE, Hello, Inbound, Intake, Outbound
from tests.simulation.host import HOST, Host

QUEUE_MAX = 400
"""Messages that a session holds while its client is away; mosquitto's default is 1,000, for faster devices."""
DUPLICATES_SHARE = 0.05
DUPLICATE_AFTER_S = (0.0, 60.0)
"""QoS 1 is at least once: a message comes again, soon or late, perhaps to another of those who share it."""
NOTICED_AFTER_S = (5.0, 15.0)
"""When a client finds out that nothing comes any more; the broker gives up at the end of it."""
CONNECT_TIMEOUT_S = 10.0


@dataclass(slots=True)
class Session:
    """What a broker keeps of a client."""

    client_id: str
    subscriptions: tuple[str, ...] = ()
    queue: deque[Outbound] = field(default_factory=deque)
    inflight: dict[int, Outbound] = field(default_factory=dict)
    line: Line | None = None

    def saved(self) -> Session:
        """As it is written to disk: what waits for an acknowledgement is sent again."""
        return Session(self.client_id, self.subscriptions, deque([*self.inflight.values(), *self.queue]))


class Broker:
    """The broker that everybody talks to."""

    def __init__(self, loop: asyncio.AbstractEventLoop, rng: random.Random) -> None:
        self.loop = loop
        self.is_up = True
        self.lost_count = 0
        """Messages that it acknowledged and forgot."""
        self._rng = rng
        self._sessions: dict[str, Session] = {}
        self._retained: dict[str, Outbound] = {}
        self._saved: tuple[list[Session], dict[str, Outbound]] = ([], {})
        self._next_mid = 0

    @property
    def waiting_count(self) -> int:
        return sum(len(session.queue) + len(session.inflight) for session in self._sessions.values())

    def save(self) -> None:
        """Write everything to disk."""
        self._saved = ([session.saved() for session in self._sessions.values()], dict(self._retained))

    def kill(self) -> None:
        """End without a word: what came since it last saved is gone, acknowledged or not."""
        self.is_up = False
        before = self.waiting_count
        for session in list(self._sessions.values()):
            if session.line is not None:
                session.line.cut("the broker ended")
        sessions, retained = self._saved
        self._sessions = {session.client_id: session.saved() for session in sessions}
        self._retained = dict(retained)
        self.lost_count += max(0, before - self.waiting_count)

    def stop(self) -> None:
        """End in order."""
        self.save()
        self.kill()

    def start(self) -> None:
        self.is_up = True

    def connect(self, line: Line) -> None:
        session = self._sessions.setdefault(line.hello.client_id, Session(line.hello.client_id))
        if session.line is not None:
            session.line.cut("another client uses the same client id")
        session.line, line.session = line, session
        session.subscriptions = tuple(line.subscriptions)
        session.queue.extendleft(reversed(session.inflight.values()))
        session.inflight.clear()
        for topic, message in self._retained.items():
            if any(_matches(wanted, topic) for wanted in session.subscriptions):
                session.queue.append(message)
        self.pump(session)

    def take(self, line: Line, number: int, message: Outbound) -> None:
        """A client published; it is acknowledged at once, durable or not."""
        self.route(message)
        if message.qos != QOS_AT_MOST_ONCE:
            line.send_down(line.answered, number)

    def route(self, message: Outbound) -> None:
        if message.retain:
            if message.payload:
                self._retained[message.topic] = message
            else:
                self._retained.pop(message.topic, None)
        fresh = replace(message, retain=False)
        self._deliver(fresh)
        if message.qos != QOS_AT_MOST_ONCE and self._rng.random() < DUPLICATES_SHARE:
            self.loop.call_later(self._rng.uniform(*DUPLICATE_AFTER_S), self._deliver, fresh)

    def _deliver(self, fresh: Outbound) -> None:
        if not self.is_up:
            return
        groups: dict[str, list[Session]] = {}
        for session in self._sessions.values():
            for wanted in session.subscriptions:
                if wanted.startswith("$share/"):
                    if _matches(wanted.split("/", 2)[2], fresh.topic):
                        groups.setdefault(wanted, []).append(session)
                elif _matches(wanted, fresh.topic):
                    self._queue(session, fresh)
        for members in groups.values():
            present = [session for session in members if session.line is not None]
            self._queue(self._rng.choice(present or members), fresh)

    def _queue(self, session: Session, message: Outbound) -> None:
        if message.qos == QOS_AT_MOST_ONCE:
            if session.line is not None:
                session.line.send_down(session.line.came, 0, message)
            return
        if len(session.queue) >= QUEUE_MAX:
            self.lost_count += 1
            return
        session.queue.append(message)
        self.pump(session)

    def pump(self, session: Session) -> None:
        """Send what the client's window has room for."""
        line = session.line
        while line is not None and session.queue and len(session.inflight) < line.hello.receive_maximum:
            self._next_mid += 1
            session.inflight[self._next_mid] = message = session.queue.popleft()
            line.send_down(line.came, self._next_mid, message)

    def acknowledged(self, line: Line, mid: int) -> None:
        session = line.session
        if session is not None and session.line is line and session.inflight.pop(mid, None) is not None:
            self.pump(session)

    def gone(self, line: Line) -> None:
        """A connection ended; its last will is told."""
        session, line.session = line.session, None
        if session is None or session.line is not line:
            return
        session.line = None
        if line.hello.will is not None and self.is_up:
            self.route(line.hello.will)


class Line:
    """One connection: what `MqttSession` sees of `gateway.mqtt_connection.Connection`, and the wire behind it."""

    def __init__(
        self,
        broker: Broker,
        hello: Hello,
        subscriptions: Sequence[str],
        on_message: Callable[[Inbound], None] | None,
        intake: Intake,
    ) -> None:
        self.loop = broker.loop
        self.hello = hello
        self.subscriptions = subscriptions
        self.session: Session | None = None
        self.lost: asyncio.Future[str] = self.loop.create_future()
        self._broker = broker
        self._host: Host = HOST.get()
        self._context = copy_context()
        """What comes is taken on the client's host, not on the sender's."""
        self._network = self._host.network
        self._on_message = on_message
        self._intake = intake
        self._is_cut = False
        """Nothing passes any more, in either direction."""
        self._answers: dict[int, asyncio.Future[None]] = {}
        self._deliveries: dict[int, Inbound] = {}
        self._held: deque[tuple[int, Outbound]] = deque()
        self._number = 0
        self._up_at_s = self._down_at_s = 0.0
        intake.on_room = self._resume

    async def greet(self) -> None:
        """Raises `UnavailableError`."""
        if self._network.silences:
            await asyncio.sleep(CONNECT_TIMEOUT_S)
            raise UnavailableError("no answer in time")
        await asyncio.sleep(3 * self._network.latency_s())
        if self._network.outages or self._network.silences:
            raise UnavailableError("no route to host")
        if not self._broker.is_up:
            raise UnavailableError("connection refused")
        self._host.lines.append(self)
        self._broker.connect(self)

    # --- what the session calls

    @property
    def is_open(self) -> bool:
        return not self.lost.done()

    def publish(self, message: Outbound) -> asyncio.Future[None]:
        self._number += 1
        answer: asyncio.Future[None] = self.loop.create_future()
        if message.qos == QOS_AT_MOST_ONCE:
            answer.set_result(None)
        else:
            self._answers[self._number] = answer
        self._send_up(self._broker.take, self, self._number, message)
        return answer

    async def end(self) -> None:
        """An orderly end: what was sent before arrives, if anything does."""
        if self.is_open and not self._host.is_dead:
            self._send_up(self._broker.gone, self)
            await asyncio.sleep(self._network.latency_s() * 2)
        self.drop()

    def drop(self) -> None:
        self._lose("ended")
        if not self._is_cut:
            self._is_cut = True
            self._broker.gone(self)
        self._intake.on_room = lambda: None
        if self in self._host.lines:
            self._host.lines.remove(self)

    # --- what happens to the wire

    def cut(self, reason: str) -> None:
        """Reset: what is on its way is lost, both ends find out soon."""
        if not self._is_cut:
            self._is_cut = True
            self._broker.gone(self)
            self.loop.call_later(self._network.latency_s(), self._lose, reason)

    def silence(self) -> None:
        """Packets vanish: each end finds out by its own keep-alive."""
        if not self._is_cut:
            self._is_cut = True
            self.loop.call_later(NOTICED_AFTER_S[1], self._broker.gone, self)
            self.loop.call_later(self._network.rng.uniform(*NOTICED_AFTER_S), self._lose, "the broker is silent")

    def abandon(self, *, is_silent: bool) -> None:
        """The client is no more: after a power cut the broker only finds out by its keep-alive."""
        self._is_cut = True
        if is_silent:
            self.loop.call_later(NOTICED_AFTER_S[1], self._broker.gone, self)
        else:
            self._broker.gone(self)

    def send_down(self, call: Callable[..., None], *args: object) -> None:
        self._down_at_s = self._pass_on(self._down_at_s, call, *args)

    def answered(self, number: int) -> None:
        answer = self._answers.pop(number, None)
        if answer is not None and not answer.done():
            answer.set_result(None)

    def came(self, mid: int, message: Outbound) -> None:
        self._held.append((mid, message))
        self._resume()

    def _resume(self) -> None:
        while self._held and self.is_open and not self._intake.is_full:
            mid, message = self._held.popleft()
            inbound = Inbound(
                topic=message.topic,
                payload=message.payload,
                content_type=message.content_type or None,
                properties=dict(message.properties),
                retain=message.retain,
                _mid=mid,
                _acknowledge=self._acknowledge,
            )
            if message.qos != QOS_AT_MOST_ONCE:
                self._deliveries[mid] = inbound
            if self._on_message is not None:
                self._intake.take(inbound)
                self.loop.call_soon(self._on_message, inbound, context=self._context)

    def _acknowledge(self, message: Inbound, mid: int) -> None:
        if self._deliveries.get(mid) is message:
            del self._deliveries[mid]
            self._send_up(self._broker.acknowledged, self, mid)

    def _send_up(self, call: Callable[..., None], *args: object) -> None:
        if not self._host.is_dead:
            self._up_at_s = self._pass_on(self._up_at_s, call, *args)

    def _pass_on(self, after_s: float, call: Callable[..., None], *args: object) -> float:
        at_s = max(after_s + 1e-5, self.loop.time() + self._network.latency_s())
        self.loop.call_at(at_s, self._arrive, call, *args)
        return at_s

    def _arrive(self, call: Callable[..., None], *args: object) -> None:
        if not self._is_cut:
            call(*args)

    def _lose(self, reason: str) -> None:
        if self.lost.done():
            return
        self.lost.set_result(reason)
        answers = list(self._answers.values())
        self._answers.clear()
        self._deliveries.clear()
        self._held.clear()
        for answer in answers:
            if not answer.done():
                answer.set_exception(UnavailableError(f"broker did not take a message: {reason}"))
                answer.exception()


@lru_cache(maxsize=4096)
def _matches(wanted: str, topic: str) -> bool:
    levels, names = wanted.split("/"), topic.split("/")
    for place, level in enumerate(levels):
        if level == "#":
            return True
        if place >= len(names) or level not in {"+", names[place]}:
            return False
    return len(levels) == len(names)
