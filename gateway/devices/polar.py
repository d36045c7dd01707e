"""Polar H10: ECG at 130 Hz over Polar's measurement data service (PMD), with heart rate, RR intervals and battery.

Sources: polar-ble-sdk `gatt/client/pmd` (control point, frames), bleakheart `_core.py` (time stamps).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gateway.devices import gatt, heart_rate
from gateway.devices.base import Event, Missing, Rejected, Samples, Send, SignalSpec, Streaming
from gateway.devices.gatt_sensor import GattSensor
from gateway.errors import DeviceError
from gateway.links.base import Chunk
from gateway.samples import NS_PER_S

ECG = "ecg"
RATE_HZ = 130
RESOLUTION_BITS = 14
MICROVOLTS_PER_COUNT = 1.0

PMD_SERVICE = "fb005c80-02e7-f387-1cad-8acd2d8df0c8"
PMD_CONTROL = "fb005c81-02e7-f387-1cad-8acd2d8df0c8"
PMD_DATA = "fb005c82-02e7-f387-1cad-8acd2d8df0c8"

MTU_BYTES_MIN = 232
"""Below this an H10 refuses to stream."""
FRAME_SAMPLES_MAX = 73
"""Samples of one frame at that MTU."""

EPOCH_UNIX_NS = 946_684_800 * NS_PER_S
"""Sensor time counts from 2000-01-01 UTC, if anybody ever set it."""

GET_SETTINGS = 0x01
START = 0x02
STOP = 0x03
FEATURES = 0x0F
RESPONSE = 0xF0
ECG_MEASUREMENT = 0x00
SETTING_RATE = 0x00
SETTING_RESOLUTION = 0x01
SETTING_CHANNELS = 0x04

OK = 0
ALREADY_STREAMING = 6
BAD_MTU = 10
ERRORS = {
    1: ("unknown command", ""),
    2: ("unknown kind of measurement", "an H10 with a current firmware gives ECG"),
    3: ("not supported", "an H10 with a current firmware gives ECG"),
    4: ("wrong length of a command", ""),
    5: ("wrong setting", ""),
    ALREADY_STREAMING: ("already streaming", "close other programs and phones that use the sensor"),
    7: ("wrong resolution", ""),
    8: ("wrong sampling rate", ""),
    9: ("wrong range", ""),
    BAD_MTU: ("the link's packets are too small", f"the adapter must allow an MTU of {MTU_BYTES_MIN} bytes"),
    11: ("wrong number of channels", ""),
    12: ("not in this state", "take the sensor off its strap for half a minute"),
    13: ("the sensor is in its charger", "take it out of the charger and wear it"),
    14: ("its memory is full", "delete the recordings in Polar's app"),
}
"""Error codes of the control point, what each means, and what helps."""

FRAME_HEADER_BYTES = 10
SAMPLE_BYTES = 3

START_NS_MAX = 10 * NS_PER_S
"""The heart rate comes at once; an ECG that has not begun by then will not."""
SILENCE_NS_MAX = 5 * NS_PER_S
"""Nine frames. The heart rate goes on when the ECG has stopped, and would hide it."""
CLOCK_SLACK = 0.01
"""The sensor's sampling clock against 130 Hz."""
GAP_NS_MAX = 60 * NS_PER_S
"""A link is given up long before: a greater leap is the sensor's clock being set."""
LATE_FRAMES_MAX = 8
"""Frames behind the newest one, in a row: so many are no repetition, the sensor's clock was set back."""


@dataclass(frozen=True, slots=True)
class Step:
    """One line of the start sequence: what is written to the control point, and which answers lead on."""

    name: str
    command: bytes
    accepted: frozenset[int]


START_SEQUENCE = (
    Step("get the ECG's settings", bytes([GET_SETTINGS, ECG_MEASUREMENT]), frozenset({OK})),
    # The H10 knows one setting only, so an ECG that somebody else has started is this one too.
    Step("start the ECG", bytes.fromhex("02 00 00 01 82 00 01 01 0e 00"), frozenset({OK, ALREADY_STREAMING})),
)


@dataclass(frozen=True, slots=True)
class Frame:
    """One notification of ECG."""

    time_ns: int
    """Of the last sample, by the sensor's clock, ns since 2000-01-01."""
    microvolts: np.ndarray[tuple[int], np.dtype[np.int32]]


def ecg_frame(data: bytes) -> Frame:
    """Decode one data notification. Raises `gatt.MalformedValueError`."""
    samples = data[FRAME_HEADER_BYTES:]
    if len(data) < FRAME_HEADER_BYTES + SAMPLE_BYTES or len(samples) % SAMPLE_BYTES:
        raise gatt.MalformedValueError(f"{len(data)} bytes are no header and whole samples")
    if data[0] != ECG_MEASUREMENT or data[9] != 0:
        raise gatt.MalformedValueError(f"measurement {data[0]}, frame type {data[9]}: not an uncompressed ECG")
    octets = np.frombuffer(samples, dtype=np.uint8).reshape(-1, SAMPLE_BYTES).astype(np.int32)
    counts = octets[:, 0] | octets[:, 1] << 8 | octets[:, 2] << 16
    return Frame(int.from_bytes(data[1:9], "little"), (counts ^ 0x800000) - 0x800000)


class PolarDecoder(GattSensor):
    """Decoder of one connection to one H10 (see `gateway.devices.base.Decoder`)."""

    NOTIFY: ClassVar[tuple[str, ...]] = (PMD_DATA, PMD_CONTROL, gatt.HEART_RATE_MEASUREMENT, *GattSensor.NOTIFY)
    READ: ClassVar[tuple[str, ...]] = (*GattSensor.READ, PMD_CONTROL)
    """The control point reads as the features that the sensor has."""

    def __init__(self) -> None:
        super().__init__(
            {},
            {
                PMD_CONTROL: self._control,
                PMD_DATA: self._data,
                gatt.HEART_RATE_MEASUREMENT: heart_rate.measurement,
            },
        )
        self._steps = deque(START_SEQUENCE)
        self._axis = SampleAxis()
        self._ecg_due_ns: int | None = None

    @property
    def signals(self) -> Sequence[SignalSpec]:
        """ECG in microvolts at 130 Hz, heart rate and RR intervals."""
        # No full scale: what the converter gives when it is railed is not published.
        return (SignalSpec(ECG, float(RATE_HZ), (ECG,), ("uV",)), heart_rate.SIGNAL)

    def start(self) -> list[Event]:
        """Ask for the settings; the rest of the start sequence follows the answers."""
        return [Send(self._steps[0].command, PMD_CONTROL)]

    def receive(self, chunk: Chunk) -> list[Event]:
        """Decode what came.

        Raises `DeviceError` when the sensor refuses, when its clock is set while it streams, and when the heart rate
        comes without the ECG.
        """
        if self._ecg_due_ns is None:
            self._ecg_due_ns = chunk.arrival_ns + START_NS_MAX
        if chunk.channel != PMD_DATA and chunk.arrival_ns > self._ecg_due_ns:
            raise DeviceError(
                "the H10 sends its heart rate and no ECG",
                hint="moisten the electrodes; close other programs and phones that use the sensor",
            )
        return super().receive(chunk)

    def _control(self, chunk: Chunk) -> list[Event]:
        data = chunk.data
        if len(data) >= 2 and data[0] == FEATURES:
            if not data[1] & 1 << ECG_MEASUREMENT:
                raise DeviceError("the sensor has no ECG", hint="an H10 has; other Polar sensors have none")
            return []
        if len(data) < 4 or data[0] != RESPONSE:
            raise gatt.MalformedValueError("no answer of the control point")
        return self._answer(data)

    def _answer(self, data: bytes) -> list[Event]:
        if not self._steps or self._steps[0].command[:2] != data[1:3]:
            return [Rejected(len(data), f"an answer to command {data[1]} that was not given")]
        step, error = self._steps[0], data[3]
        if error not in step.accepted:
            text, hint = ERRORS.get(error, ("no reason known", ""))
            raise DeviceError(f"the H10 does not {step.name}: {text} (error {error})", hint=hint)
        if data[1] == GET_SETTINGS:
            _check_settings(data[5:])
        self._steps.popleft()
        return [Send(self._steps[0].command, PMD_CONTROL)] if self._steps else [Streaming()]

    def _data(self, chunk: Chunk) -> list[Event]:
        frame = ecg_frame(chunk.data)
        self._ecg_due_ns = chunk.arrival_ns + SILENCE_NS_MAX
        count = len(frame.microvolts)
        lost = self._axis.place(frame.time_ns, count)
        if lost is None:
            return [Rejected(len(chunk.data), "ECG that is not newer than the last")]
        index = self._axis.next_index - count
        events: list[Event] = [Missing(ECG, index - lost, lost)] if lost else []
        samples = Samples(ECG, index, {ECG: frame.microvolts}, chunk.arrival_ns, {ECG: MICROVOLTS_PER_COUNT})
        return [*events, samples]


class SampleAxis:
    """Numbers samples by the sensor's stamps, of which each frame carries the one of its last sample."""

    def __init__(self) -> None:
        self.next_index = 0
        """One past the newest sample, lost ones counted."""
        self._time_ns: int | None = None
        self._frame_samples = 0
        """Samples of every frame so far; 0 once two were different."""
        self._late = 0

    def place(self, time_ns: int, count: int) -> int | None:
        """How many samples are missing before this frame; None for a frame that was there, or is too late.

        Raises `DeviceError` when the sensor's clock was set.
        """
        if self._time_ns is None:
            self._frame_samples = count
            return self._advance(time_ns, count, 0)
        elapsed_ns = time_ns - self._time_ns
        if elapsed_ns <= 0:
            self._late += 1
            if self._late > LATE_FRAMES_MAX or elapsed_ns < -GAP_NS_MAX:
                raise _clock_was_set(elapsed_ns)
            return None
        if elapsed_ns > GAP_NS_MAX:
            raise _clock_was_set(elapsed_ns)
        return self._advance(time_ns, count, self._lost(elapsed_ns / NS_PER_S * RATE_HZ, count))

    def _lost(self, elapsed_samples: float, count: int) -> int:
        """Frames are lost whole: within what the clock may be off, their number is what counts."""
        lost = elapsed_samples - count
        slack = 1 + CLOCK_SLACK * elapsed_samples
        if count == self._frame_samples:
            whole = round(lost / count) * count
            if abs(lost - whole) <= slack:
                return max(whole, 0)
        else:
            self._frame_samples = 0
        return round(lost) if lost > slack else 0

    def _advance(self, time_ns: int, count: int, lost: int) -> int:
        self._time_ns = time_ns
        self._late = 0
        self.next_index += lost + count
        return lost


def _check_settings(settings: bytes) -> None:
    """See that the only setting that is known to work is offered. Raises `DeviceError`."""
    fields = gatt.Fields(settings)
    offered: dict[int, list[int]] = {}
    while fields.left:
        kind, count = fields.uint(1), fields.uint(1)
        offered[kind] = [fields.uint(1 if kind == SETTING_CHANNELS else 2) for _ in range(count)]
    for kind, wanted in ((SETTING_RATE, RATE_HZ), (SETTING_RESOLUTION, RESOLUTION_BITS)):
        if wanted not in offered.get(kind, []):
            raise DeviceError(
                f"the sensor offers an ECG with settings {offered}, expected {RATE_HZ} Hz and {RESOLUTION_BITS} bit",
                hint="is it an H10 with a current firmware?",
            )


def _clock_was_set(elapsed_ns: int) -> DeviceError:
    return DeviceError(
        f"the H10's clock was set by {elapsed_ns / NS_PER_S:+.0f} s while it was streaming",
        hint="close other programs and phones that use the sensor",
    )
