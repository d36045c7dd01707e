"""How results and errors look in the terminal: tables and colour for people, JSON for programs, plain when piped."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gateway.errors import WardlinkError

PIPE_COLUMNS = 200
"""Width of a table that goes into a pipe, where there is no terminal to fit."""


def console() -> Console:
    """A console on standard output: coloured on a terminal, plain and wide in a pipe."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_COLUMNS)


def show_rows(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], *, as_json: bool, title: str = "") -> None:
    """Print rows as a table, or as a JSON array of objects with the same keys."""
    if as_json:
        print(json.dumps([dict(row) for row in rows], default=str, indent=2))
        return
    table = Table(title=title or None, title_justify="left")
    for column in columns:
        table.add_column(column.replace("_", " "))
    for row in rows:
        table.add_row(*(Text("" if row.get(column) is None else str(row[column])) for column in columns))
    console().print(table)


def show_error(error: WardlinkError) -> int:
    """Print one expected error on standard error and return the exit code that belongs to it."""
    to = Console(stderr=True, highlight=False, soft_wrap=True)
    to.print("error:", style="bold red", end=" ")
    to.print(error.message, markup=False)
    if error.hint:
        to.print(f"hint: {error.hint}", markup=False)
    return error.exit_code
