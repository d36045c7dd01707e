/* The lowest bins of a real Fourier transform, one channel per lane, samples of all channels side by side.
 *
 * A segment of `length` samples is taken as `parts` interleaved sequences. Each goes through a mixed-radix (2, 3, 4, 5)
 * decimation-in-time transform of real input that keeps only half of its spectrum; the parts are then joined for the
 * wanted bins alone. Any length works: what is left of it after 2, 3 and 5 is joined directly.
 *
 * Has no guard: features_transform_double.h includes it once more, with other names for its types and functions. */
#ifndef STAGES_MAX
#include "features_lanes.h"

#define STAGES_MAX 16 /* 2^15 > 10 s of 2,000 Hz */
#define real float
#define HALF ((real)0.5)
#define QUARTER ((real)0.25)
#define SINE_60 ((real)0.86602540378443865)
#define SINE_72 ((real)0.95105651629515357)
#define SINE_36 ((real)0.58778525229247313)
#define QUARTER_ROOT_5 ((real)0.55901699437494742)
#endif

typedef struct {
    int length;      /* samples of a segment */
    int bins;        /* 0..bins - 1 are wanted */
    int parts;       /* interleaved sequences, length = parts x part_length */
    int part_length;
    int stages;
    int radix[STAGES_MAX];
    int *first;      /* first sample of each butterfly of the first stage, (part_length / radix[0]) */
    vf *turns[STAGES_MAX]; /* per stage from the second on: (re, im) of factor a of bin k, at ((k - 1) (radix - 1) + a - 1) */
    int *found;      /* where a part's half spectrum holds bin k of the whole, (bins); ~place: as its mirror */
    real *cosine;   /* of 2 pi n / length, (length) */
    real *sine;
    vf *spectra;     /* half spectra of the parts, (parts, part_length / 2 + 1, 2) */
    vf *work[2];
} transform;

typedef struct {
    vf re, im;
} complex_vf;

static void take_transform(arena *from, transform *t)
{
    int half = t->part_length / 2 + 1, length = t->stages ? t->radix[0] : 1;
    size_t work = 2;
    t->first = take(from, (size_t)(t->part_length / length), sizeof(int));
    if (t->stages)
        work = (size_t)(t->part_length / length) * 2 * (size_t)(length / 2 + 1);
    for (int stage = 1; stage < t->stages; stage++) {
        t->turns[stage] = take(from, (size_t)(length / 2) * (size_t)(t->radix[stage] - 1) * 2 + 1, sizeof(vf));
        length *= t->radix[stage];
        size_t needed = (size_t)(t->part_length / length) * 2 * (size_t)(length / 2 + 1);
        work = needed > work ? needed : work;
    }
    t->work[0] = take(from, work, sizeof(vf));
    t->work[1] = take(from, work, sizeof(vf));
    t->spectra = take(from, (size_t)t->parts * (size_t)half * 2, sizeof(vf));
    t->found = take(from, (size_t)t->bins, sizeof(int));
    t->cosine = take(from, (size_t)t->length, sizeof(real));
    t->sine = take(from, (size_t)t->length, sizeof(real));
}

static void fill_transform(transform *t)
{
    for (int n = 0; n < t->length; n++) {
        t->cosine[n] = (real)cos(TURN * n / t->length);
        t->sine[n] = (real)sin(TURN * n / t->length);
    }
    for (int k = 0; k < t->bins; k++) {
        int folded = k % t->part_length;
        t->found[k] = 2 * folded > t->part_length ? ~(t->part_length - folded) : folded;
    }
    /* Each stage interleaves its blocks: the last one samples 0, 1, .. radix - 1 and so on. */
    int known = 1;
    t->first[0] = 0;
    int length = t->stages ? t->radix[0] : 1;
    for (int stage = 1; stage < t->stages; stage++) {
        int radix = t->radix[stage];
        for (int a = radix - 1; a >= 0; a--)
            for (int k = 0; k < known; k++)
                t->first[a * known + k] = a + radix * t->first[k];
        known *= radix;
        vf *at = t->turns[stage];
        for (int k = 1; k <= length / 2; k++)
            for (int a = 1; a < radix; a++, at += 2) {
                double angle = TURN * a * k / (radix * length);
                at[0] = splat((real)cos(angle));
                at[1] = splat((real)-sin(angle));
            }
        length *= radix;
    }
}

INLINE complex_vf turned(const vf *z, const vf *turn)
{
    return (complex_vf){z[0] * turn[0] - z[1] * turn[1], z[0] * turn[1] + z[1] * turn[0]};
}

INLINE void put(vf *out, int bin, complex_vf z)
{
    out[2 * bin] = z.re;
    out[2 * bin + 1] = z.im;
}

INLINE void put_mirrored(vf *out, int bin, complex_vf z)
{
    out[2 * bin] = z.re;
    out[2 * bin + 1] = -z.im;
}

INLINE complex_vf sum(complex_vf a, complex_vf b)
{
    return (complex_vf){a.re + b.re, a.im + b.im};
}

INLINE complex_vf difference(complex_vf a, complex_vf b)
{
    return (complex_vf){a.re - b.re, a.im - b.im};
}

/* Of real input. Each `out` is (re, im) at distances of `apart` bins; bins beyond the half follow from symmetry. */
INLINE void real_2(vf a, vf b, vf *out, int apart)
{
    const vf none = {0};
    put(out, 0, (complex_vf){a + b, none});
    put(out, apart, (complex_vf){a - b, none});
}

INLINE void real_3(vf a, vf b, vf c, vf *out, int apart)
{
    const vf none = {0};
    vf both = b + c;
    put(out, 0, (complex_vf){a + both, none});
    put(out, apart, (complex_vf){a - HALF * both, (c - b) * SINE_60});
}

INLINE void real_4(vf a, vf b, vf c, vf d, vf *out, int apart)
{
    const vf none = {0};
    vf even = a + c, odd = b + d;
    put(out, 0, (complex_vf){even + odd, none});
    put(out, apart, (complex_vf){a - c, d - b});
    put(out, 2 * apart, (complex_vf){even - odd, none});
}

INLINE void real_5(vf a, vf b, vf c, vf d, vf e, vf *out, int apart)
{
    const vf none = {0};
    vf outer = b + e, inner = c + d, across = e - b, within = d - c;
    vf both = outer + inner;
    vf middle = a - QUARTER * both;
    vf apart_by = (outer - inner) * QUARTER_ROOT_5;
    put(out, 0, (complex_vf){a + both, none});
    put(out, apart, (complex_vf){middle + apart_by, across * SINE_72 + within * SINE_36});
    put(out, 2 * apart, (complex_vf){middle - apart_by, across * SINE_36 - within * SINE_72});
}

static void first_stage(const transform *t, const vf *x, ptrdiff_t stride, vf *out)
{
    int radix = t->radix[0], blocks = t->part_length / radix, held = 2 * (radix / 2 + 1);
    ptrdiff_t apart = blocks * stride;
    for (int block = 0; block < blocks; block++, out += held) {
        const vf *at = x + t->first[block] * stride;
        if (radix == 5)
            real_5(at[0], at[apart], at[2 * apart], at[3 * apart], at[4 * apart], out, 1);
        else if (radix == 4)
            real_4(at[0], at[apart], at[2 * apart], at[3 * apart], out, 1);
        else if (radix == 3)
            real_3(at[0], at[apart], at[2 * apart], out, 1);
        else
            real_2(at[0], at[apart], out, 1);
    }
}

/* The next stages join `radix` half spectra of `length` samples each, in + a x step, into one of radix x length.
 * A bin k beyond half of the new length is stored at its mirror; where 2 k = length there is nothing to mirror. */
INLINE void join_2(const vf *in, ptrdiff_t step, int length, const vf *turn, vf *out)
{
    const vf *in1 = in + step;
    real_2(in[0], in1[0], out, length);
    for (int k = 1; 2 * k <= length; k++, turn += 2) {
        complex_vf a = {in[2 * k], in[2 * k + 1]}, b = turned(in1 + 2 * k, turn);
        put(out, k, sum(a, b));
        put_mirrored(out, length - k, difference(a, b)); /* where 2 k = length it is the same bin with the same value */
    }
}

INLINE void join_3(const vf *in, ptrdiff_t step, int length, const vf *turn, vf *out)
{
    const vf *in1 = in + step, *in2 = in1 + step;
    real_3(in[0], in1[0], in2[0], out, length);
    for (int k = 1; 2 * k <= length; k++, turn += 4) {
        complex_vf a = {in[2 * k], in[2 * k + 1]};
        complex_vf b = turned(in1 + 2 * k, turn), c = turned(in2 + 2 * k, turn + 2);
        complex_vf both = sum(b, c), apart = difference(b, c);
        complex_vf middle = {a.re - HALF * both.re, a.im - HALF * both.im};
        complex_vf side = {apart.im * SINE_60, apart.re * -SINE_60};
        put(out, k, sum(a, both));
        put(out, k + length, sum(middle, side));
        if (2 * k < length)
            put_mirrored(out, length - k, difference(middle, side));
    }
}

INLINE void join_4(const vf *in, ptrdiff_t step, int length, const vf *turn, vf *out)
{
    const vf *in1 = in + step, *in2 = in1 + step, *in3 = in2 + step;
    real_4(in[0], in1[0], in2[0], in3[0], out, length);
    for (int k = 1; 2 * k <= length; k++, turn += 6) {
        complex_vf a = {in[2 * k], in[2 * k + 1]}, b = turned(in1 + 2 * k, turn);
        complex_vf c = turned(in2 + 2 * k, turn + 2), d = turned(in3 + 2 * k, turn + 4);
        complex_vf even = sum(a, c), odd = sum(b, d), first = difference(a, c), second = difference(b, d);
        complex_vf side = {second.im, -second.re};
        put(out, k, sum(even, odd));
        put(out, k + length, sum(first, side));
        if (2 * k < length) {
            put_mirrored(out, 2 * length - k, difference(even, odd));
            put_mirrored(out, length - k, difference(first, side));
        }
    }
}

INLINE void join_5(const vf *in, ptrdiff_t step, int length, const vf *turn, vf *out)
{
    const vf *in1 = in + step, *in2 = in1 + step, *in3 = in2 + step, *in4 = in3 + step;
    real_5(in[0], in1[0], in2[0], in3[0], in4[0], out, length);
    for (int k = 1; 2 * k <= length; k++, turn += 8) {
        complex_vf a = {in[2 * k], in[2 * k + 1]};
        complex_vf b = turned(in1 + 2 * k, turn), c = turned(in2 + 2 * k, turn + 2);
        complex_vf d = turned(in3 + 2 * k, turn + 4), e = turned(in4 + 2 * k, turn + 6);
        complex_vf outer = sum(b, e), inner = sum(c, d), across = difference(b, e), within = difference(c, d);
        complex_vf both = sum(outer, inner), apart = difference(outer, inner);
        complex_vf middle = {a.re - QUARTER * both.re, a.im - QUARTER * both.im};
        complex_vf near = {middle.re + apart.re * QUARTER_ROOT_5, middle.im + apart.im * QUARTER_ROOT_5};
        complex_vf far = {middle.re - apart.re * QUARTER_ROOT_5, middle.im - apart.im * QUARTER_ROOT_5};
        complex_vf near_side = {across.im * SINE_72 + within.im * SINE_36, -(across.re * SINE_72 + within.re * SINE_36)};
        complex_vf far_side = {across.im * SINE_36 - within.im * SINE_72, within.re * SINE_72 - across.re * SINE_36};
        put(out, k, sum(a, both));
        put(out, k + length, sum(near, near_side));
        put(out, k + 2 * length, sum(far, far_side));
        if (2 * k < length) {
            put_mirrored(out, 2 * length - k, difference(far, far_side));
            put_mirrored(out, length - k, difference(near, near_side));
        }
    }
}

static void join_stage(int radix, const vf *in, int length, int blocks, const vf *turn, vf *out)
{
    ptrdiff_t held = 2 * (length / 2 + 1), given = 2 * (radix * length / 2 + 1);
    for (int block = 0; block < blocks; block++, in += radix * held, out += given) {
        if (radix == 5)
            join_5(in, held, length, turn, out);
        else if (radix == 4)
            join_4(in, held, length, turn, out);
        else if (radix == 3)
            join_3(in, held, length, turn, out);
        else
            join_2(in, held, length, turn, out);
    }
}

/* Half spectrum (part_length / 2 + 1, re and im) of samples that lie `stride` vectors apart. */
static void transform_part(const transform *t, const vf *x, ptrdiff_t stride, vf *out)
{
    if (t->stages == 0) {
        out[0] = x[0];
        out[1] = (vf){0};
        return;
    }
    vf *from = t->stages == 1 ? out : t->work[0];
    first_stage(t, x, stride, from);
    int length = t->radix[0];
    for (int stage = 1; stage < t->stages; stage++) {
        int radix = t->radix[stage];
        vf *to = stage == t->stages - 1 ? out : t->work[stage & 1];
        join_stage(radix, from, length, t->part_length / (radix * length), t->turns[stage], to);
        length *= radix;
        from = to;
    }
}

/* Bin k of the whole from the half spectra of the parts. */
INLINE complex_vf joined(const transform *t, int k)
{
    int parts = t->parts, mirrored = t->found[k] < 0;
    ptrdiff_t held = 2 * (t->part_length / 2 + 1);
    const vf *z = t->spectra + 2 * (mirrored ? ~t->found[k] : t->found[k]);
    vf re = z[0], im = mirrored ? -z[1] : z[1];
    for (int part = 1, turn = 0; part < parts; part++) {
        z += held;
        turn += k;
        if (turn >= t->length)
            turn -= t->length;
        vf cosine = splat(t->cosine[turn]), sine = splat(t->sine[turn]);
        vf z_im = mirrored ? -z[1] : z[1];
        re += z[0] * cosine + z_im * sine;
        im += z_im * cosine - z[0] * sine;
    }
    return (complex_vf){re, im};
}

/* Bins start..stop - 1 of a segment times a periodic Hann window, its mean removed, twice as large:
 * X[k] - (X[k - 1] + X[k + 1]) / 2 with X[0] = 0. `out`: (stop - start) x (re, im). */
static void windowed_bins(const transform *t, const vf *x, ptrdiff_t stride, int start, int stop, vf *out)
{
    ptrdiff_t held = 2 * (t->part_length / 2 + 1);
    for (int part = 0; part < t->parts; part++)
        transform_part(t, x + part * stride, t->parts * stride, t->spectra + part * held);
    complex_vf before = {{0}, {0}}, here, after;
    if (start > 1)
        before = joined(t, start - 1);
    here = joined(t, start);
    for (int k = start; k < stop; k++, out += 2) {
        after = joined(t, k + 1);
        out[0] = here.re - HALF * (before.re + after.re);
        out[1] = here.im - HALF * (before.im + after.im);
        before = here;
        here = after;
    }
}
