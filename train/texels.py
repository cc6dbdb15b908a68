"""Materials and their textures, as the renderer's kernel reads them."""

from __future__ import annotations

import warp as wp


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
