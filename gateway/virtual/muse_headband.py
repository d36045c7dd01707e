"""What all virtual Muses share: the control characteristic with its JSON replies, keep-alive, a life in time.

Written from the device's side, without the decoder's code, so that each checks the other. Knows no data packets.
Sources: muse-js (the replies of a Muse 2016, how they are cut), muse-lsl (commands).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Sequence

from gateway.virtual.peripheral import Characteristic, Peripheral, Service
from gateway.virtual.radio_faults import RadioFaults

SERVICE_UUID = "0000fe8d-0000-1000-8000-00805f9b34fb"
CONTROL_UUID = "273e0001-4c4d-454d-96be-f03bac821358"
PIECE_BYTES = 20
TICK_S = 0.015
"""A connection interval: what has become due meanwhile is notified together."""
CATCH_UP_S_MAX = 1.0
"""After a long sleep of the host the rest follows with the next ticks."""
KEEP_ALIVE_S = 30.0
"""Assumed: no public source says how long a Muse goes on without a command. Recorders send one every 10 s."""
BATTERY_PCT_PER_HOUR = 10.0
"""A Muse lasts some ten hours."""
REFUSED = 1
"""Assumed: that a code other than 0 is a refusal is known, the codes are not."""


def data_uuid(short: int) -> str:
    """UUID of one of the Muse's own characteristics."""
    return f"273e{short:04x}-4c4d-454d-96be-f03bac821358"


class MuseHeadband(Peripheral):
    """Base of the virtual Muses. Its time is seconds since it was switched on; `run` lets it pass, or `play_until`.

    Faults, to be set at any time: `faults` (the radio), `bootloader` True, `glued_replies` True.
    """

    START_COMMAND = "d"
    """Starts the stream."""
    STARTS_NEEDED = 1
    """How often it must be given."""

    def __init__(
        self,
        address: str,
        name: str,
        data_uuids: Sequence[str],
        presets: Collection[str],
        *,
        seed: int,
        battery_pct: float,
        keep_alive_s: float | None,
        speed: float,
    ) -> None:
        control = Characteristic(CONTROL_UUID, ("write-without-response", "notify"))
        notified = (Characteristic(uuid, ("notify",)) for uuid in data_uuids)
        super().__init__(address, name, (Service(SERVICE_UUID, (control, *notified)),))
        self.faults = RadioFaults(seed, spared=(CONTROL_UUID,))
        self.distort = self.faults
        self.bootloader = False
        """It answers, and does nothing else until it is reset."""
        self.glued_replies = False
        """A reply that says nothing but `rc` comes with the next one, in the same notification."""
        self.commands: list[str] = []
        """All that were given, in order."""
        self.preset = "p21"
        self.streaming = False
        self.time_s = 0.0
        self.keep_alive_s = keep_alive_s
        self._presets = presets
        self._battery_pct = battery_pct
        self._speed = speed
        self._starts = 0
        self._commanded_s = 0.0
        self._said = b""

    @property
    def battery_pct(self) -> float:
        """Charge in %, which falls with the device's own time."""
        return max(0.0, self._battery_pct - BATTERY_PCT_PER_HOUR * self.time_s / 3600)

    def play_until(self, time_s: float) -> None:
        """Let time pass up to here, and notify all that becomes due."""
        while self.streaming:
            due_s = self._due_s()
            ends_s = float("inf") if self.keep_alive_s is None else self._commanded_s + self.keep_alive_s
            if ends_s <= min(due_s, time_s):
                self.streaming = False
                break
            if due_s > time_s:
                break
            self.time_s = max(self.time_s, due_s)
            self._notify_due()
        self.time_s = max(self.time_s, time_s)

    async def run(self) -> None:
        """Play in real time, times `speed`."""
        loop = asyncio.get_running_loop()
        start_s = loop.time() - self.time_s / self._speed
        while True:
            await asyncio.sleep(TICK_S)
            now_s = (loop.time() - start_s) * self._speed
            self.play_until(min(now_s, self.time_s + CATCH_UP_S_MAX * self._speed))

    def write(self, uuid: str, value: bytes) -> None:
        """Take a command."""
        super().write(uuid, value)
        if uuid != CONTROL_UUID or len(value) < 2 or value[0] != len(value) - 1 or value[-1:] != b"\n":
            return
        command = value[1:-1].decode("latin-1")
        self.commands.append(command)
        self._commanded_s = self.time_s
        self._starts = self._starts + 1 if command == self.START_COMMAND else 0
        reply: dict[str, object] = {"rc": 0}
        if command[:1] == "v":
            reply = {**self._identity(), **reply}
        elif command == "s":
            reply = {**self._status(), **reply}
        elif command == "*1":
            self.bootloader = self.streaming = False
        elif not self._obey(command):
            reply = {"rc": REFUSED}
        self._say(reply)

    def link_down(self) -> None:
        """A Muse without a link stops."""
        self.streaming = False
        self._said = b""

    def _obey(self, command: str) -> bool:
        if command in ("k", "L0", "L1"):
            return True
        if command == "h":
            self.streaming = False
        elif self.bootloader:
            return False
        elif command == self.START_COMMAND:
            if self._starts >= self.STARTS_NEEDED and not self.streaming:
                self.streaming = True
                self._begin()
        elif command in self._presets:
            self.preset = command
        else:
            return False
        return True

    def _identity(self) -> dict[str, object]:
        mode = "bootloader" if self.bootloader else "headset"
        return {
            "ap": mode,
            "sp": "RevE",
            "tp": "consumer",
            "hw": "3.1",
            "bn": 27,
            "fw": "1.2.13",
            "bl": "1.2.3",
            "pv": 1,
        }

    def _status(self) -> dict[str, object]:
        return {
            "hn": self.name,
            "sn": "2031-VIRT-0001",
            "ma": self.address.lower().replace(":", "-"),
            "id": "07473435 32313630 004f003a",
            "bp": round(self.battery_pct),
            "ts": 0,
            "ps": int(self.preset[1:], 16),
        }

    def _say(self, reply: dict[str, object]) -> None:
        """Notify a reply in pieces: a length, so many characters, and what an earlier reply left behind them."""
        self._said += json.dumps(reply, separators=(",", ":")).encode("ascii")
        if self.glued_replies and len(reply) == 1 and reply["rc"] == 0:
            return
        said, self._said = self._said, b""
        left = b"\0" * PIECE_BYTES
        for start in range(0, len(said), PIECE_BYTES - 1):
            text = said[start : start + PIECE_BYTES - 1]
            piece = bytes((len(text),)) + text
            left = piece + left[len(piece) :]
            self.notify(CONTROL_UUID, left)

    def _begin(self) -> None:
        """The stream starts now."""
        raise NotImplementedError

    def _due_s(self) -> float:
        """When the next packet is due."""
        raise NotImplementedError

    def _notify_due(self) -> None:
        """Notify the packet that is due."""
        raise NotImplementedError
