"""The whole chain for the tests of the journey: real servers and wardlink's real processes, killed by the tests."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from wardlink.demo.account import outbox_tallies
from wardlink.demo.chain import Chain

RECORDING = Path(__file__).parents[3] / "shared/data/cyton/cyton_v6_blinks_jaw_alpha.txt"
POLL_S = 0.1


@pytest.fixture
def chain_folder(no_process_left: None) -> Iterator[Path]:
    """A folder that PostgreSQL's user may enter, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp(prefix="wardlink-journey-"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def recording() -> Path:
    """90 s of a Cyton."""
    if not RECORDING.exists():
        pytest.skip(f"{RECORDING} is not there: the journey of a real recording is NOT tested")
    return RECORDING


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool], str, float], None]:
    """Wait for a condition, and fail with what was waited for when it does not come."""

    def wait(condition: Callable[[], bool], what: str, seconds_max: float = 60.0) -> None:
        deadline = time.monotonic() + seconds_max
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds_max:.0f} s: {what}"
            time.sleep(POLL_S)

    return wait


@pytest.fixture
def accepted() -> Callable[[Chain, str], int]:
    """Samples of a signal that the gateway's outbox has accepted so far."""

    def count(chain: Chain, signal: str) -> int:
        tallies, _ = outbox_tallies(chain)
        return sum(tally.accepted for (_, name), tally in tallies.items() if name == signal)

    return count
