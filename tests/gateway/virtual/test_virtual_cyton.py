"""Virtual Cyton: the firmware's model by itself, and the whole way through a pseudo terminal to the decoder."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import struct
import subprocess
import termios
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gateway.devices.base import Event, Facts, Missing, Rejected, Samples, Send
from gateway.devices.cyton import DAISY_ELECTRODES, CytonDecoder
from gateway.devices.cyton_packets import microvolts_per_count
from gateway.errors import ConfigError, DeviceError, UnavailableError
from gateway.links.base import Chunk
from gateway.links.serial_port import SerialLink
from gateway.samples import NS_PER_S
from gateway.signal.impedance import impedance_kohm
from gateway.virtual.cyton import OVERFLOW_FAILURE, POLL_FAILURE, RESET_TEXT, CytonFirmware
from gateway.virtual.recordings import Recording, load_recording
from gateway.virtual.serial_line import VirtualSerialLine

SHARED = Path(__file__).parents[3] / ".." / "shared" / "data"
DEADLINE_S = 30.0
PERIOD_NS = NS_PER_S // 250
HALF_A_COUNT_UV = 0.0112


@pytest.fixture
def blinks() -> Recording:
    path = SHARED / "cyton" / "cyton_v6_blinks_jaw_alpha.txt"
    if not path.exists():
        pytest.skip("the shared Cyton recording is not on this machine")
    return load_recording(path)


@pytest.fixture
def ramp() -> Recording:
    """1000 rows; the first channel carries the row's number in counts."""
    uv = np.zeros((1000, 3))
    uv[:, 0] = np.arange(1000) * microvolts_per_count(24)
    uv[:, 1] = 1e9
    uv[:, 2] = -1e9
    return Recording(("row", "up", "down"), 250.0, uv)


@dataclass
class Gateway:
    """A link and a decoder, as the acquisition joins them."""

    link: SerialLink
    decoder: CytonDecoder = field(default_factory=CytonDecoder)
    events: list[Event] = field(default_factory=list)

    async def start(self) -> None:
        await self.link.open()
        await self._take(self.decoder.start())

    async def run_until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                await self._take(self.decoder.receive(await self.link.read()))

    async def _take(self, events: list[Event]) -> None:
        self.events += events
        for event in events:
            if isinstance(event, Send):
                await self.link.write(event.data)

    def samples(self, signal: str) -> list[Samples]:
        return [event for event in self.events if isinstance(event, Samples) and event.signal == signal]

    @property
    def next_index(self) -> int:
        return max((event.index + len(event) for event in self.samples("eeg")), default=0)

    def counts(self) -> dict[int, int]:
        """Index -> count of the first channel."""
        return {
            event.index + k: int(count)
            for event in self.events
            if isinstance(event, Samples)
            for k, count in enumerate(event.columns["Fp1"])
        }

    def missing(self) -> list[tuple[int, int]]:
        return [(event.index, event.count) for event in self.events if isinstance(event, Missing)]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            if condition():
                return
            await asyncio.sleep(0.005)


def microvolts(samples: Samples) -> NDArray[np.float64]:
    return np.column_stack([column * samples.scales[name] for name, column in samples.columns.items()])


# The firmware's model by itself


def playing(recording: Recording, *commands: bytes) -> CytonFirmware:
    firmware = CytonFirmware(recording)
    for command in commands:
        firmware.receive(command, 0)
    firmware.receive(b"b", 0)
    return firmware


def channels(packet: bytes) -> list[int]:
    return [int.from_bytes(packet[at : at + 3], "big", signed=True) for at in range(2, 26, 3)]


def test_a_packet(ramp: Recording) -> None:
    packets = playing(ramp).packets_until(5 * PERIOD_NS)
    assert [len(packet) for packet in packets] == [33] * 6
    assert [(packet[0], packet[1], packet[32]) for packet in packets] == [(0xA0, k, 0xC0) for k in range(6)]
    assert channels(packets[5]) == [5, 2**23 - 1, -(2**23), 0, 0, 0, 0, 0]


def test_packets_are_due_at_their_time_without_drift(ramp: Recording) -> None:
    firmware = playing(ramp)
    times_ns = np.cumsum(np.random.default_rng(1).integers(1, 40_000_000, size=500))
    count = 0
    for now_ns in times_ns:
        count += len(firmware.packets_until(int(now_ns)))
        assert count == int(now_ns) // PERIOD_NS + 1
    assert firmware.packets_played == count


def test_the_counter_wraps_and_the_recording_loops(ramp: Recording) -> None:
    packets = playing(ramp).packets_until(1999 * PERIOD_NS)
    assert [packet[1] for packet in packets] == [k % 256 for k in range(2000)]
    assert [channels(packet)[0] for packet in packets] == [k % 1000 for k in range(2000)]


def test_a_long_sleep_is_made_up_in_bounded_portions(ramp: Recording) -> None:
    firmware = playing(ramp)
    portions = [len(firmware.packets_until(9999 * PERIOD_NS)) for _ in range(5)]
    assert portions == [2500, 2500, 2500, 2500, 0]


def test_the_recording_goes_on_in_real_time_between_streams(ramp: Recording) -> None:
    firmware = playing(ramp)
    firmware.packets_until(100 * PERIOD_NS)
    firmware.receive(b"s", 110 * PERIOD_NS)
    assert firmware.packets_until(200 * PERIOD_NS) == []
    firmware.receive(b"v", 200 * PERIOD_NS)
    firmware.receive(b"b", 1300 * PERIOD_NS)
    assert firmware.first_row == 300
    packets = firmware.packets_until(1302 * PERIOD_NS)
    assert [packet[1] for packet in packets] == [0, 1, 2]
    assert [channels(packet)[0] for packet in packets] == [300, 301, 302]
    assert firmware.counts_of(2)[0] == 302


def test_acceleration_comes_with_every_tenth_packet() -> None:
    acceleration = np.tile([0.04, -0.42, 0.238], (100, 1))
    packets = playing(Recording(("Cz",), 250.0, np.zeros((100, 1)), acceleration)).packets_until(30 * PERIOD_NS)
    carried = {packet[1]: struct.unpack(">3h", packet[26:32]) for packet in packets if any(packet[26:32])}
    assert carried == dict.fromkeys((7, 17, 27), (320, -3360, 1904))


@pytest.mark.parametrize(
    ("command", "reply"),
    [
        (b"v", RESET_TEXT),
        (b"V", b"v3.1.2$$$"),
        (b"D", b"060110$$$"),
        (b"d", b"updating channel settings to default$$$"),
        (b"s", b""),
        (b"1!", b""),
        (b"x1020110X", b"Success: Channel set for 1$$$"),
        (b"x1020110Y", b"Failure: Err: 9th char not X$$$"),
        (b"x9020110X", b"Failure: Err: invalid value in channel settings$$$"),
        (b"x1090110X", b"Failure: Err: invalid value in channel settings$$$"),
        (b"x1020110Xx8000110X", b"Success: Channel set for 1$$$Success: Channel set for 8$$$"),
        (b"/2", b"Success: analog$$$"),
        (b"//", b"Success: default$$$"),
        (b"/9", b"Failure: board mode value out of bounds$$$"),
        (b"\x00\xffk", b""),
    ],
)
@pytest.mark.parametrize("cut", [False, True])
def test_replies(command: bytes, reply: bytes, cut: bool, ramp: Recording) -> None:
    firmware = CytonFirmware(ramp)
    pieces = [bytes((byte,)) for byte in command] if cut else [command]
    assert b"".join(firmware.receive(piece, 0) for piece in pieces) == reply


def test_the_register_dump_shows_the_settings(ramp: Recording) -> None:
    firmware = CytonFirmware(ramp)
    firmware.receive(b"x2010110X3", 0)
    dump = firmware.receive(b"?", 0)
    assert dump.endswith(b"$$$")
    assert [line for line in dump.splitlines() if line.startswith(b"CH")][:3] == [
        b"CH1SET, 05, 68",
        b"CH2SET, 06, 18",
        b"CH3SET, 07, E8",
    ]


def test_a_command_that_is_not_finished_in_time_is_dropped(ramp: Recording) -> None:
    firmware = CytonFirmware(ramp)
    assert firmware.receive(b"x10", 0) == b""
    reply = firmware.receive(b"V", 2 * NS_PER_S)
    assert reply.startswith(b"Timeout processing multi byte message")
    assert reply.endswith(b"$$$v3.1.2$$$")


def test_gain_and_channel_switches_change_the_counts(ramp: Recording) -> None:
    (packet,) = playing(ramp, b"x1020110X", b"2").packets_until(0)[:1]
    assert channels(packet)[:3] == [0, 0, -(2**23)]
    firmware = playing(ramp, b"x1020110X", b"2")
    packets = firmware.packets_until(600 * PERIOD_NS)
    assert channels(packets[600])[0] == 100
    assert firmware.receive(b"V@", 600 * PERIOD_NS) == b""
    assert channels(firmware.packets_until(601 * PERIOD_NS)[0])[1] == 2**23 - 1
    firmware.receive(b"sv", 602 * PERIOD_NS)
    firmware.receive(b"b", 600 * PERIOD_NS)
    assert channels(firmware.packets_until(600 * PERIOD_NS)[0])[0] == 600


def test_analog_mode_has_another_stop_byte(ramp: Recording) -> None:
    assert {packet[32] for packet in playing(ramp, b"/2").packets_until(9 * PERIOD_NS)} == {0xC1}


def test_a_board_that_is_off_has_a_dongle_that_says_so(ramp: Recording) -> None:
    firmware = playing(ramp)
    firmware.faults.board_off = True
    assert firmware.receive(b"v", 0) == POLL_FAILURE
    assert firmware.packets_until(NS_PER_S) == []
    assert not firmware.streaming


# Model against decoder, without a port


def decoded(firmware: CytonFirmware, until_ns: int) -> list[Event]:
    """What a decoder makes of a stream that arrives in lumps of 16 ms."""
    decoder = CytonDecoder()
    sends = decoder.start()
    events: list[Event] = []
    for now_ns in range(0, until_ns, 16_000_000):
        data = b"".join(firmware.receive(send.data, now_ns) for send in sends if isinstance(send, Send))
        data += b"".join(firmware.packets_until(now_ns))
        sends = decoder.receive(Chunk(data, now_ns)) if data else []
        events += sends
    return events


def test_faults_are_found_by_the_decoder_and_counted_exactly(ramp: Recording) -> None:
    firmware = CytonFirmware(ramp)
    faults = firmware.faults
    faults.lost |= {10, 11, 12, *range(300, 300 + 256), 900}
    faults.duplicated |= {20, 21}
    # Garbage costs the packet before it as well where both come in one lump: 30 begins a lump, 49 does not.
    faults.garbage |= {50: b"\x01\x02\xa0\x03"}
    faults.cut |= {100: 20}
    events = decoded(firmware, 8 * NS_PER_S)
    found = {
        event.index + k: int(count)
        for event in events
        if isinstance(event, Samples)
        for k, count in enumerate(event.columns["Fp1"])
    }
    missing = {
        number
        for event in events
        if isinstance(event, Missing)
        for number in range(event.index, event.index + event.count)
    }
    assert missing - {49} == faults.lost | {100}
    assert all(index % 1000 == count for index, count in found.items())
    assert missing | set(found) == set(range(firmware.packets_played))
    assert missing.isdisjoint(found)
    rejected = [(event.byte_count, event.reason) for event in events if isinstance(event, Rejected)]
    assert sum(count for count, reason in rejected if reason == "duplicate packet") == 2 * 33


# The whole way: pseudo terminal, serial link, decoder


async def test_the_microvolts_of_the_recording_arrive(blinks: Recording, tmp_path: Path) -> None:
    async with VirtualSerialLine(CytonFirmware(blinks), tmp_path / "cyton") as line:
        assert line.port == str(tmp_path / "cyton")
        gateway = Gateway(SerialLink(line.port, 115200), CytonDecoder(auxiliary="acceleration"))
        await gateway.start()
        await gateway.run_until(lambda: gateway.next_index >= 600)
        await gateway.link.close()
    assert Facts(model="OpenBCI Cyton", firmware="3.1.2") in gateway.events
    assert gateway.missing() == []
    assert not [event for event in gateway.events if isinstance(event, Rejected)]
    arrived = np.concatenate([microvolts(event) for event in gateway.samples("eeg")])
    assert np.abs(arrived - blinks.uv[: len(arrived)]).max() <= HALF_A_COUNT_UV
    assert blinks.acceleration_g is not None
    acceleration = np.concatenate([microvolts(event) for event in gateway.samples("acceleration")])
    # The counter begins anew after 256, so within the first round value k came with packet 10 k + 7.
    assert np.abs(acceleration[:25] - blinks.acceleration_g[7:250:10]).max() < 1e-9
    assert line.dropped_packets == 0
    assert not (tmp_path / "cyton").is_symlink()


async def test_gains_are_set_on_the_board_and_the_microvolts_stay_right(blinks: Recording) -> None:
    async with VirtualSerialLine(CytonFirmware(blinks)) as line:
        decoder = CytonDecoder(gains={"Fp1": 1, "O2": 12})
        gateway = Gateway(SerialLink(line.port, 115200), decoder)
        await gateway.start()
        await gateway.run_until(lambda: gateway.next_index >= 20)
        await gateway.link.close()
    first = next(event for event in gateway.events if isinstance(event, Samples))
    error = np.abs(microvolts(first) - blinks.uv[: len(first)]).max(axis=0)
    assert error[0] <= 0.269
    assert error[1] <= HALF_A_COUNT_UV
    assert error[7] <= 0.0225
    assert first.scales["Fp1"] == microvolts_per_count(1)


async def test_a_gateway_may_come_and_go(ramp: Recording) -> None:
    firmware = CytonFirmware(ramp)
    async with VirtualSerialLine(firmware) as line:
        for turn in range(3):
            gateway = Gateway(SerialLink(line.port, 115200))
            await gateway.start()
            await gateway.run_until(lambda gateway=gateway: gateway.next_index >= 40)
            await gateway.link.close()
            assert gateway.missing() == []
            assert all((firmware.first_row + index) % 1000 == count for index, count in gateway.counts().items())
            assert (firmware.first_row > 0) == (turn > 0)


async def test_a_killed_gateway_leaves_the_port_usable(ramp: Recording) -> None:
    async with VirtualSerialLine(CytonFirmware(ramp)) as line:
        killed = os.open(line.port, os.O_RDWR | os.O_NOCTTY)
        os.fchmod(killed, 0o666)
        fcntl.ioctl(killed, termios.TIOCEXCL)
        os.close(killed)
        async with asyncio.timeout(DEADLINE_S):
            failed = True
            while failed:
                failed = await asyncio.to_thread(opening_fails, line.port)


def opening_fails(port: str) -> bool:
    """Root may open any port, so look as nobody."""
    user = 65534 if os.geteuid() == 0 else None
    return bool(subprocess.run(["sh", "-c", ': <>"$1"', "sh", port], user=user, check=False).returncode)


async def test_faults_on_the_line(ramp: Recording) -> None:
    firmware = CytonFirmware(ramp)
    firmware.faults.lost |= {30, 31, 90}
    firmware.faults.duplicated |= {60}
    firmware.faults.cut |= {120: 5}
    async with VirtualSerialLine(firmware) as line:
        gateway = Gateway(SerialLink(line.port, 115200))
        await gateway.start()
        await gateway.run_until(lambda: gateway.next_index >= 200)
        await gateway.link.close()
    assert gateway.missing() == [(30, 2), (90, 1), (120, 1)]
    assert all(index == count for index, count in gateway.counts().items())


async def test_a_silence_of_more_than_a_counter_period_is_counted(ramp: Recording) -> None:
    firmware = CytonFirmware(ramp)
    async with VirtualSerialLine(firmware) as line:
        gateway = Gateway(SerialLink(line.port, 115200))
        await gateway.start()
        await gateway.run_until(lambda: gateway.next_index >= 50)
        firmware.faults.silent = True
        silent_from = firmware.packets_played
        await until(lambda: firmware.packets_played >= silent_from + 300)
        firmware.faults.silent = False
        await gateway.run_until(lambda: gateway.next_index >= silent_from + 500)
        await gateway.link.close()
    ((first, count),) = gateway.missing()
    assert first == silent_from
    assert count >= 300
    assert all(index % 1000 == row for index, row in gateway.counts().items())


async def test_a_failure_text_ends_the_session(ramp: Recording) -> None:
    firmware = CytonFirmware(ramp)
    async with VirtualSerialLine(firmware) as line:
        gateway = Gateway(SerialLink(line.port, 115200))
        await gateway.start()
        await gateway.run_until(lambda: gateway.next_index >= 10)
        line.send(firmware.fail(OVERFLOW_FAILURE))

        def more_bytes() -> bool:
            # What came in one chunk with the text is given out first, the error with the next chunk.
            line.send(b"\x00")
            return False

        with pytest.raises(DeviceError, match="buffer overflowed"):
            await gateway.run_until(more_bytes)
        await gateway.link.close()


async def test_a_board_that_is_off(ramp: Recording) -> None:
    firmware = CytonFirmware(ramp)
    firmware.faults.board_off = True
    async with VirtualSerialLine(firmware) as line:
        gateway = Gateway(SerialLink(line.port, 115200))
        await gateway.start()
        with pytest.raises(DeviceError, match="Communications timeout"):
            await gateway.run_until(lambda: False)
        await gateway.link.close()


async def test_the_end_of_the_line_is_an_unplugging(ramp: Recording) -> None:
    async with VirtualSerialLine(CytonFirmware(ramp)) as line:
        gateway = Gateway(SerialLink(line.port, 115200))
        await gateway.start()
        await gateway.run_until(lambda: gateway.next_index >= 10)
    with pytest.raises(UnavailableError, match="was lost"):
        await gateway.run_until(lambda: False)
    await gateway.link.close()


@dataclass
class Torrent:
    """A device that floods its line, to fill the pseudo terminal at once."""

    streaming: bool = True
    sent: int = 0

    def receive(self, data: bytes, now_ns: int) -> bytes:
        return b""

    def packets_until(self, now_ns: int) -> list[bytes]:
        packets = [struct.pack(">I", number) * 8 + b"\n" for number in range(self.sent, self.sent + 1000)]
        self.sent += len(packets)
        return packets


async def test_when_nobody_reads_whole_packets_are_dropped_and_counted() -> None:
    torrent = Torrent()
    async with VirtualSerialLine(torrent) as line:
        port = os.open(line.port, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
        try:
            await until(lambda: line.dropped_packets >= 5000)
            data = b""

            def enough_read() -> bool:
                nonlocal data
                with contextlib.suppress(BlockingIOError):
                    data += os.read(port, 4096)
                return len(data) > 60_000

            # More than a full terminal holds: the line goes on where there is room again.
            await until(enough_read)
        finally:
            os.close(port)
    packets = [data[at : at + 33] for at in range(0, len(data) - 33, 33)]
    assert all(packet[:4] * 8 + b"\n" == packet for packet in packets)
    assert line.sent_packets + line.dropped_packets == torrent.sent


async def test_a_link_replaces_a_link_but_never_a_file(ramp: Recording, tmp_path: Path) -> None:
    (tmp_path / "old").symlink_to("nowhere")
    async with VirtualSerialLine(CytonFirmware(ramp), tmp_path / "old") as line:
        assert (tmp_path / "old").readlink().is_char_device()
        assert line.port == str(tmp_path / "old")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="cannot be made"):
        async with VirtualSerialLine(CytonFirmware(ramp), tmp_path / "file"):
            pass
    assert (tmp_path / "file").read_text() == "mine"


# Daisy and test current


@pytest.fixture
def sixteen() -> Recording:
    """1000 rows; channel k carries 100 x row + k in counts."""
    counts = np.arange(1000)[:, None] * 100 + np.arange(16)
    return Recording(tuple(f"E{k}" for k in range(1, 17)), 250.0, counts * microvolts_per_count(24))


def test_packets_of_a_daisy_alternate_and_hold_means(sixteen: Recording) -> None:
    firmware = CytonFirmware(sixteen, daisy=True)
    assert b"On Daisy" in firmware.receive(b"v", 0)
    firmware.receive(b"b", 0)
    packets = firmware.packets_until(3 * PERIOD_NS)
    assert channels(packets[1])[:2] == [50, 51]
    assert channels(packets[2])[:2] == [158, 159]
    assert channels(packets[3])[:2] == [250, 251]
    assert channels(packets[0]) != [8 + k for k in range(8)]


@pytest.mark.parametrize(
    ("daisy", "command", "reply", "count"),
    [
        (True, b"c", b"daisy removed$$$", 8),
        (True, b"cC", b"daisy removed$$$daisy attached16$$$", 16),
        (True, b"C", b"16$$$", 16),
        (False, b"C", b"no daisy to attach!8$$$", 8),
        (False, b"c", b"", 8),
        (True, b"xI020110X", b"Success: Channel set for 16$$$", 16),
        (False, b"xI020110X", b"Failure: Err: invalid value in channel settings$$$", 8),
        (False, b"z301Z", b"Success: Lead off set for 3$$$", 8),
        (False, b"z30", b"", 8),
        (False, b"zQ01Z", b"Failure: Err: invalid value in lead off settings$$$", 8),
    ],
)
def test_replies_of_a_daisy(daisy: bool, command: bytes, reply: bytes, count: int, sixteen: Recording) -> None:
    firmware = CytonFirmware(sixteen, daisy=daisy)
    assert firmware.receive(command, 0) == reply
    assert firmware.channel_count == count


async def test_sixteen_channels_arrive_in_their_places(sixteen: Recording) -> None:
    firmware = CytonFirmware(sixteen, daisy=True)
    # 40 belongs to the Daisy, 61 to the board; 80 and 81 are a whole pair.
    firmware.faults.lost |= {40, 61, 80, 81}
    firmware.faults.duplicated |= {100, 101}
    async with VirtualSerialLine(firmware) as line:
        gateway = Gateway(SerialLink(line.port, 115200), CytonDecoder(DAISY_ELECTRODES, daisy=True))
        await gateway.start()
        await gateway.run_until(lambda: gateway.next_index >= 200)
        await gateway.link.close()
    assert gateway.missing() == [(40, 1)]
    rows = {
        samples.index + k: [int(samples.columns[name][k]) for name in (*DAISY_ELECTRODES, "quality")]
        for samples in gateway.samples("eeg")
        for k in range(len(samples))
    }
    assert set(rows) == set(range(max(rows) + 1)) - {40}
    for pair, row in rows.items():
        board = [0] * 8 if pair == 30 else [200 * pair + 50 + k for k in range(8)]
        daisy = [0] * 8 if pair in (0, 20) else [200 * pair - 50 + k for k in range(8, 16)]
        assert row == [*board, *daisy, {30: 0x00FF, 0: 0xFF00, 20: 0xFF00}.get(pair, 0)]


@pytest.mark.parametrize("daisy", [False, True])
async def test_impedance_all_the_way(daisy: bool) -> None:
    quiet = Recording(tuple(f"E{k}" for k in range(16)), 250.0, np.full((1000, 16), 20_000.0))
    firmware = CytonFirmware(quiet, daisy=daisy)
    firmware.skin_ohm = {0: 1_000, 1: 5_000, 7: 250_000, 15: 40_000}
    electrodes = DAISY_ELECTRODES if daisy else DAISY_ELECTRODES[:8]
    async with VirtualSerialLine(firmware) as line:
        gateway = Gateway(
            SerialLink(line.port, 115200), CytonDecoder(electrodes, daisy=daisy, lead_off=range(1, len(electrodes) + 1))
        )
        await gateway.start()
        await gateway.run_until(lambda: sum(map(len, gateway.samples("lead_off"))) >= 256)
        await gateway.link.close()
    assert gateway.samples("eeg") == []
    parts = [
        np.column_stack([part.columns[name] * part.scales[name] for name in electrodes])
        for part in gateway.samples("lead_off")
    ]
    uv = np.concatenate(parts)[1:]
    kohm = impedance_kohm(uv, gateway.decoder.signals[0].rate_hz or 0.0, averaged=2 if daisy else 1)
    expected = [firmware.skin_ohm.get(place, 10_000) / 1000 for place in range(len(electrodes))]
    assert kohm == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("turns", range(6))
async def test_the_line_ends_also_in_the_moment_of_a_message(turns: int, ramp: Recording) -> None:
    async with asyncio.timeout(DEADLINE_S):
        async with VirtualSerialLine(CytonFirmware(ramp)) as line:
            await asyncio.sleep(0.02)
            line.send(b"$$$")
            for _ in range(turns):
                await asyncio.sleep(0)
