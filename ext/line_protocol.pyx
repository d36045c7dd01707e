# distutils: language = c++
# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""Columns of numbers to InfluxDB line protocol. Definitions and oracle: cloud_sync/line_protocol.py.

Everything is checked and sized at the door; the loop itself touches no Python object and holds no GIL.
"""

from libc.math cimport isfinite, rint
from libc.stdint cimport int64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy
from libcpp.vector cimport vector


cdef extern from "<charconv>" namespace "std" nogil:
    cdef struct to_chars_result:
        char *ptr
    to_chars_result to_chars(char *first, char *last, double value)
    to_chars_result to_chars(char *first, char *last, int64_t value)


cdef struct Field:
    const char *name
    size_t name_size
    const char *values
    Py_ssize_t stride
    bint is_float64
    bint is_integer


# The same limits, with their reasons, stand in cloud_sync/line_protocol.py.
cdef size_t NUMBER_SIZE_MAX = 24
cdef size_t TIME_SIZE_MAX = 20
cdef size_t ENCODED_SIZE_MAX = 256 * 1024 * 1024
cdef double INT64_END = 9223372036854775808.0


cdef inline char *put_bytes(char *to, const char *data, size_t size) noexcept nogil:
    memcpy(to, data, size)
    return to + size


cdef inline char *put_integer(char *to, int64_t value) noexcept nogil:
    return to_chars(to, to + NUMBER_SIZE_MAX, value).ptr


cdef char *put_field(char *to, const Field &field, Py_ssize_t row, char before) noexcept nogil:
    """Write one field with the separator before it; nothing where it has no value."""
    cdef const char *at = field.values + row * field.stride
    cdef double number = 0
    cdef int64_t whole = 0
    if not field.is_float64:
        whole = (<const int64_t *> at)[0]
    else:
        number = (<const double *> at)[0]
        if not isfinite(number):
            return to
        if field.is_integer:
            number = rint(number)
            if not (-INT64_END <= number < INT64_END):
                return to
            whole = <int64_t> number
    to[0] = before
    to = put_bytes(to + 1, field.name, field.name_size)
    to[0] = b"="
    to += 1
    if field.is_integer:
        to = put_integer(to, whole)
        to[0] = b"i"
        return to + 1
    return to_chars(to, to + NUMBER_SIZE_MAX, number).ptr


cdef char *put_lines(
    char *to,
    const char *prefix,
    size_t prefix_size,
    const int64_t[:] times_ns,
    const vector[Field] &fields,
    Py_ssize_t *line_count,
) noexcept nogil:
    cdef Py_ssize_t row
    cdef size_t k
    cdef char *line
    cdef char *values
    cdef char *end
    line_count[0] = 0
    for row in range(times_ns.shape[0]):
        line = to
        values = put_bytes(to, prefix, prefix_size)
        to = values
        for k in range(fields.size()):
            to = put_field(to, fields[k], row, b" " if to == values else b",")
        if to == values:
            to = line
            continue
        to[0] = b" "
        end = put_integer(to + 1, times_ns[row])
        end[0] = b"\n"
        to = end + 1
        line_count[0] += 1
    return to


def encode(bytes prefix not None, const int64_t[:] times_ns not None, columns):
    """See `cloud_sync.line_protocol.encode`."""
    cdef vector[Field] fields
    cdef Field field
    cdef const double[:] numbers
    cdef const int64_t[:] integers
    cdef Py_ssize_t count = times_ns.shape[0]
    cdef Py_ssize_t line_count = 0
    cdef size_t line_size = <size_t> len(prefix) + TIME_SIZE_MAX + 2
    cdef const char *prefix_data = prefix
    cdef size_t prefix_size = <size_t> len(prefix)
    cdef bytes name
    cdef char *lines
    cdef char *end
    if not prefix or b"\n" in prefix:
        raise ValueError("the prefix is empty or holds a line break")
    columns = tuple(columns)  # a list could change while the lines are written
    held = []  # the buffers' exporters, and the names, until the lines are written
    for name, values, is_integer in columns:
        if not name or b"\n" in name:
            raise ValueError("a field name is empty or holds a line break")
        if len(values) != count or values.ndim != 1:
            raise ValueError(f"field {name!r} has shape {values.shape}, expected ({count},)")
        field.name = name
        field.name_size = <size_t> len(name)
        field.is_integer = bool(is_integer)
        field.is_float64 = values.dtype == "float64"
        field.values = NULL
        field.stride = 0
        if field.is_float64:
            numbers = values
            held.append((name, numbers))
            if count:
                field.values = <const char *> &numbers[0]
                field.stride = numbers.strides[0]
        elif field.is_integer:
            integers = values
            held.append((name, integers))
            if count:
                field.values = <const char *> &integers[0]
                field.stride = integers.strides[0]
        else:
            raise ValueError(f"field {name!r} is {values.dtype}, expected float64, or int64 for an integer field")
        fields.push_back(field)
        line_size += field.name_size + NUMBER_SIZE_MAX + 2
    if <size_t> count > ENCODED_SIZE_MAX // line_size:
        raise ValueError(f"{count} lines of up to {line_size} bytes exceed {ENCODED_SIZE_MAX}")
    lines = <char *> malloc(<size_t> count * line_size + NUMBER_SIZE_MAX)
    if lines == NULL:
        raise MemoryError
    try:
        with nogil:
            end = put_lines(lines, prefix_data, prefix_size, times_ns, fields, &line_count)
        return lines[: end - lines], line_count
    finally:
        free(lines)
