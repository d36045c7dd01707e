"""`wardlink gateway simulate`: its options. What plays is in `wardlink.playing`, loaded when something plays."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLES = """\
examples:
  wardlink gateway simulate --list
  wardlink gateway simulate cyton --recording session.txt --link /tmp/cyton
  wardlink gateway simulate cyton strap oximeter --json
"""


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
    parser.add_argument("--json", action="store_true", help="say in JSON, on one line, where the devices are")
    parser.set_defaults(handler=_simulate)


def _simulate(args: argparse.Namespace) -> int:
    from wardlink import playing  # noqa: PLC0415 - a gateway that runs need not hold every virtual device

    return playing.simulate(args)
