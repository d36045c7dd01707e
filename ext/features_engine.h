/* The streaming feature engine. Definitions and oracle: gateway/signal/numpy_features.py.
 *
 * Samples arrive in float64 and are narrowed as differences from a reference near their channel's newest ones.
 * Averages grow the weight of what is new instead of shrinking what is old (weights are set back by powers of two,
 * which is exact), so a step adds once to each sum and multiplies nothing. Knows no Python. */
#ifndef WARDLINK_FEATURES_ENGINE_H
#define WARDLINK_FEATURES_ENGINE_H

#include "features_coherence.h"
#include "features_phase.h"
#include "features_power.h"
#include "features_samples.h"

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
