"""Unbiased SDF volume rendering (NeuS) on a grid: the op and its gradient.

Both kernels are plain functions of arrays in grid units (one node spacing = 1) and work in float32 or
float64.  They are parallel over horizontal slabs and give the same bits for any number of threads.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

Array = NDArray[np.floating]
IntArray = NDArray[np.int32]

MAX_SAMPLES = 256
"""Samples that one ray may hold; at steps of 0.6 a ray through 128 nodes needs 256 only if it never
leaves the band around the surface."""


@njit(cache=True, fastmath=True, forceinline=True)  # type: ignore[untyped-decorator]
def _march(sdf, j, wy, x0, z0, dx, dz, length, offset, step, band, cutoff, inv_s, t_of, f_of, alpha_of):  # type: ignore[no-untyped-def]
    """Samples and opacities along one ray; empty space beyond `band` is skipped.

    Sample k lies at `t_of[k]` with distance `f_of[k]`; `alpha_of[k]` is the opacity of the segment
    from sample k to k + 1, or -1 where a skip lies between them.  Returns the number of samples.
    """
    last = sdf.shape[2] - 2
    n = 0
    k = 0
    count = int((length - offset * step) / step)
    transmittance = 1.0
    before = -2  # index on the ray's lattice of the last sample kept
    phi_before = 1.0
    while k <= count:
        t = (k + offset) * step
        x = x0 + t * dx
        z = z0 + t * dz
        i = min(max(int(x), 0), last)
        h = min(max(int(z), 0), last)
        wx = x - i
        wz = z - h
        low = (sdf[j, h, i] * (1 - wx) + sdf[j, h, i + 1] * wx) * (1 - wz) + (
            sdf[j, h + 1, i] * (1 - wx) + sdf[j, h + 1, i + 1] * wx
        ) * wz
        high = (sdf[j + 1, h, i] * (1 - wx) + sdf[j + 1, h, i + 1] * wx) * (1 - wz) + (
            sdf[j + 1, h + 1, i] * (1 - wx) + sdf[j + 1, h + 1, i + 1] * wx
        ) * wz
        f = low * (1 - wy) + high * wy
        if f > band:
            k += max(1, int((f - band) * 0.8 / step))
            continue
        phi = 1.0 / (1.0 + math.exp(-min(max(inv_s * f, -40.0), 40.0)))
        if before == k - 1:
            # NeuS Eq. 13: alpha = max((Phi(f_i) - Phi(f_i+1)) / Phi(f_i), 0)
            alpha = max(1.0 - phi / phi_before, 0.0)
            alpha_of[n - 1] = alpha
            transmittance *= 1.0 - alpha
        elif n > 0:
            alpha_of[n - 1] = -1.0
        t_of[n] = t
        f_of[n] = f
        alpha_of[n] = -1.0
        n += 1
        if transmittance < cutoff or n == t_of.shape[0]:
            break
        before = k
        phi_before = phi
        k += 1
    return n


@njit(cache=True, forceinline=True)  # type: ignore[untyped-decorator]
def _spread(slot, count):  # type: ignore[no-untyped-def]
    """A permutation of 0 .. count - 1 that deals the busy middle slabs out to all threads."""
    return (slot * 29) % count if count % 29 != 0 else slot


@njit(cache=True, fastmath=True, forceinline=True)  # type: ignore[untyped-decorator]
def _render_slab(  # type: ignore[no-untyped-def]
    j, sdf, color, inv_s, start, weight_y, entry, direction, length, offset, step, band, cutoff, out
):
    """`render_rays` for the rays of slab j."""
    last = sdf.shape[2] - 2
    t_of = np.empty(MAX_SAMPLES, np.float64)
    f_of = np.empty(MAX_SAMPLES, np.float64)
    alpha_of = np.empty(MAX_SAMPLES, np.float64)
    for ray in range(start[j], start[j + 1]):
        wy = weight_y[ray]
        x0, z0 = entry[ray, 0], entry[ray, 1]
        dx, dz = direction[ray, 0], direction[ray, 1]
        n = _march(
            sdf,
            j,
            wy,
            x0,
            z0,
            dx,
            dz,
            length[ray],
            offset[ray],
            step,
            band,
            cutoff,
            inv_s,
            t_of,
            f_of,
            alpha_of,
        )
        cr = cg = cb = nx = ny = nz = opacity = 0.0
        transmittance = 1.0
        w_before = 0.0
        for k in range(n):
            w = 0.0
            if alpha_of[k] > 0.0:
                w = transmittance * alpha_of[k]
                transmittance *= 1.0 - alpha_of[k]
            # A segment's colour and gradient are the mean of its two ends, so a sample counts
            # with half of each neighbouring segment's weight.
            share = 0.5 * (w_before + w)
            w_before = w
            opacity += w
            if share <= 0.0:
                continue
            x = x0 + t_of[k] * dx
            z = z0 + t_of[k] * dz
            i = min(max(int(x), 0), last)
            h = min(max(int(z), 0), last)
            wx = x - i
            wz = z - h
            a000, a001 = sdf[j, h, i], sdf[j, h, i + 1]
            a010, a011 = sdf[j, h + 1, i], sdf[j, h + 1, i + 1]
            a100, a101 = sdf[j + 1, h, i], sdf[j + 1, h, i + 1]
            a110, a111 = sdf[j + 1, h + 1, i], sdf[j + 1, h + 1, i + 1]
            nx += share * (
                ((a001 - a000) * (1 - wz) + (a011 - a010) * wz) * (1 - wy)
                + ((a101 - a100) * (1 - wz) + (a111 - a110) * wz) * wy
            )
            nz += share * (
                ((a010 - a000) * (1 - wx) + (a011 - a001) * wx) * (1 - wy)
                + ((a110 - a100) * (1 - wx) + (a111 - a101) * wx) * wy
            )
            ny += share * (
                ((a100 - a000) * (1 - wx) + (a101 - a001) * wx) * (1 - wz)
                + ((a110 - a010) * (1 - wx) + (a111 - a011) * wx) * wz
            )
            for corner in range(8):
                y_, z_, x_ = corner >> 2, (corner >> 1) & 1, corner & 1
                w_corner = share
                w_corner *= wy if y_ else 1 - wy
                w_corner *= wz if z_ else 1 - wz
                w_corner *= wx if x_ else 1 - wx
                cr += w_corner * color[j + y_, h + z_, i + x_, 0]
                cg += w_corner * color[j + y_, h + z_, i + x_, 1]
                cb += w_corner * color[j + y_, h + z_, i + x_, 2]
        out[ray, 0] = cr + 1.0 - opacity  # over the white background
        out[ray, 1] = cg + 1.0 - opacity
        out[ray, 2] = cb + 1.0 - opacity
        out[ray, 3] = nx
        out[ray, 4] = ny
        out[ray, 5] = nz
        out[ray, 6] = opacity


@njit(cache=True, fastmath=True, parallel=True)  # type: ignore[untyped-decorator]
def render_rays(
    sdf: Array,
    color: Array,
    inv_s: float,
    start: IntArray,
    weight_y: Array,
    entry: Array,
    direction: Array,
    length: Array,
    offset: Array,
    step: float,
    band: float,
    cutoff: float,
    out: Array,
) -> None:
    """Render rays (see `Rays`) through the field.

    Args:
        sdf: (R, R, R) [y, z, x] in node spacings.
        color: (R, R, R, 3).
        inv_s: learned inverse deviation of the logistic density, per node spacing.
        start: (R,) first ray of each slab.
        weight_y: (N,), and so on: the rays.
        entry: (N, 2).
        direction: (N, 2).
        length: (N,).
        offset: (N,) jitter of the first sample in [0, 1) steps.
        step: sample distance, node spacings.
        band: distances above this are empty space, skipped.
        cutoff: a ray ends when less light than this remains.
        out: (N, 7) receives colour over white (3), sum of weights times SDF gradient in world axes
            x, y, z, not normalised (3), and opacity (1).
    """
    slabs = sdf.shape[0] - 1
    for slot in prange(slabs):
        j = _spread(np.int64(slot), slabs)
        _render_slab(
            j, sdf, color, inv_s, start, weight_y, entry, direction, length, offset, step, band, cutoff, out
        )


@njit(cache=True, fastmath=True, forceinline=True)  # type: ignore[untyped-decorator]
def _backward_slab(  # type: ignore[no-untyped-def]
    j, sdf, color, inv_s, start, weight_y, entry, direction, length, offset, step, band, cutoff,
    d_out, d_sdf, d_color, d_inv_s,
):  # fmt: skip
    """`render_rays_backward` for the rays of slab j."""
    last = sdf.shape[2] - 2
    t_of = np.empty(MAX_SAMPLES, np.float64)
    f_of = np.empty(MAX_SAMPLES, np.float64)
    alpha_of = np.empty(MAX_SAMPLES, np.float64)
    value = np.empty(MAX_SAMPLES, np.float64)  # d loss / d weight of a sample's colour and gradient
    light = np.empty(MAX_SAMPLES, np.float64)  # transmittance before segment k
    total_inv_s = 0.0
    for ray in range(start[j], start[j + 1]):
        g_r, g_g, g_b = d_out[ray, 0], d_out[ray, 1], d_out[ray, 2]
        g_x, g_y, g_z = d_out[ray, 3], d_out[ray, 4], d_out[ray, 5]
        g_o = d_out[ray, 6] - (g_r + g_g + g_b)  # the white background behind
        wy = weight_y[ray]
        x0, z0 = entry[ray, 0], entry[ray, 1]
        dx, dz = direction[ray, 0], direction[ray, 1]
        n = _march(
            sdf, j, wy, x0, z0, dx, dz, length[ray], offset[ray], step, band, cutoff, inv_s,
            t_of, f_of, alpha_of,
        )  # fmt: skip
        transmittance = 1.0
        w_before = 0.0
        for k in range(n):
            light[k] = transmittance
            w = 0.0
            if alpha_of[k] > 0.0:
                w = transmittance * alpha_of[k]
                transmittance *= 1.0 - alpha_of[k]
            share = 0.5 * (w_before + w)
            # A sample without weight still needs its value if a neighbouring segment may gain some.
            w_before = w
            x = x0 + t_of[k] * dx
            z = z0 + t_of[k] * dz
            i = min(max(int(x), 0), last)
            h = min(max(int(z), 0), last)
            wx = x - i
            wz = z - h
            v = g_o
            for corner in range(8):
                y_, z_, x_ = corner >> 2, (corner >> 1) & 1, corner & 1
                by = wy if y_ else 1 - wy
                bz = wz if z_ else 1 - wz
                bx = wx if x_ else 1 - wx
                b = by * bz * bx
                slope = (
                    g_x * by * bz * (2 * x_ - 1) + g_y * bz * bx * (2 * y_ - 1) + g_z * by * bx * (2 * z_ - 1)
                )
                y_, z_, x_ = j + y_, h + z_, i + x_
                v += slope * sdf[y_, z_, x_]
                v += b * (
                    g_r * color[y_, z_, x_, 0] + g_g * color[y_, z_, x_, 1] + g_b * color[y_, z_, x_, 2]
                )
                if share > 0.0:
                    d_sdf[y_, z_, x_] += share * slope
                    d_color[y_, z_, x_, 0] += share * b * g_r
                    d_color[y_, z_, x_, 1] += share * b * g_g
                    d_color[y_, z_, x_, 2] += share * b * g_b
            value[k] = v
        # Back to front: `behind` is the loss gradient of the light that leaves a segment.
        behind = 0.0
        carried = 0.0  # d loss / d f of the sample ahead, from the segment already visited
        for k in range(n - 1, -1, -1):
            d_f = carried
            carried = 0.0
            if k > 0 and alpha_of[k - 1] >= 0.0:
                alpha = alpha_of[k - 1]
                mean = 0.5 * (value[k - 1] + value[k])
                d_alpha = light[k - 1] * (mean - behind)
                behind = alpha * mean + (1.0 - alpha) * behind
                if alpha > 0.0:
                    phi = 1.0 / (1.0 + math.exp(-min(max(inv_s * f_of[k], -40.0), 40.0)))
                    phi_before = 1.0 / (1.0 + math.exp(-min(max(inv_s * f_of[k - 1], -40.0), 40.0)))
                    ratio = phi / phi_before
                    d_f -= d_alpha * inv_s * (1.0 - phi) * ratio
                    carried = d_alpha * inv_s * (1.0 - phi_before) * ratio
                    total_inv_s += (
                        d_alpha * ratio * (f_of[k - 1] * (1.0 - phi_before) - f_of[k] * (1.0 - phi))
                    )
            if d_f != 0.0:
                x = x0 + t_of[k] * dx
                z = z0 + t_of[k] * dz
                i = min(max(int(x), 0), last)
                h = min(max(int(z), 0), last)
                wx = x - i
                wz = z - h
                d_sdf[j, h, i] += d_f * (1 - wy) * (1 - wz) * (1 - wx)
                d_sdf[j, h, i + 1] += d_f * (1 - wy) * (1 - wz) * wx
                d_sdf[j, h + 1, i] += d_f * (1 - wy) * wz * (1 - wx)
                d_sdf[j, h + 1, i + 1] += d_f * (1 - wy) * wz * wx
                d_sdf[j + 1, h, i] += d_f * wy * (1 - wz) * (1 - wx)
                d_sdf[j + 1, h, i + 1] += d_f * wy * (1 - wz) * wx
                d_sdf[j + 1, h + 1, i] += d_f * wy * wz * (1 - wx)
                d_sdf[j + 1, h + 1, i + 1] += d_f * wy * wz * wx
    d_inv_s[j] = total_inv_s


@njit(cache=True, fastmath=True, parallel=True)  # type: ignore[untyped-decorator]
def render_rays_backward(
    sdf: Array,
    color: Array,
    inv_s: float,
    start: IntArray,
    weight_y: Array,
    entry: Array,
    direction: Array,
    length: Array,
    offset: Array,
    step: float,
    band: float,
    cutoff: float,
    d_out: Array,
    d_sdf: Array,
    d_color: Array,
    d_inv_s: Array,
) -> None:
    """Gradient of `render_rays`; the arguments up to `cutoff` are the same.

    Args:
        d_out: (N, 7) gradient of the loss with respect to `out`.
        d_sdf: (R, R, R), added to.
        d_color: (R, R, R, 3), added to.
        d_inv_s: (R - 1,) gradient with respect to `inv_s`, one entry a slab, overwritten; sum them.
    """
    slabs = sdf.shape[0] - 1
    for parity in range(2):  # slabs of one parity share no node: no two threads write the same place
        members = (slabs + 1 - parity) // 2
        for slot in prange(members):
            j = 2 * _spread(np.int64(slot), members) + parity
            _backward_slab(
                j, sdf, color, inv_s, start, weight_y, entry, direction, length, offset, step, band, cutoff,
                d_out, d_sdf, d_color, d_inv_s,
            )  # fmt: skip
