"""`wardlink cloud …`: run the bridge, check its configuration, watch live data; and how the admin commands are run."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex
from typing import Any

from cloud_sync import app, settings
from cloud_sync.registry.database import describe
from cloud_sync.settings import Settings
from gateway import config
from gateway.errors import EXIT_OK, WireError
from gateway.mqtt import Inbound, MqttSession
from gateway.samples import NS_PER_S, SampleBlock
from gateway.service import set_up_logging
from gateway.wire import codec, topics

TAIL_WAITING_MAX = 1_000
"""Messages that wait for a slow terminal; those beyond are skipped, which the next line says."""
VALUES_SHOWN_MAX = 8
"""Fields of a block that a line shows."""


def common_options() -> argparse.ArgumentParser:
    """The parent parser of all commands below `wardlink cloud`: `--config`, `--json`, and how admin commands run."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--config", type=Path, default=settings.DEFAULT_PATH, metavar="FILE", help="default: %(default)s"
    )
    common.add_argument("--json", action="store_true", help="print JSON")
    common.set_defaults(handler=_run_admin)
    return common


def add_commands(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser],
    common: argparse.ArgumentParser,
) -> None:
    """Add `run`, `check-config` and `tail`."""
    run = subparsers.add_parser("run", parents=[common], help="run the bridge")
    run.add_argument("--log-level", default="INFO", choices=["DEBUG", "INFO", "WARNING", "ERROR"])
    run.set_defaults(handler=_run)
    check = subparsers.add_parser("check-config", parents=[common], help="check the configuration, open nothing")
    check.set_defaults(handler=_check_config)
    tail = subparsers.add_parser("tail", parents=[common], help="show live data as it passes the broker, until Ctrl-C")
    tail.add_argument("--device", type=_name, default=None, metavar="SERIAL", help="of this device only")
    tail.add_argument("--signal", type=_name, default=None, help="of this signal only, as eeg or vital_signs")
    tail.set_defaults(handler=_tail)


def _name(text: str) -> str:
    if not topics.is_name(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a device or signal")
    return text


def _run_admin(args: argparse.Namespace) -> int:
    """Admin commands need the registry alone, so no other credential."""
    conninfo = settings.conninfo(settings.load(args.config))
    code: int = asyncio.run(args.admin(args, conninfo))
    return code


def _run(args: argparse.Namespace) -> int:
    chosen = settings.load(args.config)
    set_up_logging("wardlink-cloud", args.log_level)
    asyncio.run(app.run(chosen))
    return EXIT_OK


def _check_config(args: argparse.Namespace) -> int:
    chosen = settings.load(args.config)
    settings.check(chosen)
    used = _used(chosen)
    if args.json:
        print(json.dumps({"file": str(args.config), "ok": True, **used}, indent=2))
        return EXIT_OK
    print(f"{args.config}: ok")
    for part, text in used.items():
        if part != "warnings":
            print(f"{part}: {text}")
    for warning in used["warnings"]:
        print(f"warning: {warning}")
    return EXIT_OK


def _used(chosen: Settings) -> dict[str, Any]:
    """What the bridge would use, without secrets."""
    broker = settings.broker(chosen)
    influx = chosen.influx
    org = f", organisation {influx.org}" if influx.dialect == "v2" else ""
    batches = f"{influx.batch_lines} lines or {influx.batch_ms} ms, {'gzip' if influx.gzip else 'no gzip'}"
    secrets = [settings.MQTT_PASSWORD, settings.INFLUX_TOKEN, settings.INFLUX_PASSWORD, settings.POSTGRES_PASSWORD]
    return {
        "bridge": f"{chosen.bridge.id}, state in {chosen.bridge.state_dir}",
        "broker": f"{broker}, {'TLS' if broker.tls else 'no TLS'}, user {broker.username or '(none)'}",
        "influx": f"{influx.url}, dialect {influx.dialect}{org}, {batches}",
        "postgres": describe(settings.conninfo(chosen)),
        "credentials": ", ".join(name for name in secrets if config.secret(name)) or "(none)",
        "warnings": settings.warnings(chosen),
    }


# --- tail


def _tail(args: argparse.Namespace) -> int:
    chosen = settings.load(args.config)
    return asyncio.run(_show_live(args, chosen))


async def _show_live(args: argparse.Namespace, chosen: Settings) -> int:
    arrived: asyncio.Queue[Inbound] = asyncio.Queue(TAIL_WAITING_MAX)
    skipped = 0

    def take(message: Inbound) -> None:
        nonlocal skipped
        message.acknowledge()
        try:
            arrived.put_nowait(message)
        except asyncio.QueueFull:
            skipped += 1

    # An identity and a session of its own: the bridge's are not touched.
    broker = replace(settings.broker(chosen), client_id=f"wardlink-tail-{token_hex(8)}")
    session = MqttSession(
        broker, on_message=take, subscriptions=[topics.data("+", args.device or "+", "+")], clean=True
    )
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(session.run())
        while True:
            line = _line(await arrived.get(), args)
            if skipped:
                print(f"({skipped} messages skipped)", file=sys.stderr)
                skipped = 0
            if line:
                await asyncio.to_thread(print, line, flush=True)


def _line(message: Inbound, args: argparse.Namespace) -> str:
    """One message as a line, empty where it was not asked for."""
    try:
        decoded = codec.decode_on(message.topic, message.payload, message.content_type)
    except WireError as error:
        return json.dumps({"topic": message.topic, "error": str(error)}) if args.json else f"{message.topic}: {error}"
    block, who = decoded.content, decoded.identity
    if not isinstance(block, SampleBlock) or args.signal not in {None, block.signal}:
        return ""
    if args.json:
        return json.dumps(
            {
                "gateway": who.gateway,
                "device": block.device,
                "signal": block.signal,
                "epoch": who.epoch,
                "sequence": who.sequence,
                "clock": block.clock.state,
                "first_ns": block.first_ns,
                "last_ns": block.last_ns,
                "samples": len(block),
                "newest": _newest(block),
            }
        )
    values = list(_newest(block).items())
    shown = " ".join(f"{name}={value:g}" for name, value in values[:VALUES_SHOWN_MAX] if value is not None)
    more = " …" if len(values) > VALUES_SHOWN_MAX else ""
    at = datetime.fromtimestamp(block.last_ns // NS_PER_S, UTC).strftime("%H:%M:%S")
    fraction = block.last_ns % NS_PER_S // 1_000_000
    return (
        f"{at}.{fraction:03d} {who.gateway:<16} {block.device:<20} {block.signal:<12} #{who.sequence:<8} "
        f"{len(block):>4}  {shown}{more}"
    )


def _newest(block: SampleBlock) -> dict[str, float | None]:
    """The last sample's values in physical units."""
    values = {name: float(block.physical(name)[-1]) for name in block.columns}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
