"""Which pixels the fit looks at, and their rays in grid units, sorted by horizontal slab."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
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
    size = masks.shape[-1]
    u, v = (plane.reshape(-1) for plane in pixel_grid(size))
    with ThreadPoolExecutor() as pool:  # SciPy lets other threads run
        near = list(pool.map(lambda mask: np.flatnonzero(_near(mask, MARGIN_PX * size / 256.0)), masks))
    origins, directions = [], []
    for at, camera in zip(near, TARGET_CAMERAS, strict=True):
        right, up, back = camera_axes(camera)
        origins.append(u[at][:, None] * right + v[at][:, None] * up)
        directions.append(np.broadcast_to(-back[[0, 2]], (len(at), 2)))
    origin, direction = np.concatenate(origins), np.concatenate(directions)
    order = np.random.default_rng(seed).permutation(len(origin))
    # Stable: pixels of one row stay shuffled among themselves, rows come bottom-up.
    above = np.concatenate([size - 1 - at // size for at in near]).astype(np.int16)  # sorted fastest
    order = order[np.argsort(above[order], kind="stable")]
    shown = np.concatenate([view * size * size + at for view, at in enumerate(near)])[order]
    return Pixels(
        origin=origin.take(order, axis=0),
        direction=direction.take(order, axis=0),
        color=color.reshape(-1, 3).take(shown, axis=0).astype(np.float32, copy=False),
        normal=normal.reshape(-1, 3).take(shown, axis=0).astype(np.float32, copy=False),
        mask=masks.reshape(-1).take(shown).astype(np.float32),
    )


def _near(mask: NDArray[np.bool_], margin_px: float) -> NDArray[np.bool_]:
    """Where (H, W) a silhouette (H, W) is at most so far away."""
    from scipy.ndimage import distance_transform_edt

    return np.asarray(distance_transform_edt(~mask) <= margin_px) if mask.any() else mask


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
