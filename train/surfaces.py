"""Closed surfaces from rings of points: what `train.solids` is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Piece:
    """A closed surface, wound outwards."""

    vertices: Array  # (V, 3)
    faces: NDArray[np.int64]  # (F, 3)


def box(low: tuple[float, float, float], high: tuple[float, float, float]) -> Piece:
    """The box between two corners."""
    corners = np.array(list(product(*zip(low, high, strict=True))), np.float64)
    return Piece(corners, _BOX_FACES)


_BOX_FACES = np.array(
    [(0, 1, 3), (0, 3, 2), (4, 6, 7), (4, 7, 5), (0, 4, 5), (0, 5, 1),
     (2, 3, 7), (2, 7, 6), (0, 2, 6), (0, 6, 4), (1, 5, 7), (1, 7, 3)]
)  # fmt: skip


def lofted(rings: Array, *, closed: bool = False) -> Piece:
    """A skin over rings (R, S, 3) of S points, which turn to the left seen against the way they advance.

    Its ends are fans about the rings' means; `closed` joins the last ring to the first instead.
    """
    r, s = rings.shape[:2]
    vertices = rings.reshape(-1, 3)
    if not closed:
        vertices = np.concatenate([vertices, rings[[0, -1]].mean(axis=1)])
    return Piece(vertices, _skin(r, s, closed))


@lru_cache(1024)
def _skin(r: int, s: int, closed: bool) -> NDArray[np.int64]:
    """Faces over r rings of s points."""
    number = np.arange(r * s).reshape(r, s)
    lower, upper = (number, np.roll(number, -1, axis=0)) if closed else (number[:-1], number[1:])
    right_lower, right_upper = np.roll(lower, -1, axis=1), np.roll(upper, -1, axis=1)
    quads = [
        np.stack([lower, right_lower, right_upper], axis=-1),
        np.stack([lower, right_upper, upper], axis=-1),
    ]
    faces = [quad.reshape(-1, 3) for quad in quads]
    if not closed:
        first, last = number[0], number[-1]
        faces.append(np.stack([np.roll(first, -1), first, np.full(s, r * s)], axis=-1))
        faces.append(np.stack([last, np.roll(last, -1), np.full(s, r * s + 1)], axis=-1))
    return np.concatenate(faces)


def revolved(profile: Array, sections: int, *, closed: bool = False) -> Piece:
    """A profile (n, 2: radius, height), going up, about +Y; a closed one (anticlockwise) makes a ring."""
    angle = 2.0 * np.pi * np.arange(sections) / sections
    circle = np.stack([np.sin(angle), np.zeros(sections), np.cos(angle)], axis=1)
    up = np.array([0.0, 1.0, 0.0])
    return lofted(profile[:, :1, None] * circle + profile[:, 1:, None] * up, closed=closed)


def extruded(outline: Array, height: float, twist: float = 0.0, taper: float = 1.0) -> Piece:
    """An outline (n, 2: z, x), anticlockwise about a point from which all of it is seen, along +Y."""
    steps = np.linspace(0.0, 1.0, 2 if twist == 0.0 else 12)
    rings = []
    for t in steps:
        a, size = twist * t, 1.0 + (taper - 1.0) * t
        z = (outline[:, 0] * math.cos(a) - outline[:, 1] * math.sin(a)) * size
        x = (outline[:, 0] * math.sin(a) + outline[:, 1] * math.cos(a)) * size
        rings.append(np.stack([x, np.full(len(x), height * (t - 0.5)), z], axis=1))
    return lofted(np.array(rings))


def swept(curve: Array, radius: Array | float, sections: int, *, closed: bool = False) -> Piece:
    """A tube of radius (n,) along a curve (n, 3), with frames carried along it without twist."""
    forward = np.roll(curve, -1, axis=0) - np.roll(curve, 1, axis=0)
    if not closed:
        forward[0], forward[-1] = curve[1] - curve[0], curve[-1] - curve[-2]
    forward /= np.linalg.norm(forward, axis=1, keepdims=True)
    side = np.cross(forward[0], np.eye(3)[np.argmin(np.abs(forward[0]))])
    sides = []
    for direction in forward:
        side = side - direction * (side @ direction)
        side = side / np.linalg.norm(side)
        sides.append(side)
    across = np.array(sides)
    if closed:  # what the frame has turned on its way round is given back along the way
        last = across[-1] - forward[0] * (across[-1] @ forward[0])
        turn = math.atan2(np.cross(last, across[0]) @ forward[0], last @ across[0])
        a = np.linspace(0.0, turn, len(curve))[:, None]
        across = across * np.cos(a) + np.cross(forward, across) * np.sin(a)
    over = np.cross(forward, across)
    angle = 2.0 * np.pi * (np.arange(sections) + 0.5) / sections
    spokes = (
        across[:, None] * np.cos(angle)[None, :, None] + over[:, None] * np.sin(angle)[None, :, None]
    )  # (n, sections, 3)
    return lofted(curve[:, None] + spokes * np.reshape(radius, (-1, 1, 1)), closed=closed)


def bar(start: Array, end: Array, radius: float, sections: int = 4) -> Piece:
    """A straight strut; `swept` of two points, many times as fast."""
    x, y, z = (end - start) / math.sqrt(((end - start) ** 2).sum())
    size = math.hypot(x, y) if abs(z) < 0.7 else math.hypot(y, z)
    across = np.array((-y, x, 0.0) if abs(z) < 0.7 else (0.0, -z, y)) / size
    over = np.array(
        (y * across[2] - z * across[1], z * across[0] - x * across[2], x * across[1] - y * across[0])
    )
    angle = 2.0 * np.pi * (np.arange(sections) + 0.5) / sections
    ring = radius * (np.cos(angle)[:, None] * across + np.sin(angle)[:, None] * over)
    return lofted(np.array([start + ring, end + ring]))


@lru_cache(4)
def ball(subdivisions: int) -> Piece:
    """The unit ball; not to be written to."""
    from trimesh import creation

    mesh = creation.icosphere(subdivisions=subdivisions, radius=1.0)
    return Piece(np.array(mesh.vertices, np.float64), np.array(mesh.faces, np.int64))
