// CUDA's words in plain C++, a thread at a time: `grid.cuh` takes them where no CUDA compiler works.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#define DEVICE static inline
#define KERNEL extern "C" void
#define HOT
#define SHARED static
#define TABLE static const
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

template <typename T, typename U>
static inline T atomicMax(T* to, U value) {
    const T before = *to;
    *to = max(before, (T)value);
    return before;
}

template <typename T>
static inline T atomicCAS(T* to, T expected, T value) {
    const T before = *to;
    if (before == expected) *to = value;
    return before;
}

static inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
static inline int __ffs(unsigned bits) { return __builtin_ffs((int)bits); }

static inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
