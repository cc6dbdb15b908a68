"""From a field to a textured mesh: handedness, closedness, texture."""

import numpy as np
import pytest
import trimesh
from scipy.ndimage import gaussian_filter

from tests.runtime import analytic
from uc3d_rt.errors import FitError
from uc3d_rt.mesh.build import MeshOptions, build_mesh
from uc3d_rt.mesh.extract import extract_surface
from uc3d_rt.mesh.raster import rasterize_pixels
from uc3d_rt.mesh.refine import refine_surface
from uc3d_rt.mesh.simplify import part_pinched_edges, simplify_surface
from uc3d_rt.mesh.surface import Surface, crease_normals, is_closed, signed_volumes, vertex_normals
from uc3d_rt.mesh.unwrap import unwrap_surface
from uc3d_rt.neus.field import Field, node_coordinates
from uc3d_rt.neus.fit import fit
from uc3d_rt.neus.fit_plan import FitOptions

Built = tuple[trimesh.Trimesh, np.ndarray, np.ndarray]
OPTIONS = MeshOptions(faces=4000, texture_px=256)
AXIS = node_coordinates(48)
Y, Z, X = np.meshgrid(AXIS, AXIS, AXIS, indexing="ij")


def field_of(sdf: np.ndarray) -> Field:
    return Field(sdf.astype(np.float32), np.full((*sdf.shape, 3), 0.5, np.float32))


def sphere_sdf(centre: tuple[float, float, float], radius: float) -> np.ndarray:
    return np.sqrt((X - centre[0]) ** 2 + (Y - centre[1]) ** 2 + (Z - centre[2]) ** 2) - radius


def merged(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """Vertices on chart borders joined again by position."""
    out = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    out.merge_vertices()
    return out


@pytest.fixture(scope="module")
def asymmetric() -> Built:
    color, normal = analytic.six_views(analytic.asymmetric(), 128)
    field = fit(color, normal, FitOptions(resolution=64, iterations=(30, 30, 30), rays_per_iteration=8000))
    return build_mesh(field, color, normal, OPTIONS), color, normal


def test_an_asymmetric_object_is_not_mirrored(asymmetric: Built) -> None:
    mesh = merged(asymmetric[0])
    # arm to x = +0.75, tower to y = 0.7 at x < 0, nose to z = 0.67
    np.testing.assert_allclose(mesh.bounds, [[-0.4, -0.5, -0.4], [0.75, 0.7, 0.67]], atol=0.05)
    tower = mesh.vertices[mesh.vertices[:, 1] > 0.5].mean(axis=0)
    np.testing.assert_allclose(tower[[0, 2]], [-0.2, -0.2], atol=0.05)


def test_the_mesh_is_closed_outward_and_one_piece(asymmetric: Built) -> None:
    mesh = merged(asymmetric[0])
    assert mesh.is_watertight and mesh.is_winding_consistent and mesh.volume > 0
    assert mesh.body_count == 1
    assert len(mesh.faces) < 1.1 * OPTIONS.faces


def test_normals_and_uv_are_valid(asymmetric: Built) -> None:
    mesh = asymmetric[0]
    np.testing.assert_allclose(np.linalg.norm(mesh.vertex_normals, axis=1), 1.0, atol=1e-4)
    uv = mesh.visual.uv
    assert np.isfinite(uv).all() and uv.min() >= 0 and uv.max() <= 1
    material = mesh.visual.material
    assert material.metallicFactor == 0.0 and material.roughnessFactor == 1.0
    assert material.baseColorTexture.size == (256, 256)


def test_no_white_background_in_the_texture() -> None:
    dark = np.array([0.1, 0.2, 0.3], np.float32)
    shape = analytic.asymmetric()
    color, normal = analytic.six_views(shape, 128, lambda points: np.broadcast_to(dark, points.shape))
    mixed = (normal == 0).all(-1)
    for axis in (1, 2):  # outlines half mixed with the background, as every renderer draws them
        for shift in (1, -1):
            edge = np.roll(mixed, shift, axis) & ~mixed
            color[edge] = 0.5 * dark + 0.5
    field = fit(color, normal, FitOptions(resolution=64, iterations=(5, 10), rays_per_iteration=8000))
    mesh = build_mesh(field, color, normal, OPTIONS)
    texture = np.asarray(mesh.visual.material.baseColorTexture, np.float32) / 255
    assert np.abs(texture - dark).max(axis=-1).mean() < 0.01
    assert (texture.max(axis=-1) > 0.55).mean() < 0.001
    colored = build_mesh(field, color, normal, MeshOptions(texture="vertex", faces=4000))
    seen = np.asarray(colored.visual.vertex_colors)[:, :3] / 255
    assert np.abs(seen - dark).max(axis=-1).mean() < 0.01


def test_colours_land_where_they_belong(asymmetric: Built) -> None:
    mesh = asymmetric[0]
    centres = mesh.triangles_center
    uv = mesh.visual.uv[mesh.faces].mean(axis=1)
    texture = np.asarray(mesh.visual.material.baseColorTexture, np.float32) / 255
    size = texture.shape[0]
    row, column = (np.clip((w * size).astype(int), 0, size - 1) for w in (1 - uv[:, 1], uv[:, 0]))
    got = texture[row, column]
    expected = 0.25 + 0.5 * (np.sin(centres * 9.0) * 0.5 + 0.5)
    side = np.abs(mesh.face_normals[:, 1]) < 0.5  # tops are not seen
    assert np.abs(got - expected)[side].mean() < 0.05


def test_stray_parts_and_cavities_are_dropped_large_parts_kept() -> None:
    both = np.minimum(sphere_sdf((-0.4, 0, 0), 0.4), sphere_sdf((0.5, 0, 0), 0.35))
    stray = np.minimum(both, sphere_sdf((0.0, 0.7, 0.5), 0.06))
    hollow = np.maximum(stray, -sphere_sdf((-0.4, 0, 0), 0.2))
    surface = extract_surface(field_of(hollow), 0.05)
    assert is_closed(surface.faces)
    expected = 4 / 3 * np.pi * (0.4**3 + 0.35**3)
    assert signed_volumes(surface).sum() == pytest.approx(expected, rel=0.03)


def test_a_surface_that_leaves_the_grid_is_closed_and_no_surface_is_an_error() -> None:
    assert is_closed(extract_surface(field_of(sphere_sdf((0.9, 0, 0), 0.5)), 0.05).faces)
    with pytest.raises(FitError, match="no volume"):
        extract_surface(field_of(np.ones_like(X)), 0.05)


def test_simplify_surface_stays_closed() -> None:
    surface = extract_surface(field_of(np.maximum(sphere_sdf((0, 0, 0), 0.7), np.abs(X) - 0.06)), 0.05)
    smaller = simplify_surface(surface, 600)
    assert is_closed(smaller.faces) and len(smaller.faces) <= 1200
    assert signed_volumes(smaller).sum() == pytest.approx(signed_volumes(surface).sum(), rel=0.1)
    assert simplify_surface(surface, 0) is surface


def test_refine_surface_sharpens_the_edges_of_a_box() -> None:
    half, radius = np.array([0.5, 0.35, 0.4]), 0.06
    beyond = np.abs(np.stack([X, Y, Z])) - (half - radius)[:, None, None, None]
    sdf = np.linalg.norm(np.maximum(beyond, 0), axis=0) + np.minimum(beyond.max(axis=0), 0) - radius
    rounded = extract_surface(field_of(sdf), 0.05)
    low, high = (float(-h) for h in half), (float(h) for h in half)
    normal = analytic.six_views(analytic.box(tuple(low), tuple(high)), 128)[1]
    refined = refine_surface(rounded, normal)
    assert is_closed(refined.faces)
    means = []
    for surface in (rounded, refined):
        corners = surface.vertices[surface.faces].astype(np.float64)
        across = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        area = np.linalg.norm(across, axis=1)
        side = np.abs(corners.mean(axis=1)[:, 1]) < half[1] - radius  # what the views see: not top or bottom
        straightest = np.abs(across[side] / area[side, None]).max(axis=1)
        angle = np.degrees(np.arccos(np.clip(straightest, 0, 1)))  # to the nearest axis
        means.append(np.average(angle, weights=area[side]))
    assert means[0] > 2.8 and means[1] < 2.3
    np.testing.assert_allclose(refined.vertices.max(axis=0), half, atol=0.04)


def test_part_pinched_edges() -> None:
    # Two tetrahedra that share the edge 0-1.
    vertices = np.array([[0, 0, -1], [0, 0, 1], [1, 1, 0], [1, -1, 0], [-1, 1, 0], [-1, -1, 0]], np.float32)
    first = [[0, 2, 1], [1, 2, 3], [0, 1, 3], [0, 3, 2]]
    second = [[0, 1, 4], [1, 5, 4], [0, 5, 1], [0, 4, 5]]
    faces = np.array(first + second, np.int32)
    pinched = Surface(vertices, faces)
    assert not is_closed(pinched.faces)
    parted = part_pinched_edges(pinched)
    assert is_closed(parted.faces)
    again = trimesh.Trimesh(parted.vertices, parted.faces)
    assert again.is_watertight and again.is_winding_consistent


def test_vertex_normals_of_a_sphere_point_outward() -> None:
    surface = extract_surface(field_of(sphere_sdf((0, 0, 0), 0.6)), 0.05)
    radial = surface.vertices / np.linalg.norm(surface.vertices, axis=1, keepdims=True)
    assert (vertex_normals(surface) * radial).sum(axis=1).min() > 0.98


def test_crease_normals_stay_apart_at_edges_only() -> None:
    box = trimesh.creation.box()
    flat = Surface(np.asarray(box.vertices, np.float32), np.asarray(box.faces, np.int32))
    group, normals = crease_normals(flat, 35.0)
    assert len(normals) == 24
    np.testing.assert_allclose(normals[group], np.repeat(box.face_normals[:, None], 3, axis=1), atol=1e-6)
    assert len(crease_normals(flat, 180.0)[1]) == 8


def test_the_atlas_keeps_the_faces_of_the_surface() -> None:
    surface = extract_surface(field_of(sphere_sdf((0, 0, 0), 0.6)), 0.05)
    atlas = unwrap_surface(surface, 256)
    np.testing.assert_array_equal(atlas.source[atlas.faces], surface.faces)


def knot(around: int = 200, across: int = 12) -> Surface:
    """A tube along a trefoil knot: seen from any side it lies over itself."""
    t = np.linspace(0, 2 * np.pi, around, endpoint=False)
    middle = np.stack([np.sin(t) + 2 * np.sin(2 * t), np.cos(t) - 2 * np.cos(2 * t), -np.sin(3 * t)], axis=1)
    along = np.roll(middle, -1, axis=0) - np.roll(middle, 1, axis=0)
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    side = np.cross(along, middle)
    side /= np.linalg.norm(side, axis=1, keepdims=True)
    a = np.linspace(0, 2 * np.pi, across, endpoint=False)[None, :, None]
    rings = middle[:, None] + 0.35 * (np.cos(a) * side[:, None] + np.sin(a) * np.cross(along, side)[:, None])
    number = np.arange(around * across).reshape(around, across)
    right, up = np.roll(number, -1, axis=0), np.roll(number, -1, axis=1)
    corner = np.roll(right, -1, axis=1)
    faces = np.concatenate([np.stack([number, right, corner], -1), np.stack([number, corner, up], -1)])
    vertices = 0.25 * rings.reshape(-1, 3)
    surface = Surface(vertices.astype(np.float32), faces.reshape(-1, 3).astype(np.int32))
    flipped = Surface(surface.vertices, np.ascontiguousarray(surface.faces[:, ::-1]))
    return surface if signed_volumes(surface).sum() > 0 else flipped


def test_the_atlas_gives_every_place_a_texel_of_its_own() -> None:
    surface, size = knot(), 512
    assert is_closed(surface.faces)
    atlas = unwrap_surface(surface, size)
    np.testing.assert_array_equal(atlas.source[atlas.faces], surface.faces)
    corner = atlas.faces.reshape(-1)
    place, uv = surface.vertices[atlas.source[corner]], atlas.uv[corner] * size
    faces = np.arange(len(corner), dtype=np.int32).reshape(-1, 3)
    shared = np.zeros((size, size), bool)
    for axis in range(3):  # nearest and farthest of all that is drawn onto a texel
        near, far = (
            rasterize_pixels(np.column_stack([uv, sign * place[:, axis]]), faces, size) for sign in (1, -1)
        )
        shared |= (near[0] >= 0) & (-far[2] - near[2] > 0.05)
    assert shared.sum() < 1e-3 * (near[0] >= 0).sum()
    assert (near[0] >= 0).mean() > 0.3  # of the texture is used; least-stretch charts fill 0.27 here
    # No face is squeezed to nothing: texels are shared out by area, within a factor of a few.
    e, d = np.diff(uv.reshape(-1, 3, 2), axis=1).transpose(1, 0, 2)
    texels = np.abs(e[:, 0] * d[:, 1] - e[:, 1] * d[:, 0])
    corners = surface.vertices[surface.faces]
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    density = texels / area
    assert density.min() > 0.09 * density.max()


def test_mesh_options_are_checked() -> None:
    for wrong in (
        {"texture": "none"},
        {"faces": 5},
        {"texture_px": 1},
        {"min_share": 0.0},
        {"crease_deg": 0.0},
    ):
        with pytest.raises(ValueError, match="MeshOptions"):
            MeshOptions(**wrong)


def test_a_sponge_does_not_keep_its_faces() -> None:
    rng = np.random.default_rng(0)
    size = 64
    holes = gaussian_filter(rng.standard_normal((size,) * 3), 1.0)
    axis = node_coordinates(size)
    ball = np.sqrt(axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2) - 0.7
    sdf = np.maximum(ball, holes / holes.std() * 0.02).astype(np.float32)
    field = field_of(sdf)
    color, normal = analytic.six_views(analytic.sphere((0, 0, 0), 0.7), 64)
    options = MeshOptions(texture="vertex", faces=300)
    mesh = build_mesh(field, color, normal, options)
    assert len(extract_surface(field, 0.05).faces) > 30_000
    assert len(mesh.faces) < 8_000
    assert mesh.is_watertight
