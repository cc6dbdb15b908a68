"""Texture baking on a device: `bake.py` with the kernels of `cuda/`.

The host gives the places of vertices in the views and texels in the atlas, and which vertices are neighbours;
all else is computed on the device.  No sum depends on the order of threads, so the same input gives the same
bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from uc3d_rt.device import Buffer, Device, Launch, Scope, cleared, uploaded
from uc3d_rt.mesh.device_raster import rasterize_device
from uc3d_rt.mesh.projection import (
    CONFIDENT,
    DEPTH_SLACK,
    DISTANCE,
    EMPTY_DEPTH,
    LEAST_PULL,
    LEAST_SUM,
    LEAST_WEIGHT,
    MIN_FACING,
    PULL,
    SOLVER_STEPS,
    SOLVER_TOLERANCE,
    STEEP,
    UNKNOWN,
    VIEW_POWER,
    atlas_points,
    edge_distance_px,
    view_points,
)
from uc3d_rt.mesh.surface import FloatArray, IntArray, Surface
from uc3d_rt.views import TARGET_CAMERAS, camera_axes

if TYPE_CHECKING:
    from uc3d_rt.mesh.unwrap import Atlas

CONTINUATION = np.dtype([("rho", "f8", 3), ("before", "f8", 3), ("done", "i4", 3), ("pad", "i4")])
"""`Continuation` of `cuda/bake.cu`."""

GROUPS, GROUP = 128, 128
"""Partial sums of a sum over vertices, and threads that make one of them, as in `cuda/bake.cu`."""

CHECK_EVERY = 20
"""Steps of the continuation, an even number, after which the host asks whether it is through."""


class DeviceViews:
    """Twin of `bake.ProjectedViews`: a surface and what its points are looked up in, on a device."""

    def __init__(
        self, device: Device, surface: Surface, normals: FloatArray, color: FloatArray, normal: FloatArray
    ) -> None:
        """Render the depth of `surface` in the views `color`, `normal` (6, H, H, 3).

        Args:
            device: where; a scope that frees the memory.
            surface: closed.
            normals: (V, 3) of its vertices.
            color: of the views.
            normal: of the views, zero = background.
        """
        size = color.shape[1]
        self.device, self.count = device, len(surface.vertices)
        self.faces = uploaded(device, np.ascontiguousarray(surface.faces, np.int32))
        self.vertices, self.normals, colors, shown = (
            uploaded(device, np.ascontiguousarray(array, np.float32))
            for array in (surface.vertices, normals, color, normal)
        )
        self.depth = device.empty(color.shape[:3], np.float32)
        self.color_and_edge = device.empty((*color.shape[:3], 4), np.float32)
        clear = device.empty(color.shape[:3], np.uint8)
        for view, camera in enumerate(TARGET_CAMERAS):
            points = uploaded(device, view_points(surface.vertices, camera, size))
            _, _, drawn = rasterize_device(device, points, self.faces, size)
            device.launch(
                "mark_clear", size**2, drawn, shown, np.int32(view), np.int32(size),
                np.float32(EMPTY_DEPTH), np.float32(STEEP), self.depth, clear,
            )  # fmt: skip
        count = np.int32(len(TARGET_CAMERAS))
        device.launch(
            "weigh_pixels", len(TARGET_CAMERAS) * size**2, colors, shown, clear, count, np.int32(size),
            np.float64(edge_distance_px(size)), np.float32(LEAST_WEIGHT), self.color_and_edge,
        )  # fmt: skip
        axes = np.array([camera_axes(camera) for camera in TARGET_CAMERAS], np.float64)
        self._rule = (
            uploaded(device, axes), self.color_and_edge, self.depth, count, np.int32(size),
            np.float64(DISTANCE), np.float64(DEPTH_SLACK), np.float64(MIN_FACING), np.int32(VIEW_POWER),
        )  # fmt: skip

    def blend_vertices(self) -> tuple[Buffer, Buffer]:
        """Twin of `bake.ProjectedViews.sample`: colour (V, 3) of the vertices and sum of weights (V,)."""
        color = self.device.empty((self.count, 3), np.float32)
        weight = self.device.empty((self.count,), np.float32)
        self.device.launch(
            "blend_vertices", self.count, self.vertices, self.normals, np.int32(self.count), *self._rule,
            np.float64(LEAST_SUM), color, weight,
        )  # fmt: skip
        return color, weight

    def blend_texels(self, face: Buffer, shares: Buffer, filled: Buffer) -> Buffer:
        """Twin of `bake.ProjectedViews.sample_faces`, for texels.

        Args:
            face: (S, S) number of the face; the texel stays black where it is negative.
            shares: (S, S, 3) barycentric weights.
            filled: (V, 3) colours of the vertices that are taken where no view sees a texel.

        Returns:
            (S, S, 3), bytes.
        """
        texture = self.device.empty((*face.shape, 3), np.uint8)
        texels = int(np.prod(face.shape))
        self.device.launch(
            "blend_texels", texels, face, shares, np.int32(texels), self.faces, self.vertices, self.normals,
            filled, *self._rule, np.float64(CONFIDENT), texture,
        )  # fmt: skip
        return texture


def vertex_neighbours(faces: IntArray, count: int) -> tuple[IntArray, IntArray]:
    """Neighbours of the vertices along the edges of faces (F, 3).

    Returns:
        `(starts (count + 1,), neighbours (N,))`: those of vertex n stand from `starts[n]` to before
        `starts[n + 1]`, each once, in rising order.
    """
    ends = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).astype(np.int64)
    key = np.concatenate([ends[:, 0] * count + ends[:, 1], ends[:, 1] * count + ends[:, 0]])
    key.sort()
    key = key[np.concatenate([[True], key[1:] != key[:-1]])]
    starts = np.searchsorted(key, np.arange(count + 1, dtype=np.int64) * count)
    return starts.astype(np.int32), (key % count).astype(np.int32)


def continue_on_device(device: Device, faces: IntArray, color: Buffer, weight: Buffer) -> Buffer:
    """Twin of `bake.continue_over_surface`.

    Args:
        device: where; a scope that frees the memory.
        faces: (F, 3).
        color: (V, 3) of the vertices.
        weight: (V,) the views' sum of weights; where it is `CONFIDENT` they are fully trusted.

    Returns:
        (V, 3), in [0, 1].
    """
    count = color.shape[0]
    vertices = np.int32(count)
    starts, neighbours = (uploaded(device, array) for array in vertex_neighbours(faces, count))
    diagonal = device.empty((count,), np.float64)
    solved, residual, way, next_way, product = (device.empty((count, 3), np.float64) for _ in range(5))
    mean_sums, right_sums, turn_sums, step_sums = (
        device.empty((rows, GROUPS), np.float64) for rows in (4, 3, 3, 6)
    )
    state = cleared(device, (CONTINUATION.itemsize,), np.uint8)
    threads = GROUPS * GROUP
    device.launch("continue_mean", threads, color, weight, vertices, np.float32(CONFIDENT), mean_sums)
    device.launch(
        "continue_start", threads, color, weight, starts, neighbours, vertices, np.float32(CONFIDENT),
        np.float64(PULL), np.float64(LEAST_PULL), np.float32(UNKNOWN), mean_sums, diagonal, solved, residual,
        way, right_sums, step_sums, state,
    )  # fmt: skip
    two_steps: list[Launch] = []
    for there, back in ((way, next_way), (next_way, way)):
        turned = (
            starts, neighbours, vertices, np.float64(SOLVER_TOLERANCE), right_sums, step_sums, diagonal,
            residual, there, state, back, product, turn_sums,
        )  # fmt: skip
        stepped = (vertices, turn_sums, diagonal, back, product, state, solved, residual, step_sums)
        two_steps += [("continue_turn", threads, turned), ("continue_step", threads, stepped)]
    for _ in range(SOLVER_STEPS // CHECK_EVERY):
        device.repeat(two_steps, CHECK_EVERY // 2)
        if device.download(state).view(CONTINUATION)["done"].all():
            break
    filled = device.empty((count, 3), np.float32)
    device.launch("continue_end", 3 * count, solved, vertices, filled)
    return filled


def fill_gaps(device: Device, texture: Buffer, face: Buffer) -> None:
    """Twin of `bake._fill_gaps`, for a square texture (S, S, 3)."""
    size = face.shape[0]
    down = device.empty((size, size), np.int32)
    device.launch("column_gaps", size**2, face, np.int32(size), down)
    device.launch("fill_gaps", size**2, down, np.int32(size), texture)


def vertex_colors_on_device(
    device: Device, surface: Surface, normals: FloatArray, color: FloatArray, normal: FloatArray
) -> FloatArray:
    """Twin of `bake.vertex_colors`: colours (V, 3) of the vertices.

    Args:
        device: where.
        surface: closed.
        normals: (V, 3) of its vertices.
        color: (6, H, H, 3) of the views.
        normal: (6, H, H, 3) of the views, zero = background.

    Raises:
        BackendError: the device failed, for example for want of memory.
    """
    with Scope(device) as scope:
        views = DeviceViews(scope, surface, normals, color, normal)
        return scope.download(continue_on_device(scope, surface.faces, *views.blend_vertices()))


def bake_texture_on_device(
    device: Device,
    surface: Surface,
    normals: FloatArray,
    atlas: Atlas,
    color: FloatArray,
    normal: FloatArray,
    texture_px: int,
) -> NDArray[np.uint8]:
    """Twin of `bake.bake_texture`: base colour (texture_px, texture_px, 3) sRGB, row 0 at the top.

    Args:
        device: where.
        surface: closed.
        normals: (V, 3) of its vertices.
        atlas: of the surface.
        color: (6, H, H, 3) of the views.
        normal: (6, H, H, 3) of the views, zero = background.
        texture_px: side of the texture.

    Raises:
        BackendError: the device failed, for example for want of memory.
    """
    with Scope(device) as scope:
        views = DeviceViews(scope, surface, normals, color, normal)
        filled = continue_on_device(scope, surface.faces, *views.blend_vertices())
        points, faces = uploaded(scope, atlas_points(atlas, texture_px)), uploaded(scope, atlas.faces)
        face, shares, _ = rasterize_device(scope, points, faces, texture_px)
        texture = views.blend_texels(face, shares, filled)
        fill_gaps(scope, texture, face)
        return scope.download(texture)
