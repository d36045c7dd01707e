# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""The features for what every machine has: 16-byte vectors, SSE2 on x86-64 and NEON on aarch64."""

include "features.pxi"
