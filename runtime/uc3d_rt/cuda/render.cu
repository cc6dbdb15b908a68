// NeuS rendering, its gradient, and the losses of a ray: twins of ../neus/render.py, ../neus/losses.py.
//
// A ray is eight threads (RAY_LANES), one a corner of its cells.  Nothing is stored along it: the gradient goes
// front to back a second time, and takes what lies behind a segment as the whole sum, which the first pass
// knows, less what came before.
#include "rays.cuh"

#define MAX_SAMPLES 256
#define MIN_OPACITY 0.3f  // of a ray whose normal is compared; one through empty space has none

struct March {
    float inv_s, step, band, cutoff;
};

struct Sample {
    Cell cell;
    float f, phi;
    bool joined;  // to the sample before, without a skip between
};

struct Marcher {
    int k, count, before, n;
};

DEVICE Marcher marcher_of(const Ray& ray, float step) {
    Marcher m;
    m.k = 0;
    m.count = (int)((ray.length - ray.offset * step) / step);
    m.before = -2;
    m.n = 0;
    return m;
}

// The next sample within the band around the surface; false at the end of the ray.
DEVICE bool next_sample(const float* HOT sdf, int r, const Ray& ray, const March& how, Marcher& m, Sample& s) {
    while (m.k <= m.count) {
        s.cell = cell_at(ray, r, (m.k + ray.offset) * how.step);
        s.f = distance_over_lanes(sdf, ray, r, s.cell);
        if (s.f > how.band) {
            m.k += max(1, (int)((s.f - how.band) * 0.8f / how.step));
            continue;
        }
        s.phi = 1.0f / (1.0f + expf(-clampf(how.inv_s * s.f, -40.0f, 40.0f)));
        s.joined = m.before == m.k - 1;
        m.before = m.k;
        m.k += 1;
        m.n += 1;
        return true;
    }
    return false;
}

// Opacity of the segment from a to b (NeuS Eq. 13), -1 where a skip lies between.
DEVICE float alpha_of(const Sample& a, const Sample& b) { return b.joined ? fmaxf(1.0f - b.phi / a.phi, 0.0f) : -1.0f; }

// Sum of colour (3), SDF gradient x, y, z (3) and weight (1) along a ray; no background.
DEVICE void render_ray(
    const float* HOT sdf, const float* HOT color, int r, const Ray& ray, const March& how, float sum[7]
) {
    for (int c = 0; c < 7; ++c) sum[c] = 0.0f;
    Marcher m = marcher_of(ray, how.step);
    Sample a, b;
    float light = 1.0f, w_before = 0.0f;
    bool more = next_sample(sdf, r, ray, how, m, a);
    while (more) {
        more = light >= how.cutoff && m.n < MAX_SAMPLES && next_sample(sdf, r, ray, how, m, b);
        float w = 0.0f;
        if (more) {
            const float alpha = alpha_of(a, b);
            if (alpha > 0.0f) {
                w = light * alpha;
                light *= 1.0f - alpha;
            }
        }
        // A segment's colour and gradient are the mean of its two ends.
        const float share = 0.5f * (w_before + w);
        w_before = w;
        sum[6] += w;
        if (share > 0.0f) {
            CORNERS_OF_LANE(corner) {
                float slope[3];
                const float weight = share * corner_weight(ray, a.cell, corner, slope);
                const int node = corner_node(a.cell, r, corner);
                const float f = share * sdf[node];
                for (int c = 0; c < 3; ++c) {
                    sum[c] += weight * color[3 * node + c];
                    sum[3 + c] += slope[c] * f;
                }
            }
        }
        a = b;
    }
    for (int c = 0; c < 6; ++c) sum[c] = over_lanes(sum[c]);
}

// Gradient of one ray's loss: `d_out` (7) as of `out`, `sum` as of `render_ray`.  Returns that of inv_s.
DEVICE float render_ray_backward(
    const float* HOT sdf, const float* HOT color, int r, const Ray& ray, const March& how, const float sum[7],
    const float d_out[7], Fixed* d_sdf, Fixed* d_color
) {
    const float g_o = d_out[6] - (d_out[0] + d_out[1] + d_out[2]);  // the white background behind
    float behind = g_o * sum[6];  // what all segments from here on give
    for (int c = 0; c < 6; ++c) behind += d_out[c] * sum[c];
    Marcher m = marcher_of(ray, how.step);
    Sample a, b;
    float light = 1.0f, w_before = 0.0f, d_f = 0.0f, v_a = 0.0f, v_b = 0.0f, d_inv_s = 0.0f;
    bool first = true, more = next_sample(sdf, r, ray, how, m, b);
    // Each turn takes in sample b and lets go of sample a, whose two segments are known then.
    while (true) {
        float w = 0.0f, d_a = 0.0f, d_b = 0.0f;
        if (more) {
            float v = 0.0f;
            CORNERS_OF_LANE(corner) {
                float slope[3];
                const float weight = corner_weight(ray, b.cell, corner, slope);
                const int node = corner_node(b.cell, r, corner);
                v += (d_out[3] * slope[0] + d_out[4] * slope[1] + d_out[5] * slope[2]) * sdf[node];
                for (int c = 0; c < 3; ++c) v += weight * d_out[c] * color[3 * node + c];
            }
            v_b = g_o + over_lanes(v);
            const float alpha = first ? -1.0f : alpha_of(a, b);
            if (alpha > 0.0f) {
                w = light * alpha;
                const float mean = 0.5f * (v_a + v_b), ratio = b.phi / a.phi;
                behind -= w * mean;
                const float d_alpha = light * mean - behind / (1.0f - alpha);
                d_b = -d_alpha * how.inv_s * (1.0f - b.phi) * ratio;
                d_a = d_alpha * how.inv_s * (1.0f - a.phi) * ratio;
                d_inv_s += d_alpha * ratio * (a.f * (1.0f - a.phi) - b.f * (1.0f - b.phi));
                light *= 1.0f - alpha;
            }
        }
        if (!first) {
            const float share = 0.5f * (w_before + w);
            d_f += d_a;
            if (share > 0.0f || d_f != 0.0f) {
                CORNERS_OF_LANE(corner) {
                    float slope[3];
                    const float weight = corner_weight(ray, a.cell, corner, slope);
                    const int node = corner_node(a.cell, r, corner);
                    add_fixed(
                        d_sdf + node,
                        share * (d_out[3] * slope[0] + d_out[4] * slope[1] + d_out[5] * slope[2]) + d_f * weight
                    );
                    if (share > 0.0f)
                        for (int c = 0; c < 3; ++c) add_fixed(d_color + 3 * node + c, share * weight * d_out[c]);
                }
            }
        }
        if (!more) break;
        first = false;
        w_before = w;
        d_f = d_b;
        v_a = v_b;
        a = b;
        more = light >= how.cutoff && m.n < MAX_SAMPLES && next_sample(sdf, r, ray, how, m, b);
    }
    return d_inv_s;
}

DEVICE void over_white(const float sum[7], float out[7]) {
    for (int c = 0; c < 3; ++c) out[c] = sum[c] + 1.0f - sum[6];
    for (int c = 3; c < 7; ++c) out[c] = sum[c];
}

KERNEL render_rays(
    const float* sdf, const float* color, int r, const float* origin, const float* direction, const float* offset,
    int rays, float inv_s, float step, float band, float cutoff, float* out
) {
    const March how = {inv_s, step, band, cutoff};
    for (int n = thread_index() / RAY_LANES; n < rays; n += thread_count() / RAY_LANES) {
        Ray ray;
        float sum[7] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
        if (trace_ray(origin + 3 * n, direction + 2 * n, r, offset[n], ray)) render_ray(sdf, color, r, ray, how, sum);
        if (!ray_lane()) over_white(sum, out + 7 * n);
    }
}

KERNEL render_rays_backward(
    const float* sdf, const float* color, int r, const float* origin, const float* direction, const float* offset,
    int rays, float inv_s, float step, float band, float cutoff, const float* d_out, Fixed* d_sdf, Fixed* d_color,
    Fixed* d_inv_s
) {
    const March how = {inv_s, step, band, cutoff};
    for (int n = thread_index() / RAY_LANES; n < rays; n += thread_count() / RAY_LANES) {
        Ray ray;
        float sum[7];
        if (!trace_ray(origin + 3 * n, direction + 2 * n, r, offset[n], ray)) continue;
        render_ray(sdf, color, r, ray, how, sum);
        const float found = render_ray_backward(sdf, color, r, ray, how, sum, d_out + 7 * n, d_sdf, d_color);
        if (!ray_lane()) add_fixed(d_inv_s, found);
    }
}

// Cosine between a ray's normal, summed and not normalised, and the one shown; `length` is the sum's, or a little.
DEVICE float normal_cosine(const float* summed, const float* normal, float& length) {
    length = fmaxf(sqrtf(summed[0] * summed[0] + summed[1] * summed[1] + summed[2] * summed[2]), 1e-3f);
    return (summed[0] * normal[0] + summed[1] * normal[1] + summed[2] * normal[2]) / length;
}

// Eq. 19-21 and the mask term of one ray: gradient of w_rgb L_rgb + w_normal L_normal + w_mask L_mask.
DEVICE void ray_gradient(
    const float out[7], const float* color, const float* normal, float mask, float w_rgb, float w_normal,
    float w_mask, float scale, float d_out[7]
) {
    for (int c = 0; c < 3; ++c) d_out[c] = scale * w_rgb * 2.0f * (out[c] - color[c]);
    const bool known = normal[0] != 0.0f || normal[1] != 0.0f || normal[2] != 0.0f;
    const bool met = mask > 0.5f && out[6] > MIN_OPACITY;
    const float* summed = out + 3;
    float length;
    const float cosine = normal_cosine(summed, normal, length);
    for (int c = 0; c < 3; ++c)
        d_out[3 + c] =
            known && met ? scale * w_normal * (cosine * summed[c] / length - normal[c]) / length : 0.0f;
    const float safe = clampf(out[6], 0.02f, 0.98f);
    const bool settled = fabsf(out[6] - mask) <= 0.02f;
    d_out[6] = settled ? 0.0f : scale * w_mask * (safe - mask) / (safe * (1.0f - safe));
}

DEVICE unsigned hashed(unsigned x) {  // "lowbias32" of C. Wellons: every bit of x moves half of the bits
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ (x >> 16);
}

DEVICE float jitter(unsigned key, unsigned n) { return (hashed(key ^ hashed(n)) >> 8) * (1.0f / 16777216.0f); }

// One iteration's rays: every `stride`-th pixel, rendered, compared, and differentiated.
KERNEL fit_rays(
    const float* sdf, const float* color, int r, const float* origin, const float* direction,
    const float* target_color, const float* target_normal, const float* target_mask, int pixels, int stride,
    float step, float cutoff, float w_rgb, float w_normal, float w_mask, float scale, const Turn* turns,
    Fixed* d_sdf, Fixed* d_color, Progress* progress
) {
    const March how = {progress->inv_s, step, progress->band, cutoff};
    const Turn turn = turns[progress->iteration];
    const int first = turn.first + stride * (thread_index() / RAY_LANES);
    for (int n = first; n < pixels; n += stride * (thread_count() / RAY_LANES)) {
        Ray ray;
        if (!trace_ray(origin + 3 * n, direction + 2 * n, r, jitter(turn.key, n), ray)) continue;
        float sum[7], out[7], d_out[7];
        render_ray(sdf, color, r, ray, how, sum);
        over_white(sum, out);
        ray_gradient(
            out, target_color + 3 * n, target_normal + 3 * n, target_mask[n], w_rgb, w_normal, w_mask, scale, d_out
        );
        const float d_inv_s = render_ray_backward(sdf, color, r, ray, how, sum, d_out, d_sdf, d_color);
        if (!ray_lane()) add_fixed(&progress->d_inv_s, d_inv_s);
    }
}

// Twin of `fit.view_loss`: sums (4) over all pixels of the normals' loss, the rays that have one, the mask term,
// and the rays.  The rays of a thread add up in it first: all of them share the four addresses.
KERNEL view_loss(
    const float* sdf, const float* color, int r, const float* origin, const float* direction,
    const float* target_normal, const float* target_mask, int pixels, float step, float cutoff,
    const Progress* progress, Fixed* sums
) {
    const March how = {progress->inv_s, step, progress->band, cutoff};
    Fixed own[4] = {0, 0, 0, 0};
    for (int n = thread_index() / RAY_LANES; n < pixels; n += thread_count() / RAY_LANES) {
        Ray ray;
        if (!trace_ray(origin + 3 * n, direction + 2 * n, r, 0.5f, ray)) continue;
        float sum[7], length;
        render_ray(sdf, color, r, ray, how, sum);
        const float mask = target_mask[n], safe = clampf(sum[6], 0.02f, 0.98f);
        if (mask > 0.5f && sum[6] > MIN_OPACITY) {
            const float* normal = target_normal + 3 * n;
            const bool known = normal[0] != 0.0f || normal[1] != 0.0f || normal[2] != 0.0f;
            if (known) own[0] += to_fixed(1.0f - normal_cosine(sum + 3, normal, length));
            own[1] += to_fixed(1.0f);
        }
        own[2] += to_fixed(-(mask * logf(safe) + (1.0f - mask) * logf(1.0f - safe)));
        own[3] += to_fixed(1.0f);
    }
    if (!ray_lane())
        for (int k = 0; k < 4; ++k) atomicAdd((unsigned long long*)(sums + k), (unsigned long long)own[k]);
}
