"""Made-up solids: closed, finite, of few faces, and the same from the same generator."""

from collections.abc import Callable

import numpy as np
import pytest
import trimesh

from train.solids import KINDS, solid
from train.surfaces import Piece, ball, box, revolved, swept
from uc3d_rt.views import BOUNDING_RADIUS


@pytest.mark.parametrize("make", [make for make, _ in KINDS], ids=lambda make: make.__name__.strip("_"))
def test_pieces_are_closed_and_wound_outwards(make: Callable[[np.random.Generator], list[Piece]]) -> None:
    for seed in range(8):
        pieces, again = make(np.random.default_rng(seed)), make(np.random.default_rng(seed))
        assert sum(len(piece.faces) for piece in pieces) < 3000
        for piece, same in zip(pieces, again, strict=True):
            assert np.isfinite(piece.vertices).all() and (piece.vertices == same.vertices).all()
            mesh = trimesh.Trimesh(piece.vertices, piece.faces, process=False)
            assert mesh.is_watertight and mesh.is_winding_consistent and mesh.volume > 0


def test_solids_are_normalised_objects_of_one_or_two_colours() -> None:
    colors = set()
    for seed in range(60):
        thing = solid(np.random.default_rng(seed))
        v = thing.vertices
        assert v.max(axis=0) == pytest.approx(-v.min(axis=0), abs=1e-5)
        assert np.linalg.norm(v, axis=1).max() == pytest.approx(BOUNDING_RADIUS, abs=1e-5)
        assert thing.uv is not None and len(thing.uv) == len(v) and np.isfinite(thing.uv).all()
        assert thing.face_material.max() < len(thing.materials)
        colors.add(len(thing.materials))
    assert colors == {1, 2}


def test_surfaces_have_the_size_they_are_given() -> None:
    def volume(piece: Piece) -> float:
        return float(trimesh.Trimesh(piece.vertices, piece.faces).volume)

    assert volume(box((0, 0, 0), (1, 2, 3))) == pytest.approx(6.0)
    assert volume(revolved(np.array([(1.0, 0.0), (1.0, 2.0)]), 400)) == pytest.approx(2 * np.pi, rel=1e-3)
    assert volume(ball(3)) == pytest.approx(4 / 3 * np.pi, rel=0.02)
    angle = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    ring = np.stack([np.sin(angle), np.zeros(200), np.cos(angle)], axis=1)
    assert volume(swept(ring, 0.1, 60, closed=True)) == pytest.approx(2 * np.pi**2 * 0.01, rel=1e-2)
