"""The true views of objects and what a mesh is measured against, rendered here or kept in one file.

A file needs neither the objects nor the renderer where it is read, and gives the same figures: what the
renderer gives has eight bits anyway, and points are kept as they are used, in steps of 1/16384.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from uc3d_rt.views import NUM_VIEWS, TARGET_CAMERAS, decode_normals

FloatArray = NDArray[np.float32]
ByteArray = NDArray[np.uint8]

POINT_STEPS = 16384
"""Of points per world unit."""

ARRAYS = ("color", "normal", "points", "longest")


@dataclass(frozen=True)
class GroundTruth:
    """One object as the benchmark knows it."""

    name: str
    color_bytes: ByteArray  # (6, H, H, 3) sRGB
    normal_bytes: ByteArray  # (6, H, H, 3), encoded as in `decode_normals`
    points: NDArray[np.int16]  # (N, 3) on the surface, in 1 / POINT_STEPS
    longest: float  # side of its box

    @property
    def color(self) -> FloatArray:
        """(6, H, H, 3) in [0, 1]."""
        return self.color_bytes.astype(np.float32) / 255.0

    @property
    def normal(self) -> FloatArray:
        """(6, H, H, 3) unit normals, zero = background."""
        return decode_normals(self.normal_bytes.astype(np.float32) / 255.0)[0]

    @property
    def surface_points(self) -> NDArray[np.float64]:
        """(N, 3) in world units."""
        return self.points.astype(np.float64) / POINT_STEPS


def rendered_truth(path: Path, size_px: int) -> GroundTruth:
    """An object file's views of `size_px`, and points on it."""
    from train.mesh_metrics import SAMPLES, longest_side, surface_points
    from train.objects import load_object
    from train.render import Scene, View

    thing = load_object(path)
    with Scene(thing) as scene:
        images = scene.render([View(camera) for camera in TARGET_CAMERAS], size_px)
    points = surface_points(thing, SAMPLES, seed=0) * POINT_STEPS
    return GroundTruth(
        name=path.stem,
        color_bytes=np.asarray(images.color, np.uint8),
        normal_bytes=np.asarray(images.normal, np.uint8),
        points=np.rint(points).astype(np.int16),
        longest=longest_side(thing),
    )


def save_truths(truths: list[GroundTruth], path: Path) -> None:
    """Write objects into one compressed file (`.npz`)."""
    arrays: dict[str, NDArray[np.generic]] = {"names": np.array([truth.name for truth in truths])}
    for index, truth in enumerate(truths):
        kept = (_rows(truth.color_bytes), _rows(truth.normal_bytes), truth.points, np.float64(truth.longest))
        arrays |= {f"{name}_{index}": np.asarray(a) for name, a in zip(ARRAYS, kept, strict=True)}
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def load_truths(path: Path, limit: int | None = None, spread: bool = False) -> Iterator[GroundTruth]:
    """The objects of a file, one after the other.

    Args:
        path: as `save_truths` wrote it.
        limit: at most so many.
        spread: evenly spaced, instead of the first.

    Raises:
        ValueError: it is no such file.
    """
    with np.load(path, allow_pickle=False) as file:
        if "names" not in file or "longest_0" not in file:
            raise ValueError(f"{path} holds no ground-truth views; write it with --save-views")
        names = file["names"]
        for index in chosen(len(names), limit, spread):
            color, normal, points, longest = (file[f"{name}_{index}"] for name in ARRAYS)
            yield GroundTruth(str(names[index]), _pictures(color), _pictures(normal), points, float(longest))


def chosen(count: int, limit: int | None, spread: bool) -> NDArray[np.int64]:
    """At most `limit` indices below `count`, ascending: the first ones or, `spread`, evenly spaced."""
    kept = count if limit is None else min(limit, count)
    return np.arange(kept) * count // max(kept, 1) if spread else np.arange(kept)


def _rows(pictures: ByteArray) -> ByteArray:
    """Differences to the pixel on the left (mod 256), which deflate packs better than the pixels."""
    shifted = pictures.copy()
    shifted[..., 1:, :] -= pictures[..., :-1, :]
    return shifted


def _pictures(rows: ByteArray) -> ByteArray:
    if rows.ndim != 4 or rows.shape[0] != NUM_VIEWS:
        raise ValueError(f"views have shape {rows.shape}, not ({NUM_VIEWS}, H, H, 3)")
    return np.cumsum(rows, axis=2, dtype=np.uint8)
