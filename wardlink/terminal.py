"""How results and errors look in the terminal: tables and colour for people, JSON for programs, plain when piped.

The library for tables is loaded when there is one to show: a service that runs for months need not hold it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gateway.errors import WardlinkError

if TYPE_CHECKING:
    from rich.console import Console

PIPE_COLUMNS = 200
"""Width of a table that goes into a pipe, where there is no terminal to fit."""


def console() -> Console:
    """A console on standard output: coloured on a terminal, plain and wide in a pipe."""
    from rich.console import Console  # noqa: PLC0415 - see above

    return Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else PIPE_COLUMNS)


def show_rows(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], *, as_json: bool, title: str = "") -> None:
    """Print rows as a table, or as a JSON array of objects with the same keys."""
    if as_json:
        print(json.dumps([dict(row) for row in rows], default=str, indent=2))
        return
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(title=title or None, title_justify="left")
    for column in columns:
        table.add_column(column.replace("_", " "))
    for row in rows:
        table.add_row(*(Text("" if row.get(column) is None else str(row[column])) for column in columns))
    shown = console()
    with shown.capture() as text:  # printed by Python itself, where a reader that went away is told from other errors
        shown.print(table)
    print(text.get(), end="")


def show_error(error: WardlinkError) -> int:
    """Print one expected error on standard error and return the exit code that belongs to it."""
    coloured = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    print("\x1b[1;31merror:\x1b[0m" if coloured else "error:", harmless(error.message), file=sys.stderr)
    if error.hint:
        print("hint:", harmless(error.hint), file=sys.stderr)
    return error.exit_code


def harmless(text: str) -> str:
    """Devices, files and peers are quoted in errors: nothing in them may steer the terminal."""
    return "".join(sign if sign.isprintable() or sign == "\n" else "\ufffd" for sign in text)
