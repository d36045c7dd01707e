"""The `wardlink` command: finds the subcommand, loads only its side, turns expected errors into one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from gateway.errors import EXIT_FAILURE, EXIT_OK, WardlinkError
from wardlink.terminal import show_error

_EXAMPLES = """\
examples:
  wardlink demo --seconds 20            the whole chain on private servers, with virtual devices
  wardlink gateway check-config         is /etc/wardlink/gateway.toml right?
  wardlink gateway spool status         what is waiting for its receipt
  wardlink cloud migrate                create or update the registry's tables
  wardlink cloud device add CYTON-1 --org ward --type eeg_headset --patient P-017
  wardlink cloud tail --signal vital_signs

`wardlink COMMAND --help` tells more. Exit codes: 0 ok, 1 failure, 2 usage or configuration.
"""
_SIDES = ("gateway", "cloud", "demo")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser(words[0] if words else "")
    args = parser.parse_args(words)
    try:
        handler = args.handler
        code: int = handler(args)
    except WardlinkError as error:
        return show_error(error)
    except BaseExceptionGroup as group:
        return _show_group(group)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output is gone, and so is the place for complaints
        return EXIT_OK
    return code


def _show_group(group: BaseExceptionGroup[BaseException]) -> int:
    """Tasks that fail together: the first expected error speaks for all; anything else is a bug and shows itself."""
    expected, rest = group.split(WardlinkError)
    if rest is not None or expected is None:
        raise group
    leaf: BaseException = expected
    while isinstance(leaf, BaseExceptionGroup):
        leaf = leaf.exceptions[0]
    return show_error(leaf) if isinstance(leaf, WardlinkError) else EXIT_FAILURE


def _parser(side: str) -> argparse.ArgumentParser:
    """The parser; only the side that is asked for is imported, so that a Pi needs no PostgreSQL library."""
    parser = argparse.ArgumentParser(
        prog="wardlink",
        description="Edge gateway and cloud bridge for EEG headsets and vital-sign sensors.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="{gateway,cloud,demo}")
    gateway = commands.add_parser("gateway", help="the gateway beside the patient")
    cloud = commands.add_parser("cloud", help="the bridge in the cloud and its registry")
    if side == "gateway":
        from wardlink import gateway_service, simulate  # noqa: PLC0415

        actions = gateway.add_subparsers(required=True, metavar="ACTION")
        gateway_service.add_commands(actions)
        simulate.add_commands(actions)
    elif side == "cloud":
        from wardlink import cloud_admin, cloud_service  # noqa: PLC0415

        common = cloud_service.common_options()
        actions = cloud.add_subparsers(required=True, metavar="ACTION")
        cloud_service.add_commands(actions, common)
        cloud_admin.add_commands(actions, common)
    if side == "demo":
        from wardlink import demo  # noqa: PLC0415

        demo.add_command(commands)
    else:
        commands.add_parser("demo", help="the whole chain on private servers, with virtual devices")
    return parser
