/* Coherence and phase locking of all pairs of a window's channels. */
#ifndef WARDLINK_FEATURES_WINDOW_PAIRS_H
#define WARDLINK_FEATURES_WINDOW_PAIRS_H

#include "features_window_power.h"

#define AMPLITUDE_MIN 1e-15f /* keeps 0 from being divided by, and is nothing beside what else there is */

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

/* A phasor of the analytic signal, as its unit. */
INLINE void put_unit(unit_row *to, vf re, vf im)
{
    vf size = 1.0f / (root(re * re + im * im) + AMPLITUDE_MIN);
    put_twice(to->re, re * size);
    put_twice(to->im, im * size);
}

/* Add the products of up to four turns of a pair of groups. */
INLINE void multiply_units(const unit_row *x, const unit_row *y, int first, const int turns, int count, vf *to)
{
    vf re[4], im[4];
    for (int n = 0; n < turns; n++)
        re[n] = im[n] = (vf){0};
    for (int at = 0; at < count; at++, x++, y++) {
        vf x_re = *(const vf *)x->re, x_im = *(const vf *)x->im;
        for (int n = 0; n < turns; n++) {
            vf y_re = rotated(y->re, first + n), y_im = rotated(y->im, first + n);
            re[n] += x_re * y_re;
            im[n] += x_im * y_re;
            re[n] += x_im * y_im;
            im[n] -= x_re * y_im;
        }
    }
    for (int n = 0; n < turns; n++) {
        to[2 * n] += re[n];
        to[2 * n + 1] += im[n];
    }
}

static void add_units(window *w, int count)
{
    vf *to = w->products;
    for (int i = 0; i < w->groups; i++)
        for (int j = i; j < w->groups; j++) {
            const unit_row *x = w->units + i * UNITS_MAX, *y = w->units + j * UNITS_MAX;
            int turn = i == j, turns = i == j ? LANES / 2 : LANES;
            for (; turns >= 4; turns -= 4, turn += 4, to += 8)
                multiply_units(x, y, turn, 4, count, to);
            if (turns) {
                multiply_units(x, y, turn, 2, count, to);
                to += 4;
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
        put_unit(to, up_re + sines_re, up_im + sines_im);
        put_unit(to + 1, up_re - sines_re, up_im - sines_im);
        up_re = even[0] - odd[0], up_im = even[1] - odd[1];
        sines_re = odd_sine[0] - even_sine[0], sines_im = odd_sine[1] - even_sine[1];
        put_unit(to + 2, up_re + sines_re, up_im + sines_im);
        put_unit(to + 3, up_re - sines_re, up_im - sines_im);
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
    memset(w->products, 0, 2 * (size_t)pair_vectors(w->groups) * sizeof(vf));
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
            for (int turn = i == j; turn <= (i == j ? LANES / 2 : LANES - 1); turn++, place += LANES, product += 2) {
                vf re = product[0] * each, im = product[1] * each;
                vf value = root(re * re + im * im);
                value = where(value < 1.0f, value, splat(1.0f));
                put_pairs(place, both_good(w, i, j, turn), value, plv);
            }
}

#endif
