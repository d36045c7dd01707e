"""What goes wrong on a ward, and when: drawn from the seed, every kind at least once, and once a day the storms in
which a chain that forgets too early loses data.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from enum import Enum

from gateway.errors import UnavailableError
from gateway.samples import NS_PER_S
from tests.simulation.host import BEGIN_NS, HOST
from tests.simulation.machines import BridgeMachine, GatewayMachine
from tests.simulation.wearables import PERIOD_S
from tests.simulation.world import World

DAY_S = 86_400.0
FAULTS_A_DAY = 14.0
LAST_FAULT_S = 3600.0
"""Before the end nothing new breaks, and what is broken heals."""


class Kind(Enum):
    """What a seed has to bear."""

    CALM = "the storms alone"
    ROUGH = "every fault"
    DISASTROUS = "every fault, and the loss of whole disks"


class Weather:
    """One seed's faults."""

    def __init__(self, world: World, days: float, kind: Kind) -> None:
        self.world = world
        self.end_s = days * DAY_S
        self._rng = world.rng("weather")
        self._days = days
        self._kind = kind

    async def pass_by(self) -> None:
        """All faults, and the time to the end."""
        async with asyncio.TaskGroup() as tasks:
            for at_s, fault in self._plan():
                tasks.create_task(self._break(at_s, fault))
            tasks.create_task(asyncio.sleep(self.end_s - self.world.loop.time()))
        for machine in [*self.world.gateways, *self.world.bridges]:
            if machine.running is None:
                machine.start()
        self.world.books.note("everything is mended")

    def _plan(self) -> list[tuple[float, Fault]]:
        rng, last_s = self._rng, self.end_s - LAST_FAULT_S
        plan: list[tuple[float, Fault]] = [(self.end_s * 0.4, the_unknown_device_is_registered)]
        day_s = min(DAY_S, self.end_s)
        for day in range(max(1, int(self._days))):
            # Apart from each other: each needs the others' parts to work.
            plan.append((day * day_s + rng.uniform(0.10, 0.20) * day_s, storm_without_bridges))
            plan.append((day * day_s + rng.uniform(0.60, 0.70) * day_s, storm_without_stores))
            plan.append((day * day_s + rng.uniform(0.80, 0.85) * day_s, storm_of_power))
        if self._kind is Kind.DISASTROUS:
            plan += [(rng.uniform(0.2, 0.7) * self.end_s, fault) for fault in DISASTERS]
        if self._kind is not Kind.CALM:
            plan += [(rng.uniform(PERIOD_S, last_s), fault) for fault in SINGLE]
            while len(plan) < self._days * FAULTS_A_DAY:
                plan.append((rng.uniform(PERIOD_S, last_s), rng.choice(SINGLE)))
        return sorted(plan, key=lambda entry: entry[0])

    async def _break(self, at_s: float, fault: Fault) -> None:
        await asyncio.sleep(at_s - self.world.loop.time())
        self.world.books.note(f"-- {fault.__name__}")
        self.world.books.counts[fault.__name__] += 1
        await fault(self)

    def gateway(self) -> GatewayMachine:
        return self._rng.choice(self.world.gateways)

    def machine(self) -> GatewayMachine | BridgeMachine:
        return self._rng.choice([*self.world.gateways, *self.world.bridges])

    def bridge(self) -> BridgeMachine:
        return self._rng.choice(self.world.bridges)

    async def last(self, shortest_s: float, longest_s: float) -> None:
        """Let a fault last; none outlasts the end."""
        seconds = self._rng.uniform(shortest_s, longest_s)
        await asyncio.sleep(max(0.0, min(seconds, self.end_s - self.world.loop.time())))

    def draw(self, low: float, high: float) -> float:
        return self._rng.uniform(low, high)


Fault = Callable[[Weather], Awaitable[None]]


@contextmanager
def more(owner: object, reason: str) -> Iterator[None]:
    """One more reason why something does not work."""
    setattr(owner, reason, getattr(owner, reason) + 1)
    try:
        yield
    finally:
        setattr(owner, reason, getattr(owner, reason) - 1)


def _cut_lines(machine: GatewayMachine | BridgeMachine, reason: str) -> None:
    if machine.running is not None:
        for line in list(machine.running.host.lines):
            line.cut(reason)


async def connection_reset(weather: Weather) -> None:
    machine = weather.machine()
    _cut_lines(machine, "reset by peer")


async def network_outage(weather: Weather) -> None:
    machine = weather.machine()
    with more(machine.network, "outages"):
        _cut_lines(machine, "network is unreachable")
        await weather.last(1, 3 * 3600)


async def long_network_outage(weather: Weather) -> None:
    """Longer than the quota lasts."""
    machine = weather.gateway()
    with more(machine.network, "outages"):
        _cut_lines(machine, "network is unreachable")
        await weather.last(12 * 3600, 24 * 3600)


async def silent_network(weather: Weather) -> None:
    machine = weather.machine()
    with more(machine.network, "silences"):
        if machine.running is not None:
            for line in list(machine.running.host.lines):
                line.silence()
        await weather.last(30, 3600)


async def power_cut(weather: Weather) -> None:
    machine = weather.gateway()
    machine.cut_power()
    await weather.last(20, 2 * 3600)
    await start_without_time(weather, machine)


async def power_cuts_in_a_row(weather: Weather) -> None:
    machine = weather.gateway()
    for _ in range(5):
        machine.cut_power()
        await weather.last(1, 30)
        if machine.running is None:
            machine.start()
        await weather.last(0.01, 10)


async def start_without_time(weather: Weather, machine: GatewayMachine) -> None:
    """A machine without a clock battery; a time server answers soon, late or not before the end of this fault."""
    if machine.running is not None:
        return
    behind_s = weather.draw(60, 3 * DAY_S) if weather.draw(0, 1) < 0.7 else BEGIN_NS / NS_PER_S
    if weather.draw(0, 1) < 0.6:
        machine.clock.set_wrong(-round(behind_s * NS_PER_S))
    machine.start()
    await weather.last(1, 2 * 3600)
    machine.clock.set_right()


async def gateway_restart(weather: Weather) -> None:
    machine = weather.gateway()
    await machine.shut_down()
    await weather.last(1, 60)
    if machine.running is None:
        machine.start()


async def full_disk(weather: Weather) -> None:
    machine = weather.gateway()
    was = machine.refused_since_s
    with more(machine.disk, "refusals"):
        machine.refused_since_s = weather.world.loop.time() if was is None else was
        await weather.last(10, 3 * 3600)
    if not machine.disk.refusals:
        await asyncio.sleep(90)  # retries
        machine.refused_since_s = None


async def clock_step(weather: Weather) -> None:
    """Somebody sets the clock, an hour wrong or a day; a time server puts it right."""
    machine = weather.gateway()
    furthest_s = 3600 if weather.draw(0, 1) < 0.7 else DAY_S
    machine.clock.set_wrong(round(weather.draw(-furthest_s, furthest_s) * NS_PER_S))
    await weather.last(1, 3600)
    machine.clock.set_right()


async def bridge_kill(weather: Weather) -> None:
    machine = weather.bridge()
    machine.kill()
    await weather.last(1, 3600)
    if machine.running is None:
        machine.start()


async def bridge_restart(weather: Weather) -> None:
    machine = weather.bridge()
    await machine.shut_down()
    await weather.last(1, 60)
    if machine.running is None:
        machine.start()


async def broker_kill(weather: Weather) -> None:
    broker = weather.world.broker
    broker.kill()
    await weather.last(1, 1800)
    broker.start()


async def broker_restart(weather: Weather) -> None:
    broker = weather.world.broker
    broker.stop()
    await weather.last(1, 60)
    broker.start()


async def series_outage(weather: Weather) -> None:
    with more(weather.world.series, "outages"):
        await weather.last(1, 4 * 3600)


async def series_muteness(weather: Weather) -> None:
    with more(weather.world.series, "muteness"):
        await weather.last(600, 3 * 3600)


async def registry_outage(weather: Weather) -> None:
    registry = weather.world.registry
    registry.fall()
    await weather.last(1, 4 * 3600)
    registry.outages -= 1


async def registry_muteness(weather: Weather) -> None:
    with more(weather.world.registry, "muteness"):
        await weather.last(600, 3 * 3600)


async def storm_without_bridges(weather: Weather) -> None:
    """Nobody reads, the broker acknowledges all the same, and then it is killed."""
    world = weather.world
    with more(world.bridges[0].network, "outages"), more(world.bridges[1].network, "outages"):
        for bridge in world.bridges:
            _cut_lines(bridge, "network is unreachable")
        await _acknowledged_and_not_saved(weather)
        world.broker.kill()
        await weather.last(1, 300)
        world.broker.start()
        await weather.last(60, 1800)


async def storm_without_stores(weather: Weather) -> None:
    """Bridges have messages in hand that no store takes; then broker and bridges are killed."""
    world = weather.world
    world.registry.fall()
    with more(world.series, "outages"):
        await _acknowledged_and_not_saved(weather)
        for bridge in world.bridges:
            bridge.kill()
        world.broker.kill()
        await weather.last(1, 300)
        world.broker.start()
        for bridge in world.bridges:
            if bridge.running is None:
                bridge.start()
        await weather.last(60, 1800)
    world.registry.outages -= 1


async def storm_of_power(weather: Weather) -> None:
    """Right after a commit that nobody could be sent: what was not synced is gone."""
    for machine in weather.world.gateways:
        with more(machine.network, "outages"):
            _cut_lines(machine, "network is unreachable")
            await machine.disk.written.wait()
            await weather.last(0.01, 10)
            machine.cut_power()
            await weather.last(10, 60)
            if machine.running is None:
                machine.start()


async def _acknowledged_and_not_saved(weather: Weather) -> None:
    """For as long as the broker's disk lags behind by what each wearable sends."""
    with more(weather.world, "broker_saves_not"):
        await weather.last(1.2 * PERIOD_S, 3 * PERIOD_S)


async def the_unknown_device_is_registered(weather: Weather) -> None:
    """What was parked until now is written."""
    HOST.set(weather.world.outside)
    while True:
        try:
            await weather.world.register(weather.world.unknown_serial)
        except UnavailableError:
            await asyncio.sleep(60)
        else:
            return


async def outbox_deleted(weather: Weather) -> None:
    machine = weather.gateway()
    machine.cut_power()
    machine.disk.wipe()
    await weather.last(10, 600)
    await start_without_time(weather, machine)


async def outbox_from_a_backup(weather: Weather) -> None:
    machine = weather.gateway()
    machine.disk.back_up()
    await weather.last(2 * PERIOD_S, 8 * 3600)
    machine.cut_power()
    machine.disk.restore()
    await weather.last(10, 600)
    await start_without_time(weather, machine)


DISASTERS: tuple[Fault, ...] = (outbox_deleted, outbox_from_a_backup)
SINGLE: tuple[Fault, ...] = (
    connection_reset,
    network_outage,
    long_network_outage,
    silent_network,
    power_cut,
    power_cuts_in_a_row,
    gateway_restart,
    full_disk,
    clock_step,
    bridge_kill,
    bridge_restart,
    broker_kill,
    broker_restart,
    series_outage,
    series_muteness,
    registry_outage,
    registry_muteness,
)
