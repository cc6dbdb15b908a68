"""The cameras: frame, handedness, rays, normals."""

from __future__ import annotations

import numpy as np
import pytest

from uc3d_rt.views import (
    AZIMUTHS_DEG,
    BOUNDING_RADIUS,
    FADE_POWER,
    FOCAL_LENGTHS_MM,
    TARGET_CAMERAS,
    Camera,
    camera_axes,
    camera_rays,
    decode_normals,
    decode_views,
    encode_normals,
    pixel_grid,
    project,
)

CAMERAS = [*TARGET_CAMERAS, Camera(20.0, 35.0), Camera(-50.0, -15.0, 50.0), Camera(0.0, 10.0, 35.0)]


def test_the_targets_are_the_papers() -> None:
    assert AZIMUTHS_DEG == (30.0, 90.0, 150.0, 210.0, 270.0, 330.0)
    assert all(camera.elevation_deg == 0.0 and camera.focal_mm is None for camera in TARGET_CAMERAS)


@pytest.mark.parametrize("camera", CAMERAS)
def test_axes_are_right_handed_and_orthonormal(camera: Camera) -> None:
    axes = np.stack(camera_axes(camera))
    np.testing.assert_allclose(axes @ axes.T, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(np.cross(axes[0], axes[1]), axes[2], atol=1e-6)


def test_where_cameras_stand_and_what_is_right() -> None:
    right, up, back = camera_axes(Camera(0.0))
    np.testing.assert_allclose([right, up, back], np.eye(3), atol=1e-6)  # from +Z, +X is on the right
    _, _, back = camera_axes(Camera(90.0))
    np.testing.assert_allclose(back, [1, 0, 0], atol=1e-6)
    _, _, back = camera_axes(Camera(0.0, 90.0))
    np.testing.assert_allclose(back, [0, 1, 0], atol=1e-6)


@pytest.mark.parametrize("camera", CAMERAS)
def test_rays_and_project_agree(camera: Camera) -> None:
    origins, directions = camera_rays(camera, 8)
    u, v = pixel_grid(8)
    for distance in (0.5, camera.distance):
        seen = project(origins + distance * directions, camera)
        np.testing.assert_allclose(seen[..., 0], u, atol=1e-5)
        np.testing.assert_allclose(seen[..., 1], v, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(directions, axis=-1), 1.0, atol=1e-6)
    assert u[0, 0] < 0 < u[0, -1] and v[0, 0] > 0 > v[-1, 0]  # row 0 is the top, column 0 the left


@pytest.mark.parametrize("focal_mm", FOCAL_LENGTHS_MM)
def test_perspective_keeps_the_size_at_the_origin(focal_mm: float) -> None:
    camera = Camera(70.0, 5.0, focal_mm)
    right, up, back = camera_axes(camera)
    np.testing.assert_allclose(project(0.4 * right + 0.3 * up, camera)[:2], [0.4, 0.3], atol=1e-6)
    nearer = project(0.4 * right + 0.5 * back, camera)
    assert nearer[0] > 0.4 and nearer[2] < camera.distance
    assert camera.normalized_focal == pytest.approx(focal_mm / 35.0)


def test_a_camera_inside_the_object_is_refused() -> None:
    with pytest.raises(ValueError, match="inside the object"):
        Camera(0.0, 0.0, 18.0 * BOUNDING_RADIUS)


def test_what_fades_to_white_where_the_network_is_undecided_comes_back() -> None:
    rng = np.random.default_rng(0)
    color = rng.random((200, 3), np.float32)
    normal = rng.normal(size=(200, 3))
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    share = np.linspace(0.0, 1.0, 200)[:, None]  # of the object in the mean of it and the background
    faded, shortened = share * color + (1 - share), encode_normals(share * normal)
    found, unit, mask = decode_views(faded, shortened)
    assert found.dtype == np.float32 and (mask == (share[:, 0] > 0.5)).all()
    assert (found[~mask] == 1.0).all() and (unit[~mask] == 0.0).all()
    np.testing.assert_allclose(unit[mask], normal[mask], atol=1e-5)
    np.testing.assert_allclose(found[-1], color[-1], atol=1e-6)  # what is certain stays
    left = share ** (1.0 - FADE_POWER)
    np.testing.assert_allclose(found[mask], (left * color + (1 - left))[mask], atol=1e-5)
    dark, _, _ = decode_views(np.zeros((1, 3)), encode_normals(np.array([[0.0, 0.0, 0.6]])))
    assert (dark == 0.0).all()  # never below black


def test_normals_survive_encoding_and_background_is_grey() -> None:
    rng = np.random.default_rng(0)
    normals = rng.normal(size=(5, 7, 3)).astype(np.float32)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    normals[0] = 0.0
    image = encode_normals(normals)
    assert image.dtype == np.float32 and (image[0] == 0.5).all()
    decoded, mask = decode_normals(np.round(image * 255) / 255)
    assert not mask[0].any() and mask[1:].all()
    np.testing.assert_allclose(decoded, normals, atol=0.01)
