"""Rows of the bench: what the gateway process costs with virtual devices of its own, read over pty and BLE.

Runs `wardlink gateway run` and `wardlink gateway simulate` as processes, with no broker: everything goes to the outbox.
The share is the process's own CPU time over the wall time, so other load on the machine hardly moves it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

Row = dict[str, object]

WARDLINK = [sys.executable, "-m", "wardlink", "gateway"]
WARD = ("cyton", "muse", "strap", "oximeter", "cuff", "thermometer")
SETTLE_S = 8.0
"""For connections and the first second of every time axis."""
MEASURE_S = 20.0
WARD_SHARE_GOAL = 0.15
"""Of one core of a PC; a Raspberry Pi 4 is about five times slower."""
RSS_MB_GOAL = 80.0


def rows() -> list[Row]:
    """CPU and memory with a headset and a strap, and with a ward; how many Muses one core would take."""
    pair_share, pair_mb = cost(("cyton", "strap"))
    ward_share, _ = cost(WARD)
    muse_share, _ = cost(("muse",))
    idle_share, _ = cost(())
    muses = (1 - idle_share) / max(muse_share - idle_share, 1e-4)
    return [
        _row("gateway with Cyton and strap: RSS in MB", "80 MB", RSS_MB_GOAL / pair_mb, 1.0),
        _row(f"gateway with Cyton and strap: {pair_share:.1%} of one core", "15 %", WARD_SHARE_GOAL / pair_share, 1.0),
        _row(f"gateway with {', '.join(WARD)}: {ward_share:.1%}", "15 %", WARD_SHARE_GOAL / ward_share, 1.0),
        _row("Muses that one core takes", "1", muses, None),
    ]


def cost(devices: tuple[str, ...]) -> tuple[float, float]:
    """Share of one core and RSS (MB) of a gateway that reads these virtual devices."""
    with tempfile.TemporaryDirectory(prefix="wardlink-bench-") as name:
        folder = Path(name)
        simulator = None
        places: dict[str, dict[str, str]] = {}
        if devices:
            simulator = subprocess.Popen([*WARDLINK, "simulate", *devices, "--json"], stdout=subprocess.PIPE, text=True)
            assert simulator.stdout is not None
            places = json.loads(simulator.stdout.readline())
        gateway = subprocess.Popen(
            [*WARDLINK, "run", "--log-level", "ERROR", "--config", str(configured(folder, places))],
            env=os.environ | environment(places),
        )
        try:
            time.sleep(SETTLE_S)
            process = psutil.Process(gateway.pid)
            before, began = process.cpu_times(), time.monotonic()
            time.sleep(MEASURE_S)
            after, ended = process.cpu_times(), time.monotonic()
            busy_s = after.user + after.system - before.user - before.system
            return busy_s / (ended - began), process.memory_info().rss / 1e6
        finally:
            for one in (gateway, simulator):
                if one is not None:
                    one.send_signal(signal.SIGTERM)
                    one.communicate(timeout=20)


def configured(folder: Path, places: dict[str, dict[str, str]]) -> Path:
    """A configuration for these devices and for a broker that is not there."""
    text = f'[gateway]\nid = "bench"\nstate_dir = "{folder}/state"\n'
    text += '[mqtt]\nhost = "127.0.0.1"\nport = 1\ntls = false\n[clock]\nhold_s = 0\n'
    for serial, place in places.items():
        where = "port" if "port" in place else "address"
        text += f'[[device]]\ndriver = "{place["driver"]}"\nserial = "{serial}"\n{where} = "{place[where]}"\n'
    path = folder / "gateway.toml"
    path.write_text(text, encoding="utf-8")
    return path


def environment(places: dict[str, dict[str, str]]) -> dict[str, str]:
    """What leads the gateway to the virtual BlueZ."""
    names = ("DBUS_SYSTEM_BUS_ADDRESS", "PATH")
    return {name: place[name] for place in places.values() for name in names if name in place}


def _row(name: str, peer: str, ratio: float, goal: float | None) -> Row:
    return {"name": name, "ratio": ratio, "peer": peer, "goal": goal, "ok": goal is None or ratio >= goal}


if __name__ == "__main__":
    for one in rows():
        print(one)
