"""The rig itself: the disk does what a disk does, its faults are felt, and a cut forgets what was not synced."""

from __future__ import annotations

import errno
import os
import random
import threading
from pathlib import Path, PurePosixPath

import pytest

from tests.faults.cuts import Medium, Mode, cuts, without_folder_syncs
from tests.faults.mount import MountedDisk
from tests.faults.operations import FailedSync, Mark, Operation, Sync, SyncFolder, Write

pytestmark = pytest.mark.faults

FILE = PurePosixPath("file")


def write(path: Path, data: bytes, offset: int = 0, *, sync: bool = False) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        assert os.pwrite(descriptor, data, offset) == len(data)
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def left(record: list[Operation], mode: Mode, seed: int = 0) -> dict[PurePosixPath, bytes]:
    """The files after a cut at the end of a record."""
    medium = Medium(random.Random(seed))
    for operation in record:
        medium.apply(operation)
    return dict(medium.cut(mode, -1).files)


def test_it_keeps_files_as_the_systems_own_disk_does(disk: MountedDisk, scratch: Path) -> None:
    for folder in (disk.path, scratch):
        draw = random.Random(3)
        (folder / "inner").mkdir()
        for _ in range(200):
            path = folder / draw.choice(["a", "b", "inner/c"])
            match draw.randrange(5):
                case 0 if path.exists():
                    path.unlink()
                case 1 if path.exists():
                    path.rename(folder / draw.choice(["a", "b", "inner/c"]))
                case 2 if path.exists():
                    os.truncate(path, draw.randrange(9000))
                case _:
                    write(path, draw.randbytes(draw.randrange(1, 6000)), draw.randrange(9000))
    assert contents(disk.path) == contents(scratch) == disk.files()


def test_a_record_replayed_in_full_is_the_disk(disk: MountedDisk) -> None:
    write(disk.path / "old", b"x" * 5000, sync=True)
    write(disk.path / "old", b"y" * 700, 4900)
    (disk.path / "old").rename(disk.path / "file")
    (disk.path / "inner").mkdir()
    write(disk.path / "inner" / "more", b"z")
    write(disk.path / "gone", b"z")
    (disk.path / "gone").unlink()
    files = disk.files()
    syncs = [*(Sync(number) for number in range(2, 9)), *(SyncFolder(number) for number in range(1, 9))]
    assert {str(path): data for path, data in left(disk.take_record() + syncs, Mode.NONE).items()} == files


def test_a_cut_forgets_what_was_not_synced(disk: MountedDisk) -> None:
    write(disk.path / "file", b"old", sync=True)
    without_a_name = disk.take_record()
    assert left(without_a_name, Mode.NONE) == {}
    sync_folder(disk.path)
    write(disk.path / "file", b"new")
    record = without_a_name + disk.take_record()
    assert left(record, Mode.NONE) == {FILE: b"old"}
    assert left(without_folder_syncs(record), Mode.NONE) == {}
    for mode in (Mode.PREFIX, Mode.SUBSET, Mode.TORN):
        assert {left(record, mode, seed)[FILE] for seed in range(20)} == {b"old", b"new"}


def test_a_torn_write_survives_by_sectors(disk: MountedDisk) -> None:
    write(disk.path / "file", bytes(2048), sync=True)
    sync_folder(disk.path)
    write(disk.path / "file", b"\xff" * 1024, 256)
    record = disk.take_record()
    seen = {left(record, Mode.TORN, seed)[FILE] for seed in range(100)}
    parts = (slice(256, 512), slice(512, 1024), slice(1024, 1280))
    assert {tuple(data[part][0] for part in parts) for data in seen} == {
        (a, b, c) for a in (0, 255) for b in (0, 255) for c in (0, 255)
    }
    assert all(len(set(data[part])) == 1 for data in seen for part in parts)


def test_a_rename_survives_whole_or_not_at_all(disk: MountedDisk) -> None:
    write(disk.path / "file", b"old", sync=True)
    sync_folder(disk.path)
    write(disk.path / "new", b"new", sync=True)
    (disk.path / "new").rename(disk.path / "file")
    record = disk.take_record()
    found = {tuple(sorted(left(record, Mode.SUBSET, seed).items())) for seed in range(50)}
    assert found == {((FILE, b"old"),), ((FILE, b"new"),), ((FILE, b"old"), (PurePosixPath("new"), b"new"))}


def test_what_an_fsync_failed_for_is_not_written_by_the_next() -> None:
    record: list[Operation] = [Write(2, 0, b"a"), FailedSync(2), Sync(2)]
    found = set()
    for seed in range(20):
        medium = Medium(random.Random(seed))
        for operation in record:
            medium.apply(operation)
        found.add(bytes(medium._files[2].durable))
    assert found == {b"", b"a"}


def test_every_operation_is_cut_and_marks_are_kept() -> None:
    record: list[Operation] = [Write(2, 0, b"a"), Mark(0), Sync(2), Mark(1)]
    made = list(cuts(record, [Mode.NONE, Mode.TORN], seed=1))
    assert [(cut.place, cut.mark) for cut in made] == [(1, -1)] * 2 + [(2, 0)] * 2 + [(3, 0)] * 2 + [(4, 1)] * 2


def test_a_full_disk_takes_nothing_new(disk: MountedDisk) -> None:
    write(disk.path / "file", bytes(4096))
    with disk.fault(blocks_max=2):
        assert os.statvfs(disk.path).f_bavail == 1
        write(disk.path / "file", b"over", 0)
        with pytest.raises(OSError, match="No space") as raised:
            write(disk.path / "file", bytes(8192), 4096)
        assert raised.value.errno == errno.ENOSPC
    write(disk.path / "file", bytes(8192), 4096)


def test_writes_and_syncs_fail_when_told_to(disk: MountedDisk) -> None:
    with disk.fault(write_error=errno.EIO, failing_name="-wal"):
        write(disk.path / "file", b"a")
        with pytest.raises(OSError, match="Input/output"):
            write(disk.path / "file-wal", b"a")
    with disk.fault(sync_error=errno.EIO), pytest.raises(OSError, match="Input/output"):
        write(disk.path / "file", b"b", sync=True)
    assert any(isinstance(operation, FailedSync) for operation in disk.take_record())
    with disk.fault(is_read_only=True), pytest.raises(OSError, match="Read-only") as raised:
        write(disk.path / "file", b"c")
    assert raised.value.errno == errno.EROFS
    assert (disk.path / "file").read_bytes() == b"b"


def test_an_fsync_is_held_until_it_is_let_go(disk: MountedDisk) -> None:
    with disk.stalled_sync():
        thread = threading.Thread(target=write, args=(disk.path / "file", b"a"), kwargs={"sync": True})
        thread.start()
        disk.await_stalled()
        assert thread.is_alive()
        assert (disk.path / "file").read_bytes() == b"a"
    thread.join()


def test_a_flipped_bit_is_read_by_who_has_the_file_open(disk: MountedDisk) -> None:
    write(disk.path / "file", b"\x00\x00")
    with (disk.path / "file").open("r+b", buffering=0) as file:
        assert file.read() == b"\x00\x00"
        disk.ask("flip", "file", 9)
        file.seek(0)
        assert file.read() == b"\x00\x02"
