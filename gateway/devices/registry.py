"""Every driver by name: adding a device is one decoder file and one line here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from gateway.devices import cyton
from gateway.devices.base import Decoder
from gateway.devices.heart_rate import HeartRateDecoder


class LinkKind(Enum):
    """What carries a device's bytes."""

    SERIAL = "serial"
    BLE = "BLE"


@dataclass(frozen=True, slots=True)
class Driver:
    """How to reach a kind of device and how to read it."""

    description: str
    link: LinkKind
    decoder: Callable[[Sequence[str] | None], Decoder]
    """Makes a decoder for one connection; takes the electrode names, or None for the device's own."""
    channel_count: int
    start_timeout_s: float
    """Time from the open link to the first data, after which the connection is begun anew."""
    silence_timeout_s: float
    """A stream with no data for so long is dead, whatever the link says."""
    baud_rate: int = 115_200
    notify: tuple[str, ...] = ()
    """GATT characteristics to subscribe to."""
    read: tuple[str, ...] = ()
    """GATT characteristics to read once after connecting."""


def _cyton(electrodes: Sequence[str] | None) -> Decoder:
    return cyton.CytonDecoder(electrodes or cyton.DEFAULT_ELECTRODES)


DRIVERS = {
    "cyton": Driver(
        description="OpenBCI Cyton, 8 channels, USB dongle",
        link=LinkKind.SERIAL,
        decoder=_cyton,
        channel_count=cyton.CHANNEL_COUNT,
        start_timeout_s=8.0,
        silence_timeout_s=1.0,
    ),
    "heart_rate": Driver(
        description="Heart-rate strap (0x180D) with RR intervals and battery",
        link=LinkKind.BLE,
        decoder=lambda _electrodes: HeartRateDecoder(),
        channel_count=0,
        start_timeout_s=15.0,
        silence_timeout_s=5.0,
        notify=HeartRateDecoder.NOTIFY,
        read=HeartRateDecoder.READ,
    ),
}
