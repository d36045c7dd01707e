"""A live gateway whose clock is set while it runs: by an hour back, by a day forward, and wrong from the beginning.

libfaketime changes what the gateway's process reads as UTC; the time since boot stays what it is, as on a machine
whose clock is set. What it sends is compared with the true time of its arrival here.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
import pytest_asyncio

from cloud_sync import time_desk
from gateway import status
from gateway.clock import CONFIRM_NS
from gateway.kernel_clock import kernel_discipline
from gateway.mqtt import Broker, Inbound, MqttSession, connected_session
from gateway.samples import BRAIN_STATE, BRAIN_STATE_PERIOD_NS, EEG, NS_PER_S, ClockState, SampleBlock
from gateway.virtual.cyton import CytonFirmware
from gateway.virtual.serial_line import VirtualSerialLine
from gateway.virtual.synthetic import synthetic_headset
from gateway.wire import codec, topics
from gateway.wire.topics import TopicKind
from wardlink.servers import Mosquitto

pytestmark = [pytest.mark.faults, pytest.mark.timeout(180)]

DEADLINE_S = 90.0
HOUR_NS = 3_600 * NS_PER_S
DAY_NS = 24 * HOUR_NS
ARRIVAL_NS = 15 * NS_PER_S
"""From a sample to its arrival here on a busy machine: a block, a commit, the second that is held at first."""
ROOT = Path(__file__).parents[2]
LIBRARIES = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def library() -> Path:
    if not LIBRARIES:
        pytest.skip("NOT PROVEN HERE, a live gateway whose clock is set: no libfaketime (apt-get install faketime)")
    return LIBRARIES[0]


@pytest.fixture
def needs_undisciplined_kernel() -> None:
    if kernel_discipline().state is ClockState.SYNCED:
        pytest.skip("NOT PROVEN HERE, a wrong clock at start: this machine's kernel is disciplined, and says so")


@dataclass
class Cloud:
    """The other end of the broker: keeps blocks with the true time of their arrival, and tells the time."""

    gateway: str
    blocks: dict[str, dict[int, SampleBlock]] = field(default_factory=lambda: defaultdict(dict))
    arrived_ns: dict[tuple[str, int], int] = field(default_factory=dict)
    tells_time: bool = True

    def take(self, session: MqttSession, message: Inbound) -> None:
        message.acknowledge()
        match topics.parse(message.topic).kind:
            case TopicKind.TIME_REQUEST if self.tells_time:
                session.publish(time_desk.answer(message, "bridge-1"))
            case TopicKind.DATA:
                found = codec.decode_on(message.topic, message.payload, message.content_type)
                assert isinstance(found.content, SampleBlock)
                self.blocks[found.content.signal][found.identity.sequence] = found.content
                self.arrived_ns[found.content.signal, found.identity.sequence] = time.time_ns()

    def of(self, signal: str) -> list[SampleBlock]:
        return [block for _, block in sorted(self.blocks[signal].items())]

    def check(self) -> None:
        """No time turns back; states are exactly 200 ms apart as long as a segment lasts; synced is true."""
        for signal in (EEG, BRAIN_STATE):
            numbers = sorted(self.blocks[signal])
            assert numbers == list(range(len(numbers))), "all are here"
            times = np.concatenate([block.times_ns for block in self.of(signal)])
            assert (np.diff(times) > 0).all()
        for segment in {block.segment for block in self.of(BRAIN_STATE)}:
            states = np.array([ns for b in self.of(BRAIN_STATE) if b.segment == segment for ns in b.times_ns])
            # a gap is a whole number of them: a busy machine may lose samples, of the clock nothing is to be seen
            assert (np.diff(states) % BRAIN_STATE_PERIOD_NS == 0).all()
        for (signal, number), arrived_ns in self.arrived_ns.items():
            block = self.blocks[signal][number]
            if block.clock.state is ClockState.SYNCED and kernel_discipline().state is not ClockState.SYNCED:
                assert -block.clock.error_ns <= arrived_ns - block.last_ns <= block.clock.error_ns + ARRIVAL_NS


@dataclass
class Rig:
    """A gateway with a headset, on a machine whose clock can be set."""

    cloud: Cloud
    folder: Path
    process: subprocess.Popen[bytes]

    def set_clock(self, offset: str) -> None:
        """As libfaketime has it: `-1h`, `+1d`. In one step, so that nobody reads half of it."""
        new = self.folder / "faketime.new"
        new.write_text(offset + "\n")
        new.replace(self.folder / "faketime")

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                assert self.process.poll() is None, (self.folder / "log").read_text()
                await asyncio.sleep(0.05)

    async def states(self, count: int) -> None:
        """Wait for so many more blocks of brain states."""
        wanted = len(self.cloud.blocks[BRAIN_STATE]) + count
        await self.until(lambda: len(self.cloud.blocks[BRAIN_STATE]) >= wanted)

    async def all_here(self) -> None:
        """Wait until nothing is missing before the newest block: what was held comes behind live data."""
        await self.until(lambda: all(len(found) == max(found) + 1 for found in self.cloud.blocks.values()))


def status_of(gateway: Rig) -> status.GatewayStatus:
    return msgspec.json.decode((gateway.folder / "state" / status.FILE_NAME).read_bytes(), type=status.GatewayStatus)


@pytest_asyncio.fixture
async def cyton(tmp_path: Path) -> AsyncIterator[Path]:
    recording = await asyncio.to_thread(synthetic_headset, 20.0)
    async with VirtualSerialLine(CytonFirmware(recording), tmp_path / "cyton"):
        yield tmp_path / "cyton"


@asynccontextmanager
async def rig(
    folder: Path, port: Path, broker: Mosquitto, library: Path, *, clock: str, offset: str = "+0"
) -> AsyncIterator[Rig]:
    name = f"gw-steps-{next(_numbers)}"
    login = await asyncio.to_thread(broker.gateway, name)
    (folder / "gateway.toml").write_text(
        f'[gateway]\nid = "{name}"\nstate_dir = "{folder}/state"\n'
        f'[mqtt]\nhost = "{broker.host}"\nport = {broker.port}\nusername = "{name}"\ntls = false\n'
        f"[clock]\n{clock}\n"
        f'[[device]]\ndriver = "cyton"\nserial = "CYTON-1"\nport = "{port}"\n'
    )
    (folder / "faketime").write_text(f"{offset}\n")
    faked = {
        "LD_PRELOAD": str(library),
        "DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_TIMESTAMP_FILE": str(folder / "faketime"),
        "WARDLINK_MQTT_PASSWORD": login.password,
    }
    cloud = Cloud(name)
    sessions: list[MqttSession] = []

    def take(message: Inbound) -> None:
        cloud.take(sessions[0], message)

    bridge = Broker(broker.host, broker.port, f"cloud-{name}", broker.bridge.user, broker.bridge.password)
    subscriptions = [topics.data(name, "+", "+"), topics.time_request(name)]
    sessions.append(MqttSession(bridge, on_message=take, subscriptions=subscriptions, clean=True))
    async with connected_session(sessions[0]):
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(  # noqa: ASYNC220 - it is polled and killed, never waited for here
                [sys.executable, "-m", "wardlink", "gateway", "run", "--config", str(folder / "gateway.toml")],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=os.environ | faked,
            )
        try:
            yield Rig(cloud, folder, process)
        finally:
            process.kill()
            await asyncio.to_thread(process.wait)
            print((folder / "log").read_text())  # pytest shows it with a failure


async def test_an_hour_back_is_a_bound_and_nothing_turns_back(
    tmp_path: Path, cyton: Path, mosquitto_server: Mosquitto, library: Path
) -> None:
    async with rig(tmp_path, cyton, mosquitto_server, library, clock="hold_s = 0") as gateway:
        await gateway.states(5)
        gateway.set_clock("-1h")
        await gateway.states(CONFIRM_NS // NS_PER_S + 8)
        await gateway.all_here()
        cloud = gateway.cloud
    cloud.check()
    states = cloud.of(BRAIN_STATE)
    assert max(np.diff([block.first_ns for block in states])) < 60 * NS_PER_S
    assert states[0].clock.error_ns < HOUR_NS <= states[-1].clock.error_ns
    assert states[-1].clock.state is ClockState.UNSYNCED


async def test_a_day_forward_is_doubtful_first_and_then_a_new_segment(
    tmp_path: Path, cyton: Path, mosquitto_server: Mosquitto, library: Path
) -> None:
    async with rig(tmp_path, cyton, mosquitto_server, library, clock="hold_s = 0") as gateway:
        await gateway.states(5)
        gateway.set_clock("+1d")
        await gateway.states(CONFIRM_NS // NS_PER_S + 8)
        await gateway.all_here()
        cloud = gateway.cloud
    cloud.check()
    states = cloud.of(BRAIN_STATE)
    leaps = [(one, other) for one, other in pairwise(states) if other.first_ns - one.last_ns >= DAY_NS]
    ((before, after),) = leaps
    assert before.segment < after.segment
    assert after.first_ns - before.last_ns < DAY_NS + 60 * NS_PER_S
    doubted = [block for block in states if block.clock.error_ns >= DAY_NS]
    assert len(doubted) >= 3, "while it was doubtful, the bound covered both"
    assert doubted[-1].last_ns <= before.last_ns
    assert {block.clock.state for block in doubted} == {ClockState.UNSYNCED}


@pytest.mark.usefixtures("needs_undisciplined_kernel")
async def test_a_clock_that_is_a_day_slow_is_put_right_by_a_bridge_before_anything_goes_out(
    tmp_path: Path, cyton: Path, mosquitto_server: Mosquitto, library: Path
) -> None:
    held = "hold_s = 600\ntrust_bridge = true"
    async with rig(tmp_path, cyton, mosquitto_server, library, clock=held, offset="-1d") as gateway:
        await gateway.states(6)
        await gateway.until(lambda: status_of(gateway).clock.source == "bridge")
        gateway.set_clock("+1d")  # nobody asks that clock any more
        await gateway.states(12)
        gateway.set_clock("-1h")
        await gateway.states(12)
        await gateway.all_here()
        cloud = gateway.cloud
    cloud.check()
    for signal in (EEG, BRAIN_STATE):
        assert {block.clock.state for block in cloud.of(signal)} == {ClockState.SYNCED}
        assert max(np.diff([block.first_ns for block in cloud.of(signal)])) < 60 * NS_PER_S, "nobody leapt"


@pytest.mark.usefixtures("needs_undisciplined_kernel")
async def test_without_a_bridge_that_tells_it_nothing_goes_out_before_the_deadline(
    tmp_path: Path, cyton: Path, mosquitto_server: Mosquitto, library: Path
) -> None:
    async with rig(tmp_path, cyton, mosquitto_server, library, clock="hold_s = 8", offset="-1d") as gateway:
        gateway.cloud.tells_time = False
        await gateway.until((tmp_path / "state" / status.FILE_NAME).exists)
        await gateway.until(lambda: status_of(gateway).clock.waiting)
        assert status_of(gateway).clock.holds
        assert not gateway.cloud.blocks
        await gateway.states(8)
        await gateway.all_here()
        cloud = gateway.cloud
    cloud.check()
    assert {block.clock.state for block in cloud.of(EEG)} == {ClockState.UNSYNCED}
    assert abs(cloud.of(EEG)[-1].last_ns + DAY_NS - time.time_ns()) < 60 * NS_PER_S


def test_control_a_plain_program_sees_its_clock_turn_back(tmp_path: Path, library: Path) -> None:
    """The rig bites: who stamps with the system's clock goes an hour back, and its monotonic clock does not."""
    program = (
        "import pathlib, sys, time\n"
        "before = time.time_ns(), time.monotonic_ns()\n"
        "pathlib.Path(sys.argv[1]).write_text('-1h\\n')\n"
        "after = time.time_ns(), time.monotonic_ns()\n"
        "print(after[0] - before[0], after[1] - before[1])\n"
    )
    file = tmp_path / "faketime"
    file.write_text("+0\n")
    faked = {"LD_PRELOAD": str(library), "DONT_FAKE_MONOTONIC": "1", "FAKETIME_NO_CACHE": "1"}
    said = subprocess.run(
        [sys.executable, "-c", program, str(file)],
        env=os.environ | faked | {"FAKETIME_TIMESTAMP_FILE": str(file)},
        check=True,
        capture_output=True,
        text=True,
    )
    utc_ns, monotonic_ns = map(int, said.stdout.split())
    assert -HOUR_NS <= utc_ns < -HOUR_NS + 60 * NS_PER_S
    assert 0 < monotonic_ns < 60 * NS_PER_S
