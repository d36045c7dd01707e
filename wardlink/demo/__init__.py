"""`wardlink demo`: the whole chain on private servers, with virtual devices, and the books at its end."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.live import Live

from gateway.errors import EXIT_FAILURE, EXIT_OK, ConfigError, WardlinkError
from gateway.service import install_signals
from gateway.virtual.recordings import load_recording
from wardlink.demo import view
from wardlink.demo.account import Books, outbox_tallies, settle
from wardlink.demo.chain import Chain
from wardlink.demo.watch import Watch

SECONDS_DEFAULT = 30.0
SECONDS_MIN = 5.0
SECONDS_MAX = 3600.0
DRAIN_S = 2.0
"""At the end of the demo, for what is still on its way."""
REFRESH_S = 0.25
PLAIN_EVERY = 20
"""In a pipe, one line for so many refreshes."""
EXIT_INTERRUPTED = 130

EXAMPLES = """\
examples:
  wardlink demo                                   30 s with a synthetic headset
  wardlink demo --recording session.txt --json    play a recording, print the books as JSON
  wardlink demo --keep /tmp/wardlink-demo         keep configuration, logs and data to look at
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `demo` below `wardlink`."""
    parser = commands.add_parser(
        "demo",
        help="the whole chain on private servers, with virtual devices",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=_seconds, default=SECONDS_DEFAULT, metavar="N", help="default: %(default)g")
    parser.add_argument("--recording", type=Path, metavar="FILE", help="OpenBCI text, Muse CSV, EDF or BDF")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="run in this new folder and leave it")
    parser.set_defaults(handler=_demo)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not SECONDS_MIN <= seconds <= SECONDS_MAX:
        raise argparse.ArgumentTypeError(f"{text!r}: expected {SECONDS_MIN:g} to {SECONDS_MAX:g} seconds")
    return seconds


def _demo(args: argparse.Namespace) -> int:
    if args.recording is not None:
        load_recording(args.recording)  # a wrong file is said before anything is started
    with _folder(args.keep) as folder:
        return asyncio.run(_run(args, Chain(folder, recording=args.recording)))


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        folder = Path(tempfile.mkdtemp(prefix="wardlink-"))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return
    if keep.exists() and any(keep.iterdir()):
        raise ConfigError(f"--keep {keep}: the folder is not empty", hint="name a new one")
    try:
        keep.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--keep {keep}: {error.strerror}") from None
    yield keep.absolute()


async def _run(args: argparse.Namespace, chain: Chain) -> int:
    stop = asyncio.Event()
    install_signals(stop)
    say = Console(stderr=True, highlight=False).print
    say("starting private servers, virtual devices, gateway and bridge …")
    starting = asyncio.create_task(asyncio.to_thread(chain.start))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set():
            return await _interrupted(chain, starting, say)
        await starting
        watch = Watch(chain.servers.mosquitto)
        watching = asyncio.create_task(watch.session.run())
        try:
            await _play(args, chain, watch, stop)
            if stop.is_set():
                return await _interrupted(chain, starting, say)
            say("stopping the gateway, which sends what it still has …")
            books = await settle(chain)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        return _report(args, books, watch)
    finally:
        stopping.cancel()
        await asyncio.to_thread(chain.stop)


async def _interrupted(chain: Chain, starting: asyncio.Task[None], say: Callable[[str], None]) -> int:
    say("stopped")
    chain.cancel()
    with contextlib.suppress(WardlinkError):
        await starting
    await asyncio.to_thread(chain.kill)
    return EXIT_INTERRUPTED


async def _play(args: argparse.Namespace, chain: Chain, watch: Watch, stop: asyncio.Event) -> None:
    """Show the chain at work until the time, less that for the rest, is over."""
    began = time.monotonic()
    screen = Console(stderr=args.json, highlight=False)
    shown = 0
    with (
        Live(console=screen, auto_refresh=False, transient=True)
        if screen.is_terminal
        else contextlib.nullcontext() as live
    ):
        while (elapsed_s := time.monotonic() - began) < args.seconds - DRAIN_S and not stop.is_set():
            chain.check()
            tallies, waiting = await asyncio.to_thread(outbox_tallies, chain)
            if live is not None:
                live.update(view.live_table(watch, tallies, waiting, elapsed_s, args.seconds), refresh=True)
            elif shown % PLAIN_EVERY == 0:
                screen.print(view.plain_line(watch, tallies, waiting, elapsed_s), soft_wrap=True)
            shown += 1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REFRESH_S):
                    await stop.wait()


def _report(args: argparse.Namespace, books: Books, watch: Watch) -> int:
    rows = view.stream_rows(books, watch.streams)
    settled = bool(rows) and all(stream.settled() for stream in books.streams.values())
    verdict = "ok" if settled and not books.dead_letters else "failed"
    if args.json:
        result = {"seconds": args.seconds, "streams": rows, "duplicates": books.duplicates, "exit": verdict}
        print(json.dumps(result))
    else:
        out = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
        out.print(view.summary_table(rows))
        out.print(f"duplicates: {books.duplicates}, dead letters: {books.dead_letters}")
        good = "every accepted sample is stored exactly once"
        out.print(f"[green]{good}[/]" if verdict == "ok" else "[red]the books do not agree[/]")
    return EXIT_OK if verdict == "ok" else EXIT_FAILURE
