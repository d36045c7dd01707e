"""Encryption at rest: what lies on the disk tells nothing of the samples, and no key but the right one opens it."""

from __future__ import annotations

import base64
import dataclasses
import sys
from typing import Any

import pytest

from gateway.errors import ConfigError
from gateway.spool import sealed
from gateway.spool.outbox import Limits, Outbox
from gateway.spool.sealed import SealedStore, key_of
from gateway.spool.sqlite_store import SqliteStore
from gateway.spool.store import DamagedRow

ALL = 10**9
OTHER_KEY = bytes(range(1, 33))


def test_nothing_of_a_payload_is_on_the_disk(sealed_place: Any, make: Any) -> None:
    rows = make.rows(0, 20, size=700)
    store = sealed_place.open()
    store.append(rows)
    assert [item.row for item in store.fetch(0, ALL, ALL)] == rows
    store.close()
    on_disk = b"".join(file.read_bytes() for file in sealed_place.path.parent.iterdir() if file.is_file())
    assert b"\xff" * 20 not in on_disk
    assert rows[0].payload.data[:20] not in on_disk


def test_control_without_sealing_the_payload_is_there(sqlite_place: Any, make: Any) -> None:
    row = make.row(0, size=700)
    store = sqlite_place.open()
    store.append([row])
    store.close()
    assert row.payload.data[:20] in sqlite_place.path.read_bytes()


def test_equal_payloads_are_not_equal_on_the_disk(sealed_place: Any, make: Any) -> None:
    store = sealed_place.open()
    assert len({store._sealed(make.row(0)).payload.data for _ in range(50)}) == 50


@pytest.mark.parametrize("key", [OTHER_KEY, None])
def test_rows_of_another_key_are_kept_and_reported_and_the_others_go_on(
    sealed_place: Any, make: Any, key: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    rows = make.rows(0, 3)
    with_first = sealed_place.open()
    with_first.append([*rows, make.row(4, boot="boot")])
    with_first.close()
    inner = SqliteStore(sealed_place.path)
    other = SealedStore(inner, key)
    other.open()
    new = make.rows(5, 8)
    other.append(new)
    assert [item.row for item in other.fetch(0, ALL, 2)] == new[:2]
    assert [item.row for item in other.fetch(0, ALL, ALL)] == new
    assert other.unstamped(ALL) == []
    assert len(other.unopened) == 5
    assert other.holding().rows == 9
    other.close()
    assert "outbox: 5 records so far are sealed with another key" in caplog.text
    first = sealed_place.open()
    assert [item.row for item in first.fetch(0, ALL, ALL)][:4] == rows


async def test_an_outbox_with_a_wrong_key_gives_nothing_up(sealed_place: Any, make: Any) -> None:
    outbox = Outbox(sealed_place.store(), "gw", Limits(60.0, 10**6))
    await outbox.open()
    outbox.append(make.block())
    await outbox.close()
    outbox = Outbox(SealedStore(SqliteStore(sealed_place.path), OTHER_KEY), "gw", Limits(60.0, 10**6))
    await outbox.open()
    assert await outbox.fetch(0, ALL, ALL) == []
    await outbox.commit()
    assert outbox.holding.rows == 1
    assert (await outbox.tallies())["DEV", "eeg"].lost == 0
    await outbox.close()


@pytest.mark.parametrize("change", ["device", "sequence", "first_ns", "samples", "content", "nonce"])
def test_what_was_changed_by_somebody_without_the_key_is_damaged(sealed_place: Any, make: Any, change: str) -> None:
    """Somebody who knows the format can make the checksum fit."""
    store = sealed_place.open()
    row = store._sealed(make.row(0))
    data = bytearray(row.payload.data)
    if change in {"content", "nonce"}:
        data[-1 if change == "content" else sealed.KEY_ID_BYTES] ^= 1
        row = dataclasses.replace(row, payload=dataclasses.replace(row.payload, data=bytes(data)))
    else:
        row = dataclasses.replace(row, **{change: "X" if change == "device" else 7})
    store.inner.append([row])
    (found,) = store.fetch(0, ALL, ALL)
    assert isinstance(found, DamagedRow)


def test_what_was_written_before_encryption_was_turned_on_is_read(sealed_place: Any, make: Any) -> None:
    plain = SqliteStore(sealed_place.path)
    plain.open()
    rows = make.rows(0, 5)
    plain.append(rows[:3])
    plain.close()
    store = sealed_place.open()
    store.append(rows[3:])
    assert [item.row for item in store.fetch(0, ALL, ALL)] == rows
    store.close()
    off = SealedStore(SqliteStore(sealed_place.path), sealed_place.key, seals=False)
    off.open()
    off.append([make.row(9)])
    assert len(off.fetch(0, ALL, ALL)) == 7
    off.close()


@pytest.mark.parametrize(
    "text", [OTHER_KEY.hex(), OTHER_KEY.hex().upper() + "\n", base64.b64encode(OTHER_KEY).decode()]
)
def test_a_key_is_hex_or_base64(text: str) -> None:
    assert key_of(text) == OTHER_KEY


@pytest.mark.parametrize("text", ["", "secret", "00" * 31, "00" * 33, base64.b64encode(b"short").decode(), "zz" * 32])
def test_what_is_no_key_is_the_operators_and_not_repeated(text: str) -> None:
    with pytest.raises(ConfigError, match="spool-key") as raised:
        key_of(text)
    assert "openssl rand" in raised.value.hint
    assert not text or text not in str(raised.value)


def test_without_the_library_it_is_a_clear_error(sealed_place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    with pytest.raises(ConfigError, match="cryptography") as raised:
        sealed_place.store()
    assert "wardlink[encryption]" in raised.value.hint
