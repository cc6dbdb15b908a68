"""Triangle surfaces as plain arrays: is one closed, which parts has it, which way do its normals point."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int32]


@dataclass(frozen=True)
class Surface:
    """Triangles, wound counter-clockwise seen from outside."""

    vertices: FloatArray  # (V, 3) world units
    faces: IntArray  # (F, 3)


def is_closed(faces: IntArray) -> bool:
    """Whether every edge joins exactly two faces that run along it in opposite directions.

    That is watertight, edge-manifold and consistently wound at once.
    """
    if len(faces) == 0:
        return False
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).astype(np.int64)
    if (edges[:, 0] == edges[:, 1]).any():
        return False
    count = int(edges.max()) + 1
    there = np.sort(edges[:, 0] * count + edges[:, 1])
    back = np.sort(edges[:, 1] * count + edges[:, 0])
    return bool((there[1:] != there[:-1]).all() and (there == back).all())


def signed_volumes(surface: Surface) -> NDArray[np.float64]:
    """Signed volume (F,) of the tetrahedron between each face and the origin."""
    corners = surface.vertices[surface.faces].astype(np.float64)
    return np.asarray(np.einsum("fi,fi->f", corners[:, 0], np.cross(corners[:, 1], corners[:, 2])) / 6.0)


def face_components(surface: Surface) -> tuple[int, IntArray]:
    """Number of connected parts and the part (F,) that each face belongs to."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    f = surface.faces
    rows, columns = np.concatenate([f[:, 0], f[:, 1]]), np.concatenate([f[:, 1], f[:, 2]])
    count = len(surface.vertices)
    graph = coo_matrix((np.ones(len(rows), np.int8), (rows, columns)), shape=(count, count))
    parts, labels = connected_components(graph, directed=False)
    return int(parts), labels[f[:, 0]].astype(np.int32)


def subset(surface: Surface, keep: NDArray[np.bool_]) -> Surface:
    """The faces where `keep` (F,) holds, without unused vertices."""
    faces = surface.faces[keep]
    used = np.zeros(len(surface.vertices), bool)
    used[faces] = True
    number = np.cumsum(used, dtype=np.int32) - 1
    return Surface(surface.vertices[used], number[faces].astype(np.int32))


def largest_parts(surface: Surface, min_share: float) -> Surface:
    """Drop inner cavities, and parts whose volume is below `min_share` of the largest part's."""
    parts, label = face_components(surface)
    volume = np.bincount(label, weights=signed_volumes(surface), minlength=parts)
    # A wall around a cavity has a negative volume; nobody sees it from outside.
    wanted = volume >= max(min_share * float(volume.max()), 1e-12)
    if wanted.all():
        return surface
    return subset(surface, wanted[label])


def vertex_normals(surface: Surface) -> FloatArray:
    """Unit normals (V, 3): the faces' normals weighted by the angle they have at the vertex."""
    return _summed_normals(surface, surface.faces.reshape(-1), len(surface.vertices))


def crease_normals(surface: Surface, crease_deg: float) -> tuple[IntArray, FloatArray]:
    """Normals that stay apart across sharp edges.

    Args:
        surface: closed.
        crease_deg: faces that meet at a larger angle than this do not share normals.

    Returns:
        `(group (F, 3), normals (G, 3))`: the normal of each face corner is `normals[group]`.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    faces = surface.faces.astype(np.int64)
    count, corners = len(surface.vertices), 3 * len(faces)
    begin, end = faces.reshape(-1), np.roll(faces, -1, axis=1).reshape(-1)
    key = begin * count + end
    order = np.argsort(key)
    # Half-edge 3f + k starts at corner k of face f; its twin runs the other way in the next face.
    twin = order[np.searchsorted(key[order], end * count + begin)]
    points = surface.vertices[surface.faces].astype(np.float64)
    normal = np.cross(points[:, 1] - points[:, 0], points[:, 2] - points[:, 0])
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-20)
    half = np.arange(corners)
    cosine = np.einsum("hi,hi->h", normal[half // 3], normal[twin // 3])
    smooth = half[cosine > np.cos(np.radians(crease_deg))]
    ahead = twin[smooth] // 3 * 3 + (twin[smooth] + 1) % 3  # the twin's corner at this half-edge's start
    graph = coo_matrix((np.ones(len(smooth), np.int8), (smooth, ahead)), shape=(corners, corners))
    groups, label = connected_components(graph, directed=False)
    normals = _summed_normals(surface, label, int(groups))
    return label.reshape(-1, 3).astype(np.int32), normals


def _summed_normals(surface: Surface, label: NDArray[np.integer], count: int) -> FloatArray:
    """Unit normals (count, 3) of face corners gathered by `label` (3F,), weighted by their angle."""
    corners = surface.vertices[surface.faces].astype(np.float64)
    sides = np.roll(corners, -1, axis=1) - corners  # side k runs from corner k to corner k + 1
    normal = np.cross(sides[:, 0], sides[:, 1])
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-20)
    unit = sides / np.maximum(np.linalg.norm(sides, axis=2, keepdims=True), 1e-20)
    cosine = -np.einsum("fki,fki->fk", unit, np.roll(unit, 1, axis=1))
    angle = np.arccos(np.clip(cosine, -1.0, 1.0))
    weighted = (angle[..., None] * normal[:, None, :]).reshape(-1, 3)
    summed = np.stack([np.bincount(label, weights=weighted[:, i], minlength=count) for i in range(3)], axis=1)
    length = np.linalg.norm(summed, axis=1, keepdims=True)
    # Where the faces cancel out there is no normal; any unit vector keeps the file valid.
    return np.where(length > 1e-8, summed / np.maximum(length, 1e-8), (0.0, 1.0, 0.0)).astype(np.float32)
