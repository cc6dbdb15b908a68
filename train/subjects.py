"""What a training variant shows: an object as it is, changed in shape or surface, or several as one.

A few thousand objects are soon known by heart.  Reshaped, retextured and put together at random they
become an endless supply of solids that no one has seen before, which is what teaches a network to
read shape off a picture rather than to recognise it (Xie et al., "LRM-Zero: Training Large
Reconstruction Models with Synthesized Data").

Pure functions of a `numpy.random.Generator`; results are normalised objects.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from train.augment import yaw_matrix
from train.objects import Material, Object, joined, normalized

FloatArray = NDArray[np.float32]

PAIR_SHARE = 0.1  # of variants show two objects side by side
ASSEMBLY_SHARE = 0.3  # of variants show parts of several objects, grown together
RESHAPE_SHARE = 0.35  # of the others are tapered, twisted, sheared or bent
TUMBLE_SHARE = 0.15  # of the others lie on a side or stand on their head
RETEXTURE_SHARE = 0.2  # of all wear the picture of another object
PRIMITIVE_SHARE = 0.4  # of an assembly's parts are plain solids
MAX_PARTS = 5


def subject(
    own: Object, rng: np.random.Generator, other: Callable[[np.random.Generator], Object] | None
) -> Object:
    """The thing that a variant of `own` shows; `own` itself, not a copy, where nothing is changed.

    Args:
        other: draws another object of the same folder; None if there is none.
    """
    kind = rng.random()
    thing = own
    if other is not None and kind < PAIR_SHARE:
        return pair_of(own, other(rng), rng)
    if other is not None and kind < PAIR_SHARE + ASSEMBLY_SHARE:
        thing = assembly(own, rng, other)
    else:
        if rng.random() < RESHAPE_SHARE:
            thing = reshaped(thing, rng)
        if rng.random() < TUMBLE_SHARE:
            thing = turned(thing, tumble(rng))
    if other is not None and rng.random() < RETEXTURE_SHARE:
        thing = retextured(thing, other(rng).texture, rng)
    return thing


def pair_of(a: Object, b: Object, rng: np.random.Generator) -> Object:
    """Two objects side by side on one floor, as one object."""
    size = float(rng.uniform(0.5, 1.0))
    angle = float(rng.uniform(0.0, 360.0))
    gap = float(rng.uniform(0.02, 0.2))
    moved = (b.vertices * size) @ yaw_matrix(rng.uniform(0.0, 360.0)).T.astype(np.float32)
    direction = np.array([math.sin(math.radians(angle)), 0.0, math.cos(math.radians(angle))], np.float32)
    reach = float((a.vertices @ direction).max() - (moved @ direction).min()) + gap
    moved += direction * reach
    moved[:, 1] += a.vertices[:, 1].min() - moved[:, 1].min()
    both = joined([a, replace(b, vertices=moved.astype(np.float32))], f"{a.name}+{b.name}")
    return normalized(both)


def assembly(own: Object, rng: np.random.Generator, other: Callable[[np.random.Generator], Object]) -> Object:
    """Two to `MAX_PARTS` parts, stretched and turned at random, each stuck into those before it."""
    parts: list[Object] = []
    for index in range(int(rng.integers(2, MAX_PARTS + 1))):
        if rng.random() < PRIMITIVE_SHARE:
            part = primitive(rng)
            if rng.random() < 0.5:
                part = retextured(part, other(rng).texture, rng)
        else:
            part = own if index == 0 else other(rng)
        stretch = np.exp(rng.uniform(-0.8, 0.4, size=3))
        matrix = (tumble(rng) if rng.random() < 0.6 else yaw_matrix(rng.uniform(0.0, 360.0))) * stretch
        if index:
            matrix = matrix * rng.uniform(0.3, 0.9)
        vertices = part.vertices.astype(np.float64) @ matrix.T
        if index:
            anchor = parts[int(rng.integers(index))]
            vertices += anchor.vertices[int(rng.integers(len(anchor.vertices)))] * rng.uniform(0.5, 1.0)
        parts.append(replace(part, vertices=vertices.astype(np.float32)))
    return normalized(joined(parts, "+".join(part.name for part in parts)))


def primitive(rng: np.random.Generator) -> Object:
    """A box, cylinder, cone, sphere, torus or prism in one random colour, with texture coordinates."""
    from trimesh import creation

    sections = int(rng.integers(5, 33))
    mesh = [
        lambda: creation.box((1.0, 1.0, 1.0)),
        lambda: creation.cylinder(0.5, 1.0, sections=sections),
        lambda: creation.cylinder(0.5, 1.0, sections=int(rng.integers(3, 7))),
        lambda: creation.cone(0.5, 1.0, sections=sections),
        lambda: creation.icosphere(subdivisions=int(rng.integers(1, 4)), radius=0.5),
        lambda: creation.torus(0.4, rng.uniform(0.06, 0.2), major_sections=32, minor_sections=12),
    ][int(rng.integers(6))]()
    vertices = np.asarray(mesh.vertices, np.float32)
    flat = vertices @ tumble(rng)[:, :2]
    return normalized(
        Object(
            name="solid",
            vertices=vertices,
            faces=np.asarray(mesh.faces, np.int32),
            uv=(flat + 0.5).astype(np.float32),
            texture=None,
            vertex_color=None,
            face_material=np.zeros(len(mesh.faces), np.int32),
            materials=(Material(factor=random_factor(rng)),),
        )
    )


def random_factor(rng: np.random.Generator) -> tuple[float, float, float]:
    """A base colour in linear light, dark ones as likely to the eye as light ones."""
    r, g, b = rng.uniform(0.1, 1.0, size=3) ** 2.2
    return float(r), float(g), float(b)


def tumble(rng: np.random.Generator) -> NDArray[np.float64]:
    """(3, 3) rotation: half the time any, half the time by right angles about x and z and any yaw."""
    if rng.random() < 0.5:
        w, x, y, z = (q := rng.normal(size=4)) / np.linalg.norm(q)
        return np.array(
            [
                [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
            ]
        )
    order = [np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]]), np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]])]
    quarter = np.linalg.matrix_power(order[int(rng.integers(2))], int(rng.integers(1, 4)))
    return yaw_matrix(rng.uniform(0.0, 360.0)) @ quarter


def turned(thing: Object, matrix: NDArray[np.float64]) -> Object:
    """The object under a rotation (3, 3)."""
    vertices = thing.vertices.astype(np.float64) @ matrix.T
    return normalized(replace(thing, vertices=vertices.astype(np.float32)))


def reshaped(thing: Object, rng: np.random.Generator) -> Object:
    """The object under one or two of: taper, twist, shear, bend, along a random axis.

    Vertices move, faces stay: planes and straight edges of coarse meshes stay planes and edges.
    """
    vertices = thing.vertices.astype(np.float64)
    for _ in range(int(rng.integers(1, 3))):
        axes = np.roll(np.arange(3), int(rng.integers(3)))  # u, v across; h along
        u, h, v = vertices[:, axes[0]], vertices[:, axes[1]], vertices[:, axes[2]]
        kind, amount = int(rng.integers(4)), rng.uniform(-1.0, 1.0)
        if kind == 0:
            grow = np.exp(0.8 * amount * h)
            u, v = u * grow, v * grow
        elif kind == 1:
            a = 0.8 * amount * h
            u, v = u * np.cos(a) - v * np.sin(a), u * np.sin(a) + v * np.cos(a)
        elif kind == 2:
            u = u + 0.5 * amount * h
        else:
            u = u + 0.6 * amount * h * h
        moved = np.empty_like(vertices)
        moved[:, axes[0]], moved[:, axes[1]], moved[:, axes[2]] = u, h, v
        vertices = moved
    return normalized(replace(thing, vertices=vertices.astype(np.float32)))


def retextured(thing: Object, texture: NDArray[np.uint8] | None, rng: np.random.Generator) -> Object:
    """The object with another picture on its texture coordinates, or with other plain colours.

    A palette texture thus gives every part another colour, a photograph gives a pattern.  Where the
    old texture cuts holes (alpha), the holes stay.
    """
    if thing.texture is None:
        if texture is None or thing.uv is None:
            materials = tuple(replace(m, factor=random_factor(rng)) for m in thing.materials)
            return replace(thing, materials=materials)
        tile = (0, 0, texture.shape[1], texture.shape[0])
        materials = tuple(replace(m, factor=(1.0, 1.0, 1.0), tile=tile) for m in thing.materials)
        return replace(thing, texture=np.ascontiguousarray(texture[..., :3]), materials=materials)
    if texture is None:
        return thing
    from PIL import Image

    height, width = thing.texture.shape[:2]
    picture = Image.fromarray(np.ascontiguousarray(texture[..., :3])).resize((width, height))
    pixels = np.asarray(picture, np.uint8)
    if thing.texture.shape[2] == 4:
        pixels = np.concatenate([pixels, thing.texture[..., 3:]], axis=-1)
    return replace(thing, texture=pixels)


def other_of(
    count: int, index: int, load: Callable[[int], Object]
) -> Callable[[np.random.Generator], Object] | None:
    """Draws any of `count` objects but that at `index`; None if it is the only one."""
    if count == 1:
        return None
    return lambda rng: load((index + int(rng.integers(1, count))) % count)
