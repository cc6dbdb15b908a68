"""Solids made from random numbers: plain ones, lathed, extruded, swept and blown ones, and frames of bars.

Each is a list of closed pieces, so that a table's top may have another colour than its legs.  Pure
functions of a `numpy.random.Generator`, of a few hundred to 3 000 faces.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import numpy as np

from train.objects import Material, Object
from train.surfaces import Array, Piece, ball, bar, box, extruded, lofted, revolved, swept
from uc3d_rt.views import BOUNDING_RADIUS

Generator = np.random.Generator

TWO_COLORS_SHARE = 0.5  # of solids of several pieces


def solid(rng: Generator) -> Object:
    """One of `KINDS` in one or two random colours, with texture coordinates (a flat projection)."""
    chances = np.array([chance for _, chance in KINDS], np.float64)
    make = KINDS[int(rng.choice(len(KINDS), p=chances / chances.sum()))][0]
    pieces = make(rng)
    colors = [Material(factor=random_factor(rng))]
    if len(pieces) > 1 and rng.random() < TWO_COLORS_SHARE:
        colors.append(Material(factor=random_factor(rng)))
    starts = np.cumsum([0] + [len(piece.vertices) for piece in pieces])
    vertices = np.concatenate([piece.vertices for piece in pieces])
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    vertices = (vertices - (low + high) / 2.0) / (high - low).max()
    across, _ = np.linalg.qr(rng.normal(size=(3, 2)))
    # As `normalized` does it, which would look for bad faces besides.
    radius = math.sqrt((vertices * vertices).sum(axis=1).max())
    return Object(
        name="solid",
        vertices=(vertices * (BOUNDING_RADIUS / radius)).astype(np.float32),
        faces=np.concatenate([p.faces + s for p, s in zip(pieces, starts, strict=False)]).astype(np.int32),
        uv=(vertices @ across + 0.5).astype(np.float32),
        texture=None,
        vertex_color=None,
        face_material=np.repeat(
            [min(k, len(colors) - 1) for k in range(len(pieces))], [len(p.faces) for p in pieces]
        ).astype(np.int32),
        materials=tuple(colors),
    )


def random_factor(rng: Generator) -> tuple[float, float, float]:
    """A base colour in linear light, dark ones as likely to the eye as light ones."""
    r, g, b = rng.uniform(0.1, 1.0, size=3) ** 2.2
    return float(r), float(g), float(b)


# Kinds


def _plain(rng: Generator) -> list[Piece]:
    kind, sections = int(rng.integers(6)), int(rng.integers(5, 33))
    if kind == 0:
        return [box((-0.5, -0.5, -0.5), (0.5, 0.5, 0.5))]
    if kind == 1:
        return [ball(int(rng.integers(1, 4)))]
    if kind == 2:
        return [swept(_circle(32), rng.uniform(0.12, 0.45), 12, closed=True)]
    if kind == 3:
        sections = int(rng.integers(3, 7))
    top = (0.5, 0.5, 0.5, 0.5, 1e-4, rng.uniform(0.1, 0.45))[kind]  # cylinder, prism, cone, frustum
    return [revolved(np.array([(0.5, -0.5), (top, 0.5)]), sections)]


def _superellipsoid(rng: Generator) -> list[Piece]:
    """From boxes with round edges over ellipsoids to octahedra."""
    one, two = rng.uniform(0.15, 2.0, size=2)
    rise = np.linspace(-np.pi / 2, np.pi / 2, 26)[1:-1]
    angle = 2.0 * np.pi * np.arange(40) / 40

    def bent(x: Array, power: float) -> Array:
        return np.sign(x) * np.abs(x) ** power

    level = bent(np.cos(rise), one)[:, None]
    x, z = level * bent(np.sin(angle), two), level * bent(np.cos(angle), two)
    return [lofted(np.stack([x, np.broadcast_to(bent(np.sin(rise), one)[:, None], x.shape), z], axis=-1))]


def _blob(rng: Generator) -> list[Piece]:
    """A ball swollen by a few low waves."""
    unit = ball(3)
    swell = np.zeros(len(unit.vertices))
    for _ in range(4):
        wave, phase = rng.normal(size=3) * rng.uniform(1.0, 2.5), rng.uniform(0.0, 2.0 * np.pi)
        swell += rng.uniform(0.05, 0.25) * np.sin(unit.vertices @ wave + phase)
    return [Piece(unit.vertices * np.exp(swell)[:, None], unit.faces)]


def _profile(rng: Generator, count: int) -> Array:
    """Radii (count,) between 0.15 and 1: smooth, or in steps."""
    knots = rng.uniform(0.15, 1.0, size=int(rng.integers(3, 7)))
    at = np.linspace(0.0, len(knots) - 1.0, count)
    if rng.random() < 0.3:
        return knots[np.round(at).astype(int)]
    near = at.astype(int).clip(max=len(knots) - 2)
    part = at - near
    part = part * part * (3.0 - 2.0 * part)
    return knots[near] * (1.0 - part) + knots[near + 1] * part


def _lathed(rng: Generator) -> list[Piece]:
    """A turned thing: baluster, bottle, spindle."""
    radius = _profile(rng, 28) * rng.uniform(0.3, 0.8)
    return [revolved(np.stack([radius, np.linspace(-1.0, 1.0, 28)], axis=1), int(rng.integers(6, 33)))]


def _vessel(rng: Generator) -> list[Piece]:
    """A bowl, cup or vase, hollow from above; or a pipe, open at both ends."""
    radius = _profile(rng, 16) * rng.uniform(0.4, 1.0)
    height = np.linspace(-1.0, 1.0, 16) * rng.uniform(0.4, 1.0)
    wall = rng.uniform(0.04, 0.12)
    outside = np.stack([radius, height], axis=1)
    inside = np.stack([np.maximum(radius - wall, 0.02), height], axis=1)[::-1]
    if rng.random() < 0.3:
        return [revolved(np.concatenate([outside, inside]), 24, closed=True)]
    inside[-1] = (inside[-1, 0], height[0] + wall)
    return [revolved(np.concatenate([outside, inside]), 24)]


def _outline(rng: Generator) -> Array:
    """(n, 2), all of it seen from the origin: polygons, stars, gears, lobes, and L, T and plus sections."""
    kind = int(rng.integers(5))
    if kind == 0:
        count = int(rng.integers(5, 12))
        angle = 2.0 * np.pi * (np.arange(count) + rng.uniform(-0.35, 0.35, size=count)) / count
        radius = rng.uniform(0.4, 1.0, size=count)
    elif kind == 1:
        count = 2 * int(rng.integers(3, 9))
        angle = 2.0 * np.pi * np.arange(count) / count
        radius = np.where(np.arange(count) % 2, rng.uniform(0.35, 0.75), 1.0)
    elif kind == 2:
        count = 4 * int(rng.integers(6, 15))
        angle = 2.0 * np.pi * np.arange(count) / count
        radius = np.where(np.arange(count) % 4 < 2, rng.uniform(0.7, 0.9), 1.0)
    elif kind == 3:
        angle = 2.0 * np.pi * np.arange(48) / 48
        radius = 1.0 + rng.uniform(0.1, 0.4) * np.cos(int(rng.integers(2, 7)) * angle)
    else:
        w = rng.uniform(0.15, 0.35)
        reach = np.where(rng.random(4) < 0.6, 1.0, w)  # arms along z, x, -z, -x
        a, b, c, d = reach
        return np.array([(a, -w), (a, w), (w, w), (w, b), (-w, b), (-w, w),
                         (-c, w), (-c, -w), (-w, -w), (-w, -d), (w, -d), (w, -w)])  # fmt: skip
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _extrusion(rng: Generator) -> list[Piece]:
    twist = rng.uniform(-1.5, 1.5) if rng.random() < 0.25 else 0.0
    taper = rng.uniform(0.3, 1.0) if rng.random() < 0.4 else 1.0
    return [extruded(_outline(rng), math.exp(rng.uniform(-1.8, 1.2)), twist, taper)]


def _circle(count: int) -> Array:
    angle = 2.0 * np.pi * np.arange(count) / count
    return np.stack([np.sin(angle), np.zeros(count), np.cos(angle)], axis=1)


def _tube(rng: Generator) -> list[Piece]:
    """A bent tube, an arch, a handle or a spring, thick or thin."""
    t, kind = np.linspace(0.0, 1.0, 40), int(rng.integers(3))
    if kind == 0:
        waves = sum(
            np.sin(np.pi * k * t[:, None] + rng.uniform(0, 2 * np.pi, size=3)) * rng.normal(size=3) / k
            for k in (1, 2, 3)
        )
        curve = waves + np.array([0.0, 2.5, 0.0]) * t[:, None]
    elif kind == 1:
        a = np.pi * rng.uniform(1.0, 1.7) * (t - 0.5)
        curve = np.stack([np.sin(a), np.cos(a) * rng.uniform(0.6, 1.6), np.zeros(40)], axis=1)
    else:
        t = np.linspace(0.0, 1.0, 90)
        a = 2.0 * np.pi * rng.uniform(1.5, 4.5) * t
        curve = np.stack([np.sin(a), rng.uniform(1.5, 3.0) * t, np.cos(a)], axis=1)
    radius = rng.uniform(0.08, 0.3) * np.linspace(1.0, rng.uniform(0.3, 1.0), len(t))
    return [swept(curve, radius, 8 if rng.random() < 0.7 else 4)]


def _frame(rng: Generator) -> list[Piece]:
    """The twelve edges of a box as bars, maybe with more along one axis: crates, scaffolds, lattices."""
    size, thick = rng.uniform(0.5, 1.0, size=3), rng.uniform(0.03, 0.09)
    between = np.array([0, 0, 0])
    between[int(rng.integers(3))] = int(rng.integers(0, 4))
    at = [np.linspace(-s, s, 2 + n) for s, n in zip(size, between, strict=True)]
    pieces = []
    for axis in range(3):
        u, v = (axis + 1) % 3, (axis + 2) % 3
        for a, b in product(at[u], at[v]):
            low, high = np.empty(3), np.empty(3)
            low[axis], high[axis] = -size[axis] - thick, size[axis] + thick
            low[u], high[u], low[v], high[v] = a - thick, a + thick, b - thick, b + thick
            pieces.append(box(tuple(low), tuple(high)))
    if rng.random() < 0.4:  # one wall or floor
        pieces.insert(0, box((-size[0], -size[1] - thick, -size[2]), (size[0], -size[1] + thick, size[2])))
    return pieces


def _table(rng: Generator) -> list[Piece]:
    """A slab on legs, maybe with a back (a chair) or shelves below."""
    x, z, leg = rng.uniform(0.4, 1.0), rng.uniform(0.4, 1.0), rng.uniform(0.03, 0.1)
    height, slab = rng.uniform(0.5, 1.5), rng.uniform(0.04, 0.15)
    inset, splay = leg + rng.uniform(0.0, 0.15), rng.uniform(0.0, 0.15) * (rng.random() < 0.4)
    pieces = [box((-x, height, -z), (x, height + slab, z))]
    sections = 4 if rng.random() < 0.6 else 10
    for sx, sz in product((-1.0, 1.0), repeat=2):
        top = np.array([sx * (x - inset), height + slab / 2, sz * (z - inset)])
        pieces.append(bar(top * (1.0 + splay, 0.0, 1.0 + splay), top, leg * 1.2, sections))
    if rng.random() < 0.4:
        pieces.append(box((-x, height, -z), (x, height + rng.uniform(0.6, 1.4), -z + max(slab, 0.07))))
    elif rng.random() < 0.5:
        for level in np.linspace(0.0, height, int(rng.integers(2, 5)))[:-1]:
            level += 0.05 * height
            pieces.append(box((inset - x, level, inset - z), (x - inset, level + slab, z - inset)))
    return pieces


def _open_box(rng: Generator) -> list[Piece]:
    """A tray, crate or shelf: a floor and walls, open above or in front, maybe with boards inside."""
    x, y, z = rng.uniform(0.4, 1.0, size=3)
    w = rng.uniform(0.03, 0.1)
    pieces = [
        box((-x, -y, -z), (x, -y + w, z)), box((-x, -y, -z), (-x + w, y, z)), box((x - w, -y, -z), (x, y, z)),
        box((-x, -y, -z), (x, y, -z + w)),
    ]  # fmt: skip
    if rng.random() < 0.5:
        pieces.append(box((-x, -y, z - w), (x, y, z)))
        return pieces
    pieces.append(box((-x, y - w, -z), (x, y, z)))
    for level in np.linspace(-y, y, int(rng.integers(2, 6)))[1:-1]:
        pieces.append(box((-x, level - w / 2, -z), (x, level + w / 2, z - w / 2)))
    return pieces


def _wheel(rng: Generator) -> list[Piece]:
    """A rim, a hub and spokes."""
    thick, width = rng.uniform(0.06, 0.25), rng.uniform(0.1, 0.4)
    ring = np.array([(1.0 - thick, -width), (1.0, -width), (1.0, width), (1.0 - thick, width)])
    hub = rng.uniform(0.12, 0.3)
    pieces = [revolved(ring, 32, closed=True), revolved(np.array([(hub, -width), (hub, width)]), 16)]
    count = int(rng.integers(3, 11))
    for a in 2.0 * np.pi * np.arange(count) / count:
        out = np.array([math.sin(a), 0.0, math.cos(a)])
        pieces.append(bar(out * hub * 0.5, out * (1.0 - thick / 2), rng.uniform(0.03, 0.08), 6))
    return pieces


def _stairs(rng: Generator) -> list[Piece]:
    """Steps, up to a wall or round a tower, or a stepped pyramid."""
    count, depth, rise = int(rng.integers(3, 8)), rng.uniform(0.15, 0.4), rng.uniform(0.1, 0.3)
    wide = rng.uniform(0.4, 1.2)
    if rng.random() < 0.4:
        return [
            box((-s, k * rise, -s * wide), (s, (k + 1.0) * rise, s * wide))
            for k, s in enumerate(np.linspace(1.0, 0.25, count))
        ]
    return [box((-wide, 0.0, -k * depth - depth), (wide, (k + 1.0) * rise, -k * depth)) for k in range(count)]


KINDS: tuple[tuple[Callable[[Generator], list[Piece]], float], ...] = (
    (_plain, 4.0), (_superellipsoid, 1.5), (_blob, 1.0), (_lathed, 1.5), (_vessel, 1.0), (_extrusion, 2.0),
    (_tube, 1.0), (_frame, 1.0), (_table, 1.0), (_open_box, 1.0), (_wheel, 0.7), (_stairs, 0.7),
)  # fmt: skip
"""Makers of solids, and how often each is drawn against the others."""
