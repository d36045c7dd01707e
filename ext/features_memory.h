/* What the streaming engine consists of, and its memory: taken once, never grown. */
#ifndef WARDLINK_FEATURES_MEMORY_H
#define WARDLINK_FEATURES_MEMORY_H

#include "features_average.h"
#include "features_transform.h"

#define BANDS 5
#define CHANNELS_MAX 64
#define GROUPS_MAX (CHANNELS_MAX / LANES)
#define SECTIONS_MAX 3
#define PENDING_MAX 16      /* phases between two updates of the PLV's sums */
#define MOVED_MAX 32        /* rows of a buffer before what is kept of it moves to its front */
#define LAGS 5              /* overlapping segments: 1 s / 0.2 s */

/* The auto-spectra of all channels since some segment: those of the pairs whose younger channel began then. */
typedef struct {
    int channels;    /* that began then; 0: unused */
    int64_t age;     /* segments */
    double weight_sum;
    double square_sums[LAGS];  /* of the weights, with and without the newest segments */
    double bias;
    average power;   /* (coherence bins, groups) */
} run;

/* What the engine is built from. */
typedef struct {
    int channels;
    double limit_uv;
    int band_start[BANDS], band_stop[BANDS]; /* bins, like all below */
    int entropy_start, entropy_stop;
    int coherence_start, coherence_stop;
    int start, stop;
    double flat;            /* sum of squares of windowed_bins over the bands under which a segment is flat */
    double power_decay, coherence_decay;
    double overlap[LAGS];   /* 2 r(d)^2 decay^d of d = 1..LAGS - 1, at d */
    int segments_min;
    int64_t merge_age;      /* segments after which all that was before has faded */
    int first_half, second_half; /* taps of the analytic filters on either side of their middle */
    int decimation, window;
    double turns;           /* of the band's centre, per phase */
    double silent_uv;
    int sections;
    double section[SECTIONS_MAX][5]; /* b0, b1, b2, a1, a2 */
    int common_average;
} definition;

typedef struct {
    double share[BANDS];
    double coherence, plv, entropy;
} state;

typedef struct {
    definition of;
    transform bins;
    int groups, width;             /* vectors, and channels with the unused ones, of a row */

    int64_t seen, stepped;         /* samples since the last reset */
    ptrdiff_t piece, kept, rows, end;
    vf *row;                       /* (rows, groups): samples less their reference */
    double *deep;                  /* (deep_rows, width): samples, the newest at deep_end - 1 */
    ptrdiff_t deep_rows, deep_end;
    double *reference;             /* (width) */
    double *scratch;               /* (piece, width) */

    double *memory;                /* (sections, width, 2) */
    double *anchor;                /* (width) */
    unsigned char *fresh;          /* (width): no usable sample before */

    vf *spectrum;                  /* (stop - start, 2) */
    vf *density;                   /* (stop - start) */
    double power_weight;
    average power;                 /* (groups, stop - start) */
    int power_segments;
    vi *good;                      /* (groups) */
    double entropy_max;            /* log2 of the number of bins */

    double coherence_weight;
    int coherence_segments;
    average cross;                 /* (pair vectors, coherence bins, 2) */
    float *coherent;               /* (coherence bins, groups, 2, 2 LANES) */
    float *whitening;              /* (runs, coherence bins, groups, 2 LANES): 1 / amplitude */
    int32_t *ages;                 /* (groups, 2 LANES): of the chosen channels' runs, else 0 */
    float *chosen;                 /* (groups, 2 LANES): 1 or 0 */
    vf *pair_scale;                /* (coherence bins) */
    run *run_pool;                 /* (width + 1) */
    int *run_of;                   /* (width): -1: none */

    vf *first;                     /* (first_half, 2): oldest tap first, re and im */
    vf *second;                    /* (second_half + 1) */
    int64_t next_phase;            /* number of the sample at which the next phase is due */
    double turn_re, turn_im;       /* of the next phase */
    double step_re, step_im;       /* from each phase to the next */
    vf *moved;                     /* (moved_rows, groups, 2): the band moved down to 0 Hz, once per phase */
    ptrdiff_t moved_rows, moved_end;
    float *phasors;                /* (window, groups, 2, 2 LANES) */
    int phasor_at;
    vi *valid;                     /* (groups): phases since the last one without value */
    float *pending;                /* (2, PENDING_MAX, groups, 2, 2 LANES): new, replaced */
    int pending_count;
    vi *locked;                    /* (pair vectors, 2) */
    float phasor_size;             /* power of two */
    void *arena;
} engine;

static void lay_out(engine *e, arena *from)
{
    definition *d = &e->of;
    size_t groups = (size_t)e->groups, width = (size_t)e->width, pairs = (size_t)pair_vectors(e->groups);
    size_t all = (size_t)(d->stop - d->start), some = (size_t)(d->coherence_stop - d->coherence_start);
    take_transform(from, &e->bins);
    e->row = take(from, (size_t)e->rows * groups, sizeof(vf));
    e->deep = take(from, (size_t)e->deep_rows * width, sizeof(double));
    e->reference = take(from, width, sizeof(double));
    e->scratch = take(from, (size_t)e->piece * width, sizeof(double));
    e->memory = take(from, SECTIONS_MAX * width * 2, sizeof(double));
    e->anchor = take(from, width, sizeof(double));
    e->fresh = take(from, width, 1);
    e->spectrum = take(from, all * 2, sizeof(vf));
    e->density = take(from, all, sizeof(vf));
    take_average(from, &e->power, groups * all);
    e->good = take(from, groups, sizeof(vi));
    take_average(from, &e->cross, pairs * some * 2);
    e->coherent = take(from, some * groups * 4 * LANES, sizeof(float));
    e->whitening = take(from, (width + 1) * some * groups * 2 * LANES, sizeof(float));
    e->ages = take(from, groups * 2 * LANES, sizeof(int32_t));
    e->chosen = take(from, groups * 2 * LANES, sizeof(float));
    e->pair_scale = take(from, some, sizeof(vf));
    e->run_pool = take(from, width + 1, sizeof(run));
    for (size_t k = 0; k <= width; k++) {
        average power;
        take_average(from, &power, some * groups);
        if (from->base)
            e->run_pool[k].power = power;
    }
    e->run_of = take(from, width, sizeof(int));
    e->first = take(from, (size_t)d->first_half * 2, sizeof(vf));
    e->second = take(from, (size_t)d->second_half + 1, sizeof(vf));
    e->moved = take(from, (size_t)e->moved_rows * groups * 2, sizeof(vf));
    e->phasors = take(from, (size_t)d->window * groups * 4 * LANES, sizeof(float));
    e->valid = take(from, groups, sizeof(vi));
    e->pending = take(from, 2 * PENDING_MAX * groups * 4 * LANES, sizeof(float));
    e->locked = take(from, pairs * 2, sizeof(vi));
}

static void engine_reset(engine *e)
{
    size_t pairs = (size_t)pair_vectors(e->groups), row = (size_t)e->groups * 4 * LANES;
    e->seen = e->stepped = 0;
    e->end = e->deep_end = 0;
    memset(e->reference, 0, (size_t)e->width * sizeof(double));
    memset(e->fresh, 1, (size_t)e->width);
    memset(e->good, 0, (size_t)e->groups * sizeof(vi));
    e->power_weight = e->coherence_weight = 1;
    e->power_segments = e->coherence_segments = 0;
    clear_average(&e->power);
    clear_average(&e->cross);
    for (int k = 0; k <= e->width; k++)
        e->run_pool[k].channels = 0;
    for (int c = 0; c < e->width; c++)
        e->run_of[c] = -1;
    e->next_phase = (2 * e->of.first_half + e->of.decimation - 1) / e->of.decimation * e->of.decimation;
    e->turn_re = 1;
    e->turn_im = 0;
    e->moved_end = 0;
    memset(e->phasors, 0, (size_t)e->of.window * row * sizeof(float));
    memset(e->valid, 0, (size_t)e->groups * sizeof(vi));
    memset(e->locked, 0, 2 * pairs * sizeof(vi));
    e->phasor_at = e->pending_count = 0;
}

/* `radix`: of the transform of each of `parts` interleaved sequences. `first`: (first_half, 2), re and im, oldest
 * tap first; `second`: (second_half + 1). Both go on symmetrically, but for the sign of im.
 * Returns NULL where there is no memory. */
static engine *engine_new(const definition *of, int length, int parts, const int *radix, int stages,
                          const double *first, const double *second)
{
    engine *e = calloc(1, sizeof(engine));
    if (!e)
        return NULL;
    e->of = *of;
    e->groups = (of->channels + LANES - 1) / LANES;
    e->width = e->groups * LANES;
    e->bins.length = length;
    e->bins.bins = of->stop + 1;
    e->bins.parts = parts;
    e->bins.part_length = length / parts;
    e->bins.stages = stages;
    memcpy(e->bins.radix, radix, (size_t)stages * sizeof(int));
    e->piece = length / 2;
    int reach = 2 * (of->first_half + of->second_half * of->decimation) + 1;
    e->kept = (length > reach ? length : reach) + of->decimation;
    e->moved_rows = 4 * of->second_half + MOVED_MAX;
    e->rows = 2 * e->kept + e->piece;
    e->deep_rows = e->kept + e->piece;
    arena memory = {NULL, 0};
    lay_out(e, &memory);
    if (posix_memalign(&e->arena, ARENA_ALIGNMENT, memory.used)) {
        free(e);
        return NULL;
    }
    memset(e->arena, 0, memory.used);
    memory = (arena){e->arena, 0};
    lay_out(e, &memory);
    fill_transform(&e->bins);
    for (int k = 0; k < 2 * of->first_half; k++)
        e->first[k] = splat((float)first[k]);
    for (int k = 0; k <= of->second_half; k++)
        e->second[k] = splat((float)second[k]);
    e->entropy_max = log2((double)(of->entropy_stop - of->entropy_start));
    e->step_re = cos(TURN * of->turns);
    e->step_im = -sin(TURN * of->turns);
    /* Products of phasors, times phasor_size^2, are added as int32: a whole window of them stays under 2^30. */
    int bits = 0;
    while ((1 << bits) < of->window)
        bits++;
    e->phasor_size = (float)(1 << ((30 - bits) / 2));
    engine_reset(e);
    return e;
}

static void engine_free(engine *e)
{
    if (e) {
        free(e->arena);
        free(e);
    }
}

#endif
