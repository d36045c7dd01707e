"""`wardlink gateway simulate`: virtual devices for any gateway, on a pseudo terminal and behind a virtual BlueZ."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys

from gateway.errors import EXIT_OK, ConfigError, UnavailableError
from gateway.service import install_signals
from gateway.virtual.bluetoothctl import bluetoothctl_stub
from gateway.virtual.bluez import VirtualBlueZ
from gateway.virtual.dbus_daemon import DbusDaemon
from gateway.virtual.peripheral import Peripheral
from gateway.virtual.recordings import load_recording
from gateway.virtual.serial_line import VirtualSerialLine
from gateway.virtual.twins import TWINS
from wardlink.terminal import show_rows


def simulate(args: argparse.Namespace) -> int:
    """Play the named virtual devices until SIGTERM or SIGINT, or list them all."""
    if args.list:
        rows = [
            {"device": name, "driver": twin.driver, "link": twin.link.value, "description": twin.description}
            for name, twin in TWINS.items()
        ]
        show_rows(("device", "driver", "link", "description"), rows, as_json=args.json)
        return EXIT_OK
    unknown = sorted(set(args.devices) - set(TWINS))
    if unknown or not args.devices:
        message = f"there is no virtual device {unknown[0]!r}" if unknown else "no virtual device is named"
        raise ConfigError(message, hint=f"one or more of {', '.join(TWINS)}; --list tells more")
    asyncio.run(_play(args))
    return EXIT_OK


async def _play(args: argparse.Namespace) -> None:
    stop = asyncio.Event()
    install_signals(stop)
    recording = await asyncio.to_thread(load_recording, args.recording) if args.recording else None
    async with contextlib.AsyncExitStack() as stack:
        places: dict[str, dict[str, str]] = {}
        bluez: VirtualBlueZ | None = None
        for name in dict.fromkeys(args.devices):
            twin = TWINS[name]
            model = await asyncio.to_thread(twin.make, recording, args.seed)
            if isinstance(model, Peripheral):
                if bluez is None:
                    bluez, environment = await _serve_bluez(stack, args.bus)
                bluez.add(model)
                places[name] = {"driver": twin.driver, "address": model.address, **environment}
            else:
                link = args.link if len(places) == 0 else None
                line = await stack.enter_async_context(VirtualSerialLine(model, link))
                places[name] = {"driver": twin.driver, "port": line.port}
        _say(places, as_json=args.json)
        await stop.wait()


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


def _say(places: dict[str, dict[str, str]], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(places), flush=True)
        return
    for name, place in places.items():
        print(f"{name} is there; Ctrl-C ends it")
        for key, value in place.items():
            print(f"  {key} = {value}")
    sys.stdout.flush()
