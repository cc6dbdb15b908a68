"""Fit a signed distance and colour grid to six colour and normal views (Sec. 3.6)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from uc3d_rt.device import Device, Scope
from uc3d_rt.errors import FitError
from uc3d_rt.neus.field import Field, near_nodes, node_coordinates, resample
from uc3d_rt.neus.fit_plan import (
    CUTOFF,
    HULL_SLACK,
    MASK_SHARE,
    MIN_OPACITY,
    NO_VOLUME,
    NODES_EVERY,
    RAY_BAND,
    REDISTANCE_EVERY,
    Countdown,
    FitOptions,
    Progress,
    Stage,
    compared_stages,
    falls_behind,
)
from uc3d_rt.neus.hull import hull_sdf
from uc3d_rt.neus.losses import keep_best, mask_loss, normal_loss, rgb_loss
from uc3d_rt.neus.rays import Pixels, select_pixels, trace_rays
from uc3d_rt.views import NUM_VIEWS, TARGET_CAMERAS, camera_axes, project

FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]

MIN_SILHOUETTE_PX = 16
"""Fewer foreground pixels than this in all six views together are noise, not an object."""


def fit(
    color: FloatArray,
    normal: FloatArray,
    options: FitOptions | None = None,
    on_progress: Progress | None = None,
    device: Device | None = None,
) -> Field:
    """Reconstruct the surface that six views show.

    The grid starts as the distance to the visual hull, carved towards the normals (see `carve`), then
    follows the gradient of `w_rgb L_rgb + w_normal L_normal` (Eq. 21) plus mask, eikonal and smoothness
    terms, coarse to fine.  Carving takes thin parts before thicker ones for one with them; a second start
    therefore leaves the hull as it is, and lets a blurred surface find its way on a coarse grid.  It goes on
    to the last grid in place of the first if its views are nearer on every grid that both have, and on the
    finest of those by `second_start_loss`.
    The same input, options and machine give the same bytes, for any number of threads.

    Args:
        color: (6, H, H, 3) in [0, 1], white background; the views of `uc3d_rt.views.TARGET_CAMERAS`.
        normal: (6, H, H, 3) unit world normals, zero = background.
        options: settings; None = `FitOptions()`.
        on_progress: called with (iterations done, iterations in all).
        device: where it runs; None = on the CPU.  `device_fit.fit_on_device` leaves the field there.

    Returns:
        The field, in world units.

    Raises:
        FitError: the views have wrong shapes or values, or show no object.
        BackendError: the device failed, for example for want of memory.
    """
    options = options or FitOptions()
    if device is not None:
        from uc3d_rt.neus.device_fit import fit_on_device

        with Scope(device) as scope:
            return fit_on_device(scope, color, normal, options, on_progress).download()
    color, normal, masks = check_views(color, normal)
    pixels = select_pixels(color, normal, masks, options.seed)

    hull = hull_sdf(masks, options.resolution)
    if not (hull < 0).any():
        raise FitError(NO_VOLUME)

    def start_at(resolution: int) -> FloatArray:
        """The hull in node spacings of a grid."""
        start = hull if resolution == options.resolution else resample(hull, resolution)
        return np.asarray(start * np.float32(0.5 * resolution), np.float32)

    progress = Countdown(options.total_iterations, on_progress)

    def begun(stage: Stage) -> _State:
        """A start on its first grid: the hull, and the first of all stages carved."""
        steps = options.carve_steps if stage.number == 0 else 0
        return _State(*carved(start_at(stage.resolution), pixels, color, masks, steps), stage)

    def run(state: _State) -> _State:
        _run_stage(state, pixels, masks.shape[-1], options, progress.tick)
        return state

    def next_state(state: _State, stage: Stage) -> _State:
        """What a stage begins with, on the same grid or one of twice the resolution."""
        if stage.resolution == state.stage.resolution:
            return _State(state.start, state.sdf, state.color, stage)
        return refined(state, start_at(stage.resolution), stage)

    *before, last = options.stages
    state: _State | None = None
    losses: dict[int, float] = {}
    for stage in before:
        state = run(begun(stage) if state is None else next_state(state, stage))
        if options.blurred_stages:
            losses[stage.resolution] = view_loss(state, pixels, options)
    second: _State | None = None
    for stage, compared in compared_stages(options.blurred_stages):
        second = run(begun(stage) if second is None else next_state(second, stage))
        if compared and falls_behind(view_loss(second, pixels, options), losses, stage, options):
            second = None
            break
    progress.skip(last.iterations)
    state = second or state
    state = run(begun(last) if state is None else refined(state, start_at(last.resolution), last))
    np.maximum(state.sdf, state.start - HULL_SLACK, out=state.sdf)
    return _in_world(state.sdf, state.color)


def carved(
    start: FloatArray, pixels: Pixels, color: FloatArray, masks: BoolArray, steps: int
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """A first stage's hull as a distance, the field it is carved to, and the colours to begin with.

    Args:
        start: (r, r, r) hull of the coarsest grid, in node spacings; changed in place.
        pixels: of all views.
        color: (6, H, H, 3) of the views.
        masks: (6, H, H) silhouettes.
        steps: of `carve`.
    """
    from uc3d_rt.neus.carve import carve
    from uc3d_rt.neus.redistance import restore_distance

    restore_distance(start)
    sdf = carve(start, pixels, masks.shape[-1], steps)
    return start, sdf, initial_colors(sdf, color, masks)


def refined(coarse: _State, start: FloatArray, stage: Stage) -> _State:
    """The next stage's arrays, on a grid of twice the resolution.

    What the coarse stage moved is added to the fine hull, but not where the hull is too thin for the
    coarse grid to have seen it: there the fine hull starts afresh.
    """
    moved = np.maximum(coarse.sdf - coarse.start, 0.0)
    sdf = start + 2 * resample(moved, stage.resolution) * thickness_weight(start)
    return _State(start, sdf, resample(coarse.color, stage.resolution), stage)


def view_loss(state: _State, pixels: Pixels, options: FitOptions) -> float:
    """How far a field's rendered views are from the given ones: what two starts are compared by.

    `L_normal` (Eq. 20), mean of the rays that meet the object and should, plus a quarter of the mask term,
    mean of all rays.
    """
    from uc3d_rt.neus.render import render_rays

    rays, crosses = trace_rays(pixels, slice(None), state.sdf.shape[0])
    inv_s = math.exp(state.log_inv_s)
    offset = np.full(len(rays.slab), 0.5, np.float32)
    out = np.empty((len(rays.slab), 7), np.float32)
    traced = (rays.start, rays.weight_y, rays.entry, rays.direction, rays.length, offset)
    render_rays(state.sdf, state.color, inv_s, *traced, options.sample_step, RAY_BAND / inv_s, CUTOFF, out)
    mask = pixels.mask[crosses]
    met = (mask > 0.5) & (out[:, 6] > MIN_OPACITY)
    normals = normal_loss(out[:, 3:6], pixels.normal[crosses])[0][met]
    masks = mask_loss(out[:, 6], mask)[0]
    return float(normals.sum() / max(len(normals), 1) + MASK_SHARE * masks.sum() / max(len(masks), 1))


def _in_world(sdf: FloatArray, color: FloatArray) -> Field:
    """The field of a grid in node spacings."""
    return Field(
        sdf=(sdf * np.float32(2.0 / len(sdf))).astype(np.float32),
        color=np.clip(color, 0.0, 1.0).astype(np.float32),
    )


def check_views(color: FloatArray, normal: FloatArray) -> tuple[FloatArray, FloatArray, BoolArray]:
    """Views as contiguous float32, normals made unit length, and the silhouettes (6, H, H).

    Raises:
        FitError: wrong shapes, values that are not finite, or (nearly) empty silhouettes.
    """
    check_shapes(color, normal)
    length = np.linalg.norm(normal, axis=-1, keepdims=True)
    masks = length[..., 0] > 0.5
    finite = bool(np.isfinite(color).all() and np.isfinite(normal).all())
    check_content(finite, int(masks.sum()))
    unit = np.where(masks[..., None], normal / np.maximum(length, 1e-6), 0.0)
    return np.ascontiguousarray(color, np.float32), unit.astype(np.float32), masks


def check_shapes(color: FloatArray, normal: FloatArray) -> None:
    """Raise a `FitError` unless both are (6, H, H, 3)."""
    if (
        color.ndim != 4
        or color.shape[0] != NUM_VIEWS
        or color.shape[1] != color.shape[2]
        or color.shape[3] != 3
    ):
        raise FitError(f"color has shape {color.shape}; give ({NUM_VIEWS}, H, H, 3), the six target views")
    if normal.shape != color.shape:
        raise FitError(f"normal has shape {normal.shape}, color {color.shape}; give both the same shape")


def check_content(finite: bool, foreground_px: int) -> None:
    """Raise a `FitError` unless all values of the views are finite, and they show an object."""
    if not finite:
        raise FitError("the views hold values that are not finite; decode them in float32")
    if foreground_px < MIN_SILHOUETTE_PX:
        raise FitError(
            f"the normal views show no object ({foreground_px} foreground pixels in six views); "
            "zero vectors mean background: check that the normals are decoded to [-1, 1]"
        )


class _State:
    """The arrays of one stage, in node spacings."""

    def __init__(self, start: FloatArray, sdf: FloatArray, color: FloatArray, stage: Stage) -> None:
        self.sdf, self.color, self.start, self.stage = sdf, color, start, stage
        self.log_inv_s = math.log(stage.inv_s[0])
        self.log_inv_s_mean = 0.0
        self.log_inv_s_square = 0.0
        r = sdf.shape[0]
        self.d_sdf, self.d_color = np.zeros_like(sdf), np.zeros_like(color)
        self.mean, self.square = np.zeros((r**3, 1), np.float32), np.zeros((r**3, 1), np.float32)
        self.color_mean, self.color_square = np.zeros((r**3, 3), np.float32), np.zeros((r**3, 3), np.float32)
        self.laplacian = np.zeros(r**3, np.float32)
        self.nodes = np.zeros(0, np.int64)
        self.smooth = np.zeros(0, np.float32)  # weight of each of `nodes`


def _run_stage(
    state: _State, pixels: Pixels, size: int, options: FitOptions, tick: Callable[[], None]
) -> None:
    from uc3d_rt.neus.redistance import restore_distance

    restore_distance(state.sdf)
    count = state.stage.iterations
    for iteration in range(count):
        _iterate(state, pixels, size, options, iteration, iteration / max(count - 1, 1))
        tick()


def _iterate(
    state: _State,
    pixels: Pixels,
    size: int,
    options: FitOptions,
    iteration: int,
    progress: float,  # through the stage, 0 to 1
) -> None:
    from uc3d_rt.neus.adam import adam_step
    from uc3d_rt.neus.redistance import restore_distance
    from uc3d_rt.neus.regularize import regularize
    from uc3d_rt.neus.render import render_rays, render_rays_backward

    resolution = state.sdf.shape[0]
    inv_s = math.exp(state.log_inv_s)
    band = RAY_BAND / inv_s
    if iteration % REDISTANCE_EVERY == 0 and iteration > 0:
        restore_distance(state.sdf)
    if iteration % NODES_EVERY == 0:
        # Nothing of the object lies outside of its visual hull.
        np.maximum(state.sdf, state.start - HULL_SLACK, out=state.sdf)
        state.laplacian[state.nodes] = 0.0
        state.nodes = near_nodes(state.sdf, band + 1.5)
        state.smooth = smoothness(state.sdf, state.nodes, options)
        state.d_sdf[...] = 0.0
        state.d_color[...] = 0.0

    rng = np.random.default_rng((options.seed, state.stage.number, iteration))
    stride = max(1, round(len(pixels.mask) / state.stage.rays))
    subset = slice(int(rng.integers(stride)), None, stride)
    rays, crosses = trace_rays(pixels, subset, resolution)
    offset = rng.random(len(rays.slab), dtype=np.float32)
    out = np.empty((len(rays.slab), 7), np.float32)
    traced = (rays.start, rays.weight_y, rays.entry, rays.direction, rays.length, offset)
    how = (options.sample_step, band, CUTOFF)
    render_rays(state.sdf, state.color, inv_s, *traced, *how, out)

    d_out = ray_gradient(out, pixels, subset, crosses, options)
    d_out *= np.float32((resolution / size) ** 2 * stride)  # as if one ray crossed each node's square
    d_inv_s = np.zeros(resolution, np.float64)
    render_rays_backward(
        state.sdf, state.color, inv_s, *traced, *how, d_out, state.d_sdf, state.d_color, d_inv_s
    )
    regularize(state.sdf, state.nodes, options.w_eikonal, state.smooth, state.laplacian, state.d_sdf)

    rate = options.final_rate**progress
    flat = (-1, 1)
    adam_step(
        state.sdf.reshape(flat), state.d_sdf.reshape(flat), state.mean, state.square,
        state.nodes, iteration + 1, options.learning_rate * rate, 0.02,
    )  # fmt: skip
    adam_step(
        state.color.reshape(-1, 3), state.d_color.reshape(-1, 3), state.color_mean, state.color_square,
        state.nodes, iteration + 1, options.learning_rate_color * rate, 0.01,
    )  # fmt: skip
    g = float(d_inv_s.sum()) * inv_s / max(len(state.nodes), 1)
    state.log_inv_s_mean = 0.9 * state.log_inv_s_mean + 0.1 * g
    state.log_inv_s_square = 0.98 * state.log_inv_s_square + 0.02 * g * g
    t = iteration + 1
    state.log_inv_s -= (
        0.05
        * (state.log_inv_s_mean / (1 - 0.9**t))
        / (math.sqrt(state.log_inv_s_square / (1 - 0.98**t)) + 1e-8)
    )
    _, low, high = state.stage.inv_s
    state.log_inv_s = min(max(state.log_inv_s, math.log(low)), math.log(high))


def ray_gradient(
    out: FloatArray, pixels: Pixels, subset: slice, crosses: BoolArray, options: FitOptions
) -> FloatArray:
    """Gradient (N, 7) of the summed ray losses (Eq. 21 and the mask term) for rendered rays (N, 7)."""
    target_color = pixels.color[subset][crosses]
    target_normal = pixels.normal[subset][crosses]
    target_mask = pixels.mask[subset][crosses]
    inside = target_mask > 0.5
    l_rgb, g_rgb = rgb_loss(out[:, :3], target_color)
    l_normal, g_normal = normal_loss(out[:, 3:6], target_normal)
    l_mask, g_mask = mask_loss(out[:, 6], target_mask)
    met = inside & (out[:, 6] > MIN_OPACITY)
    d_out = np.empty_like(out)
    d_out[:, :3] = options.w_rgb * g_rgb * keep_best(l_rgb, np.ones_like(inside), options.keep_rgb)[:, None]
    d_out[:, 3:6] = options.w_normal * g_normal * keep_best(l_normal, met, options.keep_normal)[:, None]
    d_out[:, 6] = options.w_mask * g_mask * keep_best(l_mask, np.ones_like(inside), options.keep_mask)
    return d_out


def thickness_weight(sdf: FloatArray) -> FloatArray:
    """How well (R, R, R) a grid of half the resolution resolves the parts of an object: 0 no, 1 yes.

    Args:
        sdf: (R, R, R) in node spacings of the fine grid.
    """
    from scipy.ndimage import maximum_filter

    depth = maximum_filter(-sdf, size=5)  # of the deepest point within one coarse node spacing
    return np.asarray(np.clip(depth - 1.0, 0.0, 1.0), dtype=np.float32)


def smoothness(sdf: FloatArray, nodes: NDArray[np.int64], options: FitOptions) -> FloatArray:
    """Smoothness weight (N,) of each node: more where the field's gradient is close to vertical.

    Views at elevation 0 see nothing of a flat top; there, smoothness is all that shapes the surface.
    """
    r, f = sdf.shape[0], sdf.reshape(-1)
    gy, gz, gx = (f[nodes + step] - f[nodes - step] for step in (r * r, r, 1))
    upright = np.abs(gy) / np.maximum(np.sqrt(gx * gx + gy * gy + gz * gz), 1e-6)
    share = np.clip((upright - 0.9) / 0.08, 0.0, 1.0)
    return np.asarray(options.w_smooth + share * (options.w_smooth_unseen - options.w_smooth), np.float32)


def initial_colors(sdf: FloatArray, color: FloatArray, masks: BoolArray) -> FloatArray:
    """Colours (R, R, R, 3) of the nodes: the views that see a node's gradient face on, blended."""
    resolution, size = sdf.shape[0], masks.shape[-1]
    axis = node_coordinates(resolution)
    gy, gz, gx = np.gradient(sdf)
    unit = np.stack([gx, gy, gz], axis=-1)
    unit /= np.maximum(np.linalg.norm(unit, axis=-1, keepdims=True), 1e-6)
    y, z, x = np.meshgrid(axis, axis, axis, indexing="ij")
    points = np.stack([x, y, z], axis=-1)
    total = np.full((*sdf.shape, 3), 0.5e-3, np.float32)
    weight = np.full((*sdf.shape, 1), 1e-3, np.float32)
    for view, camera in enumerate(TARGET_CAMERAS):
        uv = project(points, camera)
        column = np.clip(((uv[..., 0] + 1.0) * 0.5 * size).astype(np.int64), 0, size - 1)
        row = np.clip(((1.0 - uv[..., 1]) * 0.5 * size).astype(np.int64), 0, size - 1)
        facing = np.maximum(unit @ camera_axes(camera)[2], 0.0) ** 2 + 1e-2
        w = (facing * masks[view][row, column])[..., None]
        total += w * color[view][row, column]
        weight += w
    return (total / weight).astype(np.float32)
