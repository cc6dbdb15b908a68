"""Training variants, rendered from object files.

A variant is one object, turned, scaled and coloured at random, with its six target views and one or
more input views.  The random numbers of a variant depend on the seed, the object's name and the
variant's number alone, so the order of work and the number of workers change nothing.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.augment import (
    Variation,
    normalizing_placement,
    random_input_camera,
    random_light,
    random_variation,
    tight_window,
    yaw_matrix,
)
from train.framing import framed
from train.objects import Object, load_object
from train.render import TARGET_LIGHT, ImageTensors, Scene, View
from train.subjects import other_of, subject
from uc3d_rt.views import NUM_VIEWS, TARGET_CAMERAS

FloatArray = NDArray[np.float32]

IMAGE_PX = 256

INPUT_OVERSAMPLE = 1.125
"""Input views are rendered this much larger than the square they are framed into."""

INPUT_FILL = 0.95
"""Share of the rendered input that the object's longer side fills, so framing shrinks it by about a
fifth and never enlarges it."""

KEPT_OBJECTS = 128
"""Objects a process keeps in memory, to be parts of others' variants."""

MAX_ATTEMPTS = 8
"""Draws of a variant until its input views show something; a sheet can stand edge-on."""


@dataclass(frozen=True, eq=False)
class Variant:
    """One training sample."""

    color: Tensor  # (6, P, P, 3) uint8, on the render device
    normal: Tensor  # (6, P, P, 3) uint8, on the render device
    inputs: Tensor  # (M, P, P, 3) uint8, there too; framed as the runtime frames a picture
    focal: FloatArray  # (M,) f~; 0 is orthographic
    elevation_deg: FloatArray  # (M,)


@dataclass(frozen=True, eq=False)
class _Plan:
    """The views of one variant."""

    targets: tuple[View, ...]
    inputs: tuple[View, ...]


def variant_rng(seed: int, name: str, variant: int, attempt: int = 0) -> np.random.Generator:
    """The random numbers of one variant of the object of that name."""
    digest = hashlib.sha256(name.encode("utf-8")).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "little"), variant, attempt])


def render_variant(
    scene: Scene,
    rng: np.random.Generator,
    num_inputs: int,
    augment: bool = True,
    *,
    image_px: int = IMAGE_PX,
    samples: int = 2,
) -> Variant:
    """Draw and render one variant of the scene's object.

    Args:
        scene: the object on its device.
        rng: decides yaw, augmentation and input views.
        num_inputs: M input views.
        augment: False keeps the object's shape and colours; its yaw and input views stay random.
        image_px: side P of every image.

    Raises:
        ValueError: the input views show nothing, in `MAX_ATTEMPTS` draws.
    """
    for _attempt in range(MAX_ATTEMPTS):
        plan = _plan_variant(scene.object, rng, num_inputs, augment)
        pictures, seen = _framed([_inputs_of(scene, plan.inputs, image_px, samples)], image_px)
        if not all(seen):
            continue
        targets = scene.render_torch(plan.targets, image_px, samples)
        return _variant(targets.color, targets.normal, pictures, plan)
    raise ValueError(
        f"{scene.object.name} shows nothing in {MAX_ATTEMPTS} draws of its input views; "
        "it is too thin, remove it"
    )


def render_folder(
    objects: Sequence[Path],
    device: str = "cpu",
    variants: int = 12,
    inputs: int = 2,
    seed: int = 0,
    workers: int = 4,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    image_px: int = IMAGE_PX,
    samples: int = 2,
    augment: bool = True,
) -> Iterator[tuple[int, int, Variant]]:
    """Stream `variants` variants of every object, in order: `(object index, variant index, variant)`.

    Threads read objects and plan their views ahead; the device renders behind them.  With
    `augment`, many variants show the object reshaped, or with others of `objects` (`train.subjects`).

    Args:
        objects: files, as from `find_objects`.
        device: "cpu" or "cuda:0"; target images stay there.
        inputs: input views a variant.
        workers: threads for reading.
        on_progress: called with (objects done, objects in all).

    Raises:
        ValueError: an object file is unreadable, or too thin to be seen.
    """
    if not objects or variants < 1 or workers < 1:
        raise ValueError(
            "needs at least one object, variant and worker; "
            f"got {len(objects)} objects, {variants=}, {workers=}"
        )
    ahead = 2 * workers
    with ThreadPoolExecutor(workers) as readers:
        reading: deque[Future[list[_Group]]] = deque()
        try:
            for index in range(len(objects) + ahead):
                if index < len(objects):
                    job = readers.submit(_read_groups, objects, index, variants, inputs, seed, augment)
                    reading.append(job)
                if index < ahead - 1 or not reading:
                    continue
                done = index - ahead + 1
                groups = reading.popleft().result()
                rendered = _render_groups(groups, device, seed, inputs, augment, image_px, samples)
                for number in range(variants):
                    yield done, number, rendered[number]
                if on_progress is not None:
                    on_progress(done + 1, len(objects))
        finally:
            readers.shutdown(wait=False, cancel_futures=True)


def _plan_variant(obj: Object, rng: np.random.Generator, num_inputs: int, augment: bool) -> _Plan:
    if augment:
        variation = random_variation(obj.vertices, rng)
    else:
        placement = normalizing_placement(obj.vertices, yaw_matrix(rng.uniform(0.0, 360.0)))
        variation = Variation(placement, np.eye(3, dtype=np.float32), 1.0)
    shown = View(
        TARGET_CAMERAS[0],
        variation.object_to_world,
        TARGET_LIGHT,
        variation.color_matrix,
        variation.brightness,
    )
    targets = tuple(replace(shown, camera=camera) for camera in TARGET_CAMERAS)
    inputs = []
    for _ in range(num_inputs):
        camera = random_input_camera(rng)
        window = tight_window(obj.vertices, variation.object_to_world, camera, INPUT_FILL)
        inputs.append(replace(shown, camera=camera, light=random_light(rng, camera), window=window))
    return _Plan(targets, tuple(inputs))


@dataclass(frozen=True, eq=False)
class _Group:
    """Variants that share one object (or pair), and so one scene."""

    object: Object
    plans: tuple[tuple[int, _Plan], ...]  # (variant index, its views)


@lru_cache(KEPT_OBJECTS)
def _kept_object(path: Path) -> Object:
    return load_object(path)


def _read_groups(
    objects: Sequence[Path], index: int, variants: int, inputs: int, seed: int, augment: bool
) -> list[_Group]:
    obj = _kept_object(objects[index])
    other = other_of(len(objects), index, lambda number: _kept_object(objects[number]))
    groups: list[_Group] = []
    alone = []
    for variant in range(variants):
        rng = variant_rng(seed, obj.name, variant)
        shown = subject(obj, rng, other) if augment else obj
        plan = _plan_variant(shown, rng, inputs, augment)
        if shown is obj:
            alone.append((variant, plan))
        else:
            groups.append(_Group(shown, ((variant, plan),)))
    return [_Group(obj, tuple(alone)), *groups] if alone else groups


def _inputs_of(scene: Scene, views: Sequence[View], image_px: int, samples: int) -> ImageTensors | None:
    """Input views as rendered, larger than the square they are to be framed into; None of none."""
    if not views:
        return None
    return scene.render_torch(views, round(image_px * INPUT_OVERSAMPLE), samples, straight_alpha=True)


def _framed(rendered: Sequence[ImageTensors | None], image_px: int) -> tuple[Tensor, list[bool]]:
    """All of `_inputs_of` as pictures (N, P, P, 3), and of each whether it shows anything."""
    images = [some for some in rendered if some is not None]
    if not images:
        return torch.empty((0, image_px, image_px, 3), dtype=torch.uint8), []
    together = ImageTensors(
        torch.cat([some.color for some in images]),
        torch.cat([some.normal for some in images]),
        torch.cat([some.alpha for some in images]),
    )
    return framed(together, image_px)


def _render_groups(
    groups: Sequence[_Group],
    device: str,
    seed: int,
    num_inputs: int,
    augment: bool,
    image_px: int,
    samples: int,
) -> dict[int, Variant]:
    """The variants of one object's groups by their number.

    All are rendered before the first is looked at, and framed as one: a GPU is waited for once.
    """
    plans = [plan for group in groups for plan in group.plans]
    targets, inputs = [], []
    for group in groups:
        with Scene(group.object, device) as scene:
            shown = [view for _, plan in group.plans for view in plan.targets]
            targets.append(scene.render_torch(shown, image_px, samples))
            shown = [view for _, plan in group.plans for view in plan.inputs]
            inputs.append(_inputs_of(scene, shown, image_px, samples))
    color, normal = torch.cat([shot.color for shot in targets]), torch.cat([shot.normal for shot in targets])
    pictures, seen = _framed(inputs, image_px)
    rendered, unseen = dict[int, Variant](), set[int]()
    for k, (number, plan) in enumerate(plans):
        own, six = slice(k * num_inputs, (k + 1) * num_inputs), slice(k * NUM_VIEWS, (k + 1) * NUM_VIEWS)
        if all(seen[own]):
            rendered[number] = _variant(color[six], normal[six], pictures[own], plan)
        else:
            unseen.add(number)
    for group in groups:  # draw those again, from numbers of their own
        for number in unseen & {number for number, _ in group.plans}:
            rng = variant_rng(seed, group.object.name, number, attempt=1)
            with Scene(group.object, device) as scene:
                rendered[number] = render_variant(
                    scene, rng, num_inputs, augment, image_px=image_px, samples=samples
                )
    return rendered


def _variant(color: Tensor, normal: Tensor, inputs: Tensor, plan: _Plan) -> Variant:
    return Variant(
        color=color,
        normal=normal,
        inputs=inputs,
        focal=np.array([view.camera.normalized_focal for view in plan.inputs], np.float32),
        elevation_deg=np.array([view.camera.elevation_deg for view in plan.inputs], np.float32),
    )
