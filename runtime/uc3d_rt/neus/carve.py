"""Carve the visual hull towards the normal maps on a coarse grid, by solving for whole walls at once.

The hull of six views is a hexagon where the object has a flat wall.  Descent along the rendering loss
flattens such a wall from its rim inwards, a node or so an iteration, and stays in stair-steps that look
right nearly everywhere; the linear system of the same misfit moves all of the wall in one step.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from uc3d_rt.neus.field import near_nodes
from uc3d_rt.neus.rays import Pixels, Rays, trace_rays
from uc3d_rt.neus.redistance import restore_distance
from uc3d_rt.neus.shared import (
    BAND,
    COVER_DEPTH,
    COVER_WEIGHT,
    ENOUGH_PIXELS,
    LARGEST_MOVE,
    SOLVER_STEPS,
    SOLVER_TOLERANCE,
    STAY,
    UNSEEN_WEIGHT,
)

FloatArray = NDArray[np.float32]
DoubleArray = NDArray[np.float64]
IndexArray = NDArray[np.int64]


def carve(hull: FloatArray, pixels: Pixels, size_px: int, steps: int) -> FloatArray:
    """The hull's field moved so that its gradient follows the normals that the views show.

    Each step looks up which normals the views show on the present surface, carries them to the nodes
    nearby, and minimises the sum over grid edges of `(difference of f - normal along the edge)²`, plus
    a weak pull to the present values and a pull that keeps the silhouettes covered (Gauss-Newton on
    Eq. 20).  Views that disagree are averaged.  Parts thinner than the grid resolves stay as they are.

    Args:
        hull: (R, R, R) distance in node spacings; the result is nowhere below it.
        pixels: as from `select_pixels`.
        size_px: H, side of the views.
        steps: how often to look up and solve.

    Returns:
        (R, R, R) distance in node spacings.
    """
    from scipy.ndimage import maximum_filter

    sdf = hull.copy()
    inside = np.flatnonzero(pixels.mask > 0.5)
    rays, crosses = trace_rays(pixels, inside, hull.shape[0])
    shown = pixels.normal[inside[crosses]]
    # A pixel that the coarse hull itself does not meet cannot be covered here.
    covered = _follow(hull, rays)[1] < -COVER_DEPTH
    pixels_per_node = (size_px / hull.shape[0]) ** 2
    for _ in range(steps):
        hit, lowest, lowest_at = _follow(sdf, rays)
        seen = hit >= 0
        normals = _splat_normals(_points(rays, hit, seen), shown[seen], rays.direction[seen], sdf.shape[0])
        nodes = near_nodes(sdf, BAND)
        target, weight = _node_targets(sdf, nodes, normals, ENOUGH_PIXELS * pixels_per_node)
        uncovered = covered & (lowest > -COVER_DEPTH)
        pull = COVER_WEIGHT / pixels_per_node
        moved = _solve(sdf, nodes, target, weight, _points(rays, lowest_at, uncovered), pull)
        depth = maximum_filter(-sdf, size=7).reshape(-1)[nodes]
        moved = np.clip(moved, -LARGEST_MOVE, LARGEST_MOVE) * np.clip(depth - 1.0, 0.0, 1.0)
        sdf.reshape(-1)[nodes] += moved.astype(np.float32)
        np.maximum(sdf, hull, out=sdf)
        restore_distance(sdf)
    return sdf


@njit(cache=True, parallel=True)  # type: ignore[untyped-decorator]
def _follow_rays(sdf, slab, weight_y, entry, direction, length, hit, lowest, lowest_at):  # type: ignore[no-untyped-def]
    last = sdf.shape[2] - 2
    for ray in prange(slab.shape[0]):
        j, wy = slab[ray], weight_y[ray]
        t, t_before, f_before = 0.0, 0.0, -1.0
        hit[ray], lowest[ray], lowest_at[ray] = -1.0, 1e6, 0.0
        while t < length[ray]:
            x = entry[ray, 0] + t * direction[ray, 0]
            z = entry[ray, 1] + t * direction[ray, 1]
            i, h = min(max(int(x), 0), last), min(max(int(z), 0), last)
            wx, wz = x - i, z - h
            low = (sdf[j, h, i] * (1 - wx) + sdf[j, h, i + 1] * wx) * (1 - wz) + (
                sdf[j, h + 1, i] * (1 - wx) + sdf[j, h + 1, i + 1] * wx
            ) * wz
            high = (sdf[j + 1, h, i] * (1 - wx) + sdf[j + 1, h, i + 1] * wx) * (1 - wz) + (
                sdf[j + 1, h + 1, i] * (1 - wx) + sdf[j + 1, h + 1, i + 1] * wx
            ) * wz
            f = low * (1 - wy) + high * wy
            if f < lowest[ray]:
                lowest[ray], lowest_at[ray] = f, t
            if f < 0 and f_before >= 0 and hit[ray] < 0:
                hit[ray] = t_before + (t - t_before) * f_before / (f_before - f)
            if hit[ray] >= 0 and f < -1.0:
                break
            f_before, t_before = f, t
            t += max(0.5, 0.8 * f)


def _follow(sdf: FloatArray, rays: Rays) -> tuple[DoubleArray, DoubleArray, DoubleArray]:
    """Where rays meet the surface.

    Returns:
        `(hit, lowest, lowest_at)`, each (N,): distance along the ray of the first entry into the object
        or -1, the smallest value met until a node spacing deep, and where.
    """
    hit, lowest, lowest_at = (np.empty(len(rays.slab)) for _ in range(3))
    traced = (rays.slab, rays.weight_y, rays.entry, rays.direction, rays.length)
    _follow_rays(sdf, *traced, hit, lowest, lowest_at)
    return hit, lowest, lowest_at


def _points(rays: Rays, t: DoubleArray, chosen: NDArray[np.bool_]) -> DoubleArray:
    """Fractional node indices (M, 3) [y, z, x] at distance t (N,) along the chosen rays."""
    flat = rays.entry[chosen] + t[chosen, None] * rays.direction[chosen]
    height = rays.slab[chosen] + rays.weight_y[chosen].astype(np.float64)
    return np.stack([height, flat[:, 1], flat[:, 0]], axis=1)


def _corners(points: DoubleArray, resolution: int) -> tuple[IndexArray, DoubleArray]:
    """Flat indices and trilinear weights, each (M, 8), of the nodes around points (M, 3) [y, z, x]."""
    low = np.clip(points.astype(np.int64), 0, resolution - 2)
    part = points - low
    bits = np.array([[c >> 2, (c >> 1) & 1, c & 1] for c in range(8)])
    weight = np.where(bits, part[:, None, :], 1.0 - part[:, None, :]).prod(axis=2)
    at = low[:, None, :] + bits
    return (at[..., 0] * resolution + at[..., 1]) * resolution + at[..., 2], weight


def _splat_normals(
    points: DoubleArray, normals: FloatArray, direction: FloatArray, resolution: int
) -> DoubleArray:
    """Sums (4, R, R, R) at the nodes around points: normals [y, z, x] weighted, and the weights.

    A normal counts by the cosine at which its view sees it; grazing views leave the word to others.
    """
    facing = np.maximum(-(normals[:, 0] * direction[:, 0] + normals[:, 2] * direction[:, 1]), 0.0) + 1e-3
    sums = np.zeros((4, resolution, resolution, resolution))
    columns = np.stack([normals[:, 1], normals[:, 2], normals[:, 0], np.ones(len(normals))], axis=1)
    _splat(points, columns.astype(np.float64), facing.astype(np.float64), sums)
    return sums


@njit(cache=True)  # type: ignore[untyped-decorator]
def _splat(points, columns, weight, sums):  # type: ignore[no-untyped-def]
    last = sums.shape[1] - 2
    for n in range(points.shape[0]):
        j = min(max(int(points[n, 0]), 0), last)
        h = min(max(int(points[n, 1]), 0), last)
        i = min(max(int(points[n, 2]), 0), last)
        wy, wz, wx = points[n, 0] - j, points[n, 1] - h, points[n, 2] - i
        for corner in range(8):
            y, z, x = corner >> 2, (corner >> 1) & 1, corner & 1
            w = (wy if y else 1.0 - wy) * (wz if z else 1.0 - wz) * (wx if x else 1.0 - wx) * weight[n]
            for column in range(4):
                sums[column, j + y, h + z, i + x] += w * columns[n, column]


def _node_targets(
    sdf: FloatArray, nodes: IndexArray, normals: DoubleArray, enough: float
) -> tuple[DoubleArray, DoubleArray]:
    """Gradient (M, 3) [y, z, x] wanted at the nodes: that of the nearest surface point; its weight (M,)."""
    from scipy.ndimage import map_coordinates

    f, resolution = sdf.reshape(-1), sdf.shape[0]
    strides = (resolution * resolution, resolution, 1)
    own = np.stack([f[nodes + s] - f[nodes - s] for s in strides], axis=1).astype(np.float64)
    own /= np.maximum(np.linalg.norm(own, axis=1, keepdims=True), 1e-6)
    place = np.stack(np.unravel_index(nodes, sdf.shape), axis=1)
    nearest = np.clip(place - f[nodes, None] * own, 0, resolution - 1)
    sums = np.stack([map_coordinates(column, nearest.T, order=1) for column in normals], axis=1)
    trust = sums[:, 3] / (sums[:, 3] + enough)
    shown = sums[:, :3] / np.maximum(np.linalg.norm(sums[:, :3], axis=1, keepdims=True), 1e-9)
    target = trust[:, None] * shown + UNSEEN_WEIGHT * own
    target /= np.maximum(np.linalg.norm(target, axis=1, keepdims=True), 1e-9)
    return target, np.maximum(trust, UNSEEN_WEIGHT)


def _solve(
    sdf: FloatArray,
    nodes: IndexArray,
    target: DoubleArray,
    weight: DoubleArray,
    uncovered: DoubleArray,
    pull: float,
) -> DoubleArray:
    """Change (M,) of the values at `nodes` that minimises the energy of `carve`.

    Args:
        sdf: (R, R, R).
        nodes: (M,) flat indices.
        target: (M, 3) [y, z, x] wanted gradient.
        weight: (M,) of the target.
        uncovered: (K, 3) points [y, z, x] that should be `COVER_DEPTH` inside.
        pull: weight of each such point.
    """
    from scipy.sparse import coo_matrix, diags
    from scipy.sparse.linalg import cg

    f, resolution, count = sdf.reshape(-1), sdf.shape[0], len(nodes)
    number = np.full(f.shape, -1)
    number[nodes] = np.arange(count)
    rows, columns, entries = [np.arange(count)], [np.arange(count)], [np.full(count, STAY)]
    right = np.zeros(count)
    for axis, stride in enumerate((resolution * resolution, resolution, 1)):
        there = number[nodes + stride]
        a = np.flatnonzero(there >= 0)
        b = there[a]
        w = 0.5 * (weight[a] + weight[b])
        wanted = w * (0.5 * (target[a, axis] + target[b, axis]) - (f[nodes[b]] - f[nodes[a]]))
        right += np.bincount(b, wanted, count) - np.bincount(a, wanted, count)
        rows += [a, b, a, b]
        columns += [a, b, b, a]
        entries += [w, w, -w, -w]
    matrix = coo_matrix(
        (np.concatenate(entries), (np.concatenate(rows), np.concatenate(columns))), shape=(count, count)
    ).tocsr()
    index, part = _corners(uncovered, resolution)
    known = (number[index] >= 0).all(axis=1)
    if known.any():
        index, part = index[known], part[known]
        column = number[index].reshape(-1)
        row = np.repeat(np.arange(len(index)), 8)
        at = coo_matrix((part.reshape(-1), (row, column)), shape=(len(index), count)).tocsr()
        matrix = matrix + pull * (at.T @ at)
        right += pull * (at.T @ (-COVER_DEPTH - (part * f[index]).sum(axis=1)))
    moved, _ = cg(
        matrix, right, rtol=SOLVER_TOLERANCE, maxiter=SOLVER_STEPS, M=diags(1.0 / matrix.diagonal())
    )
    return np.asarray(moved)
