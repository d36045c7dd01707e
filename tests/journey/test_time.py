"""A gateway that nobody told the time, on the whole chain: held back, told by the bridge, put right, and all there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wardlink.demo.account import settle
from wardlink.demo.chain import Chain

CLOCK_TOML = "hold_s = 600\ntrust_bridge = true"
"""Where this machine is not synchronised itself, its bridge counts as if it were."""


def clock_of(chain: Chain) -> dict[str, Any]:
    file = chain.folder / "gateway" / "state" / "status.json"
    clock: dict[str, Any] = json.loads(file.read_text())["clock"] if file.exists() else {}
    return clock


@pytest.mark.timeout(180)
def test_what_was_held_is_told_the_time_by_the_bridge_and_arrives(
    chain_folder: Path, eventually: Callable[..., None], accepted: Callable[[Chain, str], int]
) -> None:
    with Chain(chain_folder, clock=CLOCK_TOML) as chain:
        eventually(lambda: accepted(chain, "eeg") > 2_000, "the headset streams")
        eventually(lambda: clock_of(chain).get("state") == "synced", "somebody told the time")
        assert clock_of(chain)["source"] in {"bridge", "ntp"}, "ntp where this machine is synchronised"
        assert clock_of(chain)["error_ns"] < 5 * 10**9
        eventually(lambda: not clock_of(chain)["waiting"], "nothing waits any more")
        books = asyncio.run(settle(chain))

    assert len(books.streams) == 3
    for key, stream in books.streams.items():
        assert stream.produced == stream.committed == stream.points > 0, (key, stream)
        assert (stream.lost, stream.parked, stream.duplicates) == (0, 0, 0), (key, stream)
