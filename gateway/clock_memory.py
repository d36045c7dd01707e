"""`clock.json` in the state folder: what is known of the time of this boot and of those before it, over restarts.

Durable: blocks that wait for their time can be put right after a crash with the same result. Knows no clock.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Literal

import msgspec

from gateway.anchor import Anchor, Source
from gateway.errors import UnavailableError
from gateway.spool.disk import sync_folder

log = logging.getLogger(__name__)

FILE_NAME = "clock.json"
BYTES_MAX = 1 << 20
BOOTS_MAX = 64
"""Boots remembered: blocks that wait for a time longer than that belong to a machine that starts and never runs."""
PUT_RIGHT_MAX = 64
"""Corrections remembered of one boot."""
HINT = "check owner and free space of the state folder"


class BootTime(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one boot. Offsets are UTC minus boot time, ns; instants `…_at_ns` are boot time."""

    boot: str
    after_ns: int
    """UTC that had passed when it began."""
    stated_ns: int
    """The offset that was stated first."""
    seen_at_ns: int
    """Its newest instant that a gateway ran in, as far as was written down."""
    offset_ns: int = 0
    error_ns: int = 0
    known_at_ns: int = 0
    source: Source = Source.NONE
    """`NONE`: nobody told its time; then the three before mean nothing."""
    put_right: list[tuple[int, int]] = []
    """Offsets that blocks were held back with, and what takes their place."""

    @property
    def anchor(self) -> Anchor | None:
        """Its time, if anybody told it."""
        if self.source is Source.NONE:
            return None
        return Anchor(self.offset_ns, self.error_ns, self.known_at_ns, self.source)


class ClockMemory(msgspec.Struct, frozen=True, kw_only=True):
    """All of `clock.json`."""

    v: Literal[1] = 1
    passed_ns: int = 0
    """UTC that has certainly passed: a clock that says less is wrong."""
    sent_through_ns: int = 0
    """Newest UTC that blocks went out with, before others were held back."""
    boots: list[BootTime] = []
    """Oldest first; this one is the last."""

    def of(self, boot: str) -> BootTime | None:
        """What is known of a boot."""
        return next((known for known in self.boots if known.boot == boot), None)


def read(folder: Path) -> ClockMemory:
    """What was written last; nothing where there is no sound file. Raises `UnavailableError`. Blocks."""
    file = folder / FILE_NAME
    try:
        with file.open("rb") as opened:
            raw = opened.read(BYTES_MAX + 1)
    except FileNotFoundError:
        return ClockMemory()
    except OSError as error:
        raise UnavailableError(f"{file} cannot be read: {error.strerror}", hint=HINT) from None
    try:
        return msgspec.json.decode(raw, type=ClockMemory)
    except (msgspec.DecodeError, RecursionError) as error:
        log.error("%s is damaged, what it knew is lost: %s", file, error)
        return ClockMemory()


def write(folder: Path, memory: ClockMemory) -> None:
    """Replace the file in one durable step. Raises `UnavailableError`. Blocks."""
    file = folder / FILE_NAME
    new = folder / f".{FILE_NAME}.new"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(msgspec.json.encode(memory))
            opened.flush()
            os.fsync(descriptor)
        new.replace(file)
        sync_folder(folder)
    except OSError as error:
        raise UnavailableError(f"{file} cannot be written: {error.strerror}", hint=HINT) from None
