"""`wardlink cloud tail` beside a running bridge, a second bridge of the same id, and one that is given up."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cloud_sync import app
from cloud_sync import settings as cloud_settings
from gateway.errors import ConfigError, UnavailableError
from gateway.wire import topics
from wardlink import bridge_commands

COMMAND = [sys.executable, "-c", "from wardlink.cli import main; raise SystemExit(main())", "cloud", "tail"]


@pytest.fixture
def config(bridge_settings: Any, tmp_path: Path) -> Path:
    mqtt = bridge_settings.mqtt
    file = tmp_path / "cloud.toml"
    file.write_text(
        f'[mqtt]\nhost = "{mqtt.host}"\nport = {mqtt.port}\nusername = "{mqtt.username}"\ntls = false\n'
        '[influx]\ndialect = "v1"\n'
    )
    return file


async def shown(config: Path, chain: Any, *options: str) -> list[str]:
    """The first lines that `tail` shows of a strap, a headset and garbage, sent until it shows enough."""
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "--config", str(config), *options, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    lines: list[str] = []
    try:
        async with chain.gateway("tailed") as gateway:

            async def send() -> None:
                for sequence in range(10_000):
                    await gateway.send(chain.vitals(n=2), sequence)
                    await gateway.send(chain.eeg(n=3), sequence)
                    await gateway.publish(topics.data(gateway.name, "STRAP-1", "vital_signs"), b"garbage")
                    await asyncio.sleep(0.05)

            sending = asyncio.create_task(send())
            async with asyncio.timeout(40):
                while len(lines) < 6:
                    lines.append((await process.stdout.readline()).decode().rstrip())
            sending.cancel()
    finally:
        process.kill()
        await process.wait()
    return lines


async def test_tail_shows_decoded_messages_and_leaves_the_bridge_alone(chain: Any, config: Path) -> None:
    await chain.start()
    text = "\n".join(await shown(config, chain))
    assert "12:00:01.000 tailed" in text
    assert "heart_rate=61 temperature=36.2" in text
    assert "Fp1=" in text
    assert "payload is not" in text
    assert chain.bridge.consumer.activity.blocks > 0


async def test_tail_selects_and_prints_json(chain: Any, config: Path) -> None:
    lines = [
        json.loads(line) for line in await shown(config, chain, "--json", "--device", "CYTON-1", "--signal", "eeg")
    ]
    assert {(line["device"], line["signal"], line["samples"]) for line in lines} == {("CYTON-1", "eeg", 3)}
    block = chain.eeg(n=3)
    assert lines[0]["newest"] == {name: float(block.physical(name)[-1]) for name in block.columns}


def test_a_second_bridge_of_the_same_id_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    lock = app._only_one(folder, "bridge-1")
    with pytest.raises(ConfigError, match="another bridge with the id 'bridge-1' runs"):
        app._only_one(folder, "bridge-1")
    app.os.close(app._only_one(folder, "bridge-2"))
    app.os.close(lock)
    app.os.close(app._only_one(folder, "bridge-1"))


def test_a_state_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"bridge\.state_dir: .*cannot be written"):
        app._only_one(tmp_path / "file" / "state", "bridge-1")


async def test_a_schema_that_is_not_there_is_waited_for(chain: Any) -> None:
    await chain.run("ALTER TABLE schema_migrations RENAME TO gone")
    bridge = await chain.start(is_connected=False)

    async def says_so() -> bool:
        return "wardlink cloud migrate" in bridge.status_line(0)

    await chain.wait_for(says_so, "a hint")
    await chain.run("ALTER TABLE gone RENAME TO schema_migrations")
    await chain.wait_for(lambda: asyncio.wait_for(bridge.consumer.session.connected.wait(), 40), "the broker")


async def forgotten(config: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and what `wardlink cloud bridge forget` said."""
    process = await asyncio.create_subprocess_exec(
        *COMMAND[:-1], "bridge", "forget", "--config", str(config), *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    said, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return process.returncode, said.decode()


async def test_a_bridge_that_is_forgotten_gets_no_share_any_more(chain: Any, config: Path) -> None:
    given_up, settings = chain.settings.bridge.id, chain.settings
    await chain.start()
    code, said = await forgotten(config, given_up)
    assert (code, "stop it first" in said) == (1, True)
    await chain.stop()
    chain.settings = msgspec.structs.replace(settings, bridge=msgspec.structs.replace(settings.bridge, id="heir"))
    await chain.start()

    async def send(sequences: range) -> None:
        for sequence in sequences:
            await gateway.send(chain.vitals(first_ns=chain.noon_ns + sequence * 10**10), sequence)

    async with chain.gateway() as gateway:
        await send(range(20))
        code, said = await forgotten(config, given_up, "--json")
        assert (code, json.loads(said)) == (0, {"bridge": given_up, "forgotten": True})
        await send(range(20, 40))
        await gateway.until_receipted("STRAP-1", "vital_signs", *range(20, 40))
        got = gateway.receipted("STRAP-1", "vital_signs")
        missing = [number for number in range(20) if not any(first <= number <= last for first, last in got)]
        assert missing  # the control: before it was forgotten, it had its share
        assert (given_up in gateway.bridges, gateway.bridges["heir"]) == (False, True)
    await chain.stop()
    await chain.forget_session()
    chain.settings = settings


async def test_a_broker_that_is_away_cannot_forget_and_says_why(
    bridge_settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge_commands, "CONNECT_S_MAX", 0.5)
    broker = dataclasses.replace(cloud_settings.broker(bridge_settings), port=1)
    with pytest.raises(UnavailableError, match="cannot reach the MQTT broker"):
        await bridge_commands.forget(broker, "bridge-9")


async def test_what_is_no_id_of_a_bridge_is_a_usage_error(config: Path) -> None:
    code, said = await forgotten(config, "a/b")
    assert (code, "no id of a bridge" in said) == (2, True)
