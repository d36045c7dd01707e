"""The AsyncAPI 3 document of the contract, made from `topics`: who sends what where, and with which properties.

It describes both ends, each operation tagged with whose it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gateway.wire import topics
from gateway.wire.codec import CBOR, JSON, RAW
from gateway.wire.topics import VERSION, TopicKind

ASYNCAPI = "3.0.0"
_BINDING = "0.2.0"
"""Of AsyncAPI's MQTT binding."""
_SCHEMA_FORMAT = "application/schema+json;version=draft-2020-12"

_PARAMETERS = {
    "gateway": "id of the gateway, which is its user name at the broker too",
    "device": "serial number of the device, as the registry has it",
    "signal": "signal of the device: eeg, brain_state, vital_signs…",
    "bridge": "id of the bridge",
}


@dataclass(frozen=True, slots=True)
class _Channel:
    address: str
    parameters: tuple[str, ...]
    messages: tuple[str, ...]
    sender: str
    retained: bool
    title: str
    description: str
    qos: int = 1


_CHANNELS: dict[TopicKind, _Channel] = {
    TopicKind.DATA: _Channel(
        topics.data("{gateway}", "{device}", "{signal}"),
        ("gateway", "device", "signal"),
        ("brain_state", "vital_signs", RAW),
        "gateway",
        retained=False,
        title="Data",
        description="Blocks of samples, each numbered within (gateway, device, signal, epoch). Sent until receipted: "
        "the same number always has the same bytes. May come late, twice and out of order.",
    ),
    TopicKind.LOSS: _Channel(
        topics.loss("{gateway}", "{device}"),
        ("gateway", "device"),
        ("loss",),
        "gateway",
        retained=False,
        title="Loss",
        description="What was produced and will not come, numbered and receipted as data is.",
    ),
    TopicKind.STATUS: _Channel(
        topics.status("{gateway}"),
        ("gateway",),
        ("status",),
        "gateway",
        retained=True,
        title="Gateway status",
        description="Presence of a gateway; the last will says that it is gone.",
    ),
    TopicKind.META: _Channel(
        topics.meta("{gateway}", "{device}"),
        ("gateway", "device"),
        ("meta",),
        "gateway",
        retained=True,
        title="Device birth",
        description="What a device is and which signals it gives.",
    ),
    TopicKind.RECEIPT: _Channel(
        topics.receipt("{gateway}"),
        ("gateway",),
        ("receipt",),
        "bridge",
        retained=False,
        title="Receipts",
        description="What is safely stored; only then may a gateway forget it.",
    ),
    TopicKind.RECEIPT_REQUEST: _Channel(
        topics.receipt_request("{gateway}"),
        ("gateway",),
        ("receipt_request",),
        "gateway",
        retained=False,
        title="Requests for receipts",
        description="Which of these are stored? Answered on the receipt channel.",
    ),
    TopicKind.TIME: _Channel(
        topics.time("{gateway}"),
        ("gateway",),
        ("time",),
        "bridge",
        retained=False,
        title="Time",
        description="What time it is at a bridge, for a gateway that no time server answers. The gateway's own error "
        "is half the round trip less the bridge's share, and the error of the bridge's clock.",
        qos=0,
    ),
    TopicKind.TIME_REQUEST: _Channel(
        topics.time_request("{gateway}"),
        ("gateway",),
        ("time_request",),
        "gateway",
        retained=False,
        title="Questions for the time",
        description="What time is it? Answered at once, on the time channel.",
        qos=0,
    ),
    TopicKind.BRIDGE_STATUS: _Channel(
        topics.bridge_status("{bridge}"),
        ("bridge",),
        ("status",),
        "bridge",
        retained=True,
        title="Bridge status",
        description="Presence of a bridge; the last will says that it is gone.",
    ),
}
_BLOCKS = frozenset({"brain_state", "vital_signs", RAW, "loss"})


def document(titles: Mapping[str, str]) -> dict[str, Any]:
    """The AsyncAPI document; `titles`: schema name -> title of the message."""
    return {
        "asyncapi": ASYNCAPI,
        "id": f"urn:wardlink:wire:v{VERSION}",
        "info": {
            "title": "wardlink wire contract",
            "version": f"{VERSION}.0.0",
            "description": "Between edge gateways and the cloud, over MQTT 5 with QoS 1, the time alone with QoS 0. "
            "A reader ignores keys that it does not know; an unknown version or schema is an error. Old names are "
            "accepted on the way in: signal and schema patient_vitals for vital_signs, field body_temperature for "
            "temperature.",
            "license": {"name": "MIT"},
        },
        "defaultContentType": JSON,
        "channels": {kind.name.lower(): _channel(kind) for kind in _CHANNELS},
        "operations": {
            f"{side}_{verb}s_{kind.name.lower()}": _operation(kind, side, verb)
            for kind, channel in _CHANNELS.items()
            for side, verb in _ends(channel)
        },
        "components": {"messages": {name: _message(name, title) for name, title in titles.items()}},
    }


def _ends(channel: _Channel) -> tuple[tuple[str, str], tuple[str, str]]:
    return (channel.sender, "send"), ("bridge" if channel.sender == "gateway" else "gateway", "receive")


def _channel(kind: TopicKind) -> dict[str, Any]:
    channel = _CHANNELS[kind]
    return {
        "address": channel.address,
        "title": channel.title,
        "description": channel.description,
        "parameters": {name: {"description": _PARAMETERS[name]} for name in channel.parameters},
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in channel.messages},
    }


def _operation(kind: TopicKind, side: str, verb: str) -> dict[str, Any]:
    channel, name = _CHANNELS[kind], kind.name.lower()
    binding: dict[str, Any] = {"qos": channel.qos, "bindingVersion": _BINDING}
    if verb == "send":
        binding["retain"] = channel.retained
    return {
        "action": verb,
        "channel": {"$ref": f"#/channels/{name}"},
        "messages": [{"$ref": f"#/channels/{name}/messages/{message}"} for message in channel.messages],
        "tags": [{"name": side}],
        "bindings": {"mqtt": binding},
    }


def _message(name: str, title: str) -> dict[str, Any]:
    properties: dict[str, Any] = {"schema": {"type": "string", "const": name}}
    if name in _BLOCKS:
        properties["historical"] = {
            "type": "string",
            "enum": ["0", "1"],
            "description": "1: out of a backlog, behind the live data",
        }
    content_type = CBOR if name == RAW else JSON
    return {
        "name": name,
        "title": title,
        "contentType": content_type,
        "headers": {
            "type": "object",
            "description": "MQTT 5 user properties; hints for routing, the payload says it all",
            "properties": properties,
        },
        "payload": {"schemaFormat": _SCHEMA_FORMAT, "schema": {"$ref": f"./schemas/{name}.schema.json"}},
        "bindings": {"mqtt": {"contentType": content_type, "bindingVersion": _BINDING}},
    }
