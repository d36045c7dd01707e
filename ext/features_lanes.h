/* Vectors of one float per channel: GCC's vector extensions, never wider than the instruction set.
 *
 * 16 bytes on baseline x86-64 (SSE2) and aarch64 (NEON). A translation unit that defines WARDLINK_V3 gets 32 bytes
 * (AVX2, FMA) where it is built for x86-64, and nothing elsewhere. Knows no signal. */
#ifndef WARDLINK_FEATURES_LANES_H
#define WARDLINK_FEATURES_LANES_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#ifdef WARDLINK_V3
#define LANES 8
#else
#define LANES 4
#endif

#define LANE_BYTES (4 * LANES)
#define ARENA_ALIGNMENT 64 /* a cache line, and more than any vector here needs */
#define TURN (2 * 3.14159265358979323846)

typedef float vf __attribute__((vector_size(LANE_BYTES)));
typedef int32_t vi __attribute__((vector_size(LANE_BYTES)));
typedef double vd __attribute__((vector_size(LANE_BYTES)));   /* half as many lanes */
typedef int64_t vl __attribute__((vector_size(LANE_BYTES)));
typedef float half_vf __attribute__((vector_size(LANE_BYTES / 2)));
typedef float vf_anywhere __attribute__((vector_size(LANE_BYTES), aligned(4)));
typedef double vd_anywhere __attribute__((vector_size(LANE_BYTES), aligned(8)));
typedef float half_vf_anywhere __attribute__((vector_size(LANE_BYTES / 2), aligned(4)));

INLINE vf splat(float value)
{
    return value - (vf){0}; /* -0.0 stays -0.0 */
}

INLINE vd splat_double(double value)
{
    return value - (vd){0};
}

INLINE vf where(vi mask, vf one, vf other)
{
    return (vf)((mask & (vi)one) | (~mask & (vi)other));
}

INLINE vf only(vi mask, vf value)
{
    return (vf)(mask & (vi)value);
}

INLINE vf root(vf value)
{
    vf result;
    for (int lane = 0; lane < LANES; lane++)
        result[lane] = __builtin_sqrtf(value[lane]);
    return result;
}

INLINE int any(vi mask)
{
    int32_t found = 0;
    for (int lane = 0; lane < LANES; lane++)
        found |= mask[lane];
    return found != 0;
}

/* Sum of the lanes, in float64. */
INLINE double total(vf value)
{
    half_vf half[2];
    memcpy(half, &value, sizeof half);
    vd sums = __builtin_convertvector(half[0], vd) + __builtin_convertvector(half[1], vd);
    double sum = sums[0];
    for (int lane = 1; lane < LANES / 2; lane++)
        sum += sums[lane];
    return sum;
}

/* A row of channels is written twice in a row, so that a load at an offset of 1..LANES - 1 rotates it. */
INLINE void put_twice(float *row, vf value)
{
    *(vf *)row = value;
    *(vf *)(row + LANES) = value;
}

INLINE vf rotated(const float *row, int lanes)
{
    return *(const vf_anywhere *)(row + lanes);
}

/* log2 of 0 < x < inf to 1e-7; finite for 0. The polynomial is log2(1 + f) / f on sqrt(1/2)..sqrt(2), minimax. */
INLINE vf log_2(vf x)
{
    vi bits = (vi)x - 0x3f3504f3; /* sqrt(1/2): the mantissa comes to lie around 1 */
    vf exponent = __builtin_convertvector(bits >> 23, vf);
    vf f = (vf)((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
    vf y = f * -0.145744428f + 0.236890376f;
    y = y * f - 0.250069052f;
    y = y * f + 0.286707461f;
    y = y * f - 0.360087216f;
    y = y * f + 0.480939448f;
    y = y * f - 0.721357167f;
    y = y * f + 1.44269478f;
    return exponent + f * y;
}

/* All pairs of channels, each at least once: group i against group j, turned by 0..LANES - 1 lanes (1..LANES / 2 for a
 * group against itself; half a turn meets each pair twice). */
static int pair_vectors(int groups)
{
    return groups * (groups - 1) / 2 * LANES + groups * (LANES / 2);
}

/* Memory is taken twice from an arena: once to measure it, once to lay it out. */
typedef struct {
    char *base; /* NULL: only measure */
    size_t used;
} arena;

static void *take(arena *from, size_t count, size_t size)
{
    void *taken = from->base ? from->base + from->used : NULL;
    from->used += (count * size + ARENA_ALIGNMENT - 1) / ARENA_ALIGNMENT * ARENA_ALIGNMENT;
    return taken;
}

#endif
