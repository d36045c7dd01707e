"""`wardlink gateway …`: run the service, check its configuration, look at its outbox, play a virtual device."""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path

from gateway import app, settings
from gateway.devices.registry import DRIVERS
from gateway.errors import EXIT_OK, ConfigError
from gateway.service import set_up_logging
from gateway.settings import Settings
from wardlink.terminal import show_rows


def add_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands below `wardlink gateway`."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", type=Path, default=settings.DEFAULT_PATH, help="default: %(default)s")
    run = subparsers.add_parser("run", parents=[common], help="run the gateway service")
    run.add_argument("--log-level", default="INFO", choices=["DEBUG", "INFO", "WARNING", "ERROR"])
    run.set_defaults(handler=_run)
    check = subparsers.add_parser("check-config", parents=[common], help="check the configuration, open nothing")
    check.set_defaults(handler=_check_config)
    drivers = subparsers.add_parser("drivers", help="list the devices that this version can read")
    drivers.add_argument("--json", action="store_true", help="print JSON")
    drivers.set_defaults(handler=_drivers)
    spool = subparsers.add_parser("spool", help="look at the outbox")
    actions = spool.add_subparsers(required=True, metavar="ACTION")
    status = actions.add_parser("status", parents=[common], help="what is waiting, accepted and lost, by stream")
    status.add_argument("--json", action="store_true", help="print JSON")
    status.set_defaults(handler=_spool_status)


def _run(args: argparse.Namespace) -> int:
    chosen = settings.load(args.config)
    set_up_logging("wardlink-gateway", args.log_level)
    asyncio.run(app.run(chosen))
    return EXIT_OK


def _check_config(args: argparse.Namespace) -> int:
    chosen = settings.load(args.config)
    broker = settings.broker(chosen)
    print(f"{args.config}: ok")
    print(f"gateway {chosen.gateway.id}, broker {broker} ({'TLS' if broker.tls else 'no TLS'})")
    print(f"outbox: {_outbox_place(chosen)}, at most {chosen.spool.bytes_max} bytes")
    for device in chosen.device:
        print(f"device {device.serial}: {device.driver} at {device.port or device.address}")
    return EXIT_OK


def _outbox_place(chosen: Settings) -> str:
    return str(chosen.outbox_path) if chosen.spool.backend == "sqlite" else "Redis"


def _drivers(args: argparse.Namespace) -> int:
    rows = [
        {"driver": name, "link": driver.link.value, "description": driver.description}
        for name, driver in sorted(DRIVERS.items())
    ]
    show_rows(("driver", "link", "description"), rows, as_json=args.json)
    return EXIT_OK


def _spool_status(args: argparse.Namespace) -> int:
    chosen = settings.load(args.config)
    if chosen.spool.backend == "sqlite" and not chosen.outbox_path.exists():
        raise ConfigError(f"there is no outbox at {chosen.outbox_path}", hint="has the gateway run with this file yet?")
    store = app.make_store(chosen, read_only=True)
    store.open()
    try:
        holding, tallies = store.holding(), store.tallies()
    finally:
        store.close()
    rows = [
        {
            "device": device,
            "signal": signal,
            "accepted": tally.accepted,
            "lost": tally.lost,
            "next": tally.next_sequence,
        }
        for (device, signal), tally in sorted(tallies.items())
    ]
    if args.json:
        print(json.dumps({"epoch": store.epoch, "waiting": holding.rows, "bytes": holding.size, "streams": rows}))
        return EXIT_OK
    show_rows(("device", "signal", "accepted", "lost", "next"), rows, as_json=False, title=f"epoch {store.epoch}")
    print(f"{holding.rows} blocks, {holding.size} bytes waiting for their receipt")
    return EXIT_OK
