"""How the compiled kernel splits a segment's length for its Fourier transform. Pure arithmetic."""

from __future__ import annotations

from functools import cache

RADICES = (2, 3, 4, 5)
"""Those that the kernel has butterflies for."""

_STAGE_WORK = {2: 10, 3: 26, 4: 34, 5: 68}
"""Operations of one complex butterfly with its turns."""
_FIRST_WORK = {2: 2, 3: 6, 4: 6, 5: 18}
"""Of one on real input."""
_JOIN_WORK = 8
"""Of one bin of one further part."""


@cache
def transform_plan(length: int, bin_count: int) -> tuple[int, tuple[int, ...]]:
    """The cheapest way to `bin_count` bins of `length` real samples.

    Returns into how many interleaved parts the samples are split, whose spectra are joined for the wanted bins alone,
    and the radices of the transform of each part, first stage first; no radices for parts of one sample.
    """
    plans = []
    for parts in range(1, length + 1):
        if length % parts == 0 and (found := _stages(length // parts)) is not None:
            work, radices = found
            plans.append((parts * work + (parts - 1) * bin_count * _JOIN_WORK, parts, radices))
    _, parts, radices = min(plans)
    return parts, radices


@cache
def _stages(length: int) -> tuple[float, tuple[int, ...]] | None:
    """The cheapest way to transform a length, with its work; None if it has other factors than the radices."""
    if length == 1:
        return 0, ()
    found: list[tuple[float, tuple[int, ...]]] = []
    for radix in RADICES:
        inner = length // radix
        if length % radix:
            continue
        if inner == 1:
            found.append((_FIRST_WORK[radix], (radix,)))
        elif (rest := _stages(inner)) is not None:
            work, radices = rest
            found.append((radix * work + inner / 2 * _STAGE_WORK[radix], (*radices, radix)))
    return min(found, default=None)
