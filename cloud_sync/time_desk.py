"""Tells gateways the time that ask for it: at once, with the trust that this machine's own clock deserves."""

from __future__ import annotations

import time

from gateway.kernel_clock import kernel_discipline
from gateway.mqtt import Inbound, Outbound
from gateway.mqtt_messages import QOS_AT_MOST_ONCE
from gateway.wire import control, topics
from gateway.wire.messages import Clock, TimeReply, TimeRequest
from gateway.wire.topics import TopicKind


def is_question(topic: str) -> bool:
    """Whether a message on this topic asks for the time; cheap, for every message that comes."""
    return topic.endswith(f"/{TopicKind.TIME_REQUEST}")


def answer(message: Inbound, bridge: str) -> Outbound:
    """The answer to a question that came just now, to be sent at once. Raises `WireError`."""
    received_ns = time.time_ns()
    request = control.decode_on(message.topic, message.payload, TimeRequest)
    said = kernel_discipline()
    reply = TimeReply(
        v=1,
        schema="time",
        gateway=request.gateway,
        bridge=bridge,
        asked=request.asked,
        received=received_ns,
        replied=max(received_ns, time.time_ns()),
        clock=Clock(said.state.value, said.error_ns),
    )
    payload = control.encode(reply)
    return Outbound(
        topics.time(request.gateway),
        payload.data,
        payload.content_type,
        {"schema": payload.schema},
        qos=QOS_AT_MOST_ONCE,
    )
