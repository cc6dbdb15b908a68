// The linear system of the carving, by conjugate gradients as SciPy's: twins of `_solve` in ../neus/carve.py.
//
// Its unknowns are the nodes whose `weight` is above 0.  The matrix is never stored: a node is tied to its
// six neighbours by the mean of both weights and to its present value by `stay`, and every point that should
// be covered pulls at the eight nodes around it.
//
// A sum over nodes is that of LANES partial sums.  Which node counts to which, and the order in which they
// are added up, do not depend on the number of threads.
#pragma once
#include "rays.cuh"

#define LANES 8192
#define SUMS 128

// A point between nodes: flat index of the first of the eight, and the weights of the further ones.
struct Pull {
    int low;
    float part[3];  // [y, z, x]
};

DEVICE double pull_corner(const Pull& pull, int r, int corner, int& node) {
    const int bit[3] = {corner >> 2, corner >> 1 & 1, corner & 1};
    double share = 1.0;
    for (int axis = 0; axis < 3; ++axis) share *= bit[axis] ? (double)pull.part[axis] : 1.0 - pull.part[axis];
    node = pull.low + (bit[0] * r + bit[1]) * r + bit[2];
    return share;
}

// Lists the points where rays that should meet the object `depth` deep come nearest to it, in any order,
// and adds up what they give to the right-hand side and to the diagonal, each without the pull's weight.
KERNEL list_uncovered(
    const float* HOT sdf, const float* HOT weight, int r, const float* HOT origin, const float* HOT direction,
    const unsigned char* HOT covered, const float* HOT lowest, const float* HOT lowest_at, float depth, int pixels,
    Solver* solver, Pull* pulls, Fixed* right, Fixed* diagonal
) {
    for (int n = thread_index(); n < pixels; n += thread_count()) {
        Ray ray;
        if (!covered[n] || !(lowest[n] > -depth)) continue;
        if (!trace_ray(origin + 3 * n, direction + 2 * n, r, 0.0f, ray)) continue;
        const Cell cell = cell_at(ray, r, lowest_at[n]);
        const Pull pull = {cell.low, {ray.wy, cell.wz, cell.wx}};
        double missing = -(double)depth;
        bool known = true;
        for (int corner = 0; corner < 8; ++corner) {
            int node;
            const double share = pull_corner(pull, r, corner, node);
            missing -= share * sdf[node];
            known &= weight[node] > 0.0f;
        }
        if (!known) continue;
        pulls[atomicAdd(&solver->uncovered, 1)] = pull;
        for (int corner = 0; corner < 8; ++corner) {
            int node;
            const double share = pull_corner(pull, r, corner, node);
            add_fixed(right + node, share * missing);
            add_fixed(diagonal + node, share * share);
        }
    }
}

DEVICE double as_double(Fixed value) { return (double)value / (double)FIXED_ONE; }

// The system, and the first direction: twin of what stands before `cg`.  Takes `pulled` in and clears it.
// Partial sums (2, LANES): squared residual, and residual times preconditioned residual.
KERNEL cg_start(
    const float* HOT sdf, const float* HOT target, const float* HOT weight, int r, double stay, double pull,
    Fixed* pulled, const Fixed* HOT pulled_diagonal, double* diagonal, double* moved, double* residual, double* way,
    double* partial
) {
    const int e[3] = {r * r, r, 1};
    for (int lane = thread_index(); lane < LANES; lane += thread_count()) {
        double square = 0.0, rho = 0.0;
        for (int n = lane; n < r * r * r; n += LANES) {
            const double own = weight[n];
            moved[n] = 0.0;
            if (!(own > 0.0)) continue;
            double d = stay + pull * as_double(pulled_diagonal[n]), right = pull * as_double(pulled[n]);
            pulled[n] = 0;
            for (int axis = 0; axis < 3; ++axis)
                for (int side = -1; side <= 1; side += 2) {
                    const int m = n + side * e[axis];
                    if (!(weight[m] > 0.0f)) continue;
                    const double w = 0.5 * (own + weight[m]);
                    const double slope = 0.5 * ((double)target[3 * n + axis] + target[3 * m + axis]);
                    d += w;
                    right += w * ((double)sdf[m] - sdf[n] - side * slope);
                }
            diagonal[n] = d;
            residual[n] = right;
            way[n] = right / d;
            square += right * right;
            rho += right * way[n];
        }
        partial[lane] = square;
        partial[LANES + lane] = rho;
    }
}

// Sum of LANES values by the threads of one block; `part` (SUMS) is theirs.
DEVICE double sum_of(const double* HOT partial, double* part) {
    for (int t = threadIdx.x; t < SUMS; t += blockDim.x) {
        double sum = 0.0;
        for (int lane = t; lane < LANES; lane += SUMS) sum += partial[lane];
        part[t] = sum;
    }
    BARRIER();
    for (int half = SUMS / 2; half > 0; half /= 2) {
        for (int t = threadIdx.x; t < half; t += blockDim.x) part[t] += part[t + half];
        BARRIER();
    }
    const double total = part[0];
    BARRIER();
    return total;
}

// After `cg_start`; `tolerance` is of the residual's 2-norm against the first one's.  One block.
KERNEL cg_begin(const double* HOT partial, double tolerance, Solver* solver) {
    SHARED double part[SUMS];
    if (blockIdx.x) return;
    const double square = sum_of(partial, part), rho = sum_of(partial + LANES, part);
    if (threadIdx.x) return;
    solver->rho = rho;
    solver->enough = tolerance * tolerance * square;
    solver->done = !(square > 0.0);
}

// What the points that should be covered give to the matrix times `way`, without the pull's weight.
KERNEL cg_pull(const Pull* HOT pulls, const Solver* solver, const double* HOT way, int r, Fixed* pulled) {
    if (solver->done) return;
    for (int k = thread_index(); k < solver->uncovered; k += thread_count()) {
        const Pull pull = pulls[k];
        double value = 0.0;
        int node;
        for (int corner = 0; corner < 8; ++corner) {
            const double share = pull_corner(pull, r, corner, node);
            value += share * way[node];
        }
        for (int corner = 0; corner < 8; ++corner) {
            const double share = pull_corner(pull, r, corner, node);
            add_fixed(pulled + node, share * value);
        }
    }
}

// The matrix times `way`, and partial sums (LANES,) of `way` times that.  Takes `pulled` in and clears it.
KERNEL cg_apply(
    const float* HOT weight, const Solver* solver, const double* HOT way, int r, double stay, double pull,
    Fixed* pulled, double* product, double* partial
) {
    const int e[3] = {r * r, r, 1};
    if (solver->done) return;
    for (int lane = thread_index(); lane < LANES; lane += thread_count()) {
        double sum = 0.0;
        for (int n = lane; n < r * r * r; n += LANES) {
            const double own = weight[n];
            if (!(own > 0.0)) continue;
            double q = stay * way[n] + pull * as_double(pulled[n]);
            pulled[n] = 0;
            for (int axis = 0; axis < 3; ++axis)
                for (int side = -1; side <= 1; side += 2) {
                    const int m = n + side * e[axis];
                    if (weight[m] > 0.0f) q += 0.5 * (own + weight[m]) * (way[n] - way[m]);
                }
            product[n] = q;
            sum += way[n] * q;
        }
        partial[lane] = sum;
    }
}

// How far to go that way.  One block.
KERNEL cg_alpha(const double* HOT partial, Solver* solver) {
    SHARED double part[SUMS];
    if (blockIdx.x || solver->done) return;
    const double curvature = sum_of(partial, part);
    if (!threadIdx.x) solver->alpha = solver->rho / curvature;
}

// Goes there; partial sums as of `cg_start`.
KERNEL cg_step(
    const float* HOT weight, const Solver* solver, const double* HOT diagonal, const double* HOT way,
    const double* HOT product, int r, double* moved, double* residual, double* partial
) {
    if (solver->done) return;
    for (int lane = thread_index(); lane < LANES; lane += thread_count()) {
        double square = 0.0, rho = 0.0;
        for (int n = lane; n < r * r * r; n += LANES) {
            if (!(weight[n] > 0.0f)) continue;
            moved[n] += solver->alpha * way[n];
            const double left = residual[n] -= solver->alpha * product[n];
            square += left * left;
            rho += left * left / diagonal[n];
        }
        partial[lane] = square;
        partial[LANES + lane] = rho;
    }
}

// Whether to go on, and how much of the old way is in the next.  One block.
KERNEL cg_beta(const double* HOT partial, Solver* solver) {
    SHARED double part[SUMS];
    if (blockIdx.x || solver->done) return;
    const double square = sum_of(partial, part), rho = sum_of(partial + LANES, part);
    if (threadIdx.x) return;
    solver->beta = rho / solver->rho;
    solver->rho = rho;
    solver->done = square < solver->enough;
}

KERNEL cg_turn(
    const float* HOT weight, const Solver* solver, const double* HOT diagonal, const double* HOT residual, int r,
    double* way
) {
    if (solver->done) return;
    for (int n = thread_index(); n < r * r * r; n += thread_count())
        if (weight[n] > 0.0f) way[n] = residual[n] / diagonal[n] + solver->beta * way[n];
}
