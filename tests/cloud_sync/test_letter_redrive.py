"""Dead letters driven again on real servers: what is mended is written, every sample counted once whatever happened."""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from cloud_sync import letter_redrive, settings
from cloud_sync.binding import Bindings
from cloud_sync.letter_redrive import LetterRedrive
from cloud_sync.registry import ledger
from cloud_sync.registry.entries import Batch, DeadLetter
from gateway.errors import EXIT_CONFIG, EXIT_FAILURE, EXIT_OK, ConfigError, UnavailableError
from gateway.samples import LossCause, LossRecord
from gateway.wire import codec, topics
from wardlink import cloud_admin

COUNTED = "SELECT coalesce(sum(point_count), 0)::int FROM signal_streams"
WAITING = "SELECT reason FROM dead_letters WHERE redriven_at IS NULL ORDER BY id"


@pytest.fixture
async def redrive(chain: Any) -> LetterRedrive:
    return LetterRedrive(chain.registry, chain.bridge.timeseries, Bindings(chain.registry))


async def refuse(chain: Any, gateway: Any, sequence: int = 0, bad: int = 5) -> None:
    """Send a block of five samples of which the store refuses `bad`, since heart rate is a float there."""
    line = f"vital_signs,other=x heart_rate=1.5 {chain.noon_ns}\n".encode()
    assert (await chain.bridge.timeseries.write("", chain.bucket, line)).refused == ()
    block = chain.vitals(first_ns=chain.noon_ns + sequence * 10**10)
    heart_rate = block.columns["heart_rate"].copy()
    heart_rate[bad:] = float("nan")
    columns = {"heart_rate": heart_rate, "temperature": block.columns["temperature"]}
    await gateway.send(type(block)(block.device, block.signal, block.times_ns, columns, block.clock), sequence)
    await gateway.until_receipted("STRAP-1", "vital_signs", sequence)


async def mend(chain: Any) -> None:
    await chain.run("UPDATE timeseries_binding SET measurement = 'vitals_again'")


async def bury(chain: Any, content: Any, *, named: bool = False, gateway: str = "gw-x") -> int:
    """A letter as an older bridge kept it that could not read the message; or one that the registry refused."""
    signal = "loss" if isinstance(content, LossRecord) else content.signal
    identity = codec.Identity(gateway, content.device, signal, "e9", 0)
    payload = codec.encode(identity, content)
    topic = topics.loss(gateway, content.device) if signal == "loss" else topics.data(gateway, content.device, signal)
    key = ledger.BlockKey(content.device, signal, "e9") if named else None
    letter = DeadLetter(
        gateway, topic, payload.content_type, payload.data, "not read", key=key, sequence=0 if named else None
    )
    async with chain.registry.connection() as connection:
        await ledger.commit(connection, Batch(letters=[letter]))
    return int(await chain.value("SELECT max(id) FROM dead_letters"))


@pytest.mark.parametrize("bad", [5, 2])
async def test_a_mended_letter_is_written_and_counted_once(chain: Any, redrive: LetterRedrive, bad: int) -> None:
    await chain.start()
    async with chain.gateway() as gateway:
        await refuse(chain, gateway, bad=bad)
    assert await chain.value(COUNTED) == 5 - bad
    ident = await chain.value("SELECT id FROM dead_letters")
    failed = await redrive.redrive(ident)
    assert (failed.is_done, "field type conflict" in failed.result) == (False, True)
    assert await chain.value(COUNTED) == 5 - bad
    await mend(chain)
    redrive = LetterRedrive(chain.registry, chain.bridge.timeseries, Bindings(chain.registry))
    assert (await redrive.redrive(ident)).is_done
    for _ in range(2):
        again = await redrive.redrive(ident)
        assert (again.is_done, "was re-driven" in again.result) == (True, True)
    assert await chain.value(COUNTED) == 5
    assert len(await chain.points("vitals_again")) == 5
    assert await chain.value("SELECT count(*) FROM alerts WHERE closed_at IS NULL") == 0
    done = await chain.rows("SELECT detail->>'done' FROM audit WHERE what = 'letter.redrive' ORDER BY id")
    assert done == [("false",), ("true",)]


async def test_a_redrive_that_is_cut_short_between_write_and_count_is_made_up(
    chain: Any, redrive: LetterRedrive, monkeypatch: pytest.MonkeyPatch
) -> None:
    await chain.start()
    async with chain.gateway() as gateway:
        await refuse(chain, gateway, bad=3)
    await mend(chain)
    ident = await chain.value("SELECT id FROM dead_letters")
    settle = letter_redrive.letters.settle_letter

    async def cut(*_: object, **__: object) -> bool:
        raise UnavailableError("the machine is off")

    monkeypatch.setattr(letter_redrive.letters, "settle_letter", cut)
    with pytest.raises(UnavailableError):
        await redrive.redrive(ident)
    assert len(await chain.points("vitals_again")) == 5
    assert await chain.value(COUNTED) == 2
    monkeypatch.setattr(letter_redrive.letters, "settle_letter", settle)
    assert (await redrive.redrive(ident)).is_done
    assert await chain.value(COUNTED) == 5


async def test_what_could_not_be_read_before_is_taken_in_as_if_it_had_just_come(
    chain: Any, redrive: LetterRedrive
) -> None:
    block = chain.vitals()
    ident = await bury(chain, block, gateway="gw-1")
    assert (await redrive.redrive(ident)).result == "5 points written"
    assert await chain.value(COUNTED) == 5
    assert len(await chain.points("vital_signs")) == 5
    assert await chain.value("SELECT committed::text FROM ledger WHERE epoch = 'e9'") == "{[0,1)}"
    # The same block came by itself meanwhile: nothing is counted again.
    await chain.run("UPDATE dead_letters SET redriven_at = NULL")
    assert (await redrive.redrive(ident)).result == "0 points written"
    assert await chain.value(COUNTED) == 5


async def test_a_loss_record_is_recorded_once(chain: Any, redrive: LetterRedrive) -> None:
    loss = LossRecord("STRAP-1", "vital_signs", LossCause.SHED, chain.noon_ns, chain.noon_ns + 1, 7, (0, 1))
    ident = await bury(chain, loss, named=True)
    for _ in range(2):
        assert (await redrive.redrive(ident)).is_done
    rows = await chain.rows("SELECT sample_count::int, epoch, outcome FROM stream_gaps")
    assert rows == [(7, "e9", "lost")]


async def test_a_letter_that_fails_again_stays_with_its_new_reason(chain: Any, redrive: LetterRedrive) -> None:
    stranger = await bury(chain, chain.vitals(device="NEW-1"), named=True)
    async with chain.registry.connection() as connection:
        await ledger.commit(connection, Batch(letters=[DeadLetter("g", topics.data("g", "d", "eeg"), "", b"{", "old")]))
    assert await redrive.waiting() == [stranger, stranger + 1]
    assert [(await redrive.redrive(ident)).is_done for ident in await redrive.waiting()] == [False, False]
    first, second = [row[0] for row in await chain.rows(WAITING)]
    assert first == "5 samples: unknown device"
    assert "payload is not" in second
    with pytest.raises(ConfigError, match="no dead letter 99"):
        await redrive.redrive(99)


async def test_what_is_parked_on_the_way_waits_there(chain: Any, redrive: LetterRedrive) -> None:
    ident = await bury(chain, chain.vitals(device="NEW-1"))
    assert (await redrive.redrive(ident)).result == "parked until its device is bound"
    assert await chain.count("parked_messages") == 1
    assert await chain.rows(WAITING) == []


async def test_of_a_parked_message_that_was_given_up_only_the_waiting_part_is_counted(
    chain: Any, redrive: LetterRedrive
) -> None:
    block = chain.vitals()
    ident = await bury(chain, block, named=True)
    await chain.run(
        "UPDATE dead_letters SET first_at = timestamptz '2024-05-01 12:00:03Z', "
        "last_at = timestamptz '2024-05-01 12:00:04Z'"
    )
    assert (await redrive.redrive(ident)).result == "2 points written"
    assert await chain.value(COUNTED) == 2


async def test_a_letter_of_before_is_counted_if_the_ledger_has_its_sequence(chain: Any, redrive: LetterRedrive) -> None:
    ident = await bury(chain, chain.vitals(), named=True)
    await chain.run("UPDATE dead_letters SET is_claimed = NULL")
    assert (await redrive.redrive(ident)).result == "5 points written"
    assert await chain.value(COUNTED) == 5


async def test_the_command(chain: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    influx = chain.settings.influx
    config = tmp_path / "cloud.toml"
    config.write_text(f'[influx]\ndialect = "v1"\nurl = "{influx.url}"\nusername = "{influx.username}"\n')
    good = await bury(chain, chain.vitals(), named=True)
    bad = await bury(chain, chain.vitals(device="NEW-1"), named=True)
    conninfo = settings.conninfo(chain.settings)

    async def typed(*words: str) -> tuple[int, list[dict[str, Any]]]:
        capsys.readouterr()
        code = await asyncio.to_thread(run, conninfo, "letters", "redrive", *words, "--json", "--config", str(config))
        return code, json.loads(capsys.readouterr().out)

    assert await typed("--all") == (
        EXIT_FAILURE,
        [
            {"id": good, "done": True, "result": "5 points written"},
            {"id": bad, "done": False, "result": "5 samples: unknown device"},
        ],
    )
    code, rows = await typed(str(good))
    assert (code, rows[0]["done"]) == (EXIT_OK, True)
    assert (await typed(str(bad)))[0] == EXIT_FAILURE


def run(conninfo: str, *words: str) -> int:
    """Run one command line below `wardlink cloud`."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true")
    common.add_argument("--config", type=Path)
    root = argparse.ArgumentParser()
    cloud_admin.add_commands(root.add_subparsers(required=True), common)
    args = root.parse_args(words)
    code: int = asyncio.run(args.admin(args, conninfo))
    return code


@pytest.mark.parametrize("words", [["letters", "redrive"], ["letters", "redrive", "1", "--all"]])
def test_the_command_wants_ids_or_all_of_them(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("", *words)
    assert ended.value.code == EXIT_CONFIG
    assert "--all" in capsys.readouterr().err
