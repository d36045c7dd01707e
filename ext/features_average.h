/* Sums over segments that stay exact for ever: the newest few in float32, all before them in float64. */
#ifndef WARDLINK_FEATURES_AVERAGE_H
#define WARDLINK_FEATURES_AVERAGE_H

#include "features_lanes.h"

#define SETTLE_STEPS 32     /* float32 sums of so few segments lose nothing */
#define WEIGHT_MAX 65536.0  /* 2^16: far from float32's limits */

/* Sums over segments: the newest few in float32, all before them in float64 with a float32 copy to read. */
typedef struct {
    ptrdiff_t count; /* vectors */
    vf *recent, *settled;
    vd *exact;       /* 2 count */
} average;

static void take_average(arena *from, average *a, size_t count)
{
    a->count = (ptrdiff_t)count;
    a->recent = take(from, count, sizeof(vf));
    a->settled = take(from, count, sizeof(vf));
    a->exact = take(from, 2 * count, sizeof(vd));
}

static void clear_average(average *a)
{
    memset(a->recent, 0, (size_t)a->count * sizeof(vf));
    memset(a->settled, 0, (size_t)a->count * sizeof(vf));
    memset(a->exact, 0, 2 * (size_t)a->count * sizeof(vd));
}

static void settle(average *a)
{
    for (ptrdiff_t k = 0; k < a->count; k++) {
        const float *recent = (const float *)(a->recent + k);
        double *exact = (double *)(a->exact + 2 * k);
        float *settled = (float *)(a->settled + k);
        for (int lane = 0; lane < LANES; lane++) {
            exact[lane] += (double)recent[lane];
            settled[lane] = (float)exact[lane];
        }
        a->recent[k] = (vf){0};
    }
}

static void scale(average *a, float factor)
{
    for (ptrdiff_t k = 0; k < a->count; k++) {
        a->recent[k] *= factor;
        a->settled[k] *= factor;
        a->exact[2 * k] *= (double)factor;
        a->exact[2 * k + 1] *= (double)factor;
    }
}

/* Zero of the lanes that `kept` leaves out. */
static void clear_lanes(average *a, ptrdiff_t first, ptrdiff_t count, vi kept)
{
    for (ptrdiff_t k = first; k < first + count; k++) {
        a->recent[k] = only(kept, a->recent[k]);
        a->settled[k] = only(kept, a->settled[k]);
        double *exact = (double *)(a->exact + 2 * k);
        for (int lane = 0; lane < LANES; lane++)
            if (!kept[lane])
                exact[lane] = 0;
    }
}

#endif
