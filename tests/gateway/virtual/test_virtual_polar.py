"""The virtual H10 through our own decoder, with ideal arrivals."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from gateway.devices import gatt, polar
from gateway.devices.base import Event, Missing, Reading, Rejected, Samples, Send, Streaming
from gateway.devices.polar import PMD_CONTROL, PMD_DATA, PolarDecoder
from gateway.errors import DeviceError
from gateway.links.base import Chunk
from gateway.samples import NS_PER_S
from gateway.virtual.polar import FRAME_S, PolarH10
from gateway.virtual.strap import Heart


class Wearing:
    """A decoder that hears the sensor and writes to it what it wants to send, without a link in between."""

    def __init__(self, sensor: PolarH10) -> None:
        self.sensor = sensor
        self.decoder = PolarDecoder()
        self.events: list[Event] = []
        self._frames = 0
        sensor.listen(self._hear)
        for uuid in PolarDecoder.READ:
            self._hear(uuid, sensor.read(uuid))
        self._act(self.decoder.start())

    def wear(self, frames: int) -> list[Event]:
        """Events of the next so many frames' time."""
        before = len(self.events)
        for _ in range(frames):
            self._frames += 1
            for uuid, value in self.sensor.measurements():
                self.sensor.send(uuid, value)
        return self.events[before:]

    def _hear(self, uuid: str, value: bytes) -> None:
        self._act(self.decoder.receive(Chunk(value, round(self._frames * FRAME_S * NS_PER_S), uuid)))

    def _act(self, events: list[Event]) -> None:
        self.events += events
        for event in events:
            if isinstance(event, Send):
                self.sensor.write(event.channel, event.data)


def ecg(events: list[Event]) -> NDArray[np.int32]:
    return np.concatenate([event.columns["ecg"] for event in events if isinstance(event, Samples)])


@pytest.mark.parametrize("rate_error", [-0.003, 0.0, 0.003])
def test_ten_minutes_of_ecg_and_heart_rate(rate_error: float) -> None:
    worn = Wearing(PolarH10(seed=3, rate_error=rate_error))
    assert worn.events.index(Streaming()) < 8
    events = worn.wear(round(600 / FRAME_S))
    assert not any(isinstance(event, Missing | Rejected) for event in events[5:])
    drawn = ecg(events)
    assert len(drawn) == 73 * round(600 / FRAME_S)
    assert 900 < drawn.max() < 1400
    assert -450 < drawn.min() < -100
    rates = [
        event.fields["heart_rate"] for event in events if isinstance(event, Reading) and "heart_rate" in event.fields
    ]
    assert 590 <= len(rates) <= 600


def test_the_r_waves_are_the_beats_of_the_heart() -> None:
    worn = Wearing(PolarH10(seed=3))
    drawn = ecg(worn.wear(200))
    beats = [beat for beat in Heart(3).beats_until(len(drawn) / 130) if 0.1 < beat < len(drawn) / 130 - 0.1]
    above = np.flatnonzero((drawn[1:-1] > 600) & (drawn[1:-1] >= drawn[:-2]) & (drawn[1:-1] > drawn[2:])) + 1
    for beat in beats:
        assert np.abs(above / 130 - beat).min() < 1 / 130
    assert len(beats) <= len(above) <= len(beats) + 2


def test_the_same_seed_is_the_same_ecg() -> None:
    assert [PolarH10(seed=3).frame() for _ in range(1)] == [PolarH10(seed=3).frame() for _ in range(1)]
    assert PolarH10(seed=3).frame() != PolarH10(seed=4).frame()


def test_lost_and_doubled_frames_are_noticed() -> None:
    sensor = PolarH10(seed=3)
    worn = Wearing(sensor)
    worn.wear(5)
    sensor.distort = lambda uuid, value: () if uuid == PMD_DATA else (value,)
    worn.wear(4)
    sensor.distort = lambda uuid, value: (value, value)
    events = worn.wear(1)
    missing = [event for event in events if isinstance(event, Missing)]
    assert missing == [Missing("ecg", 5 * 73, 4 * 73)]
    assert sum(isinstance(event, Rejected) for event in events) == 1


@pytest.mark.parametrize(("error", "says"), [(13, "charger"), (12, "state"), (14, "memory")])
def test_a_refused_start(error: int, says: str) -> None:
    sensor = PolarH10()
    sensor.start_error = error
    with pytest.raises(DeviceError, match=says):
        Wearing(sensor)


def test_a_link_with_small_packets_is_refused() -> None:
    with pytest.raises(DeviceError, match="too small") as caught:
        Wearing(PolarH10(mtu_bytes=185))
    assert "232" in caught.value.hint


def test_an_ecg_that_falls_silent_while_the_heart_rate_goes_on() -> None:
    sensor = PolarH10()
    worn = Wearing(sensor)
    worn.wear(10)
    sensor.ecg_silent = True
    with pytest.raises(DeviceError, match="no ECG"):
        worn.wear(20)


def test_a_control_point_that_does_not_answer() -> None:
    sensor = PolarH10()
    sensor.mute = True
    worn = Wearing(sensor)
    with pytest.raises(DeviceError, match="no ECG"):
        worn.wear(40)


def test_a_clock_that_is_set_while_it_streams() -> None:
    sensor = PolarH10()
    worn = Wearing(sensor)
    worn.wear(3)
    sensor.clock_ns += 7 * 365 * 86_400 * NS_PER_S
    with pytest.raises(DeviceError, match="clock was set"):
        worn.wear(1)


def test_the_commands_of_the_control_point() -> None:
    sensor = PolarH10()
    answers: list[str] = []
    sensor.listen(lambda uuid, value: answers.append(value.hex(" ")) if uuid == PMD_CONTROL else None)
    for command in (
        "0100",
        "0102",
        "02000001c8000101 0e00",
        "0200000182000101 0e00",
        "0200000182000101 0e00",
        "0300",
        "0700",
    ):
        sensor.write(PMD_CONTROL, bytes.fromhex(command))
    assert [answer[:11] for answer in answers] == [
        "f0 01 00 00",
        "f0 01 02 03",
        "f0 02 00 05",
        "f0 02 00 00",
        "f0 02 00 06",
        "f0 03 00 00",
        "f0 07 00 01",
    ]
    assert not sensor.streaming
    sensor.write(gatt.BATTERY_LEVEL, b"\x10")
    assert sensor.read(gatt.BATTERY_LEVEL) == b"\x10"
    assert sensor.read(PMD_CONTROL)[:2] == bytes([polar.FEATURES, 0x05])


def test_without_a_link_it_stops() -> None:
    sensor = PolarH10()
    worn = Wearing(sensor)
    sensor.link_down()
    assert not sensor.streaming
    assert not any(isinstance(event, Samples) for event in worn.wear(3))
