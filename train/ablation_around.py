"""Table 6 of an ablation: objects kept aside, each shown from inputs all around (see `train.viewpoint`)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from train.ablation_report import AROUND_FIGURES, Figures
from train.baselines import FloatArray, ViewPair
from train.metrics import normal_error_deg, psnr, silhouette, silhouette_iou
from train.model import MultiviewModel
from train.objects import load_object
from train.sampling import sample_views
from train.truth import EvalSample
from train.viewpoint import mean_and_spread, samples_around, view_agreement
from uc3d_rt.contract import FOCAL_UNKNOWN, SamplingDefaults
from uc3d_rt.errors import ImageError
from uc3d_rt.preprocess import frame_object
from uc3d_rt.views import decode_normals


@dataclass(frozen=True, eq=False)
class Around:
    """One object seen by N inputs, evenly spaced."""

    picture: NDArray[np.uint8]  # (N, H, W, 3), framed
    placements: tuple[FloatArray, ...]  # object_to_world (3, 4) of each input
    truth: tuple[ViewPair, ...]  # the true six views of each input


def seen_around(objects: Sequence[Path], count: int, device: str, image_px: int) -> list[Around]:
    """Each object from `count` azimuths at elevation 0, as `python -m train evaluate --protocol viewpoint`.

    Objects that are too thin to be seen from one of them are left out.

    Raises:
        ValueError: a file is unreadable, or all objects are too thin.
    """
    seen = []
    for path in objects:
        samples = list(samples_around(load_object(path), 0, count, image_px, device))
        with suppress(ImageError):
            seen.append(_framed(samples, image_px))
    if not seen:
        raise ValueError(f"each of {len(objects)} objects is too thin to be seen from all around; give more")
    return seen


def _framed(samples: Sequence[EvalSample], image_px: int) -> Around:
    return Around(
        picture=np.stack([frame_object(sample.input_rgba, image_px) for sample in samples]),
        placements=tuple(sample.object_to_world for sample in samples),
        truth=tuple(
            (sample.color.astype(np.float32) / np.float32(255.0), decode_normals(sample.normal / 255.0)[0])
            for sample in samples
        ),
    )


def around_figures(
    model: MultiviewModel, vae: torch.nn.Module, around: Around, sampling: SamplingDefaults
) -> Figures:
    """How far a model's views of one object depend on the input; names of `AROUND_FIGURES`."""
    device = next(vae.parameters()).device
    picture = torch.from_numpy(around.picture).to(device).permute(0, 3, 1, 2).float() / 255.0
    focal = torch.full((len(picture),), FOCAL_UNKNOWN, device=device)
    color, normal, _ = sample_views(model, vae, picture, focal, sampling)
    return figures_of(list(zip(color, normal, strict=True)), around)


def figures_of(views: Sequence[ViewPair], around: Around) -> Figures:
    """The figures of one object's views, one pair of every input; the truth's own say what is possible."""
    against = [_figures(pair, truth) for pair, truth in zip(views, around.truth, strict=True)]
    mean, spread = mean_and_spread(against)
    agreement = view_agreement(views, around.placements, _figures)
    parts = {"around": mean, "spread": spread, "agree": agreement}
    found: Figures = {f"{part}_{name}": value for part, row in parts.items() for name, value in row.items()}
    return {figure.name: found.get(figure.name) for figure in AROUND_FIGURES}


def _figures(pair: ViewPair, truth: ViewPair) -> dict[str, float]:
    mask, true_mask = silhouette(pair[1]), silhouette(truth[1])
    return {
        "psnr": psnr(pair[0], truth[0]),
        "silhouette_iou": silhouette_iou(mask, true_mask),
        "normal_deg": normal_error_deg(pair[1], truth[1], mask, true_mask),
    }
