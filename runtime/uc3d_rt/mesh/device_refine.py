"""A surface's faces turned to the normal maps on a device: `refine.py` with the kernels of `cuda/`.

The steps of conjugate gradients are queued without the host.  A vertex gathers from its faces in the order
of their numbers, and sums over vertices are taken in one order, so the same input gives the same bytes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from uc3d_rt.device import Buffer, Device, Scope, cleared, uploaded
from uc3d_rt.device_scan import running_sums
from uc3d_rt.mesh.device_extract import DeviceSurface, extract_surface_on_device
from uc3d_rt.mesh.device_raster import draw_winners
from uc3d_rt.mesh.projection import DEPTH_SLACK_PX
from uc3d_rt.mesh.refine import (
    AGREEMENT_POWER,
    ENOUGH,
    FACING_POWER,
    MIN_FACING,
    OWN_WEIGHT,
    STAY,
    STEPS,
)
from uc3d_rt.mesh.surface import Surface
from uc3d_rt.neus.device_carve import LANES, SOLVER
from uc3d_rt.views import TARGET_CAMERAS, camera_axes

FloatArray = NDArray[np.float32]

GROUP = 128
"""Vertices that a block takes at once: `cuda/refine.cu`."""


def surface_on_device(device: Device, sdf: Buffer, normal: FloatArray, min_share: float) -> Surface:
    """The refined surface of a field; twin of `refine_surface` of what `extract_surface` gives.

    Args:
        device: where.
        sdf: (R, R, R) of a `DeviceField`.
        normal: (6, H, H, 3) unit world normals of the target views, zero = background.
        min_share: parts with less than this share of the largest part's volume are dropped.

    Raises:
        FitError: the field has no inside, or nothing but cavities.
        BackendError: the device failed, for example for want of memory.
    """
    with Scope(device) as scope:
        surface = extract_surface_on_device(scope, sdf, min_share)
        vertices = refine_surface_on_device(scope, surface, normal)
        return Surface(scope.download(vertices), scope.download(surface.faces))


def refine_surface_on_device(scope: Device, surface: DeviceSurface, normal: FloatArray) -> Buffer:
    """Where vertices (V, 3) float32 go so that faces get the normals of the views.

    Args:
        scope: where, with the memory of the result.
        surface: closed.
        normal: as of `refine.refine_surface`, whose twin this is.

    Raises:
        BackendError: the device failed, for example for want of memory.
    """
    vertices, faces = surface.vertices, surface.faces
    count, numbers = np.int32(vertices.shape[0]), np.int32(3 * vertices.shape[0])
    out = scope.empty(vertices.shape, np.float32)
    with Scope(scope) as scratch:
        target = face_targets_on_device(scratch, surface, normal)
        first, corners = corners_around(scratch, surface)
        diagonal, moved, residual, way, product = (
            scratch.empty(vertices.shape, np.float64) for _ in range(5)
        )
        partial = scratch.empty((2, LANES), np.float64)
        solver = cleared(scratch, (SOLVER.itemsize,), np.uint8)
        system = faces, first, corners, target
        threads = LANES * GROUP
        scope.launch(
            "turn_start", threads, vertices, count, *system, np.float64(STAY), diagonal, moved, residual,
            way, partial,
        )  # fmt: skip
        scope.launch("turn_begin", 1, partial, np.float64(ENOUGH), solver)
        applied = count, *system, solver, np.float64(STAY), way, product, partial
        stepped = count, solver, diagonal, way, product, moved, residual, partial
        scope.repeat(
            [
                ("turn_apply", threads, applied),
                ("cg_alpha", 1, (partial, solver)),
                ("turn_step", threads, stepped),
                ("cg_beta", 1, (partial, solver)),
                ("turn_way", int(numbers), (numbers, solver, diagonal, residual, way)),
            ],
            STEPS,
        )
        scope.launch("move_vertices", int(numbers), vertices, numbers, moved, out)
    return out


def face_targets_on_device(scope: Device, surface: DeviceSurface, normal: FloatArray) -> Buffer:
    """Unit normals (F, 3) float64 that the views show of the faces; twin of `refine.face_targets`."""
    vertices, faces = surface.vertices, surface.faces
    views, size = len(TARGET_CAMERAS), normal.shape[1]
    distance = np.float32(TARGET_CAMERAS[0].distance)
    target = scope.empty(faces.shape, np.float64)
    with Scope(scope) as scratch:
        axes = uploaded(scratch, np.stack([np.stack(camera_axes(camera)) for camera in TARGET_CAMERAS]))
        seen = axes, np.int32(views), distance
        shown = uploaded(scratch, np.ascontiguousarray(normal, np.float32))
        points = scratch.empty((views, *vertices.shape), np.float32)
        winners = cleared(scratch, (views, size, size), np.uint64)
        scope.launch(
            "project_vertices", views * vertices.shape[0], vertices, np.int32(vertices.shape[0]), *seen,
            np.int32(size), points,
        )  # fmt: skip
        draw_winners(scratch, points, faces, winners)
        scope.launch(
            "face_targets", faces.shape[0], vertices, faces, np.int32(faces.shape[0]), *seen, shown, winners,
            np.int32(size), np.float64(OWN_WEIGHT), np.float64(MIN_FACING),
            np.float64(DEPTH_SLACK_PX / 256.0), np.int32(FACING_POWER), np.int32(AGREEMENT_POWER), target,
        )  # fmt: skip
    return target


def corners_around(scope: Device, surface: DeviceSurface) -> tuple[Buffer, Buffer]:
    """The face corners `3 f + k` at each vertex.

    Returns:
        `(first (1, V + 1), corners (3F,))`: those of vertex `v`, in their order, are
        `corners[first[0, v]:first[0, v + 1]]`.
    """
    faces, vertex_count = surface.faces, surface.vertices.shape[0]
    count = np.int32(faces.shape[0])
    first = cleared(scope, (1, vertex_count + 1), np.int32)
    corners = scope.empty((3 * faces.shape[0],), np.int32)
    with Scope(scope) as scratch:
        filled = cleared(scratch, (vertex_count,), np.int32)
        scope.launch("count_corners", 3 * faces.shape[0], faces, count, first)
        running_sums(scratch, first)
        scope.launch("list_corners", 3 * faces.shape[0], faces, count, first, filled, corners)
        scope.launch("sort_corners", vertex_count, first, np.int32(vertex_count), corners)
    return first, corners
