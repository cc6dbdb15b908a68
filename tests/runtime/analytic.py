"""Analytic objects drawn into six colour + normal views by ray tracing, in plain NumPy.

Test inputs whose surface is known in closed form; no renderer of the project takes part.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from uc3d_rt.views import TARGET_CAMERAS, camera_rays

FloatArray = NDArray[np.float32]
Hit = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Distance along the ray, +inf for a miss (N,), and the outward world normal there (N, 3)."""
Shape = Callable[[NDArray[np.float64], NDArray[np.float64]], Hit]


def sphere(centre: tuple[float, float, float], radius: float) -> Shape:
    """A sphere."""

    def trace(origins: NDArray[np.float64], directions: NDArray[np.float64]) -> Hit:
        offset = origins - np.asarray(centre)
        b = (offset * directions).sum(-1)
        root = b * b - (offset * offset).sum(-1) + radius * radius
        t = np.where(root > 0, -b - np.sqrt(np.maximum(root, 0)), np.inf)
        where = offset + np.where(np.isfinite(t), t, 0.0)[:, None] * directions
        return t, where / radius

    return trace


def box(low: tuple[float, float, float], high: tuple[float, float, float]) -> Shape:
    """An axis-aligned box."""

    def trace(origins: NDArray[np.float64], directions: NDArray[np.float64]) -> Hit:
        d = np.where(np.abs(directions) < 1e-12, 1e-12, directions)
        a, b = (np.asarray(low) - origins) / d, (np.asarray(high) - origins) / d
        near, far = np.minimum(a, b), np.maximum(a, b)
        t = near.max(-1)
        t = np.where((far.min(-1) > t) & (t > 0), t, np.inf)
        axis = near.argmax(-1)
        normals = np.zeros_like(origins)
        rows = np.arange(len(origins))
        normals[rows, axis] = -np.sign(d[rows, axis])
        return t, normals

    return trace


def union(*shapes: Shape) -> Shape:
    """Several shapes, the nearest hit wins."""

    def trace(origins: NDArray[np.float64], directions: NDArray[np.float64]) -> Hit:
        t, normals = shapes[0](origins, directions)
        for shape in shapes[1:]:
            t_other, normals_other = shape(origins, directions)
            nearer = t_other < t
            t = np.where(nearer, t_other, t)
            normals = np.where(nearer[:, None], normals_other, normals)
        return t, normals

    return trace


def asymmetric() -> Shape:
    """A body with a box arm on +X, a small sphere on +Z and a tall box at -X: no mirror symmetry."""
    return union(
        sphere((0.0, -0.1, 0.0), 0.4),
        box((0.2, -0.2, -0.12), (0.75, 0.1, 0.12)),
        sphere((0.0, 0.1, 0.45), 0.22),
        box((-0.3, -0.2, -0.3), (-0.1, 0.7, -0.1)),
    )


def six_views(
    shape: Shape, size_px: int = 256, paint: Callable[[FloatArray], FloatArray] | None = None
) -> tuple[FloatArray, FloatArray]:
    """Colour (6, H, H, 3) over white and world normals (6, H, H, 3) of the target views.

    Args:
        shape: what to draw.
        size_px: H.
        paint: world points (N, 3) to sRGB (N, 3); default by position.
    """
    color = np.ones((len(TARGET_CAMERAS), size_px, size_px, 3), np.float32)
    normal = np.zeros_like(color)
    for view, camera in enumerate(TARGET_CAMERAS):
        origins, directions = (a.reshape(-1, 3).astype(np.float64) for a in camera_rays(camera, size_px))
        t, normals = shape(origins, directions)
        hit = np.isfinite(t)
        points = (origins[hit] + t[hit, None] * directions[hit]).astype(np.float32)
        tint = 0.25 + 0.5 * (np.sin(points * 9.0) * 0.5 + 0.5) if paint is None else paint(points)
        color[view].reshape(-1, 3)[hit] = tint
        normal[view].reshape(-1, 3)[hit] = normals[hit]
    return color, normal
