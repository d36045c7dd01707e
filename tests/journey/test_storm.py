"""A storm of kill -9 over the whole chain while data flows: afterwards the books agree, sample by sample.

The control is what most tutorials build, on the same servers under the same kills: it loses. The suite runs a share;
WARDLINK_LONG=1 (`make faults`) all fifty kills.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.journey import side_by_side

pytestmark = pytest.mark.faults

KILLS = 8
KILLS_LONG = 50
SEED = 2024


@pytest.mark.timeout(1200)
def test_a_storm_of_kills_costs_and_doubles_nothing(chain_folder: Path) -> None:
    kills = KILLS_LONG if os.environ.get("WARDLINK_LONG") else KILLS
    sides = side_by_side.run(chain_folder, kills, SEED)

    print(f"killed {dict(sides.kills)}, ended by themselves {dict(sides.revived)}")
    print(f"tutorial: {sides.tutorial_produced} rows, {sides.tutorial_lost} lost")
    assert sides.kills.total() == kills
    assert len(sides.kills) == 5
    assert len(sides.books.streams) == 3
    for key, stream in sides.books.streams.items():
        print(key, stream)
        assert stream.produced == stream.committed == stream.points > 0, (key, stream)
        assert (stream.parked, stream.duplicates) == (0, 0), (key, stream)
    assert sides.point_count == sides.points
    assert sides.books.dead_letters == 0
    assert sides.tutorial_lost > 0
