"""Devices that a patient wears, coarse: a packet with a counter three times an hour, over a radio that loses some.

The decoders are small, the rest is the house's own: acquisition, time axis, blocks. Every sample carries its number.
"""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Sequence

import numpy as np

from gateway.devices.base import Event, Facts, Missing, Reading, Samples, SignalSpec, Streaming
from gateway.devices.registry import Asked, Driver, LinkKind
from gateway.errors import UnavailableError
from gateway.links.base import Chunk
from gateway.samples import BRAIN_STATE, EEG, NS_PER_S, VITAL_SIGNS
from tests.simulation.books import Books
from tests.simulation.host import HOST

PERIOD_S = 1200.0
LATE_S_MAX = 0.06
"""Of a packet's way to the host."""
RADIO_LOSS_SHARE = 0.03
READINGS = 3
"""Readings in a packet, a second apart."""
SILENCE_S = 4 * PERIOD_S

HEADSET_SIGNALS = (
    SignalSpec(EEG, 1 / PERIOD_S, ("Fp1",), ("uV",)),
    SignalSpec(BRAIN_STATE, None, ("alpha",), ("1",)),
)
STRAP_SIGNALS = (SignalSpec(VITAL_SIGNS, None, ("temperature",), ("Cel",)),)


class Wearable:
    """The device itself: it counts on, whether anybody listens or not."""

    def __init__(
        self, serial: str, signals: Sequence[SignalSpec], first_s: float, rng: random.Random, books: Books
    ) -> None:
        """`first_s`: about when the first packet goes out; those that send together are committed together."""
        self.serial = serial
        self.signals = signals
        self.is_worn = True
        """Whether it sends at all."""
        self._first_s = first_s
        self._rng = rng
        self._books = books
        self._link: RadioLink | None = None

    async def run(self) -> None:
        """Send a packet every period, for ever."""
        counter = 0
        await asyncio.sleep(self._first_s + self._rng.uniform(0, 2))
        while True:
            link = self._link
            if self.is_worn and link is not None and self._rng.random() >= RADIO_LOSS_SHARE:
                delay_s = self._rng.uniform(0, LATE_S_MAX)
                asyncio.get_running_loop().call_later(delay_s, link.came, struct.pack("<I", counter))
            counter += 1
            await asyncio.sleep(PERIOD_S)

    def new_link(self) -> RadioLink:
        self._link = RadioLink(self)
        return self._link

    def driver(self) -> Driver:
        return Driver(
            description="simulated",
            line=Asked(LinkKind.FILE),
            decoder=lambda _options: CounterDecoder(self.serial, self.signals, self._books),
            start_timeout_s=SILENCE_S,
            silence_timeout_s=SILENCE_S,
        )

    def streams(self) -> list[tuple[str, str]]:
        return [(self.serial, spec.signal) for spec in self.signals]


class RadioLink:
    """A `Link` to a wearable."""

    def __init__(self, wearable: Wearable) -> None:
        self.name = wearable.serial
        self._wearable = wearable
        self._host = HOST.get()
        self._chunks: asyncio.Queue[Chunk | None] = asyncio.Queue()

    def came(self, data: bytes) -> None:
        self._chunks.put_nowait(Chunk(data, self._host.monotonic_ns()))

    async def open(self) -> None:
        await asyncio.sleep(0.5)
        if not self._wearable.is_worn:
            raise UnavailableError(f"{self.name} is out of reach")

    async def read(self) -> Chunk:
        if (chunk := await self._chunks.get()) is None:
            raise UnavailableError(f"{self.name} is out of reach")
        return chunk

    async def write(self, data: bytes, channel: str = "") -> None:
        raise AssertionError("nothing is ever sent to it")

    async def close(self) -> None:
        self._chunks.put_nowait(None)


class CounterDecoder:
    """Packets with a counter: EEG samples by number, or readings."""

    def __init__(self, serial: str, signals: Sequence[SignalSpec], books: Books) -> None:
        self.signals = signals
        self._serial = serial
        self._books = books
        self._first: int | None = None
        self._next = 0

    def start(self) -> list[Event]:
        return [Streaming(), Facts(model="simulated", firmware="1")]

    def receive(self, chunk: Chunk) -> list[Event]:
        if not chunk.data:
            return []
        (counter,) = struct.unpack("<I", chunk.data)
        events: list[Event] = []
        for spec in self.signals:
            events += self._samples(spec, counter, chunk) if spec.rate_hz else self._readings(spec, counter, chunk)
        self._next = counter + 1
        return events

    def _samples(self, spec: SignalSpec, counter: int, chunk: Chunk) -> list[Event]:
        if self._first is None:
            self._first = self._next = counter
        events: list[Event] = []
        if (missing := counter - self._next) > 0:
            self._books.missed(self._serial, spec.signal, missing)
            events.append(Missing(spec.signal, self._next - self._first, missing))
        self._books.handed(self._serial, spec.signal, [counter])
        columns = {spec.channels[0]: np.array([counter], dtype=np.int32)}
        events.append(Samples(spec.signal, counter - self._first, columns, chunk.arrival_ns, {spec.channels[0]: 1.0}))
        return events

    def _readings(self, spec: SignalSpec, counter: int, chunk: Chunk) -> list[Event]:
        numbers = [READINGS * counter + place for place in range(READINGS)]
        self._books.handed(self._serial, spec.signal, numbers, step_s=1.0)
        return [
            Reading(
                spec.signal, {spec.channels[0]: float(number)}, chunk.arrival_ns - (READINGS - 1 - place) * NS_PER_S
            )
            for place, number in enumerate(numbers)
        ]
