"""Mesh metrics: Chamfer distance and volume IoU of triangles that need not be closed."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numba import njit
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

SAMPLES = 10_000
"""Points on each surface that the Chamfer distance is taken from."""

GRID = 48
"""Voxels along each axis of the volume IoU."""


class Triangles(Protocol):
    """What has `vertices` (V, 3) and `faces` (F, 3): `train.objects.Object`, `trimesh.Trimesh`."""

    @property
    def vertices(self) -> NDArray[np.floating]: ...

    @property
    def faces(self) -> NDArray[np.integer]: ...


def chamfer(mesh: Triangles, truth: Triangles, samples: int = SAMPLES) -> float:
    """Mean of both mean nearest distances, the truth's longest box side scaled to 1.

    Two samplings of one surface already lie some 0.5 * sqrt(area / samples) apart, so that not even
    the truth itself reaches zero: about 0.006 for 10 000 points.
    """
    return chamfer_to_points(mesh, surface_points(truth, samples, seed=0), longest_side(truth))


def chamfer_to_points(mesh: Triangles, points: FloatArray, longest: float) -> float:
    """`chamfer` to a truth known by points (N, 3) on its surface and its longest box side alone."""
    from scipy.spatial import cKDTree

    a = points / longest
    b = surface_points(mesh, len(points), seed=1) / longest
    return float(0.5 * (cKDTree(a).query(b)[0].mean() + cKDTree(b).query(a)[0].mean()))


def longest_side(mesh: Triangles) -> float:
    """Of the box of all triangles."""
    return float(np.ptp(_corners(mesh).reshape(-1, 3), axis=0).max())


def surface_points(mesh: Triangles, samples: int, seed: int) -> FloatArray:
    """Points (samples, 3) spread evenly by area."""
    import trimesh

    surface = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    return np.asarray(trimesh.sample.sample_surface(surface, samples, seed=seed)[0], np.float64)


def volume_iou(mesh: Triangles, truth: Triangles, grid: int = GRID) -> float:
    """Intersection over union of the volumes, on a grid over the box that holds both.

    NaN where the truth encloses no voxel: a sheet has no volume to compare.
    """
    both = np.concatenate([_corners(mesh).reshape(-1, 3), _corners(truth).reshape(-1, 3)])
    low, high = both.min(axis=0), both.max(axis=0)
    a, b = inside_voxels(mesh, low, high, grid), inside_voxels(truth, low, high, grid)
    return float((a & b).sum() / (a | b).sum()) if b.any() else float("nan")


def inside_voxels(mesh: Triangles, low: FloatArray, high: FloatArray, grid: int = GRID) -> BoolArray:
    """Which voxels (grid, grid, grid) [x, y, z] of a box have their centre inside the mesh.

    Inside is what at least two of the rays along x, y and z say, each by the parity of its crossings;
    so a hole in the surface spoils one axis and not the voxel.  Faces stored several times count once.
    """
    cell = np.maximum(high - low, 1e-9) / grid
    corners = _without_repeats(np.ascontiguousarray((_corners(mesh) - low) / cell))
    votes = np.zeros((grid, grid, grid), np.uint8)
    for axis in range(3):
        turned = [axis, (axis + 1) % 3, (axis + 2) % 3]  # the ray's axis first
        flips = np.zeros((grid, grid, grid), np.uint8)
        _mark_crossings(np.ascontiguousarray(corners[:, :, turned]), flips)
        votes += np.bitwise_xor.accumulate(flips, axis=0).transpose(np.argsort(turned))
    return votes >= 2


def _corners(mesh: Triangles) -> FloatArray:
    """(F, 3, 3) corner positions."""
    return np.asarray(mesh.vertices, np.float64)[np.asarray(mesh.faces)]


def _without_repeats(corners: FloatArray) -> FloatArray:
    """Each triangle (F, 3, 3) once, whichever way it is wound: a face and its back side cancel in parity."""
    rounded = np.round(corners * 1e4).astype(np.int64)
    order = np.lexsort((rounded[..., 2], rounded[..., 1], rounded[..., 0]), axis=1)
    key = np.take_along_axis(rounded, order[..., None], axis=1).reshape(len(corners), 9)
    return corners[np.unique(key, axis=0, return_index=True)[1]]


@njit(cache=True)
def _passes(a: FloatArray, b: FloatArray, y: float, z: float) -> bool:
    """Whether a half-line from (y, z) along +y crosses the projected edge.

    Both triangles of an edge get the same answer, for it is always computed from the same end.
    """
    if a[2] > b[2] or (a[2] == b[2] and a[1] > b[1]):
        a, b = b, a
    if (a[2] > z) == (b[2] > z):
        return False
    return bool(y < a[1] + (z - a[2]) / (b[2] - a[2]) * (b[1] - a[1]))


@njit(cache=True)
def _mark_crossings(corners: FloatArray, flips: NDArray[np.uint8]) -> None:
    """Flip, in each column of voxels along the first axis, the first voxel behind each crossing."""
    size = flips.shape[0]
    for face in range(corners.shape[0]):
        a, b, c = corners[face, 0], corners[face, 1], corners[face, 2]
        uy, uz, vy, vz = b[1] - a[1], b[2] - a[2], c[1] - a[1], c[2] - a[2]
        area = uy * vz - uz * vy
        if area == 0.0:
            continue
        first_y = max(int(np.ceil(min(a[1], b[1], c[1]) - 0.5)), 0)
        last_y = min(int(np.floor(max(a[1], b[1], c[1]) - 0.5)), size - 1)
        first_z = max(int(np.ceil(min(a[2], b[2], c[2]) - 0.5)), 0)
        last_z = min(int(np.floor(max(a[2], b[2], c[2]) - 0.5)), size - 1)
        for j in range(first_y, last_y + 1):
            y = j + 0.5
            for k in range(first_z, last_z + 1):
                z = k + 0.5
                if (_passes(a, b, y, z) != _passes(b, c, y, z)) == _passes(c, a, y, z):
                    continue
                wb = ((y - a[1]) * vz - (z - a[2]) * vy) / area
                wc = ((z - a[2]) * uy - (y - a[1]) * uz) / area
                x = a[0] + wb * (b[0] - a[0]) + wc * (c[0] - a[0])
                behind = max(int(np.ceil(x - 0.5)), 0)
                if behind < size:
                    flips[behind, j, k] ^= 1
