// The hull carved towards the normal maps, but for the solver (solve.cu): twins of ../neus/carve.py.
#include "rays.cuh"

// Where the rays of the silhouettes' pixels meet the surface: distance along the ray of the first entry
// into the object or -1, the smallest value met until a node spacing deep, and where.
KERNEL follow_rays(
    const float* HOT sdf, int r, const float* HOT origin, const float* HOT direction, const float* HOT mask,
    int pixels, float* hit, float* lowest, float* lowest_at
) {
    for (int n = thread_index(); n < pixels; n += thread_count()) {
        float met = -1.0f, low = 1e6f, low_at = 0.0f, t = 0.0f, t_before = 0.0f, f_before = -1.0f;
        Ray ray;
        if (mask[n] > 0.5f && trace_ray(origin + 3 * n, direction + 2 * n, r, 0.0f, ray)) {
            while (t < ray.length) {
                const float f = distance_at(sdf, ray, r, cell_at(ray, r, t));
                if (f < low) {
                    low = f;
                    low_at = t;
                }
                if (f < 0.0f && f_before >= 0.0f && met < 0.0f)
                    met = t_before + (t - t_before) * f_before / (f_before - f);
                if (met >= 0.0f && f < -1.0f) break;
                f_before = f;
                t_before = t;
                t += fmaxf(0.5f, 0.8f * f);
            }
        }
        hit[n] = met;
        lowest[n] = low;
        lowest_at[n] = low_at;
    }
}

// Which pixels the hull itself covers `depth` deep.
KERNEL mark_covered(const float* lowest, float depth, int pixels, unsigned char* covered) {
    for (int n = thread_index(); n < pixels; n += thread_count()) covered[n] = lowest[n] < -depth;
}

// Adds the normals [y, z, x] shown where rays meet the surface, and their weights, to sums (r, r, r, 4).
KERNEL splat_normals(
    const float* HOT origin, const float* HOT direction, const float* HOT normal, const float* HOT hit, int pixels,
    int r, Fixed* sums
) {
    for (int n = thread_index(); n < pixels; n += thread_count()) {
        Ray ray;
        if (hit[n] < 0.0f || !trace_ray(origin + 3 * n, direction + 2 * n, r, 0.0f, ray)) continue;
        const float* shown = normal + 3 * n;
        const float facing = fmaxf(-(shown[0] * ray.dx + shown[2] * ray.dz), 0.0f) + 1e-3f;
        const Cell cell = cell_at(ray, r, hit[n]);
        for (int corner = 0; corner < 8; ++corner) {
            float slope[3];
            const float weight = corner_weight(ray, cell, corner, slope) * facing;
            Fixed* sum = sums + 4 * (long long)corner_node(cell, r, corner);
            add_fixed(sum, weight * shown[1]);
            add_fixed(sum + 1, weight * shown[2]);
            add_fixed(sum + 2, weight * shown[0]);
            add_fixed(sum + 3, weight);
        }
    }
}

// Gradient (r, r, r, 3) [y, z, x] wanted at the nodes within `band` of the surface: that of the nearest
// surface point; and its weight (r, r, r), 0 at all other nodes.
KERNEL node_targets(
    const float* HOT sdf, int r, const Fixed* HOT sums, float band, double enough, double unseen, float* target,
    float* weight
) {
    const int e[3] = {r * r, r, 1};
    for (int n = thread_index(); n < r * r * r; n += thread_count()) {
        const int at[3] = {n / (r * r), n / r % r, n % r};
        weight[n] = 0.0f;
        if (min(min(at[0], at[1]), at[2]) < 2 || max(max(at[0], at[1]), at[2]) >= r - 2) continue;
        if (!(fabsf(sdf[n]) < band)) continue;
        double own[3], part[3], sum[4] = {0.0, 0.0, 0.0, 0.0}, square = 0.0;
        int low[3];
        for (int axis = 0; axis < 3; ++axis) {
            own[axis] = sdf[n + e[axis]] - sdf[n - e[axis]];
            square += own[axis] * own[axis];
        }
        const double length = fmax(sqrt(square), 1e-6);
        for (int axis = 0; axis < 3; ++axis) {
            own[axis] /= length;
            const double nearest = fmin(fmax(at[axis] - sdf[n] * own[axis], 0.0), r - 1.0);
            low[axis] = min((int)nearest, r - 2);
            part[axis] = nearest - low[axis];
        }
        for (int corner = 0; corner < 8; ++corner) {
            const int bit[3] = {corner >> 2, corner >> 1 & 1, corner & 1};
            double share = 1.0;
            long long node = 0;
            for (int axis = 0; axis < 3; ++axis) {
                share *= bit[axis] ? part[axis] : 1.0 - part[axis];
                node = node * r + low[axis] + bit[axis];
            }
            for (int c = 0; c < 4; ++c) sum[c] += share * ((double)sums[4 * node + c] / (double)FIXED_ONE);
        }
        const double trust = sum[3] / (sum[3] + enough);
        const double shown = fmax(sqrt(sum[0] * sum[0] + sum[1] * sum[1] + sum[2] * sum[2]), 1e-9);
        double wanted[3], total = 0.0;
        for (int axis = 0; axis < 3; ++axis) {
            wanted[axis] = trust * sum[axis] / shown + unseen * own[axis];
            total += wanted[axis] * wanted[axis];
        }
        for (int axis = 0; axis < 3; ++axis)
            target[3 * n + axis] = (float)(wanted[axis] / fmax(sqrt(total), 1e-9));
        weight[n] = (float)fmax(trust, unseen);
    }
}

// The field moved by what was solved for, where the object is thick enough, and kept within the hull.
KERNEL move_nodes(
    const float* HOT sdf, const float* HOT hull, const float* HOT weight, const double* HOT moved, double most,
    int r, float* out
) {
    for (int n = thread_index(); n < r * r * r; n += thread_count()) {
        float f = sdf[n];
        if (weight[n] > 0.0f) {
            const int at[3] = {n / (r * r), n / r % r, n % r};
            float depth = -INFINITY;
            for (int y = max(at[0] - 3, 0); y <= min(at[0] + 3, r - 1); ++y)
                for (int z = max(at[1] - 3, 0); z <= min(at[1] + 3, r - 1); ++z)
                    for (int x = max(at[2] - 3, 0); x <= min(at[2] + 3, r - 1); ++x)
                        depth = fmaxf(depth, -sdf[(y * r + z) * r + x]);
            f += (float)(fmin(fmax(moved[n], -most), most) * clampf(depth - 1.0f, 0.0f, 1.0f));
        }
        out[n] = fmaxf(f, hull[n]);
    }
}
