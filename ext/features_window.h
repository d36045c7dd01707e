/* The features of one window of samples, with the arithmetic of scipy.signal.welch, csd and hilbert: half-overlapping
 * Hann segments, plain means. Definitions and oracle: gateway/signal/numpy_window.py. Knows no Python. */
#ifndef WARDLINK_FEATURES_WINDOW_H
#define WARDLINK_FEATURES_WINDOW_H

#include "features_window_pairs.h"

/* `samples`: rows of `width` channels, `stride` doubles apart. Results: (BANDS, channels), (channels),
 * (BANDS, pairs), (pairs). */
static void window_analyse(window *w, const double *samples, ptrdiff_t stride, double *relative_power, double *entropy,
                           double *coherence, double *plv)
{
    w->given = samples;
    w->given_stride = stride;
    narrow_window(w);
    for (int g = 0; g < w->groups; g++)
        window_power(w, g, relative_power, entropy);
    if (!w->with_pairs)
        return;
    window_coherence(w, coherence);
    window_phase_locking(w, plv);
}

#endif
