"""The soft visual hull of six silhouettes, as a signed distance field: where the fit starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from uc3d_rt.neus.field import node_coordinates, world_to_grid
from uc3d_rt.views import AZIMUTHS_DEG, TARGET_CAMERAS, camera_axes

FloatArray = NDArray[np.float32]

Distances = TypeVar("Distances")
"""Distances (3, H, H) in pixels, wherever they lie."""

Hull = TypeVar("Hull")
"""A hull (R, R, R) in pixels, wherever it lies."""

BLUR_PX = 0.7
"""Standard deviation of the slight blur that rounds off the stair-steps of an outline's pixels."""

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
    return np.asarray(
        gaussian_filter(np.where(mask, -inside, outside).astype(np.float32), BLUR_PX), dtype=np.float32
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
    merged, union = pair_distances(masks)
    hull, tolerance_px = tolerant(
        [merged, union],
        masks,
        resolution,
        lambda pairs: _intersection(pairs, resolution),
        lambda field, slack_px: _printed(field - slack_px, masks.shape[-1]),
    )
    return np.asarray((hull - np.float32(tolerance_px)) * np.float32(2.0 / masks.shape[-1]), dtype=np.float32)


def pair_distances(masks: NDArray[np.bool_]) -> tuple[FloatArray, FloatArray]:
    """Distances (3, H, H) to the outlines of opposite views, merged: their mean, and their union's."""
    with ThreadPoolExecutor() as pool:  # SciPy lets other threads run
        distances = list(pool.map(silhouette_distance, masks))
    pairs = [(distances[v], distances[v + OPPOSITE][:, ::-1]) for v in range(OPPOSITE)]
    return np.stack([0.5 * (a + b) for a, b in pairs]), np.stack([np.minimum(a, b) for a, b in pairs])


def tolerant(
    choices: Sequence[Distances],
    masks: NDArray[np.bool_],
    resolution: int,
    intersection: Callable[[Distances], Hull],
    printed: Callable[[Hull, float], NDArray[np.bool_]],
) -> tuple[Hull, float]:
    """The hull in pixels, and the least tolerance with which it covers the silhouettes.

    Args:
        choices: the distances (3, H, H) to try with no tolerance, and those to go on with.
        masks: (6, H, H).
        resolution: nodes an axis.
        intersection: makes a hull of distances.
        printed: where (6, R, H) the nodes of a hull within some slack (pixels) project.
    """
    size = masks.shape[-1]
    hull = intersection(choices[0])
    for tolerance in TOLERANCES_PX:
        tolerance_px = tolerance * size / 256.0
        # Half a node spacing more, for parts so thin that they slip between the nodes.
        slack_px = tolerance_px + 0.5 * size / resolution
        covered = least_coverage(printed(hull, slack_px), masks)
        if covered >= COVERAGE or tolerance == TOLERANCES_PX[-1]:
            break
        if tolerance == 0.0:
            hull = intersection(choices[1])
    return hull, tolerance_px


def _pixel_columns(view: int, resolution: int, size: int) -> NDArray[np.float64]:
    """Fractional pixel column (R, R) [z, x] where each vertical node column projects in a view."""
    right = camera_axes(TARGET_CAMERAS[view])[0]
    nodes = node_coordinates(resolution).astype(np.float64)
    u = nodes[None, :] * float(right[0]) + nodes[:, None] * float(right[2])
    return np.asarray(world_to_grid(u, size), dtype=np.float64)


def _intersection(distances: FloatArray, resolution: int) -> FloatArray:
    """Largest of the pairs' distances (R, R, R), in pixels."""
    size = distances.shape[-1]
    rows = np.clip(world_to_grid(-node_coordinates(resolution).astype(np.float64), size), 0, size - 1)
    hull = np.full((resolution, resolution, resolution), -np.inf, np.float32)
    for view, distance in enumerate(distances):
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


def _printed(field: FloatArray, size: int) -> NDArray[np.bool_]:
    """Where (6, R, size) the nodes inside a field (R, R, R) project, a row for each layer."""
    resolution = field.shape[0]
    solid = field < 0
    seen = np.zeros((len(TARGET_CAMERAS), resolution, size), bool)
    for view in range(len(TARGET_CAMERAS)):
        columns = np.rint(_pixel_columns(view, resolution, size)).astype(int)
        inside = (columns >= 0) & (columns < size)
        layers, z, x = np.nonzero(solid & inside)
        seen[view, layers, columns[z, x]] = True
    return seen


def least_coverage(printed: NDArray[np.bool_], masks: NDArray[np.bool_]) -> float:
    """Smallest share of a silhouette that a print (6, R, H) fills, over the non-empty views."""
    resolution, size = printed.shape[1:]
    rows = np.clip(np.rint(world_to_grid(node_coordinates(resolution), size)).astype(int), 0, size - 1)[::-1]
    least = 1.0
    for seen, mask in zip(printed, masks, strict=True):
        if size > resolution:  # a node covers several pixels: widen its print so that no gaps remain
            reach = -(-size // resolution)
            seen = np.logical_or.reduce([np.roll(seen, s, axis=1) for s in range(-reach, reach + 1)])
        wanted = mask[rows]
        if wanted.any():
            least = min(least, float((wanted & seen).sum() / wanted.sum()))
    return least
