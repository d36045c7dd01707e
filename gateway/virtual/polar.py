"""A Polar H10: a strap with a seeded heart whose beats are also drawn as an ECG, behind the PMD control point.

Its clock starts in 2019, as an H10's whose clock nobody has set.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from gateway.devices import polar
from gateway.samples import NS_PER_S
from gateway.virtual.peripheral import MTU_BYTES, Characteristic, Service
from gateway.virtual.strap import Heart, HeartRateStrap

CLOCK_START_NS = 599_616_000 * NS_PER_S
"""2019-01-01, since 2000-01-01."""
FEATURES = bytes([polar.FEATURES, 0x05]) + bytes(15)
"""ECG and acceleration."""
SETTINGS = bytes.fromhex("00 01 8200 01 01 0e00")
"""130 Hz, 14 bit."""

WAVES = {
    "P": (-0.17, 0.022, 110.0),
    "Q": (-0.028, 0.009, -120.0),
    "R": (0.0, 0.011, 1150.0),
    "S": (0.03, 0.011, -260.0),
    "T": (0.24, 0.045, 290.0),
}
"""Of each wave of a beat: its middle (s after the R wave), width (s) and height (uV), as an adult's on the chest."""
WAVE_REACH_S = 0.5
BREATHING_PERIOD_S = 4.2
BREATHING_UV = 60.0
NOISE_UV = 6.0

FRAME_S = polar.FRAME_SAMPLES_MAX / polar.RATE_HZ


class PolarH10(HeartRateStrap):
    """The strap with its ECG: a frame every 562 ms once it was started, as long as there is a link.

    `rate_error`: how much longer than nominal its sampling period is. Faults: `start_error` (what the command to
    start is answered), `ecg_silent` (the heart rate goes on), `clock_ns` (set the sensor's clock), `mute` (the
    control point does not answer), those of the strap and of every sensor.
    """

    def __init__(
        self,
        address: str = "A0:9E:1A:00:10:05",
        name: str = "Polar H10 virtual",
        *,
        seed: int = 1,
        battery_pct: float = 87.0,
        speed: float = 1.0,
        rate_error: float = 0.0,
        mtu_bytes: int = MTU_BYTES,
    ) -> None:
        service = Service(
            polar.PMD_SERVICE,
            (
                Characteristic(polar.PMD_CONTROL, ("read", "write", "indicate"), FEATURES),
                Characteristic(polar.PMD_DATA, ("notify",)),
            ),
        )
        super().__init__(
            address,
            name,
            seed=seed,
            battery_pct=battery_pct,
            speed=speed,
            period_s=FRAME_S,
            more_services=(service,),
            mtu_bytes=mtu_bytes,
        )
        self.start_error = polar.OK
        self.mute = False
        self.ecg_silent = False
        self.clock_ns = CLOCK_START_NS
        """What its clock showed when it was switched on."""
        self.streaming = False
        self.samples = 0
        """Samples of the ECG since it was switched on, sent or not."""
        self._period_ns = NS_PER_S / polar.RATE_HZ * (1 + rate_error)
        self._ecg_heart = Heart(seed)
        self._beats: list[float] = []
        self._noise = np.random.default_rng(seed)

    def frame(self) -> bytes:
        """Let 73 samples pass and give the frame in which they are sent."""
        microvolts = self._microvolts(polar.FRAME_SAMPLES_MAX)
        self.samples += len(microvolts)
        time_ns = self.clock_ns + round((self.samples - 1) * self._period_ns)
        octets = np.ascontiguousarray(microvolts.astype("<i4")).view(np.uint8).reshape(-1, 4)[:, :3]
        return bytes([polar.ECG_MEASUREMENT]) + time_ns.to_bytes(8, "little") + b"\0" + octets.tobytes()

    def measurements(self) -> list[tuple[str, bytes]]:
        """The next frame, if the ECG was started, and the heart rate of each second that is over."""
        frame = self.frame()
        sent = [(polar.PMD_DATA, frame)] if self.streaming and not self.ecg_silent else []
        while self.time_s + 1 <= self.samples / polar.RATE_HZ:
            sent += super().measurements()
        return sent

    def write(self, uuid: str, value: bytes) -> None:
        """Carry out a command at the control point and indicate the answer."""
        if uuid != polar.PMD_CONTROL:
            super().write(uuid, value)
        elif not self.mute:
            error, settings = self._command(value)
            self.notify(uuid, bytes([polar.RESPONSE, *value[:2].ljust(2, b"\0"), error, 0]) + settings)

    def read(self, uuid: str) -> bytes:
        """The control point reads as the features, whatever it last answered."""
        return FEATURES if uuid == polar.PMD_CONTROL else super().read(uuid)

    def link_down(self) -> None:
        """Without a link it stops."""
        self.streaming = False

    def _command(self, value: bytes) -> tuple[int, bytes]:
        code, measurement = value[:2].ljust(2, b"\xff")
        if measurement != polar.ECG_MEASUREMENT:
            return 3, b""
        if code == polar.GET_SETTINGS:
            return polar.OK, SETTINGS
        if code == polar.STOP:
            self.streaming = False
            return polar.OK, b""
        if code != polar.START:
            return 1, b""
        return self._start(value[2:]), b""

    def _start(self, settings: bytes) -> int:
        if self.start_error:
            return self.start_error
        if settings != SETTINGS:
            return 5
        if self.mtu_bytes < polar.MTU_BYTES_MIN:
            return polar.BAD_MTU
        if self.streaming:
            return polar.ALREADY_STREAMING
        self.streaming = True
        return polar.OK

    def _microvolts(self, count: int) -> NDArray[np.int32]:
        times_s = (self.samples + np.arange(count)) / polar.RATE_HZ
        self._beats += self._ecg_heart.beats_until(float(times_s[-1]) + WAVE_REACH_S)
        self._beats = [beat for beat in self._beats if beat > times_s[0] - WAVE_REACH_S]
        drawn = BREATHING_UV * np.sin(2 * math.pi * times_s / BREATHING_PERIOD_S)
        drawn += self._noise.normal(0, NOISE_UV, count)
        for beat in self._beats:
            for middle_s, width_s, height_uv in WAVES.values():
                drawn += height_uv * np.exp(-(((times_s - beat - middle_s) / width_s) ** 2) / 2)
        return np.rint(drawn).astype(np.int32)
