"""Quadric decimation that never gives up a closed surface."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from uc3d_rt.mesh.surface import Surface, is_closed, largest_parts, signed_volumes

AGGRESSIVENESS: tuple[float, ...] = (5.0, 3.0, 7.0)
"""Of the decimation, tried in this order; below about 2 it stops long before the target."""

MAX_VOLUME_CHANGE = 0.1

PINCH_OFFSET = 2e-4
"""World units between two sheets that met in one edge, once they are parted."""


def simplify_surface(surface: Surface, faces: int) -> Surface:
    """Reduce a closed surface to about `faces` triangles; keeps more where fewer would open it.

    Args:
        surface: closed.
        faces: wanted number; 0 or more than there are = leave as it is.
    """
    import fast_simplification

    target = faces
    volume = float(signed_volumes(surface).sum())
    while 0 < target < len(surface.faces):
        for aggressiveness in AGGRESSIVENESS:
            points, triangles = fast_simplification.simplify(
                surface.vertices, surface.faces, target_count=target, agg=aggressiveness
            )
            smaller = Surface(np.asarray(points, np.float32), np.asarray(triangles, np.int32))
            smaller = part_pinched_edges(smaller)
            if not is_closed(smaller.faces):
                continue
            smaller = largest_parts(smaller, 0.0)
            if abs(float(signed_volumes(smaller).sum()) / volume - 1.0) < MAX_VOLUME_CHANGE:
                return smaller
        target *= 2
    return surface


def part_pinched_edges(surface: Surface) -> Surface:
    """Give each sheet its own midpoint where two sheets meet in one edge.

    Collapsing edges can pinch a thin neck until four faces share an edge.  Each sheet's two faces are
    split at a midpoint of their own, moved a little to the sheet's inside, after which every edge joins
    two faces again.  Other defects are left as they are.
    """
    pinched = _pinched_edges(surface.faces)
    if len(pinched) == 0:
        return surface
    vertices = [np.asarray(v, np.float64) for v in surface.vertices]
    faces = [tuple(int(i) for i in face) for face in surface.faces]
    for a, b in pinched:
        around = [n for n, face in enumerate(faces) if a in face and b in face]
        along = [n for n in around if _runs(faces[n], a, b)]
        against = [n for n in around if not _runs(faces[n], a, b)]
        if len(along) != 2 or len(against) != 2:
            return surface
        normals = {n: _normal([vertices[i] for i in faces[n]]) for n in around}
        straight = sum(float(normals[p] @ normals[q]) for p, q in zip(along, against, strict=True))
        crossed = sum(float(normals[p] @ normals[q]) for p, q in zip(along, against[::-1], strict=True))
        if crossed > straight:  # the flatter pairing is the one the surface had before
            against.reverse()
        for pair in zip(along, against, strict=True):
            inward = -(normals[pair[0]] + normals[pair[1]])
            length = float(np.linalg.norm(inward))
            offset = inward / length * PINCH_OFFSET if length > 1e-6 else np.zeros(3)
            vertices.append(0.5 * (vertices[a] + vertices[b]) + offset)
            middle = len(vertices) - 1
            for n in pair:
                face = faces[n]
                faces[n] = _replaced(face, a, middle)
                faces.append(_replaced(face, b, middle))
    return Surface(np.asarray(vertices, np.float32), np.asarray(faces, np.int32))


def _pinched_edges(faces: NDArray[np.int32]) -> NDArray[np.int64]:
    """Vertex pairs (E, 2), smaller first, of the edges that two faces run along in one direction."""
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).astype(np.int64)
    directed, count = np.unique(edges, axis=0, return_counts=True)
    return np.unique(np.sort(directed[count > 1], axis=1), axis=0)


def _runs(face: tuple[int, ...], a: int, b: int) -> bool:
    return face[(face.index(a) + 1) % 3] == b


def _replaced(face: tuple[int, ...], old: int, new: int) -> tuple[int, ...]:
    return tuple(new if i == old else i for i in face)


def _normal(corners: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    normal = np.cross(corners[1] - corners[0], corners[2] - corners[0])
    return np.asarray(normal / max(float(np.linalg.norm(normal)), 1e-20))
