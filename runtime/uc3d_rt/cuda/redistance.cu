// A field made a distance again, and carried to a finer grid: twins of ../neus/redistance.py and ../neus/fit.py.
#include "grid.cuh"

// Nodes next to the surface keep their value; all others start `far` away, with their sign.
KERNEL freeze(const float* sdf, int r, float far, float* out, unsigned char* frozen) {
    const int e[3] = {1, r, r * r};
    for (int n = thread_index(); n < r * r * r; n += thread_count()) {
        const int at[3] = {n % r, n / r % r, n / (r * r)};
        const bool inside = sdf[n] < 0.0f;
        bool crossed = false;
        for (int axis = 0; axis < 3; ++axis) {
            if (at[axis] > 0) crossed |= inside != (sdf[n - e[axis]] < 0.0f);
            if (at[axis] < r - 1) crossed |= inside != (sdf[n + e[axis]] < 0.0f);
        }
        frozen[n] = crossed;
        out[n] = crossed ? sdf[n] : inside ? -far : far;
    }
}

// One round of |grad f| = 1 (Godunov upwind) at all nodes that are not frozen.
KERNEL relax(const float* HOT sdf, const unsigned char* HOT frozen, int r, float* HOT out) {
    const int e[3] = {1, r, r * r};
    for (int n = thread_index(); n < r * r * r; n += thread_count()) {
        const float old = sdf[n];
        out[n] = old;
        if (frozen[n]) continue;
        const int at[3] = {n % r, n / r % r, n / (r * r)};
        float p[3];
        for (int axis = 0; axis < 3; ++axis) {
            const float a = fabsf(sdf[at[axis] > 0 ? n - e[axis] : n]);
            const float b = fabsf(sdf[at[axis] < r - 1 ? n + e[axis] : n]);
            p[axis] = fminf(a, b);
        }
        const float low = fminf(fminf(p[0], p[1]), p[2]), high = fmaxf(fmaxf(p[0], p[1]), p[2]);
        const float mid = fmaxf(fminf(fmaxf(p[0], p[1]), p[2]), fminf(p[0], p[1]));
        float d = low + 1.0f;
        if (d > mid) {
            d = 0.5f * (low + mid + sqrtf(2.0f - (low - mid) * (low - mid)));
            if (d > high) {
                const float total = low + mid + high;
                const float square = total * total - 3.0f * (low * low + mid * mid + high * high - 1.0f);
                d = (total + sqrtf(fmaxf(square, 0.0f))) / 3.0f;
            }
        }
        if (d < fabsf(old)) out[n] = old > 0.0f ? d : -d;
    }
}

// The coarse stage's field on the fine grid: what it moved added to the fine hull, where that is thick
// enough for the coarse grid to have seen it, and its colours.
KERNEL refine(
    const float* coarse, const float* coarse_start, const float* coarse_color, int rc, const float* start, int r,
    float* sdf, float* color
) {
    for (int n = thread_index(); n < r * r * r; n += thread_count()) {
        const int at[3] = {n / (r * r), n / r % r, n % r};
        int low[3];
        float part[3], depth = -INFINITY;
        for (int axis = 0; axis < 3; ++axis) {
            const float where = node_in(at[axis], r, rc);
            low[axis] = min((int)where, rc - 2);
            part[axis] = where - low[axis];
        }
        // Deepest point of the fine hull within one coarse node spacing.
        for (int y = max(at[0] - 2, 0); y <= min(at[0] + 2, r - 1); ++y)
            for (int z = max(at[1] - 2, 0); z <= min(at[1] + 2, r - 1); ++z)
                for (int x = max(at[2] - 2, 0); x <= min(at[2] + 2, r - 1); ++x)
                    depth = fmaxf(depth, -start[(y * r + z) * r + x]);
        float moved = 0.0f, rgb[3] = {0.0f, 0.0f, 0.0f};
        for (int corner = 0; corner < 8; ++corner) {
            const int bit[3] = {corner >> 2, corner >> 1 & 1, corner & 1};
            float weight = 1.0f;
            int node = 0;
            for (int axis = 0; axis < 3; ++axis) {
                weight *= bit[axis] ? part[axis] : 1.0f - part[axis];
                node = node * rc + low[axis] + bit[axis];
            }
            moved += weight * fmaxf(coarse[node] - coarse_start[node], 0.0f);
            for (int c = 0; c < 3; ++c) rgb[c] += weight * coarse_color[3 * node + c];
        }
        sdf[n] = start[n] + 2.0f * moved * clampf(depth - 1.0f, 0.0f, 1.0f);
        for (int c = 0; c < 3; ++c) color[3 * n + c] = rgb[c];
    }
}

// Makes of node spacings world units, and takes colours to [0, 1]: what a `Field` holds.
KERNEL to_world(float* sdf, float* color, int r) {
    for (int n = thread_index(); n < r * r * r; n += thread_count()) {
        sdf[n] *= 2.0f / r;
        for (int c = 0; c < 3; ++c) color[3 * n + c] = clampf(color[3 * n + c], 0.0f, 1.0f);
    }
}
