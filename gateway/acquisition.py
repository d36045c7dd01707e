"""One device's life: open the link, decode, put times on the samples, hand blocks to the outbox; begin again when
it goes quiet. Knows no broker and no disk.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from types import MappingProxyType

import msgspec
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception
from tenacity.wait import wait_base, wait_random_exponential

from gateway.clock import HostClock
from gateway.devices.base import (
    Event,
    Facts,
    Missing,
    NoValue,
    Reading,
    Rejected,
    Samples,
    Send,
    SignalSpec,
    Streaming,
    finish,
)
from gateway.devices.registry import Driver
from gateway.errors import RefusedError, UnavailableError, WardlinkError
from gateway.links.base import Chunk, Link
from gateway.samples import EEG, NS_PER_S, LossRecord, SampleBlock
from gateway.segments import Segments
from gateway.settings import Device
from gateway.signal.conditioning import check_settings
from gateway.signal.electrodes import Electrode
from gateway.signal.features import Features
from gateway.wire.messages import DeviceMeta, ElectrodeMeta, SignalMeta

log = logging.getLogger(__name__)

BACKOFF_S_MAX = 3.0
"""Longest pause between two attempts: whoever plugs a device in is not kept waiting."""
ELECTRODES_TOLD_S = 10.0
"""Between two messages of how the electrodes are: a loose one may change with every second."""
STEADY_S = 10.0
"""A connection that gave data for so long was a good one: the next failure starts the back-off anew."""


class State(StrEnum):
    """Where a device's connection stands."""

    CONNECTING = "connecting"
    STARTING = "starting"
    STREAMING = "streaming"
    WAITING = "waiting"


TRANSITIONS: Mapping[State, frozenset[State]] = MappingProxyType(
    {
        State.CONNECTING: frozenset({State.STARTING, State.WAITING}),
        State.STARTING: frozenset({State.STREAMING, State.WAITING}),
        State.STREAMING: frozenset({State.WAITING}),
        State.WAITING: frozenset({State.CONNECTING}),
    }
)
"""What may follow on each state. Data that stops leads to WAITING: nothing goes on that did not begin anew."""


@dataclass(slots=True)
class Condition:
    """What an operator wants to know of a device's connection."""

    state: State = State.CONNECTING
    reason: str = "gateway started"
    """Of the last change."""
    since_ns: int = field(default_factory=time.monotonic_ns)
    """When that was, CLOCK_MONOTONIC in ns: a clock that is set later does not make it wrong."""
    segments: int = 0
    rejected_bytes: int = 0
    samples: Counter[str] = field(default_factory=Counter)
    """Given out, by signal."""
    lost: Counter[str] = field(default_factory=Counter)
    """On record as lost on the radio, by signal."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where a device's data goes."""

    emit: Callable[[SampleBlock | LossRecord], None]
    announce: Callable[[DeviceMeta], None]
    on_state: Callable[[Device, Features], None]


class Acquisition:
    """Reads one device for as long as `run` runs."""

    def __init__(
        self,
        gateway: str,
        device: Device,
        driver: Driver,
        link: Callable[[], Link],
        host: HostClock,
        outputs: Outputs,
        wait: wait_base | None = None,
    ) -> None:
        self.device = device
        self.condition = Condition()
        self._driver = driver
        self._new_link = link
        self._host = host
        self._outputs = outputs
        self._newest_ns: dict[str, int] = {}
        """Newest time (UTC) of each signal, less what held times were put right by: it moves along with them."""
        self._segment: Segments | None = None
        self._electrodes_told_ns: int | None = None
        self._electrodes_seen: object = None
        """The judgement that was looked at last."""
        self._wait = wait or wait_random_exponential(multiplier=0.25, max=BACKOFF_S_MAX)
        specs = driver.decoder(device.options).signals
        self.read_as = _with_possible_features(device, specs)
        """The device, with what its streams allow of it."""
        signals = [
            SignalMeta(signal=spec.signal, channels=list(spec.channels), units=list(spec.units), rate_hz=spec.rate_hz)
            for spec in specs
        ]
        self._birth = DeviceMeta(
            v=1, schema="meta", gateway=gateway, device=device.serial, driver=device.driver, signals=signals
        )

    @property
    def since(self) -> str:
        """When the last change of its condition was: UTC, ISO 8601, by the host's clock as it is set now."""
        return utc_text(self._host.utc_ns(self.condition.since_ns))

    @property
    def electrodes(self) -> dict[str, Electrode]:
        """How each electrode is now, by name; empty for a device that has none, or that is not read at the moment."""
        return {} if self._segment is None else self._segment.electrodes

    async def run(self) -> None:
        """Connect, read, and connect again, until cancelled or until the source says that it has no more."""
        try:
            await self._keep_reading()
        except RefusedError as error:
            self._change(State.WAITING, str(error))
            log.warning("%s: %s; it is not tried again", self.device.serial, error)

    async def _keep_reading(self) -> None:
        while True:
            retrying = AsyncRetrying(
                # A bug in one driver must not end the other devices: it is logged as one and tried again, too.
                retry=retry_if_exception(_is_worth_another_try),
                wait=self._wait,
                before_sleep=self._log_retry,
            )
            async for attempt in retrying:
                with attempt:
                    await self._connect_and_read()

    async def _connect_and_read(self) -> None:
        """One connection. Returns when it is lost after a good run, raises when it failed early."""
        self._change(State.CONNECTING, self.condition.reason)
        loop = asyncio.get_running_loop()
        link = self._new_link()
        begun = loop.time()
        try:
            await link.open()
            begun = loop.time()
            await self._read(link)
        except WardlinkError as error:
            if self.condition.state is not State.STREAMING or loop.time() - begun < STEADY_S:
                raise
            log.warning("%s: %s; connecting again", self.device.serial, error)
            self._change(State.WAITING, str(error))
        finally:
            await link.close()

    async def _read(self, link: Link) -> None:
        """Read until the link is lost or the data stops. What was complete by then is given out."""
        decoder = self._driver.decoder(self.device.options)
        segment = Segments(self.read_as, decoder, self._host, self._emit, self._outputs.on_state, self._begin_segment)
        self._segment = segment
        self._change(State.STARTING, "link is open")
        self._host.on_break.append(segment.finish)
        try:
            await self._handle(decoder.start(), link, segment)
            timeout_s = self._driver.start_timeout_s
            last_data = asyncio.get_running_loop().time()
            while True:
                async with asyncio.timeout_at(last_data + timeout_s):
                    chunk = await link.read()
                if await self._handle(decoder.receive(chunk), link, segment):
                    last_data = asyncio.get_running_loop().time()
                    timeout_s = self._driver.silence_timeout_s
                    self._change(State.STREAMING, "data flows")
        except TimeoutError:
            # A device's last words may be waiting in the decoder for the next chunk, which did not come.
            decoder.receive(Chunk(b"", time.monotonic_ns()))
            raise UnavailableError(
                f"no data from {link.name} for {timeout_s:g} s", hint="is the device on, charged and in reach?"
            ) from None
        finally:
            self._segment = None
            for event in finish(decoder):
                if isinstance(event, Samples | Missing | Reading):
                    segment.take(event)
            segment.finish()
            self._host.on_break.remove(segment.finish)

    def _begin_segment(self) -> tuple[int, dict[str, int]]:
        """Number of the next segment, and the newest time (UTC) of each signal, behind which all of it lies."""
        self.condition.segments += 1
        shift_ns = self._host.shift_ns
        return self.condition.segments - 1, {signal: ns + shift_ns for signal, ns in self._newest_ns.items()}

    async def _handle(self, events: Sequence[Event], link: Link, segment: Segments) -> bool:
        """Act on events; True if there was data among them."""
        for event in events:
            match event:
                case Send(data, channel):
                    await link.write(data, channel)
                case Facts():
                    self._learn(event)
                case Rejected(count, reason):
                    self.condition.rejected_bytes += count
                    log.debug("%s: %d bytes rejected: %s", self.device.serial, count, reason)
                case Streaming():
                    self._outputs.announce(self._birth)
                case _:
                    segment.take(event)
        segment.flush_readings()
        self._tell_electrodes(segment)
        return any(isinstance(event, Samples | Reading | NoValue) for event in events)

    def _emit(self, content: SampleBlock | LossRecord) -> None:
        if isinstance(content, SampleBlock):
            self._newest_ns[content.signal] = content.last_ns - self._host.shift_ns
            self.condition.samples[content.signal] += len(content)
        else:
            self.condition.lost[content.signal] += content.sample_count
        self._outputs.emit(content)

    def _learn(self, facts: Facts) -> None:
        known = {
            name: value for name in ("model", "firmware", "battery_pct") if (value := getattr(facts, name)) is not None
        }
        self._birth = msgspec.structs.replace(self._birth, **known)
        self._outputs.announce(self._birth)

    def _tell_electrodes(self, segment: Segments) -> None:
        """Announce how the electrodes are, when it changed and was not announced a moment ago."""
        judgement = segment.judgement
        if judgement is self._electrodes_seen:
            return
        self._electrodes_seen = judgement
        now_ns = time.monotonic_ns()
        if self._electrodes_told_ns is not None and now_ns - self._electrodes_told_ns < ELECTRODES_TOLD_S * NS_PER_S:
            return
        judged = segment.electrodes
        told = {each.name: each.state for each in self._birth.electrodes or ()}
        states = {name: each.state for name, each in judged.items()}
        if told == states or not any(each.is_judged for each in judged.values()):
            return
        self._electrodes_told_ns = now_ns
        electrodes = [ElectrodeMeta(name, each.state, each.reason) for name, each in judged.items()]
        self._birth = msgspec.structs.replace(self._birth, electrodes=electrodes)
        self._outputs.announce(self._birth)
        bad = [f"{name} {each.state} ({each.reason})" for name, each in judged.items() if not each.is_usable]
        log.info("%s: electrodes: %s", self.device.serial, ", ".join(bad) or "all ok")

    def _log_retry(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        bug = None if isinstance(error, WardlinkError) else error
        reason = str(error) if bug is None else f"internal error, see the log: {bug!r}"
        self._change(State.WAITING, reason)
        wait_s = state.next_action.sleep if state.next_action else 0.0
        level = logging.WARNING if bug is None else logging.ERROR
        log.log(level, "%s: %s; next attempt in %.1f s", self.device.serial, reason, wait_s, exc_info=bug)

    def _change(self, state: State, reason: str) -> None:
        before = self.condition.state
        if state is before:
            return
        if state not in TRANSITIONS[before]:
            # A bug, and no reason to end: what is shown is what is.
            log.error("%s: %s follows on %s, which it must not (%s)", self.device.serial, state, before, reason)
        log.info("%s: %s (%s)", self.device.serial, state, reason)
        self.condition.state, self.condition.reason = state, reason
        self.condition.since_ns = time.monotonic_ns()


def _with_possible_features(device: Device, specs: Sequence[SignalSpec]) -> Device:
    """The device, without brain states where its stream is none that these are defined for."""
    for spec in specs:
        if device.brain_state and spec.signal == EEG and spec.rate_hz is not None:
            try:
                check_settings(spec.rate_hz, len(spec.channels), device.features.settings())
            except ValueError as error:
                log.warning("%s: its samples are read, but there will be no brain state: %s", device.serial, error)
                return msgspec.structs.replace(device, brain_state=False)
    return device


def utc_text(time_ns: int) -> str:
    """UTC in ns since 1970 as ISO 8601, to the second."""
    return datetime.fromtimestamp(time_ns // NS_PER_S, UTC).isoformat()


def _is_worth_another_try(error: BaseException) -> bool:
    return isinstance(error, Exception) and not isinstance(error, RefusedError)
