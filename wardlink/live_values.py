"""The newest values of one device and how its electrodes are, as a table for a terminal and as a line for a pipe."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gateway.acquisition import Acquisition, State
from gateway.devices.base import SignalSpec
from gateway.samples import BRAIN_STATE, EEG, NS_PER_S, QUALITY, ElectrodeState, LossRecord, SampleBlock
from gateway.signal.electrodes import Electrode
from gateway.wire.messages import DeviceMeta
from wardlink.terminal import harmless

if TYPE_CHECKING:
    from rich.console import RenderableType

_COLOURS = {ElectrodeState.OK: "green", ElectrodeState.UNKNOWN: "dim", ElectrodeState.NOISY: "yellow"}
_BAD = "bold red"


@dataclass(slots=True)
class _Stream:
    """The newest of one signal."""

    values: dict[str, float] = field(default_factory=dict)
    rate_hz: float | None = None
    """As its blocks say; None where the device reports when it likes."""
    samples: int = 0
    lost: int = 0


class LiveValues:
    """Takes what an acquisition gives out and keeps the newest of it."""

    def __init__(self, signals: Sequence[SignalSpec]) -> None:
        self._units = {(spec.signal, name): spec.units[k] for spec in signals for k, name in enumerate(spec.channels)}
        self._rated = {spec.signal for spec in signals if spec.rate_hz is not None}
        self._streams: dict[str, _Stream] = {}
        self.facts: DeviceMeta | None = None

    @property
    def heard(self) -> bool:
        """A value came."""
        return any(stream.samples for stream in self._streams.values())

    def learn(self, birth: DeviceMeta) -> None:
        """What the device says of itself."""
        self.facts = birth

    def take(self, content: SampleBlock | LossRecord) -> None:
        """Keep the newest."""
        stream = self._streams.setdefault(content.signal, _Stream())
        if isinstance(content, LossRecord):
            stream.lost += content.sample_count
            return
        stream.samples += len(content)
        for name in content.columns:
            # A device may leave a field out for a while: what it said last stays.
            value = float(content.physical(name)[-1])
            if name != QUALITY and not (math.isnan(value) and content.signal not in self._rated):
                stream.values[name] = value
        if content.signal in self._rated and len(content) > 1:
            stream.rate_hz = (len(content) - 1) * NS_PER_S / (content.last_ns - content.first_ns)

    def rows(self, electrodes: Mapping[str, Electrode]) -> Iterator[tuple[str, str, str, str, str]]:
        """Signal, name, value with its unit, state, reason: electrodes first."""
        for name, electrode in electrodes.items():
            value = "" if math.isnan(electrode.rms_uv) else f"{electrode.rms_uv:.1f} uV rms"
            yield EEG, name, value, electrode.state.value, electrode.reason
        for signal, stream in self._streams.items():
            for name, number in stream.values.items():
                if signal != EEG or name not in electrodes:
                    unit = self._units.get((signal, name), "")
                    yield signal, name, f"{_number(number, signal)} {unit}".rstrip(), "", ""

    def rates(self) -> list[str]:
        """Each signal with a fixed rate: as its samples came, and what was lost."""
        return [
            f"{signal} {stream.rate_hz:.1f} Hz" + (f", {stream.lost} lost" if stream.lost else "")
            for signal, stream in self._streams.items()
            if stream.rate_hz is not None
        ]

    def device(self) -> list[str]:
        """What the device says of itself."""
        facts = self.facts
        if facts is None:
            return []
        battery = "" if facts.battery_pct is None else f"battery {facts.battery_pct:g} %"
        return [harmless(text) for text in (facts.model or "", facts.firmware or "", battery) if text]


def plain_line(acquisition: Acquisition, values: LiveValues) -> str:
    """All of it in one line."""
    if acquisition.condition.state is not State.STREAMING:
        return _condition(acquisition)
    shown = [_condition(acquisition), *values.rates()]
    for signal, name, value, state, reason in values.rows(acquisition.electrodes):
        of = f"{name} " if signal == EEG else f"{signal}.{name} "
        shown.append(of + " ".join(part for part in (state, f"({reason})" if reason else "", value) if part))
    shown.extend(values.device())
    return " | ".join(shown)


def table(acquisition: Acquisition, values: LiveValues) -> RenderableType:
    """The same as a table for a terminal."""
    from rich.console import Group  # noqa: PLC0415 - only where there is a terminal
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    head = Text(" · ".join([_condition(acquisition), *values.rates(), *values.device()]), style="bold")
    if acquisition.condition.state is not State.STREAMING:
        return Group(head, Text("Ctrl-C ends it", style="dim"))
    shown = Table()
    for column in ("signal", "name", "value", "state", "reason"):
        shown.add_column(column)
    for signal, name, value, state, reason in values.rows(acquisition.electrodes):
        colour = _COLOURS.get(ElectrodeState(state), _BAD) if state else ""
        shown.add_row(signal, Text(name), value, Text(state, style=colour), Text(reason))
    return Group(head, shown, Text("Ctrl-C ends it", style="dim"))


def _condition(acquisition: Acquisition) -> str:
    condition = acquisition.condition
    text = f"{acquisition.device.serial} {condition.state}"
    return text if condition.state is State.STREAMING else harmless(f"{text}: {condition.reason}")


def _number(value: float, signal: str) -> str:
    if math.isnan(value):
        return "no value"
    return f"{value:.2f}" if signal == BRAIN_STATE else f"{value:.6g}"
