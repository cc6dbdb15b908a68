// An orthographic rasteriser: twin of ../mesh/raster.py.
//
// The winner of a pixel is the smallest pair of depth and face.  It is kept as the complement of that pair,
// so that the largest wins, in any order of threads, and 0 is a pixel that nothing covers.
#pragma once
#include "grid.cuh"

typedef unsigned long long Winner;

#define SMALL_BOX 512  // pixels of a bounding box that one thread goes through
#define STRIPES 64     // blocks that a larger one is shared out to

DEVICE Winner winner_of(float depth, int face) {
    const unsigned bits = __float_as_uint(depth + 0.0f);  // -0 is 0
    const unsigned ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return ~((Winner)ordered << 32 | (unsigned)face);
}

DEVICE int winning_face(Winner winner) { return winner ? (int)(unsigned)~winner : -1; }

DEVICE float winning_depth(Winner winner) {
    const unsigned ordered = (unsigned)(~winner >> 32);
    return winner ? __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered) : INFINITY;
}

// A triangle in pixels, and the pixels whose centres its bounding box holds.
struct Triangle {
    float ax, ay, bx, by, cx, cy, depth[3], inverse;
    int left, right, top, bottom;
};

DEVICE int first_centre(float low, int size) { return (int)fmin(fmax(ceil((double)low - 0.5), 0.0), size + 0.0); }
DEVICE int last_centre(float high, int size) { return (int)fmax(fmin(floor((double)high - 0.5), size - 1.0), -1.0); }

DEVICE bool triangle_of(const float* HOT points, const int* HOT face, int size, Triangle& t) {
    const float *a = points + 3 * face[0], *b = points + 3 * face[1], *c = points + 3 * face[2];
    t.ax = a[0], t.ay = a[1], t.depth[0] = a[2];
    t.bx = b[0], t.by = b[1], t.depth[1] = b[2];
    t.cx = c[0], t.cy = c[1], t.depth[2] = c[2];
    const float area = times(t.bx - t.ax, t.cy - t.ay) - times(t.by - t.ay, t.cx - t.ax);
    if (!(fabs((double)area) >= 1e-12)) return false;
    t.inverse = 1.0f / area;
    t.left = first_centre(fminf(fminf(t.ax, t.bx), t.cx), size);
    t.right = last_centre(fmaxf(fmaxf(t.ax, t.bx), t.cx), size);
    t.top = first_centre(fminf(fminf(t.ay, t.by), t.cy), size);
    t.bottom = last_centre(fmaxf(fmaxf(t.ay, t.by), t.cy), size);
    return t.left <= t.right && t.top <= t.bottom;
}

// Barycentric weights of a pixel's centre, and the depth there; whether it is in the triangle.
DEVICE bool cover(const Triangle& t, int column, int row, float* weights, float& depth) {
    const float x = column + 0.5f, y = row + 0.5f;
    const float b = times(times(x - t.ax, t.cy - t.ay) - times(y - t.ay, t.cx - t.ax), t.inverse);
    const float c = times(times(t.bx - t.ax, y - t.ay) - times(t.by - t.ay, x - t.ax), t.inverse);
    const float a = 1.0f - b - c;
    weights[0] = a, weights[1] = b, weights[2] = c;
    depth = times(a, t.depth[0]) + times(b, t.depth[1]) + times(c, t.depth[2]);
    return !(a < -1e-6f || b < -1e-6f || c < -1e-6f) && depth < INFINITY;
}

DEVICE void draw_pixel(const Triangle& t, int face, int column, int row, int size, Winner* winners) {
    float weights[3], depth;
    if (!cover(t, column, row, weights, depth)) return;
    Winner* winner = winners + (long long)row * size + column;
    const Winner own = winner_of(depth, face);
    if (own > *winner) atomicMax(winner, own);
}

// Draws faces (count, 3) into several images at once: points (images, vertices, 3) [column, row, depth] into
// winners (images, size, size), zero at first.  Lists the large ones, image * count + face, in any order.
KERNEL draw_faces(
    const float* HOT points, int vertices, const int* HOT faces, int count, int images, int size, Winner* winners,
    int* large, int* large_count
) {
    for (int n = thread_index(); n < images * count; n += thread_count()) {
        const long long image = n / count;
        const int face = n % count;
        Triangle t;
        if (!triangle_of(points + 3 * image * vertices, faces + 3 * face, size, t)) continue;
        if ((long long)(t.right - t.left + 1) * (t.bottom - t.top + 1) > SMALL_BOX) {
            large[atomicAdd(large_count, 1)] = n;
            continue;
        }
        Winner* own = winners + image * size * size;
        for (int row = t.top; row <= t.bottom; ++row)
            for (int column = t.left; column <= t.right; ++column) draw_pixel(t, face, column, row, size, own);
    }
}

// Draws the faces that `draw_faces` listed, every STRIPES-th row of one in a block.
KERNEL draw_large_faces(
    const float* HOT points, int vertices, const int* HOT faces, int count, int size, const int* HOT large,
    const int* large_count, Winner* winners
) {
    const long long stripes = (long long)*large_count * STRIPES;
    for (long long stripe = blockIdx.x; stripe < stripes; stripe += gridDim.x) {
        const int n = large[stripe / STRIPES], face = n % count;
        const long long image = n / count;
        Triangle t;
        if (!triangle_of(points + 3 * image * vertices, faces + 3 * face, size, t)) continue;
        Winner* own = winners + image * size * size;
        for (int row = t.top + (int)(stripe % STRIPES); row <= t.bottom; row += STRIPES)
            for (int column = t.left + threadIdx.x; column <= t.right; column += blockDim.x)
                draw_pixel(t, face, column, row, size, own);
    }
}

// What the winners say of every pixel: face or -1, barycentric weights (size, size, 3), depth or infinity.
KERNEL resolve_pixels(
    const float* HOT points, const int* HOT faces, const Winner* HOT winners, int size, int* face_id, float* weights,
    float* depth
) {
    for (int n = thread_index(); n < size * size; n += thread_count()) {
        const int face = winning_face(winners[n]);
        float found[3] = {0.0f, 0.0f, 0.0f}, d = INFINITY;
        Triangle t;
        if (face >= 0 && triangle_of(points, faces + 3 * face, size, t)) cover(t, n % size, n / size, found, d);
        face_id[n] = face;
        depth[n] = d;
        for (int corner = 0; corner < 3; ++corner) weights[3 * n + corner] = found[corner];
    }
}
