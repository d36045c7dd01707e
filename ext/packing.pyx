# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""Counts to planes of bytes of their differences, and back. Definitions and oracle: gateway/wire/packing.py.

Everything is checked and sized at the door; the loops themselves touch no Python object and hold no GIL. Words are put
together from bytes: the planes are the same on every machine.
"""

import numpy

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int32_t, uint8_t, uint32_t

# The same limit, with its reason, stands in gateway/wire/packing.py.
cdef enum:
    VALUES_MAX = 64 * 1024 * 1024

cdef object empty = numpy.empty
cdef object INT32 = numpy.dtype(numpy.int32)


cdef void split(const int32_t[:, :] counts, uint8_t *planes, Py_ssize_t size) noexcept nogil:
    cdef Py_ssize_t samples = counts.shape[0]
    cdef Py_ssize_t i, channel
    cdef uint32_t value, before, step
    for channel in range(counts.shape[1]):
        before = 0
        for i in range(samples):
            value = <uint32_t> counts[i, channel]
            step = value - before
            before = value
            planes[i] = <uint8_t> step
            planes[size + i] = <uint8_t> (step >> 8)
            planes[2 * size + i] = <uint8_t> (step >> 16)
            planes[3 * size + i] = <uint8_t> (step >> 24)
        planes += samples


cdef void join(
    const uint8_t *planes, int32_t *counts, Py_ssize_t samples, Py_ssize_t channels, Py_ssize_t size
) noexcept nogil:
    cdef Py_ssize_t i, _channel
    cdef uint32_t value
    for _channel in range(channels):
        value = 0
        for i in range(samples):
            value += (
                <uint32_t> planes[i]
                | <uint32_t> planes[size + i] << 8
                | <uint32_t> planes[2 * size + i] << 16
                | <uint32_t> planes[3 * size + i] << 24
            )
            counts[i] = <int32_t> value
        planes += samples
        counts += samples


def planes_of(const int32_t[:, :] counts not None):
    """See `gateway.wire.packing.planes_of`."""
    cdef Py_ssize_t samples = counts.shape[0]
    cdef Py_ssize_t channels = counts.shape[1]
    cdef Py_ssize_t size
    cdef uint8_t *written
    if channels and samples > VALUES_MAX // channels:
        raise ValueError(f"{samples} x {channels} counts at once, expected up to {VALUES_MAX}")
    size = samples * channels
    planes = PyBytes_FromStringAndSize(NULL, 4 * size)
    written = <uint8_t *> PyBytes_AS_STRING(planes)
    with nogil:
        split(counts, written, size)
    return planes


def counts_of(bytes planes not None, Py_ssize_t samples, Py_ssize_t channels):
    """See `gateway.wire.packing.counts_of`."""
    cdef Py_ssize_t size
    cdef const uint8_t *read = planes
    if samples < 0 or channels < 0 or (channels and samples > VALUES_MAX // channels):
        raise ValueError(f"{samples} x {channels} counts at once, expected up to {VALUES_MAX}")
    size = samples * channels
    if len(planes) != 4 * size:
        raise ValueError(f"{len(planes)} bytes are not {samples} x {channels} counts")
    counts = empty((channels, samples), INT32)
    cdef int32_t[:, ::1] written = counts
    if size:
        with nogil:
            join(read, &written[0, 0], samples, channels, size)
    return counts.T
