"""`wardlink cloud bridge …`: what a bridge leaves at the broker when it is given up."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace

from cloud_sync import settings
from gateway.errors import EXIT_OK, RefusedError, UnavailableError, WireError
from gateway.mqtt import Broker, Inbound, MqttSession, Outbound, connected_session
from gateway.wire import control, topics
from gateway.wire.messages import Status
from wardlink.admin_commands import Subparsers

CONNECT_S_MAX = 15.0
"""For the broker to let us in."""
RETAINED_S = 1.0
"""For the bridge's retained status to come after the subscription; there may be none."""
_EXAMPLES = """\
examples:
  wardlink cloud bridge forget bridge-2
  wardlink cloud bridge forget bridge-2 --json"""


def add_commands(subparsers: Subparsers, common: argparse.ArgumentParser) -> None:
    """Add `bridge`."""
    summary = "bridges and what they have at the broker"
    bridge = subparsers.add_parser("bridge", help=summary, description=summary)
    verbs: Subparsers = bridge.add_subparsers(metavar="COMMAND", required=True)
    forget = verbs.add_parser(
        "forget",
        parents=[common],
        help="take a bridge that is given up out of the broker",
        description="Take a bridge that is given up out of the broker. Bridges share the work, and the broker keeps "
        "the share of one that is away for 7 days: nobody else gets that data until gateways send it again. What it "
        "was keeping for this bridge is dropped there; gateways still have it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    forget.add_argument("id", type=_name, help="its bridge.id")
    forget.set_defaults(handler=_forget)


def _name(text: str) -> str:
    if not topics.is_name(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no id of a bridge")
    return text


def _forget(args: argparse.Namespace) -> int:
    broker = settings.broker(settings.load(args.config))
    asyncio.run(forget(broker, args.id))
    if args.json:
        print(json.dumps({"bridge": args.id, "forgotten": True}))
    else:
        print(f"the broker has nothing of bridge {args.id} any more")
    return EXIT_OK


async def forget(broker: Broker, bridge: str) -> None:
    """End the session that the broker keeps for a bridge, and take its retained status back.

    Raises `RefusedError` where the bridge runs, `UnavailableError` where the broker does not let us in.
    """
    statuses: asyncio.Queue[Inbound] = asyncio.Queue()
    topic = topics.bridge_status(bridge)
    own = replace(broker, client_id=settings.client_id(bridge))
    asking = MqttSession(
        replace(broker, client_id=f"{own.client_id}-forget"),
        on_message=statuses.put_nowait,
        subscriptions=[topic],
        clean=True,
    )
    async with _connected(asking):
        if await _is_online(statuses):
            raise RefusedError(f"bridge {bridge} is at the broker", hint="stop it first; then it can be forgotten")
    # Its own identity, with a clean start: that ends the old session, and this one ends with the connection.
    async with _connected(MqttSession(own, clean=True)) as session:
        await session.publish(Outbound(topic, b"", retain=True))


@asynccontextmanager
async def _connected(session: MqttSession) -> AsyncIterator[MqttSession]:
    async with AsyncExitStack() as held:
        try:
            async with asyncio.timeout(CONNECT_S_MAX):
                await held.enter_async_context(connected_session(session))
        except TimeoutError:
            raise UnavailableError(session.last_error) from None
        yield session


async def _is_online(statuses: asyncio.Queue[Inbound]) -> bool:
    with suppress(TimeoutError, WireError):
        async with asyncio.timeout(RETAINED_S):
            return control.decode((await statuses.get()).payload, Status).online
    return False
