/* Power and entropy: each channel's average spectrum. */
#ifndef WARDLINK_FEATURES_POWER_H
#define WARDLINK_FEATURES_POWER_H

#include "features_memory.h"

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

#endif
