/* The streaming feature engine. Definitions and oracle: gateway/signal/numpy_features.py.
 *
 * Samples arrive in float64 and are narrowed as differences from a reference near their channel's newest ones.
 * Averages grow the weight of what is new instead of shrinking what is old (weights are set back by powers of two,
 * which is exact), so a step adds once to each sum and multiplies nothing. Knows no Python. */
#ifndef WARDLINK_FEATURES_ENGINE_H
#define WARDLINK_FEATURES_ENGINE_H

#include "features_transform.h"

#define BANDS 5
#define CHANNELS_MAX 64
#define GROUPS_MAX (CHANNELS_MAX / LANES)
#define SECTIONS_MAX 3
#define PENDING_MAX 16      /* phases between two updates of the PLV's sums */
#define MOVED_MAX 32        /* rows of a buffer before what is kept of it moves to its front */
#define SETTLE_STEPS 32     /* float32 sums of so few segments lose nothing */
#define WEIGHT_MAX 65536.0  /* 2^16: far from float32's limits */
#define LAGS 5              /* overlapping segments: 1 s / 0.2 s */
/* 16 times the range of 8 samples, 4 apart: then float32 resolves a millionth of the range. */
#define REFERENCE_ROWS 8
#define REFERENCE_APART 4
#define REFERENCE_FACTOR 16.0f

/* Sums over segments: the newest few in float32, all before them in float64 with a float32 copy to read. */
typedef struct {
    ptrdiff_t count; /* vectors */
    vf *recent, *settled;
    vd *exact;       /* 2 count */
} average;

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

/* ---- memory ---- */

static void take_average(arena *from, average *a, size_t count)
{
    a->count = (ptrdiff_t)count;
    a->recent = take(from, count, sizeof(vf));
    a->settled = take(from, count, sizeof(vf));
    a->exact = take(from, 2 * count, sizeof(vd));
}

static int pair_vectors(int groups)
{
    return groups * (groups - 1) / 2 * LANES + groups * (LANES / 2);
}

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

static void clear_average(average *a)
{
    memset(a->recent, 0, (size_t)a->count * sizeof(vf));
    memset(a->settled, 0, (size_t)a->count * sizeof(vf));
    memset(a->exact, 0, 2 * (size_t)a->count * sizeof(vd));
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

/* ---- samples ---- */

/* Samples of a piece in `scratch`, NaN where not usable: filters, then the common average. */
static void condition(engine *e, ptrdiff_t count)
{
    int channels = e->of.channels, sections = e->of.sections;
    for (ptrdiff_t n = 0; n < count; n++) {
        double *x = e->scratch + n * e->width;
        double sum = 0;
        int usable = 0;
        for (int c = 0; c < channels; c++) {
            double y = x[c];
            if (!(fabs(y) <= e->of.limit_uv)) {
                x[c] = NAN;
                e->fresh[c] = 1;
                continue;
            }
            for (int s = 0; s < sections; s++) {
                const double *k = e->of.section[s];
                double *z = e->memory + (s * e->width + c) * 2;
                double v = y;
                if (e->fresh[c]) {
                    /* As if this sample had been there for ever: its offset must not ring. */
                    double steady = v * (k[0] + k[1] + k[2]) / (1 + k[3] + k[4]);
                    z[1] = k[2] * v - k[4] * steady;
                    z[0] = k[1] * v - k[3] * steady + z[1];
                }
                y = k[0] * v + z[0];
                z[0] = k[1] * v - k[3] * y + z[1];
                z[1] = k[2] * v - k[4] * y;
            }
            if (e->fresh[c]) {
                e->anchor[c] = y;
                e->fresh[c] = 0;
            }
            sum += y - e->anchor[c];
            usable++;
            x[c] = y;
        }
        if (e->of.common_average && usable)
            for (int c = 0; c < channels; c++)
                x[c] -= sum / usable;
    }
}

/* Keep half a vector of channels as they are, NaN where not usable, and as differences from their reference. */
INLINE void narrow(const double *samples, ptrdiff_t stride, double *deep, float *row, ptrdiff_t width, ptrdiff_t count,
                   const double *reference, double limit_uv)
{
    const vd limit = splat_double(limit_uv), off = *(const vd *)reference;
    const vl magnitude = (vl){0} + INT64_MAX;
    for (ptrdiff_t n = 0; n < count; n++, samples += stride, deep += width, row += width) {
        vd x = *(const vd_anywhere *)samples;
        vl usable = (vd)((vl)x & magnitude) <= limit;
        x = (vd)((vl)x | ~usable); /* all bits set is a NaN */
        *(vd *)deep = x;
        *(half_vf_anywhere *)row = __builtin_convertvector(x - off, half_vf);
    }
}

/* Narrow `count` rows, at most a piece, `stride` doubles apart, each with `width` channels. */
static void append(engine *e, const double *samples, ptrdiff_t stride, ptrdiff_t count)
{
    ptrdiff_t groups = e->groups;
    if (e->end + count > e->rows) {
        memcpy(e->row, e->row + (e->end - e->kept) * groups, (size_t)(e->kept * groups) * sizeof(vf));
        e->end = e->kept;
    }
    vf *to = e->row + e->end * groups;
    for (ptrdiff_t done = 0; done < count;) {
        ptrdiff_t room = e->deep_rows - e->deep_end, some = count - done < room ? count - done : room;
        for (int c = 0; c < e->width; c += LANES / 2)
            narrow(samples + done * stride + c, stride, e->deep + e->deep_end * e->width + c,
                   (float *)(to + done * groups) + c, e->width, some, e->reference + c, e->of.limit_uv);
        done += some;
        e->deep_end = e->deep_end + some == e->deep_rows ? 0 : e->deep_end + some;
    }
    e->end += count;
    e->seen += count;
}

/* Narrow all that is kept of a channel anew, as differences from its newest sample. */
static void refer_anew(engine *e, int channel)
{
    ptrdiff_t count = e->end < e->deep_rows ? e->end : e->deep_rows;
    ptrdiff_t at = e->deep_end;
    float *to = (float *)(e->row + e->end * e->groups) + channel;
    e->reference[channel] = e->deep[(at ? at - 1 : e->deep_rows - 1) * e->width + channel];
    for (ptrdiff_t n = 0; n < count; n++) {
        at = at ? at - 1 : e->deep_rows - 1;
        to -= e->width;
        *to = (float)(e->deep[at * e->width + channel] - e->reference[channel]);
    }
}

/* A channel whose newest samples lie far off their reference, by the measure of how they differ, gets another.
 * That of a dead channel then lies at no distance at all. */
static void check_references(engine *e)
{
    int looked = e->end < REFERENCE_APART * REFERENCE_ROWS ? (int)((e->end + REFERENCE_APART - 1) / REFERENCE_APART)
                                                            : REFERENCE_ROWS;
    for (int g = 0; g < e->groups; g++) {
        const vf *newest = e->row + (e->end - 1) * e->groups + g;
        vf low = *newest, high = *newest;
        for (int n = 1; n < looked; n++) {
            vf x = newest[-(ptrdiff_t)n * REFERENCE_APART * e->groups];
            low = where(x < low, x, low);
            high = where(x > high, x, high);
        }
        vf off = (vf)((vi)*newest & INT32_MAX);
        vi far = off > REFERENCE_FACTOR * (high - low);
        if (any(far))
            for (int lane = 0; lane < LANES; lane++)
                if (far[lane])
                    refer_anew(e, g * LANES + lane);
    }
}

/* ---- sums over segments ---- */

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

/* ---- power and entropy ---- */

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

/* Transform the newest segment of a group of channels and add it to their power. Says which of them are good. */
static vi add_power(engine *e, int g, float weight)
{
    const definition *d = &e->of;
    int count = d->stop - d->start;
    windowed_bins(&e->bins, e->row + (e->end - e->bins.length) * e->groups + g, e->groups, d->start, d->stop,
                  e->spectrum);
    for (int k = 0; k < count; k++) {
        vf re = e->spectrum[2 * k], im = e->spectrum[2 * k + 1];
        e->density[k] = re * re + im * im;
    }
    vf power = {0};
    for (int b = 0; b < BANDS; b++)
        for (int k = d->band_start[b] - d->start; k < d->band_stop[b] - d->start; k++)
            power += e->density[k];
    vi good = power >= splat((float)d->flat); /* false for NaN */
    vf *recent = e->power.recent + g * count;
    vi was = e->good[g];
    e->good[g] = good;
    if (any(was & ~good))
        clear_lanes(&e->power, g * count, count, good);
    for (int k = 0; k < count; k++)
        recent[k] += only(good, weight * e->density[k]);
    return good;
}

/* Sums over good channels, a lane for each of a group. */
typedef struct {
    vf share[BANDS], surprise;
} shares;

/* Band powers and entropies of a group of channels. */
static void add_shares(engine *e, int g, shares *to)
{
    const definition *d = &e->of;
    int count = d->stop - d->start;
    const vf *recent = e->power.recent + g * count, *settled = e->power.settled + g * count;
    vf *density = e->density;
    for (int k = 0; k < count; k++)
        density[k] = recent[k] + settled[k];
    vf band[BANDS];
    for (int b = 0; b < BANDS; b++) {
        band[b] = (vf){0};
        for (int k = d->band_start[b] - d->start; k < d->band_stop[b] - d->start; k++)
            band[b] += density[k];
    }
    vf entire = {0}, surprise = {0};
    for (int k = d->entropy_start - d->start; k < d->entropy_stop - d->start; k++)
        entire += density[k];
    /* Shares first: the logarithm of what is near 1 has no large part to lose digits to. */
    vf inverse = only(e->good[g] & (entire > 0), 1.0f / entire);
    for (int k = d->entropy_start - d->start; k < d->entropy_stop - d->start; k++) {
        vf share = density[k] * inverse;
        surprise -= share * log_2(share);
    }
    vf whole = {0};
    for (int b = 0; b < BANDS; b++)
        whole += band[b];
    whole = 1.0f / whole;
    for (int b = 0; b < BANDS; b++)
        to->share[b] += only(e->good[g], band[b] * whole);
    to->surprise += surprise;
}

/* ---- coherence ---- */

static int new_run(engine *e)
{
    int k = 0;
    while (e->run_pool[k].channels)
        k++; /* there is one more than channels */
    run *r = e->run_pool + k;
    r->age = 0;
    r->weight_sum = 0;
    memset(r->square_sums, 0, sizeof r->square_sums);
    clear_average(&r->power);
    return k;
}

/* Channels that fell out leave their runs and pairs; those that came in share a new run. */
static void change_runs(engine *e)
{
    int begun = -1, some = e->of.coherence_stop - e->of.coherence_start, fell_out = 0;
    for (int c = 0; c < e->width; c++) {
        int good = e->good[c / LANES][c % LANES];
        if (good && e->run_of[c] < 0) {
            if (begun < 0)
                begun = new_run(e);
            e->run_pool[begun].channels++;
            e->run_of[c] = begun;
        } else if (!good && e->run_of[c] >= 0) {
            e->run_pool[e->run_of[c]].channels--;
            e->run_of[c] = -1;
            fell_out = 1;
        }
    }
    if (!fell_out)
        return;
    ptrdiff_t at = 0;
    for (int i = 0; i < e->groups; i++)
        for (int j = i; j < e->groups; j++)
            for (int turn = i == j; turn <= (i == j ? LANES / 2 : LANES - 1); turn++, at += 2 * some) {
                vi kept;
                for (int lane = 0; lane < LANES; lane++)
                    kept[lane] = e->good[i][lane] & e->good[j][(lane + turn) % LANES];
                clear_lanes(&e->cross, at, 2 * some, kept);
            }
}

/* (K + 1) / (K (K - 1)) of a run's K effective segments. */
static void add_to_run(run *r, const definition *d)
{
    double decay = d->coherence_decay;
    r->age++;
    r->weight_sum = r->weight_sum * decay + 1;
    for (int lag = LAGS - 1; lag > 0; lag--)
        r->square_sums[lag] = r->square_sums[lag - 1];
    r->square_sums[0] = r->square_sums[0] * decay * decay + 1;
    double products = r->square_sums[0];
    for (int lag = 1; lag < LAGS; lag++)
        products += d->overlap[lag] * r->square_sums[lag];
    double count = r->weight_sum * r->weight_sum / products;
    r->bias = (count + 1) / (count * (count - 1));
}

INLINE float *coherent_row(const engine *e, int k, int g)
{
    return e->coherent + ((ptrdiff_t)k * e->groups + g) * 4 * LANES;
}

/* Keep the coherence band's coefficients of a group, and add their squares to the runs. */
static void keep_coherent(engine *e, int g)
{
    const definition *d = &e->of;
    int some = d->coherence_stop - d->coherence_start;
    float size = (float)sqrt(e->coherence_weight);
    const vf *z = e->spectrum + 2 * (d->coherence_start - d->start);
    for (int k = 0; k < some; k++) {
        float *row = coherent_row(e, k, g);
        put_twice(row, only(e->good[g], z[2 * k] * size));
        put_twice(row + 2 * LANES, only(e->good[g], z[2 * k + 1] * size));
    }
}

static void add_coherent_power(engine *e)
{
    int some = e->of.coherence_stop - e->of.coherence_start;
    for (int r = 0; r <= e->width; r++) {
        if (!e->run_pool[r].channels)
            continue;
        vf *to = e->run_pool[r].power.recent;
        for (int k = 0; k < some; k++)
            for (int g = 0; g < e->groups; g++) {
                const float *row = coherent_row(e, k, g);
                vf re = *(const vf *)row, im = *(const vf *)(row + 2 * LANES);
                to[k * e->groups + g] += re * re + im * im;
            }
        add_to_run(e->run_pool + r, &e->of);
    }
}

INLINE float *run_whitening_row(const engine *e, int r, int k, int g)
{
    ptrdiff_t some = e->of.coherence_stop - e->of.coherence_start;
    return e->whitening + ((r * some + k) * e->groups + g) * 2 * LANES;
}

/* Whitening of the chosen channels that are in a run or in an older one. */
static void whiten(engine *e, int r)
{
    const run *of = e->run_pool + r;
    int some = e->of.coherence_stop - e->of.coherence_start;
    for (int k = 0; k < some; k++)
        for (int g = 0; g < e->groups; g++) {
            vf power = of->power.recent[k * e->groups + g] + of->power.settled[k * e->groups + g];
            vi held = *(vi *)(e->ages + g * 2 * LANES) >= (int32_t)of->age;
            put_twice(run_whitening_row(e, r, k, g), only(held & (power > 0), 1.0f / root(power)));
        }
}

/* The scales of a pair vector's cross-spectra where channels began at different times: a pair's powers are those of
 * the run of its younger channel. */
static void scale_pairs(engine *e, int i, int j, int turn, vf *bias)
{
    int some = e->of.coherence_stop - e->of.coherence_start;
    vi age_i = *(vi *)(e->ages + i * 2 * LANES);
    vi age_j = (vi)rotated((const float *)e->ages + j * 2 * LANES, turn);
    vi younger = (age_i & (age_i < age_j)) | (age_j & (age_i >= age_j));
    *bias = (vf){0};
    for (int k = 0; k < some; k++)
        e->pair_scale[k] = (vf){0};
    for (int r = 0; r <= e->width; r++) {
        const run *of = e->run_pool + r;
        if (!of->channels || of->age < e->of.segments_min)
            continue;
        vi here = younger == (int32_t)of->age;
        if (!any(here))
            continue;
        *bias += only(here, splat((float)of->bias));
        for (int k = 0; k < some; k++)
            e->pair_scale[k] += only(here, *(vf *)run_whitening_row(e, r, k, i) *
                                               rotated(run_whitening_row(e, r, k, j), turn));
    }
}

/* Add the segment to all pairs' cross-spectra; unless `runs` is 0, also the sum over the chosen pairs and the bins of
 * the corrected coherence. `runs`: 1 where all chosen channels began together, 2 where they did not. */
INLINE double add_cross(engine *e, const int runs, int common, double bias)
{
    int some = e->of.coherence_stop - e->of.coherence_start;
    vf *recent = e->cross.recent;
    const vf *settled = e->cross.settled;
    ptrdiff_t apart = (ptrdiff_t)e->groups * 4 * LANES;
    double raw = 0, square = 0, corrected = 0;
    for (int i = 0; i < e->groups; i++)
        for (int j = i; j < e->groups; j++) {
            vf raw_here = {0}, square_here = {0};
            for (int turn = i == j; turn <= (i == j ? LANES / 2 : LANES - 1); turn++) {
                const float *x = coherent_row(e, 0, i), *y = coherent_row(e, 0, j);
                const float *white_x = run_whitening_row(e, common, 0, i), *white_y = run_whitening_row(e, common, 0, j);
                vf raw_sum = {0}, square_sum = {0}, pair_bias = {0};
                /* Half a turn meets each pair of a group twice. */
                float share = i == j && turn == LANES / 2 ? 0.5f : 1.0f;
                if (runs == 2)
                    scale_pairs(e, i, j, turn, &pair_bias);
                for (int k = 0; k < some; k++, recent += 2, settled += 2) {
                    vf x_re = *(const vf *)x, x_im = *(const vf *)(x + 2 * LANES);
                    vf y_re = rotated(y, turn), y_im = rotated(y + 2 * LANES, turn);
                    vf re = recent[0] + (x_re * y_re + x_im * y_im);
                    vf im = recent[1] + (x_im * y_re - x_re * y_im);
                    recent[0] = re;
                    recent[1] = im;
                    if (runs) {
                        vf white = runs == 1 ? *(const vf *)white_x * rotated(white_y, turn) : e->pair_scale[k];
                        re = (re + settled[0]) * white;
                        im = (im + settled[1]) * white;
                        vf c = re * re + im * im;
                        raw_sum += c;
                        square_sum += c * c;
                    }
                    x += apart;
                    y += apart;
                    white_x += apart / 2;
                    white_y += apart / 2;
                }
                if (runs == 2) {
                    /* Scales and bias are 0 where a pair is not chosen. */
                    vf rest = (float)some - 2.0f * raw_sum + square_sum;
                    corrected += (double)share * total(raw_sum - rest * pair_bias);
                } else {
                    raw_here += raw_sum * share;
                    square_here += square_sum * share;
                }
            }
            if (runs == 1) {
                raw += total(raw_here);
                square += total(square_here);
            }
        }
    return runs == 1 ? raw * (1 + 2 * bias) - square * bias : corrected;
}

static __attribute__((noinline)) void only_add_cross(engine *e)
{
    add_cross(e, 0, 0, 0);
}

static __attribute__((noinline)) double add_cross_of_one_run(engine *e, int common, double bias)
{
    return add_cross(e, 1, common, bias);
}

static __attribute__((noinline)) double add_cross_of_runs(engine *e)
{
    return add_cross(e, 2, 0, 0);
}

/* What older runs hold of the time before a younger one began has faded beyond notice: the younger one joins them. */
static void merge_runs(engine *e)
{
    int oldest = -1;
    for (int r = 0; r <= e->width; r++)
        if (e->run_pool[r].channels && (oldest < 0 || e->run_pool[r].age > e->run_pool[oldest].age))
            oldest = r;
    for (int c = 0; c < e->width; c++) {
        int r = e->run_of[c];
        if (r >= 0 && r != oldest && e->run_pool[r].age >= e->of.merge_age) {
            e->run_pool[r].channels--;
            e->run_pool[oldest].channels++;
            e->run_of[c] = oldest;
        }
    }
}

/* Mean coherence of the pairs of good channels with enough segments. */
static double add_coherence(engine *e)
{
    int some = e->of.coherence_stop - e->of.coherence_start, count = 0, common = -1, mixed = 0;
    for (int c = 0; c < e->width; c++) {
        int r = e->run_of[c];
        int chosen = r >= 0 && e->run_pool[r].age >= e->of.segments_min;
        int32_t *to = e->ages + c / LANES * 2 * LANES + c % LANES;
        to[0] = to[LANES] = chosen ? (int32_t)e->run_pool[r].age : 0;
        if (chosen) {
            count++;
            mixed |= common >= 0 && r != common;
            common = r;
        }
    }
    double number = 0.5 * count * (count - 1) * some, mean;
    if (count < 2) {
        only_add_cross(e);
        return NAN;
    }
    if (mixed) {
        for (int r = 0; r <= e->width; r++)
            if (e->run_pool[r].channels && e->run_pool[r].age >= e->of.segments_min)
                whiten(e, r);
        mean = add_cross_of_runs(e) / number;
        merge_runs(e);
    } else {
        whiten(e, common);
        double bias = e->run_pool[common].bias;
        mean = add_cross_of_one_run(e, common, bias) / number - bias;
    }
    return mean < 0 ? 0 : mean > 1 ? 1 : mean;
}

/* ---- phase locking ---- */

INLINE float *pending_row(const engine *e, int replaced, int n)
{
    return e->pending + ((ptrdiff_t)replaced * PENDING_MAX + n) * e->groups * 4 * LANES;
}

/* Add the pending phasors' products to all pairs and take those of the replaced ones out again. Rounded to integers,
 * a product leaves as exactly what it was when it came. With `sum` also the chosen pairs' PLVs, times the window. */
INLINE double update_locked(engine *e, const int evaluate)
{
    ptrdiff_t apart = (ptrdiff_t)e->groups * 4 * LANES;
    vi *to = e->locked;
    double sum = 0;
    const float inverse = 1.0f / (e->phasor_size * e->phasor_size * (float)e->of.window);
    for (int i = 0; i < e->groups; i++)
        for (int j = i; j < e->groups; j++)
            for (int turn = i == j; turn <= (i == j ? LANES / 2 : LANES - 1); turn++, to += 2) {
                const float *x = pending_row(e, 0, 0) + i * 4 * LANES, *y = pending_row(e, 0, 0) + j * 4 * LANES;
                ptrdiff_t replaced = PENDING_MAX * apart;
                vi re = to[0], im = to[1];
                for (int n = 0; n < e->pending_count; n++, x += apart, y += apart) {
                    vf x_re = *(const vf *)x, x_im = *(const vf *)(x + 2 * LANES);
                    vf y_re = rotated(y, turn), y_im = rotated(y + 2 * LANES, turn);
                    vf was_x_re = *(const vf *)(x + replaced), was_x_im = *(const vf *)(x + replaced + 2 * LANES);
                    vf was_y_re = rotated(y + replaced, turn), was_y_im = rotated(y + replaced + 2 * LANES, turn);
                    re += __builtin_convertvector(x_re * y_re + x_im * y_im, vi);
                    im += __builtin_convertvector(x_im * y_re - x_re * y_im, vi);
                    re -= __builtin_convertvector(was_x_re * was_y_re + was_x_im * was_y_im, vi);
                    im -= __builtin_convertvector(was_x_im * was_y_re - was_x_re * was_y_im, vi);
                }
                to[0] = re;
                to[1] = im;
                if (evaluate) {
                    vf a = __builtin_convertvector(re, vf) * inverse, b = __builtin_convertvector(im, vf) * inverse;
                    vf value = root(a * a + b * b);
                    value = where(value < 1.0f, value, splat(1.0f));
                    value *= *(const vf *)(e->chosen + i * 2 * LANES) * rotated(e->chosen + j * 2 * LANES, turn);
                    sum += total(value) * (i == j && turn == LANES / 2 ? 0.5 : 1.0);
                }
            }
    e->pending_count = 0;
    return sum;
}

static __attribute__((noinline)) void flush_phases(engine *e)
{
    update_locked(e, 0);
}

static __attribute__((noinline)) double locked_sum(engine *e)
{
    return update_locked(e, 1);
}

/* The band of a group of channels at `count` samples, `decimation` apart, each turned back by its phase.
 * Constants vanish in the filter: less the sample in the middle, an offset or a drift costs no digits. */
INLINE void move_down(const engine *e, const vf *oldest, const int count, const float (*turn)[2], vf *out)
{
    ptrdiff_t groups = e->groups, apart = e->of.decimation * groups;
    int half = e->of.first_half;
    const vf *newest = oldest + 2 * half * groups, *tap = e->first;
    vf re[4], im[4], twice[4];
    for (int n = 0; n < count; n++) {
        twice[n] = 2.0f * oldest[half * groups + n * apart];
        re[n] = im[n] = (vf){0};
    }
    for (int k = 0; k < half; k++, oldest += groups, newest -= groups, tap += 2) {
        vf tap_re = tap[0], tap_im = tap[1];
        for (int n = 0; n < count; n++) {
            vf a = oldest[n * apart], b = newest[n * apart];
            re[n] += (a + b - twice[n]) * tap_re;
            im[n] += (a - b) * tap_im;
        }
    }
    for (int n = 0; n < count; n++, out += 2 * groups) {
        out[0] = re[n] * turn[n][0] - im[n] * turn[n][1];
        out[1] = re[n] * turn[n][1] + im[n] * turn[n][0];
    }
}

static void move_4_down(const engine *e, const vf *oldest, const float (*turn)[2], vf *out)
{
    move_down(e, oldest, 4, turn, out);
}

static void move_1_down(const engine *e, const vf *oldest, const float (*turn)[2], vf *out)
{
    move_down(e, oldest, 1, turn, out);
}

/* The analytic signal of a group of channels, up to a turn that all channels share, from its newest moved row. */
INLINE void sharpen(const engine *e, const vf *newest, const int count, vf *out)
{
    ptrdiff_t row = 2 * (ptrdiff_t)e->groups;
    int half = e->of.second_half;
    const vf *oldest = newest - 2 * half * row, *tap = e->second;
    vf re[2], im[2];
    for (int n = 0; n < count; n++) {
        re[n] = oldest[(half + n) * row] * tap[half];
        im[n] = oldest[(half + n) * row + 1] * tap[half];
    }
    for (int k = 0; k < half; k++, oldest += row, newest -= row)
        for (int n = 0; n < count; n++) {
            re[n] += (oldest[n * row] + newest[n * row]) * tap[k];
            im[n] += (oldest[n * row + 1] + newest[n * row + 1]) * tap[k];
        }
    for (int n = 0; n < count; n++) {
        out[2 * n] = re[n];
        out[2 * n + 1] = im[n];
    }
}

/* One more phase of a group of channels, at place n of the pending ones. */
static void keep_phase(engine *e, int g, int n, int at, const vf *analytic)
{
    float *row = e->phasors + ((ptrdiff_t)at * e->groups + g) * 4 * LANES;
    float *added = pending_row(e, 0, n) + g * 4 * LANES, *replaced = pending_row(e, 1, n) + g * 4 * LANES;
    vf re = analytic[0], im = analytic[1];
    vf amplitude = root(re * re + im * im);
    vi valid = amplitude >= splat((float)e->of.silent_uv); /* false for NaN */
    vf unit = e->phasor_size / amplitude;
    memcpy(replaced, row, 4 * LANES * sizeof(float));
    put_twice(row, only(valid, re * unit));
    put_twice(row + 2 * LANES, only(valid, im * unit));
    memcpy(added, row, 4 * LANES * sizeof(float));
    e->valid[g] = (e->valid[g] + 1) & valid;
    /* A count that only matters up to the window must not overflow after years. */
    vi enough = e->valid[g] > e->of.window;
    e->valid[g] += enough;
}

/* Move the band down for all phases, `count` of them, that the samples so far allow; MOVED_MAX at most. */
static void move_rows(engine *e, int count)
{
    const definition *d = &e->of;
    ptrdiff_t row = 2 * (ptrdiff_t)e->groups;
    float turn[MOVED_MAX][2];
    if (e->moved_end + count > e->moved_rows) {
        memmove(e->moved, e->moved + (e->moved_end - 2 * d->second_half) * row,
                (size_t)(2 * d->second_half * row) * sizeof(vf));
        e->moved_end = 2 * d->second_half;
    }
    for (int n = 0; n < count; n++) {
        turn[n][0] = (float)e->turn_re;
        turn[n][1] = (float)e->turn_im;
        double re = e->turn_re * e->step_re - e->turn_im * e->step_im;
        double im = e->turn_re * e->step_im + e->turn_im * e->step_re;
        double length = 1.5 - 0.5 * (re * re + im * im); /* Newton's step to 1 / |.|: it must stay 1 for years */
        e->turn_re = re * length;
        e->turn_im = im * length;
    }
    ptrdiff_t oldest = e->end - (ptrdiff_t)(e->seen - e->next_phase) - 2 * d->first_half;
    for (int g = 0; g < e->groups; g++) {
        const vf *from = e->row + oldest * e->groups + g;
        vf *to = e->moved + e->moved_end * row + 2 * g;
        int n = 0;
        for (; n + 4 <= count; n += 4)
            move_4_down(e, from + (ptrdiff_t)n * d->decimation * e->groups, turn + n, to + n * row);
        for (; n < count; n++)
            move_1_down(e, from + (ptrdiff_t)n * d->decimation * e->groups, turn + n, to + n * row);
    }
    e->next_phase += (int64_t)count * d->decimation;
    e->moved_end += count;
}

/* All phases that the samples so far allow. */
static void add_phases(engine *e)
{
    vf analytic[4];
    ptrdiff_t row = 2 * (ptrdiff_t)e->groups;
    while (e->next_phase < e->seen) {
        int64_t due = (e->seen - 1 - e->next_phase) / e->of.decimation + 1;
        int count = due < MOVED_MAX ? (int)due : MOVED_MAX;
        move_rows(e, count);
        /* The first rows since the last reset have too few before them. */
        ptrdiff_t at = e->moved_end - count;
        at = at < 2 * e->of.second_half ? 2 * e->of.second_half : at;
        while (at < e->moved_end) {
            int some = at + 2 <= e->moved_end ? 2 : 1;
            if (e->pending_count + some > PENDING_MAX)
                flush_phases(e);
            for (int g = 0; g < e->groups; g++) {
                const vf *newest = e->moved + at * row + 2 * g;
                if (some == 2)
                    sharpen(e, newest, 2, analytic);
                else
                    sharpen(e, newest, 1, analytic);
                for (int n = 0; n < some; n++)
                    keep_phase(e, g, e->pending_count + n, (e->phasor_at + n) % e->of.window, analytic + 2 * n);
            }
            e->phasor_at = (e->phasor_at + some) % e->of.window;
            e->pending_count += some;
            at += some;
        }
    }
}

/* Mean PLV of the pairs of good channels whose window is full. */
static double phase_locking(engine *e)
{
    int count = 0;
    for (int g = 0; g < e->groups; g++) {
        vi chosen = e->good[g] & (e->valid[g] >= e->of.window);
        put_twice(e->chosen + g * 2 * LANES, only(chosen, splat(1.0f)));
        for (int lane = 0; lane < LANES; lane++)
            count -= chosen[lane];
    }
    if (count < 2) {
        flush_phases(e);
        return NAN;
    }
    return locked_sum(e) / (0.5 * count * (count - 1));
}

/* ---- the door ---- */

/* Whether any of the marks of a piece is set. */
static int marked(const char *marks, ptrdiff_t row, ptrdiff_t column, ptrdiff_t channels, ptrdiff_t count)
{
    char found = 0;
    if (column == 1 && row == channels) {
        channels *= count;
        count = 1;
    }
    for (ptrdiff_t n = 0; n < count; n++)
        for (ptrdiff_t c = 0; c < channels; c++)
            found |= marks[n * row + c * column];
    return found;
}

/* Rows for engine_push from an array of any strides (bytes), NaN where a mark is set, and conditioned. */
static void fill_scratch(engine *e, const char *samples, ptrdiff_t row, ptrdiff_t column, const char *marks,
                         ptrdiff_t marks_row, ptrdiff_t marks_column, ptrdiff_t count)
{
    int channels = e->of.channels;
    for (ptrdiff_t n = 0; n < count; n++, samples += row) {
        double *to = e->scratch + n * e->width;
        if (column == (ptrdiff_t)sizeof(double))
            memcpy(to, samples, (size_t)channels * sizeof(double));
        else
            for (int c = 0; c < channels; c++)
                memcpy(to + c, samples + c * column, sizeof(double));
        if (marks) {
            if (marks_column == 1)
                for (int c = 0; c < channels; c++)
                    to[c] = marks[c] ? NAN : to[c];
            else
                for (int c = 0; c < channels; c++)
                    to[c] = marks[c * marks_column] ? NAN : to[c];
            marks += marks_row;
        }
    }
    if (e->of.sections || e->of.common_average)
        condition(e, count);
}

/* Take in up to a piece of samples: rows of `width` channels, `stride` doubles apart; unused channels are 0. */
static void engine_push(engine *e, const double *samples, ptrdiff_t stride, ptrdiff_t count)
{
    append(e, samples, stride, count);
    check_references(e);
    add_phases(e);
}

/* The state at the newest sample. False where there is none. */
static int engine_step(engine *e, state *to)
{
    const definition *d = &e->of;
    if (e->seen < e->bins.length || e->seen == e->stepped)
        return 0;
    e->stepped = e->seen;
    shares sums = {{{0}}, {0}};
    int good = 0, changed = 0;
    for (int g = 0; g < e->groups; g++) {
        vi was = e->good[g];
        vi now = add_power(e, g, (float)e->power_weight);
        changed |= any(was ^ now);
        keep_coherent(e, g);
        for (int lane = 0; lane < LANES; lane++)
            good -= now[lane];
        if (any(now))
            add_shares(e, g, &sums);
    }
    if (changed)
        change_runs(e);
    add_coherent_power(e);
    to->coherence = add_coherence(e);
    to->plv = phase_locking(e);
    /* Each channel's shares sum to 1; float32 does not say so to the last digit. */
    double whole = 0;
    for (int b = 0; b < BANDS; b++)
        whole += to->share[b] = total(sums.share[b]);
    for (int b = 0; b < BANDS; b++)
        to->share[b] = good ? to->share[b] / whole : NAN;
    to->entropy = good ? total(sums.surprise) / (good * e->entropy_max) : NAN;
    to->entropy = to->entropy < 0 ? 0 : to->entropy > 1 ? 1 : to->entropy;

    if (++e->power_segments == SETTLE_STEPS) {
        settle(&e->power);
        e->power_segments = 0;
    }
    e->power_weight /= d->power_decay;
    if (e->power_weight >= WEIGHT_MAX) {
        scale(&e->power, (float)(1 / WEIGHT_MAX));
        e->power_weight *= 1 / WEIGHT_MAX;
    }
    if (++e->coherence_segments == SETTLE_STEPS) {
        settle(&e->cross);
        for (int r = 0; r <= e->width; r++)
            if (e->run_pool[r].channels)
                settle(&e->run_pool[r].power);
        e->coherence_segments = 0;
    }
    e->coherence_weight /= d->coherence_decay;
    if (e->coherence_weight >= WEIGHT_MAX) {
        scale(&e->cross, (float)(1 / WEIGHT_MAX));
        for (int r = 0; r <= e->width; r++)
            if (e->run_pool[r].channels)
                scale(&e->run_pool[r].power, (float)(1 / WEIGHT_MAX));
        e->coherence_weight *= 1 / WEIGHT_MAX;
    }
    return 1;
}

#endif
