"""Bring the six colour views onto a surface: per vertex, and per texel of an atlas."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from uc3d_rt.mesh.raster import rasterize_pixels, view_points
from uc3d_rt.mesh.surface import FloatArray, IntArray, Surface
from uc3d_rt.mesh.unwrap import Atlas
from uc3d_rt.views import TARGET_CAMERAS, camera_axes

VIEW_POWER = 4.0
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

CONFIDENT = 0.05
"""Sum of weights above which the views alone give the colour; below, it fades to the filled-in one."""


class ProjectedViews:
    """What is needed to look up surface points in the six views: colours, depths, edge weights."""

    def __init__(self, surface: Surface, color: FloatArray, normal: FloatArray) -> None:
        """Render the depth of `surface` in the views `color`, `normal` (6, H, H, 3)."""
        from scipy.ndimage import distance_transform_edt, maximum_filter, minimum_filter

        self.color = color
        self.size_px = size = color.shape[1]
        self.depth_slack = DEPTH_SLACK_PX / 256.0 * 2.0
        self.depth: list[FloatArray] = []
        self.edge_weight: list[FloatArray] = []
        masks = np.linalg.norm(normal, axis=-1) > 0.5
        for view, camera in enumerate(TARGET_CAMERAS):
            points = view_points(surface.vertices, camera, size)
            _, _, depth = rasterize_pixels(points, surface.faces, size)
            depth = np.where(np.isfinite(depth), depth, np.float32(1e3))
            spread = maximum_filter(depth, 3) - minimum_filter(depth, 3)
            steep = spread > 8 * self.depth_slack  # an edge in front of something, or of the background
            clear = masks[view] & ~steep
            inside = distance_transform_edt(np.pad(clear, 1))[1:-1, 1:-1]
            self.depth.append(depth)
            edge_px = EDGE_PX * max(size / 256.0, 1.0)
            weight = np.clip((inside - 1.0) / edge_px, 0.0, 1.0).astype(np.float32) ** 2
            self.edge_weight.append(np.where(masks[view], np.maximum(weight, LEAST_WEIGHT), np.float32(0.0)))

    def sample(self, points: FloatArray, normals: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Blend the views at surface points.

        Args:
            points: (N, 3) world.
            normals: (N, 3) unit.

        Returns:
            `(colour (N, 3), weight (N,))`; colour is arbitrary where the weight is 0.
        """
        total = np.zeros((len(points), 3), np.float32)
        weight = np.zeros(len(points), np.float32)
        for view, camera in enumerate(TARGET_CAMERAS):
            facing = normals @ camera_axes(camera)[2]
            chosen = np.flatnonzero(facing > MIN_FACING)
            at = view_points(points[chosen], camera, self.size_px)
            column = np.clip(at[:, 0].astype(np.int64), 0, self.size_px - 1)
            row = np.clip(at[:, 1].astype(np.int64), 0, self.size_px - 1)
            seen = at[:, 2] <= self.depth[view][row, column] + self.depth_slack / facing[chosen]
            w = facing[chosen] ** VIEW_POWER * bilinear(self.edge_weight[view][..., None], at)[:, 0] * seen
            total[chosen] += w[:, None] * bilinear(self.color[view], at)
            weight[chosen] += w
        return np.asarray(total / np.maximum(weight, np.float32(1e-8))[:, None], dtype=np.float32), weight


def bilinear(image: FloatArray, at: FloatArray) -> FloatArray:
    """Values (N, C) of an image (H, H, C) at pixel coordinates (N, 2+): column, row, centres at halves."""
    size = image.shape[0]
    x = np.clip(at[:, 0] - 0.5, 0, size - 1)
    y = np.clip(at[:, 1] - 0.5, 0, size - 1)
    i = np.minimum(x.astype(np.int64), size - 2)
    j = np.minimum(y.astype(np.int64), size - 2)
    fx, fy = (x - i)[:, None].astype(np.float32), (y - j)[:, None].astype(np.float32)
    top = image[j, i] * (1 - fx) + image[j, i + 1] * fx
    low = image[j + 1, i] * (1 - fx) + image[j + 1, i + 1] * fx
    return np.asarray(top * (1 - fy) + low * fy, dtype=np.float32)


def vertex_colors(surface: Surface, normals: FloatArray, views: ProjectedViews) -> FloatArray:
    """Colours (V, 3): the views' where they see a vertex, smoothly continued over the rest.

    Unseen vertices get the harmonic continuation: each is the mean of its neighbours.
    """
    color, weight = views.sample(surface.vertices, normals)
    trust = np.clip(weight / CONFIDENT, 0.0, 1.0)
    return continue_over_surface(surface.faces, color, trust)


def continue_over_surface(faces: IntArray, color: FloatArray, trust: FloatArray) -> FloatArray:
    """Solve for colours (V, 3) that keep `color` where `trust` (V,) is 1 and are smooth where it is 0."""
    from scipy.sparse import coo_matrix, diags
    from scipy.sparse.linalg import cg

    count = len(color)
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    adjacent = coo_matrix((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(count, count)).tocsr()
    adjacent = ((adjacent + adjacent.T) > 0).astype(np.float64)
    degree = np.asarray(adjacent.sum(axis=1)).ravel()
    pull = trust.astype(np.float64) * 100.0 + 1e-6
    matrix = (diags(degree + pull) - adjacent).tocsr()
    mean = (color * trust[:, None]).sum(axis=0) / max(float(trust.sum()), 1e-6)
    if not trust.any():
        mean = np.full(3, 0.5)
    preconditioner = diags(1.0 / (degree + pull))
    out = np.empty((count, 3), np.float32)
    for channel in range(3):
        known = np.where(trust > 0, color[:, channel], mean[channel])
        solved, _ = cg(matrix, pull * known, x0=known, rtol=1e-4, maxiter=400, M=preconditioner)
        out[:, channel] = solved
    return np.clip(out, 0.0, 1.0)


def bake_texture(
    surface: Surface, normals: FloatArray, atlas: Atlas, views: ProjectedViews, texture_px: int
) -> NDArray[np.uint8]:
    """Base colour (texture_px, texture_px, 3) sRGB of an atlas, row 0 at the top.

    Every texel inside a chart looks up its own surface point in the views; where no view sees it, it
    takes the continued colour of the vertices.  Texels between charts repeat the nearest chart's edge.
    """
    from scipy.ndimage import distance_transform_edt

    filled = vertex_colors(surface, normals, views)
    flipped = np.stack([atlas.uv[:, 0] * texture_px, (1.0 - atlas.uv[:, 1]) * texture_px], axis=1)
    points = np.concatenate([flipped, np.zeros((len(flipped), 1))], axis=1).astype(np.float32)
    face_id, weights, _ = rasterize_pixels(points, atlas.faces, texture_px)
    inside = face_id >= 0
    corners = atlas.source[atlas.faces[face_id[inside]]]  # (N, 3) vertices of the surface
    bary = weights[inside][..., None]

    def interpolate(values: FloatArray) -> FloatArray:
        return np.asarray((values[corners] * bary).sum(axis=1), dtype=np.float32)

    texel_normals = interpolate(normals)
    texel_normals /= np.maximum(np.linalg.norm(texel_normals, axis=1, keepdims=True), 1e-8)
    color, weight = views.sample(interpolate(surface.vertices), texel_normals)
    trust = np.clip(weight / CONFIDENT, 0.0, 1.0)[:, None]
    texture = np.zeros((texture_px, texture_px, 3), np.float32)
    texture[inside] = trust * color + (1 - trust) * interpolate(filled)
    if not inside.all():
        nearest = distance_transform_edt(~inside, return_distances=False, return_indices=True)
        texture = texture[nearest[0], nearest[1]]
    return (np.clip(texture, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
