"""Arrays in CBOR: RFC 8746 typed arrays, and the packed form for raw counts.

The packed form holds int32 counts (n, channels): each sample as its difference from the one before (modulo 2^32,
so any value survives), the bytes of equal weight put side by side, then zstd. Neighbouring EEG samples differ
little, so the upper bytes become runs. Differences and planes are compiled (ext/packing.pyx) where that was built; the
plain functions here give the same and are its oracle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import zstandard
from cbor2 import CBORTag
from numpy.typing import NDArray

from gateway import kernels
from gateway.errors import MalformedError
from gateway.kernels import COMPILED
from gateway.wire.excerpt import excerpt, reason

_MULTI_DIMENSIONAL_ROW_MAJOR = 40
"""RFC 8746, 3.1.1."""
_TYPED_ARRAYS: dict[int, np.dtype[Any]] = {
    64: np.dtype("u1"),
    72: np.dtype("i1"),
    77: np.dtype("<i2"),
    78: np.dtype("<i4"),
    79: np.dtype("<i8"),
    85: np.dtype("<f4"),
    86: np.dtype("<f8"),
}
"""RFC 8746, 2.1: the little-endian members that this contract uses."""
_TAG_OF = {dtype: tag for tag, dtype in _TYPED_ARRAYS.items()}

CODEC = "delta-shuffle-zstd"
_ZSTD_LEVEL = 3
"""Above 3 the size hardly falls and the time doubles."""
VALUES_MAX = 64 * 1024 * 1024
"""Most counts at once; a message is far smaller, see `gateway.wire.messages`."""


def typed_array(values: NDArray[Any]) -> CBORTag:
    """A one- or two-dimensional array as RFC 8746 has it."""
    little = values.astype(values.dtype.newbyteorder("<"), copy=False)
    flat = CBORTag(_TAG_OF[little.dtype], np.ascontiguousarray(little).tobytes())
    if values.ndim == 1:
        return flat
    return CBORTag(_MULTI_DIMENSIONAL_ROW_MAJOR, [list(values.shape), flat])


def array_of(value: object, shape: tuple[int, ...], what: str) -> NDArray[Any]:
    """The array in a decoded CBOR value, which must have this shape. Raises `MalformedError`."""
    if isinstance(value, CBORTag) and value.tag == _MULTI_DIMENSIONAL_ROW_MAJOR:
        match value.value:
            case [[*dimensions], inner] if tuple(dimensions) == shape:
                return array_of(inner, (int(np.prod(shape)),), what).reshape(shape)
        raise MalformedError(f"{what}: expected an array of shape {shape}")
    if not isinstance(value, CBORTag) or value.tag not in _TYPED_ARRAYS or not isinstance(value.value, bytes):
        raise MalformedError(f"{what}: expected an RFC 8746 array")
    dtype = _TYPED_ARRAYS[value.tag]
    if len(value.value) != dtype.itemsize * int(np.prod(shape)) or len(shape) != 1:
        raise MalformedError(f"{what}: has {len(value.value)} bytes, expected shape {shape} of {dtype}")
    return np.frombuffer(value.value, dtype=dtype)


def pack(counts: NDArray[np.int32]) -> dict[str, Any]:
    """Pack int32 counts (n, channels)."""
    planes = planes_of(counts)
    packed = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_content_size=True).compress(planes)
    return {"codec": CODEC, "data": packed}


def unpack(packed: object, shape: tuple[int, int]) -> NDArray[np.int32]:
    """The int32 counts of this shape (n, channels). Raises `MalformedError`; never allocates more than the shape."""
    match packed:
        case {"codec": str(codec), "data": bytes(data)}:
            pass
        case _:
            raise MalformedError("counts: expected codec and data")
    if codec != CODEC:
        raise MalformedError(f"counts: codec {excerpt(codec)} is not known", hint=f"this version knows {CODEC!r}")
    n, channels = shape
    size = n * channels * 4
    try:
        if zstandard.frame_content_size(data) != size:
            raise MalformedError(f"counts: packed data is not of shape {shape}")
        planes = zstandard.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise MalformedError(f"counts: zstd says {reason(error)}") from None
    return counts_of(planes, n, channels)


def planes_of_plain(counts: NDArray[np.int32]) -> bytes:
    """The same as `planes_of`, in numpy."""
    if counts.dtype != np.int32 or counts.ndim != 2:
        raise ValueError(f"counts are {counts.dtype} {counts.shape}, expected int32 (n, channels)")
    _check_shape(*counts.shape)
    bits = np.ascontiguousarray(counts, dtype="<i4").view("<u4")
    steps = bits.copy()
    steps[1:] -= bits[:-1]
    return steps.T.reshape(-1).view(np.uint8).reshape(-1, 4).T.tobytes()


def counts_of_plain(planes: bytes, samples: int, channels: int) -> NDArray[np.int32]:
    """The same as `counts_of`, in numpy."""
    _check_shape(samples, channels)
    if len(planes) != 4 * samples * channels:
        raise ValueError(f"{len(planes)} bytes are not {samples} x {channels} counts")
    octets = np.ascontiguousarray(np.frombuffer(planes, np.uint8).reshape(4, samples * channels).T)
    steps = octets.view("<u4").reshape(channels, samples)
    return np.cumsum(steps, axis=1, dtype=np.uint32).view(np.int32).T


def _check_shape(samples: int, channels: int) -> None:
    if samples < 0 or channels < 0 or samples * channels > VALUES_MAX:
        raise ValueError(f"{samples} x {channels} counts at once, expected up to {VALUES_MAX}")


planes_of: Callable[[NDArray[np.int32]], bytes]
"""Four planes of bytes, lowest first, of the differences of int32 counts (n, channels), channel after channel.

Raises `ValueError` for another type or more than `VALUES_MAX`.
"""
counts_of: Callable[[bytes, int, int], NDArray[np.int32]]
"""int32 (n, channels) out of `planes_of`'s bytes, n and channels; each channel is contiguous. Raises `ValueError`."""

IMPLEMENTATION, _compiled = kernels.choose({COMPILED: "gateway.wire._packing"})
"""Which implementation of these functions runs."""
if _compiled is None:
    planes_of = planes_of_plain
    counts_of = counts_of_plain
else:
    planes_of = _compiled.planes_of
    counts_of = _compiled.counts_of
