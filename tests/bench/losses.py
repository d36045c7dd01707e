"""Rows lost under fifty kill -9 of gateway, broker, bridge and stores: wardlink, and what most tutorials build.

Both run at once on the same servers and die together (`tests/journey/side_by_side.py`).
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.journey import side_by_side
from tests.journey.side_by_side import Sides

KILLS = 50
SEED = 2024


def rows() -> list[dict[str, object]]:
    """One row: how many times as many rows the other one lost; none counts as one."""
    folder = Path(tempfile.mkdtemp(prefix="wardlink-losses-"))
    folder.chmod(0o711)  # PostgreSQL's user goes through it
    try:
        sides = side_by_side.run(folder, KILLS, SEED)
    finally:
        shutil.rmtree(folder)
    show(sides)
    lost = sides.produced - sides.points
    return [
        {
            "name": f"rows lost in {KILLS} kills: {lost} of {sides.produced}",
            "peer": f"delete on PUBACK, automatic ack: {sides.tutorial_lost} of {sides.tutorial_produced}",
            "ratio": sides.tutorial_lost / max(lost, 1),
            "goal": None,
            "ok": lost == 0 == sides.books.duplicates and sides.point_count == sides.points and sides.tutorial_lost > 0,
        }
    ]


def show(sides: Sides) -> None:
    """Both accounts, for people."""
    table = Table(title=f"{sides.kills.total()} kills: {', '.join(sorted(sides.kills))}", title_justify="left")
    for column in ("", "accepted", "read back", "lost", "lost %"):
        table.add_column(column, justify="left" if not column else "right")
    accounts = {
        "wardlink": (sides.produced, sides.points),
        "delete on PUBACK, automatic ack": (sides.tutorial_produced, sides.tutorial_points),
    }
    for name, (accepted, read_back) in accounts.items():
        lost = accepted - read_back
        table.add_row(name, f"{accepted:,}", f"{read_back:,}", f"{lost:,}", f"{100 * lost / accepted:.1f}")
    Console(highlight=False, file=sys.stdout).print(table)
