"""How a surface is looked up in the six views: where its points lie, and the numbers of the rule.

Shared by `bake.py`, which is the rule, and its twin `device_bake.py`; this module compiles nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from uc3d_rt.views import TARGET_CAMERAS, Camera, camera_axes

if TYPE_CHECKING:
    from uc3d_rt.mesh.unwrap import Atlas

FloatArray = NDArray[np.float32]

VIEW_POWER = 4
"""Exponent of the facing weight: higher is sharper and has harder transitions between views."""

MIN_FACING = 0.15
"""Views that see a surface at a smaller cosine than this say nothing of its colour."""

EDGE_PX = 2.5
"""Distance, at 256 px or less, from a silhouette or depth edge at which a pixel counts in full; at the
edge itself it is mixed with what lies behind (white background, most of all) and hardly counts."""

LEAST_WEIGHT = 3e-4
"""Weight of such a mixed pixel: it gives way to any other, but the thinnest parts have no other."""

DEPTH_SLACK_PX = 2.0
"""How far, at 256 px, a point may lie behind the depth image and still be seen."""

DEPTH_SLACK = DEPTH_SLACK_PX / 256.0 * 2.0
"""The same in world units."""

STEEP = 8 * DEPTH_SLACK
"""Change of depth within a pixel's neighbours that is an edge in front of something, or of the background."""

EMPTY_DEPTH = 1e3
"""Of pixels that show no surface."""

LEAST_SUM = 1e-8
"""Of weights; where any view sees a point they are more."""

CONFIDENT = 0.05
"""Sum of weights above which the views alone give the colour; below, it fades to the filled-in one."""

PULL, LEAST_PULL = 100.0, 1e-6
"""Of a fully trusted vertex to its own colour, against 1 of each neighbour; and of one that no view sees."""

SOLVER_TOLERANCE, SOLVER_STEPS = 1e-4, 400
"""Residual against the right-hand side that ends the search for the unseen vertices' colours; most steps."""

UNKNOWN = 0.5
"""Colour of a surface that no view sees anywhere."""

DISTANCE = TARGET_CAMERAS[0].distance
"""Of every camera from the origin; all are orthographic."""


def edge_distance_px(size_px: int) -> float:
    """`EDGE_PX` in views of another size."""
    return EDGE_PX * max(size_px / 256.0, 1.0)


def view_points(vertices: NDArray[np.floating], camera: Camera, size_px: int) -> FloatArray:
    """World vertices (V, 3) as pixel column, row and depth of an orthographic camera."""
    right, up, back = camera_axes(camera)
    half = 0.5 * size_px
    columns = (vertices @ right + 1.0) * half
    rows = (1.0 - vertices @ up) * half
    return np.stack([columns, rows, camera.distance - vertices @ back], axis=1).astype(np.float32)


def atlas_points(atlas: Atlas, texture_px: int) -> FloatArray:
    """Split vertices (W, 3) of an atlas as texel column, row from the top, and depth 0."""
    flipped = np.stack([atlas.uv[:, 0] * texture_px, (1.0 - atlas.uv[:, 1]) * texture_px], axis=1)
    return np.concatenate([flipped, np.zeros((len(flipped), 1))], axis=1).astype(np.float32)
