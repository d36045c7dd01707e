"""Final times for rows that were accepted before the time was known: the same blocks, under the same identities.

Knows no clock: which times are right it is told.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from collections.abc import Set as AbstractSet

from gateway.errors import WireError
from gateway.samples import ClockStamp, LossRecord
from gateway.spool.store import DamagedRow, Held, Row, Store, identity
from gateway.wire import codec

Final = Callable[[Row], Row]
"""Makes of a row with provisional times the one with final times. Raises `WireError` on a damaged payload."""


def stamped(gateway: str, row: Row, shift_ns: int, host: ClockStamp) -> Row:
    """The row with its times moved and the host's part added to its bound. Raises `WireError` on a damaged payload.

    `host`: the trust that the host's clock deserves at the row's times, as it is known now. A block that is held back
    carries only the error of its own time axis.
    """
    who = identity(gateway, row)
    content = codec.decode(row.payload.data, row.payload.content_type).content
    if isinstance(content, LossRecord):
        content = dataclasses.replace(content, first_ns=content.first_ns + shift_ns, last_ns=content.last_ns + shift_ns)
    else:
        clock = ClockStamp(host.state, content.clock.error_ns + host.error_ns)
        content = dataclasses.replace(content, times_ns=content.times_ns + shift_ns, clock=clock)
    return dataclasses.replace(
        row,
        first_ns=content.first_ns,
        last_ns=content.last_ns,
        payload=codec.encode(who, content),
        boot="",
        offset_ns=0,
    )


def stamp(store: Store, final: Final, limit: int, given_up: AbstractSet[int]) -> tuple[int, list[Held]]:
    """Exchange the oldest rows with provisional times, in one durable step. Blocks. Raises `UnavailableError`.

    Returns how many were found, and those among them that are damaged; `given_up`: ids that go anyway.
    """
    damaged: list[Held] = []
    rows: dict[int, Row] = {}
    found = store.unstamped(limit)
    for item in found:
        if isinstance(item, DamagedRow):
            damaged.append(item.held)
        elif item.id not in given_up:
            try:
                rows[item.id] = final(item.row)
            except WireError:
                damaged.append(item.held)
    if rows:
        store.replace(list(rows), list(rows.values()))
    return len(found), damaged
