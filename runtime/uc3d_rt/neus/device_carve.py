"""The carving of the hull, and the first colours, on a device: `carve.py` with the kernels of `cuda/`.

The solver takes its steps without the host: how far each goes, and whether more are needed, stays on the
device.  Sums over rays are in fixed point and those over nodes in one order, so the same input gives the
same bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from uc3d_rt.device import Buffer, Device, Scope, uploaded
from uc3d_rt.neus.shared import (
    BAND,
    COVER_DEPTH,
    COVER_WEIGHT,
    ENOUGH_PIXELS,
    LARGEST_MOVE,
    SOLVER_STEPS,
    SOLVER_TOLERANCE,
    STAY,
    UNSEEN_WEIGHT,
)
from uc3d_rt.views import TARGET_CAMERAS, camera_axes

if TYPE_CHECKING:
    from uc3d_rt.neus.device_fit import DeviceState
    from uc3d_rt.neus.device_views import DeviceImages, DevicePixels

SOLVER = np.dtype(
    [("rho", "f8"), ("alpha", "f8"), ("beta", "f8"), ("enough", "f8"), ("done", "i4"), ("uncovered", "i4")]
)
"""`Solver` of `cuda/grid.cuh`."""

LANES = 8192
"""Partial sums of a sum over nodes, as in `cuda/solve.cu`."""


def carve(state: DeviceState, pixels: DevicePixels, size_px: int, steps: int) -> None:
    """Make a state's hull a distance, and its field that hull carved; twin of `carve.carve`.

    Args:
        state: of the coarsest grid, whose `start` is the hull.
        pixels: of all views.
        size_px: side of the views.
        steps: how often to look up and solve.
    """
    state.restore_distance(state.start, target=state.start)
    state.restore_distance(state.start)  # the same again: frozen nodes keep their values
    with Scope(state.device) as scope:
        carving = DeviceCarving(scope, pixels, state.resolution, size_px)
        for step in range(steps):
            carving.follow(state.sdf)
            if step == 0:
                carving.mark_covered()
            carving.find_targets(state.sdf)
            carving.solve(state.sdf)
            carving.move(state.sdf, state.start, state.spare)
            state.restore_distance(state.spare)


class DeviceCarving:
    """What the steps of `carve` need on a device; all of it taken from a scope that frees it."""

    def __init__(self, scope: Device, pixels: DevicePixels, resolution: int, size_px: int) -> None:
        """Take memory for rays of `pixels` and R³ nodes."""
        r, count = resolution, pixels.count
        self.device, self.pixels, self.resolution = scope, pixels, r
        self.pixels_per_node = (size_px / r) ** 2
        self.hit, self.lowest, self.lowest_at = (scope.empty((count,), np.float32) for _ in range(3))
        self.covered = scope.empty((count,), np.uint8)
        self.sums = scope.empty((r, r, r, 4), np.int64)
        self.target = scope.empty((r, r, r, 3), np.float32)
        self.weight = scope.empty((r, r, r), np.float32)
        self.solver = scope.empty((SOLVER.itemsize,), np.uint8)
        self.pulls = scope.empty((count, 4), np.float32)
        self.pulled, self.pulled_diagonal = (scope.empty((r, r, r), np.int64) for _ in range(2))
        self.moved, self.diagonal, self.residual, self.way, self.product = (
            scope.empty((r, r, r), np.float64) for _ in range(5)
        )
        self.partial = scope.empty((2, LANES), np.float64)

    def follow(self, sdf: Buffer) -> None:
        """Twin of `carve._follow`: where the rays of the silhouettes meet the surface."""
        self.device.launch(
            "follow_rays", self.pixels.count, sdf, np.int32(self.resolution), *self.pixels.rays,
            self.pixels.mask, np.int32(self.pixels.count), self.hit, self.lowest, self.lowest_at,
        )  # fmt: skip

    def mark_covered(self) -> None:
        """Remember which rays meet the hull itself: the others cannot be covered here."""
        count = self.pixels.count
        self.device.launch(
            "mark_covered", count, self.lowest, np.float32(COVER_DEPTH), np.int32(count), self.covered
        )

    def find_targets(self, sdf: Buffer) -> None:
        """Twins of `carve._splat_normals` and `carve._node_targets`, for the rays followed last."""
        device, pixels, r = self.device, self.pixels, np.int32(self.resolution)
        device.clear(self.sums)
        device.launch(
            "splat_normals", pixels.count, *pixels.rays, pixels.normal, self.hit, np.int32(pixels.count), r,
            self.sums,
        )  # fmt: skip
        enough = ENOUGH_PIXELS * self.pixels_per_node
        device.launch(
            "node_targets", self.resolution**3, sdf, r, self.sums, np.float32(BAND), np.float64(enough),
            np.float64(UNSEEN_WEIGHT), self.target, self.weight,
        )  # fmt: skip

    def solve(self, sdf: Buffer) -> None:
        """Twin of `carve._solve`: leaves the change of the values in `moved`."""
        device, r, count = self.device, np.int32(self.resolution), self.pixels.count
        for buffer in (self.solver, self.pulled, self.pulled_diagonal):
            device.clear(buffer)
        device.launch(
            "list_uncovered", count, sdf, self.weight, r, *self.pixels.rays, self.covered, self.lowest,
            self.lowest_at, np.float32(COVER_DEPTH), np.int32(count), self.solver, self.pulls, self.pulled,
            self.pulled_diagonal,
        )  # fmt: skip
        weights = np.float64(STAY), np.float64(COVER_WEIGHT / self.pixels_per_node)
        device.launch(
            "cg_start", LANES, sdf, self.target, self.weight, r, *weights, self.pulled,
            self.pulled_diagonal, self.diagonal, self.moved, self.residual, self.way, self.partial,
        )  # fmt: skip
        device.launch("cg_begin", 1, self.partial, np.float64(SOLVER_TOLERANCE), self.solver)
        known, sums = (self.weight, self.solver), (self.partial, self.solver)
        applied = (*known, self.way, r, *weights, self.pulled, self.product, self.partial)
        stepped = (self.diagonal, self.way, self.product, r, self.moved, self.residual, self.partial)
        device.repeat(
            [
                ("cg_pull", LANES, (self.pulls, self.solver, self.way, r, self.pulled)),
                ("cg_apply", LANES, applied),
                ("cg_alpha", 1, sums),
                ("cg_step", LANES, (*known, *stepped)),
                ("cg_beta", 1, sums),
                ("cg_turn", self.resolution**3, (*known, self.diagonal, self.residual, r, self.way)),
            ],
            SOLVER_STEPS,
        )

    def move(self, sdf: Buffer, hull: Buffer, out: Buffer) -> None:
        """The field with what `solve` found added, where it is thick enough, and nowhere below the hull."""
        self.device.launch(
            "move_nodes", self.resolution**3, sdf, hull, self.weight, self.moved, np.float64(LARGEST_MOVE),
            np.int32(self.resolution), out,
        )  # fmt: skip


def initial_colors(state: DeviceState, images: DeviceImages) -> None:
    """Fill a state's colours from the views; twin of `fit.initial_colors`.

    Args:
        state: whose `sdf` is filled.
        images: the views.
    """
    axes = np.stack([np.stack(camera_axes(camera)) for camera in TARGET_CAMERAS])
    with Scope(state.device) as scope:
        scope.launch(
            "initial_colors", state.count, state.sdf, np.int32(state.resolution), uploaded(scope, axes),
            np.int32(len(axes)), images.color, images.mask, np.int32(images.size_px), state.color,
        )  # fmt: skip
