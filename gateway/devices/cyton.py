"""Decoder of the OpenBCI Cyton behind its USB dongle, 8 channels at 250 Hz or with a Daisy 16 at 125 Hz: numbers, loss.

Knows no port, thread or clock: the only time it sees is the arrival time of a chunk.
Sources: OpenBCI_Cyton_Library `OpenBCI_32bit_Library.cpp` (commands, packets), OpenBCI_Radios (dongle texts).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Literal

from gateway.devices.base import Event, Rejected, SignalSpec
from gateway.devices.cyton_packets import (
    CHANNELS_PER_PACKET,
    COUNTER_PERIOD,
    DEFAULT_GAIN,
    GAINS,
    PACKET_BYTES,
    PACKETS_PER_S,
    PacketCutter,
    microvolts_per_count,
)
from gateway.devices.cyton_signals import (
    DAISY_CHANNELS,
    AccelerationTrack,
    AuxTrack,
    BoardTrack,
    DaisyTrack,
    Run,
    Track,
)
from gateway.devices.cyton_start import RESET_TEXT, TEXT_BYTES_MAX, TEXT_END, StartSequence, Wanted, failure_in
from gateway.devices.lateness import HiddenLoss
from gateway.errors import ConfigError, DeviceError
from gateway.links.base import Chunk
from gateway.samples import ACCELERATION, EEG, NS_PER_S

CHANNEL_COUNT = CHANNELS_PER_PACKET
DEFAULT_ELECTRODES = ("Fp1", "Fp2", "C3", "C4", "P7", "P8", "O1", "O2")
DAISY_CHANNEL_COUNT = DAISY_CHANNELS
DAISY_ELECTRODES = (*DEFAULT_ELECTRODES, "F7", "F8", "F3", "F4", "T7", "T8", "P3", "P4")
"""The usual places of the sixteen electrodes (OpenBCI GUI)."""

LEAD_OFF = "lead_off"
"""Microvolts while a test current flows: the material of an impedance, and no EEG."""
Carried = Literal["acceleration", "analog", "digital"]
"""What the board shall put into the auxiliary bytes."""

RESTORE = (b"s", b"v")
"""Stops the stream and resets the board: gain 24, no test current, acceleration, whatever was set before."""
RESTORED = RESET_TEXT
"""In the text that confirms it."""

SAMPLE_PERIOD_NS = NS_PER_S // PACKETS_PER_S
COUNTER_PERIOD_NS = COUNTER_PERIOD * SAMPLE_PERIOD_NS
DUPLICATE_REACH = 64
"""How many packets back a repeated one is recognised: a USB lump that comes twice is far smaller."""
CONFIRM_NS = NS_PER_S // 4
"""A host that slept catches up within this time; a real loss stays."""
HELD_SAMPLES_MAX = 4096


class CytonDecoder:
    """Sans-IO decoder of one connection to a Cyton: `start()` once, then `receive()` for every chunk, `finish()`."""

    def __init__(
        self,
        electrodes: Sequence[str] = DEFAULT_ELECTRODES,
        *,
        gains: Mapping[str, int] | None = None,
        daisy: bool = False,
        auxiliary: Carried | None = None,
        lead_off: Sequence[int] = (),
    ) -> None:
        """`electrodes`: names of inputs 1, 2, … (at most 8, with a Daisy 16). `gains`: by electrode, else 24.

        `auxiliary`: which further signal is given, `acceleration` or (analog, digital) `aux`.
        `lead_off`: inputs (from 1) that get the test current of 6 nA; what all electrodes then read is the signal
        `lead_off`, in place of all others (see `gateway.signal.impedance`).
        Raises `ConfigError` for names or gains that the board does not have.
        """
        electrodes = tuple(electrodes)
        by_electrode = dict.fromkeys(electrodes, DEFAULT_GAIN) | dict(gains or {})
        _check(electrodes, by_electrode, DAISY_CHANNELS if daisy else CHANNELS_PER_PACKET)
        inputs = range(1, len(electrodes) + 1)
        self._start = StartSequence(
            Wanted(
                daisy=daisy,
                gains={number: by_electrode[name] for number, name in zip(inputs, electrodes, strict=True)},
                mode=None if auxiliary == ACCELERATION or lead_off else auxiliary,
                lead_off=tuple(lead_off),
            )
        )
        scales = {name: microvolts_per_count(gain) for name, gain in by_electrode.items()}
        voltages = DaisyTrack if daisy else BoardTrack
        self._tracks: list[Track] = [voltages(LEAD_OFF if lead_off else EEG, electrodes, scales)]
        if auxiliary is not None and not lead_off:
            self._tracks.append(AccelerationTrack() if auxiliary == ACCELERATION else AuxTrack(auxiliary))
        self._cutter = PacketCutter()
        self._stray = b""
        self._failure: DeviceError | None = None
        self._next_index = 0
        self._recent: deque[bytes] = deque(maxlen=DUPLICATE_REACH)
        self._hidden = HiddenLoss(SAMPLE_PERIOD_NS, COUNTER_PERIOD, CONFIRM_NS, HELD_SAMPLES_MAX)
        self._held: list[Run] = []

    @property
    def signals(self) -> Sequence[SignalSpec]:
        """EEG in microvolts, 250 Hz or with a Daisy 125 Hz, and what else was asked for."""
        return [track.spec for track in self._tracks]

    def start(self) -> list[Event]:
        """Stop a stream that may be running, and ask for a reset."""
        return self._start.begin()

    def receive(self, chunk: Chunk) -> list[Event]:
        """Decode what came.

        Raises `DeviceError` when the dongle or the board reports a failure, when the board restarts by itself,
        or never answers. Samples that came with the report are given first, the error with the next call.
        """
        self._raise_failure()
        events: list[Event] = []
        data = chunk.data
        if not self._start.done:
            data = self._start.receive(data, events)
        if data and self._start.done:
            self._read_packets(data, chunk.arrival_ns, events)
        if not events:
            self._raise_failure()
        return events

    def finish(self) -> list[Event]:
        """Give out what is held: late samples, with the loss that their lateness shows, and half pairs."""
        events: list[Event] = []
        self._release(self._hidden.suspected_samples, events)
        for track in self._tracks:
            events += track.finish()
        return events

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _read_packets(self, data: bytes, arrival_ns: int, events: list[Event]) -> None:
        packets, stray = self._cutter.cut(data)
        if stray:
            events.append(Rejected(len(stray), "not part of a packet"))
            self._look_for_text(stray)
        if packets:
            runs, repeated = self._number(packets, arrival_ns)
            if repeated:
                events.append(Rejected(repeated * PACKET_BYTES, "duplicate packet"))
            self._settle(runs, arrival_ns, events)

    def _look_for_text(self, stray: bytes) -> None:
        """A text in the middle of the stream: the dongle lost the board, or the board restarted."""
        self._stray = (self._stray + stray)[-TEXT_BYTES_MAX:]
        text, end, rest = self._stray.rpartition(TEXT_END)
        if not end:
            return
        self._stray = rest
        self._failure = failure_in(text)
        # Before the first packet a reset text is only the answer to an earlier program's reset.
        if self._failure is None and RESET_TEXT in text and self._recent:
            self._failure = DeviceError(
                "the Cyton restarted by itself", hint="check its battery and the battery's connector"
            )

    def _number(self, packets: list[bytes], arrival_ns: int) -> tuple[list[Run], int]:
        """Runs of consecutive packets, and how many packets were repetitions of earlier ones."""
        runs: list[Run] = []
        repeated = 0
        # Losing so many that the counter comes round takes a second: then an equal packet is a new one.
        recurring = arrival_ns - self._hidden.last_arrival_ns >= COUNTER_PERIOD_NS // 2
        for packet in packets:
            lost = (packet[1] - self._next_index) % COUNTER_PERIOD
            if lost >= COUNTER_PERIOD - DUPLICATE_REACH and not recurring and packet in self._recent:
                repeated += 1
                continue
            recurring = False
            if lost or not runs:
                runs.append(Run(self._next_index + lost, lost, [], arrival_ns))
            runs[-1].packets.append(packet)
            self._next_index += lost + 1
            self._recent.append(packet)
        return runs, repeated

    def _settle(self, runs: list[Run], arrival_ns: int, events: list[Event]) -> None:
        """Give out runs, once it is sure that no multiple of 256 packets went missing before them."""
        self._held += runs
        if not self._held:
            return
        waiting = sum(len(run.packets) for run in self._held)
        hidden = self._hidden.judge(self._next_index, arrival_ns, self._held[0].arrival_ns, waiting)
        if hidden is not None:
            self._release(hidden, events)

    def _release(self, hidden: int, events: list[Event]) -> None:
        held, self._held = self._held, []
        if held and hidden:
            held[0].lost += hidden
            self._next_index += hidden
            for run in held:
                run.index += hidden
        for run in held:
            for track in self._tracks:
                events += track.take(run)


def _check(electrodes: tuple[str, ...], gains: Mapping[str, int], channels: int) -> None:
    if not 1 <= len(electrodes) <= channels or len(set(electrodes)) != len(electrodes) or "" in electrodes:
        raise ConfigError(f"this Cyton has one to {channels} electrodes with different names, not {electrodes}")
    for name, gain in gains.items():
        if name not in electrodes:
            raise ConfigError(f"a gain is set for {name!r}, expected one of {', '.join(electrodes)}")
        if gain not in GAINS:
            raise ConfigError(f"gain {gain} of {name}: expected one of {', '.join(map(str, GAINS))}")
