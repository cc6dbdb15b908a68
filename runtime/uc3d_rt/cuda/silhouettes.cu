// What the fit takes from the views: unit normals, silhouettes, distances to their outlines, and the pixels
// whose rays are looked at.  Twins of ../neus/fit.py (check_views), ../neus/hull.py and ../neus/rays.py.
#include "grid.cuh"

#define BLUR_REACH 3

// Unit normals (pixels, 3), zero where there is no object, and silhouettes (pixels,).  Adds to `found` how many
// pixels show the object, and how many hold a value that is not finite.
KERNEL unit_normals(
    const float* HOT color, const float* HOT normal, int pixels, float* unit, unsigned char* mask, int* found
) {
    for (int n = thread_index(); n < pixels; n += thread_count()) {
        float square = 0.0f, finite = 0.0f;
        for (int c = 0; c < 3; ++c) {
            const float value = normal[3 * n + c];
            square += value * value;
            finite += 0.0f * value + 0.0f * color[3 * n + c];
        }
        const float length = sqrtf(square);
        mask[n] = length > 0.5f;
        for (int c = 0; c < 3; ++c) unit[3 * n + c] = mask[n] ? normal[3 * n + c] / length : 0.0f;
        if (mask[n]) atomicAdd(found, 1);
        if (!(finite == 0.0f)) atomicAdd(found + 1, 1);
    }
}

// Pixels along its row from every pixel to the next that the silhouette holds [1] and does not hold [0]:
// (views, size, size, 2), `size` where there is none.
KERNEL row_distances(const unsigned char* HOT mask, int views, int size, short* out) {
    for (int n = thread_index(); n < views * size * size; n += thread_count()) {
        const int x = n % size, own = mask[n];
        int away = 1;
        while (away < size && !(x - away >= 0 && mask[n - away] != own) && !(x + away < size && mask[n + away] != own))
            ++away;
        out[2 * n + own] = 0;
        out[2 * n + 1 - own] = (short)away;
    }
}

// Signed distance (views, size, size) in pixels to the outline, between the centres of pixels on either side of
// it, negative inside, `size` where a view shows nothing; and which pixels are at most `margin` from the object.
KERNEL outline_distances(
    const unsigned char* HOT mask, const short* HOT rows, int views, int size, float margin, float* distance,
    unsigned char* near
) {
    const int none = size * size;  // of a row without such a pixel: no true distance is as large
    for (int n = thread_index(); n < views * size * size; n += thread_count()) {
        const int y = n / size % size, other = 1 - mask[n];
        int square = 4 * none;
        for (int away = 0; away < size && away * away < square; ++away) {
            for (int way = away ? -1 : 1; way <= 1; way += 2) {
                if (y + way * away < 0 || y + way * away >= size) continue;
                const int along = rows[2 * (n + way * away * size) + other];
                if (along < size) square = min(square, along * along + away * away);
            }
        }
        const bool met = square < 4 * none;
        const float length = met ? sqrtf((float)square) : (float)size + 0.5f;
        distance[n] = mask[n] ? 0.5f - length : length - 0.5f;
        near[n] = mask[n] || (met && length <= margin);
    }
}

// A Gaussian blur of images (images, size, size) along one axis, mirrored at their edges: `weights` of the
// pixel itself and those up to BLUR_REACH away.
KERNEL blur(
    const float* HOT values, int images, int size, int along_rows, float w0, float w1, float w2, float w3, float* out
) {
    const float weights[BLUR_REACH + 1] = {w0, w1, w2, w3};
    const int step = along_rows ? 1 : size;
    for (int n = thread_index(); n < images * size * size; n += thread_count()) {
        const int at = along_rows ? n % size : n / size % size;
        float sum = weights[0] * values[n];
        for (int away = 1; away <= BLUR_REACH; ++away) {
            int low = at - away, high = at + away;
            if (low < 0) low = -1 - low;
            if (high >= size) high = 2 * size - 1 - high;
            sum += weights[away] * (values[n + (low - at) * step] + values[n + (high - at) * step]);
        }
        out[n] = sum;
    }
}

// Distances (pairs, size, size) of views that look along the same lines from both sides: their mean, and that
// to the union of the two silhouettes.
KERNEL merge_opposite(const float* HOT distance, int pairs, int size, float* mean, float* joined) {
    for (int n = thread_index(); n < pairs * size * size; n += thread_count()) {
        const int x = n % size;
        const float a = distance[n], b = distance[n + pairs * size * size + size - 1 - 2 * x];
        mean[n] = 0.5f * (a + b);
        joined[n] = fminf(a, b);
    }
}

// Pixel of the views of which a list bottom row first, and view after view in each row, has number n.
DEVICE int listed_pixel(int n, int views, int size) {
    const int x = n % size, view = n / size % views, row = size - 1 - n / (size * views);
    return (view * size + row) * size + x;
}

// 1 for each pixel of that list which is near the object.
KERNEL count_near(const unsigned char* HOT near, int views, int size, int* counts) {
    for (int n = thread_index(); n < views * size * size; n += thread_count())
        counts[n] = near[listed_pixel(n, views, size)] != 0;
}

// The rays of those pixels and what they show, each where `place` says: `axes` (views, 3, 3) are right, up and
// back of the cameras, which look along horizontal lines.
KERNEL gather_pixels(
    const unsigned char* HOT near, const int* HOT place, const float* HOT color, const float* HOT normal,
    const unsigned char* HOT mask, const float* HOT axes, int views, int size, float* origin, float* direction,
    float* target_color, float* target_normal, float* target_mask
) {
    for (int n = thread_index(); n < views * size * size; n += thread_count()) {
        const int pixel = listed_pixel(n, views, size);
        if (!near[pixel]) continue;
        const int to = place[n], row = pixel / size % size;
        const float* axis = axes + 9 * (pixel / (size * size));
        const float u = (pixel % size + 0.5f) / size * 2.0f - 1.0f, v = 1.0f - (row + 0.5f) / size * 2.0f;
        for (int c = 0; c < 3; ++c) {
            origin[3 * to + c] = u * axis[c] + v * axis[3 + c];
            target_color[3 * to + c] = color[3 * pixel + c];
            target_normal[3 * to + c] = normal[3 * pixel + c];
        }
        direction[2 * to] = -axis[6];
        direction[2 * to + 1] = -axis[8];
        target_mask[to] = mask[pixel];
    }
}
