"""UV atlas of a surface: charts seen along the six axes, packed by xatlas.

Finding charts of little stretch is what takes an unwrapper's time, seconds for a mesh of 20 000 faces.
Colours are looked up in views by a texel's place in space, so stretch does no harm here: a chart is the part
of the surface that faces along one axis, flattened along it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from uc3d_rt.device import Device
from uc3d_rt.mesh.surface import FloatArray, IntArray, Surface

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Atlas:
    """A surface cut into charts: vertices on a cut appear once for each chart."""

    source: NDArray[np.int64]  # (W,) index of the surface's vertex that each split vertex came from
    faces: IntArray  # (F, 3) into the split vertices; face by face the surface's own
    uv: FloatArray  # (W, 2) in [0, 1], origin at the lower left

    def __post_init__(self) -> None:
        if not np.isfinite(self.uv).all():
            raise ValueError("the atlas holds UV coordinates that are not finite")


PADDING_TEXELS = 3
"""Empty texels between charts, so that bilinear look-ups do not reach into a neighbour."""

AXES = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]], np.float64)
RIGHT = np.array([[0, 0, -1], [0, 0, 1], [1, 0, 0], [1, 0, 0], [1, 0, 0], [-1, 0, 0]], np.float64)
UP = np.array([[0, 1, 0], [0, 1, 0], [0, 0, -1], [0, 0, 1], [0, 1, 0], [0, 1, 0]], np.float64)
"""The axes that faces may be flattened along, and which way a chart then lies: RIGHT x UP = AXES."""

LEAST_FACING = 0.2
"""Cosine between a face and its axis below which it would be squeezed too thin."""

NEIGHBOUR_VOTE = 0.35
"""Weight of each neighbour's axis against the cosine of a face's own: more gives fewer, larger charts."""

SMALL_CHART = 16
"""Charts of fewer faces are given to those around them, where the faces do not turn away from their axis."""

USED_SHARE = 0.7
"""Of a texture, about, that charts fill."""

LAYERS = 4
FEW = 2e-3
"""A chart may come to lie over itself.  Faces behind others are laid elsewhere, at most `LAYERS` deep, until
they are fewer than this share of all; the least-stretch charts of xatlas are not free of it either."""


def unwrap_surface(surface: Surface, texture_px: int, device: Device | None = None) -> Atlas:
    """Cut and pack a surface into one square texture.

    Args:
        surface: closed.
        texture_px: side of the texture the charts are packed for.
        device: draws what lies over itself; None = the CPU.
    """
    pairs, adjacent = _neighbours(surface.faces)
    normals = face_normals(surface)
    axis = _choose_axes(normals, adjacent)
    layer = np.zeros(len(axis), np.int64)
    chart = _connected(axis, pairs, adjacent)
    for deeper in range(1, LAYERS):
        behind = _behind_others(surface, axis, chart, texture_px, device)
        if behind.mean() < FEW:
            break
        layer[behind] = deeper
        chart = _connected(axis * LAYERS + layer, pairs, adjacent)
    return _packed(surface, axis, chart, texture_px)


def face_normals(surface: Surface) -> NDArray[np.float64]:
    """Unit normals (F, 3); zero where a face has no area."""
    corners = surface.vertices[surface.faces].astype(np.float64)
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    return np.asarray(normal / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-30))


def _neighbours(faces: IntArray) -> tuple[Labels, csr_matrix]:
    """The two faces of every edge (E, 2) of a closed surface, and the same as a matrix (F, F)."""
    from scipy.sparse import coo_matrix

    edges = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), axis=1)
    key = edges[:, 0].astype(np.int64) * (int(faces.max()) + 1) + edges[:, 1]
    order = np.argsort(key, kind="stable")
    pairs = (order % len(faces)).reshape(-1, 2)
    rows, columns = np.concatenate([pairs, pairs[:, ::-1]]).T
    ones = np.ones(len(rows), np.float32)
    return pairs, coo_matrix((ones, (rows, columns)), shape=(len(faces),) * 2).tocsr()


def _choose_axes(normals: NDArray[np.float64], adjacent: csr_matrix) -> Labels:
    """Which of `AXES` each face (F,) is flattened along."""
    facing = normals @ AXES.T
    usable = np.where(facing > LEAST_FACING, facing, -9.0)
    axis: Labels = facing.argmax(axis=1)
    for _ in range(8):
        votes = np.stack([adjacent @ (axis == k).astype(np.float32) for k in range(len(AXES))], axis=1)
        axis = (usable + NEIGHBOUR_VOTE * votes).argmax(axis=1)
    pairs = np.stack(adjacent.nonzero(), axis=1)
    for _ in range(3):
        chart = _connected(axis, pairs, adjacent)
        small = np.bincount(chart)[chart] < SMALL_CHART
        if not small.any():
            break
        large = [adjacent @ ((axis == k) & ~small).astype(np.float32) for k in range(len(AXES))]
        offer = np.where(facing > 0.5 * LEAST_FACING, np.stack(large, axis=1), 0.0)
        taken = small & (offer.max(axis=1) > 0)
        axis[taken] = (offer + 0.1 * facing)[taken].argmax(axis=1)
    return axis


def _connected(label: Labels, pairs: Labels, adjacent: csr_matrix) -> Labels:
    """Number (F,) of the connected region of one label that each face is in."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    same = pairs[label[pairs[:, 0]] == label[pairs[:, 1]]]
    graph = coo_matrix((np.ones(len(same), np.int8), (same[:, 0], same[:, 1])), shape=adjacent.shape)
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)


def _packed(surface: Surface, axis: Labels, chart: Labels, texture_px: int) -> Atlas:
    """Flatten every chart along its axis, and let xatlas pack them."""
    import xatlas

    count = len(surface.vertices)
    corner, index = np.unique(chart[:, None] * count + surface.faces, return_inverse=True)
    vertex = surface.vertices[corner % count].astype(np.float64)
    axis_of = np.zeros(int(chart.max()) + 1, np.int64)
    axis_of[chart] = axis
    lies = axis_of[corner // count]
    uv = np.stack([(vertex * RIGHT[lies]).sum(axis=1), (vertex * UP[lies]).sum(axis=1)], axis=1)
    atlas = xatlas.Atlas()
    atlas.add_uv_mesh(
        uv.astype(np.float32),
        index.reshape(-1, 3).astype(np.uint32),
        chart[:, None].astype(np.uint32),  # as materials: charts do not grow together where they touch
    )
    packing = xatlas.PackOptions()
    packing.resolution = texture_px
    packing.padding = PADDING_TEXELS
    packing.bilinear = False  # would add another texel, and half again to the time
    packing.create_image = False
    packing.rotate_charts_to_axis = False
    atlas.generate(pack_options=packing)
    source, faces, packed = atlas[0]
    return Atlas(
        corner[source] % count,
        np.ascontiguousarray(faces, dtype=np.int32),
        np.clip(packed, 0.0, 1.0).astype(np.float32),
    )


def _behind_others(
    surface: Surface, axis: Labels, chart: Labels, texture_px: int, device: Device | None
) -> NDArray[np.bool_]:
    """Faces (F,) that share a texel with one of their chart that is further up their axis."""
    frame = np.stack([RIGHT, UP, AXES], axis=1)[axis]
    corners = surface.vertices[surface.faces].astype(np.float64) @ frame.transpose(0, 2, 1)
    flat, height = corners[..., :2], corners[..., 2]  # (F, 3, 2), (F, 3)
    (ax, ay), (bx, by) = (flat[:, 1] - flat[:, 0]).T, (flat[:, 2] - flat[:, 0]).T
    area = 0.5 * float(np.abs(ax * by - ay * bx).sum())
    flat = flat * (texture_px * np.sqrt(USED_SHARE / max(area, 1e-12)))
    # Charts lie apart, so that only faces of one chart share texels.
    charts = int(chart.max()) + 1
    low, high = np.full((charts, 2), np.inf), np.full((charts, 2), -np.inf)
    np.minimum.at(low, chart, flat.min(axis=1))
    np.maximum.at(high, chart, flat.max(axis=1))
    place, side_px = _laid_out(np.ceil(high - low).astype(np.int64) + 1)
    at = flat + (place - low)[chart, None]
    above, below = (np.dstack([at, -s * height]).reshape(-1, 3).astype(np.float32) for s in (1.0, -1.0))
    if device is None:
        return _behind(above, below, side_px, 1.0 / texture_px)
    from uc3d_rt.mesh.device_unwrap import behind_on_device

    return behind_on_device(device, above, below, side_px, 1.0 / texture_px)


def _behind(above: FloatArray, below: FloatArray, side_px: int, apart: float) -> NDArray[np.bool_]:
    """Faces (F,) that share a pixel with one that is more than `apart` above them.

    Args:
        above: (3F, 3) pixel column, row and depth of the faces' corners, seen from above.
        below: the same from below; the depths are those of `above` with the other sign.
        side_px: of the image.
        apart: in units of the depth.
    """
    from uc3d_rt.mesh.raster import rasterize_pixels

    corners = np.arange(len(above), dtype=np.int32).reshape(-1, 3)
    top, bottom = (rasterize_pixels(seen, corners, side_px) for seen in (above, below))
    found = np.zeros(len(corners), bool)
    found[bottom[0][(top[0] >= 0) & (-top[2] - bottom[2] > apart)]] = True
    return found


def _laid_out(size: Labels) -> tuple[Labels, int]:
    """Places (N, 2) of boxes of some sizes (N, 2) in rows, tall ones first; the side of a square around."""
    order = np.argsort(-size[:, 1], kind="stable")
    width, height = size[order].T
    start = np.cumsum(width) - width
    room = int(np.sqrt((width * height).sum()))
    _, first, row = np.unique(start // room, return_index=True, return_inverse=True)
    x, tall = start - start[first][row], height[first]
    place = np.empty_like(size)
    place[order] = np.stack([x, (np.cumsum(tall) - tall)[row]], axis=1)
    return place, int(max((x + width).max(), tall.sum()))
