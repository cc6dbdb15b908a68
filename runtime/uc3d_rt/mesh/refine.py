"""Turn the faces of a surface to the normal maps: marching cubes rounds edges, the maps know them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from uc3d_rt.mesh.projection import DEPTH_SLACK_PX, view_points
from uc3d_rt.mesh.surface import FloatArray, Surface
from uc3d_rt.views import TARGET_CAMERAS, camera_axes

DoubleArray = NDArray[np.float64]

STAY = 0.3
"""Weight of a vertex's place against the slopes of its faces' edges.  Less carries normals further over
the surface, and moves the silhouettes more: a vertex follows what lies within about 4 edges."""

OWN_WEIGHT = 0.02
"""Weight of a face's own normal against a map that sees the face front on, which counts 1."""

FACING_POWER, AGREEMENT_POWER = 2, 3
"""Exponents of the cosines between a shown normal and the direction to its camera, and the face's own."""

MIN_FACING = 0.05
"""Views that see a face at a smaller cosine than this say nothing of its normal."""

STEPS = 60
"""Of conjugate gradients; the system is well conditioned, since every vertex is held by `STAY`."""

ENOUGH = 1e-20
"""Squared residual, weighted by the preconditioner, at which they end before that."""


def refine_surface(surface: Surface, normal: FloatArray) -> Surface:
    """Move vertices so that the faces get the normals that the views show.

    After Nehab et al., "Efficiently combining positions and normals for precise 3D geometry" (2005):
    minimises the sum over faces and their edges `e` of `(target . e)²` plus `STAY` times the squared
    movement of all vertices.  Faces that no view sees keep their own normals; the faces stay the same.

    Args:
        surface: closed.
        normal: (6, H, H, 3) unit world normals of the target views, zero = background.
    """
    from uc3d_rt.mesh.slopes import slopes

    target = face_targets(surface, normal)
    start = surface.vertices.astype(np.float64)
    faces = surface.faces
    # Conjugate gradients with the matrix's diagonal as preconditioner, for the movement.
    diagonal = np.full(start.shape, STAY)
    for corner in range(3):
        for axis in range(3):
            diagonal[:, axis] += 2.0 * np.bincount(faces[:, corner], target[:, axis] ** 2, len(start))
    moved = np.zeros_like(start)
    residual = -slopes(start, faces, target, np.empty_like(start))
    direction = residual / diagonal
    size = float((residual * direction).sum())
    image, scaled, product = np.empty_like(start), np.empty_like(start), np.empty_like(start)
    for _ in range(STEPS):  # in place: fresh arrays of this size take as long as the sums
        if size < ENOUGH:
            break
        slopes(direction, faces, target, image)
        image += np.multiply(direction, STAY, out=product)
        step = size / float(np.multiply(direction, image, out=product).sum())
        moved += np.multiply(direction, step, out=product)
        residual -= np.multiply(image, step, out=product)
        np.divide(residual, diagonal, out=scaled)
        before, size = size, float(np.multiply(residual, scaled, out=product).sum())
        direction *= size / before
        direction += scaled
    return Surface((start + moved).astype(np.float32), faces)


def face_targets(surface: Surface, normal: FloatArray) -> DoubleArray:
    """Unit normals (F, 3) that the views show where they see the middle of a face, else the face's own.

    Views count by how squarely the shown normal faces them, and by how well it agrees with the face's:
    one that looks past an edge at another side of the object says nothing of this face.
    """
    from uc3d_rt.mesh.raster import rasterize_pixels

    size = normal.shape[1]
    corners = surface.vertices[surface.faces]
    middle = corners.mean(axis=1)
    own = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]).astype(np.float64)
    own /= np.maximum(np.linalg.norm(own, axis=1, keepdims=True), 1e-20)
    total = OWN_WEIGHT * own
    slack = DEPTH_SLACK_PX / 256.0
    for view, camera in enumerate(TARGET_CAMERAS):
        back = camera_axes(camera)[2].astype(np.float64)
        _, _, depth = rasterize_pixels(view_points(surface.vertices, camera, size), surface.faces, size)
        facing = own @ back
        chosen = np.flatnonzero(facing > MIN_FACING)
        at = view_points(middle[chosen], camera, size)
        column = np.clip(at[:, 0].astype(np.int64), 0, size - 1)
        row = np.clip(at[:, 1].astype(np.int64), 0, size - 1)
        seen = at[:, 2] <= depth[row, column] + slack / np.maximum(facing[chosen], 0.2)
        shown = normal[view][row, column].astype(np.float64)  # the nearest pixel: edges stay edges
        agrees = np.maximum((shown * own[chosen]).sum(axis=1), 0.0) ** AGREEMENT_POWER
        weight = seen * np.maximum(shown @ back, 0.0) ** FACING_POWER * agrees
        total[chosen] += weight[:, None] * shown
    return np.asarray(total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-12))
