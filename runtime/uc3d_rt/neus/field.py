"""The explicit field: signed distance and colour at the nodes of a regular grid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from uc3d_rt.device import Buffer, Device

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Field:
    """Signed distance and colour on a grid of R × R × R nodes over the cube [-1, 1]³.

    Axis order is **[y, z, x]** for both arrays: a horizontal slab, which is all that one image row
    of an elevation-0 orthographic view can see, is then contiguous in memory.  Node `i` of an axis
    lies at world coordinate `(i + 0.5) * 2 / R - 1`.  Values between nodes are trilinear.
    """

    sdf: FloatArray  # (R, R, R), world units; negative inside
    color: FloatArray  # (R, R, R, 3), sRGB in [0, 1]; meaningful near the surface only

    def __post_init__(self) -> None:
        r = self.sdf.shape[0]
        if self.sdf.shape != (r, r, r) or self.color.shape != (r, r, r, 3):
            raise ValueError(
                f"sdf {self.sdf.shape} and color {self.color.shape} are no R-cube and its colours"
            )

    @property
    def resolution(self) -> int:
        """Nodes along each axis."""
        return int(self.sdf.shape[0])

    @property
    def voxel(self) -> float:
        """Distance between neighbouring nodes, world units."""
        return 2.0 / self.resolution


@dataclass(frozen=True)
class DeviceField:
    """A `Field` in the memory of a device."""

    device: Device  # through which its memory was taken
    sdf: Buffer
    color: Buffer

    def download(self) -> Field:
        """The field in the memory of the host."""
        return Field(self.device.download(self.sdf), self.device.download(self.color))


def node_coordinates(resolution: int) -> FloatArray:
    """World coordinate (resolution,) of the nodes along one axis."""
    return ((np.arange(resolution) + 0.5) * (2.0 / resolution) - 1.0).astype(np.float32)


def world_to_grid(points: NDArray[np.floating], resolution: int) -> NDArray[np.floating]:
    """World coordinates to fractional node indices, axis by axis (the order of axes is kept)."""
    return (points + 1.0) * (0.5 * resolution) - 0.5


def resample(values: FloatArray, resolution: int) -> FloatArray:
    """A grid (R, R, R) or (R, R, R, C) resampled to another node count by (tri)linear interpolation."""
    for axis in range(3):
        count = values.shape[axis]
        where = np.clip(world_to_grid(node_coordinates(resolution), count), 0.0, count - 1.0)
        low = np.minimum(where.astype(np.int64), count - 2)
        shape = [1] * values.ndim
        shape[axis] = resolution
        weight = (where - low).astype(np.float32).reshape(shape)
        values = values.take(low, axis) * (1 - weight) + values.take(low + 1, axis) * weight
    return np.ascontiguousarray(values, dtype=np.float32)


def near_nodes(sdf: FloatArray, band: float) -> NDArray[np.int64]:
    """Flat indices of the nodes within `band` of the surface, without the two outermost layers."""
    near = np.abs(sdf) < band
    for axis in range(3):
        edge = [slice(None)] * 3
        for side in (slice(None, 2), slice(-2, None)):
            edge[axis] = side
            near[tuple(edge)] = False
    return np.flatnonzero(near)
