"""`wardlink gateway scan`, `add`, `watch`, `impedance` and `status`: their options.

What they do is loaded when one of them runs.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from gateway import settings

SCAN_S = 8.0
"""Sensors that save their battery advertise every second or two."""
SECONDS_MAX = 86_400.0
IMPEDANCE_S = 2.0
IMPEDANCE_S_MIN, IMPEDANCE_S_MAX = 1.0, 60.0
"""Of one electrode. Below a second mains hum moves the result."""


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands below `wardlink gateway`."""
    _add_scan(subparsers)
    _add_add(subparsers)
    _add_watch(subparsers)
    _add_impedance(subparsers)
    _add_status(subparsers)


def _add_scan(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "scan",
        help="which devices are there, and which driver fits",
        description="List the BLE devices and serial ports that are there, and the drivers that fit. Nothing is"
        " connected or opened. A side that cannot be scanned is a warning; exit code 1 if none can.",
        epilog="examples:\n  wardlink gateway scan\n  wardlink gateway scan --seconds 20 --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--seconds",
        type=_seconds,
        default=SCAN_S,
        metavar="N",
        help="listen for BLE devices so long (default: %(default)g)",
    )
    parser.add_argument("--adapter", metavar="NAME", help="Bluetooth adapter, such as hci1; default: the first one on")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(handler=_scan)


def _add_add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "add",
        help="add a device to the configuration",
        description="Write conf.d/NN-SERIAL.toml beside the configuration. The whole configuration is checked first;"
        " on an error nothing is left.",
        epilog="examples:\n"
        "  wardlink gateway add heart_rate STRAP-1 --address 00:22:D0:3A:10:01\n"
        "  wardlink gateway add cyton CYTON-1 --port /dev/ttyUSB0 --channels Fp1,Fp2,C3,C4,P7,P8,O1,O2\n"
        "  wardlink gateway add replay REC-1 --file night.edf",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("driver", metavar="DRIVER", help="one that `wardlink gateway drivers` lists")
    parser.add_argument("serial", metavar="SERIAL", help="the serial number under which the registry knows the device")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--port", help="serial port; its name in /dev/serial/by-id is taken where there is one")
    place.add_argument("--address", help="Bluetooth address")
    place.add_argument("--file", help="recording (driver replay)")
    place.add_argument("--stream", metavar="NAME", help="name of the LSL stream (driver lsl)")
    parser.add_argument(
        "--board-id", type=int, metavar="N", help="BrainFlow's number of the board (driver brainflow), beside its place"
    )
    parser.add_argument("--channels", metavar="A,B,…", help="electrode names in the order of the inputs")
    _add_config(parser)
    parser.set_defaults(handler=_add)


def _add_watch(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "watch",
        help="live values and quality of one device",
        description="Read one configured device and show its values, the state of each electrode and the rate, until"
        " Ctrl-C. Needs no broker and stores nothing. The gateway service must not be reading the same device.",
        epilog="examples:\n  wardlink gateway watch CYTON-1\n  wardlink gateway watch STRAP-1 --seconds 30",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("serial", metavar="SERIAL", help="of a [[device]] of the configuration")
    parser.add_argument(
        "--seconds", type=_seconds, metavar="N", help="end after so long; exit code 1 if no data came (default: never)"
    )
    _add_config(parser)
    parser.set_defaults(handler=_watch)


def _add_impedance(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "impedance",
        help="measure the impedance of each electrode, in kOhm",
        description="Measure the impedance of each electrode of one configured device, one after the other, with the"
        " test current of its converter (OpenBCI Cyton: 6 nA at 31 Hz; some 4 s each). good: up to 10 kOhm, fair: up"
        " to 50, else poor. The reference is not measured. The board is reset afterwards, also after Ctrl-C. The"
        " gateway service must not be reading the device. Exit code 1 if an electrode could not be measured, 130 if"
        " interrupted.",
        epilog="examples:\n"
        "  wardlink gateway impedance CYTON-1\n"
        "  wardlink gateway impedance CYTON-1 --seconds 5 --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("serial", metavar="SERIAL", help="of a [[device]] of the configuration")
    parser.add_argument(
        "--seconds",
        type=_impedance_seconds,
        default=IMPEDANCE_S,
        metavar="N",
        help="listen to each electrode so long (default: %(default)g)",
    )
    _add_config(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(handler=_impedance)


def _add_status(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "status",
        help="how the running gateway, its devices and its outbox are",
        description="Show what the gateway wrote into status.json in its state folder, and how old that is."
        " Exit code 1 if the gateway does not run.",
        epilog="examples:\n  wardlink gateway status\n  wardlink gateway status --config ward5.toml --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_config(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(handler=_status)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, default=settings.DEFAULT_PATH, metavar="FILE", help="default: %(default)s"
    )


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= SECONDS_MAX:
        raise argparse.ArgumentTypeError(f"{text!r}: expected seconds, above 0, at most {SECONDS_MAX:g}")
    return seconds


def _impedance_seconds(text: str) -> float:
    seconds = _seconds(text)
    if not IMPEDANCE_S_MIN <= seconds <= IMPEDANCE_S_MAX:
        raise argparse.ArgumentTypeError(f"{text!r}: expected {IMPEDANCE_S_MIN:g} to {IMPEDANCE_S_MAX:g} seconds")
    return seconds


def _scan(args: argparse.Namespace) -> int:
    from wardlink import scanning  # noqa: PLC0415 - a gateway that runs need not hold any of these

    return scanning.scan(args.seconds, args.adapter, as_json=args.json)


def _add(args: argparse.Namespace) -> int:
    from wardlink import adding  # noqa: PLC0415

    places = {name: getattr(args, name) for name in ("port", "address", "file", "stream", "board_id")}
    place = {name: value for name, value in places.items() if value is not None}
    channels = None if args.channels is None else [name.strip() for name in args.channels.split(",")]
    return adding.add(args.config, args.driver, args.serial, place, channels)


def _watch(args: argparse.Namespace) -> int:
    from wardlink import watching  # noqa: PLC0415

    return watching.watch(args.config, args.serial, args.seconds)


def _impedance(args: argparse.Namespace) -> int:
    from wardlink import impedance  # noqa: PLC0415

    return impedance.impedance(args.config, args.serial, args.seconds, as_json=args.json)


def _status(args: argparse.Namespace) -> int:
    from wardlink import status_view  # noqa: PLC0415

    return status_view.show(args.config, as_json=args.json)
