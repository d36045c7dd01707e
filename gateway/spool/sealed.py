"""Encryption at rest: what a store keeps is sealed with AES-256-GCM, record by record. A decorator over any store.

The payload is sealed; identity, times and counts stay readable, since the store works with them, and are authenticated.
Rows that this key does not open are kept and reported, never given up for that. Only this file imports cryptography.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import logging
import secrets
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from gateway.errors import ConfigError
from gateway.spool.store import (
    DamagedRow,
    EpochKey,
    Held,
    Holding,
    Place,
    Range,
    Row,
    Store,
    StoredRow,
    StreamKey,
    Suspect,
    Tally,
)
from gateway.wire.codec import PAYLOAD_BYTES_MAX, Payload

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

log = logging.getLogger(__name__)

CREDENTIAL = "spool-key"
KEY_BYTES = 32
KEY_ID_BYTES = 8
"""Of the key's SHA-256: tells which key a record needs, and nothing else of it."""
NONCE_BYTES = 12
"""Random: with one key for 2^32 records, which is 68 years of two records a second (NIST SP 800-38D, 8.3)."""
MARK = "sealed:"
"""Before the content type of a sealed record."""
KEY_HINT = "32 bytes in hex or base64, as `openssl rand -hex 32` makes them"


def key_of(text: str) -> bytes:
    """The key in a credential. Raises `ConfigError`, which does not repeat it."""
    compact = "".join(text.split())
    for decode in (bytes.fromhex, _base64):
        try:
            key = decode(compact)
        except (ValueError, binascii.Error):
            continue
        if len(key) == KEY_BYTES:
            return key
    raise ConfigError(f"credential {CREDENTIAL!r} is no key", hint=f"expected {KEY_HINT}")


def _base64(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


class SealedStore:
    """A `Store` that seals what it gives to another one.

    Without a key nothing is sealed, and what is sealed stays where it is. Raises `ConfigError` where the library that
    does it is not installed.
    """

    def __init__(self, inner: Store, key: bytes | None, *, seals: bool = True) -> None:
        self.inner = inner
        self._seals = seals and key is not None
        self._key_id = hashlib.sha256(key).digest()[:KEY_ID_BYTES] if key else b""
        self._cipher = _cipher(key) if key else None
        self.unopened: set[int] = set()
        """Ids of rows that were met and that this key does not open."""

    @property
    def epoch(self) -> str:
        return self.inner.epoch

    def open(self) -> None:
        self.inner.open()

    def append(self, rows: Sequence[Row]) -> None:
        self.inner.append([self._sealed(row) for row in rows])

    def replace(
        self,
        ids: Sequence[int],
        rows: Sequence[Row],
        receipted: Sequence[Place] = (),
        settled: Sequence[Suspect] = (),
    ) -> None:
        self.inner.replace(ids, [self._sealed(row) for row in rows], receipted, settled)

    def fetch(self, after: int, through: int, limit: int) -> list[StoredRow | DamagedRow]:
        rows: list[StoredRow | DamagedRow] = []
        while (wanted := limit - len(rows)) > 0:
            found = self.inner.fetch(after, through, wanted)
            rows += self.opened(found)
            if len(found) < wanted:
                break
            last = found[-1]
            after = last.held.id
        return rows

    def unstamped(self, limit: int) -> list[StoredRow | DamagedRow]:
        # A few more than wanted, so that some that stay closed do not hide the others.
        return self.opened(self.inner.unstamped(limit + len(self.unopened)))[:limit]

    def find(self, device: str, signal: str, epoch: str, ranges: Sequence[Range]) -> list[Place]:
        return self.inner.find(device, signal, epoch, ranges)

    def suspects(self) -> list[Suspect]:
        return self.inner.suspects()

    def oldest(self, signals: Sequence[str], limit: int) -> list[Held]:
        return self.inner.oldest(signals, limit)

    def held(self) -> Mapping[EpochKey, Range]:
        return self.inner.held()

    def tallies(self) -> Mapping[StreamKey, Tally]:
        return self.inner.tallies()

    def holding(self) -> Holding:
        return self.inner.holding()

    def room(self) -> int:
        return self.inner.room()

    def close(self) -> None:
        self.inner.close()

    def _sealed(self, row: Row) -> Row:
        if not self._seals or self._cipher is None:
            return row
        nonce = secrets.token_bytes(NONCE_BYTES)
        plain = zlib.compress(row.payload.data, 1)
        kind = MARK + row.payload.content_type
        data = self._key_id + nonce + self._cipher.encrypt(nonce, plain, _about(row, row.payload.content_type))
        return dataclasses.replace(row, payload=Payload(kind, row.payload.schema, data))

    def opened(self, found: Sequence[StoredRow | DamagedRow]) -> list[StoredRow | DamagedRow]:
        """Rows as they were before they were sealed, without those that this key does not open."""
        rows: list[StoredRow | DamagedRow] = []
        closed = 0
        for item in found:
            if isinstance(item, DamagedRow) or not item.row.payload.content_type.startswith(MARK):
                rows.append(item)
            elif self._cipher is None or not item.row.payload.data.startswith(self._key_id):
                closed += item.id not in self.unopened
                self.unopened.add(item.id)
            else:
                rows.append(self._open_row(item))
        if closed:
            count = len(self.unopened)
            log.error("outbox: %d records so far are sealed with another key: they are kept, and cannot be sent", count)
        return rows

    def _open_row(self, item: StoredRow) -> StoredRow | DamagedRow:
        from cryptography.exceptions import InvalidTag  # noqa: PLC0415 - an extra

        assert self._cipher is not None
        row, sealed = item.row, item.row.payload.data[KEY_ID_BYTES:]
        kind = row.payload.content_type.removeprefix(MARK)
        try:
            plain = self._cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], _about(row, kind))
            data = zlib.decompressobj().decompress(plain, PAYLOAD_BYTES_MAX)
        except (InvalidTag, ValueError, zlib.error):
            return DamagedRow(item.held)
        return StoredRow(item.id, dataclasses.replace(row, payload=Payload(kind, row.payload.schema, data)))


def _cipher(key: bytes) -> AESGCM:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415 - an extra
    except ImportError:
        raise ConfigError(
            "spool.encrypt: the Python package cryptography is not installed", hint="pip install 'wardlink[encryption]'"
        ) from None
    return AESGCM(key)


def _about(row: Row, content_type: str) -> bytes:
    """Everything of a row but its payload: it cannot be sealed, and must not be changed either."""
    parts = (*row.identity, row.first_ns, row.last_ns, row.samples, row.lost, row.lost_signal, row.boot, row.offset_ns)
    return "\0".join(str(part) for part in (*parts, content_type, row.payload.schema)).encode()
