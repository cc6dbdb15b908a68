"""Quadric decimation that never gives up a closed surface."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

from uc3d_rt.mesh.surface import IntArray, Surface, is_closed, largest_parts, signed_volumes

Point = NDArray[np.float64]
Triangle = tuple[int, ...]

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
            for _ in range(3):  # parting one edge can show the next
                smaller = part_pinched_edges(smaller)
                if closed := is_closed(smaller.faces):
                    break
            if not closed:
                continue
            smaller = largest_parts(smaller, 0.0)
            if abs(float(signed_volumes(smaller).sum()) / volume - 1.0) < MAX_VOLUME_CHANGE:
                return smaller
        target *= 2
    return surface


def part_pinched_edges(surface: Surface) -> Surface:
    """Give each sheet its own midpoint where two sheets meet in one edge.

    Collapsing edges can fold faces back to back, which are dropped, and can pinch a thin neck until four
    or more faces share an edge.  Each sheet's two faces are
    split at a midpoint of their own, moved a little to the sheet's inside, after which every edge joins
    two faces again.  Other defects are left as they are.
    """
    surface = Surface(surface.vertices, _without_flaps(surface.faces))
    pinched = _pinched_edges(surface.faces)
    if len(pinched) == 0:
        return surface
    vertices = list(surface.vertices.astype(np.float64))
    faces: list[Triangle] = [tuple(face) for face in surface.faces.tolist()]
    touching: defaultdict[int, set[int]] = defaultdict(set)  # faces at each vertex of a pinched edge
    near: list[int] = np.flatnonzero(np.isin(surface.faces, pinched).sum(axis=1) >= 2).tolist()
    for n in near:
        for i in faces[n]:
            touching[i].add(n)
    for a, b in pinched.tolist():
        around = sorted(touching[a] & touching[b])
        along = [n for n in around if _runs(faces[n], a, b)]
        against = [n for n in around if not _runs(faces[n], a, b)]
        if len(along) != len(against):
            return surface
        for n, other in _flattest_pairs(along, against, vertices, faces):
            inward = -(_normal(vertices, faces[n]) + _normal(vertices, faces[other]))
            length = float(np.linalg.norm(inward))
            offset = inward / length * PINCH_OFFSET if length > 1e-6 else np.zeros(3)
            vertices.append(0.5 * (vertices[a] + vertices[b]) + offset)
            middle = len(vertices) - 1
            for half in (n, other):
                face = faces[half]
                faces[half] = _replaced(face, b, middle)  # keeps a
                faces.append(_replaced(face, a, middle))  # keeps b
                touching[b].discard(half)
                for i in faces[-1]:
                    touching[i].add(len(faces) - 1)
                touching[middle].add(half)
    return Surface(np.asarray(vertices, np.float32), np.asarray(faces, np.int32))


def _without_flaps(faces: IntArray) -> IntArray:
    """Without pairs of faces that lie back to back on the same three vertices."""
    while True:
        first = faces.argmin(axis=1)
        turned = np.stack([faces[np.arange(len(faces)), (first + k) % 3] for k in range(3)], axis=1)
        count = int(faces.max(initial=0)) + 1
        key = (turned[:, 0].astype(np.int64) * count + turned[:, 1]) * count + turned[:, 2]
        back = (turned[:, 0].astype(np.int64) * count + turned[:, 2]) * count + turned[:, 1]
        flap = np.isin(key, back)
        if not flap.any():
            return faces
        faces = faces[~flap]


def _flattest_pairs(
    along: list[int], against: list[int], vertices: list[Point], faces: list[Triangle]
) -> list[tuple[int, int]]:
    """Pair the faces on both sides of an edge, flattest pairs first: so the sheets ran before."""
    scored = sorted(
        (
            (float(_normal(vertices, faces[n]) @ _normal(vertices, faces[m])), n, m)
            for n in along
            for m in against
        ),
        reverse=True,
    )
    pairs: list[tuple[int, int]] = []
    for _, n, m in scored:
        if all(n != pair[0] and m != pair[1] for pair in pairs):
            pairs.append((n, m))
    return pairs


def _pinched_edges(faces: NDArray[np.int32]) -> NDArray[np.int64]:
    """Vertex pairs (E, 2), smaller first, of the edges that two faces run along in one direction."""
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).astype(np.int64)
    count = int(edges.max(initial=0)) + 1
    key = np.sort(edges[:, 0] * count + edges[:, 1])
    doubled = np.stack(np.divmod(key[1:][key[1:] == key[:-1]], count), axis=1)
    return np.unique(np.sort(doubled, axis=1), axis=0)


def _runs(face: Triangle, a: int, b: int) -> bool:
    return face[(face.index(a) + 1) % 3] == b


def _replaced(face: Triangle, old: int, new: int) -> Triangle:
    return tuple(new if i == old else i for i in face)


def _normal(vertices: list[Point], face: Triangle) -> Point:
    a, b, c = (vertices[i] for i in face)
    normal = np.cross(b - a, c - a)
    return np.asarray(normal / max(float(np.linalg.norm(normal)), 1e-20))
