"""The gateway's state as metrics in Prometheus' text format: made from what `status.json` says, for any collector.

The only file that imports prometheus_client, and the owner of the thread that answers scrapes. Knows neither devices
nor the outbox: the values are given to it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway.errors import UnavailableError
from gateway.samples import NS_PER_S, ClockState, ElectrodeState
from gateway.service import VERSION
from gateway.status import DeviceStatus, GatewayStatus

PREFIX = "wardlink_"
REASON_CHARACTERS_MAX = 200
"""Of the label that carries the reason of the last change: there is one at a time for each device."""

_Sample: TypeAlias = tuple[Sequence[str], float]


def exposition(status: GatewayStatus, states: Sequence[str], *, runs: bool) -> str:
    """All metrics of a gateway. `states`: what a device's state may be. `runs`: the status was written just now."""
    registry = CollectorRegistry()
    registry.register(_Fixed(list(_families(status, states, runs=runs))))
    return generate_latest(registry).decode()


class Exporter:
    """Tells the metrics on: into a file, to whoever scrapes an address, or both. Its thread lives until `close`."""

    def __init__(self, states: Sequence[str], textfile: Path | None, address: tuple[str, int] | None) -> None:
        """`states`: what a device's state may be."""
        self._states = states
        self._textfile = textfile
        self._address = address
        self._told = _Fixed([])
        self._stop: Callable[[], None] | None = None
        self.port = 0
        """Of the address, once it is open."""

    def tell(self, status: GatewayStatus) -> None:
        """Give the newest. Blocks. Raises `UnavailableError`, after what is possible was done; may be called again."""
        self._told.families = list(_families(status, self._states, runs=status.running))
        try:
            if self._address is not None and self._stop is None:
                self._listen(*self._address)
        finally:
            if self._textfile is not None:
                _write(self._textfile, exposition(status, self._states, runs=status.running))

    def close(self) -> None:
        """Answer no more; may be called in any state. Blocks."""
        stop, self._stop = self._stop, None
        if stop is not None:
            stop()

    def _listen(self, host: str, port: int) -> None:
        registry = CollectorRegistry()
        registry.register(self._told)
        try:
            server, thread = start_http_server(port, host, registry)
        except OSError as error:
            raise UnavailableError(
                f"metrics cannot be served at {host}:{port}: {error.strerror or error}",
                hint="metrics.listen: is the address this machine's, and the port free?",
            ) from error
        self.port = int(server.server_port)

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        self._stop = stop


def _write(file: Path, text: str) -> None:
    """Replace the file in one step: the collector may read it at any time."""
    new = file.with_name(f".{file.name}.new")
    try:
        new.write_text(text)
        os.replace(new, file)  # noqa: PTH105 - the name says that an old one is replaced
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise UnavailableError(
            f"metrics cannot be written to {file}: {error.strerror}",
            hint="metrics.textfile: may the gateway's user write there?",
        ) from error


class _Fixed(Collector):
    """Gives what it was given; a list that is replaced as a whole may be read from another thread."""

    def __init__(self, families: list[Metric]) -> None:
        self.families = families

    def collect(self) -> Iterator[Metric]:
        yield from self.families

    def describe(self) -> list[Metric]:
        """Nothing ahead of time: names are fixed, and not asked for at the registration."""
        return []


def _families(status: GatewayStatus, states: Sequence[str], *, runs: bool) -> Iterator[Metric]:
    info = InfoMetricFamily(f"{PREFIX}gateway", "which gateway this is")
    info.add_metric([], {"gateway": status.gateway, "version": VERSION, **status.implementations})
    yield info
    yield _gauge("gateway_running", "1: it runs; 0: it was stopped, or hangs", [], [([], runs)])
    written = datetime.fromisoformat(status.written).astimezone(UTC).timestamp()
    yield _gauge("status_timestamp_seconds", "when this was so, UTC", [], [([], written)])
    yield _gauge("outbox_rows", "blocks that wait for their receipt", [], [([], status.outbox.rows)])
    yield _gauge("outbox_bytes", "bytes that wait for their receipt", [], [([], status.outbox.bytes)])
    yield _gauge("outbox_failing", "1: commits fail, nothing is accepted", [], [([], bool(status.outbox.problem))])
    yield _gauge(
        "clock_state",
        "1 for how far the host's clock is known",
        ["state"],
        [([state.value], status.clock.state == state) for state in ClockState],
    )
    yield _gauge("clock_error_seconds", "bound of its error", [], [([], status.clock.error_ns / NS_PER_S)])
    yield _gauge("clock_blocks_held", "blocks held until the time is known", [], [([], status.clock.waiting)])
    yield _gauge("broker_connected", "1: the MQTT session is up", [], [([], status.broker.connected)])
    yield _gauge("broker_refused_blocks", "blocks that the broker does not take", [], [([], status.broker.refused)])
    adapters = [([one.adapter], float(one.connections)) for one in status.bluetooth]
    yield _gauge("bluetooth_connections", "connections that the adapter carries", ["adapter"], adapters)
    slots = [([one.adapter], float(one.slots)) for one in status.bluetooth if one.slots is not None]
    yield _gauge("bluetooth_slots", "connections that it may carry", ["adapter"], slots)
    yield from _device_families(status.devices, states)


def _device_families(devices: Sequence[DeviceStatus], states: Sequence[str]) -> Iterator[Metric]:
    yield _gauge(
        "device_state",
        "1 for the state that the device's connection is in",
        ["device", "driver", "state"],
        [([one.serial, one.driver, state], one.state == state) for one in devices for state in states],
    )
    change = InfoMetricFamily(f"{PREFIX}device_last_change", "why the state changed last", labels=["device"])
    for one in devices:
        change.add_metric([one.serial], {"state": one.state, "reason": one.reason[:REASON_CHARACTERS_MAX]})
    yield change
    yield _gauge(
        "device_last_change_timestamp_seconds",
        "when that was, UTC",
        ["device"],
        [([one.serial], datetime.fromisoformat(one.since).timestamp()) for one in devices],
    )
    yield _counter("device_segments", "connections that gave data", devices, lambda one: one.segments)
    yield _counter("device_reconnects", "of them after the first", devices, lambda one: max(0, one.segments - 1))
    yield _counter("device_rejected_bytes", "bytes of no valid packet", devices, lambda one: one.rejected_bytes)
    samples = CounterMetricFamily(f"{PREFIX}device_samples", "samples accepted", labels=["device", "signal"])
    lost = CounterMetricFamily(
        f"{PREFIX}device_lost_samples", "samples on record as lost", labels=["device", "signal", "cause"]
    )
    for one in devices:
        for stream in one.streams:
            samples.add_metric([one.serial, stream.signal], stream.samples)
            for cause, count in stream.lost.items():
                lost.add_metric([one.serial, stream.signal, cause], count)
    yield samples
    yield lost
    yield _gauge(
        "electrode_state",
        "1 for how the electrode is",
        ["device", "electrode", "state"],
        [
            ([one.serial, each.name, state], each.state == state)
            for one in devices
            for each in one.electrodes
            for state in ElectrodeState
        ],
    )


def _counter(
    name: str, what: str, devices: Sequence[DeviceStatus], count: Callable[[DeviceStatus], int]
) -> CounterMetricFamily:
    family = CounterMetricFamily(f"{PREFIX}{name}", what, labels=["device"])
    for one in devices:
        family.add_metric([one.serial], count(one))
    return family


def _gauge(name: str, what: str, labels: Sequence[str], samples: Sequence[_Sample]) -> Metric:
    family = GaugeMetricFamily(f"{PREFIX}{name}", what, labels=labels)
    for values, number in samples:
        family.add_metric(values, float(number))
    return family
