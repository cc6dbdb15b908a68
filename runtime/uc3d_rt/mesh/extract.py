"""Marching cubes: the zero set of a field as one clean closed surface."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from uc3d_rt.errors import FitError
from uc3d_rt.mesh.surface import Surface, is_closed, largest_parts
from uc3d_rt.neus.field import Field

FloatArray = NDArray[np.float32]

SMALLEST_VALUE = 1e-3
"""Node values nearer to zero than this, in node spacings, are moved away from it: a surface that runs
exactly through a node has triangles without area."""

NO_VOLUME = "the fitted field holds no volume; the views contradict each other, try another seed"
NOT_CLOSED = "the fitted surface cannot be closed; fit with another seed or resolution"


def extract_surface(field: Field, min_share: float) -> Surface:
    """The zero set of the field, closed, outward, without stray parts.

    Args:
        field: what was fitted.
        min_share: parts with less than this share of the largest part's volume are dropped.

    Raises:
        FitError: the field has no inside, or its surface cannot be closed.
    """
    sdf = np.pad(field.sdf / np.float32(field.voxel), 1, mode="edge")
    for axis in range(3):  # outside of the grid is outside of the object
        edge: list[slice | int] = [slice(None)] * 3
        for side in (0, -1):
            edge[axis] = side
            sdf[tuple(edge)] = np.maximum(sdf[tuple(edge)], 1.0)
    if not (sdf < 0).any():
        raise FitError(NO_VOLUME)
    for blur in (0.0, 0.5, 1.0):
        surface = largest_parts(_marching_cubes(_blurred(sdf, blur), field.voxel), min_share)
        if is_closed(surface.faces):
            return surface
    raise FitError(NOT_CLOSED)


def _blurred(sdf: FloatArray, sigma: float) -> FloatArray:
    if sigma == 0.0:
        return sdf
    from scipy.ndimage import gaussian_filter

    return np.asarray(gaussian_filter(sdf, sigma), dtype=np.float32)


def _marching_cubes(sdf: FloatArray, voxel: float) -> Surface:
    from skimage.measure import marching_cubes

    inside = np.argwhere(sdf < 0)
    low = np.maximum(inside.min(axis=0) - 2, 0)
    high = np.minimum(inside.max(axis=0) + 3, sdf.shape)
    box = sdf[low[0] : high[0], low[1] : high[1], low[2] : high[2]]
    box = np.where(np.abs(box) < SMALLEST_VALUE, np.where(box < 0, -SMALLEST_VALUE, SMALLEST_VALUE), box)
    where, faces, _, _ = marching_cubes(box.astype(np.float32), 0.0, gradient_direction="descent")
    # [y, z, x] node indices to x, y, z: a rotation of the axes, so the winding stays.
    nodes = (where + low - 1)[:, [2, 0, 1]]  # less the pad
    vertices = ((nodes + 0.5) * voxel - 1.0).astype(np.float32)
    return Surface(vertices, np.ascontiguousarray(faces, dtype=np.int32))
