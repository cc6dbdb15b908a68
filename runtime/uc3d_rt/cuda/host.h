// CUDA's words in plain C++, a thread at a time: `grid.cuh` takes them where no CUDA compiler works.
#pragma once

#include <algorithm>
#include <cmath>

#define DEVICE static inline
#define KERNEL extern "C" void
#define HOT
#define SHARED static
#define BARRIER()

using std::max;
using std::min;

struct HostIndex {
    int x;
};
static HostIndex blockIdx = {0}, gridDim = {1};
static const HostIndex threadIdx = {0}, blockDim = {1};

// A kernel is called once for each block, of one thread, in any order.
extern "C" void choose_block(int block, int blocks) {
    blockIdx.x = block;
    gridDim.x = blocks;
}

template <typename T, typename U>
static inline T atomicAdd(T* to, U value) {
    const T before = *to;
    *to += value;
    return before;
}
