"""The points of many blocks on their way into the time-series store, and what became of each block.

One request for each organisation and bucket. Knows the store's interface, no ledger and no broker.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from cloud_sync import points
from cloud_sync.binding import BoundSamples
from cloud_sync.line_protocol import UnwritableError
from cloud_sync.registry.entries import Part
from cloud_sync.timeseries import Outcome, PlaceError, Refusal, TimeSeries
from gateway.errors import RefusedError

LINES_SHOWN_MAX = 5
"""Refused lines that a dead letter quotes; its payload is kept whole."""
LINE_LENGTH_SHOWN_MAX = 1_000

Place = tuple[str, str]
"""Organisation (empty: the store's default) and bucket."""


@dataclass(slots=True)
class _Lines:
    """What goes to one place: texts of whole lines, each of one part of one block."""

    texts: list[bytes] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    parts: list[_Part] = field(default_factory=list)
    outcome: Outcome | None = None
    unusable: str = ""
    """Why this place cannot be written at present."""


@dataclass(slots=True, eq=False)
class _Part:
    """Samples for one stream. A sample counts where any target took it."""

    bound: BoundSamples
    stored_count: int = 0
    refused: list[tuple[Refusal, bytes]] = field(default_factory=list)


class PointBatch:
    """Filled with `add`, then written once; afterwards it is known what of each block is stored."""

    def __init__(self) -> None:
        self._places: dict[Place, _Lines] = {}
        self._blocks: dict[int, list[_Part]] = {}

    def add(self, block: int, bound: Sequence[BoundSamples]) -> None:
        """Encode the bound samples of a block, for every target of their streams.

        `block`: any number that names it. Raises `RefusedError` where they can never be written; then nothing of the
        block is in the batch.
        """
        encoded = []
        for samples in bound:
            part = _Part(samples)
            for target in samples.period.targets:
                try:
                    text, count = points.lines(samples.samples, target)
                except (UnwritableError, ValueError) as error:
                    raise RefusedError(f"cannot be written as line protocol: {error}") from None
                encoded.append((target, text, count, part))
        self._blocks[block] = list({id(part): part for _, _, _, part in encoded}.values())
        for target, text, count, part in encoded:
            if count:
                lines = self._places.setdefault((target.influx_org, target.bucket), _Lines())
                lines.texts.append(text)
                lines.counts.append(count)
                lines.parts.append(part)

    async def write(self, timeseries: TimeSeries) -> None:
        """Write to every place. After an `UnavailableError` it may be called again and goes on where it was."""
        for (org, bucket), lines in self._places.items():
            if lines.outcome is None and not lines.unusable:
                try:
                    lines.outcome = await timeseries.write(org, bucket, b"".join(lines.texts))
                except PlaceError as error:
                    lines.unusable = str(error)
                else:
                    _settle(lines, lines.outcome)

    def unusable(self, block: int) -> str:
        """Why a block has to wait: a place that it goes to cannot be written, the others were. Empty: it need not."""
        parts = self._blocks.get(block, ())
        return next(
            (
                lines.unusable
                for lines in self._places.values()
                if lines.unusable and not set(parts).isdisjoint(lines.parts)
            ),
            "",
        )

    def parts(self, block: int) -> tuple[Part, ...]:
        """What of a block is stored."""
        return tuple(
            Part(
                part.bound.period.stream_id,
                part.stored_count,
                part.bound.samples.first_ns,
                part.bound.samples.last_ns,
            )
            for part in self._blocks.get(block, ())
            if part.stored_count
        )

    def refusal(self, block: int) -> tuple[str, str] | None:
        """Reason and detail, if the store refused anything of a block for good."""
        refused = [pair for part in self._blocks.get(block, ()) for pair in part.refused]
        if not refused:
            return None
        shown = [line[:LINE_LENGTH_SHOWN_MAX].decode(errors="replace") for _, line in refused[:LINES_SHOWN_MAX]]
        more = [f"and {len(refused) - len(shown)} more"] if len(refused) > len(shown) else []
        return refused[0][0].reason, "\n".join([*shown, *more])


def _settle(lines: _Lines, outcome: Outcome) -> None:
    """Tell each part how many of its lines one place took."""
    ends = list(accumulate(lines.counts))
    bad: dict[int, list[Refusal]] = {}
    for refusal in outcome.refused:
        bad.setdefault(bisect_right(ends, refusal.line), []).append(refusal)
    for number, (part, count) in enumerate(zip(lines.parts, lines.counts, strict=True)):
        refusals = bad.get(number, [])
        part.stored_count = max(part.stored_count, count - len(refusals))
        if refusals:
            texts = lines.texts[number].splitlines()
            start = ends[number] - count
            part.refused += [(refusal, texts[refusal.line - start]) for refusal in refusals]
