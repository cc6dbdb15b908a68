"""The case table of marching cubes, made from a rule: `python -m export.cubes` writes `cuda/cubes.cuh`.

Corner `4y + 2z + x` of a cube has coordinates y, z and x of 0 or 1; a cube's case has a bit for each corner
that is inside.  On a face of the cube whose corners are inside and outside by turns, the two inside corners
are either joined or parted: both cubes that share the face decide that alike, from its four values.  On
every face the surface then has known segments, which make up closed loops in the cube, each to be filled.

Every edge of the surface joins two triangles, whatever the field: a segment belongs to the two cubes that
share its face, and a diagonal that fills a loop is its cube's own if its ends lie on no common face.  Some
loops cannot be filled with such diagonals alone.  Among the four pairs of vertices on one face that are no
segment, the cube below the face may take those on opposite sides of the square and the cube above it the
others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import uc3d_rt

HEADER = Path(uc3d_rt.__file__).parent / "cuda" / "cubes.cuh"

Loop = tuple[int, ...]
Triangle = tuple[int, int, int]
Point = tuple[float, float, float]

AXIS_BIT = (4, 2, 1)  # y, z, x
EDGES = tuple((corner, axis) for axis in range(3) for corner in range(8) if not corner & AXIS_BIT[axis])
"""`(lower corner, axis)` of each edge; there is at most one vertex on it."""


def _face(axis: int, side: int) -> tuple[int, ...]:
    """Corners around the face at one side along an axis."""
    b, c = (AXIS_BIT[other] for other in range(3) if other != axis)
    base = AXIS_BIT[axis] * side
    return base, base | b, base | b | c, base | c


FACES = tuple(_face(axis, side) for axis in range(3) for side in (0, 1))
"""Face `2 axis + side`; two corners that follow one another share an edge."""


def _edge(a: int, b: int) -> int:
    return EDGES.index((min(a, b), AXIS_BIT.index(a ^ b)))


FACE_EDGES = tuple(tuple(_edge(face[k], face[(k + 1) % 4]) for k in range(4)) for face in FACES)

IN_FACE_COST = 100.0
"""Of a diagonal within a face of the cube, where the surface may fold; others cost their squared length."""


def ambiguous_faces(case: int) -> tuple[int, ...]:
    """Faces whose corners are inside and outside by turns."""
    return tuple(k for k, face in enumerate(FACES) if _pattern(case, face) in ((0, 1, 0, 1), (1, 0, 1, 0)))


def _pattern(case: int, face: Sequence[int]) -> tuple[int, ...]:
    return tuple(case >> corner & 1 for corner in face)


def decisions(case: int) -> Iterator[tuple[int, ...]]:
    """Faces where the inside corners are joined, for all ways to decide, in the order of the table."""
    faces = ambiguous_faces(case)
    for bits in range(1 << len(faces)):
        yield tuple(face for k, face in enumerate(faces) if bits >> k & 1)


def loops(case: int, joined: Sequence[int]) -> list[Loop]:
    """Edges around each piece of the surface in a cube, counter-clockwise seen from outside."""
    follows: dict[int, int] = {}
    for k, corners in enumerate(FACES):
        inside = _pattern(case, corners)
        edges = FACE_EDGES[k]
        if k in ambiguous_faces(case):  # a segment around each corner of one kind
            around = [n for n in range(4) if inside[n] != (k in joined)]
            segments = [(edges[n - 1], edges[n]) for n in around]
        else:
            crossed = [n for n in range(4) if inside[n] != inside[(n + 1) % 4]]
            segments = [(edges[crossed[0]], edges[crossed[1]])] if crossed else []
        for a, b in segments:
            low, high = (a, b) if _is_along(a, b, k, case) else (b, a)
            assert low not in follows
            follows[low] = high
    out = []
    while follows:
        loop = [min(follows)]
        while (ahead := follows.pop(loop[-1])) != loop[0]:
            loop.append(ahead)
        out.append(tuple(loop))
    return out


def _is_along(a: int, b: int, face: int, case: int) -> bool:
    """Whether a segment from edge a to b of a face runs counter-clockwise around the outside."""
    start, end = _middle(a), _middle(b)
    axis, side = divmod(face, 2)
    corner, along = EDGES[a]
    inside = corner if case >> corner & 1 else corner | AXIS_BIT[along]
    way = [q - p for p, q in zip(start, end, strict=True)]
    inward = [q - p for p, q in zip(start, _place(inside), strict=True)]
    i, j = (axis + 1) % 3, (axis + 2) % 3
    turn = way[i] * inward[j] - way[j] * inward[i]
    return (turn < 0) == (side == 1)


def _place(corner: int) -> Point:
    return float(corner >> 2), float(corner >> 1 & 1), float(corner & 1)


def _middle(edge: int) -> Point:
    corner, axis = EDGES[edge]
    y, z, x = (c + 0.5 * (k == axis) for k, c in enumerate(_place(corner)))
    return y, z, x


def fill(loop: Loop, taken: frozenset[frozenset[int]]) -> tuple[Triangle, ...]:
    """Triangles within a loop, of the shortest diagonals that no other cube can have.

    Args:
        loop: edges of the cube.
        taken: pairs of them that segments join.
    """

    @cache
    def best(i: int, j: int) -> tuple[float, tuple[Triangle, ...]] | None:
        """Of what the chord from i to j cuts off."""
        if j - i < 2:
            return 0.0, ()
        found = []
        for k in range(i + 1, j):
            parts = best(i, k), best(k, j)
            costs = [_cost(loop[a], loop[b], taken) for a, b in ((i, k), (k, j)) if b - a > 1]
            if parts[0] is not None and parts[1] is not None and None not in costs:
                cost = parts[0][0] + parts[1][0] + sum(cost for cost in costs if cost is not None)
                found.append((cost, (*parts[0][1], *parts[1][1], (loop[i], loop[k], loop[j]))))
        return min(found, default=None)

    filled = best(0, len(loop) - 1)
    assert filled is not None, loop
    return filled[1]


def _cost(a: int, b: int, taken: frozenset[frozenset[int]]) -> float | None:
    """Of a diagonal; None if another triangle may run along it too."""
    if frozenset((a, b)) in taken:
        return None
    length = sum((p - q) ** 2 for p, q in zip(_middle(a), _middle(b), strict=True))
    for face, edges in enumerate(FACE_EDGES):
        if a in edges and b in edges:
            opposite = (edges.index(a) - edges.index(b)) % 2 == 0
            return IN_FACE_COST if opposite == (face % 2 == 1) else None
    return length


def triangles(case: int, joined: Sequence[int]) -> list[Triangle]:
    """Of the surface in a cube: three edges each, counter-clockwise seen from outside."""
    found = loops(case, joined)
    taken = frozenset(frozenset((loop[k - 1], loop[k])) for loop in found for k in range(len(loop)))
    return [triangle for loop in found for triangle in fill(loop, taken)]


def cubes_source() -> str:
    """What `cuda/cubes.cuh` holds."""
    ambiguous, first_entry, first, packed = [], [], [0], []
    for case in range(256):
        ambiguous.append(sum(1 << face for face in ambiguous_faces(case)))
        first_entry.append(len(first) - 1)
        for joined in decisions(case):
            packed += [a | b << 4 | c << 8 for a, b, c in triangles(case, joined)]
            first.append(len(packed))
    return "\n".join(
        [
            "// The case table of marching cubes: written by `python -m export.cubes`, which says how.",
            "#pragma once",
            "",
            "// Faces, 2 axis + side, where a case's corners are inside and outside by turns.",
            *_array("unsigned char", "AMBIGUOUS", ambiguous),
            "",
            "// A case's first entry: nothing is joined.  With ambiguous face k joined it is 2^k further.",
            *_array("unsigned short", "FIRST_ENTRY", first_entry),
            "",
            "// An entry's first triangle, and behind the last one the number of all.",
            *_array("unsigned short", "FIRST_TRIANGLE", first),
            "",
            "// Triangles: three edges, four bits each.  Edge k lies along axis k / 4.",
            *_array("unsigned short", "TRIANGLES", packed),
            "",
            "// Lower corner, 4y + 2z + x, of each edge.",
            *_array("unsigned char", "EDGE_CORNER", [corner for corner, _ in EDGES]),
            "",
            "// Corners around each face.",
            *_array("unsigned char", "FACE_CORNERS", [corner for face in FACES for corner in face]),
            "",
        ]
    )


def _array(kind: str, name: str, values: Sequence[int]) -> list[str]:
    lines = [f"TABLE {kind} {name}[{len(values)}] = {{"]
    row = "   "
    for value in values:
        if len(row) + len(str(value)) + 2 > 118:
            lines.append(row)
            row = "   "
        row += f" {value},"
    return [*lines, row, "};"]


if __name__ == "__main__":
    HEADER.write_text(cubes_source(), encoding="utf-8")
