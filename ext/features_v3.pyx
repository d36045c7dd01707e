# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""The features for x86-64-v3: 32-byte vectors, AVX2 and FMA. `AVAILABLE` is False where this was built for another
machine, or runs on one without them; then nothing else here may be called."""

cdef extern from *:
    """
    #if defined(__x86_64__)
    #define WARDLINK_V3
    #define wardlink_v3_available() (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    #else
    #define wardlink_v3_available() 0
    #endif
    """
    int wardlink_v3_available()


AVAILABLE = bool(wardlink_v3_available())

include "features.pxi"
