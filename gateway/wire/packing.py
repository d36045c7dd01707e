"""Arrays in CBOR: RFC 8746 typed arrays, and the packed form for raw counts.

The packed form holds int32 counts (n, channels): each sample as its difference from the one before (modulo 2^32,
so any value survives), the bytes of equal weight put side by side, then zstd. Neighbouring EEG samples differ
little, so the upper bytes become runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import zstandard
from cbor2 import CBORTag
from numpy.typing import NDArray

from gateway.errors import MalformedError
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
    bits = np.ascontiguousarray(counts, dtype="<i4").view("<u4")
    steps = bits.copy()
    steps[1:] -= bits[:-1]
    planes = steps.T.reshape(-1).view(np.uint8).reshape(-1, 4).T
    packed = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_content_size=True).compress(planes.tobytes())
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
    steps = np.ascontiguousarray(np.frombuffer(planes, np.uint8).reshape(4, -1).T).view("<u4").reshape(channels, n)
    return np.cumsum(steps, axis=1, dtype=np.uint32).T.view(np.int32)
