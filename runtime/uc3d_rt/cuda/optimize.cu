// Nodes near the surface, the regularisers on them, and Adam: twins of ../neus/field.py, ../neus/regularize.py, ../neus/adam.py.
#include "grid.cuh"

// Nothing of the object lies outside of its visual hull.
KERNEL keep_in_hull(float* sdf, const float* start, float slack, int count) {
    for (int n = thread_index(); n < count; n += thread_count()) sdf[n] = fmaxf(sdf[n], start[n] - slack);
}

// Before `near_nodes` counts anew.  One thread.
KERNEL forget_nodes(Progress* progress) {
    if (!thread_index()) progress->nodes = 0;
}

// Nodes within `band + margin` of the surface, in no particular order, and how smooth each should be.
KERNEL near_nodes(
    const float* sdf, int r, float margin, float w_smooth, float w_smooth_unseen, Progress* progress, int* nodes,
    float* smooth
) {
    const int ey = r * r, ez = r, ex = 1;
    const float band = progress->band + margin;
    for (int n = thread_index(); n < r * r * r; n += thread_count()) {
        const int x = n % r, z = n / r % r, y = n / (r * r);
        if (min(min(x, y), z) < 2 || max(max(x, y), z) >= r - 2 || !(fabsf(sdf[n]) < band)) continue;
        const float gy = sdf[n + ey] - sdf[n - ey], gz = sdf[n + ez] - sdf[n - ez], gx = sdf[n + ex] - sdf[n - ex];
        const float upright = fabsf(gy) / fmaxf(sqrtf(gx * gx + gy * gy + gz * gz), 1e-6f);
        const int slot = atomicAdd(&progress->nodes, 1);
        nodes[slot] = n;
        smooth[slot] = w_smooth + clampf((upright - 0.9f) / 0.08f, 0.0f, 1.0f) * (w_smooth_unseen - w_smooth);
    }
}

KERNEL bend(
    const float* sdf, int r, const int* nodes, const float* smooth, const Progress* progress, float* laplacian
) {
    const int ey = r * r, ez = r, ex = 1;
    for (int k = thread_index(); k < progress->nodes; k += thread_count()) {
        const int n = nodes[k];
        laplacian[n] = smooth[k] * (sdf[n - ex] + sdf[n + ex] + sdf[n - ey] + sdf[n + ey] + sdf[n - ez] +
                                    sdf[n + ez] - 6 * sdf[n]);
    }
}

// Gradient (nodes,) of the eikonal and smoothness energies.
KERNEL regularize(
    const float* sdf, int r, const int* nodes, const float* laplacian, float w_eikonal, const Progress* progress,
    float* gradient
) {
    const int e[3] = {1, r * r, r};
    for (int k = thread_index(); k < progress->nodes; k += thread_count()) {
        const int n = nodes[k];
        float total = 0.0f, bend = -6.0f * laplacian[n];
        for (int cell = 0; cell < 4; ++cell) {  // the cells whose forward differences hold node n
            const int c = cell ? n - e[cell - 1] : n;
            float g[3], square = 0.0f;
            for (int axis = 0; axis < 3; ++axis) {
                g[axis] = sdf[c + e[axis]] - sdf[c];
                square += g[axis] * g[axis];
            }
            const float size = sqrtf(square) + 1e-9f;
            const float excess = (size - 1.0f) / size;
            total += excess * (cell ? g[cell - 1] : -(g[0] + g[1] + g[2]));
        }
        for (int axis = 0; axis < 3; ++axis) bend += laplacian[n - e[axis]] + laplacian[n + e[axis]];
        gradient[k] = w_eikonal * total + bend;
    }
}

#define BETA_1 0.9f
#define BETA_2 0.98f

// One step of Adam on `channels` values a node; takes the gradient in and clears it.
KERNEL adam_step(
    float* values, Fixed* gradient, const float* more, float* mean, float* square, const int* nodes, int channels,
    const Progress* progress, const Turn* turns, float learning_rate, float epsilon
) {
    const Turn turn = turns[progress->iteration];
    for (int k = thread_index(); k < progress->nodes * channels; k += thread_count()) {
        const int n = nodes[k / channels] * channels + k % channels;
        const float g = from_fixed(gradient[n]) + (more ? more[k] : 0.0f);
        gradient[n] = 0;
        const float m = mean[n] = BETA_1 * mean[n] + (1.0f - BETA_1) * g;
        const float v = square[n] = BETA_2 * square[n] + (1.0f - BETA_2) * g * g;
        values[n] -= learning_rate * turn.rate * m * turn.correct_1 / (sqrtf(v * turn.correct_2) + epsilon);
    }
}

// The step of the density's inverse deviation, which ends an iteration.  One thread.
KERNEL adapt_density(Progress* p, double low, double high) {
    if (thread_index()) return;
    const int step = ++p->iteration;
    const double g = (double)p->d_inv_s / (double)FIXED_ONE * exp(p->log_inv_s) / max(p->nodes, 1);
    p->d_inv_s = 0;
    p->mean = 0.9 * p->mean + 0.1 * g;
    p->square = 0.98 * p->square + 0.02 * g * g;
    const double m = p->mean / (1.0 - pow(0.9, step)), v = p->square / (1.0 - pow(0.98, step));
    const double moved = p->log_inv_s - 0.05 * m / (sqrt(v) + 1e-8);
    p->log_inv_s = fmin(fmax(moved, log(low)), log(high));
    p->inv_s = (float)exp(p->log_inv_s);
    p->band = (float)(4.5 / exp(p->log_inv_s));
}
