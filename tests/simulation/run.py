"""One simulation from its first day to its last, with its books closed."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from tests.simulation.books import Books
from tests.simulation.faults import Kind, Weather
from tests.simulation.host import has_power
from tests.simulation.modelled import modelled
from tests.simulation.virtual_loop import VirtualLoop
from tests.simulation.world import World


def simulate(seed: str, folder: Path, conninfo: str, days: float, kind: Kind = Kind.ROUGH) -> Books:
    """A ward for so many days; `conninfo`: an empty registry of its own."""
    loop = VirtualLoop(seed)
    loop.has_power = has_power
    random.seed(seed)  # of the back-offs
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(_live(World(seed, folder, conninfo, loop), days, kind))
    finally:
        asyncio.set_event_loop(None)
        loop.close()


async def _live(world: World, days: float, kind: Kind) -> Books:
    with modelled(world):
        try:
            await world.open()
            await Weather(world, days, kind).pass_by()
            await world.close_down()
            world.close_books()
        finally:
            await world.end_tasks()
            world.registry.close()
    world.books.counts["messages that the broker lost"] = world.broker.lost_count
    return world.books
