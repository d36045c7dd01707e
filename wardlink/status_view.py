"""`wardlink gateway status`: what the running gateway says of itself, and whether it still runs."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import msgspec

from gateway import settings, status
from gateway.errors import EXIT_FAILURE, EXIT_OK, UnavailableError
from gateway.samples import NS_PER_S, ElectrodeState
from wardlink.terminal import harmless, show_rows

COLUMNS = ("serial", "driver", "state", "since", "segments", "rejected_bytes", "reason")


def show(config: Path, *, as_json: bool) -> int:
    """Print the status. Exit code 1 where the gateway does not run. Raises `UnavailableError` without a status."""
    folder = Path(settings.load(config).gateway.state_dir)
    found = status.read(folder)
    if found is None:
        raise UnavailableError(
            f"there is no {folder / status.FILE_NAME}: the gateway has not run yet", hint=status.RUN_HINT
        )
    now = datetime.now(UTC)
    age_s, fresh = found.age_s(now), found.is_fresh(now)
    if as_json:
        shown = {"age_s": round(age_s, 1), "runs": fresh, **msgspec.to_builtins(found)}
        print(msgspec.json.format(msgspec.json.encode(shown), indent=2).decode())
        return EXIT_OK if fresh else EXIT_FAILURE
    print(_headline(found, age_s, fresh=fresh))
    rows = [msgspec.to_builtins(device) for device in found.devices]
    if not fresh:
        rows = [row | {"state": f"was {row['state']}"} for row in rows]
    show_rows(COLUMNS, rows, as_json=False)
    for device in found.devices:
        if device.electrodes:
            print(f"{device.serial} electrodes: {_electrodes(device.electrodes)}")
    for adapter in found.bluetooth:
        of = "" if adapter.slots is None else f" of {adapter.slots}"
        print(f"Bluetooth {adapter.adapter}: {adapter.connections}{of} connections")
    outbox, broker = found.outbox, found.broker
    print(f"outbox: {outbox.rows} blocks, {outbox.bytes} bytes wait for their receipt")
    if outbox.problem:
        print(f"outbox: NOTHING IS ACCEPTED NOW: {outbox.problem}")
    print(_clock_line(found.clock))
    print(f"broker: {'connected' if broker.connected else f'away: {broker.last_error}'}")
    if broker.refused:
        print(f"broker: {broker.refused} blocks ARE NOT TAKEN and wait in the outbox: {harmless(broker.refusal)}")
    print("; ".join(f"{part}: {name}" for part, name in found.implementations.items()))
    return EXIT_OK if fresh else EXIT_FAILURE


def _electrodes(electrodes: list[status.ElectrodeStatus]) -> str:
    """How many are ok, and what is wrong with the others."""
    ok = sum(1 for each in electrodes if each.state == ElectrodeState.OK)
    bad = [
        f"{each.name} {each.state}" + (f" ({each.reason})" if each.reason else "")
        for each in electrodes
        if each.state != ElectrodeState.OK
    ]
    return harmless("; ".join([f"{ok} of {len(electrodes)} ok", *bad]))


def _clock_line(clock: status.ClockStatus) -> str:
    source = {"ntp": "by the system's time service", "bridge": "by a bridge"}.get(clock.source, "by nobody")
    line = f"clock: {clock.state}, told {source}, good to {clock.error_ns / NS_PER_S:.3f} s"
    return f"{line}; {clock.waiting} blocks WAIT FOR THE TIME" if clock.holds or clock.waiting else line


def _headline(found: status.GatewayStatus, age_s: float, *, fresh: bool) -> str:
    age = f"{age_s:.0f} s old" if age_s >= 0 else f"{-age_s:.0f} s in the future: the clock was set back"
    if fresh:
        return f"gateway {found.gateway} runs (process {found.pid}); this is {age}"
    if not found.running:
        return f"gateway {found.gateway} DOES NOT RUN: it was stopped; what it said last is {age}"
    return f"gateway {found.gateway} DOES NOT RUN, or hangs: what it said last is {age} ({status.RUN_HINT})"
