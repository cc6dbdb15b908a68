"""The CUDA kernels against their CPU twins, compiled as plain C++ or, with `make test-gpu`, on a GPU."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial import cKDTree

from tests.runtime import analytic
from tests.runtime.host_device import HostDevice, stage_of, uploaded_pixels
from uc3d_rt.device import Device, cleared, uploaded
from uc3d_rt.errors import FitError
from uc3d_rt.mesh.extract import extract_surface
from uc3d_rt.neus import fit as fit_twin
from uc3d_rt.neus.adam import adam_step
from uc3d_rt.neus.device_fit import (
    PROGRESS,
    RAY_LANES,
    TURN,
    DeviceHull,
    DeviceState,
    refined,
    turns_of,
    view_loss,
)
from uc3d_rt.neus.device_views import (
    images_on_device,
    merged_on_device,
    outlines_on_device,
    pixels_on_device,
)
from uc3d_rt.neus.field import near_nodes, resample
from uc3d_rt.neus.fit import check_views, fit, ray_gradient, smoothness, thickness_weight
from uc3d_rt.neus.fit_plan import FitOptions
from uc3d_rt.neus.hull import hull_sdf, pair_distances, silhouette_distance
from uc3d_rt.neus.rays import Pixels, select_pixels, trace_rays
from uc3d_rt.neus.redistance import restore_distance
from uc3d_rt.neus.regularize import regularize

R = 24
ONE = 2.0**32


@pytest.fixture
def sdf() -> np.ndarray:
    """A dented sphere, in node spacings."""
    y, z, x = np.meshgrid(*[np.arange(R) - 11.2] * 3, indexing="ij")
    radius = np.sqrt(x * x + y * y + z * z)
    return (radius - 7.0 + 0.4 * np.sin(1.3 * x) * np.cos(1.1 * y + z)).astype(np.float32)


@pytest.fixture(scope="module")
def pixels() -> Pixels:
    color, normal = analytic.six_views(analytic.asymmetric(), 48)
    return select_pixels(color, normal, (normal != 0).any(-1), 0)


def close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> bool:
    """Whether the 2-norm of the difference is small against that of what is expected."""
    error = np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected)
    return bool(error < tolerance)


@pytest.mark.parametrize("inv_s", [1.5, 5.0])
def test_render_rays(device: Device, sdf: np.ndarray, pixels: Pixels, inv_s: float) -> None:
    from uc3d_rt.neus.render import render_rays, render_rays_backward

    rng = np.random.default_rng(0)
    color = rng.random((R, R, R, 3), dtype=np.float32)
    rays, crosses = trace_rays(pixels, slice(None), R)
    count, hits = len(pixels.mask), int(crosses.sum())
    offset = rng.random(count, dtype=np.float32)
    how = (0.7, 4.5 / inv_s, 1e-3)  # step, band, cutoff
    traced = (rays.start, rays.weight_y, rays.entry, rays.direction, rays.length, offset[crosses])
    expected = np.empty((hits, 7), np.float32)
    render_rays(sdf, color, inv_s, *traced, *how, expected)
    assert expected[:, 6].max() > 0.9 and expected[:, 6].min() < 0.1

    field = [uploaded(device, a) for a in (sdf, color)]
    given = [uploaded(device, a) for a in (pixels.origin, pixels.direction, offset)]
    march = [np.float32(v) for v in (inv_s, *how)]
    out = device.empty((count, 7), np.float32)
    device.launch("render_rays", RAY_LANES * count, *field, np.int32(R), *given, np.int32(count), *march, out)
    found = device.download(out)
    assert (found[~crosses] == (1, 1, 1, 0, 0, 0, 0)).all()
    assert close(found[crosses], expected, 2e-5)

    d_out = rng.standard_normal((count, 7)).astype(np.float32)
    d_sdf, d_color, d_inv_s = np.zeros_like(sdf), np.zeros_like(color), np.zeros(R - 1)
    render_rays_backward(
        sdf, color, inv_s, *traced, *how, np.ascontiguousarray(d_out[crosses]), d_sdf, d_color, d_inv_s
    )
    sums = [cleared(device, a.shape, np.int64) for a in (sdf, color, np.empty(1))]
    device.launch(
        "render_rays_backward", RAY_LANES * count, *field, np.int32(R), *given, np.int32(count), *march,
        uploaded(device, d_out), *sums,
    )  # fmt: skip
    found_sdf, found_color, found_inv_s = (device.download(a) / ONE for a in sums)
    assert close(found_sdf, d_sdf, 1e-4)
    assert close(found_color, d_color, 1e-4)
    assert found_inv_s[0] == pytest.approx(d_inv_s.sum(), rel=1e-3)


def hashed(x: np.ndarray) -> np.ndarray:
    """Twin of the kernels' `hashed`."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x ^ (x >> np.uint32(16))


def test_fit_rays(device: Device, sdf: np.ndarray, pixels: Pixels) -> None:
    from uc3d_rt.neus.render import render_rays, render_rays_backward

    options = FitOptions(resolution=R, w_mask=1.5)
    color = np.random.default_rng(1).random((R, R, R, 3), dtype=np.float32)
    inv_s, how, key = 2.0, (0.9, 2.25, 1e-3), np.uint32(977)
    subset = slice(1, None, 3)
    rays, crosses = trace_rays(pixels, subset, R)
    which = np.arange(len(pixels.mask), dtype=np.uint32)[subset][crosses]
    offset = ((hashed(key ^ hashed(which)) >> np.uint32(8)) / 2.0**24).astype(np.float32)
    assert 0.45 < offset.mean() < 0.55 and offset.std() == pytest.approx(12**-0.5, abs=0.02)
    traced = (rays.start, rays.weight_y, rays.entry, rays.direction, rays.length, offset)
    out = np.empty((len(rays.slab), 7), np.float32)
    render_rays(sdf, color, inv_s, *traced, *how, out)
    d_out = ray_gradient(out, pixels, subset, crosses, options) * np.float32(0.5)
    assert (d_out[:, 3:6] != 0).any(1).sum() > 100 and (d_out[:, 6] != 0).sum() > 100
    d_sdf, d_color, d_inv_s = np.zeros_like(sdf), np.zeros_like(color), np.zeros(R - 1)
    render_rays_backward(sdf, color, inv_s, *traced, *how, d_out, d_sdf, d_color, d_inv_s)

    state = DeviceState(device, uploaded(device, sdf), stage_of(R, inv_s))
    device.upload(sdf, state.sdf)
    device.upload(color, state.color)
    turns = np.zeros(3, TURN)
    turns["key"], turns["first"] = (1, 2, key), (0, 2, 1)
    progress = device.download(state.progress).view(PROGRESS)
    progress["iteration"] = 2
    device.upload(progress.view(np.uint8), state.progress)
    shown = (pixels.origin, pixels.direction, pixels.color, pixels.normal, pixels.mask)
    count = len(pixels.mask)
    device.launch(
        "fit_rays", RAY_LANES * -(-count // 3), state.sdf, state.color, np.int32(R),
        *(uploaded(device, a) for a in shown), np.int32(count), np.int32(3),
        np.float32(how[0]), np.float32(how[2]),
        *(np.float32(w) for w in (options.w_rgb, options.w_normal, options.w_mask, 0.5)),
        uploaded(device, turns.view(np.uint8)), state.d_sdf, state.d_color, state.progress,
    )  # fmt: skip
    assert close(device.download(state.d_sdf)[..., 0] / ONE, d_sdf, 2e-4)
    assert close(device.download(state.d_color) / ONE, d_color, 2e-4)
    found = device.download(state.progress).view(PROGRESS)["d_inv_s"][0] / ONE
    assert found == pytest.approx(d_inv_s.sum(), rel=1e-3)
    state.keep_field()
    state.free()


def test_view_loss(device: Device, sdf: np.ndarray, pixels: Pixels) -> None:
    options = FitOptions(resolution=R)
    color = np.random.default_rng(1).random((R, R, R, 3), dtype=np.float32)
    losses = []
    for inv_s, bent in ((2.0, sdf), (0.7, sdf), (2.0, sdf + 1.5 * np.sin(np.arange(R, dtype=np.float32)))):
        stage = stage_of(R, inv_s)
        state = DeviceState(device, uploaded(device, sdf), stage)
        device.upload(bent, state.sdf)
        device.upload(color, state.color)
        expected = fit_twin.view_loss(fit_twin._State(sdf, bent, color, stage), pixels, options)
        found = view_loss(state, uploaded_pixels(device, pixels), options)
        assert found == pytest.approx(expected, rel=1e-3)
        losses.append(found)
        state.keep_field()
        state.free()
    assert losses[2] > 1.1 * losses[0]


def test_regularize_and_adam_step(device: Device, sdf: np.ndarray) -> None:
    options = FitOptions(resolution=R)
    rng = np.random.default_rng(2)
    color, d_sdf, d_color = (rng.standard_normal((R, R, R, c)).astype(np.float32) for c in (3, 1, 3))
    state = DeviceState(device, uploaded(device, sdf), stage_of(R, 3.0))
    device.upload(sdf, state.sdf)
    device.upload(color, state.color)
    state.near_nodes(options)
    device.upload((d_sdf * ONE).astype(np.int64), state.d_sdf)
    device.upload((d_color * ONE).astype(np.int64), state.d_color)
    nodes = near_nodes(sdf, 1.5 + 1.5)
    found = device.download(state.nodes)[: len(nodes)]
    assert sorted(found) == list(nodes)
    flat = sdf.reshape(-1).copy()
    smooth = smoothness(sdf, nodes, options)
    np.testing.assert_allclose(
        device.download(state.smooth)[: len(nodes)][np.argsort(found)], smooth, rtol=1e-4
    )

    expected, colors = sdf.copy(), color.copy().reshape(-1, 3)
    moments = [np.zeros((R**3, c), np.float32) for c in (1, 1, 3, 3)]
    laplacian = np.zeros(R**3, np.float32)
    turns = turns_of(options, stage_of(R, 3.0, iterations=3), 5)
    assert [round(float(rate), 6) for rate in turns["rate"]] == [1.0, round(options.final_rate**0.5, 6), 0.15]
    uploaded_turns = uploaded(device, turns.view(np.uint8))
    for step in (1, 2):
        state.step(options, uploaded_turns)
        rate = options.final_rate ** ((step - 1) / 2)
        gradient = d_sdf[..., 0].copy() if step == 1 else np.zeros_like(sdf)
        regularize(expected, nodes, options.w_eikonal, smooth, laplacian, gradient)
        rates = (options.learning_rate * rate, options.learning_rate_color * rate)
        values = expected.reshape(-1, 1)
        adam_step(values, gradient.reshape(-1, 1), *moments[:2], nodes, step, rates[0], 0.02)
        more = d_color.reshape(-1, 3).copy() if step == 1 else np.zeros((R**3, 3), np.float32)
        adam_step(colors, more, *moments[2:], nodes, step, rates[1], 0.01)
    assert not np.array_equal(expected.reshape(-1), flat)
    np.testing.assert_allclose(device.download(state.sdf), expected, atol=2e-5)
    np.testing.assert_allclose(device.download(state.color).reshape(-1, 3), colors, atol=2e-5)
    assert not device.download(state.d_sdf).reshape(-1)[nodes].any()
    state.keep_field()
    state.free()


@pytest.mark.parametrize(
    "source, target", [("sdf", "sdf"), ("start", "sdf"), ("spare", "sdf"), ("start", "start")]
)
def test_restore_distance(device: Device, sdf: np.ndarray, source: str, target: str) -> None:
    bad = sdf * np.float32(1.7)
    state = DeviceState(device, uploaded(device, sdf), stage_of(R))
    device.upload(bad, getattr(state, source))
    state.restore_distance(getattr(state, source), getattr(state, target))
    expected = bad.copy()
    restore_distance(expected)
    np.testing.assert_allclose(device.download(getattr(state, target)), expected, atol=1e-3)
    if source == "start" != target:
        np.testing.assert_array_equal(device.download(state.start), bad)
    state.keep_field()
    state.free()


def test_refine(device: Device, sdf: np.ndarray) -> None:
    rng = np.random.default_rng(3)
    color = rng.random((R, R, R, 3), dtype=np.float32)
    before = sdf - np.float32(0.8)
    start = resample(before, 2 * R) * 2
    coarse = DeviceState(device, uploaded(device, before), stage_of(R))
    device.upload(sdf, coarse.sdf)
    device.upload(color, coarse.color)
    fine = refined(device, coarse, uploaded(device, start), stage_of(2 * R))
    expected = start + 2 * resample(np.maximum(sdf - before, 0.0), 2 * R) * thickness_weight(start)
    np.testing.assert_allclose(device.download(fine.sdf), expected, atol=1e-5)
    np.testing.assert_allclose(device.download(fine.color), resample(color, 2 * R), atol=1e-5)
    fine.keep_field()
    fine.free()


@pytest.mark.parametrize("shift", [0, 3])
def test_hull(device: Device, shift: int) -> None:
    color, normal = analytic.six_views(analytic.asymmetric(), 96)
    normal[1] = np.roll(normal[1], shift, axis=0)  # views that disagree need a tolerance
    masks = (normal != 0).any(-1)
    hull = hull_on(device, normal)
    assert not hull.empty
    expected = hull_sdf(masks, 40)
    for resolution, values in ((40, expected), (20, resample(expected, 20))):
        buffer = hull.at(resolution)
        np.testing.assert_allclose(device.download(buffer), values * (0.5 * resolution), atol=1e-4)
        device.free([buffer])
    # A bar that only one pair of opposite views sees, and to the side of it one for each other.
    bars = np.zeros_like(normal)
    for view in range(6):
        bars[view, 40:50, 5 + 30 * (view % 3) : 15 + 30 * (view % 3)] = (0, 1, 0)
    assert (hull_sdf((bars != 0).any(-1), 40) < 0).any() != hull_on(device, bars).empty


def hull_on(device: Device, normal: np.ndarray) -> DeviceHull:
    images = images_on_device(device, np.ones_like(normal), normal)
    return DeviceHull(device, images, outlines_on_device(device, images)[0], 40)


def test_images_on_device(device: Device) -> None:
    color, normal = analytic.six_views(analytic.asymmetric(), 40)
    rng = np.random.default_rng(5)
    given = (normal * rng.uniform(0.6, 1.4, (6, 40, 40, 1))).astype(np.float32)
    given += np.where((normal == 0).all(-1, keepdims=True), rng.uniform(-0.2, 0.2, normal.shape), 0)
    given = given.astype(np.float32)
    images = images_on_device(device, color, given)
    expected = check_views(color, given)
    for buffer, wanted in zip((images.color, images.normal, images.mask), expected, strict=True):
        np.testing.assert_allclose(device.download(buffer), wanted, atol=1e-6)
    bad = color.copy()
    bad[2, 3, 4, 1] = np.inf
    for wrong in ((bad, normal), (color, np.where(bad < np.inf, normal, np.nan)), (color, normal * 0)):
        with pytest.raises(FitError) as raised:
            images_on_device(device, wrong[0], wrong[1].astype(np.float32))
        with pytest.raises(FitError) as on_cpu:
            check_views(*wrong)
        assert str(raised.value) == str(on_cpu.value)
    with pytest.raises(FitError, match="shape"):
        images_on_device(device, color[:5], normal)


def test_outlines_and_pixels_on_device(device: Device) -> None:
    size = 56
    color, normal = analytic.six_views(analytic.asymmetric(), size)
    normal[1] = np.roll(normal[1], 25, axis=1)  # over the edge
    normal[4] = 0  # a view that shows nothing
    normal[5, 20, 30] = 0  # a hole
    color, normal, masks = check_views(color, normal)
    images = images_on_device(device, color, normal)
    distance, near = outlines_on_device(device, images)
    expected = np.stack([silhouette_distance(mask) for mask in masks])
    np.testing.assert_allclose(device.download(distance), expected, atol=2e-5)
    for found, wanted in zip(merged_on_device(device, distance), pair_distances(masks), strict=True):
        np.testing.assert_allclose(device.download(found), wanted, atol=2e-5)

    pixels = pixels_on_device(device, images, near)
    chosen = select_pixels(color, normal, masks, 0)
    assert pixels.count == len(chosen.mask) < 6 * size**2
    found = np.concatenate(
        [device.download(a).reshape(pixels.count, -1) for a in (*pixels.rays, *pixels.targets)], axis=1
    )
    assert (np.diff(found[:, 1]) >= 0).all()  # row after row, from the lowest
    wanted = np.column_stack([chosen.origin, chosen.direction, chosen.color, chosen.normal, chosen.mask])
    orders = [np.lexsort(rows[:, [0, 2, 3, 4, 1]].round(4).T) for rows in (found, wanted)]
    np.testing.assert_allclose(found[orders[0]], wanted[orders[1]], atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_fit_on_a_device_is_the_fit_on_the_cpu(device: Device, share: float) -> None:
    color, normal = analytic.six_views(analytic.asymmetric(), 96)
    options = FitOptions(
        resolution=48, iterations=(15, 20), blurred_iterations=(10, 5), second_start_loss=share,
        rays_per_iteration=5000,
    )  # fmt: skip
    steps: list[tuple[int, int]] = []
    found = [fit(color, normal, options, lambda *at: steps.append(at), device=device) for _ in range(2)]
    assert found[0].sdf.tobytes() == found[1].sdf.tobytes()
    assert found[0].color.tobytes() == found[1].color.tobytes()
    assert steps == [(k, 50) for k in range(1, 51)] * 2
    # Rays are drawn from other random numbers than on the CPU: as near to it as its own seeds are.
    expected, other = (fit(color, normal, replace(options, seed=seed)) for seed in (0, 1))
    near = np.abs(expected.sdf) < expected.voxel
    for name in ("sdf", "color"):
        a, b, c = (getattr(field, name)[near] for field in (found[0], expected, other))
        assert np.abs(a - b).mean() < 1.2 * np.abs(b - c).mean(), name
    assert abs((found[0].sdf - expected.sdf)[near].mean()) < 0.01 * expected.voxel
    surfaces = [cKDTree(extract_surface(field, 0.05).vertices) for field in (found[0], expected, other)]
    off, usual = (
        np.concatenate([a.query(b.data)[0], b.query(a.data)[0]]).mean()
        for a, b in (surfaces[:2], surfaces[1:])
    )
    assert off < 1.2 * usual and off < 0.005  # world units; the object is 1.6 long
    with pytest.raises(FitError, match="--device cpu"):
        fit(color, normal, FitOptions(keep_rgb=0.8), device=device)


def test_a_fit_of_one_stage(device: Device) -> None:
    color, normal = analytic.six_views(analytic.sphere((0, 0, 0), 0.6), 64)
    options = FitOptions(resolution=32, iterations=(12,), rays_per_iteration=2000)
    found, expected = (fit(color, normal, options, device=where) for where in (device, None))
    near = np.abs(expected.sdf) < expected.voxel
    assert np.abs(found.sdf - expected.sdf)[near].mean() < 0.1 * expected.voxel
    vertices = extract_surface(found, 0.05).vertices
    assert np.linalg.norm(vertices, axis=1).mean() == pytest.approx(0.6, abs=0.02)


def test_a_fit_without_iterations_is_the_carved_hull(device: Device) -> None:
    color, normal = analytic.six_views(analytic.asymmetric(), 64)
    options = FitOptions(resolution=32, iterations=(0, 0), blurred_iterations=(0, 0))
    found, expected = (fit(color, normal, options, device=where) for where in (device, None))
    near = np.abs(expected.sdf) < expected.voxel
    np.testing.assert_allclose(found.sdf[near], expected.sdf[near], atol=0.02 * expected.voxel)


def test_a_fit_frees_what_it_took(machine: Device) -> None:
    if not isinstance(machine, HostDevice):
        pytest.skip("counted on the stand-in")
    color, normal = analytic.six_views(analytic.sphere((0, 0, 0), 0.6), 48)
    before = machine.live
    for share in (0.0, 1.0):  # the first start goes on, or perhaps the second
        options = FitOptions(
            resolution=32, iterations=(2, 2), blurred_iterations=(1, 1), second_start_loss=share,
            rays_per_iteration=1000,
        )  # fmt: skip
        fit(color, normal, options, device=machine)
        assert machine.live == before
