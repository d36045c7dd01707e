# The body of both compiled modules of the features, which differ in the width of their vectors alone.
# Definitions and oracle: gateway/signal/numpy_features.py. Everything is checked at the door; what runs behind it
# touches no Python object.

import math

import numpy

from gateway.signal.bands import (
    CHANNELS_MAX,
    DEFAULT_SETTINGS,
    LATENCY_S,
    SEGMENT_S,
    STEP_S,
    check_stream,
    check_window,
    phase_bins,
    samples_in,
)
from gateway.signal.conditioning import filter_sections
from gateway.signal.phase import SILENT_UV, PhaseLocking, analytic_filter
from gateway.signal.plan import transform_plan
from gateway.signal.quality import unusable
from gateway.signal.spectra import COHERENCE_SEGMENTS_MIN, FLAT_UV2, decay_of, hann, hann_correlation
from gateway.signal.state import UV_MAX, Features, WindowFeatures

from cpython.buffer cimport PyBUF_FORMAT, PyBUF_STRIDES, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int64_t
from libc.stdlib cimport free


cdef extern from "Python.h":
    ctypedef struct PyTypeObject:
        int (*tp_descr_set)(object, object, object) except -1

    PyTypeObject *Py_TYPE(object)


cdef extern from *:
    """
    #if defined(__GNUC__) && defined(__x86_64__) && defined(WARDLINK_V3)
    #pragma GCC push_options
    #pragma GCC target("avx2,fma")
    #endif
    #include "features_window.h"
    #if defined(__GNUC__) && defined(__x86_64__) && defined(WARDLINK_V3)
    #pragma GCC pop_options
    #endif
    """
    int LANES
    int BANDS
    int LAGS
    int SECTIONS_MAX

    ctypedef struct definition:
        int channels
        double limit_uv
        int band_start[5]
        int band_stop[5]
        int entropy_start
        int entropy_stop
        int coherence_start
        int coherence_stop
        int start
        int stop
        double flat
        double power_decay
        double coherence_decay
        double overlap[5]
        int segments_min
        int64_t merge_age
        int first_half
        int second_half
        int decimation
        int window
        double turns
        double silent_uv
        int sections
        double section[3][5]
        int common_average

    ctypedef struct state:
        double share[5]
        double coherence
        double plv
        double entropy

    ctypedef struct engine:
        definition of
        int width
        Py_ssize_t piece
        double *scratch

    ctypedef struct transform:
        int length
        int parts
        int part_length
        int stages
        int radix[16]

    ctypedef struct window:
        int channels
        int width
        bint with_pairs
        int samples
        int segments
        int hop
        double limit_uv
        int band_start[5]
        int band_stop[5]
        int start
        int stop
        int entropy_start
        int entropy_stop
        double flat
        int phase_start
        int phase_stop
        transform segment
        transform whole
        void *arena

    bint window_open(window *)
    void window_analyse(window *, const double *, Py_ssize_t, double *, double *, double *, double *) nogil
    engine *engine_new(const definition *, int, int, const int *, int, const double *, const double *)
    void engine_free(engine *)
    void engine_reset(engine *) nogil
    void engine_push(engine *, const double *, Py_ssize_t, Py_ssize_t) nogil
    int engine_step(engine *, state *) nogil
    bint marked(const char *, Py_ssize_t, Py_ssize_t, Py_ssize_t, Py_ssize_t) nogil
    void fill_scratch(
        engine *, const char *, Py_ssize_t, Py_ssize_t, const char *, Py_ssize_t, Py_ssize_t, Py_ssize_t
    ) nogil


# Below it the work takes a few microseconds, and handing the GIL over and back a good part of that.
cdef Py_ssize_t VALUES_WITHOUT_GIL = 2048
# 2^-66 of a weight, and of an artefact 10^10 times as large as what follows it.
cdef double FADED_NEPERS = 46
# What stores a field of `Features`: the constructor of a frozen dataclass takes longer than the whole step.
cdef object DELTA, THETA, ALPHA, BETA, GAMMA, COHERENCE, PLV, ENTROPY
DELTA, THETA, ALPHA, BETA, GAMMA, COHERENCE, PLV, ENTROPY = (vars(Features)[name] for name in Features.__slots__)


cdef inline int put(object field, object features, double value) except -1:
    return Py_TYPE(field).tp_descr_set(field, features, value)


cdef class FeatureEngine:
    """See `gateway.signal.numpy_features.FeatureEngine`."""

    cdef engine *_engine
    cdef Py_ssize_t _channels
    cdef bint _plain
    cdef bint _busy

    def __cinit__(self, rate_hz, channel_count, settings=DEFAULT_SETTINGS):
        cdef definition of
        cdef int radices[64]
        cdef const double[:, ::1] first
        cdef const double[::1] second
        check_stream(rate_hz, channel_count)
        if not 1 <= channel_count <= CHANNELS_MAX:
            raise ValueError(channel_count)
        length = samples_in(SEGMENT_S, rate_hz)
        sections = filter_sections(rate_hz, settings)
        wanted = (*settings.bands, settings.entropy_band, settings.coherence_band)
        of.channels = channel_count
        of.limit_uv = UV_MAX
        for k, band in enumerate(settings.bands):
            of.band_start[k], of.band_stop[k] = band.bins().start, band.bins().stop
        of.entropy_start, of.entropy_stop = settings.entropy_band.bins().start, settings.entropy_band.bins().stop
        of.coherence_start = settings.coherence_band.bins().start
        of.coherence_stop = settings.coherence_band.bins().stop
        of.start = min(band.bins().start for band in wanted)
        of.stop = max(band.bins().stop for band in wanted)
        # Densities are 2 |X|^2 / (rate x sum of the window's squares); the transform gives 2 X.
        of.flat = FLAT_UV2 * 2 * rate_hz * float(numpy.sum(hann(length) ** 2))
        of.power_decay = decay_of(settings.power_time_constant_s)
        of.coherence_decay = decay_of(settings.coherence_time_constant_s)
        for k in range(1, LAGS):
            of.overlap[k] = 2 * hann_correlation(k * STEP_S / SEGMENT_S) ** 2 * of.coherence_decay ** k
        of.segments_min = COHERENCE_SEGMENTS_MIN
        faded = FADED_NEPERS * settings.coherence_time_constant_s / STEP_S
        of.merge_age = math.ceil(faded) if faded < 2**62 else 2**62
        phase = PhaseLocking(rate_hz, 1, settings.coherence_band, settings.plv_window_s)
        of.window = phase.window_count
        analytic = analytic_filter(rate_hz, settings.coherence_band)
        of.first_half, of.second_half = len(analytic.first) // 2, len(analytic.second) // 2
        of.decimation = analytic.decimation
        of.turns = analytic.centre_turns * of.decimation % 1.0
        of.silent_uv = SILENT_UV
        of.sections = len(sections)
        of.common_average = settings.common_average
        for s in range(len(sections)):
            for k in range(5):
                of.section[s][k] = sections[s][k]
        parts, found = transform_plan(length, of.stop - of.start + 2)
        for k, radix in enumerate(found):
            radices[k] = radix
        oldest_first = analytic.first[:of.first_half:-1]
        first = numpy.stack([oldest_first.real, oldest_first.imag], axis=1)
        second = analytic.second
        self._engine = engine_new(&of, length, parts, radices, len(found), &first[0, 0], &second[0])
        if self._engine == NULL:
            raise MemoryError
        self._channels = channel_count
        self._plain = channel_count == self._engine.width and not sections and not settings.common_average

    def __dealloc__(self):
        engine_free(self._engine)

    @property
    def latency_s(self):
        """How long before the newest pushed sample the instant is that a state refers to."""
        return LATENCY_S

    def reset(self):
        """Begin anew."""
        self._claim()
        engine_reset(self._engine)
        self._busy = False

    cdef int _claim(self) except -1:
        if self._busy:
            raise RuntimeError("a feature engine works for one thread at a time")
        self._busy = True
        return 0

    def push(self, uv, bad=None):
        """Take in consecutive samples."""
        cdef Py_buffer view
        cdef Py_buffer mask
        PyObject_GetBuffer(uv, &view, PyBUF_FORMAT | PyBUF_STRIDES)
        try:
            if view.ndim != 2 or view.shape[1] != self._channels:
                raise ValueError(f"samples have shape {uv.shape}, expected (n, {self._channels})")
            if view.format[0] != b"d" or view.format[1] != 0:
                self.push(numpy.array(uv, dtype=numpy.float64, order="C"), bad)
                return
            if bad is None:
                self._take(&view, NULL)
                return
            marked = self._as_mask(bad, view.shape[0])
            PyObject_GetBuffer(marked, &mask, PyBUF_STRIDES)
            try:
                self._take(&view, &mask)
            finally:
                PyBuffer_Release(&mask)
        finally:
            PyBuffer_Release(&view)

    def _as_mask(self, bad, count):
        if bad.dtype == numpy.bool_:
            if bad.shape == (count, self._channels):
                return bad
            if bad.shape == (self._channels,):
                return numpy.broadcast_to(bad, (count, self._channels))
        elif bad.dtype == numpy.int64 and bad.shape == (count,):
            return unusable(bad, self._channels)
        raise ValueError(
            f"bad is {bad.dtype} {bad.shape}, expected bool ({self._channels},), "
            f"bool ({count}, {self._channels}) or int64 ({count},)"
        )

    cdef int _take(self, Py_buffer *view, Py_buffer *mask) except -1:
        cdef const char *samples = <const char *> view.buf
        cdef const char *marks = NULL
        cdef Py_ssize_t marks_row = 0
        cdef Py_ssize_t marks_column = 0
        if mask != NULL:
            marks, marks_row, marks_column = <const char *> mask.buf, mask.strides[0], mask.strides[1]
        self._claim()
        if view.shape[0] * self._channels < VALUES_WITHOUT_GIL:
            self._take_pieces(samples, view.shape[0], view.strides[0], view.strides[1], marks, marks_row, marks_column)
        else:
            with nogil:
                self._take_pieces(
                    samples, view.shape[0], view.strides[0], view.strides[1], marks, marks_row, marks_column
                )
        self._busy = False
        return 0

    cdef void _take_pieces(
        self,
        const char *samples,
        Py_ssize_t count,
        Py_ssize_t row,
        Py_ssize_t column,
        const char *marks,
        Py_ssize_t marks_row,
        Py_ssize_t marks_column,
    ) noexcept nogil:
        cdef engine *e = self._engine
        cdef Py_ssize_t done = 0
        cdef Py_ssize_t piece
        cdef bint plain = self._plain and column == 8 and row % 8 == 0 and (<size_t> samples) % 8 == 0
        while done < count:
            piece = min(count - done, e.piece)
            if plain and (marks == NULL or not marked(marks, marks_row, marks_column, self._channels, piece)):
                engine_push(e, <const double *> (samples + done * row), row // 8, piece)
            else:
                fill_scratch(e, samples + done * row, row, column, marks, marks_row, marks_column, piece)
                engine_push(e, e.scratch, e.width, piece)
            if marks != NULL:
                marks += piece * marks_row
            done += piece

    def step(self):
        """The state at the newest sample, `latency_s` before it, or None."""
        cdef state found
        cdef int there
        self._claim()
        if self._channels * self._channels < VALUES_WITHOUT_GIL:
            there = engine_step(self._engine, &found)
        else:
            with nogil:
                there = engine_step(self._engine, &found)
        self._busy = False
        if not there:
            return None
        features = Features.__new__(Features)
        put(DELTA, features, found.share[0])
        put(THETA, features, found.share[1])
        put(ALPHA, features, found.share[2])
        put(BETA, features, found.share[3])
        put(GAMMA, features, found.share[4])
        put(COHERENCE, features, found.coherence)
        put(PLV, features, found.plv)
        put(ENTROPY, features, found.entropy)
        return features


cdef int plan(transform *to, int length, int bin_count) except -1:
    to.length = length
    to.parts, radices = transform_plan(length, bin_count)
    to.part_length = length // to.parts
    to.stages = len(radices)
    for k, radix in enumerate(radices):
        to.radix[k] = radix
    return 0


cdef class WindowAnalysis:
    """See `gateway.signal.numpy_window.WindowAnalysis`."""

    cdef window _window
    cdef object _features
    cdef double[:, ::1] _relative_power
    cdef double[::1] _entropy
    cdef double[:, ::1] _coherence
    cdef double[::1] _plv
    cdef bint _busy

    def __cinit__(self, rate_hz, channel_count, sample_count, settings=DEFAULT_SETTINGS, *, with_pairs=True):
        cdef window *w = &self._window
        check_stream(rate_hz, channel_count)
        check_window(rate_hz, sample_count)
        length = samples_in(SEGMENT_S, rate_hz)
        wanted = (*settings.bands, settings.entropy_band)
        w.channels, w.samples = channel_count, sample_count
        w.with_pairs = with_pairs and channel_count > 1
        w.hop = length - length // 2
        w.segments = (sample_count - length) // w.hop + 1
        w.limit_uv = UV_MAX
        for k, band in enumerate(settings.bands):
            w.band_start[k], w.band_stop[k] = band.bins().start, band.bins().stop
        w.entropy_start, w.entropy_stop = settings.entropy_band.bins().start, settings.entropy_band.bins().stop
        w.start = min(band.bins().start for band in wanted)
        w.stop = max(band.bins().stop for band in wanted)
        # Densities are 2 |X|^2 / (rate x sum of the window's squares); the transform gives 2 X.
        w.flat = FLAT_UV2 * 2 * rate_hz * float(numpy.sum(hann(length) ** 2))
        kept = phase_bins(settings.coherence_band, rate_hz, sample_count)
        w.phase_start, w.phase_stop = kept.start, kept.stop
        plan(&w.segment, length, w.stop - w.start + 2)
        plan(&w.whole, sample_count, w.phase_stop - w.phase_start)
        if not window_open(w):
            raise MemoryError
        pairs = channel_count * (channel_count - 1) // 2 if w.with_pairs else 0
        self._features = WindowFeatures(
            numpy.empty((5, channel_count)),
            numpy.empty(channel_count),
            numpy.empty((5, pairs)),
            numpy.empty(pairs),
        )
        self._relative_power = self._features.relative_power
        self._entropy = self._features.entropy
        self._coherence = self._features.coherence
        self._plv = self._features.plv

    def __dealloc__(self):
        free(self._window.arena)

    def analyse(self, uv):
        """Features of `uv`: uV (samples, channels)."""
        cdef window *w = &self._window
        cdef Py_buffer view
        cdef const double *samples
        cdef Py_ssize_t stride
        if self._busy:
            raise RuntimeError("a window analysis works for one thread at a time")
        PyObject_GetBuffer(uv, &view, PyBUF_FORMAT | PyBUF_STRIDES)
        try:
            if view.ndim != 2 or view.shape[0] != w.samples or view.shape[1] != w.channels:
                raise ValueError(f"samples have shape {uv.shape}, expected {(w.samples, w.channels)}")
            samples, stride = <const double *> view.buf, view.strides[0] // 8
            if (
                view.format[0] != b"d" or view.format[1] != 0 or view.strides[1] != 8 or view.strides[0] % 8
                or (<size_t> view.buf) % 8 or w.channels != w.width
            ):
                return self._padded(uv)
            return self._analysed(samples, stride)
        finally:
            PyBuffer_Release(&view)

    def _padded(self, uv):
        cdef window *w = &self._window
        cdef double[:, ::1] samples = numpy.zeros((w.samples, w.width))
        numpy.asarray(samples)[:, : w.channels] = uv
        return self._analysed(&samples[0, 0], w.width)

    cdef object _analysed(self, const double *samples, Py_ssize_t stride):
        cdef window *w = &self._window
        cdef double *coherence = NULL
        cdef double *plv = NULL
        if w.with_pairs:
            coherence, plv = &self._coherence[0, 0], &self._plv[0]
        self._busy = True
        with nogil:
            window_analyse(w, samples, stride, &self._relative_power[0, 0], &self._entropy[0], coherence, plv)
        self._busy = False
        return self._features
