"""`wardlink gateway simulate`: virtual devices for any gateway, on a pseudo terminal and behind a virtual BlueZ."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from gateway.devices.registry import LinkKind
from gateway.errors import EXIT_OK, ConfigError, UnavailableError
from gateway.service import install_signals
from wardlink.terminal import show_rows

SYNTHETIC_S = 60.0
"""Length of the built-in recording, after which it begins again."""
EXAMPLES = """\
examples:
  wardlink gateway simulate --list
  wardlink gateway simulate cyton --recording session.txt --link /tmp/cyton
  wardlink gateway simulate cyton strap --json
"""


@dataclass(frozen=True, slots=True)
class Twin:
    """A virtual device that can be played."""

    driver: str
    link: LinkKind
    description: str


TWINS = {
    "cyton": Twin("cyton", LinkKind.SERIAL, "OpenBCI Cyton on a pseudo terminal, fed from a recording"),
    "strap": Twin("heart_rate", LinkKind.BLE, "heart-rate strap behind a virtual BlueZ on a private D-Bus"),
}


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `simulate` below `wardlink gateway`."""
    parser = subparsers.add_parser(
        "simulate",
        help="play virtual devices",
        description="play virtual devices until Ctrl-C, for any program that reads real ones",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("devices", nargs="*", metavar="DEVICE", help=f"one or more of {', '.join(TWINS)}")
    parser.add_argument("--list", action="store_true", help="list the virtual devices and end")
    parser.add_argument("--recording", type=Path, help="OpenBCI text, Muse CSV, EDF or BDF; default: synthetic, seeded")
    parser.add_argument("--link", type=Path, help="symbolic link to the virtual serial port")
    parser.add_argument("--bus", help="address of the private D-Bus to use; default: start one")
    parser.add_argument("--seed", type=int, default=1, help="of the synthetic signals (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="say in JSON, on one line, where the devices are")
    parser.set_defaults(handler=_simulate)


def _simulate(args: argparse.Namespace) -> int:
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
    async with contextlib.AsyncExitStack() as stack:
        places: dict[str, dict[str, str]] = {}
        if "cyton" in args.devices:
            places["cyton"] = await _serve_cyton(stack, args)
        if "strap" in args.devices:
            places["strap"] = await _serve_strap(stack, args)
        _say(places, as_json=args.json)
        await stop.wait()


async def _serve_cyton(stack: contextlib.AsyncExitStack, args: argparse.Namespace) -> dict[str, str]:
    from gateway.virtual.cyton import CytonFirmware  # noqa: PLC0415 - loaded only for what is played
    from gateway.virtual.recordings import fit_to_cyton, load_recording  # noqa: PLC0415
    from gateway.virtual.serial_line import VirtualSerialLine  # noqa: PLC0415
    from gateway.virtual.synthetic import synthetic_headset  # noqa: PLC0415

    if args.recording is None:
        recording = await asyncio.to_thread(synthetic_headset, SYNTHETIC_S, seed=args.seed)
    else:
        recording = await asyncio.to_thread(lambda: fit_to_cyton(load_recording(args.recording)))
    line = await stack.enter_async_context(VirtualSerialLine(CytonFirmware(recording), args.link))
    return {"driver": "cyton", "port": line.port, "channels": ",".join(recording.channel_names)}


async def _serve_strap(stack: contextlib.AsyncExitStack, args: argparse.Namespace) -> dict[str, str]:
    from gateway.virtual.bluetoothctl import bluetoothctl_stub  # noqa: PLC0415
    from gateway.virtual.bluez import VirtualBlueZ  # noqa: PLC0415
    from gateway.virtual.dbus_daemon import DbusDaemon  # noqa: PLC0415
    from gateway.virtual.strap import HeartRateStrap  # noqa: PLC0415

    bus = args.bus
    if bus is None:
        daemon = DbusDaemon()
        await asyncio.to_thread(daemon.start)
        stack.push_async_callback(asyncio.to_thread, daemon.stop)
        bus = daemon.address
    version = bluetoothctl_stub()
    stub = await asyncio.to_thread(version.__enter__)
    stack.push_async_callback(asyncio.to_thread, version.__exit__, None, None, None)
    strap = HeartRateStrap(seed=args.seed)
    try:
        bluez = await stack.enter_async_context(VirtualBlueZ(bus))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UnavailableError(f"no D-Bus at {bus}: {reason}", hint="without --bus a private one is started") from None
    bluez.add(strap)
    path = f"{stub}{os.pathsep}{os.environ.get('PATH', '')}"
    return {"driver": "heart_rate", "address": strap.address, "DBUS_SYSTEM_BUS_ADDRESS": bus, "PATH": path}


def _say(places: dict[str, dict[str, str]], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(places), flush=True)
        return
    for name, place in places.items():
        print(f"{name} is there; Ctrl-C ends it")
        for key, value in place.items():
            print(f"  {key} = {value}")
    sys.stdout.flush()
