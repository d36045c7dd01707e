"""The disk under an outbox: folders that survive a power cut, free space, and a reserve for when there is none."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from pathlib import Path

log = logging.getLogger(__name__)

SUFFIX = ".reserve"
RENEWED_EVERY_S = 60.0
"""Between two attempts to set a reserve up again."""


def sync_folder(folder: Path) -> None:
    """Make what was made, renamed or removed in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, so that they survive a power cut. Raises `OSError`."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for place in missing:
        sync_folder(place.parent)


def free_bytes(folder: Path) -> int:
    """What this user may still write there. Raises `OSError`."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


class Reserve:
    """A file that is there to be deleted: on a full disk even forgetting rows needs room for a log."""

    def __init__(self, database: Path, size: int) -> None:
        self.path = database.with_name(database.name + SUFFIX)
        self._size = size
        self._tried_s = 0.0

    @property
    def is_there(self) -> bool:
        return self.path.exists()

    def make(self, floor: int) -> None:
        """Set it up, unless free space would fall below the floor or it cannot be: a reserve is no necessity."""
        try:
            if not self._size or self.is_there or free_bytes(self.path.parent) < floor + 2 * self._size:
                return
            descriptor = os.open(self.path, os.O_CREAT | os.O_WRONLY, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, self._size)
            finally:
                os.close(descriptor)
        except OSError as error:
            log.warning("no reserve of disk space: %s", error)
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)

    def renew(self, floor: int) -> None:
        """Set it up again, now and then."""
        if time.monotonic() - self._tried_s > RENEWED_EVERY_S:
            self._tried_s = time.monotonic()
            self.make(floor)

    def release(self) -> bool:
        """Give its room back. False where it was gone already."""
        try:
            self.path.unlink()
        except OSError:
            return False
        log.warning("the disk is full: the outbox's reserve of %d bytes is released", self._size)
        return True
