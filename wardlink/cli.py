"""The `wardlink` command: finds the subcommand, loads only its side, turns expected errors into one line."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence

from gateway.errors import EXIT_FAILURE, EXIT_OK, ConfigError, WardlinkError
from wardlink.terminal import show_error

_EXAMPLES = """\
examples:
  wardlink demo --seconds 20            the whole chain on private servers, with virtual devices
  wardlink gateway check-config         is /etc/wardlink/gateway.toml right?
  wardlink gateway scan                 which devices are there?
  wardlink gateway watch CYTON-1        live values, and how its electrodes are
  wardlink gateway status               how the running gateway is
  wardlink gateway spool status         what is waiting for its receipt
  wardlink cloud migrate                create or update the registry's tables
  wardlink cloud device add CYTON-1 --org ward --type eeg_headset --patient P-017
  wardlink cloud tail --signal vital_signs

`wardlink COMMAND --help` tells more. Exit codes: 0 ok, 1 failure, 2 usage or configuration.
"""
EXIT_INTERRUPTED = 130
"""Of a program that Ctrl-C ended, as shells have it: 128 + SIGINT."""
_EXTRAS = {"cloud": "cloud", "demo": "gateway,cloud"}
_OWN = frozenset({"gateway", "cloud_sync", "wardlink"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    side = words[0] if words else ""
    try:
        args = _parser(side).parse_args(words)
        code: int = args.handler(args)
        sys.stdout.flush()
    except WardlinkError as error:
        return show_error(error)
    except ModuleNotFoundError as error:
        return show_error(_not_installed(error, side))
    except BaseExceptionGroup as group:
        return _show_group(group)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _leave_output()
        return EXIT_OK
    return code


def _not_installed(error: ModuleNotFoundError, side: str) -> WardlinkError:
    """A side whose libraries are not there. Raises the error itself where what is missing is our own: a bug."""
    package = (error.name or "").partition(".")[0]
    if not package or package in _OWN:
        raise error
    return ConfigError(
        f"the Python package {package} is not installed",
        hint=f"pip install 'wardlink[{_EXTRAS.get(side, 'gateway')}]'",
    )


def _leave_output() -> None:
    """Whoever read our output is gone: what is still in the buffer must not fail again when Python ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
    parser.add_argument("--version", action=_Version, nargs=0, help="say which version this is")
    commands = parser.add_subparsers(required=True, metavar="{gateway,cloud,demo}")
    gateway = commands.add_parser("gateway", help="the gateway beside the patient")
    cloud = commands.add_parser("cloud", help="the bridge in the cloud and its registry")
    if side == "gateway":
        from wardlink import device_commands, gateway_service, simulate  # noqa: PLC0415

        actions = gateway.add_subparsers(required=True, metavar="ACTION")
        gateway_service.add_commands(actions)
        device_commands.add_commands(actions)
        simulate.add_commands(actions)
    elif side == "cloud":
        from wardlink import bridge_commands, cloud_admin, cloud_service  # noqa: PLC0415

        common = cloud_service.common_options()
        actions = cloud.add_subparsers(required=True, metavar="ACTION")
        cloud_service.add_commands(actions, common)
        cloud_admin.add_commands(actions, common)
        bridge_commands.add_commands(actions, common)
    if side == "demo":
        from wardlink import demo  # noqa: PLC0415

        demo.add_command(commands)
    else:
        commands.add_parser("demo", help="the whole chain on private servers, with virtual devices")
    return parser


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        _namespace: argparse.Namespace,
        _values: object,
        _option_string: str | None = None,
    ) -> None:
        from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415

        try:
            found = version("wardlink")
        except PackageNotFoundError:
            found = "(a source tree that was never installed)"
        print(f"wardlink {found}")
        parser.exit()
