"""Which sampler settings suit a checkpoint: a table over guidance, its interval and its rescaling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from train.checkpoint import load_vae, load_weights, preset_of
from train.metrics import normal_error_deg, psnr, silhouette_iou
from train.model import MultiviewModel
from train.sampling import sample_views
from train.trainer import Watch

SETTINGS: tuple[tuple[int, float, tuple[float, float], float], ...] = (
    (50, 1.0, (0.0, 1.0), 0.0),
    (50, 1.5, (0.0, 1.0), 0.0),
    (50, 3.0, (0.0, 1.0), 0.0),
    (50, 3.0, (0.0, 1.0), 0.7),
    (50, 3.0, (0.0, 1.0), 1.0),
    (50, 3.0, (0.0, 0.3), 0.0),
    (50, 3.0, (0.0, 0.5), 0.0),
    (50, 3.0, (0.0, 0.7), 0.0),
    (50, 3.0, (0.2, 0.5), 0.0),
    (50, 3.0, (0.2, 0.7), 0.0),
    (50, 3.0, (0.0, 0.7), 0.7),
    (50, 2.0, (0.0, 0.5), 0.0),
    (20, 3.0, (0.0, 0.5), 0.0),
    (10, 1.0, (0.0, 1.0), 0.0),
    (4, 1.0, (0.0, 1.0), 0.0),
    (1, 1.0, (0.0, 1.0), 0.0),
)
"""(steps, guidance, interval, rescale)."""


def sweep(
    checkpoint: Path,
    watch: Watch,
    device: str,
    settings: Sequence[tuple[int, float, tuple[float, float], float]] = SETTINGS,
) -> str:
    """Sample the watched objects with every setting; returns a Markdown table."""
    preset = preset_of(checkpoint)
    model = MultiviewModel(preset).to(device).eval()
    load_weights(model, checkpoint / "ema.safetensors", "give the folder of a checkpoint")
    vae = load_vae(checkpoint, preset).to(device)
    picture = torch.from_numpy(watch.picture).to(device).permute(0, 3, 1, 2).float() / 255.0
    focal = torch.from_numpy(watch.focal).to(device)
    lines = [
        "| steps | guidance | interval | rescale | PSNR | IoU | normals ° |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for steps, guidance, interval, rescale in settings:
        color, normal, mask = sample_views(
            model,
            vae,
            picture,
            focal,
            steps=steps,
            guidance=guidance,
            guidance_interval=interval,
            guidance_rescale=rescale,
        )
        p = np.mean([psnr(a, b) for a, b in zip(color, watch.color, strict=True)])
        iou = np.mean([silhouette_iou(a, b) for a, b in zip(mask, watch.mask, strict=True)])
        pairs = zip(normal, watch.normal, mask, watch.mask, strict=True)
        angle = np.nanmean([normal_error_deg(*pair) for pair in pairs])
        lines.append(f"| {steps} | {guidance} | {interval} | {rescale} | {p:.2f} | {iou:.3f} | {angle:.1f} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)
