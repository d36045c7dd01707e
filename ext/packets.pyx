# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Bits of device packets to counts. Definitions and oracle: gateway/devices/packets.py.

Everything is checked and sized at the door; the loops themselves touch no Python object and hold no GIL.
"""

import numpy

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memchr


cdef extern from "packet_bits.h" nogil:
    enum:
        CYTON_BYTES
        CYTON_CHANNELS
        MUSE_BYTES
        MUSE_SAMPLES
    void cyton_counts(
        const uint8_t *data,
        const int32_t *starts,
        Py_ssize_t count,
        int32_t *counts,
        Py_ssize_t by_channel,
        Py_ssize_t by_packet,
    )
    void muse_counts_of(const uint8_t *packets, Py_ssize_t count, int32_t *counts)


# The same numbers, with their reasons, stand in gateway/devices/packets.py.
cdef enum:
    CYTON_START = 0xA0
    CYTON_STOP_FIRST = 0xC0
    CYTON_STOP_LAST = 0xC6
    VALUE_BITS_MAX = 24
    BUFFER_BYTES_MAX = 64 * 1024 * 1024
    PACKETS_AT_ONCE = 128

# Below it the work takes less than a microsecond, and handing the GIL over and back a good part of that.
cdef Py_ssize_t BYTES_WITHOUT_GIL = 16 * 1024
cdef object empty = numpy.empty
cdef object INT32 = numpy.dtype(numpy.int32)


cdef inline Py_ssize_t next_start(const uint8_t *data, Py_ssize_t size, Py_ssize_t at) noexcept nogil:
    cdef const uint8_t *found
    if at >= size:
        return size
    if data[at] == CYTON_START:
        return at
    found = <const uint8_t *> memchr(data + at, CYTON_START, <size_t> (size - at))
    return size if found == NULL else found - data


cdef Py_ssize_t find(const uint8_t *data, Py_ssize_t size, int32_t *starts, Py_ssize_t *rest) noexcept nogil:
    """Number of packets. `rest`: where the beginning of a packet stands that is not whole yet, else `size`."""
    cdef Py_ssize_t count = 0
    cdef Py_ssize_t at = next_start(data, size, 0)
    cdef Py_ssize_t end
    while at + CYTON_BYTES <= size:
        end = at + CYTON_BYTES
        if CYTON_STOP_FIRST <= data[end - 1] <= CYTON_STOP_LAST and (end == size or data[end] == CYTON_START):
            starts[count] = <int32_t> at
            count += 1
            at = end
        else:
            at = next_start(data, size, at + 1)
    rest[0] = at
    return count


cdef Py_ssize_t read(
    const uint8_t *data,
    const int32_t *starts,
    Py_ssize_t count,
    int32_t *counts,
    Py_ssize_t by_channel,
    Py_ssize_t by_packet,
    uint8_t *counters,
    uint8_t *stops,
    int expected,
) noexcept nogil:
    """Number of packets that the counters show missing. `count` is not 0."""
    cdef Py_ssize_t k, first
    cdef Py_ssize_t end = 0
    cdef uint32_t lost
    while end < count:
        # Both loops over a part that stays in the cache.
        first = end
        end = min(first + PACKETS_AT_ONCE, count)
        cyton_counts(data, starts + first, end - first, counts + first * by_packet, by_channel, by_packet)
        for k in range(first, end):
            counters[k] = data[starts[k] + 1]
            stops[k] = data[starts[k] + CYTON_BYTES - 1]
    lost = 0 if expected < 0 else <uint8_t> (counters[0] - expected)
    for k in range(1, count):
        lost += <uint8_t> (counters[k] - counters[k - 1] - 1)
    return lost


cdef bint all_inside(const int32_t *starts, Py_ssize_t count, Py_ssize_t last) noexcept nogil:
    cdef Py_ssize_t k
    cdef bint outside = False
    for k in range(count):
        outside |= (starts[k] < 0) | (starts[k] > last)
    return not outside


cdef void unpack_little(const uint8_t *data, int bits, int32_t *values, Py_ssize_t count) noexcept nogil:
    cdef Py_ssize_t k
    cdef uint64_t word = 0
    cdef uint32_t mask = (<uint32_t> 1 << bits) - 1
    cdef int held = 0
    for k in range(count):
        while held < bits:
            word |= <uint64_t> data[0] << held
            data += 1
            held += 8
        values[k] = <int32_t> (<uint32_t> word & mask)
        word >>= bits
        held -= bits


cdef int32_t *room_in(array) except? NULL:
    """Where a new array of our own has its numbers: a typed memoryview of it would take as long as the work."""
    cdef Py_buffer view
    PyObject_GetBuffer(array, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
    cdef int32_t *numbers = <int32_t *> view.buf
    PyBuffer_Release(&view)
    return numbers


cdef Py_ssize_t size_of(bytes data) except -1:
    cdef Py_ssize_t size = len(data)
    if size > BUFFER_BYTES_MAX:
        raise ValueError(f"{size} bytes at once, expected up to {BUFFER_BYTES_MAX}")
    return size


cdef Py_ssize_t parts_of(bytes data, Py_ssize_t part) except -1:
    cdef Py_ssize_t size = size_of(data)
    if size % part:
        raise ValueError(f"{size} bytes are no whole number of packets of {part}")
    return size // part


def find_packets(bytes buffer not None):
    """See `gateway.devices.packets.find_packets`."""
    cdef Py_ssize_t size = size_of(buffer)
    cdef Py_ssize_t rest = 0
    cdef Py_ssize_t count
    cdef const uint8_t *data = buffer
    starts = empty(size // CYTON_BYTES + 1, INT32)
    cdef int32_t *written = room_in(starts)
    if size < BYTES_WITHOUT_GIL:
        count = find(data, size, written, &rest)
    else:
        with nogil:
            count = find(data, size, written, &rest)
    return starts[:count], rest


def channel_counts(bytes packets not None):
    """See `gateway.devices.packets.channel_counts`."""
    cdef Py_ssize_t count = parts_of(packets, CYTON_BYTES)
    cdef const uint8_t *data = packets
    counts = empty((CYTON_CHANNELS, count), INT32)
    cdef int32_t *written = room_in(counts)
    with nogil:
        cyton_counts(data, NULL, count, written, count, 1)
    return counts


def read_packets(
    bytes buffer not None, const int32_t[::1] starts not None, int expected=-1, bint sample_major=False
):
    """See `gateway.devices.packets.read_packets`."""
    cdef Py_ssize_t size = size_of(buffer)
    cdef Py_ssize_t count = starts.shape[0]
    cdef Py_ssize_t lost = 0
    cdef const uint8_t *data = buffer
    if not -1 <= expected <= 255:
        raise ValueError(f"a counter of {expected} is expected, which has one byte")
    if count and not all_inside(&starts[0], count, size - CYTON_BYTES):
        raise ValueError(f"a packet of {CYTON_BYTES} bytes begins outside of {size} bytes")
    counts = empty((count, CYTON_CHANNELS), INT32) if sample_major else empty((CYTON_CHANNELS, count), INT32)
    counters = PyBytes_FromStringAndSize(NULL, count)
    stops = PyBytes_FromStringAndSize(NULL, count)
    cdef int32_t *counts_written = room_in(counts)
    cdef Py_ssize_t by_channel = 1 if sample_major else count
    cdef Py_ssize_t by_packet = CYTON_CHANNELS if sample_major else 1
    cdef uint8_t *counters_written = <uint8_t *> PyBytes_AS_STRING(counters)
    cdef uint8_t *stops_written = <uint8_t *> PyBytes_AS_STRING(stops)
    if 0 < count and size < BYTES_WITHOUT_GIL:
        lost = read(
            data, &starts[0], count, counts_written, by_channel, by_packet, counters_written, stops_written, expected
        )
    elif count:
        with nogil:
            lost = read(
                data, &starts[0], count, counts_written, by_channel, by_packet, counters_written, stops_written,
                expected,
            )
    return counts, counters, stops, lost


def muse_counts(bytes packets not None):
    """See `gateway.devices.packets.muse_counts`."""
    cdef Py_ssize_t count = parts_of(packets, MUSE_BYTES)
    cdef const uint8_t *data = packets
    counts = empty((count, MUSE_SAMPLES), INT32)
    cdef int32_t *written = room_in(counts)
    if count * MUSE_BYTES < BYTES_WITHOUT_GIL:
        muse_counts_of(data, count, written)
    else:
        with nogil:
            muse_counts_of(data, count, written)
    return counts


def little_values(bytes data not None, int bits):
    """See `gateway.devices.packets.little_values`."""
    cdef Py_ssize_t size = size_of(data)
    cdef const uint8_t *octets = data
    if not 1 <= bits <= VALUE_BITS_MAX:
        raise ValueError(f"values of {bits} bits, expected 1 to {VALUE_BITS_MAX}")
    if size * 8 % bits:
        raise ValueError(f"{size} bytes are no whole number of values of {bits} bits")
    cdef Py_ssize_t count = size * 8 // bits
    values = empty(count, INT32)
    cdef int32_t *written = room_in(values)
    with nogil:
        unpack_little(octets, bits, written, count)
    return values
