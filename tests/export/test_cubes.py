"""The case table of marching cubes: the header is of this rule, and the rule closes every surface."""

from collections import Counter
from itertools import combinations

import pytest

from export.cubes import (
    AXIS_BIT,
    EDGES,
    FACE_EDGES,
    HEADER,
    Triangle,
    ambiguous_faces,
    cubes_source,
    decisions,
    loops,
    triangles,
)

ENTRIES = [(case, joined) for case in range(256) for joined in decisions(case)]


def sides(found: list[Triangle]) -> Counter[tuple[int, int]]:
    return Counter((t[k], t[(k + 1) % 3]) for t in found for k in range(3))


def test_the_header_is_of_this_rule() -> None:
    assert HEADER.read_text(encoding="utf-8") == cubes_source(), "run: python -m export.cubes"


def test_the_simplest_cases() -> None:
    assert triangles(0, ()) == triangles(255, ()) == []
    (corner,) = triangles(1, ())  # the origin is inside: seen from far along [1, 1, 1], y to z to x
    assert {EDGES[edge] for edge in corner} == {(0, 0), (0, 1), (0, 2)}
    first = corner.index(EDGES.index((0, 0)))
    assert EDGES[corner[(first + 1) % 3]] == (0, 1)
    assert len(triangles(0b00001111, ())) == 2
    assert len(ENTRIES) == 656 and max(len(triangles(*entry)) for entry in ENTRIES) == 10


@pytest.mark.parametrize("part", range(8))
def test_triangles_of_a_cube_and_of_its_neighbours_share_no_edge_but_the_segments(part: int) -> None:
    for case, joined in ENTRIES[part::8]:
        found = triangles(case, joined)
        crossed = {
            k for k, (low, axis) in enumerate(EDGES) if (case >> low ^ case >> (low | AXIS_BIT[axis])) & 1
        }
        assert {edge for triangle in found for edge in triangle} == crossed
        around = loops(case, joined)
        segments = {(loop[k - 1], loop[k]) for loop in around for k in range(len(loop))}
        edges = sides(found)
        assert set(edges.values()) <= {1}
        assert segments == {(a, b) for a, b in edges if (b, a) not in edges}
        for a, b in edges.keys() - segments:
            for face, on_face in enumerate(FACE_EDGES):
                if a in on_face and b in on_face:  # the cube on the other side may only take the others
                    assert face in ambiguous_faces(case)
                    assert ((on_face.index(a) - on_face.index(b)) % 2 == 0) == (face % 2 == 1)


def test_both_cubes_at_a_face_have_its_segments_in_opposite_directions() -> None:
    for axis in range(3):
        below, above = FACE_EDGES[2 * axis + 1], FACE_EDGES[2 * axis]
        seen: dict[tuple[int, bool], set[frozenset[tuple[int, int]]]] = {}
        for side, on_face in ((1, below), (0, above)):
            face, bit = 2 * axis + side, AXIS_BIT[axis]
            for case, joined in ENTRIES:
                corners = [c for c in range(8) if bool(c & bit) == bool(side)]
                pattern = sum((case >> c & 1) << k for k, c in enumerate(corners))
                found = {
                    (on_face.index(a), on_face.index(b))
                    for loop in loops(case, joined)
                    for a, b in zip(loop, loop[1:] + loop[:1], strict=True)
                    if a in on_face and b in on_face
                }
                ahead = frozenset(found if side else {(b, a) for a, b in found})
                seen.setdefault((pattern, face in joined), set()).add(ahead)
        assert len(seen) == 18 and all(len(found) == 1 for found in seen.values())


def test_no_two_edges_of_a_cube_lie_on_two_common_faces() -> None:
    for a, b in combinations(range(12), 2):
        assert sum(a in edges and b in edges for edges in FACE_EDGES) <= 1
