"""What the rays of one launch of the fit's kernel do, followed one by one on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class RayCounts:
    """What the rays of one launch of `fit_rays` do."""

    rays: int
    crossing: int  # the grid
    lookups: int  # of the distance, in each of the two passes
    samples: int  # kept, in each of the two passes: those within the band
    joined: int  # to the sample before
    opaque: int  # segments that let less light through
    blended: int  # samples with a weight
    met: int  # rays whose normal is compared
    unsettled: int  # rays whose opacity is not the silhouette's


@njit(cache=True)
def _count_rays(  # type: ignore[no-untyped-def]
    sdf, origin, direction, start, stride, key, inv_s, band, step, cutoff, most, seen, blended_at
):
    """Twin of the marches of `fit_rays`: marks the nodes that are looked up, and those that count.

    Returns crossing, lookups, samples, joined, opaque, blended, and the opacity of each ray (NaN: it misses).
    """
    one = np.float32(1.0)
    r = sdf.shape[0]
    half, last = np.float32(0.5 * r), np.float32(r - 1)
    opacity = np.full(origin.shape[0], np.nan, np.float32)
    crossing = lookups = samples = joined = opaque = blended = 0
    for n in range(start, origin.shape[0], stride):
        height = (origin[n, 1] + one) * half - np.float32(0.5)
        if not (height >= 0 and height < last):
            continue
        enter, leave, inside = np.float32(-np.inf), np.float32(np.inf), True
        x0 = (origin[n, 0] + one) * half - np.float32(0.5)
        z0 = (origin[n, 2] + one) * half - np.float32(0.5)
        for axis in range(2):
            at, d = (x0, direction[n, 0]) if axis == 0 else (z0, direction[n, 1])
            if abs(d) < np.float32(1e-6):
                inside = inside and at >= 0 and at <= last
                continue
            a, b = -at / d, (last - at) / d
            enter, leave = max(enter, min(a, b)), min(leave, max(a, b))
        if not inside or not leave > enter:
            continue
        crossing += 1
        j = int(height)
        wy = height - np.float32(j)
        x0, z0 = x0 + enter * direction[n, 0], z0 + enter * direction[n, 1]
        offset = _jitter(key, n)
        count = int((leave - enter - offset * step) / step)
        k, kept, before = 0, 0, -2
        light, w_before, phi_before = one, np.float32(0.0), one
        low_before = 0
        summed = np.float32(0.0)
        while k <= count and kept < most and light >= cutoff:
            t = (np.float32(k) + offset) * step
            x, z = x0 + t * direction[n, 0], z0 + t * direction[n, 1]
            i, h = min(max(int(x), 0), r - 2), min(max(int(z), 0), r - 2)
            wx, wz = x - np.float32(i), z - np.float32(h)
            f = np.float32(0.0)
            for corner in range(8):
                y_, z_, x_ = corner >> 2, corner >> 1 & 1, corner & 1
                weight = (wy if y_ else one - wy) * (wz if z_ else one - wz) * (wx if x_ else one - wx)
                f += weight * sdf[j + y_, h + z_, i + x_]
                seen[j + y_, h + z_, i + x_] = True
            lookups += 1
            if f > band:
                k += max(1, int((f - band) * np.float32(0.8) / step))
                continue
            phi = one / (one + np.exp(-min(max(inv_s * f, np.float32(-40.0)), np.float32(40.0))))
            w = np.float32(0.0)
            if before == k - 1:
                joined += 1
                alpha = one - phi / phi_before
                if alpha > 0:
                    opaque += 1
                    w = light * alpha
                    light *= one - alpha
            if kept > 0 and w_before + w > 0:
                blended += 1
                _mark(blended_at, low_before, r)
            summed += w
            w_before, phi_before, before, low_before = w, phi, k, (j * r + h) * r + i
            kept += 1
            k += 1
        if w_before > 0:
            blended += 1
            _mark(blended_at, low_before, r)
        samples += kept
        opacity[n] = summed
    return crossing, lookups, samples, joined, opaque, blended, opacity


@njit(cache=True)
def _jitter(key, n):  # type: ignore[no-untyped-def]
    mask = np.uint64(0xFFFFFFFF)
    x = np.uint64(n)
    for turn in range(2):
        x ^= x >> np.uint64(16)
        x = (x * np.uint64(0x7FEB352D)) & mask
        x ^= x >> np.uint64(15)
        x = (x * np.uint64(0x846CA68B)) & mask
        x ^= x >> np.uint64(16)
        if turn == 0:
            x ^= np.uint64(key)
    return np.float32(x >> np.uint64(8)) * np.float32(1.0 / 16777216.0)


@njit(cache=True)
def _mark(nodes, low, r):  # type: ignore[no-untyped-def]
    y, z, x = low // (r * r), low // r % r, low % r
    nodes[y : y + 2, z : z + 2, x : x + 2] = True


def count_rays(
    sdf: FloatArray,
    pixels: Sequence[FloatArray],
    start: int,
    stride: int,
    key: int,
    inv_s: float,
    band: float,
    step: float,
    cutoff: float,
) -> tuple[RayCounts, BoolArray, BoolArray]:
    """What one launch of `fit_rays` does.

    Args:
        sdf: (R, R, R) in node spacings.
        pixels: origin (P, 3), direction (P, 2), colour (P, 3), normal (P, 3) and mask (P,).
        start: first pixel of the launch.
        stride: from one to the next.
        key: that their jitter is drawn from.
        inv_s: inverse deviation per node spacing.
        band: distances above are skipped.
        step: sample distance, node spacings.
        cutoff: a ray ends when less light is left.

    Returns:
        The counts, and which nodes (R, R, R) are looked up and which have a share in a ray.
    """
    from uc3d_rt.neus.render import MAX_SAMPLES

    origin, direction, _, normal, mask = pixels
    seen, blended_at = np.zeros(sdf.shape, bool), np.zeros(sdf.shape, bool)
    floats = (np.float32(value) for value in (inv_s, band, step, cutoff))
    *counts, opacity = _count_rays(
        sdf, origin, direction, start, stride, key, *floats, MAX_SAMPLES, seen, blended_at
    )
    met = (mask > 0.5) & (opacity > 0.3) & (normal != 0).any(axis=1)
    unsettled = np.abs(opacity - mask) > 0.02  # not where a ray misses: NaN
    rays = len(range(start, len(mask), stride))
    found = RayCounts(rays, *(int(count) for count in counts), int(met.sum()), int(unsettled.sum()))
    return found, seen, blended_at
