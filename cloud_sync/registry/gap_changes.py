"""How the open rows of a ledger row's gaps become its holes: which are moved, opened, merged, closed. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime


@dataclass(frozen=True, slots=True)
class Hole:
    """Sequences [first, stop) that are missing, with the times at its ends as far as they are known."""

    first: int
    stop: int
    before_at: datetime | None = None
    """Of the last sample before it."""
    after_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class OpenRow:
    """A row that is open, with the sequences that it had when it was last looked at."""

    id: int
    first: int
    stop: int
    opened_at: datetime


@dataclass(slots=True)
class Changes:
    """How the open rows become the holes."""

    moved: list[tuple[OpenRow, Hole]] = field(default_factory=list)
    opened: list[tuple[datetime | None, Hole]] = field(default_factory=list)
    """With the time when the row that it was a part of was opened."""
    merged: list[OpenRow] = field(default_factory=list)
    """Their hole is another row's now."""
    filled: list[OpenRow] = field(default_factory=list)


def changes(holes: Sequence[Hole], rows: Sequence[OpenRow], *, are_all: bool) -> Changes:
    """Match holes and open rows, both in order and each without overlap; `are_all`: there are no further holes.

    A row stays with the first hole that it overlaps; further ones become rows of their own. Pure.
    """
    found = Changes()
    horizon = None if are_all or not holes else holes[-1].stop
    taken: set[int] = set()
    number = 0
    for hole in holes:
        while number < len(rows) and rows[number].stop <= hole.first:
            number += 1
        touching: list[OpenRow] = []
        at = number
        while at < len(rows) and rows[at].first < hole.stop:
            touching.append(rows[at])
            at += 1
        owner = next((row for row in touching if row.id not in taken), None)
        if owner is None:
            found.opened.append((touching[0].opened_at if touching else None, hole))
            continue
        taken.add(owner.id)
        if (owner.first, owner.stop) != (hole.first, hole.stop):
            found.moved.append((owner, hole))
        for row in touching:
            if row.id not in taken and row.stop <= hole.stop:
                taken.add(row.id)
                found.merged.append(row)
    if horizon is None:
        found.filled = [row for row in rows if row.id not in taken]
    else:
        found.filled = [row for row in rows if row.id not in taken and row.stop <= horizon]
    return found
