"""Time over MQTT: the arithmetic against the truth, and the real exchange over a broker with the bridge's own code."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_sync.consumer import Consumer
from gateway import kernel_clock
from gateway.anchor import UNSEEN_ERROR_NS, Source
from gateway.clock import HostClock
from gateway.kernel_clock import Discipline
from gateway.mqtt import Broker, Inbound, MqttSession, Outbound, connected_session
from gateway.samples import NS_PER_S, ClockState
from gateway.uplink.time_exchange import EXCHANGES, TimeExchange, measured
from gateway.wire import control, topics
from gateway.wire.messages import Clock, TimeReply
from tests.faults.chaos_proxy import ChaosProxy, Conditions
from wardlink.servers import Mosquitto

MS = 1_000_000
UNSYNCED = Discipline(ClockState.UNSYNCED, 16 * NS_PER_S)
GATEWAY = "gw-time"
DAY_NS = 86_400 * NS_PER_S

_numbers = itertools.count(1)


def reply(
    asked: int, received: int, replied: int, *, state: Any = "synced", error_ns: int = 0, gateway: str = GATEWAY
) -> TimeReply:
    return TimeReply(
        v=1,
        schema="time",
        gateway=gateway,
        bridge="b",
        asked=asked,
        received=received,
        replied=replied,
        clock=Clock(state, error_ns),
    )


# --- the arithmetic


@given(
    offset_ns=st.integers(-(2**60), 2**60),
    asked=st.integers(0, 2**60),
    up_ns=st.integers(0, 10 * NS_PER_S),
    at_the_bridge_ns=st.integers(0, NS_PER_S),
    down_ns=st.integers(0, 10 * NS_PER_S),
    bridge_error_ns=st.integers(0, NS_PER_S),
    bridge_off=st.floats(-1, 1),
)
def test_the_bound_holds_whichever_way_is_the_slower(
    offset_ns: int,
    asked: int,
    up_ns: int,
    at_the_bridge_ns: int,
    down_ns: int,
    bridge_error_ns: int,
    bridge_off: float,
) -> None:
    """`offset_ns`: true UTC minus boot time. The bridge's own clock is off by up to what it says."""
    off_ns = round(bridge_error_ns * bridge_off)
    received = asked + up_ns + offset_ns + off_ns
    said = reply(asked, received, received + at_the_bridge_ns, error_ns=bridge_error_ns)
    word = measured(said, asked + up_ns + at_the_bridge_ns + down_ns)
    assert word is not None
    assert abs(word.offset_ns - offset_ns) <= word.error_ns
    rest_ns = word.error_ns - bridge_error_ns - (up_ns + down_ns) // 2 - UNSEEN_ERROR_NS
    assert 0 <= rest_ns <= 2 + (up_ns + at_the_bridge_ns + down_ns) // 10_000
    assert word.source is Source.BRIDGE


def test_times_that_contradict_each_other_are_of_no_use() -> None:
    assert measured(reply(100, 0, 50), 120) is None, "the bridge took longer than all of it"
    assert measured(reply(100, 0, 0), 99) is None, "answered before it was asked"


def test_a_bridge_that_counts_as_right_adds_no_error() -> None:
    word = measured(reply(0, 5, 5, state="unsynced", error_ns=16 * NS_PER_S), 100, trusted=True)
    assert word is not None
    assert word.error_ns == 51 + UNSEEN_ERROR_NS


# --- over a broker


class Ward:
    """A broker with a bridge's consumer on it, and a gateway whose way there may be bad."""

    def __init__(self, mosquitto: Mosquitto, name: str) -> None:
        self.mosquitto = mosquitto
        self.name = name

    @asynccontextmanager
    async def bridge(self) -> AsyncIterator[Consumer]:
        """The bridge's own code; its stores are not asked for the time."""

        async def stores_answer() -> None:
            return None

        login = self.mosquitto.bridge
        broker = Broker(self.mosquitto.host, self.mosquitto.port, f"bridge-{self.name}", login.user, login.password)
        stores: Any = None
        consumer = Consumer(
            broker,
            f"bridge-{self.name}",
            stores,
            batch_lines=100,
            batch_ms=10,
            stores_answer=stores_answer,
            on_parked=lambda _device: None,
        )
        running = asyncio.create_task(consumer.run())
        await asyncio.wait_for(consumer.session.connected.wait(), 20)
        try:
            yield consumer
            assert not running.done()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    @asynccontextmanager
    async def gateway(self, clock: HostClock, port: int | None = None, **options: Any) -> AsyncIterator[TimeExchange]:
        login = await asyncio.to_thread(self.mosquitto.gateway, self.name)
        port = port or self.mosquitto.port
        broker = Broker(self.mosquitto.host, port, f"client-{self.name}", login.user, login.password)
        told: list[Callable[[Inbound], None]] = []

        def take(message: Inbound) -> None:
            told[0](message)

        session = MqttSession(broker, on_message=take, subscriptions=[topics.time(self.name)], clean=True)
        exchange = TimeExchange(session, self.name, clock, spacing_s=0.02, **options)
        told.append(exchange.take)
        async with connected_session(session):
            yield exchange


@pytest.fixture
def ward(mosquitto_server: Mosquitto) -> Ward:
    return Ward(mosquitto_server, f"gw-time-{next(_numbers)}")


def wrong_clock(**options: Any) -> HostClock:
    """A clock that nobody disciplines and that is a day slow, on this machine's own time since boot."""
    return HostClock(
        time.monotonic_ns,
        lambda: time.time_ns() - DAY_NS,
        lambda: UNSYNCED,
        boot_ns=kernel_clock.boot_ns,
        **options,
    )


def error_ns(clock: HostClock) -> int:
    return abs(clock.now_ns() - time.time_ns())


@pytest.fixture
def bridge_is_synced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether this machine is synchronised or not; its clock is the truth here."""
    monkeypatch.setattr("cloud_sync.time_desk.kernel_discipline", lambda: Discipline(ClockState.SYNCED, 2 * MS))


@pytest.mark.usefixtures("bridge_is_synced")
async def test_a_bridge_tells_the_time_and_what_was_held_can_go_out(ward: Ward) -> None:
    clock = wrong_clock(holds=True)
    assert clock.is_held
    async with ward.bridge(), ward.gateway(clock) as exchange:
        await exchange.ask()
    assert not clock.is_held
    assert clock.known.state is ClockState.SYNCED
    assert clock.anchor is not None
    assert clock.anchor.source is Source.BRIDGE
    assert error_ns(clock) <= clock.known.error_ns < NS_PER_S


@pytest.mark.usefixtures("bridge_is_synced")
@pytest.mark.parametrize("upstream_extra_s", [0.0, 0.3])
async def test_the_bound_holds_on_a_way_that_is_slower_up_than_down(ward: Ward, upstream_extra_s: float) -> None:
    clock = wrong_clock()
    conditions = Conditions(latency_s=0.02, upstream_extra_s=upstream_extra_s)
    async with (
        ChaosProxy(ward.mosquitto.port, conditions=conditions) as proxy,
        ward.bridge(),
        ward.gateway(clock, proxy.port) as exchange,
    ):
        await exchange.ask()
    assert clock.known.state is ClockState.SYNCED
    assert error_ns(clock) <= clock.known.error_ns
    assert clock.known.error_ns >= (0.04 + upstream_extra_s) / 2 * NS_PER_S, "half the way there and back"
    if upstream_extra_s:
        assert error_ns(clock) > 0.05 * NS_PER_S, "the way is as unequal as it should be"


async def test_a_bridge_that_is_not_synchronised_says_so_and_is_not_believed(
    ward: Ward, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloud_sync.time_desk.kernel_discipline", lambda: UNSYNCED)
    clock = wrong_clock(holds=True)
    async with ward.bridge():
        async with ward.gateway(clock) as exchange:
            await exchange.ask()
        assert clock.anchor is None
        assert clock.is_held
        assert f"bridge-{ward.name} says that its own clock is unsynced" in exchange.refused
        async with ward.gateway(clock, trust_bridge=True) as exchange:
            await exchange.ask()
    assert clock.known.state is ClockState.SYNCED
    assert error_ns(clock) <= clock.known.error_ns


@pytest.mark.usefixtures("bridge_is_synced")
async def test_who_is_told_the_time_by_the_kernel_does_not_ask(ward: Ward) -> None:
    synced = HostClock(discipline=lambda: Discipline(ClockState.SYNCED, MS))
    async with ward.bridge() as bridge, ward.gateway(synced) as exchange:
        running = asyncio.create_task(exchange.run())
        await asyncio.sleep(0)
        await exchange._session.publish(Outbound(topics.status(ward.name), b"{}"))  # a round trip later
        assert exchange._open == set()
        assert bridge.session.connected.is_set()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_nobody_answers_and_nothing_is_believed(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers to questions that were not asked, too late, or twice are no answers."""
    monkeypatch.setattr("gateway.uplink.time_exchange.ANSWER_S_MAX", 0.05)
    clock = wrong_clock()
    async with ward.gateway(clock) as exchange:
        await exchange.ask()
        assert len(exchange._open) == EXCHANGES
        assert clock.anchor is None
        now_ns = time.time_ns()
        forged = control.encode(reply(clock.boot_now_ns(), now_ns, now_ns, gateway=ward.name))
        exchange.take(
            Inbound(topics.time(ward.name), forged.data, None, {}, retain=False, _mid=0, _acknowledge=lambda *_: None)
        )
        assert exchange._words == []


@pytest.mark.usefixtures("bridge_is_synced")
async def test_garbage_among_the_questions_stops_nothing(ward: Ward) -> None:
    clock = wrong_clock()
    async with ward.bridge(), ward.gateway(clock) as exchange:
        for garbage in (b"", b"{}", b'{"v":1,"schema":"time_request","gateway":"another","asked":1}'):
            await exchange._session.publish(Outbound(topics.time_request(ward.name), garbage))
        await exchange.ask()
    assert clock.known.state is ClockState.SYNCED
