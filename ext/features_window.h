/* The features of one window of samples, with the arithmetic of scipy.signal.welch, csd and hilbert: half-overlapping
 * Hann segments, plain means. Definitions and oracle: gateway/signal/numpy_window.py. Knows no Python. */
#ifndef WARDLINK_FEATURES_WINDOW_H
#define WARDLINK_FEATURES_WINDOW_H

#include "features_engine.h"
#include "features_transform_double.h"

#define UNITS_MAX 32        /* phasors of a channel at a time: those of 8 channels stay in the first-level cache */
#define ENERGY_APART 4      /* every fourth sample says well enough how large the rest is */
/* Float32 leaves an error of 1e-6 in the coherence where the bands hold less than a tenth of what the samples do (mains
 * hum, most often) and a bin of one of them less than 1/200 of what white noise would put there. */
#define SHARE_MIN 0.1
#define BIN_SHARE_MIN 0.005
#define AMPLITUDE_MIN 1e-15f /* keeps 0 from being divided by, and is nothing beside what else there is */
#define LEVEL_APART 8       /* the mean of every eighth sample is level enough to narrow from */

/* What is read of a phasor when pairs are multiplied: three products instead of four. */
typedef struct {
    float re[2 * LANES], sum[2 * LANES], difference[2 * LANES], im[LANES];
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
    vf *products;                   /* (pair vectors, 3) */
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
    w->products = take(from, pairs * 3, sizeof(vf));
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

/* Some half vectors of channels of all samples in float32, less their level. */
INLINE void narrow_columns(const window *w, const double *samples, ptrdiff_t stride, float *to, const int halves)
{
    const vd limit = splat_double(w->limit_uv);
    const vl magnitude = (vl){0} + INT64_MAX;
    vd level[4];
    for (int h = 0; h < halves; h++)
        level[h] = (vd){0};
    for (int n = 0; n < w->samples; n += LEVEL_APART)
        for (int h = 0; h < halves; h++)
            level[h] += ((const vd_anywhere *)(samples + n * stride))[h] - ((const vd_anywhere *)samples)[h];
    for (int h = 0; h < halves; h++)
        level[h] = ((const vd_anywhere *)samples)[h] +
                   level[h] * splat_double(1.0 / ((w->samples + LEVEL_APART - 1) / LEVEL_APART));
    for (int n = 0; n < w->samples; n++, samples += stride, to += w->width)
        for (int h = 0; h < halves; h++) {
            vd x = ((const vd_anywhere *)samples)[h];
            vl usable = (vd)((vl)x & magnitude) <= limit;
            x = (vd)((vl)(x - level[h]) | ~usable); /* all bits set is a NaN */
            ((half_vf *)to)[h] = __builtin_convertvector(x, half_vf);
        }
}

static void narrow_window(window *w, const double *samples, ptrdiff_t stride)
{
    int g = 0;
    for (; g + 2 <= w->groups; g += 2)
        narrow_columns(w, samples + g * LANES, stride, (float *)(w->row + g), 4);
    if (g < w->groups)
        narrow_columns(w, samples + g * LANES, stride, (float *)(w->row + g), 2);
}

INLINE float *window_row(const window *w, int segment, int k, int g)
{
    return w->scratch + (((ptrdiff_t)segment * (w->stop - w->start) + k) * w->groups + g) * 4 * LANES;
}

/* The samples of a group in float64, less the first one. */
static void widen_row(window *w, int g)
{
    const double *from = w->given + g * LANES;
    for (int h = 0; h < 2; h++)
        for (int n = 0; n < w->samples; n++)
            w->row_double[2 * n + h] = ((const vd_anywhere *)(from + n * w->given_stride))[h] - ((const vd_anywhere *)from)[h];
}

/* Coefficients of a segment of a group, as windowed_bins gives them. */
static void segment_bins(window *w, int g, int segment)
{
    int count = w->stop - w->start;
    ptrdiff_t first = (ptrdiff_t)segment * w->hop;
    if (!w->wide[g]) {
        windowed_bins(&w->segment, w->row + first * w->groups + g, w->groups, w->start, w->stop, w->spectrum);
        return;
    }
    for (int h = 0; h < 2; h++) {
        windowed_bins_double(&w->segment_double, w->row_double + 2 * first + h, 2, w->start, w->stop, w->spectrum_double);
        for (int k = 0; k < 2 * count; k++)
            ((half_vf *)(w->spectrum + k))[h] = __builtin_convertvector(w->spectrum_double[k], half_vf);
    }
}

/* Keep the coefficients of all segments of a group, and add up their squares. */
static void keep_segments(window *w, int g)
{
    int count = w->stop - w->start;
    for (int segment = 0; segment < w->segments; segment++) {
        segment_bins(w, g, segment);
        for (int k = 0; k < count; k++) {
            float *row = window_row(w, segment, k, g);
            vf re = w->spectrum[2 * k], im = w->spectrum[2 * k + 1], square = re * re + im * im;
            w->density[k] = segment ? w->density[k] + square : square;
            if (w->with_pairs) {
                *(vf *)row = re;
                *(vf *)(row + 2 * LANES) = im;
            }
        }
    }
}

/* Whether a channel of a group has so little in its bands, beside what else its samples hold, that float32's rounding
 * would show. */
static int too_little(const window *w, int g)
{
    vf energy = {0}, in_bands = {0}, least = splat(INFINITY);
    for (int n = 0; n < w->samples; n += ENERGY_APART) {
        vf x = w->row[(ptrdiff_t)n * w->groups + g];
        energy += x * x;
    }
    for (int b = 0; b < BANDS; b++) {
        vf power = {0};
        for (int k = w->band_start[b] - w->start; k < w->band_stop[b] - w->start; k++)
            power += w->density[k];
        in_bands += power;
        power *= 1.0f / (float)(w->band_stop[b] - w->band_start[b]);
        least = where(power < least, power, least);
    }
    /* Of samples with this energy in a segment: the sum over all bins of |2 X|^2, and that of a bin of white noise. */
    float sum_of_bins = 0.75f * (float)w->segment.length * (float)w->segments;
    energy *= (float)(ENERGY_APART * w->segment.length) / (float)w->samples;
    vi little = in_bands < (float)SHARE_MIN * sum_of_bins * energy;
    little &= least < (float)BIN_SHARE_MIN * 2.0f * sum_of_bins / (float)w->segment.length * energy;
    return any(little);
}

/* Power of a group of channels; their coefficients are left so that their squares add up to 1 in each bin. */
static void window_power(window *w, int g, double *relative_power, double *entropy)
{
    int count = w->stop - w->start;
    vf *density = w->density;
    w->wide[g] = 0;
    keep_segments(w, g);
    if (w->with_pairs && too_little(w, g)) {
        w->wide[g] = 1;
        widen_row(w, g);
        keep_segments(w, g);
    }
    vf band[BANDS], whole = {0}, entire = {0}, surprise = {0};
    for (int b = 0; b < BANDS; b++) {
        band[b] = (vf){0};
        for (int k = w->band_start[b] - w->start; k < w->band_stop[b] - w->start; k++)
            band[b] += density[k];
        whole += band[b];
    }
    w->good[g] = whole >= splat((float)(w->flat * w->segments)); /* false for NaN */
    vf none = (vf)~w->good[g];
    for (int k = w->entropy_start - w->start; k < w->entropy_stop - w->start; k++)
        entire += density[k];
    vf inverse = 1.0f / entire;
    for (int k = w->entropy_start - w->start; k < w->entropy_stop - w->start; k++) {
        vf share = only(w->good[g], density[k] * inverse);
        surprise -= share * log_2(share);
    }
    surprise *= (float)(1 / log2((double)(w->entropy_stop - w->entropy_start)));
    surprise = (vf)((vi)surprise | (vi)none);
    whole = 1.0f / whole;
    for (int b = 0; b < BANDS; b++)
        band[b] = (vf)((vi)(band[b] * whole) | (vi)none);
    for (int lane = 0; lane < LANES && g * LANES + lane < w->channels; lane++) {
        for (int b = 0; b < BANDS; b++)
            relative_power[b * w->channels + g * LANES + lane] = (double)band[b][lane];
        entropy[g * LANES + lane] = (double)surprise[lane];
    }
    if (!w->with_pairs)
        return;
    for (int k = 0; k < count; k++)
        density[k] = only(w->good[g] & (density[k] > 0), 1.0f / root(density[k]));
    for (int segment = 0; segment < w->segments; segment++)
        for (int k = 0; k < count; k++) {
            float *row = window_row(w, segment, k, g);
            put_twice(row, *(vf *)row * density[k]);
            put_twice(row + 2 * LANES, *(vf *)(row + 2 * LANES) * density[k]);
        }
}

/* Put the lanes of a pair vector into their places, NaN for pairs with a channel that is not good. */
INLINE void put_pairs(const int *place, vi good, vf value, double *to)
{
    value = (vf)((vi)value | ~good);
    for (int lane = 0; lane < LANES; lane++)
        if (place[lane] >= 0)
            to[place[lane]] = (double)value[lane];
}

INLINE vi both_good(const window *w, int i, int j, int turn)
{
    vi good;
    for (int lane = 0; lane < LANES; lane++)
        good[lane] = w->good[i][lane] & w->good[j][(lane + turn) % LANES];
    return good;
}

/* Coherence of up to four turns of a pair of groups. */
INLINE void coherence_of(const window *w, int i, int j, int first, const int turns, const int *place, double *coherence)
{
    ptrdiff_t pairs = (ptrdiff_t)w->channels * (w->channels - 1) / 2;
    ptrdiff_t segment = (ptrdiff_t)w->groups * 4 * LANES * (w->stop - w->start);
    vi good[4];
    for (int n = 0; n < turns; n++)
        good[n] = both_good(w, i, j, first + n);
    for (int b = 0; b < BANDS; b++) {
        float each = 1.0f / (float)(w->band_stop[b] - w->band_start[b]);
        vf mean[4];
        for (int n = 0; n < turns; n++)
            mean[n] = (vf){0};
        for (int k = w->band_start[b] - w->start; k < w->band_stop[b] - w->start; k++) {
            const float *x = window_row(w, 0, k, i), *y = window_row(w, 0, k, j);
            vf re[4], im[4];
            for (int n = 0; n < turns; n++)
                re[n] = im[n] = (vf){0};
            for (int s = 0; s < w->segments; s++, x += segment, y += segment) {
                vf x_re = *(const vf *)x, x_im = *(const vf *)(x + 2 * LANES);
                for (int n = 0; n < turns; n++) {
                    vf y_re = rotated(y, first + n), y_im = rotated(y + 2 * LANES, first + n);
                    re[n] += x_re * y_re + x_im * y_im;
                    im[n] += x_im * y_re - x_re * y_im;
                }
            }
            for (int n = 0; n < turns; n++)
                mean[n] += (re[n] * re[n] + im[n] * im[n]) * each;
        }
        for (int n = 0; n < turns; n++)
            put_pairs(place + n * LANES, good[n], mean[n], coherence + b * pairs);
    }
}

/* Coherence of all pairs in all bands: (BANDS, pairs). */
static void window_coherence(window *w, double *coherence)
{
    const int *place = w->place;
    for (int i = 0; i < w->groups; i++)
        for (int j = i; j < w->groups; j++) {
            int turn = i == j, turns = i == j ? LANES / 2 : LANES;
            for (; turns >= 4; turns -= 4, turn += 4, place += 4 * LANES)
                coherence_of(w, i, j, turn, 4, place, coherence);
            if (turns) {
                coherence_of(w, i, j, turn, 2, place, coherence);
                place += 2 * LANES;
            }
        }
}

INLINE void put_unit(unit_row *to, vf re, vf im)
{
    put_twice(to->re, re);
    put_twice(to->sum, re + im);
    put_twice(to->difference, re - im);
    *(vf *)to->im = im;
}

/* Two phasors of analytic signals: one division for both. */
INLINE void put_units(unit_row *to, complex_vf one, complex_vf other)
{
    vf length = root(one.re * one.re + one.im * one.im) + AMPLITUDE_MIN;
    vf other_length = root(other.re * other.re + other.im * other.im) + AMPLITUDE_MIN;
    vf inverse = 1.0f / (length * other_length);
    vf size = inverse * other_length, other_size = inverse * length;
    put_unit(to, one.re * size, one.im * size);
    put_unit(to + 1, other.re * other_size, other.im * other_size);
}

/* Add up to four turns of a pair of groups: the sums of (re + im) re', re (re' + im') and im (re' - im'). */
INLINE void multiply_units(const unit_row *x, const unit_row *y, int first, const int turns, int count, vf *to)
{
    vf sum_of[4][3];
    for (int n = 0; n < turns; n++)
        for (int k = 0; k < 3; k++)
            sum_of[n][k] = (vf){0};
    for (int at = 0; at < count; at++, x++, y++) {
        vf re = *(const vf *)x->re, im = *(const vf *)x->im, both = *(const vf *)x->sum;
        for (int n = 0; n < turns; n++) {
            sum_of[n][0] += both * rotated(y->re, first + n);
            sum_of[n][1] += re * rotated(y->sum, first + n);
            sum_of[n][2] += im * rotated(y->difference, first + n);
        }
    }
    for (int n = 0; n < turns; n++)
        for (int k = 0; k < 3; k++)
            to[3 * n + k] += sum_of[n][k];
}

static void add_units(window *w, int count)
{
    vf *to = w->products;
    for (int i = 0; i < w->groups; i++)
        for (int j = i; j < w->groups; j++) {
            const unit_row *x = w->units + i * UNITS_MAX, *y = w->units + j * UNITS_MAX;
            int turn = i == j, turns = i == j ? LANES / 2 : LANES;
            for (; turns >= 4; turns -= 4, turn += 4, to += 12)
                multiply_units(x, y, turn, 4, count, to);
            if (turns) {
                multiply_units(x, y, turn, 2, count, to);
                to += 6;
            }
        }
}

/* The analytic signals at the samples t, n - t, n / 2 - t and n / 2 + t, up to a turn that all channels share:
 * sums of the even and odd cosines and sines serve all four. */
INLINE void put_quarter(window *w, int t, int count)
{
    for (int g = 0; g < w->groups; g++) {
        const vf *turn = w->turns + t * w->half * 2;
        const vf *p = w->side_sum + 2 * g, *q = w->side_difference + 2 * g;
        vf even[2] = {w->middle[2 * g], w->middle[2 * g + 1]}, odd[2] = {{0}, {0}};
        vf even_sine[2] = {{0}, {0}}, odd_sine[2] = {{0}, {0}};
        int j = 0;
        for (; j + 2 <= w->half; j += 2, turn += 4, p += 4 * w->groups, q += 4 * w->groups) {
            odd[0] += p[0] * turn[0];
            odd[1] += p[1] * turn[0];
            odd_sine[0] += q[0] * turn[1];
            odd_sine[1] += q[1] * turn[1];
            even[0] += p[2 * w->groups] * turn[2];
            even[1] += p[2 * w->groups + 1] * turn[2];
            even_sine[0] += q[2 * w->groups] * turn[3];
            even_sine[1] += q[2 * w->groups + 1] * turn[3];
        }
        if (j < w->half) {
            odd[0] += p[0] * turn[0];
            odd[1] += p[1] * turn[0];
            odd_sine[0] += q[0] * turn[1];
            odd_sine[1] += q[1] * turn[1];
        }
        unit_row *to = w->units + g * UNITS_MAX + count;
        vf up_re = even[0] + odd[0], up_im = even[1] + odd[1], sines_re = even_sine[0] + odd_sine[0],
           sines_im = even_sine[1] + odd_sine[1];
        put_units(to, (complex_vf){up_re + sines_re, up_im + sines_im},
                  (complex_vf){up_re - sines_re, up_im - sines_im});
        up_re = even[0] - odd[0], up_im = even[1] - odd[1];
        sines_re = odd_sine[0] - even_sine[0], sines_im = odd_sine[1] - even_sine[1];
        put_units(to + 2, (complex_vf){up_re + sines_re, up_im + sines_im},
                  (complex_vf){up_re - sines_re, up_im - sines_im});
    }
}

static void transform_whole(window *w, int g)
{
    ptrdiff_t held = 2 * (w->whole.part_length / 2 + 1);
    int parts = w->whole.parts;
    if (!w->wide[g]) {
        for (int part = 0; part < parts; part++)
            transform_part(&w->whole, w->row + part * w->groups + g, parts * w->groups, w->whole.spectra + part * held);
        return;
    }
    transform_double *t = &w->whole_double;
    widen_row(w, g);
    for (int half = 0; half < 2; half++) {
        for (int part = 0; part < parts; part++)
            transform_part_double(t, w->row_double + 2 * part + half, 2 * parts, t->spectra + part * held);
        for (int k = w->phase_start; k < w->phase_stop; k++) {
            complex_vf_double z = joined_double(t, k);
            vf *to = w->whole_bins + 2 * (k - w->phase_start);
            ((half_vf *)to)[half] = __builtin_convertvector(z.re, half_vf);
            ((half_vf *)(to + 1))[half] = __builtin_convertvector(z.im, half_vf);
        }
    }
}

/* Bin k of the whole window of the group that was transformed last. */
static complex_vf whole_bin(const window *w, int g, int k)
{
    if (!w->wide[g])
        return joined(&w->whole, k);
    const vf *z = w->whole_bins + 2 * (k - w->phase_start);
    return (complex_vf){z[0], z[1]};
}

/* PLV of all pairs: (pairs). */
static void window_phase_locking(window *w, double *plv)
{
    int centre = w->phase_start + w->half;
    for (int g = 0; g < w->groups; g++) {
        transform_whole(w, g);
        complex_vf middle = whole_bin(w, g, centre);
        w->middle[2 * g] = middle.re;
        w->middle[2 * g + 1] = middle.im;
        for (int j = 1; j <= w->half; j++) {
            complex_vf below = whole_bin(w, g, centre - j), above = {{0}, {0}};
            if (centre + j < w->phase_stop)
                above = whole_bin(w, g, centre + j);
            vf *to_sum = w->side_sum + ((j - 1) * w->groups + g) * 2;
            vf *to_difference = w->side_difference + ((j - 1) * w->groups + g) * 2;
            to_sum[0] = above.re + below.re;
            to_sum[1] = above.im + below.im;
            to_difference[0] = below.im - above.im; /* i (above - below) */
            to_difference[1] = above.re - below.re;
        }
    }
    memset(w->products, 0, 3 * (size_t)pair_vectors(w->groups) * sizeof(vf));
    int n = w->samples, count = 0;
    for (int t = 0; t <= n / 4; t++) {
        put_quarter(w, t, count);
        if (t == 0) {
            /* n - 0 is 0 again: keep n / 2 in its place. */
            for (int g = 0; g < w->groups; g++)
                w->units[g * UNITS_MAX + 1] = w->units[g * UNITS_MAX + 2];
            count += 2;
        } else {
            count += 4 * t == n ? 2 : 4; /* n / 2 - n / 4 is n / 4 again */
        }
        if (count + 4 > UNITS_MAX || t == n / 4) {
            add_units(w, count);
            count = 0;
        }
    }
    const int *place = w->place;
    const vf *product = w->products;
    float each = 1.0f / (float)n;
    for (int i = 0; i < w->groups; i++)
        for (int j = i; j < w->groups; j++)
            for (int turn = i == j; turn <= (i == j ? LANES / 2 : LANES - 1); turn++, place += LANES, product += 3) {
                vf re = (product[0] - product[2]) * each, im = (product[0] - product[1]) * each;
                vf value = root(re * re + im * im);
                value = where(value < 1.0f, value, splat(1.0f));
                put_pairs(place, both_good(w, i, j, turn), value, plv);
            }
}

/* `samples`: rows of `width` channels, `stride` doubles apart. Results: (BANDS, channels), (channels),
 * (BANDS, pairs), (pairs). */
static void window_analyse(window *w, const double *samples, ptrdiff_t stride, double *relative_power, double *entropy,
                           double *coherence, double *plv)
{
    w->given = samples;
    w->given_stride = stride;
    narrow_window(w, samples, stride);
    for (int g = 0; g < w->groups; g++)
        window_power(w, g, relative_power, entropy);
    if (!w->with_pairs)
        return;
    window_coherence(w, coherence);
    window_phase_locking(w, plv);
}

#endif
