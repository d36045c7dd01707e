"""What any MQTT subscriber can see of the chain: newest values, rates, and how long samples took to be committed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gateway.errors import WireError
from gateway.mqtt import Broker, Inbound, MqttSession
from gateway.samples import NS_PER_S, QUALITY, SampleBlock
from gateway.wire import codec, control, topics
from gateway.wire.codec import Identity
from gateway.wire.messages import Receipt
from wardlink.servers import Mosquitto

StreamName = tuple[str, str]
"""Device serial and signal."""

UNRECEIPTED_MAX = 100_000
"""Blocks whose receipt is waited for; a demo that lasts a day with the bridge away stays in memory."""
RATE_WINDOW_S = 5.0
VALUES_SHOWN_MAX = 4


@dataclass(slots=True)
class Seen:
    """One stream as it passed the broker."""

    newest: Mapping[str, float] = field(default_factory=dict)
    committed: int = 0
    latencies_ms: list[NDArray[np.float64]] = field(default_factory=list)
    _arrivals: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=64))

    def arrived(self, block: SampleBlock) -> None:
        """A block passed."""
        names = [name for name in block.columns if name != QUALITY][:VALUES_SHOWN_MAX]
        values = {name: float(block.physical(name)[-1]) for name in names}
        self.newest = {**self.newest, **{name: value for name, value in values.items() if not np.isnan(value)}}
        self._arrivals.append((time.monotonic(), len(block)))

    def rate_hz(self) -> float:
        """Samples a second over the last seconds."""
        now = time.monotonic()
        recent = [(at, count) for at, count in self._arrivals if now - at < RATE_WINDOW_S]
        if len(recent) < 2:
            return 0.0
        return sum(count for _, count in recent[1:]) / (recent[-1][0] - recent[0][0])

    def latency_ms(self, percentile: float) -> float | None:
        """Time from sample to commit that this share of the samples stayed below; None before the first commit."""
        if not self.latencies_ms:
            return None
        return round(float(np.percentile(np.concatenate(self.latencies_ms), percentile)), 1)


class Watch:
    """A subscriber beside the bridge; holds no part of the chain up."""

    def __init__(self, broker: Mosquitto) -> None:
        self.streams: dict[StreamName, Seen] = {}
        self._waiting: dict[Identity, NDArray[np.int64]] = {}
        login = broker.bridge
        self.session = MqttSession(
            Broker(broker.host, broker.port, "wardlink-demo-watch", login.user, login.password),
            on_message=self._take,
            subscriptions=[topics.data("+", "+", "+"), topics.receipt("+")],
            clean=True,
        )

    def _take(self, message: Inbound) -> None:
        message.acknowledge()
        try:
            if message.topic.endswith("/receipt"):
                self._receipted(control.decode(message.payload, Receipt))
            else:
                self._passed(codec.decode(message.payload, message.content_type))
        except WireError:
            return  # the bridge keeps it as a dead letter, which the summary counts

    def _passed(self, message: codec.Message) -> None:
        if isinstance(message.content, SampleBlock) and len(self._waiting) < UNRECEIPTED_MAX:
            if message.identity not in self._waiting:
                self._stream(message.identity).arrived(message.content)
            self._waiting[message.identity] = message.content.times_ns

    def _receipted(self, receipt: Receipt) -> None:
        now_ns = time.time_ns()
        for entry in receipt.committed:
            for first, last in entry.ranges:
                for sequence in range(first, min(last, first + UNRECEIPTED_MAX) + 1):
                    who = Identity(receipt.gateway, entry.device, entry.signal, entry.epoch, sequence)
                    times_ns = self._waiting.pop(who, None)
                    if times_ns is not None:
                        stream = self._stream(who)
                        stream.committed += len(times_ns)
                        stream.latencies_ms.append((now_ns - times_ns) / (NS_PER_S / 1000))

    def _stream(self, who: Identity) -> Seen:
        return self.streams.setdefault((who.device, who.signal), Seen())
