// A surface's faces turned to the normal maps: twins of ../mesh/refine.py.
//
// A vertex gathers what the faces around it say, in the order of their numbers.  A sum over vertices is that
// of LANES partial ones (solve.cu), each added up by one block.
#include "raster.cu"
#include "solve.cu"

#define GROUP 128  // vertices that a block takes at once

// A place as pixel column, row and depth of an orthographic view; `axes` (3, 3) are its right, up and back.
DEVICE void project(const double* world, const float* HOT axes, float distance, int size, float* point) {
    float seen[3];
    for (int row = 0; row < 3; ++row)
        seen[row] = (float)(world[0] * axes[3 * row] + world[1] * axes[3 * row + 1] + world[2] * axes[3 * row + 2]);
    point[0] = times(seen[0] + 1.0f, 0.5f * size);
    point[1] = times(1.0f - seen[1], 0.5f * size);
    point[2] = distance - seen[2];
}

// Vertices in all views: points (views, count, 3).
KERNEL project_vertices(
    const float* HOT vertices, int count, const float* HOT axes, int views, float distance, int size, float* points
) {
    for (int n = thread_index(); n < views * count; n += thread_count()) {
        const float* vertex = vertices + 3 * (n % count);
        const double world[3] = {vertex[0], vertex[1], vertex[2]};
        project(world, axes + 9 * (n / count), distance, size, points + 3 * (long long)n);
    }
}

DEVICE double power(double x, int n) {
    double out = 1.0;
    for (; n > 0; --n) out *= x;
    return out;
}

// Unit normals (count, 3) that the views (views, size, size, 3) show where they see the middle of a face,
// else its own.
KERNEL face_targets(
    const float* HOT vertices, const int* HOT faces, int count, const float* HOT axes, int views, float distance,
    const float* HOT normal, const Winner* HOT winners, int size, double own_weight, double min_facing, double slack,
    int facing_power, int agreement_power, double* target
) {
    for (int n = thread_index(); n < count; n += thread_count()) {
        const float* corner[3];
        for (int k = 0; k < 3; ++k) corner[k] = vertices + 3 * faces[3 * n + k];
        double middle[3], own[3], square = 0.0;
        for (int i = 0; i < 3; ++i) {
            const int j = (i + 1) % 3, k = (i + 2) % 3;
            middle[i] = ((double)corner[0][i] + corner[1][i] + corner[2][i]) / 3.0;
            own[i] = ((double)corner[1][j] - corner[0][j]) * ((double)corner[2][k] - corner[0][k]) -
                     ((double)corner[1][k] - corner[0][k]) * ((double)corner[2][j] - corner[0][j]);
            square += own[i] * own[i];
        }
        double total[3], length = fmax(sqrt(square), 1e-20);
        for (int i = 0; i < 3; ++i) {
            own[i] /= length;
            total[i] = own_weight * own[i];
        }
        for (int view = 0; view < views; ++view) {
            const float* back = axes + 9 * view + 6;
            const double facing = own[0] * back[0] + own[1] * back[1] + own[2] * back[2];
            if (!(facing > min_facing)) continue;
            float at[3];
            project(middle, axes + 9 * view, distance, size, at);
            const int column = clampi((int)at[0], 0, size - 1), row = clampi((int)at[1], 0, size - 1);
            const long long pixel = ((long long)view * size + row) * size + column;
            if (!(at[2] <= winning_depth(winners[pixel]) + slack / fmax(facing, 0.2))) continue;
            const float* shown = normal + 3 * pixel;
            double agrees = 0.0, front = 0.0;
            for (int i = 0; i < 3; ++i) {
                agrees += shown[i] * own[i];
                front += (double)shown[i] * back[i];
            }
            const double weight = power(fmax(front, 0.0), facing_power) * power(fmax(agrees, 0.0), agreement_power);
            for (int i = 0; i < 3; ++i) total[i] += weight * shown[i];
        }
        length = fmax(sqrt(total[0] * total[0] + total[1] * total[1] + total[2] * total[2]), 1e-12);
        for (int i = 0; i < 3; ++i) target[3 * (long long)n + i] = total[i] / length;
    }
}

// How many faces meet at each vertex; 0 at first.
KERNEL count_corners(const int* HOT faces, int count, int* valence) {
    for (int n = thread_index(); n < 3 * count; n += thread_count()) atomicAdd(valence + faces[n], 1);
}

// The corners, 3 face + k, at each vertex in any order, from `first` (vertices + 1,) on; `filled` is 0 at first.
KERNEL list_corners(const int* HOT faces, int count, const int* HOT first, int* filled, int* corners) {
    for (int n = thread_index(); n < 3 * count; n += thread_count())
        corners[first[faces[n]] + atomicAdd(filled + faces[n], 1)] = n;
}

KERNEL sort_corners(const int* HOT first, int count, int* corners) {
    for (int vertex = thread_index(); vertex < count; vertex += thread_count())
        for (int n = first[vertex] + 1; n < first[vertex + 1]; ++n) {
            const int own = corners[n];
            int at = n;
            for (; at > first[vertex] && corners[at - 1] > own; --at) corners[at] = corners[at - 1];
            corners[at] = own;
        }
}

// The faces around every vertex.
struct Around {
    const int *faces, *first, *corners;
    const double* target;
};

// Gradient at a vertex of half the sum of (target . edge)^2 over faces and edges, at positions x (vertices, 3).
template <typename T>
DEVICE void slopes_at(const Around& around, const T* HOT x, int vertex, double* out) {
    for (int i = 0; i < 3; ++i) out[i] = 0.0;
    for (int n = around.first[vertex]; n < around.first[vertex + 1]; ++n) {
        const int corner = around.corners[n], face = corner / 3, k = corner % 3;
        const T* a = x + 3 * (long long)vertex;
        const T* b = x + 3 * (long long)around.faces[3 * face + (k + 1) % 3];
        const T* c = x + 3 * (long long)around.faces[3 * face + (k + 2) % 3];
        const double* t = around.target + 3 * (long long)face;
        double slope = 0.0;
        for (int i = 0; i < 3; ++i) slope += t[i] * (2.0 * a[i] - b[i] - c[i]);
        for (int i = 0; i < 3; ++i) out[i] += slope * t[i];
    }
}

// Leaves the sum of the parts (GROUP,) of a block's threads in the first.
DEVICE void add_up(double* part) {
    BARRIER();
    for (int half = GROUP / 2; half > 0; half /= 2) {
        for (int t = threadIdx.x; t < half; t += blockDim.x) part[t] += part[t + half];
        BARRIER();
    }
}

// The system, whose unknown is the movement, and the first direction.  Partial sums (LANES,).
KERNEL turn_start(
    const float* HOT vertices, int count, const int* HOT faces, const int* HOT first, const int* HOT corners,
    const double* HOT target, double stay, double* diagonal, double* moved, double* residual, double* way,
    double* partial
) {
    SHARED double part[GROUP];
    const Around around = {faces, first, corners, target};
    for (int lane = blockIdx.x; lane < LANES; lane += gridDim.x) {
        for (int t = threadIdx.x; t < GROUP; t += blockDim.x) {
            double rho = 0.0;
            for (int v = lane * GROUP + t; v < count; v += LANES * GROUP) {
                double slope[3], square[3] = {0.0, 0.0, 0.0};
                slopes_at(around, vertices, v, slope);
                for (int n = first[v]; n < first[v + 1]; ++n)
                    for (int i = 0; i < 3; ++i) {
                        const double own = target[3 * (long long)(corners[n] / 3) + i];
                        square[i] += own * own;
                    }
                for (int i = 0; i < 3; ++i) {
                    const long long n = 3 * (long long)v + i;
                    diagonal[n] = stay + 2.0 * square[i];
                    moved[n] = 0.0;
                    residual[n] = -slope[i];
                    way[n] = residual[n] / diagonal[n];
                    rho += residual[n] * way[n];
                }
            }
            part[t] = rho;
        }
        add_up(part);
        if (!threadIdx.x) partial[lane] = part[0];
        BARRIER();
    }
}

// After `turn_start`; the search ends when residual times preconditioned residual is below `enough`.  One block.
KERNEL turn_begin(const double* HOT partial, double enough, Solver* solver) {
    SHARED double part[SUMS];
    if (blockIdx.x) return;
    const double rho = sum_of(partial, part);
    if (threadIdx.x) return;
    solver->rho = rho;
    solver->enough = enough;
    solver->done = rho < enough;
}

// The matrix times `way`, and partial sums of `way` times that, for `cg_alpha`.
KERNEL turn_apply(
    int count, const int* HOT faces, const int* HOT first, const int* HOT corners, const double* HOT target,
    const Solver* solver, double stay, const double* HOT way, double* product, double* partial
) {
    SHARED double part[GROUP];
    const Around around = {faces, first, corners, target};
    if (solver->done) return;
    for (int lane = blockIdx.x; lane < LANES; lane += gridDim.x) {
        for (int t = threadIdx.x; t < GROUP; t += blockDim.x) {
            double sum = 0.0;
            for (int v = lane * GROUP + t; v < count; v += LANES * GROUP) {
                double slope[3];
                slopes_at(around, way, v, slope);
                for (int i = 0; i < 3; ++i) {
                    const long long n = 3 * (long long)v + i;
                    product[n] = slope[i] + stay * way[n];
                    sum += way[n] * product[n];
                }
            }
            part[t] = sum;
        }
        add_up(part);
        if (!threadIdx.x) partial[lane] = part[0];
        BARRIER();
    }
}

// Goes that way.  Partial sums (2, LANES) for `cg_beta`, which ends the search by the first: here both are
// the residual times the preconditioned residual.
KERNEL turn_step(
    int count, const Solver* solver, const double* HOT diagonal, const double* HOT way, const double* HOT product,
    double* moved, double* residual, double* partial
) {
    SHARED double part[GROUP];
    if (solver->done) return;
    for (int lane = blockIdx.x; lane < LANES; lane += gridDim.x) {
        for (int t = threadIdx.x; t < GROUP; t += blockDim.x) {
            double rho = 0.0;
            for (int v = lane * GROUP + t; v < count; v += LANES * GROUP)
                for (int i = 0; i < 3; ++i) {
                    const long long n = 3 * (long long)v + i;
                    moved[n] += solver->alpha * way[n];
                    const double left = residual[n] -= solver->alpha * product[n];
                    rho += left * left / diagonal[n];
                }
            part[t] = rho;
        }
        add_up(part);
        if (!threadIdx.x) partial[lane] = partial[LANES + lane] = part[0];
        BARRIER();
    }
}

// The next way; `numbers` is three times the vertices.
KERNEL turn_way(
    int numbers, const Solver* solver, const double* HOT diagonal, const double* HOT residual, double* way
) {
    if (solver->done) return;
    for (int n = thread_index(); n < numbers; n += thread_count())
        way[n] = residual[n] / diagonal[n] + solver->beta * way[n];
}

KERNEL move_vertices(const float* HOT vertices, int numbers, const double* HOT moved, float* out) {
    for (int n = thread_index(); n < numbers; n += thread_count()) out[n] = (float)(vertices[n] + moved[n]);
}
