"""Every driver by name: adding a device is one decoder file and one entry here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from gateway.devices import cyton, muse
from gateway.devices.base import Decoder
from gateway.devices.blood_pressure import BloodPressureDecoder
from gateway.devices.contec import ContecDecoder, ContecOldDecoder
from gateway.devices.gps import GpsDecoder
from gateway.devices.heart_rate import HeartRateDecoder
from gateway.devices.muse_athena import MuseAthenaDecoder
from gateway.devices.nonin import SELECT_ONYX, NoninFormat2Decoder, NoninFormat7Decoder
from gateway.devices.polar import PolarDecoder
from gateway.devices.pulse_oximeter import PulseOximeterDecoder
from gateway.devices.thermometer import ThermometerDecoder

CUFF_SILENCE_S = 24 * 3600.0
"""A cuff or a thermometer reports when somebody uses it: silence says nothing, and the link says when it is lost."""


class LinkKind(Enum):
    """What carries a device's bytes."""

    SERIAL = "serial"
    BLE = "BLE"
    FILE = "file"
    BRAINFLOW = "BrainFlow"
    LSL = "LSL"


@dataclass(frozen=True, slots=True)
class Options:
    """What an operator may choose about a device's signals."""

    electrodes: tuple[str, ...] | None = None
    """Names in the order of the inputs; None: the device's own."""
    auxiliary: cyton.Carried | None = None
    """Cyton: what its auxiliary bytes carry."""


@dataclass(frozen=True, slots=True)
class SerialLine:
    """How a port is driven, beside 8 data bits and one stop bit."""

    baud_rate: int
    parity: Literal["none", "even", "odd"] = "none"
    flow_control: Literal["none", "xon_xoff"] = "none"


@dataclass(frozen=True, slots=True)
class Characteristics:
    """GATT characteristics that a driver uses."""

    notify: tuple[str, ...]
    """To subscribe to; the device must have the first one."""
    read: tuple[str, ...]
    """To read once after connecting, where they are there."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A source that says itself what it gives, when it is asked through its library."""

    link: LinkKind


@dataclass(frozen=True, slots=True)
class LeadOff:
    """How a board measures the impedance of its electrodes."""

    decoder: Callable[[Options, int], Decoder]
    """Makes a decoder for one connection in which this input (from 1) gets the test current."""
    restore: tuple[bytes, ...]
    """Commands that undo it, whatever the board is doing."""
    restored: bytes
    """In the text that confirms them."""
    averaged: int = 1
    """Of how many samples of the converter each value is the mean."""


@dataclass(frozen=True, slots=True)
class Driver:
    """How to reach a kind of device and how to read it."""

    description: str
    line: SerialLine | Characteristics | Asked
    decoder: Callable[[Options], Decoder]
    """Makes a decoder for one connection."""
    start_timeout_s: float
    """Time from the open link to the first data, after which the connection is begun anew."""
    silence_timeout_s: float
    """A stream with no data for so long is dead, whatever the link says."""
    channel_count: int = 0
    """Electrodes that can be named."""
    lead_off: LeadOff | None = None
    """None: the hardware cannot measure an impedance."""

    @property
    def link(self) -> LinkKind:
        """What carries the device's bytes."""
        match self.line:
            case SerialLine():
                return LinkKind.SERIAL
            case Characteristics():
                return LinkKind.BLE
            case Asked(link):
                return link


def _cyton(options: Options) -> Decoder:
    electrodes = options.electrodes or cyton.DEFAULT_ELECTRODES
    return cyton.CytonDecoder(electrodes, auxiliary=options.auxiliary)


def _cyton_daisy(options: Options) -> Decoder:
    electrodes = options.electrodes or cyton.DAISY_ELECTRODES
    return cyton.CytonDecoder(electrodes, daisy=True, auxiliary=options.auxiliary)


def _cyton_lead_off(options: Options, number: int) -> Decoder:
    return cyton.CytonDecoder(options.electrodes or cyton.DEFAULT_ELECTRODES, lead_off=(number,))


def _cyton_daisy_lead_off(options: Options, number: int) -> Decoder:
    return cyton.CytonDecoder(options.electrodes or cyton.DAISY_ELECTRODES, daisy=True, lead_off=(number,))


def _muse(description: str, preset: str, electrode_count: int) -> Driver:
    return Driver(
        description,
        Characteristics(muse.notified(preset), ()),
        lambda options: muse.MuseDecoder(options.electrodes, preset),
        start_timeout_s=10.0,
        silence_timeout_s=2.0,
        channel_count=electrode_count,
    )


def _sensor(
    description: str,
    decoder: Callable[[], Decoder],
    notify: Sequence[str],
    read: Sequence[str],
    silence_timeout_s: float,
    start_timeout_s: float = 15.0,
) -> Driver:
    characteristics = Characteristics(tuple(notify), tuple(read))
    return Driver(description, characteristics, lambda _options: decoder(), start_timeout_s, silence_timeout_s)


def _serial(
    description: str, decoder: Callable[[], Decoder], line: SerialLine, silence_timeout_s: float, start_s: float = 5.0
) -> Driver:
    return Driver(description, line, lambda _options: decoder(), start_s, silence_timeout_s)


def _not_asked(_options: Options) -> Decoder:
    raise AssertionError("gateway.reach completes this driver with what its source says")


def _asked(description: str, link: LinkKind, silence_timeout_s: float) -> Driver:
    return Driver(description, Asked(link), _not_asked, 20.0, silence_timeout_s)


DRIVERS = {
    "cyton": Driver(
        "OpenBCI Cyton, 8 channels",
        SerialLine(115_200),
        _cyton,
        8.0,
        1.0,
        cyton.CHANNEL_COUNT,
        LeadOff(_cyton_lead_off, cyton.RESTORE, cyton.RESTORED),
    ),
    "cyton_daisy": Driver(
        "OpenBCI Cyton with Daisy, 16 channels",
        SerialLine(115_200),
        _cyton_daisy,
        8.0,
        1.0,
        cyton.DAISY_CHANNEL_COUNT,
        LeadOff(_cyton_daisy_lead_off, cyton.RESTORE, cyton.RESTORED, averaged=2),
    ),
    "muse": _muse("Muse 2016, Muse 2, Muse S: EEG, acceleration, gyro, battery", "p21", 4),
    "muse_aux": _muse("Muse with its auxiliary electrode", "p20", 5),
    "muse_ppg": _muse("Muse 2, Muse S with PPG and auxiliary electrode", "p50", 5),
    "muse_athena": Driver(
        "Muse S Athena: EEG, optics, acceleration, gyro, battery",
        Characteristics(MuseAthenaDecoder.NOTIFY, ()),
        lambda options: MuseAthenaDecoder(options.electrodes),
        start_timeout_s=10.0,
        silence_timeout_s=3.0,
        channel_count=4,
    ),
    "heart_rate": _sensor(
        "Heart-rate strap (0x180D) with RR intervals",
        HeartRateDecoder,
        HeartRateDecoder.NOTIFY,
        HeartRateDecoder.READ,
        5.0,
    ),
    "pulse_oximeter": _sensor(
        "Pulse oximeter (0x1822), continuous and spot-check",
        PulseOximeterDecoder,
        PulseOximeterDecoder.NOTIFY,
        PulseOximeterDecoder.READ,
        30.0,
        60.0,
    ),
    "blood_pressure": _sensor(
        "Blood pressure cuff (0x1810)",
        BloodPressureDecoder,
        BloodPressureDecoder.NOTIFY,
        BloodPressureDecoder.READ,
        CUFF_SILENCE_S,
        CUFF_SILENCE_S,
    ),
    "thermometer": _sensor(
        "Health thermometer (0x1809)",
        ThermometerDecoder,
        ThermometerDecoder.NOTIFY,
        ThermometerDecoder.READ,
        CUFF_SILENCE_S,
        CUFF_SILENCE_S,
    ),
    "polar_h10": _sensor(
        "Polar H10: ECG 130 Hz, heart rate, battery", PolarDecoder, PolarDecoder.NOTIFY, PolarDecoder.READ, 5.0
    ),
    "nonin": _serial("Nonin OEM III, Xpod (data format 2)", NoninFormat2Decoder, SerialLine(9_600), 2.0),
    "nonin_wristox2": _serial("Nonin WristOx2 3150 (data format 7)", NoninFormat7Decoder, SerialLine(9_600), 2.0),
    "nonin_onyx": _serial(
        "Nonin Onyx II (data format 7)",
        lambda: NoninFormat7Decoder(SELECT_ONYX, "Nonin Onyx II"),
        SerialLine(9_600),
        2.0,
    ),
    "contec": _serial("Contec CMS50D+ from firmware 4.6 on, CMS50E", ContecDecoder, SerialLine(115_200), 3.0),
    "contec_old": _serial(
        "Contec CMS50D+ before firmware 4.6", ContecOldDecoder, SerialLine(19_200, "odd", "xon_xoff"), 3.0
    ),
    "gps": _serial("GPS receiver (NMEA 0183)", GpsDecoder, SerialLine(9_600), 10.0, 20.0),
    "replay": _asked("Recording: OpenBCI text, Muse CSV, EDF, BDF, XDF, NMEA log", LinkKind.FILE, 60.0),
    "brainflow": _asked("Any board that BrainFlow knows (extra brainflow, x86-64)", LinkKind.BRAINFLOW, 3.0),
    "lsl": _asked("A stream of the Lab Streaming Layer (extra lsl)", LinkKind.LSL, 5.0),
}
