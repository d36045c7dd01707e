"""What is said to a Cyton before it streams, and what its texts mean: reset, gains, modes, failures.

Sources: OpenBCI_Cyton_Library `OpenBCI_32bit_Library.cpp` (commands, replies), OpenBCI_Radios (dongle texts).
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from gateway.devices.base import Event, Facts, Send, Streaming
from gateway.devices.cyton_packets import DEFAULT_GAIN, GAINS
from gateway.errors import DeviceError

TEXT_BYTES_MAX = 1024
"""The longest text, the register dump apart, is a reset text of some 120 bytes."""
START_BYTES_MAX = 256 * 1024
"""A board that was streaming leaves at most a full kernel buffer (64 KiB) behind; 256 KiB are 31 s of stream."""
CONFIRMING_FIRMWARE = 3
"""Since this version the board answers a setting: an unconfirmed one could mean a wrong unit, worse than no data."""

INPUT_LETTERS = "12345678QWERTYUI"
"""The inputs 1 to 16 in the commands `x` and `z`."""
MODE_COMMANDS = {"analog": b"/2", "digital": b"/3"}

TEXT_END = b"$$$"
RESET_TEXT = b"OpenBCI V3"
_FIRMWARE = re.compile(rb"Firmware: v((\d{1,3})[0-9A-Za-z.\-]{0,20})")
_FAILURE = re.compile(rb"Failure: ?[\x20-\x7e\r\n]*")
_FAILURE_HINTS = {
    "Communications timeout": "switch the board on (position PC), check its battery, and that board and dongle"
    " are on the same radio channel",
    "System is Down": "switch the board on (position PC) and check its battery",
    "buffer overflowed": "bring the dongle closer to the board, away from other 2.4 GHz transmitters",
}


def failure_in(text: bytes) -> DeviceError | None:
    """The failure that a text of dongle or board reports, if it does."""
    failure = _FAILURE.search(text)
    if failure is None:
        return None
    said = " ".join(failure.group().decode("ascii").split())
    hint = next((hint for sign, hint in _FAILURE_HINTS.items() if sign in said), "switch the board off and on")
    return DeviceError(f"the Cyton's dongle says: {said}", hint=hint)


@dataclass(frozen=True, slots=True)
class Wanted:
    """How the board shall be set. Inputs are numbered from 1."""

    daisy: bool = False
    gains: Mapping[int, int] = field(default_factory=dict)
    """By input; those at 24 need no command."""
    mode: str | None = None
    """A key of `MODE_COMMANDS`; None: acceleration in the auxiliary bytes."""
    lead_off: tuple[int, ...] = ()
    """Inputs that get the test current of 6 nA at their negative side."""


@dataclass(frozen=True, slots=True)
class _Step:
    """One line of the start sequence."""

    command: bytes
    reply: bytes = b""
    """What the board's text must contain before the next step; empty: the command has no reply."""


_STOP = _Step(b"s")
# A stream may still be in flight: what comes before the reset text is drained unread.
_RESET = _Step(b"v", RESET_TEXT)
# With a Daisy attached every other packet would belong to it.
_EIGHT_CHANNELS = _Step(b"c", b"daisy removed")
_SIXTEEN_CHANNELS = _Step(b"C", b"16")
_BEGIN = _Step(b"b")


class StartSequence:
    """The commands from the open port to the first packet, each sent when the one before is confirmed."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._steps = deque([_STOP, _RESET])
        self._text = b""
        self._bytes = 0

    @property
    def done(self) -> bool:
        """Whether packets follow."""
        return not self._steps

    @property
    def held_bytes(self) -> int:
        """Length of the text that has not ended yet."""
        return len(self._text)

    def begin(self) -> list[Event]:
        """Stop a stream that may be running, and ask for a reset."""
        events: list[Event] = []
        self._advance(events)
        return events

    def receive(self, data: bytes, events: list[Event]) -> bytes:
        """Go through the texts in `data`; give back what follows the last one that was waited for.

        Raises `DeviceError` for a reported failure, a board that cannot be set as wanted, and no answer at all.
        """
        self._bytes += len(data)
        self._text += data
        while self._steps:
            text, end, rest = self._text.partition(TEXT_END)
            if not end:
                self._text = self._text[-TEXT_BYTES_MAX:]
                if self._bytes > START_BYTES_MAX:
                    raise DeviceError(
                        f"the Cyton sent {self._bytes} bytes and no answer to {self._steps[0].command!r}",
                        hint="switch the board off and on, and see that nothing else uses its dongle",
                    )
                return b""
            self._text = rest
            self._take_reply(text, events)
        rest, self._text = self._text, b""
        return rest

    def _advance(self, events: list[Event]) -> None:
        while self._steps:
            events.append(Send(self._steps[0].command))
            if self._steps[0].reply:
                return
            self._steps.popleft()
        events.append(Streaming())

    def _take_reply(self, text: bytes, events: list[Event]) -> None:
        step = self._steps[0]
        failure = failure_in(text)
        if failure:
            raise failure
        if step.reply not in text:
            return
        self._steps.popleft()
        if step is _RESET:
            self._read_reset_text(text[text.rfind(RESET_TEXT) :], events)
        self._advance(events)

    def _read_reset_text(self, text: bytes, events: list[Event]) -> None:
        version = _FIRMWARE.search(text)
        firmware = version.group(1).decode("ascii") if version else None
        confirms = version is not None and int(version.group(2)) >= CONFIRMING_FIRMWARE
        has_daisy = b"On Daisy" in text
        model = "OpenBCI Cyton + Daisy" if self._wanted.daisy else "OpenBCI Cyton"
        events.append(Facts(model=model, firmware=firmware))
        if self._wanted.daisy and not has_daisy:
            raise DeviceError(
                "the Cyton finds no Daisy on itself",
                hint="switch it off and press the Daisy on, or use the driver for 8 channels",
            )
        if self._wanted.daisy:
            self._steps.append(_SIXTEEN_CHANNELS)
        elif has_daisy:
            self._steps.append(_EIGHT_CHANNELS)
        settings = self._settings()
        if settings and not confirms:
            raise DeviceError(
                f"the Cyton's firmware {firmware or '1'} does not confirm settings, and {settings[0].command!r} is one",
                hint="update the board's firmware to 3.x, or leave gains and inputs as they are",
            )
        self._steps += [*settings, _BEGIN]

    def _settings(self) -> list[_Step]:
        steps = []
        for number, gain in self._wanted.gains.items():
            if gain != DEFAULT_GAIN:
                command = f"x{INPUT_LETTERS[number - 1]}0{GAINS.index(gain)}0110X"
                steps.append(_Step(command.encode("ascii"), f"Channel set for {number}".encode("ascii")))
        if self._wanted.mode is not None:
            steps.append(_Step(MODE_COMMANDS[self._wanted.mode], self._wanted.mode.encode("ascii")))
        for number in self._wanted.lead_off:
            command = f"z{INPUT_LETTERS[number - 1]}01Z"
            steps.append(_Step(command.encode("ascii"), f"Lead off set for {number}".encode("ascii")))
        return steps
