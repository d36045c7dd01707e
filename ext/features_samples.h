/* The engine's samples: conditioned, kept in float64, and narrowed to float32 as differences from a reference near
 * their channel's newest ones. */
#ifndef WARDLINK_FEATURES_SAMPLES_H
#define WARDLINK_FEATURES_SAMPLES_H

#include "features_memory.h"

/* 16 times the range of 8 samples, 4 apart: then float32 resolves a millionth of the range. */
#define REFERENCE_ROWS 8
#define REFERENCE_APART 4
#define REFERENCE_FACTOR 16.0f

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

#endif
