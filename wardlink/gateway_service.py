"""`wardlink gateway …`: run the service, check its configuration, look at its outbox, play a virtual device."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

from gateway import app, config, settings, status
from gateway.devices.registry import DRIVERS
from gateway.errors import EXIT_FAILURE, EXIT_OK, UnavailableError
from gateway.service import set_up_logging
from gateway.settings import Settings
from gateway.spool import sealed
from wardlink import spool_commands
from wardlink.terminal import show_rows

log = logging.getLogger(__name__)


Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001 - it has no public name


def add_commands(subparsers: Subparsers) -> None:
    """Add the commands below `wardlink gateway`."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--config", type=Path, default=settings.DEFAULT_PATH, metavar="FILE", help="default: %(default)s"
    )
    as_json = argparse.ArgumentParser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="print JSON")
    run = _command(subparsers, _run, "run", "run the gateway service", [common], "run --config ward5.toml")
    run.add_argument("--log-level", default="INFO", choices=["DEBUG", "INFO", "WARNING", "ERROR"])
    _command(
        subparsers,
        _check_config,
        "check-config",
        "check the configuration, open nothing",
        [common, as_json],
        "check-config",
        "check-config --config ward5.toml --json",
    )
    _command(
        subparsers,
        _metrics,
        "metrics",
        "the running gateway's state in Prometheus' text format; exit code 1 if it does not run",
        [common],
        "metrics",
        "metrics --config ward5.toml",
    )
    _command(subparsers, _drivers, "drivers", "list the devices that this version can read", [as_json], "drivers")
    spool = subparsers.add_parser("spool", help="look at the outbox", description="look at the outbox")
    actions = spool.add_subparsers(required=True, metavar="ACTION")
    spool_commands.add_commands(actions, _command, common, as_json)


def _command(
    subparsers: Subparsers,
    handler: Callable[[argparse.Namespace], int],
    name: str,
    summary: str,
    parents: Sequence[argparse.ArgumentParser],
    *examples: str,
) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        name,
        parents=parents,
        help=summary,
        description=summary,
        epilog="\n".join(["examples:", *(f"  wardlink gateway {example}" for example in examples)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(handler=handler)
    return parser


def _run(args: argparse.Namespace) -> int:
    chosen = settings.load(args.config)
    set_up_logging("wardlink-gateway", args.log_level)
    for warning in settings.warnings(chosen):
        log.warning("%s: %s", args.config, warning)
    asyncio.run(app.run(chosen))
    return EXIT_OK


def _check_config(args: argparse.Namespace) -> int:
    chosen = settings.load(args.config)
    app.make_store(chosen)  # its credentials, too; nothing is opened
    used = _used(chosen)
    if args.json:
        print(json.dumps({"file": str(args.config), "ok": True, **used}, indent=2))
        return EXIT_OK
    print(f"{args.config}: ok")
    for part in ("gateway", "broker", "outbox", "credentials"):
        print(f"{part}: {used[part]}")
    for device in used["devices"]:
        print(f"device {device['serial']}: {device['driver']} at {device['place']}")
    for warning in used["warnings"]:
        print(f"warning: {warning}")
    return EXIT_OK


def _used(chosen: Settings) -> dict[str, Any]:
    """What the gateway would use, without secrets."""
    broker = settings.broker(chosen)
    place = str(chosen.outbox_path) if chosen.spool.backend == "sqlite" else "Redis"
    found = [
        name for name in (settings.MQTT_PASSWORD, settings.REDIS_PASSWORD, sealed.CREDENTIAL) if config.secret(name)
    ]
    return {
        "gateway": f"{chosen.gateway.id}, state in {chosen.gateway.state_dir}",
        "broker": f"{broker}, {'TLS' if broker.tls else 'no TLS'}, user {broker.username or '(none)'}",
        "outbox": f"{place}, at most {chosen.spool.bytes_max} bytes",
        "credentials": ", ".join(found) or "(none)",
        "devices": [
            {"serial": device.serial, "driver": device.driver, "place": device.port or device.address}
            for device in chosen.device
        ],
        "warnings": settings.warnings(chosen),
    }


def _metrics(args: argparse.Namespace) -> int:
    from gateway.metrics import exposition  # noqa: PLC0415 - a gateway that runs need not hold it

    folder = Path(settings.load(args.config).gateway.state_dir)
    found = status.read(folder)
    if found is None:
        raise UnavailableError(
            f"there is no {folder / status.FILE_NAME}: the gateway has not run yet", hint=status.RUN_HINT
        )
    runs = found.is_fresh(datetime.now(UTC))
    print(exposition(found, app.STATES, runs=runs), end="")
    return EXIT_OK if runs else EXIT_FAILURE


def _drivers(args: argparse.Namespace) -> int:
    rows = [
        {"driver": name, "link": driver.link.value, "description": driver.description}
        for name, driver in sorted(DRIVERS.items())
    ]
    show_rows(("driver", "link", "description"), rows, as_json=args.json)
    return EXIT_OK
