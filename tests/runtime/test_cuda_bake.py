"""The bake's kernels against `bake.py`, compiled as plain C++ or, with `make test-gpu`, on a GPU."""

import subprocess
import sys

import numpy as np
import pytest
import trimesh
from scipy.spatial import KDTree

from tests.runtime import analytic
from tests.runtime.host_device import HostDevice
from tests.runtime.test_cuda_carve import Failing
from uc3d_rt.device import Device, uploaded
from uc3d_rt.errors import BackendError
from uc3d_rt.mesh import bake as twin
from uc3d_rt.mesh.build import MeshOptions, build_mesh
from uc3d_rt.mesh.device_bake import (
    DeviceViews,
    bake_texture_on_device,
    continue_on_device,
    fill_gaps,
    vertex_colors_on_device,
    vertex_neighbours,
)
from uc3d_rt.mesh.device_unwrap import behind_on_device
from uc3d_rt.mesh.extract import extract_surface
from uc3d_rt.mesh.projection import CONFIDENT, UNKNOWN, atlas_points
from uc3d_rt.mesh.raster import rasterize_pixels
from uc3d_rt.mesh.surface import Surface, vertex_normals
from uc3d_rt.mesh.unwrap import Atlas, _behind, unwrap_surface
from uc3d_rt.neus.field import Field, node_coordinates

CENTRES, RADII = ((-0.4, 0.1, 0.0), (0.45, -0.1, 0.2)), (0.38, 0.3)
TEXTURE_PX = 160

Scene = tuple[Surface, np.ndarray, np.ndarray, np.ndarray, Atlas]


def balls_field(nodes: int) -> Field:
    """One ball hides part of the other from some views."""
    axis = node_coordinates(nodes)
    y, z, x = np.meshgrid(axis, axis, axis, indexing="ij")
    distance = [
        np.sqrt((x - c[0]) ** 2 + (y - c[1]) ** 2 + (z - c[2]) ** 2) - r
        for c, r in zip(CENTRES, RADII, strict=True)
    ]
    sdf = np.minimum(*distance).astype(np.float32)
    return Field(sdf, np.zeros((*sdf.shape, 3), np.float32))


def balls_views(size_px: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise, so that every pixel counts, and normals."""
    shapes = [analytic.sphere(c, r) for c, r in zip(CENTRES, RADII, strict=True)]
    normal = analytic.six_views(analytic.union(*shapes), size_px)[1]
    return np.random.default_rng(0).random(normal.shape).astype(np.float32), normal


@pytest.fixture(scope="module")
def scene() -> Scene:
    """Surface, normals, colours and normals of the views, atlas."""
    surface = extract_surface(balls_field(40), 0.05)
    return surface, vertex_normals(surface), *balls_views(96), unwrap_surface(surface, TEXTURE_PX)


def alike(found: np.ndarray, expected: np.ndarray, tolerance: float, share: float) -> None:
    """All but a share lie within the tolerance: a GPU rounds some yes or no to the other side."""
    off = np.abs(found.astype(np.float64) - expected) > tolerance
    assert off.mean() <= share, f"{off.mean():.2e} of the values are off"


@pytest.mark.parametrize("size_px", [96, 300])  # distances to edges count further in large views
def test_views(device: Device, scene: Scene, size_px: int) -> None:
    surface, normals = scene[:2]
    color, normal = balls_views(size_px)
    normal[:, :40, :, :] = 0.0  # an outline that the surface does not have
    normal[0] = (0.0, 1.0, 0.0)  # and one that only the image's border ends
    views = DeviceViews(device, surface, normals, color, normal)
    expected = twin.ProjectedViews(surface, color, normal)
    alike(device.download(views.depth), expected.depth, 1e-5, 1e-3)
    found = device.download(views.color_and_edge)
    np.testing.assert_array_equal(found[..., :3], color)
    alike(found[..., 3], expected.color_and_edge[..., 3], 1e-6, 1e-3)
    weights = expected.color_and_edge[..., 3]
    assert len(np.unique(weights[weights < 1])) > 6 and (weights == 1).mean() > 0.05
    assert (expected.depth < 10).mean() > 0.05


def test_vertices_get_the_colours_of_the_views(device: Device, scene: Scene) -> None:
    surface, outward, color, normal, _ = scene
    rng = np.random.default_rng(1)
    # Some points below the surface and normals askew, so that every limit of the rule is met from both sides.
    depth = rng.uniform(0.0, 0.03, (len(outward), 1))
    surface = Surface((surface.vertices - depth * outward).astype(np.float32), surface.faces)
    normals = (outward + rng.normal(0.0, 0.5, outward.shape)).astype(np.float32)
    views = DeviceViews(device, surface, normals, color, normal)
    expected = twin.ProjectedViews(surface, color, normal).sample(surface.vertices, normals)
    for buffer, array in zip(views.blend_vertices(), expected, strict=True):
        alike(device.download(buffer), array, 1e-5, 2e-3)
    assert (expected[1] == 0).sum() > 100 and (expected[1] > CONFIDENT).sum() > 1000


def test_neighbours() -> None:
    faces = np.array(
        [[0, 1, 2], [2, 1, 4], [0, 2, 1]], np.int32
    )  # open, one edge three times; vertex 3 is alone
    starts, neighbours = vertex_neighbours(faces, 5)
    np.testing.assert_array_equal(starts, [0, 2, 5, 8, 8, 10])
    np.testing.assert_array_equal(neighbours, [1, 2, 0, 2, 4, 0, 1, 4, 1, 2])


def continued(device: Device, surface: Surface, color: np.ndarray, trust: np.ndarray) -> np.ndarray:
    given = uploaded(device, color), uploaded(device, (trust * CONFIDENT).astype(np.float32))
    return device.download(continue_on_device(device, surface.faces, *given))


@pytest.mark.parametrize("unseen", [0.0, 0.3, 0.9, 0.99])
def test_unseen_vertices_are_continued(device: Device, scene: Scene, unseen: float) -> None:
    surface = scene[0]
    rng = np.random.default_rng(4)
    place = surface.vertices
    trust = np.where(place[:, 1] > np.quantile(place[:, 1], unseen), 1.0, 0.0).astype(np.float32)
    trust[::7] *= rng.random(len(trust[::7]), dtype=np.float32)
    color = (0.5 + 0.5 * np.sin(7 * place + rng.random(3))).astype(np.float32) * (trust > 0)[:, None]
    color[:, 2] = 0.0  # a channel with nothing to solve
    found = continued(device, surface, color, trust)
    expected = twin.continue_over_surface(surface.faces, color, trust)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert np.abs(found - color)[trust == 1].mean() < 0.05
    if unseen:
        assert np.ptp(found[trust == 0][:, :2], axis=0).max() > 0.01 and not found[:, 2].any()


def test_a_surface_that_no_view_sees_is_grey(device: Device, scene: Scene) -> None:
    surface = scene[0]
    black = np.zeros_like(surface.vertices)
    found = continued(device, surface, black, np.zeros(len(black)))
    np.testing.assert_allclose(found, UNKNOWN, atol=1e-6)
    np.testing.assert_allclose(
        found, twin.continue_over_surface(surface.faces, black, np.zeros(len(black))), atol=1e-6
    )


@pytest.mark.parametrize("held", [1.0, 0.01])  # channels end at 0, 111 and 158 steps; two take all there are
def test_the_search_ends_as_on_the_cpu(device: Device, held: float) -> None:
    count = 400
    ring = np.arange(2 * count, dtype=np.int32).reshape(-1, 2)
    faces = [
        np.stack([ring[:-1, 0], ring[1:, 0], ring[:-1, 1]], axis=1),
        np.stack([ring[1:, 0], ring[1:, 1], ring[:-1, 1]], axis=1),
    ]
    strip = Surface(np.zeros((2 * count, 3), np.float32), np.concatenate(faces))
    trust = np.zeros(2 * count, np.float32)
    trust[:2], trust[-2:] = held, 0.5 * held
    color = np.zeros((2 * count, 3), np.float32)
    color[:2], color[-2:] = (1.0, 0.2, 0.5), (0.0, 0.9, 0.5)
    expected = twin.continue_over_surface(strip.faces, color, trust)
    np.testing.assert_allclose(continued(device, strip, color, trust), expected, atol=1e-3)
    assert np.ptp(expected[:, 0]) > 0.9


def test_gaps_take_the_texel_that_they_take_on_the_cpu(device: Device) -> None:
    rng = np.random.default_rng(2)
    for share in (0.0, 0.001, 0.05, 0.5, 1.0):
        inside = rng.random((57, 57)) < share
        inside[:, 20:40] &= rng.random((57, 20)) < 0.1
        texture = rng.integers(0, 256, (57, 57, 3), np.uint8)
        texture[~inside] = 0
        face = np.where(inside, 7, -1).astype(np.int32)
        buffer = uploaded(device, texture)
        fill_gaps(device, buffer, uploaded(device, face))
        twin._fill_gaps(texture, face)
        np.testing.assert_array_equal(device.download(buffer), texture)


def test_a_texture_is_that_of_the_cpu(machine: Device, device: Device, scene: Scene) -> None:
    surface, normals, color, normal, atlas = scene
    views = twin.ProjectedViews(surface, color, normal)
    expected = twin.bake_texture(surface, normals, atlas, views, TEXTURE_PX)
    found = bake_texture_on_device(device, surface, normals, atlas, color, normal, TEXTURE_PX)
    assert found.dtype == np.uint8 and found.std() > 20
    off = np.abs(found.astype(int) - expected).max(axis=-1)
    assert (off > 1).mean() < 2e-3
    assert (off > 0).mean() < (1e-3 if isinstance(machine, HostDevice) else 0.02)
    on_vertices = vertex_colors_on_device(device, surface, normals, color, normal)
    alike(on_vertices, twin.vertex_colors(surface, normals, views), 1 / 255, 2e-3)


def test_a_painted_sphere(device: Device) -> None:
    """The views' paint is a known function of the place: that is the colour where they look squarely."""

    def paint(points: np.ndarray) -> np.ndarray:
        return (0.5 + 0.4 * np.sin(3.0 * points + np.array([0.0, 1.0, 2.0]))).astype(np.float32)

    ball, radius = trimesh.creation.icosphere(4, 0.7), 0.7
    surface = Surface(np.asarray(ball.vertices, np.float32), np.asarray(ball.faces, np.int32))
    normals = (surface.vertices / radius).astype(np.float32)
    color, normal = analytic.six_views(analytic.sphere((0, 0, 0), radius), 256, paint)
    on_vertices = vertex_colors_on_device(device, surface, normals, color, normal)
    seen = np.abs(normals[:, 1]) < 0.7
    assert np.abs(on_vertices - paint(surface.vertices))[seen].max() < 0.02
    # The poles, which no view sees, continue what is around them.
    pole = np.abs(normals[:, 1]) > 0.995
    for side in (1.0, -1.0):
        there = normals[:, 1] * side
        around = on_vertices[(there > 0.95) & (there < 0.98)]
        inside = on_vertices[pole & (there > 0)]
        assert len(inside) > 5
        assert (inside > around.min(axis=0) - 0.02).all() and (inside < around.max(axis=0) + 0.02).all()

    atlas = unwrap_surface(surface, 256)
    texture = bake_texture_on_device(device, surface, normals, atlas, color, normal, 256) / 255.0
    face, shares, _ = rasterize_pixels(atlas_points(atlas, 256), atlas.faces, 256)
    inside = face >= 0
    place = (surface.vertices[surface.faces[face[inside]]] * shares[inside][..., None]).sum(axis=1)
    side = np.abs(place[:, 1]) < 0.7 * radius
    off = np.abs(texture[inside] - paint(place)).max(axis=1)[side]
    assert np.quantile(off, 0.999) < 0.02 and side.mean() > 0.5
    # Between the charts there are no other colours than in them.
    charts = {tuple(c) for c in (texture[inside] * 255).round().astype(int)}
    assert {tuple(c) for c in (texture[~inside] * 255).round().astype(int)} <= charts


def test_faces_behind_others_are_those_of_the_cpu(device: Device) -> None:
    rng = np.random.default_rng(6)
    corners = np.concatenate([rng.uniform(0, 90, (80, 3, 2)), rng.uniform(-1, 1, (80, 3, 1))], axis=2)
    above = corners.reshape(-1, 3).astype(np.float32)
    below = above * np.array([1, 1, -1], np.float32)
    for apart in (0.01, 0.8):
        expected = _behind(above, below, 90, apart)
        assert 5 < expected.sum() < 80
        assert (behind_on_device(device, above, below, 90, apart) != expected).mean() < 0.03


def test_threads_in_another_order_give_the_same_bytes(machine: Device, scene: Scene) -> None:
    if not isinstance(machine, HostDevice):
        pytest.skip("the stand-in's order can be chosen")
    surface, normals, color, normal, _ = scene
    found = []
    try:
        for machine.blocks in ((0,), (3, 0, 6, 2, 4, 1, 5), (1, 0)):
            atlas = unwrap_surface(surface, TEXTURE_PX, machine)
            texture = bake_texture_on_device(machine, surface, normals, atlas, color, normal, TEXTURE_PX)
            vertices = vertex_colors_on_device(machine, surface, normals, color, normal)
            found.append((texture.tobytes(), vertices.tobytes(), atlas.uv.tobytes()))
    finally:
        machine.blocks = (0,)
    assert found[0] == found[1] == found[2]


def test_twice_gives_the_same_bytes(device: Device, scene: Scene) -> None:
    surface, normals, color, normal, atlas = scene
    first, second = (
        bake_texture_on_device(device, surface, normals, atlas, color, normal, TEXTURE_PX) for _ in range(2)
    )
    assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize(
    "what", [{"memory": m} for m in (3, 12, 40)] + [{"launches": n} for n in (1, 30)] + [{}]
)
def test_all_memory_is_given_back(machine: Device, scene: Scene, what: dict[str, int]) -> None:
    if not isinstance(machine, HostDevice):
        pytest.skip("counted on the stand-in")
    surface, normals, color, normal, atlas = scene
    failing = Failing(machine, **what)
    if what:
        with pytest.raises(BackendError):
            bake_texture_on_device(failing, surface, normals, atlas, color, normal, TEXTURE_PX)
    else:
        bake_texture_on_device(failing, surface, normals, atlas, color, normal, TEXTURE_PX)
        vertex_colors_on_device(failing, surface, normals, color, normal)
        unwrap_surface(surface, TEXTURE_PX, failing)
    assert failing.live == 0


@pytest.mark.parametrize("texture", ["atlas", "vertex"])
def test_a_mesh_of_a_device(machine: Device, device: Device, texture: str) -> None:
    color, normal = balls_views(96)
    faces = 1500 if texture == "atlas" else 0  # decimated, the two roads' vertices stand elsewhere
    options = MeshOptions(texture=texture, faces=faces, texture_px=128)
    told: list[tuple[int, int]] = []
    field = balls_field(48)
    here = build_mesh(field, color, normal, options)
    there = build_mesh(field, color, normal, options, lambda *step: told.append(step), device)
    steps = 4 if texture == "atlas" else 3
    assert told == [(n + 1, steps) for n in range(steps)]
    assert there.vertices.shape[1] == 3 and there.volume == pytest.approx(here.volume, rel=0.02)
    if texture == "vertex":  # their order is each road's own
        distance, nearest = KDTree(here.vertices).query(there.vertices)
        levels = [mesh.visual.vertex_colors.astype(float) for mesh in (there, here)]
        assert distance.mean() < 3e-3 and np.abs(levels[0] - levels[1][nearest]).mean() < 4


def test_the_device_road_compiles_nothing() -> None:
    """Loading numba's functions takes a cold process seconds."""
    names = "build, device_bake, device_extract, device_refine, device_unwrap, projection, unwrap"
    script = f"import sys\nfrom uc3d_rt.mesh import {names}\nsys.exit('numba' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
