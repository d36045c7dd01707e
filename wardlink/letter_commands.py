"""`wardlink cloud parked|letters …`: what waits for a binding, what could not be read or was refused, driven again."""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import asdict
from typing import Any

from cloud_sync import app, settings
from cloud_sync.binding import Bindings
from cloud_sync.letter_redrive import LetterRedrive
from cloud_sync.registry import dead_letters, letters
from cloud_sync.registry.database import Connection, Database
from cloud_sync.registry.dead_letters import Letter
from gateway.errors import EXIT_FAILURE, EXIT_OK, ConfigError
from wardlink.admin_commands import ROWS_MAX, Group, Subparsers, limit, say, say_list

PAYLOAD_SHOWN_MAX = 4096
"""Bytes of a dead letter's payload that are shown."""


def add_commands(subparsers: Subparsers, common: argparse.ArgumentParser) -> None:
    """Add `parked` and `letters`."""
    group = Group(subparsers, common, "parked", "data that waits for its device to be bound")
    group.add("list", _parked_list, "list devices whose data waits, and why", "parked list")

    group = Group(subparsers, common, "letters", "dead letters: messages that could not be read or were refused")
    parser = group.add("list", _letters_list, "list dead letters, newest first", "letters list", "letters list --all")
    parser.add_argument("--all", action="store_true", help="also those that were re-driven")
    parser.add_argument("--limit", type=limit, default=ROWS_MAX, help="rows at most (default: %(default)s)")
    parser = group.add("show", _letters_show, "show one dead letter with its payload", "letters show 7")
    parser.add_argument("letter", type=int, metavar="LETTER", help="id, see `letters list`")
    parser = group.add_handler(
        "redrive",
        _letters_redrive,
        "write dead letters again, once their reason is mended; 1 if one of them fails again",
        "letters redrive 7 9",
        "letters redrive --all",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("letters", type=int, nargs="*", metavar="LETTER", default=[], help="ids, see `letters list`")
    which.add_argument("--all", action="store_true", help="all that wait, the oldest first")


async def _parked_list(args: argparse.Namespace, connection: Connection) -> int:
    rows = [asdict(device) for device in await letters.parked_devices(connection)]
    return say_list(args, rows, "device messages samples first_at last_at reason", "devices with parked data")


async def _letters_list(args: argparse.Namespace, connection: Connection) -> int:
    found = await dead_letters.list_letters(connection, args.limit, with_redriven=args.all)
    rows = [_letter_row(letter) for letter in found]
    columns = "id received_at gateway topic bytes reason detail repeats redriven_at"
    return say_list(args, rows, columns, "dead letters")


def _letter_row(letter: Letter) -> dict[str, Any]:
    row = asdict(letter)
    row["bytes"] = len(row.pop("payload"))
    return row


async def _letters_show(args: argparse.Namespace, connection: Connection) -> int:
    letter = await dead_letters.find_letter(connection, args.letter)
    if letter is None:
        raise ConfigError(f"no dead letter {args.letter}", hint="`wardlink cloud letters list --all` shows them")
    row = _letter_row(letter)
    shown = letter.payload[:PAYLOAD_SHOWN_MAX]
    if args.json:
        return say(args, (), [{**row, "payload_hex": letter.payload.hex()}])
    row["payload"] = shown.decode() if _is_text(shown) else shown.hex(" ")
    if len(letter.payload) > len(shown):
        row["payload"] += f" … and {len(letter.payload) - len(shown)} bytes more"
    return say(args, ("field", "value"), [{"field": name, "value": value} for name, value in row.items()])


def _is_text(payload: bytes) -> bool:
    try:
        text = payload.decode()
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character in "\n\t" for character in text)


async def _letters_redrive(args: argparse.Namespace, conninfo: str) -> int:
    """The only one of these commands that needs the time-series store, with its credential."""
    timeseries = app.timeseries(await asyncio.to_thread(settings.load, args.config))
    try:
        async with Database(conninfo, pool_size=2) as database:
            redrive = LetterRedrive(database, timeseries, Bindings(database))
            ids = await redrive.waiting() if args.all else list(dict.fromkeys(args.letters))
            found = [await redrive.redrive(ident) for ident in ids]
    finally:
        await timeseries.close()
    rows = [{"id": one.id, "done": one.is_done, "result": one.result} for one in found]
    say_list(args, rows, "id done result", "letters re-driven")
    return EXIT_OK if all(one.is_done for one in found) else EXIT_FAILURE
