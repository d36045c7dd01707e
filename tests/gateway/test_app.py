"""The whole gateway in this process: a real broker, a Cyton on a pseudo terminal, a strap behind a virtual BlueZ."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
import redis

from gateway import app, settings
from gateway.acquisition import State
from gateway.app import Gateway
from gateway.errors import ConfigError, DamagedError, UnavailableError
from gateway.links.ble import BleLink
from gateway.links.serial_port import SerialLink
from gateway.live.redis_live import current_key
from gateway.mqtt import Broker, Inbound, MqttSession, Outbound
from gateway.reach import link_maker
from gateway.samples import BRAIN_STATE, EEG, VITAL_SIGNS, LossCause, LossRecord, SampleBlock
from gateway.settings import Settings
from gateway.spool.redis_store import RedisStore
from gateway.spool.sqlite_store import SqliteStore
from gateway.spool.store import EpochKey, Row, StoredRow, StreamKey, Tally
from gateway.virtual.bluetoothctl import bluetoothctl_stub
from gateway.virtual.bluez import VirtualBlueZ
from gateway.virtual.cyton import CytonFirmware
from gateway.virtual.dbus_daemon import DbusDaemon
from gateway.virtual.serial_line import VirtualSerialLine
from gateway.virtual.strap import HeartRateStrap
from gateway.virtual.synthetic import synthetic_headset
from gateway.wire import codec, control, topics
from gateway.wire.messages import CommittedRanges, DeviceMeta, Receipt, Status
from wardlink.servers import Mosquitto

pytestmark = pytest.mark.timeout(120)

DEADLINE_S = 30.0
GATEWAY = "gw-app"
USER = "6b1f5f0e-6f3a-4b1e-9c50-0d9c5a3c7a11"
ADDRESS = "00:22:D0:3A:10:01"
BRIDGE = "bridge-of-tests"
STREAMS = {("CYTON-1", EEG), ("CYTON-1", BRAIN_STATE), ("STRAP-1", VITAL_SIGNS)}


Configure = Callable[..., Awaitable[Settings]]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


# --- the ward


@pytest.fixture(scope="module")
def bus() -> Iterator[DbusDaemon]:
    with DbusDaemon() as daemon, bluetoothctl_stub():
        yield daemon


@pytest_asyncio.fixture
async def cyton(tmp_path: Path) -> AsyncIterator[VirtualSerialLine]:
    recording = await asyncio.to_thread(synthetic_headset, 20.0)
    async with VirtualSerialLine(CytonFirmware(recording), tmp_path / "cyton") as line:
        yield line


@pytest_asyncio.fixture
async def strap(bus: DbusDaemon, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[HeartRateStrap]:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus.address)
    async with VirtualBlueZ(bus.address) as bluez:
        strap = HeartRateStrap(ADDRESS, speed=10.0)
        bluez.add(strap)
        yield strap


@pytest.fixture
def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configure:
    """Settings of a gateway with both devices and a login at a broker."""

    def write(broker: Mosquitto, more: str = "", *, devices: bool = True) -> Settings:
        (tmp_path / "mqtt-password").write_text(broker.gateway(GATEWAY).password)
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
        text = f"""
            [gateway]
            id = "{GATEWAY}"
            state_dir = "{tmp_path}/state"
            [mqtt]
            host = "{broker.host}"
            port = {broker.port}
            username = "{GATEWAY}"
            tls = false
            [clock]
            hold_s = 0
            {more}
        """
        if devices:
            text += f"""
            [[device]]
            driver = "cyton"
            serial = "CYTON-1"
            port = "{tmp_path}/cyton"
            user_id = "{USER}"
            [[device]]
            driver = "heart_rate"
            serial = "STRAP-1"
            address = "{ADDRESS.lower()}"
            """
        (tmp_path / "gateway.toml").write_text(text)
        return settings.load(tmp_path / "gateway.toml")

    async def write_in_a_thread(*arguments: Any, **options: Any) -> Settings:
        return await asyncio.to_thread(write, *arguments, **options)

    return write_in_a_thread


class Cloud:
    """What is at the other end of the broker: takes all blocks, and receipts them if it is told to."""

    def __init__(self, broker: Mosquitto, *, receipts: bool) -> None:
        login = Broker(broker.host, broker.port, "cloud-of-tests", broker.bridge.user, broker.bridge.password)
        subscriptions = [topics.data("+", "+", "+"), topics.loss("+", "+"), topics.status("+"), topics.meta("+", "+")]
        self.session = MqttSession(login, on_message=self._take, subscriptions=subscriptions, clean=True)
        self.receipts = receipts
        self.blocks: dict[tuple[str, str, str], dict[int, SampleBlock]] = defaultdict(dict)
        """By (device, signal, epoch), by sequence."""
        self.losses: list[LossRecord] = []
        self.births: dict[str, DeviceMeta] = {}
        self.online: list[bool] = []

    def _take(self, message: Inbound) -> None:
        message.acknowledge()
        if message.topic == topics.status(GATEWAY):
            self.online.append(control.decode(message.payload, Status).online)
        elif message.topic.startswith(topics.meta(GATEWAY, "")):
            birth = control.decode(message.payload, DeviceMeta)
            self.births[birth.device] = birth
        else:
            self._keep(codec.decode_on(message.topic, message.payload, message.content_type))

    def _keep(self, message: codec.Message) -> None:
        who, content = message.identity, message.content
        if isinstance(content, LossRecord):
            self.losses.append(content)
        else:
            self.blocks[who.device, who.signal, who.epoch][who.sequence] = content
        if self.receipts:
            entry = CommittedRanges(who.device, who.signal, who.epoch, [(who.sequence, who.sequence)])
            receipt = Receipt(v=1, schema="receipt", gateway=GATEWAY, committed=[entry])
            self.publish(topics.receipt(GATEWAY), receipt)

    def publish(self, topic: str, message: control.ControlMessage, *, retain: bool = False) -> asyncio.Future[None]:
        payload = control.encode(message)
        return self.session.publish(
            Outbound(topic, payload.data, payload.content_type, {"schema": payload.schema}, retain)
        )

    def count(self, device: str, signal: str) -> int:
        found = [blocks for (of, what, _), blocks in self.blocks.items() if (of, what) == (device, signal)]
        return sum(len(block) for blocks in found for block in blocks.values())

    def has_all_streams(self, samples: int = 1) -> bool:
        return all(self.count(*stream) >= samples for stream in STREAMS)


@asynccontextmanager
async def cloud_at(broker: Mosquitto, *, receipts: bool = True) -> AsyncIterator[Cloud]:
    cloud = Cloud(broker, receipts=receipts)
    task = asyncio.create_task(cloud.session.run())
    await asyncio.wait_for(cloud.session.connected.wait(), DEADLINE_S)
    here = Status(v=1, schema="status", name=BRIDGE, online=True)
    if receipts:
        await cloud.publish(topics.bridge_status(BRIDGE), here, retain=True)
    try:
        yield cloud
    finally:
        if cloud.session.connected.is_set():
            # what is retained would tell the next test's gateway of a bridge that is gone
            retained = [topics.bridge_status(BRIDGE)]
            await asyncio.gather(*(cloud.session.publish(Outbound(topic, b"", retain=True)) for topic in retained))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def running(chosen: Settings) -> AsyncIterator[Gateway]:
    """A gateway that runs, and is asked to stop at the end."""
    gateway, stop = await asyncio.to_thread(Gateway, chosen), asyncio.Event()
    await gateway.open()
    task = asyncio.create_task(gateway.run(stop))
    try:
        yield gateway
        assert not task.done()
    finally:
        stop.set()
        async with asyncio.timeout(DEADLINE_S):
            await task
        await gateway.close()


@dataclass
class Kept:
    """What is in the outbox of a gateway that has ended."""

    epoch: str
    tallies: Mapping[StreamKey, Tally]
    rows: list[Row]


async def outbox(chosen: Settings) -> Kept:
    def read() -> Kept:
        store = SqliteStore(chosen.outbox_path, read_only=True)
        store.open()
        found, tallies = store.fetch(0, store.holding().last_id, 10_000), store.tallies()
        store.close()
        return Kept(store.epoch, tallies, [item.row for item in found if isinstance(item, StoredRow)])

    return await asyncio.to_thread(read)


def outbox_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("outbox", "serial"))]


# --- the tests


async def test_from_both_devices_to_the_broker_and_out_again(
    mosquitto_server: Mosquitto,
    configure: Configure,
    cyton: VirtualSerialLine,
    strap: HeartRateStrap,
) -> None:
    chosen = await configure(mosquitto_server)
    async with cloud_at(mosquitto_server) as cloud:
        async with running(chosen) as gateway:
            assert gateway.status_line().startswith("0/2 devices streaming")
            await until(lambda: cloud.has_all_streams(5) and cloud.count("CYTON-1", EEG) >= 500)
            assert gateway.status_line().startswith("2/2 devices streaming")
            assert gateway.status_line().endswith("connected")
            assert cloud.online == [True]
            assert cloud.births["CYTON-1"].firmware == "3.1.2"
            await until(lambda: cloud.births["CYTON-1"].electrodes is not None)
            told = [(each.name, each.state.value) for each in cloud.births["CYTON-1"].electrodes or []]
            cyton_status, strap_status = gateway.current_status().devices
            assert [(each.name, each.state) for each in cyton_status.electrodes] == told
            assert strap_status.electrodes == []
            assert strap_status.streams[0].signal == VITAL_SIGNS
            counted = {each.signal: each.samples for each in cyton_status.streams}
            assert counted[EEG] >= cloud.count("CYTON-1", EEG)
            assert {each.lost["radio"] for each in cyton_status.streams} == {0}
            (adapter,) = gateway.current_status().bluetooth
            assert (adapter.adapter, adapter.connections, adapter.slots) == ("hci0", 1, None)
            assert (cloud.births["STRAP-1"].firmware, cloud.births["STRAP-1"].battery_pct) == ("1.0.0", 87.0)
        await until(lambda: cloud.online[-1] is False)
        kept = await outbox(chosen)
        assert kept.rows == [], "all is receipted before it ends"
        assert set(kept.tallies) == STREAMS
        for (device, name), tally in kept.tallies.items():
            assert tally.accepted == cloud.count(device, name)
            assert sorted(cloud.blocks[device, name, kept.epoch]) == list(range(tally.blocks))
        assert cloud.losses == []
    await until(lambda: outbox_threads() == [])


async def test_sigterm_drains_and_the_next_start_goes_on_counting(
    mosquitto_server: Mosquitto,
    configure: Configure,
    cyton: VirtualSerialLine,
    strap: HeartRateStrap,
) -> None:
    chosen = await configure(mosquitto_server, "[spool]\ncommit_interval_s = 60.0\ncommit_blocks = 4096")
    ends: list[dict[tuple[str, str], int]] = []
    async with cloud_at(mosquitto_server, receipts=False) as cloud:
        for _ in range(2):
            task = asyncio.create_task(app.run(chosen))
            played = cyton.sent_packets
            await until(lambda before=played: cyton.sent_packets > before + 750)  # some are on their way
            assert cloud.blocks == {} or ends, "nothing is committed before the end"
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(task, DEADLINE_S)
            kept = await outbox(chosen)
            ends.append({key: tally.blocks for key, tally in kept.tallies.items()})
            rows = kept.rows
            assert len(rows) == sum(ends[-1].values())
            counted: dict[EpochKey, list[int]] = defaultdict(list)
            for row in rows:
                counted[row.epoch_key].append(row.sequence)
            assert all(numbers == list(range(len(numbers))) for numbers in counted.values())
            assert len({epoch for _, _, epoch in counted}) == len(ends)
            accepted = sum(row.samples for row in rows if row.key == ("CYTON-1", EEG))
            assert accepted >= 590 * len(ends), "but for the packets that were on their way"
    assert all(ends[1][key] > ends[0][key] > 0 for key in (("CYTON-1", EEG), ("CYTON-1", BRAIN_STATE)))
    await until(lambda: outbox_threads() == [])


async def test_a_second_start_sends_what_the_first_could_not(
    mosquitto_server: Mosquitto,
    configure: Configure,
    cyton: VirtualSerialLine,
    strap: HeartRateStrap,
) -> None:
    chosen = await configure(mosquitto_server)
    async with running(chosen) as gateway:
        await until(lambda: gateway.outbox.holding.rows >= 5)
    before = {key: tally.accepted for key, tally in (await outbox(chosen)).tallies.items()}
    async with cloud_at(mosquitto_server) as cloud, running(chosen):
        await until(lambda: all(cloud.count(*key) > accepted for key, accepted in before.items()))
        for (device, name), accepted in before.items():
            former, now = [found for (of, what, _), found in cloud.blocks.items() if (of, what) == (device, name)]
            if min(block.first_ns for block in former.values()) > min(block.first_ns for block in now.values()):
                former, now = now, former
            for blocks in (former, now):
                await until(lambda found=blocks: sorted(found) == list(range(len(found))))
            runs = [[block for _, block in sorted(blocks.items())] for blocks in (former, now)]
            for run in runs:
                times = [time for block in run for time in block.times_ns.tolist()]
                assert times == sorted(set(times))
            assert sum(len(block) for run in runs for block in run) > accepted


async def test_with_the_broker_away_it_runs_says_so_and_delivers_later(
    servers_folder: Path,
    configure: Configure,
    cyton: VirtualSerialLine,
    strap: HeartRateStrap,
) -> None:
    broker = Mosquitto(servers_folder / "away")
    chosen = await configure(broker)
    try:
        async with running(chosen) as gateway:
            await until(lambda: gateway.outbox.holding.rows >= 5)
            assert "broker away:" in gateway.status_line()
            assert str(broker.port) in gateway.status_line()
            await asyncio.to_thread(broker.start)
            async with cloud_at(broker) as cloud:
                await until(lambda: cloud.has_all_streams(3) and gateway.status_line().endswith("connected"))
                for blocks in cloud.blocks.values():
                    await until(lambda found=blocks: sorted(found) == list(range(len(found))))
                await asyncio.to_thread(broker.kill)
                await until(lambda: "broker away:" in gateway.status_line())
                waiting = gateway.outbox.holding.rows
                await until(lambda: gateway.outbox.holding.rows > waiting)
    finally:
        await asyncio.to_thread(broker.stop)


async def test_an_end_without_a_broker_does_not_wait_for_it(servers_folder: Path, configure: Configure) -> None:
    chosen = await configure(Mosquitto(servers_folder / "never"), "[uplink]\ndrain_s = 60", devices=False)
    async with asyncio.timeout(20):
        async with running(chosen) as gateway:
            await until(lambda: "broker away: cannot" in gateway.status_line() or "refused" in gateway.status_line())


async def test_devices_that_are_away_are_named_with_their_reason(
    mosquitto_server: Mosquitto, configure: Configure, bus: DbusDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus.address)
    async with running(await configure(mosquitto_server)) as gateway:
        await until(lambda: all(one.condition.reason != "gateway started" for one in gateway.acquisitions))
        line = gateway.status_line()
        assert line.startswith("0/2 devices streaming; 0 blocks waiting; ")
        assert "; CYTON-1 waiting: serial port" in line.replace("connecting", "waiting")
        assert "there is no such port" in line
        assert "; STRAP-1 waiting: " in line.replace("connecting", "waiting")


async def test_an_outbox_that_takes_nothing_comes_first_in_the_status(
    mosquitto_server: Mosquitto, configure: Configure
) -> None:
    async with running(await configure(mosquitto_server, devices=False)) as gateway:
        gateway.outbox.problem = "disk is full"
        assert gateway.status_line().startswith("OUTBOX: disk is full; ")
        gateway.outbox.problem = ""


async def test_newest_states_are_shown_in_redis(
    mosquitto_server: Mosquitto,
    configure: Configure,
    cyton: VirtualSerialLine,
    strap: HeartRateStrap,
    redis_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The library looks its own version up on the disk with every connection, which is not what is tested here.
    monkeypatch.setattr("redis.utils.get_lib_version", lambda: "0")
    client = redis.Redis.from_url(redis_url)
    secret, _, place = redis_url.removeprefix("unix://:").partition("@")
    monkeypatch.setenv("WARDLINK_REDIS_PASSWORD", secret)
    async with running(await configure(mosquitto_server, f'[live.redis]\nurl = "unix://{place}"')) as gateway:
        await until(lambda: gateway.acquisitions[0].condition.state is State.STREAMING)
        async with asyncio.timeout(DEADLINE_S):
            while True:
                if await asyncio.to_thread(client.exists, current_key(USER)):
                    break
                await asyncio.sleep(0.05)
    state = await asyncio.to_thread(client.hgetall, current_key(USER))
    assert 0 < float(state[b"alpha"]) < 1
    assert state[b"state"] in {b"ordinary", b"syntergic"}
    client.close()


async def test_a_damaged_outbox_ends_the_start_with_a_hint(mosquitto_server: Mosquitto, configure: Configure) -> None:
    chosen = await configure(mosquitto_server, devices=False)
    chosen.outbox_path.parent.mkdir()
    chosen.outbox_path.write_bytes(b"this is no database" * 1_000)
    with pytest.raises(DamagedError, match=str(chosen.outbox_path)) as caught:
        await app.run(chosen)
    assert caught.value.hint
    await until(lambda: outbox_threads() == [])


async def test_a_state_folder_that_cannot_be_made_ends_the_start_with_a_hint(
    mosquitto_server: Mosquitto, configure: Configure, tmp_path: Path
) -> None:
    (tmp_path / "state").write_text("a file is in the way")
    with pytest.raises(UnavailableError, match=str(tmp_path / "state")) as caught:
        await app.run(await configure(mosquitto_server, devices=False))
    assert caught.value.hint
    await until(lambda: outbox_threads() == [])


async def test_links_and_stores_are_those_of_the_settings(
    mosquitto_server: Mosquitto, configure: Configure, tmp_path: Path
) -> None:
    chosen = await configure(mosquitto_server)
    cyton, strap = (link_maker(device) for device in chosen.device)
    assert isinstance(cyton(), SerialLink)
    assert cyton() is not cyton()
    assert cyton().name == str(tmp_path / "cyton")
    assert isinstance(strap(), BleLink)
    assert strap().name == ADDRESS
    store = app.make_store(chosen).inner
    assert isinstance(store, SqliteStore)
    assert store.path == tmp_path / "state" / "outbox.db"
    remote = await configure(mosquitto_server, '[spool]\nbackend = "redis"\nredis_url = "redis://localhost"')
    assert isinstance(app.make_store(remote).inner, RedisStore)


async def test_records_are_sealed_with_the_key_of_the_credential(
    mosquitto_server: Mosquitto, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = await configure(mosquitto_server, "[spool]\nencrypt = true")
    with pytest.raises(ConfigError, match="spool-key"):
        app.make_store(chosen)
    monkeypatch.setenv("WARDLINK_SPOOL_KEY", "not a key")
    with pytest.raises(ConfigError, match="is no key"):
        app.make_store(chosen)
    monkeypatch.setenv("WARDLINK_SPOOL_KEY", "5a" * 32)
    assert app.make_store(chosen)._seals
    assert not app.make_store(await configure(mosquitto_server))._seals


async def test_a_gateway_that_nobody_told_the_time_says_so_and_ends_without_waiting(
    mosquitto_server: Mosquitto, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Undisciplined:
        """A kernel whose clock nobody disciplines, whatever this machine's is."""

        def adjtimex(self, _timex: object) -> int:
            return 5

    monkeypatch.setattr("gateway.kernel_clock._libc", Undisciplined())
    # longer than the deadline below: who waited for receipts would miss it
    chosen = await configure(mosquitto_server, f"[uplink]\ndrain_s = {2 * DEADLINE_S}", devices=False)
    held = msgspec.structs.replace(chosen, clock=settings.Clock(hold_s=600))
    async with cloud_at(mosquitto_server), asyncio.timeout(DEADLINE_S), running(held) as gateway:
        await until(lambda: gateway.uplink is not None and gateway.uplink.sender.bridge_present)
        now_ns = gateway.time.clock.now_ns()
        gateway.time.accept(LossRecord("CYTON-1", EEG, LossCause.RADIO, now_ns, now_ns, 1))
        assert gateway.status_line().endswith("nobody has told the time: 1 blocks wait for it")
        clock = gateway.current_status().clock
        assert (clock.state, clock.source, clock.holds, clock.waiting) == ("unsynced", "none", True, 1)
    kept = await outbox(held)
    assert kept.rows == [], "nobody may send it"
    assert kept.tallies["CYTON-1", EEG].lost == 1
