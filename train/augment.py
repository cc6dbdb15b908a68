"""Random variations of an object and of its input view: pure functions of a `numpy.random.Generator`.

The input view is azimuth 0 by definition, so a variation turns the object under the cameras and
leaves the cameras where they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from train.render import Light
from uc3d_rt.views import BOUNDING_RADIUS, FOCAL_LENGTHS_MM, HALF_WINDOW, Camera, camera_axes

FloatArray = NDArray[np.float32]

MIRROR_SHARE = 0.5
SCALE_RANGE = (0.8, 1.25)  # of each axis, log-uniform
PLAIN_ALBEDO_SHARE = 0.3  # of variants keep their colours
HUE_RANGE_DEG = 45.0  # turn of the hue, either way
SATURATION_RANGE = (0.6, 1.3)
BRIGHTNESS_RANGE = (0.75, 1.2)
ELEVATION_RANGE_DEG = (-20.0, 40.0)
ORTHOGRAPHIC_SHARE = 0.4

LUMINANCE = np.array([0.2126, 0.7152, 0.0722])  # of linear sRGB


@dataclass(frozen=True, eq=False)
class Variation:
    """How one variant of an object differs from the file, in every one of its views."""

    object_to_world: FloatArray  # (3, 4)
    color_matrix: FloatArray  # (3, 3), on linear albedo
    brightness: float


def random_variation(vertices: FloatArray, rng: np.random.Generator) -> Variation:
    """Placement and colours of a variant of the object with these vertices (V, 3)."""
    placement = random_placement(vertices, rng)
    matrix, brightness = random_albedo(rng)
    return Variation(placement, matrix, brightness)


def random_placement(vertices: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Mirror, scale along the object's axes and turn about +Y at random, then normalise.

    Returns:
        (3, 4) `object_to_world` under which the vertices (V, 3) are centred on their box in the
        world's axes, with bounding radius 0.95.
    """
    low, high = np.log(SCALE_RANGE)
    scale = np.exp(rng.uniform(low, high, size=3))
    if rng.random() < MIRROR_SHARE:
        scale[0] = -scale[0]
    return normalizing_placement(vertices, yaw_matrix(rng.uniform(0.0, 360.0)) * scale)


def yaw_matrix(yaw_deg: float) -> NDArray[np.float64]:
    """(3, 3) turn about +Y that takes what faces azimuth 0 to azimuth `yaw_deg`."""
    a = math.radians(yaw_deg)
    return np.array([[math.cos(a), 0.0, math.sin(a)], [0.0, 1.0, 0.0], [-math.sin(a), 0.0, math.cos(a)]])


def normalizing_placement(vertices: FloatArray, matrix: NDArray[np.floating]) -> FloatArray:
    """`matrix` (3, 3) completed to the (3, 4) placement that centres and scales the result.

    The box is that of the turned object, in the world's axes: what the input camera sees is then
    centred left to right, which a box in the object's own axes would not promise.
    """
    moved = np.asarray(matrix, np.float64) @ np.asarray(vertices, np.float64).T  # (3, V)
    centre = (moved.min(axis=1) + moved.max(axis=1)) / 2.0
    moved -= centre[:, None]
    scale = BOUNDING_RADIUS / math.sqrt((moved * moved).sum(axis=0).max())
    placement: NDArray[np.float64] = scale * np.column_stack([matrix, -centre])
    return placement.astype(np.float32)


def random_albedo(rng: np.random.Generator) -> tuple[FloatArray, float]:
    """`(color_matrix (3, 3), brightness)` of a moderate change of hue, saturation and brightness.

    Greys keep their hue and every colour its luminance until brightness acts.
    """
    turn = rng.uniform(-HUE_RANGE_DEG, HUE_RANGE_DEG)
    saturation = rng.uniform(*SATURATION_RANGE)
    brightness = float(rng.uniform(*BRIGHTNESS_RANGE))
    if rng.random() < PLAIN_ALBEDO_SHARE:
        return np.eye(3, dtype=np.float32), 1.0
    return (hue_matrix(turn) @ saturation_matrix(saturation)).astype(np.float32), brightness


def hue_matrix(turn_deg: float) -> NDArray[np.float64]:
    """(3, 3) turn of linear RGB about the grey axis, sheared so that luminance stays as it was."""
    a = math.radians(turn_deg)
    axis = np.ones(3) / math.sqrt(3.0)
    cross = np.array([[0.0, -axis[2], axis[1]], [axis[2], 0.0, -axis[0]], [-axis[1], axis[0], 0.0]])
    turn = math.cos(a) * np.eye(3) + math.sin(a) * cross + (1.0 - math.cos(a)) * np.outer(axis, axis)
    return turn + np.outer(np.ones(3), LUMINANCE @ (np.eye(3) - turn))


def saturation_matrix(saturation: float) -> NDArray[np.float64]:
    """(3, 3) blend of linear RGB with its luminance: 0 is grey, 1 leaves it."""
    return saturation * np.eye(3) + (1.0 - saturation) * np.outer(np.ones(3), LUMINANCE)


def random_light(rng: np.random.Generator, camera: Camera) -> Light:
    """A key light in the upper hemisphere, more often on the camera's side."""
    azimuth, level = math.radians(camera.azimuth_deg), math.cos(math.radians(camera.elevation_deg))
    direction = rng.normal(size=3)
    direction /= np.linalg.norm(direction)
    direction += 0.6 * level * np.array([math.sin(azimuth), 0.0, math.cos(azimuth)])
    direction[1] = abs(direction[1]) + 0.05
    ambient = float(rng.uniform(0.35, 0.9))
    tint = rng.uniform(0.95, 1.05, size=3)
    return Light(
        direction=(float(direction[0]), float(direction[1]), float(direction[2])),
        ambient=ambient,
        key=1.0 - ambient,
        wrap=float(rng.uniform(0.0, 1.0)),
        tint=(float(tint[0]), float(tint[1]), float(tint[2])),
        exposure=float(rng.uniform(0.8, 1.2)),
    )


def random_input_camera(rng: np.random.Generator) -> Camera:
    """Azimuth 0; elevation and focal length as the design has them."""
    elevation = float(rng.uniform(*ELEVATION_RANGE_DEG))
    focal = float(rng.choice(FOCAL_LENGTHS_MM))
    return Camera(0.0, elevation, None if rng.random() < ORTHOGRAPHIC_SHARE else focal)


def tight_window(
    vertices: FloatArray, object_to_world: FloatArray, camera: Camera, fill: float
) -> tuple[float, float, float]:
    """The `View.window` whose longer side the object fills to `fill`, exact for triangle meshes.

    A perspective view of 35 mm can show the object beyond the usual window; this one holds it all.
    """
    in_view = np.stack(camera_axes(camera)).astype(np.float64) @ object_to_world  # (3: right up back, 4)
    u, v, back = in_view[:, :3].astype(np.float32) @ vertices.T + in_view[:, 3:].astype(np.float32)
    if camera.focal_mm is not None:
        larger = camera.distance / (camera.distance - back)
        u, v = u * larger, v * larger
    left, right, low, high = float(u.min()), float(u.max()), float(v.min()), float(v.max())
    half = max(max(right - left, high - low) / 2.0 / fill, 1e-3 * HALF_WINDOW)
    return ((left + right) / 2.0, (low + high) / 2.0, half)
