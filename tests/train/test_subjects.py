"""Changed and joined objects: what stays true of them, and that the same generator gives the same thing."""

from dataclasses import replace

import numpy as np
import pytest
import trimesh
from scipy.spatial import cKDTree

from tests.train.shapes import cone
from tests.train.shapes import thing as object_of
from train import subjects
from train.objects import Material, Object
from train.solids import solid
from train.subjects import (
    MAX_PARTS,
    assembly,
    mirrored,
    other_of,
    pair_of,
    repeated,
    reshaped,
    retextured,
    subject,
    tumble,
    turned,
)
from uc3d_rt.views import BOUNDING_RADIUS


def painted(channels: int = 3) -> Object:
    """A cone with a picture; its last channel, if there are four, cuts holes."""
    thing, pixels = cone(), np.full((8, 4, channels), 7, np.uint8)
    return replace(
        thing,
        uv=np.zeros((len(thing.vertices), 2), np.float32),
        texture=pixels,
        materials=(Material(tile=(0, 0, 4, 8)),),
    )


def is_normalised(thing: Object) -> bool:
    v = thing.vertices
    return bool(
        np.allclose(v.max(axis=0), -v.min(axis=0), atol=1e-5)
        and np.isclose(np.linalg.norm(v, axis=1).max(), BOUNDING_RADIUS, atol=1e-5)
    )


def test_pairs_stand_side_by_side_on_one_floor() -> None:
    a, b = cone((1.0, 0.0, 0.0)), cone((0.0, 0.0, 1.0))
    for seed in range(10):
        pair = pair_of(a, b, np.random.default_rng(seed))
        assert pair.name == "cone+cone" and len(pair.faces) == len(a.faces) + len(b.faces)
        assert np.linalg.norm(pair.vertices, axis=1).max() == pytest.approx(BOUNDING_RADIUS, abs=1e-5)
        first, second = (pair.vertices[np.unique(pair.faces[pair.face_material == m])] for m in (0, 1))
        assert first[:, 1].min() == pytest.approx(second[:, 1].min(), abs=1e-4)
        angles = np.radians(np.arange(0, 360, 1))
        directions = np.stack([np.sin(angles), np.zeros(360), np.cos(angles)], axis=1)
        gap = ((second @ directions.T).min(axis=0) - (first @ directions.T).max(axis=0)).max()
        assert gap > 0.0  # a plane passes between them


def test_assemblies_are_one_object_that_hangs_together() -> None:
    counts = set()
    for seed in range(20):
        thing = assembly(cone(), np.random.default_rng(seed), lambda rng: cone((0.0, 0.0, 1.0)))
        assert is_normalised(thing) and thing.faces.max() < len(thing.vertices)
        counts.add(thing.name.count("+") + 1)
        # Each part begins inside the hull of an earlier one, so the boxes of parts form one cluster.
        mesh = trimesh.Trimesh(thing.vertices, thing.faces, process=True)
        boxes = [part.bounds for part in mesh.split(only_watertight=False)]
        joined = {0}
        for _ in boxes:
            joined |= {
                i
                for i, a in enumerate(boxes)
                for j in joined
                if (a[0] <= boxes[j][1] + 1e-4).all() and (boxes[j][0] <= a[1] + 1e-4).all()
            }
        assert len(joined) == len(boxes)
    assert counts == set(range(2, MAX_PARTS + 1))


def test_flat_things_are_parts_too() -> None:
    corners = np.array([[-0.6, -0.6, 0.0], [0.6, -0.6, 0.0], [0.6, 0.6, 0.0], [-0.6, 0.6, 0.0]], np.float32)
    sheet = replace(cone(), vertices=corners, faces=np.array([[0, 1, 2], [0, 2, 3]], np.int32))
    sheet = replace(sheet, uv=None, face_material=np.zeros(2, np.int32))
    for seed in range(60):
        thing = assembly(sheet, np.random.default_rng(seed), lambda rng: sheet)
        assert np.isfinite(thing.vertices).all() and is_normalised(thing)


@pytest.mark.parametrize("both", [0.0, 1.0])
def test_symmetric_assemblies_are_their_own_mirror_image(
    monkeypatch: pytest.MonkeyPatch, both: float
) -> None:
    monkeypatch.setattr(subjects, "MIRROR_SHARE", 1.0)
    monkeypatch.setattr(subjects, "DOUBLE_MIRROR_SHARE", both)
    for seed in range(12):
        thing = assembly(painted(), np.random.default_rng(seed), lambda rng: cone((0.0, 0.0, 1.0)))
        assert is_normalised(thing) and thing.uv is not None and len(thing.uv) == len(thing.vertices)
        for axis in (0, 2)[: 2 if both else 1]:
            image = thing.vertices * np.where(np.arange(3) == axis, -1, 1)
            distance, _ = cKDTree(thing.vertices).query(image)
            assert distance.max() < 1e-4
        volume = trimesh.Trimesh(thing.vertices, thing.faces).volume
        assert volume > 0


def test_a_mirrored_solid_is_closed_and_twice_its_half() -> None:
    ball = object_of(trimesh.creation.icosphere(subdivisions=3), colors=np.full((642, 3), 77, np.uint8))
    for at in (-0.3, 0.0, 0.4):
        for keep in (1.0, -1.0):
            whole = mirrored(ball, 0, at, keep)
            mesh = trimesh.Trimesh(whole.vertices, whole.faces, process=True)
            mesh.update_faces(mesh.nondegenerate_faces())  # of corners in the plane
            assert mesh.is_watertight and mesh.is_winding_consistent
            assert len(np.unique(whole.faces)) == len(whole.vertices)  # nothing of the other side is left
            cap = 2 * np.pi * BOUNDING_RADIUS * (BOUNDING_RADIUS - keep * at)  # area of a half
            assert mesh.area == pytest.approx(2 * cap, rel=0.01) and mesh.volume > 0
            assert whole.vertex_color is not None and (whole.vertex_color == 77).all()
            assert len(whole.face_material) == len(whole.faces)
    aside = replace(ball, vertices=ball.vertices + np.array([3, 0, 0], np.float32))
    for keep in (1.0, -1.0):  # all on one side: two of it
        assert len(mirrored(aside, 0, 0.0, keep).faces) == 2 * len(ball.faces)


def test_repeats_are_turned_or_in_a_row() -> None:
    anchor, part = np.array([[-1.0, -1, -1], [1, 1, 1]]), cone().vertices.astype(float) * 0.2
    kinds = set()
    for seed in range(20):
        copies = repeated(part, anchor, np.random.default_rng(seed))
        middles = np.array([(c.min(axis=0) + c.max(axis=0)) / 2 for c in copies])
        assert 2 <= len(copies) <= 8 and (np.abs(middles) <= 1.3).all()
        if np.ptp(middles[:, 0]) > 1e-6 and np.ptp(middles[:, 2]) > 1e-6:
            kinds.add("ring")
            assert np.hypot(middles[:, 0], middles[:, 2]).std() < 0.1
        elif len(copies) > 2:
            kinds.add("row")
            assert np.diff(middles, n=2, axis=0) == pytest.approx(0, abs=1e-9)
    assert kinds == {"ring", "row"}


def test_tumbles_are_rotations_of_every_kind() -> None:
    ups = []
    for seed in range(200):
        matrix = tumble(np.random.default_rng(seed))
        assert matrix @ matrix.T == pytest.approx(np.eye(3), abs=1e-12)
        assert np.linalg.det(matrix) == pytest.approx(1.0)
        ups.append(matrix[:, 1])
    assert np.linalg.norm(np.mean(ups, axis=0)) < 0.25  # up goes anywhere
    assert is_normalised(turned(cone(), tumble(np.random.default_rng(0))))


def test_reshaping_moves_vertices_and_keeps_the_rest() -> None:
    thing, moved = painted(), 0
    for seed in range(20):
        changed = reshaped(thing, np.random.default_rng(seed))
        assert is_normalised(changed) and (changed.faces == thing.faces).all()
        assert changed.uv is not None and changed.texture is thing.texture
        moved += np.abs(changed.vertices - thing.vertices).max() > 1e-2
        volume = trimesh.Trimesh(changed.vertices, changed.faces).volume
        assert volume > 0  # not turned inside out
    assert moved >= 15  # a cone tapered along its axis is a cone again


def test_retexturing_keeps_holes_and_fits_the_tiles() -> None:
    rng, picture = np.random.default_rng(0), np.arange(5 * 6 * 3, dtype=np.uint8).reshape(5, 6, 3)
    dressed = retextured(painted(4), picture, rng)
    assert dressed.texture is not None and dressed.texture.shape == (8, 4, 4)
    assert (dressed.texture[..., 3] == 7).all() and dressed.texture[..., :3].std() > 5
    swapped = retextured(painted(), picture, rng)  # one tile over all of it: the picture as it is
    assert swapped.texture is not None and (swapped.texture == picture).all()
    assert swapped.materials[0].tile == (0, 0, 6, 5)
    plain = retextured(cone(), picture, rng)  # no texture coordinates: other plain colours
    assert plain.texture is None and plain.materials != cone().materials
    block = retextured(solid(rng), picture, rng)
    assert block.texture is not None and block.materials[0].tile == (0, 0, 6, 5)
    assert retextured(painted(), None, rng).texture is not None


def test_subjects_are_repeatable_and_of_every_kind() -> None:
    own = painted()
    other = other_of(2, 0, lambda index: cone())
    names = set()
    unchanged = 0
    for seed in range(60):
        one, two = (subject(own, np.random.default_rng(seed), other) for _ in range(2))
        assert (one.vertices == two.vertices).all() and one.materials == two.materials
        names.add(one.name)
        unchanged += one is own
    assert 5 < unchanged < 40 and {"cone", "cone+cone"} <= names and any("solid" in name for name in names)


def test_a_lone_object_is_still_varied() -> None:
    assert other_of(1, 0, lambda index: cone()) is None
    drawn = [subject(cone(), np.random.default_rng(seed), None) for seed in range(30)]
    assert {thing.name for thing in drawn} == {"cone"}
    assert any((thing.vertices != cone().vertices).any() for thing in drawn)
