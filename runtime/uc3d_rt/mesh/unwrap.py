"""UV atlas of a surface (xatlas)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from uc3d_rt.mesh.surface import FloatArray, IntArray, Surface


@dataclass(frozen=True)
class Atlas:
    """A surface cut into charts: vertices on a cut appear once for each chart."""

    source: NDArray[np.int64]  # (W,) index of the surface's vertex that each split vertex came from
    faces: IntArray  # (F, 3) into the split vertices; face by face the surface's own
    uv: FloatArray  # (W, 2) in [0, 1], origin at the lower left

    def __post_init__(self) -> None:
        if not np.isfinite(self.uv).all():
            raise ValueError("the atlas holds UV coordinates that are not finite")


PADDING_TEXELS = 2
"""Empty texels between charts, so that bilinear look-ups do not reach into a neighbour."""


def unwrap_surface(surface: Surface, texture_px: int) -> Atlas:
    """Cut and pack a surface into one square texture.

    Args:
        surface: closed.
        texture_px: side of the texture the charts are packed for.
    """
    import xatlas

    atlas = xatlas.Atlas()
    atlas.add_mesh(surface.vertices, surface.faces.astype(np.uint32))
    charts = xatlas.ChartOptions()
    charts.max_iterations = 1
    charts.max_cost = 4.0  # larger charts, fewer seams; the views are blended in 3D, stretch is harmless
    packing = xatlas.PackOptions()
    packing.resolution = texture_px
    packing.padding = PADDING_TEXELS
    packing.create_image = False
    packing.rotate_charts_to_axis = False
    atlas.generate(chart_options=charts, pack_options=packing)
    source, faces, uv = atlas[0]
    return Atlas(
        source.astype(np.int64),
        np.ascontiguousarray(faces, dtype=np.int32),
        np.clip(uv, 0.0, 1.0).astype(np.float32),
    )
