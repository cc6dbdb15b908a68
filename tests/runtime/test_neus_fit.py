"""The fit against closed forms, its determinism, its errors, and views that contradict each other."""

import numpy as np
import pytest

from tests.runtime import analytic
from uc3d_rt.errors import FitError
from uc3d_rt.mesh.extract import extract_surface
from uc3d_rt.mesh.raster import render_normals
from uc3d_rt.mesh.surface import Surface, is_closed, signed_volumes, vertex_normals
from uc3d_rt.neus.carve import carve
from uc3d_rt.neus.field import Field, node_coordinates, resample
from uc3d_rt.neus.fit import FitOptions, fit
from uc3d_rt.neus.hull import hull_sdf
from uc3d_rt.neus.rays import select_pixels
from uc3d_rt.neus.redistance import restore_distance

SMALL = FitOptions(resolution=64, iterations=(30, 30, 30), rays_per_iteration=8000)


def angle_deg(surface: Surface, normal: np.ndarray) -> float:
    seen = render_normals(surface.vertices, surface.faces, vertex_normals(surface), normal.shape[1])
    both = (seen != 0).any(-1) & (normal != 0).any(-1)
    return float(np.degrees(np.arccos(np.clip((seen[both] * normal[both]).sum(-1), -1, 1))).mean())


def test_fit_sphere() -> None:
    color, normal = analytic.six_views(analytic.sphere((0.1, 0.0, -0.05), 0.6), 128)
    surface = extract_surface(fit(color, normal, SMALL), 0.05)
    radius = np.linalg.norm(surface.vertices - (0.1, 0.0, -0.05), axis=1)
    assert abs(radius.mean() - 0.6) < 0.02  # a voxel is 0.031
    assert np.abs(radius - 0.6).mean() < 0.02
    assert angle_deg(surface, normal) < 6.0
    assert is_closed(surface.faces) and signed_volumes(surface).sum() > 0


def test_fit_box_keeps_its_flat_top() -> None:
    low, high = (-0.5, -0.4, -0.3), (0.5, 0.35, 0.3)
    color, normal = analytic.six_views(analytic.box(low, high), 128)
    surface = extract_surface(fit(color, normal, SMALL), 0.05)
    np.testing.assert_allclose(surface.vertices.min(axis=0), low, atol=0.03)
    np.testing.assert_allclose(surface.vertices.max(axis=0), high, atol=0.03)
    v = surface.vertices
    top = v[(np.abs(v[:, 0]) < 0.4) & (np.abs(v[:, 2]) < 0.2) & (v[:, 1] > 0)]
    assert np.abs(top[:, 1] - 0.35).max() < 0.03  # no elevation-0 view sees it
    assert angle_deg(surface, normal) < 8.0


def test_fit_same_seed_same_bytes_for_any_number_of_threads() -> None:
    import numba

    color, normal = analytic.six_views(analytic.asymmetric(), 64)
    options = FitOptions(resolution=32, iterations=(8, 8), rays_per_iteration=4000, seed=5)
    fields = [fit(color, normal, options) for _ in range(2)]
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        fields.append(fit(color, normal, options))
    finally:
        numba.set_num_threads(before)
    for other in fields[1:]:
        assert other.sdf.tobytes() == fields[0].sdf.tobytes()
        assert other.color.tobytes() == fields[0].color.tobytes()


def test_fit_survives_views_that_disagree() -> None:
    color, normal = analytic.six_views(analytic.asymmetric(), 128)
    rng = np.random.default_rng(0)
    for view, shift in enumerate((2, -2, 1, -1, 2, 0)):
        color[view] = np.roll(color[view], shift, axis=1)
        normal[view] = np.roll(normal[view], -shift if view % 2 else shift, axis=0)
    normal += (normal != 0).any(-1, keepdims=True) * rng.normal(0, 0.15, normal.shape).astype(np.float32)
    surface = extract_surface(fit(color, normal, SMALL), 0.05)
    truth = 4 / 3 * np.pi * 0.4**3
    assert is_closed(surface.faces)
    assert 0.8 * truth < signed_volumes(surface).sum() < 2.0 * truth
    seen = render_normals(surface.vertices, surface.faces, vertex_normals(surface), 128)
    a, b = (seen != 0).any(-1), (normal != 0).any(-1)
    assert (a & b).sum() / (a | b).sum() > 0.88


def test_fit_reports_progress_and_empty_views() -> None:
    color, normal = np.ones((6, 32, 32, 3), np.float32), np.zeros((6, 32, 32, 3), np.float32)
    with pytest.raises(FitError, match="decoded to"):
        fit(color, normal)
    with pytest.raises(FitError, match="shape"):
        fit(color[:5], normal[:5])
    normal[0] = np.nan
    with pytest.raises(FitError, match="finite"):
        fit(color, normal)
    color, normal = analytic.six_views(analytic.sphere((0, 0, 0), 0.5), 32)
    seen: list[tuple[int, int]] = []
    options = FitOptions(resolution=16, iterations=(3,), rays_per_iteration=1000)
    fit(color, normal, options, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_stages_too_coarse_are_left_out() -> None:
    assert FitOptions(resolution=160, iterations=(1, 2, 3, 4)).stages == ((20, 1), (40, 2), (80, 3), (160, 4))
    assert FitOptions(resolution=64, iterations=(1, 2, 3, 4)).stages == ((16, 2), (32, 3), (64, 4))
    assert FitOptions(resolution=100, iterations=(1, 2, 3, 4)).stages == ((25, 2), (50, 3), (100, 4))
    assert FitOptions(resolution=33, iterations=(1, 2, 3, 4)).stages == ((33, 4),)


def test_fit_options_are_checked() -> None:
    for wrong in (
        {"resolution": 15},
        {"resolution": 1024},
        {"w_rgb": -1.0},
        {"keep_normal": 0.0},
        {"sample_step": 0.0},
        {"iterations": ()},
        {"carve_steps": -1},
        {"rays_per_iteration": 1},
        {"learning_rate": 2.0},
    ):
        with pytest.raises(ValueError, match="FitOptions"):
            FitOptions(**wrong)


def test_hull_of_exact_silhouettes_is_not_grown_and_of_bad_ones_not_carved() -> None:
    normal = analytic.six_views(analytic.sphere((0, 0, 0), 0.5), 128)[1]
    masks = (normal != 0).any(-1)
    axis = node_coordinates(64)
    exact = hull_sdf(masks, 64)
    middle = exact[32, 32]  # along x: the hexagon around the circle
    assert abs(np.interp(0, middle[32:], axis[32:]) - 0.5 / np.cos(np.pi / 6)) < 0.09
    shifted = np.stack([np.roll(mask, s, axis=1) for mask, s in zip(masks, (5, 5, -5, 0, 0, 0), strict=True)])
    assert (hull_sdf(shifted, 64) < 0).sum() > 0.9 * (exact < 0).sum()


def test_carve_flattens_the_walls_of_a_box() -> None:
    low, high = (-0.5, -0.4, -0.3), (0.5, 0.35, 0.3)
    color, normal = analytic.six_views(analytic.box(low, high), 128)
    masks = (normal != 0).any(-1)
    hull = hull_sdf(masks, 40) * np.float32(20)
    restore_distance(hull)
    carved = carve(hull, select_pixels(color, normal, masks, 0), 128, 5)
    assert (carved >= hull - 1.0).all()  # redistancing moves values, not the surface
    x = np.arange(40)
    middle = 19  # the hull's ridge stands at z = 0, far out of the wall at x = 0.5
    walls = []
    for field in (hull, carved):
        row = field[middle]  # (z, x)
        depth = [np.interp(0.0, row[z, 20:], x[20:]) for z in range(15, 25)]
        walls.append((np.array(depth) + 0.5) / 20 - 1)
    assert np.ptp(walls[0]) > 0.1 and np.ptp(walls[1]) < 0.02
    np.testing.assert_allclose(walls[1], 0.5, atol=0.04)


def test_select_pixels_takes_a_margin_too_and_sorts_by_height() -> None:
    from scipy.ndimage import distance_transform_edt

    size = 64
    color, normal = analytic.six_views(analytic.asymmetric(), size)
    color += np.random.default_rng(1).random(
        color.shape, dtype=np.float32
    )  # so that pixels can be told apart
    masks = (normal != 0).any(-1)
    masks[2] = False  # a view that shows nothing
    pixels, other = (select_pixels(color, normal, masks, seed) for seed in (0, 1))
    near = [distance_transform_edt(~mask) <= 2.5 if mask.any() else mask for mask in masks]
    views, rows, columns = np.nonzero(near)
    expected = {tuple(c): (v, r, k) for c, v, r, k in zip(color[near], views, rows, columns, strict=True)}
    found = np.array([expected.pop(tuple(c)) for c in pixels.color])
    assert not expected and not np.array_equal(pixels.color, other.color)
    assert (np.diff(pixels.origin[:, 1]) >= 0).all()
    v, r, k = found.T
    np.testing.assert_array_equal(pixels.normal, normal[v, r, k])
    np.testing.assert_array_equal(pixels.mask, masks[v, r, k])
    np.testing.assert_allclose(pixels.origin[:, 1], 1 - (r + 0.5) * 2 / size, atol=1e-6)
    assert all(array.flags.c_contiguous and array.dtype == np.float32 for array in vars(pixels).values())


def test_restore_distance_of_a_scaled_sphere() -> None:
    axis = np.arange(32, dtype=np.float32) - 15.5
    y, z, x = np.meshgrid(axis, axis, axis, indexing="ij")
    truth = np.sqrt(x * x + y * y + z * z) - 9
    sdf = np.where(np.abs(truth) < 1.5, truth, 5 * truth).astype(np.float32)
    restore_distance(sdf)
    near = np.abs(truth) < 5
    assert np.abs(sdf - truth)[near].max() < 0.5
    assert ((sdf < 0) == (truth < 0)).all()


def test_resample_keeps_linear_fields() -> None:
    axis = node_coordinates(16)
    values = (axis[:, None, None] + 2 * axis[None, :, None] - axis[None, None, :]).astype(np.float32)
    fine = node_coordinates(32)
    expected = fine[:, None, None] + 2 * fine[None, :, None] - fine[None, None, :]
    np.testing.assert_allclose(resample(values, 32)[1:-1, 1:-1, 1:-1], expected[1:-1, 1:-1, 1:-1], atol=1e-5)
    with pytest.raises(ValueError, match="cube"):
        Field(values, values)
