"""`wardlink gateway spool …`: how full the outbox is, what is in it, and what a damaged file still has.

`status` and `export` only look, also beside a running gateway; `salvage` writes, and needs the gateway stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from gateway import app, settings
from gateway.errors import EXIT_FAILURE, EXIT_OK, ConfigError, DamagedError, UnavailableError, WireError
from gateway.samples import LossRecord
from gateway.settings import Settings
from gateway.spool import disk
from gateway.spool.sealed import SealedStore
from gateway.spool.sqlite_recovery import read_log, rows_in, set_aside_files
from gateway.spool.sqlite_store import SqliteStore
from gateway.spool.store import DamagedRow, Row, StoredRow
from gateway.wire import codec
from wardlink.terminal import show_rows

ROWS_AT_ONCE = 200
EVERY_ID = 2**63 - 1
CSV_COLUMNS = ("time", "device", "signal", "field", "value", "epoch", "sequence")

MakeCommand = Callable[..., argparse.ArgumentParser]


def add_commands(spool: Any, command: MakeCommand, common: argparse.ArgumentParser, as_json: Any) -> None:
    """Add the commands below `wardlink gateway spool`; `command` makes one as the other commands are made."""
    command(
        spool,
        _status,
        "status",
        "what is waiting, accepted and lost, by stream; room, suspects, files that were set aside",
        [common, as_json],
        "spool status",
        "spool status --json",
    )
    export = command(
        spool,
        _export,
        "export",
        "write what the outbox holds into a file, decoded; nothing in it changes",
        [common, as_json],
        "spool export held.ndjson",
        "spool export --format csv held.csv",
        "spool export - | head",
    )
    _add_output(export)
    salvage = command(
        spool,
        _salvage,
        "salvage",
        "take the intact records of a damaged file into the outbox, or into an export; the file stays as it is",
        [common, as_json],
        "spool salvage /var/lib/wardlink-gateway/outbox.db.damaged-20260507T101500.000000Z",
        "spool salvage --export found.ndjson card-image.db",
    )
    salvage.add_argument("file", type=Path, metavar="FILE", help="a damaged outbox; its -wal beside it is read, too")
    salvage.add_argument("--export", type=Path, metavar="OUT", help="write the records there, leave the outbox alone")
    salvage.add_argument("--format", choices=("ndjson", "csv"), default="ndjson", help="of the export")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", type=Path, metavar="FILE", help="a file that is not there yet, or - for the terminal")
    parser.add_argument(
        "--format",
        choices=("ndjson", "csv"),
        default="ndjson",
        help="ndjson: a block a line; csv: a value a line (default: %(default)s)",
    )


# --- status


def _status(args: argparse.Namespace) -> int:
    chosen = settings.load(args.config)
    with _opened(chosen) as store:
        holding, tallies, suspects = store.holding(), store.tallies(), store.suspects()
        epoch = store.epoch
    rows = [
        {"device": device, "signal": signal, **asdict(tally)} for (device, signal), tally in sorted(tallies.items())
    ]
    quota = chosen.spool.bytes_max
    fill_pct = round(100 * holding.size / quota, 1)
    said = {
        "epoch": epoch,
        "waiting": holding.rows,
        "bytes": holding.size,
        "bytes_max": quota,
        "fill_pct": fill_pct,
        **(_place(chosen) if chosen.spool.backend == "sqlite" else {}),
        "suspects": [asdict(suspect) for suspect in suspects],
        "streams": rows,
    }
    if args.json:
        print(json.dumps(said))
        return EXIT_OK
    show_rows(("device", "signal", "blocks", "accepted", "lost"), rows, as_json=False, title=f"epoch {epoch}")
    print(f"{holding.rows} blocks, {holding.size} bytes waiting for their receipt; {fill_pct} % of the quota")
    if "free_bytes" in said:
        reserve = "there" if said["has_reserve"] else "NOT THERE"
        print(f"disk: {said['free_bytes']} bytes free, kept free {said['free_bytes_min']}; reserve {reserve}")
    for suspect in suspects:
        which = f"{suspect.device} {suspect.signal} blocks {suspect.first} to {suspect.last} of epoch {suspect.epoch}"
        print(f"SUSPECT: {which}: {suspect.samples} samples are gone unless the cloud has them")
    for name in said.get("damaged_files", []):
        print(f"set aside: {name} (wardlink gateway spool salvage reads it)")
    return EXIT_OK


def _place(chosen: Settings) -> dict[str, Any]:
    path = chosen.outbox_path
    return {
        "free_bytes": disk.free_bytes(path.parent),
        "free_bytes_min": chosen.spool.free_bytes_min,
        "has_reserve": disk.Reserve(path, chosen.spool.reserve_bytes).is_there,
        "damaged_files": [str(file) for file in set_aside_files(path)],
    }


# --- export


def _export(args: argparse.Namespace) -> int:
    chosen = settings.load(args.config)
    with _opened(chosen) as store, _output(args.output) as out:
        counted = _write(_every_row(store), out, args.format)
        counted["sealed_with_another_key"] = len(store.unopened)
    _tell(counted, args.output, as_json=args.json)
    return EXIT_FAILURE if counted["damaged"] or counted["sealed_with_another_key"] else EXIT_OK


def _every_row(store: SealedStore) -> Iterator[StoredRow | DamagedRow]:
    """Rows with final times first, then those that wait for theirs."""
    after = 0
    while found := store.fetch(after, EVERY_ID, ROWS_AT_ONCE):
        yield from found
        after = max(item.held.id for item in found)
    yield from store.unstamped(EVERY_ID >> 1)


def _write(rows: Iterator[StoredRow | DamagedRow], out: IO[str], form: str) -> dict[str, int]:
    counted = {"records": 0, "samples": 0, "damaged": 0}
    table = csv.writer(out)
    if form == "csv":
        table.writerow(CSV_COLUMNS)
    for item in rows:
        try:
            if isinstance(item, DamagedRow):
                raise DamagedError("its checksum does not fit")
            row = item.row
            content = codec.decode(row.payload.data, row.payload.content_type).content
        except (DamagedError, WireError):
            counted["damaged"] += 1
            continue
        counted["records"] += 1
        counted["samples"] += row.samples
        if form == "csv":
            table.writerows(_values(row, content))
        else:
            out.write(json.dumps(_record(row, content)) + "\n")
    return counted


def _record(row: Row, content: Any) -> dict[str, Any]:
    head: dict[str, Any] = {
        "device": row.device,
        "signal": row.signal,
        "epoch": row.epoch,
        "sequence": row.sequence,
        "first": _time_text(row.first_ns),
        "last": _time_text(row.last_ns),
        "times_are_provisional": bool(row.boot),
    }
    if isinstance(content, LossRecord):
        lost = {"cause": content.cause.value, "signal": content.signal, "samples": content.sample_count}
        return head | {"lost": lost | {"sequences": content.sequences, "epoch": content.epoch}}
    columns = {name: _plain(content.physical(name).tolist()) for name in content.columns}
    clock = {"state": content.clock.state.value, "error_ns": content.clock.error_ns}
    return head | {"clock": clock, "times_ns": content.times_ns.tolist(), "columns": columns}


def _values(row: Row, content: Any) -> Iterator[tuple[object, ...]]:
    who = (row.epoch, row.sequence)
    if isinstance(content, LossRecord):
        name = f"lost:{content.cause.value}"
        yield (_time_text(content.first_ns), row.device, content.signal, name, content.sample_count, *who)
        return
    for name in content.columns:
        for time_ns, value in zip(content.times_ns.tolist(), _plain(content.physical(name).tolist()), strict=True):
            if value is not None:
                yield (_time_text(time_ns), row.device, row.signal, name, value, *who)


def _plain(values: list[float]) -> list[float | None]:
    return [None if value != value else value for value in values]  # noqa: PLR0124 - what is not itself is no number


def _time_text(time_ns: int) -> str:
    seconds, rest = divmod(time_ns, 10**9)
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:09d}Z"
    except (OverflowError, ValueError, OSError):
        return str(time_ns)


# --- salvage


def _salvage(args: argparse.Namespace) -> int:
    chosen = settings.load(args.config)
    file: Path = args.file
    if not file.is_file():
        raise ConfigError(f"there is no file {file}", hint="wardlink gateway spool status names those set aside")
    if args.export is not None:
        sealing = app.make_store(chosen)
        with _output(args.export) as out:
            found = (row for item in rows_in(file, read_log(file)) for row in sealing.opened([item]))
            counted = _write(found, out, args.format)
        _tell(counted, args.export, as_json=args.json)
        return EXIT_OK if counted["records"] else EXIT_FAILURE
    store = app.make_store(chosen).inner
    if not isinstance(store, SqliteStore):
        raise ConfigError('spool.backend is "redis": nothing is put into it', hint="--export writes what is found")
    try:
        store.open()
        count = store.take_in(file)
        holding = store.holding()
    finally:
        store.close()
    if args.json:
        print(json.dumps({"file": str(file), "taken_in": count, "waiting": holding.rows}))
    else:
        print(f"{count} records of {file} are in the outbox now; {holding.rows} wait for their receipt")
    return EXIT_OK


# --- both


@contextlib.contextmanager
def _opened(chosen: Settings) -> Iterator[SealedStore]:
    """The outbox, to be looked at only."""
    if chosen.spool.backend == "sqlite" and not chosen.outbox_path.exists():
        raise ConfigError(f"there is no outbox at {chosen.outbox_path}", hint="has the gateway run with this file yet?")
    store = app.make_store(chosen, read_only=True)
    try:
        store.open()
        yield store
    except DamagedError as error:
        raise DamagedError(error.message, hint=error.hint or app.DAMAGED_HINT) from error
    finally:
        store.close()


@contextlib.contextmanager
def _output(path: Path) -> Iterator[IO[str]]:
    """A new file that nobody else may read, or standard output."""
    if str(path) == "-":
        yield sys.stdout
        return
    try:
        with path.open("x", encoding="utf-8", newline="") as out:
            path.chmod(0o600)
            yield out
    except FileExistsError:
        raise ConfigError(f"{path} is there already", hint="name a file that is not: nothing is written over") from None
    except OSError as error:
        raise UnavailableError(f"{path} cannot be written: {error.strerror}") from error


def _tell(counted: dict[str, int], output: Path, *, as_json: bool) -> None:
    where = sys.stderr if str(output) == "-" else sys.stdout
    if as_json:
        print(json.dumps({"file": str(output), **counted}), file=where)
        return
    print(f"{counted['records']} records, {counted['samples']} samples", file=where)
    for name in ("damaged", "sealed_with_another_key"):
        if counted.get(name):
            print(f"{counted[name]} records left out: {name.replace('_', ' ')}", file=where)
