"""Evaluation samples: an object as its file has it, one input picture, and the true six views."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from train.augment import normalizing_placement, random_input_camera, random_light, tight_window, yaw_matrix
from train.dataset import IMAGE_PX, variant_rng
from train.objects import Object, load_object
from train.render import Light, Scene, View
from uc3d_rt.views import TARGET_CAMERAS, Camera

ByteArray = NDArray[np.uint8]
FloatArray = NDArray[np.float32]

INPUT_PX = 512
SAMPLES = 3  # along each side of a pixel


@dataclass(frozen=True, eq=False)
class EvalSample:
    """An object as it is, its six target views, and one input picture."""

    input_rgba: ByteArray  # (H, W, 4), straight alpha
    focal_mm: float | None  # None is orthographic
    elevation_deg: float
    yaw_deg: float  # the object's front stands at this azimuth
    color: ByteArray  # (6, P, P, 3)
    normal: ByteArray  # (6, P, P, 3)
    object_to_world: FloatArray  # (3, 4)


def ground_truth(
    path: Path,
    camera_seed: int = 0,
    *,
    device: str = "cpu",
    image_px: int = IMAGE_PX,
    input_px: int = INPUT_PX,
    samples: int = SAMPLES,
) -> EvalSample:
    """An object as its file has it, seen from a random azimuth that `camera_seed` and its name decide.

    Raises:
        ValueError: the file is unreadable.
    """
    obj = load_object(path)
    rng = variant_rng(camera_seed, obj.name, 0)
    yaw = float(rng.uniform(0.0, 360.0))
    camera = random_input_camera(rng)
    light = plain_light(rng, camera)
    return seen_from(
        obj, yaw, camera, light, device=device, image_px=image_px, input_px=input_px, samples=samples
    )


def plain_light(rng: np.random.Generator, camera: Camera) -> Light:
    """A random light that changes no hue and no exposure."""
    return replace(random_light(rng, camera), tint=(1.0, 1.0, 1.0), exposure=1.0)


def seen_from(
    obj: Object,
    yaw_deg: float,
    camera: Camera,
    light: Light,
    *,
    device: str = "cpu",
    image_px: int = IMAGE_PX,
    input_px: int = INPUT_PX,
    samples: int = SAMPLES,
) -> EvalSample:
    """The sample of an object that is turned by `yaw_deg` under an input camera of azimuth 0.

    Args:
        light: of the input picture, in the world's frame, which is the input camera's.
    """
    placement = normalizing_placement(obj.vertices, yaw_matrix(yaw_deg))
    window = tight_window(obj.vertices, placement, camera, fill=0.9)
    with Scene(obj, device) as scene:
        targets = scene.render([View(c, placement) for c in TARGET_CAMERAS], image_px, samples)
        view = View(camera, placement, light, window=window)
        picture = scene.render([view], input_px, samples, straight_alpha=True)
    return EvalSample(
        input_rgba=np.concatenate([picture.color[0], picture.alpha[0, ..., None]], axis=-1),
        focal_mm=camera.focal_mm,
        elevation_deg=camera.elevation_deg,
        yaw_deg=yaw_deg,
        color=targets.color,
        normal=targets.normal,
        object_to_world=placement,
    )
