"""Bring the six colour views onto a surface: per vertex, and per texel of an atlas."""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from uc3d_rt.mesh.projection import (
    CONFIDENT,
    DEPTH_SLACK,
    DISTANCE,
    EMPTY_DEPTH,
    LEAST_PULL,
    LEAST_SUM,
    LEAST_WEIGHT,
    MIN_FACING,
    PULL,
    SOLVER_STEPS,
    SOLVER_TOLERANCE,
    STEEP,
    UNKNOWN,
    VIEW_POWER,
    atlas_points,
    edge_distance_px,
    view_points,
)
from uc3d_rt.mesh.raster import rasterize_pixels
from uc3d_rt.mesh.surface import FloatArray, IntArray, Surface
from uc3d_rt.mesh.unwrap import Atlas
from uc3d_rt.views import TARGET_CAMERAS, camera_axes


class ProjectedViews:
    """What is needed to look up surface points in the six views: colours, depths, edge weights."""

    def __init__(self, surface: Surface, color: FloatArray, normal: FloatArray) -> None:
        """Render the depth of `surface` in the views `color`, `normal` (6, H, H, 3)."""
        from scipy.ndimage import distance_transform_edt, maximum_filter, minimum_filter

        size = color.shape[1]
        self.depth_slack = DEPTH_SLACK
        self.axes = np.array([camera_axes(camera) for camera in TARGET_CAMERAS], np.float64)  # (6, 3, 3)
        self.depth = np.empty(color.shape[:3], np.float32)
        self.color_and_edge = np.empty((*color.shape[:3], 4), np.float32)
        self.color_and_edge[..., :3] = color
        masks = np.linalg.norm(normal, axis=-1) > 0.5
        for view, camera in enumerate(TARGET_CAMERAS):
            points = view_points(surface.vertices, camera, size)
            _, _, depth = rasterize_pixels(points, surface.faces, size)
            depth = np.where(np.isfinite(depth), depth, np.float32(EMPTY_DEPTH))
            spread = maximum_filter(depth, 3) - minimum_filter(depth, 3)
            clear = masks[view] & ~(spread > STEEP)
            inside = distance_transform_edt(np.pad(clear, 1))[1:-1, 1:-1]
            self.depth[view] = depth
            weight = np.clip((inside - 1.0) / edge_distance_px(size), 0.0, 1.0).astype(np.float32) ** 2
            self.color_and_edge[view, ..., 3] = np.where(masks[view], np.maximum(weight, LEAST_WEIGHT), 0.0)

    def sample(self, points: FloatArray, normals: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Blend the views at surface points.

        Args:
            points: (N, 3) world.
            normals: (N, 3) unit.

        Returns:
            `(colour (N, 3), weight (N,))`; colour is black where the weight is 0.
        """
        # Each point as the first corner of a face of its own.
        own = np.arange(len(points), dtype=np.int32)
        first, black = np.zeros((2, len(points), 3), np.float32)
        first[:, 0] = 1.0
        alone = Surface(points, np.repeat(own[:, None], 3, axis=1))
        return self.sample_faces(own, first, alone, normals, black, LEAST_SUM)

    def sample_faces(
        self,
        face: IntArray,
        bary: FloatArray,
        surface: Surface,
        normals: FloatArray,
        filled: FloatArray,
        enough: float,
    ) -> tuple[FloatArray, FloatArray]:
        """Blend the views at places on faces: what `sample` does, at interpolated positions and normals.

        Args:
            face: (N,) number of the face; nothing is looked up where it is negative.
            bary: (N, 3) barycentric weights.
            surface: whose faces they are.
            normals: (V, 3) of its vertices.
            filled: (V, 3) colours of its vertices that are taken where no view sees it.
            enough: sum of weights above which the views alone give the colour.

        Returns:
            `(colour (N, 3), weight (N,))`, both 0 where nothing was looked up.
        """
        color, weight = np.zeros((len(face), 3), np.float32), np.zeros(len(face), np.float32)
        corners = np.ascontiguousarray(surface.faces, np.int32)
        values = np.concatenate([surface.vertices, normals, filled], axis=1, dtype=np.float32)
        views = (self.axes, self.color_and_edge, self.depth, self.depth_slack)
        _blend_views(face, bary, corners, values, *views, enough, color, weight)
        return color, weight


@njit(cache=True, parallel=True)  # type: ignore[untyped-decorator]
def _blend_views(  # type: ignore[no-untyped-def]
    face, bary, corners, values, axes, color_and_edge, depth, depth_slack, enough, color, weight
):
    """`ProjectedViews.sample_faces`; values (V, 9) are positions, normals and filled-in colours."""
    size = depth.shape[1]
    for n in prange(face.shape[0]):
        if face[n] < 0:
            continue
        a, b, c = corners[face[n], 0], corners[face[n], 1], corners[face[n], 2]
        wa, wb, wc = np.float64(bary[n, 0]), np.float64(bary[n, 1]), np.float64(bary[n, 2])
        x = wa * values[a, 0] + wb * values[b, 0] + wc * values[c, 0]
        y = wa * values[a, 1] + wb * values[b, 1] + wc * values[c, 1]
        z = wa * values[a, 2] + wb * values[b, 2] + wc * values[c, 2]
        nx = wa * values[a, 3] + wb * values[b, 3] + wc * values[c, 3]
        ny = wa * values[a, 4] + wb * values[b, 4] + wc * values[c, 4]
        nz = wa * values[a, 5] + wb * values[b, 5] + wc * values[c, 5]
        length = max(math.sqrt(nx * nx + ny * ny + nz * nz), 1e-8)
        total = red = green = blue = 0.0
        for view in range(depth.shape[0]):
            facing = (nx * axes[view, 2, 0] + ny * axes[view, 2, 1] + nz * axes[view, 2, 2]) / length
            if facing <= MIN_FACING:
                continue
            # As `view_points`: pixel centres lie at half-integers.
            right = x * axes[view, 0, 0] + y * axes[view, 0, 1] + z * axes[view, 0, 2]
            up = x * axes[view, 1, 0] + y * axes[view, 1, 1] + z * axes[view, 1, 2]
            back = x * axes[view, 2, 0] + y * axes[view, 2, 1] + z * axes[view, 2, 2]
            column, row = 0.5 * size * (1.0 + right), 0.5 * size * (1.0 - up)
            i, j = min(max(int(column), 0), size - 1), min(max(int(row), 0), size - 1)
            if DISTANCE - back > depth[view, j, i] + depth_slack / facing:
                continue
            u, v = min(max(column - 0.5, 0.0), size - 1.0), min(max(row - 0.5, 0.0), size - 1.0)
            i, j = min(int(u), size - 2), min(int(v), size - 2)
            u, v = u - i, v - j
            here, below = color_and_edge[view, j], color_and_edge[view, j + 1]
            w00, w01, w10, w11 = (1 - u) * (1 - v), u * (1 - v), (1 - u) * v, u * v
            w = w00 * here[i, 3] + w01 * here[i + 1, 3] + w10 * below[i, 3] + w11 * below[i + 1, 3]
            w *= facing**VIEW_POWER
            total += w
            w00, w01, w10, w11 = w * w00, w * w01, w * w10, w * w11
            red += w00 * here[i, 0] + w01 * here[i + 1, 0] + w10 * below[i, 0] + w11 * below[i + 1, 0]
            green += w00 * here[i, 1] + w01 * here[i + 1, 1] + w10 * below[i, 1] + w11 * below[i + 1, 1]
            blue += w00 * here[i, 2] + w01 * here[i + 1, 2] + w10 * below[i, 2] + w11 * below[i + 1, 2]
        unseen = max(1.0 - total / enough, 0.0)
        wa, wb, wc = unseen * wa, unseen * wb, unseen * wc
        for k, seen in enumerate((red, green, blue)):
            hidden = wa * values[a, 6 + k] + wb * values[b, 6 + k] + wc * values[c, 6 + k]
            color[n, k] = seen / max(total, enough) + hidden
        weight[n] = total


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
    pull = trust.astype(np.float64) * PULL + LEAST_PULL
    matrix = (diags(degree + pull) - adjacent).tocsr()
    mean = (color * trust[:, None]).sum(axis=0) / max(float(trust.sum()), 1e-6)
    if not trust.any():
        mean = np.full(3, UNKNOWN)
    preconditioner = diags(1.0 / (degree + pull))
    out = np.empty((count, 3), np.float32)
    for channel in range(3):
        known = np.where(trust > 0, color[:, channel], mean[channel])
        solved, _ = cg(
            matrix,
            pull * known,
            x0=known,
            rtol=SOLVER_TOLERANCE,
            maxiter=SOLVER_STEPS,
            M=preconditioner,
        )
        out[:, channel] = solved
    return np.clip(out, 0.0, 1.0)


def bake_texture(
    surface: Surface, normals: FloatArray, atlas: Atlas, views: ProjectedViews, texture_px: int
) -> NDArray[np.uint8]:
    """Base colour (texture_px, texture_px, 3) sRGB of an atlas, row 0 at the top.

    Every texel inside a chart looks up its own surface point in the views; where no view sees it, it
    takes the continued colour of the vertices.  Texels between charts repeat the nearest chart's edge.
    """
    filled = vertex_colors(surface, normals, views)
    face, bary, _ = rasterize_pixels(atlas_points(atlas, texture_px), atlas.faces, texture_px)
    color, _ = views.sample_faces(face.ravel(), bary.reshape(-1, 3), surface, normals, filled, CONFIDENT)
    texture = (np.clip(color, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8).reshape(*face.shape, 3)
    _fill_gaps(texture, face)
    return texture


@njit(cache=True)  # type: ignore[untyped-decorator]
def _fill_gaps(texture, face):  # type: ignore[no-untyped-def]
    """Give texels (H, W, 3) whose `face` (H, W) is negative the value of the nearest inside a chart."""
    rows, columns = face.shape
    far = rows + columns
    # Rows down (up where negative) to the nearest texel inside a chart in the same column.
    down = np.zeros((rows, columns), np.int32)
    for row in range(rows):
        for column in range(columns):
            if face[row, column] < 0:
                down[row, column] = (down[row - 1, column] if row > 0 else -far) - 1
    for row in range(rows - 2, -1, -1):
        for column in range(columns):
            if 0 <= down[row + 1, column] < -down[row, column] - 1:
                down[row, column] = down[row + 1, column] + 1
    for row in range(rows):
        for column in range(columns):
            if face[row, column] >= 0:
                continue
            best, nearest_row, nearest_column = far * far, row, column
            aside = 0
            while aside < columns and aside * aside < best:
                for other in (column - aside, column + aside):
                    if 0 <= other < columns:
                        square = down[row, other] ** 2 + aside * aside
                        if square < best:
                            best, nearest_row, nearest_column = square, row + down[row, other], other
                aside += 1
            for channel in range(3):
                texture[row, column, channel] = texture[nearest_row, nearest_column, channel]
