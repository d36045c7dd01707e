"""The admin commands as typed: a ward is registered without SQL, mistakes get one clear line and their exit code."""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from cloud_sync.registry import gap_rows
from cloud_sync.registry.database import Database
from cloud_sync.registry.entries import BlockCommit, LossCommit, Span
from cloud_sync.registry.ledger import Batch, BlockKey, DeadLetter, ParkedBlock, commit
from cloud_sync.registry.migrations import sql_folder
from gateway.errors import EXIT_CONFIG, EXIT_FAILURE, EXIT_OK, WardlinkError
from gateway.samples import LossCause, LossRecord
from wardlink.admin_commands import moment
from wardlink.cloud_admin import add_commands
from wardlink.terminal import show_error

Run = Callable[[str], int]
Ask = Callable[[str], list[dict[str, Any]]]
HOSTILE = "\x1b[2J[/bold] [red]"


def parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true")
    common.add_argument("--config")
    root = argparse.ArgumentParser(prog="wardlink cloud")
    add_commands(root.add_subparsers(required=True), common)
    return root


@pytest.fixture
def run(database: str) -> Run:
    """Run one command line against an empty database; its exit code."""

    def typed(line: str) -> int:
        try:
            args = parser().parse_args(shlex.split(line))
        except SystemExit as ended:
            return int(str(ended.code))
        try:
            code: int = asyncio.run(args.admin(args, database))
        except WardlinkError as error:
            return show_error(error)
        return code

    return typed


@pytest.fixture
def ask(run: Run, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Run one command that must succeed, with --json; its rows."""

    def rows(line: str) -> list[dict[str, Any]]:
        capsys.readouterr()
        assert run(f"{line} --json") == EXIT_OK
        found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
        return found

    return rows


def test_ward_is_registered_without_sql(run: Run, ask: Ask) -> None:
    for line in (
        "migrate",
        "org add st-anna --name 'St. Anna'",
        "patient add P-1 --org st-anna",
        "patient add P-2 --org st-anna",
        "template add --org st-anna --signal eeg --bucket raw --tag location=ICU-5",
        "device add CYTON-1 --org st-anna --type eeg_headset --patient P-1 --brand OpenBCI",
        "device add AA:BB --org north --type hr_strap --patient N-1 --create",
        "stream open CYTON-1 --signal eeg --since 2024-05-01T12:00:00+02:00 --rate 250",
        "binding add CYTON-1 --signal eeg --bucket research --measurement eeg_raw --retention 30d --tag a=b=c",
        "stream list",
        "binding list",
        "verify",
        "status",
    ):
        assert run(line) == EXIT_OK, line
    orgs = ask("org list")
    assert [(row["code"], row["name"], row["patients"], row["devices"]) for row in orgs] == [
        *(("north", "north", 1, 1), ("st-anna", "St. Anna", 2, 1))
    ]
    assert [row["wears"] for row in ask("patient list --org st-anna")] == ["CYTON-1", None]
    (device,) = ask("device list --org st-anna")
    assert (device["serial"], device["patient"], device["brand"]) == ("CYTON-1", "P-1", "OpenBCI")
    (stream,) = ask("stream list --device CYTON-1 --open")
    assert (stream["started_at"], stream["sample_rate_hz"]) == ("2024-05-01 10:00:00+00:00", "250.000")
    template, added = ask("binding list --device CYTON-1")
    assert (template["influx_bucket"], template["tags"]) == ("raw", "location=ICU-5")
    assert (added["measurement"], added["retention_hint"], added["tags"]) == ("eeg_raw", "30d", "a=b=c")

    assert run(f"binding tag {added['id']} priority=high") == EXIT_OK
    assert run(f"stream close {stream['id']}") == EXIT_OK
    assert ask("stream list --open") == []
    assert run("stream open CYTON-1 --signal eeg") == EXIT_OK
    assert run("device assign CYTON-1 --patient P-2") == EXIT_OK
    assert [row["ended_at"] is None for row in ask("stream list")] == [False, False]
    assert run("device assign CYTON-1 --nobody") == EXIT_OK
    assert (ask("device list --org st-anna"))[0]["patient"] is None
    assert len(ask("template list")) == 1


def test_schema_commands_before_and_after(run: Run, ask: Ask, capsys) -> None:
    (before,) = ask("status")
    assert before["pending"] is True
    assert "parked_messages" not in before
    assert run("verify") == EXIT_FAILURE
    assert "wardlink cloud migrate" in capsys.readouterr().err
    assert run("device list") == EXIT_FAILURE
    assert "wardlink cloud migrate" in capsys.readouterr().err
    assert len(ask("migrate")) == len(list(sql_folder().glob("*.sql")))
    assert ask("migrate") == []
    (after,) = ask("status")
    assert (after["pending"], after["parked_messages"], after["dead_letters"]) == (False, 0, 0)
    assert run("migrate") == EXIT_OK
    assert "nothing to do" in capsys.readouterr().out


MISTAKES = [
    ("patient add P-9 --org nowhere", EXIT_CONFIG, "there are: st-anna"),
    ("device add X --org st-anna --type toaster", EXIT_CONFIG, "hr_strap"),
    ("device add X --org nowhere --type gps", EXIT_CONFIG, "no organisation 'nowhere'"),
    ("device add 'X Y' --org st-anna --type gps", EXIT_CONFIG, "no spaces"),
    ("device assign CYTON-1 --patient P-9", EXIT_CONFIG, "there are: P-1"),
    ("device assign CYTON-1", EXIT_CONFIG, "--patient"),
    ("org add st-anna", EXIT_FAILURE, "exists already"),
    ("stream open CYTON-1 --signal eeg --since yesterday", EXIT_CONFIG, "2025-03-01T14:30:00Z"),
    ("stream open CYTON-1 --signal eeg --since 2024-05-01T12:00:00", EXIT_CONFIG, "has no zone"),
    ("stream open CYTON-1 --signal eeg --rate fast", EXIT_CONFIG, "no sampling rate"),
    ("stream open CYTON-1 --signal eeg --rate nan", EXIT_CONFIG, "no sampling rate"),
    ("stream close CYTON-1", EXIT_CONFIG, "--signal"),
    ("stream close CYTON-1 --signal eeg", EXIT_CONFIG, "no open stream"),
    ("stream list --limit 0", EXIT_CONFIG, "expected 1 to 100000"),
    ("binding tag 1 location", EXIT_CONFIG, "key=value"),
    ("binding tag 1 location=''", EXIT_CONFIG, "key=value"),
    ("template add --org st-anna --signal eeg --bucket ''", EXIT_CONFIG, "no empty names"),
    ("template add --org st-anna --signal eeg --bucket b --measurement _m", EXIT_CONFIG, "no leading underscore"),
    ("binding tag 1 a=b", EXIT_CONFIG, "no binding 1"),
    ("letters show 1", EXIT_CONFIG, "letters list"),
    ("alerts ack 1", EXIT_CONFIG, "alerts list"),
    ("alerts close 1 2", EXIT_CONFIG, "no open alert 1, 2"),
    ("gaps --cause theft", EXIT_CONFIG, "transport"),
    ("gaps --since yesterday", EXIT_CONFIG, "2025-03-01T14:30:00Z"),
    ("template add --org st-anna --signal eeg --bucket b --tag org_id=1", EXIT_CONFIG, "belong to wardlink"),
]


def test_mistakes_get_one_clear_line(run: Run, capsys) -> None:
    for made in ("migrate", "device add CYTON-1 --org st-anna --type eeg_headset --patient P-1 --create"):
        assert run(made) == EXIT_OK
    for line, code, said in MISTAKES:
        capsys.readouterr()
        assert run(line) == code, line
        told = capsys.readouterr().err
        assert said in told, line
        assert "Traceback" not in told


def test_what_waits_is_shown_and_steers_no_terminal(run: Run, ask: Ask, capsys, database: str) -> None:
    assert run("migrate") == EXIT_OK
    at = int(datetime(2024, 5, 1, tzinfo=UTC).timestamp()) * 10**9
    parked = ParkedBlock("gw", BlockKey("NEW-1", "eeg", "e"), 0, "t", "c", b"x", at, at, 250, "unknown device")
    letters = [
        DeadLetter("gw", f"t/{HOSTILE}", "c", payload, "malformed", HOSTILE, properties={"schema": HOSTILE})
        for payload in (b'{"a": 1}', HOSTILE.encode(), b"\xff" * 5000)
    ]

    async def receive() -> None:
        async with Database(database) as opened, opened.connection() as connection:
            for letter in letters:
                await commit(connection, Batch(parked=[parked], letters=[letter]))

    asyncio.run(receive())
    (device,) = ask("parked list")
    assert (device["device"], device["messages"], device["samples"], device["reason"]) == (
        *("NEW-1", 1, 250, "unknown device"),
    )
    rows = ask("letters list")
    assert [row["bytes"] for row in rows] == [5000, len(HOSTILE), 8]
    assert (ask("letters list --limit 1"))[0]["id"] == rows[0]["id"]
    assert (ask(f"letters show {rows[0]['id']}"))[0]["payload_hex"] == "ff" * 5000

    for line in ("letters list", "parked list", *(f"letters show {row['id']}" for row in rows)):
        capsys.readouterr()
        assert run(line) == EXIT_OK, line
        shown = capsys.readouterr().out
        assert "\x1b" not in shown
    assert '{"a": 1}' in shown
    assert "[/bold] [red]" in shown


def test_gaps_are_listed_by_what_they_are(run: Run, ask: Ask, capsys, database: str) -> None:
    assert run("migrate") == EXIT_OK
    noon = datetime(2024, 5, 1, 12, tzinfo=UTC)
    noon_ns = int(noon.timestamp()) * 10**9
    day = 86_400 * 10**9
    key, lost = BlockKey("STRAP-1", "vital_signs", "e1"), BlockKey("STRAP-1", "loss", "e1")
    shed = LossRecord("STRAP-1", "vital_signs", LossCause.SHED, noon_ns, noon_ns + day, 40, (4, 7))
    radio = LossRecord("CYTON-1", "eeg", LossCause.RADIO, noon_ns - day, noon_ns - day, 250)

    async def receive() -> None:
        blocks = [BlockCommit("gw", key, n, (), span=Span(noon_ns + n, noon_ns + n, 10)) for n in (0, 3)]
        losses = [LossCommit("gw", lost, 0, shed), LossCommit("gw", replace(lost, device="CYTON-1"), 0, radio)]
        async with Database(database) as opened, opened.connection() as connection:
            await commit(connection, Batch(blocks=blocks, losses=losses))
            await gap_rows.review(connection, key)
            await gap_rows.watch(connection, timedelta(0))

    asyncio.run(receive())

    def kinds(options: str = "") -> list[tuple[Any, ...]]:
        return [
            (row["device"], row["cause"], row["samples"], row["state"], row["blocks"]) for row in ask(f"gaps {options}")
        ]

    hole = ("STRAP-1", "transport", 20, "open", "1-2")
    given_up = ("STRAP-1", "shed", 40, "lost", "4-7")
    never_came = ("CYTON-1", "radio", 250, "lost", None)
    assert kinds() == [hole, given_up, never_came]
    assert kinds("--open") == kinds("--cause transport") == kinds("--limit 1") == [hole]
    assert kinds("--device CYTON-1") == kinds("--signal eeg") == [never_came]
    assert kinds("--since 2024-05-01T12:00:00.1Z") == [given_up]
    assert kinds("--device NOBODY") == []
    sums = {(row["device"], row["cause"]): (row["lost"], row["open"], row["estimated"]) for row in ask("gaps --sum")}
    assert sums == {
        ("CYTON-1", "radio"): (250, 0, 0),
        ("STRAP-1", "shed"): (40, 0, 0),
        ("STRAP-1", "transport"): (0, 20, 0),
    }
    assert run("gaps") == run("gaps --sum") == EXIT_OK
    assert "STRAP-1" in capsys.readouterr().out

    known = ("device", "signal", "produced", "received", "lost", "open", "missing_blocks", "is_consistent")
    assert [tuple(row[name] for name in known) for row in ask("books")] == [
        ("CYTON-1", "eeg", 250, 0, 250, 0, 0, True),
        ("STRAP-1", "vital_signs", 60, 20, 40, 20, 2, True),
    ]
    assert len(ask("books --device STRAP-1")) == 1
    assert run("verify") == EXIT_OK

    (alert,) = ask("alerts list")
    assert (alert["kind"], alert["subject"], alert["acknowledged_at"]) == ("stream_gap", "STRAP-1 vital_signs", None)
    (acknowledged,) = ask(f"alerts ack {alert['id']}")
    assert acknowledged["acknowledged_at"]
    assert ask("alerts list")[0]["acknowledged_by"]
    asyncio.run(receive())
    assert len(ask("alerts list --all")) == 1, "an alert that is known is not raised again"
    assert ask(f"alerts close {alert['id']}")[0]["closed_at"]
    assert ask("alerts list") == []
    assert len(ask("alerts list --all")) == 1
    asyncio.run(receive())
    assert len(ask("alerts list")) == 1, "its cause lasts"

    async def spoil() -> None:
        async with Database(database) as opened, opened.connection() as connection:
            await connection.execute(
                "UPDATE ledger SET missing = 1 WHERE device_serial = 'STRAP-1' AND signal <> 'loss'"
            )

    asyncio.run(spoil())
    assert run("books") == run("verify") == EXIT_FAILURE
    assert "STRAP-1 vital_signs e1" in capsys.readouterr().err


def test_every_command_explains_itself_with_an_example(capsys) -> None:
    root = parser()
    nouns = root._subparsers._group_actions[0].choices  # type: ignore[union-attr]  # argparse has no public way
    lines = []
    for noun, group in nouns.items():
        verbs = group._subparsers._group_actions[0].choices if group._subparsers else [None]
        lines += [[noun, verb] if verb else [noun] for verb in verbs]
    assert len(lines) == 27
    for words in lines:
        with pytest.raises(SystemExit):
            root.parse_args([*words, "--help"])
        shown = capsys.readouterr().out
        assert f"examples:\n  wardlink cloud {' '.join(words)}" in shown
        assert "--json" in shown


def test_moment_keeps_its_zone() -> None:
    assert moment("2024-05-01T12:00:00Z") == datetime(2024, 5, 1, 12, tzinfo=UTC)
    assert moment("2024-05-01T12:00+05:30").utcoffset() == timedelta(hours=5, minutes=30)
