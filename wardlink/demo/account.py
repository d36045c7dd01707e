"""The books of the chain at its end: what each side says, asked of the real stores."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field

from cloud_sync.registry.admin import rows_of
from cloud_sync.registry.database import Database
from gateway.samples import LOSS, NS_PER_S
from gateway.spool.sqlite_store import SqliteStore
from gateway.spool.store import StreamKey, Tally
from wardlink.demo.chain import BUCKET, Chain

WINDOW_NS = 60 * NS_PER_S
"""Points are read back a minute at a time, so that a long demo fits into memory."""
SETTLE_STARTS_MAX = 3
SETTLE_S = 2.0
"""For a gateway to connect and send what it has, before it is asked to stop again."""

_COMMITTED = """
SELECT d.serial, t.code AS signal, d.id AS device_id, sum(s.point_count)::bigint AS points
FROM signal_streams s JOIN devices d ON d.id = s.device_id JOIN signal_types t ON t.id = s.signal_type_id
GROUP BY 1, 2, 3
"""
_PARKED = (
    "SELECT device_serial AS serial, signal, sum(sample_count)::bigint AS samples FROM parked_messages GROUP BY 1, 2"
)
_LETTERS = "SELECT count(*) AS letters FROM dead_letters"


@dataclass(slots=True)
class StreamBooks:
    """One signal of one device, as the gateway, the registry and the time-series store count it."""

    produced: int = 0
    """Samples that the gateway accepted."""
    lost: int = 0
    committed: int = 0
    """Samples that the registry counted as stored."""
    parked: int = 0
    points: int = 0
    """Points read back from InfluxDB."""
    duplicates: int = 0
    """Points that say the same instant of the same stream a second time."""

    def settled(self) -> bool:
        """Whether every sample is where it should be, exactly once."""
        return self.produced == self.committed + self.parked and self.committed == self.points and not self.duplicates


@dataclass(slots=True)
class Books:
    """All streams."""

    streams: dict[StreamKey, StreamBooks] = field(default_factory=dict)
    dead_letters: int = 0

    def of(self, device: str, signal: str) -> StreamBooks:
        """The books of one stream, opened when first asked for."""
        return self.streams.setdefault((device, signal), StreamBooks())

    @property
    def duplicates(self) -> int:
        return sum(stream.duplicates for stream in self.streams.values())


def outbox_tallies(chain: Chain) -> tuple[dict[StreamKey, Tally], int]:
    """What the gateway accepted and lost by stream, and how many blocks wait, from its outbox; it may be running."""
    store = SqliteStore(chain.gateway.outbox, read_only=True)
    store.open()
    try:
        return dict(store.tallies()), store.holding().rows
    finally:
        store.close()


async def close_books(chain: Chain) -> Books:
    """Ask all three. The servers must run; the gateway and the bridge need not."""
    books = Books()
    tallies, _ = await asyncio.to_thread(outbox_tallies, chain)
    for (device, signal), tally in tallies.items():
        if signal != LOSS:
            stream = books.of(device, signal)
            stream.produced, stream.lost = tally.accepted, tally.lost
    async with Database(chain.conninfo) as database, database.connection() as connection:
        committed = await rows_of(connection, _COMMITTED)
        for row in await rows_of(connection, _PARKED):
            if row["signal"] != LOSS:
                books.of(row["serial"], row["signal"]).parked = row["samples"]
        books.dead_letters = (await rows_of(connection, _LETTERS))[0]["letters"]
    for row in committed:
        stream = books.of(row["serial"], row["signal"])
        stream.committed = row["points"]
        stream.points, stream.duplicates = await asyncio.to_thread(
            _read_back, chain, row["signal"], str(row["device_id"])
        )
    return books


async def settle(chain: Chain) -> Books:
    """Stop the gateway, which sends what it still has, and close the books.

    What is left because its receipt did not come in time is sent after another start; the devices are stopped for
    that, so that nothing new comes.
    """
    await asyncio.to_thread(chain.gateway.stop)
    for _ in range(SETTLE_STARTS_MAX):
        _, waiting = await asyncio.to_thread(outbox_tallies, chain)
        if not waiting:
            break
        await asyncio.to_thread(chain.devices.stop)
        await asyncio.to_thread(chain.gateway.start)
        await asyncio.sleep(SETTLE_S)
        await asyncio.to_thread(chain.gateway.stop)
    return await close_books(chain)


def _read_back(chain: Chain, measurement: str, device_id: str) -> tuple[int, int]:
    """Points of a device in a measurement, and how many of them repeat an instant."""
    influx = chain.servers.influxdb
    where = f"FROM \"{measurement}\" WHERE device_id = '{device_id}'"
    ends = []
    for order in ("ASC", "DESC"):
        series = influx.query(f"SELECT * {where} ORDER BY time {order} LIMIT 1", BUCKET)
        if not series:
            return 0, 0
        ends.append(int(series[0]["values"][0][0]))
    points, repeated = 0, 0
    for start in range(ends[0], ends[1] + 1, WINDOW_NS):
        window = f"{where} AND time >= {start} AND time < {start + WINDOW_NS}"
        times: Counter[int] = Counter()
        for series_found in influx.query(f"SELECT * {window}", BUCKET):
            times.update(int(values[0]) for values in series_found["values"])
        points += times.total()
        repeated += times.total() - len(times)
    return points, repeated
