"""The cameras: world frame, the six target views, and their rays.

World (as glTF): right-handed, +Y up, +Z towards the input camera's azimuth.  A camera at azimuth
`a` and elevation `e` stands in direction `(sin a cos e, sin e, cos a cos e)` and looks at the
origin.  Image row 0 is the top, column 0 the left; pixel centres lie at half-integers.  Training,
fit, texturing and evaluation all take their cameras from here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

AZIMUTHS_DEG: tuple[float, ...] = (30.0, 90.0, 150.0, 210.0, 270.0, 330.0)
"""The six target views, relative to the input view, elevation 0 (Sec. 4.1.3)."""

NUM_VIEWS = len(AZIMUTHS_DEG)

HALF_WINDOW = 1.0
"""An orthographic view shows x and y in [-HALF_WINDOW, HALF_WINDOW] of its image plane."""

BOUNDING_RADIUS = 0.95
"""Objects are centred on their bounding box and scaled to this bounding-sphere radius."""

SENSOR_HALF_WIDTH_MM = 18.0
"""The `s` of `d = f / s` (Sec. 4.1.1): half of the 36 mm frame that focal lengths refer to, so
that the window at the origin has half-width 1 for every focal length."""

FOCAL_LENGTHS_MM: tuple[float, ...] = (35.0, 50.0, 85.0, 105.0, 135.0)
"""Focal lengths of the training views (Sec. 4.1.1)."""

REFERENCE_FOCAL_MM = 35.0
"""`f~ = f / 35 mm` conditions the network; 0 stands for an orthographic view."""


@dataclass(frozen=True)
class Camera:
    """A camera looking at the origin; `focal_mm=None` is orthographic."""

    azimuth_deg: float
    elevation_deg: float = 0.0
    focal_mm: float | None = None

    def __post_init__(self) -> None:
        if self.focal_mm is not None and not self.focal_mm > SENSOR_HALF_WIDTH_MM * BOUNDING_RADIUS:
            raise ValueError(
                f"focal_mm={self.focal_mm} puts the camera inside the object; use more than "
                f"{SENSOR_HALF_WIDTH_MM * BOUNDING_RADIUS:.1f} mm"
            )

    @property
    def distance(self) -> float:
        """Distance from the origin: `d = f / s` for perspective, outside the object otherwise."""
        return 2.0 if self.focal_mm is None else self.focal_mm / SENSOR_HALF_WIDTH_MM

    @property
    def normalized_focal(self) -> float:
        """`f~` of Sec. 4.1.1: focal length over 35 mm, 0 for an orthographic view."""
        return 0.0 if self.focal_mm is None else self.focal_mm / REFERENCE_FOCAL_MM


TARGET_CAMERAS: tuple[Camera, ...] = tuple(Camera(a) for a in AZIMUTHS_DEG)


def camera_axes(camera: Camera) -> tuple[FloatArray, FloatArray, FloatArray]:
    """World-space `(right, up, back)` unit vectors (3,) of a camera; `back` points at the camera."""
    a, e = math.radians(camera.azimuth_deg), math.radians(camera.elevation_deg)
    back = np.array([math.sin(a) * math.cos(e), math.sin(e), math.cos(a) * math.cos(e)])
    right = np.array([math.cos(a), 0.0, -math.sin(a)])
    up = np.cross(back, right)
    return right.astype(np.float32), up.astype(np.float32), back.astype(np.float32)


def pixel_grid(size_px: int) -> tuple[FloatArray, FloatArray]:
    """Image-plane coordinates of the pixel centres of a square image.

    Returns:
        `(u, v)`, each (size_px, size_px) in (-1, 1): `u` grows to the right, `v` upwards.
    """
    centre = ((np.arange(size_px) + 0.5) / size_px * 2.0 - 1.0).astype(np.float32)
    u, v = np.meshgrid(centre * HALF_WINDOW, -centre * HALF_WINDOW)
    return u, v


def camera_rays(camera: Camera, size_px: int) -> tuple[FloatArray, FloatArray]:
    """Rays through the pixel centres.

    Returns:
        `(origins, directions)`, each (size_px, size_px, 3), world space, directions of unit length.
    """
    right, up, back = camera_axes(camera)
    u, v = pixel_grid(size_px)
    on_plane = u[..., None] * right + v[..., None] * up  # the plane through the origin
    eye = back * np.float32(camera.distance)
    if camera.focal_mm is None:
        origins = on_plane + eye
        directions = np.broadcast_to(-back, origins.shape).astype(np.float32)
    else:
        origins = np.broadcast_to(eye, on_plane.shape).astype(np.float32)
        directions = on_plane - eye
        directions = directions / np.linalg.norm(directions, axis=-1, keepdims=True)
    return origins.astype(np.float32), directions.astype(np.float32)


def project(points: NDArray[np.floating], camera: Camera) -> FloatArray:
    """World points (..., 3) to `(u, v, depth)` (..., 3) of a camera.

    `u`, `v` are image-plane coordinates as in `pixel_grid`; `depth` is the distance from the
    camera along its viewing direction.
    """
    right, up, back = camera_axes(camera)
    points = np.asarray(points, dtype=np.float32)
    depth = camera.distance - points @ back
    scale = 1.0 if camera.focal_mm is None else camera.distance / depth
    return np.stack([points @ right * scale, points @ up * scale, depth], axis=-1)


def encode_normals(normals: NDArray[np.floating]) -> FloatArray:
    """World normals (..., 3), zero for background, to an image in [0, 1]: `(n + 1) / 2`."""
    return ((np.asarray(normals, dtype=np.float32) + 1.0) * 0.5).astype(np.float32)


FADE_POWER = 0.75
"""Of the decoded normal's length, by which a colour's distance from white is divided in `decode_views`."""


def decode_views(
    color: NDArray[np.floating], normal: NDArray[np.floating]
) -> tuple[FloatArray, FloatArray, NDArray[np.bool_]]:
    """Decoded images (..., 3) in [0, 1] of colours and of normals, read as views.

    Where a network cannot tell whether the object is there, both its colour and its normal are means of
    what may be: the one fades to white, the other gets shorter.  Within the silhouette the object is taken
    to be there, so the colour is brought back by the normal's length.  That is the share of the object in
    the mean, or less where directions differ too: hence a power below 1.

    Returns:
        Colours, white outside of the silhouette; unit normals, zero outside; and the silhouette (...).
    """
    length = np.linalg.norm(np.asarray(normal, np.float32) * 2.0 - 1.0, axis=-1, keepdims=True)
    shown = 1.0 - (1.0 - np.asarray(color, np.float32)) / np.clip(length, 0.5, 1.0) ** FADE_POWER
    unit, mask = decode_normals(normal)
    return np.where(mask[..., None], np.clip(shown, 0.0, 1.0), 1.0).astype(np.float32), unit, mask


def decode_normals(image: NDArray[np.floating]) -> tuple[FloatArray, NDArray[np.bool_]]:
    """A normal map (..., 3) in [0, 1] to unit normals (..., 3), zero outside, and the silhouette.

    The silhouette (...) is where the decoded vector is longer than 0.5.
    """
    vectors = np.asarray(image, dtype=np.float32) * 2.0 - 1.0
    length = np.linalg.norm(vectors, axis=-1)
    mask = length > 0.5
    unit = np.where(mask[..., None], vectors / np.maximum(length, 1e-6)[..., None], 0.0)
    return unit.astype(np.float32), mask
