"""Which pixels the fit looks at, and their rays in grid units, sorted by horizontal slab."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from uc3d_rt.neus.field import world_to_grid
from uc3d_rt.views import TARGET_CAMERAS, camera_axes, pixel_grid

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int32]

MARGIN_PX = 10
"""Pixels this near to a silhouette (at 256 px) are rendered too, so that the mask loss can act."""


@dataclass(frozen=True)
class Pixels:
    """N pixels of the six views with what they show; independent of the grid's resolution."""

    origin: FloatArray  # (N, 3) world, on the plane through the world origin
    direction: FloatArray  # (N, 2) world x and z; y is 0 at elevation 0
    color: FloatArray  # (N, 3) target sRGB
    normal: FloatArray  # (N, 3) target world normal, zero = background
    mask: FloatArray  # (N,) 1 inside the silhouette


@dataclass(frozen=True)
class Rays:
    """N rays in grid units, sorted by `slab`: ray `n` runs between node layers `slab` and `slab + 1`.

    All rays of an elevation-0 orthographic image row lie in one horizontal plane, so `slab` and
    `weight_y` are constants of a ray, and two slabs that are not neighbours share no node: gradients
    can be scattered slab by slab in parallel, without atomics, in an order that no scheduler changes.
    """

    start: IntArray  # (R,) first ray of each slab; slab j holds start[j] .. start[j + 1]
    slab: IntArray  # (N,)
    weight_y: FloatArray  # (N,) weight of layer slab + 1
    entry: FloatArray  # (N, 2) x and z where the ray enters the grid
    direction: FloatArray  # (N, 2) x and z, unit length
    length: FloatArray  # (N,) from entry to exit


def select_pixels(color: FloatArray, normal: FloatArray, masks: NDArray[np.bool_], seed: int) -> Pixels:
    """The pixels in and near the silhouettes of the six views, in an order shuffled by `seed`.

    Args:
        color: (6, H, H, 3) in [0, 1].
        normal: (6, H, H, 3) unit world normals, zero = background.
        masks: (6, H, H) silhouettes.
        seed: of the shuffle; makes every strided subset of the pixels a fair sample.
    """
    from scipy.ndimage import binary_dilation, distance_transform_edt

    size = masks.shape[-1]
    margin = MARGIN_PX * size / 256.0
    u, v = pixel_grid(size)
    parts: list[tuple[FloatArray, ...]] = []
    for view, camera in enumerate(TARGET_CAMERAS):
        if masks[view].any():
            near = distance_transform_edt(~masks[view]) <= margin
        else:
            near = binary_dilation(masks[view])
        right, up, back = camera_axes(camera)
        count = int(near.sum())
        origin = u[near][:, None] * right + v[near][:, None] * up
        direction = np.broadcast_to(-back[[0, 2]], (count, 2))
        parts.append((origin, direction, color[view][near], normal[view][near], masks[view][near]))
    joined = [np.concatenate(column).astype(np.float32) for column in zip(*parts, strict=True)]
    order = np.random.default_rng(seed).permutation(len(joined[0]))
    # Stable: pixels of one row stay shuffled among themselves, rows come bottom-up.
    order = order[np.argsort(joined[0][order, 1], kind="stable")]
    return Pixels(*(np.ascontiguousarray(column[order]) for column in joined))


def trace_rays(
    pixels: Pixels, subset: NDArray[np.intp] | slice, resolution: int
) -> tuple[Rays, NDArray[np.bool_]]:
    """Rays of a subset of the pixels for a grid of `resolution` nodes an axis.

    Args:
        pixels: as from `select_pixels`, sorted by height.
        subset: ascending indices, or a slice.
        resolution: nodes an axis.

    Returns:
        The rays that cross the grid, and which of the subset (n,) they are.
    """
    last = resolution - 1
    height = world_to_grid(pixels.origin[subset, 1], resolution)
    at = world_to_grid(pixels.origin[subset][:, [0, 2]], resolution)
    direction = pixels.direction[subset]
    # Distances to the box [0, last]² along x and z; a zero component never limits.
    with np.errstate(divide="ignore", invalid="ignore"):
        to_low, to_high = (0.0 - at) / direction, (last - at) / direction
    flat = np.abs(direction) < 1e-6
    enter = np.where(flat, -np.inf, np.minimum(to_low, to_high)).max(axis=1)
    leave = np.where(flat, np.inf, np.maximum(to_low, to_high)).min(axis=1)
    between = np.all(~flat | ((at >= 0) & (at <= last)), axis=1)
    crosses = (leave > enter) & between & (height >= 0) & (height < last)
    slab = np.floor(height[crosses]).astype(np.int32)
    entry = at[crosses] + enter[crosses, None] * direction[crosses]
    rays = Rays(
        start=np.searchsorted(slab, np.arange(resolution)).astype(np.int32),
        slab=slab,
        weight_y=(height[crosses] - slab).astype(np.float32),
        entry=entry.astype(np.float32),
        direction=np.ascontiguousarray(direction[crosses]),
        length=(leave - enter)[crosses].astype(np.float32),
    )
    return rays, crosses
