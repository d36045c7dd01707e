"""InfluxDB line protocol: names and tags escaped once, columns of values turned into lines.

`encode` is compiled (ext/line_protocol.pyx) where that was built; the plain implementation here gives the same bytes
and is its oracle. Pure: knows no binding, no server. Source: InfluxDB 2 line protocol reference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gateway import kernels
from gateway.errors import Fault, WardlinkError
from gateway.kernels import COMPILED

Values = NDArray[np.float64] | NDArray[np.float32] | NDArray[np.int64]
Column = tuple[bytes, Values, bool]
"""Escaped field name, values (n,), and whether the field is an integer. NaN and infinities are "no value"."""


class Encode(Protocol):
    """The type of `encode`."""

    def __call__(
        self, prefix: bytes, times_ns: NDArray[np.int64], columns: Sequence[Column], decimals: int = -1
    ) -> tuple[bytes, int]:
        """See `encode`."""


ENCODED_BYTES_MAX = 256 * 1024 * 1024
"""Most that one call may need in the worst case; a batch of 5,000 lines with 64 channels stays under 13 MB."""
SERIES_KEY_BYTES_MAX = 65_535
"""InfluxDB's limit for a measurement with all its tags."""
NUMBER_BYTES_MAX = 24
"""Longest shortest form of a float64, -1.2345678901234567e-308; a signed 64-bit integer with its `i` has 21."""
DECIMALS_MAX = 9
SHORTEST = -1
"""In place of a number of decimals: as many as it takes to give the same value back."""

_FLOATS = (np.dtype(np.float64), np.dtype(np.float32))
_TIME_BYTES_MAX = 20
_FIXED_END = 2.0**51
"""From here on a float64 times a power of ten has no room for the half that rounding looks at."""
_INT64_END = 2.0**63
_ESCAPED_IN_MEASUREMENT = str.maketrans({",": r"\,", " ": r"\ "})
_ESCAPED_IN_KEY = str.maketrans({",": r"\,", " ": r"\ ", "=": r"\="})


class UnwritableError(WardlinkError):
    """A measurement, tag or field name that line protocol has no way to write."""

    fault = Fault.OPERATOR


def escape_measurement(name: str) -> str:
    """The measurement as it stands in a line. Raises `UnwritableError`."""
    _check(name, "measurement")
    if name.startswith(("_", "#")):
        raise UnwritableError(f"measurement {name!r} begins with {name[0]!r}, which InfluxDB keeps for itself")
    return name.translate(_ESCAPED_IN_MEASUREMENT)


def escape_key(name: str) -> str:
    """A tag key or field name as it stands in a line. Raises `UnwritableError`."""
    _check(name, "tag or field name")
    if name.startswith("_"):
        raise UnwritableError(f"tag or field name {name!r} begins with '_', which InfluxDB keeps for itself")
    if name == "time":
        raise UnwritableError("a tag or field cannot be named 'time': InfluxDB drops it")
    return name.translate(_ESCAPED_IN_KEY)


def escape_tag_value(value: str) -> str:
    """A tag value as it stands in a line. Raises `UnwritableError`."""
    _check(value, "tag value")
    return value.translate(_ESCAPED_IN_KEY)


def _check(text: str, what: str) -> None:
    if not text:
        raise UnwritableError(f"a {what} is empty", hint="leave the tag out, or give it a value")
    # A backslash escapes whatever separator follows, and cannot itself be escaped.
    if text.endswith("\\"):
        raise UnwritableError(f"{what} {text!r} ends in a backslash, which would swallow the separator after it")
    if any(letter < " " or letter == "\x7f" for letter in text):
        raise UnwritableError(f"{what} {text!r} holds a line break or another control character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UnwritableError(f"{what} {text!r} is not valid Unicode") from None


def series_prefix(measurement: str, tags: Mapping[str, str]) -> bytes:
    """Measurement and tags, escaped, sorted by tag key as InfluxDB prefers: what every line of a series begins with.

    Raises `UnwritableError`.
    """
    parts = [escape_measurement(measurement)]
    parts += [f"{escape_key(key)}={escape_tag_value(tags[key])}" for key in sorted(tags)]
    prefix = ",".join(parts).encode()
    if len(prefix) > SERIES_KEY_BYTES_MAX:
        raise UnwritableError(
            f"measurement {measurement!r} with its tags has {len(prefix)} bytes, expected up to {SERIES_KEY_BYTES_MAX}"
        )
    return prefix


def encode_plain(
    prefix: bytes, times_ns: NDArray[np.int64], columns: Sequence[Column], decimals: int = SHORTEST
) -> tuple[bytes, int]:
    """The same as `encode`, in Python."""
    if not SHORTEST <= decimals <= DECIMALS_MAX:
        raise ValueError(f"{decimals} decimals, expected 0 to {DECIMALS_MAX}")
    _check_columns(prefix, times_ns, columns)
    texts = [(b"," + name + b"=", _texts(values, is_integer, decimals)) for name, values, is_integer in columns]
    lines = []
    for row, time_ns in enumerate(times_ns.tolist()):
        fields = b"".join(name + text for name, column in texts if (text := column[row]) is not None)
        if fields:
            lines.append(b"%b %b %d\n" % (prefix, fields[1:], time_ns))
    return b"".join(lines), len(lines)


def _check_columns(prefix: bytes, times_ns: NDArray[np.int64], columns: Sequence[Column]) -> None:
    if not prefix or b"\n" in prefix:
        raise ValueError("the prefix is empty or holds a line break")
    if times_ns.dtype != np.int64 or times_ns.ndim != 1:
        raise ValueError(f"times are {times_ns.dtype} {times_ns.shape}, expected int64 (n,)")
    line_bytes = len(prefix) + _TIME_BYTES_MAX + 2
    for name, values, is_integer in columns:
        if not name or b"\n" in name:
            raise ValueError("a field name is empty or holds a line break")
        if values.shape != times_ns.shape:
            raise ValueError(f"field {name!r} has shape {values.shape}, expected {times_ns.shape}")
        if values.dtype not in _FLOATS and not (is_integer and values.dtype == np.int64):
            raise ValueError(f"field {name!r} is {values.dtype}, expected a float, or int64 for an integer field")
        line_bytes += len(name) + NUMBER_BYTES_MAX + 2
    if line_bytes * times_ns.shape[0] > ENCODED_BYTES_MAX:
        raise ValueError(f"{times_ns.shape[0]} lines of up to {line_bytes} bytes exceed {ENCODED_BYTES_MAX}")


def _texts(values: Values, is_integer: bool, decimals: int) -> list[bytes | None]:
    if values.dtype == np.int64:
        return [b"%di" % value for value in values.tolist()]
    if is_integer:
        with np.errstate(invalid="ignore"):  # a signalling NaN is "no value" like any other
            whole = np.rint(values).tolist()
        return [b"%di" % int(value) if -_INT64_END <= value < _INT64_END else None for value in whole]
    single = values.dtype == np.float32
    return [_text(value, single, decimals) if math.isfinite(value) else None for value in values.tolist()]


def _text(value: float, single: bool, decimals: int) -> bytes:
    if decimals == SHORTEST or abs(value) * 10.0**decimals >= _FIXED_END:
        return shortest(value, single=single and decimals == SHORTEST)
    text = b"%.*f" % (decimals, value)
    return text.lstrip(b"-") if not text.strip(b"-0.") else text


def shortest(value: float, *, single: bool = False) -> bytes:
    """The fewest characters that read back as the same float64, as C++17's std::to_chars writes them.

    Plain or with an exponent, whichever is shorter, plain if equal. `value` is finite. `single`: the same float32.
    """
    sign, digits, exponent = _decimal(value, single)
    point = len(digits) + exponent
    if exponent >= 0:
        plain = str(abs(int(value)))
    elif point > 0:
        plain = f"{digits[:point]}.{digits[point:]}"
    else:
        plain = f"0.{'0' * -point}{digits}"
    fraction = f".{digits[1:]}" if len(digits) > 1 else ""
    scientific = f"{digits[0]}{fraction}e{point - 1:+03d}"
    return (sign + (plain if len(plain) <= len(scientific) else scientific)).encode()


def _decimal(value: float, single: bool) -> tuple[str, str, int]:
    """Sign, shortest digits d and exponent e: the value is d x 10^e."""
    text = np.format_float_scientific(np.float32(abs(value))) if single else repr(abs(value))
    mantissa, _, power = text.partition("e")
    whole, _, fraction = mantissa.partition(".")
    exponent = int(power or 0) - len(fraction)
    digits = (whole + fraction).lstrip("0") or "0"
    kept = digits.rstrip("0") or "0"
    sign = "-" if math.copysign(1, value) < 0 else ""
    return sign, kept, 0 if kept == "0" else exponent + len(digits) - len(kept)


IMPLEMENTATION, _compiled = kernels.choose({COMPILED: "cloud_sync._line_protocol"})
"""Which implementation of `encode` runs."""
encode: Encode = encode_plain if _compiled is None else _compiled.encode
"""Lines of n samples that share a prefix, and how many lines: `encode(prefix, times_ns, columns, decimals)`.

`prefix`: from `series_prefix`. `times_ns`: int64 (n,), UTC in ns, any sign. `columns`: names from `escape_key`,
in the order in which they are to stand. A float64 or float32 is written with the fewest digits that give it back; in an
integer field it is rounded to the nearest integer (halves to even) and is none if it does not fit 64 bits.
`decimals`: not `SHORTEST` but so many digits behind the point, rounded to the nearest (exact ties to even), without the
sign of a zero; a value of 2^51 / 10^decimals or more is written shortest. Microvolts out of a 24-bit converter need
three: a count of the Cyton is 0.022 uV, and the rest of the 17 digits is none that was measured.
Fields without a value are left out, and so are lines without a field. Every line ends in a line feed.
Raises `ValueError` for columns that do not fit each other, or that need over `ENCODED_BYTES_MAX`.
"""
