/* The transform once more, in float64: half as many channels at a time, for where float32 is not enough.
 * Included after features_transform.h. */
#ifndef WARDLINK_FEATURES_TRANSFORM_DOUBLE_H
#define WARDLINK_FEATURES_TRANSFORM_DOUBLE_H

#undef real
#define real double
#define vf vd
#define splat splat_double
#define transform transform_double
#define complex_vf complex_vf_double
#define turned turned_double
#define put put_double
#define put_mirrored put_mirrored_double
#define sum sum_double
#define difference difference_double
#define real_2 real_2_double
#define real_3 real_3_double
#define real_4 real_4_double
#define real_5 real_5_double
#define first_stage first_stage_double
#define join_2 join_2_double
#define join_3 join_3_double
#define join_4 join_4_double
#define join_5 join_5_double
#define join_stage join_stage_double
#define transform_part transform_part_double
#define joined joined_double
#define windowed_bins windowed_bins_double
#define take_transform take_transform_double
#define fill_transform fill_transform_double

#include "features_transform.h"

#undef real
#define real float
#undef vf
#undef splat
#undef transform
#undef complex_vf
#undef turned
#undef put
#undef put_mirrored
#undef sum
#undef difference
#undef real_2
#undef real_3
#undef real_4
#undef real_5
#undef first_stage
#undef join_2
#undef join_3
#undef join_4
#undef join_5
#undef join_stage
#undef transform_part
#undef joined
#undef windowed_bins
#undef take_transform
#undef fill_transform

#endif
