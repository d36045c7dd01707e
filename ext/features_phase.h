/* Phase locking: the band moved down to 0 Hz and decimated, the phasors of a window, the sums of their products. */
#ifndef WARDLINK_FEATURES_PHASE_H
#define WARDLINK_FEATURES_PHASE_H

#include "features_memory.h"

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

#endif
