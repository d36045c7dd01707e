"""Places where an outbox can be kept: each opens stores on the same data, and can damage it."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from gateway.samples import ClockStamp, ClockState, LossCause, LossRecord, SampleBlock
from gateway.spool.redis_store import RedisStore
from gateway.spool.sealed import SealedStore
from gateway.spool.sqlite_store import SqliteStore
from gateway.spool.store import Row, Store
from gateway.wire.codec import Payload

GATEWAY = "gw-spool"
EPOCH = "0123456789abcdef"
"""Of rows that are made by hand."""
NOON_NS = 1_714_564_800_000_000_000
MS = 1_000_000
CLOCK = ClockStamp(ClockState.SYNCED, 1000)

_numbers = itertools.count(1)


class Place(ABC):
    """Where an outbox's data is."""

    gateway = GATEWAY

    def __init__(self) -> None:
        self._opened: list[Store] = []

    @abstractmethod
    def store(self, *, read_only: bool = False) -> Store:
        """A store on this place, not yet open."""

    @abstractmethod
    def damage(self, number: int, column: str = "payload", value: object = b"not what was stored") -> None:
        """Change one column of the row with this id behind the store's back."""

    def size_of(self, rows: Sequence[Row]) -> int:
        """Bytes that these rows take of the quota."""
        return sum(row.size for row in rows)

    @abstractmethod
    def back_up(self) -> None:
        """Keep a copy of the data; no writer may have it open."""

    @abstractmethod
    def restore(self) -> None:
        """Put the copy in the place of the data; no writer may have it open."""

    def open(self, *, read_only: bool = False) -> Store:
        """A store on this place, open; closed at the end of the test at the latest."""
        store = self.store(read_only=read_only)
        store.open()
        self._opened.append(store)
        return store

    def close(self) -> None:
        for store in self._opened:
            store.close()


class SqlitePlace(Place):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def store(self, *, read_only: bool = False) -> SqliteStore:
        return SqliteStore(self.path, read_only=read_only)

    def back_up(self) -> None:
        copy = self._copy()
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        for file in self.path.parent.glob(f"{self.path.name}*"):
            shutil.copy(file, copy)

    def restore(self) -> None:
        for file in self.path.parent.glob(f"{self.path.name}*"):
            file.unlink()
        shutil.copytree(self._copy(), self.path.parent, dirs_exist_ok=True)

    def _copy(self) -> Path:
        return self.path.parent / f"copy-of-{self.path.name}"

    def damage(self, number: int, column: str = "payload", value: object = b"not what was stored") -> None:
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as connection:
            changed = connection.execute(f"UPDATE block SET {column} = ? WHERE id = ?", (value, number))
            assert changed.rowcount == 1


class SealedPlace(SqlitePlace):
    """An outbox in SQLite whose records are sealed."""

    key = bytes(range(32))

    def store(self, *, read_only: bool = False) -> Any:
        return SealedStore(super().store(read_only=read_only), self.key)

    def size_of(self, rows: Sequence[Row]) -> int:
        return sum(self.store()._sealed(row).size for row in rows)


class RedisPlace(Place):
    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self.client: Any = redis.Redis.from_url(url)
        self._copy: dict[bytes, bytes] = {}

    def store(self, *, read_only: bool = False) -> RedisStore:
        return RedisStore(self.url, GATEWAY, read_only=read_only)

    def back_up(self) -> None:
        self._copy = {key: self.client.dump(key) for key in self.client.scan_iter()}

    def restore(self) -> None:
        self.client.flushdb()
        for key, value in self._copy.items():
            self.client.restore(key, 0, value)

    def damage(self, number: int, column: str = "payload", value: object = b"not what was stored") -> None:
        """A stream's entries cannot be changed: write the whole stream anew."""
        key = f"wardlink:outbox:{GATEWAY}:blocks"
        entries = self.client.xrange(key)
        last = self.client.xinfo_stream(key)["last-generated-id"]
        assert f"{number}-1".encode() in [entry for entry, _ in entries]
        self.client.delete(key)
        for entry, fields in entries:
            changed = {column.encode(): value} if entry == f"{number}-1".encode() else {}
            self.client.xadd(key, fields | changed, id=entry)
        self.client.xsetid(key, last) if hasattr(self.client, "xsetid") else self.client.execute_command(
            "XSETID", key, last
        )

    def close(self) -> None:
        super().close()
        self.client.close()


@pytest.fixture
def sqlite_place(tmp_path: Path) -> Iterator[SqlitePlace]:
    place = SqlitePlace(tmp_path / "state" / "outbox.db")
    yield place
    place.close()


@pytest.fixture
def sealed_place(tmp_path: Path) -> Iterator[SealedPlace]:
    place = SealedPlace(tmp_path / "state" / "outbox.db")
    yield place
    place.close()


@pytest.fixture
def redis_place(redis_url: str) -> Iterator[RedisPlace]:
    place = RedisPlace(redis_url)
    yield place
    place.close()


@pytest.fixture(params=["sqlite", "redis"])
def place(request: pytest.FixtureRequest) -> Place:
    found: Place = request.getfixturevalue(f"{request.param}_place")
    return found


class Make:
    """Rows, blocks and loss records."""

    noon_ns = NOON_NS
    epoch = EPOCH

    def row(
        self,
        sequence: int,
        device: str = "DEV",
        signal: str = "eeg",
        *,
        samples: int = 10,
        lost: int = 0,
        lost_signal: str = "",
        size: int = 40,
        epoch: str = EPOCH,
        boot: str = "",
        offset_ns: int = 0,
    ) -> Row:
        first_ns = NOON_NS + sequence * 1000 * MS
        data = f"{device} {signal} {sequence} {next(_numbers)} ".encode().ljust(size, b"\xff")
        payload = Payload("application/cbor", "raw", data)
        return Row(
            device,
            signal,
            epoch,
            sequence,
            first_ns,
            first_ns + 999 * MS,
            samples,
            lost,
            lost_signal,
            payload,
            boot,
            offset_ns,
        )

    def rows(self, first: int, last: int, device: str = "DEV", signal: str = "eeg", **more: Any) -> list[Row]:
        return [self.row(sequence, device, signal, **more) for sequence in range(first, last + 1)]

    def loss_row(self, sequence: int, device: str = "DEV", lost_signal: str = "eeg", lost: int = 7, **more: Any) -> Row:
        return self.row(sequence, device, "loss", samples=0, lost=lost, lost_signal=lost_signal, **more)

    def block(self, device: str = "DEV", signal: str = "eeg", *, at: int = 0, n: int = 10) -> SampleBlock:
        """Second number `at` since noon."""
        times = NOON_NS + at * 1000 * MS + np.arange(n, dtype=np.int64) * (1000 * MS // n)
        values = np.arange(n) + at
        if signal == "brain_state":
            columns: dict[str, Any] = {"alpha": values.astype(np.float64)}
            return SampleBlock(device, signal, times, columns, CLOCK)
        if signal == "vital_signs":
            return SampleBlock(device, signal, times, {"heart_rate": values.astype(np.float64)}, CLOCK)
        return SampleBlock(device, signal, times, {"Fp1": values.astype(np.int32)}, CLOCK, scales={"Fp1": 0.5})

    def loss(self, device: str = "DEV", signal: str = "eeg", *, at: int = 0, count: int = 5) -> LossRecord:
        first_ns = NOON_NS + at * 1000 * MS
        return LossRecord(device, signal, LossCause.RADIO, first_ns, first_ns + 500 * MS, count)

    @staticmethod
    def forget(store: Store, device: str, signal: str, epoch: str, ranges: Sequence[tuple[int, int]]) -> list[int]:
        """A receipt for these sequences; gives the ids that are gone."""
        places = store.find(device, signal, epoch, ranges)
        store.replace([], [], places)
        return [place.id for place in places]


@pytest.fixture
def make() -> Make:
    return Make()
