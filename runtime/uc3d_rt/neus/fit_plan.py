"""Settings of a fit, the stages that they make, and what decides between its two starts.

The fit on the CPU (`fit.py`) and its twin on a device (`device_fit.py`) follow the same plan.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

Progress = Callable[[int, int], None]

MIN_NODES, MAX_NODES = 16, 512

MIN_BLURRED_NODES = 32
"""Along an axis, of the grid that the second start begins on."""

NO_VOLUME = (
    "the six silhouettes have no volume in common; the views contradict each other, "
    "try another seed or more sampling steps"
)

REDISTANCE_EVERY, NODES_EVERY = 15, 5
"""Iterations after which the field is made a distance again, and nodes near its surface are looked for."""

RAY_BAND = 4.5
"""Deviations from the surface within which rays take samples."""

CUTOFF = 1e-3
"""Share of the light at which a ray ends."""

MIN_OPACITY = 0.3
"""Of a ray whose normal is compared; one through empty space has none."""

MASK_SHARE = 0.25
"""Weight of the mask term in `view_loss`."""

HULL_SLACK = 0.25
"""Node spacings that the surface may stand out of the visual hull, itself only as exact as its pixels."""


@dataclass(frozen=True)
class Stage:
    """Iterations on one grid."""

    resolution: int  # nodes along an axis
    iterations: int
    number: int  # for the random numbers: no other stage of a fit has it
    inv_s: tuple[float, float, float]  # start and range of the inverse deviation, per node spacing
    rays: int  # wanted of an iteration; a coarse grid needs fewer, and a blurred surface


@dataclass(frozen=True)
class FitOptions:
    """Settings of `fit`; the defaults are for six views of 256 px."""

    resolution: int = 160  # nodes along each axis of the final grid
    carve_steps: int = 8  # of `carve`, at the coarsest resolution
    iterations: tuple[int, ...] = (30, 40, 40)  # at resolution / 2^k, ..., resolution / 2, resolution;
    # stages whose grid would be no whole number of nodes, or fewer than MIN_NODES, are left out
    blurred_iterations: tuple[int, int] = (80, 60)  # of the second start, which is not carved: with a blurred
    # surface on a grid of MIN_BLURRED_NODES or a little more, and with a sharp one on each grid from there to
    # the first start's coarsest; none with a blurred one = one start only
    second_start_loss: float = 0.98  # the second start goes on to the last grid if its `view_loss` on the
    # one before is below this share of the first's
    rays_per_iteration: int = 25_000
    seed: int = 0
    w_rgb: float = 0.3  # Eq. 19
    w_normal: float = 4.0  # Eq. 20
    w_mask: float = 2.0
    w_eikonal: float = 0.2
    w_smooth: float = 0.005
    w_smooth_unseen: float = 0.4  # where the surface faces up or down, out of every view's sight
    keep_rgb: float = 1.0  # share of the rays whose residual counts
    keep_normal: float = 1.0
    keep_mask: float = 1.0
    learning_rate: float = 0.25  # of the distance, node spacings an iteration
    learning_rate_color: float = 0.05
    final_rate: float = 0.15  # learning rates fall to this share within a stage
    inv_s_start: float = 2.0  # inverse deviation per node spacing when a stage starts
    inv_s_range: tuple[float, float] = (1.5, 6.0)
    inv_s_blurred: tuple[float, float, float] = (16.0, 12.0, 48.0)  # start and range of the blurred surface,
    # per world unit
    sample_step: float = 0.9  # node spacings between samples on a ray

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: naming the option, its value and what it may be.
        """
        if not self.iterations or min(self.iterations) < 0:
            raise ValueError(f"FitOptions.iterations must be counts >= 0, one a stage, got {self.iterations}")
        if self.carve_steps < 0:
            raise ValueError(f"FitOptions.carve_steps must be >= 0, got {self.carve_steps}")
        if not MIN_NODES <= self.resolution <= MAX_NODES:
            raise ValueError(
                f"FitOptions.resolution must be from {MIN_NODES} to {MAX_NODES}, got {self.resolution}"
            )
        if self.rays_per_iteration < 1000:
            raise ValueError(
                f"FitOptions.rays_per_iteration must be at least 1000, got {self.rays_per_iteration}"
            )
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name.startswith("w_") and not value >= 0:
                raise ValueError(f"FitOptions.{item.name} must be >= 0, got {value}")
            if item.name.startswith("keep_") and not 0 < value <= 1:
                raise ValueError(f"FitOptions.{item.name} must be in (0, 1], got {value}")
            if item.name.startswith("learning_rate") and not 0 < value < 1:
                raise ValueError(f"FitOptions.{item.name} must be in (0, 1), got {value}")
        if len(self.blurred_iterations) != 2 or min(self.blurred_iterations) < 0:
            raise ValueError(
                f"FitOptions.blurred_iterations must be two counts >= 0, got {self.blurred_iterations}"
            )
        if not 0 <= self.second_start_loss <= 1:
            raise ValueError(f"FitOptions.second_start_loss must be in [0, 1], got {self.second_start_loss}")
        if not 0.1 <= self.sample_step <= 1.5:
            raise ValueError(f"FitOptions.sample_step must be in [0.1, 1.5], got {self.sample_step}")

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of the first start, coarse to fine; the last one is the second start's as well."""
        last = len(self.iterations) - 1
        shrinks = [2 ** (last - stage) for stage in range(last + 1)]
        sharp = (self.inv_s_start, *self.inv_s_range)
        pairs = [
            (self.resolution // shrink, count)
            for shrink, count in zip(shrinks, self.iterations, strict=True)
            if self.resolution % shrink == 0 and self.resolution // shrink >= MIN_NODES
        ]
        return tuple(
            Stage(nodes, count, number, sharp, self.rays_per_iteration * nodes // self.resolution)
            for number, (nodes, count) in enumerate(pairs)
        )

    @property
    def blurred_stages(self) -> tuple[Stage, ...]:
        """The stages of the second start but the last; empty = there is none.

        They end where those of the first start do before its last, so that the two can be compared.
        """
        blurred, sharp = self.blurred_iterations
        if not blurred or len(self.stages) < 2:
            return ()
        coarsest, *later = self.stages[:-1]
        first = coarsest.resolution
        while first % 2 == 0 and first // 2 >= MIN_BLURRED_NODES:
            first //= 2
        start, low, high = (2.0 * inv_s / first for inv_s in self.inv_s_blurred)
        rays = self.rays_per_iteration * first // self.resolution
        stages = [Stage(first, blurred, 0, (start, low, high), rays // 2)]
        grid = min(2 * first, coarsest.resolution)
        while grid <= coarsest.resolution:
            rays = self.rays_per_iteration * grid // self.resolution
            stages.append(replace(coarsest, resolution=grid, iterations=sharp, rays=rays))
            grid *= 2
        numbers = itertools.count(len(self.stages))
        return tuple(replace(stage, number=next(numbers)) for stage in (*stages, *later))

    @property
    def total_iterations(self) -> int:
        """Of all stages of both starts."""
        return sum(stage.iterations for stage in (*self.stages, *self.blurred_stages))


class Countdown:
    """Tells of iterations done, of all that there may be."""

    def __init__(self, total: int, on_progress: Progress | None) -> None:
        self._done, self._total, self._on_progress = 0, total, on_progress

    def tick(self) -> None:
        """One more is done."""
        self._done += 1
        if self._on_progress is not None:
            self._on_progress(self._done, self._total)

    def skip(self, left: int) -> None:
        """None but the last `left` will follow: what was given up counts as done."""
        self._done = self._total - left


def compared_stages(stages: tuple[Stage, ...]) -> list[tuple[Stage, bool]]:
    """Each stage of the second start, and whether it is the last one on its grid: then they are compared."""
    followers = [*(stage.resolution for stage in stages[1:]), 0]
    pairs = zip(stages, followers, strict=False)  # no stages, no follower
    return [(stage, stage.resolution != follower) for stage, follower in pairs]


def falls_behind(loss: float, first: dict[int, float], stage: Stage, options: FitOptions) -> bool:
    """Whether the second start is given up after a stage: it must be nearer, on its last grid by enough.

    Coarse grids tell the two apart less well: what is only just nearer there may be far nearer in the end.

    Args:
        loss: its `view_loss`.
        first: those of the first start, by resolution.
        stage: the last one of the second start on a grid.
        options: settings of both.
    """
    share = options.second_start_loss if stage == options.blurred_stages[-1] else 1.0
    return loss >= first.get(stage.resolution, math.inf) * share
