// Which faces lie behind others in one chart: twin of the end of `_behind_others` in ../mesh/unwrap.py.
#include "grid.cuh"

// Marks the lowest face of every pixel where the highest is more than `apart` above it.  `above`, `below` (pixels,)
// are faces or negative, the depths grow downwards and upwards.  Threads that meet write the same.
KERNEL mark_behind(
    const int* HOT above, const float* HOT above_depth, const int* HOT below, const float* HOT below_depth,
    int pixels, float apart, unsigned char* found
) {
    for (int n = thread_index(); n < pixels; n += thread_count())
        if (above[n] >= 0 && -above_depth[n] - below_depth[n] > apart) found[below[n]] = 1;
}
