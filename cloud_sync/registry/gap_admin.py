"""Gaps as an operator looks at them: single ones, and their sums by cause."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from cloud_sync.registry.admin import Rows, rows_of
from cloud_sync.registry.database import Connection
from cloud_sync.registry.losses import TRANSPORT
from gateway.samples import LossCause

CAUSES = (*(cause.value for cause in LossCause), TRANSPORT)


@dataclass(frozen=True, slots=True)
class Chosen:
    """Which gaps; None: all."""

    device: str | None = None
    signal: str | None = None
    cause: str | None = None
    since: datetime | None = None
    is_open: bool = False


_CHOSEN = (
    "FROM stream_gaps WHERE (%(device)s::text IS NULL OR device_serial = %(device)s) "
    "AND (%(signal)s::text IS NULL OR signal = %(signal)s) AND (%(cause)s::text IS NULL OR cause = %(cause)s) "
    "AND (%(since)s::timestamptz IS NULL OR last_at >= %(since)s) AND (closed_at IS NULL OR NOT %(open)s) "
)


async def gaps(connection: Connection, chosen: Chosen, limit: int) -> Rows:
    """The gaps, those of the newest samples first."""
    return await rows_of(
        connection,
        "SELECT device_serial AS device, signal, cause, first_at, last_at, sample_count AS samples, is_estimated, "
        "coalesce(outcome, 'open') AS state, opened_at, closed_at, epoch, "
        "CASE WHEN sequences IS NOT NULL THEN lower(sequences) || '-' || upper(sequences) - 1 END AS blocks, "
        "gateway_id AS gateway, stream_id, id " + _CHOSEN + "ORDER BY first_at DESC, id DESC LIMIT %(limit)s",
        _parameters(chosen, limit),
    )


async def sums(connection: Connection, chosen: Chosen, limit: int) -> Rows:
    """Samples by device, signal and cause. What a stream produced is what it has stored plus what it has `lost`.

    `estimated`: how many of the lost ones were counted from blocks of mean size.
    """
    return await rows_of(
        connection,
        "SELECT device_serial AS device, signal, cause, "
        "coalesce(sum(sample_count) FILTER (WHERE outcome = 'lost'), 0)::bigint AS lost, "
        "coalesce(sum(sample_count) FILTER (WHERE outcome = 'lost' AND is_estimated), 0)::bigint AS estimated, "
        "coalesce(sum(sample_count) FILTER (WHERE outcome = 'elsewhere'), 0)::bigint AS elsewhere, "
        "coalesce(sum(sample_count) FILTER (WHERE outcome IS NULL), 0)::bigint AS open, "
        "coalesce(sum(sample_count) FILTER (WHERE outcome = 'arrived'), 0)::bigint AS arrived "
        + _CHOSEN
        + "GROUP BY 1, 2, 3 ORDER BY 1, 2, 3 LIMIT %(limit)s",
        _parameters(chosen, limit),
    )


def _parameters(chosen: Chosen, limit: int) -> dict[str, object]:
    return {
        "device": chosen.device,
        "signal": chosen.signal,
        "cause": chosen.cause,
        "since": chosen.since,
        "open": chosen.is_open,
        "limit": limit,
    }
