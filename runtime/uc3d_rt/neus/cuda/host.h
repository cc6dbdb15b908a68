// CUDA's words in plain C++, with a single thread: `grid.cuh` takes them where no CUDA compiler works.
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
static const HostIndex blockIdx = {0}, threadIdx = {0}, blockDim = {1}, gridDim = {1};

template <typename T, typename U>
static inline T atomicAdd(T* to, U value) {
    const T before = *to;
    *to += value;
    return before;
}
