"""`wardlink gateway spool`: an outbox that a gateway wrote, looked at, exported, and put together again."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gateway.errors import ConfigError, UnavailableError
from gateway.samples import EEG, QUALITY, VITAL_SIGNS, ClockStamp, ClockState, LossCause, LossRecord, SampleBlock
from gateway.spool.outbox import Outbox
from gateway.spool.sealed import SealedStore
from gateway.spool.sqlite_store import SqliteStore
from gateway.spool.store import Store
from wardlink import cli

NOON_NS = 1_714_564_800_000_000_000
KEY = bytes(range(32))
STAMP = ClockStamp(ClockState.SYNCED, 1000)


def write_config(folder: Path, more: str = "") -> Path:
    path = folder / "gateway.toml"
    path.write_text(f'[gateway]\nid = "gw-1"\nstate_dir = "{folder}/state"\n[mqtt]\nhost = "broker"\n[spool]\n{more}\n')
    return path


async def fill(store: Store) -> None:
    """Two blocks of heart rate, one of EEG with provisional times, and a loss."""
    outbox = Outbox(store, "gw-1")
    await outbox.open()
    for start in (0, 1):
        times = NOON_NS + start * 10**9 + np.arange(2, dtype=np.int64) * 500_000_000
        values = {"heart_rate": np.array([60.0 + start, np.nan])}
        outbox.append(SampleBlock("STRAP-1", VITAL_SIGNS, times, values, STAMP))
    counts = {"Fp1": np.array([10, -20], dtype=np.int32), QUALITY: np.array([0, 1])}
    eeg = SampleBlock("CYTON-1", EEG, np.array([5, 9]), counts, STAMP, scales={"Fp1": 0.5})
    outbox.append(eeg, "boot", 3)
    outbox.append(LossRecord("STRAP-1", VITAL_SIGNS, LossCause.RADIO, NOON_NS, NOON_NS + 5, 4))
    await outbox.close()


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    asyncio.run(fill(SqliteStore(tmp_path / "state" / "outbox.db", reserve_bytes=1 << 16)))
    return write_config(tmp_path)


def run(*words: object) -> int:
    return cli.main(["gateway", "spool", *(str(word) for word in words)])


def said(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def test_status_tells_room_reserve_and_what_was_set_aside(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = filled.parent / "state"
    (state / "outbox.db.damaged-20260101T000000.000000Z").write_bytes(b"remains")
    (state / "outbox.db.damaged-20260101T000000.000000Z-wal").write_bytes(b"of its log")
    assert run("status", "--config", filled, "--json") == 0
    found = said(capsys)
    assert (found["waiting"], found["bytes_max"], found["has_reserve"]) == (4, 4 << 30, True)
    assert found["fill_pct"] == 0.0
    assert found["free_bytes"] > found["free_bytes_min"] == 64 << 20
    assert found["damaged_files"] == [str(state / "outbox.db.damaged-20260101T000000.000000Z")]
    assert {row["signal"]: (row["blocks"], row["accepted"], row["lost"]) for row in found["streams"]} == {
        "vital_signs": (2, 4, 4),
        "eeg": (1, 2, 0),
        "loss": (1, 0, 0),
    }
    assert run("status", "--config", filled) == 0
    out = capsys.readouterr().out
    assert "reserve there" in out
    assert "set aside: " in out


def test_status_names_suspects(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (filled.parent / "state" / "outbox.db").unlink()
    store = SqliteStore(filled.parent / "state" / "outbox.db")
    store.open()
    store.close()
    assert run("status", "--config", filled, "--json") == 0
    assert sum(suspect["samples"] for suspect in said(capsys)["suspects"]) == 4 + 2 + 4
    assert run("status", "--config", filled) == 0
    assert "SUSPECT: STRAP-1 vital_signs blocks 0 to 1" in capsys.readouterr().out


def test_export_writes_what_is_held_and_changes_nothing(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    database = filled.parent / "state" / "outbox.db"
    before = database.read_bytes()
    out = filled.parent / "held.ndjson"
    assert run("export", "--config", filled, "--json", out) == 0
    assert said(capsys) == {"file": str(out), "records": 4, "samples": 6, "damaged": 0, "sealed_with_another_key": 0}
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(record["device"], record["signal"], record["sequence"]) for record in records] == [
        ("STRAP-1", "vital_signs", 0),
        ("STRAP-1", "vital_signs", 1),
        ("STRAP-1", "loss", 0),
        ("CYTON-1", "eeg", 0),
    ]
    assert records[0]["columns"] == {"heart_rate": [60.0, None]}
    assert records[0]["first"] == "2024-05-01T12:00:00.000000000Z"
    assert records[2]["lost"] == {
        "cause": "radio",
        "signal": "vital_signs",
        "samples": 4,
        "sequences": None,
        "epoch": "",
    }
    assert (records[3]["times_are_provisional"], records[3]["columns"]["Fp1"]) == (True, [5.0, -10.0])
    assert out.stat().st_mode & 0o777 == 0o600
    assert database.read_bytes() == before
    assert run("export", "--config", filled, out) == ConfigError.exit_code
    assert "nothing is written over" in capsys.readouterr().err


def test_export_in_lines_of_values_to_the_terminal(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("export", "--config", filled, "--format", "csv", "-") == 0
    shown = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(shown.out)))
    assert [(row["time"], row["field"], row["value"]) for row in rows if row["device"] == "STRAP-1"] == [
        ("2024-05-01T12:00:00.000000000Z", "heart_rate", "60.0"),
        ("2024-05-01T12:00:01.000000000Z", "heart_rate", "61.0"),
        ("2024-05-01T12:00:00.000000000Z", "lost:radio", "4"),
    ]
    assert "4 records, 6 samples" in shown.err


def test_sealed_records_are_exported_with_the_key_and_only_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config(tmp_path, "encrypt = true")
    asyncio.run(fill(SealedStore(SqliteStore(tmp_path / "state" / "outbox.db"), KEY)))
    assert run("export", "--config", path, tmp_path / "none") == ConfigError.exit_code
    assert "spool-key" in capsys.readouterr().err
    monkeypatch.setenv("WARDLINK_SPOOL_KEY", "11" * 32)
    assert run("export", "--config", path, "--json", tmp_path / "wrong") == 1
    assert said(capsys)["sealed_with_another_key"] == 4
    monkeypatch.setenv("WARDLINK_SPOOL_KEY", KEY.hex())
    assert run("export", "--config", path, "--json", tmp_path / "right") == 0
    assert said(capsys)["records"] == 4
    copy = tmp_path / "copy.db"
    copy.write_bytes((tmp_path / "state" / "outbox.db").read_bytes())
    assert run("salvage", "--config", path, "--json", "--export", tmp_path / "found", copy) == 0
    assert said(capsys)["records"] == 4


def test_salvage_puts_what_is_intact_into_the_outbox(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    database = filled.parent / "state" / "outbox.db"
    damaged = filled.parent / "damaged.db"
    damaged.write_bytes(b"\xa5" * 100 + database.read_bytes()[100:])
    before = damaged.read_bytes()
    database.unlink()
    assert run("salvage", "--config", filled, "--json", damaged) == 0
    assert said(capsys) == {"file": str(damaged), "taken_in": 4, "waiting": 4}
    assert damaged.read_bytes() == before
    assert run("status", "--config", filled, "--json") == 0
    found = said(capsys)
    assert (found["waiting"], found["suspects"]) == (4, [])
    assert run("salvage", "--config", filled, damaged) == 0
    assert "0 records" in capsys.readouterr().out


def test_salvage_beside_a_running_gateway_is_refused(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    database = filled.parent / "state" / "outbox.db"
    copy = filled.parent / "copy.db"
    copy.write_bytes(database.read_bytes())
    gateway = SqliteStore(database)
    gateway.open()
    try:
        assert run("salvage", "--config", filled, copy) == UnavailableError.exit_code
    finally:
        gateway.close()
    assert "another program" in capsys.readouterr().err


def test_what_cannot_be_done_is_a_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path)
    for words in (["status"], ["export", tmp_path / "out"], ["salvage", tmp_path / "none.db"]):
        assert run(words[0], "--config", path, *words[1:]) == ConfigError.exit_code
    assert "has the gateway run" in capsys.readouterr().err
    redis = write_config(tmp_path, 'backend = "redis"\nredis_url = "redis://localhost"')
    file = tmp_path / "some.db"
    file.write_bytes(b"")
    assert run("salvage", "--config", redis, file) == ConfigError.exit_code
    assert "--export" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["status", "export", "salvage"])
def test_each_shows_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(command, "--help")
    assert f"wardlink gateway spool {command}" in capsys.readouterr().out
