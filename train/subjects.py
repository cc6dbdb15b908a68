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
from train.objects import Object, joined, normalized
from train.solids import random_factor, solid

FloatArray = NDArray[np.float32]
Array = NDArray[np.float64]

PAIR_SHARE = 0.1  # of variants show two objects side by side
ASSEMBLY_SHARE = 0.5  # of variants show parts of several objects, grown together
RESHAPE_SHARE = 0.5  # of the others are tapered, twisted, sheared or bent
TUMBLE_SHARE = 0.15  # of the others lie on a side or stand on their head
RETEXTURE_SHARE = 0.35  # of all wear the picture of another object
SOLID_SHARE = 0.5  # of an assembly's parts are made-up solids
STACK_SHARE = 0.5  # of assemblies stand straight on one floor, the others grow any way round
MIRROR_SHARE = 0.5  # of assemblies are their own mirror image
DOUBLE_MIRROR_SHARE = 0.3  # of those, from front to back too
REPEAT_SHARE = 0.2  # of the other assemblies have one part several times, in a ring or a row
MAX_PARTS = 5

_SINK = 0.03  # how deep, of its own size, a part stands in the one below or beside it


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
    """Two to `MAX_PARTS` parts, stretched and turned at random, each stuck into those before it.

    Half of them stand straight and stacked, as furniture, buildings and vehicles do; half are symmetric.
    """
    count = int(rng.integers(2, MAX_PARTS + 1))
    stacked = rng.random() < STACK_SHARE
    mirrors: dict[int, float] = {}  # axis -> where the plane across it lies
    symmetric = rng.random() < MIRROR_SHARE
    repeat = not symmetric and rng.random() < REPEAT_SHARE
    parts: list[Object] = []
    for index in range(count):
        part = _part(own if index == 0 else None, rng, other)
        stretch = np.exp(rng.uniform(-0.8, 0.4, size=3))
        if index:
            stretch = stretch * rng.uniform(0.3, 0.9)
        if stacked:
            matrix = yaw_matrix(90.0 * rng.integers(4)) * stretch
        else:
            matrix = (tumble(rng) if rng.random() < 0.6 else yaw_matrix(rng.uniform(0.0, 360.0))) * stretch
        v = part.vertices.astype(np.float64) @ matrix.T
        touch, anchor = np.zeros(3), v
        if index:
            anchor = parts[int(rng.integers(index))].vertices.astype(np.float64)
            if stacked:
                shift, touch = _beside(v, anchor, rng)
            else:
                shift = touch = anchor[int(rng.integers(len(anchor)))] * rng.uniform(0.5, 1.0)
            v = v + shift
        elif symmetric:
            mirrors = {axis: _within(v[:, axis], rng) for axis in (0, 2)}
            if rng.random() >= DOUBLE_MIRROR_SHARE:
                del mirrors[2]
        if repeat and index == count - 1:
            copies = repeated(v, anchor, rng)
            one = replace(part, vertices=v.astype(np.float32))
            part = joined([replace(one, vertices=c.astype(np.float32)) for c in copies], part.name)
        else:
            part = replace(part, vertices=v.astype(np.float32))
        for axis, at in mirrors.items():
            # The side that touches what was there before: that is symmetric already, so the image does too.
            part = mirrored(part, axis, at, keep=1.0 if touch[axis] >= at else -1.0)
        parts.append(part)
    return normalized(joined(parts, "+".join(part.name for part in parts)))


def _part(
    own: Object | None, rng: np.random.Generator, other: Callable[[np.random.Generator], Object]
) -> Object:
    if rng.random() >= SOLID_SHARE:
        return other(rng) if own is None else own
    part = solid(rng)
    return retextured(part, other(rng).texture, rng) if rng.random() < 0.4 else part


def _beside(v: Array, anchor: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """The shift (3,) that puts a part on top of another, below it or to its side; and where they touch."""
    axis = int(rng.choice([1, 1, 0, 2]))
    sign = 1.0 if rng.random() < (0.75 if axis == 1 else 0.5) else -1.0
    # What of either is near where they meet.
    reach, its_reach = -sign * v[:, axis], sign * anchor[:, axis]
    foot = v[reach >= reach.max() - 0.1 * np.ptp(reach)]
    top = anchor[its_reach >= its_reach.max() - 0.1 * np.ptp(its_reach)]
    low, high, its_low, its_high = foot.min(axis=0), foot.max(axis=0), top.min(axis=0), top.max(axis=0)
    # In the middle, flush with an end, or anywhere between.
    place = np.array([rng.choice([0.0, 0.5, 0.5, 1.0, rng.uniform()]) for _ in range(3)])
    shift = its_low - low + place * ((its_high - its_low) - (high - low))
    if axis != 1 and rng.random() < 0.7:
        floor = float(anchor[:, 1].min() - v[:, 1].min())
        if its_low[1] <= high[1] + floor and low[1] + floor <= its_high[1]:
            shift[1] = floor
    shift[axis] = sign * (its_reach.max() + reach.max() - _SINK * np.ptp(reach))
    touch = (np.maximum(low + shift, its_low) + np.minimum(high + shift, its_high)) / 2.0
    return shift, touch


def _within(values: Array, rng: np.random.Generator) -> float:
    """Some place about the middle of what the values span."""
    low, high = float(values.min()), float(values.max())
    return low + (high - low) * float(rng.uniform(0.35, 0.65))


def repeated(v: Array, anchor: Array, rng: np.random.Generator) -> list[Array]:
    """Vertices (V, 3) of a part several times: in a ring about an anchor's axis +Y, or in a row on it."""
    count = int(rng.integers(2, 9))
    low, high = anchor.min(axis=0), anchor.max(axis=0)
    middle, half = (low + high) / 2.0, (high - low) / 2.0
    own = (v.min(axis=0) + v.max(axis=0)) / 2.0
    if rng.random() < 0.6:
        away = np.array([0.0, 0.0, min(half[0], half[2]) * rng.uniform(0.6, 1.0)])
        start = v - own * (1.0, 0.0, 1.0) + away
        turns = [yaw_matrix(360.0 * k / count) for k in range(count)]
        return [start @ turn.T + middle * (1.0, 0.0, 1.0) for turn in turns]
    axis = int(rng.choice([0, 2]))
    places = np.linspace(low[axis], high[axis], 2 * count + 1)[1::2]
    return [v + np.eye(3)[axis] * (place - own[axis]) for place in places]


def mirrored(thing: Object, axis: int, at: float = 0.0, keep: float = 1.0) -> Object:
    """What an object has on one side of the plane x = `at` (or y, z), and the mirror image of that.

    Faces are cut at the plane, so a closed surface stays closed.  With nothing on that side, the other
    counts.  Not normalised.

    Args:
        keep: 1 for the side of larger coordinates, -1 for the other.
    """
    v = thing.vertices.astype(np.float64)
    height = (v[:, axis] - at) * (keep if ((v[:, axis] - at) * keep).max() > 0.0 else -keep)
    inside = (height >= 0.0)[thing.faces]
    count = inside.sum(axis=1)
    one, two = np.flatnonzero(count == 1), np.flatnonzero(count == 2)

    def turned_to(rows: NDArray[np.intp], alone: NDArray[np.bool_]) -> NDArray[np.intp]:
        """Faces (R, 3), turned so that the corner that is alone on its side comes first."""
        order = (alone[rows].argmax(axis=1)[:, None] + np.arange(3)) % 3
        return np.take_along_axis(thing.faces[rows], order, axis=1)

    a, b = turned_to(one, inside), turned_to(two, ~inside)
    # Every cut edge gives a vertex of its own, from a corner inside to one outside.
    edges = np.concatenate([a[:, [0, 1]], a[:, [0, 2]], b[:, [1, 0]], b[:, [2, 0]]])
    share = (height[edges[:, 0]] / (height[edges[:, 0]] - height[edges[:, 1]]))[:, None]
    stays = height >= 0.0
    number = np.cumsum(stays) - 1
    cuts = int(stays.sum()) + np.arange(len(edges))
    a1, a2, b1, b2 = np.split(cuts, np.cumsum([len(a), len(a), len(b)]))
    faces = np.concatenate(
        [
            number[thing.faces[count == 3]],
            np.stack([number[a[:, 0]], a1, a2], axis=1),
            np.stack([b1, number[b[:, 1]], number[b[:, 2]]], axis=1),
            np.stack([b1, number[b[:, 2]], b2], axis=1),
        ]
    ).astype(np.int32)
    material = thing.face_material[np.concatenate([np.flatnonzero(count == 3), one, two, two])]

    def with_cuts(values: NDArray[np.generic]) -> Array:
        new = values[edges[:, 0]] * (1.0 - share) + values[edges[:, 1]] * share
        return np.concatenate([values[stays].astype(np.float64), new])

    half = with_cuts(v)
    half[-len(edges) or len(half) :, axis] = at
    image = half.copy()
    image[:, axis] = 2.0 * at - image[:, axis]
    uv = None if thing.uv is None else with_cuts(thing.uv).astype(np.float32)
    color = None if thing.vertex_color is None else np.round(with_cuts(thing.vertex_color)).astype(np.uint8)
    return replace(
        thing,
        vertices=np.concatenate([half, image]).astype(np.float32),
        faces=np.concatenate([faces, faces[:, ::-1] + len(half)]).astype(np.int32),
        uv=None if uv is None else np.concatenate([uv, uv]),
        vertex_color=None if color is None else np.concatenate([color, color]),
        face_material=np.concatenate([material, material]),
    )


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
    height, width = thing.texture.shape[:2]
    tile = (0, 0, texture.shape[1], texture.shape[0])
    if thing.texture.shape[2] == 3 and all(m.tile in (None, (0, 0, width, height)) for m in thing.materials):
        materials = tuple(m if m.tile is None else replace(m, tile=tile) for m in thing.materials)
        return replace(thing, texture=np.ascontiguousarray(texture[..., :3]), materials=materials)
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(texture[..., :3])).resize(
        (width, height), Image.Resampling.BILINEAR, reducing_gap=2.0
    )
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
