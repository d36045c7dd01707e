# distutils: language = c++
# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""Columns of numbers to InfluxDB line protocol. Definitions and oracle: cloud_sync/line_protocol.py.

Everything is checked and sized at the door; the loop itself touches no Python object and holds no GIL.
"""

from cpython.buffer cimport PyBUF_RECORDS_RO, PyBuffer_Release, PyObject_GetBuffer
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF
from libc.math cimport isfinite, rint
from libc.stdint cimport int64_t
from libc.string cimport memcpy, strcmp
from libcpp.vector cimport vector


cdef extern from "Python.h":
    PyObject *PyBytes_FromStringAndSize(const char *text, Py_ssize_t size) except NULL
    char *PyBytes_AS_STRING(PyObject *text)
    int _PyBytes_Resize(PyObject **text, Py_ssize_t size) except -1


cdef extern from "number_text.h" namespace "number_text" nogil:
    enum:
        SLACK
        SIZE_MAX_OF_NUMBER
        DECIMALS_MAX
    char *put_shortest(char *to, double value)
    char *put_shortest(char *to, float value)
    char *put_shortest(char *to, int64_t value)
    char *put_fixed(char *to, double value, int decimals)


cdef enum Kind:
    FLOAT64
    FLOAT32
    INT64

cdef struct Field:
    const char *name
    size_t name_size
    const char *values
    Py_ssize_t stride
    Kind kind
    bint is_integer

# The same limits, with their reasons, stand in cloud_sync/line_protocol.py.
cdef size_t TIME_SIZE_MAX = 20
cdef size_t ENCODED_SIZE_MAX = 256 * 1024 * 1024
cdef double INT64_END = 9223372036854775808.0


cdef inline char *put_name(char *to, const Field &field) noexcept nogil:
    if field.name_size <= 16:
        memcpy(to, field.name, 16)  # of a fixed size: two moves instead of a call
    else:
        memcpy(to, field.name, field.name_size)
    return to + field.name_size


cdef inline char *put_field(char *to, const Field &field, Py_ssize_t row, int decimals) noexcept nogil:
    """Write one field with a comma before it; nothing where it has no value."""
    cdef const char *at = field.values + row * field.stride
    cdef double number = 0
    cdef int64_t whole = 0
    if field.kind == INT64:
        whole = (<const int64_t *> at)[0]
    else:
        number = (<const double *> at)[0] if field.kind == FLOAT64 else (<const float *> at)[0]
        if not isfinite(number):
            return to
        if field.is_integer:
            number = rint(number)
            if not (-INT64_END <= number < INT64_END):
                return to
            whole = <int64_t> number
    to = put_name(to, field)
    if field.is_integer:
        to = put_shortest(to, whole)
        to[0] = b"i"
        return to + 1
    if decimals >= 0:
        return put_fixed(to, number, decimals)
    if field.kind == FLOAT32:
        return put_shortest(to, <float> number)
    return put_shortest(to, number)


cdef char *put_lines(
    char *to,
    const char *prefix,
    size_t prefix_size,
    const Field &times,
    Py_ssize_t count,
    const vector[Field] &fields,
    int decimals,
    Py_ssize_t *line_count,
) noexcept nogil:
    cdef Py_ssize_t row
    cdef size_t k
    cdef char *line
    cdef char *values
    line_count[0] = 0
    for row in range(count):
        line = to
        memcpy(to, prefix, prefix_size)
        values = to + prefix_size
        to = values
        for k in range(fields.size()):
            to = put_field(to, fields[k], row, decimals)
        if to == values:
            to = line
            continue
        values[0] = b" "
        to[0] = b" "
        to = put_shortest(to + 1, (<const int64_t *> (times.values + row * times.stride))[0])
        to[0] = b"\n"
        to += 1
        line_count[0] += 1
    return to


cdef class Columns:
    """The buffers of one call, held until its lines are written."""
    cdef vector[Py_buffer] buffers
    cdef vector[Field] fields
    cdef vector[char] names

    def __dealloc__(self):
        cdef size_t k
        for k in range(self.buffers.size()):
            PyBuffer_Release(&self.buffers[k])

    cdef Field take(self, object values, Py_ssize_t count) except *:
        """The column of this many numbers; -1: any. There must be room for its buffer, which must not move."""
        cdef Field field
        cdef Py_buffer *view
        self.buffers.resize(self.buffers.size() + 1)
        view = &self.buffers.back()
        try:
            PyObject_GetBuffer(values, view, PyBUF_RECORDS_RO)
        except BaseException:
            self.buffers.pop_back()
            raise
        if view.ndim != 1 or (count >= 0 and view.shape[0] != count):
            raise ValueError(f"a column has shape {[view.shape[k] for k in range(view.ndim)]}, expected {[count]}")
        if strcmp(view.format, b"d") == 0:
            field.kind = FLOAT64
        elif strcmp(view.format, b"f") == 0:
            field.kind = FLOAT32
        elif view.itemsize == 8 and (strcmp(view.format, b"l") == 0 or strcmp(view.format, b"q") == 0):
            field.kind = INT64
        else:
            raise ValueError(f"a column is of type {view.format.decode()!r}, expected float64, float32 or int64")
        field.values = <const char *> view.buf
        field.stride = view.strides[0]
        field.name = NULL
        field.name_size = 0
        field.is_integer = False
        return field


def encode(bytes prefix not None, times_ns, columns, int decimals=-1):
    """See `cloud_sync.line_protocol.encode`."""
    cdef Columns held = Columns()
    cdef Field times, field
    cdef Py_ssize_t count, at
    cdef Py_ssize_t line_count = 0
    cdef size_t k
    cdef size_t prefix_size = <size_t> len(prefix)
    cdef size_t line_size = prefix_size + TIME_SIZE_MAX + 2
    cdef const char *prefix_text = prefix
    cdef bytes name
    cdef bint is_integer
    cdef PyObject *text = NULL
    cdef char *lines
    cdef char *end
    if not prefix or b"\n" in prefix:
        raise ValueError("the prefix is empty or holds a line break")
    if not -1 <= decimals <= DECIMALS_MAX:
        raise ValueError(f"{decimals} decimals, expected 0 to {DECIMALS_MAX}")
    columns = tuple(columns)  # a list could change while its length is relied on
    held.buffers.reserve(<size_t> len(columns) + 1)
    times = held.take(times_ns, -1)
    if times.kind != INT64:
        raise ValueError("times are no int64")
    count = held.buffers[0].shape[0]
    for name, values, is_integer in columns:
        if not name or b"\n" in name:
            raise ValueError("a field name is empty or holds a line break")
        field = held.take(values, count)
        if field.kind == INT64 and not is_integer:
            raise ValueError(f"field {name!r} is int64 and no integer field")
        field.is_integer = is_integer
        field.name_size = <size_t> len(name) + 2
        held.fields.push_back(field)
        at = <Py_ssize_t> held.names.size()
        held.names.resize(held.names.size() + field.name_size)
        held.names[at] = b","
        memcpy(&held.names[at + 1], <const char *> name, <size_t> len(name))
        held.names[at + len(name) + 1] = b"="
        line_size += field.name_size + SIZE_MAX_OF_NUMBER
    if <size_t> count > ENCODED_SIZE_MAX // line_size:
        raise ValueError(f"{count} lines of up to {line_size} bytes exceed {ENCODED_SIZE_MAX}")
    held.names.resize(held.names.size() + SLACK)
    at = 0
    for k in range(held.fields.size()):
        held.fields[k].name = &held.names[at]
        at += held.fields[k].name_size
    text = PyBytes_FromStringAndSize(NULL, <Py_ssize_t> (<size_t> count * line_size + 2 * SLACK + SIZE_MAX_OF_NUMBER))
    lines = PyBytes_AS_STRING(text)
    with nogil:
        end = put_lines(lines, prefix_text, prefix_size, times, count, held.fields, decimals, &line_count)
    _PyBytes_Resize(&text, end - lines)
    result = <object> text
    Py_DECREF(result)
    return result, line_count
