"""What the commands of `wardlink cloud` share: a noun with its verbs, arguments with a meaning, tables that are safe.

Knows no command and no table of the database.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import Any, TypeAlias

import rich.table
import rich.text  # noqa: F401

from cloud_sync.registry.database import Connection, Database
from gateway.errors import EXIT_OK
from wardlink.terminal import harmless, show_rows

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001 - it has no public name
Handler: TypeAlias = Callable[[argparse.Namespace, str], Awaitable[int]]
Act: TypeAlias = Callable[[argparse.Namespace, Connection], Awaitable[int]]

ROWS_MAX = 200
"""Rows of a list unless `--limit` says more."""
LIMIT_MAX = 100_000


class Group:
    """A noun of the command line and its verbs."""

    def __init__(self, subparsers: Subparsers, common: argparse.ArgumentParser, noun: str, summary: str) -> None:
        parser = subparsers.add_parser(noun, help=summary, description=summary)
        self._verbs: Subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
        self._common = common

    def add(self, verb: str, act: Act, summary: str, *examples: str) -> argparse.ArgumentParser:
        return self.add_handler(verb, on_connection(act), summary, *examples)

    def add_handler(self, verb: str, handler: Handler, summary: str, *examples: str) -> argparse.ArgumentParser:
        """For what needs more than a connection to the registry."""
        return command(self._verbs, self._common, verb, handler, summary, *examples)


def command(
    subparsers: Subparsers, common: argparse.ArgumentParser, name: str, handler: Handler, summary: str, *examples: str
) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        name,
        parents=[common],
        help=summary,
        description=summary,
        epilog="\n".join(["examples:", *(f"  wardlink cloud {example}" for example in examples)]) if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(admin=handler)
    return parser


def on_connection(act: Act) -> Handler:
    async def handler(args: argparse.Namespace, conninfo: str) -> int:
        async with Database(conninfo, pool_size=1) as database, database.connection() as connection:
            return await act(args, connection)

    return handler


def moment(text: str) -> datetime:
    """ISO 8601 with a zone, since a bare local time names two moments a year and none at all elsewhere."""
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no time, expected 2025-03-01T14:30:00Z") from None
    if at.tzinfo is None:
        raise argparse.ArgumentTypeError(f"{text!r} has no zone, expected 2025-03-01T14:30:00Z or …+01:00")
    return at


def tag(text: str) -> tuple[str, str]:
    """key=value."""
    key, separator, value = text.partition("=")
    if not (separator and key and value):
        raise argparse.ArgumentTypeError(f"{text!r} is no tag, expected key=value")
    return key, value


def limit(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= LIMIT_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is out of range, expected 1 to {LIMIT_MAX}")
    return int(text)


def rate(text: str) -> float:
    try:
        rate_hz = float(text)
    except ValueError:
        rate_hz = math.nan
    if not 0.001 <= rate_hz <= 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is no sampling rate in Hz, expected 0.001 to 1000000")
    return rate_hz


def say(args: argparse.Namespace, columns: Sequence[str], rows: Sequence[dict[str, Any]], title: str = "") -> int:
    shown = rows if args.json else [{name: _plain(value) for name, value in row.items()} for row in rows]
    show_rows(columns, shown, as_json=args.json, title=title)
    return EXIT_OK


def _plain(value: object) -> str | None:
    """Topics, reasons and models come from outside: nothing in them may steer the terminal."""
    if value is None:
        return None
    if isinstance(value, datetime):
        return value.isoformat(" ", "milliseconds")
    return harmless(str(value))


def say_list(args: argparse.Namespace, rows: Sequence[dict[str, Any]], columns: str, title: str) -> int:
    return say(args, columns.split(), rows, f"{title}: {len(rows)}" if rows else f"{title}: none")
