"""Marching cubes and the choice of parts on a device: `extract.py` with the kernels of `cuda/`.

What a thread writes goes to a place that counts and their running sums gave it beforehand, and sums over
faces are in fixed point, so the same field gives the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from uc3d_rt.device import Buffer, Device, Scope, cleared
from uc3d_rt.device_scan import running_sums
from uc3d_rt.errors import FitError
from uc3d_rt.mesh.extract import NO_VOLUME, NOT_CLOSED, SMALLEST_VALUE

NODES_A_WORD = 32
"""Along x: `cuda/surface.cu`."""

VOLUME_RUN = 32
"""Faces whose volume one thread adds up: `cuda/parts.cu`."""


@dataclass(frozen=True)
class DeviceSurface:
    """Triangles on a device, wound counter-clockwise seen from outside."""

    vertices: Buffer  # (V, 3) float32, world units
    faces: Buffer  # (F, 3) int32


def extract_surface_on_device(scope: Device, sdf: Buffer, min_share: float) -> DeviceSurface:
    """The zero set of a field, closed, outward, without stray parts; twin of `extract.extract_surface`.

    The case table (`export/cubes.py`) gives two faces to every edge whatever the field holds, so the field
    need never be blurred as on the CPU, and nothing has to be checked.

    Args:
        scope: where, with the memory of the surface.
        sdf: (R, R, R) float32, world units, as of a `Field`.
        min_share: parts with less than this share of the largest part's volume are dropped.

    Raises:
        FitError: the field has no inside, or nothing but cavities.
        BackendError: the device failed, for example for want of memory.
    """
    return largest_parts_on_device(scope, marching_cubes_on_device(scope, sdf), min_share)


def marching_cubes_on_device(scope: Device, sdf: Buffer) -> DeviceSurface:
    """All of the zero set, parts and cavities; arguments and errors as `extract_surface_on_device`."""
    r = sdf.shape[0]
    side = r + 2
    words = side * side * -(-side // NODES_A_WORD)
    field = sdf, np.int32(r), np.float32(2.0 / r), np.float32(SMALLEST_VALUE)
    with Scope(scope) as scratch:
        bits = scratch.empty((words,), np.uint32)
        first = scratch.empty((2, words), np.int32)
        scope.launch("mark_inside", words, sdf, np.int32(r), bits)
        scope.launch("count_cubes", words, *field, bits, first)
        vertex_count, face_count = running_sums(scratch, first)
        if not face_count:
            raise FitError(NO_VOLUME)
        surface = _empty(scope, vertex_count, face_count)
        scope.launch("emit_cubes", words, *field, bits, first, surface.vertices, surface.faces)
    return surface


def largest_parts_on_device(scope: Device, surface: DeviceSurface, min_share: float) -> DeviceSurface:
    """Without cavities and small parts; twin of `surface.largest_parts`.

    Args:
        scope: where, with the memory of both surfaces.
        surface: closed; freed if another one is returned.
        min_share: as of `extract_surface_on_device`.

    Raises:
        FitError: no part is left.
        BackendError: the device failed, for example for want of memory.
    """
    vertex_count, face_count = surface.vertices.shape[0], surface.faces.shape[0]
    count = np.int32(face_count)
    with Scope(scope) as scratch:
        label = scratch.empty((vertex_count,), np.int32)
        volume = scratch.empty((vertex_count,), np.int64)
        largest = cleared(scratch, (1,), np.int64)
        number = scratch.empty((2, face_count), np.int32)  # there are more faces than vertices
        given = surface.vertices, surface.faces
        parts = label, volume, largest, np.float64(min_share)
        scope.launch("start_labels", vertex_count, np.int32(vertex_count), label, volume)
        scope.launch("join_labels", face_count, surface.faces, count, label)
        scope.launch("measure_parts", -(-face_count // VOLUME_RUN), *given, count, label, volume)
        scope.launch("largest_part", vertex_count, label, volume, np.int32(vertex_count), largest)
        scope.launch("mark_kept", face_count, surface.faces, np.int32(vertex_count), count, *parts, number)
        kept_vertices, kept_faces = running_sums(scratch, number)
        if not kept_faces:
            raise FitError(NOT_CLOSED)
        if kept_faces == face_count:
            return surface
        kept = _empty(scope, kept_vertices, kept_faces)
        scope.launch(
            "keep_parts", face_count, *given, np.int32(vertex_count), count, *parts, number, kept.vertices,
            kept.faces,
        )  # fmt: skip
    scope.free(given)
    return kept


def _empty(scope: Device, vertices: int, faces: int) -> DeviceSurface:
    return DeviceSurface(scope.empty((vertices, 3), np.float32), scope.empty((faces, 3), np.int32))
