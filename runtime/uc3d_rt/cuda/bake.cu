// The views brought onto a surface: twins of ../mesh/bake.py, whose arithmetic in float64 they keep.
//
// Colours of vertices that no view sees come of a linear system on the surface's edges (`continue_*`), three
// channels at once, by conjugate gradients as SciPy's.  A sum over vertices is that of GROUPS partial sums;
// which vertex counts to which, and the order in which they are added up, do not depend on the number of threads.
#include "grid.cuh"

#define GROUP 128
#define GROUPS 128  // as many as a group has lanes, so that one group adds up all partial sums

// Which pixels of view `view` are in its silhouette and not beside a depth edge, and its depth (views, size, size)
// with `empty` where `drawn` (size, size) is infinite; `normal` (views, size, size, 3).
KERNEL mark_clear(
    const float* HOT drawn, const float* HOT normal, int view, int size, float empty, float steep, float* depth,
    unsigned char* clear
) {
    for (int n = thread_index(); n < size * size; n += thread_count()) {
        const int row = n / size, column = n % size, pixel = view * size * size + n;
        float low = INFINITY, high = -INFINITY;
        for (int j = max(row - 1, 0); j <= min(row + 1, size - 1); ++j)
            for (int i = max(column - 1, 0); i <= min(column + 1, size - 1); ++i) {
                const float d = drawn[j * size + i] < INFINITY ? drawn[j * size + i] : empty;
                low = fminf(low, d);
                high = fmaxf(high, d);
            }
        const float* shown = normal + 3 * pixel;
        const bool inside = sqrtf(shown[0] * shown[0] + shown[1] * shown[1] + shown[2] * shown[2]) > 0.5f;
        depth[pixel] = drawn[n] < INFINITY ? drawn[n] : empty;
        clear[pixel] = inside && !(high - low > steep);
    }
}

// Colour and weight (views, size, size, 4) of every pixel: the weight grows with the distance to the nearest
// pixel that is not clear, up to `edge_px` beyond the first, and is 0 outside of the silhouette.
KERNEL weigh_pixels(
    const float* HOT color, const float* HOT normal, const unsigned char* HOT clear, int views, int size,
    double edge_px, float least, float* color_and_edge
) {
    const int reach = (int)(1.0 + edge_px);  // pixels further away do not matter
    for (int pixel = thread_index(); pixel < views * size * size; pixel += thread_count()) {
        const int row = pixel / size % size, column = pixel % size, first = pixel - row * size - column;
        const float* shown = normal + 3 * pixel;
        float weight = 0.0f;
        if (sqrtf(shown[0] * shown[0] + shown[1] * shown[1] + shown[2] * shown[2]) > 0.5f) {
            int nearest = (reach + 1) * (reach + 1);
            for (int j = row - reach; j <= row + reach; ++j)
                for (int i = column - reach; i <= column + reach; ++i) {
                    const int square = (j - row) * (j - row) + (i - column) * (i - column);
                    const bool there = j >= 0 && j < size && i >= 0 && i < size;
                    if (square < nearest && !(there && clear[first + j * size + i])) nearest = square;
                }
            const double inside = (sqrt((double)nearest) - 1.0) / edge_px;
            weight = (float)fmin(fmax(inside, 0.0), 1.0);
            weight = fmaxf(weight * weight, least);
        }
        for (int c = 0; c < 3; ++c) color_and_edge[4 * pixel + c] = color[3 * pixel + c];
        color_and_edge[4 * pixel + 3] = weight;
    }
}

// A place on a face, and the sums that the views give there.
struct Place {
    int corner[3];
    double share[3];
};
struct Blend {
    double color[3], total;
};

DEVICE double at_place(const Place& place, const float* values, int c) {
    double value = 0.0;
    for (int k = 0; k < 3; ++k) value += place.share[k] * values[3 * place.corner[k] + c];
    return value;
}

// Twin of `_blend_views`, but for what is filled in where no view sees the place.  `axes` (views, 3, 3): right, up
// and back of each; `color_and_edge` (views, size, size, 4); `depth` (views, size, size).
DEVICE Blend blend_views(
    const Place& place, const float* vertices, const float* normals, const double* axes, const float* color_and_edge,
    const float* depth, int views, int size, double distance, double slack, double least_facing, int power
) {
    Blend blend = {{0.0, 0.0, 0.0}, 0.0};
    double at[3], across[3], square = 0.0;
    for (int c = 0; c < 3; ++c) {
        at[c] = at_place(place, vertices, c);
        across[c] = at_place(place, normals, c);
        square += across[c] * across[c];
    }
    const double length = fmax(sqrt(square), 1e-8);
    for (int view = 0; view < views; ++view) {
        double facing = 0.0, seen[3] = {0.0, 0.0, 0.0};
        for (int c = 0; c < 3; ++c) {
            facing += across[c] * axes[9 * view + 6 + c];
            for (int row = 0; row < 3; ++row) seen[row] += at[c] * axes[9 * view + 3 * row + c];
        }
        facing /= length;
        if (facing <= least_facing) continue;
        const double column = 0.5 * size * (1.0 + seen[0]), row = 0.5 * size * (1.0 - seen[1]);
        int i = clampi((int)column, 0, size - 1), j = clampi((int)row, 0, size - 1);
        if (distance - seen[2] > depth[(view * size + j) * size + i] + slack / facing) continue;
        double u = fmin(fmax(column - 0.5, 0.0), size - 1.0), v = fmin(fmax(row - 0.5, 0.0), size - 1.0);
        i = min((int)u, size - 2);
        j = min((int)v, size - 2);
        u -= i;
        v -= j;
        const double part[4] = {(1 - u) * (1 - v), u * (1 - v), (1 - u) * v, u * v};
        const float* here = color_and_edge + 4 * ((view * size + j) * size + i);
        const float* four[4] = {here, here + 4, here + 4 * size, here + 4 * size + 4};
        double w = 0.0;
        for (int k = 0; k < 4; ++k) w += part[k] * four[k][3];
        for (int k = 0; k < power; ++k) w *= facing;
        blend.total += w;
        for (int k = 0; k < 4; ++k)
            for (int c = 0; c < 3; ++c) blend.color[c] += w * part[k] * four[k][c];
    }
    return blend;
}

// Colour (count, 3) of vertices and the views' sum of weights (count,); black where that is 0.
KERNEL blend_vertices(
    const float* HOT vertices, const float* HOT normals, int count, const double* HOT axes,
    const float* HOT color_and_edge, const float* HOT depth, int views, int size, double distance, double slack,
    double least_facing, int power, double enough, float* color, float* weight
) {
    for (int n = thread_index(); n < count; n += thread_count()) {
        const Place place = {{n, n, n}, {1.0, 0.0, 0.0}};
        const Blend blend = blend_views(
            place, vertices, normals, axes, color_and_edge, depth, views, size, distance, slack, least_facing, power
        );
        for (int c = 0; c < 3; ++c) color[3 * n + c] = (float)(blend.color[c] / fmax(blend.total, enough));
        weight[n] = (float)blend.total;
    }
}

// Colour (texels, 3) of the texels inside a chart, black in the others; where the views' weights are not `enough`,
// it fades to that of the vertices in `filled`.
KERNEL blend_texels(
    const int* HOT face, const float* HOT shares, int texels, const int* HOT faces, const float* HOT vertices,
    const float* HOT normals, const float* HOT filled, const double* HOT axes, const float* HOT color_and_edge,
    const float* HOT depth, int views, int size, double distance, double slack, double least_facing, int power,
    double enough, unsigned char* texture
) {
    for (int n = thread_index(); n < texels; n += thread_count()) {
        float color[3] = {0.0f, 0.0f, 0.0f};
        if (face[n] >= 0) {
            Place place;
            for (int k = 0; k < 3; ++k) {
                place.corner[k] = faces[3 * face[n] + k];
                place.share[k] = shares[3 * n + k];
            }
            const Blend blend = blend_views(
                place, vertices, normals, axes, color_and_edge, depth, views, size, distance, slack, least_facing,
                power
            );
            const double unseen = fmax(1.0 - blend.total / enough, 0.0);
            for (int c = 0; c < 3; ++c)
                color[c] = (float)(blend.color[c] / fmax(blend.total, enough) + unseen * at_place(place, filled, c));
        }
        for (int c = 0; c < 3; ++c)
            texture[3 * n + c] = (unsigned char)(clampf(color[c], 0.0f, 1.0f) * 255.0f + 0.5f);
    }
}

// What the kernels of the continuation tell one another, a value a channel.
struct Continuation {
    double rho[3], before[3];  // residual . preconditioned residual, now and a step ago
    int done[3];
    int pad;
};

// Adds up K times GROUP values, side by side, by the threads of one block; the sums come first in `part`.
template <int K>
DEVICE void add_up(double (*part)[GROUP]) {
    BARRIER();
    for (int half = GROUP / 2; half > 0; half /= 2) {
        for (int t = threadIdx.x; t < half; t += blockDim.x)
            for (int k = 0; k < K; ++k) part[k][t] += part[k][t + half];
        BARRIER();
    }
}

// Sums of K rows of partial sums (K, GROUPS), by every block for itself.
template <int K>
DEVICE void add_up_groups(const double* HOT partial, double (*part)[GROUP], double* sums) {
    for (int t = threadIdx.x; t < GROUPS; t += blockDim.x)
        for (int k = 0; k < K; ++k) part[k][t] = partial[k * GROUPS + t];
    add_up<K>(part);
    for (int k = 0; k < K; ++k) sums[k] = part[k][0];
    BARRIER();
}

DEVICE float trust_of(const float* weight, int n, float confident) {
    return clampf(weight[n] / confident, 0.0f, 1.0f);
}

// Partial sums (4, GROUPS): colour by trust, and trust.
KERNEL continue_mean(const float* HOT color, const float* HOT weight, int count, float confident, double* partial) {
    SHARED double part[4][GROUP];
    for (int group = blockIdx.x; group < GROUPS; group += gridDim.x) {
        for (int t = threadIdx.x; t < GROUP; t += blockDim.x) {
            double sum[4] = {0.0, 0.0, 0.0, 0.0};
            for (int n = group * GROUP + t; n < count; n += GROUPS * GROUP) {
                const float trust = trust_of(weight, n, confident);
                for (int c = 0; c < 3; ++c) sum[c] += color[3 * n + c] * trust;
                sum[3] += trust;
            }
            for (int k = 0; k < 4; ++k) part[k][t] = sum[k];
        }
        add_up<4>(part);
        for (int k = threadIdx.x; k < 4; k += blockDim.x) partial[k * GROUPS + group] = part[k][0];
        BARRIER();
    }
}

// The system and where the search begins: what is seen keeps its colour, all else has the mean, or `unknown`.
// Vertex n has the neighbours [starts[n], starts[n + 1]).  Partial sums `right_sums` (3, GROUPS): squared right-hand
// side; `step_sums` (6, GROUPS): squared residual, and residual times preconditioned residual.
KERNEL continue_start(
    const float* HOT color, const float* HOT weight, const int* HOT starts, const int* HOT neighbours, int count,
    float confident, double pull, double least_pull, float unknown, const double* HOT mean_sums, double* diagonal,
    double* solved, double* residual, double* way, double* right_sums, double* step_sums, Continuation* state
) {
    SHARED double part[9][GROUP];
    double total[4];
    add_up_groups<4>(mean_sums, part, total);
    float mean[3];
    for (int c = 0; c < 3; ++c) mean[c] = total[3] > 0.0 ? (float)(total[c] / fmax(total[3], 1e-6)) : unknown;
    if (thread_index() == 0)
        for (int c = 0; c < 3; ++c) {
            state->rho[c] = state->before[c] = 0.0;
            state->done[c] = 0;
        }
    for (int group = blockIdx.x; group < GROUPS; group += gridDim.x) {
        for (int t = threadIdx.x; t < GROUP; t += blockDim.x) {
            double sum[9] = {0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0};
            for (int n = group * GROUP + t; n < count; n += GROUPS * GROUP) {
                const double trust = trust_of(weight, n, confident), held = trust * pull + least_pull;
                const double d = starts[n + 1] - starts[n] + held;
                diagonal[n] = d;
                for (int c = 0; c < 3; ++c) {
                    const double known = trust > 0.0 ? color[3 * n + c] : mean[c], right = held * known;
                    double left = right - d * known;
                    for (int k = starts[n]; k < starts[n + 1]; ++k) {
                        const int m = neighbours[k];
                        left += weight[m] > 0.0f ? color[3 * m + c] : mean[c];
                    }
                    solved[3 * n + c] = known;
                    residual[3 * n + c] = left;
                    way[3 * n + c] = 0.0;
                    sum[c] += right * right;
                    sum[3 + c] += left * left;
                    sum[6 + c] += left * left / d;
                }
            }
            for (int k = 0; k < 9; ++k) part[k][t] = sum[k];
        }
        add_up<9>(part);
        for (int k = threadIdx.x; k < 9; k += blockDim.x)
            (k < 3 ? right_sums + k * GROUPS : step_sums + (k - 3) * GROUPS)[group] = part[k][0];
        BARRIER();
    }
}

// The next way from the one before, the matrix times it, and partial sums (3, GROUPS) of both multiplied; whether
// to go on.  A block works out the neighbours' next way for itself.
KERNEL continue_turn(
    const int* HOT starts, const int* HOT neighbours, int count, double tolerance, const double* HOT right_sums,
    const double* HOT step_sums, const double* HOT diagonal, const double* HOT residual, const double* HOT way,
    Continuation* state, double* next, double* product, double* turn_sums
) {
    SHARED double part[6][GROUP];
    double right[3], step[6], beta[3];
    add_up_groups<3>(right_sums, part, right);
    add_up_groups<6>(step_sums, part, step);
    bool done[3];
    for (int c = 0; c < 3; ++c) {
        const double before = state->before[c];
        done[c] = !(step[c] > 0.0 && step[c] >= tolerance * tolerance * right[c]);
        beta[c] = before > 0.0 ? step[3 + c] / before : 0.0;
    }
    if (thread_index() == 0)
        for (int c = 0; c < 3; ++c) {
            state->rho[c] = step[3 + c];
            state->done[c] = done[c];
        }
    if (done[0] && done[1] && done[2]) return;
    for (int group = blockIdx.x; group < GROUPS; group += gridDim.x) {
        for (int t = threadIdx.x; t < GROUP; t += blockDim.x) {
            double sum[3] = {0.0, 0.0, 0.0};
            for (int n = group * GROUP + t; n < count; n += GROUPS * GROUP) {
                const double d = diagonal[n];
                double own[3], q[3];
                for (int c = 0; c < 3; ++c) {
                    own[c] = residual[3 * n + c] / d + beta[c] * way[3 * n + c];
                    q[c] = d * own[c];
                }
                for (int k = starts[n]; k < starts[n + 1]; ++k) {
                    const int m = neighbours[k];
                    const double e = diagonal[m];
                    for (int c = 0; c < 3; ++c) q[c] -= residual[3 * m + c] / e + beta[c] * way[3 * m + c];
                }
                for (int c = 0; c < 3; ++c) {
                    next[3 * n + c] = own[c];
                    product[3 * n + c] = q[c];
                    sum[c] += own[c] * q[c];
                }
            }
            for (int c = 0; c < 3; ++c) part[c][t] = sum[c];
        }
        add_up<3>(part);
        for (int c = threadIdx.x; c < 3; c += blockDim.x) turn_sums[c * GROUPS + group] = part[c][0];
        BARRIER();
    }
}

// Goes that way in the channels that are not done; their rows of `step_sums` as of `continue_start`.
KERNEL continue_step(
    int count, const double* HOT turn_sums, const double* HOT diagonal, const double* HOT way,
    const double* HOT product, Continuation* state, double* solved, double* residual, double* step_sums
) {
    SHARED double part[6][GROUP];
    bool done[3];
    double alpha[3], curvature[3];
    for (int c = 0; c < 3; ++c) done[c] = state->done[c];
    if (done[0] && done[1] && done[2]) return;
    add_up_groups<3>(turn_sums, part, curvature);
    for (int c = 0; c < 3; ++c) alpha[c] = done[c] ? 0.0 : state->rho[c] / curvature[c];
    if (thread_index() == 0)
        for (int c = 0; c < 3; ++c)
            if (!done[c]) state->before[c] = state->rho[c];
    for (int group = blockIdx.x; group < GROUPS; group += gridDim.x) {
        for (int t = threadIdx.x; t < GROUP; t += blockDim.x) {
            double sum[6] = {0.0, 0.0, 0.0, 0.0, 0.0, 0.0};
            for (int n = group * GROUP + t; n < count; n += GROUPS * GROUP)
                for (int c = 0; c < 3; ++c) {
                    if (done[c]) continue;
                    solved[3 * n + c] += alpha[c] * way[3 * n + c];
                    const double left = residual[3 * n + c] -= alpha[c] * product[3 * n + c];
                    sum[c] += left * left;
                    sum[3 + c] += left * left / diagonal[n];
                }
            for (int k = 0; k < 6; ++k) part[k][t] = sum[k];
        }
        add_up<6>(part);
        for (int k = threadIdx.x; k < 6; k += blockDim.x)
            if (!done[k % 3]) step_sums[k * GROUPS + group] = part[k][0];
        BARRIER();
    }
}

// The colours (count, 3) that were solved for, as values from 0 to 1.
KERNEL continue_end(const double* HOT solved, int count, float* filled) {
    for (int n = thread_index(); n < 3 * count; n += thread_count()) filled[n] = clampf((float)solved[n], 0.0f, 1.0f);
}

// Rows down (up where negative) to the nearest texel inside a chart in the same column, up where both are as near;
// in a column without any, more than any distance within the texture.
KERNEL column_gaps(const int* HOT face, int size, int* down) {
    for (int n = thread_index(); n < size * size; n += thread_count()) {
        const int row = n / size, last = max(row, size - 1 - row);
        int found = face[n] >= 0 ? 0 : 2 * size;
        for (int away = 1; away <= last && found == 2 * size; ++away) {
            if (row + away < size && face[n + away * size] >= 0) found = away;
            if (row - away >= 0 && face[n - away * size] >= 0) found = -away;
        }
        down[n] = found;
    }
}

// Gives texels (size, size, 3) outside of all charts the colour of the nearest inside one; of several, of that in
// the nearest column, the left one first.
KERNEL fill_gaps(const int* HOT down, int size, unsigned char* texture) {
    for (int n = thread_index(); n < size * size; n += thread_count()) {
        if (down[n] == 0) continue;
        const int row = n / size, column = n % size;
        int best = 4 * size * size, nearest = n;
        for (int aside = 0; aside < size && aside * aside < best; ++aside)
            for (int side = -1; side <= 1; side += 2) {
                const int other = column + side * aside;
                if (other < 0 || other >= size) continue;
                const int rows = down[row * size + other], square = rows * rows + aside * aside;
                if (square < best) {
                    best = square;
                    nearest = (row + rows) * size + other;
                }
            }
        for (int c = 0; c < 3; ++c) texture[3 * n + c] = texture[3 * nearest + c];
    }
}
