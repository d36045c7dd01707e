"""`wardlink cloud gaps|books|alerts …`: what is missing and why, and what somebody should know of."""

from __future__ import annotations

import argparse
import getpass

from cloud_sync.registry import alerts, books, gap_admin
from cloud_sync.registry.database import Connection
from gateway.errors import EXIT_FAILURE, EXIT_OK
from wardlink.admin_commands import ROWS_MAX, Group, Subparsers, command, limit, moment, on_connection, say_list


def add_commands(subparsers: Subparsers, common: argparse.ArgumentParser) -> None:
    """Add `gaps`, `books` and `alerts`."""
    parser = command(
        subparsers,
        common,
        "gaps",
        on_connection(_gaps),
        "list what is missing, newest first: still open, lost, or come after all",
        "gaps --open",
        "gaps --device CYTON-0042 --since 2025-03-01T00:00:00Z --cause shed",
        "gaps --sum --json",
    )
    parser.add_argument("--device", metavar="SERIAL", help="of this device only")
    parser.add_argument("--signal", metavar="SIGNAL", help="of this signal only")
    parser.add_argument("--open", action="store_true", help="only those whose data may still come")
    parser.add_argument("--since", type=moment, metavar="TIME", help="only with samples of then or later")
    parser.add_argument("--cause", choices=gap_admin.CAUSES, help="of this cause only")
    parser.add_argument("--sum", action="store_true", help="samples by device, signal and cause instead of single gaps")
    parser.add_argument("--limit", type=limit, default=ROWS_MAX, help="rows at most (default: %(default)s)")

    parser = command(
        subparsers,
        common,
        "books",
        on_connection(_books),
        "what each signal of a device has produced, and where it is; 1 if the ledger contradicts itself",
        "books",
        "books --device CYTON-0042 --json",
    )
    parser.add_argument("--device", metavar="SERIAL", help="of this device only")
    parser.add_argument("--limit", type=limit, default=ROWS_MAX, help="rows at most (default: %(default)s)")

    group = Group(subparsers, common, "alerts", "what somebody should know of")
    parser = group.add("list", _list, "list open alerts, newest first", "alerts list", "alerts list --all --json")
    parser.add_argument("--all", action="store_true", help="also closed ones")
    parser.add_argument("--limit", type=limit, default=ROWS_MAX, help="rows at most (default: %(default)s)")
    parser = group.add("ack", _ack, "note that you know: it stays open while its cause lasts", "alerts ack 3 4")
    parser.add_argument("alerts", type=int, nargs="+", metavar="ALERT", help="ids, see `alerts list`")
    parser = group.add("close", _close, "close alerts; one whose cause lasts is raised again", "alerts close 3")
    parser.add_argument("alerts", type=int, nargs="+", metavar="ALERT", help="ids, see `alerts list`")


async def _gaps(args: argparse.Namespace, connection: Connection) -> int:
    chosen = gap_admin.Chosen(args.device, args.signal, args.cause, args.since, is_open=args.open)
    if args.sum:
        rows = await gap_admin.sums(connection, chosen, args.limit)
        return say_list(args, rows, "device signal cause lost estimated elsewhere open arrived", "samples")
    rows = await gap_admin.gaps(connection, chosen, args.limit)
    columns = "device signal cause first_at last_at samples is_estimated state opened_at closed_at epoch blocks gateway"
    return say_list(args, rows, columns, "gaps")


async def _books(args: argparse.Namespace, connection: Connection) -> int:
    rows = await books.books(connection, device=args.device, limit=args.limit)
    columns = "device signal produced received stored parked lost elsewhere open missing_blocks is_consistent"
    say_list(args, rows, columns, "samples")
    return EXIT_OK if all(row["is_consistent"] for row in rows) else EXIT_FAILURE


_ALERT_COLUMNS = "id kind subject detail opened_at acknowledged_at acknowledged_by closed_at"


async def _list(args: argparse.Namespace, connection: Connection) -> int:
    rows = await alerts.list_alerts(connection, with_closed=args.all, limit=args.limit)
    return say_list(args, rows, _ALERT_COLUMNS, "alerts")


async def _ack(args: argparse.Namespace, connection: Connection) -> int:
    rows = await alerts.acknowledge(connection, args.alerts, _who())
    return say_list(args, rows, _ALERT_COLUMNS, "acknowledged")


async def _close(args: argparse.Namespace, connection: Connection) -> int:
    rows = await alerts.close(connection, args.alerts, _who())
    return say_list(args, rows, _ALERT_COLUMNS, "closed")


def _who() -> str:
    """The system's user, for the audit record; empty where it has no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""
