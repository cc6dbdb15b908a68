"""Objects kept out of training, rendered once, to look at while training runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from train.metrics import normal_error_deg, psnr, silhouette_iou
from train.model import MultiviewModel
from train.presets import Preset
from train.sampling import sample_views
from train.sheets import contact_sheet, view_row
from train.truth import ground_truth
from uc3d_rt.contract import FOCAL_UNKNOWN
from uc3d_rt.preprocess import frame_object
from uc3d_rt.views import decode_normals


@dataclass(frozen=True)
class Watch:
    """Objects kept out of training, looked at while it runs."""

    picture: np.ndarray  # (n, H, W, 3) uint8, framed inputs
    focal: np.ndarray  # (n,)
    color: np.ndarray  # (n, 6, H, W, 3) in [0, 1]
    normal: np.ndarray  # (n, 6, H, W, 3) unit normals
    mask: np.ndarray  # (n, 6, H, W)


def watched(objects: Sequence[Path], device: str, image_px: int) -> Watch:
    """One random input view of each object and its six true views; focal lengths stay unknown."""
    samples = [ground_truth(path, device=device, image_px=image_px) for path in objects]
    normals, masks = zip(*(decode_normals(sample.normal / 255.0) for sample in samples), strict=True)
    return Watch(
        picture=np.stack([frame_object(sample.input_rgba, image_px) for sample in samples]),
        focal=np.full(len(samples), FOCAL_UNKNOWN, dtype=np.float32),
        color=np.stack([sample.color.astype(np.float32) / 255.0 for sample in samples]),
        normal=np.stack(normals),
        mask=np.stack(masks),
    )


def look(
    preset: Preset,
    weights: dict[str, Tensor],
    vae: torch.nn.Module,
    watch: Watch,
    path: Path,
    steps: int = 25,
) -> None:
    """Sample the watched objects with the averaged weights; write a sheet and print the figures."""
    device = next(vae.parameters()).device
    model = MultiviewModel(preset).to(device).eval()
    model.load_state_dict(weights)
    picture = torch.from_numpy(watch.picture).to(device).permute(0, 3, 1, 2).float() / 255.0
    focal = torch.from_numpy(watch.focal).to(device)
    for guidance in (1.0, preset.sampling.guidance):
        sampling = replace(preset.sampling, steps=steps, guidance=guidance)
        color, normal, mask = sample_views(model, vae, picture, focal, sampling)
        figures = {
            "psnr": np.mean([psnr(a, b) for a, b in zip(color, watch.color, strict=True)]),
            "iou": np.mean([silhouette_iou(a, b) for a, b in zip(mask, watch.mask, strict=True)]),
            "normal_deg": np.nanmean(
                [normal_error_deg(*pair) for pair in zip(normal, watch.normal, mask, watch.mask, strict=True)]
            ),
        }
        print(
            f"{path.stem} guidance {guidance}: " + " ".join(f"{k} {v:.3f}" for k, v in figures.items()),
            flush=True,
        )
    rows = [
        [view_row(color[i], normal[i]), view_row(watch.color[i], watch.normal[i])]
        for i in range(min(16, len(color)))
    ]
    contact_sheet(path, list(watch.picture[:16]), rows)
