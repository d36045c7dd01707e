/* What the analysis of a window consists of, and its memory: taken once, used for each window. */
#ifndef WARDLINK_FEATURES_WINDOW_MEMORY_H
#define WARDLINK_FEATURES_WINDOW_MEMORY_H

#include "features_engine.h"
#include "features_transform_double.h"

#define UNITS_MAX 64 /* phasors of a channel at a time: those of 8 channels stay in the first-level cache */

typedef struct {
    float re[2 * LANES], im[2 * LANES];
} unit_row;

typedef struct {
    int channels, groups, width;
    int with_pairs;
    int samples, segments, hop;
    double limit_uv;
    int band_start[BANDS], band_stop[BANDS];
    int start, stop;
    int entropy_start, entropy_stop;
    double flat;
    int phase_start, phase_stop;    /* bins of the whole window */

    transform segment, whole;
    transform_double segment_double, whole_double;
    vf *row;                        /* (samples, groups) */
    vd *row_double;                 /* (samples, 2): of one group, where float32 is not enough */
    vd *spectrum_double;            /* (stop - start, 2) */
    const double *given;            /* the samples that are being analysed */
    ptrdiff_t given_stride;
    vf *energy;                     /* (groups): sums of the samples' squares, less their level */
    int *wide;                      /* (groups): whether float64 was needed */
    float *scratch;                 /* (segments, stop - start, groups, 2, 2 LANES): coefficients, then whitened */
    vf *spectrum;                   /* (stop - start, 2) */
    vf *density;                    /* (stop - start) */
    vi *good;                       /* (groups) */
    vf *side_sum, *side_difference; /* (half, groups, 2): of the bins j above and below the middle one */
    vf *middle;                     /* (groups, 2) */
    vf *whole_bins;                 /* (phase_stop - phase_start, 2): of one group, where float32 is not enough */
    int half;
    vf *turns;                      /* (samples / 4 + 1, half, 2): cosine and sine of the first quarter's samples, j = 1.. */
    unit_row *units;                /* (groups, UNITS_MAX) */
    vf *products;                   /* (pair vectors, 2): sums over phasors, re and im */
    int *place;                     /* (pair vectors, LANES): of each pair in the results; -1: none */
    void *arena;
} window;

static void lay_out_window(window *w, arena *from)
{
    size_t groups = (size_t)w->groups, all = (size_t)(w->stop - w->start), pairs = (size_t)pair_vectors(w->groups);
    take_transform(from, &w->segment);
    take_transform(from, &w->whole);
    take_transform_double(from, &w->segment_double);
    take_transform_double(from, &w->whole_double);
    w->row_double = take(from, (size_t)w->samples * 2, sizeof(vd));
    w->spectrum_double = take(from, all * 2, sizeof(vd));
    w->energy = take(from, groups, sizeof(vf));
    w->wide = take(from, groups, sizeof(int));
    w->row = take(from, (size_t)w->samples * groups, sizeof(vf));
    w->scratch = take(from, (size_t)w->segments * all * groups * 4 * LANES, sizeof(float));
    w->spectrum = take(from, all * 2, sizeof(vf));
    w->density = take(from, all, sizeof(vf));
    w->good = take(from, groups, sizeof(vi));
    w->side_sum = take(from, (size_t)w->half * groups * 2, sizeof(vf));
    w->side_difference = take(from, (size_t)w->half * groups * 2, sizeof(vf));
    w->middle = take(from, groups * 2, sizeof(vf));
    w->whole_bins = take(from, (size_t)(w->phase_stop - w->phase_start) * 2, sizeof(vf));
    w->turns = take(from, (size_t)(w->samples / 4 + 1) * (size_t)w->half * 2, sizeof(vf));
    w->units = take(from, groups * UNITS_MAX, sizeof(unit_row));
    w->products = take(from, pairs * 2, sizeof(vf));
    w->place = take(from, pairs * LANES, sizeof(int));
}

static void copy_plan(transform_double *to, const transform *from)
{
    to->length = from->length;
    to->bins = from->bins;
    to->parts = from->parts;
    to->part_length = from->part_length;
    to->stages = from->stages;
    memcpy(to->radix, from->radix, sizeof to->radix);
}

/* `w`: all its numbers and the plans of its transforms are filled in. Returns 0 where there is no memory. */
static int window_open(window *w)
{
    w->groups = (w->channels + LANES - 1) / LANES;
    w->width = w->groups * LANES;
    w->half = (w->phase_stop - w->phase_start) / 2;
    w->segment.bins = w->stop + 1;
    w->whole.bins = w->phase_stop;
    copy_plan(&w->segment_double, &w->segment);
    copy_plan(&w->whole_double, &w->whole);
    arena memory = {NULL, 0};
    lay_out_window(w, &memory);
    if (posix_memalign(&w->arena, ARENA_ALIGNMENT, memory.used))
        return 0;
    memset(w->arena, 0, memory.used);
    memory = (arena){w->arena, 0};
    lay_out_window(w, &memory);
    fill_transform(&w->segment);
    fill_transform(&w->whole);
    fill_transform_double(&w->segment_double);
    fill_transform_double(&w->whole_double);
    for (int t = 0; t <= w->samples / 4; t++)
        for (int j = 1; j <= w->half; j++) {
            vf *turn = w->turns + (t * w->half + j - 1) * 2;
            turn[0] = splat((float)cos(TURN * j * t / w->samples));
            turn[1] = splat((float)sin(TURN * j * t / w->samples));
        }
    int *place = w->place;
    for (int i = 0; i < w->groups; i++)
        for (int j = i; j < w->groups; j++)
            for (int turn = i == j; turn <= (i == j ? LANES / 2 : LANES - 1); turn++)
                for (int lane = 0; lane < LANES; lane++) {
                    int one = i * LANES + lane, other = j * LANES + (lane + turn) % LANES;
                    int low = one < other ? one : other, high = one < other ? other : one;
                    /* The order of numpy.triu_indices(channels, 1). */
                    *place++ = high < w->channels ? low * (2 * w->channels - low - 1) / 2 + high - low - 1 : -1;
                }
    return 1;
}

#endif
