"""The fit against closed forms, its determinism, its errors, and views that contradict each other."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from tests.runtime import analytic
from uc3d_rt.errors import FitError
from uc3d_rt.mesh.extract import extract_surface
from uc3d_rt.mesh.raster import render_normals
from uc3d_rt.mesh.surface import Surface, is_closed, signed_volumes, vertex_normals
from uc3d_rt.neus.carve import carve
from uc3d_rt.neus.field import Field, node_coordinates, resample
from uc3d_rt.neus.fit import _State, fit
from uc3d_rt.neus.fit_plan import FitOptions, Stage, compared_stages, falls_behind
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


def grids(stages: tuple[Stage, ...]) -> list[tuple[int, int]]:
    return [(stage.resolution, stage.iterations) for stage in stages]


def test_stages_too_coarse_are_left_out() -> None:
    options = partial(FitOptions, iterations=(1, 2, 3, 4))
    assert grids(options(resolution=160).stages) == [(20, 1), (40, 2), (80, 3), (160, 4)]
    assert grids(options(resolution=64).stages) == [(16, 2), (32, 3), (64, 4)]
    assert grids(options(resolution=100).stages) == [(25, 2), (50, 3), (100, 4)]
    assert grids(options(resolution=33).stages) == [(33, 4)]


def test_the_second_start_begins_coarse_and_blurred_and_ends_where_the_first_does() -> None:
    options = partial(FitOptions, iterations=(1, 2, 3), blurred_iterations=(8, 6))
    assert grids(options(resolution=160).blurred_stages) == [(40, 8), (40, 6), (80, 2)]
    assert grids(options(resolution=256).blurred_stages) == [(32, 8), (64, 6), (128, 2)]
    assert grids(options(resolution=512).blurred_stages) == [(32, 8), (64, 6), (128, 6), (256, 2)]
    assert grids(options(resolution=100).blurred_stages) == [(25, 8), (25, 6), (50, 2)]
    assert grids(options(resolution=66).blurred_stages) == [(33, 8), (33, 6)]
    assert options(resolution=33).blurred_stages == ()  # a single stage: nothing to compare before
    assert options(resolution=160, blurred_iterations=(0, 6)).blurred_stages == ()
    for resolution in (100, 160, 256, 512):
        found = options(resolution=resolution)
        both = (*found.stages, *found.blurred_stages)
        assert len({stage.number for stage in both}) == len(both)
        assert found.total_iterations == sum(stage.iterations for stage in both)
        blurred, *sharp = found.blurred_stages
        in_world = [inv_s * blurred.resolution / 2 for inv_s in blurred.inv_s]
        assert in_world == pytest.approx([16.0, 12.0, 48.0])
        assert {stage.inv_s for stage in sharp} == {(2.0, 1.5, 6.0)}


def test_the_start_whose_views_are_nearer_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    color, normal = analytic.six_views(analytic.asymmetric(), 64)
    options = FitOptions(
        resolution=32, iterations=(4, 4), blurred_iterations=(6, 4), rays_per_iteration=2000,
        second_start_loss=0.9,
    )  # fmt: skip
    alone = fit(color, normal, replace(options, blurred_iterations=(0, 0)))
    monkeypatch.setattr("uc3d_rt.neus.fit.view_loss", lambda state, *_: 1.0)
    assert fit(color, normal, options).sdf.tobytes() == alone.sdf.tobytes()
    numbers = []

    def preferred(state: _State, *_: object) -> float:
        numbers.append(state.stage.number)
        return {0: 1.0, 3: 0.89}[state.stage.number]

    monkeypatch.setattr("uc3d_rt.neus.fit.view_loss", preferred)
    found = fit(color, normal, options)
    assert numbers == [0, 3]
    assert found.sdf.tobytes() != alone.sdf.tobytes()
    monkeypatch.setattr("uc3d_rt.neus.fit.view_loss", lambda state, *_: float(state.stage.number == 0))
    assert found.sdf.tobytes() == fit(color, normal, options).sdf.tobytes()


def test_the_second_start_has_to_be_nearer_and_at_last_by_enough() -> None:
    options = FitOptions(resolution=160)
    coarse, fine = (stage for stage, compared in compared_stages(options.blurred_stages) if compared)
    assert coarse.resolution < fine.resolution < 160
    first = {coarse.resolution: 2.0, fine.resolution: 1.0}
    found = [falls_behind(loss, first, coarse, options) for loss in (1.99, 2.0)]
    assert found == [False, True]
    found = [falls_behind(loss, first, fine, options) for loss in (0.975, 0.985)]
    assert found == [False, True]
    assert not falls_behind(5.0, {}, fine, options)  # there is no first one


def test_the_second_start_finds_the_surface_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uc3d_rt.neus.fit.view_loss", lambda state, *_: float(state.stage.number == 0))
    centre, radius = np.array([0.1, -0.05, 0.15]), 0.6
    color, normal = analytic.six_views(analytic.sphere(tuple(centre), radius), 64)
    options = FitOptions(resolution=48, iterations=(20, 20), rays_per_iteration=4000)
    surface = extract_surface(fit(color, normal, options), 0.05)
    distance = np.linalg.norm(surface.vertices - centre, axis=1)
    assert np.abs(distance - radius).mean() < 0.015 and np.abs(distance - radius).max() < 0.08


def test_fit_options_are_checked() -> None:
    for wrong in (
        {"resolution": 15},
        {"resolution": 1024},
        {"w_rgb": -1.0},
        {"keep_normal": 0.0},
        {"sample_step": 0.0},
        {"iterations": ()},
        {"carve_steps": -1},
        {"blurred_iterations": (1,)},
        {"blurred_iterations": (1, -1)},
        {"second_start_loss": 1.5},
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
