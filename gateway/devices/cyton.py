"""Decoder of the OpenBCI Cyton (8 channels, 250 Hz) behind its USB dongle: start sequence, packets, loss.

Knows no port, thread or clock: the only time it sees is the arrival time of a chunk.
Sources: OpenBCI_Cyton_Library `OpenBCI_32bit_Library.cpp` (commands, packets), OpenBCI_Radios (dongle texts).
"""

from __future__ import annotations

import re
import struct
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gateway.devices.base import Event, Facts, Missing, Rejected, Samples, Send, SignalSpec, Streaming
from gateway.errors import ConfigError, DeviceError
from gateway.links.base import Chunk
from gateway.samples import EEG, NS_PER_S

RATE_HZ = 250
CHANNEL_COUNT = 8
DEFAULT_ELECTRODES = ("Fp1", "Fp2", "C3", "C4", "P7", "P8", "O1", "O2")

GAINS = (1, 2, 4, 6, 8, 12, 24)
"""Gains of the ADS1299, in the order of the digit G of the command `x C P G I B S2 S1 X`."""
DEFAULT_GAIN = 24
"""The gain of every channel after a reset (`v`)."""

PACKET_BYTES = 33
PACKET_START = 0xA0
STOP_BYTES = frozenset(range(0xC0, 0xC7))
ACCELERATION_G_PER_COUNT = 0.002 / 16

COUNTER_PERIOD = 256
"""The sample number is one byte."""
SAMPLE_PERIOD_NS = NS_PER_S // RATE_HZ
COUNTER_PERIOD_NS = COUNTER_PERIOD * SAMPLE_PERIOD_NS

TEXT_BYTES_MAX = 1024
"""The longest text, the register dump apart, is a reset text of some 120 bytes."""
START_BYTES_MAX = 256 * 1024
"""A board that was streaming leaves at most a full kernel buffer (64 KiB) behind; 256 KiB are 31 s of stream."""
DUPLICATE_REACH = 64
"""How many packets back a repeated one is recognised: a USB lump that comes twice is far smaller."""
DRIFT_MAX = 0.01
"""The board's clock against the host's: 0.25 % has been measured, so 1 % is never drift."""
DRIFT_NS_PER_CHUNK_MAX = NS_PER_S // 10
"""However long a silence, it does not move the expected arrival by more than this."""
CONFIRM_NS = NS_PER_S // 4
"""A host that slept catches up within this time; a real loss stays."""
HELD_SAMPLES_MAX = 4096

_TEXT_END = b"$$$"
_RESET_TEXT = b"OpenBCI V3"
_FIRMWARE = re.compile(rb"Firmware: v([0-9][0-9A-Za-z.\-]{0,20})")
_FAILURE = re.compile(rb"Failure: ?[\x20-\x7e\r\n]*")
_FAILURE_HINTS = {
    "Communications timeout": "switch the board on (position PC), check its battery, and that board and dongle"
    " are on the same radio channel",
    "System is Down": "switch the board on (position PC) and check its battery",
    "buffer overflowed": "bring the dongle closer to the board, away from other 2.4 GHz transmitters",
}


def microvolts_per_count(gain: int) -> float:
    """Microvolts of one count at this gain: 4.5 V reference, 24 bit (OpenBCI documentation, Cyton data format)."""
    return 4.5e6 / gain / (2**23 - 1)


@dataclass(frozen=True, slots=True)
class Auxiliary:
    """The six bytes after the channels, whose meaning the stop byte tells. None: not in this packet."""

    acceleration_g: tuple[float | None, float | None, float | None] | None = None
    """X, Y, Z; time-stamped packets carry one axis at a time."""
    words: tuple[int, int, int] | None = None
    """Analog or digital inputs, raw (stop byte C1)."""
    board_time_ms: int | None = None


def auxiliary(packet: bytes) -> Auxiliary:
    """Decode bytes 26 to 31 of one packet of 33 bytes."""
    stop = packet[32]
    words: tuple[int, int, int] = struct.unpack(">3h", packet[26:32])
    if stop == 0xC0:
        # 25 Hz: the nine packets in between carry zeros, which are not a measurement.
        x, y, z = (word * ACCELERATION_G_PER_COUNT for word in words)
        return Auxiliary(acceleration_g=(x, y, z) if any(words) else None)
    if stop == 0xC1:
        return Auxiliary(words=words)
    if stop in (0xC3, 0xC4):
        axes: list[float | None] = [None, None, None]
        axis = packet[1] % 10 - 7
        if axis >= 0:
            axes[axis] = words[0] * ACCELERATION_G_PER_COUNT
        x_g, y_g, z_g = axes
        board_time_ms = int.from_bytes(packet[28:32], "big")
        return Auxiliary((x_g, y_g, z_g) if axis >= 0 else None, board_time_ms=board_time_ms)
    if stop in (0xC5, 0xC6):
        return Auxiliary(board_time_ms=int.from_bytes(packet[28:32], "big"))
    return Auxiliary()


@dataclass(frozen=True, slots=True)
class _Step:
    """One line of the start sequence."""

    command: bytes
    reply: bytes = b""
    """What the board's text must contain before the next step; empty: the command has no reply."""


_STOP = _Step(b"s")
# A stream may still be in flight: what comes before the reset text is drained unread.
_RESET = _Step(b"v", _RESET_TEXT)
# With a Daisy attached every other packet belongs to it; this decoder takes the eight channels of the board.
_EIGHT_CHANNELS = _Step(b"c", b"daisy removed")
_BEGIN = _Step(b"b")


@dataclass(slots=True)
class _Run:
    """Packets with consecutive numbers out of one chunk, and what was lost before them."""

    index: int
    lost: int
    packets: list[bytes]
    arrival_ns: int


class CytonDecoder:
    """Sans-IO decoder of one connection to a Cyton: `start()` once, then `receive()` for every chunk."""

    def __init__(
        self, electrodes: Sequence[str] = DEFAULT_ELECTRODES, *, gains: Mapping[str, int] | None = None
    ) -> None:
        """`electrodes`: names of inputs 1, 2, … (one to eight). `gains`: by electrode, 24 where none is given.

        Raises `ConfigError` for names or gains that the board does not have.
        """
        self._electrodes = tuple(electrodes)
        self._gains = dict.fromkeys(self._electrodes, DEFAULT_GAIN) | dict(gains or {})
        _check(self._electrodes, self._gains)
        self._scales = {name: microvolts_per_count(gain) for name, gain in self._gains.items()}
        self._steps = deque([_STOP, _RESET])
        self._text = b""
        self._start_bytes = 0
        self._rest = b""
        self._stray = b""
        self._failure: DeviceError | None = None
        self._next_index = 0
        self._recent: deque[bytes] = deque(maxlen=DUPLICATE_REACH)
        self._baseline_ns: int | None = None
        self._last_arrival_ns = 0
        self._held: list[_Run] = []
        self._acceleration_g: tuple[float, float, float] | None = None

    @property
    def signals(self) -> Sequence[SignalSpec]:
        """EEG in microvolts, 250 Hz."""
        return (SignalSpec(EEG, float(RATE_HZ), self._electrodes, ("uV",) * len(self._electrodes)),)

    @property
    def acceleration_g(self) -> tuple[float, float, float] | None:
        """The newest acceleration X, Y, Z in g; None before the first."""
        return self._acceleration_g

    def start(self) -> list[Event]:
        """Stop a stream that may be running, and ask for a reset."""
        events: list[Event] = []
        self._advance(events)
        return events

    def receive(self, chunk: Chunk) -> list[Event]:
        """Decode what came.

        Raises `DeviceError` when the dongle or the board reports a failure, when the board restarts by itself,
        or never answers. Samples that came with the report are given first, the error with the next call.
        """
        self._raise_failure()
        events: list[Event] = []
        data = chunk.data
        if self._steps:
            data = self._read_replies(data, events)
        if data and not self._steps:
            self._read_packets(data, chunk.arrival_ns, events)
        if not events:
            self._raise_failure()
        return events

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _advance(self, events: list[Event]) -> None:
        while self._steps:
            events.append(Send(self._steps[0].command))
            if self._steps[0].reply:
                return
            self._steps.popleft()
        events.append(Streaming())

    def _read_replies(self, data: bytes, events: list[Event]) -> bytes:
        """Go through the texts in `data`; give back what follows the last one that was waited for."""
        self._start_bytes += len(data)
        self._text += data
        while self._steps:
            text, end, rest = self._text.partition(_TEXT_END)
            if not end:
                self._text = self._text[-TEXT_BYTES_MAX:]
                if self._start_bytes > START_BYTES_MAX:
                    raise DeviceError(
                        f"the Cyton sent {self._start_bytes} bytes and no answer to {self._steps[0].command!r}",
                        hint="switch the board off and on, and see that nothing else uses its dongle",
                    )
                return b""
            self._text = rest
            self._take_reply(text, events)
        rest, self._text = self._text, b""
        return rest

    def _take_reply(self, text: bytes, events: list[Event]) -> None:
        step = self._steps[0]
        failure = _FAILURE.search(text)
        if failure:
            raise _failure_error(failure.group())
        if step.reply not in text:
            return
        self._steps.popleft()
        if step is _RESET:
            self._read_reset_text(text[text.rfind(_RESET_TEXT) :], events)
        self._advance(events)

    def _read_reset_text(self, text: bytes, events: list[Event]) -> None:
        version = _FIRMWARE.search(text)
        firmware = version.group(1).decode("ascii") if version else None
        events.append(Facts(model="OpenBCI Cyton", firmware=firmware))
        if b"On Daisy" in text:
            self._steps.append(_EIGHT_CHANNELS)
        for number, name in enumerate(self._electrodes, start=1):
            gain = self._gains[name]
            if gain == DEFAULT_GAIN:
                continue
            if firmware is None or int(firmware.split(".")[0]) < 3:
                # Older firmware does not confirm a setting; a wrong unit would be worse than no data.
                raise DeviceError(
                    f"the Cyton's firmware {firmware or '1'} does not confirm a gain, and {name} wants {gain}",
                    hint="update the board's firmware to 3.x, or leave the gains at 24",
                )
            command = f"x{number}0{GAINS.index(gain)}0110X".encode("ascii")
            self._steps.append(_Step(command, f"Channel set for {number}".encode("ascii")))
        self._steps.append(_BEGIN)

    def _read_packets(self, data: bytes, arrival_ns: int, events: list[Event]) -> None:
        packets, stray = self._cut(data)
        if stray:
            events.append(Rejected(len(stray), "not part of a packet"))
            self._look_for_text(stray)
        if packets:
            runs, repeated = self._number(packets, arrival_ns)
            if repeated:
                events.append(Rejected(repeated * PACKET_BYTES, "duplicate packet"))
            self._settle(runs, arrival_ns, events)

    def _cut(self, data: bytes) -> tuple[list[bytes], bytes]:
        """Packets and stray bytes. 0xA0 occurs inside data, so after a failed candidate go on by one byte."""
        buffer = self._rest + data
        packets: list[bytes] = []
        stray = bytearray()
        at = 0
        self._rest = b""
        while True:
            start = buffer.find(PACKET_START, at)
            if start < 0:
                stray += buffer[at:]
                return packets, bytes(stray)
            stray += buffer[at:start]
            end = start + PACKET_BYTES
            if end > len(buffer):
                self._rest = buffer[start:]
                return packets, bytes(stray)
            if buffer[end - 1] in STOP_BYTES and (end == len(buffer) or buffer[end] == PACKET_START):
                packets.append(buffer[start:end])
                at = end
            else:
                stray.append(PACKET_START)
                at = start + 1

    def _look_for_text(self, stray: bytes) -> None:
        """A text in the middle of the stream: the dongle lost the board, or the board restarted."""
        self._stray = (self._stray + stray)[-TEXT_BYTES_MAX:]
        text, end, rest = self._stray.rpartition(_TEXT_END)
        if not end:
            return
        self._stray = rest
        failure = _FAILURE.search(text)
        if failure:
            self._failure = _failure_error(failure.group())
        elif _RESET_TEXT in text and self._recent:
            # Before the first packet it is only the answer to an earlier program's reset.
            self._failure = DeviceError(
                "the Cyton restarted by itself", hint="check its battery and the battery's connector"
            )

    def _number(self, packets: list[bytes], arrival_ns: int) -> tuple[list[_Run], int]:
        """Runs of consecutive packets, and how many packets were repetitions of earlier ones."""
        runs: list[_Run] = []
        repeated = 0
        # Losing so many that the counter comes round takes a second: then an equal packet is a new one.
        recurring = arrival_ns - self._last_arrival_ns >= COUNTER_PERIOD_NS // 2
        for packet in packets:
            lost = (packet[1] - self._next_index) % COUNTER_PERIOD
            if lost >= COUNTER_PERIOD - DUPLICATE_REACH and not recurring and packet in self._recent:
                repeated += 1
                continue
            recurring = False
            if lost or not runs:
                runs.append(_Run(self._next_index + lost, lost, [], arrival_ns))
            runs[-1].packets.append(packet)
            self._next_index += lost + 1
            self._recent.append(packet)
        return runs, repeated

    def _settle(self, runs: list[_Run], arrival_ns: int, events: list[Event]) -> None:
        """Give out runs, once it is sure that no multiple of 256 packets went missing before them.

        The counter cannot show such a loss; that the stream is late by a multiple of 1.024 s does. A host that
        slept is late as well, but catches up at once: what is late is held until one or the other is clear.
        """
        if not runs and not self._held:
            return
        self._held += runs
        periods = self._periods_late(arrival_ns)
        if periods:
            waited = arrival_ns - self._held[0].arrival_ns >= CONFIRM_NS
            if not waited and sum(len(run.packets) for run in self._held) < HELD_SAMPLES_MAX:
                return
            hidden = periods * COUNTER_PERIOD
            self._held[0].lost += hidden
            self._next_index += hidden
            for run in self._held:
                run.index += hidden
        for run in self._held:
            if run.lost:
                events.append(Missing(EEG, run.index - run.lost, run.lost))
            events.append(self._samples(run))
        self._held = []

    def _periods_late(self, arrival_ns: int) -> int:
        """By how many whole counter periods the stream is later than its earliest arrivals let expect."""
        lateness_ns = arrival_ns - self._next_index * SAMPLE_PERIOD_NS
        if self._baseline_ns is None:
            self._baseline_ns = lateness_ns
        drift_ns = int(DRIFT_MAX * (arrival_ns - self._last_arrival_ns))
        self._last_arrival_ns = arrival_ns
        self._baseline_ns = min(lateness_ns, self._baseline_ns + min(drift_ns, DRIFT_NS_PER_CHUNK_MAX))
        return (lateness_ns - self._baseline_ns + COUNTER_PERIOD_NS // 2) // COUNTER_PERIOD_NS

    def _samples(self, run: _Run) -> Samples:
        for packet in run.packets:
            self._keep_acceleration(packet)
        counts = _channel_counts(run.packets)
        columns = {name: counts[channel] for channel, name in enumerate(self._electrodes)}
        return Samples(EEG, run.index, columns, run.arrival_ns, self._scales)

    def _keep_acceleration(self, packet: bytes) -> None:
        new = auxiliary(packet).acceleration_g if any(packet[26:32]) else None
        if new is not None:
            old = self._acceleration_g or (0.0, 0.0, 0.0)
            x, y, z = (last if axis is None else axis for axis, last in zip(new, old, strict=True))
            self._acceleration_g = (x, y, z)


def _channel_counts(packets: Sequence[bytes]) -> NDArray[np.int32]:
    """int32 (8, n): the 24-bit big-endian two's complement values of n packets."""
    frames = np.frombuffer(b"".join(packets), dtype=np.uint8).reshape(-1, PACKET_BYTES)
    octets = frames[:, 2:26].reshape(-1, CHANNEL_COUNT, 3).transpose(2, 1, 0).astype(np.int32)
    counts: NDArray[np.int32] = octets[0] << 16 | octets[1] << 8 | octets[2]
    counts ^= 0x800000
    counts -= 0x800000
    return counts


def _check(electrodes: tuple[str, ...], gains: Mapping[str, int]) -> None:
    if not 1 <= len(electrodes) <= CHANNEL_COUNT or len(set(electrodes)) != len(electrodes) or "" in electrodes:
        raise ConfigError(f"a Cyton has one to {CHANNEL_COUNT} electrodes with different names, not {electrodes}")
    for name, gain in gains.items():
        if name not in electrodes:
            raise ConfigError(f"a gain is set for {name!r}, expected one of {', '.join(electrodes)}")
        if gain not in GAINS:
            raise ConfigError(f"gain {gain} of {name}: expected one of {', '.join(map(str, GAINS))}")


def _failure_error(text: bytes) -> DeviceError:
    said = " ".join(text.decode("ascii").split())
    hint = next((hint for sign, hint in _FAILURE_HINTS.items() if sign in said), "switch the board off and on")
    return DeviceError(f"the Cyton's dongle says: {said}", hint=hint)
