"""Colours from the views: the kernel against the same rule written out, the gaps between charts, threads."""

import numba
import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt, map_coordinates

from tests.runtime import analytic
from uc3d_rt.mesh.bake import ProjectedViews, _fill_gaps, bake_texture
from uc3d_rt.mesh.extract import extract_surface
from uc3d_rt.mesh.surface import Surface, vertex_normals
from uc3d_rt.mesh.unwrap import _laid_out, unwrap_surface
from uc3d_rt.neus.field import Field, node_coordinates
from uc3d_rt.views import TARGET_CAMERAS, camera_axes, project

SIZE = 96


@pytest.fixture(scope="module")
def two_balls() -> tuple[Surface, ProjectedViews]:
    """One ball hides part of the other from some views; the views hold noise, so that every pixel counts."""
    axis = node_coordinates(40)
    y, z, x = np.meshgrid(axis, axis, axis, indexing="ij")
    centres, radii = ((-0.4, 0.1, 0.0), (0.45, -0.1, 0.2)), (0.38, 0.3)
    distance = [
        np.sqrt((x - c[0]) ** 2 + (y - c[1]) ** 2 + (z - c[2]) ** 2) - r
        for c, r in zip(centres, radii, strict=True)
    ]
    sdf = np.minimum(*distance).astype(np.float32)
    surface = extract_surface(Field(sdf, np.zeros((*sdf.shape, 3), np.float32)), 0.05)
    shapes = [analytic.sphere(c, r) for c, r in zip(centres, radii, strict=True)]
    normal = analytic.six_views(analytic.union(*shapes), SIZE)[1]
    color = np.random.default_rng(0).random((6, SIZE, SIZE, 3)).astype(np.float32)
    return surface, ProjectedViews(surface, color, normal)


def written_out(
    point: np.ndarray, normal: np.ndarray, filled: np.ndarray, views: ProjectedViews
) -> tuple[np.ndarray, float, float, int]:
    """Colour, sum of weights, how near a yes or no was to its limit, number of views that see the point."""
    normal = normal / np.linalg.norm(normal)
    colors, weights, margin = [], [], 1.0
    for view, camera in enumerate(TARGET_CAMERAS):
        facing = float(normal @ camera_axes(camera)[2].astype(np.float64))
        margin = min(margin, abs(facing - 0.15))
        if facing <= 0.15:
            continue
        u, v, depth = project(point, camera).astype(np.float64)
        column, row = (u + 1) / 2 * SIZE, (1 - v) / 2 * SIZE
        behind = depth - views.depth[view, int(row), int(column)] - 4 / 256 / facing
        margin = min(margin, abs(behind), *(abs(w - round(w)) for w in (column, row)))
        if behind > 0:
            continue
        at = [[row - 0.5], [column - 0.5]]
        image = views.color_and_edge[view].astype(np.float64)
        *rgb, edge = (map_coordinates(image[..., k], at, order=1, mode="nearest")[0] for k in range(4))
        colors.append(rgb)
        weights.append(facing**4 * edge)
    total = float(sum(weights))
    trust = min(total / 0.05, 1.0)
    shown = np.average(colors, axis=0, weights=weights) if total > 0 else np.zeros(3)
    return trust * shown + (1 - trust) * filled, total, margin, len(weights)


def test_places_on_faces_get_the_colours_of_the_rule(two_balls: tuple[Surface, ProjectedViews]) -> None:
    surface, views = two_balls
    rng = np.random.default_rng(1)
    outward = vertex_normals(surface)
    # Some points below the surface and normals askew, so that every limit of the rule is met from both sides.
    depth = rng.uniform(0.0, 0.03, (len(outward), 1))
    surface = Surface((surface.vertices - depth * outward).astype(np.float32), surface.faces)
    normals = outward + rng.normal(0.0, 0.5, outward.shape)
    normals = (normals / np.linalg.norm(normals, axis=1, keepdims=True)).astype(np.float32)
    filled = rng.random(normals.shape).astype(np.float32)
    face = rng.integers(0, len(surface.faces), 600).astype(np.int32)
    bary = rng.dirichlet((1, 1, 1), len(face)).astype(np.float32)
    bary[:50] = np.eye(3, dtype=np.float32)[rng.integers(0, 3, 50)]
    face[::10] = -1
    color, weight = views.sample_faces(face, bary, surface, normals, filled, 0.05)
    assert not color[::10].any() and not weight[::10].any()
    seen_by = []
    for n in np.flatnonzero(face >= 0):
        at = surface.faces[face[n]]
        share = bary[n].astype(np.float64)
        point, across, fill = (share @ values[at] for values in (surface.vertices, normals, filled))
        expected, total, margin, views_in_sight = written_out(point, across, fill, views)
        if margin < 1e-5:  # either answer is right
            continue
        seen_by.append(views_in_sight)
        assert weight[n] == pytest.approx(total, rel=1e-4, abs=1e-7)
        np.testing.assert_allclose(color[n], expected, atol=5e-4)
    assert len(seen_by) > 500 and set(seen_by) >= {0, 1, 2, 3}


def test_vertices_go_by_the_same_rule(two_balls: tuple[Surface, ProjectedViews]) -> None:
    surface, views = two_balls
    normals = vertex_normals(surface)
    color, weight = views.sample(surface.vertices, normals)
    confident = weight > 0.05
    assert confident.mean() > 0.5
    corner = np.zeros((len(surface.faces), 3), np.float32)
    corner[:, 1] = 1.0
    face = np.arange(len(surface.faces), dtype=np.int32)
    black = np.zeros_like(normals)
    on_faces, weight_on_faces = views.sample_faces(face, corner, surface, normals, black, 0.05)
    vertex = surface.faces[:, 1]
    np.testing.assert_array_equal(weight_on_faces, weight[vertex])
    np.testing.assert_array_equal(on_faces[confident[vertex]], color[vertex][confident[vertex]])


def test_gaps_take_the_nearest_texel_of_a_chart() -> None:
    rng = np.random.default_rng(2)
    for share in (0.0, 0.003, 0.05, 0.5, 1.0):
        inside = rng.random((40, 53)) < share
        texture = rng.integers(0, 256, (40, 53, 3), np.uint8)
        texture[~inside] = 0
        before = texture.copy()
        _fill_gaps(texture, np.where(inside, 7, -1).astype(np.int32))
        np.testing.assert_array_equal(texture[inside], before[inside])
        if not inside.any():
            assert not texture.any()
            continue
        distance = distance_transform_edt(~inside)
        rows, columns = np.nonzero(inside)
        for row, column in np.argwhere(~inside):
            apart = np.hypot(rows - row, columns - column)
            nearest = np.abs(apart - distance[row, column]) < 1e-9  # of several, any
            candidates = before[rows[nearest], columns[nearest]]
            assert (candidates == texture[row, column]).all(axis=1).any()


def test_boxes_are_laid_out_apart() -> None:
    size = np.random.default_rng(3).integers(1, 40, (200, 2))
    size[0] = (400, 2)
    place, side = _laid_out(size)
    taken = np.zeros((side, side), np.int64)
    for (x, y), (width, height) in zip(place, size, strict=True):
        taken[x : x + width, y : y + height] += 1
    assert taken.max() == 1 and taken.sum() == (size[:, 0] * size[:, 1]).sum()


def test_the_texture_does_not_depend_on_the_number_of_threads(
    two_balls: tuple[Surface, ProjectedViews],
) -> None:
    surface, views = two_balls
    normals, atlas = vertex_normals(surface), unwrap_surface(surface, 128)
    many = bake_texture(surface, normals, atlas, views, 128)
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        one = bake_texture(surface, normals, atlas, views, 128)
    finally:
        numba.set_num_threads(before)
    np.testing.assert_array_equal(one, many)
