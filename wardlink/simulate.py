"""`wardlink gateway simulate`: its options. What plays is in `wardlink.playing`, loaded when something plays."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

EXAMPLES = """\
examples:
  wardlink gateway simulate --list
  wardlink gateway simulate cyton --recording session.txt --link /tmp/cyton
  wardlink gateway simulate cyton strap oximeter --json
  wardlink gateway simulate muse --loss 0.01 --reordering 0.01 --drop-link-after 20
  wardlink gateway simulate cyton --link /tmp/cyton --garbage 0.02 --failure-message-after 30
"""
SECONDS_MAX = 86_400.0
SHARES = {
    "loss": "are lost",
    "duplicates": "come twice",
    "reordering": "come after the next one (BLE)",
    "garbage": "have random bytes before them",
    "half-packets": "end in their middle",
}
TIMES = {
    "silence-after": "nothing arrives for 5 s, and the link stays up",
    "drop-link-after": "the link is lost; a serial port is unplugged for 3 s, and needs --link",
    "failure-message-after": "the dongle says 'Failure: Communications timeout' and the stream ends (Cyton)",
    "kill-bluetoothd-after": "bluetoothd is killed, and is there again after 3 s (BLE)",
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
    parser.add_argument("devices", nargs="*", metavar="DEVICE", help="one or more of those that --list names")
    parser.add_argument("--list", action="store_true", help="list the virtual devices and end")
    parser.add_argument("--recording", type=Path, help="OpenBCI text, Muse CSV, EDF or BDF; default: synthetic, seeded")
    parser.add_argument("--link", type=Path, help="symbolic link to the first virtual serial port")
    parser.add_argument("--bus", help="address of the private D-Bus to use; default: start one")
    parser.add_argument("--seed", type=int, default=1, help="of the synthetic signals (default: %(default)s)")
    _add_faults(
        parser.add_argument_group("faults", "Refused for a device that cannot have them; --list says which can.")
    )
    parser.add_argument("--json", action="store_true", help="say in JSON, on one line, where the devices are")
    parser.set_defaults(handler=_simulate)


def _add_faults(group: argparse._ArgumentGroup) -> None:
    for name, what in SHARES.items():
        group.add_argument(
            f"--{name}", type=_share, default=0.0, metavar="SHARE", help=f"this share of packets, 0 to 1: they {what}"
        )
    for name, what in TIMES.items():
        group.add_argument(f"--{name}", type=_seconds, metavar="SECONDS", help=f"so long after the start {what}")
    group.add_argument(
        "--rr-without-heart-rate", action="store_true", help="RR intervals come with a heart rate of 0 (strap)"
    )


def _share(text: str) -> float:
    return _number(text, 1.0, "a share from 0 to 1")


def _seconds(text: str) -> float:
    return _number(text, SECONDS_MAX, f"seconds from 0 to {SECONDS_MAX:g}")


def _number(text: str, most: float, expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= most:
        raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}")
    return value


def _simulate(args: argparse.Namespace) -> int:
    from wardlink import playing  # noqa: PLC0415 - a gateway that runs need not hold every virtual device

    return playing.simulate(args)
