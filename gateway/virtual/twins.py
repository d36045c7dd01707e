"""The virtual twin of every driver: what stands in for a device in demos, tests and field checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from gateway.devices.cyton import DAISY_ELECTRODES
from gateway.devices.registry import DRIVERS, LinkKind
from gateway.virtual.cyton import CytonFirmware, seeded_skin_ohm
from gateway.virtual.gps import GpsFirmware
from gateway.virtual.muse import VirtualMuse
from gateway.virtual.muse_athena import VirtualMuseAthena
from gateway.virtual.oximeter_serial import ContecFirmware, ContecOldFirmware, NoninFirmware
from gateway.virtual.peripheral import Peripheral
from gateway.virtual.polar import PolarH10
from gateway.virtual.recordings import Recording, fit_to_cyton
from gateway.virtual.serial_line import Firmware
from gateway.virtual.strap import HeartRateStrap
from gateway.virtual.synthetic import synthetic_headset
from gateway.virtual.vitals import BloodPressureCuff, PulseOximeter, Thermometer

SELECT_ONYX = bytes.fromhex("027002020703")
"""What an Onyx II is told to use data format 7 (OpenICE); a WristOx2 has a longer one."""
SYNTHETIC_S = 60.0
"""Length of the built-in recording, after which it begins again."""
CUFF_INTERVAL_S = 60
"""A virtual cuff measures every minute, so that a short demonstration sees it."""


class Maker(Protocol):
    """Makes a device's model; may take a second, for a synthetic recording."""

    def __call__(self, recording: Recording | None, seed: int) -> Firmware | Peripheral:
        """`recording`: what an EEG headset plays; None: synthetic, of this seed."""


@dataclass(frozen=True, slots=True)
class Twin:
    """A virtual device that can be played."""

    driver: str
    make: Maker

    @property
    def link(self) -> LinkKind:
        """What carries its bytes."""
        return DRIVERS[self.driver].link

    @property
    def description(self) -> str:
        """What it stands in for."""
        return DRIVERS[self.driver].description


def _cyton(recording: Recording | None, seed: int) -> Firmware:
    recording = fit_to_cyton(recording or synthetic_headset(SYNTHETIC_S, seed=seed))
    return CytonFirmware(recording, skin_ohm=seeded_skin_ohm(seed))


def _cyton_daisy(recording: Recording | None, seed: int) -> Firmware:
    recording = recording or synthetic_headset(SYNTHETIC_S, seed=seed, electrodes=DAISY_ELECTRODES)
    return CytonFirmware(recording, daisy=True, skin_ohm=seeded_skin_ohm(seed))


def _seeded(make: Callable[[int], Firmware | Peripheral]) -> Maker:
    """A device that plays no EEG."""

    def maker(recording: Recording | None, seed: int) -> Firmware | Peripheral:  # noqa: ARG001 - it has no use for one
        return make(seed)

    return maker


TWINS = {
    "cyton": Twin("cyton", _cyton),
    "cyton_daisy": Twin("cyton_daisy", _cyton_daisy),
    "muse": Twin("muse", lambda recording, seed: VirtualMuse(recording, seed=seed)),
    "muse_athena": Twin("muse_athena", lambda recording, seed: VirtualMuseAthena(recording, seed=seed)),
    "strap": Twin("heart_rate", _seeded(lambda seed: HeartRateStrap(seed=seed))),
    "oximeter": Twin("pulse_oximeter", _seeded(lambda seed: PulseOximeter(seed=seed))),
    "cuff": Twin("blood_pressure", _seeded(lambda seed: BloodPressureCuff(seed=seed, interval_s=CUFF_INTERVAL_S))),
    "thermometer": Twin("thermometer", _seeded(lambda seed: Thermometer(seed=seed))),
    "polar_h10": Twin("polar_h10", _seeded(lambda seed: PolarH10(seed=seed))),
    "nonin": Twin("nonin", _seeded(lambda seed: NoninFirmware(seed=seed))),
    "nonin_wristox2": Twin("nonin_wristox2", _seeded(lambda seed: NoninFirmware(7, seed=seed))),
    "nonin_onyx": Twin("nonin_onyx", _seeded(lambda seed: NoninFirmware(7, seed=seed, select=SELECT_ONYX))),
    "contec": Twin("contec", _seeded(ContecFirmware)),
    "contec_old": Twin("contec_old", _seeded(ContecOldFirmware)),
    "gps": Twin("gps", _seeded(lambda seed: GpsFirmware(seed=seed))),
}
