"""Alerts: at most one open for each kind and subject, closed when its cause is gone or somebody says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cloud_sync.registry.admin import Rows, record_act, rows_of
from cloud_sync.registry.database import Connection
from gateway.errors import ConfigError


async def open_alerts(connection: Connection, kind: str, details: Mapping[str, str]) -> None:
    """One open alert for each subject; a later reason replaces the one before."""
    await connection.execute(
        "INSERT INTO alerts (kind, subject, detail) "
        "SELECT %s, subject, detail FROM unnest(%s::text[], %s::text[]) AS a(subject, detail) ORDER BY subject "
        "ON CONFLICT (kind, subject) WHERE closed_at IS NULL DO UPDATE SET detail = excluded.detail "
        "WHERE alerts.detail <> excluded.detail",
        (kind, list(details), list(details.values())),
    )


async def list_alerts(connection: Connection, *, with_closed: bool = False, limit: int = 200) -> Rows:
    """Alerts, the newest first."""
    return await rows_of(
        connection,
        "SELECT id, kind, subject, detail, opened_at, acknowledged_at, acknowledged_by, closed_at FROM alerts "
        "WHERE closed_at IS NULL OR %(closed)s ORDER BY id DESC LIMIT %(limit)s",
        {"closed": with_closed, "limit": limit},
    )


async def acknowledge(connection: Connection, ids: Sequence[int], who: str) -> Rows:
    """Note that somebody knows; the alerts stay open. Returns them. Raises `ConfigError` for one that is not open."""
    return await _change(
        connection,
        ids,
        who,
        "alert.ack",
        "acknowledged_at = coalesce(acknowledged_at, now()), acknowledged_by = %(who)s",
    )


async def close(connection: Connection, ids: Sequence[int], who: str) -> Rows:
    """Close alerts; one whose cause lasts is raised again. Returns them. Raises `ConfigError` where one is not open."""
    return await _change(connection, ids, who, "alert.close", "closed_at = now()")


async def _change(connection: Connection, ids: Sequence[int], who: str, what: str, change: str) -> Rows:
    async with connection.transaction():
        await connection.execute(
            "SELECT FROM alerts WHERE id = ANY(%s) ORDER BY kind, subject FOR UPDATE", (list(ids),)
        )
        rows = await rows_of(
            connection,
            f"UPDATE alerts SET {change} WHERE id = ANY(%(ids)s) AND closed_at IS NULL "  # noqa: S608 - ours
            "RETURNING id, kind, subject, detail, opened_at, acknowledged_at, acknowledged_by, closed_at",
            {"ids": list(ids), "who": who},
        )
        if missing := sorted(set(ids) - {row["id"] for row in rows}):
            raise ConfigError(
                f"no open alert {', '.join(map(str, missing))}", hint="`wardlink cloud alerts list` shows them"
            )
        for row in rows:
            await record_act(connection, what, id=row["id"], kind=row["kind"], subject=row["subject"], by=who)
    return rows
