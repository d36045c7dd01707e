"""How the demo looks while it runs and at its end: a live table on a terminal, plain lines in a pipe."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gateway.samples import LOSS
from gateway.spool.store import StreamKey, Tally
from wardlink.demo.account import Books
from wardlink.demo.watch import Seen, StreamName, Watch

_EMPTY = Seen()


def live_table(
    watch: Watch, tallies: Mapping[StreamKey, Tally], waiting: int, elapsed_s: float, seconds: float
) -> Group:
    """One line a stream: rate, newest values, accepted, committed, lost; and how deep the outbox is."""
    table = Table(
        title="wardlink demo: device -> gateway -> MQTT -> bridge -> InfluxDB, PostgreSQL", title_justify="left"
    )
    for name in ("device", "signal"):
        table.add_column(name)
    table.add_column("rate /s", justify="right")
    table.add_column("newest values", min_width=44, no_wrap=True)
    for name in ("accepted", "committed", "lost"):
        table.add_column(name, justify="right")
    for device, signal in sorted(set(watch.streams) | {key for key in tallies if key[1] != LOSS}):
        seen = watch.streams.get((device, signal), _EMPTY)
        tally = tallies.get((device, signal), Tally(0, 0, 0))
        lost = f"[red]{tally.lost}[/]" if tally.lost else "0"
        table.add_row(
            device,
            signal,
            f"{seen.rate_hz():.1f}",
            _values(seen),
            str(tally.accepted),
            f"[green]{seen.committed}[/]",
            lost,
        )
    done = ProgressBar(total=seconds, completed=min(elapsed_s, seconds), width=40)
    foot = Text(f"outbox: {waiting} blocks wait for their receipt   {min(elapsed_s, seconds):.0f} of {seconds:.0f} s")
    return Group(table, foot, done)


def plain_line(watch: Watch, tallies: Mapping[StreamKey, Tally], waiting: int, elapsed_s: float) -> str:
    """The same in one line."""
    parts = [f"{elapsed_s:5.1f} s", f"outbox {waiting}"]
    for key, tally in sorted(tallies.items()):
        if key[1] != LOSS:
            seen = watch.streams.get(key, _EMPTY)
            parts.append(f"{key[0]} {key[1]}: {tally.accepted} accepted, {seen.committed} committed, {tally.lost} lost")
    return "; ".join(parts)


def summary_table(rows: list[dict[str, object]]) -> Table:
    """The books at the end."""
    table = Table(title="what became of every sample", title_justify="left")
    for name in rows[0] if rows else ():
        table.add_column(name.replace("_", " "), justify="left" if name in {"device", "signal"} else "right")
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    return table


def stream_rows(books: Books, streams: Mapping[StreamName, Seen]) -> list[dict[str, object]]:
    """The streams of the summary, as `--json` prints them."""
    rows: list[dict[str, object]] = []
    for (device, signal), stream in sorted(books.streams.items()):
        seen = streams.get((device, signal), _EMPTY)
        rows.append(
            {
                "device": device,
                "signal": signal,
                "produced": stream.produced,
                "committed": stream.committed,
                "lost": stream.lost,
                "parked": stream.parked,
                "points_in_influx": stream.points,
                "latency_ms_p50": seen.latency_ms(50),
                "latency_ms_p99": seen.latency_ms(99),
            }
        )
    return rows


def _values(seen: Seen) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in seen.newest.items())
