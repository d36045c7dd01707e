"""The gateway's state as metrics: read back with Prometheus' own parser, from text, from a file, and over HTTP."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.app import STATES
from gateway.errors import UnavailableError
from gateway.metrics import REASON_CHARACTERS_MAX, Exporter, exposition
from gateway.samples import ElectrodeState
from gateway.status import (
    BluetoothStatus,
    BrokerStatus,
    ClockStatus,
    DeviceStatus,
    ElectrodeStatus,
    GatewayStatus,
    OutboxStatus,
    StreamStatus,
)

SINCE = "2026-01-01T00:00:00+00:00"
SINCE_S = 1_767_225_600.0
CYTON = DeviceStatus(
    "CYTON-1",
    "cyton",
    "/dev/x",
    "waiting",
    'no "data" from\n/dev/x',
    SINCE,
    3,
    17,
    [ElectrodeStatus("Fp1", "ok", ""), ElectrodeStatus("C3", "railed", "10 %")],
    [StreamStatus("eeg", 1000, {"radio": 12, "shed": 250}), StreamStatus("brain_state", 20, {"radio": 0})],
)
STRAP = DeviceStatus("STRAP-1", "heart_rate", "00:22", "streaming", "data flows", SINCE, 1, 0)

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def said(*devices: DeviceStatus, problem: str = "", connected: bool = True) -> GatewayStatus:
    return GatewayStatus(
        "gw-1",
        42,
        SINCE,
        running=True,
        devices=list(devices or (CYTON, STRAP)),
        outbox=OutboxStatus(5, 1234, problem),
        broker=BrokerStatus(connected, "" if connected else "refused"),
        clock=ClockStatus("unsynced", 16_000_000_000, "none", holds=True, waiting=3),
        implementations={"features": "numpy"},
        bluetooth=[BluetoothStatus("hci0", 2, 5), BluetoothStatus("hci1", 1, None)],
    )


def parsed(text: str) -> Samples:
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, "said twice"
            found[key] = sample.value
    return found


def value(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((f"wardlink_{name}", frozenset(labels.items())))


def test_every_number_of_the_status_is_there() -> None:
    found = parsed(exposition(said(), STATES, runs=True))
    for name, labels, expected in (
        ("gateway_running", {}, 1),
        ("status_timestamp_seconds", {}, SINCE_S),
        ("outbox_rows", {}, 5),
        ("outbox_bytes", {}, 1234),
        ("outbox_failing", {}, 0),
        ("broker_connected", {}, 1),
        ("clock_state", {"state": "unsynced"}, 1),
        ("clock_state", {"state": "synced"}, 0),
        ("clock_error_seconds", {}, 16),
        ("clock_blocks_held", {}, 3),
        ("bluetooth_connections", {"adapter": "hci0"}, 2),
        ("bluetooth_slots", {"adapter": "hci0"}, 5),
        ("bluetooth_slots", {"adapter": "hci1"}, None),
        ("device_segments_total", {"device": "CYTON-1"}, 3),
        ("device_reconnects_total", {"device": "CYTON-1"}, 2),
        ("device_reconnects_total", {"device": "STRAP-1"}, 0),
        ("device_rejected_bytes_total", {"device": "CYTON-1"}, 17),
        ("device_samples_total", {"device": "CYTON-1", "signal": "eeg"}, 1000),
        ("device_lost_samples_total", {"device": "CYTON-1", "signal": "eeg", "cause": "radio"}, 12),
        ("device_lost_samples_total", {"device": "CYTON-1", "signal": "eeg", "cause": "shed"}, 250),
        ("device_last_change_timestamp_seconds", {"device": "STRAP-1"}, SINCE_S),
        (
            "device_last_change_info",
            {"device": "CYTON-1", "state": "waiting", "reason": 'no "data" from\n/dev/x'},
            1,
        ),
    ):
        assert value(found, name, **labels) == expected, (name, labels)


def test_each_device_is_in_one_of_its_states_and_each_electrode_in_one_of_its() -> None:
    found = parsed(exposition(said(), STATES, runs=True))
    for device, driver, state in (("CYTON-1", "cyton", "waiting"), ("STRAP-1", "heart_rate", "streaming")):
        states = {name: value(found, "device_state", device=device, driver=driver, state=name) for name in STATES}
        assert states == {name: float(name == state) for name in STATES}
    for electrode, state in (("Fp1", "ok"), ("C3", "railed")):
        kinds = [each.value for each in ElectrodeState]
        told = {
            name: value(found, "electrode_state", device="CYTON-1", electrode=electrode, state=name) for name in kinds
        }
        assert told == {name: float(name == state) for name in kinds}


def test_what_is_wrong_is_told() -> None:
    found = parsed(exposition(said(problem="disk is full", connected=False), STATES, runs=False))
    assert value(found, "gateway_running") == 0
    assert value(found, "outbox_failing") == 1
    assert value(found, "broker_connected") == 0


def test_a_long_reason_is_cut() -> None:
    device = DeviceStatus("X", "gps", "", "waiting", "x" * 5000, SINCE, 0, 0)
    text = exposition(said(device), STATES, runs=True)
    assert "x" * REASON_CHARACTERS_MAX in text
    assert "x" * (REASON_CHARACTERS_MAX + 1) not in text
    assert value(parsed(text), "device_reconnects_total", device="X") == 0


# --- where it is told


@pytest.fixture
def exporter(tmp_path: Path) -> Iterator[Exporter]:
    exporter = Exporter(STATES, tmp_path / "wardlink.prom", ("127.0.0.1", 0))
    yield exporter
    exporter.close()
    assert not [thread for thread in threading.enumerate() if "serve_forever" in thread.name]


def scraped(port: int) -> Samples:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        return parsed(answer.read().decode())


async def test_file_and_address_give_the_newest(exporter: Exporter, tmp_path: Path) -> None:
    for rows in (5, 7):
        told = msgspec.structs.replace(said(), outbox=OutboxStatus(rows, 0, ""))
        await asyncio.to_thread(exporter.tell, told)
        over_http = await asyncio.to_thread(scraped, exporter.port)
        assert value(over_http, "outbox_rows") == rows
        assert parsed((tmp_path / "wardlink.prom").read_text()) == over_http
    assert await asyncio.to_thread(os.listdir, tmp_path) == ["wardlink.prom"]
    await asyncio.to_thread(exporter.close)
    with pytest.raises(OSError, match="refused"):
        await asyncio.to_thread(scraped, exporter.port)


def test_a_port_that_is_taken_is_said_and_tried_again_and_the_file_is_written(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        exporter = Exporter(STATES, tmp_path / "wardlink.prom", ("127.0.0.1", port))
        with pytest.raises(UnavailableError, match=rf"metrics cannot be served at 127\.0\.0\.1:{port}: "):
            exporter.tell(said())
        assert parsed((tmp_path / "wardlink.prom").read_text())
    exporter.tell(said())
    assert value(scraped(port), "outbox_rows") == 5
    exporter.close()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    exporter = Exporter(STATES, tmp_path / "none" / "wardlink.prom", None)
    with pytest.raises(UnavailableError, match=r"wardlink\.prom: No such file"):
        exporter.tell(said())
    exporter.close()
