"""Rendered images against closed forms, trimesh ray casts, and meshes with the placement baked in."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import trimesh

from tests.train.shapes import thing
from train.augment import yaw_matrix
from train.objects import Material, Object, linear_to_srgb, srgb_to_linear
from train.render import TARGET_LIGHT, Light, Scene, View
from uc3d_rt.views import BOUNDING_RADIUS, TARGET_CAMERAS, Camera, camera_rays, decode_normals, pixel_grid

PX = 96
FLAT = Light(direction=(0.0, 1.0, 0.0), ambient=1.0, key=0.0, wrap=0.0)
FRONT = Camera(0.0)


def many_colors(mesh: trimesh.Trimesh) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (len(mesh.vertices), 3), dtype=np.uint8)


def quad(texture: np.ndarray, uv: np.ndarray | None = None, material: Material | None = None) -> Object:
    """A square of half side 0.5 in the plane z = 0, facing +Z, with a texture over it."""
    corners = np.array([[-0.5, -0.5, 0], [0.5, -0.5, 0], [0.5, 0.5, 0], [-0.5, 0.5, 0]], np.float32)
    if uv is None:
        uv = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
    material = material or Material()
    return Object(
        name="quad",
        vertices=corners,
        faces=np.array([[0, 1, 2], [0, 2, 3]], np.int32),
        uv=np.asarray(uv, np.float32),
        texture=texture,
        vertex_color=None,
        face_material=np.zeros(2, np.int32),
        materials=(replace(material, tile=(0, 0, texture.shape[1], texture.shape[0])),),
    )


@pytest.fixture(scope="module")
def blob() -> trimesh.Trimesh:
    """An irregular closed mesh with a hole through it."""
    mesh = trimesh.creation.torus(0.7, 0.25, major_sections=24, minor_sections=12)
    rng = np.random.default_rng(3)
    mesh.vertices += rng.normal(scale=0.02, size=mesh.vertices.shape)
    mesh.apply_transform(trimesh.transformations.rotation_matrix(0.7, [1, 2, 3]))
    return mesh


def test_sphere_silhouette_and_normals() -> None:
    sphere = thing(trimesh.creation.icosphere(subdivisions=5))
    cameras = [Camera(0.0), Camera(200.0), Camera(70.0, 35.0)]
    with Scene(sphere) as scene:
        images = scene.render([View(c) for c in cameras], PX)
    u, v = pixel_grid(PX)
    for k, camera in enumerate(cameras):
        normals, mask = decode_normals(images.normal[k] / 255.0)
        inside = np.hypot(u, v) < BOUNDING_RADIUS
        sure = np.abs(np.hypot(u, v) - BOUNDING_RADIUS) > 2.0 / PX
        assert (mask == inside)[sure].all()
        origins, directions = camera_rays(camera, PX)
        travelled = 2.0 - np.sqrt(np.maximum(BOUNDING_RADIUS**2 - u**2 - v**2, 0))
        hit = origins + directions * travelled[..., None]
        core = np.hypot(u, v) < 0.85
        cosine = (normals * hit).sum(-1)[core] / BOUNDING_RADIUS
        assert np.degrees(np.arccos(np.clip(cosine, -1, 1))).max() < 4.0  # facets are ~2 degrees wide


def test_target_views_of_a_box_have_its_face_normals_and_widths() -> None:
    box = thing(trimesh.creation.box([1.0, 0.5, 0.25]))
    half = np.abs(box.vertices).max(axis=0)
    with Scene(box) as scene:
        images = scene.render([View(c) for c in TARGET_CAMERAS], PX)
    for k, camera in enumerate(TARGET_CAMERAS):
        a = math.radians(camera.azimuth_deg)
        normals, mask = decode_normals(images.normal[k] / 255.0)
        width = 2 * (half[0] * abs(math.cos(a)) + half[2] * abs(math.sin(a)))
        coverage = images.alpha[k] / 255.0  # known to an eighth of a pixel at either edge
        assert coverage[PX // 2].sum() * 2 / PX == pytest.approx(width, abs=0.5 / PX + 1e-3)
        assert coverage[:, PX // 2].sum() * 2 / PX == pytest.approx(2 * half[1], abs=0.5 / PX + 1e-3)
        allowed = {(round(math.copysign(1, math.sin(a))), 0, 0), (0, 0, round(math.copysign(1, math.cos(a))))}
        seen = {tuple(np.round(n).astype(int)) for n in normals[mask] if np.abs(n).max() > 0.98}
        assert seen <= allowed and len(seen) >= 1


def test_background_is_white_mid_grey_and_transparent(blob: trimesh.Trimesh) -> None:
    with Scene(thing(blob)) as scene:
        images = scene.render([View(FRONT)], PX)
    outside = images.alpha[0] == 0
    assert outside[0].all() and (images.color[0][outside] == 255).all()
    assert (images.normal[0][images.alpha[0] < 127] == 128).all()
    assert (images.normal[0][images.alpha[0] > 127] != 128).any(axis=-1).all()


@pytest.mark.parametrize("camera", [Camera(40.0, 25.0), Camera(310.0, -15.0, 35.0), Camera(0.0, 0.0, 85.0)])
def test_hits_and_normals_are_those_of_trimesh(blob: trimesh.Trimesh, camera: Camera) -> None:
    obj = thing(blob)
    mesh = trimesh.Trimesh(obj.vertices, obj.faces, process=False)
    px = 40
    with Scene(obj) as scene:
        images = scene.render([View(camera)], px, samples=1)
    origins, directions = (a.reshape(-1, 3).astype(np.float64) for a in camera_rays(camera, px))
    triangles = mesh.ray.intersects_first(origins, directions)
    hit = triangles >= 0
    differ = (images.alpha[0].reshape(-1) > 0) != hit
    assert differ.mean() < 0.002  # rays that graze an edge
    both = hit & ~differ
    want = mesh.face_normals[triangles]
    want = want * -np.sign((want * directions).sum(axis=1))[:, None]
    got, _ = decode_normals(images.normal[0].reshape(-1, 3) / 255.0)
    close = (got * want).sum(axis=1)[both] > 0.999
    assert close.mean() > 0.995


def test_both_sides_of_a_sheet_face_the_camera() -> None:
    sheet = quad(np.full((2, 2, 3), 200, np.uint8))
    with Scene(sheet) as scene:
        images = scene.render([View(Camera(0.0), light=FLAT), View(Camera(180.0), light=FLAT)], PX)
    middle = PX // 2
    assert images.normal[0, middle, middle].tolist() == [128, 128, 255]
    assert images.normal[1, middle, middle].tolist() == [128, 128, 0]
    assert (images.color[:, middle, middle] == 200).all()


@pytest.mark.parametrize("samples", [2, 4])
def test_coverage_is_the_exact_area(samples: int) -> None:
    turned = trimesh.creation.box([1.0, 1.0, 1.0])
    turned.apply_transform(trimesh.transformations.rotation_matrix(math.radians(30), [0, 0, 1]))
    box = thing(turned, normalise=False)  # a unit square, turned by 30 degrees, seen from +Z
    with Scene(box) as scene:
        images = scene.render([View(FRONT)], PX, samples)
    area = (images.alpha[0] / 255.0).sum() * (2.0 / PX) ** 2
    assert area == pytest.approx(1.0, rel=0.01)
    levels = np.unique(np.round(images.alpha[0] / 255.0 * samples**2, 2))
    assert len(levels) > samples  # partial coverage occurs


def test_color_at_the_edge_is_composited_on_white_in_srgb() -> None:
    sheet = quad(np.zeros((1, 1, 3), np.uint8))  # black, edges at u = +-0.5
    with Scene(sheet) as scene:
        on_white = scene.render([View(FRONT, light=FLAT)], 6, samples=2)
        straight = scene.render([View(FRONT, light=FLAT)], 6, samples=2, straight_alpha=True)
    # pixels are 1/3 wide: the column from 1/3 to 2/3 is half covered, its row in the middle fully
    assert on_white.alpha[0, 2, 4] == 128 and on_white.color[0, 2, 4].tolist() == [128] * 3
    assert straight.alpha[0, 2, 4] == 128 and straight.color[0, 2, 4].tolist() == [0] * 3
    assert straight.color[0, 0, 0].tolist() == [255] * 3


@pytest.mark.parametrize("focal", [None, 35.0, 50.0, 135.0])
def test_apparent_size_follows_the_focal_length(focal: float | None) -> None:
    """A sheet at distance z before the origin is magnified by d / (d - z), with d = f / 18 mm."""
    z = 0.4
    near = quad(np.zeros((1, 1, 3), np.uint8))
    near = replace(near, vertices=(near.vertices + np.array([0, 0, z])).astype(np.float32))
    with Scene(near) as scene:
        images = scene.render([View(Camera(0.0, 0.0, focal))], 256)
    width = (images.alpha[0, 128] / 255.0).sum() * 2.0 / 256
    expected = 1.0 if focal is None else (focal / 18.0) / (focal / 18.0 - z)
    assert width == pytest.approx(expected, abs=0.005)


def test_window_moves_and_magnifies() -> None:
    sheet = quad(np.zeros((1, 1, 3), np.uint8))
    with Scene(sheet) as scene:
        images = scene.render([View(FRONT, window=(0.5, 0.25, 0.5))], 64)
    columns = np.flatnonzero(images.alpha[0].any(axis=0))
    rows = np.flatnonzero(images.alpha[0].any(axis=1))
    assert (columns.min(), columns.max()) == (0, 31)  # u from 0 to 1: the sheet ends at 0.5
    assert (rows.min(), rows.max()) == (16, 63)  # v from 0.75 to -0.25: it begins at 0.5


def test_image_is_not_mirrored_and_elevation_looks_from_above() -> None:
    """Red at +X, green at +Y, blue at +Z of the origin."""
    meshes, colors = [], []
    for axis in range(3):
        ball = trimesh.creation.icosphere(subdivisions=2, radius=0.2)
        ball.apply_translation(np.eye(3)[axis] * 0.6)
        meshes.append(ball)
        colors.append(np.tile(np.eye(3)[axis] * 255, (len(ball.vertices), 1)))
    obj = thing(
        trimesh.util.concatenate(meshes), colors=np.concatenate(colors).astype(np.uint8), normalise=False
    )

    def centre(image: np.ndarray, channel: int) -> tuple[float, float]:
        other = np.delete(image.astype(int), channel, axis=-1).sum(-1)
        rows, columns = np.nonzero((image[..., channel] > 200) & (other < 60))
        return (columns.mean() + 0.5) / PX * 2 - 1, 1 - (rows.mean() + 0.5) / PX * 2

    with Scene(obj) as scene:
        cameras = (Camera(0.0), Camera(90.0), Camera(0.0, 40.0))
        front, side, above = scene.render([View(camera, light=FLAT) for camera in cameras], PX).color
    assert centre(front, 0) == pytest.approx((0.6, 0.0), abs=0.03)
    assert centre(front, 1) == pytest.approx((0.0, 0.6), abs=0.03)
    assert centre(side, 2) == pytest.approx((-0.6, 0.0), abs=0.03)  # from +X, +Z is on the left
    e = math.radians(40.0)
    assert centre(above, 2) == pytest.approx((0.0, -0.6 * math.sin(e)), abs=0.03)  # the near side sinks
    assert centre(above, 1) == pytest.approx((0.0, 0.6 * math.cos(e)), abs=0.03)


def test_texture_stands_upright_and_is_bilinear_in_linear_light() -> None:
    texture = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)
    sheet = quad(texture, material=Material(repeat=(False, False)))
    with Scene(sheet) as scene:
        image = scene.render([View(FRONT, light=FLAT)], 64, samples=1).color[0]
    # the sheet covers pixels 16..47; texel centres lie at 24 and 40, and the corners are clamped
    assert image[17, 17].tolist() == [255, 0, 0] and image[17, 46].tolist() == [0, 255, 0]
    assert image[46, 17].tolist() == [0, 0, 255] and image[46, 46].tolist() == [255, 255, 255]
    t = (28.5 - 24.0) / 16.0  # between the upper two texels
    want = linear_to_srgb(np.array([1 - t, t, 0.0])) * 255
    assert image[18, 28] == pytest.approx(want, abs=1.01)


def test_wrap_and_nearest() -> None:
    texture = np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8)
    twice = np.array([[0, 0], [2, 0], [2, 1], [0, 1]])
    views = [View(FRONT, light=FLAT)]
    with Scene(quad(texture, twice, Material(nearest=True))) as scene:
        repeated = scene.render(views, 64, samples=1).color[0, 32, 16:48, 0]
    assert repeated.tolist() == ([0] * 8 + [255] * 8) * 2
    with Scene(quad(texture, twice, Material(nearest=True, repeat=(False, False)))) as scene:
        clamped = scene.render(views, 64, samples=1).color[0, 32, 16:48, 0]
    assert clamped.tolist() == [0] * 8 + [255] * 24


def test_tiles_of_a_joint_texture_do_not_bleed() -> None:
    stack = np.zeros((8, 4, 3), np.uint8)
    stack[:4] = (200, 10, 10)
    stack[4:] = (10, 10, 200)
    sheet = quad(stack)
    lower = replace(sheet, materials=(Material(tile=(0, 4, 4, 4)),))
    with Scene(lower) as scene:
        image = scene.render([View(FRONT, light=FLAT)], 64).color[0, 17:47, 17:47]
    assert (image == (10, 10, 200)).all()


def test_cut_out_alpha_lets_rays_through() -> None:
    texture = np.full((1, 2, 4), 255, np.uint8)
    texture[0, 0] = (0, 0, 0, 0)
    sheet = quad(texture, material=Material(alpha_cutoff=0.5, nearest=True))
    with Scene(sheet) as scene:
        alpha = scene.render([View(FRONT)], 64).alpha[0, 32]
    assert alpha[16:32].max() == 0 and alpha[32:48].min() == 255


def test_shading_is_the_documented_formula() -> None:
    tilt = math.radians(50.0)
    mesh = trimesh.creation.box([1.0, 1.0, 1e-3])
    mesh.apply_transform(trimesh.transformations.rotation_matrix(-tilt, [1, 0, 0]))
    factor = (0.5, 0.2, 0.05)
    light = Light((0.3, 0.8, 0.2), ambient=0.2, key=0.6, wrap=0.3, tint=(1.0, 0.9, 0.8), exposure=1.1)
    with Scene(thing(mesh, factor=factor)) as scene:
        got = scene.render([View(FRONT, light=light), View(FRONT)], PX).color[:, PX // 2, PX // 2]
    normal = np.array([0.0, math.sin(tilt), math.cos(tilt)])
    towards = np.array(light.direction) / np.linalg.norm(light.direction)
    shading = 0.2 + 0.6 * np.clip((normal @ towards + 0.3) / 1.3, 0, 1)
    want = linear_to_srgb(np.array(factor) * shading * np.array(light.tint) * 1.1)
    assert got[0] == pytest.approx(want * 255, abs=0.51)
    soft = 0.6 + 0.4 * (normal[1] + 1) / 2
    assert got[1] == pytest.approx(linear_to_srgb(np.array(factor) * soft) * 255, abs=0.51)


def test_target_light_does_not_change_with_yaw(blob: trimesh.Trimesh) -> None:
    """Turning object and camera together shows the same picture."""
    turn = np.column_stack([yaw_matrix(77.0), np.zeros(3)]).astype(np.float32)
    with Scene(thing(blob)) as scene:
        still, turned = scene.render([View(Camera(0.0)), View(Camera(77.0), turn)], PX).color.astype(int)
    assert TARGET_LIGHT.wrap == 1.0
    assert (np.abs(still - turned).max(axis=-1) > 2).mean() < 0.003


def test_color_matrix_and_brightness_act_on_the_albedo() -> None:
    sheet = quad(np.array([[[180, 90, 30]]], np.uint8))
    swap = np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]], np.float32)
    with Scene(sheet) as scene:
        turned, brighter = scene.render(
            [View(FRONT, light=FLAT, color_matrix=swap), View(FRONT, light=FLAT, brightness=1.5)], 32
        ).color[:, 16, 16]
    assert turned.tolist() == [90, 30, 180]
    want = linear_to_srgb(np.clip(srgb_to_linear(np.array([180, 90, 30]) / 255.0) * 1.5, 0, 1)) * 255
    assert brighter == pytest.approx(want, abs=0.51)


@pytest.mark.parametrize("mirror", [1.0, -1.0])
def test_placement_equals_a_transformed_mesh(blob: trimesh.Trimesh, mirror: float) -> None:
    matrix = yaw_matrix(50.0) * np.array([0.8 * mirror, 0.6, 0.9])
    placement = np.column_stack([matrix, [0.05, -0.02, 0.03]]).astype(np.float32)
    obj = thing(blob, colors=many_colors(blob))
    baked = replace(obj, vertices=(obj.vertices @ placement[:, :3].T + placement[:, 3]).astype(np.float32))
    cameras = [Camera(0.0, 20.0), Camera(130.0, 0.0, 50.0)]
    with Scene(obj) as scene:
        placed = scene.render([View(c, placement) for c in cameras], PX)
    with Scene(baked) as scene:
        moved = scene.render([View(c) for c in cameras], PX)
    for got, want in ((placed.color, moved.color), (placed.normal, moved.normal)):
        differ = np.abs(got.astype(int) - want.astype(int)).max(axis=-1)
        assert (differ > 3).mean() < 0.003
    assert (placed.alpha != moved.alpha).mean() < 0.003


def test_normals_under_uneven_scale_match_finite_differences_of_depth() -> None:
    """A sphere scaled to an ellipsoid, whose depth has a closed form."""
    axes = np.array([0.9, 0.6, 0.3])
    sphere = thing(trimesh.creation.icosphere(subdivisions=5))
    unit = (sphere.vertices / np.linalg.norm(sphere.vertices, axis=1, keepdims=True)).astype(np.float32)
    placement = np.column_stack([np.diag(axes), np.zeros(3)]).astype(np.float32)
    with Scene(replace(sphere, vertices=unit)) as scene:
        image = scene.render([View(FRONT, placement)], PX).normal[0]
    u, v = pixel_grid(PX)
    inside = (u / 0.9) ** 2 + (v / 0.6) ** 2 < 0.8

    def depth(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return 0.3 * np.sqrt(1 - (x / 0.9) ** 2 - (y / 0.6) ** 2)

    x, y, h = u[inside].astype(np.float64), v[inside].astype(np.float64), 1e-5
    slope_x = (depth(x + h, y) - depth(x - h, y)) / (2 * h)
    slope_y = (depth(x, y + h) - depth(x, y - h)) / (2 * h)
    want = np.stack([-slope_x, -slope_y, np.ones_like(x)], axis=-1)
    want /= np.linalg.norm(want, axis=-1, keepdims=True)
    got, _ = decode_normals(image[inside] / 255.0)
    assert np.degrees(np.arccos(np.clip((got * want).sum(-1), -1, 1))).max() < 5.0


def test_renders_are_the_same_each_time_and_in_any_company(blob: trimesh.Trimesh) -> None:
    views = [View(Camera(a, 10.0)) for a in (0.0, 90.0, 222.0)]
    with Scene(thing(blob)) as scene:
        together = scene.render(views, 50)
        again = scene.render(views, 50)
        alone = [scene.render([view], 50).color[0] for view in views]
    assert (together.color == again.color).all() and (together.normal == again.normal).all()
    assert (together.color == np.stack(alone)).all()


def test_torch_results_are_the_same(blob: trimesh.Trimesh) -> None:
    with Scene(thing(blob)) as scene:
        tensors = scene.render_torch([View(FRONT)], 32)
        images = scene.render([View(FRONT)], 32)
    assert tensors.color.dtype == tensors.normal.dtype == tensors.alpha.dtype == torch.uint8
    assert (tensors.to_host().color == images.color).all()


def test_what_cannot_work_is_refused(blob: trimesh.Trimesh) -> None:
    with pytest.raises(ValueError, match="gpu7"):
        Scene(thing(blob), "gpu7")
    with Scene(thing(blob)) as scene:
        with pytest.raises(ValueError, match="at least one view"):
            scene.render([], 32)
        with pytest.raises(ValueError, match="invertible"):
            scene.render([View(FRONT, np.zeros((3, 4), np.float32))], 32)
    with pytest.raises(ValueError, match="direction"):
        Light((0.0, 0.0, 0.0), 0.5, 0.5, 0.0)


@pytest.mark.gpu
def test_cuda_renders_what_the_cpu_renders(blob: trimesh.Trimesh) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    obj = thing(blob, colors=many_colors(blob))
    views = [View(Camera(a, 15.0, focal)) for a, focal in ((0.0, None), (60.0, 35.0), (200.0, 85.0))]
    with Scene(obj, "cpu") as scene:
        cpu = scene.render(views, PX)
    with Scene(obj, "cuda:0") as scene:
        tensors = scene.render_torch(views, PX)
        assert tensors.color.is_cuda
        cuda = tensors.to_host()
    for got, want in ((cuda.color, cpu.color), (cuda.normal, cpu.normal)):
        differ = np.abs(got.astype(int) - want.astype(int)).max(axis=-1)
        assert (differ > 2).mean() < 0.003
    assert (cuda.alpha != cpu.alpha).mean() < 0.003
