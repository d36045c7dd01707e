"""MQTT topics of the contract: built and parsed here and nowhere else.

    wardlink/v1/<gateway>/data/<device>/<signal>   blocks of samples
    wardlink/v1/<gateway>/loss/<device>            loss records
    wardlink/v1/<gateway>/status                   retained, with last will
    wardlink/v1/<gateway>/meta/<device>            retained birth of a device
    wardlink/v1/<gateway>/receipt                  cloud -> gateway: what is safely stored
    wardlink/v1/<gateway>/receipt/request          gateway -> cloud: which of these have you stored?
    wardlink/v1/<gateway>/time                     cloud -> gateway: what time it is there
    wardlink/v1/<gateway>/time/request             gateway -> cloud: what time is it?
    wardlink/v1/_cloud/status/<bridge>             retained, with last will: is a bridge there?

A gateway writes only below its own id, so an access list on its client name is enough.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from gateway.errors import MalformedError, UnknownVersionError
from gateway.wire.excerpt import excerpt

ROOT = "wardlink"
VERSION = 1
_PREFIX = f"{ROOT}/v{VERSION}"
_CLOUD = "_cloud"

NAME_LENGTH_MAX = 80
"""Length of `devices.serial` in the registry; gateway ids and signal names keep to it too."""
NAME_PATTERN = rf"^[A-Za-z0-9][A-Za-z0-9._:\-]{{0,{NAME_LENGTH_MAX - 1}}}$(?!\n)"
"""Names that are safe as one MQTT topic level, with no wildcard, no slash and no reserved first sign.

In Python `$` also matches before a last newline: hence the look-ahead, which says nothing new in JSON Schema."""
NAME_RULE = f"letters, digits, '.', '_', ':' or '-', a letter or digit first, at most {NAME_LENGTH_MAX}"
_NAME = re.compile(NAME_PATTERN)
LEVELS_MAX = 6
"""Levels of the longest topic: what has more is none of ours."""


class TopicKind(StrEnum):
    """What a topic carries."""

    DATA = "data"
    LOSS = "loss"
    STATUS = "status"
    META = "meta"
    RECEIPT = "receipt"
    RECEIPT_REQUEST = "receipt/request"
    TIME = "time"
    TIME_REQUEST = "time/request"
    BRIDGE_STATUS = "bridge_status"


_OF_A_GATEWAY = {
    kind.value: kind
    for kind in (
        TopicKind.STATUS,
        TopicKind.RECEIPT,
        TopicKind.RECEIPT_REQUEST,
        TopicKind.TIME,
        TopicKind.TIME_REQUEST,
    )
}
"""Kinds of which a gateway has one, by the levels behind its id."""


@dataclass(frozen=True, slots=True)
class Topic:
    """A parsed topic."""

    kind: TopicKind
    gateway: str = ""
    device: str = ""
    signal: str = ""
    bridge: str = ""


def is_name(text: str) -> bool:
    """Whether a text can be a gateway id, a device serial or a signal name."""
    return _NAME.match(text) is not None


def data(gateway: str, device: str, signal: str) -> str:
    """Topic of blocks of one signal; `+` is allowed for subscriptions."""
    return f"{_PREFIX}/{gateway}/data/{device}/{signal}"


def loss(gateway: str, device: str) -> str:
    """Topic of a device's loss records."""
    return f"{_PREFIX}/{gateway}/loss/{device}"


def status(gateway: str) -> str:
    """Topic of a gateway's retained status and last will."""
    return f"{_PREFIX}/{gateway}/status"


def meta(gateway: str, device: str) -> str:
    """Topic of a device's retained birth message."""
    return f"{_PREFIX}/{gateway}/meta/{device}"


def receipt(gateway: str) -> str:
    """Topic on which the cloud tells a gateway what is safely stored."""
    return f"{_PREFIX}/{gateway}/receipt"


def receipt_request(gateway: str) -> str:
    """Topic on which a gateway asks what is safely stored."""
    return f"{_PREFIX}/{gateway}/receipt/request"


def time(gateway: str) -> str:
    """Topic on which a bridge tells a gateway the time."""
    return f"{_PREFIX}/{gateway}/time"


def time_request(gateway: str) -> str:
    """Topic on which a gateway asks for the time."""
    return f"{_PREFIX}/{gateway}/time/request"


def bridge_status(bridge: str) -> str:
    """Topic of a bridge's retained status and last will."""
    return f"{_PREFIX}/{_CLOUD}/status/{bridge}"


def parse(topic: str) -> Topic:
    """Read a topic. Raises `UnknownVersionError` or `MalformedError`."""
    levels = topic.split("/", LEVELS_MAX)
    if len(levels) < 3 or levels[0] != ROOT:
        raise MalformedError(f"topic {excerpt(topic)} is not one of wardlink's", hint=f"expected {_PREFIX}/<gateway>/…")
    if levels[1] != f"v{VERSION}":
        raise UnknownVersionError(
            f"topic {excerpt(topic)} is of contract version {excerpt(levels[1])}, this program knows v{VERSION}",
            hint="update the side that is older",
        )
    if levels[2] == _CLOUD:
        if len(levels) == 5 and levels[3] == "status" and is_name(levels[4]):
            return Topic(TopicKind.BRIDGE_STATUS, bridge=levels[4])
        raise MalformedError(f"topic {excerpt(topic)} is not one of wardlink's")
    gateway, rest = levels[2], levels[3:]
    if not all(is_name(level) for level in levels[2:]):
        raise MalformedError(f"topic {excerpt(topic)} has a level that is no valid name", hint=f"a name is {NAME_RULE}")
    match rest:
        case ["data", device, signal]:
            return Topic(TopicKind.DATA, gateway, device, signal)
        case ["loss", device]:
            return Topic(TopicKind.LOSS, gateway, device)
        case ["meta", device]:
            return Topic(TopicKind.META, gateway, device)
    kind = _OF_A_GATEWAY.get("/".join(rest))
    if kind is None:
        raise MalformedError(f"topic {excerpt(topic)} is not one of wardlink's", hint="see gateway/wire/asyncapi.json")
    return Topic(kind, gateway)
