"""The fit on a device: `device_views.py`, the hull, `device_carve.py` and the loop of `fit.py`, with `cuda/`.

All is computed on the device; what the host learns on the way are the number of pixels that show the object
and how well the hull covers the silhouettes.  An iteration is captured once a stage and replayed: what sets
it apart from the others stands in a table on the device.  Sums over rays are taken in fixed point, so the
same input gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from uc3d_rt.device import Buffer, Device, Scope, cleared, uploaded
from uc3d_rt.errors import FitError
from uc3d_rt.neus.device_carve import carve, initial_colors
from uc3d_rt.neus.device_views import (
    DeviceImages,
    DevicePixels,
    images_on_device,
    merged_on_device,
    outlines_on_device,
    pixels_on_device,
)
from uc3d_rt.neus.field import DeviceField
from uc3d_rt.neus.fit_plan import (
    CUTOFF,
    HULL_SLACK,
    MASK_SHARE,
    NO_VOLUME,
    NODES_EVERY,
    RAY_BAND,
    REDISTANCE_EVERY,
    Countdown,
    FitOptions,
    Stage,
    compared_stages,
    falls_behind,
)
from uc3d_rt.neus.hull import tolerant
from uc3d_rt.neus.shared import BETA_1, BETA_2, MARGIN
from uc3d_rt.views import TARGET_CAMERAS, camera_axes

FloatArray = NDArray[np.float32]

PROGRESS = np.dtype(
    [
        ("log_inv_s", "f8"), ("mean", "f8"), ("square", "f8"), ("inv_s", "f4"), ("band", "f4"),
        ("nodes", "i4"), ("iteration", "i4"), ("d_inv_s", "i8"),
    ]
)  # fmt: skip
"""`Progress` of `cuda/grid.cuh`."""

TURN = np.dtype(
    [("key", "u4"), ("first", "i4"), ("correct_1", "f4"), ("correct_2", "f4"), ("rate", "f4")]
)  # fmt: skip
"""`Turn` of `cuda/grid.cuh`: what sets one iteration of a stage apart."""

RAY_LANES = 8
"""Threads of a ray: `cuda/rays.cuh`."""

FIXED_ONE = 2.0**32
"""Of the kernels' fixed point: `cuda/grid.cuh`."""

RELAXATIONS = 20
"""Rounds after which distances within `MARGIN` nodes no longer change, one node a round and some more."""


class DeviceState:
    """The arrays of one stage, in node spacings, on a device."""

    def __init__(self, device: Device, start: Buffer, stage: Stage, field: DeviceField | None = None) -> None:
        """Take over the hull's distance (R, R, R), and the memory of a field; that is not filled."""
        r = start.shape[0]
        self.device, self.resolution = device, r
        self.start, self.stage = start, stage
        self.sdf = device.empty((r, r, r), np.float32) if field is None else field.sdf
        self.color = device.empty((r, r, r, 3), np.float32) if field is None else field.color
        self.spare = device.empty((r, r, r), np.float32)
        self.frozen = device.empty((r, r, r), np.uint8)
        self.d_sdf, self.d_color = (device.empty((r, r, r, c), np.int64) for c in (1, 3))
        self.moments = [device.empty((r, r, r, c), np.float32) for c in (1, 1, 3, 3)]
        self.laplacian = device.empty((r, r, r), np.float32)
        self.nodes = device.empty((r**3,), np.int32)
        self.smooth, self.regular = (device.empty((r**3,), np.float32) for _ in range(2))
        self.progress = device.empty((PROGRESS.itemsize,), np.uint8)
        self._workspace = [
            self.spare, self.frozen, self.d_sdf, self.d_color, *self.moments, self.laplacian, self.nodes,
            self.smooth, self.regular, self.progress,
        ]  # fmt: skip
        self.begin(stage)

    def begin(self, stage: Stage) -> None:
        """Forget what the optimiser has learned, but for the field: a stage on this grid begins."""
        self.stage = stage
        for buffer in (self.d_sdf, self.d_color, *self.moments, self.laplacian):
            self.device.clear(buffer)
        inv_s = stage.inv_s[0]
        progress = np.zeros(1, PROGRESS)
        progress["log_inv_s"], progress["inv_s"], progress["band"] = math.log(inv_s), inv_s, RAY_BAND / inv_s
        self.device.upload(progress.view(np.uint8), self.progress)

    @property
    def count(self) -> int:
        """Nodes in all."""
        return int(self.resolution**3)

    def keep_field(self) -> None:
        """Give all memory back but that of hull, field and colours, before the next stage takes its own."""
        self.device.free(self._workspace)
        self._workspace = []

    def free(self) -> None:
        """Give the rest back."""
        self.device.free([self.start, self.sdf, self.color])

    def restore_distance(self, source: Buffer | None = None, target: Buffer | None = None) -> None:
        """Twin of `redistance.restore_distance`: the distance to a field's surface, up to `MARGIN` nodes.

        Args:
            source: the field; None = `sdf`.
            target: where the distance goes, it may be the source; not `spare`; None = `sdf`.
        """
        r, spare = np.int32(self.resolution), self.spare
        source, target = (self.sdf if buffer is None else buffer for buffer in (source, target))
        first, second = (target, spare) if source is spare else (spare, target)
        self.device.launch("freeze", self.count, source, r, np.float32(MARGIN), first, self.frozen)
        there, back = (
            ("relax", self.count, (a, self.frozen, r, b)) for a, b in ((first, second), (second, first))
        )
        self.device.repeat([there, back], RELAXATIONS // 2)
        if second is target:
            self.device.repeat([there], 1)

    def keep_in_hull(self, slack: float) -> None:
        """Twin of `np.maximum(sdf, start - slack)`."""
        self.device.launch(
            "keep_in_hull", self.count, self.sdf, self.start, np.float32(slack), np.int32(self.count)
        )

    def near_nodes(self, options: FitOptions) -> None:
        """Twins of `near_nodes` and `smoothness`; clears what was summed for other nodes."""
        device = self.device
        for buffer in (self.laplacian, self.d_sdf, self.d_color):
            device.clear(buffer)
        device.launch("forget_nodes", 1, self.progress)
        device.launch(
            "near_nodes", self.count, self.sdf, np.int32(self.resolution), np.float32(1.5),
            np.float32(options.w_smooth), np.float32(options.w_smooth_unseen), self.progress, self.nodes,
            self.smooth,
        )  # fmt: skip

    def step(self, options: FitOptions, turns: Buffer) -> None:
        """One step down the gradient that the rays have left, as the turn (of `turns_of`) has it."""
        device, r = self.device, np.int32(self.resolution)
        threads = self.count // 8  # the host does not know how many nodes there are; a thread takes several
        device.launch("bend", threads, self.sdf, r, self.nodes, self.smooth, self.progress, self.laplacian)
        device.launch(
            "regularize", threads, self.sdf, r, self.nodes, self.laplacian, np.float32(options.w_eikonal),
            self.progress, self.regular,
        )  # fmt: skip
        own: tuple[Buffer | None, ...] = self.sdf, self.d_sdf, self.regular, *self.moments[:2]
        self._adam(own, 1, turns, options.learning_rate, 0.02)
        own = self.color, self.d_color, None, *self.moments[2:]
        self._adam(own, 3, turns, options.learning_rate_color, 0.01)
        _, low, high = self.stage.inv_s
        device.launch("adapt_density", 1, self.progress, np.float64(low), np.float64(high))

    def _adam(
        self,
        arrays: tuple[Buffer | None, ...],
        channels: int,
        turns: Buffer,
        learning_rate: float,
        epsilon: float,
    ) -> None:
        self.device.launch(
            "adam_step", self.count // 8 * channels, *arrays, self.nodes, np.int32(channels), self.progress,
            turns, np.float32(learning_rate), np.float32(epsilon),
        )  # fmt: skip


def ray_key(seed: int, stage: int, iteration: int) -> np.uint32:
    """Number that the jitter of one iteration's rays is drawn from."""
    return np.uint32(np.random.SeedSequence([seed, stage, iteration]).generate_state(1, np.uint32)[0])


def turns_of(options: FitOptions, stage: Stage, stride: int) -> NDArray[np.void]:
    """The turns of a stage, `TURN`.

    Args:
        options: of the fit.
        stage: whose iterations they are.
        stride: every how many-th pixel an iteration takes.
    """
    count = stage.iterations
    turns = np.zeros(count, TURN)
    turns["key"] = [ray_key(options.seed, stage.number, iteration) for iteration in range(count)]
    turns["first"] = turns["key"] % np.uint32(stride)
    step = np.arange(1, count + 1)
    turns["correct_1"], turns["correct_2"] = 1.0 / (1.0 - BETA_1**step), 1.0 / (1.0 - BETA_2**step)
    turns["rate"] = options.final_rate ** ((step - 1) / max(count - 1, 1))
    return turns


def stride_of(pixels: DevicePixels, stage: Stage) -> int:
    """Every how many-th pixel an iteration takes."""
    return max(1, round(pixels.count / stage.rays))


def iterate(
    state: DeviceState, pixels: DevicePixels, size_px: int, options: FitOptions, turns: Buffer, stride: int
) -> None:
    """One iteration, queued; twin of `fit._iterate`.

    Args:
        state: of the stage.
        pixels: of all views.
        size_px: side of the views.
        options: of the fit.
        turns: as of `turns_of`; the device counts them.
        stride: as of `stride_of`.
    """
    scale = (state.resolution / size_px) ** 2 * stride  # as if one ray crossed each node's square
    weights = (options.w_rgb, options.w_normal, options.w_mask, scale)

    state.device.launch(
        "fit_rays", RAY_LANES * -(-pixels.count // stride), state.sdf, state.color,
        np.int32(state.resolution), *pixels.rays, *pixels.targets, np.int32(pixels.count), np.int32(stride),
        np.float32(options.sample_step), np.float32(CUTOFF), *(np.float32(w) for w in weights), turns,
        state.d_sdf, state.d_color, state.progress,
    )  # fmt: skip
    state.step(options, turns)


def run_stage(
    state: DeviceState,
    pixels: DevicePixels,
    size_px: int,
    options: FitOptions,
    tick: Callable[[], None],
) -> None:
    """All iterations of a state's stage, captured once and replayed; `tick` is called after each."""

    def look_around() -> None:
        state.keep_in_hull(HULL_SLACK)
        state.near_nodes(options)

    state.restore_distance()
    count = state.stage.iterations
    if count == 0:
        return
    stride = stride_of(pixels, state.stage)
    with Scope(state.device) as scope:
        turns = uploaded(scope, turns_of(options, state.stage, stride).view(np.uint8))
        restore, look, turn = (
            scope.capture(work)
            for work in (
                state.restore_distance,
                look_around,
                lambda: iterate(state, pixels, size_px, options, turns, stride),
            )
        )
        for iteration in range(count):
            if iteration % REDISTANCE_EVERY == 0 and iteration > 0:
                scope.replay(restore)
            if iteration % NODES_EVERY == 0:
                scope.replay(look)
            scope.replay(turn)
            tick()


def refined(
    device: Device, coarse: DeviceState, start: Buffer, stage: Stage, field: DeviceField | None = None
) -> DeviceState:
    """The next stage's arrays, its field taken over from the stage before; that is freed."""
    coarse.keep_field()
    fine = DeviceState(device, start, stage, field)
    device.launch(
        "refine", fine.count, coarse.sdf, coarse.start, coarse.color, np.int32(coarse.resolution),
        fine.start, np.int32(fine.resolution), fine.sdf, fine.color,
    )  # fmt: skip
    coarse.free()
    return fine


def view_loss(state: DeviceState, pixels: DevicePixels, options: FitOptions) -> float:
    """Twin of `fit.view_loss`; waits for the device."""
    with Scope(state.device) as scope:
        sums = cleared(scope, (4,), np.int64)
        scope.launch(
            "view_loss", RAY_LANES * -(-pixels.count // 4), state.sdf, state.color,
            np.int32(state.resolution), *pixels.rays, pixels.normal, pixels.mask, np.int32(pixels.count),
            np.float32(options.sample_step), np.float32(CUTOFF), state.progress, sums,
        )  # fmt: skip
        normals, met, masks, rays = (float(value) / FIXED_ONE for value in scope.download(sums))
    return normals / max(met, 1.0) + MASK_SHARE * masks / max(rays, 1.0)


class DeviceHull:
    """The visual hull of six silhouettes on a device; twin of `hull.hull_sdf`."""

    def __init__(self, device: Device, images: DeviceImages, distance: Buffer, resolution: int) -> None:
        """Find the least tolerance that covers the silhouettes.

        Args:
            device: where.
            images: the views.
            distance: (6, H, H) to the outlines, as of `outlines_on_device`.
            resolution: nodes an axis.
        """
        self.device, self.resolution, self.size = device, resolution, images.size_px
        rights = np.array([camera_axes(camera)[0][[0, 2]] for camera in TARGET_CAMERAS], np.float32)
        self._right = uploaded(device, rights)
        self._hull = device.empty((resolution,) * 3, np.float32)
        self._seen = device.empty((len(rights), resolution, self.size), np.uint8)
        _, self._tolerance_px = tolerant(
            merged_on_device(device, distance),
            device.download(images.mask).astype(bool),
            resolution,
            self._intersection,
            lambda _, slack: self._printed(slack),
        )

    def free(self) -> None:
        """Give the memory back."""
        self.device.free([self._hull, self._seen, self._right])

    @property
    def empty(self) -> bool:
        """Whether the silhouettes have no volume in common."""
        return not self._printed(self._tolerance_px).any()

    def at(self, resolution: int) -> Buffer:
        """Its distance (R, R, R) in node spacings of a grid."""
        out = self.device.empty((resolution,) * 3, np.float32)
        self.device.launch(
            "resample", resolution**3, self._hull, np.int32(self.resolution), np.float32(self._tolerance_px),
            np.float32(resolution / self.size), np.int32(resolution), out,
        )  # fmt: skip
        return out

    def _intersection(self, distances: Buffer) -> Buffer:
        self.device.launch(
            "intersect", self.resolution**3, distances, self._right, np.int32(self.size),
            np.int32(self.resolution), self._hull,
        )  # fmt: skip
        return self._hull

    def _printed(self, slack_px: float) -> NDArray[np.bool_]:
        self.device.clear(self._seen)
        self.device.launch(
            "print_nodes", self.resolution**3, self._hull, np.float32(slack_px), self._right,
            np.int32(len(TARGET_CAMERAS)), np.int32(self.size), np.int32(self.resolution), self._seen,
        )  # fmt: skip
        return np.asarray(self.device.download(self._seen), np.bool_)


def fit_on_device(
    device: Device,
    color: FloatArray,
    normal: FloatArray,
    options: FitOptions,
    on_progress: Callable[[int, int], None] | None = None,
) -> DeviceField:
    """All of the fit on a device; twin of `fit.fit`, whose arguments and errors it has.

    Args:
        device: where, with the memory of the field.
        color: (6, H, H, 3) in [0, 1], white background.
        normal: (6, H, H, 3) unit world normals, zero = background.
        options: settings.
        on_progress: called with (iterations queued, iterations in all).

    Returns:
        The field, done.

    Raises:
        BackendError: the device failed, for example for want of memory.
        FitError: the options ask for what the kernels do not do, or the views show no object.
    """
    if min(options.keep_rgb, options.keep_normal, options.keep_mask) < 1.0:
        raise FitError("keep_rgb, keep_normal and keep_mask below 1 work on the CPU only; use --device cpu")
    field = empty_field(device, options)
    with Scope(device) as scope:
        images = images_on_device(scope, color, normal)
        fit_images(scope, images, options, field, on_progress or (lambda done, total: None))
        device.wait()  # errors of kernels show here
    return field


def empty_field(device: Device, options: FitOptions) -> DeviceField:
    """Memory for what a fit makes."""
    shape = (options.resolution,) * 3
    return DeviceField(device, device.empty(shape, np.float32), device.empty((*shape, 3), np.float32))


def fit_images(
    device: Device,
    images: DeviceImages,
    options: FitOptions,
    field: DeviceField,
    on_progress: Callable[[int, int], None],
) -> None:
    """Fill a field from views; arguments and errors as `fit_on_device`."""
    distance, near = outlines_on_device(device, images)
    hull = DeviceHull(device, images, distance, options.resolution)
    if hull.empty:
        raise FitError(NO_VOLUME)
    pixels = pixels_on_device(device, images, near)
    device.free([distance, near])
    progress = Countdown(options.total_iterations, on_progress)

    def begun(start: Buffer, stage: Stage, into: DeviceField | None = None) -> DeviceState:
        """A start on its first grid: the hull, and the first of all stages carved."""
        state = DeviceState(device, start, stage, into)
        carve(state, pixels, images.size_px, options.carve_steps if stage.number == 0 else 0)
        initial_colors(state, images)
        return state

    def run(state: DeviceState) -> DeviceState:
        run_stage(state, pixels, images.size_px, options, progress.tick)
        return state

    def next_state(state: DeviceState, stage: Stage) -> DeviceState:
        """What a stage begins with, on the same grid or one of twice the resolution."""
        if stage.resolution != state.resolution:
            return refined(device, state, hull.at(stage.resolution), stage)
        state.begin(stage)
        return state

    *before, last = options.stages
    state: DeviceState | None = None
    losses: dict[int, float] = {}
    for stage in before:
        state = run(begun(hull.at(stage.resolution), stage) if state is None else next_state(state, stage))
        if options.blurred_stages:
            losses[stage.resolution] = view_loss(state, pixels, options)
    if state is not None:
        state.keep_field()
    second: DeviceState | None = None
    for stage, compared in compared_stages(options.blurred_stages):
        second = run(begun(hull.at(stage.resolution), stage) if second is None else next_state(second, stage))
        if compared and falls_behind(view_loss(second, pixels, options), losses, stage, options):
            second.keep_field()
            second.free()
            second = None
            break
    if state is not None and second is not None:
        second.keep_field()
        state.free()
    progress.skip(last.iterations)
    state = second or state
    start = hull.at(last.resolution)
    hull.free()
    state = run(begun(start, last, field) if state is None else refined(device, state, start, last, field))
    state.keep_in_hull(HULL_SLACK)
    device.launch("to_world", state.count, field.sdf, field.color, np.int32(state.resolution))
