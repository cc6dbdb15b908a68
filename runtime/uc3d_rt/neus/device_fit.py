"""The fit on a device: the hull, its carving (`device_carve.py`) and the loop of `fit.py`, with `cuda/`.

The host chooses the pixels and takes the distances to the outlines; all else is computed on the device.
Once the hull's tolerance is known nothing leaves it until the field is there.  Sums over rays are taken in
fixed point, so the same input gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from uc3d_rt.device import Buffer, Device, Scope, cleared, uploaded
from uc3d_rt.errors import FitError
from uc3d_rt.neus.device_carve import carve, initial_colors
from uc3d_rt.neus.hull import pair_distances, tolerant
from uc3d_rt.neus.shared import BETA_1, BETA_2, MARGIN
from uc3d_rt.views import TARGET_CAMERAS, camera_axes

if TYPE_CHECKING:
    from uc3d_rt.neus.fit import FitOptions
    from uc3d_rt.neus.rays import Pixels

FloatArray = NDArray[np.float32]

PROGRESS = np.dtype(
    [
        ("log_inv_s", "f8"), ("mean", "f8"), ("square", "f8"), ("inv_s", "f4"), ("band", "f4"),
        ("nodes", "i4"), ("pad", "i4"), ("d_inv_s", "i8"),
    ]
)  # fmt: skip
"""`Progress` of `cuda/grid.cuh`."""

RELAXATIONS = 20
"""Rounds after which distances within `MARGIN` nodes no longer change, one node a round and some more."""


class DeviceState:
    """The arrays of one stage, in node spacings, on a device."""

    def __init__(self, device: Device, start: Buffer, inv_s: float) -> None:
        """Take over the hull's distance (R, R, R); the field itself is not filled."""
        r = start.shape[0]
        self.device, self.resolution = device, r
        self.start = start
        self.sdf, self.spare = (device.empty((r, r, r), np.float32) for _ in range(2))
        self.color = device.empty((r, r, r, 3), np.float32)
        self.frozen = device.empty((r, r, r), np.uint8)
        self.d_sdf, self.d_color = (cleared(device, (r, r, r, c), np.int64) for c in (1, 3))
        self.moments = [cleared(device, (r, r, r, c), np.float32) for c in (1, 1, 3, 3)]
        self.laplacian = cleared(device, (r, r, r), np.float32)
        self.nodes = device.empty((r**3,), np.int32)
        self.smooth, self.regular = (device.empty((r**3,), np.float32) for _ in range(2))
        progress = np.zeros(1, PROGRESS)
        progress["log_inv_s"], progress["inv_s"], progress["band"] = math.log(inv_s), inv_s, 4.5 / inv_s
        self.progress = uploaded(device, progress.view(np.uint8))

    @property
    def count(self) -> int:
        """Nodes in all."""
        return int(self.resolution**3)

    def free(self) -> None:
        """Give the memory back."""
        self.device.free(
            [
                self.start, self.sdf, self.spare, self.color, self.frozen, self.d_sdf, self.d_color,
                *self.moments, self.laplacian, self.nodes, self.smooth, self.regular, self.progress,
            ]
        )  # fmt: skip

    def restore_distance(self, source: Buffer | None = None) -> None:
        """Twin of `redistance.restore_distance`: the distance to a field's surface, up to `MARGIN` nodes.

        Args:
            source: the field, `spare` or memory that is left as it is; None = `sdf` itself.
        """
        r, launch = np.int32(self.resolution), self.device.launch
        if source is None:
            self.sdf, self.spare = self.spare, self.sdf
            source = self.spare
        launch("freeze", self.count, source, r, np.float32(MARGIN), self.sdf, self.frozen)
        there, back = ((self.sdf, self.spare), (self.spare, self.sdf))
        self.device.repeat(
            [("relax", self.count, (a, self.frozen, r, b)) for a, b in (there, back)], RELAXATIONS // 2
        )

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

    def step(self, options: FitOptions, step: int, rate: float) -> None:
        """One step down the gradient that the rays have left; `step` counts from 1."""
        device, r = self.device, np.int32(self.resolution)
        threads = self.count // 8  # the host does not know how many nodes there are; a thread takes several
        device.launch("bend", threads, self.sdf, r, self.nodes, self.smooth, self.progress, self.laplacian)
        device.launch(
            "regularize", threads, self.sdf, r, self.nodes, self.laplacian, np.float32(options.w_eikonal),
            self.progress, self.regular,
        )  # fmt: skip
        self._adam(
            (self.sdf, self.d_sdf, self.regular, *self.moments[:2]),
            1,
            step,
            options.learning_rate * rate,
            0.02,
        )
        self._adam(
            (self.color, self.d_color, None, *self.moments[2:]),
            3,
            step,
            options.learning_rate_color * rate,
            0.01,
        )
        low, high = options.inv_s_range
        device.launch("adapt_density", 1, self.progress, np.int32(step), np.float64(low), np.float64(high))

    def _adam(
        self,
        arrays: tuple[Buffer | None, ...],
        channels: int,
        step: int,
        learning_rate: float,
        epsilon: float,
    ) -> None:
        self.device.launch(
            "adam_step", self.count // 8 * channels, *arrays, self.nodes, np.int32(channels), self.progress,
            np.float32(1.0 / (1.0 - BETA_1**step)), np.float32(1.0 / (1.0 - BETA_2**step)),
            np.float32(learning_rate), np.float32(epsilon),
        )  # fmt: skip


class DevicePixels:
    """What `select_pixels` chose, on a device."""

    def __init__(self, device: Device, pixels: Pixels) -> None:
        self.count = len(pixels.mask)
        self.rays = [uploaded(device, array) for array in (pixels.origin, pixels.direction)]
        self.targets = [uploaded(device, array) for array in (pixels.color, pixels.normal, pixels.mask)]
        _, self.normal, self.mask = self.targets


def ray_key(seed: int, stage: int, iteration: int) -> np.uint32:
    """Number that the jitter of one iteration's rays is drawn from."""
    return np.uint32(np.random.SeedSequence([seed, stage, iteration]).generate_state(1, np.uint32)[0])


def iterate(
    state: DeviceState,
    pixels: DevicePixels,
    size_px: int,
    options: FitOptions,
    stage: int,
    iteration: int,
    progress: float,
) -> None:
    """One iteration, queued; twin of `fit._iterate`.

    Args:
        state: of the stage.
        pixels: of all views.
        size_px: side of the views.
        options: of the fit.
        stage: for the random numbers.
        iteration: of the stage, from 0.
        progress: through the stage, 0 to 1.
    """
    from uc3d_rt.neus.fit import HULL_SLACK, NODES_EVERY, REDISTANCE_EVERY

    if iteration % REDISTANCE_EVERY == 0 and iteration > 0:
        state.restore_distance()
    if iteration % NODES_EVERY == 0:
        state.keep_in_hull(HULL_SLACK)
        state.near_nodes(options)
    resolution = state.resolution
    wanted = options.rays_per_iteration * resolution // options.resolution
    stride = max(1, round(pixels.count / wanted))
    key = ray_key(options.seed, stage, iteration)
    scale = (resolution / size_px) ** 2 * stride  # as if one ray crossed each node's square
    weights = (options.w_rgb, options.w_normal, options.w_mask, scale)
    state.device.launch(
        "fit_rays", -(-pixels.count // stride), state.sdf, state.color, np.int32(resolution), *pixels.rays,
        *pixels.targets, np.int32(pixels.count), np.int32(int(key) % stride), np.int32(stride), key,
        np.float32(options.sample_step), np.float32(1e-3), *(np.float32(w) for w in weights),
        state.d_sdf, state.d_color, state.progress,
    )  # fmt: skip
    state.step(options, iteration + 1, options.final_rate**progress)


def refined(device: Device, coarse: DeviceState, start: Buffer, inv_s: float) -> DeviceState:
    """The next stage's arrays, its field taken over from the stage before; that is freed."""
    fine = DeviceState(device, start, inv_s)
    device.launch(
        "refine", fine.count, coarse.sdf, coarse.start, coarse.color, np.int32(coarse.resolution),
        fine.start, np.int32(fine.resolution), fine.sdf, fine.color,
    )  # fmt: skip
    coarse.free()
    return fine


class DeviceHull:
    """The visual hull of six silhouettes on a device; twin of `hull.hull_sdf`."""

    def __init__(self, device: Device, masks: NDArray[np.bool_], resolution: int) -> None:
        """Find the least tolerance that covers the silhouettes (6, H, H) on a grid of `resolution` nodes."""
        self.device, self.resolution, self.size = device, resolution, masks.shape[-1]
        rights = np.array([camera_axes(camera)[0][[0, 2]] for camera in TARGET_CAMERAS], np.float32)
        self._right = uploaded(device, rights)
        self._hull = device.empty((resolution,) * 3, np.float32)
        self._seen = device.empty((len(rights), resolution, self.size), np.uint8)
        _, self._tolerance_px = tolerant(
            pair_distances(masks),
            masks,
            resolution,
            self._intersection,
            lambda _, slack: self._printed(slack),
        )

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

    def _intersection(self, distances: FloatArray) -> Buffer:
        given = uploaded(self.device, distances)
        self.device.launch(
            "intersect", self.resolution**3, given, self._right, np.int32(self.size),
            np.int32(self.resolution), self._hull,
        )  # fmt: skip
        self.device.free([given])
        return self._hull

    def _printed(self, slack_px: float) -> NDArray[np.bool_]:
        self.device.clear(self._seen)
        self.device.launch(
            "print_nodes", self.resolution**3, self._hull, np.float32(slack_px), self._right,
            np.int32(len(TARGET_CAMERAS)), np.int32(self.size), np.int32(self.resolution), self._seen,
        )  # fmt: skip
        return np.asarray(self.device.download(self._seen), np.bool_)


def fit_stages(
    device: Device,
    color: FloatArray,
    masks: NDArray[np.bool_],
    pixels: Pixels,
    options: FitOptions,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[FloatArray, FloatArray]:
    """All of the fit on a device; twin of what `fit.fit` does.

    Args:
        device: where.
        color: (6, H, H, 3) of the views.
        masks: (6, H, H) silhouettes.
        pixels: of all views.
        options: of the fit.
        on_progress: called with (iterations queued, iterations in all).

    Returns:
        `(sdf (R, R, R) in node spacings, color (R, R, R, 3))` of the last stage.

    Raises:
        BackendError: the device failed, for example for want of memory.
        FitError: the options ask for what the kernels do not do, or the views show no object.
    """
    if min(options.keep_rgb, options.keep_normal, options.keep_mask) < 1.0:
        raise FitError("keep_rgb, keep_normal and keep_mask below 1 work on the CPU only; use --device cpu")
    with Scope(device) as scope:
        return _fit_stages(scope, color, masks, pixels, options, on_progress)


def _fit_stages(
    device: Device,
    color: FloatArray,
    masks: NDArray[np.bool_],
    pixels: Pixels,
    options: FitOptions,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[FloatArray, FloatArray]:
    from uc3d_rt.neus.fit import HULL_SLACK, NO_VOLUME

    size_px = masks.shape[-1]
    hull = DeviceHull(device, masks, options.resolution)
    if hull.empty:
        raise FitError(NO_VOLUME)
    on_device = DevicePixels(device, pixels)
    total, done = sum(count for _, count in options.stages), 0
    state: DeviceState | None = None
    for stage, (resolution, count) in enumerate(options.stages):
        start = hull.at(resolution)
        if state is None:
            state = DeviceState(device, start, options.inv_s_start)
            carve(state, on_device, size_px, options.carve_steps)
            initial_colors(state, color, masks)
        else:
            state = refined(device, state, start, options.inv_s_start)
        state.restore_distance()
        for iteration in range(count):
            progress = iteration / max(count - 1, 1)
            iterate(state, on_device, size_px, options, stage, iteration, progress)
            done += 1
            if on_progress is not None:
                on_progress(done, total)
    assert state is not None
    state.keep_in_hull(HULL_SLACK)
    return device.download(state.sdf), device.download(state.color)
