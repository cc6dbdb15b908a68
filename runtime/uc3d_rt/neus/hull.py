"""The soft visual hull of six silhouettes, as a signed distance field: where the fit starts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from uc3d_rt.neus.field import node_coordinates, world_to_grid
from uc3d_rt.views import AZIMUTHS_DEG, TARGET_CAMERAS, camera_axes

FloatArray = NDArray[np.float32]

OPPOSITE = len(AZIMUTHS_DEG) // 2
"""View `v` and view `v + OPPOSITE` look along the same lines, so their silhouettes mirror."""

TOLERANCES_PX: tuple[float, ...] = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
"""How far, at 256 px, a silhouette may be off before the hull is carved; the least that covers wins."""

COVERAGE = 0.985
"""Share of every silhouette that the hull must still fill."""


def silhouette_distance(mask: NDArray[np.bool_]) -> FloatArray:
    """Signed distance (H, W) in pixels to the outline of a silhouette (H, W); negative inside."""
    from scipy.ndimage import distance_transform_edt, gaussian_filter

    if not mask.any():
        return np.full(mask.shape, float(max(mask.shape)), np.float32)
    outside = distance_transform_edt(~mask) - 0.5
    inside = distance_transform_edt(mask) - 0.5
    # The slight blur rounds off the pixel stair-steps of the outline.
    return np.asarray(
        gaussian_filter(np.where(mask, -inside, outside).astype(np.float32), 0.7), dtype=np.float32
    )


def hull_sdf(masks: NDArray[np.bool_], resolution: int) -> FloatArray:
    """Signed distance of the visual hull that tolerates silhouettes which disagree.

    Opposite views are first merged (their mean distance; where the views disagree, their union), then
    each voxel takes the largest of the three distances, less a tolerance.  The tolerance starts at
    zero and grows until the hull projects onto at least `COVERAGE` of each silhouette, so exact
    silhouettes give the exact hull and inconsistent ones are not carved away.

    Args:
        masks: (6, H, H) silhouettes of the target views.
        resolution: nodes an axis.

    Returns:
        (R, R, R) in the axis order of `Field`, world units.
    """
    distances = [silhouette_distance(mask) for mask in masks]
    size = masks.shape[-1]
    pairs = [(distances[v], distances[v + OPPOSITE][:, ::-1]) for v in range(OPPOSITE)]
    merged = [0.5 * (a + b) for a, b in pairs]
    union = [np.minimum(a, b) for a, b in pairs]
    hull = _intersection(merged, resolution)
    for tolerance in TOLERANCES_PX:
        tolerance_px = tolerance * size / 256.0
        # Half a node spacing more, for parts so thin that they slip between the nodes.
        slack_px = tolerance_px + 0.5 * size / resolution
        if _least_coverage(hull - slack_px, masks) >= COVERAGE or tolerance == TOLERANCES_PX[-1]:
            break
        if tolerance == 0.0:
            hull = _intersection(union, resolution)
    return np.asarray((hull - tolerance_px) * (2.0 / size), dtype=np.float32)


def _pixel_columns(view: int, resolution: int, size: int) -> NDArray[np.float64]:
    """Fractional pixel column (R, R) [z, x] where each vertical node column projects in a view."""
    right = camera_axes(TARGET_CAMERAS[view])[0]
    nodes = node_coordinates(resolution).astype(np.float64)
    u = nodes[None, :] * float(right[0]) + nodes[:, None] * float(right[2])
    return np.asarray(world_to_grid(u, size), dtype=np.float64)


def _intersection(pair_distances: list[FloatArray], resolution: int) -> FloatArray:
    """Largest of the pairs' distances (R, R, R), in pixels."""
    size = pair_distances[0].shape[0]
    rows = np.clip(world_to_grid(-node_coordinates(resolution).astype(np.float64), size), 0, size - 1)
    hull = np.full((resolution, resolution, resolution), -np.inf, np.float32)
    for view, distance in enumerate(pair_distances):
        lines = _lerp(distance, rows, axis=0)  # (R, W)
        columns = np.clip(_pixel_columns(view, resolution, size), 0, size - 1)
        np.maximum(hull, _lerp(lines, columns, axis=1), out=hull)
    return hull


def _lerp(values: FloatArray, where: NDArray[np.float64], axis: int) -> FloatArray:
    low = np.minimum(where.astype(np.int64), values.shape[axis] - 2)
    weight = (where - low).astype(np.float32)
    if axis == 0:
        weight = weight.reshape(-1, *([1] * (values.ndim - 1)))
    return np.asarray(
        values.take(low, axis) * (1 - weight) + values.take(low + 1, axis) * weight, dtype=np.float32
    )


def _least_coverage(hull: FloatArray, masks: NDArray[np.bool_]) -> float:
    """Smallest share of a silhouette that the hull's projection fills, over the non-empty views."""
    resolution, size = hull.shape[0], masks.shape[-1]
    rows = np.clip(np.rint(world_to_grid(node_coordinates(resolution), size)).astype(int), 0, size - 1)[::-1]
    solid = hull < 0
    least = 1.0
    for view, mask in enumerate(masks):
        columns = np.rint(_pixel_columns(view, resolution, size)).astype(int)
        inside = (columns >= 0) & (columns < size)
        seen = np.zeros((resolution, size), bool)
        layers, z, x = np.nonzero(solid & inside)
        seen[layers, columns[z, x]] = True
        if size > resolution:  # a node covers several pixels: widen its print so that no gaps remain
            reach = -(-size // resolution)
            seen = np.logical_or.reduce([np.roll(seen, s, axis=1) for s in range(-reach, reach + 1)])
        wanted = mask[rows]
        if wanted.any():
            least = min(least, float((wanted & seen).sum() / wanted.sum()))
    return least
