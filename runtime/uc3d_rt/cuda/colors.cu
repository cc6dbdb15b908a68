// The colours that the field begins with: twin of `fit.initial_colors`.
#include "grid.cuh"

// Difference of a field along one axis as `np.gradient` takes it; `at` of r nodes.
DEVICE float slope_at(const float* HOT sdf, int n, int at, int r, int stride) {
    if (at == 0) return sdf[n + stride] - sdf[n];
    if (at == r - 1) return sdf[n] - sdf[n - stride];
    return 0.5f * (sdf[n + stride] - sdf[n - stride]);
}

// Colours (r, r, r, 3) of the nodes: the views that see a node's gradient face on, blended.
// `axes` (views, 3, 3): right, up and back of each; `color` (views, size, size, 3); `masks` without the 3.
KERNEL initial_colors(
    const float* HOT sdf, int r, const float* HOT axes, int views, const float* HOT color,
    const unsigned char* HOT masks, int size, float* out
) {
    for (int n = thread_index(); n < r * r * r; n += thread_count()) {
        const int at[3] = {n % r, n / (r * r), n / r % r}, stride[3] = {1, r * r, r};  // x, y, z
        float place[3], unit[3], square = 0.0f;
        for (int c = 0; c < 3; ++c) {
            place[c] = (at[c] + 0.5f) * (2.0f / r) - 1.0f;
            unit[c] = slope_at(sdf, n, at[c], r, stride[c]);
            square += unit[c] * unit[c];
        }
        const float length = fmaxf(sqrtf(square), 1e-6f);
        float total[3] = {0.5e-3f, 0.5e-3f, 0.5e-3f}, weight = 1e-3f;
        for (int view = 0; view < views; ++view) {
            float seen[3] = {0.0f, 0.0f, 0.0f};  // u, v, and the cosine to the camera
            for (int row = 0; row < 3; ++row)
                for (int c = 0; c < 3; ++c)
                    seen[row] += (row < 2 ? place[c] : unit[c] / length) * axes[9 * view + 3 * row + c];
            const int column = clampi((int)((seen[0] + 1.0f) * 0.5f * size), 0, size - 1);
            const int line = clampi((int)((1.0f - seen[1]) * 0.5f * size), 0, size - 1);
            const int pixel = (view * size + line) * size + column;
            if (!masks[pixel]) continue;
            const float facing = fmaxf(seen[2], 0.0f);
            const float w = facing * facing + 1e-2f;
            for (int c = 0; c < 3; ++c) total[c] += w * color[3 * pixel + c];
            weight += w;
        }
        for (int c = 0; c < 3; ++c) out[3 * n + c] = total[c] / weight;
    }
}
