"""How every Muse is talked to: commands and JSON replies on the control characteristic, start sequence, keep-alive.

Sans-IO and without a clock: the time it knows is the arrival time of what comes. Knows no data packets.
Sources: muse-lsl `muse.py`, `athena.py`; muse-js `muse-parse.ts` and its tests (which replies come, and how cut).
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gateway.devices import gatt
from gateway.devices.base import Event, Facts, Rejected, Send, Streaming
from gateway.errors import DeviceError
from gateway.links.base import Chunk
from gateway.samples import NS_PER_S

SERVICE = gatt.uuid_of(0xFE8D)


def uuid_of(short: int) -> str:
    """The full UUID of a Muse's own characteristic: 0x0003 -> 273e0003-4c4d-454d-96be-f03bac821358."""
    return f"273e{short:04x}-4c4d-454d-96be-f03bac821358"


CONTROL = uuid_of(0x0001)

KEEP_ALIVE_PERIOD_NS = 10 * NS_PER_S
"""muse-lsl sends one every 10 s when it records for long (`record.py`)."""
REPLY_CHARACTERS_MAX = 1024
"""The longest, the device information, has some 130."""
PLAUSIBLE_TEXT_CHARACTERS_MAX = gatt.TEXT_CHARACTERS_MAX

KEEP_ALIVE = "k"
LEAVE_BOOT_LOADER = "*1"
_BOOT_LOADER = "bootloader"


def command(text: str) -> bytes:
    """The bytes of a command: a length that counts the line end, ASCII, line end."""
    return bytes((len(text) + 1,)) + text.encode("ascii") + b"\n"


class ReplyReader:
    """Joins the pieces `[n][n ASCII bytes][padding]` and cuts the text into JSON objects by their braces.

    A piece may end one object and begin the next, so the end of a notification means nothing.
    """

    def __init__(self) -> None:
        self._text = ""
        self._depth = 0
        self._quoted = False

    def receive(self, piece: bytes) -> tuple[list[dict[str, object]], int]:
        """Objects that this piece completes, and how many characters were no part of any."""
        if not piece or piece[0] > len(piece) - 1:
            return [], len(piece)
        objects: list[dict[str, object]] = []
        dropped = 0
        for character in piece[1 : 1 + piece[0]].decode("latin-1"):
            dropped += self._take(character, objects)
        return objects, dropped

    def _take(self, character: str, objects: list[dict[str, object]]) -> int:
        if not self._depth and character != "{":
            return 0 if character.isspace() else 1
        self._text += character
        if character == '"' and self._text[-2:-1] != "\\":
            self._quoted = not self._quoted
        elif not self._quoted:
            self._depth += {"{": 1, "}": -1}.get(character, 0)
        if self._depth and len(self._text) <= REPLY_CHARACTERS_MAX:
            return 0
        text, self._text, self._depth, self._quoted = self._text, "", 0, False
        try:
            found = json.loads(text)
        except ValueError:
            return len(text)
        objects.append(found)
        return 0


@dataclass(frozen=True, slots=True)
class Step:
    """One line of the start sequence."""

    command: str
    reply_has: str = ""
    """A field of the reply that must come before the next step; empty: go on at once.

    The bare `{"rc":0}` of most commands is not waited for: which command it answers cannot be told. A Muse obeys
    in order, so the reply to a later question confirms all that was sent before.
    """


class Conversation:
    """What is said on the control characteristic during one connection.

    Keep-alive without a timer: a Muse that streams sends 85 notifications a second and more, so each arrival is the
    moment to see whether a `k` is due (`keep_alive`). One that sends nothing is silent to the watchdog as well.
    """

    def __init__(self, steps: Sequence[Step], model: str, preset: str) -> None:
        self._steps = deque(steps)
        self._model = model
        self._preset = preset
        self._replies = ReplyReader()
        self._sent_ns: int | None = None
        self._failure: DeviceError | None = None
        self.battery_pct: float | None = None
        """As the newest status reply said."""

    @property
    def done(self) -> bool:
        """The start sequence is through: data that comes now belongs to this connection."""
        return not self._steps

    def start(self) -> list[Event]:
        """The first commands, up to the first one whose reply is waited for."""
        return self._advance()

    def receive(self, chunk: Chunk) -> list[Event]:
        """Read a piece of a reply. Raises `DeviceError` when the Muse refuses the start sequence."""
        if self._failure is not None:
            raise self._failure
        objects, dropped = self._replies.receive(chunk.data)
        events: list[Event] = [Rejected(dropped, "no part of a control reply")] if dropped else []
        for reply in objects:
            events += self._facts(reply)
            if reply.get("ap") == _BOOT_LOADER:
                self._failure = DeviceError(
                    "the Muse was in its boot loader and is restarting", hint="charge it and switch it off and on"
                )
                return [*events, Send(command(LEAVE_BOOT_LOADER), CONTROL)]
            if self._steps:
                self._check(reply)
                if self._steps[0].reply_has in reply:
                    self._steps.popleft()
                    events += self._advance()
        return events

    def keep_alive(self, arrival_ns: int) -> list[Event]:
        """A `k` to send, if it is due at this time of arrival."""
        if not self.done:
            return []
        if self._sent_ns is None:
            self._sent_ns = arrival_ns
        if arrival_ns - self._sent_ns < KEEP_ALIVE_PERIOD_NS:
            return []
        self._sent_ns = arrival_ns
        return [Send(command(KEEP_ALIVE), CONTROL)]

    def _advance(self) -> list[Event]:
        events: list[Event] = []
        while self._steps:
            events.append(Send(command(self._steps[0].command), CONTROL))
            if self._steps[0].reply_has:
                return events
            self._steps.popleft()
        return [*events, Streaming()]

    def _check(self, reply: Mapping[str, object]) -> None:
        code = reply.get("rc", 0)
        if code != 0:
            raise DeviceError(
                f"the Muse refuses its start sequence with code {code!r}, preset {self._preset}",
                hint="a preset that this model does not have: choose the driver for it; or switch it off and on",
            )

    def _facts(self, reply: Mapping[str, object]) -> list[Event]:
        firmware, battery_pct = reply.get("fw"), reply.get("bp")
        events: list[Event] = []
        if isinstance(firmware, str) and firmware.isprintable():
            events.append(Facts(model=self._model, firmware=firmware[:PLAUSIBLE_TEXT_CHARACTERS_MAX]))
        if isinstance(battery_pct, int | float) and not isinstance(battery_pct, bool) and 0 <= battery_pct <= 100:
            self.battery_pct = float(battery_pct)
            events.append(Facts(battery_pct=self.battery_pct))
        return events
