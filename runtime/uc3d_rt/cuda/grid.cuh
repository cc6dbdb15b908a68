// What all kernels share: the grid, its cells, and sums that do not depend on the order of threads.
//
// Axis order is [y, z, x] and lengths are node spacings, as in the CPU twins (../neus/field.py).
#pragma once

#ifdef __CUDACC__
#define DEVICE static __device__ __forceinline__
#define KERNEL extern "C" __global__ void
#define HOT __restrict__
#define SHARED __shared__
#define TABLE static __device__ const
#define BARRIER() __syncthreads()
#else  // the same code as plain C++, one thread after the other: for tests on machines without a GPU
#include "host.h"
#endif

// Sums over rays are taken in fixed point: integers add up to the same in any order.
typedef long long Fixed;
#define FIXED_ONE 4294967296.0f  // 2^32

DEVICE Fixed to_fixed(float value) { return (Fixed)(value * FIXED_ONE); }

DEVICE void add_fixed(Fixed* to, float value) { atomicAdd((unsigned long long*)to, (unsigned long long)to_fixed(value)); }

DEVICE void add_fixed(Fixed* to, double value) {
    atomicAdd((unsigned long long*)to, (unsigned long long)(Fixed)(value * (double)FIXED_ONE));
}

DEVICE float from_fixed(Fixed value) { return (float)((double)value / (double)FIXED_ONE); }

DEVICE int thread_index() { return blockIdx.x * blockDim.x + threadIdx.x; }
DEVICE int thread_count() { return gridDim.x * blockDim.x; }

DEVICE float clampf(float x, float low, float high) { return fminf(fmaxf(x, low), high); }
DEVICE int clampi(int x, int low, int high) { return min(max(x, low), high); }

// A product that is never fused with a sum: it is the same wherever it is taken, and as on the CPU.
#ifdef __CUDACC__
DEVICE float times(float a, float b) { return __fmul_rn(a, b); }
#else
DEVICE float times(float a, float b) { return a * b; }
#endif

// Node of a coarse or fine grid along one axis in units of another: `field.world_to_grid`.
DEVICE float node_in(int node, int resolution, int other) {
    float world = (node + 0.5f) * (2.0f / resolution) - 1.0f;
    return clampf((world + 1.0f) * (0.5f * other) - 0.5f, 0.0f, other - 1.0f);
}

// What a stage learns besides the field, and what its kernels tell one another.
struct Progress {
    double log_inv_s, mean, square;  // inverse deviation of the density per node spacing, and Adam's moments
    float inv_s, band;               // of the iteration that runs
    int nodes;                       // near the surface
    int iteration;                   // of the stage, from 0
    Fixed d_inv_s;
};

// What sets one iteration of a stage apart from the others.
struct Turn {
    unsigned key;                // of its jitter
    int first;                   // pixel of its rays
    float correct_1, correct_2;  // of Adam's moments
    float rate;                  // share of the learning rates
};

// Conjugate gradients, between their kernels.
struct Solver {
    double rho, alpha, beta;  // rho = residual . preconditioned residual
    double enough;            // squared 2-norm of a residual that ends the search
    int done;
    int uncovered;  // points that pull the surface over them
};
