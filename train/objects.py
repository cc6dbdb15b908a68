"""Any GLB, glTF, OBJ or PLY file -> one normalised triangle mesh with its base colours.

What a material says of lighting, roughness or metal is left out; base colour (factor x texture x
vertex colour, as glTF defines it) and alpha cut-outs are kept.  trimesh parses the files.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uc3d_rt.views import BOUNDING_RADIUS

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int32]
ByteArray = NDArray[np.uint8]

SUFFIXES = (".glb", ".gltf", ".obj", ".ply")

MAX_TEXTURE_PX = 1024
"""Longer textures are reduced when loaded: views have 256 pixels and there are no mipmaps."""

GREY = (186, 186, 186)
"""sRGB colour of a surface whose file names none (about half of the light reflected)."""

GENERIC_STEMS = frozenset(("model", "models", "mesh", "meshes", "scene", "object", "textured", "source"))
"""File and folder names that do not tell objects apart; the folder above is then part of the name."""


@dataclass(frozen=True)
class Material:
    """How the base colour of some faces is found: `factor * texture(tile) * vertex colour`."""

    factor: tuple[float, float, float] = (1.0, 1.0, 1.0)  # linear light
    tile: tuple[int, int, int, int] | None = None  # x, y, width, height in the object's texture, pixels
    repeat: tuple[bool, bool] = (True, True)  # wrap rather than clamp, along u and v
    nearest: bool = False  # no interpolation between texels
    alpha_cutoff: float = 0.0  # > 0: holes where the texture's alpha is below (glTF alphaMode MASK)


@dataclass(frozen=True)
class Object:
    """A triangle mesh, centred on its bounding box, bounding sphere of radius `BOUNDING_RADIUS`."""

    name: str
    vertices: FloatArray  # (V, 3), +Y up
    faces: IntArray  # (F, 3)
    uv: FloatArray | None  # (V, 2), origin at the lower left of a material's tile
    texture: ByteArray | None  # (h, w, 3 or 4) sRGB, the tiles of all materials one above the other
    vertex_color: ByteArray | None  # (V, 3) sRGB
    face_material: IntArray  # (F,)
    materials: tuple[Material, ...]


def find_objects(folder: Path) -> list[Path]:
    """All object files under a folder, sorted by their relative path, the same on every machine.

    Raises:
        ValueError: the folder is missing or holds no object file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}; give a folder of {', '.join(SUFFIXES)} files")
    found = (p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    paths = sorted(found, key=lambda p: p.relative_to(folder).as_posix())
    if not paths:
        raise ValueError(f"{folder} holds no object; put {', '.join(SUFFIXES)} files into it")
    return paths


def object_name(path: Path) -> str:
    """The file's stem, with folders before it while the name alone is generic (`model.obj`)."""
    path = Path(path)
    parts = [path.stem]
    for folder in path.parents:
        if parts[0].lower() not in GENERIC_STEMS or not folder.name:
            break
        parts.insert(0, folder.name)
    return "/".join(parts)


def load_object(path: Path) -> Object:
    """Read an object file.

    All meshes of a scene are joined with their transforms applied.  Faces without area are left
    out.  A surface without any colour is grey.

    Raises:
        ValueError: the file cannot be read, or holds no surface; the message says which.
    """
    import trimesh  # takes a second to import

    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} is no object file; use one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise ValueError(f"{path} is missing; check the path")
    try:
        scene = trimesh.load_scene(path, process=False)
        details = _gltf_details(path)
        instances = [(scene.graph[node], node) for node in sorted(scene.graph.nodes_geometry)]
        parts = []
        for (transform, geometry_name), node in instances:
            mesh = scene.geometry[geometry_name]
            if isinstance(mesh, trimesh.Trimesh) and len(mesh.faces):
                parts.append(_part(mesh, np.asarray(transform), node, details))
    except Exception as error:  # trimesh's parsers raise whatever they run into
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {error}); repair or remove it"
        ) from error
    if not parts:
        raise ValueError(f"{path} holds no triangles; export it again as a mesh, or remove it")
    try:
        return normalized(joined(parts, object_name(path)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; repair or remove it") from error


def normalized(thing: Object) -> Object:
    """Without unused vertices and faces of no area, centred on its box, bounding radius 0.95.

    Raises:
        ValueError: coordinates that are not finite, or no face with an area.
    """
    points = thing.vertices.T.astype(np.float64, order="C")  # (3, V): three times as fast as (V, 3)
    if not len(thing.faces):
        raise ValueError("has no face with an area")
    a, b, c = (points.take(corner, axis=1) for corner in thing.faces.T.copy())  # (3, F)
    low = np.min([corner.min(axis=1) for corner in (a, b, c)], axis=0)
    extent = float((np.max([corner.max(axis=1) for corner in (a, b, c)], axis=0) - low).max())
    if not math.isfinite(extent):
        raise ValueError("has vertices that are not finite numbers")
    (ux, uy, uz), (vx, vy, vz) = b - a, c - a
    cross_sq = (uy * vz - uz * vy) ** 2 + (uz * vx - ux * vz) ** 2 + (ux * vy - uy * vx) ** 2
    kept = cross_sq > (1e-12 * extent * extent) ** 2
    if not kept.any():
        raise ValueError("has no face with an area")
    used = np.zeros(len(thing.vertices), bool)
    used[thing.faces[kept]] = True
    number = np.cumsum(used) - 1  # of each vertex that stays
    points = points[:, used]
    points -= (points.min(axis=1, keepdims=True) + points.max(axis=1, keepdims=True)) / 2.0
    points *= BOUNDING_RADIUS / math.sqrt((points * points).sum(axis=0).max())
    return replace(
        thing,
        vertices=np.ascontiguousarray(points.T, np.float32),
        faces=number[thing.faces[kept]].astype(np.int32),
        uv=None if thing.uv is None else thing.uv[used],
        vertex_color=None if thing.vertex_color is None else thing.vertex_color[used],
        face_material=thing.face_material[kept],
    )


def joined(parts: Sequence[Object], name: str) -> Object:
    """Several objects as one, where they stand: meshes appended, textures one above the other.

    Textures with the same pixels are stored once.  Not normalised.
    """
    images, offsets, height = [], {}, 0
    keys = [None if part.texture is None else _image_key(part.texture) for part in parts]
    for part, key in zip(parts, keys, strict=True):
        if part.texture is not None and key not in offsets:
            offsets[key] = height
            images.append(part.texture)
            height += part.texture.shape[0]
    materials: list[Material] = []
    face_material = []
    for part, key in zip(parts, keys, strict=True):
        y = 0 if key is None else offsets[key]
        numbers = []
        for material in part.materials:
            if material.tile is not None:
                tx, ty, tw, th = material.tile
                material = replace(material, tile=(tx, ty + y, tw, th))
            if material not in materials:
                materials.append(material)
            numbers.append(materials.index(material))
        face_material.append(np.asarray(numbers, np.int32)[part.face_material])
    starts = np.cumsum([0] + [len(part.vertices) for part in parts])
    return Object(
        name=name,
        vertices=np.concatenate([part.vertices for part in parts]).astype(np.float32),
        faces=np.concatenate([part.faces + start for part, start in zip(parts, starts, strict=False)]).astype(
            np.int32
        ),
        uv=_concatenated(
            [part.uv for part in parts], [(len(part.vertices), 2) for part in parts], np.float32(0)
        ),
        texture=_stacked(images),
        vertex_color=_concatenated(
            [part.vertex_color for part in parts], [(len(part.vertices), 3) for part in parts], np.uint8(255)
        ),
        face_material=np.concatenate(face_material),
        materials=tuple(materials),
    )


def _part(mesh: Any, transform: NDArray[np.float64], name: str, details: dict[str, _Detail] | None) -> Object:
    """One trimesh geometry under its scene transform, as an object of one material.

    `details` holds what trimesh drops of glTF materials; None for other formats.
    """
    vertices = np.asarray(mesh.vertices, np.float64) @ transform[:3, :3].T + transform[:3, 3]
    faces = np.asarray(mesh.faces, np.int64)
    visual = mesh.visual
    uv = colors = image = None
    material = Material()
    if visual is not None and visual.kind == "texture":
        uv = visual.uv
        source = visual.material
        colors = visual.vertex_attributes.get("color")
        if details is None:
            # OBJ: an .mtl's Kd is display (sRGB) colour, and stands back where there is a map.
            image = getattr(source, "image", None) if uv is not None else None
            diffuse = np.asarray(source.main_color, np.float64)[:3] / 255.0
            factor = np.ones(3) if image is not None else srgb_to_linear(diffuse)
            material = replace(material, factor=_rgb(factor))
        else:
            image = source.baseColorTexture if uv is not None else None
            rounded = source.baseColorFactor
            factor = np.ones(3) if rounded is None else np.asarray(rounded, np.float64)[:3] / 255.0
            material = replace(material, factor=_rgb(factor))
            if (detail := details.get(source.name or "")) is not None:
                material = replace(
                    material, factor=detail.factor, repeat=detail.repeat, nearest=detail.nearest
                )
            if source.alphaMode == "MASK" and image is not None:
                cutoff = 0.5 if source.alphaCutoff is None else float(source.alphaCutoff)
                material = replace(material, alpha_cutoff=cutoff)
        if uv is not None and (len(uv) != len(vertices) or not np.isfinite(uv).all()):
            uv = image = None
    elif visual is not None and visual.kind == "vertex":
        colors = visual.vertex_colors
    elif visual is not None and visual.kind == "face":
        colors = np.repeat(np.asarray(visual.face_colors), 3, axis=0)
        vertices = vertices[faces.reshape(-1)]
        faces = np.arange(len(vertices)).reshape(-1, 3)
    if visual is None or (visual.kind is None and colors is None):
        material = replace(material, factor=_rgb(srgb_to_linear(np.array(GREY) / 255.0)))
    texture = None
    if image is not None:
        texture = _pixels(image, with_alpha=material.alpha_cutoff > 0)
        material = replace(material, tile=(0, 0, texture.shape[1], texture.shape[0]))
    return Object(
        name=name,
        vertices=vertices.astype(np.float32),
        faces=faces.astype(np.int32),
        uv=None if uv is None else np.asarray(uv, np.float32),
        texture=texture,
        vertex_color=None if colors is None else _color_bytes(np.asarray(colors), linear=details is not None),
        face_material=np.zeros(len(faces), np.int32),
        materials=(material,),
    )


@dataclass(frozen=True)
class _Detail:
    """Of a glTF material, what trimesh rounds (the factor) or drops (the sampler)."""

    factor: tuple[float, float, float]
    repeat: tuple[bool, bool]
    nearest: bool


_GL_REPEAT, _GL_MIRRORED, _GL_NEAREST = 10497, 33648, 9728


def _gltf_details(path: Path) -> dict[str, _Detail] | None:
    """Details by material name from a glTF header; names that occur twice are left out.

    None for a file that is no glTF.
    """
    if path.suffix.lower() == ".glb":
        with path.open("rb") as stream:
            length = struct.unpack("<5I", stream.read(20))[3]
            header = json.loads(stream.read(length))
    elif path.suffix.lower() == ".gltf":
        header = json.loads(path.read_text(encoding="utf-8"))
    else:
        return None
    details: dict[str, _Detail] = {}
    names = [material.get("name", "") for material in header.get("materials", [])]
    for name, material in zip(names, header.get("materials", []), strict=True):
        if names.count(name) > 1:
            continue
        pbr = material.get("pbrMetallicRoughness", {})
        factor = np.asarray(pbr.get("baseColorFactor", [1.0, 1.0, 1.0, 1.0]), np.float64)
        sampler: dict[str, int] = {}
        if (slot := pbr.get("baseColorTexture")) is not None:
            texture = header["textures"][slot["index"]]
            if "sampler" in texture:
                sampler = header["samplers"][texture["sampler"]]
        wraps = [sampler.get(key, _GL_REPEAT) in (_GL_REPEAT, _GL_MIRRORED) for key in ("wrapS", "wrapT")]
        details[name] = _Detail(
            factor=_rgb(factor[:3]),
            repeat=(wraps[0], wraps[1]),
            nearest=sampler.get("magFilter") == _GL_NEAREST,
        )
    return details


def srgb_to_linear(color: NDArray[np.floating]) -> NDArray[np.float64]:
    """IEC 61966-2-1 decoding of values in [0, 1]."""
    color = np.asarray(color, np.float64)
    return np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(color: NDArray[np.floating]) -> NDArray[np.float64]:
    """IEC 61966-2-1 encoding; values are clipped to [0, 1]."""
    color = np.clip(np.asarray(color, np.float64), 0.0, 1.0)
    return np.where(color <= 0.0031308, color * 12.92, 1.055 * color ** (1 / 2.4) - 0.055)


def _rgb(color: NDArray[np.floating]) -> tuple[float, float, float]:
    return (float(color[0]), float(color[1]), float(color[2]))


def _color_bytes(colors: NDArray[Any], linear: bool) -> ByteArray:
    """(V, 3 or 4) vertex colours of any dtype to (V, 3) sRGB bytes; glTF's are linear light."""
    scale = 1.0 if colors.dtype.kind == "f" else float(np.iinfo(colors.dtype).max)
    values = np.clip(np.nan_to_num(colors[:, :3].astype(np.float64)) / scale, 0.0, 1.0)
    if linear:
        values = linear_to_srgb(values)
    return np.round(values * 255.0).astype(np.uint8)


def _pixels(image: Any, with_alpha: bool) -> ByteArray:
    """A PIL image to (h, w, 4 or 3), its longer side at most MAX_TEXTURE_PX."""
    longest = max(image.size)
    image = image.convert("RGBA" if with_alpha else "RGB")
    if longest > MAX_TEXTURE_PX:
        from PIL import Image

        size = tuple(max(1, round(side * MAX_TEXTURE_PX / longest)) for side in image.size)
        image = image.resize(size, Image.Resampling.BOX)
    return np.asarray(image, np.uint8)


def _image_key(image: ByteArray) -> tuple[tuple[int, ...], int]:
    """The same for images of the same pixels, in this process."""
    return image.shape, hash(image.tobytes())


def _stacked(images: Sequence[ByteArray]) -> ByteArray | None:
    """Images one above the other, in RGBA where one has alpha; None for none."""
    if not images:
        return None
    if len(images) == 1:
        return images[0]
    width = max(image.shape[1] for image in images)
    channels = max(image.shape[2] for image in images)
    stack = np.full((sum(image.shape[0] for image in images), width, channels), 255, np.uint8)
    y = 0
    for image in images:
        stack[y : y + image.shape[0], : image.shape[1], : image.shape[2]] = image
        y += image.shape[0]
    return stack


def _concatenated(arrays: Sequence[Any], shapes: Sequence[tuple[int, int]], fill: Any) -> Any:
    """Concatenation where missing arrays are filled; None where all are missing."""
    if all(array is None for array in arrays):
        return None
    return np.concatenate(
        [
            np.full(shape, fill) if array is None else array
            for array, shape in zip(arrays, shapes, strict=True)
        ]
    )
