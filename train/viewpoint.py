"""How far the answer depends on the azimuth of the input (the paper's Sec. 4.4.2, Table 6).

One object is shown from N azimuths, evenly spaced, at elevation 0 by an orthographic camera; the light
goes with the camera, and the start noise is the same for all.  The paper says both "16 distinct input
views" and "increments of 30 degrees"; 16 is the default here, and N = 12 gives its increments.

The six targets stand at fixed azimuths from the *input*, and the world frame of the outputs turns with
it.  Hence compared are

- **with the truth**: each input's six views, normals and mesh, in its own frame.  Told are the mean over
  the azimuths, and the spread: the standard deviation over them, of each object, averaged over objects;
- **views with views**: those of two inputs whose azimuths differ by a multiple of 60 degrees, for their
  target cameras then coincide (N = 16: opposite inputs; N = 12: five others for each).  The views of one
  are put in the order of the other's, its normals turned into the other's frame, and, since an object is
  centred and scaled after it has been turned to the input, its pixels moved where the frames' centres
  or scales differ.  The row of the true views says what this comparison can reach;
- **meshes with meshes**: of every two inputs, each turned, moved and scaled into the frame of azimuth 0.

That a model agrees with itself does not say that it is right: read it beside the figures against the truth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from train.baselines import ViewPair
from train.dataset import variant_rng
from train.mesh_metrics import SAMPLES, Triangles, inside_voxels, longest_side, surface_points
from train.metrics import Row
from train.objects import Object
from train.truth import EvalSample, plain_light, seen_from
from uc3d_rt.views import NUM_VIEWS, TARGET_CAMERAS, Camera, camera_axes, pixel_grid, project

FloatArray = NDArray[np.float64]

TARGET_STEP_DEG = 360.0 / NUM_VIEWS

_NEGLIGIBLE_PX = 0.02
"""Frames that differ by less than this are the same: what is left is rounding."""


def input_azimuths(count: int) -> tuple[float, ...]:
    """Degrees in the object's own frame, evenly spaced from 0."""
    return tuple(360.0 * k / count for k in range(count))


def samples_around(
    obj: Object, seed: int, count: int, image_px: int, device: str = "cpu"
) -> Iterator[EvalSample]:
    """The object seen from each of `count` azimuths; the light in the camera's frame is drawn once."""
    camera = Camera(0.0)
    light = plain_light(variant_rng(seed, obj.name, 0), camera)
    for azimuth in input_azimuths(count):
        # A camera at azimuth b of the object stands at 0 of the world when the object is turned by -b.
        yield seen_from(obj, -azimuth, camera, light, device=device, image_px=image_px)


def coinciding(count: int) -> list[tuple[int, int, int]]:
    """Pairs `(i, j, turn)` of inputs whose targets coincide: target v of i is target v - turn of j."""
    azimuths, found = input_azimuths(count), []
    for i, j in combinations(range(count), 2):
        turn = (azimuths[j] - azimuths[i]) / TARGET_STEP_DEG
        if math.isclose(turn, round(turn), abs_tol=1e-6):
            found.append((i, j, round(turn)))
    return found


def between(start: NDArray[np.floating], end: NDArray[np.floating]) -> FloatArray:
    """(3, 4) that takes one placement's world frame to another's; placements are `object_to_world`."""
    a, b = np.asarray(start, np.float64), np.asarray(end, np.float64)
    linear = b[:, :3] @ np.linalg.inv(a[:, :3])
    return np.column_stack([linear, b[:, 3] - linear @ a[:, 3]])


def as_seen_by(pair: ViewPair, turn: int, to_other: FloatArray) -> ViewPair:
    """Views of another input, as the cameras of this one would show the same thing.

    Args:
        pair: the other's views, in its own order and frame.
        turn: see `coinciding`.
        to_other: (3, 4), this input's world frame to the other's.
    """
    order = (np.arange(NUM_VIEWS) - turn) % NUM_VIEWS
    color, normal = pair[0][order], pair[1][order]
    rotation = to_other[:, :3] / np.cbrt(np.linalg.det(to_other[:, :3]))
    turned = normal.astype(np.float64) @ rotation  # a row vector: the inverse rotation
    moved = [_moved(color[v], turned[v], v, int(order[v]), to_other) for v in range(NUM_VIEWS)]
    colors, normals = (np.stack(images).astype(np.float32) for images in zip(*moved, strict=True))
    return colors, normals


def _moved(
    color: NDArray[np.floating], normal: FloatArray, view: int, other_view: int, to_other: FloatArray
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """One colour image and normal map (H, W, 3) of the other's frame, sampled at this one's pixels."""
    from scipy.ndimage import map_coordinates

    size = color.shape[0]
    u, v = pixel_grid(size)
    right, up, _ = camera_axes(TARGET_CAMERAS[view])
    points = u[..., None] * right + v[..., None] * up  # depth does not matter: orthographic
    seen = project(points @ to_other[:, :3].T + to_other[:, 3], TARGET_CAMERAS[other_view])
    if max(np.abs(seen[..., 0] - u).max(), np.abs(seen[..., 1] - v).max()) * size / 2 < _NEGLIGIBLE_PX:
        return color, normal
    at = np.stack([(1.0 - seen[..., 1]) * size / 2 - 0.5, (seen[..., 0] + 1.0) * size / 2 - 0.5])
    channels = [map_coordinates(color[..., c], at, order=1, cval=1.0) for c in range(3)]
    # Normals are taken from the nearest pixel: a mean of two is shorter than either.
    vectors = [map_coordinates(normal[..., c], at, order=0, cval=0.0) for c in range(3)]
    return np.stack(channels, axis=-1), np.stack(vectors, axis=-1)


def view_agreement(
    views: Sequence[ViewPair],
    placements: Sequence[NDArray[np.floating]],
    figures: Callable[[ViewPair, ViewPair], dict[str, float]],
) -> dict[str, float | None]:
    """Mean figures of all pairs of inputs whose target cameras coincide; empty where none do.

    Args:
        views: of each input, in the order of `input_azimuths`.
        placements: `object_to_world` (3, 4) of each input.
        figures: of one input's views held against another's.
    """
    found = []
    for i, j, turn in coinciding(len(views)):
        other = as_seen_by(views[j], turn, between(placements[i], placements[j]))
        found.append(figures(other, views[i]))
    return mean_and_spread(found)[0]


def mesh_agreement(meshes: Sequence[Triangles], truth: Triangles) -> dict[str, float | None]:
    """Mean Chamfer distance and volume IoU of every two meshes, all in the frame of `truth`.

    The longest side of `truth` is taken as 1.
    """
    from scipy.spatial import cKDTree

    scale = 1.0 / longest_side(truth)
    points = [surface_points(mesh, SAMPLES, seed=k) * scale for k, mesh in enumerate(meshes)]
    trees = [cKDTree(p) for p in points]
    corners = np.concatenate([np.asarray(mesh.vertices, np.float64) for mesh in meshes])
    low, high = corners.min(axis=0), corners.max(axis=0)
    volumes = [inside_voxels(mesh, low, high) for mesh in meshes]
    found: list[dict[str, float]] = []
    for i, j in combinations(range(len(meshes)), 2):
        there, back = trees[j].query(points[i])[0].mean(), trees[i].query(points[j])[0].mean()
        either = int((volumes[i] | volumes[j]).sum())
        shared = (volumes[i] & volumes[j]).sum() / either if either else float("nan")
        found.append({"chamfer": 0.5 * float(there + back), "volume_iou": float(shared)})
    return mean_and_spread(found)[0]


def mean_and_spread(rows: Sequence[Row]) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """Mean and standard deviation of each column over the rows that have it; None where none does."""
    mean: dict[str, float | None] = {}
    spread: dict[str, float | None] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [v for row in rows if (v := row.get(name)) is not None and math.isfinite(v)]
        mean[name] = float(np.mean(values)) if values else None
        spread[name] = float(np.std(values)) if values else None
    return mean, spread
