"""The books of each signal of a device: received, stored, parked, lost; and whether the ledger agrees with itself.

received = samples of the blocks that are here; produced = received + lost. Of what is received, samples without any
value and lines that the store refused are no points.
"""

from __future__ import annotations

from cloud_sync.registry.admin import Rows, rows_of
from cloud_sync.registry.database import Connection
from gateway.samples import LOSS

_BOOKS = """
    WITH heard AS (
        SELECT device_serial AS device, signal, sum(sample_count)::bigint AS received,
               sum(missing)::bigint AS missing_blocks,
               bool_and(missing = missing_of(committed, lost, known_through) AND NOT lost && committed) AS is_consistent
          FROM ledger WHERE signal <> %(loss)s GROUP BY 1, 2
    ), stored AS (
        SELECT d.serial AS device, t.code AS signal, sum(s.point_count)::bigint AS stored
          FROM signal_streams s JOIN devices d ON d.id = s.device_id JOIN signal_types t ON t.id = s.signal_type_id
         GROUP BY 1, 2
    ), parked AS (
        SELECT device_serial AS device, signal, sum(sample_count)::bigint AS parked FROM parked_messages GROUP BY 1, 2
    ), gaps AS (
        SELECT device_serial AS device, signal,
               sum(sample_count) FILTER (WHERE outcome = 'lost')::bigint AS lost,
               sum(sample_count) FILTER (WHERE outcome = 'elsewhere')::bigint AS elsewhere,
               sum(sample_count) FILTER (WHERE outcome IS NULL)::bigint AS open
          FROM stream_gaps WHERE signal <> %(loss)s GROUP BY 1, 2
    )
    SELECT device, signal, coalesce(received, 0) + coalesce(lost, 0) AS produced, coalesce(received, 0) AS received,
           coalesce(stored, 0) AS stored, coalesce(parked, 0) AS parked, coalesce(lost, 0) AS lost,
           coalesce(elsewhere, 0) AS elsewhere, coalesce(open, 0) AS open,
           coalesce(missing_blocks, 0) AS missing_blocks, coalesce(is_consistent, true) AS is_consistent
      FROM heard FULL JOIN stored USING (device, signal) FULL JOIN parked USING (device, signal)
           FULL JOIN gaps USING (device, signal)
     WHERE %(device)s::text IS NULL OR device = %(device)s
     ORDER BY 1, 2 LIMIT %(limit)s
"""


async def books(connection: Connection, *, device: str | None = None, limit: int = 200) -> Rows:
    """One row for each signal of a device; `is_consistent`: no sequence is counted twice or forgotten."""
    return await rows_of(connection, _BOOKS, {"device": device, "limit": limit, "loss": LOSS})


async def inconsistent(connection: Connection) -> list[str]:
    """Ledger rows that contradict themselves: a fault of the program or of whoever changed them by hand."""
    cursor = await connection.execute(
        "SELECT device_serial || ' ' || signal || ' ' || epoch FROM ledger "
        "WHERE missing <> missing_of(committed, lost, known_through) OR lost && committed ORDER BY 1"
    )
    return [str(row[0]) for row in await cursor.fetchall()]
