/* Coherence: average cross-spectra of all pairs, whitened by the powers of the same segments, less their bias. */
#ifndef WARDLINK_FEATURES_COHERENCE_H
#define WARDLINK_FEATURES_COHERENCE_H

#include "features_memory.h"

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

#endif
