"""What the kernels of the fit have to move and compute, counted launch by launch on the fit's own arrays.

Bytes are counted three ways.  `moved` is what memory cannot be spared: each 32-byte sector that a launch
touches once, read, written or both.  `asked` is what its threads load and store, most of it from caches.
`atomics` are 64-bit additions.  Operations are additions, subtractions, products, quotients, roots and
exponentials of 32-bit floating-point numbers as the source writes them, constants, comparisons and integers
left out; an instrumented build of the kernels gives the same numbers (`tests/benchmarks`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.ray_counts import RayCounts, count_rays
from uc3d_rt.device import Buffer, Captured, Device, Launch, Scalar
from uc3d_rt.neus.device_carve import SOLVER
from uc3d_rt.neus.device_fit import PROGRESS, TURN

BoolArray = NDArray[np.bool_]

SECTOR = 32
"""Bytes that memory moves at least."""

GROUPS = {
    "fit_rays": "rays",
    "bend": "regularise",
    "regularize": "regularise",
    "adam_step": "adam",
    "adapt_density": "density",
    "keep_in_hull": "near nodes",
    "forget_nodes": "near nodes",
    "near_nodes": "near nodes",
    "clear": "near nodes",
    "freeze": "distance",
    "relax": "distance",
    "refine": "next grid",
    "resample": "next grid",
    "view_loss": "choice of start",
}
"""Of kernels, within a stage; what comes before the first stage is "hull and carving"."""

START = "start"
"""The stage before the iterations."""


@dataclass(frozen=True)
class Work:
    """Of some launches."""

    moved: int = 0  # bytes
    asked: int = 0  # bytes
    atomics: int = 0
    operations: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.moved + other.moved,
            self.asked + other.asked,
            self.atomics + other.atomics,
            self.operations + other.operations,
        )


def sectors(touched: BoolArray, itemsize: int) -> int:
    """Bytes of the sectors that the touched items (N,) of an array lie in."""
    at = np.flatnonzero(touched).astype(np.int64) * itemsize
    marked = np.zeros(-(-touched.size * itemsize // SECTOR), bool)
    for byte in {*range(0, itemsize, SECTOR), itemsize - 1}:
        marked[(at + byte) // SECTOR] = True
    return SECTOR * int(marked.sum())


def with_neighbours(nodes: BoolArray) -> BoolArray:
    """Nodes (R, R, R) and their six neighbours."""
    out = nodes.copy()
    for axis in range(3):
        here, there = [slice(None)] * 3, [slice(None)] * 3
        here[axis], there[axis] = slice(1, None), slice(None, -1)
        out[tuple(here)] |= nodes[tuple(there)]
        out[tuple(there)] |= nodes[tuple(here)]
    return out


# Operations as written in cuda/render.cu and cuda/rays.cuh, for one of each.
RAY = 21 + 1 + 2 * 3 + 6 + 25 + 16  # trace, jitter, two marches, white, losses, what is behind
MET, UNSETTLED = 18, 6
LOOKUP = 2 * (2 + 6 + 44)  # place, cell, distance
SKIP = 2 * 3
SAMPLE = 2 * 4 + 3 + 205 + 3  # density; forward; values and their sums backward
JOINED = 2 * 2
OPAQUE = 3 + 28
BLENDED = 188 + 220


def ray_work(counts: RayCounts, seen: BoolArray, blended: BoolArray, pixels: int, stride: int) -> Work:
    """Work of `fit_rays` from what its rays do; `pixels` and `stride` say which pixels they are."""
    launched = np.zeros(pixels, bool)
    launched[::stride] = True
    per_pixel = (12, 8, 12, 12, 4)
    seen, blended = seen.reshape(-1), blended.reshape(-1)
    gradients = sectors(blended, 8) + sectors(blended, 24)
    return Work(
        moved=sum(sectors(launched, size) for size in per_pixel)
        + sectors(seen, 4)
        + sectors(blended, 12)
        + 2 * gradients,
        asked=counts.rays * sum(per_pixel)
        + 2 * 32 * counts.lookups
        + 8 * 16 * (counts.samples + counts.blended)
        + 8 * 32 * counts.blended,
        atomics=32 * counts.blended + counts.crossing,
        operations=counts.crossing * RAY
        + counts.met * MET
        + counts.unsettled * UNSETTLED
        + counts.lookups * LOOKUP
        + (counts.lookups - counts.samples) * SKIP
        + counts.samples * SAMPLE
        + counts.joined * JOINED
        + counts.opaque * OPAQUE
        + counts.blended * BLENDED,
    )


class Observed(ABC):
    """A `Device` that tells a subclass of every launch, with its stage and group."""

    def __init__(self, device: Device) -> None:
        self.device, self.stage = device, START
        self.iterations: dict[str, int] = {}
        self.empty, self.free = device.empty, device.free
        self.upload, self.download, self.wait = device.upload, device.download, device.wait
        self._kept: list[Callable[[], None]] | None = None  # while something is captured

    def launch(self, kernel: str, threads: int, *arguments: Buffer | Scalar | None) -> None:
        """See `Device`."""
        self.repeat([(kernel, threads, arguments)], 1)

    def group(self, kernel: str) -> tuple[str, str]:
        """Stage and group that a kernel counts to."""
        return self.stage, "hull and carving" if self.stage == START else GROUPS.get(kernel, kernel)

    def follow(self, kernel: str, arguments: Sequence[Any], before: bool) -> None:
        """Notice where stages begin: the next grid is work of its own stage."""
        if kernel == "refine" and before:
            self.stage = str(arguments[5])
        if kernel == "initial_colors" and not before:
            self.stage = str(arguments[1])
        if kernel == "fit_rays" and before:
            self.iterations[self.stage] = self.iterations.get(self.stage, 0) + 1

    def clear(self, buffer: Buffer) -> None:
        """See `Device`."""
        self._now_or_later(lambda: self.observe_clear(buffer))

    def repeat(self, launches: Sequence[Launch], times: int) -> None:
        """See `Device`."""
        self._now_or_later(lambda: self.observe(launches, times))

    def capture(self, work: Callable[[], None]) -> Captured:
        """See `Device`: each launch is observed when it is replayed."""
        self._kept = kept = []
        try:
            work()
        finally:
            self._kept = None
        return kept

    def replay(self, captured: Captured) -> None:
        """See `Device`."""
        for observed in captured:
            observed()

    def forget(self, captured: Sequence[Captured]) -> None:
        """See `Device`: nothing is held."""
        return

    def _now_or_later(self, observed: Callable[[], None]) -> None:
        if self._kept is None:
            observed()
        else:
            self._kept.append(observed)

    @abstractmethod
    def observe_clear(self, buffer: Buffer) -> None:
        """Clear memory."""

    @abstractmethod
    def observe(self, launches: Sequence[Launch], times: int) -> None:
        """Run kernels, as `repeat`."""


class Counted(Observed):
    """Counts the work of every launch, before it runs, from the arrays that it finds."""

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.work: dict[tuple[str, str], Work] = {}
        self.rays: dict[str, list[RayCounts]] = {}
        self.nodes: dict[str, list[int]] = {}
        self._near: tuple[BoolArray, int] | None = None

    def observe_clear(self, buffer: Buffer) -> None:
        """See `Observed`."""
        size = math.prod(buffer.shape) * buffer.dtype.itemsize
        self._add("clear", Work(moved=size, asked=size))
        self.device.clear(buffer)

    def observe(self, launches: Sequence[Launch], times: int) -> None:
        """See `Observed`."""
        for _ in range(times):
            for kernel, threads, arguments in launches:
                self.follow(kernel, arguments, before=True)
                count = COUNTS.get(kernel)
                self._add(kernel, each_array_once(arguments) if count is None else count(self, arguments))
                self.device.launch(kernel, threads, *arguments)
                if kernel == "near_nodes":
                    self._near = None
                self.follow(kernel, arguments, before=False)

    def _add(self, kernel: str, work: Work) -> None:
        where = self.group(kernel)
        self.work[where] = self.work.get(where, Work()) + work

    def near(self, nodes: Buffer, progress: Buffer, resolution: int) -> tuple[BoolArray, int]:
        """Which nodes (R, R, R) are near the surface, and how many."""
        if self._near is None:
            count = int(self.download(progress).view(PROGRESS)["nodes"][0])
            marked = np.zeros(resolution**3, bool)
            marked[self.download(nodes)[:count]] = True
            self._near = marked.reshape((resolution,) * 3), count
            self.nodes.setdefault(self.stage, []).append(count)
        return self._near


def each_array_once(arguments: Sequence[Any]) -> Work:
    """All arrays of a launch moved once; its operations are not counted."""
    arrays = [a for a in arguments if a is not None and not isinstance(a, np.generic)]
    size = sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)
    return Work(moved=size, asked=size)


def _of_solver(device: Counted, arguments: Sequence[Any]) -> Work:
    """Nothing once conjugate gradients have come to their end: launches left over return at once."""
    sized = (a for a in arguments if not isinstance(a, np.generic) and a.shape == (SOLVER.itemsize,))
    done = device.download(next(sized)).view(SOLVER)["done"][0]
    return Work() if done else each_array_once(arguments)


def _fit_rays(device: Counted, arguments: Sequence[Any]) -> Work:
    sdf, _, _, *pixels = arguments[:8]
    count, stride, step, cutoff = (a.item() for a in arguments[8:12])
    progress = device.download(arguments[-1]).view(PROGRESS)[0]
    turn = device.download(arguments[16]).view(TURN)[progress["iteration"]]
    arrays = [device.download(array) for array in pixels]
    counts, seen, blended = count_rays(
        device.download(sdf), arrays, int(turn["first"]), stride, int(turn["key"]), progress["inv_s"],
        progress["band"], step, cutoff,
    )  # fmt: skip
    device.rays.setdefault(device.stage, []).append(counts)
    return ray_work(counts, seen, blended, count, stride)


def _bend(device: Counted, arguments: Sequence[Any]) -> Work:
    _, r, nodes, _, progress, _ = arguments
    near, count = device.near(nodes, progress, r.item())
    around = sectors(with_neighbours(near).reshape(-1), 4)
    own = sectors(near.reshape(-1), 4)
    return Work(moved=8 * count + around + own, asked=count * (8 + 28 + 4), operations=8 * count)


def _regularize(device: Counted, arguments: Sequence[Any]) -> Work:
    _, r, nodes, _, _, progress, _ = arguments
    near, count = device.near(nodes, progress, r.item())
    around = sectors(with_neighbours(near).reshape(-1), 4)
    return Work(moved=8 * count + 2 * around, asked=count * (8 + 64 + 28), operations=71 * count)


def _adam_step(device: Counted, arguments: Sequence[Any]) -> Work:
    values, _, more, _, _, nodes, channels, progress = arguments[:8]
    near, count = device.near(nodes, progress, values.shape[0])
    c, near = channels.item(), near.reshape(-1)
    own = 4 + (4 if more is not None else 0)
    return Work(
        moved=own * count + 6 * sectors(near, 4 * c) + 2 * sectors(near, 8 * c),
        asked=count * c * (own + 24 + 16),
        operations=16 * count * c,
    )


def _near_nodes(device: Counted, arguments: Sequence[Any]) -> Work:
    sdf, r, margin, _, _, progress, *_ = arguments
    band = device.download(progress).view(PROGRESS)["band"][0] + margin
    inner = np.abs(device.download(sdf)[2:-2, 2:-2, 2:-2]) < band
    count, total = int(inner.sum()), r.item() ** 3
    return Work(
        moved=4 * total + 8 * count,
        asked=4 * total + count * (24 + 8),
        atomics=count,
        operations=15 * count,
    )


def _freeze(device: Counted, arguments: Sequence[Any]) -> Work:
    total = arguments[1].item() ** 3
    return Work(moved=9 * total, asked=(28 + 5) * total)


def _relax(device: Counted, arguments: Sequence[Any]) -> Work:
    _, frozen, r, _ = arguments
    total = r.item() ** 3
    free = total - int(np.count_nonzero(device.download(frozen)))
    # One quadratic equation of two neighbours; a third one, or none, comes in place of it at few nodes.
    return Work(moved=9 * total, asked=9 * total + 24 * free, operations=9 * free)


def _keep_in_hull(device: Counted, arguments: Sequence[Any]) -> Work:
    total = arguments[-1].item()
    return Work(moved=12 * total, asked=12 * total, operations=total)


def _one_thread(device: Counted, arguments: Sequence[Any]) -> Work:
    return Work(moved=2 * PROGRESS.itemsize, asked=2 * PROGRESS.itemsize)


COUNTS: dict[str, Callable[[Counted, Sequence[Any]], Work]] = {
    "fit_rays": _fit_rays,
    "bend": _bend,
    "regularize": _regularize,
    "adam_step": _adam_step,
    "near_nodes": _near_nodes,
    "freeze": _freeze,
    "relax": _relax,
    "keep_in_hull": _keep_in_hull,
    "adapt_density": _one_thread,
    "forget_nodes": _one_thread,
    **dict.fromkeys(("cg_pull", "cg_apply", "cg_alpha", "cg_step", "cg_beta", "cg_turn"), _of_solver),
}
"""By kernel; all others move each of their arrays once."""
