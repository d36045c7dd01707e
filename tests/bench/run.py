"""`make bench [ONLY=kernels]`: runs the bench's files, prints a table, writes build/bench.json.

Every file here has `rows()`, which gives {"name", "ratio", "peer", "goal", "ok"}: how many times ahead of the peer, and
how many times are wanted (None: for information). Ratios of one interleaved run travel between machines, times do not.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parents[2]))  # some use the rigs of the tests

GROUPS = {
    "kernels": ("features", "packets_and_lines"),
    "devices": ("time_axis", "gateway_load"),
    "durability": ("outbox", "uplink"),
    "losses": ("losses",),
    "bridge": ("ledger",),
}
OUTPUT = Path("build/bench.json")
PIPE_COLUMNS = 160


def main(only: str) -> int:
    """Run the files of one group, or of all; 1 if a goal is missed, 2 for an unknown group."""
    if only and only not in GROUPS:
        print(f"error: there is no group {only!r}\nhint: one of {', '.join(GROUPS)}", file=sys.stderr)
        return 2
    found: list[Mapping[str, object]] = []
    for group in [only] if only else list(GROUPS):
        for name in GROUPS[group]:
            print(f"running {name} …", file=sys.stderr)
            found += importlib.import_module(name).rows()
    show(found)
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0 if all(row["ok"] for row in found) else 1


def show(rows: Sequence[Mapping[str, object]]) -> None:
    """The table, for people."""
    table = Table(title=f"bench; {OUTPUT} has the same", title_justify="left")
    for column in ("work", "ahead of", "ratio", "goal", ""):
        table.add_column(column, justify="right" if column in {"ratio", "goal"} else "left")
    for row in rows:
        goal = "" if row["goal"] is None else f"{row['goal']:g}"
        table.add_row(str(row["name"]), str(row["peer"]), f"{row['ratio']:.1f}", goal, "ok" if row["ok"] else "MISSED")
    Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_COLUMNS).print(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ""))
