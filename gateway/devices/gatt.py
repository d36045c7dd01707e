"""What the standard GATT services share: full UUIDs, names, the fields of a value, the numbers of IEEE 11073-20601.

Pure: bytes in, values out. A value that is not there is `None`, never 0.
"""

from __future__ import annotations

from datetime import UTC, datetime

BASE_UUID_TAIL = "-0000-1000-8000-00805f9b34fb"
"""Bluetooth Core, vol. 3 part B, 2.5.1: every 16-bit UUID stands for one with this tail."""

ATTRIBUTE_BYTES_MAX = 512
"""Bluetooth Core, vol. 3 part F, 3.2.9: no attribute value is longer."""

TEXT_CHARACTERS_MAX = 80
"""The registry keeps this many characters of a model or a firmware name."""


def uuid_of(short: int) -> str:
    """The full UUID, lower case, of a 16-bit one: 0x2A37 -> 00002a37-0000-1000-8000-00805f9b34fb."""
    if not 0 <= short <= 0xFFFF:
        raise ValueError(f"a short UUID has 16 bits, not {short:#x}")
    return f"0000{short:04x}{BASE_UUID_TAIL}"


HEART_RATE_SERVICE = uuid_of(0x180D)
BATTERY_SERVICE = uuid_of(0x180F)
DEVICE_INFORMATION_SERVICE = uuid_of(0x180A)
PULSE_OXIMETER_SERVICE = uuid_of(0x1822)
BLOOD_PRESSURE_SERVICE = uuid_of(0x1810)
HEALTH_THERMOMETER_SERVICE = uuid_of(0x1809)

CURRENT_TIME_SERVICE = uuid_of(0x1805)

HEART_RATE_MEASUREMENT = uuid_of(0x2A37)
BODY_SENSOR_LOCATION = uuid_of(0x2A38)
PLX_SPOT_CHECK = uuid_of(0x2A5E)
PLX_CONTINUOUS = uuid_of(0x2A5F)
BLOOD_PRESSURE_MEASUREMENT = uuid_of(0x2A35)
INTERMEDIATE_CUFF_PRESSURE = uuid_of(0x2A36)
TEMPERATURE_MEASUREMENT = uuid_of(0x2A1C)
INTERMEDIATE_TEMPERATURE = uuid_of(0x2A1E)
DATE_TIME = uuid_of(0x2A08)
CURRENT_TIME = uuid_of(0x2A2B)
BATTERY_LEVEL = uuid_of(0x2A19)
MANUFACTURER_NAME = uuid_of(0x2A29)
MODEL_NUMBER = uuid_of(0x2A24)
SERIAL_NUMBER = uuid_of(0x2A25)
FIRMWARE_REVISION = uuid_of(0x2A26)
HARDWARE_REVISION = uuid_of(0x2A27)
SOFTWARE_REVISION = uuid_of(0x2A28)

NAMES = {
    HEART_RATE_SERVICE: "Heart Rate",
    BATTERY_SERVICE: "Battery",
    DEVICE_INFORMATION_SERVICE: "Device Information",
    PULSE_OXIMETER_SERVICE: "Pulse Oximeter",
    BLOOD_PRESSURE_SERVICE: "Blood Pressure",
    HEALTH_THERMOMETER_SERVICE: "Health Thermometer",
    CURRENT_TIME_SERVICE: "Current Time",
    HEART_RATE_MEASUREMENT: "Heart Rate Measurement",
    PLX_SPOT_CHECK: "PLX Spot-Check Measurement",
    PLX_CONTINUOUS: "PLX Continuous Measurement",
    BLOOD_PRESSURE_MEASUREMENT: "Blood Pressure Measurement",
    INTERMEDIATE_CUFF_PRESSURE: "Intermediate Cuff Pressure",
    TEMPERATURE_MEASUREMENT: "Temperature Measurement",
    INTERMEDIATE_TEMPERATURE: "Intermediate Temperature",
    DATE_TIME: "Date Time",
    CURRENT_TIME: "Current Time",
    BODY_SENSOR_LOCATION: "Body Sensor Location",
    BATTERY_LEVEL: "Battery Level",
    MANUFACTURER_NAME: "Manufacturer Name String",
    MODEL_NUMBER: "Model Number String",
    SERIAL_NUMBER: "Serial Number String",
    FIRMWARE_REVISION: "Firmware Revision String",
    HARDWARE_REVISION: "Hardware Revision String",
    SOFTWARE_REVISION: "Software Revision String",
}
"""The Bluetooth SIG's own names of services and characteristics."""


def name_of(uuid: str) -> str:
    """The standard name of a service or characteristic, or the UUID itself where it is nobody's standard."""
    return NAMES.get(uuid.lower(), uuid)


SFLOAT_INFINITIES = {0x07FE: float("inf"), 0x0802: float("-inf")}
SFLOAT_NO_VALUE = frozenset({0x07FF, 0x0800, 0x0801})
"""NaN, NRes (not at this resolution), reserved (Bluetooth SIG, Personal Health Devices Transcoding)."""

FLOAT_INFINITIES = {0x007FFFFE: float("inf"), 0x00800002: float("-inf")}
FLOAT_NO_VALUE = frozenset({0x007FFFFF, 0x00800000, 0x00800001})


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value & (1 << (bits - 1)) else value


def _scaled(mantissa: int, exponent: int) -> float:
    # Dividing by an exact power of ten rounds once: 376 x 10^-1 is 37.6 and not 37.6000000000000005.
    return float(mantissa * 10**exponent) if exponent >= 0 else mantissa / 10**-exponent


def sfloat(raw: int) -> float | None:
    """Value of a 16-bit SFLOAT (exponent 4 bits, mantissa 12, both two's complement).

    None for NaN, NRes and the reserved value; the infinities are infinities.
    The specials are told by the mantissa alone, whatever the exponent.
    """
    mantissa = raw & 0x0FFF
    if mantissa in SFLOAT_NO_VALUE:
        return None
    if mantissa in SFLOAT_INFINITIES:
        return SFLOAT_INFINITIES[mantissa]
    return _scaled(_signed(mantissa, 12), _signed(raw >> 12 & 0xF, 4))


def float32(raw: int) -> float | None:
    """Value of a 32-bit IEEE 11073 FLOAT (exponent 8 bits, mantissa 24; not IEEE 754). Specials as `sfloat`."""
    mantissa = raw & 0x00FFFFFF
    if mantissa in FLOAT_NO_VALUE:
        return None
    if mantissa in FLOAT_INFINITIES:
        return FLOAT_INFINITIES[mantissa]
    return _scaled(_signed(mantissa, 24), _signed(raw >> 24 & 0xFF, 8))


class MalformedValueError(ValueError):
    """The value of a characteristic is not what its definition says; the text says how."""


class Fields:
    """The fields of one value, little-endian, read from front to back.

    Each method takes the next field and raises `MalformedValueError` where the value ends before it.
    """

    def __init__(self, value: bytes) -> None:
        self._value = value
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes that were not read yet."""
        return len(self._value) - self._at

    def octets(self, count: int) -> bytes:
        """The next `count` bytes as they are."""
        if self.left < count:
            raise MalformedValueError(f"too short for its flags ({len(self._value)} bytes)")
        self._at += count
        return self._value[self._at - count : self._at]

    def uint(self, octets: int) -> int:
        """An unsigned integer of so many bytes."""
        return int.from_bytes(self.octets(octets), "little")

    def sfloat(self) -> float | None:
        """A 16-bit SFLOAT, see `sfloat`."""
        return sfloat(self.uint(2))

    def float32(self) -> float | None:
        """A 32-bit IEEE 11073 FLOAT, see `float32`."""
        return float32(self.uint(4))

    def date_time(self) -> datetime | None:
        """A Date Time by the device's own clock, see `date_time`."""
        return date_time(self.octets(DATE_TIME_BYTES))

    def rest(self) -> bytes:
        """All that was not read yet."""
        return self.octets(self.left)


DATE_TIME_BYTES = 7


def date_time(value: bytes) -> datetime | None:
    """Year u16, month, day, hours, minutes, seconds; None where the date is unknown (0) or none at all.

    A device has no time zone: UTC stands here for the device's own clock, whatever that is set to.
    Raises `MalformedValueError` for a value of another length.
    """
    if len(value) != DATE_TIME_BYTES:
        raise MalformedValueError(f"a date and time has {DATE_TIME_BYTES} bytes, not {len(value)}")
    month, day, hours, minutes, seconds = value[2:]
    try:
        return datetime(int.from_bytes(value[:2], "little"), month, day, hours, minutes, seconds, tzinfo=UTC)
    except ValueError:
        return None


def text(value: bytes) -> str | None:
    """A device information string, UTF-8; None where nothing readable is in it.

    Devices pad with NUL bytes and blanks, and some send the NUL that ends a C string with what lay behind it.
    """
    try:
        decoded = value.split(b"\0", 1)[0].decode("utf-8").strip()
    except UnicodeDecodeError:
        return None
    if not decoded or not decoded.isprintable():
        return None
    return decoded[:TEXT_CHARACTERS_MAX]


def battery_pct(value: bytes) -> float | None:
    """Charge in %, from a Battery Level; None for any length but one byte and for values above 100."""
    if len(value) != 1 or value[0] > 100:
        return None
    return float(value[0])
