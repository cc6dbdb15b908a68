"""Colour, normal and alpha images of an object, by ray casting: one kernel on CPU and CUDA.

An object's BVH is built once, in its own frame; every view carries its own placement of the object,
and its rays are taken into the object's frame, so all augmentations of an object are one launch.
Shading is Lambertian without shadows (Eq. 14): with albedo `A` and normal `n`,

    colour = srgb(A * S * tint * exposure),   S = ambient + key * clamp((n.l + wrap) / (1 + wrap), 0, 1).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from types import TracebackType
from typing import Any

import numpy as np
import torch
import warp as wp
from numpy.typing import NDArray

from train.objects import Object, srgb_to_linear
from uc3d_rt.views import HALF_WINDOW, Camera, camera_axes

FloatArray = NDArray[np.float32]
ByteArray = NDArray[np.uint8]


def _identity_placement() -> FloatArray:
    return np.eye(3, 4, dtype=np.float32)


def _identity_color() -> FloatArray:
    return np.eye(3, dtype=np.float32)


@dataclass(frozen=True)
class Light:
    """One soft key light and ambient light, in linear units of albedo."""

    direction: tuple[float, float, float]  # world, towards the light
    ambient: float
    key: float
    wrap: float  # 0: Lambert's cosine; 1: reaches round to the far side
    tint: tuple[float, float, float] = (1.0, 1.0, 1.0)
    exposure: float = 1.0

    def __post_init__(self) -> None:
        if not math.hypot(*self.direction) > 0.0 or not self.wrap >= 0.0:
            raise ValueError(f"a light needs a direction that is not zero and wrap >= 0, got {self}")


TARGET_LIGHT = Light(direction=(0.0, 1.0, 0.0), ambient=0.6, key=0.4, wrap=1.0)
"""Light of the target views: from straight above, hence the same in the object's and in the input
camera's frame for every yaw between them."""


@dataclass(frozen=True, eq=False)
class View:
    """One image to render: a camera, where the object stands, its light and shift of colours."""

    camera: Camera
    object_to_world: FloatArray = field(default_factory=_identity_placement)  # (3, 4), may mirror and scale
    light: Light = TARGET_LIGHT
    color_matrix: FloatArray = field(default_factory=_identity_color)  # (3, 3), on linear albedo
    brightness: float = 1.0  # factor on the albedo, which is then clipped to [0, 1]
    window: tuple[float, float, float] = (0.0, 0.0, HALF_WINDOW)  # centre u, centre v, half side


@dataclass(frozen=True)
class Images:
    """N rendered images on the host."""

    color: ByteArray  # (N, H, W, 3) sRGB
    normal: ByteArray  # (N, H, W, 3) world normals (n + 1) / 2 * 255; 128 where alpha < 0.5
    alpha: ByteArray  # (N, H, W) coverage * 255


@dataclass(frozen=True)
class ImageTensors:
    """N rendered images as torch tensors on the scene's device; as `Images`."""

    color: torch.Tensor  # (N, H, W, 3) uint8
    normal: torch.Tensor  # (N, H, W, 3) uint8
    alpha: torch.Tensor  # (N, H, W) uint8

    def to_host(self) -> Images:
        """Wait for the device and copy."""
        return Images(self.color.cpu().numpy(), self.normal.cpu().numpy(), self.alpha.cpu().numpy())


@wp.struct
class RayView:
    """A view as the kernel wants it: rays in the object's frame, linear in u and v in [-1, 1]."""

    origin: wp.vec3
    origin_du: wp.vec3
    origin_dv: wp.vec3
    direction: wp.vec3
    direction_du: wp.vec3
    direction_dv: wp.vec3
    normal_matrix: wp.mat33
    albedo_matrix: wp.mat33
    light: wp.vec3
    gain: wp.vec3
    ambient: wp.float32
    key: wp.float32
    wrap: wp.float32


@wp.struct
class Surface:
    """A material as the kernel wants it."""

    factor: wp.vec3
    alpha_cutoff: wp.float32
    x: wp.int32
    y: wp.int32
    width: wp.int32  # 0: no texture
    height: wp.int32
    repeat_u: wp.int32
    repeat_v: wp.int32
    nearest: wp.int32


# Made once, not for every launch.
_RAY_VIEW, _SURFACE = RayView.numpy_dtype(), Surface.numpy_dtype()

MAX_CUTOUTS = wp.constant(16)
"""Cut-out layers a ray passes before it counts as a miss."""

_TILE_W, _TILE_H = 8, 4
TILE_W, TILE_H = wp.constant(_TILE_W), wp.constant(_TILE_H)
"""Pixels are numbered tile by tile, so that the rays of one CUDA warp stay together."""

_DECODE = srgb_to_linear(np.arange(256) / 255.0).astype(np.float32)  # sRGB byte -> linear


@wp.func
def srgb_from_linear(x: wp.float32):
    c = wp.clamp(x, 0.0, 1.0)
    encoded = 12.92 * c
    if c > 0.0031308:
        encoded = 1.055 * wp.pow(c, 1.0 / 2.4) - 0.055
    return encoded


@wp.func
def byte_from_unit(x: wp.float32):
    return wp.uint8(wp.int32(wp.clamp(x, 0.0, 1.0) * 255.0 + 0.5))


@wp.func
def wrapped_texel(i: wp.int32, size: wp.int32, repeat: wp.int32):
    j = wp.clamp(i, 0, size - 1)
    if repeat != 0:
        j = i - wp.int32(wp.floor(wp.float32(i) / wp.float32(size))) * size
        j = wp.clamp(j, 0, size - 1)
    return j


@wp.func
def texel(
    texture: wp.array3d(dtype=wp.uint8),
    decode: wp.array(dtype=wp.float32),
    s: Surface,
    x: wp.int32,
    y: wp.int32,
):
    """Linear colour and alpha of one texel, rows counted from the tile's top."""
    column = s.x + wrapped_texel(x, s.width, s.repeat_u)
    row = s.y + wrapped_texel(y, s.height, s.repeat_v)
    return wp.vec4(
        decode[wp.int32(texture[row, column, 0])],
        decode[wp.int32(texture[row, column, 1])],
        decode[wp.int32(texture[row, column, 2])],
        wp.float32(texture[row, column, 3]) / 255.0,
    )


@wp.func
def sampled_texture(
    texture: wp.array3d(dtype=wp.uint8), decode: wp.array(dtype=wp.float32), s: Surface, uv: wp.vec2
):
    """Bilinear look-up in linear light; `uv` has its origin at the lower left."""
    u = uv[0]
    v = 1.0 - uv[1]
    if s.repeat_u != 0:
        u = u - wp.floor(u)
    if s.repeat_v != 0:
        v = v - wp.floor(v)
    x = wp.clamp(u, -1.0, 2.0) * wp.float32(s.width)
    y = wp.clamp(v, -1.0, 2.0) * wp.float32(s.height)
    if s.nearest != 0:
        return texel(texture, decode, s, wp.int32(wp.floor(x)), wp.int32(wp.floor(y)))
    x0 = wp.int32(wp.floor(x - 0.5))
    y0 = wp.int32(wp.floor(y - 0.5))
    fx = x - 0.5 - wp.float32(x0)
    fy = y - 0.5 - wp.float32(y0)
    top = (1.0 - fx) * texel(texture, decode, s, x0, y0) + fx * texel(texture, decode, s, x0 + 1, y0)
    low = (1.0 - fx) * texel(texture, decode, s, x0, y0 + 1) + fx * texel(texture, decode, s, x0 + 1, y0 + 1)
    return (1.0 - fy) * top + fy * low


@wp.kernel(enable_backward=False)
def render_pixels(
    first_view: wp.int32,
    mesh: wp.uint64,
    radius: wp.float32,  # of a sphere about the object's origin that holds the mesh
    corner_uv: wp.array2d(dtype=wp.vec2),  # (F, 3)
    corner_color: wp.array2d(dtype=wp.vec3),  # (F, 3) linear, or (0, 0): white
    face_material: wp.array(dtype=wp.int32),  # (F,)
    materials: wp.array(dtype=Surface),
    texture: wp.array3d(dtype=wp.uint8),  # (h, w, 4)
    decode: wp.array(dtype=wp.float32),  # (256,) sRGB byte -> linear
    views: wp.array(dtype=RayView),
    samples: wp.int32,
    straight: wp.int32,  # 1: colour of the hits alone; 0: composited on white
    color: wp.array4d(dtype=wp.uint8),
    normal: wp.array4d(dtype=wp.uint8),
    alpha: wp.array3d(dtype=wp.uint8),
):
    size = color.shape[1]
    tiles_x = (size + TILE_W - 1) / TILE_W
    tiles = tiles_x * ((size + TILE_H - 1) / TILE_H)
    thread = wp.tid()
    tile = (thread / (TILE_W * TILE_H)) % tiles
    view = first_view + thread / (TILE_W * TILE_H * tiles)
    px = (tile % tiles_x) * TILE_W + thread % TILE_W
    py = (tile / tiles_x) * TILE_H + (thread / TILE_W) % TILE_H
    if px >= size or py >= size:
        return

    v = views[view]
    color_sum = wp.vec3(0.0, 0.0, 0.0)
    normal_sum = wp.vec3(0.0, 0.0, 0.0)
    hits = wp.int32(0)
    step = 2.0 / wp.float32(size * samples)
    for sample in range(samples * samples):
        # A rotated grid: no two samples of a pixel share a row or column, so upright edges are
        # smoothed in samples^2 steps instead of `samples`.
        i = sample % samples
        j = sample / samples
        iu = wp.float32(px * samples + i) + (wp.float32(j) + 0.5) / wp.float32(samples)
        iv = wp.float32(py * samples + j) + (wp.float32(samples - 1 - i) + 0.5) / wp.float32(samples)
        u = iu * step - 1.0
        w = 1.0 - iv * step
        start = v.origin + u * v.origin_du + w * v.origin_dv
        ray = v.direction + u * v.direction_du + w * v.direction_dv
        # Past the bounding sphere there is nothing; most rays of most images end here.
        nearest = -wp.dot(start, ray) / wp.dot(ray, ray)
        if wp.length_sq(start + nearest * ray) > radius * radius:
            continue
        found = wp.bool(False)
        face_normal = wp.vec3(0.0, 0.0, 0.0)
        base = wp.vec3(0.0, 0.0, 0.0)
        for _layer in range(MAX_CUTOUTS):
            query = wp.mesh_query_ray(mesh, start, ray, 1.0e6)
            if not query.result:
                break
            f = query.face
            b0 = query.u
            b1 = query.v
            b2 = 1.0 - b0 - b1
            surface = materials[face_material[f]]
            base = surface.factor
            opaque = wp.bool(True)
            if surface.width > 0:
                uv = b0 * corner_uv[f, 0] + b1 * corner_uv[f, 1] + b2 * corner_uv[f, 2]
                rgba = sampled_texture(texture, decode, surface, uv)
                base = wp.cw_mul(base, wp.vec3(rgba[0], rgba[1], rgba[2]))
                opaque = rgba[3] >= surface.alpha_cutoff
            if corner_color.shape[0] > 0:
                base = wp.cw_mul(
                    base, b0 * corner_color[f, 0] + b1 * corner_color[f, 1] + b2 * corner_color[f, 2]
                )
            face_normal = query.normal
            if opaque:
                found = True
                break
            start = start + (query.t + 1.0e-4 / wp.length(ray)) * ray
        if found:
            if wp.dot(face_normal, ray) > 0.0:
                face_normal = -face_normal
            n = wp.normalize(v.normal_matrix * face_normal)
            albedo = v.albedo_matrix * base
            lit = wp.clamp((wp.dot(n, v.light) + v.wrap) / (1.0 + v.wrap), 0.0, 1.0)
            shading = v.ambient + v.key * lit
            for c in range(3):
                color_sum[c] += srgb_from_linear(wp.clamp(albedo[c], 0.0, 1.0) * shading * v.gain[c])
            normal_sum += n
            hits += 1

    total = samples * samples
    alpha[view, py, px] = byte_from_unit(wp.float32(hits) / wp.float32(total))
    shade = wp.vec3(1.0, 1.0, 1.0)
    if hits > 0:
        if straight != 0:
            shade = color_sum / wp.float32(hits)
        else:
            white = wp.float32(total - hits)
            shade = (color_sum + wp.vec3(white, white, white)) / wp.float32(total)
    n = wp.vec3(0.0, 0.0, 0.0)
    if 2 * hits >= total and wp.length_sq(normal_sum) > 1.0e-8:
        n = wp.normalize(normal_sum)
    for c in range(3):
        color[view, py, px, c] = byte_from_unit(shade[c])
        normal[view, py, px, c] = byte_from_unit(0.5 * n[c] + 0.5)


class Scene:
    """An object's BVH, colours and texture on a device ("cpu", "cuda:0"); a context manager.

    "cuda" is the first GPU.  Launches go to torch's current stream of that device and do not wait for it.

    Raises:
        ValueError: the device is neither the CPU nor a CUDA device of this machine.
    """

    def __init__(self, obj: Object, device: str = "cpu") -> None:
        wp.config.log_level = max(wp.config.log_level, wp.LOG_WARNING)  # no banner
        wp.init()
        try:
            # warp wants the number of a GPU, which torch leaves out of "cuda"
            self.torch_device = torch.device("cuda:0" if device == "cuda" else device)
            self.device = wp.device_from_torch(self.torch_device)
        except Exception as error:  # warp and torch each raise their own kinds
            raise ValueError(
                f"cannot render on device {device!r} ({error}); use 'cpu' or 'cuda:0'"
            ) from error
        self.object = obj
        faces = obj.faces
        uv = np.zeros((len(obj.vertices), 2), np.float32) if obj.uv is None else obj.uv
        colors = np.zeros((0, 0, 3), np.float32)
        if obj.vertex_color is not None:
            colors = _DECODE[obj.vertex_color[faces]]
        texture = _with_alpha(obj.texture)
        self._radius = float(np.linalg.norm(obj.vertices, axis=1).max()) * 1.001
        with self._stream():
            self._mesh = wp.Mesh(
                points=wp.array(obj.vertices, dtype=wp.vec3, device=self.device),
                indices=wp.array(faces.reshape(-1), dtype=wp.int32, device=self.device),
            )
            self._corner_uv = wp.array(uv[faces], dtype=wp.vec2, device=self.device)
            self._corner_color = wp.array(colors, dtype=wp.vec3, device=self.device)
            self._face_material = wp.array(obj.face_material, dtype=wp.int32, device=self.device)
            self._materials = wp.array(_surfaces(obj), dtype=Surface, device=self.device)
            self._texture = wp.array(texture, dtype=wp.uint8, device=self.device)
            self._decode = wp.array(_DECODE, dtype=wp.float32, device=self.device)

    def __enter__(self) -> Scene:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the device memory; the scene cannot render after it."""
        with self._stream():
            for name in ("_mesh", "_corner_uv", "_corner_color", "_face_material", "_materials", "_texture"):
                if hasattr(self, name):
                    delattr(self, name)

    def render(
        self, views: Sequence[View], size_px: int = 256, samples: int = 2, *, straight_alpha: bool = False
    ) -> Images:
        """`render_torch`, copied to the host."""
        return self.render_torch(views, size_px, samples, straight_alpha=straight_alpha).to_host()

    def render_torch(
        self, views: Sequence[View], size_px: int = 256, samples: int = 2, *, straight_alpha: bool = False
    ) -> ImageTensors:
        """All views in one launch, `samples * samples` rays a pixel.

        Args:
            views: N views.
            size_px: side H = W of the square images.
            samples: rays along each side of a pixel.
            straight_alpha: colour of the surface alone (white where there is none) instead of
                the colour composited on white.

        Raises:
            ValueError: no view, a size below 1, or a placement that cannot be inverted.
        """
        if not views or size_px < 1 or samples < 1:
            raise ValueError(
                f"needs at least one view, pixel and sample; got {len(views)} views, {size_px=}, {samples=}"
            )
        count = len(views)
        rows = _ray_views(views)
        color = torch.empty((count, size_px, size_px, 3), dtype=torch.uint8, device=self.torch_device)
        normal = torch.empty_like(color)
        alpha = torch.empty((count, size_px, size_px), dtype=torch.uint8, device=self.torch_device)
        pixels = math.ceil(size_px / _TILE_W) * math.ceil(size_px / _TILE_H) * _TILE_W * _TILE_H
        with self._stream():
            tail = (
                self._mesh.id, self._radius, self._corner_uv, self._corner_color, self._face_material,
                self._materials, self._texture, self._decode,
                wp.array(rows, dtype=RayView, device=self.device), samples, int(straight_alpha),
                wp.from_torch(color), wp.from_torch(normal), wp.from_torch(alpha),
            )  # fmt: skip
            if self.device.is_cpu:
                _launch_on_threads(count, pixels, tail)
            else:
                wp.launch(render_pixels, dim=count * pixels, inputs=[0, *tail], device=self.device)
            del tail  # freed in this stream's order, after the launch
        return ImageTensors(color, normal, alpha)

    def _stream(self) -> wp.ScopedStream:
        stream = None
        if not self.device.is_cpu:
            stream = wp.stream_from_torch(torch.cuda.current_stream(self.torch_device))
        return wp.ScopedStream(stream)


def _launch_on_threads(count: int, pixels: int, tail: tuple[Any, ...]) -> None:
    """Warp runs a CPU launch on one thread; here each thread takes a range of views."""
    threads = min(count, os.cpu_count() or 1)
    bounds = [count * i // threads for i in range(threads + 1)]
    launches = [
        wp.launch(
            render_pixels, dim=(end - start) * pixels, inputs=[start, *tail], device="cpu", record_cmd=True
        )
        for start, end in zip(bounds, bounds[1:], strict=False)
    ]
    with ThreadPoolExecutor(threads) as pool:  # the compiled kernel runs without the GIL
        list(pool.map(lambda launch: launch.launch(), launches))


def _ray_views(views: Sequence[View]) -> NDArray[Any]:
    """The views' rows for the kernel (N,): rays in the object's frame."""
    placement = np.array([view.object_to_world for view in views], np.float64)
    if placement.shape[1:] != (3, 4) or not (np.abs(np.linalg.det(placement[:, :, :3])) > 1e-9).all():
        raise ValueError(f"object_to_world must be an invertible (3, 4) matrix, got {placement.tolist()}")
    inverse = np.linalg.inv(placement[:, :, :3])  # (N, 3, 3)
    axes = np.array([_axes(view.camera) for view in views], np.float64)  # (N, 3: right up back, 3)
    distance = np.array([view.camera.distance for view in views])[:, None]
    perspective = np.array([view.camera.focal_mm is not None for view in views])[:, None]
    window = np.array([view.window for view in views], np.float64)

    def in_object(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
        turned: NDArray[np.float64] = np.einsum("nij,nj->ni", inverse, vectors)
        return turned

    right, up, back = axes[:, 0], axes[:, 1], axes[:, 2]
    eye = in_object(back * distance - placement[:, :, 3])
    forward = in_object(-back * distance)
    middle = in_object(window[:, :1] * right + window[:, 1:2] * up)  # of the window, from the origin
    du, dv = in_object(window[:, 2:] * right), in_object(window[:, 2:] * up)
    lights = np.array([(*v.light.direction, *v.light.tint) for v in views], np.float64)
    rows: Any = np.zeros(len(views), dtype=_RAY_VIEW)
    rows["origin"] = np.where(perspective, eye, eye + middle)
    rows["origin_du"], rows["origin_dv"] = np.where(perspective, 0.0, du), np.where(perspective, 0.0, dv)
    rows["direction"] = np.where(perspective, forward + middle, forward)
    rows["direction_du"], rows["direction_dv"] = (
        np.where(perspective, du, 0.0),
        np.where(perspective, dv, 0.0),
    )
    rows["normal_matrix"] = inverse.transpose(0, 2, 1)
    rows["albedo_matrix"] = [np.asarray(view.color_matrix) * view.brightness for view in views]
    rows["light"] = lights[:, :3] / np.linalg.norm(lights[:, :3], axis=1, keepdims=True)
    rows["gain"] = lights[:, 3:] * np.array([view.light.exposure for view in views])[:, None]
    for name in ("ambient", "key", "wrap"):
        rows[name] = [getattr(view.light, name) for view in views]
    return rows


@lru_cache(maxsize=1024)
def _axes(camera: Camera) -> tuple[tuple[float, ...], ...]:
    """`camera_axes` as plain numbers; the six target cameras come again and again."""
    return tuple(tuple(axis.tolist()) for axis in camera_axes(camera))


def _with_alpha(texture: ByteArray | None) -> ByteArray:
    """A texture (h, w, 3 or 4) with the fourth channel, opaque where it has none; a white one of none."""
    if texture is not None and texture.shape[2] == 4:
        return texture
    whole = np.full((1, 1, 4) if texture is None else (*texture.shape[:2], 4), 255, np.uint8)
    if texture is not None:
        whole[..., :3] = texture
    return whole


def _surfaces(obj: Object) -> NDArray[Any]:
    rows: Any = np.zeros(len(obj.materials), dtype=_SURFACE)
    for row, material in zip(rows, obj.materials, strict=True):
        row["factor"] = material.factor
        row["alpha_cutoff"] = material.alpha_cutoff
        if material.tile is not None and obj.uv is not None:
            row["x"], row["y"], row["width"], row["height"] = material.tile
        row["repeat_u"], row["repeat_v"] = material.repeat
        row["nearest"] = material.nearest
    return rows
