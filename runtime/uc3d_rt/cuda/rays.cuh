// Rays of the views through the grid, and the cells they meet: twins of ../neus/rays.py.
#pragma once

#include "grid.cuh"

// The eight corners of a cell are eight threads' work: those of a ray stay together, and its number is that of
// the first of them over their count.  As plain C++ one thread does all eight.
#ifdef __CUDACC__
#define RAY_LANES 8
DEVICE int ray_lane() { return threadIdx.x & (RAY_LANES - 1); }
DEVICE float over_lanes(float value) {  // the sum, the same bits in each
    const unsigned own = 0xffu << (threadIdx.x & 24);
    for (int away = RAY_LANES / 2; away > 0; away /= 2) value += __shfl_xor_sync(own, value, away);
    return value;
}
#else
#define RAY_LANES 1
DEVICE int ray_lane() { return 0; }
DEVICE float over_lanes(float value) { return value; }
#endif
#define CORNERS_OF_LANE(corner) for (int corner = ray_lane(); corner < 8; corner += RAY_LANES)

struct Ray {
    int j;     // it runs between the node layers j and j + 1
    float wy;  // weight of layer j + 1
    float x0, z0, dx, dz, length, offset;
};

struct Cell {
    int low;  // flat index of its first corner
    float wx, wz;
};

// Six views of elevation 0 and orthographic: a pixel's ray is horizontal.  False: it misses the grid.
DEVICE bool trace_ray(const float* origin, const float* direction, int r, float offset, Ray& ray) {
    const float half = 0.5f * r, last = r - 1.0f;
    const float height = (origin[1] + 1.0f) * half - 0.5f;
    if (!(height >= 0.0f && height < last)) return false;
    const float at[2] = {(origin[0] + 1.0f) * half - 0.5f, (origin[2] + 1.0f) * half - 0.5f};
    float enter = -INFINITY, leave = INFINITY;
    for (int axis = 0; axis < 2; ++axis) {
        const float d = direction[axis];
        if (fabsf(d) < 1e-6f) {
            if (!(at[axis] >= 0.0f && at[axis] <= last)) return false;
            continue;
        }
        const float a = -at[axis] / d, b = (last - at[axis]) / d;
        enter = fmaxf(enter, fminf(a, b));
        leave = fminf(leave, fmaxf(a, b));
    }
    if (!(leave > enter)) return false;
    ray.j = (int)floorf(height);
    ray.wy = height - ray.j;
    ray.dx = direction[0];
    ray.dz = direction[1];
    ray.x0 = at[0] + enter * ray.dx;
    ray.z0 = at[1] + enter * ray.dz;
    ray.length = leave - enter;
    ray.offset = offset;
    return true;
}

DEVICE Cell cell_at(const Ray& ray, int r, float t) {
    const float x = ray.x0 + t * ray.dx, z = ray.z0 + t * ray.dz;
    const int i = clampi((int)x, 0, r - 2), h = clampi((int)z, 0, r - 2);
    Cell cell;
    cell.low = (ray.j * r + h) * r + i;
    cell.wx = x - i;
    cell.wz = z - h;
    return cell;
}

DEVICE float distance_at(const float* HOT sdf, const Ray& ray, int r, const Cell& c) {
    const float* a = sdf + c.low;
    const float* b = a + r * r;
    const float low = (a[0] * (1 - c.wx) + a[1] * c.wx) * (1 - c.wz) + (a[r] * (1 - c.wx) + a[r + 1] * c.wx) * c.wz;
    const float high = (b[0] * (1 - c.wx) + b[1] * c.wx) * (1 - c.wz) + (b[r] * (1 - c.wx) + b[r + 1] * c.wx) * c.wz;
    return low * (1 - ray.wy) + high * ray.wy;
}

// Trilinear weight of a corner (bits y, z, x), and its three slopes.
DEVICE float corner_weight(const Ray& ray, const Cell& c, int corner, float slope[3]) {
    const float by = corner & 4 ? ray.wy : 1 - ray.wy;
    const float bz = corner & 2 ? c.wz : 1 - c.wz;
    const float bx = corner & 1 ? c.wx : 1 - c.wx;
    slope[0] = by * bz * (corner & 1 ? 1.0f : -1.0f);
    slope[1] = bz * bx * (corner & 4 ? 1.0f : -1.0f);
    slope[2] = by * bx * (corner & 2 ? 1.0f : -1.0f);
    return by * bz * bx;
}

DEVICE int corner_node(const Cell& c, int r, int corner) {
    return c.low + (corner & 4 ? r * r : 0) + (corner & 2 ? r : 0) + (corner & 1);
}

// Twin of `distance_at` for all lanes of a ray together.
DEVICE float distance_over_lanes(const float* HOT sdf, const Ray& ray, int r, const Cell& c) {
    float sum = 0.0f;
    CORNERS_OF_LANE(corner) {
        const float by = corner & 4 ? ray.wy : 1 - ray.wy;
        const float bz = corner & 2 ? c.wz : 1 - c.wz;
        const float bx = corner & 1 ? c.wx : 1 - c.wx;
        sum += by * bz * bx * sdf[corner_node(c, r, corner)];
    }
    return over_lanes(sum);
}
