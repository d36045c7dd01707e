/* A window's samples in float32, its segments' transforms, and of each channel the power and the entropy. */
#ifndef WARDLINK_FEATURES_WINDOW_POWER_H
#define WARDLINK_FEATURES_WINDOW_POWER_H

#include "features_window_memory.h"

/* Float32 leaves an error of 1e-6 in the coherence where the bands hold less than a tenth of what the samples do (mains
 * hum, most often) and a bin of one of them less than 1/200 of what white noise would put there. */
#define SHARE_MIN 0.1
#define BIN_SHARE_MIN 0.005
#define LEVEL_APART 8 /* the mean of every eighth sample is level enough to narrow from */

/* Samples that no electrode delivers become NaN. */
static __attribute__((noinline)) void void_unusable(const window *w, int channel)
{
    const double *from = w->given + channel;
    float *to = (float *)w->row + channel;
    for (int n = 0; n < w->samples; n++, from += w->given_stride, to += w->width)
        if (!(fabs(*from) <= w->limit_uv))
            *to = NAN;
}

/* Some half vectors of channels of all samples, from `channel` on, in float32, less their level. */
INLINE void narrow_columns(window *w, int channel, const int halves)
{
    const double *first = w->given + channel, *from = first;
    float *to = (float *)w->row + channel;
    vd level[4], energy[4];
    for (int h = 0; h < halves; h++)
        level[h] = energy[h] = (vd){0};
    for (int n = 0; n < w->samples; n += LEVEL_APART, from += LEVEL_APART * w->given_stride)
        for (int h = 0; h < halves; h++)
            level[h] += ((const vd_anywhere *)from)[h] - ((const vd_anywhere *)first)[h];
    for (int h = 0; h < halves; h++)
        level[h] = ((const vd_anywhere *)first)[h] +
                   level[h] * splat_double(1.0 / ((w->samples + LEVEL_APART - 1) / LEVEL_APART));
    from = first;
    for (int n = 0; n < w->samples; n++, from += w->given_stride, to += w->width)
        for (int h = 0; h < halves; h++) {
            vd x = ((const vd_anywhere *)from)[h] - level[h];
            energy[h] += x * x;
            ((half_vf *)to)[h] = __builtin_convertvector(x, half_vf);
        }
    for (int h = 0; h < halves; h++) {
        /* A sample beyond the limit has more energy alone than all may have together: one look instead of many. */
        vd room = w->limit_uv - (vd)((vl)level[h] & INT64_MAX);
        vl within = (room > 0) & (energy[h] < room * room); /* false for NaN */
        for (int lane = 0; lane < LANES / 2; lane++)
            if (!within[lane])
                void_unusable(w, channel + h * (LANES / 2) + lane);
        ((half_vf *)(w->energy + channel / LANES))[h] = __builtin_convertvector(energy[h], half_vf);
    }
}

static void narrow_window(window *w)
{
    int g = 0;
    for (; g + 2 <= w->groups; g += 2)
        narrow_columns(w, g * LANES, 4);
    if (g < w->groups)
        narrow_columns(w, g * LANES, 2);
}

INLINE float *window_row(const window *w, int segment, int k, int g)
{
    return w->scratch + (((ptrdiff_t)segment * (w->stop - w->start) + k) * w->groups + g) * 4 * LANES;
}

/* The samples of a group in float64, less the first one, NaN where not usable. */
static void widen_row(window *w, int g)
{
    const double *from = w->given + g * LANES;
    const vd limit = splat_double(w->limit_uv);
    for (int h = 0; h < 2; h++)
        for (int n = 0; n < w->samples; n++) {
            vd x = ((const vd_anywhere *)(from + n * w->given_stride))[h];
            vl usable = (vd)((vl)x & INT64_MAX) <= limit;
            w->row_double[2 * n + h] = (vd)((vl)(x - ((const vd_anywhere *)from)[h]) | ~usable);
        }
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
    vf energy = w->energy[g], in_bands = {0}, least = splat(INFINITY);
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
    energy *= (float)w->segment.length / (float)w->samples;
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

#endif
