"""A small orthographic rasteriser: nearest face and barycentric weights of each pixel."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from uc3d_rt.mesh.projection import view_points
from uc3d_rt.views import TARGET_CAMERAS

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int32]


@njit(cache=True)  # type: ignore[untyped-decorator]
def rasterize(
    points: FloatArray, faces: IntArray, face_id: IntArray, weights: FloatArray, depth: FloatArray
) -> None:
    """Draw triangles into `face_id`, `weights` and `depth`; the smallest depth wins, ties go to the first.

    Args:
        points: (V, 3) pixel column, pixel row (centres at half-integers), depth.
        faces: (F, 3).
        face_id: (H, W), -1 where empty on entry.
        weights: (H, W, 3) barycentric.
        depth: (H, W), +inf where empty on entry.
    """
    rows, columns = face_id.shape
    for face in range(faces.shape[0]):
        a, b, c = faces[face, 0], faces[face, 1], faces[face, 2]
        ax, ay = points[a, 0], points[a, 1]
        bx, by = points[b, 0], points[b, 1]
        cx, cy = points[c, 0], points[c, 1]
        area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
        if abs(area) < 1e-12:
            continue
        inverse = np.float32(1.0) / area
        left = max(int(np.ceil(min(ax, bx, cx) - 0.5)), 0)
        right = min(int(np.floor(max(ax, bx, cx) - 0.5)), columns - 1)
        top = max(int(np.ceil(min(ay, by, cy) - 0.5)), 0)
        bottom = min(int(np.floor(max(ay, by, cy) - 0.5)), rows - 1)
        for row in range(top, bottom + 1):
            y = np.float32(row + 0.5)
            for column in range(left, right + 1):
                x = np.float32(column + 0.5)
                wb = ((x - ax) * (cy - ay) - (y - ay) * (cx - ax)) * inverse
                wc = ((bx - ax) * (y - ay) - (by - ay) * (x - ax)) * inverse
                wa = np.float32(1.0) - wb - wc
                if wa < -1e-6 or wb < -1e-6 or wc < -1e-6:
                    continue
                d = wa * points[a, 2] + wb * points[b, 2] + wc * points[c, 2]
                if d < depth[row, column]:
                    depth[row, column] = d
                    face_id[row, column] = face
                    weights[row, column, 0] = wa
                    weights[row, column, 1] = wb
                    weights[row, column, 2] = wc


def rasterize_pixels(
    points: FloatArray, faces: IntArray, size_px: int
) -> tuple[IntArray, FloatArray, FloatArray]:
    """`rasterize` into fresh square images.

    Args:
        points: (V, 3) as in `rasterize`.
        faces: (F, 3).
        size_px: side of the images.

    Returns:
        `(face_id, weights, depth)`, see `rasterize`.
    """
    face_id = np.full((size_px, size_px), -1, np.int32)
    weights = np.zeros((size_px, size_px, 3), np.float32)
    depth = np.full((size_px, size_px), np.inf, np.float32)
    rasterize(
        np.ascontiguousarray(points, np.float32),
        np.ascontiguousarray(faces, np.int32),
        face_id,
        weights,
        depth,
    )
    return face_id, weights, depth


def render_normals(
    vertices: NDArray[np.floating], faces: NDArray[np.integer], normals: NDArray[np.floating], size_px: int
) -> FloatArray:
    """Smooth world normals (6, size_px, size_px, 3) of a mesh in the target views, zero = background."""
    out = np.zeros((len(TARGET_CAMERAS), size_px, size_px, 3), np.float32)
    for view, camera in enumerate(TARGET_CAMERAS):
        face_id, weights, _ = rasterize_pixels(
            view_points(vertices, camera, size_px), faces.astype(np.int32), size_px
        )
        seen = face_id >= 0
        summed = (normals[faces[face_id[seen]]] * weights[seen][..., None]).sum(axis=1)
        out[view][seen] = summed / np.maximum(np.linalg.norm(summed, axis=1, keepdims=True), 1e-12)
    return out
