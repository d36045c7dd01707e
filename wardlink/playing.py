"""`wardlink gateway simulate`: virtual devices for any gateway, on a pseudo terminal and behind a virtual BlueZ."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Coroutine
from dataclasses import fields
from typing import Any

from gateway.devices.registry import LinkKind
from gateway.errors import EXIT_OK, ConfigError, UnavailableError
from gateway.service import install_signals
from gateway.virtual.bluetoothctl import bluetoothctl_stub
from gateway.virtual.bluez import VirtualBlueZ
from gateway.virtual.dbus_daemon import DbusDaemon
from gateway.virtual.fault_plan import FaultPlan, Suffering, kill_bluetoothd, possible_faults, why_not
from gateway.virtual.peripheral import Peripheral
from gateway.virtual.recordings import load_recording
from gateway.virtual.serial_line import VirtualSerialLine
from gateway.virtual.twins import TWINS
from wardlink.terminal import show_rows


def simulate(args: argparse.Namespace) -> int:
    """Play the named virtual devices until SIGTERM or SIGINT, or list them all."""
    if args.list:
        _list(as_json=args.json)
        return EXIT_OK
    unknown = sorted(set(args.devices) - set(TWINS))
    if unknown or not args.devices:
        message = f"there is no virtual device {unknown[0]!r}" if unknown else "no virtual device is named"
        raise ConfigError(message, hint=f"one or more of {', '.join(TWINS)}; --list tells more")
    asyncio.run(_play(args, _faults(args)))
    return EXIT_OK


def _list(*, as_json: bool) -> None:
    rows: list[dict[str, Any]] = [
        {
            "device": name,
            "driver": twin.driver,
            "link": twin.link.value,
            "description": twin.description,
            "faults": [_option(fault) for fault in possible_faults(twin)],
        }
        for name, twin in TWINS.items()
    ]
    if not as_json:
        rows = [row | {"faults": ", ".join(row["faults"])} for row in rows]
    show_rows(("device", "driver", "link", "description", "faults"), rows, as_json=as_json)


def _option(fault: str) -> str:
    return f"--{fault.replace('_', '-')}"


def _faults(args: argparse.Namespace) -> FaultPlan:
    """The faults that are asked for. Raises `ConfigError` where a device cannot have one of them."""
    plan = FaultPlan(**{one.name: getattr(args, one.name) for one in fields(FaultPlan)})
    for fault in plan.wanted():
        for number, name in enumerate(args.devices):
            reason = why_not(TWINS[name], fault)
            if fault == "drop_link_after" and TWINS[name].link is LinkKind.SERIAL and (number > 0 or not args.link):
                reason = "its port would come back under another name: it must be the first device, and have a --link"
            if reason:
                raise ConfigError(
                    f"{name} cannot have {_option(fault)}: {reason}", hint="wardlink gateway simulate --list"
                )
    return plan


async def _play(args: argparse.Namespace, plan: FaultPlan) -> None:
    stop = asyncio.Event()
    install_signals(stop)
    recording = await asyncio.to_thread(load_recording, args.recording) if args.recording else None
    async with contextlib.AsyncExitStack() as stack:
        places: dict[str, dict[str, str]] = {}
        befalling: list[Coroutine[None, None, None]] = []
        bluez: VirtualBlueZ | None = None
        for name in dict.fromkeys(args.devices):
            twin = TWINS[name]
            model = await asyncio.to_thread(twin.make, recording, args.seed)
            suffering = Suffering.of(plan, args.seed)
            if isinstance(model, Peripheral):
                if bluez is None:
                    bluez, environment = await _serve_bluez(stack, args.bus)
                    if plan.kill_bluetoothd_after is not None:
                        befalling.append(kill_bluetoothd(bluez, plan.kill_bluetoothd_after))
                suffering.befall(model)
                bluez.add(model)
                befalling.append(suffering.come_over_peripheral(bluez, model.address))
                places[name] = {"driver": twin.driver, "address": model.address, **environment}
            else:
                link = args.link if len(places) == 0 else None
                line = await stack.enter_async_context(VirtualSerialLine(suffering.befallen(model), link))
                befalling.append(suffering.come_over_line(line, model))
                places[name] = {"driver": twin.driver, "port": line.port}
        _say(places, as_json=args.json)
        tasks = [asyncio.create_task(each) for each in befalling]
        for task in tasks:
            task.add_done_callback(_warn)
        await stop.wait()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _serve_bluez(stack: contextlib.AsyncExitStack, bus: str | None) -> tuple[VirtualBlueZ, dict[str, str]]:
    """A virtual BlueZ, and what a gateway needs in its environment to take it for the system's."""
    if bus is None:
        daemon = DbusDaemon()
        await asyncio.to_thread(daemon.start)
        stack.push_async_callback(asyncio.to_thread, daemon.stop)
        bus = daemon.address
    version = bluetoothctl_stub()
    stub = await asyncio.to_thread(version.__enter__)
    stack.push_async_callback(asyncio.to_thread, version.__exit__, None, None, None)
    try:
        bluez = await stack.enter_async_context(VirtualBlueZ(bus))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UnavailableError(f"no D-Bus at {bus}: {reason}", hint="without --bus a private one is started") from None
    path = f"{stub}{os.pathsep}{os.environ.get('PATH', '')}"
    return bluez, {"DBUS_SYSTEM_BUS_ADDRESS": bus, "PATH": path}


def _warn(befalling: asyncio.Task[None]) -> None:
    if not befalling.cancelled() and (error := befalling.exception()) is not None:
        print(f"warning: a fault could not happen: {error}", file=sys.stderr)


def _say(places: dict[str, dict[str, str]], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(places), flush=True)
        return
    for name, place in places.items():
        print(f"{name} is there; Ctrl-C ends it")
        for key, value in place.items():
            print(f"  {key} = {value}")
    sys.stdout.flush()
