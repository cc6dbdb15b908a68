// The soft visual hull of six silhouettes: twins of ../neus/hull.py.
#include "grid.cuh"

// Fractional pixel of a world coordinate along one axis of an image: `field.world_to_grid`.
DEVICE float pixel_of(float world, int size) { return (world + 1.0f) * (0.5f * size) - 0.5f; }

DEVICE float world_of(int node, int r) { return (node + 0.5f) * (2.0f / r) - 1.0f; }

// Largest of the distances (3, size, size) of three pairs of opposite views at every node, in pixels.
// `right` (3, 2): world x and z of each pair's image columns.
KERNEL intersect(const float* HOT distances, const float* HOT right, int size, int r, float* hull) {
    for (int n = thread_index(); n < r * r * r; n += thread_count()) {
        const float y = world_of(n / (r * r), r), z = world_of(n / r % r, r), x = world_of(n % r, r);
        const float row = clampf(pixel_of(-y, size), 0.0f, size - 1.0f);
        const int a = min((int)row, size - 2);
        float most = -INFINITY;
        for (int pair = 0; pair < 3; ++pair) {
            const float u = x * right[2 * pair] + z * right[2 * pair + 1];
            const float column = clampf(pixel_of(u, size), 0.0f, size - 1.0f);
            const int b = min((int)column, size - 2);
            const float* d = distances + (pair * size + a) * size + b;
            const float wr = row - a, wc = column - b;
            const float high = d[0] * (1 - wr) + d[size] * wr, low = d[1] * (1 - wr) + d[size + 1] * wr;
            most = fmaxf(most, high * (1 - wc) + low * wc);
        }
        hull[n] = most;
    }
}

// Marks where the nodes within `slack` of the hull project: seen (views, r, size), a row for each layer.
KERNEL print_nodes(
    const float* HOT hull, float slack, const float* HOT right, int views, int size, int r, unsigned char* seen
) {
    for (int n = thread_index(); n < r * r * r; n += thread_count()) {
        if (!(hull[n] < slack)) continue;
        const int y = n / (r * r);
        const float z = world_of(n / r % r, r), x = world_of(n % r, r);
        for (int view = 0; view < views; ++view) {
            const int column = (int)rintf(pixel_of(x * right[2 * view] + z * right[2 * view + 1], size));
            if (column >= 0 && column < size) seen[(view * r + y) * size + column] = 1;
        }
    }
}

// A field on another grid by trilinear interpolation, less `offset`, times `factor`: `field.resample`.
KERNEL resample(const float* HOT values, int from, float offset, float factor, int r, float* out) {
    for (int n = thread_index(); n < r * r * r; n += thread_count()) {
        const int at[3] = {n / (r * r), n / r % r, n % r};
        int low[3];
        float part[3], sum = 0.0f;
        for (int axis = 0; axis < 3; ++axis) {
            const float where = node_in(at[axis], r, from);
            low[axis] = min((int)where, from - 2);
            part[axis] = where - low[axis];
        }
        for (int corner = 0; corner < 8; ++corner) {
            const int bit[3] = {corner >> 2, corner >> 1 & 1, corner & 1};
            float weight = 1.0f;
            int node = 0;
            for (int axis = 0; axis < 3; ++axis) {
                weight *= bit[axis] ? part[axis] : 1.0f - part[axis];
                node = node * from + low[axis] + bit[axis];
            }
            sum += weight * values[node];
        }
        out[n] = (sum - offset) * factor;
    }
}
